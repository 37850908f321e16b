"""Selecting, merging and restoring tokens.

A reduction of a sequence is a *plan* of three index tensors over its positions: ``index`` [B, M], the token that each
kept place stands at; ``src`` [B, R], the tokens removed; ``dst`` [B, R], the kept place each of them goes to. Positions
outside ``[start, stop)`` are protected: they keep their places before and behind. Everything is per sample, of static
size, free of scatter-with-reduction (which TensorRT lacks): sums over groups are one-hot matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenopt.ops import op
from tokenopt.ops.native import native


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Through the dispatcher, so that a runtime can have a form of its own."""
    return torch.ops.tokenopt.take_tokens(x, index)


@op("(Tensor x, Tensor index) -> Tensor")
def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Reads tokens by a per-sample index.

    Shapes:  x [B, N, C] · index [B, M]  ->  [B, M, C]
    """
    count = x.shape[1]
    offset = torch.arange(x.shape[0], device=x.device)[:, None] * count
    return x.flatten(0, 1).index_select(0, (index + offset).flatten()).view(x.shape[0], index.shape[1], x.shape[2])


def _around(middle: Tensor, start: int, stop: int, total: int) -> Tensor:
    """Puts the protected positions before and behind the middle [B, M]."""
    if start == 0 and stop == total:
        return middle
    every = torch.arange(total, device=middle.device)[None].expand(middle.shape[0], -1)
    return torch.cat([every[:, :start], middle, every[:, stop:]], 1)


@op("(Tensor metric, int r, int start, int stop) -> (Tensor, Tensor, Tensor)")
def match_bipartite(metric: Tensor, r: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching: even positions (A) are matched to their most similar odd position (B); the r best merge.

    Shapes:  metric [B, N, D]  ->  index [B, N - r] · src [B, r] · dst [B, r]
    Args:    r: tokens to remove, at most the even positions in [start, stop).
    The kept order is: protected head, unmerged A ascending, B ascending, protected tail.
    Source:  Bolya et al., Token Merging, arXiv:2210.09461.
    """
    total = metric.shape[1]
    kernel = native("match_bipartite", metric)
    if kernel is not None and total <= 2**14:  # it sorts within one program
        return kernel(metric, r, start, stop)
    first_a, first_b = start + start % 2, start + 1 - start % 2
    unit = metric[:, start:stop].float()
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    a, b = unit[:, first_a - start :: 2], unit[:, first_b - start :: 2]
    best, partner = (a @ b.transpose(1, 2)).max(-1)
    order = best.argsort(dim=-1, descending=True)
    merged, unmerged = order[:, :r], order[:, r:].sort(-1).values
    count_a, count_b = a.shape[1], b.shape[1]
    b_positions = first_b + 2 * torch.arange(count_b, device=metric.device)[None].expand(metric.shape[0], -1)
    index = _around(torch.cat([first_a + 2 * unmerged, b_positions], 1), start, stop, total)
    dst = start + (count_a - r) + partner.gather(1, merged)
    return index, first_a + 2 * merged, dst


@op("(Tensor score, int k, int start, int stop, bool packed) -> (Tensor, Tensor)")
def select_topk(score: Tensor, k: int, start: int, stop: int, packed: bool) -> tuple[Tensor, Tensor]:
    """Keeps the k best-scored tokens of [start, stop), in their original order.

    Shapes:  score [B, N]  ->  index [B, start + k (+ 1) + N - stop] · src [B, stop - start - k (- 1)], best first
    Args:    packed: one more place, behind the kept ones, for the token that the others are packed into; it stands at
             the best of them.
    """
    order = score[:, start:stop].float().argsort(dim=-1, descending=True) + start
    kept, rest = order[:, :k].sort(-1).values, order[:, k:]
    if packed:
        kept, rest = torch.cat([kept, rest[:, :1]], 1), rest[:, 1:]
    return _around(kept, start, stop, score.shape[1]), rest


@op("(Tensor x, Tensor? weight, Tensor index, Tensor src, Tensor dst, bool normalize) -> (Tensor, Tensor)")
def merge_tokens(
    x: Tensor, weight: Tensor | None, index: Tensor, src: Tensor, dst: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Sums weighted tokens into their places; with ``normalize``, divides by the summed weight.

    Shapes:  x [B, N, C] · weight [B, N] > 0 (None is ones) · a plan  ->  y [B, M, C] · total [B, M], summed weights,
             float32 for half-precision x
    Equals:  (x, weight) where the plan removes nothing.
    Source:  Bolya et al., arXiv:2210.09461 (weights are sizes); Liang et al., EViT, arXiv:2202.07800
             (weights are attention, not normalised).
    """
    if kernel := native("merge_tokens", x, weight, index, src, dst):
        return kernel(x, weight, index, src, dst, normalize)
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x = x.float()  # sizes beyond 256 are not exact in bfloat16
    places = torch.arange(index.shape[1], device=x.device)[None, :, None]
    share = (dst[:, None, :] == places).to(x.dtype)  # of each removed token, in each place
    if weight is None:
        kept = torch.ones_like(index, dtype=x.dtype)
    else:
        weight = weight.to(x.dtype)
        kept, share = weight.gather(1, index), share * weight.gather(1, src)[:, None, :]
    total = kept + share.sum(-1)
    if normalize:
        kept, share = kept / total, share / total[..., None]
    # the small factors are weighted, not the tokens
    y = _rows(x, index) * kept[..., None] + share @ _rows(x, src)
    return y.to(dtype), total


@op("(Tensor x, Tensor index, int dim, int batch_dim, int start, int count) -> Tensor")
def gather_tokens(x: Tensor, index: Tensor, dim: int, batch_dim: int, start: int, count: int) -> Tensor:
    """Reads tokens by a per-sample index, along any dimension of a tensor that may have no batch of its own.

    Shapes:  x [..., N, ...] · index [B, M], relative to start  ->  [..., N - count + M, ...] with B rows at batch_dim
    Args:    dim, batch_dim: non-negative; x is B or 1 rows at batch_dim. Tokens outside [start, start + count) stay.
    """
    if x.shape[batch_dim] == 1:
        x = x.expand(*(index.shape[0] if i == batch_dim else -1 for i in range(x.dim())))
    front = x.movedim((batch_dim, dim), (0, 1))
    rest = front.shape[2:]
    flat = front.reshape(front.shape[0], front.shape[1], -1)
    total = flat.shape[1]
    picked = _rows(flat[:, start : start + count], index) if (start, count) != (0, total) else _rows(flat, index)
    if (start, count) != (0, total):
        picked = torch.cat([flat[:, :start], picked, flat[:, start + count :]], 1)
    picked = picked.reshape(picked.shape[0], picked.shape[1], *rest)
    return picked.movedim((0, 1), (batch_dim, dim))


@op("(Tensor index, Tensor src, Tensor dst, int total) -> Tensor")
def token_map(index: Tensor, src: Tensor, dst: Tensor, total: int) -> Tensor:
    """Where each token of the old sequence went: the inverse of a plan.

    Shapes:  a plan over ``total`` positions  ->  int64 [B, total], places in [0, M)
    Equals:  gather(token_map(plan), index) == arange(M).
    """
    places = torch.arange(index.shape[1], device=index.device)[None].expand(index.shape[0], -1)
    where = torch.cat([index, src], 1)
    value = torch.cat([places, dst], 1)
    return where.scatter(1, where, value)  # every position is written


@op("(Tensor x, Tensor index, Tensor src, int start, int count) -> Tensor")
def nearest_tokens(x: Tensor, index: Tensor, src: Tensor, start: int, count: int) -> Tensor:
    """For each dropped token the most similar kept one, by cosine: what ``copy`` restores it from.

    Shapes:  x [B, N, C] · index [B, M] · src [B, R]  ->  dst int64 [B, R], in [start, start + count)
    Args:    start, count: the kept places to choose from; the others are protected tokens.
    """
    unit = x.float()
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    kept = _rows(unit, index[:, start : start + count])
    return (_rows(unit, src) @ kept.transpose(1, 2)).argmax(-1) + start


@op("(Tensor x, Tensor size, int dim, int batch_dim, bool keepdim) -> Tensor")
def mean_tokens(x: Tensor, size: Tensor, dim: int, batch_dim: int, keepdim: bool) -> Tensor:
    """The mean over tokens, each weighted by how many it stands for: the mean over the original tokens.

    Shapes:  x [..., M, ...] with B rows at batch_dim · size [B, M]  ->  x without dimension ``dim``
    """
    shape = [1] * x.dim()
    shape[batch_dim], shape[dim] = size.shape[0], size.shape[1]
    if batch_dim > dim:
        size = size.transpose(0, 1)
    weight = size.reshape(shape).to(x.dtype)
    return (x * weight).sum(dim, keepdim) / weight.sum(dim, keepdim)


@op("(Tensor metric, Tensor? size, int start, int stop) -> (Tensor, Tensor)")
def best_partners(metric: Tensor, size: Tensor | None, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """For each even position of [start, stop) the most similar odd one; tokens of size 0 are not there.

    Shapes:  metric [B, N, D] · size [B, N]  ->  similarity float32 [B, A], -2 where there is none ·
             partner int64 [B, A], counted among the odd positions
    """
    first_a, first_b = start % 2, 1 - start % 2
    unit = metric[:, start:stop].float()
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    similar = unit[:, first_a::2] @ unit[:, first_b::2].transpose(1, 2)
    if size is not None:
        there = size[:, start:stop] > 0
        similar = torch.where(there[:, first_a::2, None] & there[:, None, first_b::2], similar, -2.0)
    best, partner = similar.max(-1)
    return best, partner


@op("(Tensor metric, Tensor? size, Tensor threshold, int start, int stop) -> (Tensor, Tensor, Tensor, Tensor)")
def match_threshold(
    metric: Tensor, size: Tensor | None, threshold: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bipartite matching that merges every pair above a threshold: a soft plan of static size, with the dead last.

    Shapes:  metric [B, N, D] · size [B, N] (None is ones) · threshold []  ->  index int64 [B, N] · assign [B, n, n] ·
             spread [B, n, n] · size [B, N], 0 for places that hold nothing; n = stop - start
    The order is that of match_bipartite: protected head, unmerged A ascending, B ascending, nothing, protected tail.
    Source:  Wang et al., DyMU, arXiv:2504.17040 (DToMe).
    """
    best, partner = best_partners(metric, size, start, stop)
    count, offset = stop - start, start % 2
    here = torch.arange(count, device=metric.device)[None]
    source = (here % 2 == offset).expand(metric.shape[0], -1)
    pair = ((here - offset) // 2).clamp_min(0).expand(metric.shape[0], -1)
    pair = pair.clamp_max(best.shape[1] - 1)
    merges = source & (best > threshold).gather(1, pair)
    home = torch.where(merges, (2 * partner + 1 - offset).gather(1, pair), here)
    member = (home[:, :, None] == here[:, None]).float()  # [B, old, new]
    total = torch.ones_like(home, dtype=torch.float32) if size is None else size[:, start:stop].float()
    weighted = member.transpose(1, 2) * total[:, None, :]
    after = weighted.sum(-1)
    order = torch.where(after > 0, here + count * (~source).to(here.dtype), here + 2 * count).argsort(-1)
    columns = order[:, :, None].expand(-1, -1, count)
    assign = (weighted / after.clamp_min(1e-12)[..., None]).gather(1, columns)
    spread = member.transpose(1, 2).gather(1, columns).transpose(1, 2)
    around = torch.ones_like(metric[:, :, 0], dtype=torch.float32) if size is None else size.float()
    sizes = torch.cat([around[:, :start], after.gather(1, order), around[:, stop:]], 1)
    return _around(start + order, start, stop, metric.shape[1]), assign, spread, sizes


@op("(Tensor similarity, int r) -> Tensor")
def shared_threshold(similarity: Tensor, r: int) -> Tensor:
    """The similarity below which edges do not merge if, of all samples together, r per sample do: []

    Shapes:  similarity [B, A]  ->  float32 [], at least 0
    Source:  Wang et al., DyMU, arXiv:2504.17040.
    """
    ranked = similarity.flatten().float().sort(descending=True).values
    last = (torch.ones_like(similarity[:, 0], dtype=torch.int64).sum() * r).clamp_max(ranked.shape[0] - 1)
    return ranked.gather(0, last[None])[0].clamp_min(0.0)
