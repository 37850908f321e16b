"""Program: a captured model as a functional ATen graph, with its inputs, its example and its history."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind

from tokenopt.errors import AxisConflict, CaptureError
from tokenopt.staging import LastingFile

METADATA_FILE = "tokenopt.json"
METADATA_VERSION = 1


@dataclass(frozen=True)
class InputSpec:
    """One tensor the program takes: its name, dtype ("float32") and shape; a string is a dynamic size."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Edit:
    """One change a pass made: where, and the token counts before and after it (None where no tokens change)."""

    pass_spec: str
    site: str
    before: int | None = None
    after: int | None = None


@dataclass
class Program:
    """A captured model.

    ``exported`` is functional (no in-place operation), un-decomposed (attention, linear and norms are whole) and
    lifted (weights are placeholders). Passes mutate ``graph`` of a copy; everything else only reads. ``source`` is the
    module it was captured from, where there is one.
    """

    exported: ExportedProgram
    provenance: list[Edit] = field(default_factory=list)
    source: torch.nn.Module | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # a view assumes the memory layout it was traced with; under autograd or on a GPU, attention returns another
        for node in self.graph.nodes:
            if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                node.target = torch.ops.aten.reshape.default

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        return self.exported.graph

    @property
    def user_inputs(self) -> list[fx.Node]:
        """The placeholders of the user's tensors, in order."""
        names = set(self.exported.graph_signature.user_inputs)
        return [n for n in self.graph.nodes if n.op == "placeholder" and n.name in names]

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        nodes = [n for n in self.user_inputs if isinstance(n.meta.get("val"), Tensor)]
        return tuple(self._spec(n.name, n.meta["val"]) for n in nodes)

    @property
    def outputs(self) -> tuple[InputSpec, ...]:
        specs = (self._spec(name or f"output_{i}", n.meta["val"]) for i, (n, name) in enumerate(self._named_outputs))
        return tuple(specs)

    def _spec(self, name: str, value: Tensor) -> InputSpec:
        symbol = self.batch_symbol or "batch"
        shape = tuple(s if isinstance(s, int) else str(s).replace(symbol, "batch") for s in value.shape)
        return InputSpec(name, str(value.dtype).removeprefix("torch."), shape)

    @property
    def batch_symbol(self) -> str:
        """What tracing calls the dynamic batch size in the stored shapes; empty if it is static."""
        for node in self.user_inputs:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dim() and not isinstance(value.shape[0], int):
                return str(value.shape[0])
        return ""

    @property
    def output_nodes(self) -> list[fx.Node]:
        """The nodes whose tensors the program returns, in the order of the flattened result."""
        return [node for node, _ in self._named_outputs]

    @property
    def _named_outputs(self) -> list[tuple[fx.Node, str | None]]:
        """The nodes that are returned, with the names of those that a pass has added."""
        out = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        specs = self.exported.graph_signature.output_specs
        return [
            (node, spec.target if spec.kind is OutputKind.USER_OUTPUT else None)
            for node, spec in zip(out.args[0], specs, strict=True)
            if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)
        ]

    @property
    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (args, kwargs) that the model was captured with."""
        args, kwargs = self.exported.example_inputs or ((), {})
        return tuple(args), dict(kwargs)

    @property
    def dynamic_batch(self) -> bool:
        return any(spec.shape and isinstance(spec.shape[0], str) for spec in self.inputs)

    @property
    def digest(self) -> str:
        """A hash of graph and weights: equal programs have equal digests, also across saving and loading."""
        # reading a file orders the results of a call anew, and adds those that nothing reads
        nodes = (n for n in self.graph.nodes if n.users or n.op == "output")
        lines = sorted(f"{n.name} {n.op} {n.target} {n.args} {sorted(n.kwargs.items())}" for n in nodes)
        h = hashlib.sha256("\n".join(lines).encode())
        for name, value in sorted({**self.exported.state_dict, **self.exported.constants}.items()):
            h.update(name.encode())
            if isinstance(value, Tensor):
                h.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return h.hexdigest()[:16]

    def constant(self, node: fx.Node) -> Tensor | None:
        """The tensor behind a placeholder of a weight, buffer or constant; None for anything else."""
        if node.op != "placeholder":
            return None
        signature = self.exported.graph_signature
        for table in (
            signature.inputs_to_parameters,
            signature.inputs_to_buffers,
            signature.inputs_to_lifted_tensor_constants,
        ):
            if node.name in table:
                name = table[node.name]
                value = self.exported.state_dict.get(name)
                value = self.exported.constants.get(name) if value is None else value
                return value if isinstance(value, Tensor) else None
        return None

    # -- running -------------------------------------------------------------------------------------------------

    def module(self) -> torch.nn.Module:
        """The program as an ``nn.Module`` with the signature of the captured model."""
        with _quiet():
            return self.exported.module()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_module", None) is None:
            self._module = self.module()
        with torch.no_grad():
            return self._module(*args, **kwargs)

    def flat(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Runs the program and returns the tensors of its result, flattened, in order."""
        return flatten_tensors(self(*args, **kwargs))

    def bind(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (args, kwargs) of the captured signature with these tensors, in the order of ``inputs``."""
        leaves, spec = pytree.tree_flatten(self.example_inputs)
        fresh = iter(tensors)
        return pytree.tree_unflatten([next(fresh) if isinstance(v, Tensor) else v for v in leaves], spec)

    def complete(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors for the first inputs, and rows of the example for the others: those that a pass has added."""
        first = zip(tensors, self.inputs, strict=False)
        rows = next((len(t) for t, spec in first if spec.shape and isinstance(spec.shape[0], str)), None)
        others = flatten_tensors(self.example_inputs)[len(tensors) :]
        if rows is None:  # the batch is static
            return [*tensors, *others]
        return [*tensors, *(t[torch.arange(rows) % len(t)] for t in others)]

    def random_inputs(self, batch: int, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fresh random (args, kwargs) like the example, at the given batch size.

        Floating tensors are normal; integer and boolean tensors are rows of the example in random order, so that ids
        stay in range.
        """
        generator = torch.Generator().manual_seed(seed)
        example = self.example_inputs
        leaves, spec = pytree.tree_flatten(example)
        dynamic = {i for i, s in enumerate(self.inputs) if s.shape and isinstance(s.shape[0], str)}
        position = -1

        def fresh(value: Any) -> Any:
            nonlocal position
            if not isinstance(value, Tensor):
                return value
            position += 1
            rows = batch if position in dynamic else (value.shape[0] if value.dim() else None)
            if rows is None:
                return value
            pick = torch.randint(value.shape[0], (rows,), generator=generator)
            if value.dtype.is_floating_point:
                return torch.randn(rows, *value.shape[1:], generator=generator).to(value.dtype)
            return value[pick] if position in dynamic else value

        return pytree.tree_unflatten([fresh(v) for v in leaves], spec)

    # -- checking and printing -----------------------------------------------------------------------------------

    def verify(self) -> None:
        """Lints the graph and re-infers every shape with fake tensors.

        Raises:
            AxisConflict: if the graph is malformed or a stored shape differs from the inferred one.
        """
        from tokenopt.graph import infer_shapes

        try:
            self.graph.lint()
        except (RuntimeError, ValueError) as error:
            raise AxisConflict("the graph is malformed", why=str(error)) from error
        before = {n.name: _shape(n.meta.get("val")) for n in self.graph.nodes}
        infer_shapes(self)
        for node in self.graph.nodes:
            if before[node.name] is not None and before[node.name] != _shape(node.meta.get("val")):
                raise AxisConflict(
                    "a stored shape differs from the inferred one",
                    where=node.name,
                    why=f"stored {before[node.name]}, inferred {_shape(node.meta.get('val'))}",
                )

    def __str__(self) -> str:
        lines = [f"program({', '.join(f'{i.name}: {i.dtype}{list(i.shape)}' for i in self.inputs)})"]
        for node in self.graph.nodes:
            if node.op == "call_function":
                shape = _shape(node.meta.get("val"))
                name = str(node.target).removesuffix(".default")
                operands = ", ".join(_format(a) for a in node.args)
                extras = "".join(f", {k}={_format(v)}" for k, v in node.kwargs.items())
                lines.append(f"  %{node.name} = {name}({operands}{extras}) : {shape}")
        lines.append(f"  return {', '.join(f'%{n.name}' for n in self.output_nodes)}")
        return "\n".join(lines)

    # -- copying and storing -------------------------------------------------------------------------------------

    def clone(self) -> Program:
        """A copy whose graph may be mutated; weights are shared."""
        return Program(_rebuild(self.exported), list(self.provenance))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one ``.pt2`` file (an ExportedProgram plus our metadata); an existing file is replaced at the end."""
        path = Path(path)
        names = [spec.target for spec in self.exported.graph_signature.output_specs]  # which torch does not store
        metadata = {
            "version": METADATA_VERSION, "provenance": [asdict(e) for e in self.provenance], "outputs": names
        }  # fmt: skip
        with atomic_path(path) as partial, LastingFile(partial) as file, _quiet():
            torch.export.save(self.exported, file, extra_files={METADATA_FILE: json.dumps(metadata)})
        return path


def capture(
    model: torch.nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    *,
    dynamic_batch: bool = True,
) -> Program:
    """Traces a model to a Program.

    Args:
        model: any module that ``torch.export`` can trace; it is put in eval mode, its weights are shared.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. Batch dimension first.
        dynamic_batch: let the first dimension of every tensor input vary from 1 on.

    Raises:
        CaptureError: if the model cannot be traced, or only with a fixed batch size.
    """
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    args = () if kwargs else tuple(example_inputs)
    model = model.eval()
    shapes = None
    if dynamic_batch:
        args, kwargs = pytree.tree_map_only(Tensor, _at_least_two_rows, (args, kwargs))
        batch = Dim("batch", min=1)
        shapes = pytree.tree_map(
            lambda v: ({0: batch} if v.dim() else {}) if isinstance(v, Tensor) else None, (args, kwargs)
        )
        shapes = {**dict(zip(_positional_names(model, len(args)), shapes[0], strict=True)), **shapes[1]}
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(model, args, kwargs or None, dynamic_shapes=shapes, strict=False)
            exported = functional(exported)
    except Exception as error:  # torch.export raises anything, from any depth of the user's model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fixed = dynamic_batch and ("onstraint" in str(error) or "specializ" in str(error))
        raise CaptureError(
            "the model cannot be captured",
            where=type(model).__name__,
            why=f"{type(error).__name__}: {reason}",
            hint="pass dynamic_batch=False (--static-batch)"
            if fixed
            else "check that the model runs on the example inputs, and see torch.export's documentation",
        ) from error
    program = Program(exported, source=model)
    if dynamic_batch and not program.dynamic_batch:
        raise CaptureError(
            "the batch dimension did not stay dynamic",
            where=type(model).__name__,
            why="the model's code fixes it",
            hint="pass dynamic_batch=False (--static-batch)",
        )
    return program


def flatten_tensors(result: Any) -> list[Tensor]:
    """The tensors of a (nested) model result, in pytree order.

    It is made again first: a ``ModelOutput`` of transformers has its fields in the order in which they were set, and
    made from these again in another one, that of its class.
    """
    leaves, spec = pytree.tree_flatten(result)
    return [v for v in pytree.tree_leaves(pytree.tree_unflatten(leaves, spec)) if isinstance(v, Tensor)]


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The program without operations that change their operands; it returns what it did, in an order that lasts.

    Making it runs the program, and flattens what its result is made again to (see `flatten_tensors`), but keeps the
    structure of before: fields would change places.
    """
    out = next(n for n in reversed(exported.graph.nodes) if n.op == "output")
    specs, root = exported.graph_signature.output_specs, exported.module_call_graph[0].signature
    given = [i for i, spec in enumerate(specs) if spec.kind is OutputKind.USER_OUTPUT]
    values = [_distinct(out.args[0][i]) for i in given]
    try:
        again = pytree.tree_unflatten(values, root.out_spec)
    except Exception:  # of a class of the model's; what follows makes it too, and says so
        return exported.run_decompositions({})
    left = dict(zip(given, values, strict=True))
    order = []
    for leaf in pytree.tree_leaves(again):
        order.append(next(i for i, value in left.items() if value is leaf))
        del left[order[-1]]
    if order != given:
        new = dict(zip(given, order, strict=True))
        out.args = (tuple(out.args[0][new.get(i, i)] for i in range(len(specs))),)
        specs[:] = [specs[new.get(i, i)] for i in range(len(specs))]
        root.outputs[:] = [root.outputs[given.index(i)] for i in order] if root.outputs else []
        root.out_spec = pytree.tree_structure(again)
        exported.graph_module.recompile()
    return exported.run_decompositions({})


def _distinct(result: Any) -> Any:
    """What a result of a graph holds; of one that is returned twice, another object each time."""
    value = result.meta.get("val") if isinstance(result, fx.Node) else result
    return value.detach() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it replaces ``path`` only if the block succeeds, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _rebuild(exported: ExportedProgram) -> ExportedProgram:
    """A copy of the exported program with its own graph and signature; values, weights and example are shared."""
    import copy

    graph_module = exported.graph_module
    graph = fx.Graph()
    outputs = graph.graph_copy(graph_module.graph, mapping := {})
    old_output = next(n for n in reversed(graph_module.graph.nodes) if n.op == "output")
    graph.output(outputs).meta.update(old_output.meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        new.name = old.name  # fx renames a placeholder called "input"; the signature does not
    return ExportedProgram(
        root=graph_module,
        graph=graph,
        graph_signature=copy.deepcopy(exported.graph_signature),
        state_dict=dict(exported.state_dict),
        range_constraints=dict(exported.range_constraints),
        module_call_graph=copy.deepcopy(exported.module_call_graph),
        example_inputs=exported.example_inputs,
        constants=dict(exported.constants),
        verifiers=exported.verifiers,
    )


def _positional_names(model: torch.nn.Module, count: int) -> list[str]:
    import inspect

    names = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(
                "the model's forward takes *args",
                where=type(model).__name__,
                why="its inputs have no names",
                hint="wrap it in a module whose forward names its inputs",
            )
        names.append(name)
    return names[:count]


def _at_least_two_rows(value: Tensor) -> Tensor:
    """torch.export specialises a dimension whose example is 1."""
    if value.dim() and value.shape[0] == 1:
        return torch.cat([value, value])
    return value


def _shape(value: Any) -> list[str] | None:
    return [str(s) for s in value.shape] if isinstance(value, Tensor) else None


def _format(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_format(v) for v in value)}]"
    return str(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns about its own internals; what matters to the user is raised as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
