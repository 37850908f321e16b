"""The usual strategy: a solver on the table of layers, and trials of whole models. Every schedule meets the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import exp
from typing import Any, ClassVar, Protocol

from tokenopt.calibration.problem import Problem, schedule_of
from tokenopt.calibration.solve import Table, scaled, solve
from tokenopt.errors import BudgetError
from tokenopt.schedule import Schedule

TRIALS = 24
_SPREAD = 2.5  # of the log of a layer's weight, in trials: layers differ by orders of magnitude
_TIGHTEN = 6  # rewrites until the real program meets the budget that the table promised
FIXED: dict[str, Any] = {
    "constant": {"r": 8},
    "falling": {"r": (8, -1.0)},
    "rising": {"r": (8, 1.0)},
    "staged": {"keep": 0.7, "layers": [0.25, 0.5, 0.75]},
}


class Calibrator(Protocol):
    """A strategy: schedules to try, each informed by how those before it did."""

    def schedules(self, problem: Problem, budget: float, seed: int) -> Iterator[Schedule]:
        """Yields a schedule that costs at most ``budget``, as ``problem.cost`` counts; it is evaluated then."""
        ...


@dataclass(frozen=True)
class Search:
    """Dynamic programming on the table of layers, refined by a search (TPE of optuna).

    Every trial meets the budget. What is searched is how much each layer's error counts, and how far to go from the
    solution towards the best fixed schedule, which the table may not see the merits of.
    """

    trials: int = TRIALS
    wary: ClassVar[bool] = True  # a fixed schedule is taken unless a trial is surely better

    def schedules(self, problem: Problem, budget: float, seed: int) -> Iterator[Schedule]:
        """The solution of the table first, then trials; what leads to a known schedule is no trial."""
        import optuna

        table = problem.table()
        first = solved(problem, budget)
        yield first
        deviation = lambda schedule: problem.evaluate(schedule).deviation  # noqa: E731
        usual = min(fixed_schedules(problem, table, budget).values(), key=deviation, default=first)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(self.trials // 3, 1))
        study = optuna.create_study(sampler=sampler)
        known = {str(first): deviation(first), str(usual): deviation(usual)}
        for towards in (0.0, 0.5):
            study.enqueue_trial({f"layer{n}": 0.0 for n in table.layers} | {"towards": towards})
        for _ in range(3 * self.trials):
            if len(known) > self.trials:
                break
            trial = study.ask()
            weights = {n: exp(trial.suggest_float(f"layer{n}", -_SPREAD, _SPREAD)) for n in table.layers}
            towards = trial.suggest_float("towards", 0.0, 1.0)
            removed = solve(table, budget - problem.off, weights)
            if removed is None:
                break
            between = _between(problem, table, schedule_of(table.layers, removed), usual, towards)
            schedule = met(problem, table, budget, between)
            if str(schedule) not in known:
                yield schedule
                known[str(schedule)] = deviation(schedule)
            study.tell(trial, known[str(schedule)])


def _between(
    problem: Problem, table: Table, a: Schedule, b: Schedule, towards: float
) -> Callable[[float], list[int] | None]:
    """Schedules of counts between two, scaled to a target."""
    depth = max(problem.depth, len(a.r), len(b.r))
    counts = [[s.r[i] if i < len(s.r) else 0 for i in range(depth)] for s in (a, b)]
    mixed = Schedule(r=[round((1 - towards) * x + towards * y) for x, y in zip(*counts, strict=True)])
    return lambda target: scaled(table, mixed, depth, target)


def fixed_schedules(problem: Problem, table: Table, budget: float) -> dict[str, Schedule]:
    """Usual shapes and the recipe's own, scaled to the budget; those that can meet it."""
    found = {}
    for name, shape in (FIXED | {"default": problem.recipe.schedule or FIXED["constant"]}).items():
        shape = Schedule.parse(shape)
        if not shape.is_identity:
            with suppress(BudgetError):
                found[name] = met(problem, table, budget, lambda t, s=shape: scaled(table, s, problem.depth, t))
    return found


def solved(problem: Problem, budget: float) -> Schedule:
    """What keeps most by the table of layers.

    Raises:
        BudgetError: if nothing meets the budget.
    """
    table = problem.table()
    return met(problem, table, budget, lambda target: solve(table, target))


def met(problem: Problem, table: Table, budget: float, choose: Callable[[float], list[int] | None]) -> Schedule:
    """A schedule whose program, rewritten, costs at most the budget.

    Args:
        choose: what to remove at each layer, so that it costs a target by the table; None if that cannot be.

    Raises:
        BudgetError: if none does.
    """
    for _ in range(_TIGHTEN):
        removed = choose(budget - problem.off)
        if removed is None:
            break
        schedule = schedule_of(table.layers, removed)
        over = problem.cost(schedule) - budget
        if over <= 0:
            return schedule
        problem.off += max(over, 0.0005)
    raise BudgetError(
        f"recipe {problem.recipe.name} cannot meet {budget:.0%} of the dense model's {problem.price.name}",
        why="removing as much as every layer can is not enough" if removed is None else "its layers remove too little",
        hint="allow more, or take a recipe that removes in earlier layers",
    )
