"""From a budget and data to a schedule: a table per layer, a solver on it, and trials of whole models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from math import exp
from pathlib import Path
from typing import Any, Protocol

from tokenopt import recipes
from tokenopt.budget import within
from tokenopt.calibration.problem import LAYERWISE, Batch, Evaluation, Problem, schedule_of
from tokenopt.calibration.solve import Table, solve
from tokenopt.errors import BudgetError, UsageError
from tokenopt.passes.flatten_grids import FlattenGrids
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program
from tokenopt.schedule import Budget, Schedule
from tokenopt.tokens.recipe import TokenRecipe

TRIALS = 24
_SPREAD = 1.5  # of the log of a layer's weight, in trials
_TIGHTEN = 6  # rewrites until the real program meets the budget that the table promised
BASELINES: dict[str, Any] = {
    "constant": {"r": 8},
    "falling": {"r": (8, -1.0)},
    "rising": {"r": (8, 1.0)},
    "staged": {"keep": 0.7, "layers": [0.25, 0.5, 0.75]},
}


class Calibrator(Protocol):
    """A strategy: schedules to try, each informed by how those before it did."""

    def schedules(self, problem: Problem, budget: float, seed: int) -> Iterator[Schedule]:
        """Yields a schedule that costs at most ``budget``, a share of the dense operations; it is evaluated then."""
        ...


@dataclass(frozen=True)
class Search:
    """Dynamic programming on the table of layers, refined by a search over the layers' weights (TPE of optuna).

    Every trial meets the budget: what is searched is how much each layer's error counts.
    """

    trials: int = TRIALS

    def schedules(self, problem: Problem, budget: float, seed: int) -> Iterator[Schedule]:
        """The solution of the table first, then trials."""
        import optuna

        table = problem.table()
        first = met(problem, table, budget)
        yield first
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(self.trials // 3, 1))
        study = optuna.create_study(sampler=sampler)
        known = {str(first): problem.evaluate(first).deviation}
        study.enqueue_trial({f"layer{n}": 0.0 for n in table.layers})  # the first
        for _ in range(self.trials + 1):
            trial = study.ask()
            weights = {n: exp(trial.suggest_float(f"layer{n}", -_SPREAD, _SPREAD)) for n in table.layers}
            schedule = met(problem, table, budget, weights)
            if str(schedule) not in known:
                yield schedule
                known[str(schedule)] = problem.evaluate(schedule).deviation
            study.tell(trial, known[str(schedule)])


def met(problem: Problem, table: Table, budget: float, weights: dict[int, float] | None = None) -> Schedule:
    """The solution of the table whose program, rewritten, costs at most the budget.

    Raises:
        BudgetError: if none does.
    """
    target = budget * table.dense - problem.off
    for _ in range(_TIGHTEN):
        removed = solve(table, target, weights)
        if removed is None:
            break
        schedule = schedule_of(table.layers, removed)
        over = problem.share(schedule) - budget
        if over <= 0:
            return schedule
        problem.off += max(over, 0.0005) * table.dense
        target = budget * table.dense - problem.off
    raise BudgetError(
        f"recipe {problem.recipe.name} cannot meet {budget:.0%} of the dense operations",
        why="removing as much as every layer can is not enough" if removed is None else "its layers remove too little",
        hint="allow more, or take a recipe that removes in earlier layers",
    )


@dataclass
class Calibration:
    """What a calibration found.

    Attributes:
        schedule: the best that meets the budget.
        recipe, budget, metric: what was asked for.
        chosen: its evaluation on the data that were fitted on; ``held_out`` on data that were not, where there are any.
        baselines: fixed schedules of the same recipe, and random tokens, at the same budget.
        trials: everything that was tried.
        sensitivity: [{layer, ratio, deviation}] of every layer alone.
        passes: forward passes over the data, in all; ``table_passes`` of them for the table.
        seconds: it took.
    """

    schedule: Schedule
    recipe: TokenRecipe
    budget: str
    metric: str
    chosen: Evaluation
    held_out: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, Evaluation] = field(default_factory=dict)
    trials: list[Evaluation] = field(default_factory=list)
    sensitivity: list[dict[str, Any]] = field(default_factory=list)
    passes: float = 0.0
    table_passes: float = 0.0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a report's ``calibration``."""
        points = [{"name": name, "kind": "random" if name == "random" else "fixed", "cost": e.share,
                   "deviation": e.deviation, "chosen": False} for name, e in self.baselines.items()]  # fmt: skip
        points += [{"name": e.schedule, "kind": "calibrated", "cost": e.share, "deviation": e.deviation,
                    "chosen": e.schedule == self.chosen.schedule} for e in self.trials]  # fmt: skip
        return {
            "budget": self.budget,
            "metric": self.metric,
            "recipe": self.recipe.name,
            "schedule": self.schedule.to_dict(),
            "fitted": asdict(self.chosen),
            "held_out": self.held_out,
            "sensitivity": self.sensitivity,
            "front": points,
            "trials": [{"number": i, "cost": e.share, "deviation": e.deviation} for i, e in enumerate(self.trials)],
            "passes": {"table": round(self.table_passes, 2), "all": round(self.passes, 2)},
            "seconds": self.seconds,
        }


def fit(
    program: Program,
    recipe: Any,
    data: Iterable[Batch],
    *,
    budget: str | Budget,
    held_out: Iterable[Batch] | None = None,
    metric: str | None = None,
    calibrator: Calibrator | None = None,
    seed: int = 0,
    cache: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Calibration:
    """Fits the schedule of a recipe to data under a budget.

    The data are gone through about ten times for the table of layers (each layer alone, at three shares), once for each
    trial and baseline. Interrupted, it keeps the best so far (`KeyboardInterrupt` ends the search, not the call).

    Args:
        program: as captured, or in canonical form.
        recipe: a name, a file or a recipe that reduces tokens.
        data: batches of (inputs as flat tensors, labels or None), gone through several times.
        budget: "flops=60%" or "tokens=60%".
        held_out: data that are not fitted on, for the numbers of a report.
        metric: kl, cosine, last-token, relative, or package.module:function; what suits the outputs by default.
        calibrator: `Search` by default.
        seed: the same seed gives the same schedule.
        cache: folder for what was measured, so that a second budget is quick; `cache_folder` is the usual one.

    Raises:
        BudgetError: if no schedule meets the budget.
        UsageError: for a recipe without a schedule of layers, or data that do not fit.
    """
    start = time.perf_counter()
    found = recipes.get(recipe)
    if not isinstance(found, TokenRecipe):
        raise UsageError(f"recipe {found} has no schedule to calibrate", why="it gives attention a pattern")
    budget = Budget.parse(budget)
    canonical = Pipeline([FoldConstants(), RaiseAttention(), FlattenGrids()]).run(program).program
    problem = Problem(canonical, found, data, metric, cache, progress)
    baselines = dict(_baselines(problem, budget))
    calibrator = calibrator or Search()
    trials: list[Evaluation] = []
    schedules: dict[str, Schedule] = {}
    limit = budget.share if budget.metric == "flops" else None
    try:
        if found.place.name in LAYERWISE and limit is not None:
            for schedule in calibrator.schedules(problem, limit, seed):
                schedules[str(schedule)] = schedule
                trials.append(problem.evaluate(schedule))
                best = min(trials, key=lambda e: e.deviation)
                progress(f"search, deviation {best.deviation:.3g}", len(trials), TRIALS + 1)
    except KeyboardInterrupt:
        if not trials:
            raise
    problem.save()
    own = {name: e for name, (e, _) in baselines.items() if name != "random"}
    schedules |= {e.schedule: schedule for name, (e, schedule) in baselines.items() if name != "random"}
    candidates = [*trials, *own.values()]
    if not candidates:
        raise BudgetError(f"recipe {found.name} cannot meet the budget {budget}", hint="allow more, or another recipe")
    chosen = min(candidates, key=lambda e: (e.deviation, e.schedule))
    schedule = schedules[chosen.schedule]
    result = Calibration(schedule, found, str(budget), problem.metric, chosen, trials=trials, passes=problem.passes)
    result.baselines = {name: e for name, (e, _) in baselines.items()}
    if trials:
        result.sensitivity = _sensitivity(problem)
    if held_out is not None:
        result.held_out = _held_out(problem, schedule, baselines, held_out)
    result.seconds = time.perf_counter() - start
    return result


def _baselines(problem: Problem, budget: Budget) -> Iterator[tuple[str, tuple[Evaluation, Schedule]]]:
    """Fixed schedules of the recipe at the same budget, its own default, and random tokens; those that can meet it."""
    shapes = dict(BASELINES) if problem.recipe.place.name in LAYERWISE else {}
    if problem.recipe.schedule:
        shapes["default"] = problem.recipe.schedule
    for name, shape in shapes.items():
        try:
            step = within(budget, ReduceTokens(problem.recipe, shape), problem.program)
        except (BudgetError, UsageError):
            continue
        schedule = Schedule.parse(step.schedule)
        yield name, (problem.evaluate(schedule), schedule)
    other = recipes.get("random")
    if problem.recipe.name != "random" and problem.recipe.place.name in LAYERWISE:
        try:
            step = within(budget, ReduceTokens(other), problem.program)
        except (BudgetError, UsageError):
            return
        blind = Problem(problem.program, other, problem.batches, problem.metric, problem.cache)
        schedule = Schedule.parse(step.schedule)
        yield "random", (blind.evaluate(schedule), schedule)


def _sensitivity(problem: Problem) -> list[dict[str, Any]]:
    from tokenopt.calibration.solve import RATIOS

    table = problem.table()
    return [
        {"layer": layer, "ratio": ratio, "deviation": float(table.error[i, j])}
        for i, layer in enumerate(table.layers)
        for j, ratio in enumerate(RATIOS[: table.error.shape[1]])
    ]


def _held_out(
    problem: Problem, schedule: Schedule, baselines: dict[str, tuple[Evaluation, Schedule]], data: Iterable[Batch]
) -> dict[str, Any]:
    found = problem.evaluate(schedule, data)
    fixed = {name: asdict(problem.evaluate(other, data)) for name, (_, other) in baselines.items() if name != "random"}
    accuracy, samples = found.accuracy, found.samples
    return {
        "deviation": found.deviation,
        "deviation_ci": 1.96 * found.spread,
        "accuracy": accuracy,
        "accuracy_dense": problem.accuracy(data),
        "accuracy_ci": None if accuracy is None else 1.96 * (accuracy * (1 - accuracy) / samples) ** 0.5,
        "samples": samples,
        "baselines": fixed,
    }


def calibrate(
    program: Program, recipe: Any, data: Iterable[Batch], *, budget: str | Budget, **options: Any
) -> Schedule:
    """The schedule of `fit`; see there for what it takes."""
    return fit(program, recipe, data, budget=budget, **options).schedule

