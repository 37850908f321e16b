"""Merge, attend, unmerge: a reduction of the queries, keys and values of one attention, whatever surrounds it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from tokenopt.analysis.axes import AxisMap
from tokenopt.analysis.cuts import offset_in
from tokenopt.analysis.sites import AttentionSite
from tokenopt.graph import GraphEditor, add_output
from tokenopt.program import Edit
from tokenopt.tokens.plan import Plan, Refused, Region, Stream

aten = torch.ops.aten
ops = torch.ops.tokenopt


def reduce_inside(
    editor: GraphEditor, axes: AxisMap, region: Region, sites: list[AttentionSite],
    plan: Callable[[Stream], Plan | None], *, spec: str, proportional: bool,
) -> Edit | None:  # fmt: skip
    """Lets one attention run on fewer tokens; its result has all of them again.

    Windows and frames that are samples of their own to the attention are reduced each by itself.

    Rewrite:  attention(q, k, v)  ->  restore(attention(merge(q), merge(k), merge(v)))

    Returns: what was done; None if the plan left it alone.
    Raises: Refused.
    """
    site = region.site
    node, segment = site.node, site.axis.reducible
    query, key, value, bias, key_bias = [*node.args, None, None][:5]
    if query.meta["val"].dim() != 4 or key_bias is not None:
        raise Refused("it is an attention of more than heads over tokens", "reduce another one")
    start = offset_in(site.axis.terms, segment.terms)
    if start is None:
        raise Refused("its tokens are no sequence", "reduce another one")
    total = query.meta["val"].shape[2]
    rows = _rows(editor, axes, region, query, key, value)
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
    full = back(_restore(editor, made, flat, stream))
    node.replace_all_uses_with(full)
    count = made.index.meta["val"].shape[1]
    return Edit(spec, site.id, total, count)


def _nodes(plan: Plan) -> list[fx.Node]:
    return [n for n in (plan.src, plan.dst, plan.weight, plan.assign) if n is not None]


def _rows(editor: GraphEditor, axes: AxisMap, region: Region, query: fx.Node, key: fx.Node, value: fx.Node) -> fx.Node:
    """What tokens are compared by as "hidden": what they are projected from if that is a sequence, else their keys."""
    hidden = region.cut.input if region.cut is not None else None
    if hidden is not None and axes.dims(hidden)[:2] == (axes.dims(key)[0], axes.dims(key)[2]):
        return hidden
    flat, _ = _flatten(editor, key, max(query, key, value))
    return flat


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


def _restore(editor: GraphEditor, plan: Plan, rows: fx.Node, stream: Stream) -> fx.Node:
    count = rows.meta["val"].shape[1] - (stream.total - stream.count)
    if plan.base is not None:
        base = plan.base(rows, stream.total)
        full = editor.insert(max(rows, base), ops.scatter_tokens.default, rows, plan.index, base, 1, 0)
        if plan.returned:
            add_output(editor.program, full, plan.returned)
        return full
    if plan.spread is not None:
        return editor.insert(rows, ops.mix_tokens.default, rows, plan.spread, 1, 0, stream.start, count)
    dst = plan.dst
    if dst is None:
        dst = editor.insert(rows, ops.nearest_tokens.default, stream.rows, plan.index, plan.src, stream.start, count)
    where = editor.insert(max(rows, dst), ops.token_map.default, plan.index, plan.src, dst, stream.total)
    return editor.insert(where, ops.gather_tokens.default, rows, where, 1, 0, 0, rows.meta["val"].shape[1])


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
