"""Speed: ToMe against the dense model in ONNX Runtime on the CPU, side by side, with the FLOP ratio beside it.

    python -m benchmarks.speed [--models deit_s vit_b vit_l] [--batch 1 8] [--threads 1] [--rounds 7] [--out FILE]

All models are exported by tokenopt with the same settings (opset 20, float32), and run in interleaved rounds of one
process. *Slicing* is the same model with as many tokens in every layer, but always the first ones: a constant slice, so
that it scores, matches and merges nothing. What it falls short of the FLOP ratio is what the runtime loses on smaller
matrices and on reading all weights once a run, and *merging* is what ToMe takes longer, as a share of its own run.
Compile times are those of this run, without tracing and export.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.machine import machine
from benchmarks.recipe_cost import twin
from tokenopt import recipes
from tokenopt.analysis.axes import propagate
from tokenopt.analysis.cuts import find_cuts
from tokenopt.analysis.sites import find_sites
from tokenopt.cost import program_flops
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program, capture
from tokenopt.runtimes import get
from tokenopt.runtimes import open as open_engine
from tokenopt.runtimes.bench import benchmark

MODELS = {
    "deit_s": ("deit_small_patch16_224", 224, "r=13"),
    "vit_b": ("vit_base_patch16_224", 224, "r=13"),
    "vit_l": ("vit_large_patch16_384", 384, "r=23"),
}


@dataclass
class Variants:
    """The three programs of one model and what making them took."""

    dense: Program
    reduced: Program
    sliced: Program
    analysis_ms: float
    compile_s: float


def variants(name: str, size: int, schedule: str) -> Variants:
    import timm

    torch.manual_seed(0)
    program = capture(timm.create_model(name).eval(), torch.randn(2, 3, size, size))
    start = time.perf_counter()
    dense = canonicalize(program).program
    reduced = Pipeline([ReduceTokens("tome", schedule), RemoveDead()]).run(dense).program
    compile_s = time.perf_counter() - start
    sliced = Pipeline([ReduceTokens(twin(recipes.get("tome")), schedule), RemoveDead()]).run(dense).program
    start = time.perf_counter()
    axes = propagate(dense)
    find_cuts(axes, find_sites(axes)[0])
    analysis_ms = (time.perf_counter() - start) * 1e3
    return Variants(dense, reduced, sliced, analysis_ms, compile_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore")
    heads = ["model", "schedule", "batch", "dense", "ToMe", "slicing", "speed-up", "FLOP ratio", "of the FLOP ratio"]
    heads += ["slicing: of the FLOP ratio", "merging", "analysis ms", "compile s"]
    lines = [
        "# Speed",
        "",
        f"ONNX Runtime CPU, {options.threads} thread(s), float32, {options.rounds} interleaved rounds, median (IQR) in",
        f"ms; {machine()}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    print("\n".join(lines), flush=True)
    for key in options.models:
        name, size, schedule = MODELS[key]
        made = variants(name, size, schedule)
        flops = program_flops(made.dense) / program_flops(made.reduced)
        with tempfile.TemporaryDirectory() as folder:
            engines = {}
            for part in ("dense", "reduced", "sliced"):
                path = Path(folder) / f"{part}.onnx"
                get("onnxruntime").build(getattr(made, part), path)
                engines[part] = open_engine(path, threads=options.threads)
            for batch in options.batch:
                x = torch.randn(batch, 3, size, size)
                calls = {part: (lambda e=engine, x=x: e(x)) for part, engine in engines.items()}
                dense, reduced, sliced = benchmark(calls, rounds=options.rounds, warmup=1)
                merging = 1 - reduced.ratio / sliced.ratio
                times = " | ".join(f"{t.median_ms:.1f} ({t.iqr_ms:.1f})" for t in (dense, reduced, sliced))
                lines.append(
                    f"| {name} {size} | {schedule} | {batch} | {times} | {reduced.ratio:.2f}x | {flops:.2f}x "
                    f"| {reduced.ratio / flops:.2f} | {sliced.ratio / flops:.2f} | {merging:.1%} "
                    f"| {made.analysis_ms:.0f} | {made.compile_s:.1f} |"
                )
                print(lines[-1], flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
