"""Selects: which tokens stay, and for some which kept one each of the others goes to. Counts are static.

Kept tokens stay in their original order; only ``bipartite`` mixes them, as its paper does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, prod

import torch
from torch import Tensor, fx

from tokenopt.analysis.terms import Cat, Terms, length
from tokenopt.ops.mix import pool_matrix
from tokenopt.tokens.plan import Plan, Refused, Stream
from tokenopt.tokens.primitive import Primitive
from tokenopt.tokens.score import Energy, Score, features

aten = torch.ops.aten
ops = torch.ops.tokenopt


class Select(Primitive, kind="select"):
    """Which tokens stay.

    Attributes:
        scored: whether it needs a score: True, False, or None where it can use one.
        gives: whether it says where removed tokens go ("places"), mixes them softly ("soft"), leaves them as places of
            size 0 ("masked"), or none of these ("").
        permutes: whether it changes the order of tokens, even where it removes none.
        spares: whether special tokens between the others, as those of every frame, stay.
    """

    scored: bool | None = True
    gives: str = ""
    permutes = False
    spares: bool = False

    @property
    def reads_rows(self) -> bool:
        return getattr(self, "metric", "") == "hidden"

    def fit(self, stream: Stream, keep: int) -> int:
        """The number of kept tokens nearest to ``keep`` that it can do."""
        return max(keep, 1)

    def build(self, stream: Stream, score: fx.Node | None, keep: int) -> Plan:
        """The plan that keeps ``keep`` tokens of the segment. Raises: Refused."""
        raise NotImplementedError

    def neutral(self, stream: Stream, score: fx.Node | None) -> Plan:
        """A plan of the same form that removes nothing."""
        if score is None:
            numbers = torch.arange(stream.total, dtype=torch.float32).neg()[None]
            score = stream.per_sample(stream.constant("order", numbers))
        plan = stream.topk(score, stream.count)
        if self.gives in ("soft", "masked"):
            identity = stream.constant("identity", torch.eye(stream.count)[None])
            return replace(plan, assign=identity, spread=identity)
        return replace(plan, dst=plan.src) if self.gives else plan


def _plan(stream: Stream, node: fx.Node, results: int) -> Plan:
    return Plan(*stream.items(node, results))


# -- by score ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopK(Select, name="topk"):
    """the best-scored tokens stay"""

    spares = True

    def build(self, stream: Stream, score: fx.Node, keep: int) -> Plan:
        return stream.topk(score, keep)


@dataclass(frozen=True)
class Rows(Select, name="rows"):
    """whole rows of the grid stay, those of the best mean score

    Source: Jiang et al., FoPru, arXiv:2411.14164, the row strategy.
    """

    def fit(self, stream: Stream, keep: int) -> int:
        width = stream.grid[-1]
        return max(keep // width, 1) * width

    def build(self, stream: Stream, score: fx.Node, keep: int) -> Plan:
        width = stream.grid[-1]
        height = stream.count // width
        node = stream.insert(ops.select_rows.default, score, keep // width, height, width, stream.start, stream.stop)
        return _plan(stream, node, 2)


@dataclass(frozen=True)
class Groups(Select, name="groups"):
    """the best-scored tokens of each frame or crop stay, a fixed number in each

    Args:
        groups: how many equal runs of tokens there are; 0 takes the frames of a T x H x W grid.
        budget: shares of the kept tokens, one per group; equal ones by default.
    Source: QuoTA (Luo et al., arXiv:2503.08689) with fixed frame weights.
    """

    groups: int = 0
    budget: tuple[float, ...] = ()

    spares = True

    def fit(self, stream: Stream, keep: int) -> int:
        return sum(self._counts(stream, keep))

    def build(self, stream: Stream, score: fx.Node, keep: int) -> Plan:
        node = stream.insert(ops.select_groups.default, score, self._counts(stream, keep), stream.start, stream.stop)
        return _plan(stream, node, 2)

    def _counts(self, stream: Stream, keep: int) -> list[int]:
        groups = self.groups or frames_of(stream).count
        if stream.count % groups or (self.budget and len(self.budget) != groups):
            raise Refused(
                f"{stream.count} tokens are not {groups} groups with a budget each", "change groups or budget"
            )
        budget = self.budget or (1.0,) * groups
        size = stream.count // groups
        return [min(size, max(1, round(keep * b / sum(budget)))) for b in budget]


@dataclass(frozen=True)
class Contextual(Select, name="contextual"):
    """the best-scored tokens stay, and of the others an even few, to which the rest goes by similarity

    Args:
        share: of the kept tokens that are the even few.
        metric: what tokens are compared by: "key" or "hidden".
    Source: Yang et al., VisionZip, arXiv:2412.04467: dominant and contextual tokens (54 of 64 are dominant).
    """

    share: float = 0.16
    metric: str = "key"

    gives = "places"

    def build(self, stream: Stream, score: fx.Node, keep: int) -> Plan:
        contextual = min(round(self.share * keep), keep - 1)
        if not contextual:
            raise Refused(f"of {keep} tokens none is contextual", "keep more tokens, or a larger share")
        node = stream.insert(ops.select_contextual.default, score, features(stream, self.metric), keep - contextual,
                             contextual, stream.start, stream.stop)  # fmt: skip
        return _plan(stream, node, 3)


@dataclass(frozen=True)
class Cells(Select, name="cells"):
    """the best-scored tokens stay, and the others of each cell of the grid become one token

    Args:
        cell: side of a cell, in patches.
    Source: Yang et al., VFlowOpt, arXiv:2508.05211, recycling, with one slot for every cell.
    """

    cell: int = 4

    gives = "places"

    def fit(self, stream: Stream, keep: int) -> int:
        return max(keep, self._slots(stream) + 1)

    def build(self, stream: Stream, score: fx.Node, keep: int) -> Plan:
        node = stream.insert(ops.select_cells.default, score, keep - self._slots(stream), list(stream.image), self.cell,
                             stream.start, stream.stop)  # fmt: skip
        return _plan(stream, node, 3)

    def _slots(self, stream: Stream) -> int:
        return prod(ceil(size / self.cell) for size in stream.image)


@dataclass(frozen=True)
class Diverse(Select, name="diverse"):
    """half of the tokens stay by score, the others by having no near-duplicate among the rest

    Args:
        share: of the kept tokens that are chosen by score.
        step: how many near-duplicates go at once.
    Sequential: (removed / step) rounds. Source: Zhang et al., VisPruner, arXiv:2412.01818v2.
    """

    share: float = 0.5
    step: int = 8
    metric: str = "hidden"

    def build(self, stream: Stream, score: fx.Node, keep: int) -> Plan:
        node = stream.insert(ops.select_diverse.default, score, features(stream, self.metric), int(self.share * keep),
                             keep, self.step, stream.start, stream.stop)  # fmt: skip
        return _plan(stream, node, 2)


# -- by diversity ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Farthest(Select, name="farthest"):
    """tokens stay that are least similar to those chosen before, from the best-scored (or most isolated) one on

    Args:
        spread: "min" takes the token whose nearest chosen one is farthest (k-center), "sum" the one of the smallest
            summed similarity (max-sum).
    Sequential: one round per kept token. Source: Li et al., ToDRE, arXiv:2505.18757 ("min" in v1, "sum" in v2);
    Alvar et al., DivPrune, arXiv:2503.02175 ("min", without a score).
    """

    spread: str = "min"
    metric: str = "hidden"

    scored = None

    def build(self, stream: Stream, score: fx.Node | None, keep: int) -> Plan:
        if self.spread not in ("min", "sum"):
            raise Refused(f"spread is not {self.spread!r}", "spread=min or spread=sum")
        node = stream.insert(ops.select_farthest.default, features(stream, self.metric), score, keep,
                             self.spread == "sum", stream.start, stream.stop)  # fmt: skip
        return _plan(stream, node, 2)


@dataclass(frozen=True)
class Determinantal(Select, name="dpp"):
    """the set of tokens stays whose similarities have the greatest determinant, weighted by score if there is one

    Sequential: one round per kept token. Source: Zhang et al., CDPruner, arXiv:2506.10967, with greedy MAP inference of
    Chen et al., arXiv:1709.05135.
    """

    metric: str = "hidden"

    scored = None

    def build(self, stream: Stream, score: fx.Node | None, keep: int) -> Plan:
        node = stream.insert(ops.select_dpp.default, features(stream, self.metric), score, keep, stream.start,
                             stream.stop)  # fmt: skip
        return _plan(stream, node, 2)


# -- by matching -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bipartite(Select, name="bipartite"):
    """even positions go to their most similar odd position, the best pairs first

    Source: Bolya et al., Token Merging, arXiv:2210.09461.
    """

    metric: str = "key"

    scored = False
    gives = "places"
    permutes = True

    def fit(self, stream: Stream, keep: int) -> int:
        return max(keep, stream.count - stream.count // 2, 1)

    def build(self, stream: Stream, score: None, keep: int) -> Plan:
        node = stream.insert(ops.match_bipartite.default, features(stream, self.metric), stream.count - keep,
                             stream.start, stream.stop)  # fmt: skip
        return _plan(stream, node, 3)

    def neutral(self, stream: Stream, score: None) -> Plan:
        return self.build(stream, score, stream.count)


@dataclass(frozen=True)
class Threshold(Select, name="threshold"):
    """as bipartite, but each sample merges all pairs more similar than a threshold: the count depends on the data

    Merged tokens stay as places of size 0, which attention and means do not see: shapes are static, and every runtime
    takes it, but nothing gets faster. It tells what thresholds do; for speed take ``bipartite`` with the counts that
    they give on average, which is what `tokenopt.fitting.fit_thresholds` starts from.

    Args:
        values: the threshold of each layer; `tokenopt.optimize` fits them when it is given data.
    Source: Wang et al., DyMU, arXiv:2504.17040.
    """

    values: tuple[float, ...] = ()
    metric: str = "key"

    scored = False
    gives = "masked"

    def build(self, stream: Stream, score: None, keep: int) -> Plan:
        if len(self.values) <= stream.layer:
            raise Refused("there is no threshold for this layer", "give calibration data, or values, one per layer")
        return self.masked(stream, stream.constant("threshold", torch.tensor(self.values[stream.layer])))

    def masked(self, stream: Stream, threshold: fx.Node) -> Plan:
        """The plan for a threshold that is a node."""
        node = stream.insert(ops.match_threshold.default, features(stream, self.metric), stream.size, threshold,
                             stream.start, stream.stop)  # fmt: skip
        index, assign, spread, size = stream.items(node, 4)
        return Plan(index, assign=assign, spread=spread, size=size)


class _Partition(Select):
    """Matching between fixed sets of positions: the same for all samples, so also for both halves of guidance."""

    scored = False
    gives = "places"
    spares = True

    def sets(self, stream: Stream) -> tuple[list[int], list[int]]:
        """Positions in the sequence that may be removed, and those that they may go to."""
        raise NotImplementedError

    def fit(self, stream: Stream, keep: int) -> int:
        return max(keep, stream.count - len(self.sets(stream)[0]), 1)

    def build(self, stream: Stream, score: None, keep: int) -> Plan:
        sets = self.sets(stream)
        if not all(sets):
            raise Refused("no token may be merged into another here", "a grid of at least one whole cell")
        sources, targets = (
            stream.constant(name, torch.tensor([positions], dtype=torch.int64))
            for name, positions in zip(("sources", "targets"), sets, strict=True)
        )
        node = stream.insert(ops.match_partition.default, features(stream, self.metric), sources, targets,
                             stream.count - keep, stream.start, stream.stop)  # fmt: skip
        return _plan(stream, node, 3)

    def neutral(self, stream: Stream, score: None) -> Plan:
        return self.build(stream, score, stream.count)


@dataclass(frozen=True)
class Grid(_Partition, name="bipartite_grid"):
    """one token of each cell of the grid takes in the most similar tokens of all cells

    Args:
        cell: side of a cell, in patches; rows and columns that fill no cell only give.
        seed: which token of a cell it is, at random but fixed for a resolution; None is the first.
    Source: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, arXiv:2303.17604.
    """

    metric: str = "hidden"
    cell: int = 2
    seed: int | None = 0

    def sets(self, stream: Stream) -> tuple[list[int], list[int]]:
        frames = frames_of(stream)
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed + stream.layer)
        sources, targets = [], []
        for first in frames.starts(stream):
            cells = {frames.patches[i] for i in cell_tokens(*frames.grid, self.cell, generator)}
            targets += [first + i for i in sorted(cells)]
            sources += [first + i for i in frames.patches if i not in cells]
        return sources, targets


def cell_tokens(height: int, width: int, cell: int, generator: torch.Generator | None) -> list[int]:
    """One position of each whole cell of a grid, in raster order: the first, or a random one."""
    rows, columns = height // cell, width // cell
    offset = torch.zeros(rows, columns, dtype=torch.int64)
    if generator is not None:
        offset = torch.randint(cell * cell, (rows, columns), generator=generator)
    return [
        (i * cell + int(offset[i, j]) // cell) * width + j * cell + int(offset[i, j]) % cell
        for i in range(rows)
        for j in range(columns)
    ]


@dataclass(frozen=True)
class Frames(_Partition, name="bipartite_frames"):
    """the first frame, special tokens and one token of each cell of the other frames take in the others

    Args:
        cell, seed: as in bipartite_grid.
        uniform: this share of the whole sequence stays alone, too, at even distances.
    Source: Shen et al., FastVGGT, arXiv:2509.02560.
    """

    metric: str = "hidden"
    cell: int = 2
    seed: int | None = 0
    uniform: float = 0.1

    def sets(self, stream: Stream) -> tuple[list[int], list[int]]:
        frames = frames_of(stream)
        if frames.count == 1:
            sizes = "x".join(map(str, frames.grid))
            raise Refused(f"its tokens are not frames of a grid, but one of {sizes}", "use bipartite_grid")
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed + stream.layer)
        start, *others = frames.starts(stream)
        targets = [start + i for i in range(frames.size)]
        sources = []
        for first in others:
            cells = {frames.patches[i] for i in cell_tokens(*frames.grid, self.cell, generator)}
            targets += [first + i for i in range(frames.size) if i in cells or i not in frames.patches]
            sources += [first + i for i in frames.patches if i not in cells]
        step = stream.total // max(int(self.uniform * stream.total), 1) if self.uniform else 0
        return [i for i in sources if not step or i % step], targets


@dataclass(frozen=True)
class FrameGrid:
    """A segment as frames, one for an image: how many, of ``size`` tokens each, and where in one its patches lie."""

    count: int
    size: int
    patches: list[int]
    grid: tuple[int, int]

    def starts(self, stream: Stream) -> list[int]:
        """Where each frame begins in the sequence."""
        return [stream.start + i * self.size for i in range(self.count)]


def frames_of(stream: Stream) -> FrameGrid:
    """The frames of a segment that is complete. Raises: Refused."""
    terms: Terms = stream.segment.terms
    if stream.count != stream.segment.length or not terms or not isinstance(terms[-1], Cat):
        grid = stream.grid
        if len(grid) not in (2, 3):
            raise Refused(f"it needs an image or frames, and there is a grid of {'x'.join(map(str, grid))}", "use tome")
        count, size = prod(grid[:-2]), prod(grid[-2:])
        return FrameGrid(count, size, list(range(size)), (grid[-2], grid[-1]))
    count, size = length(terms[:-1]), terms[-1].size
    patches = [i for i in range(size) if i not in stream.segment.special]
    return FrameGrid(count, size, patches, stream.segment.frame or _square(len(patches)))


def _square(count: int) -> tuple[int, int]:
    side = round(count**0.5)
    return (side, side) if side * side == count else (1, count)


@dataclass(frozen=True)
class EnergyMatch(Select, name="bipartite_energy"):
    """the tokens that are most like many others are paired and merged; those that stand alone stay

    Source: Tran et al., PiToMe, arXiv:2405.16148.
    """

    energy: Score = field(default_factory=Energy)
    metric: str = "key"

    scored = False
    gives = "places"

    def fit(self, stream: Stream, keep: int) -> int:
        return max(keep, stream.count - stream.count // 2, 1)

    def build(self, stream: Stream, score: None, keep: int) -> Plan:
        r = stream.count - keep
        energy = self.energy.energy(stream)
        sets = stream.insert(ops.partition_energy.default, energy, r, stream.start, stream.stop)
        sources, targets = stream.items(sets, 2)
        node = stream.insert(ops.match_partition.default, features(stream, self.metric), sources, targets, r,
                             stream.start, stream.stop)  # fmt: skip
        return _plan(stream, node, 3)


# -- by clustering -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KMeans(Select, name="kmeans"):
    """clusters of similar tokens, found by a fixed number of rounds from evenly spaced seeds, become one token each"""

    iterations: int = 3
    metric: str = "key"

    scored = False
    gives = "places"

    def build(self, stream: Stream, score: None, keep: int) -> Plan:
        node = stream.insert(ops.cluster_kmeans.default, features(stream, self.metric), keep, self.iterations,
                             stream.start, stream.stop)  # fmt: skip
        return _plan(stream, node, 3)


@dataclass(frozen=True)
class Density(Select, name="dpc_knn"):
    """tokens in dense places far from denser ones are centres, and the others go to the nearest

    Source: density peaks (DPC-kNN) as in Zeng et al., TCFormer, arXiv:2204.08680.
    """

    neighbours: int = 5
    metric: str = "key"

    scored = False
    gives = "places"

    def build(self, stream: Stream, score: None, keep: int) -> Plan:
        neighbours = min(self.neighbours, stream.count - 1)
        node = stream.insert(ops.cluster_density.default, features(stream, self.metric), keep, neighbours, stream.start,
                             stream.stop)  # fmt: skip
        return _plan(stream, node, 3)


# -- softly ------------------------------------------------------------------------------------------------------------


def cells_of(grid: tuple[int, ...], keep: int) -> tuple[int, ...]:
    """A coarser grid of the same proportions with at most ``keep`` cells."""
    cells = [max(1, int(size * (keep / prod(grid)) ** (1 / len(grid)) + 1e-6)) for size in grid]
    while prod(cells) > keep:  # a side of less than one cell was rounded up
        cells[cells.index(max(cells))] -= 1
    for i in sorted(range(len(grid)), key=lambda i: -grid[i]):  # what rounding down left
        while cells[i] < grid[i] and prod(cells) // cells[i] * (cells[i] + 1) <= keep:
            cells[i] += 1
    return tuple(cells)


class _Soft(Select):
    """Each new token is a mixture of old ones, and each old one is restored as a mixture of new ones."""

    scored = False
    gives = "soft"

    def fit(self, stream: Stream, keep: int) -> int:
        return prod(cells_of(stream.grid, max(keep, 1)))

    def representatives(self, stream: Stream, keep: int) -> fx.Node:
        """The token in the middle of each cell, for position terms: [B, M] in the whole sequence."""
        grid, cells = stream.grid, cells_of(stream.grid, keep)
        axes = [[int((i + 0.5) * size / count) for i in range(count)] for size, count in zip(grid, cells, strict=True)]
        middle = torch.zeros(1, dtype=torch.int64)
        for size, places in zip(grid, axes, strict=True):
            middle = (middle[:, None] * size + torch.tensor(places)[None]).flatten()
        return around(stream, middle)


def around(stream: Stream, middle: Tensor) -> fx.Node:
    """Constant positions within the segment [M] as those of the whole sequence, protected tokens included: [B, .]."""
    before, behind = torch.arange(stream.start), torch.arange(stream.stop, stream.total)
    index = torch.cat([before, stream.start + middle, behind])[None]
    return stream.per_sample(stream.constant("places", index))


@dataclass(frozen=True)
class Pool(_Soft, name="pool"):
    """each cell of a coarser grid becomes the mean of its tokens

    Source: adaptive average pooling, as in TokenFLEX (Hu et al., arXiv:2504.03154).
    """

    def build(self, stream: Stream, score: None, keep: int) -> Plan:
        matrix = pool_matrix(list(stream.grid), list(cells_of(stream.grid, keep)))
        spread = (matrix > 0).float().T
        spread = spread / spread.sum(1, keepdim=True)
        assign, back = stream.constant("pool", matrix[None]), stream.constant("unpool", spread[None])
        return Plan(self.representatives(stream, keep), assign=assign, spread=back)


@dataclass(frozen=True)
class SuperTokens(_Soft, name="super_tokens"):
    """tokens are shared softly among the cells of a coarser grid by similarity

    Args:
        local: only among the 3 x 3 cells around its own.
        iterations: of the association.
    Source: Huang et al., Vision Transformer with Super Token Sampling, arXiv:2211.11167 (local); with all
    cells, the seeds of STViT (Chang et al., arXiv:2303.08685) without trained weights.
    """

    local: bool = True
    iterations: int = 1

    @property
    def reads_rows(self) -> bool:
        return True

    def build(self, stream: Stream, score: None, keep: int) -> Plan:
        cells = list(cells_of(stream.grid, keep))
        node = stream.insert(ops.soft_association.default, stream.rows, list(stream.grid), cells, self.iterations,
                             self.local, stream.start)  # fmt: skip
        assign, spread = stream.items(node, 2)
        return Plan(self.representatives(stream, keep), assign=assign, spread=spread)


@dataclass(frozen=True)
class External(_Soft, name="external"):
    """tokens of one segment become their mean; the segments are one more input of the model, int64 ids [B, N] in [0, K)

    Every id has to occur in every sample. Source: the trajectory tokens of Zheng et al., TrajViT, arXiv:2505.23617.
    """

    input: str = "ids"

    def fit(self, stream: Stream, keep: int) -> int:
        return max(keep, 1)

    def build(self, stream: Stream, score: None, keep: int) -> Plan:
        row = torch.arange(stream.count) * keep // stream.count
        ids = stream.editor.input(self.input, (stream.count,), torch.int64, row)
        node = stream.insert(ops.segment_association.default, ids, keep, stream.start, stream.total)
        index, assign, spread = stream.items(node, 3)
        return Plan(index, assign=assign, spread=spread)
