"""Programs as .pt2 and ONNX files: every form of attention and output, dynamic batch, atomic writes, clear errors."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn

from tokenopt import capture, runtimes
from tokenopt.errors import LoweringError, ParityError, TokenoptError, UsageError
from tokenopt.program import Program
from tokenopt.runtimes import lowering_tokens
from tokenopt.runtimes import onnx as onnx_runtime
from tokenopt.runtimes.compare import verify
from tokenopt.runtimes.onnxruntime import OnnxRuntimeEngine
from tokenopt.runtimes.tensorrt import TensorRT


class Encoder(nn.Module):
    """Two transformer blocks over 16 patches and a class token."""

    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.blocks(x)[:, 0])


class Attentions(nn.Module):
    """The forms of attention that models use."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 4, 6, 6))  # learned, as relative position: it changes strides

    def forward(self, x: Tensor, visible: Tensor) -> dict[str, Tensor]:
        b = x.shape[0]
        q, k, v = x.view(b, 6, 3, 4, 8).permute(2, 0, 3, 1, 4)
        attend = F.scaled_dot_product_attention
        windows = [t.reshape(b, 4, 2, 3, 8).transpose(1, 2) for t in (q, k, v)]
        additive = torch.zeros(visible.shape, dtype=x.dtype).masked_fill(~visible, -1e9)
        return {
            "plain": attend(q, k, v).transpose(1, 2).reshape(b, 6, 32),
            "rank 2": attend(self.bias[0, 0], self.bias[0, 1], self.bias[0, 2]) + x[:, :, :6],
            "rank 3": attend(q[:, 0], k[:, 0], v[:, 0]),
            "rank 3, mask": attend(q[:, 0], k[:, 0], v[:, 0], visible[:, None]),
            "rank 5": attend(*windows).transpose(1, 2).reshape(b, 4, 6, 8),
            "rank 5, mask": attend(*windows, self.bias[:, :, :3, :3]),
            "scale": attend(q, k, v, scale=0.3),
            "causal": attend(q, k, v, is_causal=True),
            "learned bias": attend(q, k, v, self.bias).transpose(1, 2).reshape(b, 6, 32),
            "key bias": attend(q, k, v, additive[:, None, None]),
            "key mask": attend(q, k, v, visible[:, None, None]),
            "full mask": attend(q, k, v, visible[:, None, None] & visible[:, None, :, None].logical_or(visible[0, 0])),
            "grouped": attend(q, k[:, :2], v[:, :2], enable_gqa=True),
            "cross": attend(q[:, :, :2], k, v),
        }


class Rewritten(nn.Module):
    """What torch's exporter refuses, or writes wrongly."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        index = torch.tensor([[0, 1, 1, 0, 0]]).expand(x.shape[0], -1)
        mean = torch.zeros_like(x[:, :3])
        return {
            "squeeze of more than one": x.squeeze(1) * 2,
            "squeeze of some": x[:, None].squeeze((1, 2)) * 2,
            "masked scatter": x.masked_scatter(x > 0, x.flip(0)),
            "mean with": mean.scatter_reduce(1, index, x, "mean"),
            "mean without": (mean + 7).scatter_reduce(1, index, x, "mean", include_self=False),
            "maximum": mean.scatter_reduce(1, index, x, "amax"),
            "stable": torch.sort(x.round(), dim=1, stable=True, descending=True)[1],
            "distances": torch.cdist(x[:, None], x[:, None]),
        }


class Outputs(nn.Module):
    """Every kind of thing a model returns, and inputs that are not tensors, not in order, or not read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor, scale: float = 1.0, *, unread: Tensor, mask: Tensor, flag: bool = True) -> dict:
        y = x * scale * mask if flag else x
        return {
            "none": None, "twice": (y, y), "input": x, "weight": self.table, "number": 3, "rows": x.shape[0],
            "ids": y.argmax(-1), "constant": torch.arange(3), "positive": y > 0,
        }  # fmt: skip


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def small_program() -> Program:
    return capture(Scale(), torch.randn(2, 4))


def image_program(**options: bool) -> Program:
    return capture(Encoder(), torch.randn(2, 3, 16, 16), **options)


def difference(engine: runtimes.Engine, program: Program, batch: int) -> float:
    args, kwargs = program.random_inputs(batch, seed=7)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    pairs = zip(engine(*tensors), program.flat(*args, **kwargs), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def node_types(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, runtimes.Engine]:
    torch.manual_seed(0)
    program = image_program()
    return program, runtimes.export(program, tmp_path_factory.mktemp("exported") / "model.onnx")


def test_dynamic_batch(exported: tuple[Program, runtimes.Engine]) -> None:
    program, engine = exported
    assert [c.passed for c in engine.parity] == [True] * 4
    assert (engine.inputs[0].name, engine.inputs[0].shape) == ("image", ("batch", 3, 16, 16))
    assert (engine.outputs[0].name, engine.outputs[0].shape) == ("output_0", ("batch", 5))
    for batch in (1, 2, 7):
        assert difference(engine, program, batch) < 1e-5
    opened = runtimes.open(engine.path, threads=1)
    assert difference(opened, program, 3) < 1e-5
    assert (opened.runtime, opened.files) == ("onnxruntime", (engine.path,))
    assert list(engine.path.parent.iterdir()) == [engine.path]
    (opset,) = onnx.load(engine.path).opset_import
    assert opset.version == onnx_runtime.OPSET


def test_static_batch(tmp_path: Path) -> None:
    program = image_program(dynamic_batch=False)
    engine = runtimes.export(program, tmp_path / "model.onnx")
    assert engine.inputs[0].shape == (2, 3, 16, 16)
    assert {c.batch for c in engine.parity} == {2}
    with pytest.raises(UsageError, match="does not fit"):
        engine(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("opset", [20, 23, 25])
def test_every_form_of_attention(tmp_path: Path, opset: int) -> None:
    """Including rows that see nothing, which torch answers with zeros."""
    visible = torch.rand(3, 6) > 0.4
    visible[:, 0] = True
    program = capture(Attentions(), (torch.randn(3, 6, 96), visible))
    engine = runtimes.export(program, tmp_path / "model.onnx", opset=opset)
    assert difference(engine, program, 2) < 1e-5
    if opset < 23:  # what the attention node answers then is not specified
        x, blind = torch.randn(2, 6, 96), torch.zeros(2, 6, dtype=torch.bool)
        torch.testing.assert_close(engine(x, blind), program.flat(x, blind), atol=1e-5, rtol=1e-5)
    types = node_types(tmp_path / "model.onnx")
    assert ("Attention" in types) == (opset >= 23)
    assert "NonZero" not in types


def test_what_the_exporter_gets_wrong_is_rewritten(tmp_path: Path) -> None:
    program = capture(Rewritten(), torch.randn(2, 5))
    engine = runtimes.export(program, tmp_path / "model.onnx")
    assert difference(engine, program, 4) < 1e-5
    assert "NonZero" not in node_types(tmp_path / "model.onnx")


def test_overlapping_patches_are_summed(tmp_path: Path) -> None:
    """Without Col2Im, which TensorRT has not."""
    cases = (
        ((8, 8), (3, 3), (1, 1), (1, 1), (1, 1)), ((9, 11), (3, 2), (2, 1), (1, 0), (2, 3)),
        ((8, 9), (2, 3), (1, 2), (0, 1), (3, 2)),
    )  # fmt: skip

    class Fold(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            return tuple(F.fold(x, *case) for x, case in zip((a, b, c), cases, strict=True))

    given = lambda rows: [F.unfold(torch.randn(rows, 5, *case[0]), *case[1:]) for case in cases]  # noqa: E731
    program = capture(Fold(), given(2))
    engine = runtimes.export(program, tmp_path / "model.onnx")
    assert difference(engine, program, 3) < 1e-5
    types = node_types(tmp_path / "model.onnx")
    assert types.count("ConvTranspose") == len(cases) and "Col2Im" not in types


def test_every_kind_of_input_and_output(tmp_path: Path) -> None:
    """Tensors alone come out, in order, each once per mention; inputs are those of the program, in its order."""
    x, mask = torch.randn(2, 4), torch.ones(2, 1)
    program = capture(Outputs(), {"mask": mask, "x": x, "unread": torch.randn(2, 3), "scale": 2.0, "flag": True})
    engine = runtimes.export(program, tmp_path / "model.onnx")
    assert [s.name for s in engine.inputs] == [s.name for s in program.inputs]
    assert [s.name for s in engine.outputs] == [f"output_{i}" for i in range(7)] == [s.name for s in program.outputs]
    assert [s.dtype for s in engine.outputs] == [s.dtype for s in program.outputs]
    assert difference(engine, program, 5) < 1e-6


def test_operations_of_tokenopt(tmp_path: Path) -> None:
    """They become standard nodes that TensorRT takes, too."""

    class Merge(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            ops = torch.ops.tokenopt
            index, src, dst = ops.match_bipartite(x, 3, 1, 9)
            y, size = ops.merge_tokens(x, None, index, src, dst, True)
            q = y.unflatten(-1, (2, 4)).transpose(1, 2)
            return ops.attention(q, q, q, None, size.log()), size, ops.gather_tokens(x, index, 1, 0, 0, 9)

    program = capture(Merge(), torch.randn(2, 9, 8))
    for opset in (20, 23):
        engine = runtimes.export(program, tmp_path / "model.onnx", opset=opset)
        assert difference(engine, program, 3) < 1e-5
        model = onnx.load(tmp_path / "model.onnx")
        assert {node.domain for node in model.graph.node} == {""}
        onnx_runtime.require_expressible(model, TensorRT.capabilities, "tensorrt")


@pytest.mark.parametrize(
    ("tokens", "start", "stop", "r", "dtype"),
    [(17, 1, 17, 5, torch.float32), (17, 1, 17, 5, torch.float16), (12, 2, 9, 2, torch.float32),
     (9, 0, 9, 5, torch.float32), (8, 0, 8, 0, torch.float32)],
)  # fmt: skip
def test_merges_equal_their_reference(
    tmp_path: Path, tokens: int, start: int, stop: int, r: int, dtype: torch.dtype
) -> None:
    """Around protected tokens, of all even positions and of none, several into one place, sizes beyond fp16."""

    class Merge(nn.Module):
        def forward(self, x: Tensor, metric: Tensor, size: Tensor) -> tuple[Tensor, ...]:
            ops = torch.ops.tokenopt
            plan = ops.match_bipartite(metric, r, start, stop)
            crowded = plan[0], plan[1], plan[2] * 0 + start
            weights = (1000 * size.exp(), None)
            return *plan, *(t for p in (plan, crowded) for w in weights for t in ops.merge_tokens(x, w, *p, True))

    batch = torch.randn(3, tokens, 6, dtype=dtype), torch.randn(3, tokens, 5), torch.randn(3, tokens)
    program = capture(Merge(), tuple(t[:2] for t in batch))
    engine = runtimes.export(program, tmp_path / "model.onnx")
    for found, expected in zip(engine(*batch), program.flat(*batch), strict=True):
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-5 if expected.dtype is torch.float32 else 2e-3, atol=1e-5)


@pytest.mark.parametrize(("r", "pairs", "shifted"), [(1, 2**15, False), (70, 2**15, True), (5, 0, False)])
def test_matches_by_energy_equal_their_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, r: int, pairs: int, shifted: bool
) -> None:
    """Fewer than all sources, of few tokens and of many, own ones of each sample and shared ones; cosines on both sides
    of the margin."""

    class Match(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            monkeypatch.setattr(lowering_tokens, "_PAIRS", pairs)
            self.register_buffer("even", torch.arange(2, 160, 2)[None])
            self.register_buffer("odd", torch.arange(3, 160, 2)[None])

        def forward(self, metric: Tensor) -> tuple[Tensor, ...]:
            ops = torch.ops.tokenopt
            energy = ops.token_energy(metric, 0.2, 0.7, shifted, 2, 160)
            sources, targets = ops.partition_energy(energy, r + 2, 2, 160)
            shared = ops.match_partition(metric, self.even, self.odd, r, 2, 160)
            return energy, sources, targets, *ops.match_partition(metric, sources, targets, r, 2, 160), *shared

    metric = torch.randn(3, 163, 4, generator=torch.Generator().manual_seed(r))
    program = capture(Match(), (metric[:2],))
    engine = runtimes.export(program, tmp_path / "model.onnx")
    for found, expected in zip(engine(metric), program.flat(metric), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if r == 1:  # a batch of a fixed size is not one row for all
        fixed = runtimes.export(capture(Match(), (metric,), dynamic_batch=False), tmp_path / "fixed.onnx")
        for found, expected in zip(fixed(metric), program.flat(metric), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nested_results_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
        output_hidden_states=True,
    )  # fmt: skip
    program = capture(transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)})
    engine = runtimes.export(program, tmp_path / "model.onnx")
    assert len(engine.outputs) == len(program.outputs) == 5
    assert difference(engine, program, 1) < 1e-5


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = Attentions()
    program = capture(model, (torch.randn(3, 6, 96), torch.ones(3, 6, dtype=torch.bool)))
    before = str(program), program.digest
    runtimes.export(program, tmp_path / "model.onnx")
    assert model.bias.requires_grad
    assert program.exported.state_dict["bias"] is model.bias
    assert (str(program), program.digest) == before


def test_the_file_tells_nothing_of_this_machine(exported: tuple[Program, runtimes.Engine]) -> None:
    path = exported[1].path
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path(__file__).parent).encode() not in content
    assert b"blocks.layers.0" in content  # where a node comes from, for messages
    model = onnx.load(path)
    assert model.producer_name == "tokenopt"


def test_large_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = image_program()
    path, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    with monkeypatch.context() as patch:
        patch.setattr(onnx_runtime, "INLINE_LIMIT", 0)
        engine = runtimes.export(program, path)
    assert engine.files == (path, data)
    assert sorted(tmp_path.iterdir()) == [path, data]
    assert path.stat().st_size < 100_000 < 4 * sum(v.numel() for v in program.exported.state_dict.values()) * 100
    assert difference(runtimes.open(path), program, 3) < 1e-5
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in engine.files:
        file.rename(moved / file.name)
    assert difference(runtimes.open(moved / "model.onnx"), program, 3) < 1e-5
    for file in (path, data):
        (moved / file.name).rename(file)
    moved.rmdir()
    assert runtimes.export(program, path).files == (path,)  # what is no longer needed goes
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ParityError):
        runtimes.export(image_program(), path, tolerance=-1.0)

    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x)

    program = capture(Unknown(), torch.randn(2, 3, 3))
    with pytest.raises(LoweringError) as caught:
        runtimes.export(program, path)
    assert "aten._linalg_eigh" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TokenoptError):
        runtimes.export(small_program(), tmp_path / "file" / "model.onnx")


def test_program_file(tmp_path: Path) -> None:
    program = image_program()
    engine = runtimes.export(program, tmp_path / "model.pt2")
    assert all(c.passed for c in engine.parity)
    assert difference(runtimes.open(tmp_path / "model.pt2", threads=1), program, 3) == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "model.pt2"]


def test_files_are_verified_against_each_other(tmp_path: Path, exported: tuple[Program, runtimes.Engine]) -> None:
    program, engine = exported
    program.save(tmp_path / "same.pt2")
    torch.manual_seed(1)
    image_program().save(tmp_path / "other.pt2")
    same = verify(tmp_path / "same.pt2", engine.path, data=[[torch.randn(4, 3, 16, 16)]])
    assert [(c.check, c.inputs, c.batch, c.passed) for c in same] == [
        ("onnxruntime", "random", 1, True), ("onnxruntime", "random", 3, True),
        ("onnxruntime", "data", 1, True), ("onnxruntime", "data", 4, True),
    ]  # fmt: skip
    assert all(c.passed for c in verify(engine.path, tmp_path / "same.pt2"))
    assert not any(c.passed for c in verify(engine.path, tmp_path / "other.pt2"))


def test_compiled_without_graph_breaks() -> None:
    program = image_program()
    compiled = torch.compile(program.module(), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(compiled(x), program(x))


@pytest.mark.parametrize("name", ["eager", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx"])
def test_registered_runtimes(name: str) -> None:
    runtime = runtimes.get(name)
    assert runtime.name == name
    assert runtime.available() is None or isinstance(runtime.available(), str)


def test_wrong_names_and_options(tmp_path: Path) -> None:
    program = small_program()
    with pytest.raises(UsageError, match="there is no runtime"):
        runtimes.get("tflite")
    with pytest.raises(UsageError, match="reads or writes .tflite"):
        runtimes.export(program, tmp_path / "model.tflite")
    with pytest.raises(UsageError, match="reads or writes files without a suffix"):
        runtimes.open(tmp_path / "model")
    with pytest.raises(UsageError, match="no option 'compute_capability'"):
        runtimes.export(program, tmp_path / "model.onnx", compute_capability="8.9")
    with pytest.raises(UsageError, match="opset 99"):
        runtimes.export(program, tmp_path / "model.onnx", opset=99)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"junk", b"\x08\x0a" * 1000, None], ids=["empty", "text", "bytes", "missing"])
def test_what_is_no_onnx_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoweringError) as caught:
        runtimes.open(path)
    assert str(path) in str(caught.value)


def test_a_truncated_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    runtimes.export(small_program(), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LoweringError, match="cannot open"):
        runtimes.open(path)


def test_a_model_of_another_maker(tmp_path: Path) -> None:
    """Sizes without a name, and inputs that torch has no value for, are no obstacle."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    engine = runtimes.open(tmp_path / "m.onnx")
    assert isinstance(engine, OnnxRuntimeEngine)
    assert engine.dynamic_batch
    assert engine.provider.endswith("ExecutionProvider")
    assert torch.equal(engine(torch.tensor([[-1.0, 0.0, 2.0]]))[0], torch.tensor([[0.0, 0.0, 2.0]]))
    assert all(c.passed for c in verify(engine, engine))


def _model(node: onnx.NodeProto, opset: int = 20, **constants: list[int]) -> onnx.ModelProto:
    initializers = [helper.make_tensor(k, TensorProto.INT64, [len(v)], v) for k, v in constants.items()]
    graph = helper.make_graph([node], "g", [], [], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (helper.make_node("ScatterElements", ["x", "i", "u"], ["y"], name="bad", reduction="add"), "reduction 'add'"),
        (helper.make_node("ScatterND", ["x", "i", "u"], ["y"], name="bad", reduction="max"), "reduction 'max'"),
        (helper.make_node("NonZero", ["x"], ["y"], name="bad"), "depends on values"),
        (helper.make_node("TopK", ["x", "k"], ["y", "z"], name="bad"), "K = 3841"),
        (helper.make_node("Attention", ["q", "k", "v"], ["y"], name="bad", left_window_size=3), "silently ignored"),
    ],
    ids=["scatter", "scatter nd", "nonzero", "topk", "window"],
)
def test_what_tensorrt_cannot_do_is_named(node: onnx.NodeProto, why: str) -> None:
    node.metadata_props.add(key="module", value="blocks.3.attn")
    model = _model(node, k=[3841])
    with pytest.raises(LoweringError) as caught:
        onnx_runtime.require_expressible(model, TensorRT.capabilities, "tensorrt")
    assert "bad (blocks.3.attn)" in str(caught.value)
    assert why in str(caught.value)
    branch = helper.make_node("If", ["c"], ["y"], then_branch=model.graph, else_branch=model.graph)
    with pytest.raises(LoweringError, match="bad"):
        onnx_runtime.require_expressible(_model(branch), TensorRT.capabilities, "tensorrt")
    onnx_runtime.require_expressible(model, onnx_runtime.Onnx.capabilities, "onnx")


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("ScatterElements", ["x", "i", "u"], ["y"]),
        helper.make_node("TopK", ["x", "k"], ["y", "z"]),
        helper.make_node("TopK", ["x", "computed"], ["y", "z"]),
        helper.make_node("Attention", ["q", "k", "v"], ["y"], left_window_size=-1),
    ],
    ids=["scatter", "topk", "topk of a computed number", "no window"],
)
def test_what_tensorrt_can_do_passes(node: onnx.NodeProto) -> None:
    onnx_runtime.require_expressible(_model(node, k=[3840]), TensorRT.capabilities, "tensorrt")
