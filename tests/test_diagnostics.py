"""Attention sinks are found where they were put, and how attention is spread equals what whole matrices say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import recipe_references as refs
from tests.references import images
from tokenopt import recipes
from tokenopt.diagnostics import _probabilities, diagnose, sinks
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.pipeline import Pipeline
from tokenopt.program import capture


class WithSinks(nn.Module):
    """A vision transformer two of whose patches get a massive feature before the second block."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = refs.tiny("head")
        extra = torch.zeros(65, 32)
        extra[[10, 40], 7] = 500.0
        self.register_buffer("extra", extra)

    def forward(self, x: Tensor) -> Tensor:
        m = self.backbone
        h = m.blocks[0](m.norm_pre(m._pos_embed(m.patch_embed(x)))) + self.extra
        for block in m.blocks[1:]:
            h = block(h)
        return m.forward_head(m.norm(h))


def test_sinks_are_found_where_they_are() -> None:
    program = capture(WithSinks().eval(), images(2))
    rows = sinks(program, [[images(4, seed=i)] for i in range(3)], threshold=4.0)
    assert [r["site"] for r in rows] == [f"backbone.blocks.{i}.attn" for i in range(4)]
    assert rows[0]["share"] == 0.0
    for row in rows[1:]:
        assert row["dims"][0] == 7
        assert row["share"] == pytest.approx(2 / 64)
        assert 0 <= row["overlap"] <= 2 / 16 + 1e-9
        assert 0 < row["received"] < 1


def test_sinks_are_left_out_of_a_score() -> None:
    program = capture(WithSinks().eval(), images(2))
    schedule = {"keep": 0.9, "layers": [2]}
    x = images(3, seed=1)

    def kept(score: str) -> Tensor:
        recipe = recipes.get("rollout").with_settings({"score": score, "positions": True})
        return Pipeline([FoldConstants(), RaiseAttention(), ReduceTokens(recipe, schedule)]).run(program).program(x)[1]

    without = kept("without_sinks{of=norm{of=hidden}, threshold=4, dims=[7]}")
    assert not torch.isin(without, torch.tensor([9, 39])).any()
    assert torch.isin(torch.tensor([9, 39]), kept("norm{of=hidden}")).all()


# -- how attention is spread -------------------------------------------------------------------------------------------


def spread_by_hand(share: Tensor, start: int, grid: tuple[int, int]) -> dict[str, float]:
    """The same from the whole attention matrix [B, H, N, N], sample by sample and row by row."""
    batch, heads, count, _ = share.shape
    mean, body = share.mean(1), range(start, start + grid[0] * grid[1])
    entropy = lambda p: float(-(p * p.clamp_min(1e-30).log()).sum())  # noqa: E731
    rows = [(b, i) for b in range(batch) for i in range(count)]
    found = {
        "entropy": sum(entropy(mean[b, i]) for b, i in rows) / len(rows),
        "head_entropy": sum(entropy(share[b, h, i]) for b, i in rows for h in range(heads)) / len(rows) / heads,
        "answer_entropy": sum(entropy(m[0, list(body)] / m[0, list(body)].sum()) for m in mean) / batch,
    }
    found["head_diversity"] = (found["entropy"] - found["head_entropy"]) / torch.log(torch.tensor(float(heads))).item()
    cut = torch.where(mean > 2 / count, mean, 0.0)
    found["row_similarity"] = float(F.cosine_similarity(cut.mean(1, keepdim=True), cut, dim=-1).mean())
    near = []
    for y in range(0, grid[0], 4):
        for x in range(0, grid[1], 4):
            window = [start + (y + i) * grid[1] + x + j for i in range(4) for j in range(4)]
            window = [p for p in window if p in body]
            far = [k for k in range(count) if k not in window]
            part = share[:, :, window][..., far]
            near.append(F.cosine_similarity(part, part.mean(2, keepdim=True), dim=-1).flatten())
    found["redundancy"] = float(torch.cat(near).mean())
    inside = share[:, :, list(body)][..., list(body)].sum() / batch / heads / count
    given = share[:, :, :start][..., list(body)].sum() / batch / heads / count
    read = share[:, :, list(body), :start].sum() / batch / heads / count
    return found | {"intra": 100 * float(inside), "inter": 100 * float(0.7 * read + 0.3 * given)}


def attentions(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The attention of every block [B, H, N, N], as the blocks of timm compute it."""
    found = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        query, key, _ = module.qkv(args[0]).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found.append((module.q_norm(query) * module.scale @ module.k_norm(key).transpose(-2, -1)).softmax(-1))

    hooks = [block.attn.register_forward_pre_hook(look) for block in model.blocks]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_the_spread_is_that_of_the_whole_matrix() -> None:
    """In batches of different sizes, and at no more than a few rows at a time."""
    model, x = refs.tiny("head"), images(5)
    found = diagnose(capture(model, x[:2]), [[x[:2]], [x[2:]]])
    assert (found["samples"], found["window"], len(found["layers"])) == (5, 4, 4)
    flow, before = [], 0.0
    for i, (row, share) in enumerate(zip(found["layers"], attentions(model, x), strict=True)):
        expected = spread_by_hand(share, 1, (8, 8))
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
        assert (row["site"], row["tokens"], row["heads"]) == (f"blocks.{i}.attn", 65, 2)
        mean, parts = share.mean((0, 1)), (slice(0, 1), slice(1, None))
        between = [[float(mean[a, b].sum(-1).mean()) for b in parts] for a in parts]
        assert row["segments"] == ["cls", "patch"]
        assert [pytest.approx(line, rel=1e-4) for line in row["between"]] == between
        before += expected["intra"] * (0.73 if i else 1.0)
        flow.append(0.4 * expected["intra"] + 0.3 * expected["inter"] + 0.3 * before)
    scaled = [(value - min(flow)) / (max(flow) - min(flow)) for value in flow]
    assert [row["flow"] for row in found["layers"]] == pytest.approx(scaled, abs=1e-4)


def test_uniform_and_copied_attention_are_the_ends_of_the_scales() -> None:
    """Where queries are zero, every row is uniform: heads agree, rows say nothing, neighbours say the same."""
    model, x = refs.tiny("head"), images(3)
    for block in model.blocks:
        block.attn.qkv.weight.data[:32] = block.attn.qkv.bias.data[:32] = 0.0
    for row in diagnose(capture(model, x), [[x]])["layers"]:
        assert row["entropy"] == row["head_entropy"] == pytest.approx(math.log(65), abs=1e-4)
        assert row["head_diversity"] == pytest.approx(0.0, abs=1e-5) and row["row_similarity"] == 0.0
        assert row["redundancy"] == pytest.approx(1.0, abs=1e-5)
        assert row["answer_entropy"] == pytest.approx(math.log(64), abs=1e-4)


def test_no_query_sees_what_a_mask_hides() -> None:
    """Causal rows add up over what they see, and the last token answers."""
    query, key = torch.randn(2, 2, 3, 12, 8).unbind()
    options = {"scale": None, "is_causal": True}
    rows = torch.arange(12)
    bias = torch.randn(12, 12)
    expected = (query @ key.transpose(-2, -1) / 8**0.5 + bias).masked_fill(~torch.ones(12, 12).tril().bool(), -math.inf)
    torch.testing.assert_close(_probabilities(query, key, bias, None, rows, options), expected.softmax(-1))
    nothing = torch.zeros(12, 12, dtype=torch.bool)
    assert _probabilities(query, key, nothing, None, rows, {}).eq(0).all()
    part = torch.tensor([7, 2])
    torch.testing.assert_close(_probabilities(query, key, bias, None, part, options), expected.softmax(-1)[:, :, part])


def test_nothing_to_look_at() -> None:
    x = torch.randn(2, 16)
    assert diagnose(capture(nn.Linear(16, 16), x), [[x]]) == {}
    model, x = refs.tiny("head"), images(2)
    assert diagnose(capture(model, x), []) == {}
