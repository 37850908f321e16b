"""Folders of images: what is in one, and one image at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenopt.errors import TokenoptError, UsageError
from tokenopt.program import InputSpec

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # those of Pillow that need no other program
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SKIP_HINT = "--skip-bad leaves such files out, and lists them"
_NAMED = 5  # files in a message


@dataclass
class Folder:
    """The files of a folder of images, in the order of their names.

    Args:
        files: the images; in class folders, class by class.
        labels: the index of each file's class; empty for a flat folder.
        classes: the names of the class folders, sorted: a class without images keeps its index.
        bad: (file, why) of everything else that is not hidden.
    """

    path: Path
    files: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    bad: list[tuple[Path, str]] = field(default_factory=list)


def list_folder(path: Path) -> Folder:
    """What is in a folder: images, or one folder of images per class. No file is opened, and links are followed.

    Names that begin with a dot are left out. What is deeper than a class folder is not looked at.

    Raises:
        UsageError: if there are images beside class folders, or none at all.
        TokenoptError: if a folder cannot be read.
    """
    found = Folder(path)
    entries = _entries(path)
    folders = [p for p in entries if p.is_dir()]
    _add(found, [p for p in entries if not p.is_dir()], None)
    if folders and found.files:
        why = f"{len(found.files)} images ({found.files[0].name}) are beside {len(folders)} folders ({folders[0].name})"
        raise UsageError("the images are neither flat nor in one folder per class", where=str(path), why=why)
    for label, folder in enumerate(folders):
        found.classes.append(folder.name)
        _add(found, _entries(folder), label)
    if not found.files:
        why = f"it holds {found.bad[0][0].name}, {found.bad[0][1]}" if found.bad else "it is empty"
        hint = f"images end in one of: {', '.join(SUFFIXES)}"
        raise UsageError("the folder holds no images", where=str(path), why=why, hint=hint)
    return found


def refuse_bad(folder: Folder) -> None:
    """Raises: TokenoptError if a folder holds anything that is no image, naming the first few."""
    if folder.bad:
        named = "; ".join(f"{p.relative_to(folder.path)}: {why}" for p, why in folder.bad[:_NAMED])
        more = f"; and {len(folder.bad) - _NAMED} more" if len(folder.bad) > _NAMED else ""
        what = f"the folder holds {len(folder.bad)} that cannot be used"
        raise TokenoptError(what, where=str(folder.path), why=named + more, hint=SKIP_HINT)


def decode(path: Path, mode: str) -> Image:
    """One image in mode RGB or L; of an animation the first.

    The rotation in a photograph's metadata is not applied, nor do timm and torchvision.

    Raises:
        TokenoptError: if it cannot be read, or is larger than Pillow thinks safe.
    """
    image_class = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image_class.DecompressionBombWarning)
            with image_class.open(path, formats=FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"its mode is {image.mode}: more than 8 bits per value would be cut")
                return image.convert(mode)
    except MemoryError:
        raise
    except (image_class.DecompressionBombError, image_class.DecompressionBombWarning) as error:
        why, cause = f"it has more than {image_class.MAX_IMAGE_PIXELS} pixels, Pillow's limit", error
    except image_class.UnidentifiedImageError as error:
        why, cause = "it is empty" if path.stat().st_size == 0 else f"it is none of {', '.join(FORMATS)}", error
    except Exception as error:  # a damaged file can fail anywhere in a decoder
        why, cause = " ".join(str(error).split()) or type(error).__name__, error
    raise TokenoptError("the image cannot be read", where=str(path), why=why, hint=SKIP_HINT) from cause


def pillow() -> Any:
    """``PIL.Image``.

    Raises:
        UsageError: if Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError("images need Pillow", why=str(error), hint="pip install 'tokenopt[data]'") from error
    return Image


def image_input(inputs: Sequence[InputSpec], where: str) -> tuple[str, tuple[int, int] | None]:
    """The mode of the images that a model takes, RGB or L, and their (height, width) where it is fixed.

    Raises:
        UsageError: if it does not take one input of images.
    """
    shapes = ", ".join(f"{s.name} {s.dtype}{list(s.shape)}" for s in inputs)
    if len(inputs) == 1 and len(inputs[0].shape) == 4 and "float" in inputs[0].dtype and inputs[0].shape[1] in (1, 3):
        _, channels, height, width = inputs[0].shape
        size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        return "RGB" if channels == 3 else "L", size
    raise UsageError(
        "a folder of images does not fit the model",
        where=where,
        why=f"it takes {shapes}; images are one input of floats [batch, 3 or 1, height, width]",
        hint="save its inputs as arrays: .npz, .npy or .safetensors",
    )


def _entries(path: Path) -> list[Path]:
    try:
        return sorted((p for p in path.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    except OSError as error:
        raise TokenoptError("the folder cannot be read", where=str(path), why=error.strerror) from error


def _add(found: Folder, paths: list[Path], label: int | None) -> None:
    for path in paths:
        if path.is_dir():
            found.bad.append((path, "a folder in the folder of a class"))
        elif path.suffix.lower() not in SUFFIXES:
            found.bad.append((path, "no image, by its name"))
        elif not path.is_file():
            found.bad.append((path, "a broken link" if path.is_symlink() else "not a regular file"))
        else:
            found.files.append(path)
            found.labels += [] if label is None else [label]
