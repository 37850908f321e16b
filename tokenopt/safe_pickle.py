"""Reads pickled models without running what they carry.

A pickle is a program: it names classes and functions and says what to do with them. ``torch.load(weights_only=True)``
imports nothing and touches only the names it is handed, so what it is handed decides. Before anything is imported, the
names are read from the file together with the use it makes of each, and every use has its own rule:

====== ============================================== ==========================================================
use    what the unpickler does                        allowed for
====== ============================================== ==========================================================
create ``cls.__new__(cls)``, then fills ``__dict__``;  ``nn.Module`` classes of the known packages, their
       no constructor runs                            configurations and plain helper classes, ``Namespace``
call   calls it with arguments of the file's choice    ``functools.partial`` (it only stores what it gets),
                                                      enumerations (a look-up), functions of tensors
refer  keeps it as a value that the model may call     layer classes and functions of tensors; not whole
       when it runs                                   pretrained models, whose constructors may fetch files
====== ============================================== ==========================================================

What torch itself allows (tensors, storages, containers) is left to torch, but for ``_rebuild_from_type_v2``, which
calls its first argument. A name outside of the known packages refuses the file before anything is imported.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import contextlib
import enum
import functools
import importlib
import io
import pickletools
import re
import sys
import types
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from tokenopt.errors import CaptureError

SAFE_FORMATS = (
    "save the weights alone, as .safetensors or torch.save(model.state_dict(), ...), and give --arch; "
    "or export the model to .pt2 (torch.export.save)"
)
TRUST_HINT = f"{SAFE_FORMATS}. --trust would run the file's code: only for files from someone you trust"
ZIP_MAGIC = b"PK\x03\x04"

_PACKAGES = frozenset({"timm", "torchvision", "transformers", "diffusers"})
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, keys of the storages

_CREATE, _CALL, _REFER = "create", "call", "refer"


@dataclass(frozen=True)
class _Name:
    """A class or function as a pickle names it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name


_UNNAMED = _Name("", "an object that the file makes")
_REBUILD = _Name("torch._tensor", "_rebuild_from_type_v2")
_HARMLESS: dict[_Name, tuple[Any, set[str]]] = {
    _Name("functools", "partial"): (functools.partial, {_CALL}),
    _Name("argparse", "Namespace"): (argparse.Namespace, {_CREATE}),
    # Torch fills no subclass of dict. What FrozenDict adds, attributes named like its keys, is in its pickled state.
    _Name("diffusers.configuration_utils", "FrozenDict"): (OrderedDict, {_CALL}),
}


def load_pickle(path: Path, *, trust: bool) -> Any:
    """The object in a ``torch.save`` file, old format or new, on the CPU.

    Args:
        path: the file.
        trust: run whatever the file says, like ``torch.load(weights_only=False)``.

    Raises:
        CaptureError: if the file names anything that is not allowed, or cannot be read.
    """
    with path.open("rb") as file:
        allowed = [] if trust else allowed_globals(file, str(path))
        file.seek(0)
        try:
            with only_globals(allowed), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=not trust)
        except Exception as error:  # a damaged pickle can fail anywhere, in any way
            if trust and isinstance(error, (ImportError, AttributeError)):
                raise CaptureError(
                    "the file names code that cannot be imported here",
                    where=str(path),
                    why=reason(error),
                    hint="put its package on PYTHONPATH; a class of a script (__main__) cannot be found again: "
                    + SAFE_FORMATS,
                ) from error
            raise unreadable(path, error) from error


@contextlib.contextmanager
def only_globals(allowed: list[tuple[Any, str]]) -> Iterator[None]:
    """Torch's restricted unpickler takes these names inside, and none of those that other libraries have added."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        meanwhile = [entry for entry in torch.serialization.get_safe_globals() if entry not in allowed]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before + meanwhile)


def allowed_globals(file: BinaryIO, where: str) -> list[tuple[Any, str]]:
    """What ``only_globals`` may be given to load this file.

    Raises:
        CaptureError: listing the names that are not allowed, or not to be found here.
    """
    try:
        legacy = file.read(len(ZIP_MAGIC)) != ZIP_MAGIC
        file.seek(0)
        pickles = _legacy_pickles(file) if legacy else [torch._C.PyTorchFileReader(file).get_record("data.pkl")]
        uses = _read_uses(pickles)
    except Exception as error:  # as above
        raise unreadable(where, error) from error
    refused = [str(name) for name in uses if name not in _HARMLESS and not _in_known_package(name)]
    found = {} if refused else {name: _HARMLESS.get(name) or _find(name) for name in uses}
    absent = [str(name) for name, entry in found.items() if entry is None]
    for name, entry in found.items():
        if entry is not None and (excess := uses[name] - entry[1]):
            refused.append(f"{name} (to {' and '.join(sorted(excess))})")
    if legacy and refused == [str(_UNNAMED)]:
        raise CaptureError(
            "the file holds a whole model in the format of torch before 1.6",
            where=where,
            why="torch's restricted unpickler cannot build modules from it",
            hint=f"save it again with today's torch.save, or {TRUST_HINT}",
        )
    if refused:
        raise CaptureError(
            "refusing to load a pickle that names code outside of the known model libraries",
            where=where,
            why=f"it names {', '.join(sorted(refused))}",
            hint=TRUST_HINT,
        )
    if absent:
        packages = sorted({name.split(".")[0] for name in absent})
        raise CaptureError(
            "the file needs classes that are not installed here",
            where=where,
            why=f"not found: {', '.join(sorted(absent))}",
            hint=f"pip install 'tokenopt[models]', with the version of {', '.join(packages)} that it was saved with",
        )
    return [(entry[0], str(name)) for name, entry in found.items() if entry is not None]


def reason(error: BaseException) -> str:
    """The first line of an error; C++ errors carry a stack trace, others advice that is not ours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    text = " ".join(line.strip() for line in lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def unreadable(where: Path | str, error: BaseException) -> CaptureError:
    """The error for a file that starts like a model and then fails to be one."""
    return CaptureError(
        "the file cannot be read",
        where=str(where),
        why=f"it is damaged or incomplete ({reason(error)})",
        hint="copy, download or save it again",
    )


# -- what is in the file ---------------------------------------------------------------------------------------------


def _legacy_pickles(file: BinaryIO) -> list[bytes]:
    """The pickles at the start of a file in the format before torch 1.6; the bytes of the tensors follow them."""
    pickles = []
    for _ in range(_LEGACY_PICKLES):
        start = file.tell()
        for _ in pickletools.genops(file):
            pass
        end = file.tell()
        file.seek(start)
        pickles.append(file.read(end - start))
    return pickles


def _unsafe_names(data: bytes) -> set[str]:
    """The names in a pickle that torch does not allow by itself. Torch reads them from its own archives only."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/version", "3\n")
        file.writestr("archive/data.pkl", data)
    archive.seek(0)
    with only_globals([]):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(archive))


_CONSTANTS = frozenset(
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT LONG1 BINUNICODE SHORT_BINSTRING "
    "EMPTY_LIST EMPTY_DICT EMPTY_SET".split()
)


def _read_uses(pickles: list[bytes]) -> dict[_Name, set[str]]:
    """The names in the pickles that torch does not allow by itself, with the uses made of them."""
    uses: dict[_Name, set[str]] = defaultdict(set)
    for data in pickles:
        _follow(data, uses)
    unsafe = set().union(*map(_unsafe_names, pickles))
    for name in unsafe - set(map(str, uses)):  # torch reads a name where we do not: it has to pass, too
        module, _, attribute = name.rpartition(".")
        uses[_Name(module, attribute)] = {_CREATE, _CALL, _REFER}
    return {name: kinds for name, kinds in uses.items() if str(name) in unsafe or name == _UNNAMED}


def _follow(data: bytes, uses: dict[_Name, set[str]]) -> None:
    """Follows a pickle without executing it, and notes the use it makes of every name.

    The opcodes are those of torch's restricted unpickler. The stack holds names, tuples of such values (arguments), and
    None for everything else.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def keep(values: list[Any]) -> None:
        for value in values:
            if isinstance(value, _Name):
                uses[value].add(_REFER)

    def pop(count: int) -> list[Any]:
        if count > len(stack):
            raise ValueError("the pickle's stack is empty")
        values = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return values

    def called(value: Any, kind: str) -> None:
        uses[value if isinstance(value, _Name) else _UNNAMED].add(kind)

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP" | "BUILD" | "APPEND":
                keep(pop(1))
            case "GLOBAL":
                stack.append(_parse_name(argument))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(stack)
                stack = []
            case "TUPLE" | "APPENDS" | "SETITEMS":
                values, stack = stack, marks.pop()
                keep(values)
                if opcode.name == "TUPLE":
                    stack.append(tuple(values))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = pop(int(opcode.name[-1]))
                keep(values)
                stack.append(tuple(values))
            case "NEWOBJ":
                target, arguments = pop(2)
                called(target, _CREATE if arguments == () else _CALL)
                stack.append(None)
            case "REDUCE":
                target, arguments = pop(2)
                called(target, _CALL)
                if target == _REBUILD:
                    called(arguments[0] if isinstance(arguments, tuple) and arguments else None, _CALL)
                stack.append(None)
            case "SETITEM":
                keep(pop(2))
            case "BINPERSID":
                keep(pop(1))
                stack.append(None)
            case name if name in _CONSTANTS:
                stack.append(None)
            case name:
                raise ValueError(f"opcode {name}")


def _parse_name(argument: str) -> _Name:
    """``"module name"`` of a GLOBAL opcode, with the names of Python 2 that protocol 2 writes translated back."""
    module, _, name = argument.partition(" ")
    if (module, name) in _compat_pickle.NAME_MAPPING:
        return _Name(*_compat_pickle.NAME_MAPPING[module, name])
    return _Name(_compat_pickle.IMPORT_MAPPING.get(module, module), name)


# -- what is allowed -------------------------------------------------------------------------------------------------


def _in_known_package(name: _Name) -> bool:
    """Whether the name is at a place that may be imported to look at it."""
    parts = name.module.split(".")
    if not name.name.isidentifier() or not all(p.isidentifier() and p != "__main__" for p in parts):
        return False
    return parts[0] in _PACKAGES or parts[:2] == ["torch", "nn"] or name.module == "torch._C._nn"


def _find(name: _Name) -> tuple[Any, set[str]] | None:
    """The class or function of a known package, and the uses that are allowed of it; None if it is not installed."""
    try:
        module = sys.modules.get(name.module) or importlib.import_module(name.module)
        value = vars(module)[name.name]
    except Exception:  # another version, or an optional dependency of the module that is absent
        return None
    return value, _rule(value)


def _rule(value: Any) -> set[str]:
    if isinstance(value, types.BuiltinFunctionType):
        return {_CALL, _REFER} if value.__module__ == "torch._C._nn" else set()
    if isinstance(value, types.FunctionType):
        of_tensors = value.__module__ == "torch.nn.functional" and not value.__name__.startswith("_")
        return {_CALL, _REFER} if of_tensors else set()
    home = value.__module__.split(".") if isinstance(value, type) else []
    if not home or (home[0] not in _PACKAGES and home[:2] != ["torch", "nn"]):
        return set()
    if issubclass(value, nn.Module):
        if issubclass(value, (torch.fx.GraphModule, torch.jit.ScriptModule, nn.parallel.DistributedDataParallel)):
            return set()  # they run code, or open connections, when they are filled
        fetches = home[0] != "torch" and (hasattr(value, "from_pretrained") or hasattr(value, "from_config"))
        return {_CREATE} if fetches else {_CREATE, _REFER}
    if issubclass(value, enum.Enum):
        return {_CALL, _REFER}
    if value.__new__ is not object.__new__ or hasattr(value, "__setstate__"):
        return set()  # filling it would run code
    if home[0] == "transformers":
        return {_CREATE} if home[-1].startswith(("configuration_", "modeling_")) else set()
    return {_CREATE} if home[1:2] in (["models"], ["layers"], ["ops"]) else set()
