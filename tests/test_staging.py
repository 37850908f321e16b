"""Files of one run appear together or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tokenopt.errors import TokenoptError, UsageError
from tokenopt.staging import LastingFile, staged


def tree(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted(folder.iterdir())}


def test_commit_replaces_and_removes(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("old")
    (tmp_path / "engine").write_text("old")
    (tmp_path / "notes").write_text("mine")
    with staged(tmp_path) as staging:
        (staging.path / "model").write_text("new")
        (staging.scratch / "dense").write_text("not kept")
        assert (tmp_path / "model").read_text() == "old"
        staging.commit(obsolete=["engine", "absent"])
    assert tree(tmp_path) == {"model": "new", "notes": "mine"}


def test_without_commit_nothing_stays(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with staged(out) as staging:
        (staging.path / "model").write_text("new")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_errors_leave_the_folder_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "model").write_text("old")
    with pytest.raises(error), staged(tmp_path) as staging:
        (staging.path / "model").write_text("new")
        raise error
    assert tree(tmp_path) == {"model": "old"}


def test_a_failing_move_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "gone"):
        (tmp_path / name).write_text(f"old {name}")
    real = os.replace

    def fails_for_b(source: Path, target: Path) -> None:
        if Path(source).parent.name == "files" and Path(source).name == "b":
            raise OSError(errno.EIO, "broken")
        real(source, target)

    with pytest.raises(OSError, match="broken"), staged(tmp_path) as staging:
        for name in ("a", "b", "c"):
            (staging.path / name).write_text("new")
        monkeypatch.setattr(os, "replace", fails_for_b)
        staging.commit(obsolete=["gone"])
    assert tree(tmp_path) == {"a": "old a", "b": "old b", "gone": "old gone"}


def test_a_full_disk_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(TokenoptError, match="the disk is full"), staged(tmp_path / "out"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("a writer failed") from error
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="not a folder"), staged(tmp_path / "out"):
        pass
    with pytest.raises(TokenoptError, match="cannot be written"), staged(tmp_path / "out" / "deeper"):
        pass
    assert tree(tmp_path) == {"out": "mine"}


def test_a_lasting_file_fails_when_it_is_closed(tmp_path: Path) -> None:
    with LastingFile(tmp_path / "a") as file:
        assert file.write(b"ab") == 2 and file.seekable() and file.writable()
    assert (tmp_path / "a").read_bytes() == b"ab"
    if not Path("/dev/full").exists():
        return
    with pytest.raises(OSError, match="No space left"), LastingFile("/dev/full") as file:
        assert file.write(b"ab") == 2
        assert file.write(b"cd") == 2
