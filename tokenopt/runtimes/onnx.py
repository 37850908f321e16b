"""Program -> ONNX file, that any runtime for ONNX reads."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenopt.errors import LoweringError, UsageError
from tokenopt.program import Program
from tokenopt.runtimes.base import Capabilities, Engine, replacing
from tokenopt.runtimes.lowering import for_exporter, lower
from tokenopt.runtimes.onnx_functions import DOMAIN, add_functions

if TYPE_CHECKING:
    import onnx

OPSET = 20  # the newest that the releases of ONNX Runtime and TensorRT in use both take
OPSETS = range(18, 26)
INLINE_LIMIT = 2**31 - 2**24  # bytes: a protobuf message ends at 2 GiB, and the graph needs some of them

_MODULE_KEY = "module"


class Onnx:
    """An ONNX file for any runtime, with the weights beside it (``model.onnx.data``) if they exceed 2 GiB.

    ONNX Runtime checks it.
    """

    name = "onnx"
    suffix = ".onnx"
    capabilities = Capabilities()

    def available(self) -> str | None:
        return None

    def _for_cpu(self) -> bool:
        return False

    def build(
        self,
        program: Program,
        path: Path,
        *,
        opset: int = OPSET,
        cpu: bool | None = None,
        named: bool = True,
        tolerance: float | None = None,
        data: Sequence[Sequence[Tensor]] = (),
    ) -> Engine:
        """Writes the file, checks it, and compares it with the program in ONNX Runtime.

        Args:
            opset: version of the ONNX operators. From 23 on, attention is one node.
            cpu: whether the file is for a CPU, see `write`. By default, if ONNX Runtime will run it, without a GPU.
            named: attention with a pattern is one node, with a function as its body.
            tolerance: see `prove`.
            data: batches of inputs to compare on besides random ones and the example.

        Raises:
            LoweringError: if an operation cannot be expressed.
            ParityError: if the file computes something else.
        """
        from tokenopt.runtimes.compare import prove

        path = Path(path)
        cpu = self._for_cpu() if cpu is None else cpu
        with replacing(path, obsolete=[data_name(path)]) as staged:
            write(program, staged, opset, cpu, named)
            engine = self.load(staged)
            engine.parity = prove(program, engine, tolerance, data)
        engine.path = path
        return engine

    def load(self, path: Path, *, threads: int | None = None) -> Engine:
        """Opens the file in ONNX Runtime."""
        from tokenopt.runtimes.onnxruntime import open_session

        return open_session(path, threads=threads)


def data_name(path: Path) -> str:
    """The file beside ``path`` that holds weights too large for it."""
    return f"{path.name}.data"


def write(
    program: Program, path: Path, opset: int = OPSET, cpu: bool = False, named: bool = True, plugins: bool = False
) -> None:
    """Translates a program, and checks the file against the ONNX standard.

    Args:
        cpu: whether the file is for a CPU: logits have a floor, see `for_exporter`, and a large attention with a
            pattern is made of loops. On a GPU the one gains nothing, the other is slow, and TensorRT refuses it.
        named, plugins: see `for_exporter`. With plugins it is a file for TensorRT alone.

    Raises:
        LoweringError: if an operation cannot be expressed.
        UsageError: if there is no such opset.
    """
    import onnx
    import onnx_ir as ir

    if opset not in OPSETS:
        raise UsageError(f"the opset {opset} cannot be exported", hint=f"{OPSETS[0]} to {OPSETS[-1]}")
    with _quiet():
        model = _translate(program, opset, cpu, named, plugins)
        _tidy(model, program)
        if plugins:
            model.opset_imports[DOMAIN] = 1
        else:
            add_functions(model, opset, cpu, lambda body: _write(for_exporter(body, opset, cpu, named=False), opset))
        size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        ir.save(model, path, external_data=data_name(path) if size > INLINE_LIMIT else None)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise LoweringError("the exported model is not valid ONNX", where=str(path), why=_first_line(error)) from error


def _translate(program: Program, opset: int, cpu: bool, named: bool, plugins: bool) -> Any:
    """The program as a model of onnx_ir."""
    try:
        names = {"input_names": [s.name for s in program.inputs], "output_names": [s.name for s in program.outputs]}
        model = _write(lower(program, opset, cpu, named, plugins), opset, **names)
    except Exception as error:  # the exporter wraps whatever its converters raise
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        operation = next((found.group(1) for e in causes if (found := re.search(r"op='([\w.:]+)'", str(e)))), None)
        raise LoweringError(
            "the program cannot be written as ONNX",
            where=operation,
            why=f"{operation} has no ONNX form" if operation else _first_line(causes[-1]),
            hint="replace the operation in the model, or register a decomposition for it",
        ) from error
    if model.opset_imports[""] != opset:
        raise LoweringError(
            f"the model cannot be converted to opset {opset}",
            why=f"the exporter stopped at {model.opset_imports['']}",
            hint=f"use opset {OPSET}",
        )
    return model


def _write(exported: torch.export.ExportedProgram, opset: int, **names: list[str]) -> Any:
    return torch.onnx.export(exported, dynamo=True, opset_version=opset, verbose=False, **names).model


def _tidy(model: Any, program: Program) -> None:
    """Names the batch, and drops what the exporter notes for its own debugging, paths of this machine among it.

    The path of the module that a node comes from stays, for messages.
    """
    import onnx_ir as ir

    from tokenopt import __version__

    batch = program.batch_symbol

    def named(dim: Any) -> Any:
        text = getattr(dim, "value", dim)
        if not batch or not isinstance(text, str):
            return dim
        return ir.SymbolicDim(re.sub(rf"\b{batch}\b", "batch", text))

    model.producer_name, model.producer_version = "tokenopt", __version__
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        for node in graph:
            scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
            node.metadata_props.clear()
            if len(scopes) > 1 and scopes[-2]:
                node.metadata_props[_MODULE_KEY] = scopes[-2]
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        for value in values:
            value.metadata_props.clear()
            if value.shape is not None:
                value.shape = ir.Shape([named(dim) for dim in value.shape])


def require_expressible(model: onnx.ModelProto, capabilities: Capabilities, runtime: str) -> None:
    """Checks that a runtime can do what a model asks, so that the message names the node and not the parser's line.

    Raises:
        LoweringError: naming the first node that it cannot do, or would silently do wrong.
    """
    for graph, node in (pair for part in (model.graph, *model.functions) for pair in _nodes(part)):
        problem = _problem(graph, node, capabilities)
        if problem is not None:
            module = {entry.key: entry.value for entry in node.metadata_props}.get(_MODULE_KEY)
            raise LoweringError(
                f"{runtime} cannot run this model",
                where=f"{node.name} ({module})" if module else node.name,
                why=f"{node.op_type}: {problem[0]}",
                hint=problem[1],
            )


def _problem(graph: onnx.GraphProto, node: onnx.NodeProto, capabilities: Capabilities) -> tuple[str, str] | None:
    """Why a node cannot be run, and what to try."""
    import onnx

    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    reduction = attributes.get("reduction", b"none")
    if node.op_type in ("ScatterElements", "ScatterND") and reduction != b"none" and not capabilities.scatter_reduce:
        return f"it scatters with reduction {reduction.decode()!r}", "sum with a one-hot matrix product"
    if node.op_type in ("NonZero", "Unique", "Compress") and not capabilities.data_dependent_shapes:
        return "the size of its result depends on values", "use where, or topk with a fixed number"
    if node.op_type == "Attention" and not capabilities.attention_windows:
        if any(attributes.get(f"{side}_window_size", -1) != -1 for side in ("left", "right")):
            return "its window is silently ignored", "pass the window as a mask"
    if node.op_type == "TopK" and capabilities.max_topk is not None:
        count = _constant(graph, node.input[1])
        if count is not None and count > capabilities.max_topk:
            return f"K = {count} is more than {capabilities.max_topk}", "use a smaller input, or fewer tokens"
    return None


def _nodes(graph: Any) -> Iterator[tuple[Any, onnx.NodeProto]]:
    """All nodes with the graph they are in, those of branches and loops too."""
    for node in graph.node:
        yield graph, node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _constant(graph: onnx.GraphProto, name: str) -> int | None:
    """The value of a constant of one element."""
    import onnx

    tensors = [t for t in getattr(graph, "initializer", ()) if t.name == name]  # a function has none
    constants = [n for n in graph.node if n.op_type == "Constant" and name in n.output]
    tensors += [a.t for n in constants for a in n.attribute if a.name == "value"]
    values = [onnx.numpy_helper.to_array(t).reshape(-1) for t in tensors]
    return int(values[0][0]) if values and values[0].size == 1 else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns and logs about its own internals; what matters to the user is raised as an error."""
    import warnings

    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in names:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
