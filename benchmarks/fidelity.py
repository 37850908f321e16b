"""Fidelity: what every recipe costs in score on every task, at equal FLOPs.

    python -m benchmarks.fidelity [--tasks digits localise] [--recipes tome random] [--ratios 0.9 0.6] [--seeds 3]
                                  [--out benchmarks/results/fidelity.md]

Per task a table: the score of each recipe (mean and standard deviation over the seeds, see `benchmarks.tasks`) with
the schedule that brings the program nearest to each share of the dense FLOPs, and the share that was measured. The best
of a column is bold, the worst italic. ``random`` and ``uniform-grid`` look at no token: what does not beat them is not
worth its time. Recipes that shorten the encoder's output are compared on the tasks named ``-features``, at equal shares
of patch tokens that leave the encoder.

A program is rewritten once per recipe and ratio and runs with the weights of every seed; one rewrite from scratch per
recipe is compared with that. A recipe with a learned score learns it for every seed, from inputs that are not scored.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.tasks import TASKS, Task, Trial
from tokenopt import recipes
from tokenopt.analysis.axes import propagate
from tokenopt.analysis.cuts import find_cuts
from tokenopt.analysis.sites import find_sites
from tokenopt.cost import program_flops
from tokenopt.errors import Refusal, TokenoptError, UsageError
from tokenopt.fitting import fit, needs_data
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program, capture
from tokenopt.schedule import Schedule
from tokenopt.tokens.recipe import TokenRecipe

BASELINES = ("random", "uniform-grid")
PUBLISHED_LAYERS = 12  # layers in a recipe's schedule are those of the paper's 12-layer model
STRONGEST = (0.97, 0.8, 0.5, 0.2)  # how much a schedule removes at most: the first that the recipe takes
CLOSE, NEAR = 0.01, 0.04  # a ratio is good enough to stop at; is good enough to stand in its column
REWRITES = 6  # at most, per ratio


# -- from a ratio to a program ---------------------------------------------------------------------------------------


class Inapplicable(Exception):
    """A recipe that does not fit a task; the text says why."""


@dataclass(frozen=True)
class Dense:
    """A canonical program with its number of self-attentions and of reducible tokens."""

    program: Program
    layers: int
    tokens: int

    @staticmethod
    def of(trial: Trial) -> Dense:
        program = capture(trial.model, tuple(x[:2] for x in trial.inputs))
        program = canonicalize(program).program
        axes = propagate(program)
        sites, _ = find_sites(axes)
        cuts, _ = find_cuts(axes, sites)
        assert cuts, "the model of a task can be reduced"
        layers = sum(site.kind in ("self", "joint") for site in sites)
        return Dense(program, layers, max(cut.segment.length for cut in cuts))


def scaled_schedule(recipe: TokenRecipe, factor: float, layers: int, tokens: int) -> dict[str, Any]:
    """The recipe's schedule, at its own layers, removing more or less.

    Args:
        factor: the share of the tokens that each scheduled layer removes: of all for ``r``, of those present for
            ``keep``.

    Raises:
        UsageError: for a schedule of another form.
    """
    schedule = dict(recipe.schedule)
    if "r" in schedule:
        step = factor * tokens
        return {"r": [round((i + 1) * step) - round(i * step) for i in range(layers)]}
    if "keep" not in schedule:
        raise UsageError(f"the schedule of {recipe.name} has neither r nor keep", why=f"it is {schedule}")
    schedule["keep"] = round(1.0 - factor, 4)
    if schedule.get("layers"):
        at = {x if isinstance(x, float) else x * layers // PUBLISHED_LAYERS for x in schedule["layers"]}
        schedule["layers"] = sorted(at)
    return schedule


def rewrite(dense: Dense, recipe: TokenRecipe, schedule: Mapping[str, Any]) -> Program:
    """Raises: Inapplicable, with the recipe's own reason."""
    try:
        result = Pipeline([ReduceTokens(recipe, schedule), RemoveDead()]).run(dense.program)
    except TokenoptError as error:
        raise Inapplicable(str(error).splitlines()[0]) from error
    if not any(edit.pass_spec.startswith(ReduceTokens.name) for edit in result.edits):
        raise Inapplicable(_reason(result.refusals))
    extra = [spec.name for spec in result.program.inputs][len(dense.program.inputs) :]
    if extra:
        raise Inapplicable(f"it takes another input: {', '.join(extra)}")
    return result.program


def _reason(refusals: Sequence[Refusal]) -> str:
    return refusals[-1].why if refusals else "nothing was changed"


@dataclass
class ToRatio:
    """The program of one recipe that costs a given share of the dense FLOPs, or keeps one of the output tokens.

    From either side, where a budget is met from below: recipes are compared at as equal a cost as can be.
    """

    dense: Dense
    recipe: TokenRecipe
    features: bool
    points: list[tuple[float, float, Program | None]] = field(default_factory=list)  # factor, ratio, program
    schedules: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # tried, by their text

    def __call__(self, ratio: float) -> tuple[Program, float, Mapping[str, Any]] | None:
        """The program, the measured ratio and the schedule; None where no schedule comes near the ratio."""
        if not self.points:
            self._start()
        for _ in range(REWRITES):
            if abs(self._nearest(ratio)[1] - ratio) <= CLOSE:
                break
            weak = max((p for p in self.points if p[1] >= ratio), key=lambda p: p[0])
            strong = min((p for p in self.points if p[0] > weak[0]), default=None, key=lambda p: p[0])
            if strong is None:
                break
            share = (weak[1] - ratio) / max(weak[1] - strong[1], 1e-9)
            if not self._try(weak[0] + min(max(share, 0.05), 0.95) * (strong[0] - weak[0])):
                break
        factor, measured, program = self._nearest(ratio)
        if program is None or abs(measured - ratio) > NEAR:
            return None
        return program, measured, self._schedule(factor)

    def _start(self) -> None:
        """The two ends: the dense program, and the strongest schedule. Raises: Inapplicable."""
        self.points.append((0.0, 1.0, None))
        for factor in STRONGEST:
            try:
                self._try(factor)
                return
            except Inapplicable as error:
                reason = error
        raise reason

    @property
    def least(self) -> float:
        """The smallest ratio that was reached."""
        return min(p[1] for p in self.points)

    def _nearest(self, ratio: float) -> tuple[float, float, Program | None]:
        return min(self.points, key=lambda p: abs(p[1] - ratio))

    def _schedule(self, factor: float) -> dict[str, Any]:
        return scaled_schedule(self.recipe, factor, self.dense.layers, self.dense.tokens)

    def _try(self, factor: float) -> bool:
        """Measures one more point; False if its schedule, in whole tokens, is one that was tried."""
        try:
            schedule = self._schedule(factor)
        except UsageError as error:
            raise Inapplicable(str(error).splitlines()[0]) from error
        if str(schedule) in self.schedules:
            return False
        self.schedules[str(schedule)] = schedule
        program = rewrite(self.dense, self.recipe, schedule)
        self.points.append((factor, self._measure(program), program))
        return True

    def _measure(self, program: Program) -> float:
        if not self.features:
            return program_flops(program) / program_flops(self.dense.program)
        protected = self.dense.program.outputs[0].shape[1] - self.dense.tokens
        return (program.outputs[0].shape[1] - protected) / self.dense.tokens


def with_weights(program: Program, dense: Program) -> Program:
    """A rewritten program with the weights of another dense program of the same graph.

    Both were folded alike, so constants have the same names; what the rewrite added stays.
    """
    swapped = program.clone()
    for mine, others in (
        (swapped.exported.state_dict, dense.exported.state_dict),
        (swapped.exported.constants, dense.exported.constants),
    ):
        mine.update({name: others[name] for name in mine if name in others})
    return swapped


# -- one cell, one row -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Scores over the seeds at one measured ratio."""

    ratio: float
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    def __str__(self) -> str:
        return f"{_spread(self.scores)} ({self.ratio:.2f})"


@dataclass
class Row:
    """One recipe on one task: a cell per ratio that can be reached, and the least ratio; or why there are none."""

    cells: dict[float, Cell] = field(default_factory=dict)
    least: float = 1.0
    reason: str = ""
    failed: bool = False


def measure(
    task: Task, trials: Sequence[Trial], denses: Sequence[Dense], name: str, ratios: Sequence[float], folder: Path
) -> Row:
    """A recipe on a task at every ratio, for all seeds; what it learns lies in the folder."""
    row = Row()
    try:
        placed = _placed(recipes.get(name), task)
        places = enumerate(zip(denses, trials, strict=True))
        seeds = [_of_seed(placed, dense, trial, i, folder) for i, (dense, trial) in places]
        alike = all(recipe == seeds[0] for recipe in seeds)
        to_ratio = ToRatio(denses[0], seeds[0], task.features)
        for ratio in ratios:
            start = time.perf_counter()
            found = to_ratio(ratio)
            if found is not None:
                program, measured, schedule = found
                if alike:
                    programs = [with_weights(program, dense.program) for dense in denses]
                    if not row.cells:
                        _check(programs[-1], rewrite(denses[-1], seeds[-1], schedule), trials[-1])
                else:
                    programs = [rewrite(dense, recipe, schedule) for dense, recipe in zip(denses, seeds, strict=True)]
                scores = (t.score(p.flat(*t.inputs)[0]) for p, t in zip(programs, trials, strict=True))
                row.cells[ratio] = Cell(measured, tuple(scores))
            seconds, tried = time.perf_counter() - start, len(to_ratio.schedules)
            _progress(f"{task.name} {name} at {ratio:g}: {row.cells.get(ratio)}, {tried} schedules, {seconds:.1f} s")
        row.least = to_ratio.least
    except Inapplicable as error:
        row.reason = str(error)
        _progress(f"{task.name} {name}: {row.reason}")
    except Exception as error:  # the table goes on, and the exit code tells
        row.reason, row.failed = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", True
        _progress(f"{task.name} {name}: {row.reason}")
    return row


def _placed(recipe: TokenRecipe, task: Task) -> TokenRecipe:
    """The recipe as it applies to the task.

    Raises:
        Inapplicable: if it acts where the task does not look.
    """
    if recipe.place.outputs and not task.features:
        raise Inapplicable("it shortens the encoder's output: see the tasks named -features")
    if recipe.place.outputs or not task.features:
        return recipe
    if recipe.name not in BASELINES:
        raise Inapplicable("it acts inside the encoder: see the tasks without -features")
    return replace(recipe, schedule={"keep": 0.5}).with_settings({"place": "output", "restore": "none"})


def _of_seed(recipe: TokenRecipe, dense: Dense, trial: Trial, seed: int, folder: Path) -> TokenRecipe:
    """The recipe for the model of a seed: random positions are drawn anew for each, and a learned score is learned.

    Raises:
        Inapplicable: if the score cannot be learned on this model.
    """
    if recipe.score is not None and recipe.score.name == "random":
        return recipe.with_settings({"score.seed": 1000 * seed})  # far apart: layers count on from them
    if not needs_data(recipe):
        return recipe
    half = Schedule.parse(scaled_schedule(recipe, 0.5, dense.layers, dense.tokens))
    batches = zip(*(x.split(64) for x in trial.others), strict=True)
    try:
        return fit(recipe, half, dense.program, batches, folder / f"{recipe.name}-{seed}.safetensors")
    except UsageError as error:
        raise Inapplicable(f"{error.what}: {error.why}") from error


def _check(swapped: Program, rewritten: Program, trial: Trial) -> None:
    """Raises: AssertionError unless exchanged weights do what a rewrite of the other model does."""
    found, expected = (p.flat(*(x[:32] for x in trial.inputs))[0] for p in (swapped, rewritten))
    error = (found - expected).abs().max().item()
    assert error <= 1e-5, f"the rewritten program depends on weights that cannot be exchanged: {error:.1e}"


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- the tables ------------------------------------------------------------------------------------------------------


def table(task: Task, dense: Sequence[float], rows: Mapping[str, Row], ratios: Sequence[float]) -> list[str]:
    """One task in Markdown."""
    unit = "output tokens" if task.features else "FLOPs"
    meaning = f"{task.meaning[0].upper()}{task.meaning[1:]}."
    lines = [f"## {task.name}", "", meaning, f"Columns are shares of the dense {unit}; the dense model has "
             f"{_spread(dense)}.", ""]  # fmt: skip
    shown = {name: row for name, row in rows.items() if row.cells}
    if shown:
        heads = ["recipe", *(f"{ratio:g} {unit}" for ratio in ratios)]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in shown.items():
        cells = [_marked(row.cells.get(ratio), [r.cells[ratio] for r in shown.values() if ratio in r.cells])
                 for ratio in ratios]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *_notes(rows, ratios, unit), ""]
    return lines


def _marked(cell: Cell | None, column: Sequence[Cell]) -> str:
    """A cell, bold if the best of its column and italic if the worst."""
    if cell is None:
        return "–"
    means = [round(c.mean, 3) for c in column]  # what looks equal is equal
    mean, text = round(cell.mean, 3), str(cell)
    if min(means) == max(means):
        return text
    return f"**{text}**" if mean == max(means) else f"*{text}*" if mean == min(means) else text


def _notes(rows: Mapping[str, Row], ratios: Sequence[float], unit: str) -> list[str]:
    """What the table does not show: where a baseline wins, what is out of reach and what does not apply."""
    lines = []
    for baseline in BASELINES:
        base = rows.get(baseline, Row())
        wins = []
        for name, row in rows.items():
            lost = [f"{r:g}" for r in ratios if r in row.cells and r in base.cells
                    and round(row.cells[r].mean, 3) <= round(base.cells[r].mean, 3)]  # fmt: skip
            if lost and name not in BASELINES:
                wins.append(f"{name} at {', '.join(lost)}")
        if base.cells:
            won = f"is at least as good as {'; '.join(wins)}" if wins else "beats no recipe"
            lines.append(f"- `{baseline}` {won}.")
    for name, row in rows.items():
        if row.cells and len(row.cells) < len(ratios):
            lines.append(f"- –: {name} has no schedule within {NEAR} of that; its least is {row.least:.2f}.")
    reasons: dict[str, list[str]] = {}
    for name, row in rows.items():
        if not row.cells:
            reason = row.reason or f"no schedule within {NEAR} of a column; the least is {row.least:.2f} of the {unit}"
            reasons.setdefault(reason, []).append(name)
    return lines + [f"- not here: {', '.join(names)}: {reason}." for reason, names in reasons.items()]


def _spread(scores: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{spread}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--recipes", nargs="+", default=recipes.names(TokenRecipe), choices=recipes.names())
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.75, 0.6, 0.5, 0.35])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    ratios = sorted(options.ratios, reverse=True)
    names = [n for n in options.recipes if n not in BASELINES] + [n for n in BASELINES if n in options.recipes]
    lines = [
        "# Fidelity",
        "",
        f"Mean ± standard deviation over {options.seeds} seeds (the measured share); best **bold**, worst *italic*, –",
        f"out of reach. Made by `python -m benchmarks.fidelity` on {date.today()};",
        f"{torch.get_num_threads()} thread(s); {machine()}.",
        "",
    ]
    failed = False
    print("\n".join(lines), flush=True)
    for name in options.tasks:
        task = TASKS[name]
        _progress(f"{name}: models of {options.seeds} seeds")
        trials = [task.trial(seed) for seed in range(options.seeds)]
        first = Dense.of(trials[0])
        denses = [first if trial.model is trials[0].model else Dense.of(trial) for trial in trials]
        scores = [t.score(d.program.flat(*t.inputs)[0]) for t, d in zip(trials, denses, strict=True)]
        with tempfile.TemporaryDirectory() as folder:
            rows = {recipe: measure(task, trials, denses, recipe, ratios, Path(folder)) for recipe in names}
        failed |= any(row.failed for row in rows.values())
        part = table(task, scores, rows, ratios)
        print("\n".join(part), flush=True)
        lines += part
        if options.out is not None:  # after every task: a run takes long
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text("\n".join(lines))
    _progress(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
