"""Static subsets of attention on a grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from tokenopt.attention.layout import Layout, Tokens
from tokenopt.attention.pattern import Lowered, Mask, Refused, box_tilings, each
from tokenopt.errors import UsageError

Sizes = int | tuple[int, ...]
BORDERS = ("shift", "truncate", "zero")


@dataclass(frozen=True, repr=False)
class Full(Mask):
    """Every query sees every key."""

    anywhere: ClassVar[bool] = True

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        return torch.ones(len(query.index), len(key.index), dtype=torch.bool)


@dataclass(frozen=True, repr=False)
class Nothing(Mask):
    """No query on the grid sees a key on the grid but itself."""

    anywhere: ClassVar[bool] = True

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        return query.index[:, None] == key.index


@dataclass(frozen=True, repr=False)
class Neighborhood(Mask):
    """Each query sees the window around it: neighbourhood attention, generalised, in one to three dimensions.

    One value stands for every axis. The semantics are those of NATTEN: with ``border="shift"`` windows shift inward at
    borders, so that every query sees exactly ``prod(window)`` keys.

    Attributes:
        window: keys per axis; an axis that is shorter is seen whole, where windows shift. A number with a point, up to
            1.0, is a share of each axis.
        stride: queries that share the window of their middle one, or a share too; ``stride == window`` makes blocks.
        dilation: steps between the keys of a window.
        causal: per axis, whether keys after the query are hidden; the window ends at the query then.
        border: "shift"; "truncate" (keys beyond the border are missing); "zero" (they are there, and zero, as in
            HaloNet's padding).

    Source: Hassani et al., Neighborhood Attention Transformer, arXiv:2204.07143; Hassani and Shi, Dilated Neighborhood
        Attention Transformer, arXiv:2209.15001; Hassani et al., Generalized Neighborhood Attention, arXiv:2504.16922;
        Vaswani et al., HaloNet, arXiv:2103.12731 (border).
    """

    window: Sizes | float
    stride: Sizes | float = 1
    dilation: Sizes = 1
    causal: bool | tuple[bool, ...] = False
    border: str = "shift"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.border not in BORDERS:
            raise UsageError(f"there is no border {self.border!r}", hint=f"one of {', '.join(BORDERS)}")
        for name in ("window", "stride", "dilation"):
            value = getattr(self, name)
            if not all(v > 0 for v in (value if isinstance(value, tuple) else (value,))):
                raise UsageError(f"{name}={value!r} of Neighborhood is not positive", hint=f"{name}=3 or {name}=(3, 5)")
            if isinstance(value, float) and value > 1.0:
                raise UsageError(f"{name}={value!r} of Neighborhood is not a share of an axis", hint=f"{name}=0.3")

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        allowed = torch.ones(len(query.index), len(key.index), dtype=torch.bool)
        window, stride, dilation, causal = self.resolved(query.grid)
        for axis, length in enumerate(query.grid):
            d = dilation[axis]
            q, k = query.coords[axis], key.coords[axis]
            start, stop = self.bounds(q, length, window[axis], stride[axis], d, causal[axis])
            inside = k // d if d > 1 else k
            allowed &= (inside >= start[:, None]) & (inside < stop[:, None])
            if d > 1:
                allowed &= (q % d)[:, None] == k % d
        return allowed

    def resolved(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Window, stride, dilation and causality of every axis; a window is no longer than its axis.

        Raises:
            Refused: if they mean nothing on this grid.
        """
        rank = len(grid)
        window, stride, dilation = (each(v, rank) for v in (self.window, self.stride, self.dilation))
        causal = each(self.causal, rank)
        whole = [n // d for n, d in zip(grid, dilation, strict=True)]
        stride = tuple(_size(s, n) for s, n in zip(stride, whole, strict=True))
        if isinstance(self.window, float):  # which leaves no gaps
            window = tuple(max(_size(w, n), s) for w, n, s in zip(window, whole, stride, strict=True))
        if self.border == "shift":
            window = tuple(min(w, n // d) for w, n, d in zip(window, grid, dilation, strict=True))
        for w, s, d, n in zip(window, stride, dilation, grid, strict=True):
            if d > n:
                raise Refused(f"a dilation of {d} is longer than an axis of {n}", "a smaller dilation")
            if s > w and w < n // d:
                raise Refused(f"a stride of {s} leaves gaps between windows of {w}", "a stride of at most the window")
        return window, tuple(map(min, stride, window)), dilation, causal

    def at(self, share: float) -> Neighborhood:
        """Windows that are a share of each axis; blocks stay blocks."""
        return replace(self, window=share, stride=share if self.stride == self.window else self.stride)

    def bounds(
        self, q: Tensor, length: int, window: int, stride: int, dilation: int, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """First key and the one behind the last that queries at ``q`` see on one axis, in steps of the dilation."""
        group = q % dilation
        last = length // dilation + (group < length % dilation).to(q.dtype) - 1
        place = q // dilation
        shift = self.border == "shift"
        if causal:
            lead = place // stride * stride + stride - 1
            lead = torch.minimum(lead, last) if shift else lead
            return (lead - (window - 1)).clamp(min=0), place + 1
        lead = place // stride * stride + stride // 2
        if not shift:
            start = lead - window // 2
            return start.clamp(min=0), torch.minimum(start + window, last + 1)
        start = torch.minimum(lead, last) - window // 2
        start = torch.minimum(start.clamp(min=0), last + 1 - window)
        return start, start + window

    def lower(self, layout: Layout) -> Lowered:
        """Attention in tiles, with the window's sizes beside the tables for kernels that need no tables."""
        lowered = super().lower(layout)
        if self.border != "shift" or layout.causal or "row_mask" in lowered.tensors:
            return lowered
        names = ("window", "stride", "dilation", "causal")
        sizes = {name: list(value) for name, value in zip(names, self.resolved(layout.grid), strict=True)}
        settings = {"start": layout.start, "grid": list(layout.grid), **sizes}
        return replace(lowered, op="neighborhood_attention", settings=settings)

    def absent(self, query: Tokens) -> Tensor | None:
        """How many zero keys beyond the border each query sees, int64 [Q]; None where there are none anywhere."""
        if self.border != "zero":
            return None
        window, stride, dilation, causal = self.resolved(query.grid)
        seen = torch.ones_like(query.index)
        for axis, n in enumerate(query.grid):
            start, stop = self.bounds(query.coords[axis], n, window[axis], stride[axis], dilation[axis], causal[axis])
            seen *= stop - start
        return prod(window) - seen

    def check(self, layout: Layout) -> None:
        _, _, _, causal = self.resolved(layout.grid)
        if self.border == "zero" and (layout.causal or any(causal)):
            raise Refused("zero keys beyond the border are before the first query", "border='truncate'")

    def tilings(self, layout: Layout) -> Iterator[Tensor]:
        window, stride, dilation, _ = self.resolved(layout.grid)
        shapes = [stride] if prod(stride) > 1 else []
        if max(stride) > 1 and prod(stride) < 64:  # whole groups of the stride, about 8 to a side
            shapes.append(tuple(s * max(8 // s, 1) for s in stride))
        yield from box_tilings(layout.grid, dilation, shapes)


def _size(value: float, length: int) -> int:
    """A size, or a share of an axis in steps of the dilation."""
    return max(round(value * length), 1) if isinstance(value, float) else value


@dataclass(frozen=True, repr=False)
class Stripe(Mask):
    """Each query sees the stripe of rows, or of columns, that it lies in: axial and cross-shaped attention.

    Attributes:
        rows: height of a stripe of rows.
        cols: width of a stripe of columns.

    Source: Dong et al., CSWin Transformer, arXiv:2107.00652.
    """

    rows: int = 0
    cols: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.rows, self.cols) < 0 or (self.rows > 0) == (self.cols > 0):
            raise UsageError("a stripe is of rows or of columns", hint="Stripe(rows=2) | Stripe(cols=2)")

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        axis, size = (-2, self.rows) if self.rows else (-1, self.cols)
        return (query.coords[axis] // size)[:, None] == key.coords[axis] // size

    def check(self, layout: Layout) -> None:
        if len(layout.grid) < 2:
            raise Refused("stripes need a grid of two axes", "Neighborhood")

    def tilings(self, layout: Layout) -> Iterator[Tensor]:
        lead = (1,) * (len(layout.grid) - 2)
        yield from box_tilings(layout.grid, (), [(*lead, self.rows, 0) if self.rows else (*lead, 0, self.cols)])


@dataclass(frozen=True, repr=False)
class Band(Mask):
    """Each query sees keys at most ``width`` away along one axis; the width may shrink with the distance along another.

    Attributes:
        axis: the axis of the band, negative from the last.
        width: distance that is still seen.
        decay: axis along which the width is halved for every ``step`` of distance.
        step: see decay.
    """

    width: int
    axis: int = -1
    decay: int | None = None
    step: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 0 or self.step < 1:
            raise UsageError(f"{self} has no width or step", hint="Band(4), Band(8, decay=0, step=2)")

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        distance = (query.coords[self.axis][:, None] - key.coords[self.axis]).abs()
        if self.decay is None:
            return distance <= self.width
        away = (query.coords[self.decay][:, None] - key.coords[self.decay]).abs()
        halvings = (away // self.step).clamp(max=30)
        return distance <= torch.bitwise_right_shift(torch.tensor(self.width, dtype=torch.int32), halvings)

    def check(self, layout: Layout) -> None:
        for axis in (self.axis, self.decay):
            if axis is not None and not -len(layout.grid) <= axis < len(layout.grid):
                raise Refused(f"there is no axis {axis} on a grid of {len(layout.grid)}", "axis=-1 is the last")


@dataclass(frozen=True, repr=False)
class Radial(Mask):
    """Each query sees a window of its own and other frames that is halved whenever the distance in time doubles.

    With s tokens per frame and ``r = 2 ** floor(log2(max(|i - j|, 1)))``, the token at place k of frame i sees that at
    place l of frame j where ``|k - l| + 1 <= width * s / r``, or where k = l and |i - j| is a multiple of ceil(r / s).

    Attributes:
        width: the window of near frames, as a share of a frame.
        sink: so many first frames are seen by all.

    Source: Li et al., Radial Attention, arXiv:2506.19852.
    """

    width: float = 1.0
    sink: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 0 or self.sink < 0:
            raise UsageError(f"{self} has no width or sink", hint="Radial(width=1.0, sink=1)")

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        size = prod(query.grid[1:])
        (i, k), (j, l) = ((t.coords[0], t.raster() % size) for t in (query, key))  # noqa: E741
        away = (i[:, None] - j).abs()
        octave = torch.bitwise_left_shift(torch.ones_like(away), away.clamp(min=1).float().log2().int())
        apart = (k[:, None] - l).abs()
        near = apart + 1 <= self.width * size / octave
        same = (apart == 0) & (away % ((octave + size - 1) // size) == 0)
        return near | same | (j < self.sink)

    def check(self, layout: Layout) -> None:
        if len(layout.grid) != 3:
            raise Refused("it needs a grid of frames, rows and columns", "Neighborhood")


@dataclass(frozen=True, repr=False)
class Global(Mask):
    """Some tokens see all others and are seen by them.

    Attributes:
        segment: all tokens of a segment; class, register and text tokens are global anyway.
        first: the first tokens of the grid, as the sinks of a language model (Xiao et al., Efficient Streaming Language
            Models with Attention Sinks, arXiv:2309.17453): they are seen by all, and see what they saw.
    """

    segment: str = ""
    first: int = 0

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        allowed = (key.raster() < self.first)[None].expand(len(query.index), -1)
        if self.segment:
            start, length = key.layout.segment(self.segment) or (0, 0)
            q, k = ((t.index >= start) & (t.index < start + length) for t in (query, key))
            allowed = allowed | q[:, None] | k
        return allowed

    def check(self, layout: Layout) -> None:
        if self.segment and layout.segment(self.segment) is None:
            names = ", ".join(s[0] for s in layout.segments)
            raise Refused(f"there is no segment '{self.segment}'", f"one of {names}")


@dataclass(frozen=True, repr=False)
class BlockMap(Mask):
    """Blocks of the tokens in raster order, and which blocks of keys each block of queries sees.

    Attributes:
        block: tokens per block.
        map: for every block of queries the blocks of keys.

    Source: Zhao et al., PAROAttention, arXiv:2506.16054 (with `permuted` and `per_head`).
    """

    block: int
    map: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise UsageError(f"block={self.block} of BlockMap is not positive")

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        count = -(-prod(query.grid) // self.block)
        table = torch.zeros(count, count, dtype=torch.bool)
        for row, columns in enumerate(self.map):
            table[row, list(columns)] = True
        return table[(query.raster() // self.block).long()][:, (key.raster() // self.block).long()]

    def check(self, layout: Layout) -> None:
        count = -(-layout.count // self.block)
        if len(self.map) != count or any(not 0 <= c < count for row in self.map for c in row):
            why = f"{layout.count} tokens are {count} blocks of {self.block}, and the map has {len(self.map)}"
            raise Refused(why, f"for each of {count} blocks of queries those of keys, 0 to {count - 1}")

    def tilings(self, layout: Layout) -> Iterator[Tensor]:
        yield from box_tilings((layout.count,), (), [(self.block,)])


@dataclass(frozen=True, repr=False)
class Diagonal(Mask):
    """Each query sees the anti-diagonals of the grid up to its own: what is generated one anti-diagonal at a time.

    Source: He et al., Neighboring Autoregressive Modeling, arXiv:2503.10696.
    """

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        return sum(key.coords) <= sum(query.coords)[:, None]

    def check(self, layout: Layout) -> None:
        if len(layout.grid) < 2:
            raise Refused("anti-diagonals need a grid of two axes", "Neighborhood(..., causal=True)")

    def tilings(self, layout: Layout) -> Iterator[Tensor]:
        number = sum(layout.at(torch.arange(layout.start, layout.start + layout.count)).coords)
        order = number.sort(stable=True).indices
        for tiling in box_tilings((layout.count,)):
            yield order[tiling]


@dataclass(frozen=True, repr=False)
class Concentric(Mask):
    """Each query sees its ring of the grid and those further out (or further in), as in concentric causal attention.

    Attributes:
        inward: the centre sees all rings, the outermost only itself; else the other way round.

    Source: Xing et al., Mitigating Object Hallucination via Concentric Causal Attention, arXiv:2410.15926.
    """

    inward: bool = True

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        q, k = self._ring(query)[:, None], self._ring(key)
        return k <= q if self.inward else k >= q

    @staticmethod
    def _ring(tokens: Tokens) -> Tensor:
        edges = [torch.minimum(c, n - 1 - c) for c, n in zip(tokens.coords, tokens.grid, strict=True)]
        ring = edges[0]
        for edge in edges[1:]:
            ring = torch.minimum(ring, edge)
        return ring

    def check(self, layout: Layout) -> None:
        if len(layout.grid) != 2:
            raise Refused("rings need a grid of two axes", "Neighborhood")
