"""Program -> program that torch's ONNX exporter translates, and translates right.

Operations of ``tokenopt`` become their references, attention becomes matrix products (or one node that ONNX knows),
and what the exporter would refuse or get wrong is written differently. Every rewrite here is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from tokenopt import ops
from tokenopt.graph import remove_dead
from tokenopt.program import Program
from tokenopt.runtimes import lowering_tokens, onnx_functions
from tokenopt.runtimes.plugins import plugin_node

aten = torch.ops.aten
_FLOOR = 40.0  # below the largest logit of a row
_ATTENTION_OPSET = 23  # the first with an attention node


def lower(
    program: Program, opset: int, floor: bool = True, named: bool = True, plugins: bool = False
) -> ExportedProgram:
    """A copy of the program for the exporter, in the operations that can be exported to this opset. Weights are shared.

    Args:
        floor, named, plugins: see `for_exporter`.
    """
    lowered = program.clone()
    _freeze(lowered)
    _squeeze_ones(lowered.graph)
    _keep_tensor_outputs(lowered)
    remove_dead(lowered)
    lowered.exported.graph_module.recompile()  # decomposing runs its code
    return for_exporter(lowered.exported, opset, floor, named, plugins)


def for_exporter(
    exported: ExportedProgram, opset: int, floor: bool = True, named: bool = True, plugins: bool = False
) -> ExportedProgram:
    """Changes how a program decomposes: to operations that the exporter writes, and writes right.

    The exporter decomposes what it is given. Ours are done in the same pass: tracing is most of the time of an export.

    Args:
        floor: lift hidden logits to a little below the largest of their row: the exponential of what is far below is a
            denormal number in ONNX Runtime, and its softmax several times slower. e^-40 of a probability is nothing.
        named: attention with a pattern stays one node of its name; else it is decomposed, and added masks hide pairs.
        plugins: attention in windows is one node, which only TensorRT with `plugins.write_plugins` knows.
    """
    decompose, rules = exported.run_decompositions, _table(opset, floor, named)
    if plugins:
        rules[torch.ops.tokenopt.neighborhood_attention.default] = plugin_node

    def run_decompositions(table: dict[Any, Callable[..., Any]]) -> ExportedProgram:
        ours = {target: _first(rule, table.get(target)) for target, rule in rules.items()}
        program = Program(decompose({**table, **ours}))
        _join_columns(program)
        return program.exported

    exported.run_decompositions = run_decompositions
    return exported


def _first(rule: Callable[..., Any], otherwise: Callable[..., Any] | None) -> Callable[..., Any]:
    """A rule, and another one for what it leaves."""
    if otherwise is None:
        return rule

    def decompose(*args: Any, **kwargs: Any) -> Any:
        result = rule(*args, **kwargs)
        return otherwise(*args, **kwargs) if result is NotImplemented else result

    return decompose


def _freeze(program: Program) -> None:
    """Weights without gradients: what attention is decomposed to depends on whether there are any."""
    frozen: dict[int, torch.nn.Parameter] = {}
    weights = program.exported.state_dict
    for name, value in weights.items():
        if isinstance(value, torch.nn.Parameter):
            weights[name] = frozen.setdefault(id(value), torch.nn.Parameter(value.detach(), requires_grad=False))


def _squeeze_ones(graph: fx.Graph) -> None:
    """Lets squeeze name those sizes alone that are 1: the exporter writes it for all, which no runtime accepts."""
    for node in graph.nodes:
        if node.target in (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default):
            sizes = node.args[0].meta["val"].shape
            dims = node.args[1] if len(node.args) > 1 else range(len(sizes))
            dims = [dims] if isinstance(dims, int) else dims
            ones = [d % len(sizes) for d in dims if isinstance(sizes[d], int) and sizes[d] == 1] if sizes else []
            node.target, node.args = aten.squeeze.dims, (node.args[0], ones)
            if not ones:
                node.replace_all_uses_with(node.args[0])


def _join_columns(program: Program) -> None:
    """Drops a dimension that is squeezed and opened again, where one operation hands an index to the next."""
    for node in program.graph.nodes:
        source = node.args[0] if node.target is aten.unsqueeze.default else None
        if isinstance(source, fx.Node) and source.target is aten.squeeze.dim:
            rank = node.meta["val"].dim()
            if node.args[1] % rank == source.args[1] % rank:
                node.replace_all_uses_with(source.args[0])
    remove_dead(program)


def _keep_tensor_outputs(program: Program) -> None:
    """Drops None and numbers from what the program returns, and copies what would otherwise be returned twice."""
    graph, signature = program.graph, program.exported.graph_signature
    out = next(n for n in reversed(graph.nodes) if n.op == "output")
    kept = {n.name for n in program.output_nodes}
    nodes, specs, seen = [], [], set()
    for node, spec in zip(out.args[0], signature.output_specs, strict=True):
        if not isinstance(node, fx.Node) or node.name not in kept or spec.kind is not OutputKind.USER_OUTPUT:
            continue
        if node in seen or node.op == "placeholder":
            with graph.inserting_before(out):
                copy = graph.call_function(aten.clone.default, (node,))
            copy.meta["val"] = node.meta["val"]
            node = copy
        seen.add(node)
        spec.arg.name = node.name
        nodes.append(node)
        specs.append(spec)
    out.args = (tuple(nodes),)
    signature.output_specs[:] = specs
    whole = next(entry for entry in program.exported.module_call_graph if entry.fqn == "")
    whole.signature.out_spec = pytree.tree_structure(tuple(nodes))


def _table(opset: int, floor: bool, named: bool) -> dict[Any, Callable[..., Any]]:
    attention = partial(_attention, floor=floor, hides=not named)
    if opset >= _ATTENTION_OPSET and (named or not floor):
        attention = _attention_node
    return {
        **ops.references(),
        **(onnx_functions.named() if named else {}),
        torch.ops.tokenopt.attention.default: partial(_proportional, floor=floor),
        torch.ops.tokenopt.take_tokens.default: lowering_tokens.take_tokens,
        torch.ops.tokenopt.match_bipartite.default: lowering_tokens.match_bipartite,
        torch.ops.tokenopt.match_partition.default: lowering_tokens.match_partition,
        torch.ops.tokenopt.partition_energy.default: lowering_tokens.partition_energy,
        torch.ops.tokenopt.token_energy.default: lowering_tokens.token_energy,
        torch.ops.tokenopt.merge_tokens.default: lowering_tokens.merge_tokens,
        aten.scaled_dot_product_attention.default: attention,
        aten.masked_scatter.default: _masked_scatter,
        aten.scatter_reduce.two: _scatter_reduce,
        aten.mean.dim: _mean,
        aten.col2im.default: _fold,
        aten.sort.default: _sort,
        aten.sort.stable: _sort_stable,
        aten.cdist.default: _distances,
        aten._cdist_forward.default: _distances,
    }


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    floor: bool = False,
    hides: bool = False,
) -> Tensor:
    """Attention of any rank as two matrix products; runtimes fuse the scale and the transposition."""
    if enable_gqa:
        key, value = (_repeat_heads(x, query.shape[-3]) for x in (key, value))
    if is_causal:
        mask = _causal(query, key)
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    if mask is None:
        return scores.softmax(-1) @ value
    if mask.dtype is not torch.bool:
        return _softmax(scores + mask, floor and hides) @ value
    weights = _softmax(torch.where(mask, scores, -torch.inf), floor)
    return weights @ value if is_causal else torch.where(mask, weights, 0.0) @ value  # a row may see nothing


def _softmax(logits: Tensor, floor: bool) -> Tensor:
    if floor and logits.dtype is not torch.float64:
        logits = torch.maximum(logits, logits.amax(-1, keepdim=True) - _FLOOR)
    return logits.softmax(-1)


def _proportional(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    floor: bool = False,
) -> Tensor:
    """tokenopt::attention; where a boolean mask meets a key bias, a row that sees nothing stays zero."""
    if bias is None or key_bias is None or bias.dtype is not torch.bool:
        reference = ops.references()[torch.ops.tokenopt.attention.default]
        return reference(query, key, value, bias, key_bias, scale=scale, is_causal=is_causal)
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    scores = scores + key_bias[:, None, None, :].to(scores.dtype)
    return torch.where(bias, _softmax(torch.where(bias, scores, -torch.inf), floor), 0.0) @ value


def _attention_node(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as the one node that ONNX has for it: of rank 4, with a mask for every query."""
    from torch.onnx import ops as onnx_ops

    rows, columns, shape = query.shape[-2], key.shape[-2], (*query.shape[:-1], value.shape[-1])
    if mask is not None:  # [..., N, M]; leading dimensions that are folded into one cannot broadcast any more
        lead = mask.shape[:-2] if query.dim() <= 4 else (*query.shape[:-3], *mask.shape[-3:-2])
        mask = _rank_four(mask.expand(*lead, rows, columns))
    result, *_ = onnx_ops.attention(
        *(_rank_four(x) for x in (query, key, value)), attn_mask=mask, is_causal=is_causal, scale=scale
    )
    return result.reshape(shape)


def _rank_four(x: Tensor) -> Tensor:
    """[..., H, N, D] with any number of leading dimensions as [B, H, N, D]."""
    if x.dim() <= 4:
        return x.reshape(*[1] * (4 - x.dim()), *x.shape) if x.dim() != 3 else x.unsqueeze(1)
    return x.flatten(0, x.dim() - 4)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    groups = heads // x.shape[-3]
    return x.unsqueeze(-3).expand(*x.shape[:-2], groups, *x.shape[-2:]).flatten(-4, -3)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    rows, columns = (torch.arange(x.shape[-2], device=x.device) for x in (query, key))
    return rows[:, None] >= columns[None]


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Without sizes that depend on values: the i-th True reads the i-th element of ``source``."""
    mask = mask.expand_as(x)
    position = mask.flatten().to(torch.int64).cumsum(0) - 1
    last = source.numel() - 1
    return torch.where(mask, source.flatten()[position.clamp(0, last)].view(x.shape), x)


def _scatter_reduce(
    x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """A mean is a sum over a count: the exporter writes a mean as a plain scatter, which is wrong."""
    if reduce != "mean":
        return NotImplemented
    ones = torch.ones_like(src)
    start, count = (x, torch.ones_like(x)) if include_self else (torch.zeros_like(x), torch.zeros_like(x))
    total = start.scatter_add(dim, index, src)
    count = count.scatter_add(dim, index, ones)
    return total / count if include_self else torch.where(count > 0, total / count.clamp_min(1), x)


def _mean(x: Tensor, dims: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """Over one dimension in the middle, a matrix product: ONNX Runtime reduces there several times more slowly."""
    if x.dtype is not torch.float32 or dtype is not None or not dims or len(dims) > 1:
        return NotImplemented
    dim = dims[0] % x.dim()
    if not 0 < dim < x.dim() - 1 or not isinstance(x.shape[dim], int):
        return NotImplemented
    shape = [*x.shape[:dim], *[1] * keepdim, *x.shape[dim + 1 :]]
    return (x.new_full((1, x.shape[dim]), 1 / x.shape[dim]) @ x.flatten(dim + 1)).reshape(shape)


def _fold(
    x: Tensor, output_size: list[int], kernel_size: list[int], dilation: list[int], padding: list[int],
    stride: list[int],
) -> Tensor:  # fmt: skip
    """Sums of overlapping patches, [B, C * k, L] or [C * k, L], as a transposed convolution: TensorRT has no Col2Im."""
    size = kernel_size[0] * kernel_size[1]
    axes = zip(output_size, kernel_size, dilation, padding, strict=True)
    room = [n + 2 * p - d * (k - 1) - 1 for n, k, d, p in axes]
    steps, beyond = zip(*((r // s + 1, r % s) for r, s in zip(room, stride, strict=True)), strict=True)
    patches = x.reshape(-1, size, *steps)
    weight = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *kernel_size)
    out = torch.nn.functional.conv_transpose2d(patches, weight, None, stride, padding, beyond, 1, dilation)
    return out.reshape(*x.shape[:-2], x.shape[-2] // size, *output_size)


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """ONNX's TopK is stable; what torch writes for a sort also computes the size that is known."""
    if not x.dim() or not isinstance(x.shape[dim], int):
        return NotImplemented
    return x.topk(x.shape[dim], dim, descending)


def _sort_stable(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return torch.sort(x, dim, descending)


def _distances(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Euclidean distances, from the differences: exact also where they are small."""
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1).sqrt() if p == 2 else NotImplemented
