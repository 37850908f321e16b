"""Every score equals its formula written out in loops, in any precision, on any batch, and in every runtime."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenopt import capture
from tokenopt.ops.score import (
    attention_received,
    boost_neighbours,
    centre_similarity,
    massive_activation,
    ncut_partition,
    patch_entropy,
    patch_variance,
    sink_rows,
    text_similarity,
    token_energy,
    token_norm,
    token_transition,
)
from tokenopt.program import Program
from tokenopt.runtimes import onnx as onnx_runtime
from tokenopt.runtimes.base import Engine
from tokenopt.runtimes.tensorrt import TensorRTRTX

ops = torch.ops.tokenopt


Cases = dict[str, tuple[Callable[..., Any], list[tuple[int, ...] | Tensor]]]


class Every(nn.Module):
    """All cases side by side: one export, one file, one engine. Its input is the list of all their inputs."""

    def __init__(self, cases: Cases) -> None:
        super().__init__()
        self.cases = cases

    def forward(self, x: list[Tensor]) -> dict[str, list[Tensor]]:
        rest = iter(x)
        return {
            name: outputs(function(*(next(rest) for _ in shapes))) for name, (function, shapes) in self.cases.items()
        }


def outputs(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def drawn(shapes: list[tuple[int, ...] | Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(s if isinstance(s, Tensor) else torch.randn(s, generator=generator) for s in shapes)


def captured(cases: Cases) -> Program:
    return capture(Every(cases), ([x for _, shapes in cases.values() for x in drawn(shapes)],))


def in_onnxruntime(cases: Cases, path: Path) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Each case's outputs by the file and by eager torch, on batches that it was not exported with."""
    engine = onnx_runtime.Onnx().load(path, threads=1)
    assert engine.dynamic_batch
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in cases}
    for count in (1, 3):
        inputs = {n: [torch.cat([x, x.flip(0)])[:count] for x in drawn(s)] for n, (_, s) in cases.items()}
        actual = iter(engine(*(x for part in inputs.values() for x in part)))
        for name, (function, _) in cases.items():
            pairs[name] += [(next(actual), x) for x in outputs(function(*inputs[name]))]
    return pairs


def check_pairs(pairs: list[tuple[Tensor, Tensor]]) -> None:
    assert pairs
    for actual, expected in pairs:
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def double(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def check(actual: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    assert actual.dtype is torch.float32
    torch.testing.assert_close(actual.double(), torch.as_tensor(np.array(expected)), atol=tolerance, rtol=tolerance)


# -- received attention ------------------------------------------------------------------------------------------------


def received_by_loops(
    query: Tensor, key: Tensor, bias: Tensor, weight: Tensor | None, scale: float, visible: Tensor, itself: bool = True
) -> list[list[float]]:
    """``bias`` and ``visible`` are [B, H, N, M]."""
    batch, heads, rows, columns = visible.shape
    result = [[0.0] * columns for _ in range(batch)]
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                seen = [j for j in range(columns) if visible[b, h, i, j] and bias[b, h, i, j] > -math.inf]
                mass = [
                    math.exp((query[b, h, i].double() @ key[b, h, j].double()).item() * scale + bias[b, h, i, j].item())
                    for j in seen
                ]
                share = 1 / rows if weight is None else weight[b % len(weight), i].item()
                for j, m in zip(seen, mass, strict=True):
                    if itself or i != j:
                        result[b][j] += share / heads * m / sum(mass)
    return result


ALL = torch.ones(2, 2, 5, 7, dtype=torch.bool)
NOTHING = torch.zeros(2, 2, 5, 7)


def heads(rows: int, batch: int = 2, count: int = 2) -> Tensor:
    return torch.randn(batch, count, rows, 4)


def test_received_attention() -> None:
    query, key = heads(5), heads(7)
    check(attention_received(query, key, None, None, None), received_by_loops(query, key, NOTHING, None, 0.5, ALL))
    check(
        attention_received(query, key, None, None, None, scale=0.9),
        received_by_loops(query, key, NOTHING, None, 0.9, ALL),
    )


@pytest.mark.parametrize("shape", [(2, 2, 5, 7), (2, 1, 1, 7), (1, 2, 5, 7), (5, 7), (1, 7), (7,)])
@pytest.mark.parametrize("boolean", [False, True])
def test_received_attention_with_a_bias_that_broadcasts(shape: tuple[int, ...], boolean: bool) -> None:
    query, key, key_bias, bias = heads(5), heads(7), torch.randn(2, 7), torch.randn(shape)
    columns = key_bias[:, None, None].expand(2, 2, 5, 7)
    visible, total = ALL, columns + bias
    if boolean:
        bias = bias > -0.3
        bias[..., 2] = True
        visible, total = bias.expand(2, 2, 5, 7), columns
    check(
        attention_received(query, key, bias, key_bias, None), received_by_loops(query, key, total, None, 0.5, visible)
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_received_attention_weighted_causal_without_itself(batch: int) -> None:
    query, key, weight = heads(7), heads(7), torch.rand(batch, 7)
    zeros, visible = torch.zeros(2, 2, 7, 7), torch.ones(2, 2, 7, 7, dtype=torch.bool)
    causal = visible.tril()
    for is_causal in (False, True):
        for exclude_self in (False, True):
            check(
                attention_received(query, key, None, None, weight, is_causal=is_causal, exclude_self=exclude_self),
                received_by_loops(
                    query, key, zeros, weight, 0.5, causal if is_causal else visible, itself=not exclude_self
                ),
            )
    with pytest.raises(AssertionError, match="own"):
        attention_received(query, key[:, :, :6], None, None, None, exclude_self=True)


@pytest.mark.parametrize("boolean", [False, True])
def test_a_query_that_sees_nothing_gives_nothing(boolean: bool) -> None:
    query, key = heads(5), heads(7)
    visible = ALL.clone()
    visible[0, :, 3] = False
    hidden = visible if boolean else NOTHING.masked_fill(~visible, -math.inf)
    received = attention_received(query, key, hidden, None, None)
    check(received, received_by_loops(query, key, NOTHING, None, 0.5, visible))
    torch.testing.assert_close(received.sum(-1), torch.tensor([0.8, 1.0]))


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in outputs(result) if isinstance(result, (Tensor, tuple)) else []:
            self.elements = max(self.elements, x.numel())
        return result


def test_received_attention_in_chunks_is_that_of_the_whole_matrix() -> None:
    """150 rows are 64, 64 and 22; the whole matrix never exists."""
    query, key, bias = torch.randn(1, 2, 150, 4), torch.randn(1, 2, 150, 4), torch.randn(1, 2, 150, 150)
    weight = torch.rand(1, 150)
    largest = Largest()
    with largest:
        received = attention_received(query, key, bias, None, weight, is_causal=True, exclude_self=True)
    assert largest.elements == 2 * 64 * 150
    hidden = torch.full((150, 150), -math.inf).triu(1)
    matrix = (query @ key.transpose(2, 3) / 2 + bias + hidden).softmax(-1).mean(1)
    matrix = matrix * (1 - torch.eye(150))
    torch.testing.assert_close(received, (weight[..., None] * matrix).sum(1))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 80), st.integers(0, 100))
def test_received_attention_sums_to_one_and_follows_a_permutation_of_keys(batch: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(batch, 2, n, 4, generator=generator) for n in (rows, 9))
    received = attention_received(query, key, None, None, None)
    torch.testing.assert_close(received.sum(-1), torch.ones(batch))
    order = torch.randperm(9, generator=generator)
    torch.testing.assert_close(attention_received(query, key[:, :, order], None, None, None), received[:, order])


# -- scores of single tokens and of pairs ------------------------------------------------------------------------------


def test_norm() -> None:
    x = torch.randn(2, 6, 5)
    check(token_norm(x), [[math.sqrt(sum(v * v for v in row)) for row in sample] for sample in double(x)])


@pytest.mark.parametrize("shifted", [False, True])
def test_energy(shifted: bool) -> None:
    x, margin, alpha = torch.randn(2, 8, 3), 0.3, 0.7
    expected = np.zeros((2, 8))
    for b, sample in enumerate(double(x)):
        for i in range(1, 7):
            for j in range(1, 7):
                s = cosine(sample[i], sample[j])
                high = s - margin if shifted else s
                expected[b, i] += (high if s >= margin else alpha * (math.exp(s - margin) - 1)) / 6
    check(token_energy(x, margin, alpha, shifted, 1, 7), expected)


@pytest.mark.parametrize("absolute", [False, True])
def test_transition(absolute: bool) -> None:
    before, after = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    expected = np.zeros((2, 7))
    for b in range(2):
        x, y = double(before)[b], double(after)[b]
        turn = [cosine(x[i], y[i]) for i in range(2, 6)]
        mass = [math.exp(1 - (abs(s) if absolute else s)) for s in turn]
        for i in range(2, 6):
            expected[b, i] = np.linalg.norm(y[i]) / np.linalg.norm(x[i]) * mass[i - 2] / sum(mass)
    check(token_transition(before, after, absolute, 2, 6), expected)


def test_similarity_with_the_centre_and_with_a_text() -> None:
    x, text = torch.randn(2, 7, 5), torch.randn(2, 3, 5)
    samples, texts = double(x), double(text)
    centre = [[cosine(token, sample[1:6].mean(0)) for token in sample] for sample in samples]
    check(centre_similarity(x, 1, 6), centre)
    wanted = [[cosine(token, words.mean(0)) for token in sample] for sample, words in zip(samples, texts, strict=True)]
    check(text_similarity(x, text), wanted)
    check(text_similarity(x, text.mean(1)), wanted)
    check(text_similarity(x, text[:1]), [[cosine(token, texts[0].mean(0)) for token in sample] for sample in samples])


def test_a_zero_vector_is_no_number_to_worry_about() -> None:
    x = torch.randn(1, 4, 3)
    x[0, 1] = 0
    for score in (
        token_energy(x, 0.5, 1.0, False, 0, 4), token_transition(x, x, True, 0, 4), centre_similarity(x, 0, 4),
        text_similarity(x, x), massive_activation(x, []), ncut_partition(x, 0.2, 5, 0, 4), token_norm(x),
    ):  # fmt: skip
        assert score.isfinite().all()


@pytest.mark.parametrize("dims", [[], [1, 4]])
def test_massive_activation(dims: list[int]) -> None:
    x = torch.randn(2, 6, 5)
    expected = [
        [max(abs(token[d]) for d in dims or range(5)) / math.sqrt((token**2).mean()) for token in sample]
        for sample in double(x)
    ]
    check(massive_activation(x, dims), expected)


# -- pixels ------------------------------------------------------------------------------------------------------------


def patches(pixels: Tensor, grid: tuple[int, ...]) -> list[list[np.ndarray]]:
    """Per sample, patches [C, ...] in raster order."""
    result = []
    for sample in double(pixels):
        size = [s // g for s, g in zip(sample.shape[1:], grid, strict=True)]
        result.append([
            sample[(slice(None), *(slice(i * s, (i + 1) * s) for i, s in zip(place, size, strict=True)))]
            for place in np.ndindex(*grid)
        ])  # fmt: skip
    return result


SHAPES = [((2, 3, 8, 12), (2, 3)), ((2, 3, 4, 8, 6), (2, 2, 3))]


@pytest.mark.parametrize(("shape", "grid"), SHAPES)
def test_patch_variance(shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    pixels = torch.randn(shape) + 10
    expected = [[np.mean([np.var(channel) for channel in p]) for p in sample] for sample in patches(pixels, grid)]
    check(patch_variance(pixels, grid), expected)


@pytest.mark.parametrize(("shape", "grid"), SHAPES)
@pytest.mark.parametrize("bins", [2, 7, 16, 256])
def test_patch_entropy(shape: tuple[int, ...], grid: tuple[int, ...], bins: int) -> None:
    pixels = torch.randn(shape)
    expected = []
    for b, sample in enumerate(patches(pixels, grid)):
        gray = double(pixels[b]).mean(0)
        expected.append([])
        for p in sample:
            histogram, _ = np.histogram(p.mean(0), bins, (gray.min(), gray.max()))
            share = [c / p[0].size for c in histogram if c]
            expected[-1].append(-sum(s * math.log(s) for s in share))
    check(patch_entropy(pixels, grid, bins), expected)


def test_pixels_that_are_blank_or_not_tiled() -> None:
    pixels = torch.full((1, 3, 4, 4), 0.3)
    assert patch_entropy(pixels, [2, 2], 256).tolist() == [[0.0] * 4]
    pixels[:, :, 2, 3] = 1.0
    assert (patch_entropy(pixels, [2, 2], 256) > 0).tolist() == [[False, False, False, True]]
    assert (patch_variance(pixels, [2, 2]) > 1e-6).tolist() == [[False, False, False, True]]
    with pytest.raises(AssertionError, match="tile"):
        patch_variance(pixels, [3, 2])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(0, 100))
def test_entropy_is_that_of_the_counts(bins: int, seed: int) -> None:
    """Levels 0 .. bins - 1 exactly, both ends there: each falls into a bin of its own."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, bins, (1, 1, 6, 6), generator=generator)
    levels[..., 0, 0], levels[..., 5, 5] = 0, bins - 1
    counts = Counter(levels.flatten().tolist()).values()
    expected = -sum(c / 36 * math.log(c / 36) for c in counts)
    # of the range 0 .. bins - 1, each level is inside a bin of width (bins - 1) / bins
    assert patch_entropy(levels.float(), [1, 1], bins).item() == pytest.approx(expected, abs=1e-5)


# -- the normalised cut ------------------------------------------------------------------------------------------------


def two_groups(first: int, second: int, seed: int) -> Tensor:
    """Two directions with noise, mixed up: [1, first + second + 2, 16] with a token more on either side."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q.T
    group = (torch.arange(first + second) >= first).long()[torch.randperm(first + second, generator=generator)]
    x = 2 * centres[group] + 0.35 * torch.randn(first + second, 16, generator=generator)
    x = x * (0.5 + torch.rand(first + second, 1, generator=generator))
    return torch.cat([torch.randn(1, 16, generator=generator), x, torch.randn(1, 16, generator=generator)])[None]


def ncut_by_eigh(x: Tensor, threshold: float) -> tuple[Tensor, float]:
    """The eigenvector (largest |y| on the positive side, minus its mean), and the rate at which iterations converge."""
    n = len(x)
    weight = torch.full((n, n), 1e-5, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            if cosine(double(x[i]), double(x[j])) > threshold:
                weight[i, j] = 1.0
    degree = weight.sum(-1)
    laplacian = (torch.diag(degree) - weight) / (degree[:, None] * degree).sqrt()
    values, vectors = torch.linalg.eigh(laplacian)
    y = vectors[:, 1] / degree.sqrt()
    y = y / (degree * y * y).sum().sqrt()
    if y[y.abs().argmax()] < y.mean():
        y = -y
    return y - y.mean(), ((2 - values[2]) / (2 - values[1])).item()


@pytest.mark.parametrize("seed", range(8))
def test_cut_equals_the_eigenvector(seed: int) -> None:
    x = torch.cat([two_groups(24, 12, seed), two_groups(24, 12, seed + 100)])
    score = ncut_partition(x, 0.2, 60, 1, 37)
    assert score[:, [0, 37]].abs().max() == 0
    for b in range(2):
        expected, rate = ncut_by_eigh(x[b, 1:37], 0.2)
        assert rate < 0.85  # the gap: 60 iterations are enough
        assert torch.equal(score[b, 1:37] > 0, expected > 0)
        assert 0 < (expected > 0).sum() < 36
        torch.testing.assert_close(score[b, 1:37].double(), expected, atol=1e-4, rtol=1e-3)


def test_cut_separates_what_it_was_made_from() -> None:
    """Disconnected groups: the foreground is the smaller one, where the eigenvector is larger."""
    x = torch.zeros(1, 12, 3)
    x[0, :8, 0], x[0, 8:, 1] = 1.0, 1.0
    assert (ncut_partition(x, 0.2, 20, 0, 12) > 0).tolist() == [[False] * 8 + [True] * 4]


# -- sinks, anchors ----------------------------------------------------------------------------------------------------


def test_sink_rows() -> None:
    received = torch.tensor([[9.0, 1, 1, 6, 1, 5, 1, 9], [9.0, 1, 2, 3, 2, 1, 3, 9]])
    expected = torch.zeros(2, 8)
    expected[0, [3, 5]] = 0.5
    expected[1, 3] = 1.0  # none exceeds twice the mean: the first of the largest
    assert torch.equal(sink_rows(received, 1.9, 1, 7), expected)


def boosted(anchor: Tensor, count: int, reach: int, h: int, w: int) -> set[int]:
    members = set()
    for a in sorted(range(h * w), key=lambda i: -anchor[i].item())[:count]:
        frontier = {(a // w, a % w)}
        for _ in range(reach):
            frontier |= {(r + i, c + j) for r, c in frontier for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))}
        members |= {r * w + c for r, c in frontier if 0 <= r < h and 0 <= c < w}
    return members


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4), st.integers(0, 3), st.booleans(), st.integers(0, 100))
def test_boost_puts_anchors_and_neighbours_first(h: int, w: int, count: int, reach: int, flat: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = h * w
    anchor, rest = torch.rand(2, n + 3, generator=generator), 0.01 * torch.rand(2, n + 3, generator=generator)
    if flat:
        rest = torch.full_like(rest, 0.25)
    score = boost_neighbours(anchor, rest, count, reach, [h, w], 2, n + 2)
    assert score[:, :2].abs().sum() + score[:, n + 2 :].abs().sum() == 0
    for b in range(2):
        members = boosted(anchor[b, 2 : n + 2], count, reach, h, w)
        order = score[b, 2 : n + 2].argsort(descending=True).tolist()
        assert set(order[: len(members)]) == members
        others = rest[b, 2 : n + 2]
        if not flat:
            assert order == sorted(range(n), key=lambda i: (i not in members, -others[i].item()))
        outside = [i for i in range(n) if i not in members]
        assert torch.equal(score[b, 2 : n + 2][outside], others[outside])


@pytest.mark.parametrize("reach", [1, 2, 3])
def test_no_neighbour_is_across_the_end_of_a_row(reach: int) -> None:
    for place in range(12):
        anchor = torch.zeros(1, 12)
        anchor[0, place] = 1.0
        score = boost_neighbours(anchor, torch.zeros(1, 12), 1, reach, [3, 4], 0, 12)
        assert set((score[0] > 0).nonzero()[:, 0].tolist()) == boosted(anchor[0], 1, reach, 3, 4)


# -- every operation: precision, batch, compilation, runtimes ----------------------------------------------------------

VISIBLE = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.3
CASES: Cases = {
    "attention_received": (
        lambda q, k, bias, key_bias, weight: ops.attention_received(
            q, k, bias, key_bias, weight, scale=0.3, exclude_self=True
        ),
        [(2, 2, 6, 4), (2, 2, 6, 4), VISIBLE, (2, 6), (2, 6)],
    ),
    "attention_received_causal": (
        lambda q, k: ops.attention_received(q, k, None, None, None, is_causal=True),
        [(2, 2, 70, 4), (2, 2, 70, 4)],
    ),
    "token_norm": (lambda x: ops.token_norm(x), [(2, 8, 5)]),
    "token_energy": (lambda x: ops.token_energy(x, 0.4, 1.0, False, 1, 7), [(2, 8, 5)]),
    "token_transition": (lambda x, y: ops.token_transition(x, y, True, 1, 7), [(2, 8, 5), (2, 8, 5)]),
    "centre_similarity": (lambda x: ops.centre_similarity(x, 1, 7), [(2, 8, 5)]),
    "text_similarity": (lambda x, text: ops.text_similarity(x, text), [(2, 8, 5), (2, 3, 5)]),
    "patch_variance": (lambda x: ops.patch_variance(x, [2, 3]), [(2, 3, 8, 12)]),
    "patch_entropy": (lambda x: ops.patch_entropy(x, [2, 2, 3], 32), [(2, 3, 4, 8, 6)]),
    "ncut_partition": (
        lambda x: ops.ncut_partition(x, 0.2, 12, 1, 19),
        [torch.cat([two_groups(12, 6, 0), two_groups(12, 6, 1)])],
    ),
    "sink_rows": (lambda x: ops.sink_rows(x, 1.2, 1, 7), [(2, 8)]),
    "massive_activation": (lambda x: ops.massive_activation(x, [1, 3]), [(2, 8, 5)]),
    "boost_neighbours": (lambda a, b: ops.boost_neighbours(a, b, 2, 1, [3, 4], 1, 13), [(2, 14), (2, 14)]),
}


@pytest.fixture(scope="module")
def program() -> Program:
    return captured(CASES)


@pytest.fixture(scope="module")
def engine(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return onnx_runtime.Onnx().build(program, tmp_path_factory.mktemp("scores") / "model.onnx")


@pytest.fixture(scope="module")
def exported(engine: Engine) -> dict[str, list[tuple[Tensor, Tensor]]]:
    return in_onnxruntime(CASES, engine.path)


@pytest.mark.parametrize("name", CASES)
def test_in_onnxruntime_with_a_dynamic_batch(name: str, exported: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
    check_pairs(exported[name])


@pytest.mark.parametrize("name", CASES)
def test_compiled_on_any_batch_and_in_half_precision(name: str) -> None:
    """What is computed from half-precision inputs is computed in float32: as from the same numbers in float32."""
    function, shapes = CASES[name]
    inputs = drawn(shapes)
    expected = function(*inputs)
    assert expected.dtype is torch.float32
    torch.testing.assert_close(function(*(x[:1] for x in inputs)), expected[:1])
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected)
    for dtype in (torch.float16, torch.bfloat16):
        half = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        exact = function(*(x.float() if x.is_floating_point() else x for x in half))
        assert torch.equal(function(*half), exact)


def test_half_precision_does_not_overflow() -> None:
    """float16 ends at 65504: neither logits before they are scaled nor squares may be in it."""
    query = torch.full((1, 1, 2, 64), 60.0, dtype=torch.float16)
    torch.testing.assert_close(attention_received(query, query, None, None, None), torch.full((1, 2), 0.5))
    assert token_norm(query[0] * 10).tolist() == [[4800.0, 4800.0]]
    assert massive_activation(query[0] * 10, []).tolist() == [[1.0, 1.0]]


@pytest.mark.tensorrt
@pytest.mark.skipif(TensorRTRTX().available() is not None, reason="tensorrt_rtx is not installed")
def test_one_engine_of_all_scores(program: Program, engine: Engine, tmp_path: Path) -> None:
    built = TensorRTRTX().build(program, tmp_path / "model.engine", source=engine)
    assert len(built.outputs) == len(CASES)
    assert all(c.passed for c in built.parity)
