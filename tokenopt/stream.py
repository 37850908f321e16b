"""Follows reduced tokens through a graph and mends every operation they reach."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import tokenopt.ops  # noqa: F401  (registers the operations)
from tokenopt.analysis.axes import AxisMap, Effect, EffectKind, tensor_operands
from tokenopt.analysis.cuts import Decision, contains, decide, offset_in, reduced_length
from tokenopt.analysis.sites import AttentionSite, Segment
from tokenopt.analysis.terms import Cat, Dims, Factor, Terms, length
from tokenopt.errors import IllegalReduction, Refusal
from tokenopt.graph import GraphEditor, add_output, module_path, shape_of
from tokenopt.program import Edit
from tokenopt.tokens.plan import Plan, Record, Reduction, Refused, Region, Stream, named
from tokenopt.tokens.restore import Copy, Restore

aten = torch.ops.aten
ops = torch.ops.tokenopt

Planner = Callable[[Stream], Plan | None]

_OWN = "score with a later layer, or match tokens by their own features: select.metric=hidden"


@dataclass(eq=False)
class _Version:
    """One state of the stream, after a reduction.

    ``plan`` is over the parent's sequence of ``total`` tokens, whose segment starts at ``start`` and had ``before``
    tokens and now has ``count``; ``terms`` are the sequence's; ``stream`` is the value that was reduced; ``size``
    [B, M] is how many originals each token of the whole sequence stands for; ``rows`` [B, N, C] are the tokens before.
    Inside attention, only ``readers`` get fewer tokens of ``stream``, and what is ``beside`` them keeps all of its.
    """

    parent: _Version | None
    plan: Plan
    terms: Terms
    start: int
    total: int
    before: int
    count: int
    stream: fx.Node
    rows: fx.Node
    size: fx.Node | None
    step: int
    site: str = ""
    until: fx.Node | None = None
    readers: set[fx.Node] | None = None
    beside: set[fx.Node] = field(default_factory=set)
    cache: dict[Any, fx.Node] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """The whole sequence, after."""
        return self.total - self.before + self.count


class StreamRewriter:
    """One walk through a graph that reduces one segment in some regions, and discharges every obligation.

    Args:
        regions: where, in order.
        segment: what is reduced.
        sites: the attentions over its sequence; what they feed is a stream value, not a position term.
        plan: what to keep at a place; None leaves it alone.
        restore: what removed tokens get where all are needed.
        short: outputs keep the reduced tokens.
        proportional: attention to merged tokens counts the originals.
        position: what position terms kept tokens get, one of `tokens.recipe.POSITIONS`.
        spec: what the edits are recorded as.
    """

    def __init__(
        self, editor: GraphEditor, axes: AxisMap, regions: list[Region], segment: Segment, plan: Planner, *,
        sites: list[AttentionSite], spec: str, restore: Restore | None = None, short: bool = False,
        proportional: bool = False, position: str = "keep",
    ) -> None:  # fmt: skip
        self.editor, self.axes, self.plan, self.spec = editor, axes, plan, spec
        self.regions, self.whole, self.segment = regions, segment, segment.terms
        self.sites, self.attentions = sites, {s.node for s in sites}
        self.restore = restore or Copy()
        self.short, self.proportional, self.position = short, proportional, position
        self.value: dict[fx.Node, tuple[fx.Node, _Version]] = {}
        self.aligned: dict[Any, fx.Node] = {}
        self.restored: dict[fx.Node, fx.Node] = {}
        self.learned: set[fx.Node] = set()
        self.seen: dict[fx.Node, _Version | None] = {}
        self.version: _Version | None = None
        self.versions: list[_Version] = []
        counts = ((n, _count_of(n)) for n in editor.graph.nodes if axes.results(n))  # not those of this very pass
        self.counted = {n: kind for n, kind in counts if kind is not None}
        self.before = self._count_before()
        self.until: set[fx.Node] = set()
        self.edits: list[Edit] = []
        self.refusals: list[Refusal] = []
        self.returned: set[tuple[str, str]] = set()
        self.averaged: set[str] = set()
        self.unmerged: set[fx.Node] = set()  # what is computed of all tokens where they are unmerged virtually

    def run(self) -> None:
        begins: dict[fx.Node, list[Region]] = {}
        for region in self.regions:
            begins.setdefault(region.after, []).append(region)
        self.originals = list(self.editor.graph.nodes)
        for node in self.originals:
            if node.op in ("call_function", "output"):
                if node in self.attentions or any(n in self.learned for n in node.all_input_nodes):
                    self.learned.add(node)
                self._visit(node)
                if node in self.attentions:
                    self.seen[node] = self.value[node][1] if node in self.value else None
            if node in self.until:
                self._end(node)
            for region in begins.get(node, ()):
                self._begin(region)

    def note(self, record: Record) -> None:
        """Adds what was done to a record."""
        first = len(record.reductions)
        for version in self.versions:
            dims = self.axes.dims(version.stream)
            cache = version.cache
            near = cache.get("nearest")
            record.reductions.append(Reduction(
                version.site, version.stream.name,
                named(version.plan, nearest=near, positions=cache.get("positions"), whole=cache.get("spread"),
                      base=cache.get("base"),
                      size_before=None if version.parent else self._sizes(self.before, version.terms)),
                version.plan.fuse, self.restore.name, self.position, self.proportional, version.start, version.total,
                version.before, version.count, (self._rows_order(dims)[0], self._rows_order(dims)[1]),
                readers=None if version.readers is None else frozenset(n.name for n in version.readers),
                until=None if version.until is None else version.until.name,
                parent=None if version.parent is None else first + self.versions.index(version.parent),
            ))  # fmt: skip
        record.restored |= self.returned
        record.averaged |= self.averaged

    def return_source(self) -> None:
        """One more output: for each original token, the reduced token that it is part of, int64 [B, originals]."""
        if self.version is not None:
            if self._origins(self.segment) is not None:
                raise IllegalReduction(
                    "source is of tokens that were reduced before",
                    where=self.regions[0].site.id,
                    hint="let the first reduction return its source, or positions",
                )
            add_output(self.editor.program, self._map(self.version), "source")

    def return_positions(self) -> None:
        """One more output: the position of each token that is left, as position terms see it, int64 [B, left]."""
        if self.version is None:
            return
        positions, origins = self._positions(self.version), self._origins(self.segment)
        if origins is not None and self.position == "keep":
            positions = self.editor.insert(last_of(positions, origins), aten.gather.default, origins, 1, positions)
        add_output(self.editor.program, positions, "positions")

    def return_stages(self) -> None:
        """Two more outputs for each reduction that leaves something, of the tokens as this pass found them.

        ``kept SITE`` is the token that each one left stands at, int64 [B, left]. Of each token, ``merged SITE`` is the
        one left that it is part of, or, where tokens are dropped, ``nearest SITE`` the one most like it, int64 [B, N].
        """
        for version, edit in zip(self.versions, self.edits, strict=True):
            if version.count:
                add_output(self.editor.program, self._index(version), f"kept {edit.site}")
                kind = "nearest" if version.plan.fuse == "drop" else "merged"
                add_output(self.editor.program, self._map(version), f"{kind} {edit.site}")

    def _origins(self, segment: Terms) -> fx.Node | None:
        """Which original each token of a segment stands for that an earlier pass reduced, [B, its length]."""
        made = segment[0].origin if len(segment) == 1 and isinstance(segment[0], Factor) else None
        if made is None or str(made.target).split(".")[0] != "tokenopt" and self.editor.program.constant(made) is None:
            return None
        names = [a.name for a in made.target._schema.arguments] if made.op == "call_function" else []
        if "stop" not in names:
            raise IllegalReduction(
                "tokens that were mixed before stand for no position",
                where=self.regions[0].site.id,
                hint="return positions in the first reduction",
            )
        start, stop = (made.args[names.index(n)] for n in ("start", "stop"))
        index = self.editor.item(made, 0)
        index = self.editor.insert(index, aten.slice.Tensor, index, 1, start, start + length(segment))
        index = self.editor.insert(index, aten.sub.Tensor, index, start)
        parent = self._origins(part_at(self.axes.dims(made.args[0])[1], start, stop))
        if parent is None:
            return index
        return self.editor.insert(last_of(index, parent), aten.gather.default, parent, 1, index)

    # -- following the reduced values --------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        """Mends one operation whose operands carry reduced tokens."""
        operands = [n for n in tensor_operands(node) if self._reads(node, n)]
        if not operands:
            if not self.unmerged.isdisjoint(node.all_input_nodes):
                self.unmerged.add(node)
            return
        decision = decide(self.axes, node, self.segment, operands, self.short)
        new: dict[fx.Node, fx.Node] = {}
        version = max((self.value[n][1] for n in operands), key=lambda v: v.step)
        chain = set(_chain(version))
        if decision.barrier is None and any(self.value[n][1] not in chain for n in operands):
            decision.barrier = Effect(node, operands[0], 0, EffectKind.LAYOUT, "it joins tokens of two reductions")
        virtual = decision.barrier is None and self._is_virtual(node, decision)
        if virtual:
            decision.barrier = Effect(node, operands[0], 0, EffectKind.ALIGN, "it is seen with all positions")
        if decision.barrier is None:
            for operand in decision.align:
                own_bias = node in self.attentions and operand in node.args[3:4]  # made from its queries, as SAM's
                if operand in version.beside and not own_bias:
                    decision.barrier = Effect(node, operand, 0, EffectKind.ALIGN, "the stream keeps all its tokens")
                    break
                gathered = self._counts(operand, version) or self._align(operand, node, version)
                if gathered is None:
                    decision.barrier = Effect(node, operand, 0, EffectKind.ALIGN, "its batch is not a dimension")
                    break
                new[operand] = gathered
        if decision.barrier is not None:
            of_queries = node in self.attentions and contains(self.axes.dims(node.args[0])[-2], self.segment)
            new = {n: self._restore(n) for n in operands}
            self._replace(node, new)
            self.returned |= {(node.name, n.name) for n in operands}
            if self.restore.name == "virtual" and of_queries:
                self.averaged.add(node.name)
                self.value[node] = (self._averaged(node, version), version)
            elif virtual:
                self.unmerged.add(node)
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
            if decision.attends and self.proportional and not any(map(self._is_count, decision.align)):
                self._add_size_bias(node, version)
            if decision.means:
                self._weigh_mean(node, operands[0], decision.means, version)

    def _reads(self, node: fx.Node, operand: fx.Node) -> bool:
        """Whether an operand has fewer tokens as this operation gets it."""
        if operand not in self.value:
            return False
        version = self.value[operand][1]
        return version.readers is None or operand is not version.stream or node in version.readers

    def _is_virtual(self, node: fx.Node, decision: Decision) -> bool:
        """Whether an operation is to see all tokens although fewer are there: positions, and attention behind them."""
        if self.restore.name != "virtual":
            return False
        placed = any(n in self.unmerged or n not in self.learned or n not in self.axes.data for n in decision.align)
        return placed or (node in self.attentions and any(n not in self.value for n in node.args[:2]))

    def _averaged(self, node: fx.Node, version: _Version) -> fx.Node:
        """The result [B, H, N, D] of an attention over all tokens, averaged over those that are one token now."""
        insert = self.editor.insert
        heads, _, width = node.meta["val"].shape[1:]
        rows = insert(node, aten.permute.default, node, [0, 2, 1, 3])
        rows = insert(rows, aten.flatten.using_ints, rows, 2, 3)
        for step in reversed(_chain(version)):
            if step.plan.fuse != "sized" or step.terms != self.axes.dims(node)[2]:
                raise IllegalReduction(
                    "tokens are unmerged virtually where they were not merged by size",
                    where=f"{node.name} ({module_path(node)})",
                    hint="restore='copy', or fuse='weighted'",
                )
            rows, _ = self._fused(step.plan, rows, step)
        rows = insert(rows, aten.unflatten.int, rows, 2, [heads, width])
        return insert(rows, aten.permute.default, rows, [0, 2, 1, 3])

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
        if step.plan.fuse in ("sized", "mean") and dims == self.axes.dims(step.stream):
            rows, back = self._rows(node, dims)
            return back(self._fused(step.plan, rows, step)[0])
        mixes = step.plan.fuse == "soft" and operand in self.learned and len(at) == 1  # a bias is of positions
        for dim in at:
            if mixes:
                node = self._mixed(node, dims, dim, step.plan.assign, step.before)
            else:
                node = self._gather(node, dims, dim, self._local(step), step.before)
        return node

    def _fused(self, plan: Plan, rows: fx.Node, step: _Version) -> tuple[fx.Node, fx.Node | None]:
        """Rows [B, N, C] reduced by a plan, and the sizes after it, if it tracks them."""
        editor, index = self.editor, plan.index
        if plan.fuse == "drop":
            return editor.insert(
                last_of(index, rows), ops.gather_tokens.default, rows, index, 1, 0, 0, step.total
            ), None
        if plan.fuse == "soft":
            after = last_of(plan.assign, rows)
            mix = ops.mix_tokens.default
            return editor.insert(after, mix, rows, plan.assign, 1, 0, step.start, step.before), plan.size
        weight = self._sizes(step.parent or self.before, step.terms) if plan.fuse == "sized" else plan.weight
        after = last_of(rows, index, plan.src, plan.dst, weight)
        merged = editor.insert(after, ops.merge_tokens.default, rows, weight, index, plan.src, plan.dst,
                               plan.fuse != "sum")  # fmt: skip
        if plan.fuse != "sized":
            return editor.item(merged, 0), None
        merged.meta["custom"] = {COUNT: "sizes"}
        return editor.item(merged, 0), editor.item(merged, 1)

    # -- the pieces of a version ---------------------------------------------------------------------------------------

    def _cached(self, version: _Version, key: Any, make: Any) -> fx.Node:
        if key not in version.cache:
            version.cache[key] = make()
        return version.cache[key]

    def _local(self, version: _Version) -> fx.Node:
        """The plan's index, relative to the segment, of the parent's tokens: [B, count]."""

        def make() -> fx.Node:
            node = version.plan.index
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

    def _positions(self, version: _Version) -> fx.Node:
        """The position whose terms each token of a version gets: [B, count]."""
        index = self._index(version)
        if self.position == "keep":
            return index

        def make() -> fx.Node:
            insert = self.editor.insert
            if self.position == "renumber":
                numbers = self.editor.constant("numbers", torch.arange(version.count)[None])
                return insert(index, aten.expand_as.default, numbers, index)
            if self.whole.grid is None or len(self.whole.grid) != 2:
                raise IllegalReduction(
                    "concentric positions need a grid of two dimensions", where=self.regions[0].site.id
                )
            ring = self.editor.constant("rings", rings(*self.whole.grid))
            flat = insert(index, aten.reshape.default, index, [-1])
            picked = insert(flat, aten.index_select.default, ring, 0, flat)
            return insert(picked, aten.reshape.default, picked, [-1, version.count])

        return self._cached(version, "positions", make)

    def _map(self, version: _Version) -> fx.Node:
        """For each original token, the token of this version that it is part of: [B, originals]."""

        def make() -> fx.Node:
            node = self._step_map(version)
            if version.parent is None:
                return node
            parent = self._map(version.parent)
            return self.editor.insert(last_of(node, parent), aten.gather.default, node, 1, parent)

        return self._cached(version, "map", make)

    def _step_map(self, version: _Version) -> fx.Node:
        """For each token of the parent's segment, the token of this version's that it is part of: [B, before]."""

        def make() -> fx.Node:
            plan, insert = version.plan, self.editor.insert
            if plan.spread is not None:
                best = insert(plan.spread, aten.argmax.default, plan.spread, -1)
                rows = self._batch(plan.index)
                return insert(last_of(best, rows, plan.index), aten.expand.default, best, [rows, -1])
            if not version.count:
                raise IllegalReduction(
                    "no token is left to restore the others from",
                    where=self.regions[0].site.id,
                    hint="restore='canvas' or restore='zero'",
                )
            dst = plan.dst
            if dst is None:
                dst = insert(last_of(plan.index, plan.src, version.rows), ops.nearest_tokens.default, version.rows,
                             plan.index, plan.src, version.start, version.count)  # fmt: skip
                version.cache["nearest"] = dst
            node = insert(last_of(plan.index, plan.src, dst), ops.token_map.default, plan.index, plan.src, dst,
                          version.total)  # fmt: skip
            if version.before != version.total:
                node = insert(node, aten.slice.Tensor, node, 1, version.start, version.start + version.before)
            return insert(node, aten.sub.Tensor, node, version.start) if version.start else node

        return self._cached(version, "step map", make)

    def _batch(self, node: fx.Node) -> fx.Node | int:
        size = node.meta["val"].shape[0]
        return size if isinstance(size, int) else self.editor.insert(node, aten.sym_size.int, node, 0)

    def _count_before(self) -> _Version | None:
        """What earlier passes merged, as a version before the first: the sizes of the segment's tokens."""
        for node, kind in self.counted.items():
            if kind == "log":
                continue
            at = _SIZES[kind]
            terms = self.axes.results(node)[at][1]
            if (start := offset_in(terms, self.segment)) is not None:
                size = node if kind == "size" else self.editor.item(node, at)
                return _Version(None, None, terms, start, length(terms), 0, self.full, node, node, size, 0)
        return None

    def _counts(self, operand: fx.Node, version: _Version) -> fx.Node | None:
        """The sizes (or their log) that an earlier pass gave an operation, after this pass."""
        if version.size is None or not self._is_count(operand):
            return None
        terms = self.axes.dims(operand)[1]
        return self._log_sizes(version, terms) if self.counted.get(operand) == "log" else self._sizes(version, terms)

    def _is_count(self, node: fx.Node) -> bool:
        """Whether a value is the sizes of merged tokens, or their log, made by an earlier pass."""
        made = self.counted.get(node.args[0] if node.target is operator.getitem else node)
        return made in ("log", "size") or (made is not None and node.args[1:] == (_SIZES[made],))

    def _sizes(self, version: _Version | None, terms: Terms) -> fx.Node | None:
        """The sizes of a sequence that contains the segment: [B, its length]; None if they are all one."""
        if version is None or version.size is None:
            return None
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
            whole = size if len(parts) == 1 else self.editor.insert(last_of(*parts), aten.cat.default, parts, 1)
            if whole is not version.size:
                whole.meta["custom"] = {COUNT: "size"}
            return whole

        return self._cached(version, ("size", terms), make)

    def _log_sizes(self, version: _Version, terms: Terms) -> fx.Node:
        def make() -> fx.Node:
            size = self._sizes(version, terms)
            node = self.editor.insert(size, aten.log.default, size)
            node.meta["custom"] = {COUNT: "log"}
            return node

        return self._cached(version, ("log size", terms), make)

    # -- obligations ---------------------------------------------------------------------------------------------------

    def _add_size_bias(self, node: fx.Node, version: _Version) -> None:
        """Attention to merged tokens counts the originals: + log(size) on the logits of each key."""
        bias = self._log_sizes(version, self.axes.dims(node.args[1])[-2])
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
        """All tokens of a reduced value."""
        if operand not in self.restored:
            node, version = self.value[operand]
            dims = self.axes.dims(operand)
            spread = self._spread(version)
            if spread is not None:
                node = self._over(dims, node, lambda n, dim: self._mixed(n, dims, dim, spread, version.count))
            elif all(v.plan.spread is None and v.plan.base is None for v in _chain(version)):
                index = self._map(version)
                node = self._over(dims, node, lambda n, dim: self._gather(n, dims, dim, index, version.count))
            elif self.restore.together:
                node = self._put(operand, dims, node, _chain(version))
            else:
                for step in _chain(version):
                    node = self._undo(operand, dims, node, step)
            self.restored[operand] = node
        return self.restored[operand]

    def _over(self, dims: Dims, node: fx.Node, change: Callable[[fx.Node, int], fx.Node]) -> fx.Node:
        for dim, terms in enumerate(dims):
            if contains(terms, self.segment):
                node = change(node, dim)
        return node

    def _spread(self, version: _Version) -> fx.Node | None:
        """Where all original tokens are a mixture of those left whatever happened between: the mixture."""
        make = lambda: self.restore.spread(self.editor, self._index(version), self.whole.grid)  # noqa: E731
        return self._cached(version, "spread", make) if hasattr(self.restore, "spread") else None

    def _undo(self, operand: fx.Node, dims: Dims, node: fx.Node, step: _Version) -> fx.Node:
        """The tokens that one step removed."""
        plan = step.plan
        if plan.base is not None and (self.restore.anywhere or dims == self.axes.dims(step.stream)):
            return self._put(operand, dims, node, [step])
        if plan.spread is not None:
            return self._over(dims, node, lambda n, dim: self._mixed(n, dims, dim, plan.spread, step.count))
        index = self._step_map(step)
        return self._over(dims, node, lambda n, dim: self._gather(n, dims, dim, index, step.count))

    def _put(self, operand: fx.Node, dims: Dims, node: fx.Node, steps: Sequence[_Version]) -> fx.Node:
        """The tokens that some steps kept, the latest first, put where they were before the first of them."""
        (*_, step), editor = steps, self.editor
        plan = step.plan
        at = [i for i, d in enumerate(dims) if contains(d, self.segment)]
        batch, terms = self._batch_dim(dims), dims[at[0]]
        if len(at) > 1 or batch in at or terms not in (step.terms, self.segment) or "returned" in step.cache:
            raise IllegalReduction(
                f"restore '{self.restore.name}' is for one sequence of tokens per place, and others need it, too",
                where=f"{operand.name} ({module_path(operand)})",
                hint="restore='copy'",
            )
        whole = terms == step.terms
        total = step.total if whole else step.before
        index, *parents = (s.plan.index if whole else self._local(s) for s in steps)
        for parent in parents:
            index = editor.insert(last_of(index, parent), aten.gather.default, parent, 1, index)
        order = [batch, at[0], *(i for i in range(len(dims)) if i not in (batch, at[0]))]
        if order != sorted(order):
            node = editor.insert(node, aten.permute.default, node, order)
        base = step.cache["base"] = plan.base(node, total)
        full = editor.insert(last_of(node, index, base), ops.scatter_tokens.default, node, index, base, 1, 0)
        if plan.returned:
            step.cache["returned"] = full
            add_output(editor.program, full, plan.returned)
        if order != sorted(order):
            full = editor.insert(full, aten.permute.default, full, [order.index(i) for i in range(len(order))])
        return full

    def _mixed(self, node: fx.Node, dims: Dims, dim: int, matrix: fx.Node, have: int) -> fx.Node:
        """Mixtures of the tokens along one dimension, by a matrix per sample."""
        batch = self._batch_of(dims)
        insert, mix = self.editor.insert, ops.mix_tokens.default
        start = offset_in(dims[dim], self.segment)
        if start is not None and (dims[batch] == self.axes.batch or matrix.meta["val"].shape[0] == 1):
            return insert(last_of(node, matrix), mix, node, matrix, dim, batch, start, have)
        after, count = last_of(node, matrix), matrix.meta["val"].shape[1]
        return self._opened(after, node, dims, dim, batch, have, count,
                            lambda x, at, b, first: insert(x, mix, x, matrix, at, b, first, have))  # fmt: skip

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
        key = (operand, version, len(out), batch)
        if key not in self.aligned:
            current = operand
            if at < 0:  # no dimension where the batch belongs yet
                pad = len(out) - batch - len(dims)
                dims, at = ((),) * pad + dims, 0
                shape = [1] * pad + list(shape_of(operand))
                current = self.editor.insert(operand, aten.reshape.default, operand, shape)
            places = self._places(operand, node, version)
            for dim, terms in enumerate(dims):
                if not contains(terms, self.segment):
                    continue
                if places is None:
                    left = reduced_length(terms, self.segment, version.count)
                    current = self.editor.insert(current, aten.slice.Tensor, current, dim, 0, left)
                else:
                    current = self._gather(current, dims, dim, places, self.full, batch_dim=at)
            self.aligned[key] = current
        return self.aligned[key]

    def _places(self, operand: fx.Node, node: fx.Node, version: _Version) -> fx.Node | None:
        """Which rows of an operand beside reduced tokens they get, [B, count]; None is the first ones.

        What a mask or an input says is of the token itself, whatever its position is called.
        """
        if self.position == "keep":
            return self._index(version)
        own = [s for s in self.sites if s.axis is not None and offset_in(s.axis.terms, self.segment) is not None]
        causal = any(s.causal for s in own)
        masks = node.target is ops.attention.default and (causal or operand.meta["val"].dtype is torch.bool)
        if masks:
            return self._index(version)
        if operand in self.axes.data:
            raise IllegalReduction(
                f"position '{self.position}' needs position terms that are constants",
                where=f"{node.name} ({module_path(node) or node.target})",
                why=f"{operand.name} depends on the inputs: it may be a mask, or features",
                hint="position='keep', or capture the model without position ids as an input",
            )
        return None if self.position == "renumber" and causal else self._positions(version)

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
            insert, gather, count = editor.insert, ops.gather_tokens.default, index.meta["val"].shape[1]
            return self._opened(after, node, dims, dim, batch_dim, have, count,
                                lambda x, at, b, first: insert(x, gather, x, index, at, b, first, have))  # fmt: skip
        return editor.insert(after, ops.gather_tokens.default, node, index, dim, batch_dim, start, have)

    def _batch_of(self, dims: tuple[Terms, ...]) -> int:
        batch = self.axes.batch
        for i, d in enumerate(dims):
            if batch and d[: len(batch)] == batch:
                return i
        return next((i for i, d in enumerate(dims) if length(d) == 1), 0)

    def _opened(
        self, after: fx.Node, node: fx.Node, dims: tuple[Terms, ...], dim: int, batch_dim: int, have: int, count: int,
        change: Callable[[fx.Node, int, int, int | None], fx.Node],
    ) -> fx.Node:  # fmt: skip
        """Changes ``have`` tokens to ``count`` where batch or tokens share a dimension with others: open it, close it.

        ``change`` gets the value, its token dimension, its batch dimension, and where the segment starts.
        """
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
        view = editor.insert(after, aten.reshape.default, node, shape)
        changed = change(view, token_at, batch_at, offset_in(opened[token_at], self.segment))
        final = [-1 if c is None else reduced_length(d, self.segment, count) for c, d in zip(closed, dims, strict=True)]
        return editor.insert(changed, aten.reshape.default, changed, final)

    # -- reducing ------------------------------------------------------------------------------------------------------

    def _begin(self, region: Region) -> None:
        """Inserts a reduction behind the value that a region begins with."""
        node, parent = self.value.get(region.after, (region.after, None))
        if parent is not None and parent.readers is not None:
            why = "another attention reduces the same tokens"
            self.refusals.append(Refusal(region.site.id, why, "reduce one of them"))
            return
        dims = self.axes.dims(region.after)
        terms = next(d for d in dims if contains(d, self.segment))
        start = offset_in(terms, self.segment)
        have = parent.count if parent is not None else self.full
        total = reduced_length(terms, self.segment, have)
        rows, back = self._rows(node, dims)
        cuts = [r.cut for r in self.regions if r.cut is not None]
        track = lambda n, s: self._track(n, s, parent)  # noqa: E731
        size = self._sizes(parent or self.before, terms)
        reduced = lambda n: self.value.get(n, (n, None))[0]  # noqa: E731
        stream = Stream(self.editor, region, self.whole, rows, start, have, total, size, self.sites, cuts, track,
                        reduced)  # fmt: skip
        plan = self.plan(stream)
        if plan is None:
            return
        if size is not None and plan.fuse == "soft" and plan.size is None:
            why = "tokens that stand for several were merged before, and a mixture of them counts each as one"
            self.refusals.append(Refusal(region.site.id, why, "a recipe that drops or merges tokens, or another order"))
            return
        count = plan.index.meta["val"].shape[1] - (total - have)
        step = parent.step + 1 if parent is not None else 1
        self.version = _Version(parent, plan, terms, start, total, have, count, region.after, rows, None, step,
                                region.site.id, region.until)  # fmt: skip
        if region.update is not None:
            self.version.readers = _between(region.after, region.site.node)
            self.version.beside = _below(region.cut.entry)
        reduced, self.version.size = self._fused(plan, rows, self.version)
        if size is not None and self.version.size is None:  # a kept place counts what the token there did
            gather = ops.gather_tokens.default
            kept = self.editor.insert(last_of(size, plan.index), gather, size, plan.index, 1, 0, 0, total)
            kept.meta["custom"] = {COUNT: "size"}
            self.version.size = kept
        self.value[region.after] = (back(reduced), self.version)
        self.restored.pop(region.after, None)
        self.versions.append(self.version)
        self.edits.append(Edit(self.spec, region.site.id, total, total - have + count))
        if region.until is not None:
            self.until.add(region.until)

    def _end(self, node: fx.Node) -> None:
        """Restores the value that a region ends with, for everything behind it."""
        if node in self.value:
            full = self._restore(node)
            self.axes.alias(full, node)
            self.learned.add(full)
            for user in self.originals:
                if user > node and node in user.all_input_nodes:
                    user.replace_input_with(node, full)
            del self.value[node]

    def _track(self, node: fx.Node, site: AttentionSite, now: _Version | None) -> fx.Node:
        """What an attention said of its keys, for the tokens that are left now."""
        have, chain = self.seen.get(site.node), _chain(now)
        steps = [s for s in chain if have is None or s.step > have.step]
        if (have is not None and have not in chain) or (steps and node.meta["val"].shape[1] != steps[-1].total):
            raise Refused(f"{site.id} attended over other tokens than those of this place", _OWN)
        for step in reversed(steps):
            index = step.plan.index
            node = self.editor.insert(last_of(node, index), ops.gather_tokens.default, node, index, 1, 0, 0, step.total)
        return node

    def _rows(self, node: fx.Node, dims: tuple[Terms, ...]) -> tuple[fx.Node, Any]:
        """A stream value as [B, N, C], and the way back."""
        order = self._rows_order(dims)
        if order == [0, 1, 2]:
            return node, lambda n: n
        rows = self.editor.insert(node, aten.permute.default, node, order)
        back = [order.index(i) for i in range(3)]
        return rows, lambda n: self.editor.insert(n, aten.permute.default, n, back)

    def _rows_order(self, dims: Dims) -> list[int]:
        """Where the batch, the tokens and the channels are in a stream value."""
        token = next(i for i, d in enumerate(dims) if contains(d, self.segment))
        batch = next(i for i, d in enumerate(dims) if i != token and (d == self.axes.batch or length(d) == 1))
        return [batch, token, ({0, 1, 2} - {token, batch}).pop()]


def _chain(version: _Version | None) -> list[_Version]:
    """A version and those before it, the latest first."""
    steps = []
    while version is not None:
        steps.append(version)
        version = version.parent
    return steps


def _between(first: fx.Node, last: fx.Node) -> set[fx.Node]:
    """The operations on the way from one value to another."""
    above, stack = {last}, [last]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand > first and operand not in above:
                above.add(operand)
                stack.append(operand)
    below = {first}
    for node in sorted(above):
        if any(n in below for n in node.all_input_nodes):
            below.add(node)
    return below - {first}


def part_at(terms: Terms, start: int, stop: int) -> Terms:
    """The part of a concatenation at an offset; the whole where it is none."""
    offset = 0
    for part in terms[0].parts if len(terms) == 1 and isinstance(terms[0], Cat) else ():
        if (offset, offset + length(part)) == (start, stop):
            return part
        offset += length(part)
    return terms


def _below(first: fx.Node) -> set[fx.Node]:
    """A value and all that is computed from it."""
    below, stack = {first}, [first]
    while stack:
        for user in stack.pop().users:
            if user not in below:
                below.add(user)
                stack.append(user)
    return below


COUNT = "tokenopt_count"
"""What a node's ``meta["custom"]``, which is saved with a program, says of the sizes of merged tokens: that it is their
"log", or a "size" itself, or that it has "sizes" or "masked" ones among its results."""

_SIZES = {"size": 0, "sizes": 1, "masked": 3}


def _count_of(node: fx.Node) -> str | None:
    if node.target is ops.match_threshold.default:
        return "masked"
    kind = (node.meta.get("custom") or {}).get(COUNT)
    of_results = node.target is operator.getitem  # reading a file gives these what is said of the operation
    return None if of_results or (kind == "sizes" and node.target is not ops.merge_tokens.default) else kind


def rings(height: int, width: int) -> torch.Tensor:
    """The ring of each position of a grid in raster order; the outermost is 0."""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    inner = torch.minimum(torch.minimum(y, height - 1 - y), torch.minimum(x, width - 1 - x))
    return inner.flatten()


def _sequences(terms: Terms) -> list[Terms]:
    """The candidates for a sequence within a dimension: concatenations, and the terms together."""
    return [(t,) for t in terms if isinstance(t, Cat)] + [terms[i:j] for i in range(len(terms))
                                                           for j in range(i + 1, len(terms) + 1)]  # fmt: skip


def _find(terms: Terms, part: Terms) -> int:
    return next(i for i in range(len(terms)) if terms[i : i + len(part)] == part)


def last_of(*nodes: Any) -> fx.Node:
    """The node that comes last in the graph."""
    return max(n for n in nodes if isinstance(n, fx.Node))
