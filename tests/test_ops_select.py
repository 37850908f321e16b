"""Every selection equals its meaning written out, token by token, on its own and in every runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokenopt.ops.select  # noqa: F401  (registers the operations)
from tokenopt import capture, runtimes
from tokenopt.runtimes.onnx import require_expressible, write
from tokenopt.runtimes.tensorrt import TensorRTRTX

ops = torch.ops.tokenopt

# -- what is meant: lists of positions in the segment, one sample at a time, in double precision -----------------------


def order(values: Sequence[float] | Tensor) -> list[int]:
    """Places of the values, largest first; of equals the first."""
    values = [float(v) for v in values]
    return sorted(range(len(values)), key=lambda i: -values[i])


def cosine(metric: Tensor) -> list[list[float]]:
    rows = [row / row.norm() for row in metric.double()]
    return [[float(a @ b) for b in rows] for a in rows]


def first_best(candidates: Sequence[int], value: Callable[[int], float]) -> int:
    return max(candidates, key=lambda i: (value(i), -i))


def partition(metric: Tensor, sources: list[int], targets: list[int], r: int) -> tuple[list[int], dict[int, int]]:
    similar = cosine(metric)
    partner = {a: first_best(targets, lambda b: similar[a][b]) for a in sources}  # noqa: B023
    ranked = sorted(sources, key=lambda a: -similar[a][partner[a]])[:r]
    return ranked, {a: partner[a] for a in ranked}


def rows(score: Tensor, keep: int, h: int, w: int) -> list[int]:
    best = order([sum(score[y * w : y * w + w].tolist()) for y in range(h)])[:keep]
    return [y * w + x for y in best for x in range(w)]


def groups(score: Tensor, counts: list[int]) -> list[int]:
    size = len(score) // len(counts)
    return [g * size + i for g, c in enumerate(counts) for i in order(score[g * size : (g + 1) * size])[:c]]


def farthest(metric: Tensor, pivot: Tensor | None, k: int, total: bool) -> list[int]:
    similar, n = cosine(metric), len(metric)
    if pivot is None:
        chosen = [first_best(range(n), lambda i: -max(similar[i][j] for j in range(n) if j != i))]
    else:
        chosen = [order(pivot)[0]]
    while len(chosen) < k:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(first_best(left, lambda i: -(sum if total else max)([similar[i][j] for j in chosen])))
    return chosen


def dpp(metric: Tensor, relevance: Tensor | None, k: int) -> list[int]:
    """By the determinants themselves."""
    kernel = torch.tensor(cosine(metric), dtype=torch.float64)
    kernel.fill_diagonal_(1.0)
    if relevance is not None:
        r = relevance.double()
        r = (r - r.min() + 1e-6) / (r.max() - r.min())
        kernel = r[:, None] * kernel * r
    chosen: list[int] = []
    for _ in range(k):
        left = [i for i in range(len(metric)) if i not in chosen]
        sets = [[*chosen, i] for i in left]
        chosen = sets[order([torch.logdet(kernel[s][:, s]) for s in sets])[0]]
    return chosen


def diverse(score: Tensor, metric: Tensor, important: int, k: int, step: int) -> list[int]:
    similar = cosine(metric)
    best = order(score)[:important]
    left = [i for i in range(len(score)) if i not in best]
    while len(left) > k - important:
        even, odd = left[::2], left[1::2]
        if not odd:
            return best
        nearest = [max(similar[a][b] for b in odd) for a in even]
        gone = [even[i] for i in order(nearest)[: min(step, len(left) - (k - important))]]
        left = [i for i in left if i not in gone]
    return best + left


def contextual(score: Tensor, metric: Tensor, dominant: int, count: int) -> tuple[list[int], dict[int, int]]:
    similar = cosine(metric)
    best = order(score)[:dominant]
    rest = [i for i in range(len(score)) if i not in best]
    targets = rest[:: len(rest) // count][:count]
    others = [i for i in rest if i not in targets]
    return best + targets, {i: first_best(targets, lambda t: similar[i][t]) for i in others}  # noqa: B023


def cells(score: Tensor, k: int, grid: list[int], cell: int) -> tuple[list[int], dict[int, int]]:
    members: dict[tuple[int, int], list[int]] = {}
    for i in range(len(score)):
        members.setdefault((i // grid[1] // cell, i % grid[1] // cell), []).append(i)
    lowest = {c: first_best(m, lambda i: -float(score[i])) for c, m in members.items()}
    best = [i for i in order(score) if i not in lowest.values()][:k]
    moved = {i: lowest[c] for c, m in members.items() for i in m if i not in best and i != lowest[c]}
    return best + list(lowest.values()), moved


def kmeans(metric: Tensor, k: int, iterations: int) -> tuple[list[int], dict[int, int]]:
    unit = [row / row.norm() for row in metric.double()]
    n = len(unit)
    seeds = [int((i + 0.5) * n / k) for i in range(k)]
    centres = [unit[s] for s in seeds]

    def nearest(i: int) -> int:
        return first_best(range(k), lambda c: float(unit[i] @ centres[c]))

    for _ in range(iterations):
        home = [nearest(i) for i in range(n)]
        members = [[unit[i] for i in range(n) if home[i] == c] for c in range(k)]
        means = [sum(m) if m else centres[c] for c, m in enumerate(members)]
        centres = [mean / mean.norm() for mean in means]
    return seeds, {i: seeds[nearest(i)] for i in range(n) if i not in seeds}


def density(metric: Tensor, k: int, neighbours: int) -> tuple[list[int], dict[int, int]]:
    x, n = metric.double(), len(metric)
    distance = [[float((a - b).norm()) / x.shape[1] ** 0.5 for b in x] for a in x]
    near = [sorted(row)[:neighbours] for row in distance]
    rho = [torch.tensor(-sum(d * d for d in row) / len(row), dtype=torch.float64).exp().item() for row in near]
    delta = []
    for i in range(n):
        denser = [distance[i][j] for j in range(n) if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        delta.append(min(denser) if denser else max(distance[i]))
    centres = order([a * b for a, b in zip(rho, delta, strict=True)])[:k]
    return centres, {i: first_best(centres, lambda c: -distance[i][c]) for i in range(n) if i not in centres}  # noqa: B023


# -- comparing ---------------------------------------------------------------------------------------------------------


def check_plan(plan: Sequence[Tensor], batch: int, start: int, stop: int, total: int, kept: int) -> None:
    """It is one: every position once, protected ones kept, kept ones ascending, destinations among the free places."""
    index, src, *dst = plan
    assert index.shape == (batch, total - (stop - start) + kept)
    assert src.shape == (batch, stop - start - kept)
    assert all(t.dtype == torch.int64 for t in plan)
    assert torch.equal(torch.cat([index, src], 1).sort(-1).values, torch.arange(total).expand(batch, -1))
    assert (index.diff(dim=1) > 0).all()
    assert ((src >= start) & (src < stop)).all()
    for places in dst:
        assert places.shape == src.shape
        assert ((places >= start) & (places < start + kept)).all()


def check(
    plan: Sequence[Tensor], expected: Sequence[Any], start: int, stop: int, total: int, ranked: bool = False
) -> None:
    """``expected``: per sample the kept tokens of the segment, or those and where each other one goes."""
    for b, answer in enumerate(expected):
        kept, moved = answer if isinstance(answer, tuple) else (answer, None)
        check_plan([t[b : b + 1] for t in plan], 1, start, stop, total, len(kept))
        index, src, *dst = (t[b].tolist() for t in plan)
        assert index == [*range(start), *(start + i for i in sorted(kept)), *range(stop, total)]
        assert ranked or src == sorted(src)
        if moved is not None:
            assert {s: index[d] for s, d in zip(src, dst[0], strict=True)} == {
                start + a: start + b for a, b in moved.items()
            }


@st.composite
def sequences(draw: st.DrawFn, least: int = 2, most: int = 18) -> tuple[Tensor, Tensor, int, int]:
    """Metric [B, N, 8], score [B, N], start, stop."""
    batch, start, free, tail = (draw(st.integers(a, b)) for a, b in ((1, 3), (0, 2), (least, most), (0, 2)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    metric = torch.randn(batch, start + free + tail, 8, generator=generator)
    return metric, torch.rand(batch, start + free + tail, generator=generator), start, start + free


many = settings(max_examples=60, deadline=None, derandomize=True)


@many
@given(sequences(), st.data())
def test_partition(sequence: Any, data: st.DataObject) -> None:
    metric, _, start, stop = sequence
    places = data.draw(st.permutations(range(stop - start)))
    a = data.draw(st.integers(1, len(places) - 1))
    b = data.draw(st.integers(a + 1, len(places)))
    r = data.draw(st.integers(0, a))
    sources, targets = torch.tensor([places[:a]]) + start, torch.tensor([places[a:b]]) + start
    plan = ops.match_partition(metric, sources, targets, r, start, stop)
    batch = metric.shape[0]
    per_sample = ops.match_partition(metric, sources.expand(batch, -1), targets.expand(batch, -1), r, start, stop)
    assert all(torch.equal(x, y) for x, y in zip(plan, per_sample, strict=True))
    results = [partition(m[start:stop], places[:a], places[a:b], r) for m in metric]
    kept = [([i for i in range(stop - start) if i not in removed], moved) for removed, moved in results]
    check(plan, kept, start, stop, metric.shape[1], ranked=True)
    assert plan[1].tolist() == [[start + i for i in removed] for removed, _ in results]


@many
@given(sequences(), st.floats(0, 1))
def test_energy_ranks_are_dealt_in_turn(sequence: Any, share: float) -> None:
    _, score, start, stop = sequence
    r = int(share * ((stop - start) // 2))
    sources, targets = ops.partition_energy(score, r, start, stop)
    for b, row in enumerate(score):
        ranked = [start + i for i in order(row[start:stop])][: 2 * r]
        assert (sources[b].tolist(), targets[b].tolist()) == (ranked[0::2], ranked[1::2])


@many
@given(sequences(12, 12), st.sampled_from([(3, 4), (4, 3), (1, 12), (12, 1)]), st.floats(0, 1))
def test_rows(sequence: Any, grid: tuple[int, int], share: float) -> None:
    _, score, start, stop = sequence
    keep = round(share * grid[0])
    plan = ops.select_rows(score, keep, *grid, start, stop)
    check(plan, [rows(s[start:stop], keep, *grid) for s in score], start, stop, score.shape[1])


@many
@given(sequences(12, 12), st.sampled_from([[2, 2, 2], [0, 4, 1], [3, 5], [12], [0, 0], [4, 4, 4]]))
def test_groups(sequence: Any, counts: list[int]) -> None:
    _, score, start, stop = sequence
    plan = ops.select_groups(score, counts, start, stop)
    check(plan, [groups(s[start:stop], counts) for s in score], start, stop, score.shape[1])


@many
@given(sequences(), st.floats(0, 1), st.booleans(), st.booleans())
def test_farthest(sequence: Any, share: float, max_sum: bool, pivot: bool) -> None:
    metric, score, start, stop = sequence
    k = max(1, round(share * (stop - start)))
    given_score = score if pivot else None
    plan = ops.select_farthest(metric, given_score, k, max_sum, start, stop)
    expected = [
        farthest(m[start:stop], s[start:stop] if pivot else None, k, max_sum)
        for m, s in zip(metric, score, strict=True)
    ]
    check(plan, expected, start, stop, metric.shape[1])


@many
@given(sequences(least=3), st.integers(1, 7), st.booleans())
def test_dpp_is_greedy_by_determinants(sequence: Any, k: int, relevant: bool) -> None:
    metric, score, start, stop = sequence
    k = min(k, stop - start - 1)  # and less than D: beyond the rank determinants are zero
    plan = ops.select_dpp(metric, score if relevant else None, k, start, stop)
    expected = [dpp(m[start:stop], s[start:stop] if relevant else None, k) for m, s in zip(metric, score, strict=True)]
    check(plan, expected, start, stop, metric.shape[1])


def test_dpp_with_relevance_of_any_scale() -> None:
    metric, relevance = torch.randn(16, 24, 16), torch.rand(16, 24)
    for scaled in (relevance, 0.01 * relevance + 5, 1e4 * relevance**4):
        expected = [dpp(m, r, 8) for m, r in zip(metric, scaled, strict=True)]
        check(ops.select_dpp(metric, scaled, 8, 0, 24), expected, 0, 24, 24)


@pytest.mark.parametrize("relevant", [False, True])
def test_dpp_beyond_the_rank_is_still_a_plan(relevant: bool) -> None:
    metric = torch.randn(2, 3, 40).transpose(1, 2)  # of rank 3
    metric[1] = metric[1, :1]  # of rank 1
    relevance = torch.rand(2, 40) if relevant else None
    index, src = ops.select_dpp(metric, relevance, 30, 2, 39)
    check_plan((index, src), 2, 2, 39, 40, 30)
    if not relevant:
        assert index[1, 2] == 2  # all are equal: the first position wins


def test_dpp_weighs_relevance_against_diversity() -> None:
    metric = torch.eye(4)[[0, 0, 1, 2]][None] + 0.01 * torch.randn(1, 4, 4)
    assert ops.select_dpp(metric, torch.tensor([[1.0, 0.9, 0.5, 0.0]]), 2, 0, 4)[0].tolist() == [[0, 2]]
    assert ops.select_dpp(metric, torch.tensor([[0.9, 1.0, 0.0, 0.5]]), 2, 0, 4)[0].tolist() == [[1, 3]]


def test_dpp_of_equal_relevance_is_that_without() -> None:
    metric = torch.randn(2, 20, 16)
    expected = ops.select_dpp(metric, None, 8, 1, 20)[0]
    assert torch.equal(ops.select_dpp(metric, torch.full((2, 20), 0.3), 8, 1, 20)[0], expected)


@many
@given(sequences(), st.floats(0, 1), st.floats(0, 1), st.integers(1, 5))
def test_diverse(sequence: Any, share: float, important_share: float, step: int) -> None:
    metric, score, start, stop = sequence
    k = max(1, round(share * (stop - start)))
    important = round(important_share * k)
    plan = ops.select_diverse(score, metric, important, k, step, start, stop)
    pairs = list(zip(score, metric, strict=True))
    expected = [diverse(s[start:stop], m[start:stop], important, k, step) for s, m in pairs]
    if important == k:
        expected = [order(s[start:stop])[:k] for s in score]
    check(plan, expected, start, stop, metric.shape[1])


@pytest.mark.parametrize(("important", "k", "step"), [(0, 1, 8), (1, 2, 8), (3, 5, 3), (0, 3, 1), (4, 4, 2)])
def test_diverse_never_drops_more_than_the_even_ones(important: int, k: int, step: int) -> None:
    metric, score = torch.randn(8, 17, 8), torch.rand(8, 17)
    pairs = zip(score, metric, strict=True)
    expected = [diverse(s, m, important, k, step) if k > important else order(s)[:k] for s, m in pairs]
    check(ops.select_diverse(score, metric, important, k, step, 0, 17), expected, 0, 17, 17)


@many
@given(sequences(), st.data())
def test_contextual(sequence: Any, data: st.DataObject) -> None:
    metric, score, start, stop = sequence
    dominant = data.draw(st.integers(0, stop - start - 1))
    count = data.draw(st.integers(1, stop - start - dominant))
    plan = ops.select_contextual(score, metric, dominant, count, start, stop)
    pairs = list(zip(score, metric, strict=True))
    expected = [contextual(s[start:stop], m[start:stop], dominant, count) for s, m in pairs]
    check(plan, expected, start, stop, metric.shape[1])


def test_contextual_tokens_must_exist() -> None:
    score, metric = torch.rand(1, 6), torch.randn(1, 6, 4)
    assert ops.select_contextual(score, metric, 6, 0, 0, 6)[0].tolist() == [list(range(6))]
    with pytest.raises(AssertionError, match="need a contextual one"):
        ops.select_contextual(score, metric, 3, 0, 0, 6)


@many
@given(sequences(12, 12), st.sampled_from([([3, 4], 2), ([4, 3], 2), ([2, 6], 3), ([3, 4], 5), ([4, 3], 1)]),
       st.floats(0, 1))  # fmt: skip
def test_cells(sequence: Any, layout: tuple[list[int], int], share: float) -> None:
    _, score, start, stop = sequence
    grid, cell = layout
    count = -(-grid[0] // cell) * -(-grid[1] // cell)
    k = round(share * (12 - count))
    plan = ops.select_cells(score, k, grid, cell, start, stop)
    check_plan(plan, score.shape[0], start, stop, score.shape[1], k + count)
    check(plan, [cells(s[start:stop], k, grid, cell) for s in score], start, stop, score.shape[1])


@many
@given(sequences(), st.floats(0, 1), st.integers(0, 4))
def test_kmeans(sequence: Any, share: float, iterations: int) -> None:
    metric, _, start, stop = sequence
    k = max(1, round(share * (stop - start)))
    plan = ops.cluster_kmeans(metric, k, iterations, start, stop)
    check(plan, [kmeans(m[start:stop], k, iterations) for m in metric], start, stop, metric.shape[1])


def test_a_centre_without_tokens_stays() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    metric = torch.stack([a, a, a, a, a, b])[None]  # seeds 1 and 4 are equal: all go to the first centre
    for iterations in (1, 2):
        index, src, dst = ops.cluster_kmeans(metric, 2, iterations, 0, 6)
        assert (index.tolist(), src.tolist()) == ([[1, 4]], [[0, 2, 3, 5]])
        # the first centre moved toward b, so that the second, which nothing moved, is the nearer one for the a's
        assert dst.tolist() == [[1, 1, 1, 0]]


@many
@given(sequences(), st.floats(0, 1), st.integers(2, 6))
def test_density(sequence: Any, share: float, neighbours: int) -> None:
    metric, _, start, stop = sequence
    k = max(1, round(share * (stop - start)))
    plan = ops.cluster_density(metric, k, neighbours, start, stop)
    check(plan, [density(m[start:stop], k, neighbours) for m in metric], start, stop, metric.shape[1])


def test_density_far_from_the_origin_and_far_apart() -> None:
    """Neither cancellation nor underflow: of distant tokens all densities are zero in float32."""
    metric = torch.randn(2, 20, 8)
    far = metric + 1000
    check(ops.cluster_density(far, 5, 4, 0, 20), [density(m, 5, 4) for m in far], 0, 20, 20)
    wide = metric * 30
    assert (-torch.cdist(wide, wide).square().topk(4, largest=False).values.mean(-1) / 8).exp().max() == 0
    check(ops.cluster_density(wide, 5, 4, 0, 20), [density(m, 5, 4) for m in wide.double()], 0, 20, 20)


# -- all of them -------------------------------------------------------------------------------------------------------

START, STOP, TOTAL = 1, 13, 14  # a 3 x 4 grid between two protected tokens
SOURCES, TARGETS = [2, 12, 5, 7, 9], [1, 6, 4]

CALLS: dict[str, tuple[Callable[[Tensor, Tensor], Sequence[Tensor]], int]] = {
    "match_partition": (lambda m, s: ops.match_partition(
        m, torch.tensor([SOURCES], device=m.device), torch.tensor([TARGETS], device=m.device), 3, START, STOP), 9),
    "partition_energy": (lambda m, s: ops.match_partition(
        m, *ops.partition_energy(s, 4, START, STOP), 4, START, STOP), 8),
    "select_rows": (lambda m, s: ops.select_rows(s, 2, 3, 4, START, STOP), 8),
    "select_groups": (lambda m, s: ops.select_groups(s, [1, 2, 0], START, STOP), 3),
    "select_farthest": (lambda m, s: ops.select_farthest(m, None, 3, False, START, STOP), 3),
    "select_farthest_sum": (lambda m, s: ops.select_farthest(m, s, 4, True, START, STOP), 4),
    "select_dpp": (lambda m, s: ops.select_dpp(m, None, 3, START, STOP), 3),
    "select_dpp_relevance": (lambda m, s: ops.select_dpp(m, s, 4, START, STOP), 4),
    "select_diverse": (lambda m, s: ops.select_diverse(s, m, 2, 5, 4, START, STOP), 5),
    "select_contextual": (lambda m, s: ops.select_contextual(s, m, 4, 2, START, STOP), 6),
    "select_cells": (lambda m, s: ops.select_cells(s, 3, [3, 4], 3, START, STOP), 5),
    "cluster_kmeans": (lambda m, s: ops.cluster_kmeans(m, 4, 1, START, STOP), 4),
    "cluster_density": (lambda m, s: ops.cluster_density(m, 4, 3, START, STOP), 4),
}  # fmt: skip


class Everything(nn.Module):
    """All selections of one sequence."""

    def forward(self, metric: Tensor, score: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for call, _ in CALLS.values() for t in call(metric, score))


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, TOTAL, 8), torch.rand(batch, TOTAL)


@pytest.mark.parametrize("name", CALLS)
def test_protected_tokens_and_the_order_of_samples_do_not_matter(name: str) -> None:
    call, kept = CALLS[name]
    metric, score = inputs(3)
    plan = call(metric, score)
    check_plan(plan, 3, START, STOP, TOTAL, kept)
    metric[:, [0, -1]], score[:, [0, -1]] = metric[:, 3:4] * 2, 100.0
    assert all(torch.equal(a, b) for a, b in zip(call(metric, score), plan, strict=True))
    for b in range(3):
        alone = call(metric[b : b + 1], score[b : b + 1])
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, plan, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_of_equals_the_first_position_wins(name: str) -> None:
    """Where everything is equal nothing but the order decides; all samples decide alike."""
    call, kept = CALLS[name]
    plan = call(torch.ones(2, TOTAL, 4), torch.ones(2, TOTAL))
    check_plan(plan, 2, START, STOP, TOTAL, kept)
    first = [*range(1, kept + 1)]
    expected = {
        "match_partition": [i for i in range(START, STOP) if i not in SOURCES[:3]],
        "partition_energy": [2, 4, 6, 8, 9, 10, 11, 12],
        "select_groups": [1, 5, 6],
        "select_diverse": [1, 2, 6, 10, 12],  # of 3 to 12 go 3, 5, 7, 9, and of 4, 6, 8, 10, 11, 12 then 4, 8, 11
        "select_contextual": [1, 2, 3, 4, 5, 9],
        "select_cells": [1, 2, 3, 4, 5],
        "cluster_kmeans": [2, 5, 8, 11],
    }
    assert plan[0].tolist() == [[0, *expected.get(name, first), 13]] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_half_precision_is_compared_in_single(name: str, dtype: torch.dtype) -> None:
    call, _ = CALLS[name]
    metric, score = (t.to(dtype) for t in inputs(16))
    for a, b in zip(call(metric, score), call(metric.float(), score.float()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_numbers_that_are_none_stay_in_bounds(name: str) -> None:
    """What they select has no meaning, but it must not be an error of the device."""
    call, _ = CALLS[name]
    metric, score = inputs(2)
    metric[0], score[0] = float("nan"), float("nan")
    expected = call(metric[1:], score[1:])
    for a, b in zip(call(metric, score), expected, strict=True):
        assert ((a >= 0) & (a < TOTAL)).all()
        assert torch.equal(a[1:], b)


def test_compiles_whole() -> None:
    """Without a graph break, and without compiling anew for another batch size."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    count = CompileCounter()
    compiled = torch.compile(Everything(), backend=count, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        arguments = inputs(batch)
        for a, b in zip(compiled(*arguments), Everything()(*arguments), strict=True):
            assert torch.equal(a, b)
    assert count.frame_count == 1


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all: most of the time goes to the exporter."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("select") / "model.onnx"
    write(capture(Everything(), inputs(2)), path)
    return path


@pytest.mark.parametrize("name", CALLS)
def test_onnx_runtime_selects_the_same(file: Path, name: str) -> None:
    engine = runtimes.open(file)
    names = [name for name, (call, _) in CALLS.items() for _ in call(*inputs(1))]
    call, _ = CALLS[name]
    for batch in (1, 2, 7):
        metric, score = inputs(batch)
        found = [t for t, n in zip(engine(metric, score), names, strict=True) if n == name]
        for a, b in zip(found, call(metric, score), strict=True):
            assert torch.equal(a, b)


@pytest.mark.tensorrt
@pytest.mark.skipif(TensorRTRTX().available() is not None, reason="tensorrt_rtx is not installed")
def test_tensorrt_builds_all(file: Path, tmp_path: Path) -> None:
    runtime = TensorRTRTX()
    require_expressible(onnx.load(file), runtime.capabilities, runtime.name)
    runtime._build(file, tmp_path / "model.engine", "8.9", (1, 8, 64), False)
    assert (tmp_path / "model.engine").stat().st_size > 0


def test_long_selections_trace_quickly() -> None:
    """64 steps are a graph of some hundred operations: no step is more than a few."""
    from torch.fx.experimental.proxy_tensor import make_fx

    limits = {"farthest": 5, "dpp": 17, "diverse": 14}
    calls = {
        "farthest": lambda m, s: ops.select_farthest(m, s, 64, False, 0, 200),
        "dpp": lambda m, s: ops.select_dpp(m, s, 64, 0, 200),
        "diverse": lambda m, s: ops.select_diverse(s, m, 0, 72, 2, 0, 200),
    }
    for name, call in calls.items():
        graph = make_fx(call, tracing_mode="fake")(torch.randn(2, 200, 4), torch.rand(2, 200)).graph
        assert len(graph.nodes) <= 64 * limits[name] + 60, name
