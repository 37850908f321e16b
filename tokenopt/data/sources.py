"""Where samples are read from: arrays, image files, noise, sequences, and what can only be iterated."""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenopt.data.arrays import LABELS, check_inputs, check_labels, match_inputs, row_inputs
from tokenopt.data.images import SKIP_HINT, decode, image_input, list_folder, pillow, refuse_bad
from tokenopt.data.preprocessing import HINT, Preprocessing, Size
from tokenopt.errors import TokenoptError, UsageError
from tokenopt.program import InputSpec


@dataclass(frozen=True)
class Batch:
    """Some samples: the inputs of a program in its order, [B, ...] each, and their labels [B, ...] if known."""

    inputs: list[Tensor]
    labels: Tensor | None = None


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    file: str
    why: str


@dataclass
class Source:
    """Samples 0 to ``count`` - 1. ``take`` reads any of them; a source that cannot do that overrides ``read``."""

    name: str
    inputs: tuple[InputSpec, ...]
    count: int = 0
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    preprocessing: Preprocessing | None = None

    @property
    def labelled(self) -> bool:
        """Whether the labels are known."""
        return self.labels is not None

    def labels_of(self, rows: Sequence[int]) -> Tensor | None:
        return None if self.labels is None else self.labels[list(rows)]

    def take(self, rows: Sequence[int]) -> Batch:
        raise NotImplementedError

    def read(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        """The rows, in ascending order, ``size`` at a time and the rest last."""
        for start in range(0, len(rows), size):
            yield self.take(rows[start : start + size])

    def _batch(self, tensors: Iterable[Tensor], labels: Tensor | None) -> Batch:
        """A batch in the dtypes of the program."""
        dtypes = (getattr(torch, spec.dtype) for spec in self.inputs)
        return Batch([t.to(d) for t, d in zip(tensors, dtypes, strict=True)], labels)


@dataclass
class Arrays(Source):
    """Rows of arrays."""

    named: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor], inputs: tuple[InputSpec, ...], name: str) -> Arrays:
        tensors = match_inputs(arrays, inputs, name)
        count = check_inputs(tensors, inputs, name)
        labels = None if LABELS in {spec.name for spec in inputs} else arrays.get(LABELS)
        labels = None if labels is None else check_labels(labels, count, name)
        return cls(name, inputs, count, labels, named=arrays)

    def take(self, rows: Sequence[int]) -> Batch:
        pairs = zip(match_inputs(self.named, self.inputs, self.name), row_inputs(self.inputs), strict=True)
        tensors = (t[list(rows)] if batched else t for t, batched in pairs)
        return self._batch(tensors, self.labels_of(rows))


@dataclass
class Images(Source):
    """Image files, each decoded when its row is taken."""

    files: list[Path] = field(default_factory=list)
    mode: str = "RGB"
    size: Size | None = None

    @classmethod
    def of(
        cls, path: Path, inputs: tuple[InputSpec, ...], preprocessing: Preprocessing | None, skip_bad: bool
    ) -> Images:
        name = str(path)
        pillow()  # missing, it is no reason to skip a file
        mode, size = image_input(inputs, name)
        if preprocessing is None:
            raise UsageError("the model does not say how its images are made", where=name, hint=HINT)
        if preprocessing.size and size and preprocessing.size != size:
            why = f"the preprocessing makes {_pixels(preprocessing.size)}, the model takes {_pixels(size)}"
            raise UsageError("the images would have another size", where=name, why=why, hint="--crop, or --resize")
        if size is None and preprocessing.size is None:
            raise UsageError("the images would have sizes of their own", where=name, hint="--crop 224")
        folder = list_folder(path)
        if not skip_bad:
            refuse_bad(folder)
        return cls(
            name,
            inputs,
            count=len(folder.files),
            labels=torch.tensor(folder.labels) if folder.classes else None,
            classes=tuple(folder.classes),
            skipped=tuple(Skipped(str(p), why) for p, why in folder.bad),
            preprocessing=preprocessing.for_channels({"RGB": 3, "L": 1}[mode]),
            files=folder.files,
            mode=mode,
            size=size,
        )

    def take(self, rows: Sequence[int]) -> Batch:
        return self._batch([torch.stack([self._image(row) for row in rows])], self.labels_of(rows))

    def readable(self, rows: Sequence[int], wanted: int | None) -> list[int]:
        """The first ``wanted`` of the rows that can be read, or all; the others are skipped."""
        found: list[int] = []
        for row in rows:
            if len(found) == wanted:
                break
            try:
                self._image(row)
                found.append(row)
            except TokenoptError as error:
                self.skipped += (Skipped(str(self.files[row]), error.why or error.what),)
        return found

    def _image(self, row: int) -> Tensor:
        path = self.files[row]
        assert self.preprocessing is not None, "images have a preprocessing"
        try:
            tensor = self.preprocessing(decode(path, self.mode))
        except ValueError as error:
            raise TokenoptError("the image cannot be used", where=str(path), why=str(error), hint=SKIP_HINT) from error
        if self.size and tuple(tensor.shape[1:]) != self.size:
            why = f"it has {_pixels(tensor.shape[1:])}, the model takes {_pixels(self.size)}"
            raise UsageError("the image cannot be used", where=str(path), why=why, hint=f"--crop, or {SKIP_HINT}")
        return tensor


def _pixels(size: Sequence[int]) -> str:
    """Height before width, as in the shapes of tensors."""
    return f"{size[0]} x {size[1]} pixels"


@dataclass
class RandomRows(Source):
    """Noise: normal floats, and integers that are 0 or 1, which any vocabulary has. A row depends on the seed alone."""

    seed: int = 0

    def take(self, rows: Sequence[int]) -> Batch:
        tensors: list[list[Tensor]] = [[] for _ in self.inputs]
        for row in rows:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
            for made, spec, batched in zip(tensors, self.inputs, row_inputs(self.inputs), strict=True):
                shape = [2 if isinstance(s, str) else s for s in (spec.shape[1:] if batched else spec.shape)]
                floating = getattr(torch, spec.dtype).is_floating_point
                made.append(torch.randn(shape, generator=generator) if floating
                            else torch.randint(2, shape, generator=generator))  # fmt: skip
        pairs = zip(tensors, row_inputs(self.inputs), strict=True)
        return self._batch((torch.stack(made) if batched else made[0] for made, batched in pairs), None)


@dataclass
class Samples(Source):
    """A sequence of single samples, such as a torch ``Dataset``: what is asked for is read by its index."""

    items: Any = None

    @property
    def labelled(self) -> bool:
        return self.take([0]).labels is not None

    def labels_of(self, rows: Sequence[int]) -> Tensor | None:
        found = [self.take([row]).labels for row in rows]
        labels = [label for label in found if label is not None]
        return torch.cat(labels) if len(labels) == len(found) else None

    def take(self, rows: Sequence[int]) -> Batch:
        return _join([read_item(self.items[row], self.inputs, f"{self.name}, item {row}")[0] for row in rows], self)


@dataclass
class Stream(Source):
    """What can only be iterated, such as a ``DataLoader``: read once to be counted, it must repeat itself then."""

    make: Callable[[], Iterable[Any]] = list
    digests: list[int] = field(default_factory=list)

    def count_rows(self) -> None:
        labels = []
        for batch in self._batches(known=False):
            self.count += check_inputs(batch.inputs, _any_batches(self.inputs))
            labels.append(batch.labels)
        if labels and all(found is not None for found in labels):
            self.labels = torch.cat(labels)

    def read(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        start, kept = 0, []
        for batch in self._batches(known=True):
            end = start + check_inputs(batch.inputs, _any_batches(self.inputs))
            for row in rows[bisect_left(rows, start) : bisect_left(rows, end)]:
                kept.append(_slice(batch, row - start, self.inputs))
                if len(kept) == size:
                    yield _join(kept, self)
                    kept = []
            start = end
            if start > rows[-1]:
                break
        if start <= rows[-1]:
            raise self._changed(f"it ended after {start} samples")
        if kept:
            yield _join(kept, self)

    def _batches(self, known: bool) -> Iterator[Batch]:
        for index, item in enumerate(self.make()):
            batch, _ = read_item(item, self.inputs, f"{self.name}, item {index}")
            digest = zlib.crc32(batch.inputs[0].contiguous().flatten().view(torch.uint8).numpy())
            if not known:
                self.digests.append(digest)
            elif index >= len(self.digests) or self.digests[index] != digest:
                raise self._changed(f"item {index} is another one")
            yield batch

    def _changed(self, why: str) -> UsageError:
        return UsageError(
            "the data is not the same when it is read again",
            where=self.name,
            why=f"{why}: what was fitted on and what is held out could not be told apart",
            hint="DataLoader(shuffle=False), and no random augmentation",
        )


def _any_batches(inputs: Sequence[InputSpec]) -> list[InputSpec]:
    """The inputs as if the batch were dynamic."""
    pairs = zip(inputs, row_inputs(inputs), strict=True)
    return [InputSpec(s.name, s.dtype, ("batch", *s.shape[1:])) if batched else s for s, batched in pairs]


def _slice(batch: Batch, row: int, inputs: Sequence[InputSpec]) -> Batch:
    """One sample of a batch."""
    tensors = [t[row : row + 1] if b else t for t, b in zip(batch.inputs, row_inputs(inputs), strict=True)]
    return Batch(tensors, None if batch.labels is None else batch.labels[row : row + 1])


def _join(batches: Sequence[Batch], source: Source) -> Batch:
    """Several batches as one, in the dtypes of the program."""
    tensors, rows = [], row_inputs(source.inputs)
    for spec, batched, *parts in zip(source.inputs, rows, *(b.inputs for b in batches), strict=True):
        if not batched and not all(torch.equal(part, parts[0]) for part in parts[1:]):
            why = "it has no dimension for samples, and is the same for all of a batch"
            raise UsageError(f"the data for input {spec.name!r} differs between samples", where=source.name, why=why)
        tensors.append(torch.cat(parts) if batched else parts[0])
    labels = [b.labels for b in batches if b.labels is not None]
    return source._batch(tensors, torch.cat(labels) if len(labels) == len(batches) else None)


# -- items of iterables ----------------------------------------------------------------------------------------------


def read_item(item: Any, inputs: Sequence[InputSpec], where: str) -> tuple[Batch, bool]:
    """What an iterable gave, as a batch, and whether it was a single sample; see `open_data` for what may be given."""
    values, labels = _parts(item, inputs, where)
    tensors, single = [], False
    for value, spec, batched in zip(values, inputs, row_inputs(inputs), strict=True):
        tensor = as_tensor(value, where)
        if batched and tensor.dim() == len(spec.shape) - 1:
            tensor, single = tensor[None], True
        tensors.append(tensor)
    rows = check_inputs(tensors, _any_batches(inputs), where)
    if labels is not None:
        labels = as_tensor(labels, where)
        labels = check_labels(labels[None] if single else labels, rows, where)
    return Batch(tensors, labels), single


def _parts(item: Any, inputs: Sequence[InputSpec], where: str) -> tuple[list[Any], Any]:
    """The inputs of an item in order, and its labels or None."""
    if isinstance(item, Mapping):
        labels = None if LABELS in {spec.name for spec in inputs} else item.get(LABELS)
        return match_inputs(item, inputs, where), labels
    if not isinstance(item, (tuple, list)):
        item = [item]
    if len(item) == 2 and isinstance(item[0], (tuple, list, Mapping)):
        return _parts(item[0], inputs, where)[0], item[1]
    if len(item) in (len(inputs), len(inputs) + 1):
        return list(item[: len(inputs)]), item[len(inputs)] if len(item) > len(inputs) else None
    names = ", ".join(spec.name for spec in inputs)
    why = f"the model takes {names}, with or without labels behind"
    raise UsageError(f"an item of the data has {len(item)} parts", where=where, why=why)


def as_tensor(value: Any, where: str) -> Tensor:
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        why = f"it is a {type(value).__name__}"
        raise UsageError("an item of the data is no tensor", where=where, why=why) from error
