"""Which patches of an image stay, merge or go at each stage of a reduction: what a report draws."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenopt.errors import IllegalReduction
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.pipeline import Pipeline

if TYPE_CHECKING:
    from tokenopt.optimization import Result
    from tokenopt.program import Program

DROPPED = -1
_PIXELS = 224  # of a picture's longer side, at most


@dataclass(frozen=True)
class Stage:
    """The patches behind one reduction.

    Attributes:
        site: the attention it is named after.
        left: how many tokens of the image are left.
        grid: rows and columns of patches.
        groups: of each patch in raster order, which token it is part of; `DROPPED` if of none.
        colours: the mean colour of each patch, as (red, green, blue) in 0 ... 255.
    """

    site: str
    left: int
    grid: tuple[int, int]
    groups: tuple[int, ...]
    colours: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Sample:
    """One image on its way through a reduced model.

    Attributes:
        number: its place in the data.
        deviation: ``|reduced - dense| / |dense|`` of the model's first output.
        changed: whether the class of the greatest score is another one; None where the output is no vector of scores.
        picture: the image as PNG, each scaled to its own range.
        stages: in the order of the model's layers.
    """

    number: int
    deviation: float
    changed: bool | None
    picture: bytes
    stages: tuple[Stage, ...]


def gallery(result: Result, images: Tensor | Sequence[Tensor], count: int = 3) -> list[Sample]:
    """The samples whose outputs a reduction changed least, then those that it changed most.

    Args:
        result: of `optimize`.
        images: [B, C, H, W] with one channel or three, or all inputs of the program with one such among them.
        count: how many of the best and of the worst, at most half of the samples each.

    Returns:
        Samples by rising deviation; none where the model takes no image, its patches form no grid of two dimensions, or
        no reduction merges or drops some of them in the stream.
    """
    inputs = [images] if isinstance(images, Tensor) else list(images)
    pictures = next((t for t in inputs if t.dim() == 4 and t.shape[1] in (1, 3) and t.is_floating_point()), None)
    segments = [s for axis in result.report.axes for s in axis["segments"] if not s["protected"] and s["grid"]]
    grids = {prod(s["grid"]): tuple(s["grid"]) for s in segments if len(s["grid"]) == 2}
    if pictures is None or not grids:
        return []
    steps = [replace(s, stages=True) if isinstance(s, ReduceTokens) else s for s in result.steps]
    try:
        watched = Pipeline(steps).run(result.dense).program
    except IllegalReduction:  # nothing of its tokens is left, or what is left is no set of them
        return []
    names = [spec.name for spec in watched.outputs]
    if not any(name.startswith("kept ") for name in names):
        return []
    dense = _flat(result.dense, inputs[: len(result.dense.inputs)])[0]
    outputs = dict(zip(names, _flat(watched, watched.complete(inputs)), strict=True))
    stages = _stages(outputs, grids)
    if not stages:
        return []
    reduced = outputs[names[0]]
    deviation = _deviation(dense, reduced)
    scores = dense.dim() == 2 and dense.shape[1] > 1 and dense.is_floating_point()
    changed = (dense.argmax(-1) != reduced.argmax(-1)).tolist() if scores else None
    order = deviation.argsort().tolist()
    count = min(count, max(len(order) // 2, 1))
    chosen = dict.fromkeys([*order[:count], *order[-count:]])
    return [
        Sample(
            number=i,
            deviation=float(deviation[i]),
            changed=changed[i] if changed is not None else None,
            picture=_png(_shrunk(_scaled(pictures[i]))),
            stages=tuple(_stage(stage, _scaled(pictures[i]), i) for stage in stages),
        )
        for i in chosen
    ]


def _flat(program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    args, kwargs = program.bind(tensors)
    return program.flat(*args, **kwargs)


@dataclass(frozen=True)
class _Stage:
    """A stage of all samples: groups [B, patches]."""

    site: str
    left: int
    grid: tuple[int, int]
    groups: Tensor


def _stages(outputs: dict[str, Tensor], grids: dict[int, tuple[int, int]]) -> list[_Stage]:
    """Every reduction of patches.

    A later pass counts the tokens that an earlier one left, but for one that it made of several, at the end: its maps
    continue those before.
    """
    stages: list[_Stage] = []
    before, counted = None, 0
    for name, kept in outputs.items():
        if not name.startswith("kept "):
            continue
        site, left = name.removeprefix("kept "), kept.shape[1]
        groups = outputs.get(f"merged {site}")
        if groups is None:
            groups = torch.full_like(outputs[f"nearest {site}"], DROPPED)
            groups = groups.scatter(1, kept, torch.arange(left, device=kept.device).expand_as(kept))
        if groups.shape[1] != counted:  # another pass, or another sequence of tokens
            counted = groups.shape[1]
            before = stages[-1] if stages and stages[-1].left - counted in (0, 1) else None
        if before is None and counted not in grids:
            continue
        if before is not None:
            others = before.left - counted
            beside = torch.arange(left, left + others, device=kept.device).expand(len(kept), -1)
            groups = torch.cat([groups, beside], 1).gather(1, before.groups.clamp_min(0))
            groups, left = torch.where(before.groups == DROPPED, DROPPED, groups), left + others
        stages.append(_Stage(site, left, before.grid if before is not None else grids[counted], groups))
    return stages


def _stage(stage: _Stage, image: Tensor, row: int) -> Stage:
    """One stage of one sample."""
    means = F.adaptive_avg_pool2d(image[None], stage.grid)[0].flatten(1).t()
    colours = tuple(tuple(colour) for colour in (means * 255).round().int().tolist())
    return Stage(stage.site, stage.left, stage.grid, tuple(stage.groups[row].tolist()), colours)


def _deviation(dense: Tensor, reduced: Tensor) -> Tensor:
    """Of each sample; compared as far as both go where outputs are left reduced."""
    a, b = (t.flatten(1).float() for t in (dense, reduced))
    if a.shape != b.shape:
        a, b = (t.flatten(1, -2).mean(1).float() if t.dim() > 2 else t.float() for t in (dense, reduced))
    return (a - b).norm(dim=1) / a.norm(dim=1).clamp_min(1e-12)


def _scaled(image: Tensor) -> Tensor:
    """An image [C, H, W] of any range as float [3, H, W] in 0 ... 1."""
    image = image.detach().float().cpu()
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp_min(1e-12)).expand(3, -1, -1)


def _shrunk(image: Tensor) -> Tensor:
    scale = _PIXELS / max(image.shape[1:])
    if scale >= 1:
        return image
    size = [max(1, round(s * scale)) for s in image.shape[1:]]
    return F.interpolate(image[None], size=size, mode="area")[0]


def _png(image: Tensor) -> bytes:
    """An image [3, H, W] in 0 ... 1 as PNG with 8 bits per channel."""
    height, width = image.shape[1:]
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).reshape(height, -1)
    above = F.pad(pixels, (0, 0, 1, 0))[:-1]
    lines = F.pad(pixels - above, (1, 0), value=2)  # each begins with the number of its filter: less the line above

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(lines.contiguous().numpy().tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
