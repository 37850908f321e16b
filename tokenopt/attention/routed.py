"""Patterns that depend on the content: each block of queries sees the blocks of keys that are most like it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenopt.attention.layout import Layout
from tokenopt.attention.masks import Sizes
from tokenopt.attention.pattern import Lowered, Pattern, Refused, box_tilings, each
from tokenopt.attention.tiles import tile_cost
from tokenopt.errors import UsageError
from tokenopt.ops.routed import block_route

_FORCED = 1e30  # above every score
_HEADS, _SCORES = ("joint", "mean", "each"), ("mean", "length")


@dataclass(frozen=True, repr=False)
class Routed(Pattern):
    """Each block of queries sees the blocks of keys whose pooled keys are most like its pooled queries.

    Blocks are boxes of the grid, or runs of it in raster order. One size stands for every axis; an axis that is shorter
    is one block, and the last block of an axis may be short. Tokens off the grid see all and are seen by all. Where the
    attention is causal, a block sees none behind it, and always its own.

    Attributes:
        block: size of a block of queries, in tokens per axis.
        topk: blocks of keys that a block of queries sees, those of ``first`` and ``local`` among them.
        mass: share of the attention that is to be seen on average, instead of ``topk``, which then comes from data.
        key_block: size of a block of keys; None is that of queries.
        score: products of "mean" queries and keys, or of those times the square root of the block's "length".
        heads: "joint" compares all channels at once, and all heads see the same; so they do with "mean", which compares
            the means of the heads; "each" head has its own blocks.
        first: blocks of keys from the start of the grid that all see.
        local: keys in blocks less than ``local`` blocks away are seen; 1 is the block itself, 0 what the scores say.
        flat: blocks are runs in raster order, whatever the grid.

    Source: Zhu et al., BiFormer, CVPR 2023, arXiv:2303.08810 (the defaults); Xiong et al., Dynamic Hierarchical Sparse
        Attention, arXiv:2510.24606 (score="length", heads="mean", first, local).
    """

    block: Sizes
    topk: int | None = None
    mass: float | None = None
    key_block: Sizes | None = None
    score: str = "mean"
    heads: str = "joint"
    first: int = 0
    local: int = 0
    flat: bool = False
    subset: ClassVar[bool] = True
    masked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("block", "key_block"):
            value = getattr(self, name)
            sizes = value if isinstance(value, (tuple, list)) else (value,)
            if value is not None and not all(isinstance(v, int) and v > 0 for v in sizes):
                raise UsageError(f"{name}={value!r} of Routed is not positive", hint=f"{name}=8 or {name}=(8, 8)")
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        if self.topk is None and self.mass is None:
            raise UsageError("Routed needs a number of blocks or a share of the attention", hint="topk=4 or mass=0.9")
        if self.topk is not None and self.topk < 1:
            raise UsageError(f"topk={self.topk} of Routed is not positive")
        if self.mass is not None and not 0 < self.mass <= 1:
            raise UsageError(f"mass={self.mass} of Routed is no share", hint="mass=0.9")
        for name, value, known in (("score", self.score, _SCORES), ("heads", self.heads, _HEADS)):
            if value not in known:
                raise UsageError(f"there is no {name} {value!r}", hint=f"one of {', '.join(known)}")

    @property
    def unfitted(self) -> bool:
        return self.topk is None

    def at(self, share: float) -> Routed:
        """Of the attention: how many blocks that takes is fitted, attention by attention."""
        return replace(self, topk=None, mass=share)

    def lower(self, layout: Layout) -> Lowered:
        if self.topk is None:
            raise Refused("how many blocks hold this share of the attention is learned from data", "--data, or topk=4")
        blocks = self.blocks(layout)
        topk = min(self.topk, len(blocks.keys))
        most = int((blocks.forced >= _FORCED).sum(-1).max())
        if most > topk:
            raise Refused(f"first and local are {most} blocks of keys already, and topk is {topk}", "a larger topk")
        settings = {"topk": topk, "heads": self.heads, "pool": self.score, "causal": layout.causal}
        tensors = blocks.tensors() | ({"forced": blocks.forced} if bool(blocks.forced.any()) else {})
        return blocks.lowered("routed_attention", tensors, settings, topk, len(blocks.queries) * len(blocks.keys))

    def whole(self, layout: Layout, lowered: Lowered) -> Lowered:
        return replace(self, topk=len(lowered.tensors["keys"])).lower(layout)

    def fit(self, layout: Layout, query: Tensor, key: Tensor) -> tuple[Pattern, dict[str, Tensor]]:
        """The number of blocks whose keys get the share ``mass`` of dense attention, mean over samples, heads, queries.

        Blocks count in the order in which they would be chosen.
        """
        blocks = self.blocks(layout)
        count = len(blocks.keys)
        index = block_route(query, key, blocks.queries, blocks.keys, blocks.forced, topk=count, heads=self.heads,
                            pool=self.score)  # fmt: skip
        probabilities = _probabilities(query, key, layout.causal)
        on_grid = (blocks.keys.unsqueeze(-1) == torch.arange(layout.total)).any(1).to(query.dtype)  # [S, N]
        got = probabilities @ on_grid.T
        reached, queries = torch.zeros(count), 0
        for number, members in enumerate(blocks.queries):
            members = members[members >= 0]
            order = index[:, :, number, None].expand(-1, got.shape[1], len(members), -1)
            captured = got[:, :, members].gather(-1, order).cumsum(-1)
            reached += captured.mean((0, 1)).sum(0)
            queries += len(members)
        share = reached / reached[-1]
        needed = int((share < self.mass - 1e-6).sum()) + 1
        least = int((blocks.forced >= _FORCED).sum(-1).max())
        return replace(self, topk=max(min(needed, count), least), mass=None), {}

    def blocks(self, layout: Layout) -> Blocks:
        """The tables of the blocks on a layout.

        Raises:
            Refused: if the sizes are for another number of axes.
        """
        layout = replace(layout, grid=(layout.count,)) if self.flat else layout
        return Blocks.of(layout, self.block, self.key_block or self.block, self.first, self.local)


@dataclass(frozen=True)
class Blocks:
    """Tables of blocks of queries and of keys.

    Attributes:
        queries, keys: int64 [T, Q], [S, L] positions of their tokens; -1 behind the last of a short block.
        forced: [T, S] added to scores: very large where the keys are always seen, -inf where never, else 0.
    """

    layout: Layout
    queries: Tensor
    keys: Tensor
    forced: Tensor

    @staticmethod
    def of(layout: Layout, block: Sizes, key_block: Sizes, first: int = 0, local: int = 0) -> Blocks:
        """The blocks of given sizes."""
        queries, keys = (_table(layout, each(size, len(layout.grid))) for size in (block, key_block))
        local = max(local, 1) if layout.causal else local
        forced = torch.zeros(len(queries), len(keys))
        forced[:, :first] = _FORCED
        if local:
            forced[_away(layout, queries, keys, each(key_block, len(layout.grid))) < local] = _FORCED
        if layout.causal:
            earliest = keys.masked_fill(keys < 0, layout.total).amin(-1)
            forced[earliest > queries.amax(-1, keepdim=True)] = float("-inf")
        return Blocks(layout, queries, keys, forced)

    def tensors(self) -> dict[str, Tensor]:
        """The operands that all attentions in blocks take."""
        rows = torch.tensor(self.layout.others, dtype=torch.int64)
        flat, order = self.queries.flatten(), torch.zeros(self.layout.total, dtype=torch.int64)
        order[flat[flat >= 0]] = torch.arange(len(flat))[flat >= 0]
        order[rows] = len(flat) + torch.arange(len(rows))
        return {"queries": self.queries, "keys": self.keys, "order": order, "rows": rows}

    def lowered(
        self, op: str, tensors: dict[str, Tensor], settings: dict[str, Any], topk: int, extra: float
    ) -> Lowered:
        """The call of an operation that sees ``topk`` blocks of keys, and finds them for ``extra`` pairs."""
        total, rows = self.layout.total, len(tensors["rows"])
        tiles, queries = self.queries.shape
        keys = topk * self.keys.shape[1] + rows
        allowed = (self.forced > float("-inf")).sum(-1).clamp(max=topk) * self.keys.shape[1] + rows
        seen = float(((self.queries >= 0).sum(-1) * allowed).sum())
        masked = self.layout.causal or bool((self.keys < 0).any())
        price = tile_cost(tiles, queries, keys, masked) + extra
        ratios = (self.layout.dense / (pairs + rows * total) for pairs in (seen, tiles * queries * keys, price))
        return Lowered(op, tensors, settings, *ratios, dense=f"{op}_bias")


def _table(layout: Layout, size: Sequence[int]) -> Tensor:
    tiles = next(box_tilings(layout.grid, (), [tuple(size)]))
    short = torch.zeros_like(tiles, dtype=torch.bool)
    short[:, 1:] = tiles[:, 1:] == tiles[:, :-1]
    return (tiles + layout.start).masked_fill(short, -1)


def _away(layout: Layout, queries: Tensor, keys: Tensor, size: Sequence[int]) -> Tensor:
    """[T, S]: how many blocks of keys each is away from each block of queries, along the axis where it is most."""
    (low, high), (key_low, key_high) = _extent(layout, queries), _extent(layout, keys)
    gap = torch.maximum(key_low - high[:, None], low[:, None] - key_high).clamp(min=0)
    return ((gap + torch.tensor(size) - 1) // torch.tensor(size)).amax(-1)


def _extent(layout: Layout, table: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest coordinates of each block, [T, axes]."""
    coords = torch.stack(layout.at(table.flatten()).coords, -1).reshape(*table.shape, -1).long()
    absent = (table < 0).unsqueeze(-1)
    return coords.masked_fill(absent, prod(layout.grid)).amin(1), coords.masked_fill(absent, -1).amax(1)


def _probabilities(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """Dense attention probabilities [B, H, N, N]."""
    logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return logits.softmax(-1)
