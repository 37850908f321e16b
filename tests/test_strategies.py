"""What papers choose schedules by, within a budget."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tokenopt
from tests import recipe_references as refs
from tests.references import images
from tests.test_calibration import run
from tokenopt import calibration, recipes, registry
from tokenopt.calibration import ExitLayer, Problem, Thresholds, strategies
from tokenopt.errors import BudgetError, UsageError
from tokenopt.passes.flatten_grids import FlattenGrids
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program, capture
from tokenopt.schedule import Schedule

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
    return Pipeline([FoldConstants(), RaiseAttention(), FlattenGrids()]).run(captured).program


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
    program = Pipeline([FoldConstants(), RaiseAttention(), FlattenGrids()]).run(
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
