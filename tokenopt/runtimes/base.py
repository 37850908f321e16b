"""What every runtime provides: how a program becomes a file, and how a file runs."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tokenopt.errors import LoweringError, UsageError
from tokenopt.program import InputSpec, Program

if TYPE_CHECKING:
    from tokenopt.runtimes.compare import Check


@dataclass(frozen=True)
class Capabilities:
    """What a runtime can express.

    Args:
        max_topk: the largest K of a TopK; None is any.
        scatter_reduce: whether a scatter may add, multiply or take the maximum.
        data_dependent_shapes: whether a size may depend on values, as that of NonZero's result.
        attention_windows: whether the window attributes of an attention node are respected.
    """

    max_topk: int | None = None
    scatter_reduce: bool = True
    data_dependent_shapes: bool = True
    attention_windows: bool = True


@dataclass
class Engine(ABC):
    """A model that a runtime has opened. Call it with the input tensors, in order; it returns the output tensors.

    Args:
        path: the file it was opened from; None for a program in memory.
        runtime: name of the runtime that executes it.
        batch_limits: the smallest and the largest batch size; None where there is no largest.
        parity: the checks against the program that were made when it was built.
    """

    path: Path | None
    runtime: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    batch_limits: tuple[int, int | None] = (1, None)
    parity: list[Check] = field(default_factory=list)

    @property
    def dynamic_batch(self) -> bool:
        return any(is_batched(spec) for spec in self.inputs)

    @property
    def device(self) -> str:
        """Where inputs are read fastest from: "cpu" or "cuda"."""
        return "cpu"

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file the model consists of."""
        return () if self.path is None else (self.path,)

    def unavailable(self) -> str | None:
        """Why the engine cannot run on this machine; None if it can."""
        return None

    @property
    def runnable(self) -> bool:
        return self.unavailable() is None

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Runs the model.

        Raises:
            UsageError: if number, dtypes or shapes of the inputs are not what the model takes.
            LoweringError: if the engine cannot run on this machine.
        """
        reason = self.unavailable()
        if reason is not None:
            raise LoweringError("the engine cannot run on this machine", where=str(self.path), why=reason)
        self._check(inputs)
        with torch.no_grad():
            return self._run(inputs)

    @abstractmethod
    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for inputs whose dtypes and shapes are right."""

    def random_inputs(self, batch: int, seed: int = 0) -> list[Tensor]:
        """Fresh random inputs: floating tensors are normal, integers and booleans 0 or 1, which any vocabulary has."""
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for spec in self.inputs:
            shape = [batch if isinstance(size, str) else size for size in spec.shape]
            dtype = getattr(torch, spec.dtype)
            if dtype.is_floating_point:
                tensors.append(torch.randn(shape, generator=generator).to(dtype))
            else:
                tensors.append(torch.randint(2, shape, generator=generator).to(dtype))
        return tensors

    def batch_sizes(self, *wanted: int) -> list[int]:
        """Those of the wanted batch sizes that the engine takes; its only one where the batch is not dynamic."""
        if not self.dynamic_batch:
            fixed = [spec.shape[0] for spec in self.inputs if spec.shape]
            return [int(fixed[0]) if fixed else 1]
        low, high = self.batch_limits
        return sorted({max(low, size if high is None else min(size, high)) for size in wanted})

    def _check(self, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(self.inputs):
            raise UsageError(
                f"the model takes {len(self.inputs)} inputs, {len(inputs)} were given",
                where=str(self.path or self.runtime),
                why=f"its inputs are {', '.join(describe(spec) for spec in self.inputs)}",
            )
        for spec, value in zip(self.inputs, inputs, strict=True):
            if not matches(spec, value):
                raise UsageError(
                    f"the input {spec.name!r} does not fit",
                    where=str(self.path or self.runtime),
                    why=f"given {dtype_name(value)}{list(value.shape)}, taken {describe(spec)}",
                )
        rows = {value.shape[0] for spec, value in zip(self.inputs, inputs, strict=True) if is_batched(spec)}
        low, high = self.batch_limits
        for batch in rows:
            if batch < low or (high is not None and batch > high):
                raise UsageError(
                    f"the batch size {batch} is out of range",
                    where=str(self.path or self.runtime),
                    why=f"the engine was built for {low} to {high}",
                    hint="build it with another batch profile",
                )


class Runtime(Protocol):
    """Turns programs into files of one format, and opens them."""

    name: str
    suffix: str
    capabilities: Capabilities

    def available(self) -> str | None:
        """Why the runtime cannot build on this machine; None if it can."""

    def build(self, program: Program, path: Path, **options: Any) -> Engine:
        """Writes the program to a file, proves the file equal to the program, and opens it.

        An existing file is replaced when all of that is done, and stays as it is otherwise.
        """

    def load(self, path: Path, *, threads: int | None = None) -> Engine:
        """Opens a file; ``threads`` bounds what one run uses, None leaves the choice to the runtime."""


def is_batched(spec: InputSpec) -> bool:
    """Whether the first dimension is the dynamic batch."""
    return bool(spec.shape) and isinstance(spec.shape[0], str)


def dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def describe(spec: InputSpec) -> str:
    """For messages: ``x: float32[batch, 3, 224, 224]``."""
    return f"{spec.name}: {spec.dtype}[{', '.join(str(size) for size in spec.shape)}]"


def matches(spec: InputSpec, value: Tensor) -> bool:
    """Whether a tensor has the dtype and, where they are fixed, the sizes of a specification."""
    return dtype_name(value) == spec.dtype and _same_shape(spec.shape, tuple(value.shape))


def require_same_interface(
    program: Program, inputs: Sequence[InputSpec], outputs: Sequence[InputSpec], where: str
) -> None:
    """Checks what was read back from a built model against the program it was built from.

    Raises:
        LoweringError: if a name, a dtype or a shape differs.
    """
    for kind, wanted, found in (("inputs", program.inputs, inputs), ("outputs", program.outputs, outputs)):
        if not same_specs(wanted, found) or [s.name for s in wanted] != [s.name for s in found]:
            raise LoweringError(
                f"the {kind} of the built model are not those of the program",
                where=where,
                why=f"program: {', '.join(map(describe, wanted))}; built: {', '.join(map(describe, found))}",
            )


def same_specs(a: Sequence[InputSpec], b: Sequence[InputSpec]) -> bool:
    """Whether dtypes and shapes agree; a dynamic size agrees with any."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype and _same_shape(x.shape, y.shape) for x, y in zip(a, b, strict=True)
    )


def _same_shape(wanted: Sequence[int | str], found: Sequence[int | str]) -> bool:
    return len(wanted) == len(found) and all(
        isinstance(w, str) or isinstance(f, str) or w == f for w, f in zip(wanted, found, strict=True)
    )


@contextlib.contextmanager
def replacing(path: Path, obsolete: Sequence[str] = ()) -> Iterator[Path]:
    """A path to build at. When the block succeeds, all files beside it go to the folder of ``path``, together.

    Args:
        obsolete: names beside ``path`` that are removed then, unless they were written anew.
    """
    from tokenopt.staging import staged

    with staged(path.parent) as staging:
        yield staging.path / path.name
        staging.commit(obsolete)
