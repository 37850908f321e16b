"""The file with TensorRT plugins does what TensorRT documents, as far as a stand-in for `tensorrt.plugin` shows."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor, nn

pytest.importorskip("triton")

from tokenopt import capture  # noqa: E402
from tokenopt.attention import Layout, Neighborhood  # noqa: E402
from tokenopt.errors import LoweringError, UsageError  # noqa: E402
from tokenopt.program import Program  # noqa: E402
from tokenopt.runtimes import onnx as onnx_runtime  # noqa: E402
from tokenopt.runtimes import plugins as plugin_writer  # noqa: E402
from tokenopt.runtimes import tensorrt, tensorrt_build  # noqa: E402
from tokenopt.runtimes.plugins import (  # noqa: E402
    NeighborhoodAttention,
    compile_problem,
    problems_of,
    write_plugins,
)
from tokenopt.runtimes.tensorrt import TensorRT, TensorRTRTX  # noqa: E402

PLAIN = NeighborhoodAttention(
    heads=3,
    tokens=260,
    dim=32,
    out_dim=64,
    start=4,
    grid=(16, 16),
    window=(7, 5),
    stride=(1, 1),
    dilation=(1, 2),
    causal=(False, False),
    scale=0.125,
)
BIASED = dataclasses.replace(PLAIN, biased=True)


class Expression:
    """A dimension, known or not, which can only be multiplied."""

    is_fake = False

    def __init__(self, value: int | str) -> None:
        self.value = value
        self.is_constant = isinstance(value, int)

    def constant_value(self) -> int:
        assert self.is_constant
        return self.value

    def __mul__(self, factor: int) -> tuple[str, int]:
        return self.value, factor


def stand_in() -> tuple[ModuleType, ModuleType, dict[tuple[str, str], Any]]:
    """tensorrt, tensorrt.plugin, and what was registered: (role, id) -> function."""
    registered: dict[tuple[str, str], Any] = {}

    def decorator(role: str) -> Any:
        def named(plugin: str) -> Any:
            return lambda function: registered.setdefault((role, plugin), function)

        return named

    class SymIntExprs(list):
        def __init__(self, count: int) -> None:
            super().__init__([None] * count)

    trt, trtp = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
    trt.float16, trt.bfloat16, trt.float32 = "half", "bfloat", "float"
    trt.plugin = trtp
    trtp.register, trtp.autotune, trtp.aot_impl = map(decorator, ("register", "autotune", "aot_impl"))
    trtp.TensorDesc = type("TensorDesc", (), {})
    trtp.KernelLaunchParams, trtp.SymIntExprs = SimpleNamespace, SymIntExprs
    trtp.SymInt32 = lambda value: ("int32", value)
    trtp.from_shape_expr = lambda shape, dtype: (shape, dtype)
    trtp.AutoTuneCombination = lambda types: types
    return trt, trtp, registered


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The file as TensorRT sees it: what it registered, and its globals."""
    path = tmp_path_factory.mktemp("plugins") / "tokenopt_plugins.py"
    write_plugins(path, [PLAIN, BIASED], capabilities=(80, 90))
    trt, trtp, registered = stand_in()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", trt)
        patch.setitem(sys.modules, "tensorrt.plugin", trtp)
        names = runpy.run_path(str(path))
    return SimpleNamespace(registered=registered, source=path.read_text(), **names)


def on(plugins: SimpleNamespace, capability: int, function: Any, *arguments: Any) -> Any:
    """Calls a function of the file on a device."""
    names = function.__globals__
    names["capability"] = lambda: capability
    return function(*arguments)


def described(problem: NeighborhoodAttention, dtype: str = "half") -> SimpleNamespace:
    sizes = ("batch", problem.tokens, problem.heads, problem.dim)
    return SimpleNamespace(shape_expr=[Expression(size) for size in sizes], dtype=dtype)


@pytest.mark.parametrize("problem", [PLAIN, BIASED])
@pytest.mark.parametrize(("device", "target"), [(80, "sm_80"), (90, "sm_90a"), (86, "sm_80"), (120, "sm_80")])
def test_launch(
    plugins: SimpleNamespace, problem: NeighborhoodAttention, device: int, target: str, tmp_path: Path
) -> None:
    import triton

    plugin = "tokenopt::neighborhood_attention" + "_biased" * problem.biased
    query = described(problem)
    inputs = (query,) * (4 if problem.biased else 3)
    name, text, launch, extra = on(
        plugins, device, plugins.registered["aot_impl", plugin], *inputs, problem.name, (None,), 0
    )
    ptx, constants = compile_problem(problem, torch.float16, 90 if target == "sm_90a" else 80)
    assert text.decode() == ptx.text and f".target {target}" in ptx.text
    assert launch.grid_x == ("batch", constants["TILES"] * problem.heads)
    assert launch.block_x == 32 * ptx.num_warps and f".reqntid {launch.block_x}" in ptx.text
    assert launch.shared_mem == ptx.shared <= 48 * 1024
    assert extra == [("int32", problem.heads)]

    # TensorRT passes inputs, extra arguments and outputs, in that order
    entry = ptx.text[ptx.text.index(f".entry {name.decode()}(") :].split(")")[0]
    assert re.findall(r"\.param \.(\w+)", entry) == ["u64"] * len(inputs) + ["u32"] + ["u64"]
    (tmp_path / "kernel.ptx").write_bytes(text)
    ptxas = [triton.knobs.nvidia.ptxas.path, f"-arch={target}", str(tmp_path / "kernel.ptx"), "-o", "/dev/null"]
    assembled = subprocess.run(ptxas, capture_output=True, text=True)
    assert assembled.returncode == 0, assembled.stderr


def test_outputs_and_types(plugins: SimpleNamespace) -> None:
    query = described(PLAIN)
    shape, dtype = plugins.registered["register", "tokenopt::neighborhood_attention"](query, None, None, PLAIN.name)
    assert shape == (query.shape_expr[0], 256, 3, 64) and dtype == "half"
    autotune = plugins.registered["autotune", "tokenopt::neighborhood_attention"]
    assert autotune(query, None, None, PLAIN.name, (None,)) == ["FP16,FP16,FP16,FP16"]
    autotune = plugins.registered["autotune", "tokenopt::neighborhood_attention_biased"]
    assert autotune(query, None, None, None, BIASED.name, (None,)) == ["FP16,FP16,FP16,FP32,FP16"]


def test_registered_functions_have_annotations_that_are_types(plugins: SimpleNamespace) -> None:
    for (role, _), function in plugins.registered.items():
        hints = function.__annotations__
        if role == "register":
            assert hints.pop("problem") is str and len(hints) >= 4
            assert {type(hint) for hint in hints.values()} == {type} and len(set(hints.values())) == 1
    assert len(plugins.registered) == 6
    assert "Not yet run with TensorRT" in plugins.source.split('"""')[1]


def test_what_the_file_does_not_hold_is_refused(plugins: SimpleNamespace) -> None:
    launch = plugins.registered["aot_impl", "tokenopt::neighborhood_attention"]
    with pytest.raises(ValueError, match="no kernel in this file"):
        on(plugins, 75, launch, *(described(PLAIN),) * 3, PLAIN.name, (None,), 0)
    with pytest.raises(ValueError, match="float32 on sm_80"):
        on(plugins, 80, launch, *(described(PLAIN, "float"),) * 3, PLAIN.name, (None,), 0)
    wrong = described(dataclasses.replace(PLAIN, heads=4))
    with pytest.raises(ValueError, match="axis 2 of the query is 4, not 3"):
        on(plugins, 80, launch, *(wrong,) * 3, PLAIN.name, (None,), 0)
    with pytest.raises(ValueError, match="no problem"):
        plugins.registered["register", "tokenopt::neighborhood_attention"](wrong, None, None, "other")


def test_problems_are_told_apart() -> None:
    changes: list[dict[str, Any]] = [{"heads": 4}, {"tokens": 300}, {"dim": 64}, {"out_dim": 32}, {"start": 0}]
    changes += [{"window": (5, 7)}, {"stride": (2, 1)}, {"dilation": (2, 1)}, {"causal": (True, False)}]
    changes += [{"grid": (8, 32)}, {"scale": 0.25}, {"biased": True}, {}]
    assert len({dataclasses.replace(PLAIN, **change).name for change in changes}) == len(changes)


def test_what_has_no_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="more than the grid"):
        compile_problem(dataclasses.replace(PLAIN, window=(17, 5)), torch.float16, 80)
    with pytest.raises(UsageError, match="256 elements"):
        compile_problem(dataclasses.replace(PLAIN, dim=512), torch.float16, 80)
    monkeypatch.setattr(plugin_writer, "SHARED_LIMIT", 1024)
    with pytest.raises(LoweringError, match="shared memory"):
        compile_problem(dataclasses.replace(PLAIN, dim=16, out_dim=16), torch.float16, 80)


# -- nodes of a network ------------------------------------------------------------------------------------------------


class Windows(nn.Module):
    """Attention in windows of two kinds, one with sizes of merged tokens, and a class token in front."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.calls = [pattern.lower(LAYOUT) for pattern in (Neighborhood(3), Neighborhood((5, 2), stride=(3, 1)))]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for key_bias, lowered in zip((None, bias), self.calls, strict=True):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            operation = getattr(torch.ops.tokenopt, lowered.op)
            names = [a.name for a in operation.default._schema.arguments[3:] if not a.kwarg_only]
            tensors = lowered.tensors | {"mask": lowered.tensors["mask"].float(), "key_bias": key_bias}
            x = x + operation(q, k, v, *map(tensors.get, names), **lowered.settings).transpose(1, 2).flatten(2)
        return x


LAYOUT = Layout(64, 1, (7, 9), heads=2, head_dim=16)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Windows(), (torch.randn(2, 64, 32), torch.randn(2, 64)))


def windows(query: Any, key: Any, value: Any, bias: Any, problem: str) -> Any:
    """The node in NumPy, from the text of its problem: the queries of the grid, each over its window, in loops."""
    of = dict(re.findall(r"([a-z]+)([\d.x]+)", problem))
    height, width = (int(n) for n in of["grid"].split("x"))
    (wy, wx), (sy, sx) = ([int(n) for n in of[name].split("x")] for name in ("window", "stride"))
    start, scale = int(of["start"]), float(of["scale"])
    out = np.zeros((len(query), height * width, *value.shape[2:]), query.dtype)
    for y, x in np.ndindex(height, width):
        firsts = []
        for i, n, w, s in ((y, height, wy, sy), (x, width, wx, sx)):
            leader = min(i // s * s + s // 2, n - 1)
            firsts.append(min(max(leader - w // 2, 0), n - w))
        top, left = firsts
        seen = [start + i * width + j for i in range(top, top + wy) for j in range(left, left + wx)]
        seen += [*range(start), *range(start + height * width, query.shape[1])]
        logits = np.einsum("bhd,bmhd->bhm", query[:, start + y * width + x], key[:, seen]) * scale
        logits = logits if bias is None else logits + bias[:, None, seen]
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[:, y * width + x] = np.einsum("bhm,bmhd->bhd", weights / weights.sum(-1, keepdims=True), value[:, seen])
    return out


def test_the_network_calls_the_plugins(program: Program, tmp_path: Path) -> None:
    class neighborhood_attention(OpRun):  # noqa: N801  (named as the operator)
        op_domain = "tokenopt"

        def _run(self, query: Any, key: Any, value: Any, problem: str) -> tuple[Any, ...]:
            return (windows(query, key, value, None, problem),)

    class neighborhood_attention_biased(OpRun):  # noqa: N801
        op_domain = "tokenopt"

        def _run(self, query: Any, key: Any, value: Any, bias: Any, problem: str) -> tuple[Any, ...]:
            return (windows(query, key, value, bias, problem),)

    path = tmp_path / "plugins.onnx"
    onnx_runtime.write(program, path, cpu=False, named=False, plugins=True)
    model = onnx.load(path)
    nodes = [n for n in model.graph.node if n.domain == "tokenopt"]
    assert [n.op_type for n in nodes] == ["neighborhood_attention", "neighborhood_attention_biased"]
    problems = problems_of(program)
    assert [n.attribute[0].s.decode() for n in nodes] == [p.name for p in problems] and not model.functions
    assert set(problems.values()) == {torch.float32}
    types = {v.name: v.type.tensor_type for v in model.graph.value_info}
    shapes = {name: [d.dim_param or d.dim_value for d in of.shape.dim] for name, of in types.items()}
    for node, problem in zip(nodes, problems, strict=True):
        query, out = plugin_writer._shapes(problem)
        assert shapes[node.input[0]] == ["batch", *query] and shapes[node.output[0]] == ["batch", *out]
    inputs = [torch.randn(3, 64, 32), torch.randn(3, 64)]
    evaluator = ReferenceEvaluator(model, new_ops=[neighborhood_attention, neighborhood_attention_biased])
    names = [spec.name for spec in program.inputs]
    (found,) = evaluator.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
    torch.testing.assert_close(torch.from_numpy(found), program.flat(*inputs)[0], atol=1e-5, rtol=1e-4)


def test_an_engine_has_plugins_when_asked(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library: what the builder is told, and the files it is given."""
    requests: list[tuple[set[str], str | None]] = []

    def run(command: Any, input: str, **_: Any) -> Any:
        request = json.loads(input)
        domains = {node.domain for node in onnx.load(request["onnx"]).graph.node}
        file = request["plugins"]
        requests.append((domains, None if file is None else Path(file).read_text()))
        return SimpleNamespace(returncode=1, stdout="", stderr='{"error": "no library", "where": null}')

    monkeypatch.setattr(TensorRT, "available", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(tensorrt, "subprocess", SimpleNamespace(run=run))
    for options in ({}, {"plugins": True}):
        with pytest.raises(LoweringError, match="no library"):
            TensorRT().build(program, tmp_path / "model.engine", **options)
    (plain, nothing), (named, text) = requests
    assert "tokenopt" not in plain and nothing is None and "tokenopt" in named
    kernels = [line for line in text.splitlines() if "'float32', 89)" in line]
    assert len(kernels) == 2 and all(any(p.name in line for line in kernels) for p in problems_of(program))
    with pytest.raises(LoweringError, match="no attention of this program"):
        TensorRT().build(capture(nn.Linear(4, 4), (torch.randn(2, 4),)), tmp_path / "m.engine", plugins=True)
    with pytest.raises(UsageError, match="no plugins in Python"):
        TensorRTRTX().build(program, tmp_path / "m.engine", plugins=True)


def test_the_builder_imports_the_plugins_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("tensorrt")

    def parser(*_: Any) -> Any:
        assert sys.modules["plugins_of_a_test"].HERE
        return SimpleNamespace(
            parse_from_file=lambda path: False,
            get_error=lambda i: SimpleNamespace(node_operator=lambda: "", node_name=lambda: "", desc=lambda: "parsed"),
        )

    library.Logger = type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None})
    library.NetworkDefinitionCreationFlag = SimpleNamespace()
    library.Builder = lambda logger: SimpleNamespace(logger=logger, create_network=lambda flags: None)
    library.OnnxParser = parser
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "plugins_of_a_test.py").write_text("HERE = True\n")
    request = {"module": "tensorrt", "onnx": "m.onnx", "plugins": str(tmp_path / "plugins_of_a_test.py")}
    with pytest.raises(tensorrt_build.Failure, match="parsed"):
        tensorrt_build.build(request)
    del sys.modules["plugins_of_a_test"]
