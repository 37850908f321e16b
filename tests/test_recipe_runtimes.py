"""Every recipe is built for every runtime that is here, and computes there what its program computes, or is refused."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenopt import matrix, recipes, runtimes
from tokenopt.errors import LoweringError, UsageError
from tokenopt.matrix import attempt, build_all, recipe_matrix
from tokenopt.program import Program, capture
from tokenopt.runtimes.base import Engine
from tokenopt.runtimes.onnx import write
from tokenopt.runtimes.tensorrt import TensorRTRTX, read_description
from tokenopt.tokens.recipe import PARTS, TokenRecipe

rtx = pytest.mark.skipif(TensorRTRTX().available() is not None, reason="tensorrt_rtx is not installed")
FOLDER = tempfile.TemporaryDirectory()
TRIED = {name: recipes.get(name) for name in recipes.names(TokenRecipe)}
TRIED["cdpruner-text"] = TRIED["cdpruner"].with_settings({"score": "text"})  # one more input


def representatives() -> set[str]:
    """Recipes that have all parts of all recipes between them: an engine is built of each, not of their variations."""
    seen: set[Any] = set()
    chosen = set()
    for name, recipe in TRIED.items():
        parts = {(kind, getattr(getattr(recipe, kind), "name", None)) for kind in PARTS}
        if not parts <= seen:
            chosen.add(name)
            seen |= parts
    return chosen


def cases() -> Iterator[Any]:
    """Those of one recipe side by side, as they share an ONNX file."""
    chosen = representatives()
    for name in TRIED:
        yield pytest.param(name, "onnxruntime", id=f"{name}-onnxruntime")
        if name in chosen:
            yield pytest.param(name, "tensorrt-rtx", id=f"{name}-tensorrt-rtx", marks=[pytest.mark.tensorrt, rtx])


@cache
def onnx_file(name: str) -> tuple[Engine, Program]:
    trial = attempt(TRIED[name])
    assert trial.status == "ok", trial.why
    return runtimes.get("onnxruntime").build(trial.program, Path(FOLDER.name) / f"{name}.onnx"), trial.program


@pytest.mark.parametrize(("name", "runtime"), list(cases()))
def test_recipe_on_runtime(name: str, runtime: str, tmp_path: Path) -> None:
    """The ONNX file has a dynamic batch, and agrees with the program at batch 1 and 3; an engine is built from it."""
    engine, program = onnx_file(name)
    if runtime == "onnxruntime":
        assert engine.dynamic_batch and all(check.passed for check in engine.parity)
        assert {c.batch for c in engine.parity if c.inputs == "random"} == {1, 3}
        assert all(s.max_rel < 1e-4 for c in engine.parity for s in c.outputs.values())
        return
    built = runtimes.get(runtime).build(program, tmp_path / "model.engine", source=engine)
    assert built.batch_limits == (1, 64)
    assert read_description(built.path).outputs == program.outputs


def test_the_matrix_says_what_was_built() -> None:
    (row,) = recipe_matrix(["divprune"], ["eager", "onnxruntime"])
    assert (row["recipe"], row["model"], list(row["runtimes"])) == ("divprune", "image", ["eager", "onnxruntime"])
    for cell in row["runtimes"].values():
        assert cell["status"] == "ok" and cell["error"] < 1e-5 and cell["why"] == ""


@pytest.mark.tensorrt
@rtx
def test_an_engine_that_cannot_run_here_was_built() -> None:
    (row,) = recipe_matrix(["pool"])
    cell = row["runtimes"]["tensorrt-rtx"]
    assert cell["status"] == ("ok" if torch.cuda.is_available() else "built") and cell["why"] == ""


def test_what_is_refused_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text_rows = TokenRecipe("mine", "", "", "topk", score="text_rows", schedule={"keep": 0.5})
    trial = attempt(text_rows)
    assert (trial.status, trial.program, trial.model) == ("refused", None, "image")
    assert "no segment 'text'" in trial.why
    assert build_all(trial, ["onnxruntime"], tmp_path)["onnxruntime"]["status"] == "refused"

    def no_data(*_: object) -> None:
        raise UsageError("there is no data to learn from")

    monkeypatch.setattr(matrix, "fit", no_data)
    trial = attempt(recipes.get("dtop"))
    assert (trial.status, trial.why) == ("needs data", "there is no data to learn from")

    def cannot(*_: object, **__: object) -> None:
        raise LoweringError("it cannot be written", why="Sort has no form")

    monkeypatch.setattr(type(runtimes.get("onnxruntime")), "build", cannot)
    trial = attempt(recipes.get("pool"))
    cell = build_all(trial, ["onnxruntime"], tmp_path)["onnxruntime"]
    assert cell == {"status": "refused", "error": None, "why": "it cannot be written: Sort has no form"}


@pytest.mark.tensorrt
@rtx
@pytest.mark.parametrize("kind", ["topk", "bipartite"])
def test_more_tokens_than_tensorrt_sorts_are_refused(kind: str, tmp_path: Path) -> None:
    """TopK ends at K = 3840, and the parser's message would be about an internal layer."""

    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            ops = torch.ops.tokenopt
            if kind == "topk":
                return ops.select_topk(x.sum(2), 3900, 0, 4000, False)[0]
            return ops.match_bipartite(x, 10, 0, 8000)[0]

    program = capture(Long(), torch.randn(2, 4000 if kind == "topk" else 8000, 2))
    write(program, tmp_path / "model.onnx")
    with pytest.raises(LoweringError, match="TopK: K = .* is more than 3840") as caught:
        TensorRTRTX()._require_expressible(tmp_path / "model.onnx")
    assert "fewer tokens" in str(caught.value)
