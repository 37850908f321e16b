"""Calibrated schedules against fixed ones of the same recipe, at the same budget, on data that were not fitted on.

    python -m benchmarks.calibration [--tasks digits localise minilm] [--seeds 5] [--budgets 70 50 35] [--out FILE]

The inputs of a task are such as its model was not trained on. A part of them is fitted on and the others are held out,
chosen by the seed; for digits and localise a seed is another model too. A row is one task, recipe and budget: deviation
from the dense model on held-out data, mean and standard deviation over the seeds, of what calibration chooses, of each
fixed schedule, and of the fixed schedule that is best on the same fitted data.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.tasks import TASKS
from tokenopt.calibration import Search, cache_folder, fit
from tokenopt.errors import TokenoptError
from tokenopt.program import capture

FITTED = {"digits": 194, "localise": 256, "minilm": 10}  # samples; all others are held out


def run(task: str, seed: int, budget: int, recipe: str, trials: int) -> dict[str, float]:
    """Deviation on held-out data by what chose the schedule: calibrated, best fixed, and each fixed one."""
    trial = TASKS[task].trial(seed)
    rows = torch.randperm(len(trial.inputs[0]), generator=torch.Generator().manual_seed(seed))
    fitted, held = rows[: FITTED[task]], rows[FITTED[task] :]
    program = capture(trial.model, tuple(t[:2] for t in trial.inputs))
    parts: list[Any] = [[tuple(t[part] for t in trial.inputs)] for part in (fitted, held)]
    found = fit(
        program, recipe, parts[0], held_out=parts[1], budget=f"flops={budget}%", seed=seed,
        calibrator=Search(trials), cache=cache_folder(),
    )  # fmt: skip
    fixed = {name: row["deviation"] for name, row in found.held_out["fixed"].items() if name != "random"}
    best = min(found.fixed, key=lambda name: found.fixed[name].deviation)
    return {"calibrated": found.held_out["deviation"], "best fixed": fixed[best]} | fixed


def main() -> None:
    parser = argparse.ArgumentParser(description="Calibrated schedules against fixed ones, on held-out data.")
    parser.add_argument("--tasks", nargs="+", default=list(FITTED), choices=list(FITTED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budgets", nargs="+", type=int, default=[70, 50, 35], help="per cent of the operations")
    parser.add_argument("--recipes", nargs="+", default=["tome", "auto"])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--out", type=Path, help="the table, also printed")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    lines = ["| task | recipe | FLOPs | seeds | chosen by | held-out deviation |", "|---|---|---|---|---|---|"]
    for task in options.tasks:
        for recipe in options.recipes:
            for budget in options.budgets:
                found: list[dict[str, float]] = []
                for seed in range(options.seeds):
                    print(f"{task} {recipe} {budget}% seed {seed}", file=sys.stderr, flush=True)
                    try:
                        found.append(run(task, seed, budget, recipe, options.trials))
                    except TokenoptError as error:
                        print(error, file=sys.stderr)
                for name in dict.fromkeys(name for row in found for name in row):
                    values = [row[name] for row in found if name in row]
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    cell = f"{statistics.mean(values):.4f} ± {spread:.4f}"
                    lines.append(f"| {task} | {recipe} | {budget} % | {len(values)} | {name} | {cell} |")
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
