"""What papers choose schedules by, and recipes that learn, within a budget."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tokenopt
from tests import recipe_references as refs
from tests.references import images
from tests.test_calibration import run
from tests.test_fitting import PerToken
from tokenopt import calibration, fitting, recipes, registry
from tokenopt.attention import Neighborhood, Paro, Predicted
from tokenopt.attention.recipe import AttentionRecipe
from tokenopt.calibration import ExitLayer, Problem, Search, Target, Thresholds, strategies
from tokenopt.calibration.learned import Patterns, problem_of
from tokenopt.cost import program_flops
from tokenopt.errors import BudgetError, UsageError
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.program import Program, capture
from tokenopt.schedule import Schedule
from tokenopt.tokens.recipe import TokenRecipe

FEW = Search(trials=1)
BLOCK = {"name": "mine", "score": "uniform_grid", "select": "topk", "place": "block", "schedule": {"r": 8}}


@cache
def model() -> nn.Module:
    """Four blocks; the last two read nothing from other tokens."""
    found = refs.tiny("head")
    with torch.no_grad():
        for block in found.blocks[2:]:
            block.attn.proj.weight.zero_()
    return found


@cache
def canonical() -> Program:
    captured = capture(model(), images(2))
    return canonicalize(captured).program


@cache
def larger() -> Program:
    """A grid of 16 x 16, on which patterns pay."""
    captured = capture(refs.tiny("head", img_size=64), images(2, 64))
    return canonicalize(captured).program


@cache
def problem(recipe: str = "mine", labels: bool = False) -> Problem:
    batches = [(images(8, seed=seed), None) for seed in (3, 4)]
    if labels:
        batches = [(x, model()(x).argmax(1)) for x, _ in batches]
    mine = recipes.get(BLOCK if recipe == "mine" else recipe)
    return Problem(canonical(), mine, [([x], y) for x, y in batches])


def only(strategy: calibration.Calibrator, on: Problem, budget: float) -> Schedule:
    (schedule,) = strategy.schedules(on, budget, seed=0)
    assert on.cost(schedule) <= budget
    return schedule


# -- dymu --------------------------------------------------------------------------------------------------------------


def test_counts_of_thresholds_are_scaled_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    tome, started = problem("tome"), []

    def counts(recipe: Any, schedule: Schedule, program: Program, batches: Any) -> dict[int, float]:
        assert len(recipe.select.values) == 4 and all(0 < v < 1 for v in recipe.select.values)
        assert sum(len(batch[0]) for batch in batches) == 16
        started.append(schedule)
        return {0: 2.0, 1: 12.0, 2: 0.0, 3: 6.0}

    monkeypatch.setattr(strategies, "threshold_counts", counts)
    found = only(Thresholds(), tome, 0.85)
    assert len(set(started[0].r)) <= 2 or max(started[0].r) - min(started[0].r) <= 1  # constant, as the recipe's own
    assert found.r[1] == pytest.approx(6 * found.r[0], abs=3) == pytest.approx(2 * found.r[3], abs=3)
    assert found.r[2] == 0
    assert 0.8 < tome.cost(found) <= 0.85


def test_thresholds_are_for_pairs_that_merge() -> None:
    with pytest.raises(UsageError, match="merges no pairs"):
        only(Thresholds(), problem(), 0.9)


# -- exit --------------------------------------------------------------------------------------------------------------


def test_tokens_leave_where_the_answers_do_not_need_them() -> None:
    """From the third block on nothing is read from patches: exactly there is the first exit that changes no answer."""
    on = problem()
    costs = [on.cost(Schedule(r=[0] * layer + [63])) for layer in range(4)]
    assert costs == sorted(costs)
    assert on.evaluate(Schedule(r=[0, 0, 63])).deviation < 1e-9 < on.evaluate(Schedule(r=[0, 63])).deviation
    assert only(ExitLayer(), on, 0.99) == Schedule(r=[0, 0, 63])
    assert only(ExitLayer(), on, costs[2] + 0.01) == Schedule(r=[0, 0, 63])


def test_a_budget_asks_for_an_earlier_exit() -> None:
    on = problem()
    costs = [on.cost(Schedule(r=[0] * layer + [63])) for layer in range(2)]
    assert only(ExitLayer(), on, costs[1] + 0.01) == Schedule(r=[0, 63])
    assert only(ExitLayer(), on, costs[0] + 0.01) == Schedule(r=[63])
    with pytest.raises(BudgetError, match="cannot meet"):
        only(ExitLayer(), on, costs[0] - 0.01)


def test_known_labels_limit_the_loss() -> None:
    """Whatever the answers: the loss decides where labels are known, and nothing where they are not."""
    heedless = ExitLayer(agreement=-1.0)
    assert only(heedless, problem(), 0.99) == Schedule(r=[63])
    assert only(heedless, problem(labels=True), 0.99) == Schedule(r=[0, 0, 63])
    assert only(ExitLayer(agreement=-1.0, loss=1e9), problem(labels=True), 0.99) == Schedule(r=[63])


def test_what_has_no_exit_is_refused() -> None:
    with pytest.raises(UsageError, match="lets no token leave"):
        only(ExitLayer(), problem("tome"), 0.9)
    program = canonicalize(
        capture(refs.tiny("features"), images(2))).program  # fmt: skip
    with pytest.raises(UsageError, match="no answers"):
        only(ExitLayer(), Problem(program, recipes.get(BLOCK), [([images(4)], None)]), 0.9)


# -- by name -----------------------------------------------------------------------------------------------------------


def test_strategies_have_names() -> None:
    names = registry.names("tokenopt.strategies")
    assert {"search", "stages", "decay", "dymu", "exit"} <= set(names)
    for name in names:
        assert callable(registry.load("tokenopt.strategies", name)().schedules)
    with pytest.raises(UsageError, match=r"no strategy 'best'\n.*decay, dymu, exit, search, stages"):
        calibration.fit(canonical(), "tome", {"x": images(4)}, budget="flops=80%", calibrator="best")
    with pytest.raises(UsageError, match="chosen for by a strategy"):
        calibration.fit(canonical(), "fopru", {"x": images(4)}, budget="tokens=50%", calibrator="decay")


def test_the_command_line_takes_a_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = capture(model(), images(2)).save(tmp_path / "model.pt2")
    np.savez(tmp_path / "data.npz", x=images(30).numpy())
    (tmp_path / "mine.yaml").write_text(json.dumps(BLOCK))
    given = ["--recipe", tmp_path / "mine.yaml", "--data", tmp_path / "data.npz", "--budget", "flops=95%"]
    assert run("calibrate", path, *given, "--strategy", "exit", "-o", tmp_path / "exit.json") == 0
    written = json.loads((tmp_path / "exit.json").read_text())
    assert written["schedule"] == {"r": [0, 0, 63]}
    assert len(written["calibration"]["trials"]) == 1 and written["calibration"]["held_out"]["fixed"]
    assert run("optimize", path, *given, "--strategy", "exit", "-o", tmp_path / "out") == 0
    report = tokenopt.Report.load(tmp_path / "out" / "report.json")
    assert report.schedule == written["schedule"] and report.tokens["after"] == [65, 65, 2, 2]
    capsys.readouterr()
    assert run("calibrate", path, *given, "--strategy", "best", "-o", tmp_path / "x.json") == 2
    assert "decay, dymu, exit, search, stages" in capsys.readouterr().err
    assert run("optimize", path, "--strategy", "exit", "-o", tmp_path / "x") == 2
    assert "--budget" in capsys.readouterr().err
    for verb in ("calibrate", "optimize"):
        assert run(verb, "--help") == 0
        assert "decay, dymu, exit, search, stages" in " ".join(capsys.readouterr().out.split())


# -- scores that are learned -------------------------------------------------------------------------------------------


@pytest.fixture
def lessons(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that scores were learned into."""
    found: list[Path] = []
    distil = fitting.distil
    monkeypatch.setattr(fitting, "distil", lambda *a, **k: found.append(a[4]) or distil(*a, **k, steps=20))
    return found


def test_a_score_is_learned_once_for_all_schedules(lessons: list[Path]) -> None:
    torch.manual_seed(0)
    per_token = capture(PerToken().eval(), images(2))
    options = {"fitting": {"calibrator": FEW}, "settings": {"score.hidden": 0}, "data": {"x": images(8)}}
    result = tokenopt.optimize(per_token, recipe="dtop", budget="flops=85%", **options)
    assert len(lessons) == 1
    report = result.report
    assert report.flops["after"] <= 0.85 * report.flops["before"]
    assert report.calibration["schedule"] == report.schedule and len(report.calibration["sensitivity"]) == 12
    assert report.recipe["settings"]["score"]["learned"]["weights"] == str(lessons[0])


def test_a_score_that_is_learned_is_not_a_part_of_the_answer(lessons: list[Path]) -> None:
    torch.manual_seed(0)
    per_token = capture(PerToken().eval(), images(2))
    recipe = recipes.get("dtop").with_settings({"score.hidden": 0})
    found = calibration.fit(per_token, recipe, {"x": images(8)}, budget="flops=85%", calibrator=FEW)
    assert found.recipe == recipe and not lessons[0].exists()
    assert found.chosen.cost <= 0.85 and found.random is not None


# -- attention patterns ------------------------------------------------------------------------------------------------


def pattern_options(x: Tensor, budget: str) -> dict[str, Any]:
    return {"data": {"x": x}, "budget": budget, "held_out": {"x": images(4, 64, seed=5)}}


@pytest.mark.usefixtures("small_tiles")
def test_density_is_the_largest_within_the_budget() -> None:
    x = images(6, 64)
    recipe = recipes.get(Paro(block=16))
    found = calibration.fit(larger(), recipe, **pattern_options(x, "flops=80%"))
    share, fitted = found.schedule.keep, Patterns(larger(), recipe, [([x], None)])
    assert found.recipe.pattern == {"all": Paro(block=16, density=share)}
    assert fitted.cost(found.schedule) == found.chosen.cost <= 0.8
    assert 0.01 < share < 1 and fitted.cost(Schedule(keep=share + 0.01)) > 0.8
    assert found.held_out["samples"] == 4 and found.held_out["deviation"] > 0
    report = tokenopt.optimize(larger(), recipe=recipe, data={"x": x}, budget="flops=80%").report
    assert report.flops["after"] == found.chosen.cost * report.flops["before"]
    assert report.calibration["fitted"]["deviation"] == found.chosen.deviation
    assert all("BlockMap(16" in p for p in report.recipe["settings"]["pattern"].values())


@pytest.mark.usefixtures("small_tiles")
def test_what_predicts_is_learned_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    learned, fit = [], Predicted.fit
    monkeypatch.setattr("tokenopt.attention.learned._STEPS", 5)
    monkeypatch.setattr(Predicted, "fit", lambda self, *a: learned.append(self) or fit(self, *a))
    recipe = recipes.get(Predicted(8, tile=4))
    found = calibration.fit(larger(), recipe, **pattern_options(images(4, 64), "flops=80%"), weights=tmp_path / "w")
    assert len(learned) == 4
    assert found.chosen.cost <= 0.8
    assert {p.keep for p in found.recipe.pattern.values()} == {found.schedule.keep}
    assert all(p.weights == str(tmp_path / "w") for p in found.recipe.pattern.values())


@pytest.mark.usefixtures("small_tiles")
def test_a_share_of_the_attention_says_how_many_blocks() -> None:
    found = calibration.fit(larger(), "Routed(4, topk=1)", **pattern_options(images(4, 64), "flops=80%"))
    (pattern,) = found.recipe.pattern.values()
    assert pattern.mass == found.schedule.keep and pattern.topk is None and found.chosen.cost <= 0.8


@pytest.mark.usefixtures("small_tiles")
def test_windows_are_the_largest_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenopt.calibration.learned.attended", lambda *_: pytest.fail("nothing is learned"))
    found = calibration.fit(larger(), "swin", **pattern_options(images(4, 64), "flops=80%"))
    share = found.schedule.keep
    assert found.recipe.pattern["::2"] == Neighborhood(share, stride=share) and found.chosen.cost <= 0.8
    assert Patterns(larger(), recipes.get("swin"), [([images(4, 64)], None)]).cost(Schedule(keep=share + 0.02)) > 0.8


@pytest.mark.usefixtures("small_tiles")
def test_the_command_line_fits_a_density(tmp_path: Path) -> None:
    path = larger().save(tmp_path / "model.pt2")
    np.savez(tmp_path / "data.npz", x=images(10, 64).numpy())
    data = ["--data", tmp_path / "data.npz"]
    given = ["--recipe", "Paro(block=16)", *data, "--budget", "flops=80%"]
    assert run("calibrate", path, *given, "--afresh", "-o", tmp_path / "paro.json") == 0
    written = json.loads((tmp_path / "paro.json").read_text())
    share = written["schedule"]["keep"]
    assert written["recipe"]["pattern"] == {"all": f"Paro(block=16, density={share})"}
    assert written["calibration"]["held_out"]["deviation"] > 0
    assert run("optimize", path, "--recipe", tmp_path / "paro.json", *data, "-o", tmp_path / "out") == 0
    report = tokenopt.Report.load(tmp_path / "out" / "report.json")
    assert report.flops["after"] <= 0.8 * report.flops["before"]


@pytest.mark.usefixtures("small_tiles")
def test_what_a_pattern_cannot_be_fitted_to() -> None:
    with pytest.raises(BudgetError, match="all but attention costs as before"):
        calibration.fit(larger(), Paro(block=16), **pattern_options(images(4, 64), "flops=40%"))
    with pytest.raises(UsageError, match="cannot be fitted to"):
        calibration.fit(larger(), Paro(block=16), **pattern_options(images(4, 64), "tokens=50%"))
    with pytest.raises(UsageError, match="no schedule to start from"):
        given = {"schedule": "r=4", "budget": "flops=80%", "data": {"x": images(4, 64)}}
        tokenopt.optimize(larger(), recipe=Paro(block=16), **given)


# -- one number, and what is measured or lost --------------------------------------------------------------------------


class Clock(Target):
    """Milliseconds that are made up: some for any program, and more for more operations."""

    def race(self, programs: Any) -> dict[str, float]:
        flops = {name: program_flops(program) / 1e6 for name, program in programs.items()}
        return {name: 10 + count for name, count in flops.items()}


@pytest.mark.parametrize("recipe", ["Paro(block=16)", "semantic-token"])
@pytest.mark.usefixtures("small_tiles")
def test_one_number_is_fitted_to_a_latency(recipe: str) -> None:
    given = {**pattern_options(images(4, 64), "latency=0.9x"), "target": Clock("eager")}
    found = calibration.fit(larger(), recipe, **given)
    dense = 10 + program_flops(larger()) / 1e6
    assert found.latency["met"] and found.latency["dense_ms"] == pytest.approx(dense, rel=1e-3)
    assert found.latency["ms"] <= 0.9 * dense
    kind = problem_of(recipes.get(recipe))
    on = kind(canonicalize(larger()).program, recipes.get(recipe), [([images(4, 64)], None)])
    assert 10 + program_flops(on.reduced(Schedule(keep=found.schedule.keep + 0.02))) / 1e6 > 0.9 * dense
    assert found.chosen.cost == pytest.approx(found.latency["ratio"], abs=0.01)
    with pytest.raises(BudgetError, match="cannot meet"):
        calibration.fit(larger(), recipe, **{**given, "budget": "latency=0.1x"})


@pytest.mark.parametrize("recipe", ["Paro(block=16)", "semantic-token"])
@pytest.mark.usefixtures("small_tiles")
def test_one_number_is_fitted_to_a_loss(recipe: str) -> None:
    """As much is left out as may be, and no more."""
    given = {"data": {"x": images(4, 64)}, "budget": "drop=100%", "metric": f"{__name__}:loss"}
    most = calibration.fit(larger(), recipe, **given)
    half = calibration.fit(larger(), recipe, **{**given, "budget": f"drop={most.chosen.deviation / 2:.6f}"})
    assert half.chosen.deviation <= most.chosen.deviation / 2
    assert most.chosen.cost < half.chosen.cost < 1.0
    more = Schedule(keep=half.schedule.keep - 0.1)
    kind = problem_of(recipes.get(recipe))
    on = kind(canonicalize(larger()).program, recipes.get(recipe), [([images(4, 64)], None)], f"{__name__}:loss")
    assert on.evaluate(more).deviation > most.chosen.deviation / 2


def loss(outputs: list[Tensor], dense: list[Tensor]) -> Tensor:
    return (outputs[0] - dense[0]).norm(dim=-1) / dense[0].norm(dim=-1) / 10


def test_what_leaves_the_model_costs_it_nothing() -> None:
    features = capture(refs.tiny("features"), images(2))
    given = {"data": {"x": images(8)}, "target": Clock("eager")}
    with pytest.raises(UsageError, match="only what comes after is faster"):
        calibration.fit(features, "fastervlm", budget="latency=0.9x", **given)
    found = calibration.fit(features, "fastervlm", budget="drop=100%", metric=f"{__name__}:nothing", **given)
    assert found.chosen.cost < 0.1


def nothing(outputs: list[Tensor], dense: list[Tensor]) -> Tensor:
    return torch.zeros(len(dense[0]))


@pytest.mark.usefixtures("small_tiles")
def test_patterns_and_reductions_are_compared() -> None:
    """A schedule to start from is for those that have one; a budget of tokens leaves patterns out."""
    assert {type(one) for one in calibration.candidates("auto")} == {TokenRecipe, AttentionRecipe}
    recipe, data = "Paro(block=16),uniform-grid", {"x": images(4, 64)}
    given = {"budget": "flops=80%", "data": data, "fitting": {"calibrator": FEW}}
    report = tokenopt.optimize(larger(), recipe=recipe, schedule="r=8", **given).report
    front = [row for row in report.calibration["front"] if row["kind"] != "random"]
    assert len({row["recipe"] for row in front}) == 2
    (chosen,) = (row for row in front if row["chosen"])
    least = {row["recipe"]: row["deviation"] for row in front if row["kind"] == "fixed" and row["name"] == "default"}
    assert chosen["recipe"] == report.recipe["name"] and chosen["deviation"] <= min(least.values()) + 1e-9
    found = calibration.fit(larger(), recipe, data, budget="tokens=80%", calibrator=FEW)
    assert found.recipe.name == "uniform-grid" and not found.others


def test_without_data_there_is_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="several recipes: tome, evit"):
        tokenopt.optimize(canonical(), recipe="tome,evit", budget="flops=80%")
    with pytest.raises(UsageError, match="paro learns from data"):
        tokenopt.optimize(larger(), recipe="paro", budget="flops=80%")
    assert run("optimize", tmp_path / "none.pt2", "--recipe", "auto", "-o", tmp_path / "out") == 2
    assert "several recipes" in capsys.readouterr().err  # before the model is looked for


# -- the gate on patterns ----------------------------------------------------------------------------------------------


class Stopwatch(Target):
    """Milliseconds that are made up: windows pay in all attentions but the second."""

    def race(self, programs: Any) -> dict[str, float]:
        gains = (2.0, -1.0, 1.0, 0.5)

        def ms(program: Program) -> float:
            attentions = [n for n in program.graph.nodes if n.target in tokenopt.ops.attentions()]
            windows = [n.target is not torch.ops.tokenopt.attention.default for n in attentions]
            assert len(windows) == 4
            return 10 - sum(gain for gain, window in zip(gains, windows, strict=True) if window)

        return {name: ms(program) for name, program in programs.items()}


@pytest.mark.parametrize("budget", [None, "flops=80%"])
@pytest.mark.usefixtures("small_tiles")
def test_patterns_that_do_not_pay_are_taken_back(budget: str | None) -> None:
    recipe, data = ("Neighborhood(3)", None) if budget is None else ("Paro(block=16)", {"x": images(4, 64)})
    result = tokenopt.optimize(larger(), recipe=recipe, data=data, budget=budget, target=Stopwatch("eager"))
    report = result.report
    sites = [row["site"] for row in report.calibration["gate"]]
    assert [row["kept"] for row in report.calibration["gate"]] == [True, False, True, True]
    assert [e["site"] for e in report.edits] == [site for site in sites if site != sites[1]]
    now = [n.target is torch.ops.tokenopt.attention.default for n in result.program.graph.nodes
           if n.target in tokenopt.ops.attentions()]  # fmt: skip
    assert now == [False, True, False, False]
    assert {row["check"] for row in report.parity} >= {"identity", "pattern"}
    assert ("budget" in report.calibration) == (budget is not None)
