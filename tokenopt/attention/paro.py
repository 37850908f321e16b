"""Block maps that data choose: for each head an order of the axes, and the blocks that it attends to in this order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from math import ceil, prod
from typing import ClassVar

import torch
from torch import Tensor

from tokenopt.attention.layout import Layout
from tokenopt.attention.masks import BlockMap
from tokenopt.attention.pattern import Lowered, Pattern, PerHead, Permuted, Refused, per_head, permuted
from tokenopt.errors import UsageError


@dataclass(frozen=True, repr=False)
class Paro(Pattern):
    """Each head sees the blocks that hold most of its attention on the data, in the order of axes that suits it best.

    Attributes:
        block: tokens per block.
        density: share of the blocks of keys that each block of queries sees.

    Source: Zhao et al., PAROAttention, arXiv:2506.16054. There, one threshold for a head says which blocks are seen;
        here every block of queries has as many, which makes tiles of one size.
    """

    subset: ClassVar[bool] = True
    block: int = 64
    density: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or not 0 < self.density <= 1:
            raise UsageError(f"not a block map: {self}", hint="block=64, density=0.3")

    @property
    def unfitted(self) -> bool:
        return True

    def at(self, share: float) -> Paro:
        """Of the blocks of keys."""
        return replace(self, density=share)

    def lower(self, layout: Layout) -> Lowered:
        raise Refused("it is learned from data", "give inputs like those the model is for (--data FILE)")

    def fit(self, layout: Layout, query: Tensor, key: Tensor) -> tuple[PerHead, dict[str, Tensor]]:
        """The blocks that hold most of the mean probabilities [H, N, N] on the data."""
        mean = query.new_zeros(query.shape[1], layout.total, layout.total)
        for q, k in zip(query, key, strict=True):
            mean += (q @ k.transpose(-2, -1) * layout.head_dim**-0.5).softmax(-1)
        on_grid = slice(layout.start, layout.start + layout.count)
        return choose(mean[:, on_grid, on_grid] / len(query), layout.grid, self.block, self.density), {}


def choose(attention: Tensor, grid: tuple[int, ...], block: int, density: float) -> PerHead:
    """For each head the order of axes, and the blocks in it, that hold most attention.

    Shapes:  attention [H, n, n], mean probabilities of queries (rows) and keys on the grid, n = prod(grid)
    Args:    density: share of the blocks of keys that each block of queries sees, rounded up.
    """
    heads = []
    for head in attention:
        found = [_blocks(head, order, grid, block, density) for order in permutations(range(len(grid)))]
        heads.append(max(found, key=lambda option: option[0])[1])
    return per_head(heads)


def _blocks(
    head: Tensor, order: tuple[int, ...], grid: tuple[int, ...], block: int, density: float
) -> tuple[float, Permuted]:
    """How much attention the chosen blocks hold in this order of axes, and the pattern of them."""
    place = torch.arange(prod(grid)).reshape(grid).permute(order).flatten()
    count = ceil(len(place) / block)
    rest = count * block - len(place)
    moved = torch.nn.functional.pad(head[place][:, place], (0, rest, 0, rest))
    held = moved.reshape(count, block, count, block).sum((1, 3)).topk(ceil(density * count), -1)
    rows = tuple(tuple(sorted(row)) for row in held.indices.tolist())
    return float(held.values.sum()), permuted(order, BlockMap(block, rows), flat=True)
