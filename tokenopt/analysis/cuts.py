"""Where a token stream can be reduced, and what each reduction owes to the operations behind it.

One decision function says what happens when reduced tokens reach an operation. `find_cuts` walks the graph with it to
list obligations; the rewrite walks with the same function to discharge them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import Tensor, fx

from tokenopt.analysis.axes import BARRIERS, AxisMap, Effect, EffectKind, Literal, tensor_operands
from tokenopt.analysis.sites import AttentionSite, Segment, TokenAxis
from tokenopt.analysis.terms import Cat, Terms, factors, length
from tokenopt.cost import node_flops
from tokenopt.errors import Refusal
from tokenopt.graph import module_path

aten = torch.ops.aten


# -- lists that contain a segment --------------------------------------------------------------------------------------


def contains(terms: Terms, segment: Terms) -> bool:
    """Whether a dimension carries the whole segment, alone or among others."""
    return any(terms[i : i + len(segment)] == segment for i in range(len(terms) - len(segment) + 1)) or any(
        contains(part, segment) for t in terms if isinstance(t, Cat) for part in t.parts
    )


def tears(terms: Terms, segment: Terms) -> bool:
    """Whether a dimension carries a piece of the segment but not all of it together."""
    atoms = set(factors(segment))
    i = 0
    while i < len(terms):
        if terms[i : i + len(segment)] == segment:
            i += len(segment)
            continue
        term = terms[i]
        if isinstance(term, Cat):
            if any(tears(part, segment) for part in term.parts):
                return True
        elif term in atoms:
            return True
        i += 1
    return False


def reduced_length(terms: Terms, segment: Terms, count: int) -> int:
    """The size of a dimension once the segment has ``count`` tokens."""
    if not contains(terms, segment):
        return length(terms)
    size, i = 1, 0
    while i < len(terms):
        term = terms[i]
        if terms[i : i + len(segment)] == segment:
            size *= count
            i += len(segment)
            continue
        size *= sum(reduced_length(p, segment, count) for p in term.parts) if isinstance(term, Cat) else term.size
        i += 1
    return size


def offset_in(terms: Terms, segment: Terms) -> int | None:
    """How many tokens lie before the segment in a dimension that is a sequence of it; None if it is not one."""
    if terms == segment:
        return 0
    if len(terms) == 1 and isinstance(terms[0], Cat):
        before = 0
        for part in terms[0].parts:
            if part == segment:
                return before
            before += length(part)
    return None


# -- what happens at an operation --------------------------------------------------------------------------------------


@dataclass
class Decision:
    """What reduced operands mean to an operation.

    Attributes:
        barrier: the effect for which every token must be restored first; nothing else counts then.
        reduced: whether its result is reduced, too.
        align: operands of full length that must be gathered.
        literals: its integers to resize.
        means: dimensions it averages over, which merged sizes must weight.
        attends: whether it attends over the reduced tokens, which needs their log size.
    """

    barrier: Effect | None = None
    reduced: bool = False
    align: list[fx.Node] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list)
    means: list[int] = field(default_factory=list)
    attends: bool = False
    segments: bool = False


def decide(axes: AxisMap, node: fx.Node, segment: Terms, reduced: Iterable[fx.Node], short: bool = False) -> Decision:
    """What an operation needs when these operands carry fewer tokens of the segment.

    Args:
        short: let graph outputs be reduced, too.
    """
    decision = Decision()
    reduced = set(reduced)
    for effect in axes.effects(node):
        if effect.operand not in reduced or not contains(axes.dims(effect.operand)[effect.dim], segment):
            continue
        if effect.kind in BARRIERS and not (effect.kind is EffectKind.OUTPUT and short):
            decision.barrier = effect
            return decision
        if effect.kind is EffectKind.REDUCE:
            decision.means.append(effect.dim)
        elif effect.kind is EffectKind.ATTEND:
            decision.attends = True
        elif effect.kind is EffectKind.SEGMENT:
            decision.segments = True
    for dims in axes.results(node):
        for terms in dims:
            if tears(terms, segment):
                operand = next(iter(reduced))
                why = "its tokens are laid out as a grid"
                decision.barrier = Effect(node, operand, 0, EffectKind.LAYOUT, why)
                return decision
            decision.reduced |= contains(terms, segment)
        if any(contains(t, segment) for t in dims) and not _by_sample(axes, dims, segment):
            why = "its samples are taken apart or joined along its tokens"
            decision.barrier = Effect(node, next(iter(reduced)), 0, EffectKind.LAYOUT, why)
            return decision
    for operand in tensor_operands(node):
        dims = axes.dims(operand)
        if operand not in reduced and dims is not None and any(contains(d, segment) for d in dims):
            if node.target in _MASKING and operand in axes.data and _one_per_token(axes, dims, segment):
                why = "each of its tokens is masked by an input of its own"
                decision.barrier = Effect(node, next(iter(reduced)), 0, EffectKind.ALIGN, why)
                return decision
            decision.align.append(operand)
    decision.literals = [x for x in axes.literals(node) if any(contains(t, segment) for t in x.lists)]
    return decision


def _by_sample(axes: AxisMap, dims: tuple[Terms, ...], segment: Terms) -> bool:
    """Whether a value still has its batch, and each dimension the segment at most once."""
    count = len(axes.batch)
    has_batch = not count or any(d[:count] == axes.batch for d in dims)
    return has_batch and all(_occurrences(d, segment) < 2 for d in dims)


def _occurrences(terms: Terms, segment: Terms) -> int:
    here = sum(terms[i : i + len(segment)] == segment for i in range(len(terms) - len(segment) + 1))
    return here + sum(_occurrences(part, segment) for t in terms if isinstance(t, Cat) for part in t.parts)


_MASKING = {aten.mul.Tensor, aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor}


def _one_per_token(axes: AxisMap, dims: tuple[Terms, ...], segment: Terms) -> bool:
    """Whether a value is one number per token: a padding mask, not features."""
    return all(contains(d, segment) or d == axes.batch or length(d) == 1 for d in dims)


# -- cuts --------------------------------------------------------------------------------------------------------------


@dataclass
class StreamCut:
    """A place where the token stream can be reduced: behind ``after``, the residual sum that follows a site.

    Attributes:
        entry: the stream before the site; input: what its queries, keys and values are projected from, if that is one
            value; update: what it adds; leave: the stream behind the MLP that follows.
        axis, segment: the sequence at this place and the part of it that may be reduced.
        layer: the index of its site among the self-attention sites.
        depth: how many of them lie before it, from 0 to 1.
        obligations: how many operations behind it need which mending, until the next cut or a restore.
        restores: the effects before which all tokens come back.
        chained: whether its reduced tokens reach the next cut.
        width: how many values carry the tokens across this place; 1 is the residual stream alone.
        savings: floating-point operations per token of the region behind it, at batch size 1.
    """

    site: AttentionSite
    after: fx.Node
    axis: TokenAxis
    segment: Segment
    layer: int
    depth: float
    entry: fx.Node
    input: fx.Node | None
    update: fx.Node
    leave: fx.Node
    width: int = 0
    obligations: Counter[str] = field(default_factory=Counter)
    restores: list[Effect] = field(default_factory=list)
    chained: bool = False
    savings: float = 0.0


def find_cuts(
    axes: AxisMap, sites: list[AttentionSite], *, paying: bool = True
) -> tuple[list[StreamCut], list[Refusal]]:
    """The cut behind each self-attention site, in order, and why the other sites have none.

    Args:
        paying: leave out those behind which nothing would get faster; inside their attention it still may.
    """
    flow = _data_flow(axes)
    candidates = [s for s in sites if s.kind in ("self", "joint")]
    cuts: list[StreamCut] = []
    refusals: list[Refusal] = []
    for layer, site in enumerate(candidates):
        found = _cut_of(axes, site, flow)
        twin = next((c for c in cuts if paying and not isinstance(found, Refusal) and c.after is found[2]), None)
        if twin is not None:
            found = Refusal(site.id, f"it adds to the stream beside {twin.site.id}", "that one is reduced")
        if isinstance(found, Refusal):
            refusals.append(found)
        else:
            entry, update, after = found
            read = _attention_input(axes, site, entry, flow)
            cuts.append(StreamCut(site, after, site.axis, site.axis.reducible, layer, (layer + 1) / len(candidates),
                                  entry, read, update, after))  # fmt: skip
    _find_leaves(axes, cuts)
    for site in sites:
        if site.kind == "cross":
            refusals.append(Refusal(site.id, "cross attention: its queries are not the tokens it attends to", _OTHERS))
        elif site.kind in ("channel", "linear"):
            refusals.append(site.refusal)
    _walk(axes, cuts)
    if not paying:
        return cuts, refusals
    wasted = [c for c in cuts if not _pays(c, cuts)]
    refusals += [_does_not_pay(c) for c in wasted]
    return [c for c in cuts if c not in wasted], refusals


_INSIDE = "reduce inside attention, with recipe tomesd or supertoken and place=attention{of=qkv}"
_OTHERS = "reduce the self-attention sites of its streams"


def _cut_of(axes: AxisMap, site: AttentionSite, flow: nx.DiGraph) -> tuple[fx.Node, fx.Node, fx.Node] | Refusal:
    """The stream before a site, what the site adds to it, and the last residual sum behind it.

    The residual sum is the first sum of something that the site made and something it was made from.
    """
    if site.refusal is not None:
        return site.refusal
    if site.axis is None:
        return Refusal(site.id, "there is one token only", "nothing to reduce here")
    segment = site.axis.reducible
    if segment is None:
        return Refusal(site.id, "no segment of its tokens comes from the input", "nothing to reduce here")
    if len(site.node.args[0].meta["val"].shape) != 4 or axes.dims(site.node.args[0])[0] != axes.batch:
        return Refusal(
            site.id,
            f"it attends within windows or frames: its {site.axis} tokens are a part of each sample's",
            f"{_INSIDE}, each window or frame by itself",
        )
    query = site.node.args[0]
    above = nx.ancestors(flow, query) | {query}
    below = {site.node}
    for node in _behind(site.node):
        operands = tensor_operands(node)
        if not any(n in below for n in operands):
            continue
        below.add(node)
        if node.target is not aten.add.Tensor or len(operands) != 2:
            continue
        if sum(_has_stream(axes, n, above, node) for n in operands) != 1:
            continue
        if not any(contains(d, segment.terms) for d in axes.dims(node)):
            if any(tears(d, segment.terms) for d in axes.dims(node)):
                sizes = " x ".join(str(length(d)) for d in axes.dims(node)[1:])
                return Refusal(
                    site.id,
                    f"the stream holds its {site.axis} tokens as a grid, {sizes}",
                    f"run flatten-grids before, or {_INSIDE}",
                )
            continue
        problem = _stream_problem(axes, node, segment, site)
        if problem is not None:
            return problem
        entry, update = sorted(operands, key=lambda n: not _has_stream(axes, n, above, node))
        return entry, update, _last_of_sum(axes, node, above)
    return Refusal(site.id, "no residual sum follows it that carries its tokens", _INSIDE)


def _has_stream(axes: AxisMap, node: fx.Node, above: set[fx.Node], total: fx.Node) -> bool:
    """Whether one side of a sum is the stream before a site, what other branches beside it add included."""
    while node not in above:
        if node.target is not aten.add.Tensor or axes.dims(node) != axes.dims(total):
            return False
        node = min(tensor_operands(node))
    return True


def _attention_input(axes: AxisMap, site: AttentionSite, entry: fx.Node, flow: nx.DiGraph) -> fx.Node | None:
    """The last value of the stream's shape from which queries, keys and values are all computed."""
    common = set.intersection(*(nx.ancestors(flow, n) | {n} for n in site.node.args[:3]))
    shape = axes.dims(entry)
    return max((n for n in common if n in axes.data and axes.dims(n) == shape), default=None)


def _find_leaves(axes: AxisMap, cuts: list[StreamCut]) -> None:
    """Where each block leaves the stream: the entry of the next, or the sum behind the last MLP."""
    for cut, behind in zip(cuts, [*cuts[1:], None], strict=False):
        if behind is not None and behind.segment.terms == cut.segment.terms and behind.layer == cut.layer + 1:
            cut.leave = behind.entry
            continue
        made = {cut.after}
        for node in _behind(cut.after):
            operands = tensor_operands(node)
            if not any(n in made for n in operands):
                continue
            made.add(node)
            joins = node.target is aten.add.Tensor and len(operands) == 2 and all(n in made for n in operands)
            if joins and axes.dims(node) == axes.dims(cut.after):
                cut.leave = node
                break


def features_behind(leave: fx.Node) -> fx.Node:
    """The features of an encoder: where its last block leaves the stream, behind a norm that follows directly."""
    users = list(leave.users)
    return users[0] if len(users) == 1 and "norm" in str(users[0].target) else leave


def _last_of_sum(axes: AxisMap, node: fx.Node, above: set[fx.Node]) -> fx.Node:
    """Behind parallel branches: the last of the sums that join them."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target is not aten.add.Tensor or len(tensor_operands(user)) != 2:
            return node
        other = next(n for n in tensor_operands(user) if n is not node)
        if other not in axes.data or other in above or axes.dims(other) != axes.dims(node):
            return node
        node = user
    return node


def _stream_problem(axes: AxisMap, node: fx.Node, segment: Segment, site: AttentionSite) -> Refusal | None:
    dims = axes.dims(node)
    tokens = [d for d in dims if contains(d, segment.terms)]
    if len(dims) != 3 or len(tokens) != 1 or offset_in(tokens[0], segment.terms) is None:
        return Refusal(
            site.id,
            f"its tokens are a window or a part of a grid in {module_path(node) or node.name}: "
            f"{' x '.join(str(length(d)) for d in dims[1:])}",
            _INSIDE,
        )
    if axes.batch and dims.count(axes.batch) != 1:
        return Refusal(site.id, "the stream has no batch dimension of its own", "capture it with a batch dimension")
    return None


def _data_flow(axes: AxisMap) -> nx.DiGraph:
    """The graph of which value is computed from which."""
    flow = nx.DiGraph()
    for node in axes.program.graph.nodes:
        flow.add_node(node)
        flow.add_edges_from((operand, node) for operand in node.all_input_nodes)
    return flow


def _behind(node: fx.Node) -> Iterable[fx.Node]:
    current = node.next
    while current.op != "output":
        if current.op == "call_function":
            yield current
        current = current.next


def _walk(axes: AxisMap, cuts: list[StreamCut]) -> None:
    """Follows every cut at once: each value belongs to the last cut whose reduction it carries."""
    by_segment: dict[Terms, list[StreamCut]] = {}
    for cut in cuts:
        by_segment.setdefault(cut.segment.terms, []).append(cut)
    for segment, group in by_segment.items():
        _measure_widths(axes, segment, group)
        starts = {c.after: c for c in group}
        carried: dict[fx.Node, StreamCut] = {}
        began = False
        for node in axes.program.graph.nodes:
            if node.op not in ("call_function", "output"):
                continue
            reduced = [n for n in tensor_operands(node) if n in carried] if began else []
            if reduced:
                cut = max((carried[n] for n in reduced), key=lambda c: c.layer)
                decision = decide(axes, node, segment, reduced)
                if decision.barrier is not None:
                    cut.obligations["restore-before"] += 1
                    cut.restores.append(decision.barrier)
                else:
                    _count(cut.obligations, decision)
                    if decision.reduced:
                        carried[node] = cut
                    cut.savings += node_flops(node) / max(1, length(cut.axis.terms))
            if node in starts:
                if node in carried:
                    carried[node].chained = True
                carried[node] = starts[node]
                began = True


def _measure_widths(axes: AxisMap, segment: Terms, cuts: list[StreamCut]) -> None:
    order = {n: i for i, n in enumerate(axes.program.graph.nodes)}
    spans = []
    for node, born in order.items():
        dims = axes.dims(node) if node in axes.data else None
        if dims is not None and any(contains(d, segment) for d in dims):
            spans.append((born, max((order[u] for u in node.users), default=born)))
    for cut in cuts:
        at = order[cut.after]
        cut.width = sum(born <= at < dies for born, dies in spans)


def _count(obligations: Counter[str], decision: Decision) -> None:
    obligations["resize-literal"] += len(decision.literals)
    obligations["gather-operand"] += len(decision.align)
    obligations["weight-mean"] += len(decision.means)
    obligations["add-size-bias"] += decision.attends
    obligations["rebase-segment"] += decision.segments
    for kind in [k for k, v in obligations.items() if not v]:
        del obligations[kind]


def _pays(cut: StreamCut, cuts: list[StreamCut]) -> bool:
    """Removing one token must save more than finding it costs: a similarity with half of the others."""
    own = cut.axis.length * cut.site.head_dim
    if cut.savings > own:
        return True
    behind = [c for c in cuts if c.layer > cut.layer and c.segment.terms == cut.segment.terms]
    return bool(cut.chained and behind and _pays(behind[0], cuts))


def _does_not_pay(cut: StreamCut) -> Refusal:
    if not cut.restores:
        return Refusal(cut.site.id, "nothing behind it is computed per token", "reduce earlier layers")
    effect = cut.restores[0]
    where = module_path(effect.node) or effect.node.name
    return Refusal(
        cut.site.id,
        f"{where} ({effect.node.target}) needs all {cut.axis.length} tokens right behind it: {effect.why}",
        f"nothing between them would get faster; {_INSIDE}",
    )


def carries(axes: AxisMap, terms: Terms) -> int:
    """How many values carry an axis."""
    count = 0
    for node in axes.program.graph.nodes:
        dims = axes.dims(node) if isinstance(node.meta.get("val"), Tensor) else None
        count += dims is not None and any(contains(d, terms) for d in dims)
    return count
