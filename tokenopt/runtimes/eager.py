"""The program itself, run by torch; its file is a ``.pt2``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tokenopt.program import Program, flatten_tensors
from tokenopt.runtimes.base import Capabilities, Engine, replacing


@dataclass
class EagerEngine(Engine):
    """A program as an engine."""

    program: Program = field(kw_only=True)
    threads: int | None = None

    @classmethod
    def of(cls, program: Program, path: Path | None = None, threads: int | None = None) -> EagerEngine:
        return cls(path, Eager.name, program.inputs, program.outputs, program=program, threads=threads)

    @property
    def example(self) -> list[Tensor]:
        """The tensors the program was captured with."""
        return flatten_tensors(self.program.example_inputs)

    def random_inputs(self, batch: int, seed: int = 0) -> list[Tensor]:
        """Fresh random inputs like the example: integers are rows of it, so that ids stay in range."""
        return flatten_tensors(self.program.random_inputs(batch, seed))

    def perturbed(self, noise: float, trials: int, seed: int = 0) -> Iterator[Engine]:
        """The program with ``noise`` units in the last place on every weight, drawn anew for each trial.

        The engines share one copy of the weights: use each before asking for the next.
        """
        module = copy.deepcopy(self.program.module())
        weights = [t.data for t in (*module.parameters(), *module.buffers()) if t.dtype.is_floating_point]
        originals = [w.clone() for w in weights]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(trials):
            for weight, original in zip(weights, originals, strict=True):
                scale = noise * torch.finfo(weight.dtype).eps
                weight.copy_(original * (1 + scale * torch.randn(original.shape, generator=generator).to(original)))
            yield _Moved(None, self.runtime, self.inputs, self.outputs, program=self.program, module=module)

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        args, kwargs = self.program.bind(inputs)
        if self.threads is None:
            return self.program.flat(*args, **kwargs)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self.program.flat(*args, **kwargs)
        finally:
            torch.set_num_threads(before)


@dataclass
class _Moved(Engine):
    """A module with a program's signature and other weights."""

    program: Program = field(kw_only=True)
    module: torch.nn.Module = field(kw_only=True)

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        args, kwargs = self.program.bind(inputs)
        return flatten_tensors(self.module(*args, **kwargs))


class Eager:
    """Torch. ``build`` saves a ``.pt2``; ``load`` opens one."""

    name = "eager"
    suffix = ".pt2"
    capabilities = Capabilities()

    def available(self) -> str | None:
        return None

    def build(
        self, program: Program, path: Path, *, tolerance: float | None = None, data: Sequence[Sequence[Tensor]] = ()
    ) -> Engine:
        """Saves the program, and checks that what is read back from the file computes the same."""
        from tokenopt.runtimes.compare import prove

        path = Path(path)
        with replacing(path) as staged:
            program.save(staged)
            engine = self.load(staged)
            engine.parity = prove(program, engine, tolerance, data)
        engine.path = path
        return engine

    def load(self, path: Path, *, threads: int | None = None) -> EagerEngine:
        """Opens a ``.pt2``.

        Raises:
            CaptureError: if it is none.
        """
        from tokenopt.loading import load_program

        return EagerEngine.of(load_program(path), Path(path), threads)
