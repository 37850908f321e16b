"""Arrays from files, in the order of a program's inputs, checked against their shapes and dtypes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokenopt.errors import TokenoptError, UsageError
from tokenopt.program import InputSpec

SUFFIXES = (".npz", ".npy", ".safetensors")
LABELS = "labels"  # the array that holds them, unless the model has an input of that name


def load_arrays(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The arrays of a ``.npz``, ``.npy`` (one array, named after the file) or ``.safetensors`` file.

    ``.npy`` and ``.safetensors`` are mapped into memory, so that only what is used is read; ``.npz`` is read whole.

    Raises:
        UsageError: if there is no such file, or it has another suffix.
        TokenoptError: if the file is not what its suffix says, or holds Python objects.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError("there is no such data file or folder", where=str(path))
    if path.suffix not in SUFFIXES or not path.is_file():
        hint = f"a folder of images, or one of: {', '.join(SUFFIXES)}"
        raise UsageError("input arrays come in another format", where=str(path), hint=hint)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        import numpy as np

        if path.suffix == ".npy":  # mode c: torch wants to be able to write, and the file stays as it is
            return {path.stem: torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))}
        with np.load(path, allow_pickle=False) as loaded:
            return {name: torch.from_numpy(np.ascontiguousarray(loaded[name])) for name in loaded.files}
    except MemoryError:
        raise
    except Exception as error:  # zipfile, numpy and safetensors raise what they like for a damaged file
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise TokenoptError("the data file cannot be read", where=str(path), why=why[0]) from error


def match_inputs(arrays: Mapping[str, Tensor], inputs: Sequence[InputSpec], where: str | None = None) -> list[Tensor]:
    """The arrays in the order of ``inputs``; others are ignored. A single array for a single input needs no name.

    Raises:
        UsageError: if a name is missing, naming ``where``.
    """
    unnamed = [name for name in arrays if name != LABELS]
    if len(inputs) == len(unnamed) == 1 and inputs[0].name not in arrays:
        return [arrays[unnamed[0]]]
    missing = [spec.name for spec in inputs if spec.name not in arrays]
    if missing:
        raise UsageError(
            f"the data has no input {missing[0]!r}",
            where=where,
            why=f"the model takes {', '.join(s.name for s in inputs)}; the data has {', '.join(arrays) or 'nothing'}",
            hint="save the arrays under the names of the inputs",
        )
    return [arrays[spec.name] for spec in inputs]


def row_inputs(inputs: Sequence[InputSpec]) -> list[bool]:
    """Which inputs have the samples in their first dimension: those with a dynamic one, or, where none has, all if they
    agree on it. The others are given whole with every batch."""
    dynamic = [bool(spec.shape) and isinstance(spec.shape[0], str) for spec in inputs]
    if any(dynamic):
        return dynamic
    return [bool(inputs) and fixed_rows(inputs) is not None] * len(inputs)


def fixed_rows(inputs: Sequence[InputSpec]) -> int | None:
    """The only batch size of a program whose inputs have none that is dynamic."""
    sizes = {spec.shape[0] if spec.shape else None for spec in inputs}
    size = sizes.pop() if len(sizes) == 1 else None
    return size if isinstance(size, int) else None


def check_inputs(tensors: Sequence[Tensor], inputs: Sequence[InputSpec], where: str | None = None) -> int:
    """The number of samples in tensors for the inputs of a program; 1 if no input has any dimension for them.

    Raises:
        UsageError: if a shape, dtype or number of samples does not fit, naming ``where``.
    """
    counts = {}
    for tensor, spec, rows in zip(tensors, inputs, row_inputs(inputs), strict=True):
        have, want = tuple(tensor.shape), spec.shape
        pairs = list(zip(have, want, strict=False))[1 if rows else 0 :]
        if len(have) != len(want) or tensor.numel() == 0 or any(isinstance(w, int) and h != w for h, w in pairs):
            why = f"the model takes {list(want)}"
            raise UsageError(f"the data for input {spec.name!r} has shape {list(have)}", where=where, why=why)
        if not torch.can_cast(tensor.dtype, getattr(torch, spec.dtype)):
            dtype, why = str(tensor.dtype).removeprefix("torch."), f"the model takes {spec.dtype}"
            raise UsageError(f"the data for input {spec.name!r} is {dtype}", where=where, why=why)
        if rows:
            counts[spec.name] = len(tensor)
    if len(set(counts.values())) > 1:
        why = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise UsageError("the arrays differ in their number of rows", where=where, why=why)
    return next(iter(counts.values()), 1)


def check_labels(labels: Tensor, rows: int, where: str | None = None) -> Tensor:
    """Labels [rows, ...], integers as int64.

    Raises:
        UsageError: if there are more or fewer.
    """
    if labels.dim() == 0 or len(labels) != rows:
        why = f"there are {rows} samples"
        raise UsageError(f"the labels have shape {list(labels.shape)}", where=where, why=why)
    return labels if labels.is_floating_point() else labels.long()
