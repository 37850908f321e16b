"""fold-constants: evaluates what does not depend on the inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tokenopt.analysis.axes import AxisMap, propagate, tensor_operands
from tokenopt.graph import GraphEditor, infer_shapes, module_path, remove_dead
from tokenopt.pipeline import Pass, PassResult
from tokenopt.program import Edit, Program

aten = torch.ops.aten
_VIEWS = {
    "view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select", "clone",
    "alias", "contiguous", "detach", "_to_copy", "to", "unbind", "split", "split_with_sizes", "getitem", "chunk",
}  # fmt: skip


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replaces input-independent subgraphs by constants: relative-position bias gathers, RoPE tables, masks.

    A value that differs only by being repeated over the batch becomes one row, expanded. Plain views of weights stay.
    What is read of a stack, as some of the intermediate outputs of an encoder, is read from its parts, so that the
    others need not be computed. What has the dtype of another value has it without that value.

    Rewrite:  index(table, relative_index).view(N, N, H).permute(2, 0, 1)  ->  constant [H, N, N]
    """

    name: ClassVar[str] = "fold-constants"
    max_elements: int = 2**26

    def run(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        _read_parts(editor)
        _read_dtypes(editor)
        axes = propagate(program)
        evaluator = _Evaluator(program)
        result = PassResult()
        if _fold_scalars(program, axes, evaluator):
            infer_shapes(program)
            axes = propagate(program)
        for node in list(program.graph.nodes):
            value = node.meta.get("val")
            if node.op != "call_function" or node in axes.data or not isinstance(value, Tensor):
                continue
            if not any(u in axes.data or u.op == "output" for u in node.users) or not evaluator.computes(node):
                continue
            folded = self._fold(node, value, evaluator)
            if folded is None:
                continue
            constant = editor.constant("folded", folded)
            new = constant
            if tuple(constant.meta["val"].shape) != tuple(value.shape):
                rows = editor.rows()
                shape = [rows if not isinstance(s, int) else -1 for s in value.shape]
                new = editor.insert(node, aten.expand.default, constant, shape)
            node.replace_all_uses_with(new)
            result.edits.append(Edit(self.spec, module_path(node) or node.name))
        editor.finish()
        return result

    def _fold(self, node: fx.Node, value: Tensor, evaluator: _Evaluator) -> Tensor | None:
        dynamic = [i for i, s in enumerate(value.shape) if not isinstance(s, int)]
        if len(dynamic) > 1 or (dynamic and str(value.shape[dynamic[0]]) != evaluator.symbol):
            return None
        if not dynamic:
            if value.numel() > self.max_elements:
                return None
            one, two = evaluator(node, 2), evaluator(node, 3)
            return one.clone() if one is not None and two is not None and torch.equal(one, two) else None
        one, two = evaluator(node, 2), evaluator(node, 3)
        if one is None or two is None or one.numel() > self.max_elements:
            return None
        row = one.narrow(dynamic[0], 0, 1)
        same = all(torch.equal(row.expand_as(part), part) for part in (one, two))
        return row.clone() if same else None


def _read_parts(editor: GraphEditor) -> None:
    """Reads of a stack along the stacked dimension become reads of its parts."""
    for node in list(editor.graph.nodes):
        source = node.args[0] if node.op == "call_function" and node.args else None
        if node.target is operator.getitem and isinstance(source, fx.Node) and source.target is aten.unbind.int:
            parts = _parts(source.args[0], _dim(source, 1))
            new = parts[node.args[1]] if parts else None
        elif node.target is aten.select.int and isinstance(node.args[2], int):
            parts = _parts(source, node.args[1])
            new = parts[node.args[2]] if parts else None
        elif node.target is aten.slice.Tensor and all(isinstance(a, int) for a in node.args[1:]):
            dim = _dim(node, 1)
            parts = _parts(source, dim)
            chosen = parts[slice(*node.args[2:])] if parts else None
            whole = not chosen or len(chosen) == len(parts)
            new = None if whole else editor.insert(node, aten.stack.default, chosen, _stacked(source))
        elif node.target is aten.index.Tensor and sum(i is not None for i in node.args[1]) == 1:
            dim = next(i for i, n in enumerate(node.args[1]) if n is not None)
            parts, places = _parts(source, dim), _numbers(editor.program, node.args[1][dim])
            chosen = [parts[i] for i in places] if parts and places else None
            new = editor.insert(node, aten.stack.default, chosen, dim) if chosen else None
        else:
            continue
        if new is not None:
            node.replace_all_uses_with(new)
    remove_dead(editor.program)


def _read_dtypes(editor: GraphEditor) -> None:
    """A cast to the dtype of another value becomes a cast to that dtype: it is no function of the other's tokens."""
    for node in list(editor.graph.nodes):
        if node.target is aten.type_as.default:
            value, other = node.args
            dtype = other.meta["val"].dtype
            same = value.meta["val"].dtype is dtype
            node.replace_all_uses_with(value if same else editor.insert(node, aten.to.dtype, value, dtype))
    remove_dead(editor.program)


def _numbers(program: Program, node: fx.Node) -> list[int] | None:
    """The integers of a constant vector."""
    while node.target in (aten.clone.default, aten.lift_fresh_copy.default):
        node = node.args[0]
    value = program.constant(node)
    return value.tolist() if value is not None and value.dim() == 1 and value.dtype is torch.int64 else None


def _dim(node: fx.Node, index: int) -> int:
    return node.args[index] if len(node.args) > index else node.kwargs.get("dim", 0)


def _stacked(node: fx.Node) -> int:
    return _dim(node, 1) % node.meta["val"].dim()


def _parts(node: Any, dim: int) -> list[fx.Node] | None:
    """What a value is stacked from, if it is along a dimension."""
    if not isinstance(node, fx.Node) or node.target is not aten.stack.default:
        return None
    return list(node.args[0]) if dim % node.meta["val"].dim() == _stacked(node) else None


def _fold_scalars(program: Program, axes: AxisMap, evaluator: _Evaluator) -> bool:
    """Numbers read from constants become literals; tracing leaves them as sizes that only the data would decide."""
    found = False
    for node in list(program.graph.nodes):
        if node.target not in _ITEM or node.args[0] in axes.data:
            continue
        one, two = evaluator(node.args[0], 2), evaluator(node.args[0], 3)
        if one is None or two is None or not torch.equal(one, two):
            continue
        number = one.item()
        for user in list(node.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), _substitute(node, number))
        found = True
    if found:
        remove_dead(program)
    return found


def _substitute(node: fx.Node, number: Any) -> Callable[[fx.Node], Any]:
    return lambda operand: number if operand is node else operand


class _Evaluator:
    """Computes input-independent values at a given batch size."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[tuple[fx.Node, int], Any] = {}
        self.symbol = program.batch_symbol

    def computes(self, node: fx.Node) -> bool:
        """Whether anything but a view happens between the weights and this value."""
        if node.op != "call_function":
            return False
        name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else "getitem"
        return name not in _VIEWS or any(self.computes(n) for n in tensor_operands(node))

    def __call__(self, node: fx.Node, batch: int) -> Any:
        key = (node, batch)
        if key not in self.values:
            self.values[key] = self._compute(node, batch)
        return self.values[key]

    def _compute(self, node: fx.Node, batch: int) -> Any:
        if node.op == "placeholder":
            value = self.program.constant(node)
            return value.detach() if value is not None else None
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return int(value.node.expr.subs({s: batch for s in value.node.expr.free_symbols}))
        if node.target in _RANDOM or not isinstance(node.target, torch._ops.OpOverload) and node.op != "call_function":
            return None
        args = fx.map_arg((node.args, node.kwargs), lambda n: self._operand(n, batch))
        if any(v is _MISSING for v in torch.utils._pytree.tree_leaves(args)):
            return None
        try:
            with torch.no_grad():
                return node.target(*args[0], **args[1])
        except (RuntimeError, IndexError):  # a subgraph that fixes one batch size has no value at another
            return None

    def _operand(self, node: fx.Node, batch: int) -> Any:
        value = self(node, batch)
        if value is None and isinstance(node.meta.get("val"), Tensor) and _shape_only(node):
            shape = [batch if not isinstance(s, int) else s for s in node.meta["val"].shape]
            return torch.empty(shape, dtype=node.meta["val"].dtype)
        return _MISSING if value is None else value


def _shape_only(node: fx.Node) -> bool:
    """Every reader takes its shape alone (zeros_like and its kin)."""
    return all("_like" in str(u.target) or ".new_" in str(u.target) or "sym_size" in str(u.target) for u in node.users)


_ITEM = (aten.item.default, aten._local_scalar_dense.default)
_MISSING = object()
_RANDOM = {aten.rand.default, aten.randn.default, aten.rand_like.default, aten.randn_like.default,
           aten.bernoulli.default, aten.empty.memory_format, aten.randperm.default}  # fmt: skip
