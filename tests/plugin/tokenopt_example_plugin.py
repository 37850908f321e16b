"""An example plug-in: a pass, a recipe, a strategy and an axis rule, each registered by an entry point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

import tokenopt
from tokenopt.analysis.cuts import StreamCut
from tokenopt.calibration import Problem
from tokenopt.calibration.search import met
from tokenopt.calibration.solve import scaled
from tokenopt.recipes.tokens import TOME
from tokenopt.schedule import Schedule
from tokenopt.tokens.plan import Plan, Stream

HALF_TOME = replace(TOME, name="half-tome", summary="ToMe with r = 6", schedule={"r": 6})

tokenopt.axis_rule("example.scale", "b n c, c -> b n c")


@dataclass(frozen=True)
class KeepFirst(tokenopt.Rule):
    """From a given depth on, keeps the first half of the patches."""

    name = "keep-first"
    after: float = 0.5

    def check(self, cut: StreamCut):
        if cut.depth < self.after:
            return tokenopt.refuse("too early", hint=f"starts at depth {self.after}")
        return tokenopt.ok(keep=cut.segment.length // 2)

    def rewrite(self, stream: Stream, keep: int) -> Plan:
        falling = stream.constant("falling", -torch.arange(float(stream.total))[None])
        score = stream.insert(torch.ops.aten.expand.default, falling, [stream.editor.rows(), -1])
        return stream.topk(score, min(keep, stream.count))


@dataclass(frozen=True)
class FirstLayers:
    """Tokens go in the first layers, as many as the budget asks for."""

    def schedules(self, problem: Problem, budget: float, seed: int) -> Iterator[Schedule]:
        table, shape = problem.table(), Schedule.parse("r=8:-1")
        yield met(problem, table, budget, lambda target: scaled(table, shape, problem.depth, target))
