"""Pooled keys and agents against formulas written from the papers, in whole models, and in every runtime."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenopt import capture, optimize, runtimes
from tokenopt.attention import Agent, AttentionRecipe, Layout, Neighborhood, Pattern, PooledKV, parse
from tokenopt.attention.pattern import Refused
from tokenopt.cost import program_flops
from tokenopt.errors import UsageError
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.sparsify_attention import SparsifyAttention
from tokenopt.pipeline import Pipeline, PipelineResult
from tokenopt.program import Program
from tokenopt.runtimes.base import Engine
from tokenopt.runtimes.tensorrt import TensorRTRTX
from tokenopt.small_models import SmallVisionTransformer, small_model

CLS, TEXT = 1, 2
ROWS, COLUMNS = 6, 8
HEADS, DIM = 2, 8


def layout(grid: tuple[int, ...] = (ROWS, COLUMNS), before: int = CLS, after: int = TEXT) -> Layout:
    """A grid with a class token before it and text behind it."""
    count = math.prod(grid)
    segments = (("cls", 0, before), ("patch", before, count), ("text", before + count, after))
    return Layout(before + count + after, before, grid, segments, HEADS, DIM)


def attend(pattern: Pattern, where: Layout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lowered = pattern.lower(where)
    return getattr(torch.ops.tokenopt, lowered.op)(q, k, v, **lowered.tensors, **lowered.settings)


def qkv(where: Layout) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, HEADS, where.total, DIM) for _ in range(3))


def on_grid(x: Tensor, where: Layout) -> Tensor:
    return x[:, :, where.start : where.start + where.count]


def off_grid(x: Tensor, where: Layout) -> Tensor:
    return torch.cat([x[:, :, : where.start], x[:, :, where.start + where.count :]], 2)


def around(grid: Tensor, others: Tensor, where: Layout) -> Tensor:
    return torch.cat([others[:, :, : where.start], grid, others[:, :, where.start :]], 2)


def softmax(q: Tensor, k: Tensor, v: Tensor, scale: float = DIM**-0.5, bias: Tensor | float = 0.0) -> Tensor:
    return (torch.einsum("bhqd,bhkd->bhqk", q, k) * scale + bias).softmax(-1) @ v


def pooled(x: Tensor, where: Layout, cells: tuple[int, ...]) -> Tensor:
    """[B, H, n, D]: adaptive average pooling of torch."""
    image = on_grid(x, where).transpose(2, 3).reshape(-1, x.shape[3], *where.grid)
    pool = F.adaptive_avg_pool3d if len(cells) == 3 else F.adaptive_avg_pool2d
    return pool(image, cells).flatten(2).transpose(1, 2).reshape(*x.shape[:2], -1, x.shape[3])


# -- formulas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid, agents", [((6, 8), (3, 4)), ((7, 5), (3, 3)), ((4, 6, 4), (2, 3, 2))])
@pytest.mark.parametrize("power, shortcut", [(1.0, 0.0), (0.3, 0.075)])
def test_agents(grid: tuple[int, ...], agents: tuple[int, ...], power: float, shortcut: float) -> None:
    where = layout(grid)
    q, k, v = qkv(where)
    agent = pooled(q, where, agents)
    out = softmax(on_grid(q, where), agent, softmax(agent, k, v), DIM ** (-0.5 * power)) + shortcut * on_grid(v, where)
    expected = around(out, softmax(off_grid(q, where), k, v), where)
    torch.testing.assert_close(attend(Agent(agents, power, shortcut), where, q, k, v), expected)


@pytest.mark.parametrize("size_bias", [False, True])
@pytest.mark.parametrize(
    "grid, stride, cells", [((6, 8), 2, (3, 4)), ((7, 5), 2, (4, 3)), ((2, 4, 6), (1, 2, 3), (2, 2, 2))]
)
def test_pooled_keys(
    grid: tuple[int, ...], stride: int | tuple[int, ...], cells: tuple[int, ...], size_bias: bool
) -> None:
    where = layout(grid)
    q, k, v = qkv(where)
    keys, values = (torch.cat([off_grid(x, where), pooled(x, where, cells)], 2) for x in (k, v))
    bias = torch.zeros(keys.shape[2])
    bias[CLS + TEXT :] = math.log(where.count / math.prod(cells)) if size_bias else 0.0
    expected = around(softmax(on_grid(q, where), keys, values, bias=bias), softmax(off_grid(q, where), k, v), where)
    torch.testing.assert_close(attend(PooledKV(stride, size_bias=size_bias), where, q, k, v), expected)


@pytest.mark.parametrize("where", [layout(), layout(before=0, after=0), layout((12,)), layout((2, 3, 4), after=0)])
def test_cells_of_one_token_are_dense_attention(where: Layout) -> None:
    q, k, v = qkv(where)
    torch.testing.assert_close(attend(PooledKV(1), where, q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_window_and_pooled_keys_in_one_softmax() -> None:
    """As TransNeXt: logits of an unfolded window, those outside the image masked, beside logits of the pooled keys."""
    where, cells = layout(before=0, after=0), (3, 4)
    q, k, v = qkv(where)

    def window(x: Tensor) -> Tensor:
        image = x.transpose(2, 3).reshape(-1, DIM, ROWS, COLUMNS)
        return F.unfold(image, 3, padding=1).reshape(2, HEADS, DIM, 9, -1).permute(0, 1, 4, 3, 2)

    inside = F.unfold(torch.ones(1, 1, ROWS, COLUMNS), 3, padding=1)[0].T  # [N, 9]
    local = torch.einsum("bhnd,bhnwd->bhnw", q, window(k)) * DIM**-0.5 + inside.log()
    coarse = torch.einsum("bhnd,bhmd->bhnm", q, pooled(k, where, cells)) * DIM**-0.5 + math.log(4)
    weights = torch.cat([local, coarse], -1).softmax(-1)
    expected = torch.einsum("bhnw,bhnwd->bhnd", weights[..., :9], window(v)) + weights[..., 9:] @ pooled(
        v, where, cells
    )
    pattern = PooledKV(2, near=Neighborhood(3, border="truncate"))
    torch.testing.assert_close(attend(pattern, where, q, k, v), expected)


def test_window_and_pooled_keys_beside_other_tokens() -> None:
    """A key of each kind for each pair: the matrix of all logits, written out, with a mask for each head."""
    where, cells = layout(), (2, 2)
    q, k, v = qkv(where)
    windows = [3, 5]
    place = torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLUMNS))
    keys, values = (torch.cat([x, pooled(x, where, cells)], 2) for x in (k, v))
    bias = torch.full((HEADS, where.total, keys.shape[2]), -math.inf)
    for head, size in enumerate(windows):
        near = ((place[:, None] - place).abs() <= size // 2).all(-1)
        bias[head, CLS : CLS + where.count, CLS : CLS + where.count] = torch.where(near, 0.0, -math.inf)
    bias[:, :, [0, -6, -5]] = 0.0  # class and text; the four last are pooled
    bias[:, [0, -2, -1], : where.total] = 0.0
    bias[:, CLS : CLS + where.count, where.total :] = math.log(12)
    text = 'PooledKV((3, 4), near=per_head([Neighborhood(3, border="truncate"), Neighborhood(5, border="truncate")]))'
    torch.testing.assert_close(attend(parse(text), where, q, k, v), softmax(q, keys, values, bias=bias))


def test_what_is_refused() -> None:
    causal = Layout(16, 0, (4, 4), causal=True)
    for pattern in (Agent(2), PooledKV(2)):
        with pytest.raises(Refused, match="behind the query"):
            pattern.lower(causal)
        with pytest.raises(Refused, match="the grid has 1 axes"):
            type(pattern)((2, 2)).lower(Layout.of(16))
    for text in ("Agent(0)", "PooledKV((2, -1))"):
        with pytest.raises(UsageError, match="not positive"):
            parse(text)
    assert not Agent(2).subset and not PooledKV(2).subset
    assert repr(parse("PooledKV(2, near=Neighborhood(3))")) == "PooledKV(2, near=Neighborhood(3))"


def test_regions() -> None:
    """Scores between different regions are masked, as the authors' code does it; region 0 and other tokens are free."""
    where = layout()
    q, k, v = qkv(where)
    ids = torch.randint(0, 4, (2, where.count))
    bias = torch.zeros(2, 1, where.total, where.total)
    for row in range(2):
        for i in range(1, 4):
            for j in range(1, 4):
                inside = [torch.nonzero(ids[row] == region)[:, 0] + CLS for region in (i, j)]
                if i != j:
                    bias[row, 0, inside[0][:, None], inside[1]] = torch.finfo(torch.float32).min
    out = torch.ops.tokenopt.region_attention(q, k, v, ids, start=CLS)
    torch.testing.assert_close(out, softmax(q, k, v, bias=bias))
    none = torch.ops.tokenopt.region_attention(q, k, v, torch.zeros_like(ids), start=CLS)
    torch.testing.assert_close(none, F.scaled_dot_product_attention(q, k, v))


# -- in models ---------------------------------------------------------------------------------------------------------


class Sums(nn.Module):
    """An attention over a grid behind a class token, with an optional bias of its own."""

    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, HEADS * DIM, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, HEADS * DIM))
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.bias = nn.Parameter(torch.randn(1, HEADS, 33, 33)) if biased else None

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).transpose(1, 2).flatten(2)


IMAGE = (2, 3, 16, 32)
PATTERNS = {
    "agent": "Agent((2, 4), power=0.3, shortcut=0.1)",
    "pooled": "PooledKV(2)",
    "window": 'PooledKV((3, 3), near=Neighborhood(3, border="truncate"))',
}


@cache
def captured(biased: bool = False) -> Program:
    return capture(Sums(biased), torch.randn(IMAGE))


def sparsified(text: str, biased: bool = False) -> PipelineResult:
    steps = [RaiseAttention(), SparsifyAttention(pattern=text, min_speedup=0)]
    return Pipeline(steps).run(captured(biased))


def test_an_attention_with_a_bias_is_refused() -> None:
    for text in ("Agent(2)", "PooledKV(2)"):
        result = sparsified(text, biased=True)
        assert [e.pass_spec for e in result.edits] == ["raise-attention"]
        assert "has a mask or a bias" in result.refusals[0].why


def test_work_is_counted() -> None:
    """Pairs of queries and keys, 4 x head_dim operations each, and pooling, axis by axis."""
    heads, pair = HEADS, 4 * DIM
    dense = program_flops(captured()) - heads * pair * 33 * 33
    pooling = 2 * heads * DIM * (32 * 2 + 16 * 4)
    agent = heads * pair * (8 * 33 + 32 * 8 + 33) + pooling
    assert program_flops(sparsified(PATTERNS["agent"]).program) == dense + agent
    keys = heads * pair * (32 * (1 + 8) + 33) + 2 * pooling
    assert program_flops(sparsified(PATTERNS["pooled"]).program) == dense + keys


def test_regions_are_an_input_of_the_program() -> None:
    """One for all layers; without regions the model is as it was, and a region is out of reach of another."""
    model, image = small_model()
    result = optimize(model, image, recipe="Regions()", min_speedup=0, given=[image])
    assert [i["name"] for i in result.report.model["added_inputs"]] == ["regions_8x8"]
    assert all(row["passed"] for row in result.report.parity)
    assert {row["check"] for row in result.report.parity} == {"capture", "identity"}
    ids = torch.ones(2, 64, dtype=torch.int64)
    ids[:, 32:] = 2
    program = result.program
    torch.testing.assert_close(program(image, regions_8x8=torch.zeros_like(ids)), model(image), rtol=1e-4, atol=1e-5)
    apart = program(image, regions_8x8=ids)
    assert not torch.allclose(apart, model(image), atol=1e-2)
    refused = optimize(model, image, recipe="Regions()")
    assert not refused.changed and "1.00x is predicted" in refused.report.refusals[0]["why"]


@pytest.fixture(scope="module")
def everything() -> Program:
    """A vision transformer with a pattern in each of its layers."""
    texts = [*PATTERNS.values(), "Regions()"]
    recipe = AttentionRecipe("all", "", "", {str(i): text for i, text in enumerate(texts)})
    torch.manual_seed(0)
    model = SmallVisionTransformer(width=16, depth=len(texts)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return optimize(model, torch.randn(2, 3, 32, 32), recipe=recipe, min_speedup=0).program


@pytest.fixture(scope="module")
def engine(everything: Program, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("lowrank") / "model.onnx"
    return runtimes.get("onnxruntime").build(everything, path)


def test_onnx_runtime(engine: Engine) -> None:
    assert {(c.inputs, c.batch) for c in engine.parity} >= {("random", 1), ("random", 3)}
    assert all(c.passed for c in engine.parity)


@pytest.mark.tensorrt
@pytest.mark.skipif(TensorRTRTX().available() is not None, reason="tensorrt_rtx is not installed")
def test_tensorrt_builds(everything: Program, tmp_path: Path) -> None:
    built = TensorRTRTX().build(everything, tmp_path / "model.engine")
    assert built.path.stat().st_size and all(c.passed for c in built.parity)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 64), patch_size=8, depth=2, embed_dim=16,
                              num_heads=2, num_classes=5)  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", PATTERNS)
def test_a_vision_transformer(vit: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model rewritten equals the model whose attention function is replaced by the operation's own formula."""
    x = torch.randn(2, 3, 48, 64)
    pattern, where = parse(PATTERNS[name]), layout((6, 8), 1, 0)
    program = optimize(vit, x, recipe=pattern, min_speedup=0).program
    names = [str(n.target) for n in program.graph.nodes if "tokenopt" in str(n.target)]
    assert names == [f"tokenopt.{pattern.lower(where).op}.default"] * 2
    got = program(x)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: formula(name, where, q, k, v))
    torch.testing.assert_close(got, vit(x), rtol=1e-4, atol=1e-4)


def formula(name: str, where: Layout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dense = softmax(off_grid(q, where), k, v)
    if name == "agent":
        agent = pooled(q, where, (2, 4))
        found = softmax(agent, k, v)
        out = softmax(on_grid(q, where), agent, found, DIM**-0.15) + 0.1 * on_grid(v, where)
        return around(out, dense, where)
    cells = (3, 4) if name == "pooled" else (2, 3)
    keys, values = (torch.cat([x, pooled(x, where, cells)], 2) for x in (k, v))
    place = torch.cartesian_prod(torch.arange(6), torch.arange(8))
    near = ((place[:, None] - place).abs() <= 1).all(-1) & (name == "window")
    bias = torch.cat(
        [torch.zeros(48, 1), near.float().log(), torch.full((48, math.prod(cells)), math.log(48 / math.prod(cells)))], 1
    )
    return around(softmax(on_grid(q, where), keys, values, bias=bias), dense, where)
