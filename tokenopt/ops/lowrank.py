"""Attention through fewer keys than tokens: keys pooled on the grid, and agents between queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod

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
    "(Tensor query, Tensor key, Tensor value, *, int start, int[] grid, int[] cells, bool size_bias=False, "
    "float? scale=None) -> Tensor"
)
def pooled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    start: int,
    grid: Sequence[int],
    cells: Sequence[int],
    size_bias: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Queries on a grid attend to keys and values averaged over its cells, and to all tokens off the grid.

    Queries off the grid attend densely.

    Shapes:  query, key [B, H, N, D] · value [B, H, N, E]  ->  [B, H, N, E]
    Args:    start, grid: the tokens [start, start + prod(grid)) lie on a grid of one to three axes, in raster order.
             cells: of the coarser grid, per axis.
             size_bias: the logits of a pooled key get the log of how many tokens it stands for.
             scale defaults to D ** -0.5.
    Equals:  attention(query, key, value) where cells is grid.
    Source:  Wang et al., Pyramid Vision Transformer, arXiv:2102.12122; size bias: Bolya et al., arXiv:2210.09461.
    """
    stop = start + prod(grid)
    keys, values = (
        torch.cat([x[:, :, :start], x[:, :, stop:], pool_grid(x, start, grid, cells)], 2) for x in (key, value)
    )
    bias, others = None, query.shape[2] - prod(grid)
    if size_bias and others:  # what all keys have changes nothing
        pooled = query.new_full((1, prod(cells)), log(prod(grid) / prod(cells)))
        bias = torch.nn.functional.pad(pooled, (others, 0))
    out = attention(query[:, :, start:stop], keys, values, bias, scale=scale)
    return _with_others(out, query, key, value, start, scale)


@op(
    "(Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys, Tensor order, Tensor rows, "
    "Tensor? mask=None, Tensor? row_mask=None, Tensor? absent=None, *, int start, int[] grid, int[] cells, "
    "float? scale=None) -> Tensor"
)
def pooled_tiled_attention(
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
    Equals:  tiled_attention of the same tables where they name no pooled key.
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
    Source:  Han et al., Agent Attention, arXiv:2312.08874, and its training-free form for diffusion.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    stop = start + prod(grid)
    agents = pool_grid(query, start, grid, cells)
    found = attention(agents, key, value, scale=scale)
    out = attention(query[:, :, start:stop], agents, found, scale=scale**power)
    if shortcut:
        out = out + shortcut * value[:, :, start:stop]
    return _with_others(out, query, key, value, start, scale)


def _with_others(out: Tensor, query: Tensor, key: Tensor, value: Tensor, start: int, scale: float | None) -> Tensor:
    """Results of the queries from ``start`` on, and around them those of the others, which attend densely."""
    stop = start + out.shape[2]
    if out.shape[2] == query.shape[2]:
        return out
    others = torch.cat([query[:, :, :start], query[:, :, stop:]], 2)
    few = attention(others, key, value, scale=scale)
    return torch.cat([few[:, :, :start], out, few[:, :, start:]], 2)
