"""Calibrated schedules against fixed ones of the same recipe, at the same budget, on data that were not fitted on.

    python -m benchmarks.calibration [--tasks digits localise minilm] [--seeds 5] [--budgets 70 50 35] [--out FILE]

No model has seen the inputs. A part of them is fitted on and others are held out, chosen by the seed; for digits and
localise a seed is another model too. A row is one task, recipe and budget: deviation from the dense model on held-out
data, mean and standard deviation over the seeds, of what calibration chose, of each fixed schedule, and of the fixed
schedule that is best on the fitted data. *Better* counts the seeds where calibration deviates less than that schedule.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.tasks import TASKS, scenes, tokenise
from tokenopt.calibration import Search, cache_folder, fit
from tokenopt.errors import TokenoptError
from tokenopt.program import capture

Inputs = tuple[Tensor, ...]


def digits(seed: int) -> tuple[nn.Module, Inputs, Inputs]:
    """Those that were not trained on, each shifted by up to half a pixel of the scan; held-out ones in several ways."""
    trial = TASKS["digits"].trial(seed)
    (fitted,), (held,) = _split(trial.inputs, 256, seed)
    shifts = ((0, 0), (2, 2), (-2, -2))
    mixed = [torch.roll(fitted[i::3], shift, (2, 3)) for i, shift in enumerate(shifts)]
    return trial.model, (torch.cat(mixed),), (torch.cat([torch.roll(held, shift, (2, 3)) for shift in shifts]),)


def localise(seed: int) -> tuple[nn.Module, Inputs, Inputs]:
    """Any number of scenes can be made."""
    return TASKS["localise"].trial(seed).model, *_split((scenes(1024, seed=2)[0],), 256, seed)


def minilm(seed: int) -> tuple[nn.Module, Inputs, Inputs]:
    """Paragraphs of Python's own manual, as it is installed with it."""
    from pydoc_data.topics import topics

    paragraphs = [" ".join(p.split()) for name in sorted(topics) for p in topics[name].split("\n\n")]
    prose = [p for p in paragraphs if 80 < len(p) < 400 and re.match(r"[A-Z][a-z]", p) and p.endswith(".")]
    texts = [p for p in dict.fromkeys(prose) if "::" not in p and ">>>" not in p]
    inputs = tokenise(texts)
    fitted, held = _split(inputs, 256, seed)
    return TASKS["minilm"].trial(0).model, fitted, tuple(t[:192] for t in held)


SAMPLES: dict[str, Callable[[int], tuple[nn.Module, Inputs, Inputs]]] = {
    "digits": digits, "localise": localise, "minilm": minilm
}  # fmt: skip


def _split(inputs: Inputs, count: int, seed: int) -> tuple[Inputs, Inputs]:
    rows = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(seed))
    fitted, held = rows[:count], rows[count:]
    return tuple(t[fitted] for t in inputs), tuple(t[held] for t in inputs)


def run(task: str, seed: int, budget: int, recipe: str, trials: int) -> dict[str, float]:
    """Deviation on held-out data by what chose the schedule: calibrated, best fixed, and each fixed one."""
    model, fitted, held = SAMPLES[task](seed)
    program = capture(model, tuple(t[:2] for t in fitted))
    found = fit(
        program, recipe, [fitted], held_out=[held], budget=f"flops={budget}%", seed=seed,
        calibrator=Search(trials), cache=cache_folder(),
    )  # fmt: skip
    fixed = {name: row["deviation"] for name, row in found.held_out["fixed"].items() if name != "random"}
    best = min(found.fixed, key=lambda name: found.fixed[name].deviation)
    print(f"{found.recipe.name} {found.schedule}: {found.effort}", file=sys.stderr, flush=True)
    singles = {}
    if found.others:  # which recipe alone would have been best
        singles = {c.recipe.name: c.held_out["deviation"] for c in (found, *found.others)}
    return {"calibrated": found.held_out["deviation"], "best fixed": fixed[best]} | fixed | singles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(SAMPLES), choices=list(SAMPLES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budgets", nargs="+", type=int, default=[70, 50, 35], help="per cent of the operations")
    parser.add_argument("--recipes", nargs="+", default=["tome", "auto"])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--out", type=Path, help="the table, also printed")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    lines = [
        "# Calibration",
        "",
        f"Deviation from the dense model on held-out data, mean ± standard deviation over {options.seeds} seeds;",
        f"{options.trials} trials each; {machine()}.",
        "",
        "| task | recipe | FLOPs | chosen by | held-out deviation | better |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for task in options.tasks:
        for recipe in options.recipes:
            for budget in options.budgets:
                for line in _rows(task, recipe, budget, options.seeds, options.trials):
                    lines.append(line)
                    print(line, flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


def _rows(task: str, recipe: str, budget: int, seeds: int, trials: int) -> list[str]:
    found: list[dict[str, float]] = []
    for seed in range(seeds):
        print(f"{task} {recipe} {budget}% seed {seed}", file=sys.stderr, flush=True)
        try:
            found.append(run(task, seed, budget, recipe, trials))
        except TokenoptError as error:
            print(error, file=sys.stderr)
    rows = []
    for name in dict.fromkeys(name for row in found for name in row):
        with_it = [row for row in found if name in row]
        values = [row[name] for row in with_it]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        better = (
            "" if name == "calibrated" else f"{sum(row['calibrated'] < row[name] for row in with_it)} of {len(with_it)}"
        )
        mean = statistics.mean(values)
        places = 2 - math.floor(math.log10(mean)) if mean > 0 else 2
        cell = f"{mean:.{places}f} ± {spread:.{places}f}"
        rows.append(f"| {task} | {recipe} | {budget} % | {name} | {cell} | {better if name != 'calibrated' else ''} |")
    return rows


if __name__ == "__main__":
    main()
