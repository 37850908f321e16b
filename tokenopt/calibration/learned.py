"""Problems whose recipe learns from the data first: scores, and patterns of attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenopt.attention.recipe import AttentionRecipe
from tokenopt.budget import SHARES, largest_share
from tokenopt.calibration.problem import Problem
from tokenopt.errors import UsageError
from tokenopt.fitting import Attended, attended, fit, fit_to, needs_data
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.sparsify_attention import SparsifyAttention
from tokenopt.schedule import Budget, Schedule
from tokenopt.tokens.recipe import TokenRecipe
from tokenopt.tokens.score import Learned

_EVERYWHERE = Schedule(keep=0.5)
_USUAL = Schedule(keep=0.1)  # to see what seeing less is worth: all but attention stays


def problem_of(recipe: TokenRecipe | AttentionRecipe) -> type[Problem]:
    """The kind of problem that a recipe is.

    Raises:
        UsageError: if nothing of it can be calibrated.
    """
    refused = f"recipe {recipe} has no schedule to calibrate"
    if isinstance(recipe, AttentionRecipe):
        if recipe.at(1.0) is None:
            raise UsageError(refused, why="no number says how much its patterns see", hint="paro, sparsifiner, sparge")
        return Patterns
    if not needs_data(recipe):
        return Problem
    if not isinstance(recipe.score, Learned):
        hint = "select=bipartite, and --strategy dymu"
        raise UsageError(refused, why="its thresholds are for one schedule, and save nothing", hint=hint)
    return LearnedScore


class _Learning(Problem):
    """With weights that are learned, in files."""

    @cached_property
    def _folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory()

    def _file_of(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.safetensors"

    @property
    def files(self) -> Sequence[Path]:
        own = sorted(Path(self._folder.name).iterdir())
        return own if self.weights is None or not self.weights.exists() else [self.weights, *own]


class LearnedScore(_Learning):
    """A recipe whose score is learned once, at every place of the dense program, for all schedules."""

    @cached_property
    def _learned(self) -> TokenRecipe:
        self.passes += 1
        batches = (inputs for inputs, _ in self.batches)
        return fit(self.recipe, _EVERYWHERE, self.program, batches, self.weights or self._file_of("scorer"))

    def recipe_at(self, schedule: Schedule) -> TokenRecipe:
        return self.recipe if self.weights is None else self._learned

    def _step(self, schedule: Schedule) -> ReduceTokens:
        return ReduceTokens(self._learned, schedule)


class Patterns(_Learning):
    """A recipe that gives attention patterns: a schedule ``keep=S`` stands for `AttentionRecipe.at` that share."""

    recipe: Any
    layerwise, counted, usual = False, "flops", _USUAL

    @property
    def _learns(self) -> bool:
        return any(pattern.unfitted for pattern in self.recipe.at(1.0).pattern.values())

    @cached_property
    def _seen(self) -> Attended:
        self.passes += 1
        return attended(self.recipe.at(1.0), self.program, (inputs for inputs, _ in self.batches))

    def recipe_at(self, schedule: Schedule) -> AttentionRecipe:
        return (self.recipe if self.weights is None else self._fitted).at(schedule.keep)

    def _step(self, schedule: Schedule) -> SparsifyAttention:
        recipe = self._fitted.at(schedule.keep)
        if self._learns and not self._ready(recipe):
            recipe = fit_to(recipe, self._seen, self._file_of(str(schedule)))
        return SparsifyAttention(recipe=recipe)

    @cached_property
    def _fitted(self) -> AttentionRecipe:
        """The recipe, with what does not depend on the share learned."""
        if not self._learns:
            return self.recipe
        found = fit_to(self.recipe.at(1.0), self._seen, self.weights or self._file_of("weights"))
        scalable = all(p.at(1.0) is not None for p in found.pattern.values())
        return found if scalable and self._ready(found.at(1.0)) else self.recipe

    def _ready(self, recipe: AttentionRecipe) -> bool:
        """Whether nothing is left to learn for the attentions that were looked at."""
        return not any(recipe.pattern_at(i, self._seen.count).unfitted for i in self._seen.operands)

    def cost_of(self, schedule: Schedule, counted: str) -> float:
        """The share that is left of the dense program's "flops"."""
        found, key = self._known.setdefault("counts", {}), str(schedule)
        if key not in found:
            found[key] = {"flops": SHARES["flops"](self.program, self.reduced(schedule), [], False)}
        return found[key][counted]

    def scaled(self, budget: Budget) -> Schedule:
        """The largest share within a budget.

        Raises:
            BudgetError: if the smallest costs more.
            UsageError: for a budget of tokens: all stay.
        """
        at = lambda share: Schedule(keep=share)  # noqa: E731
        return at(
            largest_share(
                budget, str(self.recipe), lambda share: self.cost_of(at(share), "flops"),
                lambda share: self.refused(at(share)) or "",
                lambda share: self.progress(f"search the share that is seen, {share:.0%}", 0, 0),
            )
        )  # fmt: skip
