"""remove-dead: erases calls and weights that nothing reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenopt.graph import remove_dead
from tokenopt.pipeline import Pass, PassResult
from tokenopt.program import Edit, Program


@dataclass(frozen=True)
class RemoveDead(Pass):
    """Erases operations, weights and constants whose results nothing reads.

    Rewrite:  x; y = f(w); return x  ->  x; return x
    """

    name: ClassVar[str] = "remove-dead"

    def run(self, program: Program) -> PassResult:
        removed = remove_dead(program)
        return PassResult([Edit(self.spec, f"{removed} nodes")] if removed else [])
