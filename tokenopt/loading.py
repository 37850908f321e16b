"""Loads a Program from every kind of model file, and says what to do about those that are not one."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from tokenopt.architectures import ARCH_HINT, build_model, offline
from tokenopt.errors import CaptureError, UsageError
from tokenopt.example_inputs import Shapes, infer_input_shapes, make_example_inputs, parse_input_shapes
from tokenopt.program import METADATA_FILE, METADATA_VERSION, Edit, Program, capture, functional
from tokenopt.safe_archive import load_exported
from tokenopt.safe_pickle import SAFE_FORMATS, ZIP_MAGIC, load_pickle, reason, unreadable

__all__ = ["load_program", "parse_input_shapes"]

_FORMATS = (
    ".pt2 (torch.export.save), .pt or .pth (torch.save of a model, or of its state dict with --arch), "
    ".safetensors with --arch"
)
_STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")
_HEAD = 512  # bytes of a file that say what it is
_ONNX_FIELDS = {0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A, 0x42}  # tags that may follow a model's ir_version


def load_program(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    input_shapes: str | Iterable[str] | Mapping[str | None, tuple[tuple[int, ...], torch.dtype]] = (),
    dynamic_batch: bool = True,
    trust: bool = False,
    allow_missing: bool = False,
) -> Program:
    """Loads a model file.

    Args:
        path: an exported program (``.pt2``), used as it is; a pickled ``nn.Module`` (``.pt``, ``.pth``); or a state
            dict (``.pt``, ``.pth``, ``.safetensors``). The content decides, not the suffix.
        arch: what a state dict belongs to: ``timm:NAME``, ``torchvision:NAME``, ``hf:CONFIG_DIR`` or
            ``package.module:callable``.
        input_shapes: ``"x:1x3x224x224"`` and the like, as text or as ``parse_input_shapes`` returns it; image models
            mostly know theirs.
        dynamic_batch: let the batch size vary; a ``.pt2`` keeps what it was exported with.
        trust: run the code a pickle carries. Without it only classes of the known model libraries are used.
        allow_missing: load a state dict although keys are missing or unexpected.

    Raises:
        CaptureError: if the file cannot be used, or the model in it not be captured.
        UsageError: if the arguments do not fit the file.
    """
    path = Path(path)
    shapes: Shapes = dict(input_shapes) if isinstance(input_shapes, Mapping) else parse_input_shapes(input_shapes)
    with offline():
        if (kind := _kind(path)) == "pt2":
            if arch is not None or shapes:
                raise UsageError(
                    "an exported program knows its model and its inputs",
                    where=str(path),
                    hint="leave out --arch and --input-shape",
                )
            return _load_exported(path, trust=trust)
        content = _load_safetensors(path) if kind == "safetensors" else load_pickle(path, trust=trust)
        model = _model(path, content, arch, allow_missing=allow_missing)
        for module in model.modules():
            if getattr(getattr(module, "config", None), "use_cache", False):
                module.config.use_cache = False  # a decoder returns its keys and values otherwise
        inputs = make_example_inputs(model, shapes or infer_input_shapes(model))
        return capture(model, inputs, dynamic_batch=dynamic_batch)


# -- what a file is --------------------------------------------------------------------------------------------------


def _kind(path: Path) -> str:
    """``pt2``, ``pickle`` or ``safetensors``, by content.

    Raises:
        CaptureError: if it is neither, saying what it is instead.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise _no_model(path, "it is a directory", _directory_hint(path))
        if not stat.S_ISREG(mode):
            raise _no_model(path, "it is not a regular file")
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except FileNotFoundError as error:
        raise CaptureError("there is no such file", where=str(path)) from error
    except OSError as error:
        raise CaptureError("the file cannot be opened", where=str(path), why=error.strerror or str(error)) from error
    if not head:
        raise _no_model(path, "it is empty")
    if head.startswith(ZIP_MAGIC):
        return _archive_kind(path)
    if head[:1] == b"\x80":
        return "pickle"
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and len(head) > 2 and head[2] in _ONNX_FIELDS):
        raise _no_model(
            path,
            "it is an ONNX model, which no longer has torch's operations",
            f"start from the torch model that it was exported from: {_FORMATS}",
        )
    if head[257:262] == b"ustar":
        raise _no_model(path, "it is in the tar format of torch before 0.1.10", SAFE_FORMATS)
    raise _no_model(path, "its first bytes belong to no format of torch")


def _archive_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # a damaged archive can fail anywhere, in any way
        raise unreadable(path, error) from error
    members = {name.partition("/")[2] for name in names}
    if "serialized_exported_program.json" in names:
        raise _no_model(path, "it was exported by torch 2.7 or before", "export it again with torch.export.save")
    if "constants.pkl" in members:
        raise _no_model(
            path,
            "it is a TorchScript archive, whose graph torch.export cannot read",
            f"start from the nn.Module that it was compiled from: {SAFE_FORMATS}",
        )
    if "data.pkl" in members:
        return "pickle"
    if any(m.startswith(("models/", "data/aotinductor/")) or m == "archive_format" for m in members):
        return "pt2"
    raise _no_model(path, "it is a zip archive that torch did not write")


def _no_model(path: Path, why: str, hint: str = f"tokenopt reads {_FORMATS}") -> CaptureError:
    return CaptureError("the file holds no model that can be captured", where=str(path), why=why, hint=hint)


def _directory_hint(path: Path) -> str:
    if (path / "config.json").is_file():
        weights = next((p.name for p in sorted(path.glob("*.safetensors"))), "model.safetensors")
        return f"give the weights in it: {path / weights} --arch hf:{path}"
    return f"give a file: {_FORMATS}"


# -- what is in it ---------------------------------------------------------------------------------------------------


def _load_exported(path: Path, *, trust: bool) -> Program:
    exported, metadata = load_exported(path, METADATA_FILE, trust=trust)
    provenance = [] if metadata is None else _provenance(path, metadata)
    try:
        if metadata is None:  # not ours: bring it into functional form
            exported = functional(exported)
        if exported.example_inputs is None:
            exported.example_inputs = _random_example(exported)
        _name_outputs(exported, metadata)
        return Program(exported, provenance)
    except Exception as error:  # torch.export raises anything
        raise CaptureError("the exported program cannot be used", where=str(path), why=reason(error)) from error


def _random_example(exported: ExportedProgram) -> tuple[Any, ...]:
    """Inputs for a program that was saved without any: (args, kwargs), two rows where the batch is dynamic."""
    generator = torch.Generator().manual_seed(0)
    values = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    leaves = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, ConstantArgument):
            leaves.append(spec.arg.value)
            continue
        value = values[spec.arg.name]
        shape = [size if isinstance(size, int) else 2 for size in value.shape]
        fill = torch.randn(shape, generator=generator) if value.dtype.is_floating_point else torch.ones(shape)
        leaves.append(fill.to(value.dtype))
    return pytree.tree_unflatten(leaves, exported.call_spec.in_spec)


def _name_outputs(exported: ExportedProgram, metadata: str | None) -> None:
    """Gives the outputs that a pass added their names back."""
    names = json.loads(metadata).get("outputs", []) if metadata is not None else []
    for spec, name in zip(exported.graph_signature.output_specs, names, strict=False):
        if spec.kind is OutputKind.USER_OUTPUT:
            spec.target = name if isinstance(name, str) else None


def _provenance(path: Path, metadata: str) -> list[Edit]:
    try:
        fields = json.loads(metadata)
        if fields["version"] > METADATA_VERSION:
            raise CaptureError(
                "the file was written by a newer tokenopt",
                where=str(path),
                why=f"its metadata has version {fields['version']}, this one reads {METADATA_VERSION}",
                hint="pip install --upgrade tokenopt",
            )
        return [Edit(**edit) for edit in fields["provenance"]]
    except (ValueError, TypeError, KeyError) as error:
        raise unreadable(path, error) from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # a damaged header can fail anywhere
        raise unreadable(path, error) from error


def _model(path: Path, content: Any, arch: str | None, *, allow_missing: bool) -> nn.Module:
    if isinstance(content, Mapping):
        for key in _STATE_DICT_KEYS:
            if isinstance(content.get(key), (Mapping, nn.Module)):
                content = content[key]
                break
    if isinstance(content, nn.DataParallel):
        content = content.module
    if isinstance(content, nn.Module):
        if isinstance(content, torch.jit.ScriptModule):
            raise _no_model(path, "it holds a TorchScript module", SAFE_FORMATS)
        if arch is not None:
            raise UsageError("the file holds a whole model", where=str(path), hint="leave out --arch")
        return content
    if not _is_state_dict(content):
        keys = f" with the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else ""
        raise _no_model(path, f"it holds a {type(content).__name__}{keys}", SAFE_FORMATS)
    if arch is None:
        raise UsageError(
            "the file holds a state dict, which does not say what model it belongs to",
            where=str(path),
            why=f"{len(content)} tensors: {', '.join(list(content)[:3])}, ...",
            hint=f"--arch hf:{path.parent}" if (path.parent / "config.json").is_file() else ARCH_HINT,
        )
    try:
        return build_model(arch, content, allow_missing=allow_missing)
    except CaptureError as error:
        raise CaptureError(error.what, where=error.where or str(path), why=error.why, hint=error.hint) from error


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )
