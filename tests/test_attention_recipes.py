"""Attention recipes against the papers' own ways of computing them, written independently, on whole models."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenopt import optimize
from tokenopt.attention import AttentionRecipe, Layout, Neighborhood, Pattern, parse
from tokenopt.attention.paro import choose
from tokenopt.attention.pattern import Refused
from tokenopt.errors import UsageError
from tokenopt.recipes import attention as recipes
from tokenopt.small_models import small_model


def attend(pattern: Pattern, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A pattern by the operation it is lowered to."""
    lowered = pattern.lower(layout)
    return getattr(torch.ops.tokenopt, lowered.op)(q, k, v, **lowered.tensors, **lowered.settings)


def qkv(total: int, heads: int = 2, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, heads, total, dim) for _ in range(3))


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def layer(recipe: AttentionRecipe, number: int) -> Pattern:
    found = recipe.pattern_at(number, 12)
    assert found is not None
    return found


# -- windows -----------------------------------------------------------------------------------------------------------


def natten_axis(length: int, window: int, stride: int, dilation: int) -> Tensor:
    """bool [length, length] for one axis, by loops over the definition in the papers."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        group = list(range(q % dilation, length, dilation))
        place = group.index(q)
        leader = min(place // stride * stride + stride // 2, len(group) - 1)
        left, right = window // 2, window // 2 - (1 - window % 2)
        centre = max(left, min(leader, len(group) - 1 - right))
        for k in range(centre - left, centre + right + 1):
            mask[q, group[k]] = True
    return mask


@pytest.mark.parametrize("name, number", [("NAT", 0), ("DINAT", 0), ("DINAT", 1), ("GNA", 0)])
def test_windows_as_natten_defines_them(name: str, number: int) -> None:
    pattern = layer(getattr(recipes, name), number)
    rows, columns = 14, 16
    axes = [natten_axis(n, pattern.window, pattern.stride, pattern.dilation) for n in (rows, columns)]
    mask = (axes[0][:, None, :, None] & axes[1][None, :, None, :]).reshape(rows * columns, -1)
    assert mask.sum(-1).unique().tolist() == [pattern.window**2]
    q, k, v = qkv(rows * columns)
    torch.testing.assert_close(attend(pattern, Layout.of(rows, columns, heads=2), q, k, v), masked(q, k, v, mask))


def swin(q: Tensor, k: Tensor, v: Tensor, side: int, window: int, shift: int) -> Tensor:
    """Window partition with a cyclic shift, and the mask of the regions that it brings together."""

    def partition(x: Tensor) -> Tensor:
        x = torch.roll(x.unflatten(2, (side, side)), (-shift, -shift), (2, 3))
        x = x.unflatten(3, (-1, window)).unflatten(2, (-1, window)).transpose(3, 4)
        return x.flatten(4, 5).flatten(2, 3)

    region = torch.zeros(1, 1, side, side)
    count = 0
    parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None)) if shift else (slice(None),)
    for rows in parts:
        for columns in parts:
            region[..., rows, columns] = count
            count += 1
    ids = region.unflatten(3, (-1, window)).unflatten(2, (-1, window)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    mask = torch.where(ids[..., :, None] == ids[..., None, :], 0.0, -100.0)
    out = F.scaled_dot_product_attention(*map(partition, (q, k, v)), attn_mask=mask)
    grid = out.unflatten(3, (window, window)).unflatten(2, (side // window, -1)).transpose(3, 4)
    return torch.roll(grid.flatten(4, 5).flatten(2, 3), (shift, shift), (2, 3)).flatten(2, 3)


@pytest.mark.parametrize("number, shift", [(0, 0), (1, 3)])
def test_swin(number: int, shift: int) -> None:
    q, k, v = qkv(14 * 14)
    expected = swin(q, k, v, 14, 7, shift)
    torch.testing.assert_close(attend(layer(recipes.SWIN, number), Layout.of(14, 14, heads=2), q, k, v), expected)


def test_halo_with_padding_that_attention_sees() -> None:
    """Keys and values are unfolded behind zero padding, which is not masked."""
    block, halo, side = 8, 3, 16
    q, k, v = qkv(side * side)

    def around(x: Tensor) -> Tensor:
        size = block + 2 * halo
        windows = F.unfold(x.transpose(2, 3).reshape(4, 8, side, side), size, padding=halo, stride=block)
        return windows.reshape(2, 2, 8, size * size, -1).permute(0, 1, 4, 3, 2)

    blocks = q.reshape(2, 2, 2, block, 2, block, 8).transpose(3, 4).reshape(2, 2, 4, block * block, 8)
    out = F.scaled_dot_product_attention(blocks, around(k), around(v))
    expected = out.reshape(2, 2, 2, 2, block, block, 8).transpose(3, 4).reshape(2, 2, side * side, 8)
    torch.testing.assert_close(attend(layer(recipes.HALO, 0), Layout.of(side, side, heads=2), q, k, v), expected)


def test_sliding_tiles() -> None:
    """By the numbers of tiles, with the centre of the kernel clamped to the canvas; sizes smaller than the recipe's."""
    grid, tile, kernel = (6, 8, 8), (2, 2, 2), (3, 3, 3)
    pattern = recipes.STA.with_settings({"window": [6, 6, 6], "stride": [2, 2, 2]}).pattern_at(0, 1)
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    mask = torch.ones(len(places), len(places), dtype=torch.bool)
    for axis in range(3):
        at = places[:, axis] // tile[axis]
        centre = at.clamp(kernel[axis] // 2, grid[axis] // tile[axis] - 1 - kernel[axis] // 2)
        mask &= (centre[:, None] - at).abs() <= kernel[axis] // 2
    q, k, v = qkv(math.prod(grid))
    torch.testing.assert_close(attend(pattern, Layout.of(*grid, heads=2), q, k, v), masked(q, k, v, mask))


def test_radial() -> None:
    frames, rows, columns = 10, 2, 2
    size = rows * columns
    mask = torch.zeros(frames * size, frames * size, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            octave = 2 ** math.floor(math.log2(max(abs(i - j), 1)))
            for k in range(size):
                for n in range(size):
                    near = octave <= size and abs(k - n) + 1 <= size / octave
                    same = abs(i - j) % math.ceil(octave / size) == 0 and k == n
                    mask[i * size + k, j * size + n] = near or same or j == 0
    assert not mask.all()
    q, k, v = qkv(len(mask))
    out = attend(layer(recipes.RADIAL, 0), Layout.of(frames, rows, columns, heads=2), q, k, v)
    torch.testing.assert_close(out, masked(q, k, v, mask))
    with pytest.raises(Refused, match="frames"):
        layer(recipes.RADIAL, 0).lower(Layout.of(8, 8))


def test_streaming() -> None:
    pattern = recipes.STREAMING.with_settings({"window": 6, "first": 2}).pattern_at(0, 1)
    at = torch.arange(24)
    mask = (at[:, None] >= at) & ((at[:, None] - at < 6) | (at < 2))
    q, k, v = qkv(24)
    out = attend(pattern, Layout.of(24, heads=2, causal=True), q, k, v)
    torch.testing.assert_close(out, masked(q, k, v, mask))


def test_yopo() -> None:
    """Patches see patches two rows and columns away; in an inactive head text sees no patch, and patches only text."""
    rows, columns, before, after = 6, 7, 3, 4
    count, total = rows * columns, before + rows * columns + after
    segments = (("prompt", 0, before), ("patch", before, count), ("text", before + count, after))
    where = Layout(total, before, (rows, columns), segments, heads=2)
    mask = torch.ones(2, total, total, dtype=torch.bool)
    for i in range(count):
        for j in range(count):
            (a, b), (c, d) = divmod(i, columns), divmod(j, columns)
            mask[:, before + i, before + j] = abs(a - c) <= 2 and abs(b - d) <= 2
    q, k, v = qkv(total)
    torch.testing.assert_close(attend(layer(recipes.YOPO, 0), where, q, k, v), masked(q, k, v, mask))
    mask[1, before + count :, before : before + count] = False
    mask[1, before : before + count, before : before + count] = torch.eye(count, dtype=torch.bool)
    near = layer(recipes.YOPO, 0)
    off = "on('patch', 'patch', Nothing()) & on('text', 'patch', Nothing())"
    pattern = parse(f"per_head([{near}, {off}])")
    lowered = pattern.lower(where)
    out = torch.ops.tokenopt.tiled_attention(q, k, v, **lowered.tensors)
    torch.testing.assert_close(out, masked(q, k, v, mask))


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, settings", [
    ("DINAT", {"window": 3}), ("GNA", {"window": 4, "stride": 2}), ("HALO", {"window": 6, "stride": 4}),
    ("SWIN", {"window": 4, "stride": 4, "roll": 2}),
])  # fmt: skip
def test_on_a_vision_transformer(name: str, settings: dict[str, int]) -> None:
    model, x = small_model()
    result = optimize(model, x, recipe=getattr(recipes, name), settings=settings, min_speedup=0)
    assert len(result.report.edits) == 3
    assert {row["check"] for row in result.report.parity} == {"capture", "identity", "pattern"}
    assert all(row["passed"] for row in result.report.parity)


def test_every_layer_has_a_pattern() -> None:
    for recipe in vars(recipes).values():
        if isinstance(recipe, AttentionRecipe):
            assert all(recipe.pattern_at(i, 12) is not None for i in range(12)), recipe.name
            assert AttentionRecipe.from_dict(recipe.to_dict()).pattern == recipe.pattern
    assert recipes.SWIN.pattern_at(2, 3) == Neighborhood(7, stride=7)


# -- learned from data -------------------------------------------------------------------------------------------------


def test_paro_finds_the_order_in_which_attention_is_blocks() -> None:
    """A head attends within columns, one within rows: in its own order each is two blocks of the diagonal."""
    place = torch.arange(16)
    rows, columns = place // 4, place % 4
    heads = [(a[:, None] == a).float() / 4 for a in (columns, rows)]
    found = choose(torch.stack(heads), (4, 4), 8, 0.5)
    columns_first, rows_first = (f"permuted({o}, BlockMap(8, ((0,), (1,))), flat=True)" for o in ((1, 0), (0, 1)))
    assert found == parse(f"per_head([{columns_first}, {rows_first}])")
    assert parse(repr(found)) == found


def test_paro_keeps_the_blocks_with_most_attention() -> None:
    """Against every order of a grid of frames, by reshaping, where the last block is short."""
    attention = torch.rand(1, 30, 30).pow(8)
    grid, block = (2, 3, 5), 8
    best, held = None, -1.0
    for order in itertools.permutations(range(3)):
        moved = attention[0].reshape(grid * 2).permute(*order, *(3 + a for a in order)).reshape(30, 30)
        sums = torch.tensor([[part.sum() for part in line.split(block, 1)] for line in moved.split(block, 0)])
        kept = sums.topk(2, -1)
        if kept.values.sum() > held:
            best, held = (order, [sorted(row) for row in kept.indices.tolist()]), float(kept.values.sum())
    (found,) = choose(attention, grid, block, 0.5).patterns
    assert (found.axes, [list(row) for row in found.pattern.map]) == best


def test_paro_on_a_model() -> None:
    """Each layer and head gets a map of its own, from the attention of the model on the data."""
    model, x = small_model()
    recipe = recipes.PARO.with_settings({"block": 16, "density": 0.5})
    with pytest.raises(UsageError, match="learns from data"):
        optimize(model, x, recipe=recipe, min_speedup=0)
    maps: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps.append(((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1))
        return maps[-1] @ v

    batches = [(torch.randn(3, 3, 32, 32),), (torch.randn(2, 3, 32, 32),)]
    result = optimize(model, x, recipe=recipe, min_speedup=0, data=batches)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", spy)
        for (batch,) in batches:
            model(batch)
    chosen = result.report.recipe["settings"]["pattern"]
    for number in range(3):
        mean = torch.cat([maps[number], maps[number + 3]]).mean(0)[:, 1:, 1:]
        assert parse(chosen[str(number)]) == choose(mean, (8, 8), 16, 0.5)
    assert {row["check"] for row in result.report.parity} == {"capture", "identity", "pattern"}
