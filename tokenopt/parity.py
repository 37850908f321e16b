"""Checks of anything that can be called against a program, as rows of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenopt.program import Program
from tokenopt.runtimes.base import Engine
from tokenopt.runtimes.compare import prove

Call = Callable[..., list[Tensor]]


@dataclass
class _Function(Engine):
    """A function of flat tensors, seen as an engine."""

    call: Call = list

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return self.call(*inputs)


@dataclass
class Parity:
    """Compares functions of flat tensors with a program, on fresh random, on the example and on given inputs.

    Args:
        program: what is right.
        given: one batch of the user's inputs, as flat tensors.
    """

    program: Program
    given: Sequence[Tensor] | None = None

    def check(self, name: str, call: Call) -> list[dict[str, Any]]:
        """One row of a report's ``parity`` per kind of inputs and batch size.

        Raises:
            ParityError: if one of them differs.
        """
        function = _Function(None, name, self.program.inputs, self.program.outputs, call=call)
        checks = prove(self.program, function, data=[] if self.given is None else [self.given])
        return [check.to_dict() for check in checks]
