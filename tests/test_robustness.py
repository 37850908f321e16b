"""What goes wrong leaves a clear message, the right exit code, and the files that were there."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from tokenopt import cli

SHAPE = ["--input-shape", "1x1x16x16"]
OLD = {"model.pt2": "old", "model.onnx": "old", "report.json": "old", "notes.txt": "mine"}
Cli = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pickled model of 17 tokens."""
    path = tmp_path_factory.mktemp("models") / "vit.pt"
    vit = VisionTransformer(img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2)
    torch.save(vit.eval(), path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with the outputs of an earlier run, and something of the user's."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name, text in OLD.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def tokenopt(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command line in this process and returns ``code``, ``out`` and ``err``."""

    def call(*arguments: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        stdout, stderr = capsys.readouterr()
        assert "Traceback" not in stderr
        return SimpleNamespace(code=end.value.code, out=stdout, err=stderr)

    return call


def start(*arguments: object, wrapper: str = "", **options: object) -> subprocess.Popen[str]:
    """The command line in a process of its own; ``wrapper`` is shell code that ends with ``"$@"``."""
    command = [sys.executable, "-m", "tokenopt", *map(str, arguments)]
    if wrapper:
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", wrapper, "sh", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


def can_mount() -> bool:
    """Whether this user may mount a file system that nobody else sees."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/tmp"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="mounting in a namespace of one's own is not allowed")


# -- model files -----------------------------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def damage(path: Path, kind: str, whole: bytes) -> None:
    """Writes a file that is no usable model."""
    if kind == "payload":
        torch.save(Payload(path.with_name("ran")), path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(Payload(path.with_name("ran")), protocol=2))
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(
            {
                "empty": b"",
                "text": b"this is not a model\n" * 9,
                "truncated": whole[: len(whole) // 2],
                "corrupt": whole[:2000] + bytes(len(whole) - 2000),
                "huge header": (2**62).to_bytes(8, "little") + b"{" + bytes(64),
                "onnx": b"\x08\x09\x12\x07pytorch" + bytes(64),
            }[kind]
        )


KINDS = (
    "absent", "empty", "text", "folder", "truncated", "corrupt", "huge header", "onnx", "payload", "plain pickle",
)  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_unusable_model_files(tokenopt: Cli, model: Path, out: Path, tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    damage(path, kind, model.read_bytes())
    result = tokenopt("optimize", path, *SHAPE, "--arch", "timm:vit_tiny_patch16_224", "-o", out)
    assert result.code in (1, 2) and result.err.count("error: ") == 1
    assert "unexpected" not in result.err, "every such file has a message of its own"
    assert not (tmp_path / "ran").exists(), "code in a file must never run"
    assert contents(out) == OLD


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--input-shape", "1x1x16x17"], 1),
        (["--input-shape", "1x16"], 1),
        (["--input-shape", "1x1x16x16:int64"], 1),
        (["--input-shape", "nonsense"], 2),
        (["--input-shape", "1x1x0x16"], 2),
        (["--input-shape", "y:1x1x16x16"], 2),
    ],
)
def test_wrong_shapes_and_dtypes(tokenopt: Cli, model: Path, out: Path, arguments: list[str], code: int) -> None:
    result = tokenopt("optimize", model, *arguments, "-o", out)
    assert result.code == code and "unexpected" not in result.err
    assert contents(out) == OLD


def test_wrong_data(tokenopt: Cli, model: Path, out: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((2, 3, 16, 16), np.float32))
    result = tokenopt("optimize", model, *SHAPE, "--data", tmp_path / "data.npz", "-o", out)
    assert result.code == 2 and "[2, 3, 16, 16]" in result.err
    assert contents(out) == OLD


def test_names_outside_ascii(model: Path, tmp_path: Path) -> None:
    odd = tmp_path / "модель [b]\udcff.pt"
    process = start("inspect", odd, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.isascii() and "there is no such file" in err and "[b]" in err


# -- a failing check -------------------------------------------------------------------------------------------------


def test_a_wrong_export_is_exit_code_4(
    tokenopt: Cli, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenopt.runtimes.onnxruntime import OnnxRuntimeEngine

    right = OnnxRuntimeEngine._run
    monkeypatch.setattr(OnnxRuntimeEngine, "_run", lambda self, inputs: [t + 0.01 for t in right(self, inputs)])
    result = tokenopt("optimize", model, *SHAPE, "--schedule", "r=4", "-o", out)
    assert result.code == 4 and "onnxruntime" in result.err
    assert contents(out) == OLD


# -- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [("load", signal.SIGINT, 130), ("check", signal.SIGTERM, 143), ("save", signal.SIGINT, 130)],
)
def test_signals_leave_nothing_half_written(
    tokenopt: Cli, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, stage: str, number: int, code: int
) -> None:
    from tokenopt.terminal import Stages

    reached = Stages.__call__

    def interrupted(self: Stages, name: str, done: int = 0, total: int = 0) -> None:
        reached(self, name, done, total)
        if name == stage:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Stages, "__call__", interrupted)
    result = tokenopt("optimize", model, *SHAPE, "--schedule", "r=4", "-o", out)
    assert result.code == code and stage in result.err
    assert contents(out) == OLD
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


def test_control_c_in_the_middle(model: Path, out: Path) -> None:
    process = start("optimize", model, *SHAPE, "--schedule", "r=4", "-o", out)
    for line in process.stderr:
        if line.startswith("build onnxruntime"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted; nothing was written" in err and "Traceback" not in err
    assert contents(out) == OLD


# -- disks -----------------------------------------------------------------------------------------------------------


@needs_mount
@pytest.mark.parametrize("kilobytes", [100, 300])
def test_a_full_disk(model: Path, out: Path, kilobytes: int) -> None:
    """The smaller disk does not hold model.pt2, the larger one not model.onnx beside it."""
    wrapper = (
        f'cp -r {out} {out}.copy && mount -t tmpfs -o size={kilobytes}k none {out} && cp {out}.copy/* {out} && "$@"; '
        f"code=$?; diff -r {out} {out}.copy || exit 99; exit $code"
    )
    process = start("optimize", model, *SHAPE, "--schedule", "r=4", "-o", out, wrapper=wrapper)
    stdout, err = process.communicate(timeout=300)
    assert process.returncode == 1, stdout + err
    assert "the disk is full" in err and "Traceback" not in err


@needs_mount
def test_a_read_only_folder(model: Path, out: Path) -> None:
    wrapper = f'mount -t tmpfs -o ro none {out} && "$@"'
    process = start("optimize", model, *SHAPE, "-o", out / "new", wrapper=wrapper)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "cannot be written to" in err and "Read-only file system" in err
    assert "load" not in err, "it is refused before any work is done"


def test_an_output_that_is_a_file(tokenopt: Cli, model: Path, out: Path) -> None:
    result = tokenopt("optimize", model, *SHAPE, "-o", out / "notes.txt")
    assert result.code == 2 and "not a folder" in result.err
    assert contents(out) == OLD


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_stdout() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "tokenopt", "explain", "ParityError"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.endswith("No space left on device\n")


def test_a_closed_pipe() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tokenopt", "explain", "ParityError"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""
