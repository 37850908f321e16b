"""Stored values that were found by example equal those found by following symbols."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import tokenopt.ops  # noqa: F401  (registers the operations)
from tokenopt import capture
from tokenopt.errors import AxisConflict
from tokenopt.graph import GraphEditor
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program

ops = torch.ops.tokenopt


def layouts(value: Any) -> list[Any]:
    tensors = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
    return [(list(map(str, (*v.shape, *v.stride()))), v.dtype, v.device) for v in tensors]


@pytest.fixture(scope="module", params=[True, False], ids=["dynamic batch", "static batch"])
def dense(request: pytest.FixtureRequest) -> Program:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    program = capture(model, torch.randn(2, 3, 64, 64), dynamic_batch=request.param)
    return Pipeline([FoldConstants(), RaiseAttention()]).run(program).program


@pytest.mark.parametrize("recipe", ["tome", "evit", "random"])
def test_inference_by_example(dense: Program, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Pipeline([ReduceTokens(recipe, {"keep": 0.7, "layers": [0, 1]})]).run(dense).program
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    found = {n: layouts(n.meta["val"]) for n in calls}
    monkeypatch.setattr(GraphEditor, "_infer_by_example", lambda *_: None)
    editor = GraphEditor(program)
    for node in calls:
        editor.infer(node)
        assert layouts(node.meta["val"]) == found[node], node
    assert sum(getattr(n.target, "namespace", "") == "tokenopt" for n in calls) > 2


def test_what_example_batches_do_not_tell_is_followed_by_symbols() -> None:
    class Pairs(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x[:1]]) * 2

    program = capture(Pairs(), torch.randn(2, 4))
    editor = GraphEditor(program)
    longer = next(n for n in program.graph.nodes if n.target is torch.ops.aten.cat.default)
    norm = editor.insert(longer, ops.token_norm.default, longer)
    assert str(norm.meta["val"].shape[0]) == str(longer.meta["val"].shape[0])
    assert not isinstance(norm.meta["val"].shape[0], int)


def test_operands_that_do_not_fit_are_an_error() -> None:
    program = capture(torch.nn.ReLU(), torch.randn(2, 4, 3))
    relu = next(n for n in program.graph.nodes if n.op == "call_function")
    with pytest.raises(AxisConflict, match="does not fit together"):
        GraphEditor(program).insert(relu, ops.take_tokens.default, relu, relu)
