"""Calibration: the solver against brute force, budgets that are met, and data that are looked at once."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenopt
from tests import recipe_references as refs
from tests.references import images
from tokenopt import calibration, cli, recipes
from tokenopt.calibration import Search, Target, metrics
from tokenopt.calibration import problem as problem_module
from tokenopt.calibration.price import Price, gate
from tokenopt.calibration.problem import Batches, Problem, alone
from tokenopt.calibration.solve import RATIOS, Table, expected, scaled, solve
from tokenopt.calibration.strategies import DecayCurve, Stages, _last_solved, decay
from tokenopt.errors import BudgetError, UsageError
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program, capture
from tokenopt.schedule import Budget, Schedule

FEW = Search(trials=2)


@cache
def program() -> Program:
    return capture(refs.tiny("head", depth=3), images(2))


@cache
def folder() -> Path:
    """What most tests share: they ask for much the same schedules."""
    return Path(tempfile.mkdtemp())


def fit(recipe: str, data: Any, *, budget: str, **options: Any) -> calibration.Calibration:
    return calibration.fit(program(), recipe, data, budget=budget, **{"calibrator": FEW, "cache": folder(), **options})


@cache
def canonical() -> Program:
    return canonicalize(program()).program


def data(count: int = 8, seed: int = 3) -> dict[str, Tensor]:
    inputs = images(count, seed=seed)
    return {"x": inputs, "labels": program().module()(inputs).argmax(1)}


@cache
def fitted(budget: str = "flops=80%", recipe: str = "tome") -> calibration.Calibration:
    return fit(recipe, data(), budget=budget, held_out=data(6, seed=4))


# -- the solver --------------------------------------------------------------------------------------------------------


@st.composite
def tables(draw: Any) -> Table:
    layers, tokens = draw(st.integers(1, 3)), draw(st.integers(4, 8))
    error = np.outer([draw(st.floats(0.01, 1)) for _ in range(layers)], 1 - np.array(RATIOS)) ** 2
    saved = np.array([[0.0, 0.25, 0.5, 0.75]] * layers) * np.array([[draw(st.floats(0.05, 1))] for _ in range(layers)])
    cost = np.vstack([np.full((1, 4), 2.0), -saved])
    overhead, chained = draw(st.sampled_from([0.0, 0.01])), draw(st.booleans())
    return Table(tuple(range(layers)), tokens, error, cost, overhead, chained=chained)


def error_of(table: Table, removed: list[int]) -> float:
    """What the solver minimises, written down again."""
    left, total = table.tokens, 0.0
    for i, count in enumerate(removed):
        before, left = (left, left - count) if table.chained else (table.tokens, table.tokens - count)
        after, was = (float(table.errors(i, np.array([n / table.tokens]))[0]) for n in (left, before))
        total += max(after - was, 0.0)
    return total


@settings(deadline=None, max_examples=40, derandomize=True)
@given(tables(), st.floats(0, 1))
def test_the_solver_is_near_brute_force_and_never_over_budget(table: Table, part: float) -> None:
    def legal(removed: tuple[int, ...]) -> bool:
        return (sum(removed) if table.chained else max(removed)) < table.tokens

    options = [list(r) for r in itertools.product(range(table.tokens), repeat=len(table.layers)) if legal(r)]
    costs = [expected(table, r) for r in options]
    budget = min(costs) + part * (table.dense - min(costs))
    found = solve(table, budget)
    if found is None:
        assert budget < min(costs) + 1e-6
        return
    assert expected(table, found) <= budget + 1e-9
    within = [error_of(table, r) for r, cost in zip(options, costs, strict=True) if cost <= budget]
    # a price finds solutions on the convex hull alone: between two of them it may miss the best
    assert error_of(table, found) <= min(within) + 0.5 * float(table.error.max()) + 1e-9


@settings(deadline=None, max_examples=20, derandomize=True)
@given(tables())
def test_more_budget_is_never_worse(table: Table) -> None:
    errors = []
    for part in (0.4, 0.6, 0.8, 1.0):
        found = solve(table, part * table.dense)
        errors.append(math.inf if found is None else error_of(table, found))
    assert all(b <= a + 0.35 * float(table.error.max()) + 1e-9 for a, b in itertools.pairwise(errors))
    assert errors[-1] == 0.0


@settings(deadline=None, max_examples=30)
@given(tables(), st.sampled_from(["r=1", "r=1:-1", "r=1:1", "keep=0.5@0.5"]), st.floats(0.3, 1))
def test_scaled_shapes_meet_the_budget(table: Table, shape: str, part: float) -> None:
    found = scaled(table, Schedule.parse(shape), len(table.layers), part * table.dense)
    assert found is None or expected(table, found) <= part * table.dense + 1e-9


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_are_their_formulas() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    p, q = b.softmax(1).double(), a.softmax(1).double()
    naive = torch.stack([sum(p[i, j] * (p[i, j] / q[i, j]).log() for j in range(7)) for i in range(5)])
    torch.testing.assert_close(metrics.kl(a, b), naive, rtol=1e-5, atol=1e-7)
    cosine = torch.stack([1 - a[i] @ b[i] / a[i].norm() / b[i].norm() for i in range(5)])
    torch.testing.assert_close(metrics.cosine(a, b).float(), cosine)
    relative = torch.stack([(a[i] - b[i]).norm() / b[i].norm() for i in range(5)])
    torch.testing.assert_close(metrics.relative(a, b).float(), relative)
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    torch.testing.assert_close(metrics.last_token(x, y), metrics.cosine(x[:, 3], y[:, 3]))
    for name in metrics.METRICS:
        assert metrics.get(name)([x], [x]).abs().max() < 1e-7
    assert metrics.get("tests.test_calibration:largest")([a], [b]).shape == (5,)
    with pytest.raises(UsageError, match="no metric"):
        metrics.get("nothing")
    with pytest.raises(UsageError, match="cannot be loaded"):
        metrics.get("no.such:thing")


def largest(outputs: list[Tensor], dense: list[Tensor]) -> Tensor:
    """A metric of the user's."""
    return (outputs[0] - dense[0]).abs().flatten(1).amax(1)


# -- fitting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["flops=80%", "tokens=70%"])
def test_the_budget_is_met_and_the_choice_reported(budget: str) -> None:
    found = fitted(budget)
    share = Budget.parse(budget).share
    reduced = Pipeline([ReduceTokens("tome", found.schedule)]).run(canonical()).program
    assert found.chosen.cost <= share
    assert {"constant", "rising", "falling", "staged", "default"} >= set(found.fixed) >= {"constant"}
    assert all(e.cost <= share for e in (*found.trials, *found.fixed.values()))
    tried = {e.schedule for e in (*found.trials, *found.fixed.values())}
    assert found.chosen.schedule in tried
    report = found.to_dict()
    assert sum(point["chosen"] for point in report["front"]) >= 1
    assert {p["kind"] for p in report["front"]} >= {"calibrated", "fixed", "random"}
    assert report["held_out"]["samples"] == 6 and report["held_out"]["accuracy_dense"] == 1.0
    low, high = report["held_out"]["accuracy_ci"]
    assert 0 <= low <= report["held_out"]["accuracy"] <= high <= 1
    json.dumps(report)
    assert len(reduced.outputs) == 1


def test_the_same_seed_gives_the_same_schedule() -> None:
    again = fit("tome", data(), budget="flops=80%", cache=None)
    assert again.schedule == fitted().schedule
    assert [e.schedule for e in again.trials] == [e.schedule for e in fitted().trials]


def test_a_second_run_makes_no_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fitted()
    ran: list[Program] = []
    run = problem_module._run
    monkeypatch.setattr(problem_module, "_run", lambda p, inputs: ran.append(p) or run(p, inputs))
    again = fit("tome", data(), budget="flops=80%")
    assert again.schedule == first.schedule
    assert len(ran) <= 1  # on one batch, to know what the outputs are
    assert not any(spent["passes"] for spent in again.effort.values())
    problem = Problem(canonical(), recipes.get("tome"), Batches.of(data(seed=9), program()), cache=folder())
    assert not problem._known  # other data, other measurements


def test_held_out_data_change_nothing() -> None:
    poison = {"x": torch.full((4, 3, 32, 32), float("nan")), "labels": torch.full((4,), 99)}
    found = fit("tome", data(), budget="flops=80%", held_out=poison)
    assert found.schedule == fitted().schedule
    assert math.isnan(found.held_out["deviation"]) and found.held_out["accuracy"] == 0


def test_data_are_read_a_batch_at_a_time() -> None:
    problem = Problem(canonical(), recipes.get("tome"), Batches.of(data(), program()))
    held = 0

    def batches() -> Iterator[Any]:
        nonlocal held
        for _ in range(4):
            held += 1
            yield [images(2)], None
            held -= 1
            assert held == 0

    assert problem.evaluate(alone(0, 4), batches()).samples == 8


def test_an_interrupted_search_keeps_the_best() -> None:
    @dataclass
    class Interrupted:
        def schedules(self, problem: Problem, budget: float, seed: int) -> Iterator[Schedule]:
            yield Schedule(r=[0, 30, 10])
            raise KeyboardInterrupt

    found = fit("tome", data(), budget="flops=80%", calibrator=Interrupted())
    assert found.interrupted and len(found.trials) == 1
    assert found.schedule is not None


def test_several_recipes_share_a_front() -> None:
    found = fit("tome,evit", data(), budget="flops=80%")
    assert {point["recipe"] for point in found.front} == {"tome", "evit"}
    assert found.chosen.deviation == min([found.chosen.deviation, *(c.chosen.deviation for c in found.others)])


def test_a_largest_loss_finds_the_least_cost() -> None:
    found = fit("tome", {"x": data()["x"]}, budget="drop=0.5%")
    assert found.share < 1.0
    assert found.chosen.deviation <= 0.005 + 1e-9


def test_calibrate_gives_the_schedule() -> None:
    found = tokenopt.calibrate(program(), "tome", data(), budget="flops=80%", calibrator=FEW, cache=folder())
    assert found == fitted().schedule


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(BudgetError, match="cannot meet") as error:
        fit("tome", data(), budget="flops=5%")
    assert error.value.exit_code == 5
    with pytest.raises(UsageError, match="no schedule to calibrate"):
        learned = {"name": "learned", "select": "threshold", "fuse": "weighted", "schedule": {"r": 4}}
        fit(learned, data(), budget="flops=80%")
    with pytest.raises(UsageError, match="no schedule to calibrate"):
        fit("agent", data(), budget="flops=80%")
    with pytest.raises(UsageError, match="needs data"):
        tokenopt.optimize(program(), recipe="tome", budget="latency=0.9x")
    with pytest.raises(UsageError, match="no target"):
        Target("abacus")


# -- strategies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [Stages(trials=2), DecayCurve()])
def test_the_strategies_of_papers_meet_the_budget(strategy: calibration.Calibrator) -> None:
    found = fit("tome", data(), budget="flops=80%", calibrator=strategy)
    assert 1 <= len(found.trials) <= 2
    assert all(e.cost <= 0.8 for e in found.trials)


def test_a_stage_is_solved_for_the_budget() -> None:
    table = Table((0, 1, 2), 16, np.zeros((3, 3)), np.array([[3.0] * 4] + [[0, -0.25, -0.5, -0.75]] * 3))
    found = _last_solved(table, [0, 2], [0.5], 1.4)
    assert found[:2] == [8, 0] and expected(table, found) <= 1.4 < expected(table, [8, 0, found[2] - 1])
    assert _last_solved(table, [0, 2], [1.0], 0.5) is None


def test_the_decay_curve_is_the_nearest_exponential() -> None:
    x = np.arange(1, 7) / 6
    wanted = 0.1 + 0.9 * (np.exp(-3 * x) - np.exp(-3)) / (1 - np.exp(-3))
    np.testing.assert_allclose(decay(wanted, 0.1), wanted, atol=0.01)
    assert (np.diff(decay(np.linspace(0, 1, 6), 0.1)) < 0).all()


# -- latency -----------------------------------------------------------------------------------------------------------


def test_a_price_goes_through_its_points() -> None:
    price = Price.fitted(10.0, [(0.6, 1, 7.2), (0.98, 4, 10.2)])
    assert price(1.0, 0) == pytest.approx(1.0)
    assert price(0.6, 1) == pytest.approx(0.72)
    assert price(0.98, 4) == pytest.approx(1.02)


@dataclass(frozen=True)
class Clockwork(Target):
    """Milliseconds that are made up: proportional to operations, and so much for each reduction."""

    each: float = 0.0
    off: float = 1.0

    def race(self, programs: Any) -> dict[str, float]:
        from tokenopt.cost import program_flops

        def ms(p: Program) -> float:
            reductions = sum("merge" in str(n.target) for n in p.graph.nodes)
            return program_flops(p) / program_flops(canonical()) + self.each * reductions

        found = {name: ms(p) for name, p in programs.items()}
        return {name: t * (self.off if name == "reduced" else 1.0) for name, t in found.items()}


def test_a_latency_is_met_by_solving_again() -> None:
    found = fit("tome", data(), budget="latency=0.85x", target=Clockwork(off=1.05))
    assert found.latency["met"] and found.latency["ratio"] <= 0.85
    assert found.share < 0.85


def test_a_latency_that_cannot_be_met() -> None:
    options = {"budget": "latency=0.85x", "target": Clockwork(off=3.0)}
    with pytest.raises(BudgetError, match="cannot meet the budget latency"):
        fit("tome", data(), **options)
    found = fit("tome", data(), keep_best=True, **options)
    assert not found.latency["met"]


def test_the_gate_takes_back_what_does_not_pay() -> None:
    times = {frozenset({0, 1, 2}): 8.0, frozenset({1, 2}): 9.0, frozenset({0, 2}): 7.5, frozenset({0}): 8.5}

    @dataclass(frozen=True)
    class Fake(Target):
        def race(self, programs: Any) -> dict[str, float]:
            return {name: times[p] for name, p in programs.items()}

    kept, rows = gate({0: "a", 1: "b", 2: "c"}, lambda numbers: numbers, Fake())
    assert kept == {0, 2}
    assert [row["kept"] for row in rows] == [True, False, True]
    assert "without" in rows[1]["why"]


def test_modelled_latency_is_said_to_be() -> None:
    target = Target("eager", modelled=True)
    assert "modelled" in target.source
    assert fit("tome", data(), budget="latency=0.9x", target=target).latency["ratio"] <= 0.9


# -- the command line --------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    return end.value.code


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tokenopt.calibration.fitter.Search", lambda: FEW)
    np.savez(tmp_path / "data.npz", **{name: t.numpy() for name, t in data(10).items()})
    return Path(program().save(tmp_path / "model.pt2")), tmp_path / "data.npz"


def test_calibrate_writes_a_schedule_that_optimize_takes(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, inputs = files
    out = tmp_path / "schedule.json"
    assert run("calibrate", model, "--budget", "flops=80%", "--data", inputs, "-o", out) == 0
    written = json.loads(out.read_text())
    assert written["calibration"]["held_out"]["samples"] == 2 and written["recipe"] == "tome"
    assert list((tmp_path / "cache" / "tokenopt" / "calibration").glob("*.json"))
    report = tokenopt.optimize(program(), recipe="tome", schedule=str(out)).report
    assert report.flops["after"] <= 0.8 * report.flops["before"]
    assert run("calibrate", model, "--budget", "flops=1%", "--data", inputs, "-o", out) == 5
    assert run("calibrate", model, "--budget", "flops=80%", "-o", out) == 2
    assert run("calibrate", model, "--data", inputs, "-o", out) == 2


def test_optimize_fits_a_budget_to_data(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, inputs = files
    out = tmp_path / "out"
    assert run("optimize", model, "--max-drop", "10%", "--data", inputs, "--recipe", "tome", "-o", out) == 0
    report = tokenopt.Report.load(out / "report.json")
    assert report.calibration["budget"] == "drop=10%"
    assert report.calibration["schedule"] == report.schedule
