"""From a budget and data to a schedule: what a strategy finds, beside fixed ones, on the target and held-out data."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from tokenopt import recipes, registry
from tokenopt.calibration.learned import problem_of
from tokenopt.calibration.price import Price, Target, gate
from tokenopt.calibration.problem import Batches, Evaluation, Problem, alone, schedule_of
from tokenopt.calibration.result import Calibration
from tokenopt.calibration.search import FIXED, Calibrator, Search, fixed_schedules, solved
from tokenopt.calibration.solve import RATIOS, Table
from tokenopt.calibration.workers import named_workers
from tokenopt.errors import BudgetError, UsageError
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.program import Program
from tokenopt.schedule import Budget, Schedule

AUTO = ("tome", "pitome", "evit", "uniform-grid", "nat", "biformer", "paro")  # tokens layer by layer, and patterns
_BUILDS = 3  # engines until one meets the latency that the price promised
_HALVINGS = 6  # of the range of costs, until the least that loses no more than it may

Progress = Callable[[str, int, int], None]


def fit(
    program: Program,
    recipe: Any,
    data: Any,
    *,
    budget: str | Budget,
    held_out: Any = None,
    metric: str | None = None,
    calibrator: Calibrator | str | None = None,
    target: Target | None = None,
    seed: int = 0,
    cache: Path | None = None,
    keep_best: bool = False,
    workers: str | None = None,
    weights: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Calibration:
    """Fits the schedule of a recipe to data under a budget.

    The data are gone through about ten times for the table of layers (each layer alone, at three shares), and once for
    each trial and fixed schedule. Interrupted by a `KeyboardInterrupt`, the search keeps the best so far.

    Args:
        program: as captured, or in canonical form.
        recipe: a name, a file or a recipe; several names with commas between them, a list, or "auto" for `AUTO`: the
            one that keeps most is chosen, those that cannot are left out. Parts that are learned are learned first.
        data: anything that `open_data` takes, with or without labels; read several times, a batch at a time.
        budget: "flops=60%", "tokens=60%", "latency=0.6x", "latency=4ms" or "drop=0.5%".
        held_out: data that are not fitted on, for the numbers of a report.
        metric: kl, cosine, last-token, relative, or package.module:function; what suits the outputs by default.
        calibrator: a strategy, or its name; `Search` by default.
        target: where latency counts. What does not pay there is taken back, even if that costs operations or tokens.
        seed: the same seed gives the same schedule, where latency is not measured.
        cache: folder for what was measured, so that a second budget is quick; `cache_folder` is the usual one.
        keep_best: return the best found where nothing meets a budget of latency.
        workers: "ray", or "ray:HOST:PORT" for a cluster that runs: the data, a batch at a time, are gone through on
            Ray's processes. The schedule is the same, however many there are. This process alone by default.
        weights: where the weights of a single recipe that learns are kept (.safetensors), so that it need not again.
        progress: called with (stage, done, total).

    Raises:
        BudgetError: if no schedule meets the budget.
        UsageError: for a recipe without a schedule of layers, data that do not fit, or workers that are not there.
        TokenoptError: if workers die again and again.
    """
    budget = Budget.parse(budget)
    names = candidates(recipe)
    kinds = [problem_of(one) for one in names]
    strategy = registry.load("tokenopt.strategies", calibrator)() if isinstance(calibrator, str) else calibrator
    canonical = canonicalize(program).program
    if budget.metric == "latency" and target is None:
        target = Target()
    batches = Batches.of(data, program)
    others = None if held_out is None else Batches.of(held_out, program)
    found: list[tuple[float, Calibration]] = []
    refused: list[BudgetError | UsageError] = []
    with named_workers(workers) as pool:
        for one, kind in zip(names, kinds, strict=True):
            kept = weights if len(names) == 1 else None
            problem = kind(canonical, one, batches, metric, cache, progress, workers=pool, weights=kept)
            try:
                fitting = _Fit(problem, budget, strategy or Search(), target, seed, keep_best)
                calibration = fitting.run(others)
                found.append((fitting.score(calibration), calibration))
            except (BudgetError, UsageError) as error:
                refused.append(error)
            finally:
                problem.save()
            if found and found[-1][1].interrupted:
                break
    if not found:
        raise refused[0]
    _, best = min(found, key=lambda scored: scored[0])
    best.others = [c for _, c in found if c is not best]
    return best


def candidates(recipe: Any) -> list[Any]:
    """The recipes that a text names: one, some with commas between them, or "auto"; or a list of recipes."""
    if isinstance(recipe, str) and not Path(recipe).suffix:
        recipe = AUTO if recipe == "auto" else [n.strip() for n in re.split(r",(?![^(]*\))", recipe)]
    return [recipes.get(one) for one in (recipe if isinstance(recipe, (list, tuple)) else [recipe])]


@dataclass
class _Fit:
    """One recipe's calibration."""

    problem: Problem
    budget: Budget
    calibrator: Calibrator
    target: Target | None
    seed: int
    keep_best: bool
    found: dict[str, Schedule] = field(default_factory=dict)
    trials: list[str] = field(default_factory=list)
    fixed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    effort: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mark = 0.0, time.perf_counter()

    def _spent(self, stage: str) -> None:
        """Passes and time since the last call were spent on this stage."""
        mark = self.problem.passes, time.perf_counter()
        spent = self.effort.setdefault(stage, {"passes": 0.0, "seconds": 0.0})
        for name, now, before in zip(spent, mark, self._mark, strict=True):
            spent[name] += now - before
        self._mark = mark

    def run(self, held_out: Batches | None) -> Calibration:
        problem, budget = self.problem, self.budget
        layerwise, chooses = problem.layerwise, not getattr(self.calibrator, "wary", False)
        if not layerwise and chooses:
            why = "it has no schedule of layers: one number is scaled to the budget"
            raise UsageError(f"recipe {problem.recipe.name} cannot be chosen for by a strategy", why=why)
        if layerwise:
            problem.table()
            self._spent("layers")
        latency: dict[str, Any] = {}
        rows: list[dict[str, Any]] = []
        if budget.metric == "latency":
            schedule, share, rows, latency = self._timed()
        else:
            if budget.metric == "drop":
                timed = self.target is not None and problem.counted == "flops"
                problem.price = self._price(self.target) if timed else Price(problem.counted)
                share = self._least()
            else:
                problem.price, share = Price(budget.metric), budget.share
            schedule = self._search(share)
            if self.target is not None and layerwise:
                schedule, rows = self._gated(schedule)
        evaluate = problem.evaluate
        result = Calibration(schedule, problem.recipe_at(schedule), budget, share, problem.metric, evaluate(schedule))
        result.trials = [evaluate(self.found[key]) for key in self.trials]
        result.fixed = {name: evaluate(self.found[key]) for name, key in self.fixed.items()}
        result.sensitivity = _sensitivity(problem) if layerwise else []
        result.gate, result.latency, result.interrupted = rows, latency, self.interrupted
        blind = self._blind(layerwise)
        if blind is not None:
            result.random = blind.evaluate(schedule)
            blind.save()
        self._spent("search")
        if held_out is not None:
            result.held_out = self._held_out(result, blind, held_out)
            self._spent("held_out")
        result.effort = self.effort
        return result

    # -- one search ----------------------------------------------------------------------------------------------

    def _search(self, share: float) -> Schedule:
        """The best schedule at a share of the dense model's cost: of the trials, or a fixed one."""
        self.found, self.trials, self.fixed = {}, [], {}
        try:
            with _ctrl_c():
                if self.problem.layerwise:
                    self._try_all(share, self.problem.table())
                else:
                    schedule = self._solution(share)
                    self.fixed = {"default": str(schedule)}
                    self._tried(schedule, "fixed schedules", 1, 1)
        except KeyboardInterrupt:
            if not self.found:
                raise
            self.interrupted = True
        return self._best()

    def _try_all(self, share: float, table: Table) -> None:
        """The calibrator's first schedule, fixed schedules, and the calibrator's others."""
        schedules = self.calibrator.schedules(self.problem, share, self.seed)
        first = list(islice(schedules, 1))
        self._spent("solution")
        for name, schedule in fixed_schedules(self.problem, table, share).items():
            self.fixed[name] = str(schedule)
            self._tried(schedule, "fixed schedules", len(self.fixed), len(FIXED) + 1)
        self._spent("fixed")
        for schedule in chain(first, schedules):
            self.trials.append(str(schedule))
            self._tried(schedule, "search", len(self.trials), getattr(self.calibrator, "trials", 0) + 1)

    def _tried(self, schedule: Schedule, stage: str, done: int, total: int) -> None:
        self.problem.evaluate(schedule)
        self.problem.save()
        self.found[str(schedule)] = schedule
        best = min(self.problem.evaluate(s).deviation for s in self.found.values())
        self.problem.progress(f"{stage}, {self.problem.recipe.name}, best {best:.3g}", done, total)

    def _best(self) -> Schedule:
        """The best trial; of a search, if it is better than the best fixed schedule by a standard error, else that.

        The best of many trials looks better on the data it was chosen on than it is, and the mean deviation is made by
        the few samples that are about to change their class. So schedules are compared by the roots of the deviations,
        which single samples do not decide, and a trial and a fixed schedule sample by sample.
        """
        if not self.found:
            raise BudgetError(f"recipe {self.problem.recipe.name} cannot meet the budget {self.budget}")
        roots = {key: self._roots(s) for key, s in self.found.items()}
        allowed = {key for key, s in self.found.items() if self._allowed(self.problem.evaluate(s))}
        least = lambda keys: min(keys, key=lambda key: (roots[key].mean(), key))  # noqa: E731
        trials, fixed = ([key for key in keys if key in allowed] for keys in (self.trials, self.fixed.values()))
        if trials and not getattr(self.calibrator, "wary", False):  # it was asked for; fixed schedules are to compare
            return self.found[least(trials)]
        if not trials or not fixed:
            return self.found[least(allowed or roots)]
        best, usual = least(trials), least(fixed)
        gain = roots[usual] - roots[best]
        surely = gain.mean() > gain.std() / len(gain) ** 0.5
        return self.found[best if surely else usual]

    def _roots(self, schedule: Schedule) -> np.ndarray:
        return np.sqrt(self.problem.deviations(schedule).clip(0.0))

    def score(self, found: Calibration) -> float:
        """What one recipe is preferred to another by, the less the better, as schedules of one recipe are."""
        return found.chosen.cost if self.budget.metric == "drop" else float(self._roots(found.schedule).mean())

    def _allowed(self, found: Evaluation) -> bool:
        """Whether a schedule loses no more than it may."""
        return self.budget.metric != "drop" or self._lost(found) <= self.budget.share

    def _lost(self, found: Evaluation) -> float:
        dense = self.problem.accuracy()
        return found.deviation if dense is None or found.accuracy is None else dense - found.accuracy

    def _solution(self, share: float) -> Schedule:
        """What keeps most at a share of the dense model's cost: by the table of layers, or the one number there is."""
        problem = self.problem
        if problem.layerwise:
            return solved(problem, share)
        counted = problem.price.counted_at(share)
        if counted <= 0.0:
            raise BudgetError(f"recipe {problem.recipe.name} cannot meet {share:.0%} of the dense model's latency")
        return problem.scaled(Budget(problem.price.counted, min(counted, 1.0)))

    # -- budgets that are not a share of what can be counted -----------------------------------------------------

    def _least(self) -> float:
        """The least share of the dense model's cost at which the solution loses no more than it may."""
        problem = self.problem
        low, high = 0.0, 1.0
        for i in range(_HALVINGS):
            problem.progress(f"search the least cost, {high:.0%}", i, _HALVINGS)
            share = (low + high) / 2
            try:
                schedule = self._solution(share)
            except BudgetError:
                low, problem.off = share, 0.0
                continue
            lost = self._lost(problem.evaluate(schedule))
            low, high = (low, share) if lost <= self.budget.share else (share, high)
        if high == 1.0:
            raise BudgetError(
                f"recipe {problem.recipe.name} loses more than {self.budget.share:.2%} whatever it removes",
                hint="allow a larger loss, or take another recipe",
            )
        return high

    def _timed(self) -> tuple[Schedule, float, list[dict[str, Any]], dict[str, Any]]:
        """Solves for a latency that is priced, builds the engine, measures it, and solves again for less if need be."""
        problem, target = self.problem, self.target
        assert target is not None, "latency counts somewhere"
        if problem.counted != "flops":
            raise UsageError(
                f"recipe {problem.recipe.name} cannot be fitted to {self.budget}",
                why="what it removes leaves the model, so that only what comes after is faster",
                hint="--budget tokens=50%",
            )
        problem.progress("measure the price", 0, 0)
        problem.price = self._price(target)
        dense_ms = problem.price.dense_ms
        ms = self.budget.milliseconds
        wanted = self.budget.share if ms is None else ms / dense_ms
        aim, tried = min(wanted, 1.0), []
        for i in range(_BUILDS):
            try:
                schedule = self._search(aim)
            except BudgetError:
                if not tried:
                    raise
                break
            schedule, rows = self._gated(schedule) if problem.layerwise else (schedule, [])
            problem.progress("measure the engine", i, _BUILDS)
            times = target.race({"dense": problem.program, "reduced": problem.reduced(schedule)})
            found = times["reduced"] / times["dense"]
            latency = asdict(target) | {"source": target.source, "dense_ms": times["dense"], "ms": times["reduced"]}
            met_it = times["reduced"] <= ms if ms is not None else found <= wanted
            tried.append((found, schedule, aim, rows, latency | {"ratio": found, "met": met_it}))
            if met_it or self.interrupted:
                break
            aim *= min(wanted / found, 0.99)
        found, schedule, aim, rows, latency = min(tried, key=lambda t: (not t[-1]["met"], t[0]))
        if not latency["met"] and not self.keep_best:
            raise BudgetError(
                f"recipe {problem.recipe.name} cannot meet the budget {self.budget}",
                why=f"the best of {len(tried)} engines takes {latency['ms']:.3f} ms, {found:.2f}x of the dense model's "
                f"{latency['dense_ms']:.3f} ms, {target.source}",
                hint="allow more, take another recipe, or --keep-best writes what was found",
            )
        return schedule, aim, rows, latency

    def _price(self, target: Target) -> Price:
        """Milliseconds as a line, from three programs: dense, fewer tokens at once, and one token less everywhere.

        Where one number is all there is, from two: dense, and as the recipe is by itself.
        """
        problem = self.problem
        if not problem.layerwise:
            usual = problem.usual
            if problem.cost_of(usual, "flops") >= 1.0:
                raise BudgetError(f"recipe {problem.recipe.name} saves nothing here", why=problem.refused(usual))
            times = target.race({"dense": problem.program, "usual": problem.reduced(usual)})
            return Price.fitted(times["dense"], [(problem.cost_of(usual, "flops"), 0, times["usual"])])
        layers = list(problem.places)
        tokens = max(count for _, count in problem.places.values())
        fewer = alone(layers[0], tokens // 2)
        everywhere = schedule_of(layers, [1] * len(layers))
        times = target.race(
            {"dense": problem.program, "fewer": problem.reduced(fewer), "each": problem.reduced(everywhere)}
        )
        points = [(problem.cost_of(s, "flops"), len(problem.reducing(s)), times[name])
                  for name, s in (("fewer", fewer), ("each", everywhere))]  # fmt: skip
        return Price.fitted(times["dense"], points)

    def _gated(self, schedule: Schedule) -> tuple[Schedule, list[dict[str, Any]]]:
        """The schedule without the layers that do not pay on the target."""
        problem = self.problem
        layers = problem.reducing(schedule)
        if not layers:
            return schedule, []

        def only(kept: frozenset[int]) -> Schedule:
            removed = [schedule.r[n] if n in kept else 0 for n in problem.places]
            return schedule_of(list(problem.places), removed)

        problem.progress("gate", 0, 0)
        sites = {n: problem.places[n][0] for n in layers}
        kept, rows = gate(sites, lambda numbers: problem.reduced(only(numbers)), self.target)
        return only(kept), rows

    # -- data that were not fitted on ----------------------------------------------------------------------------

    def _blind(self, layerwise: bool) -> Problem | None:
        """The same problem with a recipe that chooses tokens at random."""
        problem = self.problem
        if problem.recipe.name == "random" or not layerwise or self.interrupted:
            return None
        recipe = replace(recipes.get("random"), place=problem.recipe.place)
        try:
            return Problem(
                problem.program, recipe, problem.batches, problem.metric, problem.cache, workers=problem.workers
            )
        except UsageError:  # it has no such place
            return None

    def _held_out(self, result: Calibration, blind: Problem | None, data: Batches) -> dict[str, Any]:
        problem = self.problem
        found = problem.evaluate(result.schedule, data)
        unlike = {key: asdict(problem.evaluate(self.found[key], data)) for key in dict.fromkeys(self.fixed.values())}
        others = {name: unlike[key] for name, key in self.fixed.items()}
        if blind is not None:
            others["random"] = asdict(blind.evaluate(result.schedule, data))
        return {
            "samples": found.samples,
            "deviation": found.deviation,
            "deviation_ci": _interval(found.deviation, found.spread),
            "accuracy": found.accuracy,
            "accuracy_dense": problem.accuracy(data),
            "accuracy_ci": None if found.accuracy is None else _wilson(found.accuracy, found.samples),
            "fixed": others,
        }


@contextmanager
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C raises a KeyboardInterrupt, whatever else it does elsewhere."""
    before = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread() and before is not signal.SIG_IGN
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _interval(mean: float, error: float) -> list[float]:
    """At 95 %, of what is never less than nothing."""
    return [max(mean - 1.96 * error, 0.0), mean + 1.96 * error]


def _wilson(share: float, samples: int) -> list[float]:
    """At 95 %, of a share of samples.

    Source: Wilson, JASA 22(158), 1927.
    """
    z = 1.96**2 / samples
    middle, half = share + z / 2, (share * (1 - share) * z + z**2 / 4) ** 0.5
    return [(middle - half) / (1 + z), (middle + half) / (1 + z)]


def _sensitivity(problem: Problem) -> list[dict[str, Any]]:
    table = problem.table()
    return [
        {"layer": layer, "site": problem.places[layer][0], "ratio": ratio, "deviation": float(table.error[i, j])}
        for i, layer in enumerate(table.layers)
        for j, ratio in enumerate(RATIOS[: table.error.shape[1]])
    ]


def calibrate(program: Program, recipe: Any, data: Any, *, budget: str | Budget, **options: Any) -> Schedule:
    """The schedule of `fit`; see there for what it takes."""
    return fit(program, recipe, data, budget=budget, **options).schedule
