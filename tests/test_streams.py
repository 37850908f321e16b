"""Where reductions meet layers, windows and norms that they did not expect: each works or is refused, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokenopt
from benchmarks.zoo import ZOO
from tests import recipe_references as refs
from tests import references
from tokenopt.optimization import Result


class Block(nn.Module):
    """Attention and MLP with their norms before them or behind the sums."""

    def __init__(self, norm_first: bool, width: int = 32) -> None:
        super().__init__()
        self.norm_first, self.qkv, self.out = norm_first, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, module in ((self.norm1, self.attend), (self.norm2, self.mlp)):
            x = x + module(norm(x)) if self.norm_first else norm(x + module(x))
        return x


def blocks(count: int = 3, norm_first: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return references.perturb(nn.Sequential(*(Block(norm_first) for _ in range(count))), 0.05).eval()


def tokens(batch: int, count: int = 24, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


def optimize(name: str, recipe: str, schedule: Any, **settings: Any) -> Result:
    model, inputs = ZOO[name].build()
    return tokenopt.optimize(model, inputs, recipe=recipe, schedule=schedule, settings=settings)


def edits(result: Result) -> dict[str, int | None]:
    return {e["site"]: e["after"] for e in result.report.edits}


@pytest.mark.parametrize("name", ["timm/vit_medium_patch16_gap_256", "torch/TransformerEncoder[pre-norm]"])
def test_an_attention_that_saw_fewer_tokens_scores_none_of_all(name: str) -> None:
    """Behind a layer that kept all, one is reduced; its keys are too few to score the next one's tokens with."""
    result = optimize(name, "tome", {"r": [0, 4, 4]}, place="attention")
    (site,) = edits(result)
    assert "1" in site and any("attended over other tokens" in r["why"] for r in result.report.refusals)
    own = optimize(name, "tome", {"r": [0, 4, 4]}, place="attention", select="bipartite{metric=hidden}")
    assert len(edits(own)) == 2


def test_attention_without_keys_scores_nothing() -> None:
    result = optimize("timm/volo.VOLO", "tome", {"r": 2}, place="attention")
    assert any("there are no keys" in r["why"] and r["why"].startswith("recipe tome") for r in result.report.refusals)


@pytest.mark.parametrize("name", ["timm/samvit_base_patch16_224", "timm/twins_svt_small"])
def test_a_cache_holds_no_windows(name: str) -> None:
    """Global attentions beside windowed ones still have one."""
    settings = {"place": "attention{of=qkv}", "restore": "cached", "fuse": "mean"}
    result = optimize(name, "tomesd", {"keep": 0.5}, **settings)
    assert any("a cache holds one sequence" in r["why"] for r in result.report.refusals)
    assert len(result.report.model["added_inputs"]) == len(edits(result)) == 1


def test_keys_of_windows_score_no_sequence() -> None:
    result = optimize("timm/twins_svt_small", "tome", {"r": 2}, place="attention")
    assert not result.changed


@pytest.mark.parametrize("norm_first", [False, True])
def test_transitions_behind_a_reduction(norm_first: bool) -> None:
    """Of two reductions, the second counts what the first left, in the blocks before and behind it."""
    model, x = blocks(norm_first=norm_first), tokens(3)
    found = tokenopt.optimize(model, (x,), recipe="transition", schedule={"keep": 0.5, "layers": [1, 2]},
                              short_outputs=True).program(x)  # fmt: skip
    score = torch.zeros(x.shape[:2])
    for i, block in enumerate(model):
        if i:
            stays = score.topk(x.shape[1] // 2).indices.sort(1).values
            x, score = references.take(x, stays), score.gather(1, stays)
        for norm, module in ((block.norm1, block.attend), (block.norm2, block.mlp)):
            before = norm(x) if norm_first else x
            after = module(before)
            score = score + refs.turning(before, after, True)
            x = x + after if norm_first else norm(x + after)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_transitions_where_all_tokens_come_back() -> None:
    """torch's own attention joins samples and tokens: what it adds to the stream has all of them."""
    result = optimize("torch/TransformerEncoder[pre-norm]", "transition", {"keep": 0.5, "layers": [1, 2]})
    assert len(edits(result)) == 1
    assert any("all tokens come back" in r["why"] for r in result.report.refusals)
