"""drop-layers: attention heads, attention layers and MLPs that add nothing to the stream, for all tokens or some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import networkx as nx
import torch
from torch import fx

from tokenopt.analysis.axes import AxisMap, propagate, tensor_operands
from tokenopt.analysis.cuts import StreamCut, contains, decide, find_cuts, offset_in, reduced_length
from tokenopt.analysis.sites import AttentionSite, Segment, find_sites
from tokenopt.attention.pattern import Refused
from tokenopt.attention.recipe import site_numbers
from tokenopt.errors import Refusal, UsageError
from tokenopt.graph import GraphEditor
from tokenopt.pipeline import Pass, PassResult
from tokenopt.program import Edit, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class DropLayers(Pass):
    """Lets chosen attentions, heads and MLPs add nothing; what is computed for them alone is removed.

    Rewrite:  x = x + attn(x); x = x + mlp(x)  ->  x
              with a segment:  x  ->  cat([x + mlp(x) of the tokens before it, x of its own, x + mlp(x) of the others])
              with units:  mlp(x) of its own, with some of the hidden units, is added

    Attributes:
        attention, mlp: which layers, counted from 0: "all", numbers or a slice; none by default.
        heads: heads whose output becomes zero, as layer/head: "3/0,3/2,4/1".
        segment: name of the tokens that attention, heads and MLPs add nothing to: patch, cls, ...; all tokens by
            default.
        units: share of the hidden units that these MLPs keep, the first ones; by default none, and they add nothing.
        seen: whether the others still attend to the tokens of the segment in these layers and heads. If not, from a
            layer to the last, the segment has left the model.
        inactive: instead of ``heads``: those that give the segment less than this, relative to what they give the
            others. They are found on data, see `tokenopt.diagnostics.head_thresholds`. With a budget of operations, the
            least that meets it.

    Source: Zhang et al., Treat Visual Tokens as Text?, arXiv:2410.06169 (heads, layers and, with units=0.5, half of the
        hidden units of visual tokens: the first half, in whatever order, as in the authors' code); Wu et al.,
        Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit, arXiv:2411.19628 (with layers that
        are fixed, and not chosen by its gates). What heads do not see has no share in their softmax, as in YOPO's code
        for Qwen2-VL; in that for LLaVA it has one, and is left out behind it.
    """

    attention: Any = ""
    mlp: Any = ""
    heads: str = ""
    segment: str = ""
    units: float = 0.0
    seen: bool = True
    inactive: float = 0.0
    name: ClassVar[str] = "drop-layers"

    def __post_init__(self) -> None:
        if isinstance(self.inactive, bool) or not isinstance(self.inactive, (int, float)):
            raise UsageError(f"inactive={self.inactive!r} of {self.name} is no number", hint="inactive=0.07")

    def run(self, program: Program) -> PassResult:
        if not 0 <= self.units < 1:
            raise UsageError(f"units={self.units} is no share of the hidden units", hint="units=0.5")
        if self.inactive:
            why = "which heads are inactive is learned from data"
            raise UsageError("drop-layers has no heads yet", why=why, hint="--data PATH, or heads=3/0,3/2")
        axes = propagate(program)
        sites = find_sites(axes)[0]
        layers = [s for s in sites if s.kind in ("self", "joint")]
        cuts, refusals = find_cuts(axes, sites, paying=False)
        known = {c.layer: c for c in cuts}
        why = {r.site: r for r in refusals}
        editor = _Dropper(axes)
        result = PassResult()
        for layer, what, change in reversed(list(self._changes(editor, len(layers)))):  # the last is changed first
            site = layers[layer]
            try:
                if (what != "heads" or self.segment) and layer not in known:
                    found = why[site.id]
                    raise Refused(found.why, found.hint)
                change(site, known.get(layer))
            except Refused as refused:
                result.refusals.append(Refusal(site.id, f"its {what} cannot be dropped: {refused.why}", refused.hint))
            else:
                result.edits.append(Edit(self.spec, f"{site.id} ({what})"))
        result.edits.reverse()
        result.refusals.reverse()
        editor.finish()
        return result

    def _changes(self, editor: _Dropper, count: int) -> Iterator[tuple[int, str, Any]]:
        heads = _heads(self.heads, count)
        attention, mlp = (site_numbers(str(w), count) if str(w) else set() for w in (self.attention, self.mlp))
        for layer in range(count):
            if layer in attention:
                yield layer, "attention", lambda site, cut: editor.drop_attention(site, cut, self.segment, self.seen)
            elif layer in heads:
                yield layer, "heads", lambda site, cut, which=heads[layer]: editor.drop_heads(
                    site, cut, which, self.segment, self.seen)  # fmt: skip
            if layer in mlp:
                yield layer, "mlp", lambda site, cut: editor.drop_mlp(cut, self.segment, self.units)


def heads_text(known: str, more: Iterable[tuple[int, int]]) -> str:
    """Heads as `DropLayers` names them, (layer, head) behind those that are named already."""
    return ",".join([*[known] * bool(known), *(f"{layer}/{head}" for layer, head in more)])


def _heads(text: str, count: int) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for pair in filter(None, (p.strip() for p in str(text).split(","))):
        layer, slash, head = pair.partition("/")
        if not (slash and layer.isdigit() and head.isdigit() and int(layer) < count):
            raise UsageError(f"not a head of one of {count} layers: {pair!r}", hint="heads=3/0,3/2,4/1 is layer/head")
        found.setdefault(int(layer), set()).add(int(head))
    return found


class _Dropper(GraphEditor):
    """Takes updates out of the stream, the last of them first: what is before one is as the analysis saw it."""

    def __init__(self, axes: AxisMap) -> None:
        super().__init__(axes.program)
        self.axes = axes

    def drop_attention(self, site: AttentionSite, cut: StreamCut, segment: str, seen: bool) -> None:
        if cut.entry not in cut.after.args[:2] or cut.update not in cut.after.args[:2]:
            raise Refused("it adds to the stream beside others", "")
        if not segment:
            self.replace(cut.after, cut.entry)
            return
        where = _segment(cut, segment)
        new = {cut.entry: self._rest(cut.entry, cut.entry, self._dim(cut.entry, where), where)}
        if seen:
            new[site.node] = self._attention_of_rest(site, where)
        self._put(cut.after, cut.entry, self._recomputed(new, cut.after, where), where)

    def drop_mlp(self, cut: StreamCut, segment: str, units: float = 0.0) -> None:
        after, leave = cut.after, cut.leave
        if leave is after or leave.target is not aten.add.Tensor or after not in leave.args[:2]:
            raise Refused("no residual sum of one MLP follows its attention", "")
        if not segment:
            self.replace(leave, self._narrowed({}, after, leave, units) if units else after)
            return
        where = _segment(cut, segment)
        dim, own = self._dim(after, where), None
        if units:
            own = self.insert(after, aten.slice.Tensor, after, dim, where.start, where.start + where.length, like=after)
            own = self._narrowed({after: own}, after, leave, units, where)
        rest = self._rest(after, after, dim, where)
        self._put(leave, after, self._recomputed({after: rest}, leave, where), where, own)

    def drop_heads(self, site: AttentionSite, cut: StreamCut | None, heads: set[int], segment: str, seen: bool) -> None:
        node = site.node
        if site.refusal is not None:
            raise Refused(site.refusal.why, site.refusal.hint)
        if max(heads) >= site.heads or any(n.meta["val"].dim() != 4 for n in node.args[:3]):
            raise Refused(f"it has {site.heads} heads, and not {max(heads) + 1}", "")
        where = _segment(cut, segment) if segment else None
        kept = [h for h in range(site.heads) if h not in heads]
        if not kept and where is None:
            raise Refused("no head of it would be left", "drop the attention")
        places = torch.full((site.heads,), len(kept))
        order = kept if where is None else [*kept, *sorted(heads)]
        places[order] = torch.arange(len(order))
        parts = []
        if kept:
            operands = self._heads(site, kept)
            parts.append(self.insert(node.prev, node.target, *operands, like=node, **node.kwargs))
        if where is None:
            new = self.insert(parts[0], aten.constant_pad_nd.default, parts[0], [0, 0, 0, 0, 0, 1])
        else:
            parts.append(self._spread(self._attention_of_rest(site, where, sorted(heads), seen), where))
            new = self.insert(parts[-1], aten.cat.default, parts, 1)
        self.replace(node, self.insert(new, aten.index_select.default, new, 1, self.constant("head_places", places)))

    def _heads(self, site: AttentionSite, heads: list[int]) -> list[Any]:
        """The operands of some heads of an attention; what all heads share is as it was."""
        index = self.constant("heads", torch.tensor(heads))
        found = list(site.node.args)
        for i, operand in enumerate(found[:4]):
            shape = operand.meta["val"].shape if operand is not None else ()
            if len(shape) > 2 and shape[-3] == site.heads:
                before = site.node.prev
                found[i] = self.insert(before, aten.index_select.default, operand, len(shape) - 3, index)
        return found

    def _spread(self, rest: fx.Node, where: Segment) -> fx.Node:
        """The output of heads for the tokens beside a segment, with zeros for those of it."""
        before = self.insert(rest, aten.slice.Tensor, rest, 2, 0, where.start)
        before = self.insert(before, aten.constant_pad_nd.default, before, [0, 0, 0, where.length])
        after = self.insert(before, aten.slice.Tensor, rest, 2, where.start, rest.meta["val"].shape[2])
        return self.insert(after, aten.cat.default, [before, after], 2)

    def _attention_of_rest(
        self, site: AttentionSite, where: Segment, heads: list[int] | None = None, seen: bool = True
    ) -> fx.Node:
        """The attention, or some heads of it, with the queries beside the segment only.

        Args:
            seen: whether they see the keys of the segment.
        """
        node = site.node
        query, key, value, bias, *others = (*(node.args if heads is None else self._heads(site, heads)), None)
        options = dict(node.kwargs)
        rows = self._rest(node.prev, query, query.meta["val"].dim() - 2, where)
        if not seen:
            key, value = (self._rest(node.prev, n, n.meta["val"].dim() - 2, where) for n in (key, value))
            if bias is not None and bias.meta["val"].shape[-1] == site.keys:
                bias = self._rest(node.prev, bias, bias.meta["val"].dim() - 1, where)
            if others and others[0] is not None:  # one per key, as sizes of merged tokens
                others[0] = self._rest(node.prev, others[0], 1, where)
        if seen and options.pop("is_causal", False):
            if bias is not None:
                raise Refused("it is causal, and has a mask besides", "")
            causal = torch.ones(site.queries, site.keys, dtype=torch.bool).tril()
            left = torch.arange(site.queries)
            left = left[(left < where.start) | (left >= where.start + where.length)]
            bias = self.constant("causal", causal[left])
        elif bias is not None and bias.meta["val"].dim() > 1 and bias.meta["val"].shape[-2] == site.queries:
            bias = self._rest(node.prev, bias, bias.meta["val"].dim() - 2, where)
        return self.insert(node, node.target, rows, key, value, bias, *others[:1], like=node, **options)

    def _recomputed(self, new: dict[fx.Node, fx.Node], last: fx.Node, where: Segment) -> fx.Node:
        """A residual sum, and all it is made from behind some nodes, with these nodes in their place."""
        flow = nx.DiGraph((operand, n) for n in self.graph.nodes for operand in n.all_input_nodes)
        needed = nx.ancestors(flow, last) | {last}
        for node in list(self.graph.nodes):
            replaced = [n for n in tensor_operands(node) if n in new]
            if node not in needed or node in new or not replaced:
                continue
            decision = decide(self.axes, node, where.terms, replaced)
            if decision.barrier is not None:
                raise Refused(f"{node.name}: {decision.barrier.why}", "drop it for all tokens")
            for operand in decision.align:
                new[operand] = self._aligned(node.prev, operand, where)
            args = list(fx.map_arg(node.args, lambda n: new.get(n, n)))
            for literal in decision.literals:
                size = sum(reduced_length(t, where.terms, 0) for t in literal.lists) * literal.sign
                _set(args, literal.path, size)
            kwargs = fx.map_arg(node.kwargs, lambda n: new.get(n, n))
            new[node] = self.insert(node, node.target, *args, **kwargs)
        return new[last]

    def _narrowed(
        self, new: dict[fx.Node, fx.Node], after: fx.Node, leave: fx.Node, units: float, where: Segment | None = None
    ) -> fx.Node:
        """A residual sum of an MLP with the first of its hidden units, for all tokens or those that ``new`` has."""
        flow = nx.DiGraph((operand, n) for n in self.graph.nodes for operand in n.all_input_nodes)
        within = nx.descendants(flow, after) & nx.ancestors(flow, leave)
        inside = [n for n in self.graph.nodes if n in within]
        *ups, down = [n for n in inside if n.target is aten.linear.default] or [leave]
        behind = nx.ancestors(flow, down).intersection(set().union(*(nx.descendants(flow, n) for n in ups)))
        hidden = down.args[1].meta["val"].shape[-1]
        wide = {*ups, *behind}
        if not ups or any(n.meta["val"].shape[-1] != hidden for n in wide) or not all(
            _elementwise(n, wide) for n in behind
        ):  # fmt: skip
            raise Refused("its hidden units are not those of linear layers, each by itself", "drop all of it")
        count = max(1, round(units * hidden))
        for node in [*inside, leave]:
            replaced = [n for n in tensor_operands(node) if n in new]
            if not replaced and node not in ups:
                continue
            if where is not None:
                decision = decide(self.axes, node, where.terms, replaced)
                if decision.barrier is not None or decision.literals or decision.align:
                    raise Refused(f"{node.name} of its MLP is not of each token by itself", "drop all of it")
            args = list(fx.map_arg(node.args, lambda n: new.get(n, n)))
            if node in ups:
                args[1:] = [None if w is None else self.insert(node.prev, aten.slice.Tensor, w, 0, 0, count)
                            for w in args[1:]]  # fmt: skip
            elif node is down:
                args[1] = self.insert(node.prev, aten.slice.Tensor, args[1], 1, 0, count)
            kwargs = fx.map_arg(node.kwargs, lambda n: new.get(n, n))
            new[node] = self.insert(node, node.target, *args, **kwargs)
        return new[leave]

    def _put(self, old: fx.Node, stream: fx.Node, rest: fx.Node, where: Segment, own: fx.Node | None = None) -> None:
        """The stream as it was for the tokens of the segment, or what is given, and with an update for the others."""
        dim, stop = self._dim(stream, where), where.start + where.length
        total = stream.meta["val"].shape[dim]
        middle = (stream, where.start, stop) if own is None else (own, 0, where.length)
        pieces = [(rest, 0, where.start), middle, (rest, where.start, total - where.length)]
        behind = rest if own is None else max(rest, own)
        parts = [self.insert(behind, aten.slice.Tensor, n, dim, i, j) for n, i, j in pieces if j > i]
        self.replace(old, self.insert(parts[0], aten.cat.default, parts, dim))

    def _rest(self, after: fx.Node, node: fx.Node, dim: int, where: Segment) -> fx.Node:
        """A value without the tokens of the segment."""
        stop, total = where.start + where.length, node.meta["val"].shape[dim]
        ends = [(0, where.start), (stop, total)]
        parts = [self.insert(after, aten.slice.Tensor, node, dim, a, b, like=node) for a, b in ends if b > a]
        return self.insert(parts[0], aten.cat.default, parts, dim) if len(parts) > 1 else parts[0]

    def _aligned(self, after: fx.Node, node: fx.Node, where: Segment) -> fx.Node:
        """What has a place for every token, as positions and biases do, without the places of the segment."""
        rest = node
        for dim, terms in enumerate(self.axes.dims(node)):
            if contains(terms, where.terms):
                if offset_in(terms, where.terms) != where.start:
                    raise Refused(f"{node.name} has its tokens in another order", "drop it for all tokens")
                rest = self._rest(after if rest is node else rest, rest, dim, where)
        return rest

    def _dim(self, stream: fx.Node, where: Segment) -> int:
        return next(i for i, d in enumerate(self.axes.dims(stream)) if contains(d, where.terms))


def _segment(cut: StreamCut, name: str) -> Segment:
    found = next((s for s in cut.axis.segments if s.name == name), None)
    if found is None or not found.terms or found.length == cut.axis.length:
        names = ", ".join(s.name for s in cut.axis.segments)
        raise Refused(f"'{name}' is no part of its tokens that can be told from the others", f"its segments: {names}")
    return found


def _elementwise(node: fx.Node, among: set[fx.Node]) -> bool:
    """Whether a value is computed element by element from others, all of ``among``."""
    known = torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target is aten.dropout.default
    return known and all(n in among for n in node.all_input_nodes)


def _set(args: list[Any], path: tuple[int, ...], size: int) -> None:
    """A size in the arguments of a node."""
    if len(path) == 1:
        args[path[0]] = size
    else:
        inner = list(args[path[0]])
        inner[path[1]] = -1 if isinstance(inner[path[1]], fx.Node) else size  # a product with the batch
        args[path[0]] = inner
