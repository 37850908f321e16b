"""What a schedule costs: operations or tokens, which are counted, or milliseconds on the runtime that counts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenopt import runtimes
from tokenopt.cost import roofline_ms
from tokenopt.errors import UsageError
from tokenopt.program import Program
from tokenopt.runtimes.base import Engine
from tokenopt.runtimes.bench import bench
from tokenopt.runtimes.eager import EagerEngine

RUNTIMES = ("onnxruntime", "eager", "tensorrt", "tensorrt-rtx", "cuda")
_SECONDS, _ROUNDS = 4.0, (7, 40)  # that one comparison may take, and the rounds it has at least and at most


@dataclass(frozen=True)
class Price:
    """Cost of a program, relative to the dense one's, as a line: in what is counted, and per layer that reduces.

    Attributes:
        counted: "flops" or "tokens".
        fixed, slope, each: cost = fixed + slope x (share of what is counted) + each x (layers that reduce).
        dense_ms: what the dense program takes, where cost is latency.
    """

    counted: str = "flops"
    fixed: float = 0.0
    slope: float = 1.0
    each: float = 0.0
    dense_ms: float | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return self.counted if self.dense_ms is None else "latency"

    def __call__(self, share: float, reductions: int) -> float:
        return self.fixed + self.slope * share + self.each * reductions

    def counted_at(self, cost: float) -> float:
        """The share of what is counted at a cost, where no layer counts by itself."""
        return (cost - self.fixed) / self.slope

    @staticmethod
    def fitted(dense_ms: float, points: list[tuple[float, int, float]]) -> Price:
        """The line through the dense program and others (share of operations, layers that reduce, milliseconds)."""
        # dense: fixed + slope = 1; the others: 1 - slope (1 - share) + each n = ms / dense_ms
        a = torch.tensor([[share - 1, n] for share, n, _ in points], dtype=torch.float64)
        y = torch.tensor([[ms / dense_ms - 1] for *_, ms in points], dtype=torch.float64)
        slope, each = torch.linalg.lstsq(a, y, driver="gelsd").solution[:, 0].tolist()  # the least, of many
        each = max(each, 0.0)  # noise may say that reducing costs less than nothing
        slope = min(max(slope, 0.05), 1.5)
        return Price("flops", 1 - slope, slope, each, dense_ms)


@dataclass(frozen=True)
class Target:
    """Where latency counts.

    Attributes:
        runtime: one of `RUNTIMES`; cuda is ONNX Runtime on a GPU.
        batch: samples of a run.
        threads: of the CPU.
        modelled: take the roofline model even if the runtime is here.
    """

    runtime: str = "onnxruntime"
    batch: int = 1
    threads: int = 1
    modelled: bool = False

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise UsageError(f"there is no target {self.runtime!r}", hint=f"--for takes one of {', '.join(RUNTIMES)}")

    def missing(self) -> str | None:
        """Why latency is modelled rather than measured; None if it can be measured here."""
        if self.modelled:
            return "asked for"
        if self.runtime == "cuda":
            import onnxruntime

            here = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available()
            return None if here else "ONNX Runtime has no CUDA device here"
        return runtimes.get(self.runtime).available()

    @property
    def source(self) -> str:
        """For reports: measured on what, or modelled and why."""
        why = self.missing()
        return f"measured on {self.runtime}" if why is None else f"modelled: {why}"

    def race(self, programs: Mapping[str, Program]) -> dict[str, float]:
        """Milliseconds of each, all measured side by side in one run, or by the roofline model."""
        if self.missing() is not None:
            kind = "cpu" if self.runtime in ("onnxruntime", "eager") else "gpu"
            return {name: roofline_ms(program, self.batch, kind) for name, program in programs.items()}
        with tempfile.TemporaryDirectory() as folder:
            engines = [self._engine(program, Path(folder) / f"{i}") for i, program in enumerate(programs.values())]
            start = time.perf_counter()
            bench(engines, batches=[self.batch], threads=self.threads, rounds=1, warmup=1)
            seconds = (time.perf_counter() - start) / 3
            rounds = min(max(int(_SECONDS / seconds), _ROUNDS[0]), _ROUNDS[1])
            rows = bench(engines, batches=[self.batch], threads=self.threads, rounds=rounds, warmup=1)
        return {name: row["median_ms"] for name, row in zip(programs, rows, strict=True)}

    def _engine(self, program: Program, path: Path) -> Engine:
        if self.runtime == "eager":
            return EagerEngine.of(program, threads=self.threads)
        runtime = runtimes.get("onnxruntime" if self.runtime == "cuda" else self.runtime)
        path = path.with_suffix(runtime.suffix)
        runtime.build(program, path)
        return runtime.load(path, threads=self.threads)


def gate(
    sites: Mapping[int, str],
    build: Callable[[frozenset[int]], Program],
    target: Target,
    noise: float = 0.01,
) -> tuple[frozenset[int], list[dict[str, object]]]:
    """Keeps the rewrites that pay: each is taken back where the program without it is as fast.

    Rewrites are tried one by one, against all that are kept until then.

    Args:
        sites: the rewritten ones, by number: names for the rows.
        build: the program with the rewrites of these alone.
        noise: share by which a rewrite has to be faster.

    Returns:
        The numbers that are kept, and for each site {site, kept, why, speedup}: of the whole program, by this rewrite.
    """
    kept, rows = frozenset(sites), []
    for number, site in sites.items():
        times = target.race({"without": build(kept - {number}), "with": build(kept)})
        speedup = times["without"] / times["with"]
        pays = speedup > 1 + noise
        why = f"{times['with']:.3f} ms with it, {times['without']:.3f} ms without, {target.source}"
        kept = kept if pays else kept - {number}
        rows.append({"site": site, "kept": pays, "why": why, "speedup": speedup})
    return kept, rows
