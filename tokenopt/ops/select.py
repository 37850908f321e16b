"""Choosing the tokens that stay: by partition, by group, by diversity, by cluster.

Every operation returns a plan as `tokenopt.ops.tokens` describes it, with these conventions: ``index`` is ascending;
``src`` is ascending too, where nothing else is said; together they hold every position once. Positions outside
``[start, stop)`` are protected. ``n`` is ``stop - start``. Similarity is the cosine, in float32 whatever the dtype; of
equals the first position wins.

The greedy selections are loops of a fixed number of steps, unrolled when they are traced, of few operations each: they
read rows of one n x n matrix of similarities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenopt.ops import op
from tokenopt.ops.tokens import _around, _rows

_FAR = 1e30  # beyond any similarity or gain, and finite: infinity times zero is not a number


def _unit(x: Tensor) -> Tensor:
    """Rows of length one, in float32."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _best(score: Tensor, k: int) -> Tensor:
    """score [B, n] -> the places of the k largest, best first."""
    return score.argsort(dim=-1, descending=True)[:, :k]


def _mark(places: Tensor, like: Tensor) -> Tensor:
    """places [B, k] among the n of like [B, n] -> int64 [B, n], 1 there and 0 elsewhere."""
    return torch.zeros_like(like, dtype=torch.int64).scatter(1, places, torch.ones_like(places))


def _split(kept: Tensor, k: int, start: int, stop: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """kept int64 [B, n], 1 at k tokens of the segment -> index, src, and the place in index of each kept one [B, n].

    A running count, not a sort: the inverse is needed too, and TensorRT sorts no more than 3840 values.
    """
    positions = torch.arange(stop - start, device=kept.device)[None]
    before = kept.cumsum(1)
    place = torch.where(kept > 0, before - 1, k + positions - before)
    place = place.clamp(0, stop - start - 1)  # in bounds also where scores that are not numbers chose fewer than k
    order = torch.zeros_like(place).scatter(1, place, positions.expand_as(place)) + start
    return _around(order[:, :k], start, stop, total), order[:, k:], place + start


def _everything(like: Tensor) -> tuple[Tensor, Tensor]:
    """The plan that removes nothing from like [B, N, ...]."""
    index = torch.arange(like.shape[1], device=like.device)[None].expand(like.shape[0], -1)
    return index, index[:, :0]


def _first_rows(x: Tensor) -> Tensor:
    """x [B, n, ...] -> [B], where the rows of each sample begin once batch and tokens are one dimension."""
    return torch.arange(x.shape[0], device=x.device) * x.shape[1]


@op("(Tensor metric, Tensor sources, Tensor targets, int r, int start, int stop) -> (Tensor, Tensor, Tensor)")
def match_partition(
    metric: Tensor, sources: Tensor, targets: Tensor, r: int, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Matches each source to its most similar target; the r best sources are removed, everything else stays.

    Shapes:  metric [B, N, D] · sources [B or 1, RA] · targets [B or 1, RB], disjoint positions in [start, stop)
             ->  index [B, N - r] · src [B, r], best first · dst [B, r]
    Args:    r: tokens to remove, 0 <= r <= RA.
    Source:  Bolya and Hoffman, Token Merging for Fast Stable Diffusion, arXiv:2303.17604 (a target per cell);
             Tran et al., PiToMe, arXiv:2405.16148 (sources and targets by energy).
    """
    if r == 0:
        index, none = _everything(metric)
        return index, none, none
    batch, total = metric.shape[0], metric.shape[1]
    sources, targets = (places.expand(batch, -1) - start for places in (sources, targets))
    unit = _unit(metric[:, start:stop])
    best, partner = (_rows(unit, sources) @ _rows(unit, targets).transpose(1, 2)).max(-1)
    order = _best(best, r)
    removed = sources.gather(1, order)
    kept = 1 - _mark(removed, unit[:, :, 0])
    index, _, place = _split(kept, stop - start - r, start, stop, total)
    return index, removed + start, place.gather(1, targets.gather(1, partner.gather(1, order)))


@op("(Tensor energy, int r, int start, int stop) -> (Tensor, Tensor)")
def partition_energy(energy: Tensor, r: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The 2r tokens of highest energy, ranked: even ranks are sources, odd ranks targets.

    Shapes:  energy [B, N]  ->  sources [B, r] · targets [B, r], positions in the sequence
    Args:    r: at most half of [start, stop).
    Source:  Tran et al., PiToMe, arXiv:2405.16148.
    """
    ranked = (_best(energy[:, start:stop].float(), 2 * r) + start).unflatten(1, (r, 2))
    return ranked[:, :, 0], ranked[:, :, 1]


@op("(Tensor score, int rows, int h, int w, int start, int stop) -> (Tensor, Tensor)")
def select_rows(score: Tensor, rows: int, h: int, w: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keeps the image rows of highest mean score, whole.

    Shapes:  score [B, N], h * w of them in [start, stop)  ->  index [B, N - (h - rows) * w] · src [B, (h - rows) * w]
    Source:  Jiang et al., FoPru, arXiv:2411.14164 (row pruning).
    """
    mean = score[:, start:stop].float().unflatten(1, (h, w)).mean(-1)
    best, rest, _ = _split(_mark(_best(mean, rows), mean), rows, 0, h, h)
    columns = torch.arange(w, device=score.device) + start
    kept, src = ((places[:, :, None] * w + columns).flatten(1) for places in (best, rest))
    return _around(kept, start, stop, score.shape[1]), src


@op("(Tensor score, int[] counts, int start, int stop) -> (Tensor, Tensor)")
def select_groups(score: Tensor, counts: list[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keeps the ``counts[g]`` best-scored tokens of each group; the groups are contiguous and equal: frames, crops.

    Shapes:  score [B, N]  ->  index [B, N - n + sum(counts)] · src [B, n - sum(counts)]
    Args:    counts: one per group; len(counts) divides n.
    """
    groups, size = len(counts), (stop - start) // len(counts)
    segment = score[:, start:stop].float()
    order = segment.unflatten(1, (groups, size)).argsort(dim=-1, descending=True)
    order = order + (torch.arange(groups, device=score.device) * size)[:, None]
    if len(set(counts)) == 1:
        best = order[:, :, : counts[0]].flatten(1)
    else:
        best = torch.cat([order[:, g, :count] for g, count in enumerate(counts)], 1)
    index, src, _ = _split(_mark(best, segment), sum(counts), start, stop, score.shape[1])
    return index, src


@op("(Tensor metric, Tensor? pivot_score, int k, bool max_sum, int start, int stop) -> (Tensor, Tensor)")
def select_farthest(
    metric: Tensor, pivot_score: Tensor | None, k: int, max_sum: bool, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Keeps k tokens that are unlike each other: greedily, the next is the one least similar to those chosen.

    Shapes:  metric [B, N, D] · pivot_score [B, N]  ->  index [B, N - n + k] · src [B, n - k]
    Args:    pivot_score: the first choice is the best-scored token; None: the token whose most similar other token is
             least similar.
             k: at least 1. k - 1 steps.
             max_sum: how similar a token is to those chosen: the sum of its similarities, or else their maximum.
    Memory:  float32 [B, n, n].
    Source:  Alvar et al., DivPrune, arXiv:2503.02175 (maximum, no pivot); Li et al., ToDRE,
             arXiv:2505.18757 (v1: maximum, v2: sum; the pivot has the largest class attention).
    """
    if k == stop - start:
        return _everything(metric)
    unit = _unit(metric[:, start:stop])
    similar = unit @ unit.transpose(1, 2)
    positions = torch.arange(stop - start, device=metric.device)
    itself = positions[:, None] == positions
    if pivot_score is None:
        pick = similar.masked_fill(itself, -_FAR).amax(-1).argmin(-1)
    else:
        pick = pivot_score[:, start:stop].float().argmax(-1)
    table = similar.masked_fill(itself, _FAR).flatten(0, 1)  # who is chosen is as similar as can be, and stays so
    first = _first_rows(unit)
    taken = table.index_select(0, pick + first)
    for _ in range(k - 1):
        row = table.index_select(0, taken.argmin(-1) + first)
        taken = taken + row if max_sum else torch.maximum(taken, row)
    index, src, _ = _split((taken > _FAR / 2).to(torch.int64), k, start, stop, metric.shape[1])
    return index, src


@op("(Tensor metric, Tensor? relevance, int k, int start, int stop) -> (Tensor, Tensor)")
def select_dpp(metric: Tensor, relevance: Tensor | None, k: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keeps k relevant tokens that are unlike each other: the greedy mode of a determinantal point process.

    The kernel is ``r_i cos_ij r_j``; each step adds the token that enlarges the determinant of the chosen ones most.

    Shapes:  metric [B, N, D] · relevance [B, N]  ->  index [B, N - n + k] · src [B, n - k]
    Args:    relevance: r is (relevance - min + 1e-6) / (max - min), over the segment of each sample; None is all ones.
             k: steps. Beyond the rank of the kernel, which is at most D, determinants are zero, and rounding decides.
    Memory:  float32 [B, n, n + k].
    Source:  Chen et al., Fast greedy MAP inference for determinantal point processes, arXiv:1709.05135;
             Zhang et al., CDPruner, arXiv:2506.10967.
    """
    if k == stop - start:
        return _everything(metric)
    unit = _unit(metric[:, start:stop])
    table = (unit @ unit.transpose(1, 2)).flatten(0, 1)[:, :, None]
    first = _first_rows(unit)
    weight = None
    if relevance is not None:
        relevance = relevance[:, start:stop, None].float()
        low = relevance.amin(1, keepdim=True)
        span = (relevance.amax(1, keepdim=True) - low).clamp_min(1e-12)
        weight = ((relevance - low + 1e-6) / span).square()
    # The factorisation is that of the cosines alone, whose scale is known; relevance only scales what each token adds.
    factor = gain = torch.ones_like(unit[:, :, :1])
    never = torch.full_like(gain[:, :1], -_FAR)
    for step in range(k):
        pick = (gain if weight is None else gain * weight).argmax(1, keepdim=True)
        if step < k - 1:
            at = pick.flatten() + first
            row = table.index_select(0, at)
            if step > 0:
                own = factor.view(-1, step, 1).index_select(0, at)
                row = row - torch.bmm(factor, own)
            row = row * gain.gather(1, pick).clamp_min(1e-6).rsqrt()
            factor = torch.cat([factor, row], 2) if step > 0 else row
            gain = gain - row * row
        gain = gain.scatter(1, pick, never)
    index, src, _ = _split((gain[:, :, 0] < -_FAR / 2).to(torch.int64), k, start, stop, metric.shape[1])
    return index, src


@op("(Tensor score, Tensor metric, int important, int k, int step, int start, int stop) -> (Tensor, Tensor)")
def select_diverse(
    score: Tensor, metric: Tensor, important: int, k: int, step: int, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Keeps the best-scored tokens, and of the others a diverse rest: k in all.

    While there are too many others, they are taken in order; of those at even ranks the ``step`` (or as many as are too
    many) that are most similar to one at an odd rank are dropped.

    Shapes:  score [B, N] · metric [B, N, D]  ->  index [B, N - n + k] · src [B, n - k]
    Args:    important: how many are kept for their score, at most k.
             step: about (n - k) / step steps.
    Memory:  float32 [B, n, n].
    Source:  Zhang et al., VisPruner, arXiv:2412.01818v2, and the official code.
    """
    if k == stop - start:
        return _everything(metric)
    score = score[:, start:stop].float()
    best, many = _best(score, important), stop - start - important
    # 1 for those left and 4 for the others, which are even: the running sum is odd at even ranks, that count from zero.
    state = 1 + 3 * _mark(best, score)
    gone = torch.full_like(state[:, :step], 4)
    if k > important:
        unit = _unit(metric[:, start:stop])
        similar = unit @ unit.transpose(1, 2)
        while many > k - important:
            count = min(step, many - (k - important), (many + 1) // 2)
            side = state.cumsum(1) % 2 + state  # 1 at odd ranks, 2 at even ones, and more
            nearest = similar.masked_fill((side > 1)[:, None, :], -_FAR).amax(-1)
            dropped = _best(nearest.masked_fill(side != 2, -_FAR), count)
            state = state.scatter(1, dropped, gone if count == step else gone[:, :count])
            many -= count
        kept = (state == 1).to(torch.int64).scatter(1, best, torch.ones_like(best))
    else:
        kept = _mark(best, score)
    index, src, _ = _split(kept, k, start, stop, metric.shape[1])
    return index, src


@op("(Tensor score, Tensor metric, int dominant, int contextual, int start, int stop) -> (Tensor, Tensor, Tensor)")
def select_contextual(
    score: Tensor, metric: Tensor, dominant: int, contextual: int, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the best-scored tokens, and evenly spaced ones of the rest, to which the others go by similarity.

    Shapes:  score [B, N] · metric [B, N, D]  ->  index [B, N - R] · src [B, R] · dst [B, R], places of contextual
             tokens alone; R = n - dominant - contextual
    Args:    dominant: kept for their score.
             contextual: of the rest, in order, every (n - dominant) // contextual-th; at least 1, if anything is left.
    Source:  Yang et al., VisionZip, arXiv:2412.04467.
    """
    rest = stop - start - dominant
    if rest == contextual:
        index, none = _everything(metric)
        return index, none, none
    assert 0 < contextual < rest, "tokens that are neither dominant nor contextual need a contextual one to go to"
    unit, score = _unit(metric[:, start:stop]), score[:, start:stop].float()
    best = _mark(_best(score, dominant), score)
    _, others, _ = _split(best, dominant, 0, stop - start, stop - start)
    stride = rest // contextual
    strides = others[:, : contextual * stride].unflatten(1, (contextual, stride))
    targets = strides[:, :, 0]
    src = torch.cat([strides[:, :, 1:].flatten(1), others[:, contextual * stride :]], 1)
    partner = (_rows(unit, src) @ _rows(unit, targets).transpose(1, 2)).argmax(-1)
    kept = best.scatter(1, targets, torch.ones_like(targets))
    index, src_positions, place = _split(kept, dominant + contextual, start, stop, metric.shape[1])
    return index, src_positions, place.gather(1, targets.gather(1, partner))


@op("(Tensor score, int k, int[] grid, int cell, int start, int stop) -> (Tensor, Tensor, Tensor)")
def select_cells(
    score: Tensor, k: int, grid: list[int], cell: int, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the k best-scored tokens, and one token per cell of the grid, to which the removed ones of the cell go.

    The lowest-scored token of each cell stands for the cell, and is not among the k. A cell may have no other token.

    Shapes:  score [B, N], grid[0] * grid[1] of them in [start, stop)  ->  index [B, N - R] · src [B, R] · dst [B, R];
             R = n - k - cells
    Args:    cell: side of a cell in tokens; cells at the right and lower edges may be smaller.
    Source:  Yang et al., VFlowOpt, arXiv:2508.05211 (recycling), with a fixed number of cells.
    """
    (h, w), down, across = grid, -(-grid[0] // cell), -(-grid[1] // cell)
    cells, inside = down * across, cell * cell
    device, segment = score.device, score[:, start:stop].float()

    def by_cell(values: Tensor, fill: float) -> Tensor:  # [B, h * w] -> [B, cells, cell * cell]
        image, padding = values.unflatten(1, (h, w)), (0, across * cell - w, 0, down * cell - h)
        if any(padding):
            image = torch.nn.functional.pad(image, padding, value=fill)
        return image.unflatten(2, (across, cell)).unflatten(1, (down, cell)).transpose(2, 3).flatten(3).flatten(1, 2)

    positions = by_cell(torch.arange(h * w, device=device)[None], 0).flatten()
    lowest = by_cell(segment, _FAR).argmin(-1) + torch.arange(cells, device=device) * inside
    keepers = positions[lowest]
    best = _best(segment.scatter(1, keepers, torch.full_like(keepers, -_FAR, dtype=torch.float32)), k)
    kept = _mark(torch.cat([best, keepers], 1), segment)
    index, src, place = _split(kept, k + cells, start, stop, score.shape[1])
    row, column = ((torch.arange(m, device=device)[:, None].expand(m, cell).flatten())[:size]
                   for m, size in ((down, h), (across, w)))  # fmt: skip
    home = (row[:, None] * across + column).flatten()  # the cell of each token
    return index, src, place.gather(1, keepers.gather(1, home[src - start]))


@op("(Tensor metric, int k, int iterations, int start, int stop) -> (Tensor, Tensor, Tensor)")
def cluster_kmeans(metric: Tensor, k: int, iterations: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters by cosine, from evenly spaced seeds, which stay and stand for their clusters; the others go to them.

    Shapes:  metric [B, N, D]  ->  index [B, N - n + k] · src [B, n - k] · dst [B, n - k]
    Args:    k: clusters; seed i is the token floor((i + 1/2) n / k) of the segment.
             iterations: of Lloyd's algorithm: tokens to the nearest centre, centres to the mean of their tokens; one
             without tokens stays. 0: the seeds are the centres.
    Source:  Dhillon and Modha, Concept decompositions for large sparse text data using clustering, 2001 (spherical
             k-means).
    """
    n, total, device = stop - start, metric.shape[1], metric.device
    seeds = (torch.arange(k, device=device) * 2 + 1) * n // (2 * k)
    index, src, _ = _split(_mark(seeds[None], torch.zeros(1, n, device=device)), k, start, stop, total)
    index, src = (places.expand(metric.shape[0], -1) for places in (index, src))
    unit = _unit(metric[:, start:stop])
    centres, clusters = unit.index_select(1, seeds), torch.arange(k, device=device)
    for _ in range(iterations):
        nearest = (unit @ centres.transpose(1, 2)).argmax(-1)
        member = (nearest[:, None, :] == clusters[:, None]).float()
        centres = torch.where(member.amax(-1, keepdim=True) > 0, _unit(member @ unit), centres)
    return index, src, (_rows(unit, src - start) @ centres.transpose(1, 2)).argmax(-1) + start


@op("(Tensor metric, int k, int neighbours, int start, int stop) -> (Tensor, Tensor, Tensor)")
def cluster_density(metric: Tensor, k: int, neighbours: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters around tokens in dense places that are far from denser ones (DPC-kNN); the others go to the nearest.

    Distances are euclidean, divided by sqrt(D). The density of a token is exp(-mean squared distance to the nearest
    ``neighbours``, itself among them, as in the official code); of equal densities the first position is the denser.
    Centres have the largest density times distance to the nearest denser token (to the farthest token, for the
    densest).

    Shapes:  metric [B, N, D]  ->  index [B, N - n + k] · src [B, n - k] · dst [B, n - k]
    Memory:  float32 [B, n, n].
    Source:  Zeng et al., TCFormer, arXiv:2204.08680; Du et al., 2016 (DPC-kNN).
    """
    n, total = stop - start, metric.shape[1]
    x = metric[:, start:stop].float()
    x = (x - x.mean(1, keepdim=True)) / x.shape[-1] ** 0.5  # centred, squares cancel less
    square = x.square().sum(-1)
    positions = torch.arange(n, device=metric.device)
    distance = square[:, :, None] + square[:, None, :] - 2 * (x @ x.transpose(1, 2))  # squared
    distance = distance.masked_fill(positions[:, None] == positions, 0).clamp_min(0)
    # Logarithms: the densities of distant tokens are zero in float32.
    density = -distance.topk(min(neighbours, n), dim=-1, largest=False).values.mean(-1)
    mine, other = density[:, :, None], density[:, None, :]
    denser = (other > mine) | ((other == mine) & (positions < positions[:, None]))
    gap = torch.where(denser, distance, distance.amax((1, 2), keepdim=True)).amin(-1)
    kept = _mark(_best(density + gap.log() / 2, k), density)
    index, src, _ = _split(kept, k, start, stop, total)
    nearest = _rows(distance, index[:, start : start + k] - start).argmin(1)
    return index, src, nearest.gather(1, src - start) + start
