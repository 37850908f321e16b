"""reduce-tokens: applies a token recipe at the cuts of a program and mends everything behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from tokenopt import recipes
from tokenopt.analysis.axes import AxisMap, Cat, Terms, length, propagate, tensor_operands
from tokenopt.analysis.cuts import StreamCut, contains, decide, find_cuts, offset_in, reduced_length
from tokenopt.analysis.sites import AttentionSite, find_sites
from tokenopt.errors import IllegalReduction, Refusal
from tokenopt.graph import GraphEditor, add_output
from tokenopt.pipeline import Pass, PassResult
from tokenopt.program import Edit, Program
from tokenopt.schedule import Schedule
from tokenopt.tokens.recipe import TokenRecipe

aten = torch.ops.aten
ops = torch.ops.tokenopt


@dataclass(frozen=True)
class ReduceTokens(Pass):
    """Inserts a recipe's reductions between attention and MLP, and discharges every obligation they cause.

    Sizes in reshapes follow the tokens; position terms, masks and biases are gathered per sample; means are weighted by
    size and attention gets the log size as a key bias; before anything that needs every token, tokens are restored.

    Args:
        recipe: a name, a YAML file, or a recipe.
        schedule: how many tokens stay where; the recipe's own by default.
        settings: fields of the recipe to change.
        short_outputs: outputs that carry tokens keep the reduced ones.

    Rewrite:  x = x + attn(x); y = mlp(x)  ->  x = x + attn(x); x', size = merge_tokens(x, ...); y = mlp(x')
    """

    name: ClassVar[str] = "reduce-tokens"
    recipe: str | TokenRecipe = "tome"
    schedule: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    short_outputs: bool = False

    def resolved(self) -> tuple[TokenRecipe, Schedule]:
        """The recipe and the schedule that this pass stands for."""
        recipe = recipes.get(self.recipe).with_settings(self.settings)
        return recipe, Schedule.parse(recipe.schedule if self.schedule is None else self.schedule)

    def run(self, program: Program) -> PassResult:
        recipe, schedule = self.resolved()
        axes = propagate(program)
        sites, _ = find_sites(axes)
        cuts, refusals = find_cuts(axes, sites)
        if recipe.segment is not None:
            cuts = _with_segment(cuts, recipe.segment)
        result = PassResult(refusals=refusals)
        layers = sum(s.kind in ("self", "joint") for s in sites)
        short = self.short_outputs or recipe.restore == "none"
        editor = GraphEditor(program)
        groups: dict[Terms, list[StreamCut]] = {}
        for cut in cuts:
            groups.setdefault(cut.segment.terms, []).append(cut)
        for group in groups.values():
            if recipe.place == "boundary":
                group = group[-1:]
            rewriter = _Rewriter(editor, axes, recipe, schedule, group, sites, layers, short, self.spec)
            rewriter.run()
            result.edits += rewriter.edits
            result.refusals += rewriter.refusals
        editor.finish()
        return result


def _with_segment(cuts: list[StreamCut], name: str) -> list[StreamCut]:
    from dataclasses import replace

    chosen = []
    for cut in cuts:
        segment = next((s for s in cut.axis.segments if s.name == name and s.length > 1), None)
        if segment is None:
            names = ", ".join(s.name for s in cut.axis.segments)
            raise IllegalReduction(f"there is no segment {name!r}", where=cut.site.id, why=f"it has {names}")
        chosen.append(replace(cut, segment=segment))
    return chosen


@dataclass(eq=False)
class _Version:
    """One state of the stream, after a reduction.

    ``index``, ``src``, ``dst`` are the plan over the parent's sequence of ``total`` tokens, whose segment starts at
    ``start`` and had ``before`` tokens and now has ``count``; ``terms`` are the sequence's; ``stream`` is the value that
    was reduced; ``size`` [B, M] is how many originals each token of the whole sequence stands for.
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
    weighted: bool
    step: int
    cache: dict[Any, fx.Node] = field(default_factory=dict)


class _Rewriter:
    """One walk through the graph that reduces one segment at its cuts."""

    def __init__(
        self, editor: GraphEditor, axes: AxisMap, recipe: TokenRecipe, schedule: Schedule, cuts: list[StreamCut],
        sites: list[AttentionSite], layers: int, short: bool, spec: str,
    ) -> None:  # fmt: skip
        self.editor, self.axes, self.recipe, self.schedule = editor, axes, recipe, schedule
        self.cuts = {c.after: c for c in cuts}
        self.segment = cuts[0].segment.terms
        self.layers, self.short, self.spec = layers, short, spec
        self.sites = [s for s in sites if s.kind in ("self", "joint")]
        self.value: dict[fx.Node, tuple[fx.Node, _Version]] = {}
        self.aligned: dict[Any, fx.Node] = {}
        self.restored: dict[fx.Node, fx.Node] = {}
        self.learned: set[fx.Node] = set()
        self.version: _Version | None = None
        self.edits: list[Edit] = []
        self.refusals: list[Refusal] = []

    def run(self) -> None:
        nodes = list(self.editor.graph.nodes)
        attentions = {s.node for s in self.sites}
        for node in nodes:
            if node.op not in ("call_function", "output"):
                continue
            if any(n in self.learned for n in node.all_input_nodes) or node in attentions:
                self.learned.add(node)
            self._visit(node)
            cut = self.cuts.get(node)
            if cut is not None:
                self._reduce(cut)
        if self.recipe.source and self.version is not None:
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
            if decision.attends and self.recipe.proportional:
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
        if step.weighted and dims == self.axes.dims(step.stream):
            before = step.parent.size if step.parent is not None else None
            rows, back = self._rows(node, dims)
            merged = self.editor.insert(_last(rows, step.index, step.dst), ops.merge_tokens.default, rows, before,
                                        step.index, step.src, step.dst, True)  # fmt: skip
            return back(self.editor.item(merged, 0))
        for dim in at:
            index = self._local(step)
            node = self._gather(node, dims, dim, index, step.before, step.count, rank=len(dims), batch_dim=None)
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
                node = self.editor.insert(node, aten.slice.Tensor, node, 1, version.start, version.start + version.count)
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
            return self.editor.insert(_last(local, parent), aten.gather.default, parent, 1, local)

        return self._cached(version, "index", make)

    def _map(self, version: _Version) -> fx.Node:
        """For each original token, the token of this version that it is part of: [B, originals]."""

        def make() -> fx.Node:
            total = version.total
            node = self.editor.insert(_last(version.index, version.src, version.dst), ops.token_map.default,
                                      version.index, version.src, version.dst, total)  # fmt: skip
            if version.before != total:
                node = self.editor.insert(node, aten.slice.Tensor, node, 1, version.start, version.start + version.before)
            if version.start:
                node = self.editor.insert(node, aten.sub.Tensor, node, version.start)
            if version.parent is None:
                return node
            parent = self._map(version.parent)
            return self.editor.insert(_last(node, parent), aten.gather.default, node, 1, parent)

        return self._cached(version, "map", make)

    def _sizes(self, version: _Version, terms: Terms) -> fx.Node:
        """The sizes of a sequence that contains the segment: [B, its length]."""
        if terms == version.terms:
            return version.size

        def make() -> fx.Node:
            size = version.size
            if version.count != size.meta["val"].shape[1]:
                size = self.editor.insert(size, aten.slice.Tensor, size, 1, version.start, version.start + version.count)
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
            return self.editor.insert(_last(*parts), aten.cat.default, parts, 1)

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
                    node = self._gather(node, dims, dim, self._map(version), version.count, None, rank=len(dims),
                                        batch_dim=None)  # fmt: skip
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
            rank = len(dims)
            if at < 0:
                rank, at = len(out) - batch, 0
            for dim, terms in enumerate(dims):
                if contains(terms, self.segment):
                    current = self._gather(current, dims, dim, self._index(version), self.full, version.count, rank=rank,
                                           batch_dim=at)  # fmt: skip
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
        self, node: fx.Node, dims: tuple[Terms, ...], dim: int, index: fx.Node, have: int, count: int | None, *,
        rank: int, batch_dim: int | None,
    ) -> fx.Node:  # fmt: skip
        """Reads tokens along one dimension by a per-sample index, opening that dimension and the batch if needed.

        ``have`` tokens of the segment are there now; dims are the terms of the full value, ``rank`` its rank once
        leading dimensions of size 1 are added, ``batch_dim`` where the batch is or belongs.
        """
        editor = self.editor
        after = _last(node, index)
        shape = list(node.meta["val"].shape)
        if rank > len(shape):
            pad = rank - len(shape)
            node = editor.insert(after, aten.view.default, node, [1] * pad + _sizes_of(shape))
            dims, dim = ((),) * pad + dims, dim + pad
            shape = [1] * pad + shape
            after = node
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
        closed = [reduced_length(d, self.segment, have) if d[: len(batch)] != batch or not batch else None for d in dims]
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
        view = editor.insert(_last(node, index), aten.view.default, node, shape)
        start = offset_in(opened[token_at], self.segment)
        gathered = editor.insert(view, ops.gather_tokens.default, view, index, token_at, batch_at, start, have)
        count = index.meta["val"].shape[1]
        final = [-1 if c is None else reduced_length(d, self.segment, count) for c, d in zip(closed, dims, strict=True)]
        return editor.insert(gathered, aten.view.default, gathered, final)

    # -- reducing ------------------------------------------------------------------------------------------------------

    def _reduce(self, cut: StreamCut) -> None:
        """Inserts the recipe's reduction behind a cut's residual sum."""
        node, parent = self.value.get(cut.after, (cut.after, None))
        dims = self.axes.dims(cut.after)
        terms = next(d for d in dims if contains(d, self.segment))
        start = offset_in(terms, self.segment)
        have = parent.count if parent is not None else self.full
        total = reduced_length(terms, self.segment, have)
        kept = self.schedule.kept(cut.layer, self.layers, have)
        recipe = self.recipe
        if recipe.select == "bipartite":
            kept = max(kept, have - have // 2)
        kept = max(kept, 1)
        if kept + (recipe.fuse == "pack") >= have:
            return
        score = self._score(cut, start, total)
        if score is None:
            return
        rows, back = self._rows(node, dims)
        editor = self.editor
        size: fx.Node | None = None
        if recipe.select == "bipartite":
            plan = editor.insert(_last(score, rows), ops.match_bipartite.default, score, have - kept, start, start + have)
            index, src, dst = (editor.item(plan, i) for i in range(3))
            after = dst
        else:
            packed = recipe.fuse == "pack"
            plan = editor.insert(_last(score, rows), ops.select_topk.default, score, kept, start, start + have, packed)
            index, src = (editor.item(plan, i) for i in range(2))
            if packed:
                dst = editor.insert(src, aten.full_like.default, src, start + kept)
            else:
                dst = editor.insert(_last(index, src), ops.nearest_tokens.default, rows, index, src)
            after = dst
        if recipe.fuse == "weighted":
            before = parent.size if parent is not None else None
            merged = editor.insert(after, ops.merge_tokens.default, rows, before, index, src, dst, True)
            reduced, size = editor.item(merged, 0), editor.item(merged, 1)
        elif recipe.fuse == "pack":
            weight = self._pack_weight(score, index, start, kept, have, total)
            merged = editor.insert(_last(weight, after), ops.merge_tokens.default, rows, weight, index, src, dst, False)
            reduced = editor.item(merged, 0)
        else:
            reduced = editor.insert(after, ops.gather_tokens.default, rows, index, 1, 0, 0, total)
        count = kept + (recipe.fuse == "pack")
        version = _Version(parent, terms, start, total, have, count, index, src, dst, cut.after, size,
                           recipe.fuse == "weighted", parent.step + 1 if parent is not None else 1)  # fmt: skip
        self.version = version
        self.value[cut.after] = (back(reduced), version)
        self.edits.append(Edit(self.spec, cut.site.id, total, total - have + count))

    def _score(self, cut: StreamCut, start: int, total: int) -> fx.Node | None:
        recipe, editor = self.recipe, self.editor
        if recipe.score == "mean_key":
            key = cut.site.node.args[1]
            return editor.insert(key, aten.mean.dim, key, [1])
        if recipe.score == "random":
            generator = torch.Generator().manual_seed(recipe.seed + cut.layer)
            score = editor.constant("random_score", torch.rand(1, total, generator=generator))
            rows = editor.rows()
            after = score if isinstance(rows, int) else _last(score, rows)
            last = [n for n in editor.graph.nodes if n.op == "placeholder"][-1]
            return editor.insert(_last(after, last), aten.expand.default, score, [rows, -1])
        cls = next((s for s in cut.axis.segments if s.name == "cls"), None)
        site = cut.site
        if recipe.place == "boundary":
            try:
                site = self.sites[recipe.score_layer]
            except IndexError:
                raise IllegalReduction(
                    f"there is no layer {recipe.score_layer} to score with", why=f"the encoder has {len(self.sites)}"
                ) from None
        if cls is None or site.axis is None or site.axis.terms != cut.axis.terms:
            self.refusals.append(Refusal(
                cut.site.id, f"recipe {recipe.name} scores by the class token's attention, and there is no class token",
                "use a recipe without a class token, such as tome",
            ))  # fmt: skip
            return None
        attention = site.node
        query, key, _, *rest = attention.args
        bias, key_bias = [*rest, None, None][:2]
        row = cls.start if cls.start < start else total - (cut.axis.length - cls.start)
        scale = attention.kwargs.get("scale")
        return editor.insert(attention, ops.attention_probe.default, query, key, bias, key_bias, row, 1, scale=scale)

    def _pack_weight(self, score: fx.Node, index: fx.Node, start: int, kept: int, have: int, total: int) -> fx.Node:
        """Weight 1 for what stays, the score for what is packed: the packed ones are not among the kept."""
        editor = self.editor
        chosen = editor.insert(index, aten.slice.Tensor, index, 1, 0, start + kept)
        zeros = editor.insert(chosen, aten.ones_like.default, chosen, dtype=score.meta["val"].dtype)
        weight = editor.insert(_last(zeros, score), aten.scatter.src, score, 1, chosen, zeros)
        if start + have < total:
            tail = editor.insert(weight, aten.slice.Tensor, weight, 1, 0, start + have)
            rest = editor.insert(tail, aten.slice.Tensor, weight, 1, start + have, total)
            ones = editor.insert(rest, aten.ones_like.default, rest)
            weight = editor.insert(ones, aten.cat.default, [tail, ones], 1)
        return weight

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


def _sizes_of(shape: list[Any]) -> list[Any]:
    return [s if isinstance(s, int) else -1 for s in shape]


def _last(*nodes: fx.Node | int) -> fx.Node:
    return max(n for n in nodes if isinstance(n, fx.Node))
