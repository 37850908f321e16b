"""A reduction of your own in fifteen lines: drop the patches of low variance, from a given depth on.

python samples/custom_rule.py
"""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch

import tokenopt
from tokenopt.pipeline import parse_passes
from tokenopt.tokens.plan import Plan, Stream


@dataclass(frozen=True)
class DropFlat(tokenopt.Rule):
    """Keeps the tokens whose features vary most."""

    name = "drop-flat"
    keep: float = 0.7
    after: float = 0.5

    def check(self, cut: tokenopt.StreamCut):
        if cut.depth < self.after:
            return tokenopt.refuse("too early", hint=f"starts at depth {self.after}")
        return tokenopt.ok()

    def rewrite(self, stream: Stream) -> Plan:
        spread = stream.insert(torch.ops.aten.std.correction, stream.rows, [-1], correction=0)
        return stream.topk(spread, round(self.keep * stream.count))


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=10).eval()
    images = torch.randn(2, 3, 224, 224)
    program = tokenopt.capture(model, images)
    passes = parse_passes("fold-constants,raise-attention")
    result = tokenopt.Pipeline([*passes, DropFlat(keep=0.5), *parse_passes("remove-dead")]).run(program)
    for edit in result.edits:
        if edit.before:
            print(f"{edit.site}: {edit.before} -> {edit.after} tokens")
    for refusal in result.refusals:
        print(f"{refusal.where}: {refusal.why}")
    print("outputs", tuple(result.program(images).shape))


if __name__ == "__main__":
    main()
