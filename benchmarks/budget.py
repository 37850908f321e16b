"""Budgets: whether what was asked for is what is measured, and what fitting costs.

    python -m benchmarks.budget [--models deit_s vit_b] [--latency 0.7] [--samples 32] [--trials 4] [--out FILE]

ToMe is fitted to ``latency=0.7x`` on ONNX Runtime's CPU (one thread, batch 1) and exported; then the engine and the
dense one are timed anew, in interleaved rounds. The weights are random, and so are the images: latency does not depend
on them, and what deviation there is says nothing. *Again* is a second budget on what the first one has measured: the
seconds until its schedule is solved.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch

from benchmarks.machine import machine
from benchmarks.speed import MODELS
from tokenopt.calibration import Search, Target, fit
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program, capture
from tokenopt.runtimes import get
from tokenopt.runtimes import open as open_engine
from tokenopt.runtimes.bench import Timing, benchmark
from tokenopt.schedule import Schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_s", "vit_b"], choices=list(MODELS))
    parser.add_argument("--latency", type=float, default=0.7, help="of the dense model's")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore")
    lines = [
        "# Budgets",
        "",
        f"ONNX Runtime CPU, 1 thread, batch 1, {options.rounds} interleaved rounds, median (IQR) in ms;",
        f"{options.samples} samples, {options.trials} trials; {machine()}.",
        "",
        "| model | budget | dense | reduced | measured | schedule | passes for layers | seconds | again, seconds |",
        "|---" * 9 + "|",
    ]
    print("\n".join(lines), flush=True)
    for key in options.models:
        lines.append(_row(key, options))
        print(lines[-1], flush=True)
    if options.out is not None:
        options.out.write_text("\n".join([*lines, ""]))


def _row(key: str, options: argparse.Namespace) -> str:
    import timm

    name, size, _ = MODELS[key]
    torch.manual_seed(0)
    program = capture(timm.create_model(name).eval(), torch.randn(2, 3, size, size))
    data = [(torch.randn(options.samples, 3, size, size),)]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        asked = {"recipe": "tome", "data": data, "cache": cache, "calibrator": Search(options.trials)}
        start = time.perf_counter()
        found = fit(program, **asked, budget=f"latency={options.latency}x", target=Target(), keep_best=True)
        seconds = time.perf_counter() - start
        again = fit(program, **asked | {"calibrator": Search(0)}, budget="flops=55%")
        dense, reduced = _race(program, found.schedule, Path(folder), options.rounds)
    return (
        f"| {name} {size} | latency={options.latency}x | {dense.median_ms:.1f} ({dense.iqr_ms:.1f}) "
        f"| {reduced.median_ms:.1f} ({reduced.iqr_ms:.1f}) | {reduced.median_ms / dense.median_ms:.3f}x "
        f"| {found.schedule} | {found.effort['layers']['passes']:.1f} | {seconds:.0f} "
        f"| {again.effort['layers']['seconds'] + again.effort['solution']['seconds']:.1f} |"
    )


def _race(program: Program, schedule: Schedule, folder: Path, rounds: int) -> list[Timing]:
    """The dense model and that with the schedule, in engines of their own."""
    dense = canonicalize(program).program
    reduced = Pipeline([ReduceTokens("tome", schedule), RemoveDead()]).run(dense).program
    x, calls = program.example_inputs[0][0][:1], {}
    for part, made in (("dense", dense), ("reduced", reduced)):
        get("onnxruntime").build(made, folder / f"{part}.onnx")
        engine = open_engine(folder / f"{part}.onnx", threads=1)
        calls[part] = partial(engine, x)
    return benchmark(calls, rounds=rounds, warmup=1)


if __name__ == "__main__":
    main()
