"""Recognises softmax attention in every spelling, and says why something that looks like it is not.

A match is found from the softmax outwards. Operands are taken by their role in the two matrix products, never by the
literals of the permutations around them, and the named axes decide whether it is attention between tokens at all.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import isinf
from typing import Any

import torch
from torch import Tensor, fx

from tokenopt.analysis.axes import AxisMap, tensor_operands
from tokenopt.analysis.terms import Terms, factors, is_channel, length
from tokenopt.errors import Refusal
from tokenopt.graph import module_path

aten = torch.ops.aten

SOFTMAX = (aten.softmax.int, aten._softmax.default)
_SAME = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.clone.default,
    aten.contiguous.default, aten.alias.default, aten.dropout.default, aten.type_as.default, aten.detach.default,
}  # fmt: skip
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
          aten.expand.default, aten.unflatten.int, aten.flatten.using_ints}  # fmt: skip
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}


@dataclass
class Addend:
    """Something added to the logits (or a boolean mask of what is visible), with the factor it is scaled by."""

    node: fx.Node
    scale: float
    visible: bool = False
    inverted: bool = False
    lead: tuple[Any, ...] | None = None


@dataclass
class Product:
    """One batched matrix product, as ``a [.., rows, inner]`` times ``b [.., inner, columns]``.

    For an einsum, ``permute_a`` and ``permute_b`` bring the operands into ``[.., rows, inner]`` and
    ``[.., columns, inner]`` (columns first) and ``permute_out`` brings ``[.., rows, columns]`` into its own order.
    """

    node: fx.Node
    a: fx.Node
    b: fx.Node
    permute_a: tuple[int, ...] | None = None
    permute_b: tuple[int, ...] | None = None
    permute_out: tuple[int, ...] | None = None
    scale: float = 1.0
    added: Addend | None = None


@dataclass
class AttentionMatch:
    """A softmax attention spelled out: everything that ``tokenopt::attention`` needs."""

    softmax: fx.Node
    scores: Product
    output: Product
    scale: float
    factors: list[fx.Node] = field(default_factory=list)
    addends: list[Addend] = field(default_factory=list)
    views: list[fx.Node] = field(default_factory=list)
    after: list[fx.Node] = field(default_factory=list)


def match_attention(axes: AxisMap, softmax: fx.Node) -> AttentionMatch | Refusal | None:
    """The attention around a softmax; a Refusal if it resembles one; None if no matrix product feeds it."""
    where = module_path(softmax) or softmax.name
    logits = softmax.args[0]
    rank = len(logits.meta["val"].shape)
    scale, tensors, addends, views = 1.0, [], [], []
    node = logits
    scores: Product | None = None
    while scores is None:
        target = node.target
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return _without_keys(axes, softmax, where)
        if target in _SAME:
            node = node.args[0]
        elif target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            x, other = node.args[:2]
            divide = "div" in str(target)
            if not isinstance(other, fx.Node):
                scale *= 1 / other if divide else other
                node = x
                continue
            if not divide and _feeds(axes, other, x):
                x, other = other, x
            value = other.meta["val"]
            if not isinstance(value, Tensor):
                return None
            number = _number(axes, other)
            if number is not None:
                scale *= 1 / number if divide else number
            elif other in axes.data and _same_shape(other, node):
                return Refusal(where, "the logits are multiplied by another map of the same size", _KEEP_DENSE)
            elif value.shape and value.shape[-1] != 1:
                return Refusal(where, "the logits are scaled differently for every key", _KEEP_DENSE)
            elif divide or len(value.shape) > len(node.meta["val"].shape):
                return Refusal(where, "the logits are scaled by a tensor of another layout", _KEEP_DENSE)
            else:
                tensors.append(other)
            node = x
        elif target in (aten.add.Tensor, aten.sub.Tensor):
            x, other = node.args[:2]
            sign = node.kwargs.get("alpha", 1) * (-1 if target is aten.sub.Tensor else 1)
            if not isinstance(other, fx.Node):
                node = x  # a constant shift of all logits does not change a softmax
                continue
            if sign == 1 and _feeds(axes, other, x):
                x, other = other, x
            if tensors:
                return Refusal(where, "the logits are scaled by a tensor after a bias was added", _KEEP_DENSE)
            addends.append(Addend(other, scale * sign, lead=tuple(node.meta["val"].shape[:-2])))
            node = x
        elif target in (aten.masked_fill.Scalar, aten.where.ScalarOther, aten.where.self):
            if target is aten.masked_fill.Scalar:
                x, mask, fill, inverted = *node.args, True
            else:
                mask, x, fill = node.args
                inverted = False
                fill = _number(axes, fill) if isinstance(fill, fx.Node) else fill
            if fill is None or not (isinf(fill) and fill < 0):
                return Refusal(where, f"its mask fills with {fill}, not with -inf", _KEEP_DENSE)
            addends.append(Addend(mask, 1.0, visible=True, inverted=inverted, lead=tuple(node.meta["val"].shape[:-2])))
            node = x
        elif target in _VIEWS and _keeps_matrix(node):
            views.append(node)
            node = node.args[0]
        elif target in _PRODUCTS:
            scores = as_product(node)
            if scores is None:
                return Refusal(where, "an einsum of this form is not understood", _WRITE_PLAIN)
        elif target in (aten.tanh.default, aten.sigmoid.default):
            return Refusal(where, f"the logits pass through {target.name().split('::')[1]} (soft capping)", _KEEP_DENSE)
        elif _reaches_product(axes, node):
            return Refusal(where, _why_between(node, "before"), _KEEP_DENSE)
        else:
            return _without_keys(axes, softmax, where)
    if scores.a not in axes.data and scores.b not in axes.data:
        return None
    dim = softmax.args[1] % rank
    if scores.added is not None:
        addends.append(Addend(scores.added.node, scale * scores.added.scale, lead=scores.added.lead))
    after: list[fx.Node] = []
    output = _value_product(softmax, after)
    if isinstance(output, str):
        return Refusal(where, output, _KEEP_DENSE)
    if not any(n in axes.data for n in (output.a, output.b) if n is not softmax and n not in after):
        return None  # a lookup in learned values, not attention
    logit_dims = axes.dims(logits)
    inner = _contracted(axes, scores)
    if logit_dims is not None and inner is not None and _is_channels(axes, logit_dims[dim], inner):
        return Refusal(
            where, "channel attention: the softmax runs over features, and the tokens are summed over",
            "it is linear in the number of tokens already",
        )  # fmt: skip
    if dim != rank - 1:
        return Refusal(where, "a transposed softmax: each key distributes itself over the queries", _KEEP_DENSE)
    return AttentionMatch(softmax, scores, output, scale * scores.scale, tensors, addends, views, after)


_KEEP_DENSE = "it stays as it is; the other sites of the model are not affected"
_WRITE_PLAIN = "write it as matmul or torch.nn.functional.scaled_dot_product_attention"
_TRANSPOSES = {aten.transpose.int, aten.permute.default}


def unmatched_products(axes: AxisMap) -> list[tuple[fx.Node, str, str]]:
    """Pairs of data-dependent products without a softmax between them: (first product, kind, why)."""
    found = []
    for node in axes.program.graph.nodes:
        if node.target not in _PRODUCTS:
            continue
        product = as_product(node)
        if product is None or product.a not in axes.data or product.b not in axes.data:
            continue
        path = _path_to_product(axes, node)
        if path is None or any(n.target in SOFTMAX for n in path):
            continue
        inner = _contracted(axes, product)
        names = {str(n.target).split(".")[1] for n in path if str(n.target).startswith("aten.")}
        squash = sorted(names & {"tanh", "sigmoid", "relu", "gelu", "silu", "elu"})
        if inner is not None and not is_channel(inner) and length(inner) > 1:
            found.append((node, "linear", "linear attention: keys and values are multiplied first, tokens summed over"))
        elif squash:
            found.append((node, "self", f"{squash[0]} attention: there is no softmax over the keys"))
        else:
            found.append((node, "self", "a product of products without a softmax over the keys"))
    return found


def as_product(node: fx.Node) -> Product | None:
    """A product node in its canonical roles; None for an einsum that is no batched matrix product."""
    if node.target is aten.baddbmm.default:
        added, a, b = node.args
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        extra = Addend(added, beta, lead=tuple(node.meta["val"].shape[:-2])) if beta else None
        return Product(node, a, b, scale=alpha, added=extra)
    if node.target is not aten.einsum.default:
        a, b = node.args[:2]
        return Product(node, a, b)
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    if len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    (left, right), out = equation.split("->")[0].split(","), equation.split("->")[1]
    if len(set(left)) != len(left) or len(set(right)) != len(right) or set(out) - set(left) - set(right):
        return None
    inner = [x for x in left if x in right and x not in out]
    rows, columns = [x for x in out if x not in right], [x for x in out if x not in left]
    if len(inner) != 1 or len(rows) != 1 or len(columns) != 1 or set(left + right) - set(out) - set(inner):
        return None
    lead = [x for x in out if x in left and x in right]
    canonical = [*lead, rows[0], columns[0]]
    permute_out = tuple(canonical.index(x) for x in out)
    return Product(
        node, operands[0], operands[1],
        permute_a=tuple(left.index(x) for x in (*lead, rows[0], inner[0])),
        permute_b=tuple(right.index(x) for x in (*lead, columns[0], inner[0])),
        permute_out=permute_out,
    )  # fmt: skip


def _value_product(softmax: fx.Node, after: list[fx.Node]) -> Product | str:
    """The product of the probabilities with the values, or why there is none. ``after`` gets the nodes between."""
    node = softmax
    while True:
        users = [u for u in node.users if "sym_size" not in str(u.target) and "assert" not in str(u.target)]
        if len(users) != 1:
            return "the probabilities are used more than once" if users else "nothing reads the probabilities"
        user = users[0]
        if user.target in _PRODUCTS:
            product = as_product(user)
            if product is None or (product.added is not None):
                return "the product with the values is not understood"
            turned = bool(after) and after[-1].target in _TRANSPOSES
            if (product.a is node and not turned) or (product.b is node and turned and product.permute_b is None):
                return product
            if product.permute_a is not None and product.b is node:
                swapped = _swap(product)
                if swapped is not None:
                    return swapped
            return "the probabilities are transposed before the product with the values"
        if user.op == "output":
            return "the probabilities are returned"
        if user.target in _SAME or (user.target in _VIEWS and _keeps_matrix(user)):
            after.append(user)
        elif user.target in _TRANSPOSES and _swaps_last_two(user) and not after[-1:] == [user]:
            after.append(user)
        else:
            return _why_between(user, "after")
        node = user


def _without_keys(axes: AxisMap, softmax: fx.Node, where: str) -> Refusal | None:
    """A softmax that weighs values by something other than a product with keys."""
    after: list[fx.Node] = []
    output = _value_product(softmax, after)
    if isinstance(output, str) or not any(n in axes.data for n in (output.a, output.b) if n not in (softmax, *after)):
        return None
    return Refusal(where, "its weights are computed from the queries alone: there are no keys", _KEEP_DENSE)


def _swap(product: Product) -> Product | None:
    """An einsum whose probabilities are the second operand, seen from them."""
    rank = len(product.permute_out)
    order = list(range(rank - 2)) + [rank - 1, rank - 2]
    permute_out = tuple(order.index(i) for i in product.permute_out)
    return Product(product.node, product.b, product.a, product.permute_b, product.permute_a, permute_out)


def _why_between(node: fx.Node, side: str) -> str:
    name = str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)
    if name in ("linear", "conv2d", "permute", "einsum"):
        return f"talking heads: heads are mixed {side} the softmax ({name})"
    if name == "mul":
        return f"the probabilities are multiplied by something {side} the softmax"
    if "scatter" in name or name == "copy":
        return f"parts of the logits are edited in place {side} the softmax ({name})"
    return f"{name} stands between the softmax and its {'logits' if side == 'before' else 'values'}"


def _swaps_last_two(node: fx.Node) -> bool:
    rank = len(node.meta["val"].shape)
    if node.target is aten.transpose.int:
        return {d % rank for d in node.args[1:3]} == {rank - 1, rank - 2}
    order = [d % rank for d in node.args[1]]
    return order == [*range(rank - 2), rank - 1, rank - 2]


def _keeps_matrix(node: fx.Node) -> bool:
    """A view that regroups leading dimensions only."""
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    return len(before) >= 2 and len(after) >= 2 and tuple(before[-2:]) == tuple(after[-2:])


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return tuple(a.meta["val"].shape) == tuple(b.meta["val"].shape)


def _number(axes: AxisMap, node: fx.Node) -> float | None:
    value = axes.program.constant(node)
    return float(value) if value is not None and value.numel() == 1 else None


def _feeds(axes: AxisMap, candidate: fx.Node, other: fx.Node) -> bool:
    """Whether the logits come through ``candidate`` rather than ``other`` (a bias): data-dependent, near a product."""
    if candidate not in axes.data:
        return False
    if other not in axes.data:
        return True
    return _distance(candidate) < _distance(other)


def _distance(node: fx.Node) -> int:
    """Steps up through unary operations to the next product."""
    for steps in range(32):
        if node.op != "call_function" or node.target in _PRODUCTS:
            return steps if node.target in _PRODUCTS else 99
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if not operands:
            return 99
        node = operands[0]
    return 99


def _reaches_product(axes: AxisMap, node: fx.Node) -> bool:
    """Whether a data-by-data product lies a few steps above."""
    queue, seen = deque([(node, 0)]), set()
    while queue:
        current, depth = queue.popleft()
        if current in seen or depth > 8 or current.op != "call_function":
            continue
        seen.add(current)
        if current.target in _PRODUCTS:
            product = as_product(current)
            if product is None or (product.a in axes.data and product.b in axes.data):
                return True
            continue
        queue.extend((n, depth + 1) for n in tensor_operands(current) if n in axes.data)
    return False


def _path_to_product(axes: AxisMap, start: fx.Node) -> list[fx.Node] | None:
    """The operations from one product to the next product or attention that reads it, both data by data."""
    queue, seen = deque([(u, [u]) for u in start.users]), set()
    while queue:
        node, path = queue.popleft()
        if node in seen or len(path) > 14 or node.op != "call_function":
            continue
        seen.add(node)
        if node.target in _PRODUCTS:
            product = as_product(node)
            if product is not None and product.a in axes.data and product.b in axes.data:
                return path
            continue
        name = str(node.target)
        if "linear" in name or "conv" in name or "layer_norm" in name or "batch_norm" in name:
            continue
        queue.extend((u, [*path, u]) for u in node.users)
    return None


def _contracted(axes: AxisMap, product: Product) -> Terms | None:
    dims = axes.dims(product.a)
    if dims is None:
        return None
    return dims[product.permute_a[-1]] if product.permute_a is not None else dims[-1]


def _is_channels(axes: AxisMap, attended: Terms, inner: Terms) -> bool:
    """The softmax runs over features while what is contracted is not features."""
    atoms = list(factors(attended))
    return bool(atoms) and all(a.channel for a in atoms) and not is_channel(inner) and length(inner) > 1
