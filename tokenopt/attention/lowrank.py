"""Patterns that are another, smaller softmax: pooled keys, and agents between queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log, prod
from typing import Any

import torch

from tokenopt.attention.layout import Layout
from tokenopt.attention.masks import Sizes
from tokenopt.attention.pattern import Lowered, Mask, Pattern, Refused, each
from tokenopt.attention.tiles import Tiles, tile, tile_cost
from tokenopt.errors import UsageError


@dataclass(frozen=True, repr=False)
class PooledKV(Pattern):
    """Queries on the grid see keys and values averaged over its cells, and the keys that a mask lets them see.

    All are in one softmax. Tokens off the grid are seen as they are, and attend densely.

    Attributes:
        stride: tokens per cell on each axis; the grid becomes ``ceil(n / stride)`` cells per axis by adaptive average
            pooling. 1 pools nothing, and without ``near`` is dense attention.
        near: what is seen beside the pooled keys: ``Neighborhood(3, border="truncate")`` in TransNeXt.
        size_bias: adds the logarithm of how many tokens a pooled key stands for to its logits.

    Source: Wang et al., Pyramid Vision Transformer, arXiv:2102.12122 (pooled keys); Shi, TransNeXt,
        arXiv:2311.17132 (with a window); Bolya et al., Token Merging, arXiv:2210.09461 (size bias).
    """

    stride: Sizes
    near: Mask | None = None
    size_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("stride", self.stride)

    def lower(self, layout: Layout) -> Lowered:
        if layout.causal:
            raise Refused("a pooled key would tell of tokens behind the query", "a window, which knows causality")
        cells = tuple(-(-n // s) for n, s in zip(layout.grid, each(self.stride, len(layout.grid)), strict=True))
        settings = {"start": layout.start, "grid": list(layout.grid), "cells": list(cells)}
        if self.near is not None:
            return self._beside(tile(self.near, layout), prod(cells), settings)
        rows = (layout.total - layout.count) * layout.total
        keys = layout.total - layout.count + prod(cells)
        cost = rows + tile_cost(1, layout.count, keys, self.size_bias)
        settings["size_bias"] = self.size_bias
        return _lowered("pooled_attention", layout, rows + layout.count * keys, cost, settings)

    def _beside(self, near: Tiles, count: int, settings: dict[str, Any]) -> Lowered:
        """The tables of a mask with ``count`` pooled keys behind the others in each tile."""
        tensors, layout = near.tensors, near.layout
        heads, tiles, _ = near.queries.shape
        pooled = torch.arange(layout.total, layout.total + count)
        tensors["keys"] = torch.cat([near.keys, pooled.expand(heads, tiles, -1)], -1)
        mask = tensors.get("mask", torch.zeros(1, 1, near.keys.shape[-1]))
        bias = torch.full((*mask.shape[:-1], count), log(layout.count / count) if self.size_bias else 0.0)
        tensors["mask"] = torch.cat([mask, bias], -1)
        if len(near.rows):
            row_mask = tensors.get("row_mask", torch.zeros(len(near.rows), layout.total))
            tensors["row_mask"] = torch.nn.functional.pad(row_mask, (0, count), value=float("-inf"))
        whole = replace(near, keys=tensors["keys"], mask=tensors["mask"], seen=near.seen + layout.count * count)
        return Lowered("pooled_tiled_attention", tensors, settings, whole.ideal, whole.tile, whole.predicted)


@dataclass(frozen=True, repr=False)
class Agent(Pattern):
    """A few agents, the queries pooled over the grid, attend to all tokens; queries on the grid attend to the agents.

    Tokens off the grid are seen by the agents, and attend densely.

    Attributes:
        agents: per axis of the grid; one value stands for every axis.
        power: of the scale in the second softmax, k_scale2 in AgentSD.
        shortcut: share of a token's own value that is added, k_shortcut in AgentSD.

    Source: Han et al., Agent Attention, arXiv:2312.08874.
    """

    agents: Sizes
    power: float = 1.0
    shortcut: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("agents", self.agents)

    def lower(self, layout: Layout) -> Lowered:
        if layout.causal:
            raise Refused("an agent would tell of tokens behind the query", "a window, which knows causality")
        cells = tuple(min(a, n) for a, n in zip(each(self.agents, len(layout.grid)), layout.grid, strict=True))
        agents, rows = prod(cells), (layout.total - layout.count) * layout.total
        pairs = rows + agents * (layout.total + layout.count)
        cost = rows + tile_cost(1, agents, layout.total, False) + tile_cost(1, layout.count, agents, False)
        settings = {"start": layout.start, "grid": list(layout.grid), "cells": list(cells), "power": self.power,
                    "shortcut": self.shortcut}  # fmt: skip
        return _lowered("agent_attention", layout, pairs, cost, settings)


def _lowered(op: str, layout: Layout, pairs: int, cost: float, settings: dict[str, Any]) -> Lowered:
    ratios = layout.dense / pairs, layout.dense / pairs, layout.dense / cost
    return Lowered(op, {}, settings, *ratios)


def _positive(name: str, value: Sizes) -> None:
    if not all(v > 0 for v in (value if isinstance(value, tuple) else (value,))):
        raise UsageError(f"{name}={value!r} is not positive", hint=f"{name}=4, or one for each axis")
