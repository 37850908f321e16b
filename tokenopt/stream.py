"""Follows reduced tokens through a graph and mends every operation they reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import tokenopt.ops  # noqa: F401  (registers the operations)
from tokenopt.analysis.axes import AxisMap, tensor_operands
from tokenopt.analysis.cuts import StreamCut, contains, decide, offset_in, reduced_length
from tokenopt.analysis.terms import Cat, Terms, length
from tokenopt.graph import GraphEditor, add_output, shape_of
from tokenopt.program import Edit

aten = torch.ops.aten
ops = torch.ops.tokenopt


@dataclass(frozen=True)
class Plan:
    """Which tokens stay and where the others go, as nodes; positions count the whole sequence at the cut.

    Attributes:
        index: [B, M], the token each kept place stands at; src: [B, R], the tokens removed.
        dst: [B, R], the place each removed token goes to; by default the most similar kept one.
        fuse: "weighted" (mean by size), "pack" (sum by ``weight``) or "drop".
        weight: [B, N], for "pack".
    """

    index: fx.Node
    src: fx.Node
    dst: fx.Node | None = None
    fuse: str = "drop"
    weight: fx.Node | None = None


@dataclass(frozen=True)
class Stream:
    """The token stream at a cut, as it is there: what a plan is made from.

    Attributes:
        rows: the tokens [B, total, C].
        start, count: where the reducible segment begins and how many tokens it has now; ``total`` is the sequence.
    """

    editor: GraphEditor
    cut: StreamCut
    rows: fx.Node
    start: int
    count: int
    total: int

    @property
    def stop(self) -> int:
        return self.start + self.count

    def insert(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new operation, placed behind its operands."""
        nodes = [n for n in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(n, fx.Node)]
        return self.editor.insert(last_of(*nodes, self.rows), target, *args, **kwargs)

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One result of an operation that has several."""
        return self.editor.item(node, index)

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A constant tensor."""
        return self.editor.constant(name, value)

    def topk(self, score: fx.Node, keep: int) -> Plan:
        """Keeps the best-scored tokens ([B, total], larger is better) in their order, and drops the others."""
        plan = self.insert(ops.select_topk.default, score, keep, self.start, self.stop, False)
        return Plan(self.item(plan, 0), self.item(plan, 1))


Planner = Callable[[Stream], Plan | None]


@dataclass(eq=False)
class _Version:
    """One state of the stream, after a reduction.

    ``index``, ``src``, ``dst`` are the plan over the parent's sequence of ``total`` tokens, whose segment starts at
    ``start`` and had ``before`` tokens and now has ``count``; ``terms`` are the sequence's; ``stream`` is the value
    that was reduced; ``size`` [B, M] is how many originals each token of the whole sequence stands for.
    """

    parent: _Version | None
    terms: Terms
    start: int
    total: int
    before: int
    count: int
    index: fx.Node
    src: fx.Node
    dst: fx.Node
    stream: fx.Node
    size: fx.Node | None
    step: int
    cache: dict[Any, fx.Node] = field(default_factory=dict)


class StreamRewriter:
    """One walk through a graph that reduces one segment at its cuts, and discharges every obligation.

    Args:
        cuts: of one segment, in order.
        plan: what to keep at a cut; None leaves it alone.
        short: outputs keep the reduced tokens.
        spec: what the edits are recorded as.
        proportional: attention to merged tokens counts the originals.
        attentions: attention nodes; what they feed is a stream value, not a position term.
    """

    def __init__(
        self, editor: GraphEditor, axes: AxisMap, cuts: list[StreamCut], plan: Planner, *, attentions: set[fx.Node],
        spec: str, short: bool = False, proportional: bool = False,
    ) -> None:  # fmt: skip
        self.editor, self.axes, self.plan, self.spec = editor, axes, plan, spec
        self.cuts = {c.after: c for c in cuts}
        self.segment = cuts[0].segment.terms
        self.short, self.proportional, self.attentions = short, proportional, attentions
        self.value: dict[fx.Node, tuple[fx.Node, _Version]] = {}
        self.aligned: dict[Any, fx.Node] = {}
        self.restored: dict[fx.Node, fx.Node] = {}
        self.learned: set[fx.Node] = set()
        self.version: _Version | None = None
        self.edits: list[Edit] = []

    def run(self) -> None:
        for node in list(self.editor.graph.nodes):
            if node.op not in ("call_function", "output"):
                continue
            if node in self.attentions or any(n in self.learned for n in node.all_input_nodes):
                self.learned.add(node)
            self._visit(node)
            cut = self.cuts.get(node)
            if cut is not None:
                self._reduce(cut)

    def return_source(self) -> None:
        """One more output: for each original token, the reduced token that it is part of, int64 [B, originals]."""
        if self.version is not None:
            add_output(self.editor.program, self._map(self.version), "source")

    # -- following the reduced values --------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        """Mends one operation whose operands carry reduced tokens."""
        operands = [n for n in tensor_operands(node) if n in self.value]
        if not operands:
            return
        decision = decide(self.axes, node, self.segment, operands, self.short)
        new: dict[fx.Node, fx.Node] = {}
        version = max((self.value[n][1] for n in operands), key=lambda v: v.step)
        if decision.barrier is None:
            for operand in decision.align:
                gathered = self._align(operand, node, version)
                if gathered is None:
                    decision.barrier = True
                    break
                new[operand] = gathered
        if decision.barrier is not None:
            new = {n: self._restore(n) for n in operands}
            self._replace(node, new)
            return
        for operand in operands:
            new[operand] = self._convert(operand, version)
        self._replace(node, new)
        if node.op == "output":
            return
        for literal in decision.literals:
            value = sum(reduced_length(t, self.segment, version.count) for t in literal.lists) * literal.sign
            self._set_literal(node, literal.path, value)
        if decision.reduced:
            self.value[node] = (node, version)
        self.editor.infer(node)
        if version.size is not None:
            if decision.attends and self.proportional:
                self._add_size_bias(node, version)
            if decision.means:
                self._weigh_mean(node, operands[0], decision.means, version)

    def _replace(self, node: fx.Node, new: Mapping[fx.Node, fx.Node]) -> None:
        swap = lambda n: new.get(n, n)  # noqa: E731
        node.args = fx.map_arg(node.args, swap)
        node.kwargs = fx.map_arg(node.kwargs, swap)

    def _set_literal(self, node: fx.Node, path: tuple[int, ...], value: int) -> None:
        args = list(node.args)
        if len(path) == 1:
            args[path[0]] = value
        else:
            inner = list(args[path[0]])
            # a size that a product with the batch computes: let the reshape infer it
            inner[path[1]] = -1 if isinstance(inner[path[1]], fx.Node) else value
            args[path[0]] = inner
        node.args = tuple(args)

    def _convert(self, operand: fx.Node, version: _Version) -> fx.Node:
        """A reduced value, brought to a later version by the same reductions."""
        node, have = self.value[operand]
        while have is not version:
            step = version
            while step.parent is not have:
                step = step.parent
            node = self._apply(operand, node, step)
            have = step
        return node

    def _apply(self, operand: fx.Node, node: fx.Node, step: _Version) -> fx.Node:
        """One reduction step, applied to another value of the stream."""
        dims = self.axes.dims(operand)
        at = [i for i, d in enumerate(dims) if contains(d, self.segment)]
        if step.size is not None and dims == self.axes.dims(step.stream):
            before = self._sizes(step.parent, step.terms) if step.parent is not None else None
            rows, back = self._rows(node, dims)
            merged = self.editor.insert(last_of(rows, step.index, step.dst), ops.merge_tokens.default, rows, before,
                                        step.index, step.src, step.dst, True)  # fmt: skip
            return back(self.editor.item(merged, 0))
        for dim in at:
            index = self._local(step)
            node = self._gather(node, dims, dim, index, step.before)
        return node

    # -- the pieces of a version ---------------------------------------------------------------------------------------

    def _cached(self, version: _Version, key: Any, make: Any) -> fx.Node:
        if key not in version.cache:
            version.cache[key] = make()
        return version.cache[key]

    def _local(self, version: _Version) -> fx.Node:
        """The plan's index, relative to the segment, of the parent's tokens: [B, count]."""

        def make() -> fx.Node:
            node = version.index
            total = node.meta["val"].shape[1]
            if version.count != total:
                node = self.editor.insert(
                    node, aten.slice.Tensor, node, 1, version.start, version.start + version.count
                )
            if version.start:
                node = self.editor.insert(node, aten.sub.Tensor, node, version.start)
            return node

        return self._cached(version, "local", make)

    def _index(self, version: _Version) -> fx.Node:
        """For each token of a version, the original token that stands for it: [B, count]."""

        def make() -> fx.Node:
            local = self._local(version)
            if version.parent is None:
                return local
            parent = self._index(version.parent)
            return self.editor.insert(last_of(local, parent), aten.gather.default, parent, 1, local)

        return self._cached(version, "index", make)

    def _map(self, version: _Version) -> fx.Node:
        """For each original token, the token of this version that it is part of: [B, originals]."""

        def make() -> fx.Node:
            total = version.total
            node = self.editor.insert(last_of(version.index, version.src, version.dst), ops.token_map.default,
                                      version.index, version.src, version.dst, total)  # fmt: skip
            if version.before != total:
                node = self.editor.insert(
                    node, aten.slice.Tensor, node, 1, version.start, version.start + version.before
                )
            if version.start:
                node = self.editor.insert(node, aten.sub.Tensor, node, version.start)
            if version.parent is None:
                return node
            parent = self._map(version.parent)
            return self.editor.insert(last_of(node, parent), aten.gather.default, node, 1, parent)

        return self._cached(version, "map", make)

    def _sizes(self, version: _Version, terms: Terms) -> fx.Node:
        """The sizes of a sequence that contains the segment: [B, its length]."""
        if terms == version.terms:
            return version.size

        def make() -> fx.Node:
            size = version.size
            if version.count != size.meta["val"].shape[1]:
                size = self.editor.insert(
                    size, aten.slice.Tensor, size, 1, version.start, version.start + version.count
                )
            before = offset_in(terms, self.segment)
            behind = reduced_length(terms, self.segment, version.count) - before - version.count
            parts = [size]
            for count, place in ((before, 0), (behind, 2)):
                if count:
                    rows = self.editor.insert(size, aten.slice.Tensor, size, 1, 0, 1)
                    ones = self.editor.insert(rows, aten.ones_like.default, rows)
                    parts.insert(place, self.editor.insert(ones, aten.expand.default, ones, [-1, count]))
            if len(parts) == 1:
                return size
            return self.editor.insert(last_of(*parts), aten.cat.default, parts, 1)

        return self._cached(version, ("size", terms), make)

    # -- obligations ---------------------------------------------------------------------------------------------------

    def _add_size_bias(self, node: fx.Node, version: _Version) -> None:
        """Attention to merged tokens counts the originals: + log(size) on the logits of each key."""
        terms = self.axes.dims(node.args[1])[-2]

        def make() -> fx.Node:
            size = self._sizes(version, terms)
            return self.editor.insert(size, aten.log.default, size)

        bias = self._cached(version, ("log size", terms), make)
        args = [*node.args, *[None] * (5 - len(node.args))]
        if args[4] is not None:
            bias = self.editor.insert(node.prev, aten.add.Tensor, args[4], bias)
        args[4] = bias
        node.args = tuple(args)
        self.editor.infer(node)

    def _weigh_mean(self, node: fx.Node, operand: fx.Node, dims: list[int], version: _Version) -> None:
        if node.target is not aten.mean.dim:
            return  # extremes do not depend on how often a value occurs
        terms = self.axes.dims(operand)[dims[0]]
        batch_dim = self._batch_dim(self.axes.dims(operand))
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        sizes = self._sizes(version, terms)
        new = self.editor.insert(node, ops.mean_tokens.default, node.args[0], sizes, dims[0], batch_dim, keep)
        node.replace_all_uses_with(new)
        new.args = (node.args[0], *new.args[1:])
        if node in self.value:
            self.value[new] = (new, version)

    def _restore(self, operand: fx.Node) -> fx.Node:
        """All tokens of a reduced value: each original gets the value of the token it is part of."""
        if operand not in self.restored:
            node, version = self.value[operand]
            dims = self.axes.dims(operand)
            for dim, terms in enumerate(dims):
                if contains(terms, self.segment):
                    node = self._gather(node, dims, dim, self._map(version), version.count)
            self.restored[operand] = node
        return self.restored[operand]

    def _align(self, operand: fx.Node, node: fx.Node, version: _Version) -> fx.Node | None:
        """An operand of full length beside a reduced one: position terms are gathered, stream values reduced alike."""
        dims = self.axes.dims(operand)
        if operand in self.learned and operand in self.axes.data:
            chain = [version]
            while chain[0].parent is not None:
                chain.insert(0, chain[0].parent)
            current = operand
            for step in chain:
                current = self._apply(operand, current, step)
            return current
        out = self.axes.dims(node.args[0] if node.target is ops.attention.default else node)
        if out is None:
            return None
        batch = self._batch_dim(out)
        at = batch - len(out) + len(dims)
        if self.axes.batch in dims and self.axes.batch:
            at = dims.index(self.axes.batch)
        elif at >= 0 and (length(dims[at]) != 1):
            return None
        key = (operand, version.step, len(out), batch)
        if key not in self.aligned:
            current = operand
            if at < 0:  # no dimension where the batch belongs yet
                pad = len(out) - batch - len(dims)
                dims, at = ((),) * pad + dims, 0
                shape = [1] * pad + list(shape_of(operand))
                current = self.editor.insert(operand, aten.reshape.default, operand, shape)
            for dim, terms in enumerate(dims):
                if contains(terms, self.segment):
                    current = self._gather(current, dims, dim, self._index(version), self.full, batch_dim=at)
            self.aligned[key] = current
        return self.aligned[key]

    @property
    def full(self) -> int:
        return length(self.segment)

    def _batch_dim(self, dims: tuple[Terms, ...]) -> int:
        """Where the batch is; for a static batch of one, the first dimension of size 1."""
        if self.axes.batch in dims:
            return dims.index(self.axes.batch)
        return next((i for i, d in enumerate(dims) if length(d) == 1), 0)

    def _gather(
        self, node: fx.Node, dims: tuple[Terms, ...], dim: int, index: fx.Node, have: int, batch_dim: int | None = None
    ) -> fx.Node:
        """Reads tokens along one dimension by a per-sample index, opening that dimension and the batch if needed.

        ``have`` tokens of the segment are there now; dims are the terms of the full value; ``batch_dim`` is where the
        batch is or belongs, found from the terms by default.
        """
        editor = self.editor
        after = last_of(node, index)
        terms = dims[dim]
        if batch_dim is None:
            batch_dim = self._batch_of(dims)
        opened_batch = dims[batch_dim] != self.axes.batch and bool(dims[batch_dim]) and self.axes.batch != ()
        start = offset_in(terms, self.segment)
        if start is None or opened_batch:
            return self._gather_opened(node, dims, dim, index, have, batch_dim)
        return editor.insert(after, ops.gather_tokens.default, node, index, dim, batch_dim, start, have)

    def _batch_of(self, dims: tuple[Terms, ...]) -> int:
        batch = self.axes.batch
        for i, d in enumerate(dims):
            if batch and d[: len(batch)] == batch:
                return i
        return next((i for i, d in enumerate(dims) if length(d) == 1), 0)

    def _gather_opened(
        self, node: fx.Node, dims: tuple[Terms, ...], dim: int, index: fx.Node, have: int, batch_dim: int
    ) -> fx.Node:
        """The same where batch or tokens share a dimension with others: open it, gather, close it."""
        editor, batch = self.editor, self.axes.batch
        closed = [
            reduced_length(d, self.segment, have) if d[: len(batch)] != batch or not batch else None for d in dims
        ]
        opened: list[Terms] = []
        token_at = batch_at = 0
        for i, terms in enumerate(dims):
            parts = [terms]
            if batch and terms[: len(batch)] == batch and len(terms) > len(batch):
                parts = [terms[: len(batch)], terms[len(batch) :]]
            for part in parts:
                if i == batch_dim and part == batch:
                    batch_at = len(opened)
                if i == dim and contains(part, self.segment):
                    whole = next(t for t in _sequences(part) if contains(t, self.segment))
                    position = _find(part, whole)
                    for piece in (part[:position], whole, part[position + len(whole) :]):
                        if piece == whole:
                            token_at = len(opened)
                        if piece:
                            opened.append(piece)
                else:
                    opened.append(part)
        shape = [-1 if p == batch and batch else reduced_length(p, self.segment, have) for p in opened]
        view = editor.insert(last_of(node, index), aten.reshape.default, node, shape)
        start = offset_in(opened[token_at], self.segment)
        gathered = editor.insert(view, ops.gather_tokens.default, view, index, token_at, batch_at, start, have)
        count = index.meta["val"].shape[1]
        final = [-1 if c is None else reduced_length(d, self.segment, count) for c, d in zip(closed, dims, strict=True)]
        return editor.insert(gathered, aten.reshape.default, gathered, final)

    # -- reducing ------------------------------------------------------------------------------------------------------

    def _reduce(self, cut: StreamCut) -> None:
        """Inserts a reduction behind a cut's residual sum."""
        node, parent = self.value.get(cut.after, (cut.after, None))
        dims = self.axes.dims(cut.after)
        terms = next(d for d in dims if contains(d, self.segment))
        start = offset_in(terms, self.segment)
        have = parent.count if parent is not None else self.full
        total = reduced_length(terms, self.segment, have)
        rows, back = self._rows(node, dims)
        plan = self.plan(Stream(self.editor, cut, rows, start, have, total))
        if plan is None:
            return
        editor, index, src, dst = self.editor, plan.index, plan.src, plan.dst
        size = None
        count = index.meta["val"].shape[1] - (total - have)
        if dst is None:
            after = last_of(index, src, rows)
            dst = editor.insert(after, ops.nearest_tokens.default, rows, index, src, start, count)
        if plan.fuse == "drop":
            reduced = editor.insert(last_of(index, rows), ops.gather_tokens.default, rows, index, 1, 0, 0, total)
        else:
            weighted = plan.fuse == "weighted"
            weight = plan.weight if not weighted else self._sizes(parent, terms) if parent is not None else None
            after = last_of(rows, index, src, dst, *([weight] if weight is not None else []))
            merged = editor.insert(after, ops.merge_tokens.default, rows, weight, index, src, dst, weighted)
            reduced = editor.item(merged, 0)
            size = editor.item(merged, 1) if weighted else None
        self.version = _Version(parent, terms, start, total, have, count, index, src, dst, cut.after, size,
                                parent.step + 1 if parent is not None else 1)  # fmt: skip
        self.value[cut.after] = (back(reduced), self.version)
        self.edits.append(Edit(self.spec, cut.site.id, total, total - have + count))

    def _rows(self, node: fx.Node, dims: tuple[Terms, ...]) -> tuple[fx.Node, Any]:
        """A stream value as [B, N, C], and the way back."""
        token = next(i for i, d in enumerate(dims) if contains(d, self.segment))
        batch = next(i for i, d in enumerate(dims) if i != token and (d == self.axes.batch or length(d) == 1))
        channel = ({0, 1, 2} - {token, batch}).pop()
        order = [batch, token, channel]
        if order == [0, 1, 2]:
            return node, lambda n: n
        rows = self.editor.insert(node, aten.permute.default, node, order)
        back = [order.index(i) for i in range(3)]
        return rows, lambda n: self.editor.insert(n, aten.permute.default, n, back)


def _sequences(terms: Terms) -> list[Terms]:
    """The candidates for a sequence within a dimension: concatenations, and the terms together."""
    return [(t,) for t in terms if isinstance(t, Cat)] + [terms[i:j] for i in range(len(terms))
                                                           for j in range(i + 1, len(terms) + 1)]  # fmt: skip


def _find(terms: Terms, part: Terms) -> int:
    return next(i for i in range(len(terms)) if terms[i : i + len(part)] == part)


def last_of(*nodes: Any) -> fx.Node:
    """The node that comes last in the graph."""
    return max(n for n in nodes if isinstance(n, fx.Node))
