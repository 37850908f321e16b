"""How an image becomes the input of a model: the transform of timm or of transformers, read from their settings."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenopt.errors import TokenoptError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # height, width
Model = nn.Module | str | os.PathLike[str] | None  # what may say how its images are made

FITS = ("cover", "contain", "stretch")
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # as Pillow numbers them
HINT = "say how the model was trained, such as --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --resize 256"
_KNOWN_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_reduce_labels"}


@dataclass(frozen=True)
class Preprocessing:
    """An image to float32 [C, H, W]: resized, cropped in the centre, scaled, and normalised.

    Args:
        mean, std: of the scaled values, one per channel, or one for all.
        resize: (height, width) in pixels before the crop; None leaves the image as it is.
        crop: (height, width) in pixels of the result; a smaller image gets a border. None leaves what was resized.
        fit: how the image meets ``resize``: it may keep its proportions and "cover" that size or be "contain"-ed in it,
            or be "stretch"-ed to it.
        interpolation: as Pillow calls it, in lower case.
        scale: what the values, 0 to 255, are multiplied with.
        source: where all this comes from, for the report.

    Raises:
        UsageError: for values that make no sense.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Size | None = None
    crop: Size | None = None
    fit: str = "cover"
    interpolation: str = "bicubic"
    scale: float = 1 / 255
    source: str = "given"

    def __post_init__(self) -> None:
        def check(fine: bool, what: str) -> None:
            if not fine:
                raise UsageError(f"the preprocessing of images has {what}", where=self.source, hint=HINT)

        for name in ("mean", "std"):
            values = getattr(self, name)
            check(bool(values) and all(_number(v) for v in values), f"the {name} {values}")
        check(min(self.std) > 0, f"the std {self.std}")
        check(len(self.mean) == len(self.std), f"{len(self.mean)} means and {len(self.std)} standard deviations")
        for name in ("resize", "crop"):
            size = getattr(self, name)
            fine = size is None or len(size) == 2 and all(isinstance(s, int) and 0 < s < 2**16 for s in size)
            check(fine, f"{name} {size}")
        check(self.fit in FITS, f"fit {self.fit!r}")
        check(self.interpolation in INTERPOLATIONS, f"interpolation {self.interpolation!r}")
        check(_number(self.scale) and self.scale > 0, f"the scale {self.scale}")

    @property
    def size(self) -> Size | None:
        """(height, width) of the result; None where it is that of the image."""
        return self.crop or (self.resize if self.fit == "stretch" else None)

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a report."""
        return asdict(self)

    def for_channels(self, channels: int) -> Preprocessing:
        """The same with a mean and std for each of so many channels: equal values serve any number.

        Raises:
            UsageError: if they differ, and there are more or fewer.
        """
        if len(self.mean) == channels:
            return self
        if len({*zip(self.mean, self.std, strict=True)}) > 1:
            what = f"the preprocessing of images has {len(self.mean)} channels, the model {channels}"
            raise UsageError(what, where=self.source, hint="--mean and --std take a value for each, or one for all")
        return replace(self, mean=self.mean[:1] * channels, std=self.std[:1] * channels)

    # -- where it comes from ---------------------------------------------------------------------------------------

    @classmethod
    def resolve(cls, model: Model, size: Size | None, **given: Any) -> Preprocessing | None:
        """What the model says, with the fields of ``given`` that are not None instead; or those alone.

        Without a model that says anything, mean and std are needed; the crop is the model's input by default, and the
        resize the crop.

        Args:
            model: see `from_model`.
            size: (height, width) of the model's input.

        Returns:
            None if the model says nothing, and nothing is given.
        """
        given = {name: value for name, value in given.items() if value is not None}
        try:
            found = cls.from_model(model, size)
        except UsageError:  # whose hint are these options
            if not {"mean", "std"} <= given.keys():
                raise
            found = None
        options = ", ".join(f"--{name}" for name in ("mean", "std", "resize", "crop") if name in given)
        if found is not None:
            return replace(found, **given, source=f"{found.source}, {options}") if given else found
        if not given:
            return None
        if missing := [f"--{name}" for name in ("mean", "std") if name not in given]:
            raise UsageError(f"images need {' and '.join(missing)}", why="the model does not say", hint=HINT)
        crop = given.get("crop", size)
        return cls(**{"crop": crop, "resize": crop, **given}, source=options)

    @classmethod
    def from_model(cls, model: Model, size: Size | None) -> Preprocessing | None:
        """What a model of timm carries, or the ``preprocessor_config.json`` of transformers in a directory says.

        Args:
            model: a module; or a directory with a model's configuration, as a `Path` or as ``hf:CONFIG_DIR``.
            size: (height, width) of the model's input, which may have been built for another size than the original.

        Returns:
            None if the model does not say.

        Raises:
            UsageError: if what it says is not understood.
        """
        if isinstance(model, nn.Module):
            config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
            config = config.to_dict() if hasattr(config, "to_dict") else config
            return _from_timm(config, size) if isinstance(config, Mapping) and "mean" in config else None
        if model is None or (isinstance(model, str) and not model.startswith("hf:")):
            return None
        path = Path(str(model).removeprefix("hf:"))
        path = path if path.is_dir() else path.parent
        return _from_transformers(path) if (path / "preprocessor_config.json").is_file() else None

    # -- what it does ----------------------------------------------------------------------------------------------

    def __call__(self, image: Image) -> Tensor:
        """Float32 [C, H, W] from an image in mode RGB or L, with C = 3 or 1.

        Raises:
            ValueError: if the image would become too large.
        """
        import numpy as np
        from PIL import Image

        channels = len(image.getbands())
        if self.resize is not None:
            height, width = self._resized(image.height, image.width)
            if Image.MAX_IMAGE_PIXELS and height * width > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"its {image.width} x {image.height} pixels would become {width} x {height}")
            image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        if self.crop is not None and self.crop != (image.height, image.width):
            border = tuple(round(255 * m) if self.fit == "contain" else 0 for m in self.for_channels(channels).mean)
            cropped = Image.new(image.mode, self.crop[::-1], border)
            cropped.paste(image, (-_offset(image.width, self.crop[1]), -_offset(image.height, self.crop[0])))
            image = cropped
        values = torch.from_numpy(np.array(image)).reshape(image.height, image.width, channels).permute(2, 0, 1)
        mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        return values.float().mul_(self.scale).sub_(mean).div_(std).contiguous()

    def _resized(self, height: int, width: int) -> Size:
        """(height, width) after the resize, rounded as torchvision does for squares, and timm for all else."""
        assert self.resize is not None, "there is a size to resize to"
        if self.fit == "stretch":
            return self.resize
        across = (height / self.resize[0], width / self.resize[1])
        if self.fit == "cover" and self.resize[0] == self.resize[1]:
            side, short = self.resize[0], min(height, width)
            return (side, int(side * width / short)) if height <= width else (int(side * height / short), side)
        ratio = min(across) if self.fit == "cover" else max(across)
        return max(1, round(height / ratio)), max(1, round(width / ratio))


def _offset(have: int, want: int) -> int:
    """Where a central crop begins, rounded as in torchvision; negative for a border."""
    return -((want - have) // 2) if have < want else round((have - want) / 2)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


# -- settings of libraries -------------------------------------------------------------------------------------------


def _from_timm(config: Mapping[str, Any], size: Size | None) -> Preprocessing:
    """The transform that ``timm.data.create_transform`` makes for evaluation."""
    name = config.get("architecture") or ""
    source = f"timm's pretrained_cfg of {name}" if name else "timm's pretrained_cfg"
    try:
        height, width = size or tuple(config["input_size"])[1:]
        share = float(config.get("crop_pct") or 0.875)
        mode = config.get("crop_mode") or "center"
        return Preprocessing(
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            resize=(math.floor(height / share), math.floor(width / share)),
            crop=(height, width),
            fit={"center": "cover", "squash": "stretch", "border": "contain"}[mode],
            interpolation=config.get("interpolation") or "bicubic",
            source=source,
        )
    except TokenoptError:
        raise
    except Exception as error:  # a pickled model can carry anything
        raise UsageError("the model's settings for images are not understood", where=source, hint=HINT) from error


def _from_transformers(folder: Path) -> Preprocessing:
    """The image processor of a directory, with the defaults of its class. Nothing is downloaded."""
    file = folder / "preprocessor_config.json"
    try:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = processor.to_dict()
        other = [k for k, v in config.items() if k.startswith("do_") and v and k not in _KNOWN_STEPS]
        other += [k for k in ("crop_pct", "rescale_offset") if config.get(k)]
        if other:
            raise ValueError(f"tokenopt does not know {', '.join(other)}")
        resize, fit = _transformers_size(config) if config.get("do_resize") else (None, "cover")
        crop = config.get("crop_size") if config.get("do_center_crop") else None
        normalised = config.get("do_normalize")
        return Preprocessing(
            mean=tuple(config["image_mean"]) if normalised else (0.0,),
            std=tuple(config["image_std"]) if normalised else (1.0,),
            resize=resize,
            crop=(crop["height"], crop["width"]) if crop else None,
            fit=fit,
            interpolation=INTERPOLATIONS[2 if (code := config.get("resample")) is None else int(code)],
            scale=float(config.get("rescale_factor") or 1 / 255) if config.get("do_rescale") else 1.0,
            source=str(file),
        )
    except TokenoptError:
        raise
    except Exception as error:  # anything in a configuration that transformers, or this, does not understand
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            "the image processor of transformers is not understood", where=str(file), why=why, hint=HINT
        ) from error


def _transformers_size(config: Mapping[str, Any]) -> tuple[Size, str]:
    size = {k: v for k, v in dict(config["size"]).items() if v is not None}
    if size.keys() == {"height", "width"}:
        return (size["height"], size["width"]), "stretch"
    if size.keys() == {"shortest_edge"}:
        return (size["shortest_edge"],) * 2, "cover"
    raise ValueError(f"tokenopt does not know the size {size}")
