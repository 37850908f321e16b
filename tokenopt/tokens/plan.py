"""What a reduction decides, and what it decides it from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from tokenopt.analysis.cuts import StreamCut, offset_in
from tokenopt.analysis.sites import AttentionSite, Segment, TokenAxis
from tokenopt.graph import GraphEditor
from tokenopt.program import Program

aten = torch.ops.aten
ops = torch.ops.tokenopt


_GRID = "use it before other reductions, on tokens of an image, or a recipe without a grid, such as tome or fopru"


class Refused(Exception):
    """A recipe cannot be applied at a place; it becomes a `Refusal` of that place.

    Args:
        why: the reason.
        hint: what to try instead.
    """

    def __init__(self, why: str, hint: str) -> None:
        self.why, self.hint = why, hint
        super().__init__(why)


@dataclass(frozen=True)
class Plan:
    """Which tokens stay and where the others go, as nodes; positions count the whole sequence at the place.

    Attributes:
        index: [B, M], the token that each kept place stands at; its position terms (RoPE, bias, mask) are kept.
        src, dst: [B, R], the tokens removed, and the kept place that each goes to; without ``dst``, to be restored they
            are taken to be in the most similar kept place.
        fuse: "drop", "sized" (mean weighted by how many originals each stands for), "mean" or "sum" (by ``weight``).
        weight: [B, N]; None is ones.
        assign, spread: a soft plan for the reducible segment of n tokens: new = assign @ old, assign [B or 1, M, n];
            restored = spread @ new, with spread [B or 1, n, M].
        size: [B, M], how many originals each token of a soft plan stands for; one of size 0 is not there any more.
        base: what removed tokens are restored from instead of from a kept place: given the kept tokens of a value,
            [B, M, ...], and N, the [B, N, ...] to put them into.
        returned: the name of an output of the model for the restored value.
    """

    index: fx.Node
    src: fx.Node | None = None
    dst: fx.Node | None = None
    fuse: str = "drop"
    weight: fx.Node | None = None
    assign: fx.Node | None = None
    spread: fx.Node | None = None
    size: fx.Node | None = None
    base: Callable[[fx.Node, int], fx.Node] | None = None
    returned: str = ""


@dataclass(frozen=True)
class Reduction:
    """One reduction as it was carried out; nodes are named, since the graph that it was done in may change.

    Attributes:
        site: the attention that it is named after.
        at: the value that was reduced, or the attention whose queries, keys and values were.
        nodes: the parts of the `Plan` that there are; "nearest" is where dropped tokens are restored from, "positions"
            whose position terms the kept ones have, "whole" all original tokens as mixtures of those left, "base" what
            removed ones are restored from.
        start, total, before, count: the segment begins at ``start`` of ``total`` tokens and had ``before`` of them; it
            has ``count`` now.
        dims: where the batch and the tokens are in the value; of an attention within windows, where these are.
        readers: inside attention, the operations that get fewer tokens; None is all.
        until: the value behind which all tokens are there again.
        parent: the reduction before it of the same tokens, by its place in the `Record`.
    """

    site: str
    at: str
    nodes: Mapping[str, str]
    fuse: str
    restore: str
    position: str
    proportional: bool
    start: int
    total: int
    before: int
    count: int
    dims: tuple[int, ...] = ()
    inside: bool = False
    readers: frozenset[str] | None = None
    until: str | None = None
    parent: int | None = None


@dataclass
class Record:
    """What a pass did to a graph, for the proof that it was right.

    Attributes:
        reductions: in order.
        restored: (operation, operand) where all tokens of the operand came back first.
        averaged: attentions over all tokens whose results were merged again.
        before, after: the program without and with the reductions; all that the plans were made of is still in it.
    """

    reductions: list[Reduction] = field(default_factory=list)
    restored: set[tuple[str, str]] = field(default_factory=set)
    averaged: set[str] = field(default_factory=set)
    before: Program | None = None
    after: Program | None = None


def named(plan: Plan, **others: fx.Node | None) -> dict[str, str]:
    """The nodes of a plan, and others, by their names."""
    parts = {f.name: getattr(plan, f.name) for f in fields(plan)} | others
    return {part: node.name for part, node in parts.items() if isinstance(node, fx.Node)}


@dataclass(frozen=True)
class Region:
    """A stretch of a graph that runs on fewer tokens.

    Attributes:
        site: the attention that it is named after.
        layer: the layer whose entry of the schedule says how many tokens stay.
        after: the value that is reduced; None for the operands of the attention itself.
        until: the value that is restored; None lets the tokens stay reduced.
        known: the last attention that has been computed when the plan is made.
        update: inside attention, what the attention adds to the stream: the region holds only what leads there.
        cut: where it is on a stream, if it is.
    """

    site: AttentionSite
    layer: int
    after: fx.Node | None
    until: fx.Node | None = None
    known: AttentionSite | None = None
    update: fx.Node | None = None
    cut: StreamCut | None = None

    @property
    def axis(self) -> TokenAxis:
        return self.site.axis


@dataclass(frozen=True)
class Stream:
    """The token stream at a place, as it is there: what a plan is made from. Positions count the whole sequence.

    Attributes:
        rows: the tokens [B, total, C].
        start, count: where the reducible segment begins and how many tokens it has now; ``total`` is the sequence.
        size: [B, total], how many originals each token stands for; None before any merge that counts them.
        sites: the attentions over this stream, layer by layer; cuts: the places on it.
        track: brings a node [B, tokens at an attention] to the tokens that are left now.
        reduced: a value of the stream as what lies behind it reads it: with the tokens that were left there.
    """

    editor: GraphEditor
    region: Region
    segment: Segment
    rows: fx.Node
    start: int
    count: int
    total: int
    size: fx.Node | None = None
    sites: list[AttentionSite] = field(default_factory=list)
    cuts: list[StreamCut] = field(default_factory=list)
    track: Callable[[fx.Node, AttentionSite], fx.Node] = lambda node, site: node
    reduced: Callable[[fx.Node], fx.Node] = lambda node: node

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def layer(self) -> int:
        return self.region.layer

    @property
    def cut(self) -> StreamCut | None:
        return self.region.cut

    # -- building ------------------------------------------------------------------------------------------------------

    def insert(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new operation, placed behind its operands."""
        nodes = [n for n in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(n, fx.Node)]
        return self.editor.insert(max([*nodes, self.rows]), target, *args, **kwargs)

    def items(self, node: fx.Node, count: int) -> tuple[fx.Node, ...]:
        """The results of an operation that has several."""
        return tuple(self.editor.item(node, i) for i in range(count))

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A constant tensor."""
        return self.editor.constant(name, value)

    def per_sample(self, node: fx.Node) -> fx.Node:
        """A value [1, ...] with one row for each sample of the batch."""
        return self.insert(aten.expand.default, node, [self.batch, *[-1] * (node.meta["val"].dim() - 1)])

    @property
    def batch(self) -> fx.Node | int:
        """How many samples there are."""
        size = self.rows.meta["val"].shape[0]
        return size if isinstance(size, int) else self.insert(aten.sym_size.int, self.rows, 0)

    def topk(self, score: fx.Node, keep: int) -> Plan:
        """Keeps the best-scored tokens ([B, total], larger is better) in their order, and drops the others."""
        return Plan(*self.items(self.insert(ops.select_topk.default, score, keep, self.start, self.stop, False), 2))

    # -- geometry ------------------------------------------------------------------------------------------------------

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of the segment's tokens, in raster order.

        Raises:
            Refused: if they form none, or not any more.
        """
        grid = self.segment.grid
        if self.count != self.segment.length:
            raise Refused(f"it needs all tokens of a grid, and {self.count} of {self.segment.length} are left", _GRID)
        if grid is None or prod(grid) != self.count:
            why = f"it needs to know the grid of the {self.count} tokens, and the graph does not show it"
            raise Refused(why, "say it: --set grid=[height,width]")
        return grid

    @property
    def image(self) -> tuple[int, int]:
        """The same where it has rows and columns only. Raises: Refused."""
        if len(self.grid) != 2:
            raise Refused(f"it needs an image, and its tokens are a grid of {'x'.join(map(str, self.grid))}", _GRID)
        return self.grid

    # -- attention -----------------------------------------------------------------------------------------------------

    def site(self, layer: int | float | None = None) -> AttentionSite:
        """The attention of a layer: by number (negative ones from the last), as a share of the depth, or the latest.

        Raises:
            Refused: if it is not there, not computed yet, or not over these tokens.
        """
        if layer is None:
            site = self.region.known
            if site is None:
                raise Refused("no attention was computed before this place", "reduce behind the first attention")
        else:
            number = layer_number(layer, len(self.sites))
            if not 0 <= number < len(self.sites):
                raise Refused(
                    f"there is no layer {layer} to score with: there are {len(self.sites)}", "change the layer"
                )
            site = self.sites[number]
            if self.region.known is None or site.node > self.region.known.node:
                raise Refused(f"layer {number} is not computed yet at this place", "score with an earlier layer")
        if not site.known:
            raise Refused(f"{site.id}: {site.refusal.why}", "score with another layer")
        return site

    def of_keys(self, node: fx.Node, site: AttentionSite) -> fx.Node:
        """What an attention says of its keys [B, keys, ...], for the tokens of this stream: [B, total, ...]."""
        if site.axis is None or offset_in(site.axis.terms, self.segment.terms) is None:
            raise Refused(f"{site.id} does not attend over these tokens", "score with another layer")
        node = self.track(node, site)
        if node.meta["val"].shape[1] == self.total:
            return node
        if self.count != self.total:
            why = "the attention's sequence and the stream's have different tokens beside the reducible ones"
            raise Refused(why, "reduce it with a rule of your own")
        start = offset_in(site.axis.terms, self.segment.terms)
        return self.insert(aten.slice.Tensor, node, 1, start, start + self.count)

    def keys(self, site: AttentionSite) -> fx.Node:
        """The keys of an attention, averaged over its heads: [B, total, D]."""
        _, key, *_ = logits_of(site)[0]
        return self.of_keys(self.editor.insert(key, aten.mean.dim, key, [1]), site)

    def probe(self, site: AttentionSite, row: int, count: int = 1) -> fx.Node:
        """The attention probabilities of a few query rows, averaged over heads and rows: [B, total]."""
        return self._probe(ops.attention_probe.default, site, row, count)

    def received(self, site: AttentionSite, weight: fx.Node | None = None, exclude_self: bool = False) -> fx.Node:
        """The attention probabilities summed over the query rows with a weight each (1/N by default): [B, total]."""
        return self._probe(ops.attention_received.default, site, weight, exclude_self=exclude_self)

    def _probe(self, target: Any, site: AttentionSite, *args: Any, **kwargs: Any) -> fx.Node:
        weight = [a for a in args if isinstance(a, fx.Node)]
        logits, options = logits_of(site)
        node = self.editor.insert(max([site.node, *weight]), target, *logits, *args, **options, **kwargs)
        return self.of_keys(node, site)

    def special(self, name: str, site: AttentionSite) -> Segment | None:
        """A protected segment of an attention's sequence."""
        return next((s for s in site.axis.segments if s.name == name), None)


def logits_of(site: AttentionSite) -> tuple[tuple[fx.Node | None, ...], dict[str, Any]]:
    """What the logits of an attention are made from: (query, key, bias, key_bias), and its scale and causality.

    Raises:
        Refused: if it is not one attention per sample.
    """
    query, key, _, bias, key_bias = [*site.node.args, None, None][:5]
    if query.meta["val"].dim() != 4:
        raise Refused(f"{site.id} attends within windows", "score with an attention over all tokens")
    options = {k: site.node.kwargs[k] for k in ("scale", "is_causal") if k in site.node.kwargs}
    return (query, key, bias, key_bias), options


def layer_number(layer: int | float, layers: int) -> int:
    """A layer as a number from 0: negative ones count from the last, a fraction is a share of the depth."""
    if isinstance(layer, float) and 0.0 <= layer <= 1.0:
        return min(int(layer * layers), layers - 1)
    return int(layer) + layers if layer < 0 else int(layer)
