"""raise-attention: every spelling of softmax attention becomes ``tokenopt::attention``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

import tokenopt.ops  # noqa: F401  (registers tokenopt::attention)
from tokenopt.analysis.attention import SOFTMAX, Addend, AttentionMatch, match_attention
from tokenopt.analysis.axes import AxisMap, propagate
from tokenopt.analysis.terms import is_channel, length
from tokenopt.errors import Refusal
from tokenopt.graph import GraphEditor, module_path
from tokenopt.pipeline import Pass, PassResult
from tokenopt.program import Edit, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Rewrites fused calls and hand-written attention to one operation, and drops masks that hide nothing.

    Rewrite:  softmax(q @ k.transpose(-2, -1) * s + bias) @ v  ->  tokenopt.attention(q, k, v, bias, scale=s)
    """

    name: ClassVar[str] = "raise-attention"

    def run(self, program: Program) -> PassResult:
        axes = propagate(program)
        editor = GraphEditor(program)
        result = PassResult()
        for node in list(program.graph.nodes):
            if node.target is aten.scaled_dot_product_attention.default:
                _raise_fused(editor, axes, node)
            elif node.target in SOFTMAX and node in axes.data:
                match = match_attention(axes, node)
                if isinstance(match, AttentionMatch):
                    match = _raise_match(editor, axes, match)
                if isinstance(match, Refusal):
                    result.refusals.append(match)
                    continue
                if match is None:
                    continue
            else:
                continue
            result.edits.append(Edit(self.spec, module_path(node) or node.name))
        editor.finish()
        return result


def _raise_fused(editor: GraphEditor, axes: AxisMap, node: fx.Node) -> None:
    """A fused call: the same operands under one name; grouped-query heads are repeated."""
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    arguments.update(node.kwargs)
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    if arguments.get("enable_gqa"):
        groups = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]
        if groups > 1:
            key, value = (editor.insert(node.prev, aten.repeat_interleave.self_int, t, groups, -3, like=node)
                          for t in (key, value))  # fmt: skip
    bias = _visible_bias(axes, arguments.get("attn_mask"))
    new = _attention(
        editor, axes, node, query, key, value, bias, arguments.get("scale"), arguments.get("is_causal", False)
    )
    editor.replace(node, new)


def _raise_match(editor: GraphEditor, axes: AxisMap, match: AttentionMatch) -> Refusal | fx.Node:
    end = match.output.node
    where = module_path(match.softmax) or match.softmax.name
    query = _oriented(editor, match.scores.a, match.scores.permute_a, end, transpose=False)
    key = _oriented(editor, match.scores.b, match.scores.permute_b, end, transpose=match.scores.permute_b is None)
    turned = match.output.b if not _is_probability(match, match.output.a) else None
    if turned is not None and match.output.permute_b is None:  # v^T @ p^T
        value = _oriented(editor, match.output.a, None, end, transpose=True)
    else:
        value = _oriented(editor, match.output.b, match.output.permute_b, end, transpose=False)
        if match.output.permute_b is not None:  # permute_b gives columns first
            value = _swap_last(editor, value, end)
    for factor in match.factors:
        query = editor.insert(_last(query, factor), aten.mul.Tensor, query, factor, like=end)
    lead = _finest_lead(match)
    bias: fx.Node | None = None
    for addend in match.addends:
        term = _bias_term(editor, axes, addend, end, lead)
        if term is None:
            continue
        if isinstance(term, str):
            return Refusal(where, term, "write the mask with the leading dimensions of the logits")
        bias = term if bias is None else _combine(editor, bias, term, end)
    out_lead = tuple(end.meta["val"].shape[:-2]) if match.output.permute_out is None else None
    reshaped = lead is not None and tuple(query.meta["val"].shape[:-2]) != lead
    if reshaped:
        query, key, value = (_reshaped(editor, t, (*lead, *t.meta["val"].shape[-2:]), end) for t in (query, key, value))
    scale = match.scale
    new = _attention(editor, axes, end, query, key, value, bias, scale, False)
    if reshaped or (out_lead is not None and tuple(new.meta["val"].shape[:-2]) != out_lead):
        shape = tuple(end.meta["val"].shape)
        shape = (*shape[:-2], *new.meta["val"].shape[-2:])
        new = _reshaped(editor, new, shape, end)
    if turned is not None and match.output.permute_b is None:
        new = _swap_last(editor, new, end)
    if match.output.permute_out is not None and list(match.output.permute_out) != sorted(match.output.permute_out):
        new = editor.insert(new, aten.permute.default, new, list(match.output.permute_out), like=end)
    if new.meta["val"].dtype != end.meta["val"].dtype:
        new = editor.insert(new, aten._to_copy.default, new, dtype=end.meta["val"].dtype)
    if tuple(new.meta["val"].shape) != tuple(end.meta["val"].shape):
        return Refusal(where, "its output has an unexpected shape", "please report this model")
    editor.replace(end, new)
    return new


def _attention(
    editor: GraphEditor, axes: AxisMap, like: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node,
    bias: fx.Node | None, scale: float | None, is_causal: bool,
) -> fx.Node:  # fmt: skip
    """The canonical node; three-dimensional operands whose rows are batch times heads get both dimensions back."""
    dtype = query.meta["val"].dtype
    if bias is not None and bias.meta["val"].dtype not in (torch.bool, dtype):
        bias = editor.insert(_last(bias, like.prev), aten._to_copy.default, bias, dtype=dtype, like=like)
    heads = _heads_of_rows(axes, query)
    flat = query.meta["val"].shape if heads is not None else None
    after = _last(*(n for n in (query, key, value, bias) if n is not None), like.prev)
    if heads is not None:
        split = lambda t: [-1, heads, *t.meta["val"].shape[1:]]  # noqa: E731
        query, key, value = (
            editor.insert(after, aten.reshape.default, t, split(t), like=like) for t in (query, key, value)
        )
        if bias is not None and len(bias.meta["val"].shape) == 3:
            one = bias.meta["val"].shape[0] == 1
            shape = [1, 1, *bias.meta["val"].shape[1:]] if one else split(bias)
            bias = editor.insert(after, aten.reshape.default, bias, shape, like=like)
        after = _last(*(n for n in (query, key, value, bias) if n is not None))
    kwargs: dict[str, Any] = {"scale": scale}
    if is_causal:
        kwargs["is_causal"] = True
    new = editor.insert(after, torch.ops.tokenopt.attention.default, query, key, value, bias, like=like, **kwargs)
    if flat is not None:
        new = editor.insert(new, aten.reshape.default, new, [-1, *new.meta["val"].shape[2:]], like=like)
    return new


def _heads_of_rows(axes: AxisMap, query: fx.Node) -> int | None:
    """The number of heads where the rows of a three-dimensional query are batch, windows or frames, and heads."""
    dims = axes.dims(query)
    if dims is None or len(dims) != 3 or not axes.batch:
        return None
    rows = dims[0]
    count = len(axes.batch)
    if rows[:count] != axes.batch or len(rows) == count:
        return None
    heads = rows[count:]
    while len(heads) > 1 and not is_channel(heads[:1]):  # positions: windows are samples of their own
        heads = heads[1:]
    return length(heads)


def _oriented(
    editor: GraphEditor, node: fx.Node, permute: tuple[int, ...] | None, like: fx.Node, *, transpose: bool
) -> fx.Node:
    if permute is not None:
        if list(permute) == sorted(permute):
            return node
        return editor.insert(node, aten.permute.default, node, list(permute), like=like)
    return _swap_last(editor, node, like) if transpose else node


def _swap_last(editor: GraphEditor, node: fx.Node, like: fx.Node) -> fx.Node:
    rank = len(node.meta["val"].shape)
    if node.target is aten.transpose.int and {d % rank for d in node.args[1:3]} == {rank - 1, rank - 2}:
        return node.args[0]
    return editor.insert(node, aten.transpose.int, node, -2, -1, like=like)


def _is_probability(match: AttentionMatch, node: fx.Node) -> bool:
    return node is match.softmax or node in match.after


def _finest_lead(match: AttentionMatch) -> tuple[Any, ...] | None:
    """The leading dimensions with the most parts that any addend is written in; None if all agree with the product."""
    own = tuple(match.scores.node.meta["val"].shape[:-2])
    leads = [a.lead for a in match.addends if a.lead is not None]
    finest = max(leads, key=len, default=own)
    return finest if len(finest) > len(own) else None


def _bias_term(
    editor: GraphEditor, axes: AxisMap, addend: Addend, like: fx.Node, lead: tuple[Any, ...] | None
) -> fx.Node | str | None:
    node = addend.node
    if _hides_nothing(axes, node, addend):
        return None
    after = _last(node, like.prev)
    if addend.visible and addend.inverted:
        node = editor.insert(after, aten.logical_not.default, node, like=like)
        after = node
    if addend.scale != 1.0 and not addend.visible:
        node = editor.insert(after, aten.mul.Tensor, node, addend.scale, like=like)
        after = node
    if lead is not None and addend.lead is not None and len(addend.lead) < len(lead):
        shape = list(node.meta["val"].shape)
        added = len(lead) - len(addend.lead)
        own = [1] * (len(addend.lead) + 2 - len(shape)) + shape
        if own[0] != 1:
            return "two masks are added in different groupings of the batch"
        node = editor.insert(after, aten.reshape.default, node, [1] * (added + 1) + own[1:], like=like)
    return node


def _combine(editor: GraphEditor, a: fx.Node, b: fx.Node, like: fx.Node) -> fx.Node:
    after = _last(a, b, like.prev)
    booleans = [n.meta["val"].dtype is torch.bool for n in (a, b)]
    if all(booleans):
        return editor.insert(after, aten.logical_and.default, a, b, like=like)
    if any(booleans):
        mask, values = (a, b) if booleans[0] else (b, a)
        hidden = editor.insert(after, aten.logical_not.default, mask, like=like)
        return editor.insert(hidden, aten.masked_fill.Scalar, values, hidden, float("-inf"), like=like)
    return editor.insert(after, aten.add.Tensor, a, b, like=like)


def _visible_bias(axes: AxisMap, node: fx.Node | None) -> fx.Node | None:
    if node is None or _hides_nothing(axes, node, None):
        return None
    return node


def _hides_nothing(axes: AxisMap, node: fx.Node, addend: Addend | None) -> bool:
    """A constant mask of all True (or a bias of all zeros), possibly expanded."""
    while node.target in (aten.expand.default, aten._to_copy.default, aten.to.dtype) and isinstance(
        node.args[0], fx.Node
    ):
        node = node.args[0]
    value = axes.program.constant(node)
    if not isinstance(value, Tensor):
        return False
    if value.dtype is torch.bool:
        return bool((~value).all()) if addend is not None and addend.inverted else bool(value.all())
    return not bool(value.any())


def _reshaped(editor: GraphEditor, node: fx.Node, shape: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A reshape in which the one dynamic size is inferred."""
    sizes = [s if isinstance(s, int) else -1 for s in shape]
    return editor.insert(_last(node, like.prev), aten.reshape.default, node, sizes, like=like)


def _last(*nodes: fx.Node) -> fx.Node:
    """The node that comes last in the graph."""
    return max(nodes)
