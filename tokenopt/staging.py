"""Files of one run appear together, when all of them are done, or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenopt.errors import TokenoptError, UsageError


@dataclass
class Staging:
    """Where a run writes: ``path`` for what will be moved to ``out``, ``scratch`` for what will not."""

    path: Path
    scratch: Path
    out: Path

    def commit(self, obsolete: Iterable[str] = ()) -> None:
        """Moves everything into ``out`` and removes ``obsolete`` names there; on an error all is put back."""
        backup = self.scratch / "replaced"
        backup.mkdir()
        new = sorted(p.name for p in self.path.iterdir())
        moved: list[str] = []
        with _no_interrupt():
            try:
                for name in sorted({*new, *obsolete}):
                    if (self.out / name).exists():
                        os.replace(self.out / name, backup / name)
                for name in new:
                    os.replace(self.path / name, self.out / name)
                    moved.append(name)
            except BaseException:
                for name in moved:
                    (self.out / name).unlink()
                for old in backup.iterdir():
                    os.replace(old, self.out / old.name)
                raise


@contextlib.contextmanager
def staged(out: str | os.PathLike[str]) -> Iterator[Staging]:
    """A place to write in, on the file system of ``out``; whatever was not committed is gone at the end.

    Raises:
        UsageError: if ``out`` is a file.
        TokenoptError: if it cannot be written to, before any work is done; or if the disk is full.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError("the output is not a folder", where=str(out), hint="give a folder with -o")
    created = [p for p in (out, *out.parents) if not p.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Inside ``out``, which may be a mount point: a move from anywhere else might be a copy.
        root = Path(tempfile.mkdtemp(prefix=".tokenopt-", dir=out))
    except OSError as error:
        _remove_empty(created)
        raise TokenoptError(
            "the output folder cannot be written to",
            where=str(out),
            why=error.strerror,
            hint="choose another folder with -o",
        ) from error
    try:
        staging = Staging(root / "files", root / "scratch", out)
        staging.path.mkdir()
        staging.scratch.mkdir()
        yield staging
    except Exception as error:
        if not isinstance(error, UsageError) and _is_full(error, root):
            raise TokenoptError(
                "the disk is full", where=str(out), why="nothing was written", hint="free some space or change -o"
            ) from error
        raise
    finally:
        shutil.rmtree(root, ignore_errors=True)
        _remove_empty(created)


class LastingFile(io.FileIO):
    """A new file for writers in C++, which abort the process when a write fails: it never does.

    The first error is kept, and raised when the file is closed; Ctrl-C waits until then, too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "w")
        self._error: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            rest = memoryview(data) if self._error is None else b""
            while rest:
                rest = rest[super().write(rest) :]
        except BaseException as error:
            self._error = error
        return len(data)

    def close(self) -> None:
        super().close()
        error, self._error = self._error, None
        if error is not None:
            raise error


def _remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders, innermost first, as far as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _is_full(error: BaseException | None, where: Path) -> bool:
    """Whether an error, or what caused it, is a full disk. Writers in C++ only say that a write failed."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return shutil.disk_usage(where).free < 2**16


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Lets a few renames finish: Ctrl-C is ignored meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
