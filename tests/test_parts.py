"""Parts of recipes: reading and printing them, and the places and restores that no published recipe is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import recipe_references as refs
from tests import references
from tests.references import images
from tokenopt import recipes
from tokenopt.errors import IllegalReduction, UsageError
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline, PipelineResult
from tokenopt.program import capture
from tokenopt.tokens.place import Place
from tokenopt.tokens.plan import layer_number
from tokenopt.tokens.recipe import TokenRecipe
from tokenopt.tokens.score import Score, even_grid
from tokenopt.tokens.select import Select, cells_of


def reduce(model: nn.Module, x: Any, recipe: Any, schedule: Any = None, **options: Any) -> PipelineResult:
    steps = [FoldConstants(), RaiseAttention(), ReduceTokens(recipe, schedule, **options), RemoveDead()]
    result = Pipeline(steps).run(capture(model, x))
    result.program.verify()
    return result


def reductions(result: PipelineResult) -> list[tuple[int, int]]:
    return [(e.before, e.after) for e in result.edits if e.pass_spec.startswith("reduce-tokens")]


# -- as text and data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.names(TokenRecipe))
def test_recipes_survive_being_written(name: str) -> None:
    recipe = recipes.get(name)
    assert recipe.name == name
    assert recipe.summary
    assert recipe.paper
    assert TokenRecipe.from_dict(recipe.to_dict()) == recipe
    for part in (recipe.select, recipe.fuse, recipe.restore, recipe.place):
        assert type(part).parse(str(part)) == part


@pytest.mark.parametrize(
    "text",
    [
        "cls_row", "cls_row{layer=-1}", "accumulated{of=received, since=0.5}",
        "anchored{anchor=received{layer=0.25}, rest=cls_row, share=0.2}", "without_sinks{of=cls_row, dims=[1,2]}",
    ],
)  # fmt: skip
def test_parts_survive_being_written(text: str) -> None:
    part = Score.parse(text)
    assert Score.parse(str(part)) == part
    assert Score.parse(part.to_data()) == part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beauty", "no score 'beauty'"),
        ("cls_row{row=1}", "no setting 'row'"),
        ("cls_row{layer=first}", "is not of type"),
        ("cls_row{layer}", "has no value"),
        ("accumulated{of=topk}", "no score 'topk'"),
        ("without_sinks{dims=3}", "is not of type"),
        (3, "no score 3"),
        ({"cls_row": [1]}, "not a mapping"),
    ],
)
def test_wrong_parts_say_what_fits(text: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Score.parse(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": None}, "needs a score"),
        ({"select": "bipartite"}, "does not go with score"),
        ({"fuse": "mix"}, "does not go with select"),
        ({"fuse": "pack", "score": "random"}, "a score that is a weight"),
        ({"proportional": True}, "needs merged sizes"),
        ({"position": "first"}, "no position"),
        ({"restore": "canvas"}, "does not go with place"),
        ({"place": "output"}, "undoes it"),
        ({"select.seed": 1}, "no setting 'seed'"),
        ({"nothing.seed": 1}, "no setting 'nothing.seed'"),
    ],
)
def test_impossible_recipes_say_what_fits(changes: dict[str, Any], message: str) -> None:
    recipe = TokenRecipe("mine", "", "", score="cls_row", select="topk")
    with pytest.raises(UsageError, match=message) as error:
        recipe.with_settings(changes)
    assert error.value.hint


def test_the_recipe_in_the_documentation_is_one() -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    block = text.split("```yaml\n")[1].split("```")[0]
    assert len(block.splitlines()) < 20
    recipe = recipes.get(yaml.safe_load(block))
    assert (recipe.name, recipe.score.name, recipe.place.name) == ("fastv", "last_row", "block")


def test_settings_reach_parts_within_parts() -> None:
    changed = recipes.get("hiprune").with_settings({"score.rest.layer": 1, "score.share": 0.5})
    assert str(changed.score) == "anchored{rest=received{layer=1}, share=0.5}"


def test_every_part_says_what_it_does() -> None:
    for kind in (Score, Select, Place):
        assert all(summary and len(summary) < 120 for summary in kind.choices().values())


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_even_grids_have_distinct_places(height: int, width: int, data: Any) -> None:
    count = data.draw(st.integers(1, height * width))
    places = even_grid(count, height, width)
    assert len(set(places)) == count == len(places)
    assert 0 <= min(places) <= max(places) < height * width


@settings(max_examples=50)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=3), st.data())
def test_cells_fill_the_budget(grid: list[int], data: Any) -> None:
    keep = data.draw(st.integers(1, int(torch.tensor(grid).prod())))
    cells = cells_of(tuple(grid), keep)
    assert int(torch.tensor(cells).prod()) <= keep
    assert all(1 <= c <= g for c, g in zip(cells, grid, strict=True))


def test_layers_are_numbers_or_shares() -> None:
    assert [layer_number(x, 12) for x in (0, 3, -1, 0.0, 0.5, 0.99, 1.0)] == [0, 3, 11, 0, 6, 11, 11]


# -- places and restores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", ["copy", "canvas", "zero", "interpolate"])
def test_a_range_of_blocks_runs_on_fewer_tokens(restore: str) -> None:
    """Behind the range all tokens are there again, each with what the restore gives it."""
    model = refs.tiny("features")
    x = images(3, seed=1)
    recipe = TokenRecipe("mine", "", "", score="uniform_grid", select="topk", restore=restore,
                         place="range{first=1, last=2}", schedule={"keep": 0.4})  # fmt: skip
    result = reduce(model, images(2), recipe)
    assert reductions(result) == [(65, 27)]
    with torch.no_grad():
        h = model.blocks[0](model.norm_pre(model._pos_embed(model.patch_embed(x))))
        kept = even_grid(26, 8, 8)
        index = torch.tensor([0, *(1 + i for i in kept)])
        short = model.blocks[2](model.blocks[1](h[:, index]))
        full = {"canvas": h.clone(), "zero": torch.zeros_like(h)}.get(restore)
        if full is not None:
            full[:, index] = short
        else:
            full = torch.empty_like(h)
            full[:, 0] = short[:, 0]
            grid = torch.tensor([[i // 8, i % 8] for i in range(64)], dtype=torch.float32)
            unit = F.normalize(h, dim=-1)
            for i in range(64):
                if restore == "copy":
                    for b in range(3):
                        best = (unit[b, index[1:]] @ unit[b, i + 1]).argmax()
                        full[b, i + 1] = short[b, 1 + best] if i not in kept else short[b, 1 + kept.index(i)]
                elif i in kept:
                    full[:, i + 1] = short[:, 1 + kept.index(i)]
                else:
                    weight = (grid[kept] - grid[i]).norm(dim=1) ** -2.0
                    full[:, i + 1] = torch.einsum("m, bmc -> bc", weight / weight.sum(), short[:, 1:])
        expected = model.norm(model.blocks[3](full))
    torch.testing.assert_close(result.program.flat(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_merging_within_a_range_is_restored_behind_it() -> None:
    model, x = refs.tiny("features"), images(3, seed=1)
    recipe = recipes.get("tome").with_settings({"place": "range{first=1, last=2}"})
    result = reduce(model, images(2), recipe, "keep=0.6")
    assert reductions(result) == [(65, 40)]
    assert result.program(x).shape == (3, 65, 32)
    neutral = reduce(model, images(2), recipe, neutral=True)
    with torch.no_grad():
        torch.testing.assert_close(neutral.program(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("restore", ["canvas", "zero"])
def test_all_tokens_of_a_segment_can_leave(restore: str) -> None:
    model, x = refs.tiny("features"), images(3, seed=1)
    recipe = TokenRecipe("mine", "", "", score="cls_row", select="topk", restore=restore, place="exit{layer=2}",
                         schedule={"keep": 0.5})  # fmt: skip
    result = reduce(model, images(2), recipe)
    assert reductions(result) == [(65, 1)]
    with torch.no_grad():
        h = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks[:2]:
            h = block(h)
        short = h[:, :1]
        for block in model.blocks[2:]:
            short = block(short)
        full = torch.cat([short, h[:, 1:] if restore == "canvas" else torch.zeros_like(h[:, 1:])], 1)
        torch.testing.assert_close(result.program(x), model.norm(full), rtol=1e-5, atol=1e-5)


def test_a_class_head_needs_no_restore_after_all_patches_left() -> None:
    model, x = refs.tiny("head"), images(3, seed=1)
    recipe = TokenRecipe("mine", "", "", score="cls_row", select="topk", place="exit{layer=2}",
                         schedule={"keep": 0.5})  # fmt: skip
    result = reduce(model, images(2), recipe)
    with torch.no_grad():
        h = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks[:2]:
            h = block(h)
        h = h[:, :1]
        for block in model.blocks[2:]:
            h = block(h)
        torch.testing.assert_close(result.program(x), model.forward_head(model.norm(h)), rtol=1e-5, atol=1e-5)


def test_features_that_are_needed_cannot_all_leave() -> None:
    recipe = TokenRecipe("mine", "", "", score="cls_row", select="topk", place="exit{layer=2}",
                         schedule={"keep": 0.5})  # fmt: skip
    with pytest.raises(IllegalReduction, match="no token is left"):
        reduce(refs.tiny("features"), images(2), recipe)


class RotaryDecoder(nn.Module):
    """A vision transformer followed by one block whose attention has rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = refs.tiny("features")
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        angle = torch.arange(65.0)[:, None] * 10.0 ** -torch.arange(0, 1, 1 / 8)
        self.register_buffer("cos", angle.cos().repeat(1, 2))
        self.register_buffer("sin", angle.sin().repeat(1, 2))

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.qkv(self.norm(h)).reshape(*h.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        q, k, v = self.project(h)
        a = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        h = h + self.out(a.transpose(1, 2).reshape(h.shape))
        h = h + self.mlp(h)
        return h[:, 0]


def test_rotary_attention_sees_merged_tokens_at_all_their_positions() -> None:
    """Virtual unmerging: expand before the positions, attend, average back; all else runs on the merged tokens."""
    torch.manual_seed(0)
    model = references.perturb(RotaryDecoder(), 0.1)
    x = images(3, seed=1)
    r = [8, 8, 8, 8]
    recipe = recipes.get("dymu").with_settings({"restore": "virtual"})
    result = reduce(model, images(2), recipe, {"r": [*r, 0]})
    assert [b - a for b, a in reductions(result)] == r
    with torch.no_grad():
        tokens, layers = references.timm_embed(model.encoder, x)
        tokens = references.tome(tokens, layers, r)
        h = model.encoder.norm(tokens.x)
        q, k, v = (references.take(t.transpose(1, 2), tokens.home).transpose(1, 2) for t in model.project(h))
        a = F.scaled_dot_product_attention(model.rotate(q), model.rotate(k), v).transpose(1, 2).flatten(2)
        mean = torch.zeros_like(h).scatter_add(1, tokens.home[..., None].expand_as(a), a) / tokens.size[..., None]
        h = h + model.out(mean)
        expected = (h + model.mlp(h))[:, 0]
    torch.testing.assert_close(result.program(x), expected, rtol=1e-5, atol=1e-5)
    linear = [n for n in result.program.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert {n.meta["val"].shape[1] for n in linear[-4:]} == {33}


@pytest.mark.parametrize("score", ["norm", "norm{of=hidden}", "centre", "pixels{of=entropy}", "without_sinks",
                                   "accumulated{of=received}", "last_row"])  # fmt: skip
def test_scores_choose_different_tokens(score: str) -> None:
    """Each score runs, is per sample, and is not another in disguise."""
    model, x = refs.tiny("head"), images(3, seed=1)
    recipe = TokenRecipe("mine", "", "", score=score, select="topk", source=True, schedule={"keep": 0.3, "layers": [2]})
    kept = reduce(model, images(2), recipe).program(x)[1]
    other = reduce(model, images(2), replace(recipe, score=Score.parse("random"))).program(x)[1]
    assert kept.shape == (3, 64)
    assert not torch.equal(kept, other)


def test_groups_have_budgets_of_their_own() -> None:
    model, x = refs.tiny("head"), images(3, seed=1)
    recipe = TokenRecipe("mine", "", "", score="cls_row", select="groups{groups=4, budget=[4,2,1,1]}", positions=True,
                         schedule={"keep": 0.25, "layers": [2]})  # fmt: skip
    _, positions = reduce(model, images(2), recipe).program(x)
    assert (positions.diff(dim=1) > 0).all()
    assert [[int((row // 16 == g).sum()) for g in range(4)] for row in positions] == [[8, 4, 2, 2]] * 3
