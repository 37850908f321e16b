"""What a calibration asks of a model: programs for schedules, their cost, and what they do to the outputs on data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenopt.budget import SHARES, within
from tokenopt.calibration import metrics
from tokenopt.calibration.price import Price
from tokenopt.calibration.solve import RATIOS, Table
from tokenopt.data import Dataset, find_preprocessing, open_data
from tokenopt.errors import UsageError
from tokenopt.passes.reduce_tokens import Planner, ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline, PipelineResult
from tokenopt.program import Program, atomic_path
from tokenopt.schedule import Budget, Schedule
from tokenopt.tokens.plan import Stream
from tokenopt.tokens.recipe import TokenRecipe

_BATCH = 32
Batch = tuple[Sequence[Tensor], Tensor | None]  # inputs as flat tensors, and labels where they are known
LAYERWISE = ("mid", "block", "attention")  # places where every layer has a number of its own
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
    weights: Path | None = None
    passes: float = 0.0  # forward passes over the data so far
    off: float = 0.0  # what programs were found to cost more than the table says

    def __post_init__(self) -> None:
        self._dense: list[list[Tensor]] = []
        self._known: dict[str, Any] = {}
        self._places: dict[int, tuple[str, int]] | None = None
        self._programs: dict[str, PipelineResult] = {}
        self.samples, self.depth = 0, 1
        self._digest = hashlib.sha256()
        self._look()
        self._load()

    # -- the dense model -----------------------------------------------------------------------------------------

    def _look(self) -> None:
        """One pass: what the data are, and what the dense model makes of them."""
        size = 0
        for inputs, labels in self.batches:
            outputs = self._run(self.program, inputs)
            self.samples += len(inputs[0])
            size += sum(t.numel() * t.element_size() for t in outputs)
            if size <= _KEPT_OUTPUTS:
                self._dense.append(outputs)
            for tensor in (*inputs, *([] if labels is None else [labels])):
                self._digest.update(tensor.contiguous().cpu().numpy().tobytes())
        if not self.samples:
            raise UsageError("there is nothing to calibrate on", why="the data are empty")
        if size > _KEPT_OUTPUTS:
            self._dense = []
        self.passes += 1
        causal = any(n.kwargs.get("is_causal") for n in self.program.graph.nodes)
        if self.metric is None:
            first = self._dense[0] if self._dense else outputs
            self.metric = metrics.metric_for(first, causal)
        self._measure = metrics.get(self.metric)

    def _run(self, program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
        args, kwargs = program.bind(program.complete(inputs))
        with torch.no_grad():
            return program.flat(*args, **kwargs)[: len(self.program.output_nodes)]

    # -- schedules -----------------------------------------------------------------------------------------------

    @property
    def layerwise(self) -> bool:
        """Whether every layer has a number of its own."""
        return self.recipe.place.name in LAYERWISE

    def scaled(self, budget: Budget) -> Schedule:
        """The recipe's own schedule, scaled to a budget: for places without layers of their own."""
        return Schedule.parse(within(budget, self._step(Schedule.parse(self.recipe.schedule)), self.program).schedule)

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

    def _rewritten(self, schedule: Schedule) -> PipelineResult:
        """The last few are kept."""
        key = str(schedule)
        if key not in self._programs:
            while len(self._programs) > 3:
                self._programs.pop(next(iter(self._programs)))
            self._programs[key] = Pipeline([self._step(schedule), RemoveDead()]).run(self.program)
        return self._programs[key]

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
        deviations, hits = (np.array(v) for v in self._values(schedule, batches))
        spread = float(deviations.std(ddof=1) / len(deviations) ** 0.5) if len(deviations) > 1 else 0.0
        accuracy = float(hits.mean()) if len(hits) else None
        cost = self.cost(schedule)
        return Evaluation(str(schedule), cost, float(deviations.mean()), spread, accuracy, len(deviations))

    def deviations(self, schedule: Schedule) -> np.ndarray:
        """Of every sample."""
        return np.array(self._values(schedule)[0])

    def _values(
        self, schedule: Schedule, batches: Iterable[Batch] | None = None, share: float = 1.0
    ) -> tuple[list[float], list[bool]]:
        """Deviation of every sample, and whether its answer is right, where labels are known."""
        if batches is not None:
            return self._run_all(schedule, batches)
        known, key = self._known.setdefault("evaluations", {}), f"{schedule} {share:.4f}"
        if key not in known:
            known[key] = self._run_all(schedule, self.batches, self._dense, share)
            self.passes += len(known[key][0]) / self.samples
        return known[key]

    def _run_all(
        self, schedule: Schedule, batches: Iterable[Batch], kept: Sequence[list[Tensor]] = (), share: float = 1.0
    ) -> tuple[list[float], list[bool]]:
        program = self.reduced(schedule)
        deviations: list[float] = []
        right: list[bool] = []
        for i, (inputs, labels) in enumerate(batches):
            if ceil((i + 1) * share) == ceil(i * share):  # batches all over the data: they may be in order of classes
                continue
            dense = kept[i] if i < len(kept) else self._run(self.program, inputs)
            outputs = self._run(program, inputs)
            deviations += self._measure(outputs, dense).double().tolist()
            right += self._right(outputs, labels)
        return deviations, right

    def outputs(self, schedule: Schedule) -> Iterator[tuple[list[Tensor], list[Tensor], Tensor | None]]:
        """What the program with a schedule returns, what the dense one does, and the labels, batch by batch."""
        program = self.reduced(schedule)
        for i, (inputs, labels) in enumerate(self.batches):
            dense = self._dense[i] if i < len(self._dense) else self._run(self.program, inputs)
            yield self._run(program, inputs), dense, labels

    @staticmethod
    def _right(outputs: Sequence[Tensor], labels: Tensor | None) -> list[bool]:
        hits = None if labels is None else metrics.correct(outputs, labels)
        return [] if hits is None else hits.tolist()

    def accuracy(self, batches: Iterable[Batch] | None = None) -> float | None:
        """Of the dense model."""
        right: list[bool] = []
        for i, (inputs, labels) in enumerate(self.batches if batches is None else batches):
            known = batches is None and i < len(self._dense)
            right += self._right(self._dense[i] if known else self._run(self.program, inputs), labels)
        return sum(right) / len(right) if right else None

    def _step(self, schedule: Schedule) -> ReduceTokens:
        return ReduceTokens(self.recipe, schedule)

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
        counted, share = self.price.counted, min(1.0, _PASSES / (len(places) * len(RATIOS)))
        layers, tokens = tuple(places), max(places.values())
        chained = self.recipe.place.name != "attention"
        error, saved = np.zeros((len(layers), len(RATIOS))), np.zeros((len(layers), len(RATIOS)))
        for i, layer in enumerate(layers):
            for j, ratio in enumerate(RATIOS):
                self.progress("measure layers", i * len(RATIOS) + j, len(layers) * len(RATIOS))
                schedule = alone(layer, round((1 - ratio) * places[layer]))
                error[i, j] = np.mean(self._values(schedule, share=share)[0])
                saved[i, j] = 1 - self.cost_of(schedule, counted)
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
