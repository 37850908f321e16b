"""Operations on tokens in few nodes of ONNX.

A runtime spends microseconds on every node, however small its tensors are: per merge that is more than the arithmetic.
So the forms here gather per sample with one node, compute only the rows that tokens are merged into, and keep indices
and sizes as columns [B, M, 1], which is what gathers of whole rows take. What they compute equals the references in
``ops/tokens.py``; nothing scatters with a reduction, which TensorRT lacks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenopt.ops import select, tokens

_PAIRS = 2**15  # of removed tokens and places, up to which comparing them costs less than the nodes of a running count


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """One node that copies whole rows; a gather with an expanded index would copy numbers one by one."""
    shape = (x.shape[0], index.shape[1], *x.shape[2:])
    return _node("GatherND", (x, index.unsqueeze(-1)), shape, x.dtype, batch_dims=1)


def match_bipartite(metric: Tensor, r: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions come from constant tables; the protected ones are padding around the unmerged, not concatenated."""
    total, device = metric.shape[1], metric.device
    positions = torch.arange(total, device=device)
    first_a, first_b = start + start % 2, start + 1 - start % 2
    a_positions, b_positions = positions[first_a:stop:2], positions[first_b:stop:2]
    count_a = len(a_positions)
    if not 0 < r < count_a:
        return tokens.match_bipartite(metric, r, start, stop)
    unit = _unit(metric)
    a, b = unit.index_select(1, a_positions), unit.index_select(1, b_positions)
    best, partner = (a @ b.transpose(1, 2)).topk(1)
    order = best.topk(count_a, 1).indices
    merged, rest = order.split([r, count_a - r], 1)
    unmerged = rest.topk(count_a - r, 1, largest=False).values
    behind = torch.cat([b_positions, positions[stop:]])
    fixed = torch.cat([positions[:start], torch.full_like(a_positions[r:], first_a), behind])
    index = 2 * F.pad(unmerged, (0, 0, start, len(behind))) + fixed.unsqueeze(-1)
    src = _node("Gather", (a_positions, merged), merged.shape, merged.dtype)
    dst = partner.gather(1, merged) + (start + count_a - r)
    return index.squeeze(-1), src.squeeze(-1), dst.squeeze(-1)


def token_energy(metric: Tensor, margin: float, alpha: float, shifted: bool, start: int, stop: int) -> Tensor:
    """A sum for each side of the margin, which costs less than choosing; the jump there is a count."""
    vectors = _unit(metric)[:, start:stop]
    above = vectors @ vectors.transpose(1, 2) - margin
    positive = above.relu()
    energy = positive.mean(-1) + alpha * ((above - positive).exp().mean(-1) - 1)
    if not shifted:
        energy = energy + margin * (above >= 0).float().mean(-1)
    return F.pad(energy, (start, metric.shape[1] - stop))


def partition_energy(energy: Tensor, r: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """No more is sorted than is taken."""
    ranked = energy[:, start:stop].float().unsqueeze(-1).topk(2 * r, 1).indices + start
    return ranked[:, 0::2].squeeze(-1), ranked[:, 1::2].squeeze(-1)


def match_partition(
    metric: Tensor, sources: Tensor, targets: Tensor, r: int, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A place is a position less the removed ones before it: where they are few, these are counted in pairs."""
    unit, total = _unit(metric), metric.shape[1]
    if not 0 < r * total <= _PAIRS:
        return select.match_partition(metric, sources, targets, r, start, stop)
    best, partner = (_rows(unit, sources) @ _rows(unit, targets).transpose(1, 2)).topk(1)
    order = best.topk(r, 1).indices
    removed, into = _places(sources, order), _places(targets, partner.gather(1, order))
    numbers = torch.arange(total, device=metric.device)
    gaps = removed.topk(r, 1, largest=False).values - numbers[:r, None]  # kept ones before each removed one
    index = numbers[: total - r] + (gaps <= numbers[: total - r]).sum(1)
    dst = into - (removed.transpose(1, 2) < into).sum(-1, keepdim=True)
    return index, removed.squeeze(-1), dst.squeeze(-1)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Rows [B, R, D] at places [B, R], or [1, R] that all samples share."""
    return x.index_select(1, places[0]) if _shared(places) else take_tokens(x, places)


def _places(places: Tensor, index: Tensor) -> Tensor:
    """Those of places [B, R], or [1, R], at an index [B, K, 1]."""
    if _shared(places):
        return _node("Gather", (places[0], index), index.shape, index.dtype)
    return places.unsqueeze(-1).gather(1, index)


def _shared(places: Tensor) -> bool:
    """Whether there is one row for all samples; a batch that is not known is never asked for its size."""
    return isinstance(places.shape[0], int) and places.shape[0] == 1


def merge_tokens(
    x: Tensor, weight: Tensor | None, index: Tensor, src: Tensor, dst: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Most places keep the token they have: the means of the others are computed apart and written over it."""
    if not normalize or not src.shape[1]:
        return tokens.merge_tokens(x, weight, index, src, dst, normalize)
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    y = take_tokens(x, index)
    moved, into = take_tokens(x, src).to(wide), take_tokens(y, dst).to(wide)
    index, src, dst = index.unsqueeze(-1), src.unsqueeze(-1), dst.unsqueeze(-1)
    same = (dst == dst.transpose(1, 2)).to(wide)  # [B, R, R]: which removed tokens go to one place
    if weight is None:
        size, total = torch.ones_like(index, dtype=wide), same.sum(-1, keepdim=True) + 1.0
        mean = into + same @ ((moved - into) / total)
    else:
        weight = weight.unsqueeze(-1).to(wide)
        size, part = weight.gather(1, index), weight.gather(1, src)
        total = size.gather(1, dst) + same @ part
        mean = into + same @ ((moved - into) * (part / total))
    sample = torch.arange(x.shape[0], device=x.device)[:, None, None].expand(-1, src.shape[1], 1)
    # where several go to one place, all of them write the same
    y = _node("ScatterND", (y, torch.cat([sample, dst], -1), mean.to(x.dtype)), y.shape, y.dtype)
    return y, size.scatter(1, dst, total).squeeze(-1)


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return _node("LpNormalization", (x,), x.shape, x.dtype, axis=-1, p=2)


def _node(name: str, inputs: tuple[Tensor, ...], shape: Any, dtype: torch.dtype, **attributes: int) -> Tensor:
    """A node that torch has no operation for."""
    from torch.onnx import ops as onnx_ops

    return onnx_ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape)
