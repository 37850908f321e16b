"""An example plug-in: a pass, a recipe and an axis rule, each registered by an entry point."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import tokenopt
from tokenopt.analysis.cuts import StreamCut
from tokenopt.recipes.tokens import TOME
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
