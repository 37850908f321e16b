"""Compiles a C++ file of this package with the system's compiler, once per machine, and loads it.

The library is kept in ``$XDG_CACHE_HOME/tokenopt`` under a name that tells apart sources, flags, compilers and
instruction sets. It has a plain C interface, for ctypes: neither the headers of torch nor those of Python are needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

# No -ffast-math: scores outside of a window are minus infinity, and what is not a number has to stay that.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-pthread")
# The first of these that the compiler takes: GCC and Clang on x86, Clang on ARM, any.
TARGETS = (("-march=native",), ("-mcpu=native",), ())
SECONDS = 120

_loaded: dict[Path, tuple[ctypes.CDLL | None, str | None]] = {}
_lock = threading.Lock()


class _BuildError(Exception):
    pass


def load(source: Path) -> ctypes.CDLL | None:
    """The compiled source, built by the first call on this machine; None where that cannot be, see `reason`.

    ``$CXX`` names the compiler and may hold flags; without it the first of c++, g++ and clang++ is taken. Never raises.
    """
    with _lock:
        if source not in _loaded:
            try:
                _loaded[source] = _build(source), None
            except (_BuildError, OSError, ValueError, subprocess.SubprocessError) as error:
                _loaded[source] = None, str(error)
        return _loaded[source][0]


def reason(source: Path) -> str | None:
    """Why `load` gives None for this source; None where it does not."""
    load(source)
    return _loaded[source][1]


def forget() -> None:
    """Makes the next `load` look for the compiler and the library again."""
    with _lock:
        _loaded.clear()


def _build(source: Path) -> ctypes.CDLL:
    compiler = _compiler()
    target, macros = _target(compiler)
    command = [*compiler, *FLAGS, *target]
    key = hashlib.sha256(b"\0".join([source.read_bytes(), macros, " ".join(command).encode()])).hexdigest()[:20]
    name = f"{source.stem}-{key}.so"
    problems = []
    for folder in (_cache, _temporary):
        try:
            path = folder() / name
            if not path.exists():
                _compile(command, source, path)
            return ctypes.CDLL(str(path))
        except (OSError, RuntimeError) as error:  # not writable, not executable, or no home at all
            problems.append(str(error))
    raise _BuildError("; ".join(problems))


def _compiler() -> list[str]:
    if named := os.environ.get("CXX"):
        command = shlex.split(named)
        if not command or shutil.which(command[0]) is None:
            raise _BuildError(f"$CXX is {named!r}, which cannot be run")
        return command
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise _BuildError("no C++ compiler: none of c++, g++ and clang++ is installed, and $CXX is not set")


def _target(compiler: list[str]) -> tuple[tuple[str, ...], bytes]:
    """The flags for this CPU, and the compiler's own macros: they name its version and every instruction set."""
    for flags in TARGETS:
        done = subprocess.run(
            [*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, timeout=SECONDS
        )
        if done.returncode == 0:
            return flags, done.stdout
    raise _BuildError(f"{shlex.join(compiler)} does not work: {_tail(done.stderr)}")


def _compile(command: list[str], source: Path, path: Path) -> None:
    """Writes beside the path, then renames: another process sees all of the library or nothing."""
    handle, name = tempfile.mkstemp(suffix=".so", prefix=".", dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run([*command, str(source), "-o", name], capture_output=True, timeout=SECONDS)
        if done.returncode != 0:
            raise _BuildError(f"{shlex.join(command)} failed: {_tail(done.stderr)}")
        os.chmod(name, 0o755)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _tail(output: bytes) -> str:
    return output.decode(errors="replace").strip()[-2000:]


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenopt"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


_folder: tempfile.TemporaryDirectory[str] | None = None  # removed when the process ends


def _temporary() -> Path:
    global _folder
    _folder = _folder or tempfile.TemporaryDirectory(prefix="tokenopt-", ignore_cleanup_errors=True)
    return Path(_folder.name)
