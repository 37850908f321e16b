"""Patterns that depend on the content through weights that are fitted on data, from a .safetensors file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenopt.attention.layout import Layout
from tokenopt.attention.masks import BlockMap, Sizes
from tokenopt.attention.pattern import Lowered, Pattern, Refused, box_tilings, each
from tokenopt.attention.routed import Blocks
from tokenopt.attention.tiles import tile_as
from tokenopt.errors import UsageError

_TOKENS, _ITERATIONS = 20000, 30  # of the clustering
_SAMPLES, _STEPS = 64, 300  # of the distillation
_LEAST = 0.02  # entries of the basis below are none, as in Sparsifiner


@dataclass(frozen=True, repr=False)
class Sorted(Pattern):
    """Tokens are sorted by the centre nearest to their key and cut into chunks, that see themselves and the next chunk.

    The last chunk, which may be short, sees itself. Tokens off the grid see all and are seen by all.

    Attributes:
        centres: how many.
        chunk: tokens per chunk.
        weights: the file with the centres; without, they are fitted on data.
        site: number of the attention whose centres they are.

    Source: Liu et al., CATANet, CVPR 2025, arXiv:2503.06896: its token aggregation and the attention within groups; not
        its second softmax over the centres, which has weights of its own.
    """

    centres: int = 64
    chunk: int = 64
    weights: str | None = None
    site: int = 0
    subset: ClassVar[bool] = True
    masked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive(self, "centres", "chunk")

    @property
    def unfitted(self) -> bool:
        return self.weights is None

    def lower(self, layout: Layout) -> Lowered:
        if layout.causal:
            raise Refused("sorted tokens have no order in time", "Routed")
        [centres] = _load(self, ("centres",))
        width = layout.heads * layout.head_dim
        if centres.shape[1] != width:
            raise Refused(f"the centres have {centres.shape[1]} features, and the keys {width}", "fit them here")
        count = -(-layout.count // self.chunk)
        chunks = BlockMap(self.chunk, tuple(tuple(range(c, min(c + 2, count))) for c in range(count)))
        line = replace(layout, grid=(layout.count,))
        found = tile_as(chunks, line, next(box_tilings(line.grid, (), [(self.chunk,)]))[None] + layout.start).lowered()
        stop = layout.start + layout.count
        settings = {"start": layout.start, "stop": stop, "chunk": self.chunk}
        extra = 4 * layout.total + layout.count * self.centres  # four copies, and distances to the centres
        predicted = 1 / (1 / found.predicted + extra / layout.dense)
        return replace(found, op="sorted_attention", tensors={**found.tensors, "centres": F.normalize(centres, dim=-1)},
                       settings=settings, predicted=predicted, tiles=None, dense="sorted_attention_bias")  # fmt: skip

    def whole(self, layout: Layout, lowered: Lowered) -> Lowered:
        return replace(self, chunk=layout.count).lower(layout)

    def fit(self, layout: Layout, query: Tensor, key: Tensor) -> tuple[Pattern, dict[str, Tensor]]:
        """Centres of the keys: k-means by cosine from far-off keys, the fixed point of CATANet's moving averages."""
        keys = key[:, :, layout.start : layout.start + layout.count].transpose(1, 2).flatten(2).flatten(0, 1)
        generator = torch.Generator().manual_seed(0)
        keys = keys[torch.randperm(len(keys), generator=generator)[:_TOKENS]]
        if len(keys) < self.centres:
            raise UsageError(f"{len(keys)} tokens of data have no {self.centres} centres", hint="more data")
        unit, chosen = F.normalize(keys, dim=-1), [0]
        near = torch.full((len(keys),), -1.0)
        for _ in range(self.centres - 1):  # k-means++: more likely, the less like a centre
            near = torch.maximum(near, unit @ unit[chosen[-1]])
            chosen.append(int((1 - near).clamp(min=1e-6).multinomial(1, generator=generator)))
        centres = keys[chosen]
        for _ in range(_ITERATIONS):
            nearest = (keys @ F.normalize(centres, dim=-1).T).argmax(-1)
            member = F.one_hot(nearest, self.centres).to(keys.dtype)
            size = member.sum(0).unsqueeze(-1)
            centres = torch.where(size > 0, member.T @ keys / size.clamp(min=1), centres)
        return self, {"centres": centres}


@dataclass(frozen=True, repr=False)
class Predicted(Pattern):
    """Each query sees the keys that a predicted attention of low rank gives most to.

    The prediction is for one size of grid. Tokens off the grid see all and are seen by all.

    Attributes:
        rank: maps of attention that a prediction is made of.
        keep: share of the keys on the grid that are seen.
        tile: size of the boxes of queries that see the same keys; 1 as in the paper, where every query has its own.
        coefficients: how many of the maps a query's prediction is made of.
        weights: the file with what predicts; without, it is distilled from dense attention on data.
        site: number of the attention that it is for.

    Source: Wei et al., Sparsifiner, CVPR 2023, arXiv:2303.13755.
    """

    rank: int = 32
    keep: float = 0.25
    tile: Sizes = 1
    coefficients: int = 8
    weights: str | None = None
    site: int = 0
    subset: ClassVar[bool] = True
    masked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive(self, "rank", "coefficients")
        if not 0 < self.keep <= 1:
            raise UsageError(f"keep={self.keep} of Predicted is no share", hint="keep=0.25")

    @property
    def unfitted(self) -> bool:
        return self.weights is None

    def at(self, share: float) -> Predicted:
        """Of the keys on the grid; what is learned is the same for all."""
        return replace(self, keep=share)

    def lower(self, layout: Layout) -> Lowered:
        if layout.causal:
            raise Refused("a prediction for one grid does not know the past", "Routed")
        names = ("query_weight", "key_weight", "project", "basis")
        learned = dict(zip(names, _load(self, names), strict=True))
        count, inner = len(learned["project"]), len(learned["query_weight"])
        if (count, inner) != (layout.count, layout.head_dim):
            there = f"there are {layout.count} of {layout.head_dim}"
            raise Refused(f"it predicts for {count} tokens of {inner} features, and {there}", "fit it here")
        blocks = Blocks.of(layout, self.tile, each(1, len(layout.grid)))
        topk = ceil(self.keep * layout.count)
        settings = {"topk": topk, "coefficients": min(self.coefficients, len(learned["basis"]))}
        extra = len(blocks.queries) * layout.count * (1 + self.rank / layout.head_dim)
        return blocks.lowered("predicted_attention", {**blocks.tensors(), **learned}, settings, topk, extra)

    def whole(self, layout: Layout, lowered: Lowered) -> Lowered:
        return replace(self, keep=1.0).lower(layout)

    def fit(self, layout: Layout, query: Tensor, key: Tensor) -> tuple[Pattern, dict[str, Tensor]]:
        """Distils dense attention among the tokens on the grid, by the divergence of the prediction from it."""
        stop = layout.start + layout.count
        query, key = (x[:_SAMPLES, :, layout.start : stop] for x in (query, key))
        target = (query @ key.transpose(-2, -1) * layout.head_dim**-0.5).softmax(-1)
        small = max(layout.head_dim // 2, 1)
        generator = torch.Generator().manual_seed(0)
        normal = lambda *shape: torch.randn(shape, generator=generator) * shape[0] ** -0.5  # noqa: E731
        learned = {
            "query_weight": normal(layout.head_dim, small),
            "key_weight": normal(layout.head_dim, small),
            "project": normal(layout.count, self.rank),
            "basis": torch.rand(self.rank, layout.count, generator=generator),
        }
        parameters = [p.requires_grad_() for p in learned.values()]
        optimizer = torch.optim.Adam(parameters, 1e-2)
        with torch.enable_grad():
            for _ in range(_STEPS):
                maps = (query @ parameters[0]) @ ((key @ parameters[1]).transpose(-2, -1) @ parameters[2])
                predicted = (maps * layout.heads**-0.5).softmax(-1) @ parameters[3].abs() + 1e-6
                predicted = predicted / predicted.sum(-1, keepdim=True)
                loss = -(target * predicted.log()).sum(-1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        weights = {name: p.detach() for name, p in learned.items()}
        basis = weights["basis"].abs()
        basis = basis / basis.amax()  # a prediction is a ranking: its scale means nothing
        return self, {**weights, "basis": torch.where(basis > _LEAST, basis, 0.0)}


def _positive(pattern: Pattern, *names: str) -> None:
    for name in names:
        if getattr(pattern, name) < 1:
            raise UsageError(f"{name}={getattr(pattern, name)} of {type(pattern).__name__} is not positive")


def _load(pattern: Sorted | Predicted, names: tuple[str, ...]) -> list[Tensor]:
    """The weights of a pattern.

    Raises:
        Refused: if there are none for this attention.
        UsageError: if the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if pattern.weights is None:
        raise Refused("its weights are fitted on data", "give inputs like those the model is for (--data FILE)")
    try:
        tensors = load_file(pattern.weights)
    except (OSError, SafetensorError) as error:
        raise UsageError("the weights of the pattern cannot be read", where=pattern.weights, why=str(error)) from error
    keys = [f"site{pattern.site}.{name}" for name in names]
    if any(key not in tensors for key in keys):
        raise Refused(f"{pattern.weights} has no weights for attention {pattern.site}", "fit them with this model")
    return [tensors[key] for key in keys]
