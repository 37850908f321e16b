"""Scores that are learned and thresholds that are fitted on data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import recipe_references as refs
from tests import references
from tests.references import images
from tokenopt import fitting, recipes
from tokenopt.errors import UsageError
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline, PipelineResult
from tokenopt.program import Program, capture
from tokenopt.schedule import Schedule
from tokenopt.tokens.recipe import TokenRecipe

DATA = [[images(8, seed=i)] for i in range(10, 14)]


class PerToken(nn.Module):
    """A vision transformer with a prediction for each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = refs.tiny("features")
        self.head = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[:, 1:])


def reduce(program: Program, recipe: TokenRecipe, schedule: Any = None, **options: Any) -> PipelineResult:
    steps = [FoldConstants(), RaiseAttention(), ReduceTokens(recipe, schedule, **options), RemoveDead()]
    return Pipeline(steps).run(program)


def per_token() -> tuple[PerToken, Program, TokenRecipe]:
    torch.manual_seed(0)
    model = PerToken().eval()
    recipe = recipes.get("dtop").with_settings({"score.hidden": 16})
    return model, capture(model, images(2)), recipe


def test_least_confident_tokens_go_on(tmp_path: Path) -> None:
    """The learned score ranks tokens as the model's own confidence does, and what is settled keeps its features."""
    model, program, recipe = per_token()
    schedule = Schedule.parse("keep=0.5@2")
    quality = fitting.distil(recipe, schedule, program, DATA, tmp_path / "scorer.safetensors", steps=200)
    assert quality["layer2"] > 0.6
    fitted = recipe.with_settings({"score.weights": str(tmp_path / "scorer.safetensors")})
    result = reduce(program, fitted, schedule)
    x = images(3, seed=1)
    scorer = torch.nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 1))
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "scorer.safetensors")
    state = {f"{2 * i}.{kind}": weights[f"layer2.{i}.{kind}"] for i in range(2) for kind in ("weight", "bias")}
    scorer.load_state_dict(state)
    with torch.no_grad():
        expected = refs.canvas(model.backbone, x, lambda h: -scorer(h).squeeze(-1), 0.5, (2,))
        torch.testing.assert_close(result.program.flat(x)[0], model.head(expected[:, 1:]), rtol=1e-5, atol=1e-5)
        neutral = reduce(program, fitted, schedule, neutral=True)
        torch.testing.assert_close(neutral.program.flat(x)[0], model(x), rtol=1e-5, atol=1e-5)


def test_learned_weights_are_in_the_program(tmp_path: Path) -> None:
    from tokenopt.loading import load_program

    _, program, recipe = per_token()
    path = tmp_path / "scorer.safetensors"
    fitted = fitting.fit(recipe, Schedule.parse("keep=0.5@2"), program, DATA[:1], path)
    saved = reduce(program, fitted, "keep=0.5@2").program
    path.unlink()
    again = load_program(saved.save(tmp_path / "model.pt2"))
    x = images(2, seed=3)
    assert torch.equal(again.flat(x)[0], saved.flat(x)[0])


def test_the_same_seed_learns_the_same(tmp_path: Path) -> None:
    _, program, recipe = per_token()
    schedule = Schedule.parse("keep=0.5@2")
    for name in ("a", "b"):
        fitting.distil(recipe, schedule, program, DATA[:1], tmp_path / name, steps=20)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_received_attention_of_the_last_layer_can_be_learned(tmp_path: Path) -> None:
    _, program, recipe = per_token()
    recipe = recipe.with_settings({"score.target": "received", "score.hidden": 0})
    quality = fitting.distil(recipe, Schedule.parse("keep=0.5@2"), program, DATA, tmp_path / "w", steps=200)
    assert quality["layer2"] > 0.5


@pytest.mark.parametrize(
    ("settings", "message"), [({"score.target": "beauty"}, "cannot learn"), ({}, "no output of the model is a pred")]
)
def test_what_cannot_be_learned_says_why(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    program = capture(refs.tiny("head"), images(2))
    recipe = recipes.get("dtop").with_settings(settings)
    with pytest.raises(UsageError, match=message):
        fitting.distil(recipe, Schedule.parse("keep=0.5@2"), program, DATA, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_score_without_weights_is_refused() -> None:
    result = reduce(capture(refs.tiny("head"), images(2)), recipes.get("dtop"))
    assert any("no weights" in r.why and "data" in r.hint for r in result.refusals)


# -- thresholds --------------------------------------------------------------------------------------------------------


def thresholded(model: nn.Module, r: str) -> tuple[Program, TokenRecipe]:
    program = capture(model, images(2))
    recipe = recipes.get("dymu").with_settings({"select": "threshold"})
    return program, fitting.fit(recipe, Schedule.parse(r), program, DATA, Path("unused"))


def counts(model: nn.Module, x: Tensor, values: tuple[float, ...]) -> tuple[list[int], Tensor]:
    """How many pairs of one image [1, ...] are above the threshold in each layer, and the logits with these merged."""
    tokens, layers = references.timm_embed(model, x)
    removed = []
    for layer, value in zip(layers, values, strict=False):
        attended = layer.attend(tokens, references.log_size(tokens))
        unit = torch.nn.functional.normalize(attended.key.mean(1)[0], dim=-1)
        best = (unit[2::2] @ unit[1::2].T).amax(-1)  # the class token is position 0
        removed.append(int((best > value).sum()))
        tokens = references.merge(replace(tokens, x=attended.x), attended.key, removed[-1])
        tokens = replace(tokens, x=layer.feed(tokens))
    return removed, references.timm_head(model, tokens, True)


def test_each_image_merges_what_is_above_the_threshold() -> None:
    """Masked places change nothing: every image equals the hand-patched model with its own numbers per layer."""
    model = refs.tiny("head")
    program, recipe = thresholded(model, "r=8")
    reduced = reduce(program, recipe, "r=8").program
    x = images(4, seed=1)
    with torch.no_grad():
        numbers, logits = zip(*(counts(model, row[None], recipe.select.values) for row in x), strict=True)
    assert len({tuple(r) for r in numbers}) > 1, "the images do not differ, so this shows nothing"
    assert 4 < sum(map(sum, numbers)) / 16 < 12  # about 8 per layer
    torch.testing.assert_close(reduced.flat(x)[0], torch.cat(logits), rtol=1e-5, atol=1e-5)


def test_thresholds_merge_as_many_as_scheduled_on_average() -> None:
    model = refs.tiny("head")
    program, recipe = thresholded(model, "r=8")
    first = recipe.select.values[0]
    with torch.no_grad():
        found = [counts(model, row[None], (first,))[0][0] for batch in DATA for row in batch[0]]
    assert sum(found) / len(found) == pytest.approx(8, abs=1)


def ranked(model: nn.Module, batch: Tensor, r: int) -> list[float]:
    """The thresholds of one batch, layer by layer: the similarity of the pair behind the last that merges, of all."""
    values: list[float] = []
    for number in range(len(model.blocks)):
        similar = []
        for row in batch:
            tokens, layers = references.timm_embed(model, row[None])
            for layer, value in zip(layers, (*values, None), strict=False):
                attended = layer.attend(tokens, references.log_size(tokens))
                unit = torch.nn.functional.normalize(attended.key.mean(1)[0], dim=-1)
                best = (unit[2::2] @ unit[1::2].T).amax(-1)
                if value is None:
                    similar += best.tolist()
                    break
                tokens = references.merge(replace(tokens, x=attended.x), attended.key, int((best > value).sum()))
                tokens = replace(tokens, x=layer.feed(tokens))
        values.append(max(sorted(similar, reverse=True)[r * len(batch)], 0.0))
        assert len(values) == number + 1
    return values


def test_pairs_of_a_batch_are_ranked_together_layer_by_layer() -> None:
    """Against the hand-patched model, one image at a time; then how many each threshold merges, mean over batches."""
    model = refs.tiny("head")
    program, recipe = thresholded(model, "r=8")
    with torch.no_grad():
        expected = torch.tensor([ranked(model, batch, 8) for (batch,) in DATA]).mean(0)
        torch.testing.assert_close(torch.tensor(recipe.select.values), expected, rtol=1e-4, atol=1e-5)
        merged = [counts(model, row[None], recipe.select.values)[0] for (batch,) in DATA for row in batch]
    found = fitting.threshold_counts(recipe, Schedule.parse("r=8"), program, DATA)
    assert list(found) == [0, 1, 2, 3]
    torch.testing.assert_close(torch.tensor(list(found.values())), torch.tensor(merged).float().mean(0))


# -- in optimize -------------------------------------------------------------------------------------------------------


def test_optimize_learns_from_the_data_it_is_given() -> None:
    import tokenopt

    model, program, _ = per_token()
    settings = {"score.hidden": 0}
    result = tokenopt.optimize(program, recipe="dtop", schedule="keep=0.5@2", settings=settings, data=DATA[:2])
    assert [e["after"] for e in result.report.edits] == [33]
    assert result.program(images(3)).shape == model(images(3)).shape
    with pytest.raises(UsageError, match="learns from data, and there is none"):
        tokenopt.optimize(program, recipe="dtop")


def test_the_command_line_leaves_the_learned_weights_beside_the_recipe(tmp_path: Path) -> None:
    import numpy as np
    import yaml

    from tokenopt import cli

    _, program, _ = per_token()
    path = program.save(tmp_path / "model.pt2")
    np.savez(tmp_path / "data.npz", x=images(40, seed=3).numpy())
    for recipe in ("dtop", tmp_path / "out" / "recipe.resolved.yaml"):
        data = ["--data", tmp_path / "data.npz"] if recipe == "dtop" else []
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in ("optimize", path, "--recipe", recipe, "-o", tmp_path / "out", *data)])
        assert end.value.code == 0
        resolved = yaml.safe_load((tmp_path / "out" / "recipe.resolved.yaml").read_text())["recipe"]
        weights = Path(resolved["score"]["learned"]["weights"])
        assert weights == tmp_path / "out" / "scorer.safetensors"
        assert weights.exists()
