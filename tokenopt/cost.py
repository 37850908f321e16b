"""Floating-point operations of a program, counted on its shapes (2 per multiply-add)."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, fx

from tokenopt.program import Program

aten = torch.ops.aten


def node_flops(node: fx.Node, batch: int = 1) -> float:
    """Operations of one call: matrix products, convolutions and attention; 0 for the rest, which is not compute."""
    counter = _FLOPS.get(node.target)
    if counter is None or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
        return 0.0
    return counter(node, lambda n: _shape(n, batch))


def program_flops(program: Program, batch: int = 1) -> float:
    """Operations of one forward pass."""
    return sum(node_flops(n, batch) for n in program.graph.nodes if n.op == "call_function")


def _shape(value: Any, batch: int) -> tuple[int, ...]:
    value = value.meta["val"] if isinstance(value, fx.Node) else value
    sizes = []
    for s in value.shape:
        expr = None if isinstance(s, int) else s.node.expr
        sizes.append(s if expr is None else int(expr.subs({x: batch for x in expr.free_symbols})))
    return tuple(sizes)


Shapes = Callable[[Any], tuple[int, ...]]


def _linear(node: fx.Node, shape: Shapes) -> float:
    return 2.0 * prod(shape(node)) * shape(node.args[1])[-1]


def _product(a: int) -> Callable[[fx.Node, Shapes], float]:
    return lambda node, shape: 2.0 * prod(shape(node)) * shape(node.args[a])[-1]


def _einsum(node: fx.Node, shape: Shapes) -> float:
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    sizes: dict[str, int] = {}
    if "." in equation:
        return 2.0 * prod(shape(node))
    for letters, operand in zip(equation.split("->")[0].split(","), operands, strict=True):
        sizes.update(zip(letters, shape(operand), strict=True))
    return 2.0 * prod(sizes.values())


def _convolution(node: fx.Node, shape: Shapes) -> float:
    weight = shape(node.args[1])
    return 2.0 * prod(shape(node)) * prod(weight[1:])


def _attention(node: fx.Node, shape: Shapes) -> float:
    query, key, value = (shape(n) for n in node.args[:3])
    return 2.0 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _tiles(node: fx.Node, shape: Shapes) -> float:
    query, key, value = (shape(n) for n in node.args[:3])
    _, tiles, size = shape(node.args[3])
    pairs = tiles * size * shape(node.args[4])[-1] + shape(node.args[6])[0] * key[-2]
    return 2.0 * prod(query[:2]) * pairs * (query[-1] + value[-1])


def _pooling(node: fx.Node, features: int) -> float:
    """Pooling of a grid with so many features per token, axis by axis."""
    total, left = 0.0, prod(node.kwargs["grid"])
    for size, cells in zip(node.kwargs["grid"], node.kwargs["cells"], strict=True):
        total += 2.0 * left * cells * features if cells != size else 0.0
        left = left // size * cells
    return total


def _pooled(node: fx.Node, shape: Shapes) -> float:
    query, key, value = (shape(n) for n in node.args[:3])
    count = prod(node.kwargs["grid"])
    others = query[-2] - count
    pairs = others * key[-2] + count * (others + prod(node.kwargs["cells"]))
    width = query[-1] + value[-1]
    return 2.0 * prod(query[:2]) * pairs * width + _pooling(node, prod(query[:2]) * width)


def _pooled_tiles(node: fx.Node, shape: Shapes) -> float:
    key, value = (shape(n) for n in node.args[1:3])
    width = prod(key[:2]) * (key[-1] + value[-1])
    rows = 2.0 * width * prod(node.kwargs["cells"]) * shape(node.args[6])[0]
    return _tiles(node, shape) + rows + _pooling(node, width)


def _agents(node: fx.Node, shape: Shapes) -> float:
    query, key, value = (shape(n) for n in node.args[:3])
    count, agents = prod(node.kwargs["grid"]), prod(node.kwargs["cells"])
    pairs = agents * (key[-2] + count) + (query[-2] - count) * key[-2]
    return 2.0 * prod(query[:2]) * pairs * (query[-1] + value[-1]) + _pooling(node, prod(query[:2]) * query[-1])


def _listed(node: fx.Node, shape: Shapes, blocks: int) -> float:
    """Attention of blocks of queries over lists of so many blocks of keys and the tokens in no block."""
    query, key, value = (shape(n) for n in node.args[:3])
    first = 4 if node.target is torch.ops.tokenopt.block_sparse_attention.default else 3
    (tiles, size), (_, length), _, (rows,) = (shape(n) for n in node.args[first : first + 4])
    pairs = tiles * size * (blocks * length + rows) + rows * key[-2]
    return 2.0 * prod(query[:2]) * pairs * (query[-1] + value[-1])


def _block_sparse(node: fx.Node, shape: Shapes) -> float:
    return _listed(node, shape, shape(node.args[3])[-1])


def _routed(node: fx.Node, shape: Shapes) -> float:
    query = shape(node.args[0])
    pooled = prod(query) + prod(shape(node.args[1]))
    scores = shape(node.args[3])[0] * shape(node.args[4])[0] * query[0] * query[1] * query[-1]
    return _listed(node, shape, node.kwargs["topk"]) + 2.0 * (pooled + scores)


def _predicted(node: fx.Node, shape: Shapes) -> float:
    query, (tiles, size), (keys, _) = (shape(node.args[i]) for i in (0, 3, 4))
    (inner, small), (_, rank) = shape(node.args[7]), shape(node.args[9])
    low = (tiles * size + keys) * inner * small + keys * small * rank + tiles * (size * small + keys) * rank
    return _listed(node, shape, node.kwargs["topk"]) + 2.0 * query[0] * query[1] * low


def _sorted(node: fx.Node, shape: Shapes) -> float:
    count = node.kwargs["stop"] - node.kwargs["start"]
    return _tiles(node, shape) + 2.0 * shape(node.args[0])[0] * count * prod(shape(node.args[7]))


def _probe(node: fx.Node, shape: Shapes) -> float:
    key = shape(node.args[1])
    return 2.0 * prod(key) * node.args[5]


def _match(node: fx.Node, shape: Shapes) -> float:
    batch, total, inner = shape(node.args[0])
    return 2.0 * batch * (total / 2) ** 2 * inner


def _merge(node: fx.Node, shape: Shapes) -> float:
    batch, places = shape(node.args[2])
    return 2.0 * batch * places * shape(node.args[3])[1] * (shape(node.args[0])[-1] + 1)


def _nearest(node: fx.Node, shape: Shapes) -> float:
    batch, places = shape(node.args[1])
    return 2.0 * batch * places * shape(node.args[2])[1] * shape(node.args[0])[-1]


def _segment(node: fx.Node) -> int:
    """The free tokens of an operation on (..., start, stop)."""
    return node.args[-1] - node.args[-2]


def _received(node: fx.Node, shape: Shapes) -> float:
    return 2.0 * prod(shape(node.args[0])) * shape(node.args[1])[-2]


def _pairs(node: fx.Node, shape: Shapes) -> float:
    """Similarities of all free tokens with each other."""
    batch, _, inner = shape(node.args[0])
    return 2.0 * batch * _segment(node) ** 2 * inner


def _cut(node: fx.Node, shape: Shapes) -> float:
    batch, _, inner = shape(node.args[0])
    return 2.0 * batch * _segment(node) ** 2 * (inner + node.args[2] + 2)


def _entropy(node: fx.Node, shape: Shapes) -> float:
    batch, _, *sizes = shape(node.args[0])
    return 2.0 * batch * prod(sizes) * (isqrt(node.args[2] - 1) + 1) ** 2


def _mix(node: fx.Node, shape: Shapes) -> float:
    _, places, count = shape(node.args[1])
    total = shape(node.args[0])[node.args[2]] - count + places
    return 2.0 * prod(shape(node)) / total * places * count


def _association(node: fx.Node, shape: Shapes) -> float:
    batch, _, channels = shape(node.args[0])
    grid, cells, iterations = node.args[1:4]
    return 4.0 * batch * prod(grid) * prod(cells) * channels * iterations


def _neighbours(node: fx.Node, shape: Shapes) -> float:
    batch, places = shape(node.args[2])
    return 2.0 * batch * places * _segment(node) * shape(node.args[0])[-1]


def _match_partition(node: fx.Node, shape: Shapes) -> float:
    batch, _, inner = shape(node.args[0])
    return 2.0 * batch * shape(node.args[1])[-1] * shape(node.args[2])[-1] * inner if node.args[3] else 0.0


def _farthest(node: fx.Node, shape: Shapes) -> float:
    return _pairs(node, shape) if node.args[2] < _segment(node) else 0.0


def _dpp(node: fx.Node, shape: Shapes) -> float:
    batch, _, inner = shape(node.args[0])
    free, k = _segment(node), node.args[2]  # each step but the last projects on those chosen before
    return 2.0 * batch * free * (free * inner + (k - 1) * (k - 2) / 2) if k < free else 0.0


def _diverse(node: fx.Node, shape: Shapes) -> float:
    batch, _, inner = shape(node.args[1])
    free, (important, k) = _segment(node), node.args[2:4]
    return 2.0 * batch * free**2 * inner if important < k < free else 0.0


def _contextual(node: fx.Node, shape: Shapes) -> float:
    batch, _, inner = shape(node.args[1])
    dominant, contextual = node.args[2:4]
    return 2.0 * batch * (_segment(node) - dominant - contextual) * contextual * inner


def _kmeans(node: fx.Node, shape: Shapes) -> float:
    batch, _, inner = shape(node.args[0])
    free, (k, iterations) = _segment(node), node.args[1:3]
    return 2.0 * batch * k * inner * (2 * iterations * free + free - k)


def _ours() -> dict[Any, Callable[[fx.Node, Shapes], float]]:
    import tokenopt.ops  # noqa: F401  (registers the operations)

    ops = torch.ops.tokenopt
    return {
        ops.attention.default: _attention,
        ops.tiled_attention.default: _tiles,
        ops.neighborhood_attention.default: _tiles,
        ops.pooled_attention.default: _pooled,
        ops.pooled_tiled_attention.default: _pooled_tiles,
        ops.region_attention.default: _attention,
        ops.agent_attention.default: _agents,
        ops.block_sparse_attention.default: _block_sparse,
        ops.routed_attention.default: _routed,
        ops.predicted_attention.default: _predicted,
        ops.sorted_attention.default: _sorted,
        ops.attention_probe.default: _probe,
        ops.match_bipartite.default: _match,
        ops.merge_tokens.default: _merge,
        ops.nearest_tokens.default: _nearest,
        ops.attention_received.default: _received,
        ops.token_energy.default: _pairs,
        ops.ncut_partition.default: _cut,
        ops.patch_entropy.default: _entropy,
        ops.mix_tokens.default: _mix,
        ops.soft_association.default: _association,
        ops.neighbour_weights.default: _neighbours,
        ops.match_partition.default: _match_partition,
        ops.match_threshold.default: lambda node, shape: _pairs(node, shape) / 4,
        ops.best_partners.default: lambda node, shape: _pairs(node, shape) / 4,
        ops.select_farthest.default: _farthest,
        ops.select_dpp.default: _dpp,
        ops.select_diverse.default: _diverse,
        ops.select_contextual.default: _contextual,
        ops.cluster_kmeans.default: _kmeans,
        ops.cluster_density.default: _pairs,
    }


_FLOPS: dict[Any, Callable[[fx.Node, Shapes], float]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _product(0),
    aten.bmm.default: _product(0),
    aten.mm.default: _product(0),
    aten.baddbmm.default: _product(1),
    aten.addmm.default: _product(1),
    aten.einsum.default: _einsum,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.scaled_dot_product_attention.default: _attention,
    **_ours(),
}


# -- time, modelled ----------------------------------------------------------------------------------------------------

_RATES = {  # operations and bytes per second, and seconds that starting an operation takes
    "cpu": (50e9, 20e9, 2e-6),
    "gpu": (20e12, 500e9, 5e-6),
}


def roofline_ms(program: Program, batch: int = 1, kind: str = "gpu") -> float:
    """Milliseconds of one forward pass by the roofline model: what computes waits for operations or bytes.

    What has no operations is taken to be fused with what has. The rates are those of a common processor ("cpu": one
    core, "gpu": a small card), so that ratios mean more than milliseconds.

    Source: Williams et al., Roofline, CACM 52(4), 2009.
    """
    operations, bandwidth, start = _RATES[kind]
    seconds = 0.0
    for node in program.graph.nodes:
        flops = node_flops(node, batch) if node.op == "call_function" else 0.0
        if flops:
            seconds += max(flops / operations, _bytes(node, batch) / bandwidth) + start
    return 1e3 * seconds


def _bytes(node: fx.Node, batch: int) -> float:
    """What a call reads and writes."""
    tensors = [n for n in (node, *node.all_input_nodes) if isinstance(n.meta.get("val"), Tensor)]
    return sum(prod(_shape(n, batch)) * n.meta["val"].element_size() for n in tensors)
