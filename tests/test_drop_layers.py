"""drop-layers against models whose forward is written by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenopt
from tokenopt import capture, diagnostics, runtimes
from tokenopt.analysis.axes import propagate
from tokenopt.analysis.sites import find_sites
from tokenopt.cost import program_flops
from tokenopt.diagnostics import head_thresholds
from tokenopt.errors import BudgetError, UsageError
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.passes.drop_layers import DropLayers
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline, PipelineResult, _options
from tokenopt.program import Program
from tokenopt.schedule import Budget

WIDTH, HEADS, LAYERS, TEXT, PATCHES = 16, 2, 3, 5, 16


class Reader(nn.Module):
    """A causal model that reads four tokens of a prompt, 4 x 4 patches of an image, and five tokens of text."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.patches, self.words = nn.Conv2d(3, WIDTH, 4, 4), nn.Embedding(11, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(LAYERS))
        self.phase = nn.Parameter(torch.randn(4 + PATCHES + TEXT, WIDTH // HEADS))
        self.attention: set[int] = set()
        self.mlp: set[int] = set()
        self.heads: set[tuple[int, int]] = set()
        self.blind: set[tuple[int, int]] = set()
        self.only = slice(None)
        self.units = 0
        self.causal = self.seen = True

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        patches = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.prompt.expand(image.shape[0], -1, -1), patches, self.words(text)], 1)
        for i in range(LAYERS):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            q, k = q * self.phase, k * self.phase
            if self.seen or i not in self.attention:
                heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            else:
                mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
                mask = mask.tril() if self.causal else mask
                mask[:, self.only] = False
                heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            for layer, head in self.heads:
                if layer == i:
                    heads[:, head] = 0
            for layer, head in self.blind:
                if layer == i:
                    heads[:, head] = self._blinded(q[:, head], k[:, head], v[:, head])
            x = self._add(x, self.out[i](heads.transpose(1, 2).flatten(2)), i in self.attention)
            hidden = F.gelu(self.up[i](self.norms[2 * i + 1](x)))
            if i in self.mlp and self.units:
                hidden = hidden.clone()
                hidden[:, self.only, self.units :] = 0
            x = self._add(x, self.down[i](hidden), i in self.mlp and not self.units)
        return x

    def _blinded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A head that adds nothing to some tokens, and where ``seen`` is false does not see them either."""
        logits = q @ k.transpose(1, 2) / q.shape[2] ** 0.5
        if self.causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        if not self.seen:
            logits[:, :, self.only] = -torch.inf
        out = logits.softmax(-1) @ v
        out[:, self.only] = 0
        return out

    def _add(self, x: Tensor, update: Tensor, dropped: bool) -> Tensor:
        if not dropped:
            return x + update
        update = update.clone()
        update[:, self.only] = 0
        return x + update


def inputs(rows: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 16, 16), torch.randint(0, 11, (rows, TEXT))


@pytest.fixture(scope="module")
def models() -> dict[bool, tuple[Reader, Program]]:
    """A causal one and one that is not, each with its program."""
    torch.manual_seed(0)
    model = Reader().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    other = copy.deepcopy(model)
    other.causal = False
    return {m.causal: (m, capture(m, inputs())) for m in (model, other)}


@pytest.fixture
def program(models: dict[bool, tuple[Reader, Program]]) -> Program:
    return models[True][1]


Models = dict[bool, tuple[Reader, Program]]


def dropped(program: Program, **options: object) -> PipelineResult:
    return Pipeline([FoldConstants(), RaiseAttention(), DropLayers(**options), RemoveDead()]).run(program)


@pytest.mark.parametrize("segment, only", [("", slice(None)), ("patch", slice(4, 20)), ("text", slice(20, 25))])
@pytest.mark.parametrize("attention, mlp", [([1], [1]), ([0, 2], []), ([0, 1, 2], [0, 1, 2])])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_layers(
    models: dict[bool, tuple[Reader, Program]], segment: str, only: slice, attention: list[int], mlp: list[int],
    causal: bool,
) -> None:  # fmt: skip
    model, program = models[causal]
    options = {"attention": ",".join(map(str, attention)), "mlp": ",".join(map(str, mlp)), "segment": segment}
    result = dropped(program, **options)
    assert not result.refusals
    model = copy.deepcopy(model)
    model.attention, model.mlp, model.only = set(attention), set(mlp), only
    for rows in (1, 3):
        given = inputs(rows)
        torch.testing.assert_close(result.program(*given), model(*given), rtol=1e-4, atol=1e-5)
    assert program_flops(result.program) < program_flops(program)


@pytest.mark.parametrize("segment, only", [("", slice(None)), ("patch", slice(4, 20)), ("text", slice(20, 25))])
@pytest.mark.parametrize("attention", ["", "1"])
@torch.no_grad()
def test_some_hidden_units(program: Program, models: Models, segment: str, only: slice, attention: str) -> None:
    """The first units are left to the tokens of a segment; the others are computed for no token of it."""
    result = dropped(program, attention=attention, mlp="0,1", segment=segment, units=0.25)
    assert not result.refusals
    model = copy.deepcopy(models[True][0])
    model.attention, model.mlp, model.only, model.units = {1} if attention else set(), {0, 1}, only, WIDTH // 2
    for rows in (1, 3):
        given = inputs(rows)
        torch.testing.assert_close(result.program(*given), model(*given), rtol=1e-4, atol=1e-5)
    if not attention:
        count = len(range(4 + PATCHES + TEXT)[only])
        gone = 2 * count * 0.75 * 2 * 2 * 2 * WIDTH * WIDTH
        assert program_flops(program) - program_flops(result.program) == gone


class Gated(nn.Module):
    """Attention, and an MLP with a gate, or one with a norm on its hidden units."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.cls, self.patches = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Conv2d(3, WIDTH, 4, 4)
        self.up, self.gate, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24, bias=False), nn.Linear(24, WIDTH)
        self.norm = nn.LayerNorm(24) if normed else nn.Identity()
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, image: Tensor, units: int = 24) -> Tensor:
        patches = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(image.shape[0], -1, -1), patches], 1)
        heads = x.unflatten(2, (HEADS, -1)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        hidden = F.silu(self.gate(x)) * self.up(x)
        if units < 24:
            hidden = torch.cat([hidden[:, :1], F.pad(hidden[:, 1:, :units], (0, 24 - units))], 1)
        return x + self.scale * self.down(self.norm(hidden))


@torch.no_grad()
def test_hidden_units_with_a_gate() -> None:
    image = torch.randn(2, 3, 16, 16)
    model = Gated(normed=False).eval()
    result = dropped(capture(model, image), mlp="0", segment="patch", units=0.5)
    assert not result.refusals
    torch.testing.assert_close(result.program(image), model(image, units=12), rtol=1e-4, atol=1e-5)
    normed = dropped(capture(Gated(normed=True).eval(), image), mlp="0", segment="patch", units=0.5)
    assert not any("drop" in e.pass_spec for e in normed.edits)
    assert "not those of linear layers" in normed.refusals[0].why
    with pytest.raises(UsageError, match="no share of the hidden units"):
        dropped(capture(model, image), mlp="0", units=1.5)


@pytest.mark.parametrize("segment, only", [("patch", slice(4, 20)), ("text", slice(20, 25))])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_tokens_that_leave(models: dict[bool, tuple[Reader, Program]], segment: str, only: slice, causal: bool) -> None:
    """From the second layer on the others do not see them: no work is left for them but that of the first."""
    model, program = models[causal]
    result = dropped(program, attention="1:", mlp="1:", segment=segment, seen=False)
    assert not result.refusals
    model = copy.deepcopy(model)
    model.attention = model.mlp = {1, 2}
    model.only, model.seen = only, False
    for rows in (1, 3):
        given = inputs(rows)
        torch.testing.assert_close(result.program(*given), model(*given), rtol=1e-4, atol=1e-5)
    total, gone = 4 + PATCHES + TEXT, only.stop - only.start
    work = lambda n: n * (4 + 4) * 2 * WIDTH * WIDTH + 4 * n * n * WIDTH  # noqa: E731
    assert program_flops(program) - program_flops(result.program) == 2 * (work(total) - work(total - gone))


@torch.no_grad()
def test_work_that_is_left(program: Program) -> None:
    """Whole layers leave nothing behind; a segment's MLP is computed for the other tokens only."""
    mlp, total = 2 * 2 * 2 * WIDTH * WIDTH, 4 + PATCHES + TEXT
    dense = program_flops(program)
    assert program_flops(dropped(program, mlp="1").program) == dense - total * mlp
    assert program_flops(dropped(program, mlp="1", segment="patch").program) == dense - PATCHES * mlp
    empty = dropped(program, attention="all", mlp="all").program
    assert not any("qkv" in n.name or "up" in n.name for n in empty.graph.nodes)
    rows = dropped(program, attention="1", segment="patch").program
    attention = PATCHES * (4 * total * WIDTH + 2 * WIDTH * WIDTH)  # queries and what follows; keys and values stay
    assert program_flops(rows) == dense - attention


@torch.no_grad()
def test_heads(models: dict[bool, tuple[Reader, Program]]) -> None:
    model, program = copy.deepcopy(models[True][0]), models[True][1]
    result = dropped(program, heads="0/1,2/0", mlp=1)
    model.heads, model.mlp = {(0, 1), (2, 0)}, {1}
    given = inputs(3)
    torch.testing.assert_close(result.program(*given), model(*given), rtol=1e-4, atol=1e-5)
    total = 4 + PATCHES + TEXT
    less = 2 * 4 * total * total * WIDTH // HEADS
    assert program_flops(dropped(program, heads="0/1,2/0").program) == program_flops(program) - less


@pytest.mark.parametrize("segment, only", [("patch", slice(4, 20)), ("text", slice(20, 25))])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seen", [True, False])
@torch.no_grad()
def test_heads_without_a_segment(
    models: dict[bool, tuple[Reader, Program]], segment: str, only: slice, causal: bool, seen: bool
) -> None:
    """One head of the first layer and both of the last leave the segment alone; the others see it as before."""
    model, program = models[causal]
    result = dropped(program, heads="0/1,2/0,2/1", segment=segment, seen=seen)
    assert not result.refusals
    model = copy.deepcopy(model)
    model.blind, model.only, model.seen = {(0, 1), (2, 0), (2, 1)}, only, seen
    for rows in (1, 3):
        given = inputs(rows)
        torch.testing.assert_close(result.program(*given), model(*given), rtol=1e-4, atol=1e-5)
    assert program_flops(result.program) < program_flops(program)


# -- heads that data choose --------------------------------------------------------------------------------------------


def shares(model: Reader, given: tuple[Tensor, Tensor]) -> Tensor:
    """Attention of the last layer's heads to the patches over that to the others, [B, H]: of the last token in a causal
    model, else the mean of all tokens that are no patches."""
    x = torch.cat([model.prompt.expand(len(given[0]), -1, -1), model.patches(given[0]).flatten(2).transpose(1, 2),
                   model.words(given[1])], 1)  # fmt: skip
    for i in range(LAYERS):
        parts = model.qkv[i](model.norms[2 * i](x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0] * model.phase, parts[1] * model.phase, parts[2]
        logits = q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5
        if model.causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        weights = logits.softmax(-1)
        x = x + model.out[i]((weights @ v).transpose(1, 2).flatten(2))
        x = x + model.down[i](F.gelu(model.up[i](model.norms[2 * i + 1](x))))
    others = [*range(4), *range(20, 25)]
    rows = weights[:, :, -1:] if model.causal else weights[:, :, others]
    given_to = rows[..., 4:20].sum(-1).mean(-1)
    return given_to / (1 - given_to)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_heads_are_voted_on(models: dict[bool, tuple[Reader, Program]], causal: bool) -> None:
    """A head is inactive exactly where at most 40 % of the samples give the patches more than the threshold."""
    model, program = models[causal]
    batches = [inputs(6), inputs(4)]
    ratio = torch.cat([shares(model, batch) for batch in batches])
    found = head_thresholds(program, batches, "patch")
    sizes = set()
    for threshold in (ratio.flatten().sort().values[::2] + 1e-4).tolist():
        expected = [(2, h) for h in range(HEADS) if (ratio[:, h] > threshold).float().mean() <= 0.4]
        assert [head for head, least in found.items() if least <= threshold] == expected
        sizes.add(len(expected))
    assert sizes == {0, 1, 2}
    with pytest.raises(UsageError, match="no heads to vote on"):
        head_thresholds(program, batches, "sky")
    with pytest.raises(UsageError, match="no data"):
        head_thresholds(program, [], "patch")


@torch.no_grad()
def test_a_head_that_sees_the_segment_alone_is_active(models: dict[bool, tuple[Reader, Program]]) -> None:
    """Though what it gives sums up to a little more than 1."""
    _, program = models[True]
    site = [s for s in find_sites(propagate(canonicalize(program).program))[0] if s.kind in ("self", "joint")][2]
    votes = diagnostics._Votes(2, site, next(s for s in site.axis.segments if s.name == "patch"))
    shares = torch.zeros(200, 2, 1, 25)
    shares[..., 4:20] = torch.randn(200, 2, 1, 16).softmax(-1)
    assert (shares[..., 4:20].sum(-1) > 1).any()
    with pytest.MonkeyPatch.context() as patch:
        for sample in shares:
            patch.setattr(diagnostics, "_probabilities", lambda *_, s=sample: s[None])
            votes.add([torch.zeros(1)] * 3, {})
            assert votes.ratios[-1].min() > 1e5


@torch.no_grad()
def test_optimize_drops_the_heads_that_data_choose(models: dict[bool, tuple[Reader, Program]]) -> None:
    model, program = models[True]
    passes = "fold-constants,raise-attention,drop-layers{inactive=1000,segment=patch,seen=false},remove-dead"
    result = tokenopt.optimize(program, passes=passes, data=[list(inputs(4))])
    step = next(s for s in result.steps if isinstance(s, DropLayers))
    assert step == DropLayers(heads="2/0,2/1", segment="patch", seen=False)
    model = copy.deepcopy(model)
    model.blind, model.only, model.seen = {(2, 0), (2, 1)}, slice(4, 20), False
    given = inputs(3)
    torch.testing.assert_close(result.program(*given), model(*given), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="pass drop-layers learns from data"):
        tokenopt.optimize(program, passes=passes)
    with pytest.raises(UsageError, match="no heads yet"):
        dropped(program, inactive=0.1, segment="patch")
    with pytest.raises(UsageError, match="no number"):
        DropLayers(inactive="few", segment="patch")


@torch.no_grad()
def test_a_budget_drops_as_few_heads_as_it_takes(
    models: dict[bool, tuple[Reader, Program]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those first that the fewest samples need: the same as by the threshold that leaves so much."""
    _, program = models[False]
    data = [list(inputs(6))]
    passes = "fold-constants,raise-attention,drop-layers{inactive=%s,segment=patch,seen=false},remove-dead"
    monkeypatch.setattr(diagnostics, "_ALL_ACTIVE", 1)
    thresholds = head_thresholds(program, data, "patch")
    order = sorted(thresholds, key=thresholds.get)
    assert len(order) == 4
    left = {}
    for count in range(5):
        least = thresholds[order[count - 1]] + 1e-6 if count else 1e-9
        left[count] = tokenopt.optimize(program, passes=passes % f"{least:.9f}", data=data).program
    flops = {count: program_flops(found) / program_flops(program) for count, found in left.items()}
    assert sorted(flops.values(), reverse=True) == list(flops.values()) and flops[4] < flops[0]
    for count in range(1, 4):
        budget = Budget("flops", (flops[count] + 2 * flops[count + 1]) / 3)
        result = tokenopt.optimize(program, passes=passes % 1, data=data, budget=budget)
        (step,) = (s for s in result.steps if isinstance(s, DropLayers))
        assert step.heads == ",".join(f"{layer}/{head}" for layer, head in order[: count + 1])
        given = inputs(3)
        torch.testing.assert_close(result.program(*given), left[count + 1](*given))
    with pytest.raises(BudgetError, match="cannot meet") as error:
        tokenopt.optimize(program, passes=passes % 1, data=data, budget="flops=1%")
    assert "without the 4 heads that can go" in error.value.why
    with pytest.raises(UsageError, match="heads cannot be fitted"):
        tokenopt.optimize(program, passes=passes % 1, data=data, budget="tokens=50%")


def test_what_is_refused(program: Program) -> None:
    for options, why in (
        ({"mlp": "1", "segment": "sky"}, "'sky' is no part"), ({"heads": "0/2"}, "it has 2 heads, and not 3"),
        ({"heads": "1/0,1/1"}, "no head of it would be left"),
    ):  # fmt: skip
        result = dropped(program, **options)
        assert why in result.refusals[0].why and not [e for e in result.edits if "drop" in e.pass_spec]
    for options in ({"heads": "3/0"}, {"heads": "1"}, {"attention": "first"}):
        with pytest.raises(UsageError):
            dropped(program, **options)


def test_text_of_the_pass() -> None:
    options = {"attention": "1:", "mlp": "0,1:30", "heads": "0/1,2/0", "segment": "patch", "seen": False}
    spec = DropLayers(**options).spec
    assert spec == "drop-layers{attention=1:,mlp=0,1:30,heads=0/1,2/0,segment=patch,seen=False}"
    assert _options(spec.split("{")[1].rstrip("}"), "drop-layers") == options


@torch.no_grad()
def test_onnx_runtime(program: Program, tmp_path: Path) -> None:
    smaller = dropped(program, attention="1", mlp="0,1", segment="patch", heads="2/1").program
    assert all(c.passed for c in runtimes.get("onnxruntime").build(smaller, tmp_path / "model.onnx").parity)
