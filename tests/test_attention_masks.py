"""Attention masks: neighbourhoods as NATTEN defines them, every pattern against loops, the algebra, and its text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenopt.attention import (
    Band,
    BlockMap,
    Concentric,
    Full,
    Global,
    Layout,
    Mask,
    Neighborhood,
    Nothing,
    Permuted,
    Stripe,
    on,
    parse,
    per_head,
    permuted,
)
from tokenopt.attention.pattern import Refused
from tokenopt.attention.tiles import absent_keys, reference_mask
from tokenopt.errors import UsageError

Place = tuple[int, ...]


def mask(pattern: Mask, layout: Layout) -> Tensor:
    """bool [N, N] of a pattern that is the same for all heads."""
    (found,) = reference_mask(pattern, layout)
    return found


def by_loops(grid: Place, sees: Callable[[Place, Place], bool]) -> Tensor:
    """bool [N, N] by a predicate on the coordinates of a query and a key."""
    places = list(product(*map(range, grid)))
    return torch.tensor([[sees(q, k) for k in places] for q in places])


# -- neighbourhoods ----------------------------------------------------------------------------------------------------


def sees(q: int, k: int, n: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """One axis of NATTEN's reference kernel (csrc/include/natten/cuda/reference/mask.hpp)."""
    group, j = q % dilation, q // dilation
    if k % dilation != group:
        return False
    m = k // dilation
    length = n // dilation + (group < n % dilation)
    left, right = window // 2, window // 2 - 1 + window % 2
    if causal:
        leader = min(j // stride * stride + stride - 1, length - 1)
        return max(leader - (window - 1), 0) <= m <= j
    leader = min(j // stride * stride + stride // 2, length - 1)
    start = max(leader - left, 0)
    if leader + right >= length:
        start += length - right - leader - 1
    return start <= m < start + window


def expected(grid: Place, queries: Tensor, window: Any, stride: Any, dilation: Any, causal: Any) -> Tensor:
    """bool [Q, N]: all axes see."""
    found = torch.ones(len(queries), prod(grid), dtype=torch.bool)
    each = lambda v: v if isinstance(v, tuple) else (v,) * len(grid)  # noqa: E731
    keys, step = torch.arange(prod(grid)), prod(grid)
    for n, *axis in zip(grid, each(window), each(stride), each(dilation), each(causal), strict=True):
        step //= n
        table = torch.tensor([[sees(q, k, n, *axis) for k in range(n)] for q in range(n)])
        found &= table[queries // step % n][:, keys // step % n]
    return found


GOLDEN = {  # (length, window, stride, dilation, causal): first and last key of each query
    (8, 3, 1, 1, False): [(0, 2), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7), (5, 7)],
    (8, 4, 1, 1, False): [(0, 3), (0, 3), (0, 3), (1, 4), (2, 5), (3, 6), (4, 7), (4, 7)],
    (8, 4, 2, 1, False): [(0, 3), (0, 3), (1, 4), (1, 4), (3, 6), (3, 6), (4, 7), (4, 7)],
    (8, 4, 4, 1, False): [(0, 3)] * 4 + [(4, 7)] * 4,
    (8, 4, 1, 1, True): [(0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (3, 6), (4, 7)],
    (8, 4, 2, 1, True): [(0, 0), (0, 1), (0, 2), (0, 3), (2, 4), (2, 5), (4, 6), (4, 7)],
    (9, 3, 1, 2, False): [(0, 4), (1, 5), (0, 4), (1, 5), (2, 6), (3, 7), (4, 8), (3, 7), (4, 8)],
    (7, 3, 3, 1, False): [(0, 2)] * 3 + [(3, 5)] * 3 + [(4, 6)],
}


@pytest.mark.parametrize("row", GOLDEN, ids=str)
def test_published_rows(row: tuple[Any, ...]) -> None:
    length, window, stride, dilation, causal = row
    keys = [set(range(first, last + 1, dilation)) for first, last in GOLDEN[row]]
    found = mask(Neighborhood(window, stride, dilation, causal), Layout.of(length))
    assert [set(r.nonzero().flatten().tolist()) for r in found] == keys


NATTEN = [  # shape, window, stride, dilation, of tests/test_fna.py
    ((256,), 255, 82, 1), ((128,), 63, 31, 1), ((128,), 3, 2, 5), ((128,), 8, 7, 5), ((128,), 3, 2, 10),
    ((125,), 15, 1, 1), ((256,), 3, 2, 10), ((5, 25), (5, 16), (1, 16), 1), ((84, 19), (7, 3), 1, (5, 1)),
    ((19, 29), (8, 8), 1, (2, 3)), ((67, 80), (12, 7), (8, 4), (5, 11)), ((33, 33), (24, 16), 1, 1),
    ((44, 80), (9, 10), 1, 1), ((28, 40), (17, 31), 1, 1), ((36, 40), (36, 40), (12, 13), 1),
    ((32, 10, 10), (7, 3, 3), (5, 1, 1), (1, 2, 3)), ((8, 8, 16), (3, 3, 3), (2, 1, 2), (2, 2, 4)),
    ((18, 37, 12), (14, 16, 12), (12, 8, 1), (1, 2, 1)), ((13, 11, 9), (3, 4, 3), (2, 3, 3), (3, 2, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("grid", "window", "stride", "dilation"), NATTEN, ids=str)
def test_published_shapes(grid: Place, window: Any, stride: Any, dilation: Any) -> None:
    """All causal combinations; a sample of the queries of large grids."""
    layout = Layout.of(*grid)
    queries = torch.arange(layout.total) if layout.total <= 600 else torch.randperm(layout.total)[:200]
    for causal in product((False, True), repeat=len(grid)):
        pattern = Neighborhood(window, stride, dilation, causal)
        pattern.check(layout)
        found = pattern.visible(layout.at(queries), layout.tokens())
        assert torch.equal(found, expected(grid, queries, window, stride, dilation, causal)), causal
        if not any(causal):
            assert set(found.sum(1).tolist()) == {prod(window) if isinstance(window, tuple) else window}


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int, int, bool]:
    """Length, window, stride, dilation and causality of an axis, as NATTEN allows."""
    n = draw(st.integers(2, 12))
    window = draw(st.integers(2, n))
    return n, window, draw(st.integers(1, window)), draw(st.integers(1, n // window)), draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(st.lists(axes(), min_size=1, max_size=3).filter(lambda a: prod(x[0] for x in a) <= 400))
def test_random_neighbourhoods(found: list[tuple[int, int, int, int, bool]]) -> None:
    grid, *given = map(tuple, zip(*found, strict=True))
    layout = Layout.of(*grid)
    assert torch.equal(mask(Neighborhood(*given), layout), expected(grid, torch.arange(layout.total), *given))


def test_an_axis_shorter_than_the_window_is_seen_whole() -> None:
    short = mask(Neighborhood(5), Layout.of(3, 9))
    assert torch.equal(short, mask(Neighborhood((3, 5)), Layout.of(3, 9)))
    assert mask(Neighborhood(9, stride=9), Layout.of(4, 4)).all()


def test_a_window_may_be_a_share_of_each_axis() -> None:
    layout = Layout.of(10, 20)
    assert torch.equal(mask(Neighborhood(0.3), layout), mask(Neighborhood((3, 6)), layout))
    assert torch.equal(mask(Neighborhood(0.4, dilation=2), layout), mask(Neighborhood((2, 4), dilation=2), layout))
    assert torch.equal(mask(Neighborhood(0.01), layout), mask(Neighborhood(1), layout))
    assert torch.equal(mask(Neighborhood(0.01, stride=4), layout), mask(Neighborhood(4, stride=4), layout)), "no gaps"
    assert mask(Neighborhood(1.0), layout).all()
    assert Neighborhood(7, stride=7).at(0.2) == Neighborhood(0.2, stride=0.2), "blocks stay blocks"
    with pytest.raises(UsageError, match="not a share of an axis"):
        Neighborhood(1.5)


@settings(max_examples=60, deadline=None)
@given(axes(), st.sampled_from(["truncate", "zero"]), st.booleans())
def test_windows_that_do_not_shift(axis: tuple[int, int, int, int, bool], border: str, large: bool) -> None:
    """The window of the middle query of a stride lies around it; the grid cuts it off, or zeros are beyond."""
    n, window, stride, dilation, _ = axis
    window += n * large
    layout = Layout.of(n)

    def around(q: int) -> list[int]:
        leader = q // dilation // stride * stride + stride // 2
        first = leader - window // 2
        return [m * dilation + q % dilation for m in range(first, first + window)]

    pattern = Neighborhood(window, stride, dilation, border=border)
    assert torch.equal(mask(pattern, layout), by_loops((n,), lambda q, k: k[0] in around(q[0])))
    beyond = [sum(not 0 <= k < n for k in around(q)) for q in range(n)]
    absent = absent_keys(pattern, layout)
    assert (absent is None) if border == "truncate" else (absent.tolist() == [beyond])


@pytest.mark.parametrize(("block", "halo", "grid"), [(4, 1, (8, 12)), (4, 2, (12, 8)), (3, 1, (9, 9))])
def test_halonet(block: int, halo: int, grid: Place) -> None:
    """Blocks of queries see their block and a halo around it; HaloNet pads the image with zeros."""
    inside = lambda q, k: q // block * block - halo <= k < q // block * block + block + halo  # noqa: E731
    cut = by_loops(grid, lambda q, k: all(map(inside, q, k)))
    zero = Neighborhood(block + 2 * halo, stride=block, border="zero")
    assert torch.equal(mask(Neighborhood(block + 2 * halo, stride=block, border="truncate"), Layout.of(*grid)), cut)
    assert torch.equal(mask(zero, Layout.of(*grid)), cut)
    assert torch.equal(absent_keys(zero, Layout.of(*grid))[0], (block + 2 * halo) ** 2 - cut.sum(1))


# -- the other patterns ------------------------------------------------------------------------------------------------


def ring(place: Place, grid: Place) -> int:
    return min(min(c, n - 1 - c) for c, n in zip(place, grid, strict=True))


def number(place: Place, grid: Place) -> int:
    found = 0
    for c, n in zip(place, grid, strict=True):
        found = found * n + c
    return found


BLOCKS = ((0, 2), (1,), (0, 1, 2, 3), (3, 0))
PREDICATES: list[tuple[Mask, Place, Callable[[Place, Place], bool]]] = [
    (Full(), (3, 4), lambda q, k: True),
    (Nothing(), (3, 4), lambda q, k: q == k),
    (Stripe(rows=2), (5, 4), lambda q, k: q[0] // 2 == k[0] // 2),
    (Stripe(cols=3), (4, 7), lambda q, k: q[1] // 3 == k[1] // 3),
    (Stripe(rows=2), (3, 4, 4), lambda q, k: q[1] // 2 == k[1] // 2),
    (Stripe(cols=1), (2, 3, 4), lambda q, k: q[2] == k[2]),
    (Band(2), (9,), lambda q, k: abs(q[0] - k[0]) <= 2),
    (Band(1, axis=0), (5, 4), lambda q, k: abs(q[0] - k[0]) <= 1),
    (Band(8, decay=0), (5, 12), lambda q, k: abs(q[1] - k[1]) <= 8 // 2 ** abs(q[0] - k[0])),
    (Band(5, axis=1, decay=0, step=2), (6, 9), lambda q, k: abs(q[1] - k[1]) <= 5 // 2 ** (abs(q[0] - k[0]) // 2)),
    (Band(4, decay=0), (40, 5), lambda q, k: abs(q[1] - k[1]) <= 4 >> abs(q[0] - k[0])),
    (Global(first=3), (2, 5), lambda q, k: number(k, (2, 5)) < 3),
    (Global("patch"), (2, 5), lambda q, k: True),
    (BlockMap(4, BLOCKS), (3, 5), lambda q, k: number(k, (3, 5)) // 4 in BLOCKS[number(q, (3, 5)) // 4]),
    (Concentric(), (6, 7), lambda q, k: ring(k, (6, 7)) <= ring(q, (6, 7))),
    (Concentric(inward=False), (5, 4), lambda q, k: ring(k, (5, 4)) >= ring(q, (5, 4))),
]


@pytest.mark.parametrize(("pattern", "grid", "predicate"), PREDICATES,
                         ids=lambda v: "loops" if callable(v) else repr(v)[:40])  # fmt: skip
def test_masks_equal_loops(pattern: Mask, grid: Place, predicate: Callable[[Place, Place], bool]) -> None:
    found = by_loops(grid, predicate)
    assert torch.equal(mask(pattern, Layout.of(*grid)), found)
    count = prod(grid)
    around = Layout(count + 5, 2, grid, (("cls", 0, 1), ("registers", 1, 1), ("patch", 2, count),
                                         ("text", count + 2, 3)))  # fmt: skip
    whole = torch.ones(count + 5, count + 5, dtype=torch.bool)
    whole[2:-3, 2:-3] = found
    assert torch.equal(mask(pattern, around), whole), "tokens around the grid see and are seen"
    causal = Layout(count + 5, 2, grid, around.segments, causal=True)
    assert torch.equal(mask(pattern, causal), whole.tril())


# -- the algebra -------------------------------------------------------------------------------------------------------

GRID = (4, 6)
AROUND = Layout(28, 1, GRID, (("cls", 0, 1), ("patch", 1, 24), ("text", 25, 3)), heads=8)
MASKS = st.recursive(
    st.sampled_from([
        Full(), Nothing(), Neighborhood(3), Neighborhood((2, 4), stride=2), Neighborhood(2, dilation=2),
        Neighborhood(3, causal=(True, False)), Neighborhood(5, border="truncate"), Stripe(rows=1), Stripe(cols=2),
        Band(1), Band(3, axis=0, decay=1, step=2), Global(first=2), Global("cls"), Concentric(),
        BlockMap(8, ((0, 1), (1,), (2, 0))), permuted("diagonal", Neighborhood(5)),
        permuted((1, 0), Neighborhood(5), flat=True), Permuted(Neighborhood(2, stride=2), roll=(1, 0)),
        on("patch", "patch", Stripe(rows=2)), on("text", "patch", Nothing()),
    ]),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a | b, inner, inner), st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: per_head([a, b]), inner, inner), st.builds(lambda p: per_head([p]), inner),
    ),
    max_leaves=3,
)  # fmt: skip


def heads(pattern: Mask) -> Tensor:
    """bool [8, N, N]."""
    return reference_mask(pattern, AROUND).expand(8, -1, -1)


def same(a: Mask, b: Mask) -> bool:
    return torch.equal(heads(a), heads(b))


@settings(max_examples=25, deadline=None)
@given(MASKS, MASKS, MASKS)
def test_masks_are_a_lattice(a: Mask, b: Mask, c: Mask) -> None:
    assert torch.equal(heads(a | b), heads(a) | heads(b)) and torch.equal(heads(a & b), heads(a) & heads(b))
    assert heads(a | Full()).all() and same(a & Full(), a) and same(a | a, a) and same(a & a, a)
    assert same(a | b, b | a) and same(a & b, b & a) and same((a | b) | c, a | (b | c)) and same(a | (a & b), a)
    assert same(a & (b | c), (a & b) | (a & c)) and same(a | (b & c), (a | b) & (a | c))


@settings(max_examples=60, deadline=None)
@given(MASKS)
def test_text_is_read_back(pattern: Mask) -> None:
    assert parse(repr(pattern)) == pattern and hash(parse(repr(pattern))) == hash(pattern)
    assert parse(pattern) is pattern


@settings(max_examples=25, deadline=None)
@given(MASKS, st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_a_larger_share_sees_as_much(pattern: Mask, a: float, b: float) -> None:
    """Those around windows keep what they are; a pattern without a window has no share."""
    less, more = (pattern.at(share) for share in sorted((a, b)))
    assert (less is None) == ("Neighborhood" not in repr(pattern))
    if less is not None and "stride" not in repr(pattern):  # blocks of other sizes have other borders
        assert (heads(more) | ~heads(less)).all()
        assert parse(repr(less)) == less


def test_heads_have_patterns_of_their_own() -> None:
    layout = Layout.of(4, 6, heads=4)
    rows, cols = Stripe(rows=1), Stripe(cols=1)
    found = reference_mask(per_head([rows, cols]) | Global(first=1), layout)
    both = [mask(p | Global(first=1), layout) for p in (rows, rows, cols, cols)]
    assert torch.equal(found, torch.stack(both))
    nested = reference_mask(per_head([per_head([rows, cols]), Full()]), layout)
    assert torch.equal(nested, torch.stack([mask(p, layout) for p in (rows, cols, Full(), Full())]))
    with pytest.raises(Refused, match="4 heads cannot be shared by 3 patterns"):
        reference_mask(per_head([rows, cols, rows]), layout)
    with pytest.raises(UsageError, match="needs a pattern"):
        per_head([])


@pytest.mark.parametrize("wrap", [lambda p: p | Nothing(), lambda p: Nothing() | p, lambda p: p & Full(),
                                  lambda p: on("patch", "patch", p), lambda p: permuted((1, 0), p)])  # fmt: skip
def test_one_head_may_have_a_pattern_of_its_own(wrap: Callable[[Mask], Mask]) -> None:
    layout = Layout.of(4, 4)
    assert torch.equal(mask(wrap(per_head([Stripe(rows=1)])), layout), mask(wrap(Stripe(rows=1)), layout))


def test_on_is_for_pairs_of_segments() -> None:
    patch, everything = heads(Neighborhood(3)), torch.ones(8, 28, 28, dtype=torch.bool)
    assert torch.equal(heads(on("patch", "patch", Neighborhood(3))), patch)
    blind = everything.clone()
    blind[:, 25:, 1:25] = False
    assert torch.equal(heads(on("text", "patch", Nothing())), blind)
    assert torch.equal(heads(on("text", "patch", Nothing()) & Neighborhood(3)), blind & patch)
    with pytest.raises(Refused, match="no segment 'audio'"):
        heads(on("audio", "patch", Nothing()))
    with pytest.raises(Refused, match="is on a grid, and 'text' is not"):
        heads(on("text", "patch", Neighborhood(3)))


def test_permuted_axes() -> None:
    layout = Layout.of(4, 6)
    assert torch.equal(mask(permuted((1, 0), Stripe(rows=2)), layout), mask(Stripe(cols=2), layout))
    assert torch.equal(mask(permuted((1, 0), Neighborhood((3, 5))), layout), mask(Neighborhood((5, 3)), layout))
    video = Layout.of(2, 4, 5)
    assert torch.equal(mask(permuted((2, 0, 1), Neighborhood((5, 1, 3))), video), mask(Neighborhood((1, 3, 5)), video))
    with pytest.raises(Refused, match="the grid has 2 axes"):
        mask(permuted((0, 1, 2), Full()), layout)


def orders(grid: Place) -> dict[Any, list[Place]]:
    """The places of a grid one behind another."""
    places = list(product(*map(range, grid)))
    return {(): places, (1, 0): sorted(places, key=lambda p: p[::-1]),
            "diagonal": sorted(places, key=lambda p: (sum(p), p[0]))}  # fmt: skip


@pytest.mark.parametrize("grid", [(4, 6), (7, 3), (1, 5)])
@pytest.mark.parametrize("order", [(), (1, 0), "diagonal"], ids=str)
def test_one_axis_in_another_order(order: Any, grid: Place) -> None:
    place = {p: i for i, p in enumerate(orders(grid)[order])}
    line = mask(Neighborhood(5), Layout.of(prod(grid)))
    found = mask(Permuted(Neighborhood(5), axes=order, flat=True), Layout.of(*grid))
    assert torch.equal(found, by_loops(grid, lambda q, k: bool(line[place[q], place[k]])))


@pytest.mark.parametrize(("grid", "window", "shift"), [((8, 8), 4, 2), ((6, 9), 3, 1), ((8, 4), 4, 3)])
def test_shifted_windows_of_swin(grid: Place, window: int, shift: int) -> None:
    """Roll, cut into windows, and mask those pairs in a window that were no neighbours: Swin's own attention mask."""
    number = torch.arange(prod(grid)).reshape(grid).roll((-shift, -shift), (0, 1))
    region = torch.zeros(grid)
    for i, rows in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
        for j, columns in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
            region[rows, columns] = 3 * i + j
    cut = lambda x: x.unfold(0, window, window).unfold(1, window, window).flatten(2).flatten(0, 1)  # noqa: E731
    swin = torch.zeros(prod(grid), prod(grid), dtype=torch.bool)
    for tokens, regions in zip(cut(number), cut(region), strict=True):
        swin[tokens[:, None], tokens] = regions[:, None] == regions
    windows = Neighborhood(window, stride=window)
    for roll in (shift, (shift, shift), shift + window * grid[0] * grid[1], -prod(grid) + shift):
        assert torch.equal(mask(Permuted(windows, roll=roll), Layout.of(*grid)), swin), roll
    assert torch.equal(mask(Permuted(Full() & windows, roll=shift), Layout.of(*grid)), swin)


def test_what_is_rolled_knows_its_segments() -> None:
    layout = Layout(17, 1, (4, 4), (("cls", 0, 1), ("patch", 1, 16)))
    assert mask(Permuted(Global("patch") | Nothing(), axes=(1, 0)), layout).all()
    first = mask(Permuted(Global(first=1) | Nothing(), roll=(1, 0)), layout)
    wrapped = by_loops((4, 4), lambda q, k: q == k or (k == (1, 0) and q[0] >= 1))
    assert torch.equal(first[1:, 1:], wrapped)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "grid", "why"),
    [
        (Neighborhood((3, 3)), (9,), "the grid has 1 axes"),
        (Neighborhood(3, dilation=9), (4, 4), "longer than an axis"),
        (Neighborhood(3, stride=4), (9, 9), "leaves gaps"),
        (Neighborhood(3, causal=True, border="zero"), (9,), "before the first"),
        (Neighborhood(3, border="zero") | Global(first=1), (9,), "no mask"),
        (Permuted(Neighborhood(3, border="zero"), roll=1), (9,), "no mask"),
        (Stripe(rows=1), (9,), "two axes"),
        (Concentric(), (9,), "two axes"),
        (Band(1, axis=2), (4, 4), "no axis 2"),
        (Band(1, decay=-3), (4, 4), "no axis -3"),
        (Global("audio"), (4, 4), "no segment"),
        (BlockMap(8, ((0,),)), (4, 4), "2 blocks"),
        (BlockMap(8, ((0,), (2,))), (4, 4), "2 blocks"),
        (permuted("diagonal", Full()), (4,), "two axes"),
        (Permuted(Full(), roll=(1, 2, 3)), (4, 4), "2 axes"),
    ],
    ids=repr,
)
def test_what_means_nothing_on_a_grid_is_refused(pattern: Mask, grid: Place, why: str) -> None:
    with pytest.raises(Refused, match=why) as found:
        reference_mask(pattern, Layout.of(*grid))
    assert found.value.hint


def test_zero_keys_in_causal_attention_are_refused() -> None:
    with pytest.raises(Refused, match="before the first"):
        reference_mask(Neighborhood(3, border="zero"), Layout(9, 0, (9,), causal=True))


HOSTILE = [
    "", "Neighborhood", "Neighborhood(", "neighborhood(7)", "print(1)", "__import__('os')", "parse('Full()')", "Mask()",
    "Pattern()", "_Pair(Full(), Full())", "Or(Full(), Full())", "Full().lower", "Full().allows(1, 2)", "Full.__class__",
    "Full()()", "Full()[0]", "(lambda: Full())()", "[Full() for _ in (1,)]", "Full() if 1 else Full()", "x := Full()",
    "Full(); Full()", "Full() + Full()", "Full() | 1", "not Full()", "~Full()", "Full() == Full()", "3", "'Full()'",
    "(Full(), Full())", "None", "Neighborhood(x)", "Neighborhood(9**9**9)", "Neighborhood(1 << 99)",
    "Neighborhood(2*3)", "Neighborhood(*(3,))", "Neighborhood(**{'window': 3})",
    "Neighborhood(3, 1, 1, False, 'shift', 5)",
    "Neighborhood(size=3)", "Neighborhood()", "Neighborhood(0)", "Neighborhood(-3)", "Neighborhood(3.5)",
    "Neighborhood('3')", "Neighborhood(True)", "Neighborhood((3, 'x'))", "Neighborhood(3, causal='yes')",
    "Neighborhood(3, border='wrap')", "Neighborhood({3})", "Neighborhood(f'{3}')", "Neighborhood(b'3')",
    "Neighborhood(99999999999999999999)", "Neighborhood(" + "9" * 5000 + ")", "Stripe()", "Stripe(rows=1, cols=1)",
    "Stripe(rows=-1, cols=2)", "Stripe(rows='1')", "Band('x')", "Band(-1)", "Band(4, decay=0, step=0)",
    "Band(1, axis=None)", "Global(5)", "Global(first='x')", "BlockMap(0, ((0,),))", "BlockMap(4, 3)",
    "BlockMap(4, (('a',),))", "per_head(5)", "per_head([1, 2])", "per_head([])",
    "per_head(Full())", "on(1, 2, Full())", "on('cls', 'patch', 3)",
    "on('cls')", "permuted(5, Full())", "permuted((0.5,), Full())", "Permuted(Full(), roll='a')",
    "Full()\x00", "(" * 500 + "Full()" + ")" * 500, "-" * 50000 + "1", "|".join(["Full()"] * 5000),
    "per_head([" * 90 + "Full()" + "])" * 90,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: t[:30].replace("\x00", "0"))
def test_hostile_text_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


@pytest.mark.parametrize("value", [5, None, ["Full()"], {"window": 3}, Full], ids=str)
def test_what_is_no_text_is_a_usage_error(value: Any) -> None:
    with pytest.raises(UsageError):
        parse(value)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="()[],|&*=.'\" 0123456789abFullNeighborhdper_ad\n\\", max_size=40))
def test_random_text_is_a_pattern_or_a_usage_error(text: str) -> None:
    try:
        parse(text)
    except UsageError:
        pass
