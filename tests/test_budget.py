"""Budgets are met by scaling a recipe's own schedule."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import tokenopt
from tests import recipe_references as refs
from tests.references import images
from tokenopt import cli, run
from tokenopt.errors import BudgetError, UsageError
from tokenopt.program import Program, capture
from tokenopt.schedule import Budget, Schedule


@cache
def program(kind: str) -> Program:
    return capture(refs.tiny(kind), images(2))


@pytest.mark.parametrize("recipe", ["tome", "evit", "tomesd", "transition"])
@pytest.mark.parametrize("budget", ["flops=80%", "tokens=0.7"])
def test_a_budget_is_met_from_below(recipe: str, budget: str) -> None:
    wanted = Budget.parse(budget)
    if recipe == "tomesd" and wanted.metric == "flops":
        wanted = Budget("flops", 0.9)
    schedule = {"keep": 0.7, "layers": [0.25, 0.5]} if recipe == "evit" else None
    report = tokenopt.optimize(program("head"), recipe=recipe, schedule=schedule, budget=wanted).report
    if wanted.metric == "flops":
        share = report.flops["after"] / report.flops["before"]
    else:
        share = sum(report.tokens["after"]) / sum(report.tokens["before"])
    assert wanted.share - 0.06 < share <= wanted.share
    again = tokenopt.optimize(program("head"), recipe=recipe, schedule=report.schedule).report
    assert again.flops == report.flops


def test_output_tokens_have_budgets_too() -> None:
    result = tokenopt.optimize(program("features"), recipe="divprune", budget="tokens=25%")
    assert result.program(images(3)).shape[1] in (16, 17)
    with pytest.raises(BudgetError, match="divprune cannot meet") as error:
        tokenopt.optimize(program("features"), recipe="divprune", budget="flops=25%")
    assert "leaves" in error.value.why
    assert error.value.exit_code == 5


def test_what_cannot_be_reached_says_what_can() -> None:
    with pytest.raises(BudgetError, match="leaves 8"):
        tokenopt.optimize(program("head"), recipe="evit", schedule="keep=0.7@3", budget="flops=30%")


def test_a_pattern_sees_as_much_as_the_budget_allows() -> None:
    flops = lambda report: report.flops["after"] / report.flops["before"]  # noqa: E731
    options = {"recipe": "nat", "min_speedup": 0}
    least, most = (flops(tokenopt.optimize(program("head"), **options, settings={"window": w}).report) for w in (1, 8))
    wanted = (2 * least + most) / 3
    report = tokenopt.optimize(program("head"), **options, budget=Budget("flops", wanted)).report
    assert least < flops(report) <= wanted and len(report.edits) == 4
    share = float(report.patterns[0]["pattern"].removeprefix("Neighborhood(").removesuffix(")"))
    more = tokenopt.optimize(program("head"), **options, settings={"window": share + 0.01}).report
    assert 0 < share < 1 and flops(more) > wanted
    passes = "raise-attention,sparsify-attention{pattern=Neighborhood(7),min-speedup=0,sites=1:}"
    some = tokenopt.optimize(program("head"), passes=passes, budget=Budget("flops", (wanted + most) / 2))
    assert [r["site"] for r in some.report.patterns] == [f"blocks.{i}.attn" for i in (1, 2, 3)]
    assert flops(some.report) <= (wanted + most) / 2
    again = tokenopt.optimize(program("head"), passes=run._settled(passes, some)).report
    assert again.patterns == some.report.patterns and again.flops == some.report.flops


@pytest.mark.parametrize("recipe", ["nat", "swin"])
def test_a_pattern_of_a_recipe_is_repeated_too(recipe: str) -> None:
    """A recipe that was scaled has no name; its patterns have text."""
    passes = f"raise-attention,sparsify-attention{{recipe={recipe},min-speedup=0}},remove-dead"
    first = tokenopt.optimize(program("head"), passes=passes, budget="flops=97%")
    again = tokenopt.optimize(program("head"), passes=run._settled(passes, first)).report
    rows = lambda report: sorted((r["site"], r["pattern"]) for r in report.patterns if not r["refusal"])  # noqa: E731
    assert rows(again) == rows(first.report) and len(rows(again)) == 4
    assert again.flops == first.report.flops and "(0." in rows(again)[0][1]


def test_patterns_that_meet_no_budget() -> None:
    with pytest.raises(BudgetError, match="nat cannot meet") as error:
        tokenopt.optimize(program("head"), recipe="nat", min_speedup=0, budget="flops=10%")
    assert "where least is seen" in error.value.why
    with pytest.raises(BudgetError) as error:
        tokenopt.optimize(program("head"), recipe="nat", min_speedup=100, budget="flops=90%")
    assert "100.0% is left" in error.value.why and "100x asked for" in error.value.why
    wrong = {("agent", "flops=80%"): "no number", ("nat", "tokens=50%"): "all tokens", ("nat", "latency=0.5x"): "data"}
    for (recipe, budget), why in wrong.items():
        with pytest.raises(UsageError) as refused:
            tokenopt.optimize(program("head"), recipe=recipe, min_speedup=0, budget=budget)
        assert why in refused.value.why
    with pytest.raises(UsageError, match="gives patterns .* and there are 2"):
        twice = ",".join(["raise-attention", *["sparsify-attention{pattern=Neighborhood(3)}"] * 2])
        tokenopt.optimize(program("head"), passes=twice, budget="flops=90%")


WRONG = ["latency=0ms", "flops=4ms", "flops", "flops=0%", "tokens=130%", "flops=-1", "60%", "flops=1.2.3", "flops=."]


@pytest.mark.parametrize("text", WRONG)
def test_wrong_budgets_say_what_fits(text: str) -> None:
    with pytest.raises(UsageError, match="not a budget"):
        Budget.parse(text)


def test_a_recipe_that_refuses_to_leave_next_to_nothing() -> None:
    """The strongest schedule is none that it can do; the budget is met all the same."""
    report = tokenopt.optimize(program("features"), recipe="visionzip", budget="tokens=50%").report
    assert 0.45 < report.edits[-1]["after"] / 65 <= 0.5


def test_a_recipe_that_refuses_everything_says_why() -> None:
    recipe = {"name": "mine", "select": "topk", "score": "text_rows", "schedule": "keep=0.5"}
    with pytest.raises(BudgetError, match="no segment 'text'"):
        tokenopt.optimize(program("head"), recipe=recipe, budget="tokens=50%")


def test_nothing_to_scale_is_an_error() -> None:
    with pytest.raises(UsageError, match="removes nothing"):
        tokenopt.optimize(program("head"), recipe="tome", schedule="r=0", budget="flops=50%")


@given(st.floats(0, 4), st.integers(1, 30), st.one_of(st.integers(0, 20), st.lists(st.integers(0, 20), min_size=1)))
def test_scaled_schedules_remove_in_proportion(factor: float, layers: int, r: Any) -> None:
    schedule = Schedule.parse({"r": r})
    whole = [64 * 64 - schedule.kept(i, layers, 64 * 64) for i in range(layers)]
    scaled = schedule.scaled(factor, layers)
    assert len(scaled.r) == layers
    assert abs(sum(scaled.r) - factor * sum(whole)) <= 0.5 + 1e-6
    assert all(abs(a - factor * b) <= 1 + 1e-6 for a, b in zip(scaled.r, whole, strict=True))


@given(st.floats(0.05, 1.0), st.floats(0, 1))
def test_scaled_shares_stay_shares(keep: float, factor: float) -> None:
    scaled = Schedule.parse({"keep": keep, "layers": [2]}).scaled(factor, 4)
    assert scaled.layers == (2,)
    assert scaled.keep == pytest.approx(max(1 - factor * (1 - keep), 1e-3), abs=1e-5)


def test_the_command_line_writes_the_schedule_that_meets_it(tmp_path: Path) -> None:
    path = program("head").save(tmp_path / "model.pt2")
    for budget, code in (("flops=80%", 0), ("flops=0.01%", 5), ("speed=2", 2)):
        arguments = ["optimize", path, "--recipe", "tome", "--budget", budget, "-o", tmp_path / "out"]
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        assert end.value.code == code
    resolved = yaml.safe_load((tmp_path / "out" / "recipe.resolved.yaml").read_text())
    assert len(resolved["schedule"]["r"]) == 4
    assert isinstance(torch.tensor(resolved["schedule"]["r"]).sum().item(), int)
