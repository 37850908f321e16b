"""Merge, attend, unmerge: a reduction of the queries, keys and values of one attention, whatever surrounds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from tokenopt.analysis.axes import AxisMap
from tokenopt.analysis.cuts import offset_in
from tokenopt.analysis.sites import AttentionSite
from tokenopt.analysis.terms import is_channel, length
from tokenopt.graph import GraphEditor, add_output
from tokenopt.program import Edit
from tokenopt.tokens.plan import Plan, Reduction, Refused, Region, Stream, named
from tokenopt.tokens.restore import Restore

aten = torch.ops.aten
ops = torch.ops.tokenopt


def reduce_inside(
    editor: GraphEditor, axes: AxisMap, region: Region, sites: list[AttentionSite],
    plan: Callable[[Stream], Plan | None], *, spec: str, proportional: bool, restore: Restore,
) -> tuple[Edit, Reduction] | None:  # fmt: skip
    """Lets one attention run on fewer tokens; its result has all of them again.

    Windows and frames that are samples of their own to the attention are reduced each by itself.

    Rewrite:  attention(q, k, v)  ->  restore(attention(merge(q), merge(k), merge(v)))

    Returns: what was done, for the report and for its proof; None if the plan left it alone.
    Raises: Refused.
    """
    site, segment, name = region.site, region.axis.reducible, region.site.node.name
    windows = _windows(axes, site)
    if len(site.node.args) > 4 and site.node.args[4] is not None:
        raise Refused("it counts merged tokens already", "reduce another one")
    hidden = region.cut.input if region.cut is not None else _projected(axes, site)
    wanted = axes.dims(site.node.args[1])
    if hidden is not None and axes.dims(hidden)[:2] != (wanted[0], wanted[-2]):
        hidden = None
    if site.node.args[0].meta["val"].dim() != 4:
        separate = _separate(editor, axes, site)
        sites = [separate if s is site else s for s in sites]
        region = replace(region, site=separate, known=separate)
        site = separate
    node = site.node
    query, key, value, bias = [*node.args, None][:4]
    start = offset_in(site.axis.terms, segment.terms)
    if start is None:
        raise Refused("its tokens are no sequence", "reduce another one")
    total = query.meta["val"].shape[2]
    rows = hidden if hidden is not None else _flatten(editor, key, max(query, key, value))[0]
    stream = Stream(editor, region, segment, rows, start, segment.length, total, None, sites)
    made = plan(stream)
    if made is None:
        return None
    size: fx.Node | None = None
    reduced = []
    for operand in (query, key, value):
        flat, back = _flatten(editor, operand, max(operand, made.index, *_nodes(made)))
        rows, size = _fuse(editor, made, flat, stream)
        reduced.append(back(rows))
    args = [*reduced, _bias(editor, bias, made.index, total), None]
    after = max(n for n in args if n is not None)
    if size is not None and proportional:
        args[4] = after = editor.insert(max(after, size), aten.log.default, size)
    attended = editor.insert(after, ops.attention.default, *args, **node.kwargs, like=node)
    flat, back = _flatten(editor, attended, attended)
    if hasattr(restore, "spread"):
        made = replace(made, spread=_spread(editor, made.index, flat, stream, restore))
    rows, nearest, base = _restore(editor, made, flat, stream)
    node.replace_all_uses_with(back(rows))
    count = made.index.meta["val"].shape[1]
    left = count - (total - segment.length)
    reduction = Reduction(
        site.id, name, named(made, nearest=nearest, base=base), made.fuse, restore.name, "keep", proportional, start,
        total, segment.length, left, windows, inside=True,
    )  # fmt: skip
    return Edit(spec, site.id, total, count), reduction


def _nodes(plan: Plan) -> list[fx.Node]:
    return [n for n in (plan.src, plan.dst, plan.weight, plan.assign) if n is not None]


def _separate(editor: GraphEditor, axes: AxisMap, site: AttentionSite) -> AttentionSite:
    """The same attention with every window or frame as a sample of its own, [B, H, N, D]."""
    node = site.node
    dims = axes.dims(node.args[0])
    among = _windows(axes, site)
    if len(dims) != 5 or len(among) != 1:
        raise Refused("it is an attention of more than heads and windows over tokens", "reduce another one")
    order, count = [0, among[0], 3 - among[0], 3, 4], length(dims[among[0]])

    def together(x: fx.Node | None) -> fx.Node | None:
        if x is None:
            return None
        shape = [1] * (5 - x.meta["val"].dim()) + list(x.meta["val"].shape)
        if x.meta["val"].dim() < 5:
            x = editor.insert(node.prev, aten.reshape.default, x, shape)
        x = editor.insert(max(x, node.prev), aten.permute.default, x, order)
        if shape[0] == 1 != shape[among[0]]:  # a bias that differs between windows, the same for all samples
            rows = editor.insert(x, aten.sym_size.int, node.args[0], 0)
            x = editor.insert(rows, aten.expand.default, x, [rows, -1, -1, -1, -1])
        elif shape[among[0]] == 1 != shape[0]:
            x = editor.insert(x, aten.expand.default, x, [-1, count, -1, -1, -1])
        return editor.insert(x, aten.flatten.using_ints, x, 0, 1)

    operands = [together(x) for x in [*node.args, None][:4]]
    new = editor.insert(max(n for n in operands if n is not None), ops.attention.default, *operands, **node.kwargs,
                        like=node)  # fmt: skip
    apart = editor.insert(new, aten.unflatten.int, new, 0, [-1, count])
    apart = editor.insert(apart, aten.permute.default, apart, [order.index(i) for i in range(5)])
    node.replace_all_uses_with(apart)
    return replace(site, node=new)


def _windows(axes: AxisMap, site: AttentionSite) -> tuple[int, ...]:
    """Which dimensions of an attention's queries are windows or frames: neither batch, heads, tokens nor channels."""
    dims = axes.dims(site.node.args[0])
    return tuple(i for i in range(1, len(dims) - 2) if length(dims[i]) > 1 and not is_channel(dims[i]))


def _projected(axes: AxisMap, site: AttentionSite) -> fx.Node | None:
    """The last sequence of an attention's samples from which its queries, keys and values are all computed."""
    above = []
    for operand in site.node.args[:3]:
        seen, stack = {operand}, [operand]
        while stack:
            new = [n for n in stack.pop().all_input_nodes if n in axes.data and n not in seen]
            seen.update(new)
            stack.extend(new)
        above.append(seen)
    dims = axes.dims(site.node.args[1])

    def fits(node: fx.Node) -> bool:
        own = axes.dims(node)
        if own is None or len(own) != 3 or own[:2] != (dims[0], dims[-2]):
            return False
        # queries, keys and values in one value are projected already
        return node.target is not aten.linear.default or length(own[2]) <= site.heads * site.head_dim

    return max((n for n in set.intersection(*above) if fits(n)), default=None)


def _flatten(editor: GraphEditor, node: fx.Node, after: fx.Node) -> tuple[fx.Node, Callable[[fx.Node], fx.Node]]:
    """[B, H, N, D] as rows [B, N, H D], and the way back."""
    heads, _, width = node.meta["val"].shape[1:]
    rows = editor.insert(after, aten.permute.default, node, [0, 2, 1, 3])
    rows = editor.insert(rows, aten.flatten.using_ints, rows, 2, 3)

    def back(flat: fx.Node) -> fx.Node:
        split = editor.insert(flat, aten.unflatten.int, flat, 2, [heads, width])
        return editor.insert(split, aten.permute.default, split, [0, 2, 1, 3])

    return rows, back


def _fuse(editor: GraphEditor, plan: Plan, rows: fx.Node, stream: Stream) -> tuple[fx.Node, fx.Node | None]:
    if plan.fuse == "soft":
        return editor.insert(rows, ops.mix_tokens.default, rows, plan.assign, 1, 0, stream.start, stream.count), None
    if plan.fuse == "drop":
        return editor.insert(rows, ops.gather_tokens.default, rows, plan.index, 1, 0, 0, stream.total), None
    merged = editor.insert(rows, ops.merge_tokens.default, rows, plan.weight, plan.index, plan.src, plan.dst,
                           plan.fuse != "sum")  # fmt: skip
    return editor.item(merged, 0), editor.item(merged, 1) if plan.fuse == "sized" else None


def _restore(
    editor: GraphEditor, plan: Plan, rows: fx.Node, stream: Stream
) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
    """All rows; what dropped ones are most like, and what all are put into, where they are."""
    count = rows.meta["val"].shape[1] - (stream.total - stream.count)
    if plan.base is not None:
        base = plan.base(rows, stream.total)
        full = editor.insert(max(rows, base), ops.scatter_tokens.default, rows, plan.index, base, 1, 0)
        if plan.returned:
            add_output(editor.program, full, plan.returned)
        return full, None, base
    if plan.spread is not None:
        after = max(rows, plan.spread)
        return editor.insert(after, ops.mix_tokens.default, rows, plan.spread, 1, 0, stream.start, count), None, None
    dst = plan.dst
    if dst is None:
        dst = editor.insert(rows, ops.nearest_tokens.default, stream.rows, plan.index, plan.src, stream.start, count)
    where = editor.insert(max(rows, dst), ops.token_map.default, plan.index, plan.src, dst, stream.total)
    full = editor.insert(where, ops.gather_tokens.default, rows, where, 1, 0, 0, rows.meta["val"].shape[1])
    return full, None if plan.dst is not None else dst, None


def _spread(editor: GraphEditor, index: fx.Node, after: fx.Node, stream: Stream, restore: Restore) -> fx.Node:
    """Each token of the segment as a mixture of the kept ones, by where they are."""
    kept = index.meta["val"].shape[1] - (stream.total - stream.count)
    local = editor.insert(after, aten.slice.Tensor, index, 1, stream.start, stream.start + kept)
    local = editor.insert(local, aten.sub.Tensor, local, stream.start)
    return restore.spread(editor, local, stream.segment.grid)


def _bias(editor: GraphEditor, bias: fx.Node | None, index: fx.Node, total: int) -> fx.Node | None:
    """The rows and columns of a bias that belong to the kept tokens."""
    if bias is None:
        return None
    rank = bias.meta["val"].dim()
    if rank < 4:
        bias = editor.insert(
            max(bias, index), aten.reshape.default, bias, [1] * (4 - rank) + list(bias.meta["val"].shape)
        )
    for dim in (2, 3):
        if bias.meta["val"].shape[dim] == total:
            bias = editor.insert(max(bias, index), ops.gather_tokens.default, bias, index, dim, 0, 0, total)
    return bias
