"""Latency of several models, measured side by side in one run."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from tokenopt.errors import LoweringError, UsageError
from tokenopt.runtimes.base import Engine
from tokenopt.runtimes.eager import EagerEngine

_SAMPLE = 2e-3  # seconds that one sample takes at least: a shorter call is repeated


@dataclass(frozen=True)
class Timing:
    """Latency of one callable.

    Args:
        median_ms, iqr_ms: median and interquartile range over the rounds, in milliseconds per call.
        ratio: how many times faster than the first: median over the rounds, each compared within itself.
    """

    name: str
    median_ms: float
    iqr_ms: float
    ratio: float
    rounds: int


def benchmark(calls: Mapping[str, Callable[[], Any]], rounds: int = 20, warmup: int = 3) -> list[Timing]:
    """Times callables in interleaved rounds, so that what slows the machine down slows all of them.

    Every round calls each of them once, in an order that rotates. A call of less than 2 ms is repeated within a round.
    """
    if rounds < 1 or not calls:
        raise UsageError("there is nothing to measure", why=f"{len(calls)} models, {rounds} rounds")
    names = list(calls)
    repeats = {}
    for name, call in calls.items():
        for _ in range(warmup):
            call()
        repeats[name] = max(1, math.ceil(_SAMPLE / max(_seconds(call, 1), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(_seconds(calls[name], repeats[name]) * 1e3)
    first = samples[names[0]]
    ratios = {n: statistics.median(a / b for a, b in zip(first, samples[n], strict=True)) for n in names}
    return [Timing(n, statistics.median(samples[n]), _spread(samples[n]), ratios[n], rounds) for n in names]


def bench(
    models: Sequence[str | os.PathLike[str] | Engine],
    *,
    batches: Sequence[int] = (1,),
    threads: int | None = 1,
    rounds: int = 20,
    warmup: int = 3,
    inputs: Sequence[Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Times any models (``.pt2``, ``.onnx``, ``.engine``, or engines) on the same inputs.

    One may take more inputs than another, behind those that both take, as a model that a recipe has added one to.

    Args:
        batches: batch sizes; each is measured on its own, all models interleaved.
        threads: how many a run on the CPU may use; None leaves it to the runtimes. An engine keeps its own.
        inputs: what to run on, instead of random inputs; rows are repeated or cut to the batch size.

    Returns:
        A dict per model and batch size: ``name, runtime, batch, threads, median_ms, iqr_ms, ratio, rounds``.

    Raises:
        LoweringError: if one of them cannot run on this machine.
        ParityError: if they take different inputs.
    """
    from tokenopt.runtimes import open as open_engine
    from tokenopt.runtimes.compare import require_same_inputs

    engines = [m if isinstance(m, Engine) else open_engine(m, threads=threads) for m in models]
    for engine in engines:
        reason = engine.unavailable()
        if reason is not None:
            raise LoweringError("the engine cannot run on this machine", where=str(engine.path), why=reason)
        require_same_inputs(engines[0], engine, more=True)
    names = _names(engines)
    source = max(engines, key=lambda e: (len(e.inputs), isinstance(e, EagerEngine)))
    rows = []
    for batch in batches:
        tensors = source.random_inputs(batch) if inputs is None else [_rows(t, batch) for t in inputs]
        calls = {name: _call(engine, tensors) for name, engine in zip(names, engines, strict=True)}
        for timing, engine in zip(benchmark(calls, rounds, warmup), engines, strict=True):
            rows.append({"runtime": engine.runtime, "batch": batch, "threads": threads, **asdict(timing)})
    return rows


def _call(engine: Engine, tensors: Sequence[Tensor]) -> Callable[[], Any]:
    placed = [t.to(engine.device) for t in tensors[: len(engine.inputs)]]
    return lambda: engine(*placed)


def _names(engines: Sequence[Engine]) -> list[str]:
    """The paths, with a number where one is given twice."""
    names: list[str] = []
    for engine in engines:
        name = str(engine.path or engine.runtime)
        count = sum(known == name or known.startswith(f"{name} (") for known in names)
        names.append(f"{name} ({count + 1})" if count else name)
    return names


def _rows(tensor: Tensor, batch: int) -> Tensor:
    return tensor.repeat(math.ceil(batch / len(tensor)), *[1] * (tensor.dim() - 1))[:batch]


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low
