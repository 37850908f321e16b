"""Opens ``.pt2`` archives without running what they carry.

``torch.export.load`` trusts its file: it falls back to full unpickling of example inputs and constants, opens compiled
libraries, and evaluates parts of the program's description as Python (symbolic sizes, guards, names that are pasted
into generated code). A program needs none of that, so an archive is checked first: which members it has, its pickles by
the rules of ``safe_pickle``, and every string of the description against what belongs in its place.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import logging
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram

from tokenopt.errors import CaptureError
from tokenopt.safe_pickle import allowed_globals, only_globals, unreadable

_MODELS, _SAMPLES, _WEIGHTS, _CONSTANTS = "models/", "data/sample_inputs/", "data/weights/", "data/constants/"
_COMPILED = "data/aotinductor/"

_IDENTIFIER = re.compile(r"\w*", re.ASCII)
_WORD = re.compile(r"[\w.:/+\-]*", re.ASCII)  # names with dots, paths of members, versions, devices
_TEXT = re.compile(r"[\w .,:/+\-]*")  # nothing that ends a quoted string or calls something
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?", re.ASCII)

_NAMESPACES = frozenset({"aten", "prims", "tokenopt", "torchvision", "quantized_decomposed"})
_HIGHER_ORDER = frozenset(
    "cond while_loop scan associative_scan map_impl flex_attention invoke_subgraph "
    "wrap_with_set_grad_enabled wrap_with_autocast".split()
)
_SCALAR_FUNCTIONS = re.compile(
    r"_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|abs|lshift|rshift"
    r"|and_|or_|not_|eq|ne|lt|le|gt|ge)|math\.(ceil|floor|trunc|sqrt)|torch\.sym_\w+|round",
    re.ASCII,
)
_DEFAULT_FACTORIES = frozenset({"list", "dict", "set", "tuple", "int", "float", "str"})


class _Unsafe(Exception):
    """Something in an archive that loading would run, or that has no business where it is."""


def load_exported(path: Path, extra_file: str, *, trust: bool) -> tuple[ExportedProgram, str | None]:
    """The program of a ``.pt2`` archive, and the text of one of its extra files if it has it.

    Args:
        path: the archive.
        extra_file: the name of the extra file.
        trust: leave out the checks, and run whatever the archive carries.

    Raises:
        CaptureError: if the archive carries code, or cannot be read.
    """
    from torch.export.pt2_archive._package import load_pt2  # slow to import; torch.export.load hides why it fails

    import tokenopt.ops  # noqa: F401  (programs of ours name its operations)

    with path.open("rb") as file:
        try:
            allowed = [] if trust else _check_archive(file, path)
            _import_result_types(file)
        except _Unsafe as error:
            raise CaptureError(
                "refusing to load a .pt2 that may run code",
                where=str(path),
                why=str(error),
                hint="export the model again with torch.export.save. --trust would run what the file carries: "
                "only for files from someone you trust",
            ) from error
        except CaptureError:
            raise
        except Exception as error:  # a damaged archive can fail anywhere, in any way
            raise unreadable(path, error) from error
        file.seek(0)
        try:
            with _quiet(), _only_weights(not trust), only_globals(allowed):
                contents = load_pt2(file)
        except Exception as error:  # as above
            raise _load_error(path, error) from error
    if "model" not in contents.exported_programs:
        raise CaptureError("the archive holds no exported program", where=str(path), why="it has no models/model.json")
    return contents.exported_programs["model"], contents.extra_files.get(extra_file)


def _load_error(path: Path, error: Exception) -> CaptureError:
    unregistered = re.search(r"Deserializing (\S+) in pytree is not registered", str(error))
    if unregistered:
        return CaptureError(
            "the program takes or returns a type that is not known here",
            where=str(path),
            why=f"{unregistered[1]} is not registered with torch.utils._pytree",
            hint="import the package that defines it first, or export a model that returns tensors",
        )
    unknown = re.search(r"resolve (\S+) to an operator", str(error))
    if unknown:
        return CaptureError(
            "the program calls an operation that is not known here",
            where=str(path),
            why=f"{unknown[1]} is not registered with torch",
            hint="import the package that registers it first",
        )
    return unreadable(path, error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings and log records; what matters to the user is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _only_weights(active: bool) -> Iterator[None]:
    """Every ``torch.load`` inside is restricted, also those that ask for ``weights_only=False``."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names} if active else {}
    if active:
        os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


# -- members ---------------------------------------------------------------------------------------------------------


def _check_archive(file: BinaryIO, path: Path) -> list[tuple[Any, str]]:
    """What ``only_globals`` may be given to load the archive.

    Raises:
        _Unsafe: if it carries code.
        CaptureError: if one of its pickles does.
    """
    reader = torch._C.PyTorchFileReader(file)
    members = reader.get_all_records()
    if compiled := [m for m in members if m.startswith(_COMPILED)]:
        raise _Unsafe(f"it carries compiled code ({compiled[0]})")
    pickles = {m for m in members if m.lower().startswith(_SAMPLES)}  # torch looks members up without regard to case
    pickles |= {m for m in members if m.lower().startswith((_WEIGHTS, _CONSTANTS)) and m.lower().endswith(".pt")}
    for member in members:
        if member.startswith((_WEIGHTS, _CONSTANTS)) and member.endswith("_config.json"):
            folder = _WEIGHTS if member.startswith(_WEIGHTS) else _CONSTANTS
            for payload in json.loads(reader.get_record(member))["config"].values():
                if folder == _CONSTANTS and not payload["path_name"].startswith("tensor_"):
                    raise _Unsafe(f"it carries a pickled object that is not a tensor ({payload['path_name']})")
                if payload.get("use_pickle"):
                    pickles.add(folder + payload["path_name"])
    allowed = []
    for member in sorted(pickles):
        if data := reader.get_record(member):
            allowed += allowed_globals(io.BytesIO(data), f"{path}, {member}")
    for member in members:
        if member.startswith(_MODELS):
            _check(json.loads(reader.get_record(member)))
    return allowed


def _import_result_types(file: BinaryIO) -> None:
    """Imports the modules of transformers and diffusers whose result types the program uses; that registers them."""
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        texts = [archive.read(name).decode() for name in archive.namelist() if "/" + _MODELS in name]
    types = re.findall(r'\\"type\\": \\"((?:transformers|diffusers)\.[\w.]+)\.\w+\\"', "".join(texts))
    for module in sorted({name for name in types if "__main__" not in name}):
        with contextlib.suppress(ImportError):  # loading names the type that is then not registered
            importlib.import_module(module)


# -- the description of the program ----------------------------------------------------------------------------------


def _check(value: Any, key: str = "", in_node: bool = False) -> None:
    """Checks every string below ``value``, which is found under ``key``, by what torch will do with it."""
    if isinstance(value, dict):
        for name, item in value.items():
            _match(_IDENTIFIER if key.endswith("_values") else _WORD, name, key)
            if name != "metadata" or key not in ("nodes", "graph_module"):  # notes for people, kept as they are
                _check(item, name, in_node or key == "nodes")
    elif isinstance(value, list):
        for item in value:
            _check(item, key, in_node or key == "nodes")
    elif isinstance(value, str):
        if key == "expr_str":
            _check_size(value)
        elif key == "guards_code":
            _check_guard(value)
        elif key in ("in_spec", "out_spec"):
            _check_structure(json.loads(value)[1])
        elif key in ("target", "as_operator"):
            _check_operation(value)
        elif key in ("as_string", "as_strings"):
            if not in_node:  # arguments of operations are quoted properly
                _match(_TEXT, value, key)
        else:
            _match(_IDENTIFIER if key in ("name", "as_name", "forward_arg_names") else _WORD, value, key)


def _match(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        raise _Unsafe(f"{what or 'a name'} is {text[:80]!r}")


def _check_operation(target: str) -> None:
    """Operations must be torch's or ours, and must not touch files."""
    if _SCALAR_FUNCTIONS.fullmatch(target):
        return
    parts = target.split(".")
    if parts[:3] == ["torch", "ops", "higher_order"] and len(parts) == 4 and parts[3] in _HIGHER_ORDER:
        if isinstance(getattr(torch.ops.higher_order, parts[3], None), HigherOrderOperator):
            return
    if parts[:2] == ["torch", "ops"] and len(parts) == 5 and parts[2] in _NAMESPACES:
        if parts[2] == "torchvision":
            with contextlib.suppress(ImportError):
                importlib.import_module("torchvision")
        operation: Any = torch.ops
        for name in parts[2:]:
            operation = getattr(operation, name, None)
        if operation is None:
            return  # loading says that it is not known
        if isinstance(operation, OpOverload) and not any(a.name == "filename" for a in operation._schema.arguments):
            return
    raise _Unsafe(f"it calls {target[:80]!r}, which is not one of the operations that models are made of")


def _check_structure(node: Any) -> None:
    """A serialized ``TreeSpec``: the keys in it end up in generated code, enumerations are imported by name."""
    context = node["context"]
    if node["type"] is not None:
        _match(_WORD, node["type"], "a container's type")
    if node["type"] == "collections.defaultdict":
        factory = (context["default_factory_module"], context["default_factory_name"])
        if factory[0] != "builtins" or factory[1] not in _DEFAULT_FACTORIES:
            raise _Unsafe(f"a defaultdict makes {'.'.join(factory)[:80]!r}")
    stack = [json.loads(context) if isinstance(context, str) else context]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if "__enum__" in value:
                raise _Unsafe("a container's keys are of an enumeration to be imported")
            stack += [*value, *value.values()]
        elif isinstance(value, list):
            stack += value
        elif isinstance(value, str):
            _match(_TEXT, value, "a container's key")
    for child in node["children_spec"]:
        _check_structure(child)


def _check_size(text: str) -> None:
    """A symbolic size, ``Mul(Integer(2), Symbol('s77', integer=True))`` or ``2*s77``: sympy's expressions only."""
    import sympy  # slow to import
    from torch.utils._sympy import functions as torch_sympy

    for node in _walk(text):
        match node:
            case ast.Call(func=ast.Name(id=name)):
                place = torch_sympy if hasattr(torch_sympy, name) else sympy
                made = getattr(place, name, None)
                if not (isinstance(made, type) and issubclass(made, sympy.Basic)):
                    raise _Unsafe(f"a size calls {name!r}")
            case ast.Constant(value=str(word)):
                if not (_IDENTIFIER.fullmatch(word) or _NUMBER.fullmatch(word)):
                    raise _Unsafe(f"a size holds {word[:80]!r}")
            case ast.Constant(value=bool() | int() | float()) | ast.Name() | ast.keyword() | ast.Load():
                pass
            case ast.BinOp() | ast.UnaryOp() | ast.Compare() | ast.Tuple():
                pass
            case ast.operator() | ast.unaryop() | ast.cmpop():
                pass
            case _:
                raise _Unsafe(f"a size is {text[:80]!r}")


def _check_guard(text: str) -> None:
    """A condition on the inputs, ``L['x'].size()[0] % 2 == 0``."""
    for node in _walk(text):
        match node:
            case ast.Call(func=ast.Attribute(), keywords=[]):
                pass
            case ast.Call(func=ast.Name(id="max" | "min" | "abs" | "round" | "int" | "float" | "bool"), keywords=[]):
                pass
            case ast.Attribute(value=ast.Name(id="math"), attr="ceil" | "floor" | "trunc" | "sqrt" | "inf" | "isnan"):
                pass
            case ast.Attribute(value=ast.Name(id="torch"), attr=name) if name.startswith("sym_"):
                pass
            case ast.Attribute(value=ast.Subscript(), attr="size" | "stride" | "storage_offset" | "dim" | "numel"):
                pass
            case ast.Constant(value=str(key)):
                _match(_TEXT, key, "a guard's key")
            case ast.Constant(value=bool() | int() | float() | None) | ast.Name() | ast.Subscript() | ast.Tuple():
                pass
            case ast.Compare() | ast.BoolOp() | ast.BinOp() | ast.UnaryOp() | ast.IfExp():
                pass
            case ast.cmpop() | ast.boolop() | ast.operator() | ast.unaryop() | ast.expr_context():
                pass
            case _:
                raise _Unsafe(f"a guard is {text[:80]!r}")


def _walk(text: str) -> Iterator[ast.AST]:
    """Every node of a one-line Python expression."""
    try:
        if re.search(r"[#\\\n\r\f]", text):
            raise ValueError
        return ast.walk(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError):
        raise _Unsafe(f"{text[:80]!r} is not an expression") from None
