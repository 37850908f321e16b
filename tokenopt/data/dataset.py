"""Dataset: samples for a program, read when they are needed, one batch at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenopt.data.arrays import fixed_rows, load_arrays, row_inputs
from tokenopt.data.images import image_input
from tokenopt.data.preprocessing import Model, Preprocessing
from tokenopt.data.sources import (
    Arrays,
    Batch,
    Images,
    RandomRows,
    Samples,
    Skipped,
    Source,
    Stream,
    as_tensor,
    read_item,
)  # fmt: skip
from tokenopt.errors import UsageError
from tokenopt.program import InputSpec

RANDOM = "random"
RANDOM_ROWS = 32  # of random data, if nothing else is asked for
NOISE = "the data is random: ratios, thresholds and accuracies fitted to noise mean nothing"


@dataclass(frozen=True)
class Dataset:
    """Samples for a program, in the order of their source, which can be read any number of times.

    Made by `open_data`. What `sample` and `split` choose depends on the seed and the number of samples alone.
    """

    source: Source
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The inputs of the program, which the samples are for."""
        return self.source.inputs

    @property
    def labels(self) -> Tensor | None:
        """The label of every sample, [N, ...], or None. A sequence is read for them, one sample at a time."""
        return self.source.labels_of(self.rows)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the class folders; a label is an index into it."""
        return self.source.classes

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The files that were left out."""
        return self.source.skipped

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples, ``size`` at a time and the rest last. Memory holds one batch, however many there are.

        Of a program with a fixed batch, batches are of its size, and a rest that does not fill one is left out.

        Raises:
            TokenoptError: for an image that cannot be read; or, as a UsageError, an item of a wrong shape, or samples
                too few for a fixed batch.
        """
        fixed = None if any(_dynamic(spec) for spec in self.inputs) else fixed_rows(self.inputs)
        if fixed is None:
            return self.source.read(self.rows, size if any(row_inputs(self.inputs)) else 1)
        if len(self) < fixed:
            why = f"the model takes {fixed} at a time"
            raise UsageError(f"there are too few samples: {len(self)}", where=self.source.name, why=why)
        return self.source.read(self.rows[: len(self) - len(self) % fixed], fixed)

    def for_inputs(self, inputs: Sequence[InputSpec]) -> Dataset | None:
        """The same samples for a program with other inputs; None if the source has no arrays of their names."""
        named = self.source.named if isinstance(self.source, Arrays) else {}
        if not {spec.name for spec in inputs} <= named.keys():
            return None
        return Dataset(Arrays.of(named, tuple(inputs), self.source.name), self.rows)

    def sample(self, count: int, seed: int = 0) -> Dataset:
        """``count`` of the samples, chosen at random.

        Raises:
            UsageError: if there are fewer.
        """
        if count < 1:
            raise UsageError(f"cannot choose {count} samples", hint="--samples takes 1 or more")
        if count > len(self):
            raise self._too_few(f"{count} were asked for")
        return self._choose(_shuffled(len(self), seed)[:count])

    def split(self, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Two datasets without a common sample: what to fit on, and what is held out, a ``share`` of all chosen at
        random; at least one sample each.

        Raises:
            UsageError: if there is one sample alone, or the share is not between 0 and 1.
        """
        if not 0 < share < 1:
            raise UsageError(f"cannot hold out a share of {share}", why="it is between 0 and 1")
        if len(self) < 2:
            raise self._too_few("some have to be held out")
        held = min(max(1, round(share * len(self))), len(self) - 1)
        order = _shuffled(len(self), seed)
        return self._choose(order[held:]), self._choose(order[:held])

    def describe(self) -> dict[str, Any]:
        """What a report says: ``source, samples, labels (whether known), classes (how many, or null), preprocessing
        ({field: value}, or null), synthetic, skipped ([{file, why}])``."""
        source = self.source
        return {
            "source": source.name,
            "samples": len(self),
            "labels": source.labelled,
            "classes": len(source.classes) or None,
            "preprocessing": source.preprocessing.to_dict() if source.preprocessing else None,
            "synthetic": isinstance(source, RandomRows),
            "skipped": [asdict(s) for s in source.skipped],
        }

    def _choose(self, places: Sequence[int]) -> Dataset:
        return Dataset(self.source, [self.rows[place] for place in sorted(places)])

    def _too_few(self, why: str) -> UsageError:
        left_out = f"; {len(self.skipped)} files were skipped" if self.skipped else ""
        what = f"there are too few samples: {len(self)}"
        return UsageError(what, where=self.source.name, why=why + left_out)


def find_preprocessing(data: Any, model: Model, inputs: Sequence[InputSpec], **given: Any) -> Preprocessing | None:
    """`Preprocessing.resolve` for a folder of images; None for other data.

    Args:
        data: as for `open_data`.
        model, given: see `Preprocessing.resolve`.
        inputs: those of the program.

    Raises:
        UsageError: if something is given, and the data is no folder.
    """
    if isinstance(data, (str, os.PathLike)) and data != RANDOM and Path(data).is_dir():
        return Preprocessing.resolve(model, image_input(inputs, str(data))[1], **given)
    if options := ", ".join(f"--{name}" for name, value in given.items() if value is not None and name != "fit"):
        why = "its values are given to the model as they are"
        raise UsageError(f"only a folder of images takes {options}", where=str(data), why=why)
    return None


def open_data(
    data: Any,
    inputs: Sequence[InputSpec],
    *,
    preprocessing: Preprocessing | None = None,
    samples: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> Dataset:
    """Opens data for the inputs of a program.

    Args:
        data: one of

            - a folder of images, or of one folder of images per class: these, sorted by name, are the labels 0, 1, ...
              Images are decoded when their batch is read;
            - a ``.npz``, ``.npy`` or ``.safetensors`` file, its arrays named as the inputs, samples in the first
              dimension, and ``labels`` if known; a single input needs no name;
            - ``"random"``: noise, with a warning;
            - a mapping of tensors, as in such a file, or a tensor for a single input;
            - a sequence of samples, such as a torch ``Dataset`` (without random augmentation): read by index;
            - any other iterable that can be read again, such as a ``DataLoader`` (not shuffled) or a list of batches,
              or a function that returns an iterator: read once to be counted, and in full for every pass;
            - a `Dataset`, which keeps its inputs.

            An item of a sequence or iterable is a batch, or a sample if its tensors have one dimension fewer than the
            inputs. It is a tensor; a tuple or list of tensors in the order of the inputs, with or without labels behind
            them; a mapping by the names of inputs, with or without ``labels``; or a pair of such a tuple or mapping and
            labels.
        inputs: those of the program.
        preprocessing: for images.
        samples: so many, chosen at random; all by default.
        seed: of that choice, and of random data.
        skip_bad: leave out the files of a folder that cannot be used, and list them, instead of an error. All that are
            chosen are decoded once for it.

    Raises:
        UsageError: if the data does not fit the inputs, or there is too little of it.
        TokenoptError: if a file cannot be read, naming it.
    """
    inputs = tuple(inputs)
    if isinstance(data, Dataset):
        return data if samples is None else data.sample(samples, seed)
    source = _source(data, inputs, preprocessing, samples, seed, skip_bad)
    rows: Sequence[int] = range(source.count)
    if skip_bad and isinstance(source, Images):
        order = rows if samples is None else _shuffled(source.count, seed)
        rows = sorted(source.readable(order, samples))
    dataset = Dataset(source, rows)
    if not rows:
        raise dataset._too_few("none is left" if source.skipped else "nothing can be done with none")
    return dataset if samples is None else dataset.sample(samples, seed)


def _source(
    data: Any, inputs: tuple[InputSpec, ...], preprocessing: Preprocessing | None, samples: int | None, seed: int,
    skip_bad: bool,
) -> Source:  # fmt: skip
    if isinstance(data, str) and data == RANDOM:
        warnings.warn(NOISE, stacklevel=3)
        return RandomRows(RANDOM, inputs, RANDOM_ROWS if samples is None else samples, seed=seed)
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        if path.is_dir():
            return Images.of(path, inputs, preprocessing, skip_bad)
        return Arrays.of(load_arrays(path), inputs, str(path))
    name = type(data).__name__
    if isinstance(data, Tensor) or hasattr(data, "__array__"):
        return Arrays.of({"data": as_tensor(data, name)}, inputs, name)
    if isinstance(data, Mapping):
        return Arrays.of({k: as_tensor(v, f"{name}, {k}") for k, v in data.items()}, inputs, name)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        if len(data):
            _, single = read_item(data[0], inputs, f"{name}, item 0")
            if single:
                return Samples(name, inputs, len(data), items=data)
        make: Callable[[], Iterable[Any]] = lambda: map(data.__getitem__, range(len(data)))  # noqa: E731
    elif isinstance(data, Iterable):
        if isinstance(data, Iterator):
            hint = "give the function that makes it, a list, or a DataLoader"
            raise UsageError("the data can be read only once", where=name, hint=hint)
        make = lambda: data  # noqa: E731
    elif callable(data):
        make = data
    else:
        raise UsageError(f"this is no data: a {name}", hint="a path, tensors, or an iterable of them")
    stream = Stream(name, inputs, make=make)
    stream.count_rows()
    return stream


def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _dynamic(spec: InputSpec) -> bool:
    return bool(spec.shape) and isinstance(spec.shape[0], str)
