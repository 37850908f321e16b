"""The Triton kernels of matching, merging and probing equal the references of their operations.

Without a GPU they run in Triton's interpreter, which has to be chosen before Triton is imported: so one test runs this
file again in a process of its own, and that one runs the cases marked ``interpreted``. The other tests compile the
kernels for GPUs that need not be there.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tokenopt.ops import attention, native, score, tokens

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter, in a process of its own")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@compiled
@pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(metadata.version("numpy")) >= (2, 4),
    reason="the interpreter of Triton 3.6 takes an integer of an array, which NumPy 2.4 refuses",
)
def test_all_cases_in_the_interpreter() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def _interpreter_knows_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dot multiplies the bits of bfloat16 numbers as integers (Triton 3.6 to 3.8)."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def values(x: Any) -> Any:
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        return interpreter.TensorHandle(np.matmul(values(a), values(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def equal(actual: Any, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


def same_plan(metric: Tensor, r: int, start: int, stop: int) -> None:
    """Equal to the reference with a stable sort: torch leaves the order among equals open, the kernel does not."""
    from tokenopt.kernels import reduce

    actual = reduce.match_bipartite(metric, r, start, stop)
    with mock.patch.object(Tensor, "argsort", functools.partialmethod(Tensor.argsort, stable=True)):
        expected = tokens.match_bipartite(metric, r, start, stop)
    for name, a, e in zip(("index", "src", "dst"), actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e), (name, a, e)


# tokens, start, stop, channels, r, type
PLANS = [
    (2, 0, 2, 3, 1, torch.float32),
    (5, 0, 5, 4, 0, torch.float32),
    (5, 0, 5, 4, 3, torch.float32),  # every even position
    (5, 1, 5, 4, 2, torch.float32),
    (24, 1, 22, 70, 10, torch.float32),  # protected at both ends; channels in two blocks
    (24, 2, 21, 70, 1, torch.float16),
    (24, 9, 12, 16, 1, torch.bfloat16),
    (141, 1, 141, 8, 17, torch.float32),  # more than one tile of either side
    (139, 0, 139, 8, 70, torch.float16),
]


@interpreted
@pytest.mark.parametrize(("total", "start", "stop", "size", "r", "dtype"), PLANS)
def test_match(total: int, start: int, stop: int, size: int, r: int, dtype: torch.dtype) -> None:
    same_plan(torch.randn(2, total, size).to(dtype), r, start, stop)


@interpreted
@pytest.mark.parametrize("r", [1, 9])
def test_match_breaks_ties_towards_the_first(r: int) -> None:
    alphabet = torch.cat([torch.eye(3), -torch.eye(3), torch.zeros(1, 3)])  # exact cosines: 1, 0, -1
    same_plan(alphabet[torch.randint(0, 7, (2, 41))] * 2.0, r, 1, 41)
    same_plan(torch.ones(1, 71, 4), r, 0, 71)  # of both sides more than one tile


@interpreted
def test_match_of_what_is_not_a_number_is_a_plan() -> None:
    metric = torch.randn(2, 21, 8)
    metric[0, 4] = float("nan")  # in the first set
    metric[1, 7] = float("nan")  # in the second
    same_plan(metric, 4, 1, 20)


@interpreted
def test_match_of_any_strides() -> None:
    same_plan(torch.randn(2, 8, 21).transpose(1, 2), 4, 1, 21)
    same_plan(torch.randn(2, 21, 3, 8)[:, :, 1], 4, 1, 21)
    same_plan(torch.randn(21, 2, 8).transpose(0, 1), 4, 1, 21)
    same_plan(torch.randn(1, 21, 8).expand(3, -1, -1), 4, 1, 21)


def plan(samples: int, total: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    return tokens.match_bipartite(torch.randn(samples, total, 8), r, 1, total)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sized", "normalize"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize(("total", "channels", "r"), [(4, 24, 0), (7, 5, 3), (11, 33, 4)])
def test_merge(total: int, channels: int, r: int, sized: bool, normalize: bool, dtype: torch.dtype) -> None:
    from tokenopt.kernels import reduce

    x = torch.randn(2, total, channels).to(dtype)
    weight = torch.randint(1, 5, (2, total)).float() if sized else None
    arguments = (x, weight, *plan(2, total, r), normalize)
    equal(reduce.merge_tokens(*arguments), tokens.merge_tokens(*arguments), dtype)


@interpreted
def test_merge_of_nothing_changes_nothing() -> None:
    from tokenopt.kernels import reduce

    x, weight = torch.randn(2, 11, 6), torch.rand(2, 11) + 0.1
    index, src, dst = plan(2, 11, 0)
    y, sizes = reduce.merge_tokens(x, weight, index, src, dst, True)
    assert torch.equal(y, tokens.take_tokens(x, index)) and torch.equal(sizes, weight.gather(1, index))


@interpreted
def test_merge_of_any_strides_and_of_all_into_one_place() -> None:
    from tokenopt.kernels import reduce

    x = torch.randn(3, 2, 280, 2)[:, :, :, 1].permute(1, 2, 0)
    weight = torch.rand(280, 2).t() + 0.1
    index = torch.stack([torch.randperm(280) for _ in range(2)])
    src, index = index[:, :270], index[:, 270:]  # more removed than one block of them
    dst = torch.full((2, 270), 3)
    dst[:, ::50] = 7
    arguments = (x, weight, index, src, dst, True)
    torch.testing.assert_close(reduce.merge_tokens(*arguments), tokens.merge_tokens(*arguments))


# queries, keys, head dim, first row, rows, type
PROBES = [
    (5, 5, 8, 0, 1, torch.float32),
    (70, 70, 20, 69, 1, torch.bfloat16),
    (70, 70, 16, 3, 66, torch.float32),  # two tiles of either
    (3, 67, 70, 1, 2, torch.float16),
]


@interpreted
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("rows", "columns", "size", "row", "count", "dtype"), PROBES)
def test_probe(
    rows: int, columns: int, size: int, row: int, count: int, is_causal: bool, dtype: torch.dtype
) -> None:
    from tokenopt.kernels import probe

    query = torch.randn(2, rows, 2, size).to(dtype).transpose(1, 2)
    key = torch.randn(2, 2, size, columns).to(dtype).transpose(2, 3)
    for key_bias, scale in ((None, None), (torch.randn(columns, 2).t(), 0.3)):
        arguments = (query, key, None, key_bias, row, count)
        settings = {"scale": scale, "is_causal": is_causal}
        equal(probe.attention_probe(*arguments, **settings), attention.attention_probe(*arguments, **settings))


@interpreted
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "size", "dtype"),
    [(5, 5, 8, torch.float32), (70, 70, 20, torch.float16), (66, 9, 16, torch.bfloat16)],
)
def test_received(rows: int, columns: int, size: int, is_causal: bool, dtype: torch.dtype) -> None:
    from tokenopt.kernels import probe

    query, key = (torch.randn(2, 2, n, size).to(dtype) for n in (rows, columns))
    key_bias = torch.randn(2, columns)
    key_bias[1, 0] = float("-inf")  # the first query sees nothing where attention is causal
    cases = [(None, None), (key_bias, torch.rand(1, rows)), (key_bias, torch.rand(rows, 2).t())]
    for bias, weight in cases:
        settings = {"is_causal": is_causal, "exclude_self": rows == columns}
        arguments = (query, key, None, bias, weight)
        expected = score.attention_received(*arguments, **settings)
        equal(probe.attention_received(*arguments, **settings), expected)


@interpreted
def test_a_row_that_sees_nothing() -> None:
    from tokenopt.kernels import probe

    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    hidden = torch.full((1, 4), float("-inf"))
    for f, reference in (
        (probe.attention_probe, attention.attention_probe),
        (probe.attention_received, score.attention_received),
    ):
        rest = (1, 2) if reference is attention.attention_probe else (None,)
        equal(f(query, key, None, hidden, *rest), reference(query, key, None, hidden, *rest))


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any, launches: list[str], name: str) -> None:
        self.kernel, self.launches, self.name = kernel, launches, name

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        self.launches.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    from tokenopt.kernels import probe, reduce

    names: list[str] = []
    for module, kernels in ((reduce, ("_best", "_select", "_merge")), (probe, ("_row_sums", "_column_sums"))):
        for name in kernels:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), names, name))
    yield names


@interpreted
def test_a_step_is_three_launches(launches: list[str]) -> None:
    from tokenopt.kernels import reduce

    x = torch.randn(1, 9, 8)
    reduce.merge_tokens(x, None, *reduce.match_bipartite(x, 2, 1, 9), True)
    assert launches == ["_best", "_select", "_merge"]


@interpreted
def test_operations_take_the_kernels(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered for the CPU, where only the interpreter runs them, as they are for CUDA."""
    here = {(name, "cpu"): target for (name, device), target in native._KERNELS.items() if device == "cuda"}
    monkeypatch.setattr(native, "_KERNELS", here)
    op = torch.ops.tokenopt
    x, query = torch.randn(1, 9, 8), torch.randn(1, 2, 5, 8)
    merged = op.merge_tokens(x, None, *op.match_bipartite(x, 2, 1, 9), True)[0]
    op.attention_probe(query, query, None, None, 0, 1)
    op.attention_received(query, query, None, None, None)
    assert launches == ["_best", "_select", "_merge", *2 * ["_row_sums", "_column_sums"]]
    launches.clear()

    op.attention_probe(query, query, torch.zeros(5, 5), None, 0, 1)  # with a bias there is no kernel
    differentiated = x.clone().requires_grad_()
    op.merge_tokens(differentiated, None, *op.match_bipartite(differentiated, 2, 1, 9), True)[0].sum().backward()
    torch.export.export(Step(), (x,))
    monkeypatch.setenv("TOKENOPT_KERNELS", "0")
    equal(op.merge_tokens(x, None, *op.match_bipartite(x, 2, 1, 9), True)[0], merged)
    assert launches == []


class Step(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.tokenopt.merge_tokens(x, None, *torch.ops.tokenopt.match_bipartite(x, 2, 1, 9), True)[0]


def test_a_kernel_is_for_plain_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_KERNELS", {("sqrt", "cpu"): "math:sqrt", ("gone", "cpu"): "no_such_module:f"})
    x = torch.rand(3)
    leaf = torch.rand(3, requires_grad=True)
    assert native.native("sqrt", x, None) is not None
    assert native.native("gone", x) is None and native.native("other", x) is None
    assert native.native("sqrt", x, leaf) is None and native.native("sqrt", x.double()) is None
    assert native.native("sqrt", x, torch.rand(3, device="meta")) is None
    with torch.no_grad():
        assert native.native("sqrt", leaf) is not None
    with FlopCounterMode(display=False):
        assert native.native("sqrt", x) is None
    with FakeTensorMode() as mode:
        assert native.native("sqrt", mode.from_tensor(x)) is None
    seen: list[Any] = []
    torch.func.functionalize(lambda x: seen.append(native.native("sqrt", x)) or x)(x)
    torch.func.vmap(lambda x: seen.append(native.native("sqrt", x)) or x)(x)
    assert seen == [None, None]
    monkeypatch.setenv("TOKENOPT_KERNELS", "0")
    assert native.native("sqrt", x) is None


def signatures(dtype: str) -> dict[str, tuple[dict[str, str], dict[str, Any]]]:
    """Kernel -> (types of its pointers, constants); all other arguments are integers or named in ``FLOATS``."""
    x, f, i, j = f"*{dtype}", "*fp32", "*i32", "*i64"
    attention = {"query": x, "key": x, "key_bias": f, "sums": f, "weight": f, "received": f}
    tiles = {"CAUSAL": True, "D": 64, "BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 64}
    plan = {"index": j, "src": j, "dst": j}
    merge = {"x": x, "weight": f, **plan, "y": x, "total": f}
    return {
        "_best": (
            {"a": x, "b": x, "best": f, "partner": i},
            {"D": 64, "BLOCK_A": 32, "BLOCK_B": 64, "BLOCK_D": 64},
        ),
        "_select": ({"best": f, "partner": i, **plan}, {"BLOCK": 128}),
        "_merge": (merge, {"NORMALIZE": True, "BLOCK_C": 1024, "BLOCK_R": 16}),
        "_row_sums": (attention, tiles),
        "_column_sums": (attention, {**tiles, "EXCLUDE_SELF": True, "EMPTY_IS_ZERO": True}),
    }


FLOATS = {"scale", "share"}
LEFT_OUT = dict.fromkeys(("weight", "key_bias"))  # tensors that need not be given
OFF = dict.fromkeys(("CAUSAL", "EXCLUDE_SELF", "EMPTY_IS_ZERO", "NORMALIZE"), False)


@compiled
@pytest.mark.parametrize(
    ("capability", "dtype", "bare"), [(80, "fp32", False), (80, "bf16", True), (90, "fp16", False), (90, "fp16", True)]
)
@pytest.mark.parametrize("name", list(signatures("fp32")))
def test_kernels_compile_without_a_gpu(
    name: str, capability: int, dtype: str, bare: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tokenopt.kernels import probe, reduce

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(reduce, name, None) or getattr(probe, name)
    pointers, constants = signatures(dtype)[name]
    if bare:
        constants = constants | {k: v for k, v in (LEFT_OUT | OFF).items() if k in kernel.arg_names}
    types = {n: pointers.get(n, "fp32" if n in FLOATS else "i32") for n in kernel.arg_names}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    assert f".target sm_{capability}" in ptx
    tensor_cores = "mma" in ptx
    assert tensor_cores == (dtype != "fp32" and name not in ("_select", "_merge"))


@pytest.mark.gpu
@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "total", "size", "r"), [(32, 197, 64, 16), (4, 577, 80, 99), (2, 4097, 320, 999)])
def test_step_on_a_gpu(
    samples: int, total: int, size: int, r: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cosines that differ by rounding may change places there, so it is their values that are compared."""
    from tokenopt.kernels import reduce

    monkeypatch.setenv("TOKENOPT_KERNELS", "0")
    metric = torch.randn(samples, total, size, device="cuda").to(dtype)
    index, src, dst = reduce.match_bipartite(metric, r, 1, total)
    every = torch.arange(total, device="cuda").expand(samples, -1)
    assert torch.equal(torch.cat([index, src], 1).sort(1).values, every)
    places = (total - 1) // 2  # of the odd positions, which stay and stand behind the even ones
    assert torch.equal(index[:, : total - r - places].sort(1).values, index[:, : total - r - places])
    assert bool((dst >= total - r - places).all())

    def cosines(src: Tensor, dst: Tensor, index: Tensor) -> Tensor:
        ends = (tokens.take_tokens(metric, where).float() for where in (src, index.gather(1, dst)))
        return F.cosine_similarity(*ends, dim=-1)

    expected = tokens.match_bipartite(metric, r, 1, total)
    equal(cosines(src, dst, index), cosines(*expected[1:], expected[0]))

    x = torch.randn(samples, total, 768, device="cuda").to(dtype)
    weight = torch.randint(1, 9, (samples, total), device="cuda").float()
    arguments = (x, weight, index, src, dst, True)
    equal(reduce.merge_tokens(*arguments), tokens.merge_tokens(*arguments), dtype)


@pytest.mark.gpu
@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_probe_on_a_gpu(is_causal: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenopt.kernels import probe

    monkeypatch.setenv("TOKENOPT_KERNELS", "0")
    query, key = (torch.randn(2, 12, 1025, 64, device="cuda").to(dtype) for _ in range(2))
    key_bias = torch.randn(2, 1025, device="cuda")
    rows = (query, key, None, key_bias, 1024, 1)
    equal(probe.attention_probe(*rows, is_causal=is_causal), attention.attention_probe(*rows, is_causal=is_causal))
    every = (query, key, None, key_bias, None)
    equal(
        probe.attention_received(*every, is_causal=is_causal), score.attention_received(*every, is_causal=is_causal)
    )
