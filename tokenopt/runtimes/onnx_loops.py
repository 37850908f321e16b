"""Attention in tiles on a CPU: a loop over the heads of all samples, and in it one over a few tiles at a time.

What lies between the products, keys gathered for each tile and scores, stays in the cache. All heads at once, it goes
through memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokenopt.ops import tiles

if TYPE_CHECKING:
    import onnx_ir as ir

_TILED = ("tiled_attention", "neighborhood_attention")
_LOGITS = 2**16  # of a head, at least: a loop costs ONNX Runtime tens of microseconds for each, more with many threads
_KEYS = 2**13  # that a step gathers, at most: with 64 features, 4 MiB of keys and values

Trace = Callable[[Callable[..., Tensor], list[Tensor]], "ir.Graph"]


def pays(operation: str, shapes: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether all heads of all samples do the same in tiles, and much enough.

    Args:
        shapes: of the operands that are there.
    """
    if operation not in _TILED or "key_bias" in shapes:
        return False
    leading = [*shapes["queries"][:1], *shapes.get("mask", ())[:-3], *shapes.get("row_mask", ())[:-2]]
    return all(d == 1 for d in leading) and prod(shapes["queries"]) * shapes["keys"][-1] >= _LOGITS


def looped(operands: Mapping[str, Tensor], scale: float | None, trace: Trace) -> ir.Graph:
    """`tiled_attention` with its operands as inputs, in order.

    Args:
        operands: examples of those that are there, by name, of any batch.
        trace: writes a function of examples in the operators of ONNX.
    """
    import onnx_ir as ir

    three = [operands[name][0, 0] for name in ("query", "key", "value")]
    scale = three[0].shape[-1] ** -0.5 if scale is None else scale
    parts = _parts(operands)
    rest = [name for name in ("order", "rows", "row_mask") if name in operands]

    def step(query: Tensor, key: Tensor, value: Tensor, *few: Tensor) -> Tensor:
        of = {"mask": None, "absent": None} | dict(zip(parts, few, strict=True))
        absent = None if of["absent"] is None else of["absent"][None]
        q, k, v = (x[None, None] for x in (query, key, value))
        return tiles.of_tiles(q, k, v, of["queries"][None], of["keys"][None], of["mask"], absent, None, scale)[0, 0]

    def head(query: Tensor, key: Tensor, value: Tensor, out: Tensor, *others: Tensor) -> Tensor:
        of = {"row_mask": None} | dict(zip(rest, others, strict=True))
        out, q, k, v = (x[None, None] for x in (out, query, key, value))
        return tiles.placed(out, q, k, v, of["order"], of["rows"], of["row_mask"], None, scale)[0, 0]

    inner = trace(step, [*three, *(x[0] for x in parts.values())])
    out = three[2].new_zeros(operands["queries"].numel(), three[2].shape[1])
    outer = trace(head, [*three, out, *(operands[name] for name in rest)])
    inputs = {name: ir.Value(name=name) for name in operands}
    _rename(inner, "step")
    _rename(outer, "head")

    _capture(inner, slice(0, 3), outer.inputs[:3])
    within = _Nodes("step")
    tables = _Nodes("table")
    found = within.scan([tables.reshape(inputs[name], *x.shape) for name, x in parts.items()], inner)
    found = within.reshape(found, *out.shape)
    for node in reversed(within.nodes):
        outer.insert_before(outer[0], node)
    _capture(outer, slice(3, None), [found, *(inputs[name] for name in rest)])

    result = tables.scan([tables.reshape(v, -1, *x.shape) for v, x in zip(inputs.values(), three, strict=False)], outer)
    result = tables.reshape(result, -1, operands["query"].shape[1], three[0].shape[0], out.shape[1])
    return ir.Graph(list(inputs.values()), [result], nodes=tables.nodes)


def _parts(operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tables of tiles, a few of these at a time, [steps, tiles, ...]; all at once where their number has no such
    divisor."""
    _, count, size = operands["keys"].shape
    wanted = -(-count * size // _KEYS)
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    steps = next((n for n in divisors if wanted <= n <= 4 * wanted), max(n for n in divisors if n <= wanted))
    found = {}
    for name in ("queries", "keys", "mask", "absent"):
        if name in operands:
            last = operands[name].shape[-2 if name == "mask" else -1 :]
            found[name] = operands[name].reshape(steps, count // steps, *last)
    return found


def _rename(graph: ir.Graph, prefix: str) -> None:
    """Names in a loop's body must be unlike those around it."""
    for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
        value.name = f"{prefix}_{value.name}"
    graph.name = prefix


def _capture(graph: ir.Graph, which: slice, values: Sequence[ir.Value]) -> None:
    """Inputs of a graph become values from around it."""
    import onnx_ir as ir

    for inner, outer in zip(graph.inputs[which], values, strict=True):
        ir.convenience.replace_all_uses_with(inner, outer)
    del graph.inputs[which]


class _Nodes:
    """New nodes, one after another."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def add(self, operator: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        import onnx_ir as ir

        output = ir.Value(name=f"{self.prefix}s_{len(self.nodes)}")
        self.nodes.append(ir.node(operator, inputs, attributes=attributes, outputs=[output]))
        return output

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        return self.add("Reshape", [value, self.add("Constant", [], value_ints=shape)])

    def scan(self, values: Sequence[ir.Value], body: ir.Graph) -> ir.Value:
        return self.add("Scan", values, body=body, num_scan_inputs=len(values))
