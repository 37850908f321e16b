"""The canonical form of programs, which every analysis and every reduction starts from."""

from __future__ import annotations

from tokenopt.passes.flatten_grids import FlattenGrids
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.pipeline import Pass, Pipeline, PipelineResult
from tokenopt.program import Program


def canonical_passes() -> list[Pass]:
    """Constants are folded, attention is one operation, and tokens stand in one row."""
    return [FoldConstants(), RaiseAttention(), FlattenGrids()]


def canonicalize(program: Program) -> PipelineResult:
    """The program after `canonical_passes`."""
    return Pipeline(canonical_passes()).run(program)
