"""The calibrators of papers, as strategies: what they choose, under the same budget and on the same data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tokenopt.calibration.problem import Problem, schedule_of
from tokenopt.calibration.search import met
from tokenopt.calibration.solve import Table, expected, scaled
from tokenopt.diagnostics import diagnose
from tokenopt.errors import BudgetError, UsageError
from tokenopt.schedule import Schedule


@dataclass(frozen=True)
class Stages:
    """Shares that are kept at a few layers, by Bayesian optimisation; the budget gives the last of them.

    Attributes:
        stages: shares of the depth.
        least: of the tokens, that one stage keeps.
        trials: programs that are evaluated, at most.

    Source: VFlowOpt, arXiv:2508.05211: there a Gaussian process over three shares and settings of the score, on 30
    samples and in 300 calls, by the cosine of the last token (the metric last-token); here optuna's TPE.
    """

    stages: tuple[float, ...] = (0.25, 0.5, 0.75)
    least: float = 0.25
    trials: int = 24

    def schedules(self, problem: Problem, budget: float, seed: int) -> Iterator[Schedule]:
        """Those that meet the budget; others count as the worst."""
        import optuna

        table = problem.table()
        numbers = sorted({min(int(s * problem.depth), max(table.layers)) for s in self.stages} & set(table.layers))
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        known: dict[str, float] = {}
        for _ in range(3 * self.trials):
            if len(known) >= self.trials:
                break
            trial = study.ask()
            keeps = [trial.suggest_float(f"stage{n}", max(self.least, table.least), 1.0) for n in numbers[:-1]]
            try:
                schedule = met(problem, table, budget, lambda t, k=keeps: _last_solved(table, numbers, k, t))
            except BudgetError:
                problem.off = 0.0
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            if str(schedule) not in known:
                yield schedule
                known[str(schedule)] = problem.evaluate(schedule).deviation
            study.tell(trial, known[str(schedule)])


def _last_solved(table: Table, numbers: list[int], keeps: list[float], budget: float) -> list[int] | None:
    """Tokens to remove at the table's layers: as the shares say at all stages but the last, which meets the budget."""
    left, counts = table.tokens, dict.fromkeys(table.layers, 0)
    for number, keep in zip(numbers, keeps, strict=False):
        counts[number] = left - max(round(keep * left), 1)
        left -= counts[number]
    for removed in range(left - max(int(np.ceil(table.least * left)), 1) + 1):
        counts[numbers[-1]] = removed
        if expected(table, list(counts.values())) <= budget:
            return list(counts.values())
    return None


@dataclass(frozen=True)
class DecayCurve:
    """One schedule, without a search: the tokens that are left decay as information flows among them less and less.

    The shares A exp(-B (x - C)) + D are 1 at the first layer and ``last`` at the last, which leaves one parameter
    to fit to the flow; then tokens are removed as the curve falls, scaled to the budget.

    Attributes:
        last: the share that the curve ends at.

    Source: AdaToken-3D, with the flow of `tokenopt.diagnostics.diagnose`; there the stages are chosen by hand from it.
    """

    last: float = 0.1

    def schedules(self, problem: Problem, budget: float, seed: int) -> Iterator[Schedule]:
        """The one."""
        table = problem.table()
        inputs, _ = next(iter(problem.batches))
        flow = {row["site"]: row["flow"] for row in diagnose(problem.program, [inputs]).get("layers", ())}
        known = [flow.get(problem.places[layer][0]) for layer in table.layers]
        if any(value is None for value in known):
            raise UsageError("there is no flow of information to fit a curve to", why="an attention is not recognised")
        shares = decay(np.array(known, dtype=float), self.last)
        removed = np.round(table.tokens * -np.diff(shares, prepend=1.0)).astype(int).clip(0)
        shape = Schedule(r=list(schedule_of(table.layers, removed.tolist()).r))
        yield met(problem, table, budget, lambda target: scaled(table, shape, problem.depth, target))


def decay(flow: np.ndarray, last: float) -> np.ndarray:
    """The exponential from 1 to ``last`` that is nearest to the flow, [layers], in [0, 1]; removal starts at once."""
    x = np.arange(1, len(flow) + 1) / len(flow)
    rates = np.geomspace(0.1, 20.0, 200)[:, None]
    curves = last + (1 - last) * (np.exp(-rates * x) - np.exp(-rates)) / (1 - np.exp(-rates))
    return curves[((curves - flow) ** 2).sum(1).argmin()]
