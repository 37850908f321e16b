"""The calibrators of papers, as strategies: what they choose, under the same budget and on the same data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenopt.calibration.metrics import metric_for
from tokenopt.calibration.problem import Problem, alone, schedule_of
from tokenopt.calibration.search import FIXED, met
from tokenopt.calibration.solve import Table, expected, scaled
from tokenopt.diagnostics import diagnose
from tokenopt.errors import BudgetError, UsageError
from tokenopt.fitting import fit_thresholds, threshold_counts
from tokenopt.schedule import Schedule
from tokenopt.tokens.select import Threshold


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


@dataclass(frozen=True)
class Thresholds:
    """As many tokens in each layer as thresholds of similarity merge there, mean over the data.

    The thresholds are those above which a batch has as many pairs as the recipe's own schedule, scaled to the budget,
    merges. What they merge is scaled to the budget again.

    Source: Wang et al., DyMU, arXiv:2504.17040, sec. 3.1. There the number differs from image to image, which saves
        nothing where shapes are static; here every image has the mean.
    """

    def schedules(self, problem: Problem, budget: float, seed: int) -> Iterator[Schedule]:
        """The one.

        Raises:
            UsageError: for a recipe that does not merge pairs of tokens.
        """
        recipe = problem.recipe
        if recipe.select.name != "bipartite":
            why = f"they are for select 'bipartite', and it has '{recipe.select.name}'"
            raise UsageError(f"recipe {recipe.name} merges no pairs that thresholds could choose", why=why)
        table, own = problem.table(), Schedule.parse(recipe.schedule or FIXED["constant"])
        start = met(problem, table, budget, lambda target: scaled(table, own, problem.depth, target))
        masked = replace(recipe, select=Threshold(metric=recipe.select.metric))
        values = fit_thresholds(masked, start, problem.program, (inputs for inputs, _ in problem.batches))
        masked = replace(masked, select=replace(masked.select, values=tuple(values)))
        counts = threshold_counts(masked, start, problem.program, (inputs for inputs, _ in problem.batches))
        problem.passes += 2
        shape = Schedule(r=[round(counts.get(layer, 0.0)) for layer in range(max(counts) + 1)])
        problem.off = 0.0  # that of other shapes says nothing of this one
        yield met(problem, table, budget, lambda target: scaled(table, shape, problem.depth, target))


@dataclass(frozen=True)
class ExitLayer:
    """All tokens leave before one layer: the first within the budget from which on the answers do not need them.

    Where the answers need them in all layers within the budget, it is the last of these. A recipe that has to keep a
    token keeps that one.

    Attributes:
        agreement: share of the data on which the class of greatest score has to stay the same.
        loss: factor by which the loss may grow, where labels are known.

    Source: Wu et al., Dynamic Visual-Token Exit, arXiv:2411.19628: its labels, which are there what gates learn that
        let each sample exit at a layer of its own.
    """

    agreement: float = 0.99
    loss: float = 1.03

    def schedules(self, problem: Problem, budget: float, seed: int) -> Iterator[Schedule]:
        """The one.

        Raises:
            UsageError: for a recipe that cannot remove all tokens at once, or a model whose outputs are no answers.
        """
        table = problem.table()
        if table.least > 0.25 or not table.chained:
            what = "gives all tokens back" if not table.chained else f"keeps {table.least:.0%} or more at a layer"
            raise UsageError(f"recipe {problem.recipe.name} lets no token leave for good", why=f"it {what}",
                             hint="a recipe that drops tokens, at place mid or block")  # fmt: skip
        exits = [alone(layer, problem.places[layer][1] - 1) for layer in table.layers]
        within = [schedule for schedule in exits if problem.cost(schedule) <= budget]
        if not within:
            raise BudgetError(
                f"recipe {problem.recipe.name} cannot meet {budget:.0%} of the dense model's {problem.price.name}",
                why="even if all tokens leave at its first layer", hint="allow more",
            )  # fmt: skip
        yield next((schedule for schedule in within[:-1] if self._unneeded(problem, schedule)), within[-1])

    def _unneeded(self, problem: Problem, schedule: Schedule) -> bool:
        """The label of a layer."""
        causal, same, losses = problem.causal, [], []
        for found, dense, labels in problem.outputs(schedule):
            after, before = (_scores(outputs, causal) for outputs in (found, dense))
            same.append((after.argmax(-1) == before.argmax(-1)).float())
            if labels is not None and not causal and int(labels.max()) < before.shape[1]:
                losses.append([F.cross_entropy(t, labels.long(), reduction="sum") for t in (after, before)])
        problem.passes += 1
        if float(torch.cat(same).mean()) <= self.agreement:
            return False
        loss, usual = map(sum, zip(*losses, strict=True)) if losses else (0.0, 1.0)
        return bool(loss < self.loss * usual)


def _scores(outputs: Sequence[Tensor], causal: bool) -> Tensor:
    """[B, classes], or of the last token [B, words].

    Raises:
        UsageError: if the model returns no such scores.
    """
    kind = metric_for(outputs, causal)
    if kind not in ("kl", "last-token"):
        why = f"it returns {', '.join(str(list(t.shape)) for t in outputs)}"
        raise UsageError("the model has no answers to compare", why=why, hint="another strategy")
    first = next(t for t in outputs if t.dtype.is_floating_point).float()
    return first[:, -1] if kind == "last-token" else first
