"""Runtimes: what a program is run with, and the files they read.

They know programs and operations; they know no pass and no method.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from tokenopt import registry
from tokenopt.errors import LoweringError, UsageError
from tokenopt.program import Program
from tokenopt.runtimes.base import Capabilities, Engine, Runtime

__all__ = ["Capabilities", "Engine", "Runtime", "export", "get", "open"]

_GROUP = "tokenopt.runtimes"
_FORMATS = {".pt2": ("eager",), ".onnx": ("onnxruntime",), ".engine": ("tensorrt", "tensorrt-rtx")}


def get(name: str) -> Runtime:
    """The runtime registered under a name.

    Raises:
        UsageError: if there is none; it lists those there are.
    """
    return registry.load(_GROUP, name)()


def export(program: Program, path: str | os.PathLike[str], **options: Any) -> Engine:
    """Writes a program to the format that the suffix of ``path`` names: ``.pt2``, ``.onnx`` or ``.engine``.

    What is written is proven equal to the program first; an existing file stays as it is until then. An ``.onnx`` file
    is as ONNX Runtime is fast with on this machine; with ``cpu=False`` it is for any runtime.

    Args:
        options: of the runtime's ``build``; ``opset`` and ``compute_capability``, for instance.

    Raises:
        LoweringError: if the runtime cannot express or build the program, or is not installed.
        ParityError: if the result computes something else.
        UsageError: for an unknown suffix or option.
    """
    path = Path(path)
    runtimes = _by_suffix(path)
    runtime = next((r for r in runtimes if r.available() is None), None)
    if runtime is None:
        reasons = "; ".join(f"{r.name}: {r.available()}" for r in runtimes)
        raise LoweringError(f"nothing here builds {path.suffix} files", where=str(path), why=reasons)
    known = [p.name for p in inspect.signature(runtime.build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise UsageError(f"{runtime.name} has no option {name!r}", hint=f"one of: {', '.join(known)}")
    return runtime.build(program, path, **options)


def open(path: str | os.PathLike[str], *, threads: int | None = None) -> Engine:  # noqa: A001  (as in the library)
    """Opens a ``.pt2``, ``.onnx`` or ``.engine`` file to run it.

    Args:
        threads: how many a run on the CPU may use; None leaves it to the runtime.
    """
    path = Path(path)
    return _by_suffix(path)[0].load(path, threads=threads)


def _by_suffix(path: Path) -> list[Runtime]:
    if path.suffix in _FORMATS:
        return [get(name) for name in _FORMATS[path.suffix]]
    others = {runtime.suffix: runtime for runtime in map(get, registry.names(_GROUP))}
    if path.suffix not in others:
        raise UsageError(
            f"no runtime reads or writes {path.suffix or 'files without a suffix'}",
            where=str(path),
            hint=f"one of: {', '.join(sorted(others))}",
        )
    return [others[path.suffix]]
