"""What a calibration asks of a model: programs for schedules, their cost, and what they do to the outputs on data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenopt.calibration import metrics
from tokenopt.calibration.solve import RATIOS, Table
from tokenopt.cost import program_flops
from tokenopt.errors import UsageError
from tokenopt.passes.reduce_tokens import Planner, ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program, atomic_path
from tokenopt.schedule import Schedule
from tokenopt.tokens.plan import Stream
from tokenopt.tokens.recipe import TokenRecipe

Batch = tuple[Sequence[Tensor], Tensor | None]  # inputs as flat tensors, and labels where they are known
LAYERWISE = ("mid", "block", "attention")  # places where every layer has a number of its own
_KEPT_OUTPUTS = 2**28  # bytes of the dense model's outputs that are kept; beyond, they are computed again
_PASSES = 10.0  # forward passes over the data that the table of all layers may take


@dataclass(frozen=True)
class Evaluation:
    """What one schedule does.

    Attributes:
        schedule: in text.
        share: of the dense program's floating-point operations.
        deviation: mean over samples, and ``spread``, its standard error.
        accuracy: share of samples whose label is the greatest score; None without labels.
        samples: how many were looked at.
    """

    schedule: str
    share: float
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
    """

    program: Program
    recipe: TokenRecipe
    batches: Iterable[Batch]
    metric: str | None = None
    cache: Path | None = None
    progress: Callable[[str, int, int], None] = field(default=lambda *_: None)
    passes: float = 0.0  # forward passes over the data so far
    off: float = 0.0  # what programs were found to cost more than the table says

    def __post_init__(self) -> None:
        self._dense: list[list[Tensor]] = []
        self._known: dict[str, Any] = {}
        self._programs: dict[str, Program] = {}
        self.samples = 0
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

    @property
    def dense_flops(self) -> float:
        return program_flops(self.program)

    # -- schedules -----------------------------------------------------------------------------------------------

    def places(self) -> dict[int, int]:
        """Layers where the recipe can reduce, with the tokens that can be reduced there."""
        looker = _Looker(self.recipe, Schedule(r=1))
        self._step(looker.schedule).apply(self.program.clone(), looker)
        return looker.seen

    def reduced(self, schedule: Schedule) -> Program:
        """The program with this schedule; the last few are kept."""
        key = str(schedule)
        if key not in self._programs:
            while len(self._programs) > 3:
                self._programs.pop(next(iter(self._programs)))
            self._programs[key] = Pipeline([self._step(schedule), RemoveDead()]).run(self.program).program
        return self._programs[key]

    def share(self, schedule: Schedule) -> float:
        """Of the dense program's operations."""
        found = self._known.setdefault("share", {})
        key = str(schedule)
        if key not in found:
            found[key] = program_flops(self.reduced(schedule)) / self.dense_flops
        return found[key]

    def evaluate(self, schedule: Schedule, batches: Iterable[Batch] | None = None, part: float = 1.0) -> Evaluation:
        """Deviation and accuracy of a schedule.

        Args:
            batches: other data than those to fit on.
            part: of the samples to look at.
        """
        found, key = self._known.setdefault("evaluations", {}), f"{schedule} {part:.3f}"
        if batches is None and key in found:
            return Evaluation(**found[key])
        evaluation = self._evaluate(schedule, batches, part)
        if batches is None:
            found[key] = vars(evaluation)
        return evaluation

    def _evaluate(self, schedule: Schedule, batches: Iterable[Batch] | None, part: float) -> Evaluation:
        program = self.reduced(schedule)
        deviations, right, labelled, seen = [], 0, 0, 0
        wanted = max(round(part * self.samples), 1) if batches is None else None
        for i, (inputs, labels) in enumerate(self.batches if batches is None else batches):
            if wanted is not None and seen >= wanted:
                break
            known = batches is None and i < len(self._dense)
            dense = self._dense[i] if known else self._run(self.program, inputs)
            if wanted is not None and seen + len(inputs[0]) > wanted:
                few = wanted - seen
                inputs, dense = [t[:few] for t in inputs], [t[:few] for t in dense]
                labels = None if labels is None else labels[:few]
            outputs = self._run(program, inputs)
            deviations.append(self._measure(outputs, dense).double().cpu())
            hits = None if labels is None else metrics.correct(outputs, labels)
            if hits is not None:
                right, labelled = right + int(hits.sum()), labelled + len(hits)
            seen += len(inputs[0])
        if batches is None:
            self.passes += seen / self.samples
        values = torch.cat(deviations)
        spread = float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
        accuracy = right / labelled if labelled else None
        return Evaluation(str(schedule), self.share(schedule), float(values.mean()), spread, accuracy, seen)

    def accuracy(self, batches: Iterable[Batch]) -> float | None:
        """Of the dense model."""
        right = total = 0
        for inputs, labels in batches:
            hits = None if labels is None else metrics.correct(self._run(self.program, inputs), labels)
            if hits is not None:
                right, total = right + int(hits.sum()), total + len(hits)
        return right / total if total else None

    def _step(self, schedule: Schedule) -> ReduceTokens:
        return ReduceTokens(self.recipe, schedule)

    # -- the table -----------------------------------------------------------------------------------------------

    def table(self) -> Table:
        """Error and cost of every layer at several shares: each is reduced alone, on a part of the data.

        Its cost counts operations. What lies between two layers' places is how much more one saves than the next.
        """
        if self.recipe.place.name not in LAYERWISE:
            raise UsageError(f"recipe {self.recipe.name} has no schedule of layers", why=f"place {self.recipe.place}")
        places = self.places()
        if not places:
            raise UsageError(f"recipe {self.recipe.name} reduces nothing on this model")
        layers, tokens = tuple(places), max(places.values())
        chained = self.recipe.place.name != "attention"
        part = min(1.0, _PASSES / (len(layers) * len(RATIOS)))
        error, saved = np.zeros((len(layers), len(RATIOS))), np.zeros((len(layers), len(RATIOS)))
        for i, layer in enumerate(layers):
            for j, ratio in enumerate(RATIOS):
                self.progress("measure layers", i * len(RATIOS) + j, len(layers) * len(RATIOS))
                schedule = alone(layer, round((1 - ratio) * places[layer]))
                found = self.evaluate(schedule, part=part)
                error[i, j], saved[i, j] = found.deviation, 1 - found.share
        self.save()
        # where one layer can remove no more, as a merge can no more than half, there is no more to measure
        grows = (np.diff(saved, axis=1, prepend=0) > 1e-9).all(0)
        valid = int(grows.argmin()) if not grows.all() else len(RATIOS)
        if not valid:
            raise UsageError(f"recipe {self.recipe.name} saves nothing where it removes tokens")
        error, saved = error[:, :valid], saved[:, :valid]
        # what is saved by all later places is counted by the next layer
        nothing = np.zeros((1, valid))
        between = saved - np.vstack([saved[1:], nothing]) if chained else saved
        cost = np.concatenate([np.zeros((len(layers) + 1, 1)), -np.vstack([nothing, between])], 1)
        cost[0] += 1.0  # what is not saved: the costs of stretches are less than nothing
        least = RATIOS[valid - 1] if valid < len(RATIOS) else 0.02
        return Table(layers, tokens, error, cost, least=least, chained=chained)

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
        self.seen: dict[int, int] = {}

    def __call__(self, stream: Stream) -> None:
        self.seen[stream.layer] = stream.count


def with_schedule(recipe: TokenRecipe, schedule: Schedule) -> TokenRecipe:
    """The recipe with a schedule of its own."""
    return replace(recipe, schedule=schedule.to_dict())
