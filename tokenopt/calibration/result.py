"""What a calibration found, as an object and as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tokenopt.calibration.problem import Evaluation
from tokenopt.schedule import Budget, Schedule
from tokenopt.tokens.recipe import TokenRecipe


@dataclass
class Calibration:
    """What a calibration found.

    Attributes:
        schedule: the best that meets the budget.
        recipe, budget, metric: what was asked for; ``share``: the budget as a share of the dense model's cost.
        chosen: its evaluation on the data that were fitted on; ``held_out`` on data that were not, where there are any.
        fixed: fixed schedules of the same recipe at the same budget; ``random``: the chosen one, random tokens.
        trials: everything that was tried.
        sensitivity: [{layer, ratio, deviation}] of every layer alone.
        gate: [{site, kept, why, speedup}], what each reduction was measured to gain.
        latency: {source, dense_ms, ms, budget_ms, met}, for a budget of latency.
        effort: {stage: {passes, seconds}}, forward passes over the data and time, of the stages layers (each alone),
            solution (of their table), fixed (usual schedules), search (trials, gate and engines), held_out.
        interrupted: whether the search was ended early.
    """

    schedule: Schedule
    recipe: TokenRecipe
    budget: Budget
    share: float
    metric: str
    chosen: Evaluation
    held_out: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Evaluation] = field(default_factory=dict)
    random: Evaluation | None = None
    trials: list[Evaluation] = field(default_factory=list)
    sensitivity: list[dict[str, Any]] = field(default_factory=list)
    gate: list[dict[str, Any]] = field(default_factory=list)
    latency: dict[str, Any] = field(default_factory=dict)
    others: list[Calibration] = field(default_factory=list)
    effort: dict[str, dict[str, float]] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def seconds(self) -> float:
        """That it took."""
        return sum(spent["seconds"] for spent in self.effort.values())

    @property
    def front(self) -> list[dict[str, Any]]:
        """[{name, kind, recipe, cost, deviation, chosen}] of everything that was tried, of all recipes."""
        rows = []
        for of in (self, *self.others):
            named = [(e.schedule, "calibrated", e) for e in of.trials]
            named += [(name, "fixed", e) for name, e in of.fixed.items()]
            named += [("random", "random", of.random)] if of.random is not None else []
            if of.chosen.schedule not in {e.schedule for _, kind, e in named if kind != "random"}:  # the gate made it
                named.append((of.chosen.schedule, "calibrated", of.chosen))
            for name, kind, e in named:
                chosen = of is self and kind != "random" and e.schedule == self.chosen.schedule
                row = {"name": name, "kind": kind, "recipe": of.recipe.name, "cost": e.cost, "deviation": e.deviation}
                rows.append(row | {"chosen": chosen})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a report's ``calibration``."""
        return {
            "budget": str(self.budget),
            "metric": self.metric,
            "data": {"samples": self.chosen.samples},
            "recipe": self.recipe.name,
            "schedule": self.schedule.to_dict(),
            "fitted": asdict(self.chosen),
            "held_out": self.held_out,
            "sensitivity": self.sensitivity,
            "front": self.front,
            "gate": self.gate,
            "reverted": [{"site": row["site"], "why": row["why"]} for row in self.gate if not row["kept"]],
            "latency": self.latency,
            "trials": [{"number": i, "cost": e.cost, "deviation": e.deviation} for i, e in enumerate(self.trials)],
            "effort": {stage: {k: round(v, 2) for k, v in spent.items()} for stage, spent in self.effort.items()},
            "interrupted": self.interrupted,
        }
