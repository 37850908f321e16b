"""Every recipe for every runtime: built on small models, compared, or refused with the reason."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenopt import recipes, runtimes
from tokenopt.errors import TokenoptError, UsageError
from tokenopt.fitting import fit, needs_data
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program, capture, flatten_tensors
from tokenopt.runtimes.base import Engine
from tokenopt.schedule import Schedule
from tokenopt.small_models import DEPTH, MODELS, small_model
from tokenopt.tokens.recipe import TokenRecipe

Progress = Callable[[str, int, int], None]

RUNTIMES = ("eager", "onnxruntime", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Trial:
    """A recipe on a small model: the rewritten program, or why there is none.

    Args:
        status: "ok", "needs data" or "refused".
    """

    recipe: str
    model: str
    status: str
    why: str = ""
    program: Program | None = None


def recipe_matrix(
    names: Iterable[str] | None = None, runtime_names: Iterable[str] | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Builds recipes for runtimes.

    Args:
        names: of recipes; all by default.
        runtime_names: of runtimes; all that can build on this machine by default.
        progress: called with (stage, done, total).

    Returns:
        A dict per recipe: ``recipe``, ``model`` ("image" or "video", the first that it reduces), ``runtimes``
        {name: {status, error, why}}. ``status`` is "ok" if a file was built and computes what the program computes,
        "built" if it cannot run on this machine, else "needs data", "refused" or "differs"; ``error`` is the largest
        relative difference, or null.
    """
    chosen = list(names if names is not None else recipes.names(TokenRecipe))
    known = [r for r in RUNTIMES if runtimes.get(r).available() is None] if runtime_names is None else runtime_names
    rows = []
    for done, name in enumerate(chosen):
        if progress is not None:
            progress(name, done, len(chosen))
        trial = attempt(recipes.get(name))
        with tempfile.TemporaryDirectory() as folder:
            cells = build_all(trial, known, Path(folder))
        rows.append({"recipe": name, "model": trial.model, "runtimes": cells})
    return rows


def attempt(recipe: TokenRecipe) -> Trial:
    """A recipe on the first small model that it reduces, with its own schedule at one layer."""
    trials = []
    for model in MODELS:
        trials.append(_attempt(recipe, model))
        if trials[-1].status != "refused":
            return trials[-1]
    return trials[0]


def build_all(trial: Trial, names: Iterable[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Files for several runtimes in a folder: {runtime: {status, error, why}}."""
    cells: dict[str, dict[str, Any]] = {}
    made: dict[str, Engine] = {}
    for name in names:
        cells[name] = {"status": trial.status, "error": None, "why": trial.why}
        if trial.program is None:
            continue
        runtime = runtimes.get(name)
        reads_onnx = "source" in inspect.signature(runtime.build).parameters
        options = {"source": made["onnxruntime"]} if reads_onnx and "onnxruntime" in made else {}
        try:
            engine = made[name] = runtime.build(trial.program, folder / f"{name}{runtime.suffix}", **options)
        except TokenoptError as error:
            status = "differs" if error.exit_code == 4 else "refused"
            cells[name] |= {"status": status, "why": ": ".join(filter(None, (error.what, error.why)))}
            continue
        checks = [c for c in engine.parity if c.check == engine.runtime and c.outputs]
        errors = [s.max_rel for check in checks for s in check.outputs.values()]
        cells[name] |= {"status": "ok", "error": max(errors)} if errors else {"status": "built"}
    return cells


@cache
def _dense(model: str) -> Program:
    return canonicalize(capture(*small_model(model))).program


def _attempt(recipe: TokenRecipe, model: str) -> Trial:
    dense = _dense(model)
    schedule = _on_one_layer(recipe)
    with tempfile.TemporaryDirectory() as folder:
        if needs_data(recipe):
            batches = [flatten_tensors(dense.random_inputs(16, seed)) for seed in range(4)]
            try:
                recipe = fit(recipe, schedule, dense, batches, Path(folder) / "scorer.safetensors")
            except UsageError as error:
                return Trial(recipe.name, model, "needs data", error.what)
        result = Pipeline([ReduceTokens(recipe, schedule), RemoveDead()]).run(dense)
    if any(e.pass_spec.startswith(ReduceTokens.name) for e in result.edits):
        return Trial(recipe.name, model, "ok", program=result.program)
    why = next((r.why for r in result.refusals), "its schedule reduces nothing here")
    return Trial(recipe.name, model, "refused", why)


def _on_one_layer(recipe: TokenRecipe) -> Schedule:
    """The recipe's schedule at one layer alone, which is quicker to build: its first that there is, or the second."""
    schedule = Schedule.parse(recipe.schedule)
    if isinstance(schedule.r, int):
        return Schedule(r=[0, schedule.r])
    if schedule.keep is None or recipe.place.outputs:
        return schedule
    there = [x for x in schedule.layers or () if isinstance(x, float) or x < DEPTH]
    return Schedule(keep=schedule.keep, layers=(there[0] if there else 1,))
