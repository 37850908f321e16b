"""Attention sinks are found where they were put."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests import recipe_references as refs
from tests.references import images
from tokenopt import recipes
from tokenopt.diagnostics import sinks
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
