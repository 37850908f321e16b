"""Masks as tiles: constant tables of which queries are computed together, and which keys each tile of them reads.

The keys of a tile are the union of what its queries see, so that dense attention within the tile, masked where the
union is more than a query sees, is exact. The tables are all that a runtime needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenopt.attention.layout import Layout
from tokenopt.attention.pattern import Lowered, Mask, Refused

_PAIRS = 2**25  # pairs of tokens looked at in one go

# What tiles cost in units of one query-key pair of dense attention, fitted to ONNX Runtime on a CPU with AVX-512, which
# computes a few tiles of one head at a time (benchmarks/attention.py): a pair costs somewhat more than a dense one, and
# gathering a key with its value and opening a tile cost so many pairs. Opening costs a little more than there, so that
# tiles of few queries, which take torch twice as long, are not chosen for a few per cent.
_PAIR, _MASKED, _KEY, _TILE = 1.15, 1.28, 8.0, 1400.0


@dataclass(frozen=True)
class Tiles:
    """The tables of one pattern on one layout; H is 1 where all heads share them.

    Attributes:
        queries: int64 [H, T, Q] positions of the queries of each tile; a short tile repeats its last.
        keys: int64 [H, T, K] positions of the keys that each tile reads; a short list repeats its first.
        mask: bool [H, T, Q, K], which pairs are seen; None where all are.
        order: int64 [H, N] where each token's result lies behind the tiles' results and the rows'.
        rows: int64 [E] positions of the queries that are not on the grid, which attend densely.
        row_mask: bool [H, E, N], what they see; None where they see all.
        absent: float64 [H, T, Q] number of zero keys that each query sees besides; None where there are none.
        seen: pairs of tokens that the pattern lets see each other, mean over heads.
    """

    layout: Layout
    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    order: Tensor
    rows: Tensor
    row_mask: Tensor | None
    absent: Tensor | None
    seen: float

    @property
    def visited(self) -> int:
        """Pairs that are computed, per head."""
        _, tiles, queries = self.queries.shape
        return tiles * queries * self.keys.shape[-1] + len(self.rows) * self.layout.total

    @property
    def ideal(self) -> float:
        """Speed-up of attention if only seen pairs cost anything."""
        return self.layout.dense / self.seen

    @property
    def tile(self) -> float:
        """Speed-up of attention if every computed pair costs as much as one of dense attention."""
        return self.layout.dense / self.visited

    @property
    def predicted(self) -> float:
        """Speed-up of attention by the cost model."""
        rows = len(self.rows) * self.layout.total
        cost = tile_cost(*self.queries.shape[1:], self.keys.shape[2], self.mask is not None)
        return self.layout.dense / (rows + cost)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tables as operands of ``tokenopt::tiled_attention``."""
        tensors = {"queries": self.queries, "keys": self.keys, "order": self.order, "rows": self.rows}
        if self.mask is not None:
            tensors["mask"] = additive(self.mask)
        if self.row_mask is not None:
            tensors["row_mask"] = additive(self.row_mask)
        if self.absent is not None:
            tensors["absent"] = self.absent.log()
        return tensors

    def lowered(self) -> Lowered:
        """The call of ``tokenopt::tiled_attention``."""
        return Lowered("tiled_attention", self.tensors, {}, self.ideal, self.tile, self.predicted, self)


def additive(mask: Tensor) -> Tensor:
    """A boolean mask as what is added to logits."""
    return torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))


def tile_cost(tiles: int, queries: int, keys: int, masked: bool) -> float:
    """What attention in tiles costs, in pairs of dense attention."""
    pair = _MASKED if masked else _PAIR
    return tiles * (queries * keys * pair + keys * _KEY + _TILE)


def tile(pattern: Mask, layout: Layout) -> Tiles:
    """The tables of a mask on a layout, with the tiling that the cost model likes best.

    Raises:
        Refused: if the pattern means nothing here, or leaves a query without any key.
    """
    pattern.check(layout)
    heads = list(pattern.by_head(layout.heads))
    for head in heads:
        head.check(layout)
    return _joined(heads, layout, [_best_tiling(head, layout) for head in heads])


def tile_as(pattern: Mask, layout: Layout, queries: Tensor) -> Tiles:
    """The tables of a mask in given tiles of queries, [H, T, Q]."""
    heads = list(pattern.by_head(layout.heads)) * len(queries)
    return _joined(heads, layout, [(q, _width(head, layout, q)[0]) for head, q in zip(heads, queries, strict=True)])


def _joined(heads: list[Mask], layout: Layout, tilings: list[tuple[Tensor, int]]) -> Tiles:
    parts = [_tables(head, layout, queries, width) for head, (queries, width) in zip(heads, tilings, strict=True)]
    most = [max(p[i].shape[d] for p in parts) for i, d in ((0, 0), (0, 1), (1, 1))]
    tables = [_grown(p, *most) for p in parts]
    queries, keys, mask = (torch.stack(column) for column in zip(*tables, strict=True))
    rows = torch.tensor(layout.others, dtype=torch.int64)
    row_mask = torch.cat([seen for head in heads for _, seen in _visible(head, layout, rows[None])])
    seen = (sum(p[3] for p in parts) + int(row_mask.sum())) / len(parts)
    row_mask = row_mask if bool((row_mask != row_mask[:1]).any()) else row_mask[:1]
    return Tiles(
        layout, queries, keys, None if bool(mask.all()) else mask, _order(queries, rows, layout), rows,
        None if bool(row_mask.all()) else row_mask, _absent(heads, layout, queries), seen,
    )  # fmt: skip


def reference_mask(pattern: Mask, layout: Layout) -> Tensor:
    """bool [H, N, N]: what every query sees, from the pattern's own words; the truth for every lowering."""
    pattern.check(layout)
    tokens = layout.tokens()
    masks = [head.visible(tokens, tokens) for head in pattern.by_head(layout.heads)]
    mask = torch.stack(masks)
    return mask & torch.ones(layout.total, layout.total, dtype=torch.bool).tril() if layout.causal else mask


def absent_keys(pattern: Mask, layout: Layout) -> Tensor | None:
    """int64 [H, N]: how many zero keys each query sees besides; None where there are none."""
    return _zero_keys(pattern.by_head(layout.heads), layout)


def _zero_keys(heads: Sequence[Mask], layout: Layout) -> Tensor | None:
    tokens = layout.tokens()
    counts = [getattr(head, "absent", lambda _: None)(tokens) for head in heads]
    if all(c is None for c in counts):
        return None
    return torch.stack([tokens.on_grid * (0 if c is None else c) for c in counts])


def _best_tiling(pattern: Mask, layout: Layout) -> tuple[Tensor, int]:
    """The queries of every tile, and the longest list of keys."""
    best = None
    for tiling in _distinct(pattern.tilings(layout)):
        queries = tiling + layout.start
        width, masked = _width(pattern, layout, queries)
        cost = tile_cost(*queries.shape, width, masked)
        if best is None or cost < best[0]:
            best = cost, queries, width
    assert best is not None, "every pattern has a tiling"
    return best[1:]


def _width(pattern: Mask, layout: Layout, queries: Tensor) -> tuple[int, bool]:
    """Keys that the tile which sees most of them reads, and whether some pair of a tile is hidden."""
    width, seen_pairs = 0, 0
    for _, seen in _visible(pattern, layout, queries):
        width = max(width, int(seen.any(1).sum(-1).max()))
        seen_pairs += int(seen.sum())
    return width, seen_pairs < queries.numel() * width


def _distinct(tilings: Iterator[Tensor]) -> Iterator[Tensor]:
    known: set[tuple[int, ...]] = set()
    for tiling in tilings:
        key = (*tiling.shape, *tiling[0].tolist())
        if key not in known:
            known.add(key)
            yield tiling


def _visible(pattern: Mask, layout: Layout, queries: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """bool [t, Q, N] for some tiles at a time: what their queries see."""
    tokens = layout.tokens()
    step = max(_PAIRS // max(queries.shape[1] * layout.total, 1), 1)
    for first in range(0, len(queries), step):
        part = queries[first : first + step]
        seen = pattern.visible(layout.at(part.flatten()), tokens).reshape(*part.shape, layout.total)
        if layout.causal:
            seen = seen & (part[..., None] >= torch.arange(layout.total))
        yield slice(first, first + step), seen


def _tables(pattern: Mask, layout: Layout, queries: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, float]:
    keys = torch.zeros(len(queries), width, dtype=torch.int64)
    mask = torch.zeros(*queries.shape, width, dtype=torch.bool)
    real = torch.ones_like(queries, dtype=torch.bool)
    real[:, 1:] = queries[:, 1:] != queries[:, :-1]
    total = 0
    for where, seen in _visible(pattern, layout, queries):
        union = seen.any(1)
        count = union.sum(-1, keepdim=True)
        order = (~union).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :width]
        valid = torch.arange(width) < count
        keys[where] = torch.where(valid, order, order[:, :1])
        mask[where] = seen.gather(2, order[:, None].expand(-1, queries.shape[1], -1)) & valid[:, None]
        total += int((seen.sum(-1) * real[where]).sum())
    if not bool(mask.any(-1).all()):
        raise Refused("a query would see no key at all", "join it with a pattern that holds the query itself")
    return queries, keys, mask, total


def _grown(
    tables: tuple[Tensor, Tensor, Tensor, float], tiles: int, queries: int, keys: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The tables of one head, as large as those of the others: more tiles, queries and keys, that change nothing."""
    q, k, mask, _ = tables
    at = lambda n, m: torch.arange(m).clamp(max=n - 1)  # noqa: E731
    t, i, j = at(q.shape[0], tiles), at(q.shape[1], queries), at(k.shape[1], keys)
    grown = mask[t][:, i][:, :, j]
    grown[:, :, k.shape[1] :] = False
    return q[t][:, i], k[t][:, j], grown


def _order(queries: Tensor, rows: Tensor, layout: Layout) -> Tensor:
    heads, tiles, size = queries.shape
    order = torch.zeros(heads, layout.total, dtype=torch.int64)
    place = torch.arange(tiles * size).expand(heads, -1)
    order.scatter_(1, queries.flatten(1), place)
    order[:, rows] = tiles * size + torch.arange(len(rows))
    return order


def _absent(heads: Sequence[Mask], layout: Layout, queries: Tensor) -> Tensor | None:
    counts = _zero_keys(heads, layout)
    if counts is None or not bool(counts.any()):
        return None
    return counts.gather(1, queries.flatten(1)).reshape(queries.shape).double()
