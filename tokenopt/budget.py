"""From a budget to a schedule: a recipe's own schedule, scaled until the rewritten program costs no more."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from tokenopt.analysis.axes import propagate
from tokenopt.analysis.sites import AttentionSite, find_sites
from tokenopt.cost import program_flops
from tokenopt.errors import BudgetError, Refusal, UsageError
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program
from tokenopt.schedule import Budget, Schedule

REWRITES = 10  # at most, for one budget


def meet(budget: Budget, reduce: ReduceTokens, canonical: Program) -> tuple[Schedule, float]:
    """The schedule that removes least of those whose rewritten program is within a budget, and the share it reaches.

    Args:
        reduce: the recipe with the schedule whose shape is kept.
        canonical: the dense program, constants folded and attention raised.

    Raises:
        BudgetError: if none is; it says how near the best one came.
        UsageError: if the schedule removes nothing, so that it has no shape.
    """
    recipe, shape = reduce.resolved()
    if shape.is_identity:
        raise UsageError(f"a budget cannot scale the schedule {shape}", why="it removes nothing at any scale")
    sites, token_axes = find_sites(propagate(canonical))
    tokens = [a.reducible.length for a in token_axes if a.reducible is not None]
    search = _Search(budget, reduce, shape, canonical, sites, max(tokens, default=0))
    best = search.run()
    if best is None:
        raise BudgetError(
            f"recipe {recipe.name} does not meet the budget {budget}",
            why=search.reason(),
            hint="a larger budget, another recipe, or a schedule of another shape",
        )
    return shape.scaled(best), search.costs[best]


def token_counts(sites: list[AttentionSite], program: Program) -> tuple[list[int], list[int]]:
    """Tokens that enter each attention, before and after; sites that were not raised are as before."""
    now = [n for n in program.graph.nodes if n.target is torch.ops.tokenopt.attention.default]
    raised = [s for s in sites if s.raised]
    counts = {s.id: int(n.args[0].meta["val"].shape[-2]) for s, n in zip(raised, now, strict=False)}
    before = [s.queries for s in sites]
    return before, [counts.get(s.id, s.queries) for s in sites]


@dataclass
class _Search:
    """Costs by scale. A larger scale costs less, up to one at which the recipe refuses, or can do no more."""

    budget: Budget
    reduce: ReduceTokens
    shape: Schedule
    canonical: Program
    sites: list[AttentionSite]
    tokens: int
    costs: dict[int, float] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    def run(self) -> int | None:
        """The smallest scale found within the budget."""
        low, high = 0, self.shape.limit(self.tokens)  # low: too dear; high: cheap enough, or refused
        self.costs[0], best = 1.0, None
        guess = self._first(high)
        while low < high - (best is not None) and len(self.costs) <= REWRITES:
            reduced = self._try(guess)
            if reduced and self.costs[guess] <= self.budget.share:
                high = best = guess
            elif reduced:
                low = guess
            else:
                high = guess - 1
            if best is None and low >= high:
                break
            guess = self._next(low, high, best)
        return best

    def _first(self, limit: int) -> int:
        """A scale to begin with: the one that would remove the budget's share of the tokens."""
        if self.shape.keep is not None:
            return min(limit, max(1, round(limit * (1.0 - self.budget.share))))
        layers = max(1, len(self.sites))
        return min(limit, max(1, round(2 * self.tokens * (1.0 - self.budget.share) / layers)))

    def _next(self, low: int, high: int, best: int | None) -> int:
        """Between too dear and cheap enough: where a line between them meets the budget, alternating with the middle."""
        if best is None:
            return min(high, max(low + 1, 2 * low))
        if len(self.costs) % 2:
            return (low + high) // 2
        a, b = self.costs[low], self.costs[high]
        at = low + round((high - low) * (a - self.budget.share) / (a - b)) if a > b else high - 1
        return min(high - 1, max(low + 1, at))

    def _try(self, scale: int) -> bool:
        """Whether anything is reduced at a scale; its cost is noted."""
        step = replace(self.reduce, schedule=self.shape.scaled(scale))
        result = Pipeline([step, RemoveDead()]).run(self.canonical)
        edits = [e for e in result.edits if e.pass_spec.startswith(ReduceTokens.name)]
        leave = {e.site: e.after / e.before for e in edits if e.before and e.after is not None}
        self.refusals += [r for r in result.refusals if r not in self.refusals]
        if self.budget.metric == "flops":
            self.costs[scale] = program_flops(result.program) / max(program_flops(self.canonical), 1.0)
        elif self.reduce.resolved()[0].place.outputs:
            self.costs[scale] = max(leave.values(), default=1.0)
        else:
            before, after = token_counts(self.sites, result.program)
            self.costs[scale] = sum(after) / max(sum(before), 1)
        return bool(edits)

    def reason(self) -> str:
        """How near it came, and what stood in the way."""
        best = min(self.costs, key=lambda scale: (self.costs[scale], scale))
        if best == 0:
            refused = next((r.why for r in self.refusals), None)
            return f"it reduces nothing here{f': {refused}' if refused else ''}"
        reached = f"the best that was reached is {self.budget.metric}={100 * self.costs[best]:.1f}%"
        return f"{reached}, with {self.shape.scaled(best)}"
