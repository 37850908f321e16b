"""Operations that keep their name in an ONNX file: a node of the domain ``tokenopt``, and a function that is its body.

A runtime that knows the operation claims the node; every other one runs the function. Nodes that are alike share one.
On a CPU, the function of a large attention goes head by head, so that what lies between its products stays in the
cache.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenopt.ops import attentions, references

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "tokenopt"
_BATCH = 2  # of the example that a body is traced with
_TILED = ("tiled_attention", "neighborhood_attention", "pooled_tiled_attention")
_LOOPED = 2**15  # logits of a head, at least: a loop costs ONNX Runtime tens of microseconds for each
_DTYPES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "DOUBLE": "float64", "INT64": "int64",
           "BOOL": "bool"}  # fmt: skip


def named() -> dict[Any, Callable[..., Tensor]]:
    """Operation -> one node of its name: attention with a pattern. Dense attention is what runtimes know."""
    patterns = attentions() - {torch.ops.tokenopt.attention.default}
    return {target: _node(target) for target in patterns}


def _node(target: Any) -> Callable[..., Tensor]:
    name = target._schema.name.removeprefix(f"{DOMAIN}::")
    positional = [a.name for a in target._schema.arguments if not a.kwarg_only]

    def call(*args: Any, **kwargs: Any) -> Tensor:
        from torch.onnx import ops as onnx_ops

        given = dict(zip(positional, args, strict=False)) | {k: v for k, v in kwargs.items() if k in positional}
        inputs = [given.get(argument) for argument in positional]
        while inputs[-1] is None:
            inputs.pop()
        query, _, value = inputs[:3]
        attributes = {k: _plain(v) for k, v in kwargs.items() if k not in positional and v is not None}
        shape = (*query.shape[:-1], value.shape[-1])
        return onnx_ops.symbolic(f"{DOMAIN}::{name}", inputs, attributes, dtype=query.dtype, shape=shape)

    return call


def _plain(value: Any) -> Any:
    return [int(v) for v in value] if isinstance(value, (list, tuple)) else value


def add_functions(
    model: ir.Model, opset: int, cpu: bool, translate: Callable[[torch.export.ExportedProgram], ir.Model]
) -> None:
    """Gives every named node of a model its body.

    Args:
        cpu: whether the file is for a CPU.
        translate: writes a traced body in the operators of ONNX.
    """
    bodies: dict[Any, ir.Function] = {}
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        settings = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        key = (node.op_type, *map(_signature, node.inputs), *settings)
        if key not in bodies:
            number = sum(k[0] == node.op_type for k in bodies) + 1
            name = node.op_type if number == 1 else f"{node.op_type}_{number}"
            bodies[key] = _function(node, name, opset, cpu and _gains_by_head(node), translate)
            model.functions[bodies[key].identifier()] = bodies[key]
        node.op_type = bodies[key].name
    if bodies:
        model.opset_imports[DOMAIN] = 1


def _signature(value: ir.Value | None) -> Any:
    if value is None:
        return None
    return value.dtype, tuple(d if isinstance(d, int) else None for d in value.shape)


def _gains_by_head(node: ir.Node) -> bool:
    """Whether all heads of all samples do the same, in tiles, and much enough."""
    names = [a.name for a in _operation(node)._schema.arguments]
    shapes = {n: tuple(v.shape) for n, v in zip(names, node.inputs, strict=False) if v is not None}
    if node.op_type not in _TILED or "key_bias" in shapes:
        return False
    leading = [*shapes["queries"][:1], *(d for n in ("mask", "row_mask") for d in shapes.get(n, ())[:-3])]
    return all(d == 1 for d in leading) and prod(shapes["queries"]) * shapes["keys"][-1] >= _LOOPED


def _operation(node: ir.Node) -> Any:
    return getattr(torch.ops.tokenopt, node.op_type).default


def _function(node: ir.Node, name: str, opset: int, by_head: bool, translate: Callable[..., ir.Model]) -> ir.Function:
    import onnx_ir as ir

    graph = _body(node, by_head, translate)
    if by_head:
        graph = _over_heads(graph, [tuple(v.shape) for v in node.inputs[:3]])
    for i, (argument, value) in enumerate(zip(_operation(node)._schema.arguments, node.inputs, strict=False)):
        if value is None:  # an operand that is left out has its place all the same
            graph.inputs.insert(i, ir.Value())
        graph.inputs[i].name = argument.name
    graph.opset_imports[""] = opset
    attributes = [ir.Attr(key, attribute.type, None) for key, attribute in node.attributes.items()]
    return ir.Function(DOMAIN, name, graph=graph, attributes=attributes)


def _body(node: ir.Node, by_head: bool, translate: Callable[..., ir.Model]) -> ir.Graph:
    """The reference in the operators of ONNX, of the operands that are there; of one head, [N, D], or of all."""
    import onnx_ir as ir

    reference = references()[_operation(node)]
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    given = [value is not None for value in node.inputs]

    class Body(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            if by_head:
                tensors = (*(x[None, None] for x in tensors[:3]), *tensors[3:])
            left = iter(tensors)
            out = reference(*(next(left) if there else None for there in given), **settings)
            return out[0, 0] if by_head else out

    values = [v for v in node.inputs if v is not None]
    examples = [_example(v) for v in values]
    batch = torch.export.Dim("batch", min=1)
    dynamic = [{i: batch for i, d in enumerate(v.shape) if not isinstance(d, int)} for v in values]
    if by_head:
        examples[:3] = (x[0, 0] for x in examples[:3])
        dynamic[:3] = ({}, {}, {})
    exported = torch.export.export(Body(), tuple(examples), dynamic_shapes=(tuple(dynamic),), strict=False)
    graph = translate(exported).graph
    for constant in list(graph.initializers.values()):
        literal = ir.node("Constant", [], attributes={"value": constant.const_value})
        ir.convenience.replace_all_uses_with(constant, literal.outputs[0])
        graph.insert_before(graph[0], literal)
    graph.initializers.clear()
    graph.opset_imports.clear()
    for inner in graph:
        inner.metadata_props.clear()
    return graph


def _over_heads(head: ir.Graph, shapes: list[tuple[Any, ...]]) -> ir.Graph:
    """The graph of one head as the body of a loop over those of all samples.

    Args:
        shapes: of query, key and value, [B, H, N, D].
    """
    import onnx_ir as ir

    nodes = []

    def add(operator: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        name = f"outer_{len(nodes)}"  # unlike those in the loop
        nodes.append(ir.node(operator, inputs, attributes=attributes, outputs=[ir.Value(name=name)]))
        return nodes[-1].outputs[0]

    def reshape(value: ir.Value, *shape: int) -> ir.Value:
        return add("Reshape", [value, add("Constant", [], value_ints=shape)])

    arguments = [ir.Value() for _ in head.inputs]
    whole = arguments[: len(shapes)]
    for inner, outer in list(zip(head.inputs, arguments, strict=True))[len(shapes) :]:  # tables, read from within
        ir.convenience.replace_all_uses_with(inner, outer)
    del head.inputs[len(shapes) :]
    head.name = "head"
    heads = [reshape(value, -1, *shape[2:]) for value, shape in zip(whole, shapes, strict=True)]
    out = add("Scan", heads, body=head, num_scan_inputs=len(heads))
    out = reshape(out, -1, *shapes[0][1:3], shapes[2][3])
    return ir.Graph(arguments, [out], nodes=nodes)


def _example(value: ir.Value) -> Tensor:
    shape = [d if isinstance(d, int) else _BATCH for d in value.shape]
    return torch.zeros(shape, dtype=getattr(torch, _DTYPES[value.dtype.name]))
