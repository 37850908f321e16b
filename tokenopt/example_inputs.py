"""Example inputs for a model: shapes read from text or found in the model, and tensors to fill them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenopt.errors import UsageError

Shapes = dict[str | None, tuple[tuple[int, ...], torch.dtype]]

_SHAPE = re.compile(r"(?:([A-Za-z_]\w*):)?(\d+(?:[xX,]\d+)*)(?::(\w+))?")
_HINT = "--input-shape 1x3x224x224, or by name and with a dtype: --input-shape input_ids:1x128:int64; repeat it"
_SEED = 0
_IDS_BELOW = 8  # integer inputs of a model without an embedding


def parse_input_shapes(texts: str | Iterable[str]) -> Shapes:
    """Reads ``x:1x3x224x224``, ``1x3x224x224``, ``input_ids:1x128:int64``.

    Sizes are separated by ``x`` or commas, inputs by commas or given one by one. Without a dtype, inputs whose names
    end in ``_ids`` or ``_mask`` are int64, all others float32.

    Returns:
        Name -> (shape, dtype), in order; the name is None where none is given.

    Raises:
        UsageError: for anything else.
    """
    shapes: Shapes = {}
    for text in [texts] if isinstance(texts, str) else texts:
        for item in _split(text):
            match = _SHAPE.fullmatch(item)
            if match is None:
                raise UsageError(f"cannot read the input shape {item!r}", hint=_HINT)
            name, sizes, dtype = match.groups()
            shape = tuple(int(size) for size in re.split("[xX,]", sizes))
            if 0 in shape:
                raise UsageError(f"the input shape {item!r} has a size of 0", hint=_HINT)
            if name in shapes:
                what = f"the input {name!r}" if name else "an input without a name"
                raise UsageError(f"{what} is given twice", hint=_HINT)
            shapes[name] = (shape, _dtype(dtype, name))
    return shapes


def _split(text: str) -> list[str]:
    """Parts of a text at those commas that do not separate two sizes of one shape."""
    parts: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        if parts and re.fullmatch(r"\d+(:\w+)?", part) and re.search(r"\d$", parts[-1]):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def _dtype(text: str | None, name: str | None) -> torch.dtype:
    if text is None:
        return torch.int64 if name and name.endswith(("_ids", "_mask")) else torch.float32
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype) or (dtype.is_floating_point and dtype.itemsize < 2) or dtype.is_complex:
        raise UsageError(
            f"there is no input dtype {text!r}", hint="float32, float16, bfloat16, float64, int64, int32, uint8, bool"
        )
    return dtype


def infer_input_shapes(model: nn.Module) -> Shapes:
    """The input of an image model, from what the model says about itself.

    Raises:
        UsageError: if it does not say.
    """
    shapes = _transformers_shapes(model) or _timm_shapes(model) or _torchvision_shapes(model)
    if not shapes:
        raise UsageError(
            "the model does not say how large its inputs are",
            where=type(model).__name__,
            why=f"its forward takes ({', '.join(_parameters(model))})",
            hint=_HINT,
        )
    return {name: (shape, torch.float32) for name, shape in shapes.items()}


def _transformers_shapes(model: nn.Module) -> dict[str | None, tuple[int, ...]]:
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if not size or getattr(model, "main_input_name", None) != "pixel_values":
        return {}
    frames = [config.num_frames] if getattr(config, "num_frames", None) else []
    return {"pixel_values": (1, *frames, getattr(config, "num_channels", 3), *_pair(size))}


def _timm_shapes(model: nn.Module) -> dict[str | None, tuple[int, ...]]:
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if built_for and stem is not None:  # pretrained_cfg describes the original, whatever size this one was built for
        size = (stem.in_channels, *_pair(built_for))
    return {None: (1, *size)} if size else {}


def _torchvision_shapes(model: nn.Module) -> dict[str | None, tuple[int, ...]]:
    size, stem = getattr(model, "image_size", None), getattr(model, "conv_proj", None)
    return {None: (1, stem.in_channels, size, size)} if isinstance(size, int) and isinstance(stem, nn.Conv2d) else {}


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return size["height"], size["width"]
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def make_example_inputs(model: nn.Module, shapes: Shapes) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Tensors of the given shapes, as ``capture`` takes them.

    They are positional where they are the first arguments of the model's forward; models of transformers are called by
    keyword. Floats are normal, the same in every run; integers are below the size of the vocabulary; masks and
    booleans are ones.

    Raises:
        UsageError: for a name that the model's forward does not take, or an argument that it needs and is not given.
    """
    parameters = _parameters(model)
    if None in shapes:
        first = next(iter(parameters), None)
        if first is None or first in shapes:
            raise UsageError(
                "the input without a name has no place",
                where=type(model).__name__,
                why=f"its forward takes ({', '.join(parameters)})",
                hint=_HINT,
            )
        shapes = {first if name is None else name: shape for name, shape in shapes.items()}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    unknown = [] if takes_any else [name for name in shapes if name not in parameters]
    absent = [name for name, p in parameters.items() if p.default is p.empty and name not in shapes]
    if unknown or absent:
        raise UsageError(
            "the inputs are not those of the model",
            where=type(model).__name__,
            why="; ".join(
                f"{text} {', '.join(map(str, names))}"
                for text, names in (("it does not take", unknown), ("it also needs", absent))
                if names
            ),
            hint=f"its forward takes ({', '.join(parameters)}); give --input-shape NAME:SHAPE for each",
        )
    generator = torch.Generator().manual_seed(_SEED)
    tensors = {str(n): _tensor(model, str(n), shape, dtype, generator) for n, (shape, dtype) in shapes.items()}
    if list(tensors) == list(parameters)[: len(tensors)] and not hasattr(model, "main_input_name"):
        return tuple(tensors.values())
    return tensors


def _tensor(
    model: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if dtype is torch.bool or "mask" in name:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(_ids_below(model, name), shape, generator=generator).to(dtype)


def _ids_below(model: nn.Module, name: str) -> int:
    """The smallest embedding bounds all ids; that of the tokens is known for models of transformers."""
    if name == "input_ids" and hasattr(model, "get_input_embeddings"):
        table = model.get_input_embeddings()
        if isinstance(table, nn.Embedding):
            return table.num_embeddings
    return min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=_IDS_BELOW)


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The named arguments of the model's forward."""
    parameters = inspect.signature(model.forward).parameters
    return {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
