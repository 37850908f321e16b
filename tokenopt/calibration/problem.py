"""What a calibration asks of a model: programs for schedules, their cost, and what they do to the outputs on data."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenopt.budget import SHARES, within
from tokenopt.calibration import metrics
from tokenopt.calibration.price import Price
from tokenopt.calibration.solve import RATIOS, Table
from tokenopt.calibration.workers import InProcess, Workers
from tokenopt.data import Dataset, find_preprocessing, open_data
from tokenopt.errors import UsageError
from tokenopt.loading import load_program
from tokenopt.passes.reduce_tokens import Planner, ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pass, Pipeline, PipelineResult
from tokenopt.program import Program, atomic_path
from tokenopt.schedule import Budget, Schedule
from tokenopt.tokens.plan import Stream
from tokenopt.tokens.recipe import TokenRecipe

_BATCH = 32
Batch = tuple[Sequence[Tensor], Tensor | None]  # inputs as flat tensors, and labels where they are known
Values = tuple[list[float], list[bool]]  # deviation of every sample, and whether it is right, where labels are known
LAYERWISE = ("mid", "block", "attention")  # places where every layer has a number of its own
_KEPT_PROGRAMS = 16  # they share their weights
_KEPT_OUTPUTS = 2**28  # bytes of the dense model's outputs that are kept; beyond, they are computed again
_PASSES = 10.0  # forward passes over the data that the table of all layers may take


@dataclass(frozen=True)
class Batches:
    """The samples of a dataset, some at a time, as often as they are gone through."""

    data: Dataset

    def __iter__(self) -> Iterator[Batch]:
        return ((batch.inputs, batch.labels) for batch in self.data.batches(_BATCH))

    @staticmethod
    def of(data: Any, program: Program) -> Batches:
        """Anything that `open_data` takes."""
        preprocessing = find_preprocessing(data, program.source, program.inputs)
        return Batches(open_data(data, program.inputs, preprocessing=preprocessing))


class Task(NamedTuple):
    """A schedule on one batch, and the pass that applies it; without the dense outputs, these are computed too.

    The files that the pass reads are pickled with it.
    """

    number: int
    schedule: str
    step: Pass
    inputs: Sequence[Tensor]
    labels: Tensor | None
    dense: Sequence[Tensor] | None
    files: Sequence[Path] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _task_with_files, (*self[:-1], {path: path.read_bytes() for path in self.files})


def _task_with_files(*values: Any) -> Task:
    """A task whose files are where it reads them, on whatever machine this is."""
    *values, files = values
    for path, content in files.items():
        if not path.exists() or path.read_bytes() != content:
            with atomic_path(path) as partial:
                partial.write_bytes(content)
    return Task(*values, files=tuple(files))


@dataclass(eq=False)
class Measurement:
    """What schedules do to the outputs of a program. It can be pickled, which needs a metric that can be imported."""

    program: Program
    metric: str

    def __post_init__(self) -> None:
        self._metric = metrics.get(self.metric)
        self._results: dict[str, PipelineResult] = {}

    def __call__(self, task: Task) -> tuple[int, Values]:
        """The number of the task, and the values of its samples."""
        dense = _run(self.program, task.inputs) if task.dense is None else task.dense
        program = self.rewritten(task.schedule, task.step).program
        outputs = _run(program, task.inputs)[: len(dense)]  # a recipe may add some
        return task.number, (self._metric(outputs, dense).double().tolist(), _right(outputs, task.labels))

    def rewritten(self, schedule: str, step: Pass) -> PipelineResult:
        """The last few are kept."""
        if schedule not in self._results:
            while len(self._results) >= _KEPT_PROGRAMS:
                self._results.pop(next(iter(self._results)))
            self._results[schedule] = Pipeline([step, RemoveDead()]).run(self.program)
        return self._results[schedule]

    def __reduce__(self) -> tuple[Any, ...]:
        with tempfile.TemporaryDirectory() as folder:
            content = self.program.save(Path(folder) / "program.pt2").read_bytes()
        return _unpickled, (content, self.metric)


def _unpickled(content: bytes, metric: str) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.pt2"
        path.write_bytes(content)
        return Measurement(load_program(path, trust=True), metric)  # as all else in a pickle


def _run(program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    args, kwargs = program.bind(program.complete(inputs))
    with torch.no_grad():
        return program.flat(*args, **kwargs)


def _right(outputs: Sequence[Tensor], labels: Tensor | None) -> list[bool]:
    hits = None if labels is None else metrics.correct(outputs, labels)
    return [] if hits is None else hits.tolist()


@dataclass(frozen=True)
class Evaluation:
    """What one schedule does.

    Attributes:
        schedule: in text.
        cost: of the dense program's, in the unit of the budget.
        deviation: mean over samples, and ``spread``, its standard error.
        accuracy: share of samples whose label is the greatest score; None without labels.
        samples: how many were looked at.
    """

    schedule: str
    cost: float
    deviation: float
    spread: float
    accuracy: float | None
    samples: int


@dataclass
class Problem:
    """A recipe on a program, and data to fit it on.

    Args:
        program: in canonical form, as raise-attention leaves it.
        recipe: what is fitted.
        batches: of the data to fit on; gone through several times.
        metric: see `metrics.get`; what suits the outputs by default.
        cache: a folder for what was measured; None keeps nothing.
        progress: called with (stage, done, total).
        price: what a schedule costs; operations by default.
        workers: where reduced programs run on the data; the dense one runs here.
        weights: the file that learned weights are kept in, and that the recipe of the answer reads; None if it is to
            learn again.
    """

    program: Program
    recipe: TokenRecipe
    batches: Iterable[Batch]
    metric: str | None = None
    cache: Path | None = None
    progress: Callable[[str, int, int], None] = field(default=lambda *_: None)
    price: Price = field(default_factory=Price)
    workers: Workers = field(default_factory=InProcess)
    weights: Path | None = None
    passes: float = 0.0  # forward passes over the data so far
    off: float = 0.0  # what programs were found to cost more than the table says

    def __post_init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._places: dict[int, tuple[str, int]] | None = None
        self._steps: dict[str, Pass] = {}
        self.samples, self.depth = 0, 1
        self._digest = hashlib.sha256()
        self._look()
        self._load()

    # -- the dense model -----------------------------------------------------------------------------------------

    def _look(self) -> None:
        """What the data are; the first batch tells what measure suits the outputs."""
        for inputs, labels in self.batches:
            if self.metric is None:
                self.metric = metrics.metric_for(_run(self.program, inputs), self.causal)
            self.samples += len(inputs[0])
            for tensor in (*inputs, *([] if labels is None else [labels])):
                self._digest.update(tensor.contiguous().cpu().numpy().tobytes())
        if not self.samples:
            raise UsageError("there is nothing to calibrate on", why="the data are empty")
        self._measurement = Measurement(self.program, self.metric)

    @property
    def causal(self) -> bool:
        """Whether it is a decoder, whose last token answers."""
        return any(n.kwargs.get("is_causal") for n in self.program.graph.nodes)

    @cached_property
    def _dense(self) -> list[list[Tensor]]:
        """Outputs of every batch, by one pass; none where they are too large to keep."""
        kept: list[list[Tensor]] = []
        size = 0
        for inputs, _ in self.batches:
            kept.append(_run(self.program, inputs))
            size += sum(t.numel() * t.element_size() for t in kept[-1])
            if size > _KEPT_OUTPUTS:
                return []
        self.passes += 1
        return kept

    # -- schedules -----------------------------------------------------------------------------------------------

    @property
    def layerwise(self) -> bool:
        """Whether every layer has a number of its own."""
        return self.recipe.place.name in LAYERWISE

    @property
    def files(self) -> Sequence[Path]:
        """What its passes read."""
        return ()

    @property
    def counted(self) -> str:
        """What it saves, "flops" or "tokens": where outputs get shorter, what comes after is not this program's."""
        return "tokens" if self.recipe.place.outputs else "flops"

    @property
    def usual(self) -> Schedule:
        """The recipe's own schedule."""
        return Schedule.parse(self.recipe.schedule)

    def scaled(self, budget: Budget) -> Schedule:
        """The recipe's own schedule, scaled to a budget: for places without layers of their own."""
        return Schedule.parse(within(budget, self._step(self.usual), self.program).schedule)

    def recipe_at(self, schedule: Schedule) -> Any:
        """The recipe that is the answer where a schedule is."""
        return self.recipe

    @property
    def places(self) -> dict[int, tuple[str, int]]:
        """Layers where the recipe can reduce: the attention's name, and the tokens that can be reduced there."""
        if self._places is None:
            looker = _look_at(self.program, self.recipe)
            self._places, self.depth = looker.seen, looker.depth
        return self._places

    def reduced(self, schedule: Schedule) -> Program:
        """The program with this schedule."""
        return self._rewritten(schedule).program

    def refused(self, schedule: Schedule) -> str | None:
        """Why it changes nothing, or less than it says."""
        return next((refusal.why for refusal in self._rewritten(schedule).refusals), None)

    def _rewritten(self, schedule: Schedule) -> PipelineResult:
        return self._measurement.rewritten(str(schedule), self._step_at(schedule))

    def _step(self, schedule: Schedule) -> Pass:
        return ReduceTokens(self.recipe, schedule)

    def _step_at(self, schedule: Schedule) -> Pass:
        """The pass that applies a schedule; making it may learn."""
        if str(schedule) not in self._steps:
            self._steps[str(schedule)] = self._step(schedule)
        return self._steps[str(schedule)]

    def cost(self, schedule: Schedule) -> float:
        """Of the dense program's, in the unit of the price."""
        reductions = len(self.reducing(schedule)) if self.price.each else 0
        return self.price(self.cost_of(schedule, self.price.counted), reductions)

    def reducing(self, schedule: Schedule) -> list[int]:
        """The layers that a schedule of counts reduces at."""
        return [layer for layer in self.places if schedule.kept(layer, self.depth, 2**20) < 2**20]

    def cost_of(self, schedule: Schedule, counted: str) -> float:
        """The share that is left of the dense program's "flops" or "tokens"."""
        found, key = self._known.setdefault("counts", {}), str(schedule)
        if key not in found:
            result = self._rewritten(schedule)
            edits = [e for e in result.edits if e.before is not None]
            outputs = self.recipe.place.outputs
            found[key] = {name: share(self.program, result.program, edits, outputs) for name, share in SHARES.items()}
        return found[key][counted]

    def evaluate(self, schedule: Schedule, batches: Iterable[Batch] | None = None) -> Evaluation:
        """Deviation and accuracy of a schedule, on the data to fit on or on others."""
        [values] = self._values([schedule]) if batches is None else self._run_all([schedule], batches)
        deviations, hits = map(np.array, values)
        spread = float(deviations.std(ddof=1) / len(deviations) ** 0.5) if len(deviations) > 1 else 0.0
        accuracy = float(hits.mean()) if len(hits) else None
        cost = self.cost(schedule)
        return Evaluation(str(schedule), cost, float(deviations.mean()), spread, accuracy, len(deviations))

    def deviations(self, schedule: Schedule) -> np.ndarray:
        """Of every sample."""
        [(deviations, _)] = self._values([schedule])
        return np.array(deviations)

    def _values(self, schedules: Sequence[Schedule], share: float = 1.0) -> Iterator[Values]:
        """Of each schedule, in order, on a share of the data to fit on; what is not known yet is measured."""
        known = self._known.setdefault("evaluations", {})
        keys = [f"{schedule} {share:.4f}" for schedule in schedules]
        missing = {key: schedule for key, schedule in zip(keys, schedules, strict=True) if key not in known}
        found = self._run_all(list(missing.values()), self.batches, self._dense, share) if missing else iter(())
        for key in keys:
            if key not in known:
                known[key] = next(found)
                self.passes += len(known[key][0]) / self.samples
            yield known[key]

    def _run_all(
        self, schedules: Sequence[Schedule], batches: Iterable[Batch], kept: Sequence[list[Tensor]] = (),
        share: float = 1.0,
    ) -> Iterator[Values]:  # fmt: skip
        """Of each schedule, in order; every batch is a task of its own."""

        def tasks() -> Iterator[Task]:
            for number, schedule in enumerate(schedules):
                step = self._step_at(schedule)
                for i, (inputs, labels) in enumerate(batches):
                    if int((i + 1) * share + 1e-9) > int(i * share + 1e-9):  # all over the data: in order of classes
                        dense = kept[i] if i < len(kept) else None
                        yield Task(number, str(schedule), step, inputs, labels, dense, self.files)

        for _, parts in groupby(self.workers.map(self._measurement, tasks()), lambda part: part[0]):
            values: Values = [], []
            for _, (deviations, right) in parts:
                values[0].extend(deviations)
                values[1].extend(right)
            yield values

    def outputs(self, schedule: Schedule) -> Iterator[tuple[list[Tensor], list[Tensor], Tensor | None]]:
        """What the program with a schedule returns, what the dense one does, and the labels, batch by batch."""
        program = self.reduced(schedule)
        for i, (inputs, labels) in enumerate(self.batches):
            dense = self._dense[i] if i < len(self._dense) else _run(self.program, inputs)
            yield _run(program, inputs)[: len(dense)], dense, labels

    def accuracy(self, batches: Iterable[Batch] | None = None) -> float | None:
        """Of the dense model."""
        right: list[bool] = []
        for i, (inputs, labels) in enumerate(self.batches if batches is None else batches):
            known = batches is None and i < len(self._dense)
            right += _right(self._dense[i] if known else _run(self.program, inputs), labels)
        return sum(right) / len(right) if right else None

    # -- the table -----------------------------------------------------------------------------------------------

    def table(self) -> Table:
        """Error and cost of every layer at several shares: each is reduced alone, on a part of the data.

        What lies between two layers' places is how much more one saves than the next.
        """
        if self.recipe.place.name not in LAYERWISE:
            raise UsageError(f"recipe {self.recipe.name} has no schedule of layers", why=f"place {self.recipe.place}")
        places = {layer: count for layer, (_, count) in self.places.items()}
        if not places:
            raise UsageError(f"recipe {self.recipe.name} reduces nothing on this model")
        one_batch = min(_BATCH / self.samples, 1.0)
        counted, share = self.price.counted, min(1.0, max(_PASSES / (len(places) * len(RATIOS)), one_batch))
        layers, tokens = tuple(places), max(places.values())
        chained = self.recipe.place.name != "attention"
        error, saved = np.zeros((len(layers), len(RATIOS))), np.zeros((len(layers), len(RATIOS)))
        cells = [alone(layer, round((1 - ratio) * places[layer])) for layer in layers for ratio in RATIOS]
        values = self._values(cells, share)
        for cell, schedule in enumerate(cells):
            self.progress("measure layers", cell, len(cells))
            at = divmod(cell, len(RATIOS))
            error[at] = np.mean(next(values)[0])
            saved[at] = 1 - self.cost_of(schedule, counted)
        self.save()
        # where one layer can remove no more, as a merge can no more than half, there is no more to measure
        grows = (np.diff(saved, axis=1, prepend=0) > 1e-9).any(0)
        valid = int(grows.argmin()) if not grows.all() else len(RATIOS)
        if not valid:
            raise UsageError(f"recipe {self.recipe.name} saves nothing where it removes tokens")
        error, saved = error[:, :valid], saved[:, :valid]
        # what is saved by all later places is counted by the next layer
        nothing = np.zeros((1, valid))
        between = saved - np.vstack([saved[1:], nothing]) if chained else saved
        cost = np.concatenate([np.zeros((len(layers) + 1, 1)), -np.vstack([nothing, between])], 1)
        cost *= self.price.slope
        cost[0] += self.price.fixed + self.price.slope  # what is not saved: stretches cost less than nothing
        least = RATIOS[valid - 1] if valid < len(RATIOS) else 0.02
        return Table(layers, tokens, error, cost, self.price.each, least, chained)

    # -- what is kept on disk --------------------------------------------------------------------------------------

    @property
    def _file(self) -> Path | None:
        if self.cache is None:
            return None
        from tokenopt import __version__

        recipe = json.dumps(self.recipe.to_dict(), sort_keys=True, default=str)
        parts = (self.program.digest, recipe, self._digest.hexdigest(), self.metric, __version__)
        return self.cache / f"{hashlib.sha256('|'.join(map(str, parts)).encode()).hexdigest()[:24]}.json"

    def _load(self) -> None:
        if self._file is not None and self._file.is_file():
            try:
                self._known = json.loads(self._file.read_text())
            except (OSError, ValueError):  # a cache that cannot be read is as good as none
                self._known = {}

    def save(self) -> None:
        """Keeps what was measured for the next budget."""
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._file) as partial:
            partial.write_text(json.dumps(self._known))


def alone(layer: int, removed: int) -> Schedule:
    """A schedule that removes tokens at one layer."""
    return Schedule(r=[0] * layer + [removed])


def schedule_of(layers: Sequence[int], removed: Sequence[int]) -> Schedule:
    """A schedule that removes so many tokens at these layers."""
    counts = dict(zip(layers, removed, strict=True))
    return Schedule(r=[counts.get(layer, 0) for layer in range(max(layers) + 1)])


def cache_folder() -> Path:
    """Where calibrations keep what they measured: ``$XDG_CACHE_HOME/tokenopt/calibration``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tokenopt" / "calibration"


class _Looker(Planner):
    """Notes where a recipe could reduce, and reduces nothing."""

    def __init__(self, recipe: TokenRecipe, schedule: Schedule) -> None:
        super().__init__(recipe, schedule)
        self.seen: dict[int, tuple[str, int]] = {}
        self.depth = 1

    def __call__(self, stream: Stream) -> None:
        self.depth = len(stream.sites)
        self.seen[stream.layer] = stream.region.site.id, stream.count


def places(program: Program, recipe: TokenRecipe) -> dict[int, tuple[str, int]]:
    """Layers where a recipe can reduce a program in canonical form: the attention's name, and the tokens there."""
    return _look_at(program, recipe).seen


def _look_at(program: Program, recipe: TokenRecipe) -> _Looker:
    looker = _Looker(recipe, Schedule(r=1))
    ReduceTokens(recipe, looker.schedule).apply(program.clone(), looker)
    return looker
