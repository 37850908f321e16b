"""TensorRT engines: built without a GPU, described, read back; failures and crashes of the builder."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from tokenopt import capture, runtimes
from tokenopt.errors import LoweringError, ParityError, UsageError
from tokenopt.program import InputSpec, Program
from tokenopt.runtimes import tensorrt as tensorrt_runtime
from tokenopt.runtimes.base import require_same_interface
from tokenopt.runtimes.bench import bench
from tokenopt.runtimes.compare import verify
from tokenopt.runtimes.tensorrt import TensorRT, TensorRTEngine, TensorRTRTX, read_description

rtx = pytest.mark.skipif(TensorRTRTX().available() is not None, reason="tensorrt_rtx is not installed")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


class Merging(nn.Module):
    """A small vision transformer that merges a quarter of its tokens between its two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.before, self.after = (
            nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.head = nn.Linear(32, 5)

    def forward(self, image: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        ops = torch.ops.tokenopt
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = self.before(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))
        index, src, dst = ops.match_bipartite(x, 4, 1, 17)
        y, size = ops.merge_tokens(x, None, index, src, dst, True)
        return self.head(self.after(y)[:, 0]) * scale, ops.token_map(index, src, dst, 17)


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def small_program() -> Program:
    return capture(Scale(), torch.randn(2, 4))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Merging(), {"image": torch.randn(2, 3, 16, 16), "scale": torch.ones(2, 1)})


@pytest.fixture(scope="module")
def engine(program: Program, tmp_path_factory: pytest.TempPathFactory) -> TensorRTEngine:
    return TensorRTRTX().build(program, tmp_path_factory.mktemp("engine") / "model.engine")


@pytest.mark.tensorrt
@rtx
def test_engine_of_a_merging_model(engine: TensorRTEngine) -> None:
    """With a dynamic batch, without a GPU; its interface is read back from the file."""
    described = read_description(engine.path)
    assert described.inputs == (
        InputSpec("image", "float32", ("batch", 3, 16, 16)),
        InputSpec("scale", "float32", ("batch", 1)),
    )
    assert described.outputs == (
        InputSpec("output_0", "float32", ("batch", 5)),
        InputSpec("output_1", "int64", ("batch", 17)),
    )
    assert (described.module, described.batch) == ("tensorrt_rtx", (1, 8, 64))
    assert (engine.runtime, engine.batch_limits) == ("tensorrt-rtx", (1, 64))
    assert list(engine.path.parent.iterdir()) == [engine.path]
    # Not our description of them, but the engine's own records: names behind their lengths.
    content = engine.path.read_bytes()
    for spec in (*described.inputs, *described.outputs):
        assert struct.pack("<Q", len(spec.name)) + spec.name.encode() in content


@pytest.mark.tensorrt
@rtx
@no_gpu
def test_what_can_be_checked_without_a_gpu_is_checked(engine: TensorRTEngine) -> None:
    """The ONNX file it was built from is run; the engine's interface is compared."""
    made = [(c.check, c.inputs, c.batch) for c in engine.parity]
    assert made == [
        ("onnxruntime", "random", 1), ("onnxruntime", "random", 3),
        ("onnxruntime", "example", 1), ("onnxruntime", "example", 2),
        ("tensorrt-rtx", "shapes", 0),
    ]  # fmt: skip
    assert all(c.passed for c in engine.parity)
    assert engine.description.compute_capability == "8.9"
    opened = runtimes.open(engine.path)
    assert not opened.runnable
    inputs = opened.random_inputs(2)
    for attempt in (lambda: opened(*inputs), lambda: verify(opened, opened), lambda: bench([opened])):
        with pytest.raises(LoweringError, match="cannot run on this machine") as caught:
            attempt()
        assert "NVIDIA GPU" in str(caught.value)


@pytest.mark.gpu
@pytest.mark.tensorrt
@rtx
def test_engine_runs_on_a_gpu(engine: TensorRTEngine, program: Program) -> None:
    assert all(c.passed for c in engine.parity)
    assert {c.check for c in engine.parity} == {"onnxruntime", "tensorrt-rtx"}
    opened = runtimes.open(engine.path)
    for batch in (1, 5, 64):
        inputs = opened.random_inputs(batch)
        result, expected = opened(*inputs), program.flat(**dict(zip(("image", "scale"), inputs, strict=True)))
        torch.testing.assert_close(result[0], expected[0], atol=1e-3, rtol=1e-3)
    with pytest.raises(UsageError, match="batch size 65"):
        opened(*opened.random_inputs(65))


@pytest.mark.tensorrt
@rtx
@pytest.mark.parametrize(("opset", "capability"), [(20, "12.0"), (23, "8.6")])
def test_attention_in_single_precision(tmp_path: Path, opset: int, capability: str) -> None:
    """At opset 23 it is one node, for which there is no dedicated kernel: it must be allowed to be decomposed."""

    class Attention(nn.Module):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            q, k, v = x.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            return torch.ops.tokenopt.attention(q, k, v, None, bias)

    model = capture(Attention(), (torch.randn(2, 7, 96), torch.randn(2, 7)))
    engine = TensorRTRTX().build(
        model, tmp_path / "model.engine", opset=opset, compute_capability=capability, batch_profile=(2, 2, 4)
    )
    assert engine.description.compute_capability == capability
    assert engine.batch_limits == (2, 4)
    assert engine.batch_sizes(1, 3, 9) == [2, 3, 4]


@pytest.mark.tensorrt
@rtx
def test_static_batch_half_precision_and_inputs_that_nothing_reads(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8).half()

        def forward(self, x: Tensor, unread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.linear(x), x, x > 0

    x = torch.randn(2, 8).half()
    model = capture(Half(), (x, torch.zeros(2, dtype=torch.int64)), dynamic_batch=False)
    engine = TensorRTRTX().build(model, tmp_path / "model.engine")
    assert [s.dtype for s in engine.inputs] == ["float16", "int64"]
    assert [s.dtype for s in engine.outputs] == ["float16", "float16", "bool"]
    assert engine.inputs[0].shape == (2, 8)
    assert engine.batch_sizes(1, 3) == [2]


@pytest.mark.tensorrt
@rtx
def test_what_it_cannot_express_is_refused_before_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nonzero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros(x.shape[0], 4).scatter_add(1, (x > 0).long(), x)

    monkeypatch.setattr(tensorrt_runtime, "_BUILDER", tmp_path / "not reached")
    (tmp_path / "model.engine").write_bytes(b"old")
    with pytest.raises(LoweringError) as caught:
        TensorRTRTX().build(capture(Nonzero(), torch.randn(2, 4)), tmp_path / "model.engine")
    assert "ScatterElements" in str(caught.value)
    assert "node" in str(caught.value)
    assert (tmp_path / "model.engine").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.engine"]


def _build(tmp_path: Path, node: onnx.NodeProto, inputs: list[onnx.ValueInfoProto], **options: object) -> None:
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output[:1]]
    graph = helper.make_graph([node], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    arguments = {"capability": "8.9", "batch": (1, 8, 64), "tf32": False, **options}
    TensorRTRTX()._build(tmp_path / "model.onnx", tmp_path / "model.engine", **arguments)  # type: ignore[arg-type]


@pytest.mark.tensorrt
@rtx
def test_errors_of_the_parser_and_the_builder(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    with pytest.raises(LoweringError) as caught:
        _build(tmp_path, helper.make_node("NonZero", ["x"], ["y"], name="culprit"), [x])
    assert "NonZero culprit" in str(caught.value)
    with pytest.raises(LoweringError, match="knows no such node") as caught:
        _build(tmp_path, helper.make_node("Det", ["x"], ["y"], name="culprit"), [x])
    assert caught.value.where == "Det culprit"
    odd = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b"])
    with pytest.raises(LoweringError, match="only the first size"):
        _build(tmp_path, helper.make_node("Relu", ["x"], ["y"]), [odd])
    with pytest.raises(LoweringError, match="3.0 is not among .*8.9"):
        _build(tmp_path, helper.make_node("Relu", ["x"], ["y"]), [x], capability="3.0")
    with pytest.raises(LoweringError, match="do not fit"):
        names = [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]
        many = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in names]
        _build(tmp_path, helper.make_node("Relu", [many[0].name], ["y"]), many)
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("print('last words', flush=True); import os; os.kill(os.getpid(), 11)", ("SIGSEGV", "last words")),
        ("raise RuntimeError('out of luck')", ("code 1", "out of luck")),
        ("import os; os._exit(3)", ("code 3",)),
    ],
    ids=["signal", "exception", "exit"],
)
def test_a_crash_of_the_builder_is_an_error_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: tuple[str, ...]
) -> None:
    builder = tmp_path / "builder.py"
    builder.write_text(script)
    monkeypatch.setattr(tensorrt_runtime, "_BUILDER", builder)
    with pytest.raises(LoweringError) as caught:
        TensorRTRTX()._build(tmp_path / "m.onnx", tmp_path / "m.engine", "8.9", (1, 8, 64), False)
    for text in expected:
        assert text in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"tokenopt-engine:AAAA;", None])
def test_what_is_no_engine(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.engine"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoweringError) as caught:
        runtimes.open(path)
    assert str(path) in str(caught.value)


def test_wrong_options(tmp_path: Path) -> None:
    program = small_program()
    if TensorRTRTX().available() is None:
        with pytest.raises(UsageError, match="not in order"):
            TensorRTRTX().build(program, tmp_path / "m.engine", batch_profile=(4, 2, 8))
        with pytest.raises(UsageError, match="no compute capability"):
            TensorRTRTX().build(program, tmp_path / "m.engine", compute_capability="ada")
    if TensorRT().available() is not None:
        with pytest.raises(LoweringError, match="tensorrt cannot be used"):
            TensorRT().build(program, tmp_path / "m.engine")
    assert not list(tmp_path.iterdir())


def test_an_interface_that_differs_is_an_error() -> None:
    program = small_program()
    (spec,) = program.inputs
    require_same_interface(program, [spec], program.outputs, "here")
    require_same_interface(program, [InputSpec(spec.name, "float32", ("n", 4))], program.outputs, "here")
    for wrong in (("other", "float32", ("n", 4)), (spec.name, "float16", ("n", 4)), (spec.name, "float32", ("n", 5))):
        with pytest.raises(LoweringError, match="inputs of the built model"):
            require_same_interface(program, [InputSpec(*wrong)], program.outputs, "here")
    with pytest.raises(LoweringError, match="outputs of the built model"):
        require_same_interface(program, [spec], [], "here")


@pytest.mark.tensorrt
@rtx
def test_a_file_that_differs_from_the_program_builds_no_engine(program: Program, tmp_path: Path) -> None:
    with pytest.raises(ParityError):
        runtimes.export(program, tmp_path / "model.engine", tolerance=-1.0)
    assert not list(tmp_path.iterdir())
