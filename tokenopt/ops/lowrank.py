"""Attention through fewer keys than tokens: keys pooled on the grid, and agents between queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from tokenopt.ops import op
from tokenopt.ops.attention import attention
from tokenopt.ops.mix import pool_matrix
from tokenopt.ops.tiles import tiled_attention


def pool_grid(x: Tensor, start: int, grid: Sequence[int], cells: Sequence[int]) -> Tensor:
    """Adaptive average pooling of the tokens on a grid, one axis after the other.

    Shapes:  x [B, H, N, D], whose tokens [start, start + prod(grid)) lie on the grid  ->  [B, H, prod(cells), D]
    """
    pooled = x[:, :, start : start + prod(grid)]
    before = 1
    for size, count in zip(grid, cells, strict=True):
        if count != size:
            matrix = pool_matrix((size,), (count,), x.device).to(x.dtype)
            pooled = matrix @ pooled.reshape(*x.shape[:2], before, size, -1)
        before *= count
    return pooled.reshape(*x.shape[:2], before, x.shape[-1])


@op(
    "(Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys, Tensor order, Tensor rows, "
    "Tensor? mask=None, Tensor? row_mask=None, Tensor? absent=None, *, int start, int[] grid, int[] cells, "
    "float? scale=None) -> Tensor"
)
def pooled_attention(
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
    *,
    start: int,
    grid: Sequence[int],
    cells: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """Attention in tiles over a sequence that has its own grid, pooled to ``cells``, behind it: one softmax over both.

    Shapes:  as `tiled_attention`; keys and row_mask are about N + prod(cells) keys  ->  [B, H, N, E]
    Args:    start, grid: the tokens [start, start + prod(grid)) lie on a grid of one to three axes, in raster order.
             cells: of the coarser grid, per axis; keys and values are averaged within each.
    Equals:  attention(query, key, value) where cells is grid and the tables name the pooled keys instead of the others.
    Source:  Shi, TransNeXt, arXiv:2311.17132, pixel-focused attention (without what it learns).
    """
    key, value = (torch.cat([x, pool_grid(x, start, grid, cells)], 2) for x in (key, value))
    return tiled_attention(query, key, value, queries, keys, order, rows, mask, row_mask, absent, scale=scale)


@op(
    "(Tensor query, Tensor key, Tensor value, *, int start, int[] grid, int[] cells, float power=1.0, "
    "float shortcut=0.0, float? scale=None) -> Tensor"
)
def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    start: int,
    grid: Sequence[int],
    cells: Sequence[int],
    power: float = 1.0,
    shortcut: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Two attentions: agents, the pooled queries, attend to all tokens, and queries on the grid to the agents.

    ``softmax(q A^T scale^power) softmax(A k^T scale) v + shortcut v``; queries off the grid attend densely.

    Shapes:  query, key [B, H, N, D] · value [B, H, N, E]  ->  [B, H, N, E]
    Args:    start, grid: the tokens [start, start + prod(grid)) lie on a grid of one to three axes, in raster order.
             cells: agents per axis.
             power: of the scale in the second softmax; below 1 it is sharper. AgentSD: 0.3.
             shortcut: share of the values that is added. AgentSD: 0.075.
             scale defaults to D ** -0.5.
    Source:  Han et al., Agent Attention, arXiv:2312.08874, sec. 4, and its training-free form for diffusion.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    stop = start + prod(grid)
    agents = pool_grid(query, start, grid, cells)
    found = attention(agents, key, value, scale=scale)
    out = attention(query[:, :, start:stop], agents, found, scale=scale**power)
    if shortcut:
        out = out + shortcut * value[:, :, start:stop]
    if out.shape[2] == query.shape[2]:
        return out
    others = torch.cat([query[:, :, :start], query[:, :, stop:]], 2)
    few = attention(others, key, value, scale=scale)
    return torch.cat([few[:, :, :start], out, few[:, :, start:]], 2)
