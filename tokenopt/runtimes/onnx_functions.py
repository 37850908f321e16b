"""Operations that keep their name in an ONNX file: a node of the domain ``tokenopt``, and a function that is its body.

A runtime that knows the operation claims the node; every other one runs the function. Nodes that are alike share one.
On a CPU, the function of a large attention in tiles is made of loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenopt.ops import attentions, references
from tokenopt.runtimes import onnx_loops

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "tokenopt"
_BATCH = 2  # of the example that a body is traced with
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
            bodies[key] = _function(node, name, opset, cpu, translate)
            model.functions[bodies[key].identifier()] = bodies[key]
        node.op_type = bodies[key].name
    if bodies:
        model.opset_imports[DOMAIN] = 1


def _signature(value: ir.Value | None) -> Any:
    if value is None:
        return None
    return value.dtype, tuple(d if isinstance(d, int) else None for d in value.shape)


def _function(node: ir.Node, name: str, opset: int, cpu: bool, translate: Callable[..., ir.Model]) -> ir.Function:
    import onnx_ir as ir

    operation = getattr(torch.ops.tokenopt, node.op_type).default
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    names = [a.name for a, _ in zip(operation._schema.arguments, node.inputs, strict=False)]
    values = {n: v for n, v in zip(names, node.inputs, strict=True) if v is not None}
    if cpu and onnx_loops.pays(node.op_type, {n: tuple(v.shape) for n, v in values.items()}):
        examples = {n: _example(v) for n, v in values.items()}
        graph = onnx_loops.looped(examples, settings.get("scale"), lambda call, given: _traced(call, given, translate))
    else:
        graph = _body(operation, settings, [*values], list(values.values()), translate)
    for i, argument in enumerate(names):
        if argument not in values:  # an operand that is left out has its place all the same
            graph.inputs.insert(i, ir.Value())
        graph.inputs[i].name = argument
    graph.opset_imports[""] = opset
    attributes = [ir.Attr(key, attribute.type, None) for key, attribute in node.attributes.items()]
    return ir.Function(DOMAIN, name, graph=graph, attributes=attributes)


def _body(
    operation: Any, settings: dict[str, Any], names: list[str], values: list[ir.Value], translate: Callable[..., Any]
) -> ir.Graph:
    """The reference of an operation in the operators of ONNX."""
    reference = references()[operation]

    def call(*tensors: Tensor) -> Tensor:
        return reference(**dict(zip(names, tensors, strict=True)), **settings)

    batch = torch.export.Dim("batch", min=1)
    dynamic = tuple({i: batch for i, d in enumerate(v.shape) if not isinstance(d, int)} for v in values)
    return _traced(call, [_example(v) for v in values], translate, dynamic)


def _traced(
    call: Callable[..., Tensor], examples: list[Tensor], translate: Callable[..., ir.Model], dynamic: Any = None
) -> ir.Graph:
    """A function of tensors in the operators of ONNX, without initializers: functions have none."""
    import onnx_ir as ir

    class Body(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return call(*tensors)

    shapes = None if dynamic is None else (dynamic,)
    graph = translate(torch.export.export(Body(), tuple(examples), dynamic_shapes=shapes, strict=False)).graph
    for constant in list(graph.initializers.values()):
        literal = ir.node("Constant", [], attributes={"value": constant.const_value})
        ir.convenience.replace_all_uses_with(constant, literal.outputs[0])
        graph.insert_before(graph[0], literal)
    graph.initializers.clear()
    graph.opset_imports.clear()
    for inner in graph:
        inner.metadata_props.clear()
    return graph


def _example(value: ir.Value) -> Tensor:
    shape = [d if isinstance(d, int) else _BATCH for d in value.shape]
    return torch.zeros(shape, dtype=getattr(torch, _DTYPES[value.dtype.name]))
