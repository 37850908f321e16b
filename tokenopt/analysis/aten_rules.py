"""The axis rules of ATen's operations and of our own: one per operation family."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import Tensor, fx

from tokenopt.analysis.axes import Axes, Dims, EffectKind, tensor_operands
from tokenopt.analysis.axis_rules import Rule, axis_rule, broadcast, pointwise
from tokenopt.analysis.terms import Cat, Terms, concatenate, factors, length, resolve

# -- pointwise and creation ------------------------------------------------------------------------------------------


for _name in (
    "aten.to aten._to_copy aten.clone aten.contiguous aten.alias aten.detach aten.dropout aten.type_as aten.copy "
    "aten.lift_fresh_copy aten.zeros_like aten.ones_like aten.full_like aten.empty_like aten.rand_like "
    "aten.randn_like aten.fill aten.masked_fill aten.where aten.batch_norm aten.__and__ aten.__or__ aten.__xor__ "
    "aten.hardswish aten.hardsigmoid aten.hardtanh aten.softplus aten.leaky_relu aten.mish aten.prelu aten.relu6 "
    "aten.logit aten.feature_dropout aten.native_dropout aten.lerp aten.bernoulli aten.float aten.bucketize "
    "aten.max.other aten.min.other"
).split():
    axis_rule(_name)(pointwise)


@axis_rule("aten._native_batch_norm_legit_no_training aten._native_batch_norm_legit")
def batch_norm(axes: Axes, node: fx.Node) -> list[Dims]:
    operand = node.args[0]
    dims = axes.of(operand)
    axes.mark_channel(dims[1])
    return [dims, *(tuple(axes.fresh(s, node, i) for i, s in enumerate(axes.shape(v))) for v in node.meta["val"][1:])]


@axis_rule(
    "aten.arange aten.full aten.zeros aten.ones aten.empty aten.rand aten.randn aten.eye aten.scalar_tensor "
    "aten.linspace aten.new_zeros aten.new_ones aten.new_full aten.new_empty aten.tensor aten.lift aten.tril_indices"
)
def create(axes: Axes, node: fx.Node) -> Dims:
    return tuple(axes.fresh(s, node, i) for i, s in enumerate(axes.shape(node.meta["val"])))


# -- layout ----------------------------------------------------------------------------------------------------------


@axis_rule("aten.view aten.reshape aten._unsafe_view aten.flatten aten.unflatten aten.view_as aten.reshape_as")
def reshape(axes: Axes, node: fx.Node) -> Dims:
    operand = node.args[0]
    out = axes.regroup(axes.of(operand), axes.shape(node.meta["val"]), node, operand)
    if len(node.args) > 1 and isinstance(node.args[1], (list, tuple)):
        for dim, size in enumerate(node.args[1]):
            if not (isinstance(size, int) and size == -1):
                axes.literal(node, (1, dim), out[dim])
    return out


@axis_rule("aten.expand aten.expand_as aten.broadcast_to")
def expand(axes: Axes, node: fx.Node) -> Dims:
    dims = axes.of(node.args[0])
    shape = axes.shape(node.meta["val"])
    out: list[Terms] = []
    for dim, size in enumerate(shape):
        at = dim - len(shape) + len(dims)
        kept = at >= 0 and length(dims[at]) == size
        out.append(dims[at] if kept else axes.fresh(size, node, dim))
        if isinstance(node.args[1], (list, tuple)) and node.args[1][dim] != -1:
            axes.literal(node, (1, dim), out[dim])
    return tuple(out)


@axis_rule("aten.repeat")
def repeat(axes: Axes, node: fx.Node) -> Dims:
    dims = axes.of(node.args[0])
    shape = axes.shape(node.meta["val"])
    out: list[Terms] = []
    for dim, size in enumerate(shape):
        at = dim - len(shape) + len(dims)
        inner = dims[at] if at >= 0 else ()
        out.append((*axes.fresh(size // length(inner), node, dim), *inner) if size else ())
    return tuple(out)


@axis_rule("aten.repeat_interleave.self_int")
def repeat_interleave(axes: Axes, node: fx.Node) -> Dims | None:
    dims = list(axes.of(node.args[0]))
    dim = _argument(node, 2, "dim")
    if dim is None:
        return None
    size = axes.shape(node.meta["val"])[dim]
    dims[dim] = (*dims[dim], *axes.fresh(size // length(dims[dim]), node, dim))
    return tuple(dims)


@axis_rule("aten.permute")
def permute(axes: Axes, node: fx.Node) -> Dims:
    dims = axes.of(node.args[0])
    return tuple(dims[i] for i in node.args[1])


@axis_rule("aten.transpose aten.swapaxes aten.swapdims aten.t aten.numpy_T aten.mT aten.movedim aten.moveaxis")
def transpose(axes: Axes, node: fx.Node) -> Dims | None:
    dims = list(axes.of(node.args[0]))
    if len(node.args) == 1:
        return tuple(dims[::-1])
    a, b = node.args[1:3]
    if not isinstance(a, int):
        return None
    if "move" in str(node.target):
        dims.insert(b % (len(dims)), dims.pop(a))
    else:
        dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


@axis_rule("aten.unsqueeze")
def unsqueeze(axes: Axes, node: fx.Node) -> Dims:
    dims = list(axes.of(node.args[0]))
    at = node.args[1]
    dims.insert(at if at >= 0 else at + len(dims) + 1, ())
    return tuple(dims)


@axis_rule("aten.squeeze")
def squeeze(axes: Axes, node: fx.Node) -> Dims:
    dims = axes.of(node.args[0])
    if len(node.args) == 1:
        return tuple(d for d in dims if d)
    which = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    gone = {w % len(dims) for w in which}
    return tuple(d for i, d in enumerate(dims) if not (i in gone and length(d) == 1))


@axis_rule("operator.getitem")
def getitem(axes: Axes, node: fx.Node) -> Dims:
    return axes.map._dims[node.args[0]][node.args[1]]


# -- joining and cutting ---------------------------------------------------------------------------------------------


@axis_rule("aten.cat aten.concat aten.concatenate")
def cat(axes: Axes, node: fx.Node) -> Dims:
    shape = axes.shape(node.meta["val"])
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(shape)
    operands = [n for n in node.args[0] if len(axes.map._dims[n]) == len(shape)]
    operands = [n for n in operands if axes.shape(n.meta["val"])[dim] != 0]
    dims = [list(axes.of(n)) for n in operands]
    out = broadcast(
        axes, node, [[t for i, t in enumerate(d) if i != dim] for d in dims], shape[:dim] + shape[dim + 1 :]
    )
    joined = dims[0][dim] if len(dims) == 1 else (concatenate([resolve(d[dim]) for d in dims]),)
    return (*out[:dim], resolve(joined), *out[dim:])


@axis_rule("aten.stack")
def stack(axes: Axes, node: fx.Node) -> Dims:
    shape = axes.shape(node.meta["val"])
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(shape)
    out = broadcast(axes, node, [list(axes.of(n)) for n in node.args[0]], shape[:dim] + shape[dim + 1 :])
    return (*out[:dim], axes.fresh(len(node.args[0]), node, dim), *out[dim:])


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


@axis_rule("aten.split_with_sizes aten.split aten.chunk aten.unsafe_split aten.unsafe_chunk aten.tensor_split")
def split(axes: Axes, node: fx.Node) -> list[Dims]:
    operand = node.args[0]
    dims = axes.of(operand)
    dim = _argument(node, 2, "dim", 0) % len(dims)
    out: list[Dims] = []
    offset = 0
    for i, value in enumerate(node.meta["val"]):
        count = axes.shape(value)[dim]
        part = axes.take(dims[dim], offset, count)
        if part is None:
            axes.effect(node, operand, dim, EffectKind.SLICE, "it is split off its structure")
            part = axes.fresh(count, node, dim)
        elif isinstance(node.args[1], (list, tuple)):
            axes.literal(node, (1, i), part)
        out.append((*dims[:dim], part, *dims[dim + 1 :]))
        offset += count
    if not isinstance(node.args[1], (list, tuple)):
        axes.effect(node, operand, dim, EffectKind.SLICE, "it is cut into equal chunks")
    elif not any(e.dim == dim for e in axes.map.effects(node)):
        axes.effect(node, operand, dim, EffectKind.SEGMENT, "it is split into its segments")
    return out


@axis_rule("aten.unbind")
def unbind(axes: Axes, node: fx.Node) -> list[Dims]:
    operand = node.args[0]
    dims = axes.of(operand)
    dim = _argument(node, 1, "dim", 0) % len(dims)
    axes.effect(node, operand, dim, EffectKind.SLICE, "it is unbound")
    return [(*dims[:dim], *dims[dim + 1 :])] * len(node.meta["val"])


@axis_rule("aten.slice aten.narrow")
def slice_(axes: Axes, node: fx.Node) -> Dims:
    operand = node.args[0]
    dims = axes.of(operand)
    dim = _argument(node, 1, "dim", 0) % len(dims)
    total = length(dims[dim])
    count = axes.shape(node.meta["val"])[dim]
    narrow = "narrow" in str(node.target)
    start = _argument(node, 2, "start", 0) or 0
    step = 1 if narrow else _argument(node, 4, "step", 1)
    if count == total:
        return dims
    part = None
    if step == 1 and isinstance(start, int):
        start = max(start + total, 0) if start < 0 else min(start, total)
        part = axes.take(dims[dim], start, count)
    if part is None:
        axes.effect(node, operand, dim, EffectKind.SLICE, "it is sliced off its structure")
        part = axes.fresh(count, node, dim)
        return (*dims[:dim], part, *dims[dim + 1 :])
    whole = resolve(dims[dim])
    before = axes.take(whole, 0, start) if start else ()
    _bound(axes, node, 2, before, start, whole, total)
    if narrow:
        axes.literal(node, (3,), part)
    else:
        end = start + count
        _bound(axes, node, 3, axes.take(whole, 0, end), end, whole, total)
    axes.effect(node, operand, dim, EffectKind.SEGMENT, "it is sliced at a segment's edge")
    return (*dims[:dim], resolve(part), *dims[dim + 1 :])


def _bound(axes: Axes, node: fx.Node, arg: int, before: Terms | None, at: int, whole: Terms, total: int) -> None:
    """A slice bound is the length of what lies before it, or minus the length of what lies behind it."""
    if len(node.args) <= arg or not isinstance(node.args[arg], int) or node.args[arg] == sys.maxsize:
        return
    if node.args[arg] < 0:
        behind = axes.take(whole, at, total - at)
        if behind is not None and at < total:
            axes.literal(node, (arg,), behind, sign=-1)
    elif at and before is not None:
        axes.literal(node, (arg,), before)


@axis_rule("aten.select")
def select(axes: Axes, node: fx.Node) -> Dims:
    operand, dim, index = node.args[0], node.args[1], node.args[2]
    dims = axes.of(operand)
    dim %= len(dims)
    total = length(dims[dim])
    rest = (*dims[:dim], *dims[dim + 1 :])
    if not isinstance(index, int) or total == 1:
        if total != 1:
            axes.effect(node, operand, dim, EffectKind.SLICE, "a computed position is read")
        return rest
    at = index % total
    terms = resolve(dims[dim])
    single = len(terms) == 1 and not all(f.channel for f in _atoms(terms))
    # reading the first or the last token alone makes it a segment of its own
    cut = axes.take(terms, at, 1) if single and (at in (0, total - 1) or _is_part(terms, at)) else None
    if cut is None:
        axes.effect(node, operand, dim, EffectKind.SLICE, "one position is read")
        return rest
    whole = resolve(dims[dim])
    if index < 0:
        axes.literal(node, (2,), axes.take(whole, at, total - at), sign=-1)
    elif at:
        axes.literal(node, (2,), axes.take(whole, 0, at))
    axes.effect(node, operand, dim, EffectKind.SEGMENT, "one special token is read")
    return rest


def _atoms(terms: Terms) -> list[Any]:
    return list(factors(terms))


def _is_part(terms: Terms, at: int) -> bool:
    offset = 0
    for part in terms[0].parts if isinstance(terms[0], Cat) else ():
        if offset == at and length(part) == 1:
            return True
        offset += length(part)
    return False


@axis_rule("aten.slice_scatter aten.select_scatter")
def slice_scatter(axes: Axes, node: fx.Node) -> Dims:
    operand, source = node.args[0], node.args[1]
    dims = axes.of(operand)
    dim = _argument(node, 2, "dim", 0) % len(dims)
    for n in (operand, source):
        if len(axes.of(n)) == len(dims):
            axes.effect(node, n, dim, EffectKind.SLICE, "a part of it is overwritten")
    others = [i for i in range(len(dims)) if i != dim]
    if len(axes.of(source)) == len(dims):
        for i in others:
            axes.unify(dims[i], axes.of(source)[i])
    return dims


@axis_rule("aten.index_select aten.gather aten.take_along_dim")
def index_along(axes: Axes, node: fx.Node) -> Dims:
    operand = node.args[0]
    dims = list(axes.of(operand))
    dim = node.args[1] if isinstance(node.args[1], int) else node.args[2]
    axes.effect(node, operand, dim, EffectKind.LAYOUT, "positions are read by index")
    shape = axes.shape(node.meta["val"])
    dims[dim] = axes.fresh(shape[dim], node, dim % len(shape))
    for i in range(len(dims)):
        if length(dims[i]) != shape[i]:
            dims[i] = axes.fresh(shape[i], node, i)
    return tuple(dims)


@axis_rule("aten.index")
def index(axes: Axes, node: fx.Node) -> Dims | None:
    operand, indices = node.args
    dims = axes.of(operand)
    used = [i for i, n in enumerate(indices) if n is not None]
    if any(isinstance(n.meta["val"], Tensor) and n.meta["val"].dtype is torch.bool for n in indices if n is not None):
        return None
    for i in used:
        axes.effect(node, operand, i, EffectKind.LAYOUT, "positions are read by index")
    if used != list(range(used[0], used[-1] + 1)):
        return None
    shape = axes.shape(node.meta["val"])
    lead, tail = used[0], len(dims) - used[-1] - 1
    lists = [list(axes.of(indices[i])) for i in used]
    inner = broadcast(axes, node, lists, shape[lead : len(shape) - tail])
    return (*dims[:lead], *inner, *(dims[len(dims) - tail :] if tail else ()))


@axis_rule("aten.embedding")
def embedding(axes: Axes, node: fx.Node) -> Dims:
    weight, ids = node.args[:2]
    channels = axes.of(weight)[1]
    axes.mark_channel(channels)
    axes.effect(node, weight, 0, EffectKind.LAYOUT, "positions are read by index")
    return (*axes.of(ids), channels)


@axis_rule("aten.masked_scatter")
def masked_scatter(axes: Axes, node: fx.Node) -> Dims:
    operand, mask, source = node.args
    dims = axes.of(operand)
    broadcast(axes, node, [list(dims), list(axes.of(mask))], axes.shape(node.meta["val"]))
    for dim in range(len(axes.of(source))):
        axes.effect(node, source, dim, EffectKind.LAYOUT, "its rows fill the places of a mask in order")
    for dim in range(len(dims)):
        axes.effect(node, operand, dim, EffectKind.LAYOUT, "rows are put into it in order")
    return dims


# -- contraction -----------------------------------------------------------------------------------------------------


@axis_rule("aten.linear")
def linear(axes: Axes, node: fx.Node) -> Dims:
    x, weight = node.args[:2]
    dims, (out, inner) = axes.of(x), axes.of(weight)
    axes.unify(dims[-1], inner)
    axes.mark_channel(inner)
    axes.mark_channel(out)
    axes.effect(node, x, len(dims) - 1, EffectKind.LAYOUT, "a linear layer mixes it")
    return (*dims[:-1], out)


@axis_rule("aten.matmul aten.bmm aten.mm aten.baddbmm aten.addmm")
def matmul(axes: Axes, node: fx.Node) -> Dims | None:
    added = [node.args[0]] if "add" in str(node.target) else []
    a, b = node.args[len(added) :][:2]
    da, db = axes.of(a), axes.of(b)
    if len(da) < 2 or len(db) < 2:
        return None
    axes.unify(da[-1], db[-2])
    for operand, dim in ((a, len(da) - 1), (b, len(db) - 2)):
        axes.effect(node, operand, dim, EffectKind.LAYOUT, "a matrix product sums over it")
    for weight, out in ((a, da[-2]), (b, db[-1])):
        if weight not in axes.map.data:
            axes.mark_channel(da[-1])
            axes.mark_channel(out)
    shape = axes.shape(node.meta["val"])
    lead = broadcast(axes, node, [list(da[:-2]), list(db[:-2])], shape[:-2])
    out = (*lead, da[-2], db[-1])
    for operand in added:
        broadcast(axes, node, [list(out), list(axes.of(operand))], shape)
    return out


@axis_rule("aten.einsum")
def einsum(axes: Axes, node: fx.Node) -> Dims | None:
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    if "." in equation or "->" not in equation:
        return None
    left, right = equation.split("->")
    named: dict[str, Terms] = {}
    weights = any(n not in axes.map.data for n in operands)
    for operand, letters in zip(operands, left.split(","), strict=True):
        for dim, (letter, terms) in enumerate(zip(letters, axes.of(operand), strict=True)):
            if length(named.get(letter, ())) == 1:
                named[letter] = terms
            elif length(terms) != 1 and not axes.unify(named[letter], terms):
                axes.effect(node, operand, dim, EffectKind.OPAQUE, "operands disagree about this axis")
            if letter not in right:
                axes.effect(node, operand, dim, EffectKind.LAYOUT, "a product sums over it")
                if weights:
                    axes.mark_channel(terms)
    return tuple(named[letter] for letter in right)


@axis_rule("aten.scaled_dot_product_attention tokenopt.attention")
def attention(axes: Axes, node: fx.Node) -> Dims:
    query, key, value = node.args[:3]
    dq, dk, dv = axes.of(query), axes.of(key), axes.of(value)
    axes.unify(dq[-1], dk[-1])
    axes.unify(dk[-2], dv[-2])
    shape = axes.shape(node.meta["val"])
    lead = broadcast(axes, node, [list(dq[:-2]), list(dk[:-2]), list(dv[:-2])], shape[:-2])
    for operand in (key, value):
        axes.effect(node, operand, len(dk) - 2, EffectKind.ATTEND, "attention weighs over it")
    for operand, dims in ((query, dq), (key, dk)):
        axes.effect(node, operand, len(dims) - 1, EffectKind.LAYOUT, "attention contracts it")
    counts = node.args[4] if len(node.args) > 4 and "tokenopt" in str(node.target) else None
    if counts is not None:
        axes.unify(dk[-2], axes.of(counts)[1])
    bias = _argument(node, 3, "attn_mask")
    if bias is not None:
        logits = (*lead, dq[-2], dk[-2])
        db = axes.of(bias)
        for dim in range(len(db)):
            other = logits[dim - len(db) + len(logits)]
            if length(db[dim]) == length(other) != 1:
                axes.unify(other, db[dim])
    return (*lead, dq[-2], dv[-1])


@axis_rule("tokenopt.tiled_attention tokenopt.neighborhood_attention tokenopt.pooled_attention "
           "tokenopt.pooled_tiled_attention tokenopt.agent_attention tokenopt.region_attention "
           "tokenopt.block_sparse_attention tokenopt.routed_attention tokenopt.predicted_attention "
           "tokenopt.sorted_attention")  # fmt: skip
def patterned(axes: Axes, node: fx.Node) -> Dims:
    """Attention whose tables name positions: every token has to be where it was."""
    query, key, value = node.args[:3]
    dq, dk, dv = axes.of(query), axes.of(key), axes.of(value)
    axes.unify(dq[-1], dk[-1])
    axes.unify(dk[-2], dv[-2])
    axes.unify(dq[-2], dk[-2])
    for operand, dims in ((query, dq), (key, dk), (value, dv)):
        axes.effect(node, operand, len(dims) - 2, EffectKind.LAYOUT, "an attention pattern reads it as a grid")
    for operand, dims in ((query, dq), (key, dk)):
        axes.effect(node, operand, len(dims) - 1, EffectKind.LAYOUT, "attention contracts it")
    return (*dq[:-1], dv[-1])


@axis_rule("tokenopt.tile_bias")
def tiled_bias(axes: Axes, node: fx.Node) -> Dims:
    bias, shape = node.args[0], axes.shape(node.meta["val"])
    dims = axes.of(bias)
    for dim in range(max(len(dims) - 2, 0), len(dims)):
        if length(dims[dim]) > 1:
            axes.effect(node, bias, dim, EffectKind.LAYOUT, "an attention pattern reads it as a grid")
    lead = [() if size == 1 else axes.fresh(size, node, i) for i, size in enumerate(shape[:2])]
    if len(dims) == 4:
        lead = [d if length(d) == size else own for d, size, own in zip(dims[:2], shape[:2], lead, strict=True)]
    return (*lead, *(axes.fresh(size, node, i) for i, size in enumerate(shape[2:], 2)))


axis_rule("aten.outer", "i, j -> i j")


# -- reductions and normalisations -----------------------------------------------------------------------------------


def _reduced(node: fx.Node, rank: int) -> tuple[list[int], bool]:
    dim = _argument(node, 1, "dim")
    keep = bool(_argument(node, 2, "keepdim", False))
    if dim is None or dim == []:
        return list(range(rank)), keep
    return [d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])], keep


def _reduce(kind: EffectKind, why: str) -> Rule:
    def rule(axes: Axes, node: fx.Node) -> Any:
        operand = node.args[0]
        dims = axes.of(operand)
        gone, keep = _reduced(node, len(dims))
        for dim in gone:
            axes.effect(node, operand, dim, kind, why)
        out = tuple(() if i in gone else d for i, d in enumerate(dims) if keep or i not in gone)
        value = node.meta["val"]
        return out if isinstance(value, Tensor) else [out for _ in value]

    return rule


axis_rule("aten.mean aten.amax aten.amin aten.max.dim aten.min.dim aten.any aten.all")(
    _reduce(EffectKind.REDUCE, "it is reduced")
)
axis_rule(
    "aten.sum aten.var aten.std aten.argmax aten.argmin aten.linalg_vector_norm aten.norm aten.logsumexp aten.prod "
    "aten.var_mean aten.count_nonzero aten.max.default aten.min.default aten.median"
)(_reduce(EffectKind.LAYOUT, "a statistic of all its positions is taken"))


@axis_rule("aten.softmax aten._softmax aten.log_softmax aten.cumsum aten.cumprod aten.sort aten.argsort aten.flip")
def along(axes: Axes, node: fx.Node) -> Any:
    operand = node.args[0]
    dims = axes.of(operand)
    which = _argument(node, 1, "dim", -1)
    for dim in which if isinstance(which, (list, tuple)) else [which]:
        if isinstance(dim, int) and not isinstance(dim, bool):
            axes.effect(node, operand, dim % len(dims), EffectKind.LAYOUT, f"{node.target} runs along it")
    value = node.meta["val"]
    return dims if isinstance(value, Tensor) else [dims for _ in value]


@axis_rule("aten.layer_norm aten.rms_norm aten.native_layer_norm aten._fused_rms_norm")
def layer_norm(axes: Axes, node: fx.Node) -> Any:
    operand = node.args[0]
    dims = axes.of(operand)
    count = len(node.args[1])
    for dim in range(len(dims) - count, len(dims)):
        axes.effect(node, operand, dim, EffectKind.LAYOUT, "a normalisation spans it")
    for extra in tensor_operands(node)[1:]:
        for dim, terms in enumerate(axes.of(extra)):
            axes.unify(dims[dim - count], terms)
            axes.mark_channel(terms)
    value = node.meta["val"]
    return dims if isinstance(value, Tensor) else [dims, *[dims[:-count]] * (len(value) - 1)]


@axis_rule("aten.group_norm aten.instance_norm aten.native_group_norm")
def group_norm(axes: Axes, node: fx.Node) -> Dims:
    operand = node.args[0]
    dims = axes.of(operand)
    for dim in range(1, len(dims)):
        axes.effect(node, operand, dim, EffectKind.LAYOUT, "a normalisation spans it")
    return dims


# -- grids -----------------------------------------------------------------------------------------------------------


@axis_rule("aten.conv1d aten.conv2d aten.conv3d aten.convolution aten._convolution aten.conv_transpose2d "
           "aten.conv_transpose1d aten.conv_transpose3d")  # fmt: skip
def convolution(axes: Axes, node: fx.Node) -> Dims:
    x, weight = node.args[:2]
    dims, dw = axes.of(x), axes.of(weight)
    shape = axes.shape(node.meta["val"])
    rank = len(dw) - 2
    batch = dims[: len(dims) - rank - 1]
    per_token = all(length(t) == 1 for t in dw[2:]) and shape[-rank:] == axes.shape(x.meta["val"])[-rank:]
    axes.effect(node, x, len(batch), EffectKind.LAYOUT, "a convolution mixes it")
    if length(dims[len(batch)]) == length(dw[1]):
        axes.unify(dims[len(batch)], dw[1])
    axes.mark_channel(dims[len(batch)])
    axes.mark_channel(dw[0])
    if per_token:
        spatial = dims[-rank:]
    else:
        for dim in range(len(dims) - rank, len(dims)):
            axes.effect(node, x, dim, EffectKind.LAYOUT, "a convolution reads it as a grid")
        spatial = tuple(axes.fresh(shape[i], node, i) for i in range(len(shape) - rank, len(shape)))
    out = dw[0] if length(dw[0]) == shape[len(batch)] else axes.fresh(shape[len(batch)], node, len(batch), channel=True)
    return (*batch, out, *spatial)


def _grid(keep: int, why: str) -> Rule:
    """Operations on a grid: the first ``keep`` dimensions pass, the others are read as a grid."""

    def rule(axes: Axes, node: fx.Node) -> Any:
        operand = node.args[0]
        dims = axes.of(operand)

        def out(value: Tensor) -> Dims:
            shape = axes.shape(value)
            return tuple(
                dims[i] if i < len(dims) and (i < keep or length(dims[i]) == s == 1) and length(dims[i]) == s
                else axes.fresh(s, node, i)
                for i, s in enumerate(shape)
            )  # fmt: skip

        for dim in range(keep, len(dims)):
            axes.effect(node, operand, dim, EffectKind.LAYOUT, why)
        value = node.meta["val"]
        return out(value) if isinstance(value, Tensor) else [out(v) for v in value]

    return rule


axis_rule(
    "aten.avg_pool1d aten.avg_pool2d aten.avg_pool3d aten.max_pool1d aten.max_pool2d aten.max_pool3d "
    "aten.adaptive_avg_pool1d aten.adaptive_avg_pool2d aten.adaptive_avg_pool3d aten.adaptive_max_pool2d "
    "aten.max_pool2d_with_indices aten.lp_pool2d aten.upsample_nearest2d aten.upsample_bilinear2d "
    "aten.upsample_bicubic2d aten.upsample_linear1d aten.upsample_nearest1d aten.upsample_nearest3d "
    "aten.upsample_trilinear3d aten._upsample_bilinear2d_aa aten._upsample_bicubic2d_aa aten.grid_sampler "
    "aten.grid_sampler_2d"
)(_grid(2, "pooling or resizing reads it as a grid"))
axis_rule("aten.pixel_shuffle aten.pixel_unshuffle aten.im2col aten.col2im aten.unfold_copy")(
    _grid(1, "it is rearranged as a grid")
)


@axis_rule("aten.pad aten.constant_pad_nd aten.reflection_pad2d aten.replication_pad2d")
def pad(axes: Axes, node: fx.Node) -> Dims:
    operand = node.args[0]
    dims = list(axes.of(operand))
    shape = axes.shape(node.meta["val"])
    for dim in range(len(dims)):
        if length(dims[dim]) != shape[dim]:
            axes.effect(node, operand, dim, EffectKind.LAYOUT, "it is padded")
            dims[dim] = axes.fresh(shape[dim], node, dim)
    return tuple(dims)


@axis_rule("aten.unfold")
def unfold(axes: Axes, node: fx.Node) -> Dims:
    operand, dim = node.args[0], node.args[1]
    dims = list(axes.of(operand))
    dim %= len(dims)
    shape = axes.shape(node.meta["val"])
    axes.effect(node, operand, dim, EffectKind.LAYOUT, "sliding windows read it")
    dims[dim] = axes.fresh(shape[dim], node, dim)
    return (*dims, axes.fresh(shape[-1], node, len(shape) - 1))


@axis_rule("aten.roll aten.triu aten.tril")
def permuted(axes: Axes, node: fx.Node) -> Dims:
    operand = node.args[0]
    dims = axes.of(operand)
    which = node.args[2] if "roll" in str(node.target) and len(node.args) > 2 else range(len(dims))
    for dim in which:
        axes.effect(node, operand, dim % len(dims), EffectKind.LAYOUT, "its order matters here")
    return dims


@axis_rule("aten.topk")
def topk(axes: Axes, node: fx.Node) -> list[Dims]:
    operand = node.args[0]
    dims = axes.of(operand)
    dim = _argument(node, 2, "dim", -1) % len(dims)
    axes.effect(node, operand, dim, EffectKind.LAYOUT, "positions are selected")
    count = axes.shape(node.meta["val"][0])[dim]
    return [(*dims[:dim], axes.fresh(count, node, dim), *dims[dim + 1 :])] * 2


# -- our own operations: kept tokens start an axis of their own, between the protected ones, which stay what they are --


def _named(node: fx.Node, name: str) -> Any:
    """An argument of one of our operations, by the name that its schema gives."""
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            return node.args[i] if len(node.args) > i else node.kwargs.get(name, argument.default_value)
    return None


def _replaced(axes: Axes, terms: Terms, start: int, stop: int, middle: Terms) -> Terms:
    """A sequence of which the tokens [start, stop) have become others."""
    total = length(terms)
    head = axes.take(terms, 0, start) if start else ()
    tail = axes.take(terms, stop, total - stop) if stop < total else ()
    if head is None or tail is None:
        return middle
    parts = [p for p, there in ((head, start), (middle, True), (tail, stop < total)) if there]
    return resolve(parts[0] if len(parts) == 1 else (concatenate([resolve(p) for p in parts]),))


def _mark_data(axes: Axes, node: fx.Node, old: Terms, new: Terms) -> None:
    """Tokens chosen by constants are those of the input, too, if what they are chosen from is."""
    if node.args[0] in axes.map.data and any(f.data for f in factors(resolve(old))):
        for factor in factors(resolve(new)):
            factor.data = True


def _reduces(axes: Axes, node: fx.Node, why: str = "tokens are reduced here") -> None:
    for operand in tensor_operands(node):
        for dim in range(1, len(axes.of(operand))):
            axes.effect(node, operand, dim, EffectKind.LAYOUT, why)


def _results(axes: Axes, node: fx.Node, *some: Dims | None) -> Any:
    """The dimensions of each result of a reduction; by default those of unrelated numbers per sample."""
    first = axes.of(node.args[0])[0]

    def out(value: Tensor, known: Dims | None) -> Dims:
        if known is not None:
            return known
        shape = axes.shape(value)
        return tuple(first if i == 0 and length(first) == s else axes.fresh(s, node, i) for i, s in enumerate(shape))

    value = node.meta["val"]
    if isinstance(value, Tensor):
        return out(value, some[0] if some else None)
    return [out(v, some[i] if i < len(some) else None) for i, v in enumerate(value)]


@axis_rule("tokenopt.gather_tokens tokenopt.mix_tokens")
def gathered(axes: Axes, node: fx.Node) -> Dims:
    operand, by, dim, batch_dim, start, count = node.args
    dims, new = list(axes.of(operand)), axes.of(by)
    axes.effect(node, operand, dim, EffectKind.LAYOUT, "tokens are selected")
    if length(dims[batch_dim]) == 1 and length(new[0]) != 1:
        dims[batch_dim] = new[0]
    stop = start + count
    total = length(dims[dim])
    _mark_data(axes, node, dims[dim], _middle(axes, by, new[1]))
    if (start, stop) == (0, total):
        head, tail = _protected(axes, by)
        for at, theirs, size in ((0, 0, head), (total - tail, length(new[1]) - tail, tail)):
            if size:
                axes.unify(axes.take(dims[dim], at, size) or (), axes.take(new[1], theirs, size) or ())
        dims[dim] = resolve(new[1])
    else:
        dims[dim] = _replaced(axes, dims[dim], start, stop, new[1])
    return tuple(dims)


def _plan_of(index: fx.Node) -> fx.Node | None:
    """The operation that an index of kept tokens is a result of."""
    made = index.args[0] if index.target is operator.getitem else None
    return made if made is not None and _named(made, "stop") is not None else None


def _protected(axes: Axes, index: fx.Node) -> tuple[int, int]:
    """How many tokens before and behind those that a plan is about its index holds."""
    made = _plan_of(index)
    if made is None:
        return 0, 0
    total = length(axes.of(made.args[0])[1])
    return _named(made, "start"), total - _named(made, "stop")


def _middle(axes: Axes, index: fx.Node, terms: Terms) -> Terms:
    head, tail = _protected(axes, index)
    return axes.take(terms, head, length(terms) - head - tail) or ()


@axis_rule("tokenopt.merge_tokens")
def merged(axes: Axes, node: fx.Node) -> Any:
    operand, _, index = node.args[:3]
    batch, tokens, channels = axes.of(operand)
    _reduces(axes, node)
    new = axes.of(index)[1]
    _mark_data(axes, node, tokens, _middle(axes, index, new))
    return _results(axes, node, (batch, new, channels), (batch, new))


@axis_rule("tokenopt.mean_tokens")
def weighted_mean(axes: Axes, node: fx.Node) -> Dims:
    operand, size, dim, batch_dim, keep = node.args
    dims = axes.of(operand)
    axes.unify(dims[dim], axes.of(size)[1])
    axes.unify(dims[batch_dim], axes.of(size)[0])
    axes.effect(node, operand, dim, EffectKind.REDUCE, "it is reduced")
    return tuple(() if i == dim else d for i, d in enumerate(dims) if keep or i != dim)


@axis_rule("tokenopt.scatter_tokens")
def scattered(axes: Axes, node: fx.Node) -> Dims:
    operand, _, base, dim = node.args[:4]
    axes.effect(node, operand, dim, EffectKind.LAYOUT, "tokens are put back here")
    axes.effect(node, base, dim, EffectKind.LAYOUT, "some of its tokens are replaced")
    return axes.of(base)


@axis_rule("tokenopt.attention_probe tokenopt.attention_received")
def attention_rows(axes: Axes, node: fx.Node) -> Dims:
    query, key = node.args[:2]
    _reduces(axes, node)
    return axes.of(query)[0], axes.of(key)[-2]


@axis_rule("tokenopt.token_norm tokenopt.token_energy tokenopt.token_transition tokenopt.centre_similarity "
           "tokenopt.text_similarity tokenopt.ncut_partition tokenopt.sink_rows tokenopt.massive_activation "
           "tokenopt.boost_neighbours")  # fmt: skip
def score(axes: Axes, node: fx.Node) -> Dims:
    _reduces(axes, node)
    return axes.of(node.args[0])[:2]


@axis_rule("tokenopt.match_bipartite tokenopt.match_partition tokenopt.match_threshold tokenopt.select_topk "
           "tokenopt.select_rows tokenopt.select_groups tokenopt.select_farthest tokenopt.select_dpp "
           "tokenopt.select_diverse tokenopt.select_contextual tokenopt.select_cells tokenopt.cluster_kmeans "
           "tokenopt.cluster_density")  # fmt: skip
def plan(axes: Axes, node: fx.Node) -> Any:
    """index [B, M] holds the protected tokens and those that are kept, which begin an axis; src and dst are numbers."""
    batch, tokens = axes.of(node.args[0])[:2]
    _reduces(axes, node)
    start, stop = _named(node, "start"), _named(node, "stop")
    kept = axes.shape(node.meta["val"][0])[1] - start - (length(tokens) - stop)
    middle = axes.fresh(kept, node, 1) if kept else ()
    index = (batch, _replaced(axes, tokens, start, stop, middle))
    if node.target is not torch.ops.tokenopt.match_threshold.default:
        return _results(axes, node, index)
    old = axes.take(tokens, start, stop - start) or axes.fresh(stop - start, node, 2)
    return _results(axes, node, index, (batch, middle, old), (batch, old, middle), index)


@axis_rule("tokenopt.soft_association")
def association(axes: Axes, node: fx.Node) -> Any:
    batch, tokens = axes.of(node.args[0])[:2]
    _reduces(axes, node)
    new, count = axes.shape(node.meta["val"][0])[1:]
    old = axes.take(tokens, _named(node, "start"), count) or axes.fresh(count, node, 2)
    middle = axes.fresh(new, node, 1)
    return _results(axes, node, (batch, middle, old), (batch, old, middle))


@axis_rule("tokenopt.neighbour_weights")
def neighbours(axes: Axes, node: fx.Node) -> Dims:
    batch, tokens = axes.of(node.args[0])[:2]
    _reduces(axes, node)
    start, stop = _named(node, "start"), _named(node, "stop")
    return batch, axes.of(node.args[2])[1], axes.take(tokens, start, stop - start) or axes.fresh(stop - start, node, 2)


@axis_rule("tokenopt.segment_association")
def given_segments(axes: Axes, node: fx.Node) -> Any:
    batch, old = axes.of(node.args[0])
    _reduces(axes, node)
    start, total = _named(node, "start"), _named(node, "total")
    middle = axes.fresh(_named(node, "k"), node, 1)
    sequence = axes.fresh(total, node, 1)
    index = (batch, _replaced(axes, sequence, start, start + length(old), middle))
    return _results(axes, node, index, (batch, middle, old), (batch, old, middle))


@axis_rule("tokenopt.best_partners tokenopt.shared_threshold tokenopt.partition_energy tokenopt.patch_variance "
           "tokenopt.patch_entropy tokenopt.token_map tokenopt.nearest_tokens tokenopt.grid_interpolation "
           "tokenopt.shares tokenopt.take_tokens tokenopt.block_route tokenopt.predict_route tokenopt.sorted_places "
           "tokenopt.routed_attention_bias tokenopt.predicted_attention_bias "
           "tokenopt.sorted_attention_bias")  # fmt: skip
def numbers(axes: Axes, node: fx.Node) -> Any:
    _reduces(axes, node)
    return _results(axes, node)
