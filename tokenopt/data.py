"""Input arrays from a file, matched to the inputs of a program by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokenopt.errors import TokenoptError, UsageError
from tokenopt.program import InputSpec

SUFFIXES = (".npz", ".npy", ".safetensors")


def load_arrays(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The arrays of a ``.npz``, ``.npy`` (one array, named after the file) or ``.safetensors`` file.

    Raises:
        UsageError: for another suffix.
        TokenoptError: if the file is not what its suffix says, or holds Python objects.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError("input arrays come in another format", where=str(path), hint=f"one of: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError("there is no such data file", where=str(path))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        import numpy as np

        loaded = np.load(path, allow_pickle=False)
        arrays = {path.stem: loaded} if path.suffix == ".npy" else {name: loaded[name] for name in loaded.files}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    except MemoryError:
        raise
    except Exception as error:  # zipfile, numpy and safetensors raise what they like for a damaged file
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise TokenoptError("the data file cannot be read", where=str(path), why=why[0]) from error


def match_inputs(arrays: Mapping[str, Tensor], inputs: Sequence[InputSpec]) -> list[Tensor]:
    """The arrays in the order of ``inputs``, checked and converted to their dtypes. Others are ignored (labels, say);
    a single array for a single input needs no name.

    Raises:
        UsageError: if a name is missing, or a shape, dtype or number of rows does not fit.
    """
    if len(arrays) == len(inputs) == 1:
        arrays = {inputs[0].name: next(iter(arrays.values()))}
    missing = [spec.name for spec in inputs if spec.name not in arrays]
    if missing:
        raise UsageError(
            f"the data has no input {missing[0]!r}",
            why=f"the model takes {', '.join(s.name for s in inputs)}; the data has {', '.join(arrays) or 'nothing'}",
            hint="save the arrays under the names of the inputs",
        )
    tensors = [_fit(arrays[spec.name], spec) for spec in inputs]
    batched = {spec.name: len(t) for spec, t in zip(inputs, tensors, strict=True) if _has_batch(spec)}
    if len(set(batched.values())) > 1:
        counts = ", ".join(f"{name}: {rows}" for name, rows in batched.items())
        raise UsageError("the arrays differ in their number of rows", why=counts)
    return tensors


def batches(tensors: Sequence[Tensor], inputs: Sequence[InputSpec], size: int) -> Iterator[list[Tensor]]:
    """Consecutive rows, ``size`` at a time, the rest last; tensors without a dynamic batch are given whole."""
    rows = [len(t) for t, spec in zip(tensors, inputs, strict=True) if _has_batch(spec)]
    if not rows:
        yield list(tensors)
        return
    for start in range(0, rows[0], size):
        yield [
            t[start : start + size] if _has_batch(spec) else t for t, spec in zip(tensors, inputs, strict=True)
        ]


def _has_batch(spec: InputSpec) -> bool:
    return bool(spec.shape) and isinstance(spec.shape[0], str)


def _fit(array: Tensor, spec: InputSpec) -> Tensor:
    shape = tuple(array.shape)
    fits = len(shape) == len(spec.shape) and all(
        isinstance(want, str) or have == want for have, want in zip(shape, spec.shape, strict=True)
    )
    if not fits or array.numel() == 0:
        raise UsageError(
            f"the data for input {spec.name!r} has shape {list(shape)}", why=f"the model takes {list(spec.shape)}"
        )
    dtype = getattr(torch, spec.dtype)
    if not torch.can_cast(array.dtype, dtype):
        have = str(array.dtype).removeprefix("torch.")
        raise UsageError(f"the data for input {spec.name!r} is {have}", why=f"the model takes {spec.dtype}")
    return array.to(dtype)
