"""Where the tokens of one attention lie: a run of them on a grid, and the others around it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

_BLOCKS = (768, 256), (192, 64), (0, 32)  # from so many queries on, so many are computed together


@dataclass(frozen=True)
class Layout:
    """The tokens of a self-attention: ``grid`` in raster order from ``start`` on; class, register, text around it.

    Attributes:
        total: number of tokens, N.
        start: position of the first token of the grid.
        grid: sizes of its axes, one to three: (length,), (height, width) or (frames, height, width).
        segments: (name, start, length) of every run of tokens.
        heads: number of attention heads.
        head_dim: features per head.
        causal: no query sees what comes after it.
        skips: dense attention is told so, and does not compute what its blocks of queries cannot see; under a mask it
            would.
    """

    total: int
    start: int
    grid: tuple[int, ...]
    segments: tuple[tuple[str, int, int], ...] = ()
    heads: int = 1
    head_dim: int = 64
    causal: bool = False
    skips: bool = False

    @staticmethod
    def of(*grid: int, **options: int) -> Layout:
        """A grid alone."""
        return Layout(prod(grid), 0, grid, (("patch", 0, prod(grid)),), **options)

    @property
    def count(self) -> int:
        """Tokens on the grid."""
        return prod(self.grid)

    @property
    def dense(self) -> int:
        """Pairs that dense attention computes in torch on a CPU: in blocks of queries, each up to its last query."""
        if not self.skips:
            return self.total**2
        block = next(size for least, size in _BLOCKS if self.total >= least)
        return sum(min(block, self.total - i) * min(i + block, self.total) for i in range(0, self.total, block))

    @property
    def others(self) -> list[int]:
        """Positions of the tokens that are not on the grid."""
        return [*range(self.start), *range(self.start + self.count, self.total)]

    def segment(self, name: str) -> tuple[int, int] | None:
        """First position and length of a segment; None where there is none of that name."""
        return next(((start, length) for n, start, length in self.segments if n == name), None)

    def tokens(self) -> Tokens:
        """All tokens."""
        return self.at(torch.arange(self.total))

    def at(self, index: Tensor) -> Tokens:
        """The tokens at these positions of the sequence."""
        on_grid = (index >= self.start) & (index < self.start + self.count)
        return Tokens(self, index, on_grid, _coordinates((index - self.start).clamp(0, self.count - 1), self.grid))


@dataclass(frozen=True)
class Tokens:
    """Some tokens of a layout.

    Attributes:
        index: positions in the sequence, int64 [n].
        on_grid: bool [n].
        coords: coordinates on the grid, one int32 [n] per axis; meaningless where ``on_grid`` is False.
        grid: the sizes that the coordinates run over: those of the layout, or of a permuted grid.
    """

    layout: Layout
    index: Tensor
    on_grid: Tensor
    coords: tuple[Tensor, ...]
    grid: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.grid:
            object.__setattr__(self, "grid", self.layout.grid)

    def moved(self, coords: tuple[Tensor, ...], grid: tuple[int, ...]) -> Tokens:
        """The same tokens at other places of another grid."""
        return replace(self, coords=coords, grid=grid)

    def raster(self) -> Tensor:
        """Number of each token in raster order of the grid, int32 [n]."""
        number = torch.zeros_like(self.coords[0])
        for coord, size in zip(self.coords, self.grid, strict=True):
            number = number * size + coord
        return number


def _coordinates(raster: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, ...]:
    coords = []
    for size in reversed(grid):
        coords.append((raster % size).to(torch.int32))
        raster = raster // size
    return tuple(reversed(coords))
