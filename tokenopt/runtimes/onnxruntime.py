"""ONNX files, run by ONNX Runtime: on the CPU, or on a CUDA device where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenopt.errors import LoweringError
from tokenopt.program import InputSpec
from tokenopt.runtimes.base import Engine
from tokenopt.runtimes.onnx import Onnx, data_name

if TYPE_CHECKING:
    import onnxruntime

_DTYPES = {"float": "float32", "double": "float64"}  # the others are called as in torch


@dataclass
class OnnxRuntimeEngine(Engine):
    """An ONNX file in a session of ONNX Runtime."""

    session: onnxruntime.InferenceSession = field(kw_only=True)

    @property
    def files(self) -> tuple[Path, ...]:
        if self.path is None:
            return ()
        data = self.path.with_name(data_name(self.path))
        return (self.path, data) if data.exists() else (self.path,)

    @property
    def provider(self) -> str:
        """Where it runs: "CPUExecutionProvider" or "CUDAExecutionProvider"."""
        return self.session.get_providers()[0]

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        names = [value.name for value in self.session.get_inputs()]
        feed = {name: value.detach().cpu().numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in self.session.run(None, feed)]


class OnnxRuntime(Onnx):
    """As ``onnx``, but written as ONNX Runtime is fast with on this machine."""

    name = "onnxruntime"

    def _for_cpu(self) -> bool:
        return len(providers()) == 1


def open_session(path: Path, *, threads: int | None = None) -> OnnxRuntimeEngine:
    """Opens an ONNX file.

    Args:
        threads: how many one operation may use; None is all.

    Raises:
        LoweringError: if ONNX Runtime cannot read or run the model.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; a warning about, say, a constant folded is nothing a user can act on
    # Threads that spin after a run steal the time of whatever runs next, beside it in the same process.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    path = Path(path)
    if not path.is_file():
        raise LoweringError("there is no such model", where=str(path))
    try:
        session = ort.InferenceSession(str(path), options, providers=providers())
    except Exception as error:  # every error of ONNX Runtime is a class of its own, derived from Exception
        raise LoweringError("ONNX Runtime cannot open the model", where=str(path), why=_reason(error)) from error
    inputs, outputs = (tuple(map(_spec, values)) for values in (session.get_inputs(), session.get_outputs()))
    return OnnxRuntimeEngine(path, OnnxRuntime.name, inputs, outputs, session=session)


def providers() -> list[str]:
    """Where ONNX Runtime can run on this machine, the fastest first."""
    import onnxruntime as ort

    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    return [name for name in wanted if name in ort.get_available_providers()]


def _spec(value: Any) -> InputSpec:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, (int, str)) else "?" for size in value.shape)
    return InputSpec(value.name, _DTYPES.get(kind, kind), shape)


def _reason(error: Exception) -> str:
    """Its message without the name of the library and the code, on one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(" : ")[-1][:500]
