"""Soft reductions: every new token is a weighted sum of old ones.

A soft plan is two matrices over the segment of n tokens: ``assign`` [B or 1, M', n], whose product with the tokens is
the M' new ones; ``spread`` [B or 1, n, M'], whose product with those is the restored segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenopt.ops import op
from tokenopt.ops.score import unit
from tokenopt.ops.tokens import _rows


def _flat(x: Tensor, dim: int, batch_dim: int, batch: int) -> tuple[Tensor, Sequence[int]]:
    """x as [B, N, features] and the sizes of its features; one row at ``batch_dim`` serves every sample."""
    if x.shape[batch_dim] == 1:
        x = x.expand(*(batch if i == batch_dim else -1 for i in range(x.dim())))
    front = x.movedim((batch_dim, dim), (0, 1))
    return front.reshape(front.shape[0], front.shape[1], -1), front.shape[2:]


def _unflat(flat: Tensor, features: Sequence[int], dim: int, batch_dim: int) -> Tensor:
    return flat.reshape(flat.shape[0], flat.shape[1], *features).movedim((0, 1), (batch_dim, dim))


@op("(Tensor x, Tensor matrix, int dim, int batch_dim, int start, int count) -> Tensor")
def mix_tokens(x: Tensor, matrix: Tensor, dim: int, batch_dim: int, start: int, count: int) -> Tensor:
    """Replaces the tokens [start, start + count) by weighted sums of them, along any dimension of a tensor.

    Shapes:  x [..., N, ...], finite · matrix [B or 1, M', count]  ->  [..., N - count + M', ...], in the dtype of x
    Args:    dim, batch_dim: non-negative; x is B or 1 rows at batch_dim. Tokens outside [start, start + count) stay.
    Sums are in float32 where x is in half precision.
    """
    flat, features = _flat(x, dim, batch_dim, matrix.shape[0])
    segment = flat[:, start : start + count]
    if x.dtype in (torch.float16, torch.bfloat16):
        segment = segment.float()
    mixed = (matrix.to(segment.dtype) @ segment).to(x.dtype)
    if (start, count) != (0, flat.shape[1]):
        mixed = torch.cat([flat[:, :start], mixed, flat[:, start + count :]], 1)
    return _unflat(mixed, features, dim, batch_dim)


@op("(Tensor y, Tensor index, Tensor base, int dim, int batch_dim) -> Tensor")
def scatter_tokens(y: Tensor, index: Tensor, base: Tensor, dim: int, batch_dim: int) -> Tensor:
    """The canvas ``base`` with its tokens at a per-sample index replaced.

    Shapes:  y [..., M, ...] · index [B, M], no position twice · base [..., N, ...]  ->  as base, with B rows at
             batch_dim, in its dtype
    Args:    dim, batch_dim: non-negative; y and base are B or 1 rows at batch_dim.
    """
    canvas, features = _flat(base, dim, batch_dim, index.shape[0])
    new, _ = _flat(y.to(base.dtype), dim, batch_dim, index.shape[0])
    total = canvas.shape[1]
    # which row of [canvas, new] each token is: a small scatter and one gather of rows
    old = torch.arange(total, device=index.device)[None].expand(index.shape[0], -1)
    places = torch.arange(total, total + index.shape[1], device=index.device)[None].expand(index.shape[0], -1)
    return _unflat(_rows(torch.cat([canvas, new], 1), old.scatter(1, index, places)), features, dim, batch_dim)


def _outer(factors: Sequence[Tensor]) -> Tensor:
    """The Kronecker product of matrices: raster order on both sides."""
    result = factors[0]
    for factor in factors[1:]:
        result = (result[:, None, :, None] * factor[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return result


def pool_matrix(grid: Sequence[int], cells: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Adaptive average pooling of a grid of 1 to 3 dimensions as a matrix.

    Shapes:  float32 [prod(cells), prod(grid)], rows sum to 1
    Equals:  adaptive_avg_pool of the tokens laid out on the grid.
    """
    assert len(grid) == len(cells), "there are as many numbers of cells as dimensions of the grid"
    factors = []
    for size, count in zip(grid, cells, strict=True):
        cell = torch.arange(count, device=device)[:, None]
        place = torch.arange(size, device=device)
        member = ((place >= cell * size // count) & (place < ((cell + 1) * size + count - 1) // count)).float()
        factors.append(member / member.sum(-1, keepdim=True))
    return _outer(factors)


def _around_own_cell(grid: Sequence[int], cells: Sequence[int], device: torch.device) -> Tensor:
    """1 for the cells that a token's own cell touches, itself included: float32 [prod(grid), prod(cells)]."""
    factors = []
    for size, count in zip(grid, cells, strict=True):
        own = (2 * torch.arange(size, device=device) + 1) * count // (2 * size)  # the cell that its centre is in
        factors.append(((own[:, None] - torch.arange(count, device=device)).abs() <= 1).float())
    return _outer(factors)


@op("(Tensor x, int[] grid, int[] cells, int iterations, bool local, int start) -> (Tensor, Tensor)")
def soft_association(
    x: Tensor, grid: Sequence[int], cells: Sequence[int], iterations: int, local: bool, start: int
) -> tuple[Tensor, Tensor]:
    """Super tokens, as a soft plan: each token belongs to the cells of a coarser grid in proportion to likeness.

    Centres start as means of cells. Each iteration takes ``A = softmax(x S^T / sqrt(C))`` over cells, and from it the
    centres ``S = A^T x / (sum A + 1e-12)``: the super tokens are the last ones, and A is not taken again for them.

    Shapes:  x [B, N, C], the segment being the prod(grid) tokens from ``start`` on
             ->  assign [B, prod(cells), prod(grid)] · spread [B, prod(grid), prod(cells)], rows sum to 1; float32
    Args:    iterations: at least 1.
             local: a token belongs to its own cell and those that touch it only.
    Source:  Huang et al., Super Token Sampling, arXiv:2211.11167.
    """
    assert iterations > 0, "without an association there is no super token"
    tokens = x[:, start : start + math.prod(grid)].float()
    centres = pool_matrix(grid, cells, x.device) @ tokens
    near = _around_own_cell(grid, cells, x.device) > 0 if local else None
    for iteration in range(iterations):
        if iteration:
            centres = assign @ tokens  # noqa: F821  (of the last round)
        logits = tokens @ centres.transpose(1, 2) * x.shape[-1] ** -0.5
        spread = (logits if near is None else torch.where(near, logits, -math.inf)).softmax(-1)
        assign = (spread / (spread.sum(1, keepdim=True) + 1e-12)).transpose(1, 2)
    return assign, spread


@op("(Tensor metric, Tensor score, Tensor index, int neighbours, int start, int stop) -> Tensor")
def neighbour_weights(metric: Tensor, score: Tensor, index: Tensor, neighbours: int, start: int, stop: int) -> Tensor:
    """Soft plan in which each kept token takes up, weighted by score, the removed tokens most similar to it.

    New token p is ``x_p + sum_q score_q x_q`` over its ``neighbours`` nearest removed q, by cosine; a removed token may
    go to several kept ones, or to none.

    Shapes:  metric [B, N, D] · score [B, N] · index [B, M'], relative to start  ->  float32 [B, M', stop - start]
    Args:    neighbours: no more are taken than tokens are removed.
    Source:  Shang et al., LLaVA-PruMerge, arXiv:2403.15388 (token supplement).
    """
    count, kept = stop - start, index.shape[1]
    own = (index[..., None] == torch.arange(count, device=index.device)).float()
    near = min(neighbours, count - kept)
    if near <= 0:
        return own
    vectors = unit(metric[:, start:stop])
    cosine = _rows(vectors, index) @ vectors.transpose(1, 2)
    cosine = torch.where(own.amax(1, keepdim=True) > 0, -2.0, cosine)  # below any cosine: only removed ones are taken
    chosen = cosine.topk(near, -1).indices
    taken = torch.zeros_like(cosine).scatter(2, chosen, torch.ones_like(chosen, dtype=cosine.dtype))
    return own + taken * score[:, None, start:stop].float()


@op("(Tensor index, int[] grid, float power) -> Tensor")
def grid_interpolation(index: Tensor, grid: Sequence[int], power: float) -> Tensor:
    """Restores dropped tokens by inverse-distance weighting of the kept ones in the grid; kept ones stay exact.

    Shapes:  index [B, M'], positions in the grid  ->  spread float32 [B, prod(grid), M'], rows sum to 1
    Args:    power: weights are ``d ** -power``, d the euclidean distance in cells.
    Source:  Shepard, A two-dimensional interpolation function for irregularly-spaced data, 1968.
    """
    place = torch.arange(math.prod(grid), device=index.device)[:, None]
    squared = None
    stride = 1
    for size in reversed(grid):
        apart = (place // stride % size - index[:, None] // stride % size).float().square()
        squared = apart if squared is None else squared + apart
        stride *= size
    nearest = squared.amin(-1, keepdim=True).clamp_min(1.0)  # distances relative to it: no power underflows them all
    weight = (squared.clamp_min(1.0) / nearest).pow(-power / 2)
    own = (squared == 0).float()
    weight = torch.where(own.amax(-1, keepdim=True) > 0, own, weight)
    return weight / weight.sum(-1, keepdim=True)


@op("(Tensor index, Tensor src, Tensor dst) -> Tensor")
def shares(index: Tensor, src: Tensor, dst: Tensor) -> Tensor:
    """What each token weighs if a place gets its own token plus the mean of those that go to it.

    Shapes:  a plan of index [B, M] · src [B, R] · dst [B, R]  ->  float32 [B, M + R]: 1 for kept tokens, 1 / (how many
             go to the same place) for removed ones
    """
    same = (dst[:, :, None] == dst[:, None, :]).float().sum(-1)
    weight = torch.cat([torch.ones_like(index, dtype=torch.float32), 1.0 / same], 1)
    return torch.zeros_like(weight).scatter(1, torch.cat([index, src], 1), weight)


@op("(Tensor ids, int k, int start, int total) -> (Tensor, Tensor, Tensor)")
def segment_association(ids: Tensor, k: int, start: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """A soft plan whose tokens are the means of given segments; each stands where its first token does.

    Shapes:  ids int64 [B, n] in [0, k)  ->  index int64 [B, total - n + k], in the sequence of ``total`` tokens whose
             reducible ones begin at ``start`` · assign float32 [B, k, n], rows sum to 1 · spread float32 [B, n, k]
    An id that does not occur gives a token of zeros, at the first position.
    """
    count = ids.shape[1]
    member = (ids[:, :, None] == torch.arange(k, device=ids.device)).float()
    assign = member.transpose(1, 2)
    first = start + assign.argmax(-1)
    assign = assign / assign.sum(-1, keepdim=True).clamp_min(1.0)
    every = torch.arange(total, device=ids.device)[None].expand(ids.shape[0], -1)
    return torch.cat([every[:, :start], first, every[:, start + count :]], 1), assign, member
