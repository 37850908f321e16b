"""Every spelling of token attention becomes one operation with the same result; look-alikes are refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import references
from tokenopt.analysis.axes import propagate
from tokenopt.analysis.sites import find_sites
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.pipeline import Pipeline, PipelineResult
from tokenopt.program import Program, capture

B, N, C, H = 2, 9, 24, 3
D = C // H
Core = Callable[["Attention", Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """A residual block around an attention that is spelled by ``core(self, q, k, v) -> [B, H, N, D]``."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)
        self.bias = nn.Parameter(torch.randn(H, N, N))
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 0.5)
        self.mix = nn.Linear(H, H)
        self.gate = nn.Parameter(torch.rand(H, N, N))
        self.register_buffer("visible", torch.tril(torch.ones(N, N, dtype=torch.bool)))
        self.register_buffer("all_visible", torch.ones(1, 1, N, N, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.proj(self.core(self, q, k, v).transpose(1, 2).reshape(x.shape))


def plain(logits: Tensor, v: Tensor) -> Tensor:
    return logits.softmax(-1) @ v


def three_dimensional(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, N, D) for t in (q, k, v))
    return torch.bmm(torch.bmm(q * D**-0.5, k.transpose(1, 2)).softmax(-1), v).view(-1, H, N, D)


def three_dimensional_fused(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, N, D) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).view(-1, H, N, D)


def five_dimensional(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unsqueeze(2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).squeeze(2)


def added_in_another_grouping(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Shifted windows: the mask is added with the batch split in two."""
    logits = q @ k.transpose(-2, -1) + m.bias
    mask = torch.zeros(1, 1, N, N).masked_fill(~m.visible, -100.0)
    logits = (logits.view(-1, 1, H, N, N) + mask.unsqueeze(0)).view(-1, H, N, N)
    return plain(logits, v)


def baddbmm(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, N, D) for t in (q, k, v))
    bias = m.bias.repeat(q.shape[0] // H, 1, 1)
    return torch.bmm(torch.baddbmm(bias, q, k.transpose(1, 2), beta=0.5, alpha=0.3).softmax(-1), v).view(-1, H, N, D)


def grouped(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, :1].expand(-1, H, -1, -1) for t in (k, v))
    return plain(q @ k.transpose(-2, -1) * 0.2, v)


SPELLINGS: dict[str, Core] = {
    "fused": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "fused, scale": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.1),
    "fused, causal": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "fused, bias": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias),
    "fused, boolean mask": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=m.visible),
    "fused, grouped queries": lambda m, q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
    "scale after": lambda m, q, k, v: plain(q @ k.transpose(-2, -1) * 0.3, v),
    "scale before": lambda m, q, k, v: plain((q * 0.3) @ k.transpose(-2, -1), v),
    "scale in keys": lambda m, q, k, v: plain(q @ (k * 0.3).transpose(-2, -1), v),
    "division": lambda m, q, k, v: plain(q @ k.transpose(-2, -1) / math.sqrt(D), v),
    "permuted keys": lambda m, q, k, v: plain(q @ k.permute(0, 1, 3, 2), v),
    "bias": lambda m, q, k, v: plain(q @ k.transpose(-2, -1) * 0.3 + m.bias, v),
    "bias on the left": lambda m, q, k, v: plain(m.bias + q @ k.transpose(-2, -1), v),
    "bias, then scale": lambda m, q, k, v: plain((q @ k.transpose(-2, -1) + m.bias) * 0.3, v),
    "two biases": lambda m, q, k, v: plain(q @ k.transpose(-2, -1) + m.bias - 2 * m.gate, v),
    "masked fill": lambda m, q, k, v: plain((q @ k.transpose(-2, -1)).masked_fill(~m.visible, float("-inf")), v),
    "where": lambda m, q, k, v: plain(torch.where(m.visible, q @ k.transpose(-2, -1), float("-inf")), v),
    "mask and bias": lambda m, q, k, v: plain(
        (q @ k.transpose(-2, -1) + m.bias).masked_fill(~m.visible, float("-inf")), v
    ),
    "constant shift": lambda m, q, k, v: plain(q @ k.transpose(-2, -1) + 5.0, v),
    "learned temperature": lambda m, q, k, v: plain(
        F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.temperature + m.bias, v
    ),
    "upcast": lambda m, q, k, v: (q @ k.transpose(-2, -1)).softmax(-1, dtype=torch.float32).to(q.dtype) @ v,
    "dropout": lambda m, q, k, v: F.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.5, m.training) @ v,
    "einsum": lambda m, q, k, v: torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v),
    "einsum, tokens first": lambda m, q, k, v: torch.einsum(
        "bhqk,bkhd->bqhd",
        torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)).softmax(-1),
        v.transpose(1, 2),
    ).transpose(1, 2),  # fmt: skip
    "values on the left": lambda m, q, k, v: (
        v.transpose(-2, -1) @ (q @ k.transpose(-2, -1)).softmax(-1).transpose(-2, -1)
    ).transpose(-2, -1),
    "three dimensions": three_dimensional,
    "three dimensions, fused": three_dimensional_fused,
    "five dimensions": five_dimensional,
    "added in another grouping": added_in_another_grouping,
    "baddbmm": baddbmm,
    "grouped queries by expand": grouped,
}

REFUSED: dict[str, tuple[Core, str, str]] = {
    "channel attention": (
        lambda m, q, k, v: ((q.transpose(-2, -1) @ k).softmax(-1) @ v.transpose(-2, -1)).transpose(-2, -1),
        "channel", "channel attention",
    ),
    "linear attention": (
        lambda m, q, k, v: (F.relu(q) @ (F.relu(k).transpose(-2, -1) @ v)) / N, "linear", "linear attention",
    ),
    "talking heads": (
        lambda m, q, k, v: plain(m.mix((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), v),
        "self", "talking heads",
    ),
    "talking heads after": (
        lambda m, q, k, v: m.mix((q @ k.transpose(-2, -1)).softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v,
        "self", "talking heads",
    ),
    "tanh": (lambda m, q, k, v: (q @ k.transpose(-2, -1)).tanh() @ v, "self", "tanh attention"),
    "sigmoid": (lambda m, q, k, v: (q @ k.transpose(-2, -1)).sigmoid() @ v, "self", "sigmoid attention"),
    "soft capping": (lambda m, q, k, v: plain((q @ k.transpose(-2, -1)).tanh() * 9, v), "self", "soft capping"),
    "gated": (
        lambda m, q, k, v: ((q @ k.transpose(-2, -1)).softmax(-1) * m.gate) @ v, "self", "multiplied by something",
    ),
    "scaled per key": (lambda m, q, k, v: plain((q @ k.transpose(-2, -1)) * m.gate, v), "self", "for every key"),
    "transposed softmax": (
        lambda m, q, k, v: (q @ k.transpose(-2, -1)).softmax(-2) @ v, "self", "transposed softmax",
    ),
    "transposed probabilities": (
        lambda m, q, k, v: (q @ k.transpose(-2, -1)).softmax(-1).transpose(-2, -1) @ v, "self", "transposed before",
    ),
    "finite mask": (
        lambda m, q, k, v: plain((q @ k.transpose(-2, -1)).masked_fill(~m.visible, -3.0), v), "self", "not with -inf",
    ),
}  # fmt: skip


def raised(core: Core, batch: int = B) -> tuple[nn.Module, PipelineResult]:
    torch.manual_seed(0)
    model = references.perturb(Attention(core), 0.1)
    return model, Pipeline([FoldConstants(), RaiseAttention()]).run(capture(model, torch.randn(B, N, C)))


def attentions(program: Program) -> int:
    return sum(n.target is torch.ops.tokenopt.attention.default for n in program.graph.nodes)


@pytest.mark.parametrize("name", list(SPELLINGS))
def test_a_spelling_is_raised_and_means_the_same(name: str) -> None:
    model, result = raised(SPELLINGS[name])
    result.program.verify()
    assert attentions(result.program) == 1, [str(r) for r in result.refusals]
    assert not any("softmax" in str(n.target) for n in result.program.graph.nodes)
    for batch in (1, 3):
        x = torch.randn(batch, N, C)
        torch.testing.assert_close(result.program(x), model(x).detach(), rtol=1e-5, atol=1e-5)
    sites, axes = find_sites(propagate(result.program))
    assert [(s.kind, s.queries, s.raised) for s in sites] == [("self", N, True)]
    assert len(axes) == 1


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_look_alike_is_refused_with_its_reason(name: str) -> None:
    core, kind, reason = REFUSED[name]
    model, result = raised(core)
    assert attentions(result.program) == 0
    sites, _ = find_sites(propagate(result.program))
    assert [s.kind for s in sites] == [kind]
    assert reason in sites[0].refusal.why
    x = torch.randn(3, N, C)
    torch.testing.assert_close(result.program(x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_mask_that_hides_nothing_is_dropped() -> None:
    core: Core = lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=m.all_visible)  # noqa: E731
    _, result = raised(core)
    node = next(n for n in result.program.graph.nodes if n.target is torch.ops.tokenopt.attention.default)
    assert node.args[3] is None


def test_multihead_attention_module() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(C, H, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x, need_weights=False)[0]

    model = references.perturb(Block(), 0.1)
    result = Pipeline([FoldConstants(), RaiseAttention()]).run(capture(model, torch.randn(B, N, C)))
    assert attentions(result.program) == 1
    x = torch.randn(3, N, C)
    torch.testing.assert_close(result.program(x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_probabilities_that_are_returned_stay() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(C, H, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, weights = self.attention(x, x, x, need_weights=True)
            return x + y, weights

    result = Pipeline([FoldConstants(), RaiseAttention()]).run(capture(Block().eval(), torch.randn(B, N, C)))
    assert attentions(result.program) == 0
    assert any("used more than once" in r.why for r in result.refusals)


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "dinov2_registers"])
def test_transformers_eager_equals_sdpa_after_raising(name: str) -> None:
    graphs = []
    for attention in ("eager", "sdpa"):
        model = references.tiny_hf(name, attn_implementation=attention)
        result = Pipeline([FoldConstants(), RaiseAttention()]).run(
            capture(model, {"pixel_values": references.images(2)})
        )
        assert attentions(result.program) == 3 + (name == "siglip")
        graphs.append(result.program)
    x = references.images(3, seed=1)
    for a, b in zip(graphs[0].flat(pixel_values=x), graphs[1].flat(pixel_values=x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
