"""Attention in tiles: each tile of queries attends to the keys that a constant table names."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenopt.ops import native, op
from tokenopt.ops.attention import attention

_HIDDEN = -3e4  # in every dtype; exp of it is 0


@op(
    "(Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys, Tensor order, Tensor rows, "
    "Tensor? mask=None, Tensor? row_mask=None, Tensor? absent=None, Tensor? key_bias=None, *, float? scale=None) "
    "-> Tensor"
)
def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    order: Tensor,
    rows: Tensor,
    mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    absent: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each tile of queries over its own list of keys, and of a few rows over all keys.

    Shapes:  query, key [B, H, N, D] · value [B, H, N, E] · queries int64 [h, T, Q] · keys int64 [h, T, K] ·
             order int64 [h, N] · rows int64 [R] · mask [T, Q, K], [H or 1, T, Q, K] or [B, H or 1, T, Q, K], additive ·
             row_mask broadcast to [B, H, R, N], additive · absent [h, T, Q] · key_bias [B, N]  ->  [B, H, N, E];
             h is H, or 1 where all heads share the tables
    Args:    queries, keys: positions in the sequence. A query may be in several places; its result is one of them.
             order: where each token's result lies behind the results of all tiles and those of the rows.
             rows: queries that see all keys (class, register, text tokens).
             absent: log of the number of keys beyond a border, all zero, that a query sees besides; -inf for none.
             scale defaults to D ** -0.5.
    Equals:  attention(query, key, value, bias) where bias is -inf but for the pairs of a tile.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    compute = None
    if absent is None:
        compute = native.native("tiled_attention", query, key, value, queries, keys, mask, key_bias)
    if compute is None:
        out = of_tiles(query, key, value, queries, keys, mask, absent, key_bias, scale)
        return placed(out, query, key, value, order, rows, row_mask, key_bias, scale)
    out = compute(query, key, value, queries, keys, mask, key_bias, scale=scale)
    if not rows.shape[0]:
        return out
    return out.index_copy_(2, rows, attention(query.index_select(2, rows), key, value, row_mask, key_bias, scale=scale))


def of_tiles(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, mask: Tensor | None,
    absent: Tensor | None, key_bias: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """The results of all tiles of `tiled_attention`, [B, H, T * Q, E]."""
    _, tiles, size = queries.shape
    q = _take(query, queries)
    k, v = _take(key, keys), _take(value, keys)
    bias = mask
    if key_bias is not None:
        columns = key_bias[:, keys].unsqueeze(-2).to(query.dtype)  # [B, h, T, 1, K]
        bias = columns if bias is None else bias + columns
    if absent is not None:
        k, v = torch.nn.functional.pad(k, (0, 0, 0, 1)), torch.nn.functional.pad(v, (0, 0, 0, 1))
        bias = q.new_zeros(1, 1, tiles, size, keys.shape[-1]) if bias is None else bias
        column = absent.to(query.dtype).unsqueeze(-1).expand(*bias.shape[: max(bias.dim() - 4, 0)], -1, -1, -1, 1)
        lead = torch.broadcast_shapes(bias.shape[:-1], column.shape[:-1])
        bias = torch.cat([bias.expand(*lead, -1), column.expand(*lead, -1)], -1)
    return attend(q, k, v, bias, scale).flatten(2, 3)


def placed(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, order: Tensor, rows: Tensor, row_mask: Tensor | None,
    key_bias: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """What `of_tiles` gives, and the rows that see all keys behind it, in the order of the tokens."""
    if rows.shape[0]:
        few = attention(query.index_select(2, rows), key, value, row_mask, key_bias, scale=scale)
        out = torch.cat([out, few], 2)
    if order.shape[0] == 1:
        return out.index_select(2, order[0])
    return out.flatten(1, 2).index_select(1, _flat(order, out.shape[2])).unflatten(1, (query.shape[1], -1))


@op(
    "(Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys, Tensor order, Tensor rows, "
    "Tensor? mask=None, Tensor? key_bias=None, *, int start, int[] grid, int[] window, int[] stride, int[] dilation, "
    "bool[] causal, float? scale=None) -> Tensor"
)
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    order: Tensor,
    rows: Tensor,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    start: int,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[bool],
    scale: float | None = None,
) -> Tensor:
    """Each query on a grid attends to the window around it and to all tokens off the grid; those attend to all.

    Shapes:  as `tiled_attention`, whose tables those of the window are
    Args:    start, grid: the tokens [start, start + prod(grid)) lie on a grid of one to three axes, in raster order.
             window, stride, dilation, causal: per axis, with the semantics of NATTEN; they say what the tables say, for
             kernels that read the grid in place.
    Equals:  attention(query, key, value) where the window is the grid.
    Source:  Hassani et al., Generalized Neighborhood Attention, arXiv:2504.16922.
    """
    compute = native.native("neighborhood_attention", query, key, value, key_bias)
    if compute is None:
        return tiled_attention(query, key, value, queries, keys, order, rows, mask, None, None, key_bias, scale=scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    axes = {"grid": grid, "window": window, "stride": stride, "dilation": dilation, "causal": causal}
    axes = {name: tuple(value) for name, value in axes.items()}
    out = compute(query, key, value, key_bias, start=start, scale=scale, **axes)
    if not rows.shape[0]:
        return out
    few = attention(query.index_select(2, rows), key, value, None, key_bias, scale=scale)
    return torch.cat([few[:, :, :start], out, few[:, :, start:]], 2)


@op("(Tensor bias, Tensor queries, Tensor keys) -> Tensor")
def tile_bias(bias: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The part of a bias on all logits that each tile of `tiled_attention` needs, additive.

    What it hides is hidden by a large finite number: a window of nothing but padding would otherwise be a softmax of
    nothing, which is not a number in most runtimes, and spreads from there.

    Shapes:  bias broadcast to [B, H, N, N], additive or boolean (True is visible) · queries [h, T, Q] · keys [h, T, K]
             ->  [B or 1, H or 1, T, Q or 1, K]
    """
    if bias.dtype is torch.bool:
        bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill(~bias, _HIDDEN)
    bias = bias.clamp(min=_HIDDEN)
    bias = bias.reshape(*[1] * (4 - bias.dim()), *bias.shape)
    total = bias.shape[-1]
    pairs = keys.unsqueeze(2) if bias.shape[-2] == 1 else keys.unsqueeze(2) + total * queries.unsqueeze(3)
    flat = bias.flatten(2)
    if pairs.shape[0] == 1:
        return flat.index_select(2, pairs.flatten()).unflatten(2, pairs.shape[1:])
    parts = [flat[:, h if flat.shape[1] > 1 else 0].index_select(1, p.flatten()) for h, p in enumerate(pairs)]
    return torch.stack(parts, 1).unflatten(2, pairs.shape[1:])


def _take(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, N, D], int64 [h, T, K] -> [B, H, T, K, D]."""
    _, tiles, size = index.shape
    if index.shape[0] == 1:
        return x.index_select(2, index.flatten()).unflatten(2, (tiles, size))
    return x.flatten(1, 2).index_select(1, _flat(index, x.shape[2])).unflatten(1, (x.shape[1], tiles, size))


def _flat(index: Tensor, count: int) -> Tensor:
    """Positions of each head's sequence [h, ...] as positions in those of all heads one behind another."""
    first = count * torch.arange(index.shape[0], device=index.device).reshape(-1, *[1] * (index.dim() - 1))
    return (index + first).flatten()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of rank 5, [B, H, T, Q, D], by one of rank 4: heads become batch where they share the mask."""
    batch, heads, tiles = q.shape[:3]
    shared = bias is None or bias.dim() < 4 or (bias.shape[-4] == 1 and (bias.dim() == 4 or bias.shape[0] == 1))
    if shared:
        if bias is not None and bias.dim() != 4:  # of constants, exporters store what a reshape makes once per layer
            bias = bias.reshape(1, *bias.shape[-3:])
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    else:
        rank5 = bias if bias.dim() == 5 else bias.unsqueeze(0)
        bias = rank5.expand(-1, heads, tiles, -1, -1).flatten(1, 2)
        q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.reshape(batch, heads, tiles, *out.shape[-2:])
