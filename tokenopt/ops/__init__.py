"""The operation set ``tokenopt::*``: what passes insert into graphs.

Every operation is composite: its body is its torch reference, so autograd, ``torch.compile``, fake tensors and
``run_decompositions`` see through it, and a runtime lowers it by decomposing it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("tokenopt", "DEF")
_references: dict[str, Callable[..., Any]] = {}


def op(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as ``torch.ops.tokenopt.<its name>`` with this schema."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        _library.define(f"{name}{schema}")
        _library.impl(name, function, "CompositeImplicitAutograd")
        _references[name] = function
        return function

    return register


def references() -> dict[Any, Callable[..., Any]]:
    """Operation -> reference, as ``ExportedProgram.run_decompositions`` takes it."""
    return {getattr(torch.ops.tokenopt, name).default: function for name, function in _references.items()}


def attentions() -> set[Any]:
    """The operations that are attention of (query, key, value, ...): dense, and every pattern's."""
    names = ("", "tiled_", "neighborhood_", "pooled_", "pooled_tiled_", "agent_", "region_", "block_sparse_", "routed_",
             "predicted_", "sorted_")  # fmt: skip
    return {getattr(torch.ops.tokenopt, f"{name}attention").default for name in names}


from tokenopt.ops import (  # noqa: E402, F401  (they register themselves)
    attention,
    lowrank,
    mix,
    regions,
    routed,
    score,
    select,
    tiles,
    tokens,
)
