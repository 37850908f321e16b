"""Soft plans equal their formulas written out in loops, in any layout and precision, and in every runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.test_ops_score import Cases, captured, check_pairs, cosine, double, drawn, in_onnxruntime, outputs
from tokenopt.ops.mix import (
    grid_interpolation,
    mix_tokens,
    neighbour_weights,
    pool_matrix,
    scatter_tokens,
    soft_association,
)
from tokenopt.runtimes.onnx import write
from tokenopt.runtimes.tensorrt import TensorRTRTX

ops = torch.ops.tokenopt

# shape, the dimension of 7 tokens, the dimension of samples
LAYOUTS = [((2, 7, 4), 1, 0), ((7, 2, 4), 0, 1), ((2, 3, 7, 4), 2, 0), ((1, 7), 1, 0), ((2, 7), 1, 0),
           ((1, 1, 7, 7), 3, 0), ((4, 2, 7), 2, 1), ((2, 3, 7, 2, 2), 2, 0)]  # fmt: skip


def samples(x: Tensor, dim: int, batch_dim: int) -> list[Tensor]:
    """Of two samples, tokens first: [N, ...] each."""
    x = x.expand(*(2 if i == batch_dim else -1 for i in range(x.dim())))
    return [x.select(batch_dim, b).movedim(dim - (dim > batch_dim), 0) for b in range(2)]


# -- mixing and scattering ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim", "batch_dim"), LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_mixing_in_any_layout(shape: tuple[int, ...], dim: int, batch_dim: int, batch: int) -> None:
    x = torch.randn(shape)
    for start, count, places in ((2, 4, 3), (0, 7, 5)):
        matrix = torch.randn(batch, places, count)
        out = mix_tokens(x, matrix, dim, batch_dim, start, count)
        wanted = list(shape)
        wanted[dim], wanted[batch_dim] = 7 - count + places, max(shape[batch_dim], batch)
        assert list(out.shape) == wanted
        for b, (result, old) in enumerate(zip(samples(out, dim, batch_dim), samples(x, dim, batch_dim), strict=True)):
            weights = matrix[b % batch]
            mixed = [sum(weights[i, j] * old[start + j] for j in range(count)) for i in range(places)]
            torch.testing.assert_close(result, torch.cat([old[:start], torch.stack(mixed), old[start + count :]]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(0, 3), st.integers(0, 100))
def test_mixing_by_the_identity_and_by_a_permutation(head: int, count: int, tail: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, head + count + tail, 3, generator=generator)
    assert torch.equal(mix_tokens(x, torch.eye(count)[None], 1, 0, head, count), x)
    order = torch.randperm(count, generator=generator)
    expected = torch.cat([x[:, :head], x[:, head : head + count][:, order], x[:, head + count :]], 1)
    assert torch.equal(mix_tokens(x, torch.eye(count)[order][None], 1, 0, head, count), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixing_in_half_precision_sums_in_single(dtype: torch.dtype) -> None:
    """The weights 1 + 2^-12 and -1 are equal and opposite once they are rounded."""
    mixed = mix_tokens(torch.ones(1, 2, 1, dtype=dtype), torch.tensor([[[1 + 2**-12, -1.0]]]), 1, 0, 0, 2)
    assert mixed.dtype is dtype
    assert mixed.item() == 2**-12


def test_mixing_keeps_double_precision() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    matrix = torch.rand(2, 2, 5)
    torch.testing.assert_close(mix_tokens(x, matrix, 1, 0, 0, 5), matrix.double() @ x, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("shape", "dim", "batch_dim"), LAYOUTS)
def test_scattering_in_any_layout(shape: tuple[int, ...], dim: int, batch_dim: int) -> None:
    base = torch.randn(shape)
    y = torch.randn(*(3 if i == dim else s for i, s in enumerate(shape)))
    index = torch.tensor([[0, 6, 2], [3, 5, 1]])
    out = scatter_tokens(y, index, base, dim, batch_dim)
    parts = zip(samples(out, dim, batch_dim), samples(y, dim, batch_dim), samples(base, dim, batch_dim), strict=True)
    for b, (result, new, canvas) in enumerate(parts):
        expected = canvas.clone()
        for i in range(3):
            expected[index[b, i]] = new[i]
        assert torch.equal(result, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.data())
def test_scattering_all_tokens_back_is_the_identity(batch: int, total: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    index = torch.stack([torch.randperm(total, generator=generator) for _ in range(batch)])
    index = index[:, : data.draw(st.integers(1, total))]
    base = torch.randn(batch, total, 2, generator=generator)
    kept = ops.gather_tokens(base, index, 1, 0, 0, total)
    torch.testing.assert_close(scatter_tokens(kept.double(), index, base, 1, 0), base, atol=0, rtol=0)
    added = scatter_tokens(kept + 1, index, base, 1, 0) - base
    torch.testing.assert_close(added.sum(), torch.tensor(2.0 * index.numel()))


# -- pooling and association -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3))
def test_pooling_is_adaptive_average_pooling(sizes: list[tuple[int, int]]) -> None:
    grid, cells = [max(s) for s in sizes], [min(s) for s in sizes]
    x = torch.randn(2, math.prod(grid), 3)
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(grid) - 1]
    expected = pool(x.transpose(1, 2).unflatten(2, grid), cells).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool_matrix(grid, cells) @ x, expected)


def associate_by_loops(
    x: np.ndarray, grid: list[int], cells: list[int], iterations: int, local: bool
) -> tuple[np.ndarray, np.ndarray]:
    """x [n, C] -> A [n, K], S [K, C]."""
    n, c = x.shape
    tokens, places = list(np.ndindex(*grid)), list(np.ndindex(*cells))
    centres = []
    for cell in places:
        ranges = [range(j * g // k, math.ceil((j + 1) * g / k)) for j, g, k in zip(cell, grid, cells, strict=True)]
        inside = [i for i, token in enumerate(tokens) if all(t in r for t, r in zip(token, ranges, strict=True))]
        centres.append(x[inside].mean(0))
    for _ in range(iterations):
        shares = np.zeros((n, len(places)))
        for i, token in enumerate(tokens):
            own = [int((t + 0.5) * k / g) for t, g, k in zip(token, grid, cells, strict=True)]
            mass = {
                j: math.exp(x[i] @ centres[j] / math.sqrt(c))
                for j, cell in enumerate(places)
                if not local or all(abs(a - b) <= 1 for a, b in zip(own, cell, strict=True))
            }
            for j, m in mass.items():
                shares[i, j] = m / sum(mass.values())
        centres = [
            sum(shares[i, j] * x[i] for i in range(n)) / (shares[:, j].sum() + 1e-12) for j in range(len(places))
        ]
    return shares, np.stack(centres)


@pytest.mark.parametrize(("grid", "cells"), [([6, 8], [3, 4]), ([5, 7], [4, 3]), ([9], [4]), ([2, 4, 4], [1, 3, 4])])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_association(grid: list[int], cells: list[int], local: bool, iterations: int) -> None:
    n = math.prod(grid)
    x = torch.randn(2, n + 3, 5)
    assign, spread = soft_association(x, grid, cells, iterations, local, 2)
    assert assign.dtype is spread.dtype is torch.float32
    torch.testing.assert_close(spread.sum(-1), torch.ones(2, n))
    torch.testing.assert_close(assign.sum(-1), torch.ones(2, math.prod(cells)))
    for b in range(2):
        shares, centres = associate_by_loops(double(x[b, 2 : n + 2]), grid, cells, iterations, local)
        torch.testing.assert_close(spread[b].double(), torch.tensor(shares), atol=1e-5, rtol=1e-4)
        super_tokens = mix_tokens(x, assign, 1, 0, 2, n)[b, 2:-1]
        torch.testing.assert_close(super_tokens.double(), torch.tensor(centres), atol=1e-5, rtol=1e-4)


def test_association_with_as_many_cells_as_tokens_and_far_tokens_is_the_identity() -> None:
    x = 30 * torch.eye(12)[None]
    assign, spread = soft_association(x, [3, 4], [3, 4], 1, True, 0)
    torch.testing.assert_close(assign[0], torch.eye(12))
    torch.testing.assert_close(spread[0], torch.eye(12))
    with pytest.raises(AssertionError, match="association"):
        soft_association(x, [3, 4], [3, 4], 0, True, 0)


# -- kept tokens and their neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", [0, 1, 3, 32])
def test_neighbour_weights(neighbours: int) -> None:
    metric, score = torch.randn(2, 10, 4), torch.rand(2, 10)
    index = torch.tensor([[0, 4, 6], [1, 2, 7]])
    assign = neighbour_weights(metric, score, index, neighbours, 1, 9)
    expected = torch.zeros(2, 3, 8)
    for b in range(2):
        vectors, kept = double(metric[b, 1:9]), index[b].tolist()
        removed = [q for q in range(8) if q not in kept]
        for place, p in enumerate(kept):
            expected[b, place, p] = 1.0
            for q in sorted(removed, key=lambda q: -cosine(vectors[p], vectors[q]))[:neighbours]:  # noqa: B023
                expected[b, place, q] = score[b, 1 + q]
    torch.testing.assert_close(assign, expected)


def test_no_token_is_removed_so_none_is_taken() -> None:
    index = torch.arange(6)[None]
    assign = neighbour_weights(torch.randn(2, 6, 4), torch.rand(2, 6), index.expand(2, -1), 4, 0, 6)
    assert torch.equal(assign, torch.eye(6).expand(2, 6, 6))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from([0.5, 1.0, 2.0]), st.data())
def test_interpolation_in_a_grid(grid: list[int], power: float, data: st.DataObject) -> None:
    n = math.prod(grid)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    count = data.draw(st.integers(1, min(n, 6)))
    index = torch.stack([torch.randperm(n, generator=generator)[:count] for _ in range(2)])
    spread = grid_interpolation(index, grid, power)
    assert spread.dtype is torch.float32
    torch.testing.assert_close(spread.sum(-1), torch.ones(2, n))
    places = list(np.ndindex(*grid))
    for b in range(2):
        kept = index[b].tolist()
        assert torch.equal(spread[b, index[b]], torch.eye(count))
        for i in set(range(n)) - set(kept):
            distances = [math.dist(places[i], places[k]) for k in kept]
            total = sum(d**-power for d in distances)
            expected = torch.tensor([d**-power / total for d in distances])
            torch.testing.assert_close(spread[b, i], expected, atol=1e-5, rtol=1e-4)


def test_interpolation_by_a_high_power_is_the_nearest_token() -> None:
    """100 ** -40 is 0 in float32."""
    spread = grid_interpolation(torch.tensor([[0, 199]]), [200], 40.0)
    nearest = (torch.arange(200) >= 100).long()
    assert torch.equal(spread[0].argmax(-1), nearest)
    torch.testing.assert_close(spread.sum(-1), torch.ones(1, 200))


# -- every operation: precision, batch, compilation, runtimes ----------------------------------------------------------

INDEX = torch.tensor([[0, 4, 6], [5, 2, 7]])
CASES: Cases = {
    "mix_tokens": (lambda x, m: ops.mix_tokens(x, m, 1, 0, 2, 4), [(2, 8, 5), (2, 3, 4)]),
    "mix_tokens_of_heads_and_a_table": (
        lambda x, m: (ops.mix_tokens(x, m, 2, 0, 0, 8), ops.mix_tokens(x[:1, 0, :, :1].mT, m, 2, 0, 0, 8)),
        [(2, 3, 8, 5), (2, 3, 8)],
    ),
    "mix_tokens_by_a_constant": (
        lambda x: ops.mix_tokens(x, pool_matrix([2, 4], [1, 2])[None], 1, 0, 0, 8),
        [(2, 8, 5)],
    ),
    "mix_tokens_of_a_later_batch": (
        lambda x, m: ops.mix_tokens(x.transpose(0, 1), m, 0, 1, 1, 7).transpose(0, 1),
        [(2, 8, 5), (2, 3, 7)],
    ),
    "scatter_tokens": (lambda y, i, base: ops.scatter_tokens(y, i, base, 1, 0), [(2, 3, 5), INDEX, (2, 8, 5)]),
    "scatter_tokens_of_heads": (
        lambda y, i, base: ops.scatter_tokens(y, i, base, 2, 0),
        [(2, 2, 3, 5), INDEX, (2, 2, 8, 5)],
    ),
    "soft_association": (lambda x: ops.soft_association(x, [3, 4], [2, 2], 2, True, 1), [(2, 14, 5)]),
    "soft_association_global": (lambda x: ops.soft_association(x, [2, 3, 2], [1, 2, 2], 1, False, 0), [(2, 12, 5)]),
    "neighbour_weights": (
        lambda metric, score, i: ops.neighbour_weights(metric, score, i, 2, 1, 9),
        [(2, 10, 4), (2, 10), INDEX],
    ),
    "grid_interpolation": (lambda i: ops.grid_interpolation(i, [2, 4], 2.0), [INDEX]),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Tensor, Tensor]]]:
    path = tmp_path_factory.mktemp("mixes") / "model.onnx"
    write(captured(CASES), path)
    return in_onnxruntime(CASES, path)


@pytest.mark.parametrize("name", CASES)
def test_in_onnxruntime_with_a_dynamic_batch(name: str, exported: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
    check_pairs(exported[name])


@pytest.mark.parametrize("name", CASES)
def test_compiled_on_any_batch_and_in_half_precision(name: str) -> None:
    """Plans do not depend on the precision of their inputs, tokens keep theirs: as float32, rounded at the end."""
    function, shapes = CASES[name]
    inputs = drawn(shapes)
    expected = outputs(function(*inputs))
    for alone, both in zip(outputs(function(*(x[:1] for x in inputs))), expected, strict=True):
        torch.testing.assert_close(alone, both[:1])
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for actual, both in zip(outputs(compiled(*inputs)), expected, strict=True):
        torch.testing.assert_close(actual, both)
    for dtype in (torch.float16, torch.bfloat16):
        half = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        exact = outputs(function(*(x.float() if x.is_floating_point() else x for x in half)))
        for actual, wanted in zip(outputs(function(*half)), exact, strict=True):
            assert actual.dtype is (dtype if "tokens" in name else torch.float32)
            assert torch.equal(actual, wanted.to(actual.dtype))


@pytest.mark.tensorrt
@pytest.mark.skipif(TensorRTRTX().available() is not None, reason="tensorrt_rtx is not installed")
def test_one_engine_of_all_mixes(tmp_path: Path) -> None:
    """Indices are chosen inside: those that a parity check draws may be out of range, or the same twice."""

    def choose(name: str) -> tuple[Callable[..., Any], list[tuple[int, ...] | Tensor]]:
        function, shapes = CASES[name]
        at = next(i for i, s in enumerate(shapes) if s is INDEX)

        def chosen(*inputs: Tensor) -> Tensor:
            order = inputs[at].argsort(-1)[:, :3]
            return function(*inputs[:at], order, *inputs[at + 1 :])

        return chosen, [(2, 8) if s is INDEX else s for s in shapes]

    cases = {n: choose(n) if any(x is INDEX for x in s) else (f, s) for n, (f, s) in CASES.items()}
    engine = TensorRTRTX().build(captured(cases), tmp_path / "model.engine")
    assert len(engine.outputs) == sum(len(outputs(f(*drawn(s)))) for f, s in CASES.values())
    assert all(c.passed for c in engine.parity)
