"""The file with TensorRT plugins does what TensorRT documents, as far as a stand-in for `tensorrt.plugin` shows."""

from __future__ import annotations

import dataclasses
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tokenopt.errors import LoweringError, UsageError  # noqa: E402
from tokenopt.runtimes import plugins as plugin_writer  # noqa: E402
from tokenopt.runtimes.plugins import NeighborhoodAttention, compile_problem, write_plugins  # noqa: E402

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
