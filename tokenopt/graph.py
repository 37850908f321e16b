"""The only place that mutates graphs: insert, resize, add constants, re-infer shapes, remove what nothing reads."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument

from tokenopt.errors import AxisConflict
from tokenopt.program import Program

aten = torch.ops.aten
_EXAMPLE_BATCHES = 6, 10
_PLAIN = (Tensor, int, float, str, torch.SymInt, torch.dtype, type(None))
# On the device "meta" their kernels return other strides.
_LAYOUT_OF_DEVICE = (
    "tokenopt::attention", "aten::scaled_dot_product_attention", "aten::convolution", "aten::conv1d", "aten::conv2d",
    "aten::conv3d",
)  # fmt: skip


class GraphEditor:
    """Edits the graph of one program, keeping every node's stored value (``meta["val"]``) true.

    Args:
        program: it is mutated.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self.mode = fake_mode(program)
        self._values: dict[Any, Tensor] = {}

    def insert(self, after: fx.Node, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """A new call behind ``after`` (and behind every operand), with its value inferred.

        Args:
            like: the node whose module path the new one takes; ``after`` by default.
        """
        source = (like or after).meta
        while after.op == "placeholder" and after.next.op == "placeholder":
            after = after.next
        with self.graph.inserting_after(after):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: source[k] for k in ("nn_module_stack", "stack_trace", "torch_fn") if k in source}
        self.infer(node)
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One result of a call that has several."""
        import operator

        last = node
        while last.next.target is operator.getitem and last.next.args[0] is node:
            last = last.next
            if last.args[1] == index:
                return last
        return self.insert(last, operator.getitem, node, index)

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A new constant tensor of the program, as a placeholder before the user's inputs."""
        exported = self.program.exported
        specs = exported.graph_signature.input_specs
        taken = {s.target for s in specs} | {n.name for n in self.graph.nodes}
        target, count = name, 0
        while target in taken or f"c_{target}" in taken:
            count += 1
            target = f"{name}_{count}"
        first = self.program.user_inputs[0]
        position = next(i for i, s in enumerate(specs) if s.kind is InputKind.USER_INPUT)
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(f"c_{target}")
        node.meta["val"] = self.mode.from_tensor(value.detach(), static_shapes=True)
        specs.insert(position, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=node.name), target, None))
        exported.constants[target] = value.detach()
        return node

    def input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, example: Tensor | None = None) -> fx.Node:
        """One more input of the program, by keyword: [batch, *shape]. One that has the name already is taken.

        Args:
            example: one row of it; zeros by default.
        """
        exported, specs = self.program.exported, self.program.exported.graph_signature.input_specs
        for node in self.program.user_inputs:
            if node.name == name:
                return node
        first = next(n for n in self.program.user_inputs if isinstance(n.meta.get("val"), Tensor))
        size = first.meta["val"].shape[0]
        args, kwargs = exported.example_inputs or ((), {})
        leaf = next(v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor))
        row = torch.zeros(shape, dtype=dtype) if example is None else example
        with self.graph.inserting_after(self.program.user_inputs[-1]):
            node = self.graph.placeholder(name)
        with self.mode, self._no_new_symbols():
            node.meta["val"] = torch.empty((size, *shape), dtype=dtype)
        specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name=node.name), None, None))
        kwargs = {**kwargs, name: row[None].expand(leaf.shape[0], *shape).clone()}
        exported._example_inputs = (args, kwargs)
        root = exported.module_call_graph[0].signature
        root.inputs.append(TensorArgument(name=node.name))
        root.in_spec = pytree.tree_structure((args, kwargs))
        if root.forward_arg_names is not None:
            root.forward_arg_names.append(node.name)
        return node

    def infer(self, node: fx.Node) -> None:
        """Computes the stored value of one call from those of its operands."""
        operand = lambda n: n.meta["val"]  # noqa: E731
        args, kwargs = fx.map_arg(node.args, operand), fx.map_arg(node.kwargs, operand)
        if isinstance(node.target, torch._ops.OpOverload):
            node.meta["val"] = self._infer_by_example(node.target, args, kwargs)
            if node.meta["val"] is not None:
                return
        try:
            # the Python dispatcher: C++ kernels of some operations would fix the batch size
            with self.mode, self._no_new_symbols(), enable_python_dispatcher(), torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)
        except Exception as error:  # fake kernels raise anything
            raise AxisConflict(
                "the rewritten graph does not fit together",
                where=f"{node.name} ({module_path(node) or node.target})",
                why=f"{node.target}: {str(error).splitlines()[0]}",
                hint="please report this model: the analysis should have refused it",
            ) from error

    def _infer_by_example(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The value of an operation, from runs without data at two batch sizes; None where they do not tell.

        To follow the symbol of the batch through every step of an operation takes far longer.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [v for v in leaves if isinstance(v, Tensor)]
        devices = {v.device for v in tensors}
        if not all(isinstance(v, _PLAIN) for v in leaves) or len(devices) != 1:
            return None
        (device,) = devices
        sizes = [s for v in tensors for s in v.shape]
        batch = next((s for s in sizes if isinstance(s, torch.SymInt) and s.node.expr.is_Symbol), None)

        def example(rows: int) -> Any:
            number = lambda s: int(s.node.expr.subs(batch.node.expr, rows)) if isinstance(s, torch.SymInt) else s  # noqa: E731
            like = lambda v: _Like(tuple(map(number, _layout(v))), v.dtype)  # noqa: E731
            of = lambda v: like(v) if isinstance(v, Tensor) else number(v)  # noqa: E731
            return _result(target, spec, tuple((type(v), of(v)) for v in leaves), device)

        try:
            few, many = map(example, _EXAMPLE_BATCHES)
        except Exception:  # where symbols are followed, the error is reported
            return None
        results, result_spec = pytree.tree_flatten(few)
        if not all(isinstance(r, _Like) for r in results):
            return None
        layouts = [
            [_symbolic(x, y, batch) for x, y in zip(a.layout, b.layout, strict=True)]
            for a, b in zip(results, pytree.tree_leaves(many), strict=True)
        ]
        if any(None in layout for layout in layouts):
            return None
        values = [self._value(layout, r.dtype, device) for layout, r in zip(layouts, results, strict=True)]
        return pytree.tree_unflatten(values, result_spec)

    def _value(self, layout: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A value without data; those that look alike are one."""
        key = (*(str(size) for size in layout), dtype, device)
        if key not in self._values:
            with self.mode:
                self._values[key] = _empty(layout, dtype, device)
        return self._values[key]

    def _no_new_symbols(self) -> contextlib.AbstractContextManager[Any]:
        """Sizes that only the data decides are not waited for by the next trace."""
        shapes = self.mode.shape_env
        return shapes.ignore_fresh_unbacked_symbols() if shapes is not None else contextlib.nullcontext()

    def rows(self) -> fx.Node | int:
        """The batch size: a node where it is dynamic, else an integer."""
        for placeholder in self.program.user_inputs:
            value = placeholder.meta.get("val")
            if isinstance(value, Tensor) and value.dim():
                if isinstance(value.shape[0], int):
                    return value.shape[0]
                for user in placeholder.users:
                    if user.target is aten.sym_size.int and user.args[1] == 0 and user.prev.op == "placeholder":
                        return user
                last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
                return self.insert(last, aten.sym_size.int, placeholder, 0)
        return 1

    def replace(self, old: fx.Node, new: fx.Node, *, keep: Iterable[fx.Node] = ()) -> None:
        """Lets every user of ``old`` behind it read ``new``, but for ``keep`` and ``new`` itself."""
        kept = {new, *keep}
        for user in list(old.users):
            if user not in kept:
                user.replace_input_with(old, new)

    def finish(self) -> None:
        """Removes what nothing reads and brings signature and code up to date; stored values are true already."""
        remove_dead(self.program)
        sync_outputs(self.program)


@dataclass(frozen=True)
class _Like:
    """A tensor without data: sizes and strides, one behind the other."""

    layout: tuple[int, ...]
    dtype: torch.dtype


@lru_cache(maxsize=2**14)  # layers are alike, and so are passes
def _result(target: Any, spec: pytree.TreeSpec, leaves: tuple[tuple[type, Any], ...], device: torch.device) -> Any:
    """What an operation gives for operands: tensors in it as `_Like`."""
    there = target._schema.name in _LAYOUT_OF_DEVICE
    where, without_data = (device, FakeTensorMode()) if there else ("meta", contextlib.nullcontext())
    with without_data, torch.no_grad():
        inputs = [_empty(v.layout, v.dtype, where) if isinstance(v, _Like) else v for _, v in leaves]
        args, kwargs = pytree.tree_unflatten(inputs, spec)
        found = target(*args, **kwargs)
    return pytree.tree_map(lambda v: _Like(tuple(_layout(v)), v.dtype) if isinstance(v, Tensor) else v, found)


def _layout(value: Tensor) -> tuple[Any, ...]:
    return (*value.shape, *value.stride())


def _empty(layout: Sequence[Any], dtype: torch.dtype, device: Any) -> Tensor:
    rank = len(layout) // 2
    return torch.empty_strided(layout[:rank], layout[rank:], dtype=dtype, device=device)


def _symbolic(few: int, many: int, batch: Any) -> Any:
    """A size that was seen at both example batches: constant, or a multiple of the batch; None for anything else."""
    first, second = _EXAMPLE_BATCHES
    if few == many:
        return few
    return few // first * batch if few % first == 0 and few * second == many * first else None


def fake_mode(program: Program) -> FakeTensorMode:
    """The fake-tensor mode that the program's stored values belong to."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    raise AxisConflict("the program holds no tensors")


def infer_shapes(program: Program) -> None:
    """Recomputes the stored value of every node, in order, with fake tensors.

    Raises:
        AxisConflict: naming the first operation whose operands do not fit.
    """
    editor = GraphEditor(program)
    for node in program.graph.nodes:
        if node.op == "call_function":
            editor.infer(node)
    sync_outputs(program)


def sync_outputs(program: Program) -> None:
    """Lets the signature name the nodes that the graph now returns."""
    out = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    for spec, node in zip(program.exported.graph_signature.output_specs, out.args[0], strict=True):
        if isinstance(node, fx.Node) and hasattr(spec.arg, "name"):
            spec.arg.name = node.name


def add_output(program: Program, node: fx.Node, name: str) -> None:
    """Returns one more tensor: the program's result becomes (result, tensor), or (result, ..., tensor).

    A name that is taken gets a number.
    """
    exported = program.exported
    specs = exported.graph_signature.output_specs
    more = any(s.kind is OutputKind.USER_OUTPUT and s.target for s in specs)  # the model's own have no name
    taken = {spec.name for spec in (*program.inputs, *program.outputs)}
    name = next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in taken)
    out = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    out.args = ((*out.args[0], node),)
    specs.append(OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=node.name), name))
    root = exported.module_call_graph[0].signature
    root.outputs.append(TensorArgument(name=node.name))
    results = root.out_spec.children() if more else [root.out_spec]
    root.out_spec = pytree.TreeSpec(tuple, None, [*results, pytree.tree_structure(0)])


def remove_dead(program: Program) -> int:
    """Erases calls and weights that nothing reads; returns how many. The user's inputs stay.

    Assertions on shapes and dtypes, which tracing leaves behind, go too: they hold by construction.
    """
    graph, exported = program.graph, program.exported
    removed = 0
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
            removed += 1
    specs = exported.graph_signature.input_specs
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    kept = []
    for spec in specs:
        node = placeholders.get(getattr(spec.arg, "name", ""))
        if spec.kind is not InputKind.USER_INPUT and node is not None and not node.users:
            graph.erase_node(node)
            removed += 1
        else:
            kept.append(spec)
    used = {s.target for s in kept if s.kind is not InputKind.USER_INPUT}
    specs[:] = kept
    for table in (exported.state_dict, exported.constants):
        for name in [n for n in table if n not in used]:
            del table[name]
    return removed


def module_path(node: fx.Node) -> str:
    """The path of the module that a node comes from (``blocks.3.attn``), or its own name."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path = list(stack.values())[-1][0].removeprefix("L['self'].").removeprefix("L['self']")
        if path:
            return path
    return ""


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)
