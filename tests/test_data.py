"""Input arrays from files, matched to inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tokenopt.data import batches, load_arrays, match_inputs
from tokenopt.errors import TokenoptError, UsageError
from tokenopt.program import InputSpec

IMAGE = InputSpec("x", "float32", ("s0", 3, 4))
IDS = InputSpec("ids", "int64", ("s0", 5))


def test_formats(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.savez(tmp_path / "a.npz", x=array)
    np.save(tmp_path / "x.npy", array)
    save_file({"x": torch.from_numpy(array)}, tmp_path / "a.safetensors")
    for name in ("a.npz", "x.npy", "a.safetensors"):
        loaded = load_arrays(tmp_path / name)
        assert list(loaded) == ["x"]
        assert torch.equal(loaded["x"], torch.from_numpy(array))


def test_inputs_are_matched_by_name_and_converted() -> None:
    ids = torch.ones(2, 5, dtype=torch.int32)
    arrays = {"label": torch.zeros(9), "ids": ids, "x": torch.zeros(2, 3, 4, dtype=torch.float64)}
    tensors = match_inputs(arrays, [IMAGE, IDS])
    assert [t.dtype for t in tensors] == [torch.float32, torch.int64]


def test_a_single_array_needs_no_name() -> None:
    (tensor,) = match_inputs({"arr_0": torch.zeros(2, 3, 4)}, [IMAGE])
    assert tensor.shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, "no input 'x'"),
        ({"x": torch.zeros(2, 3, 5), "ids": torch.ones(2, 5, dtype=torch.int64)}, r"\[2, 3, 5\]"),
        ({"x": torch.zeros(0, 3, 4), "ids": torch.ones(0, 5, dtype=torch.int64)}, r"\[0, 3, 4\]"),
        ({"x": torch.zeros(2, 3, 4), "ids": torch.ones(2, 5)}, "'ids' is float32"),
        ({"x": torch.zeros(2, 3, 4), "ids": torch.ones(3, 5, dtype=torch.int64)}, "number of rows"),
    ],
)
def test_what_does_not_fit_is_refused(arrays: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        match_inputs(arrays, [IMAGE, IDS])


def test_batches_keep_rows_together() -> None:
    static = InputSpec("scale", "float32", (1,))
    x, scale = torch.arange(5.0), torch.ones(1)
    found = list(batches([x, scale], [InputSpec("x", "float32", ("s0",)), static], 2))
    assert [b[0].tolist() for b in found] == [[0, 1], [2, 3], [4]]
    assert all(b[1] is scale for b in found)
    assert len(list(batches([scale], [static], 2))) == 1


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"\x93NUMPY\x01\x00", b"\xff" * 64])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenoptError, match="cannot be read"):
        load_arrays(tmp_path / name)


def test_python_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(TokenoptError, match="cannot be read"):
        load_arrays(tmp_path / "a.npy")


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another format"):
        load_arrays(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="no such data file"):
        load_arrays(tmp_path / "a.npz")
