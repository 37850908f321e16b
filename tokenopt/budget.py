"""Budgets that are counted: a schedule, what patterns see or how many heads go, until a program costs what it may."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from tokenopt.analysis.axes import propagate
from tokenopt.analysis.sites import find_sites
from tokenopt.cost import program_flops
from tokenopt.errors import BudgetError, Refusal, UsageError
from tokenopt.passes.drop_layers import DropLayers, heads_text
from tokenopt.passes.reduce_tokens import Planner, ReduceTokens
from tokenopt.passes.sparsify_attention import SparsifyAttention
from tokenopt.pipeline import Pass
from tokenopt.program import Edit, Program
from tokenopt.schedule import Budget, Schedule

_REWRITES = 8
_STRONGEST = (0.95, 0.9, 0.75, 0.5)  # of the factor that leaves next to nothing
_CLOSE = 0.005  # a share this little below the budget is near enough
_SHARES = 100  # of what patterns see, that are told apart


def within(budget: Budget, step: ReduceTokens, program: Program) -> ReduceTokens:
    """The reduction with its schedule scaled: the weakest that costs no more than the budget.

    Args:
        program: in canonical form, as raise-attention leaves it.

    Raises:
        BudgetError: if no scale of the schedule meets the budget; it says what the strongest one reaches.
        UsageError: if the schedule removes nothing, so that there is nothing to scale; for a budget of latency or loss.
    """
    recipe, schedule = step.resolved()
    if budget.metric not in SHARES:
        why = "it is measured" if budget.metric == "latency" else "what is lost can be seen on data alone"
        raise UsageError(f"the budget {budget} needs data to calibrate on", why=why, hint="give --data, or flops=60%")
    if schedule.is_identity:
        raise UsageError(f"the schedule {schedule} removes nothing, so it cannot be scaled to {budget}")
    layers = sum(s.kind in ("self", "joint") for s in find_sites(propagate(program))[0])
    measured: dict[str, float] = {}
    refused: dict[str, str] = {}

    def share(factor: float) -> tuple[float, Schedule]:
        scaled = schedule.scaled(factor, layers)
        if str(scaled) not in measured:
            reduced, planner = program.clone(), Planner(recipe, scaled)
            edits = [e for e in step.apply(reduced, planner).edits if e.before is not None]
            measured[str(scaled)] = SHARES[budget.metric](program, reduced, edits, recipe.place.outputs)
            if planner.refusals and not edits:
                refused[str(scaled)] = planner.refusals[0].why
        return measured[str(scaled)], scaled

    limit = 0.999 / (1.0 - schedule.keep) if schedule.keep is not None else _strongest(schedule, layers, program)
    low, high = 0.0, limit
    least, best = share(high)
    for part in _STRONGEST:  # a recipe may refuse to leave next to nothing
        if str(best) not in refused:
            break
        high = part * limit
        least, best = share(high)
    if least > budget.share:
        hint = (
            "give --budget tokens=...; FLOPs behind the output are not this model's"
            if recipe.place.outputs
            else ("allow more, or use a schedule that removes in earlier layers")
        )
        why = f"its schedule, scaled as far as it goes, leaves {least:.1%}"
        raise BudgetError(
            f"recipe {recipe.name} cannot meet the budget {budget}",
            why="; ".join([why, *([refused[str(best)]] if str(best) in refused else [])]),
            hint=hint,
        )
    factor = min(1.0, high / 2)
    for _ in range(_REWRITES):
        found, scaled = share(factor)
        if found <= budget.share:
            high, best = factor, scaled
            if budget.share - found <= _CLOSE:
                break
        else:
            low = factor
        factor = (low + high) / 2
    return replace(step, schedule=best)


def patterns_within(budget: Budget, step: SparsifyAttention, program: Program) -> SparsifyAttention:
    """Attention patterns that see as much as a budget of operations allows.

    Args:
        program: in canonical form, as raise-attention leaves it.

    Raises:
        BudgetError: if the smallest patterns cost more.
        UsageError: if no number says how much the patterns see; for a budget of anything but operations.
    """
    recipe = step.resolved()
    if recipe.at(1.0) is None:
        why = "no number says how much its patterns see"
        raise UsageError(f"recipe {recipe} cannot be scaled to {budget}", why=why)
    if step.pattern is None:
        at = lambda share: replace(step, recipe=recipe.at(share), sites="all")  # noqa: E731
    else:
        at = lambda share: replace(step, pattern=next(iter(recipe.at(share).pattern.values())))  # noqa: E731
    left = lambda share: _after(at(share), program)[0]  # noqa: E731
    refused = lambda share: next((r.why for r in _after(at(share), program)[1]), "")  # noqa: E731
    return at(largest_share(budget, str(recipe), left, refused))


def largest_share(
    budget: Budget,
    recipe: str,
    left: Callable[[float], float],
    refused: Callable[[float], str],
    progress: Callable[[float], None] = lambda _: None,
) -> float:
    """The largest share of what a recipe's patterns can see that meets a budget of operations.

    Args:
        left: the operations that are left where patterns see a share, of the dense program's.
        refused: why a share changed nothing; "" if it did.
        progress: called with the share that is tried.

    Raises:
        BudgetError: if the smallest share costs more.
        UsageError: for another budget.
    """
    if budget.metric != "flops":
        why = "it keeps all tokens" if budget.metric == "tokens" else "only operations can be counted without data"
        raise UsageError(f"recipe {recipe} cannot be fitted to {budget}", why=why, hint="--budget flops=80%")
    least = left(1 / _SHARES)
    if least > budget.share:
        why = f"where least is seen, {least:.1%} is left: all but attention costs as before"
        if reason := refused(1 / _SHARES):
            why = f"{why}; {reason}"
        raise BudgetError(f"recipe {recipe} cannot meet the budget {budget}", why=why, hint="allow more")

    def over(number: int) -> bool:
        progress(number / _SHARES)
        return left(number / _SHARES) > budget.share

    return (1 + bisect_left(range(2, _SHARES + 1), True, key=over)) / _SHARES


def heads_within(
    budget: Budget, step: DropLayers, program: Program, thresholds: Mapping[tuple[int, int], float]
) -> DropLayers:
    """As few heads dropped as a budget of operations takes, those first that need the segment least.

    Args:
        program: in canonical form, as raise-attention leaves it.
        thresholds: from which threshold on a head, (layer, head), is inactive.

    Raises:
        BudgetError: if dropping all of them is not enough.
        UsageError: for a budget of anything but operations.
    """
    if budget.metric != "flops":
        raise UsageError(f"heads cannot be fitted to {budget}", why="only operations are counted", hint="flops=80%")
    order = sorted(thresholds, key=lambda head: (thresholds[head], head))

    without = lambda count: replace(step, heads=heads_text(step.heads, order[:count]), inactive=0.0)  # noqa: E731
    left = lambda count: _after(without(count), program)[0]  # noqa: E731
    least = left(len(order))
    if least > budget.share:
        raise BudgetError(
            f"{step.name} cannot meet the budget {budget}",
            why=f"without the {len(order)} heads that can go, {least:.1%} is left", hint="allow more",
        )  # fmt: skip
    return without(bisect_left(range(len(order)), True, key=lambda count: left(count) <= budget.share))


def _after(step: Pass, program: Program) -> tuple[float, list[Refusal]]:
    """The operations that are left behind a step, of the program's, and what it refused."""
    reduced = program.clone()
    refusals = step.run(reduced).refusals
    return _flops(program, reduced, [], False), refusals


def _strongest(schedule: Schedule, layers: int, program: Program) -> float:
    """The factor that removes all tokens if it is spread as the schedule is."""
    sites = find_sites(propagate(program))[0]
    longest = max((s.axis.reducible.length for s in sites if s.axis and s.axis.reducible), default=1)
    removed = sum(schedule.scaled(1.0, layers).r)
    return longest / max(removed, 1)


def _flops(dense: Program, reduced: Program, edits: list[Edit], outputs: bool) -> float:
    return program_flops(reduced) / program_flops(dense)


def _tokens(dense: Program, reduced: Program, edits: list[Edit], outputs: bool) -> float:
    if outputs:
        return min((e.after / e.before for e in edits), default=1.0)
    before, after = (
        [n.args[0].meta["val"].shape[-2] for n in p.graph.nodes if n.target is torch.ops.tokenopt.attention.default]
        for p in (dense, reduced)
    )
    return sum(after) / max(sum(before), 1)


SHARES: dict[str, Callable[[Program, Program, list[Edit], bool], float]] = {"flops": _flops, "tokens": _tokens}
"""(dense program, reduced program, its edits, whether the recipe shortens outputs) -> the share that is left."""
