"""The functions that give a pattern's node its meaning in an ONNX file: head by head where that is faster."""

from __future__ import annotations

from math import prod
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

import tokenopt
from tokenopt import runtimes
from tokenopt.attention import Global, Layout, Mask, Neighborhood, per_head
from tokenopt.attention.tiles import absent_keys, reference_mask
from tokenopt.runtimes import onnx_loops
from tokenopt.runtimes.tensorrt import TensorRTRTX

HEADS = 2


class Attend(torch.nn.Module):
    """The operation that a pattern becomes."""

    def __init__(self, pattern: Mask, layout: Layout) -> None:
        super().__init__()
        lowered = pattern.lower(layout)
        self.target, self.settings, self.names = getattr(torch.ops.tokenopt, lowered.op), lowered.settings, []
        for name, tensor in lowered.tensors.items():
            self.register_buffer(name, tensor)
            self.names.append(name)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **more: Tensor) -> Tensor:
        return self.target(query, key, value, **{n: getattr(self, n) for n in self.names}, **more, **self.settings)


class Weighted(Attend):
    """With a bias on its keys, as tokens that stand for several have it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor) -> Tensor:
        return super().forward(query, key, value, key_bias=key_bias)


def layout(*grid: int, before: int = 0, causal: bool = False) -> Layout:
    count = prod(grid)
    segments = (("cls", 0, before), ("patch", before, count))
    return Layout(before + count, before, grid, segments, HEADS, 8, causal)


def operands(where: Layout, batch: int) -> list[Tensor]:
    return [torch.randn(batch, HEADS, where.total, size) for size in (8, 8, 5)]


def dense(pattern: Mask, where: Layout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax over what the pattern lets a query see, and over zero keys beyond the border, in float64."""
    weight = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).exp() * reference_mask(pattern, where)
    absent = absent_keys(pattern, where)
    total = weight.sum(-1) + (0 if absent is None else absent)
    return (weight / total[..., None] @ v.double()).float()


def written(module: torch.nn.Module, inputs: list[Tensor], path: Path, **options: bool) -> runtimes.Engine:
    return runtimes.get("onnxruntime").build(tokenopt.capture(module.eval(), inputs), path, **options)


def operators(path: Path) -> list[str]:
    """Of the file's functions, without what is within loops."""
    return [node.op_type for function in onnx.load(path).functions for node in function.node]


def steps(path: Path) -> int:
    """Of the loop within the loop over heads."""
    (function,) = onnx.load(path).functions
    (heads,) = (node for node in function.node if node.op_type == "Scan")
    body = next(a.g for a in heads.attribute if a.name == "body")
    assert len(body.input) == 3  # tables are not copied for every head
    (inner,) = (node for node in body.node if node.op_type == "Scan")
    shape = next(node for node in function.node if inner.input[0] in node.output).input[1]
    values = next(node for node in function.node if shape in node.output).attribute[0].ints
    return values[0]


CASES = {
    "window": (Neighborhood(7), layout(20, 20)),
    "one tile": (Neighborhood(63), layout(80)),
    "class token": (Neighborhood((3, 9)), layout(19, 21, before=1)),
    "zero border": (Neighborhood(9, border="zero"), layout(20, 18, before=1)),
    "what others see": (Neighborhood(7) | Global(first=3), layout(20, 20, before=2)),
    "causal": (Neighborhood(65, causal=True), layout(600, causal=True)),
}


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little work is looped over too, in steps of few keys."""
    monkeypatch.setattr(onnx_loops, "_LOGITS", 2**12)
    monkeypatch.setattr(onnx_loops, "_KEYS", 2**8)


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("name", CASES)
def test_a_loop_over_heads_computes_the_pattern(name: str, tmp_path: Path) -> None:
    pattern, where = CASES[name]
    path = tmp_path / "model.onnx"
    engine = written(Attend(pattern, where), operands(where, 2), path)
    assert set(operators(path)) == {"Constant", "Reshape", "Scan"} and operators(path).count("Scan") == 1
    tiles = Attend(pattern, where).queries.shape[1]
    assert tiles % steps(path) == 0 and (steps(path) > 1) is (tiles > 1)
    (node,) = onnx.load(path).graph.node
    assert node.domain == "tokenopt" and node.op_type in ("tiled_attention", "neighborhood_attention")
    for batch in (1, 3):
        given = operands(where, batch)
        (found,) = engine(*given)
        torch.testing.assert_close(found, dense(pattern, where, *given), rtol=1e-5, atol=1e-5)


def test_what_a_loop_cannot_do_or_does_no_faster(tmp_path: Path) -> None:
    """Tables of each head, a bias of each sample, little work, and a file that is for a GPU."""
    large = layout(32, 32)
    heads = per_head([Neighborhood(7), Neighborhood((3, 15))])
    cases = {"heads": (heads, large, True), "small": (Neighborhood(3), layout(16, 16), True),
             "gpu": (Neighborhood(7), large, False)}  # fmt: skip
    for name, (pattern, where, cpu) in cases.items():
        path = tmp_path / f"{name}.onnx"
        given = operands(where, 2)
        engine = written(Attend(pattern, where), given, path, cpu=cpu)
        assert "Scan" not in operators(path) and operators(path).count("MatMul") == 2
        assert ("ReduceMax" in operators(path)) is (cpu and "mask" in Attend(pattern, where).names)
        torch.testing.assert_close(engine(*given)[0], dense(pattern, where, *given), rtol=1e-5, atol=1e-5)
    path, given = tmp_path / "bias.onnx", [*operands(large, 2), torch.randn(2, large.total)]
    engine = written(Weighted(Neighborhood(7), large), given, path)
    assert "Scan" not in operators(path)
    torch.testing.assert_close(engine(*given)[0], Weighted(Neighborhood(7), large)(*given), rtol=1e-5, atol=1e-5)


def test_heads_that_differ_have_no_loop() -> None:
    shapes = {"queries": (1, 64, 32), "keys": (1, 64, 140), "mask": (1, 64, 32, 140), "row_mask": (1, 1, 1025)}
    assert onnx_loops.pays("tiled_attention", shapes)
    for name, shape in (("queries", (2, 64, 32)), ("mask", (2, 64, 32, 140)), ("mask", (None, 1, 64, 32, 140)),
                        ("row_mask", (2, 1, 1025)), ("key_bias", (3, 1025))):  # fmt: skip
        assert not onnx_loops.pays("tiled_attention", shapes | {name: shape})
    assert not onnx_loops.pays("pooled_tiled_attention", shapes)


@pytest.mark.parametrize(("count", "size", "steps"), [(64, 400, 4), (61, 200, 1), (61, 20000, 61), (3, 10, 1)])
def test_steps_divide_the_tiles(count: int, size: int, steps: int) -> None:
    """Without a divisor near what is wanted, all tiles at once."""
    found = onnx_loops._parts({"keys": torch.zeros(1, count, size), "queries": torch.zeros(1, count, 2)})
    assert found["keys"].shape == (steps, count // steps, size) and found["queries"].shape[0] == steps


def test_loops_are_for_onnx_runtime_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other runtimes read a file for any: TensorRT knows no loop over heads."""
    where, path = layout(32, 32), tmp_path / "model.onnx"
    program = tokenopt.capture(Attend(Neighborhood(7), where), operands(where, 2))
    loops = lambda name: (runtimes.get(name).build(program, path), operators(path).count("Scan"))[1]  # noqa: E731
    assert loops("onnx") == 0 and loops("onnxruntime") == 1
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("tokenopt.runtimes.onnxruntime.providers", lambda: both)
    assert not runtimes.get("onnxruntime")._for_cpu()


@pytest.mark.tensorrt
@pytest.mark.skipif(TensorRTRTX().available() is not None, reason="tensorrt_rtx is not installed")
def test_tensorrt_takes_the_function_of_a_file_for_any_runtime(tmp_path: Path) -> None:
    where = layout(32, 32, before=1)
    written(Attend(Neighborhood(7), where), operands(where, 2), tmp_path / "model.onnx", cpu=False)
    TensorRTRTX()._build(tmp_path / "model.onnx", tmp_path / "model.engine", "8.9", (1, 2, 8), False)
    assert (tmp_path / "model.engine").stat().st_size > 0


@pytest.mark.usefixtures("little")
def test_attentions_of_one_kind_share_a_loop(tmp_path: Path) -> None:
    where = layout(20, 20)

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = Attend(Neighborhood(7), where)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attend(query, key, torch.nn.functional.pad(self.attend(query, key, value), (0, 0)))

    path = tmp_path / "model.onnx"
    given = operands(where, 3)
    engine = written(Two(), given, path)
    assert operators(path).count("Scan") == 1 and len(onnx.load(path).functions) == 1
    once = dense(Neighborhood(7), where, *given)
    expected = dense(Neighborhood(7), where, *given[:2], once)
    torch.testing.assert_close(engine(*given)[0], expected, rtol=1e-5, atol=1e-5)
