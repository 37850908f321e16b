"""Every recipe in half precision: the dtype stays, the plan is that of single precision, nothing breaks the graph."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests import recipe_references as refs
from tests.references import images
from tokenopt import recipes
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program, capture
from tokenopt.tokens.recipe import TokenRecipe

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
ops = torch.ops.tokenopt


@cache
def program(dtype: torch.dtype) -> Program:
    """A tiny vision transformer of two blocks that returns its features."""
    model = refs.tiny("features", depth=2).to(dtype)
    return Pipeline([FoldConstants(), RaiseAttention()]).run(capture(model, images(2).to(dtype))).program


@cache
def frames(dtype: torch.dtype) -> Program:
    example = refs.frames(tiny_vggt(), 2).to(dtype)
    return Pipeline([FoldConstants(), RaiseAttention()]).run(capture(tiny_vggt().to(dtype), example)).program


def tiny_vggt() -> refs.TinyVGGT:
    return refs.tiny_vggt(frames=3, depth=1)


# models and settings of recipes that are not about a single image with a class token, or need weights
FRAMES = ("fastvggt",)
SETTINGS = {"dtop": {"score": "norm{of=hidden}"}, "semantic-token": {"place": "range{first=1}"}}


def schedule(name: str) -> dict[str, Any]:
    """The recipe's own form of schedule for two blocks."""
    own = recipes.get(name).schedule
    if "r" in own:
        return {"r": 9}
    early = recipes.get(name).place.name == "block" and own.get("layers") == [0]
    return {"keep": max(own["keep"], 0.2), **({"layers": [0 if early else 1]} if "layers" in own else {})}


@cache
def reduced(name: str, dtype: torch.dtype) -> Program:
    dense = frames(dtype) if name in FRAMES else program(dtype)
    step = ReduceTokens(name, schedule(name), settings=SETTINGS.get(name, {}), short_outputs=True)
    result = Pipeline([step, RemoveDead()]).run(dense)
    assert any(e.pass_spec.startswith("reduce-tokens") for e in result.edits), [str(r) for r in result.refusals]
    return result.program


def inputs(name: str, batch: int, dtype: torch.dtype) -> list[Tensor]:
    if name in FRAMES:
        return [refs.frames(tiny_vggt(), batch, seed=3).to(dtype)]
    tensors = [images(batch, seed=3).to(dtype)]
    if name == "trajectory":
        ids = [torch.randperm(64, generator=torch.Generator().manual_seed(i)) % 16 for i in range(batch)]
        tensors.append(torch.stack(ids))
    return tensors


class Watch(fx.Interpreter):
    """Runs a program, and every score and plan in it again with its operands in single precision."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.exported.graph_module)
        self.program = program
        self.plans: list[Tensor] = []

    def watch(self, *tensors: Tensor) -> list[Tensor]:
        exported, given = self.program.exported, iter(tensors)
        table = {**exported.constants, **exported.state_dict}
        values = [
            next(given) if s.target is None else table[s.target] for s in exported.graph_signature.input_specs
        ]
        with torch.no_grad():
            return self.run(*values, enable_io_processing=False)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super().call_function(target, args, kwargs)
        if str(target).startswith(DECIDING):
            again = super().call_function(target, fx.node.map_aggregate(args, _single), kwargs)
            pairs = list(zip(_tuple(found), _tuple(again), strict=True))
            for one, other in pairs:
                assert one.dtype in (torch.int64, torch.float32)
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
            if str(target).startswith(("tokenopt.match_", "tokenopt.select_", "tokenopt.cluster_")):
                self.plans.append(pairs[0][0])
        return found


DECIDING = tuple(
    f"tokenopt.{name}" for name in (
        "match_", "select_", "cluster_", "partition_", "attention_probe", "attention_received", "token_norm",
        "token_energy", "token_transition", "centre_", "patch_", "ncut_", "sink_", "boost_", "soft_association",
        "neighbour_weights", "grid_interpolation", "nearest_tokens",
    )
)  # fmt: skip


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


@pytest.mark.parametrize("half", list(HALF))
@pytest.mark.parametrize("name", recipes.names(TokenRecipe))
def test_half_precision(name: str, half: str) -> None:
    dtype = HALF[half]
    few, exact = Watch(reduced(name, dtype)), Watch(reduced(name, torch.float32))
    found, alone = few.watch(*inputs(name, 3, dtype))[0], few.watch(*inputs(name, 1, dtype))[0]
    assert found.dtype is dtype and torch.isfinite(found).all()
    assert alone.dtype is dtype and alone.shape == (1, *found.shape[1:])
    exact.watch(*inputs(name, 3, torch.float32))
    exact.watch(*inputs(name, 1, torch.float32))
    assert len(few.plans) == len(exact.plans)
    rows = [(a, b) for one, other in zip(few.plans, exact.plans, strict=True) for a, b in zip(one, other, strict=True)]
    shares = [len(set(a.tolist()) & set(b.tolist())) / len(b) for a, b in rows]
    if shares:
        assert sum(shares) / len(shares) > {"fp16": 0.95, "bf16": 0.75}[half]


def _named(name: str, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return dict(zip(["ids"], inputs(name, batch, dtype)[1:], strict=False))


@pytest.mark.parametrize("name", recipes.names(TokenRecipe))
def test_compiles_without_graph_breaks(name: str) -> None:
    module = reduced(name, torch.float32).module()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    args, named = inputs(name, 2, torch.float32)[:1], _named(name, 2, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args, **named), module(*args, **named), rtol=1e-5, atol=1e-5)
