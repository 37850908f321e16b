"""Floating-point operations of a program, counted on its shapes (2 per multiply-add)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
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


def _ours() -> dict[Any, Callable[[fx.Node, Shapes], float]]:
    import tokenopt.ops  # noqa: F401  (registers the operations)

    ops = torch.ops.tokenopt
    return {
        ops.attention.default: _attention,
        ops.attention_probe.default: _probe,
        ops.match_bipartite.default: _match,
        ops.merge_tokens.default: _merge,
        ops.nearest_tokens.default: _nearest,
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
