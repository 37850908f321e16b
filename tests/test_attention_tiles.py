"""Attention in tiles equals dense attention under the mask, for every mask and layout; and what the tables cost."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenopt import ops  # noqa: F401  (registers the operations)
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
    Routed,
    Stripe,
    on,
    per_head,
    permuted,
)
from tokenopt.attention.pattern import Refused, box_tilings
from tokenopt.attention.tiles import Tiles, absent_keys, additive, reference_mask, tile, tile_as

HEADS = 2
pytestmark = pytest.mark.usefixtures("small_tiles")


def layout(*grid: int, before: int = 0, text: int = 0, causal: bool = False) -> Layout:
    """A grid with class tokens before and text behind."""
    count = prod(grid)
    segments = (("cls", 0, before), ("patch", before, count), ("text", before + count, text))
    return Layout(before + count + text, before, grid, segments, HEADS, 8, causal)


def operands(where: Layout, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(batch, where.heads, where.total, d, dtype=torch.float64).to(dtype) for d in (8, 8, 5)]


def dense(pattern: Mask, where: Layout, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax over what the mask lets a query see, and over zero keys beyond the border, written out in float64."""
    q, k, v = q.double(), k.double(), v.double()
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype is torch.bool else logits + bias
    weight = logits.exp() * reference_mask(pattern, where)
    total = weight.sum(-1)
    absent = absent_keys(pattern, where)
    total = total if absent is None else total + absent  # exp(0) each
    return weight / total[..., None] @ v


def tiled(tables: Tiles, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **more: Tensor) -> Tensor:
    given = {n: t.to(q.dtype) if t.is_floating_point() else t for n, t in tables.lowered().tensors.items()}
    if bias is not None:
        everything = torch.arange(tables.layout.total)[None, None]
        cut = torch.ops.tokenopt.tile_bias
        parts = {"mask": cut(bias, tables.queries, tables.keys),
                 "row_mask": cut(bias, tables.rows[None, None], everything).squeeze(2)}  # fmt: skip
        given |= {name: (given.get(name, 0) + part).to(q.dtype) for name, part in parts.items()}
    return torch.ops.tokenopt.tiled_attention(q, k, v, **given, **more)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


# -- every mask on every layout ----------------------------------------------------------------------------------------

LINES: list[Mask] = [
    Full(), Nothing(), Neighborhood(3), Neighborhood(8, causal=True) | Global(first=2), Neighborhood(4, stride=3),
    Neighborhood(3, dilation=2), Neighborhood(5, border="truncate"), Neighborhood(5, border="zero"), Band(3),
    BlockMap(12, tuple((i, 0) for i in range(5))),
    per_head([Neighborhood(3), Neighborhood(9)]), per_head([Neighborhood(5, border="zero"), Full()]),
]  # fmt: skip
PLANES: list[Mask] = [
    Full(), Nothing(), Neighborhood(3), Neighborhood((2, 5)), Neighborhood(3, stride=(2, 3)), Neighborhood(4, stride=4),
    Neighborhood((3, 2), dilation=(1, 3)), Neighborhood(3, causal=(True, False)), Neighborhood(3, border="truncate"),
    Neighborhood(5, border="zero"), Neighborhood(6, stride=4, border="zero"), Stripe(rows=1), Stripe(cols=2),
    Stripe(rows=1) | Stripe(cols=1), per_head([Stripe(rows=1), Stripe(cols=1)]),
    per_head([Neighborhood(3) | Global(first=1), permuted("diagonal", Neighborhood(7))]), Band(2, axis=0),
    Band(5, decay=0, step=2), Global(first=3) | Nothing(), Concentric(), Concentric(inward=False),
    Permuted(Neighborhood(4, stride=4), roll=2), permuted((1, 0), Neighborhood(9), flat=True),
    permuted("diagonal", Neighborhood(5)), Neighborhood(5) & Stripe(rows=4),
    per_head([Neighborhood(3, border="zero"), Stripe(rows=2)]),
]  # fmt: skip
VOLUMES: list[Mask] = [
    Neighborhood(3), Neighborhood((2, 3, 3), stride=(2, 1, 1)), Neighborhood((1, 3, 5), causal=(True, False, False)),
    Neighborhood((2, 2, 2), dilation=(1, 2, 2)), Stripe(rows=2), Band(4, decay=0), Global(first=1) | Band(0, axis=0),
    Neighborhood(3, border="zero"), per_head([Band(0, axis=0), permuted((2, 1, 0), Stripe(cols=1))]),
]  # fmt: skip
LAYOUTS = {
    "line": (LINES, layout(53)), "line, prefix": (LINES, layout(50, before=3)),
    "line, causal": (LINES, layout(49, text=2, causal=True)), "plane": (PLANES, layout(8, 8)),
    "plane, odd": (PLANES, layout(7, 9, before=1)), "plane, text": (PLANES, layout(5, 11, before=2, text=6)),
    "plane, causal": (PLANES, layout(6, 7, before=1, text=3, causal=True)), "volume": (VOLUMES, layout(3, 5, 6)),
    "volume, text": (VOLUMES, layout(4, 3, 5, before=1, text=4)),
}  # fmt: skip
CASES = [pytest.param(mask, where, id=f"{name}-{mask}"[:70]) for name, (masks, where) in LAYOUTS.items()
         for mask in masks]  # fmt: skip


@pytest.mark.parametrize(("pattern", "where"), CASES)
def test_tiles_equal_dense_masked_attention(pattern: Mask, where: Layout) -> None:
    if where.causal and "zero" in repr(pattern):
        with pytest.raises(Refused, match="before the first"):
            tile(pattern, where)
        return
    tables = tile(pattern, where)
    q, k, v = operands(where)
    close(tiled(tables, q, k, v), dense(pattern, where, q, k, v))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        low = [t.to(dtype) for t in (q, k, v)]
        close(tiled(tables, *low), dense(pattern, where, *low), tolerance)
    same = tile_as(Full(), where, tables.queries)
    everything = Layout(where.total, where.start, where.grid, where.segments, HEADS, 8)
    if not where.causal:
        assert same.mask is None and same.row_mask is None
        everything = where
    causal = None if not where.causal else torch.ones(where.total, where.total, dtype=torch.bool).tril()
    close(tiled(same, q, k, v), dense(Full(), everything, q, k, v, causal))
    check(tables, pattern)


def check(tables: Tiles, pattern: Mask) -> None:
    """The tables and what they say of themselves, by counting."""
    where, mask = tables.layout, reference_mask(pattern, tables.layout)
    heads, tiles, queries = tables.queries.shape
    n, grid = where.total, set(range(where.start, where.start + where.count))
    assert tables.seen == pytest.approx(int(mask.sum()) / len(mask))
    assert tables.ideal == pytest.approx(n * n * len(mask) / int(mask.sum()))
    assert tables.visited == tiles * queries * tables.keys.shape[-1] + (n - where.count) * n
    assert tables.tile == pytest.approx(n * n / tables.visited)
    assert tables.rows.tolist() == [i for i in range(n) if i not in grid]
    widest = 0
    for head, (of_queries, of_keys) in enumerate(zip(tables.queries, tables.keys, strict=True)):
        assert set(of_queries.flatten().tolist()) == grid
        places = [*of_queries.flatten().tolist(), *tables.rows.tolist()]
        assert [places[i] for i in tables.order[head]] == list(range(n))
        for t, (some, keys) in enumerate(zip(of_queries, of_keys, strict=True)):
            union = mask[head % len(mask)][some].any(0).nonzero().flatten().tolist()
            assert set(union) == set(keys.tolist()) and keys[: len(union)].tolist() == union
            widest = max(widest, len(union))
            if tables.mask is not None:
                assert torch.equal(tables.mask[head, t].sum(1), mask[head % len(mask)][some].sum(1))
    assert tables.keys.shape[-1] == widest


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_neighbourhoods_in_tiles(data: st.DataObject) -> None:
    draw = data.draw
    grid = draw(st.lists(st.integers(2, 9), min_size=1, max_size=3).filter(lambda g: prod(g) <= 150))
    windows = tuple(draw(st.integers(2, n)) for n in grid)
    strides = tuple(draw(st.integers(1, w)) for w in windows)
    dilations = tuple(draw(st.integers(1, n // w)) for n, w in zip(grid, windows, strict=True))
    causal = tuple(draw(st.booleans()) for _ in grid)
    pattern: Mask = Neighborhood(windows, strides, dilations, causal, draw(st.sampled_from(["shift", "truncate"])))
    pattern = draw(st.sampled_from([pattern, pattern | Global(first=2), per_head([pattern, Full()])]))
    where = layout(*grid, before=draw(st.integers(0, 2)), text=draw(st.integers(0, 2)), causal=draw(st.booleans()))
    tables = tile(pattern, where)
    q, k, v = operands(where, batch=1)
    close(tiled(tables, q, k, v), dense(pattern, where, q, k, v))
    check(tables, pattern)


@pytest.mark.parametrize("grid", [(17,), (5, 7), (3, 4, 5)], ids=str)
def test_a_window_as_large_as_the_grid_is_dense_attention(grid: tuple[int, ...]) -> None:
    where = layout(*grid, before=1, text=2)
    q, k, v = operands(where)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    tables = tile(Neighborhood(grid), where)
    assert tables.ideal == 1 and tables.mask is None
    close(tiled(tables, q, k, v), plain)


# -- biases ------------------------------------------------------------------------------------------------------------

BIASED = [Neighborhood(3), per_head([Stripe(rows=1), Stripe(cols=1)]), Neighborhood(5, border="zero"),
          on("text", "patch", Nothing()) & Neighborhood((4, 5), stride=2), Full()]  # fmt: skip
SHAPES = {"full": (2, 2, 0, 0), "head": (1, 2, 0, 0), "batch": (2, 1, 0, 0), "one": (1, 1, 0, 0), "rank 3": (2, 0, 0),
          "rank 2": (0, 0), "keys": (2, 1, 1, 0), "keys of heads": (1, 2, 1, 0)}  # fmt: skip


@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("pattern", BIASED, ids=lambda p: repr(p)[:30])
def test_a_bias_is_cut_along_the_tiles(pattern: Mask, shape: tuple[int, ...], boolean: bool) -> None:
    where = layout(5, 6, before=1, text=3)
    shape = tuple(s or where.total for s in shape)
    q, k, v = operands(where)
    bias = torch.randn(shape, dtype=torch.float64)
    if boolean:
        bias = (bias > -0.8).logical_or(torch.arange(where.total) % 5 == 0)  # every window has a key that is seen
        bias = bias.logical_or(torch.eye(where.total, dtype=torch.bool)) if shape[-2] > 1 else bias
        seen = reference_mask(pattern, where) & bias
        assert seen.any(-1).all()
    close(tiled(tile(pattern, where), q, k, v, bias), dense(pattern, where, q, k, v, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_windows_of_padding_are_finite(dtype: torch.dtype) -> None:
    """Their queries are padding, too; all others see what they saw."""
    where = layout(20)
    real = torch.arange(20) < 14
    q, k, v = operands(where, dtype=dtype)
    for bias in (real[None, None, None], torch.zeros(1, 1, 1, 20).masked_fill(~real, -torch.inf)):
        found = tiled(tile(Neighborhood(3), where), q, k, v, bias)
        last = torch.full((1, 1, 1), 19)
        assert found.isfinite().all() and torch.ops.tokenopt.tile_bias(bias, last, last).isfinite().all()
        tolerance = 1e-5 if dtype is torch.float32 else 1e-2
        close(found[:, :, :14], dense(Neighborhood(3), where, q, k, v, bias)[:, :, :14], tolerance)


@pytest.mark.parametrize("pattern", BIASED, ids=lambda p: repr(p)[:30])
def test_a_key_bias_joins_the_tables(pattern: Mask) -> None:
    where = layout(5, 6, before=1, text=3)
    q, k, v = operands(where)
    sizes = torch.randint(1, 5, (2, where.total)).double().log()
    bias = torch.randn(2, HEADS, where.total, where.total, dtype=torch.float64)
    columns = sizes[:, None, None]
    close(tiled(tile(pattern, where), q, k, v, key_bias=sizes), dense(pattern, where, q, k, v, columns))
    close(tiled(tile(pattern, where), q, k, v, bias, key_bias=sizes), dense(pattern, where, q, k, v, columns + bias))


def test_heads_that_differ_only_in_what_other_tokens_see() -> None:
    where = layout(4, 4, before=1)
    pattern = per_head([on("cls", "patch", Nothing()) & Neighborhood(3), Neighborhood(3)])
    q, k, v = operands(where)
    close(tiled(tile(pattern, where), q, k, v), dense(pattern, where, q, k, v))


def test_neighborhood_attention_is_its_tables() -> None:
    """The operation that kernels know by its sizes computes what its tables say."""
    where = layout(6, 7, before=1)
    lowered = Neighborhood(3, stride=(1, 2), dilation=(2, 1)).lower(where)
    assert lowered.op == "neighborhood_attention"
    assert lowered.settings == {"start": 1, "grid": [6, 7], "window": [3, 3], "stride": [1, 2], "dilation": [2, 1],
                                "causal": [False, False]}  # fmt: skip
    q, k, v = operands(where)
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in lowered.tensors.items()}
    found = torch.ops.tokenopt.neighborhood_attention(q, k, v, **tensors, **lowered.settings)
    close(found, dense(Neighborhood(3, stride=(1, 2), dilation=(2, 1)), where, q, k, v))
    for other in (Neighborhood(3, border="truncate").lower(where), (Neighborhood(3) | Global(first=1)).lower(where),
                  Neighborhood(3).lower(layout(6, 7, causal=True))):  # fmt: skip
        assert other.op == "tiled_attention" and not other.settings


# -- what the tables cost ----------------------------------------------------------------------------------------------


def test_tiles_of_known_patterns() -> None:
    blocks = tile(Neighborhood(8, stride=8), Layout.of(16, 16))
    assert blocks.mask is None and blocks.tile == blocks.ideal == 4 and blocks.queries.shape == (1, 4, 64)
    rows = tile(Stripe(rows=4), Layout.of(32, 32))
    assert rows.mask is None and rows.tile == rows.ideal == 8
    heads = tile(per_head([Stripe(rows=4), Stripe(cols=4)]), Layout.of(32, 32, heads=2))
    assert heads.mask is None and heads.tile == heads.ideal == 8
    diagonal = tile(permuted("diagonal", Neighborhood(64, stride=64)), Layout.of(16, 16))
    assert diagonal.mask is None and diagonal.tile == diagonal.ideal == 4
    swin = tile(Permuted(Neighborhood(8, stride=8), roll=4), Layout.of(16, 16))
    assert swin.keys.shape == (1, 4, 64) and swin.tile == 4 and swin.ideal > 4
    halo = tile_as(Neighborhood(7), Layout.of(32, 32), next(box_tilings((32, 32)))[None])
    assert halo.queries.shape == (1, 16, 64) and halo.keys.shape[-1] == 14 * 14
    assert halo.ideal == pytest.approx(1024 / 49) and halo.tile == pytest.approx(1024 / 196)


def test_the_tiling_with_the_least_predicted_cost_is_taken() -> None:
    where = Layout.of(12, 20)
    for pattern in (Neighborhood(3), Neighborhood(5, stride=2), Neighborhood(3, dilation=2), Stripe(rows=3),
                    Band(2, axis=0), permuted((1, 0), Neighborhood(30), flat=True)):  # fmt: skip
        speeds = [tile_as(pattern, where, queries[None]).predicted for queries in pattern.tilings(where)]
        assert tile(pattern, where).predicted == pytest.approx(max(speeds))
        for queries in pattern.tilings(where):
            assert set(queries.flatten().tolist()) == set(range(240))


@pytest.mark.parametrize(("total", "block"), [(20, 32), (100, 32), (200, 64), (1000, 256), (4096, 256)])
def test_dense_attention_that_is_causal_skips_what_no_block_sees(total: int, block: int) -> None:
    """A block of queries is computed up to its last query, as torch does on a CPU."""
    where = Layout(total, 0, (total,), causal=True, skips=True)
    assert where.dense == sum(min((i // block + 1) * block, total) for i in range(total))
    assert replace(where, skips=False).dense == total * total


def test_the_gain_of_a_causal_pattern_is_over_what_dense_attention_computes() -> None:
    line = Layout(768, 0, (768,), causal=True)
    for pattern in (Full(), Neighborhood(64, causal=True), Routed(128, topk=8, key_block=32, flat=True)):
        masked, told = pattern.lower(line), pattern.lower(replace(line, skips=True))
        for name in ("ideal", "tile", "predicted"):
            assert getattr(told, name) / getattr(masked, name) == pytest.approx((768 + 256) / 2 / 768)


def test_a_query_without_keys_is_refused() -> None:
    holes = BlockMap(8, ((0,), ()))
    for pattern in (holes, Band(0, axis=0) & Global(first=1), per_head([Full(), holes])):
        with pytest.raises(Refused, match="no key at all"):
            tile(pattern, Layout.of(4, 4, heads=2))
    tile(Global(first=1), Layout(16, 0, (4, 4), causal=True))  # the first token is before all others


def test_masks_are_additive() -> None:
    assert additive(torch.tensor([True, False])).tolist() == [0.0, float("-inf")]
