"""Data: array files, folders of images, iterables; matched to inputs, read lazily, chosen and split by a seed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tokenopt import cli, run
from tokenopt.data import Batch, Dataset, Preprocessing, find_preprocessing, open_data, sources
from tokenopt.data.arrays import load_arrays
from tokenopt.errors import TokenoptError, UsageError
from tokenopt.program import InputSpec
from tokenopt.report import Report

ROWS = InputSpec("x", "float32", ("s0", 3, 4))
IDS = InputSpec("ids", "int64", ("s0", 5))
IMAGE = InputSpec("x", "float32", ("batch", 3, 8, 8))
EIGHT = Preprocessing(mean=(0.5,), std=(0.25,), resize=(8, 8), crop=(8, 8))


def noise(height: int = 12, width: int = 10, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A folder of ten images."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for i in range(10):
        noise(seed=i).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three folders with 2, 0 and 3 images."""
    for name, count in (("ant", 2), ("bee", 0), ("cat", 3)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for i in range(count):
            noise(seed=i).save(tmp_path / "classes" / name / f"{i}.jpg")
    return tmp_path / "classes"


def stacked(dataset: Dataset, size: int = 3) -> Tensor:
    return torch.cat([batch.inputs[0] for batch in dataset.batches(size)])


# -- array files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.npz", "x.npy", "a.safetensors"])
def test_formats(tmp_path: Path, name: str) -> None:
    array = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
    labels = np.array([3, 1, 2, 0, 4], dtype=np.int32)
    np.savez(tmp_path / "a.npz", x=array, labels=labels)
    np.save(tmp_path / "x.npy", array)
    save_file({"x": torch.from_numpy(array), "labels": torch.from_numpy(labels)}, tmp_path / "a.safetensors")
    dataset = open_data(tmp_path / name, [ROWS])
    batches = list(dataset.batches(2))
    assert [len(batch.inputs[0]) for batch in batches] == [2, 2, 1]
    assert torch.equal(stacked(dataset), torch.from_numpy(array))
    if name == "x.npy":
        assert dataset.labels is None and batches[0].labels is None
    else:
        assert dataset.labels.tolist() == [3, 1, 2, 0, 4] and dataset.labels.dtype == torch.int64
        assert batches[1].labels.tolist() == [2, 0]


def test_inputs_are_matched_by_name_and_converted() -> None:
    ids = torch.ones(2, 5, dtype=torch.int32)
    arrays = {"other": torch.zeros(9), "ids": ids, "x": torch.zeros(2, 3, 4, dtype=torch.float64)}
    (batch,) = open_data(arrays, [ROWS, IDS]).batches(2)
    assert [t.dtype for t in batch.inputs] == [torch.float32, torch.int64]


def test_a_single_array_needs_no_name() -> None:
    arrays = {"arr_0": torch.zeros(2, 3, 4), "labels": torch.zeros(2)}
    assert stacked(open_data(arrays, [ROWS])).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, "no input 'x'"),
        ({"x": torch.zeros(2, 3, 5), "ids": torch.ones(2, 5, dtype=torch.int64)}, r"\[2, 3, 5\]"),
        ({"x": torch.zeros(0, 3, 4), "ids": torch.ones(0, 5, dtype=torch.int64)}, r"\[0, 3, 4\]"),
        ({"x": torch.zeros(2, 3, 4), "ids": torch.ones(2, 5)}, "'ids' is float32"),
        ({"x": torch.zeros(2, 3, 4), "ids": torch.ones(3, 5, dtype=torch.int64)}, "number of rows"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, Tensor], message: str) -> None:
    save_file(arrays, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=message) as caught:
        open_data(tmp_path / "a.safetensors", [ROWS, IDS])
    assert caught.value.where == str(tmp_path / "a.safetensors")


def test_labels_of_another_length() -> None:
    with pytest.raises(UsageError, match="labels have shape"):
        open_data({"x": torch.zeros(2, 3, 4), "labels": torch.zeros(3)}, [ROWS])
    labels = InputSpec("labels", "int64", ("s0",))
    assert open_data({"x": torch.zeros(2, 3, 4), "labels": torch.ones(2).long()}, [ROWS, labels]).labels is None


def test_batches_keep_rows_together() -> None:
    static, x = InputSpec("scale", "float32", (1,)), InputSpec("x", "float32", ("s0",))
    dataset = open_data({"x": torch.arange(5.0), "scale": torch.ones(1)}, [x, static])
    assert [b.inputs[0].tolist() for b in dataset.batches(2)] == [[0, 1], [2, 3], [4]]
    assert all(b.inputs[1].shape == (1,) for b in dataset.batches(2))


def test_a_fixed_batch_is_filled() -> None:
    fixed = InputSpec("x", "float32", (2, 3))
    dataset = open_data(torch.arange(15.0).reshape(5, 3), [fixed])
    assert [b.inputs[0].shape[0] for b in dataset.batches(32)] == [2, 2]
    with pytest.raises(UsageError, match="too few samples: 1"):
        dataset.sample(1).batches(32)
    unlike = [InputSpec("a", "float32", (2, 3)), InputSpec("b", "float32", (4,))]  # no dimension for samples
    one = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    for data, count in ((one, 1), ([one, one], 2)):
        found = [[list(t.shape) for t in batch.inputs] for batch in open_data(data, unlike).batches(32)]
        assert found == [[[2, 3], [4]]] * count


def test_npy_files_are_mapped_and_never_written(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 3, 4), np.uint8))
    (array,) = load_arrays(tmp_path / "a.npy").values()
    array += 1
    assert not np.load(tmp_path / "a.npy").any()


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"\x93NUMPY\x01\x00", b"\xff" * 64])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenoptError, match="cannot be read") as caught:
        load_arrays(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)


def test_python_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([print], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", np.array([print], dtype=object))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(TokenoptError, match="cannot be read"):
            load_arrays(tmp_path / name)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such data file or folder"):
        load_arrays(tmp_path / "a.npz")
    (tmp_path / "a.csv").write_text("0,1")
    with pytest.raises(UsageError, match="another format"):
        load_arrays(tmp_path / "a.csv")


# -- folders of images -----------------------------------------------------------------------------------------------


def test_a_flat_folder(flat: Path) -> None:
    dataset = open_data(flat, [IMAGE], preprocessing=EIGHT)
    assert len(dataset) == 10 and dataset.labels is None and dataset.classes == ()
    batches = list(dataset.batches(4))
    assert [tuple(b.inputs[0].shape) for b in batches] == [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)]
    assert torch.equal(batches[1].inputs[0][0], EIGHT.for_channels(3)(noise(seed=4)))
    said = dataset.describe()
    assert (said["samples"], said["labels"], said["classes"], said["source"]) == (10, False, None, str(flat))
    assert said["preprocessing"]["mean"] == (0.5,) * 3 and said["skipped"] == []


def test_class_folders_give_labels(classes: Path) -> None:
    dataset = open_data(classes, [IMAGE], preprocessing=EIGHT)
    assert dataset.classes == ("ant", "bee", "cat")
    assert dataset.labels.tolist() == [0, 0, 2, 2, 2], "a class without images keeps its index"
    assert [b.labels.tolist() for b in dataset.batches(3)] == [[0, 0, 2], [2, 2]]
    assert dataset.describe()["classes"] == 3


def test_images_are_decoded_with_their_batch(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    decode = sources.decode
    monkeypatch.setattr(sources, "decode", lambda path, mode: decoded.append(path.name) or decode(path, mode))
    batches = open_data(flat, [IMAGE], preprocessing=EIGHT).batches(3)
    assert decoded == []
    next(batches)
    assert decoded == ["0.png", "1.png", "2.png"]


def test_grey_images_and_half_precision(flat: Path) -> None:
    grey = InputSpec("x", "float16", ("batch", 1, 8, 8))
    (batch,) = open_data(flat, [grey], preprocessing=EIGHT).sample(2).batches(8)
    assert batch.inputs[0].shape == (2, 1, 8, 8) and batch.inputs[0].dtype == torch.float16
    with pytest.raises(UsageError, match="3 channels, the model 1"):
        open_data(flat, [grey], preprocessing=Preprocessing((0.1, 0.2, 0.3), (1.0, 1.0, 1.0), crop=(8, 8)))


def break_folder(flat: Path) -> None:
    (flat / "2.png").write_bytes((flat / "2.png").read_bytes()[:150])
    (flat / "3.png").write_bytes(b"")
    (flat / "4.png").write_text("no image")


@pytest.mark.parametrize(("name", "why"), [("2.png", "truncated"), ("3.png", "empty"), ("4.png", "none of BMP")])
def test_a_corrupt_image_is_named(flat: Path, name: str, why: str) -> None:
    break_folder(flat)
    dataset = open_data(flat, [IMAGE], preprocessing=EIGHT)
    with pytest.raises(TokenoptError, match=why) as caught:
        dataset.source.take([int(name[0])])
    assert caught.value.where == str(flat / name) and "--skip-bad" in str(caught.value)
    with pytest.raises(TokenoptError, match="cannot be read"):
        stacked(dataset)


def test_skip_bad_counts_and_lists(flat: Path) -> None:
    break_folder(flat)
    (flat / "labels.csv").write_text("0,1")
    dataset = open_data(flat, [IMAGE], preprocessing=EIGHT, skip_bad=True)
    assert len(dataset) == len(stacked(dataset)) == 7
    skipped = dataset.describe()["skipped"]
    assert [Path(s["file"]).name for s in skipped] == ["labels.csv", "2.png", "3.png", "4.png"]
    assert all(s["why"] for s in skipped)
    some = [open_data(flat, [IMAGE], preprocessing=EIGHT, skip_bad=True, samples=5, seed=1) for _ in range(2)]
    assert len(some[0]) == 5 and torch.equal(*map(stacked, some))
    with pytest.raises(UsageError, match=r"too few samples: 7[^$]*8 were asked for; 4 files were skipped"):
        open_data(flat, [IMAGE], preprocessing=EIGHT, skip_bad=True, samples=8)


def test_skip_bad_keeps_labels_in_step(classes: Path) -> None:
    (classes / "cat" / "0.jpg").write_bytes(b"no image")
    dataset = open_data(classes, [IMAGE], preprocessing=EIGHT, skip_bad=True)
    assert dataset.labels.tolist() == [0, 0, 2, 2]


def test_files_that_are_no_images_are_named(flat: Path) -> None:
    (flat / "readme.txt").write_text("hello")
    (flat / "gone.png").symlink_to(flat / "nowhere.png")
    os.mkfifo(flat / "pipe.png")
    with pytest.raises(TokenoptError, match=r"gone.png: a broken link; pipe.png: not a regular file; readme.txt"):
        open_data(flat, [IMAGE], preprocessing=EIGHT)


def test_hidden_files_are_left_out_and_links_followed(flat: Path, classes: Path) -> None:
    for name in (".DS_Store", ".hidden.png"):
        (flat / name).write_bytes(b"")
    (flat / "linked.png").symlink_to(classes / "cat" / "0.jpg")
    (flat / ".git").mkdir()
    assert len(open_data(flat, [IMAGE], preprocessing=EIGHT)) == 11
    (classes / "dog").symlink_to(classes / "cat")
    (classes / ".cache").mkdir()
    assert open_data(classes, [IMAGE], preprocessing=EIGHT).labels.tolist() == [0, 0, 2, 2, 2, 3, 3, 3]


def test_folders_of_another_form(tmp_path: Path, flat: Path, classes: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        open_data(tmp_path / "empty", [IMAGE], preprocessing=EIGHT)
    (flat / "more").mkdir()
    with pytest.raises(UsageError, match="neither flat nor"):
        open_data(flat, [IMAGE], preprocessing=EIGHT)
    (classes / "cat" / "deeper").mkdir()
    with pytest.raises(TokenoptError, match="cat/deeper: a folder in the folder of a class"):
        open_data(classes, [IMAGE], preprocessing=EIGHT)
    with pytest.raises(UsageError, match="does not fit the model"):
        open_data(classes, [ROWS], preprocessing=EIGHT)
    with pytest.raises(UsageError, match=r"no such data file[^$]*absent.npz"):
        open_data(tmp_path / "absent.npz", [ROWS])


def test_pillow_is_needed_for_images_alone(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert len(open_data(X, [ROWS])) == 5
    with pytest.raises(UsageError, match=r"tokenopt\[data\]"):
        open_data(flat, [IMAGE], preprocessing=EIGHT, skip_bad=True)


def test_huge_images(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(1, 400).save(flat / "line.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(TokenoptError, match="would become 3200 x 8"):  # as high as asked for, and as wide as a bomb
        open_data(flat, [IMAGE], preprocessing=EIGHT).source.take([10])
    for side in (40, 90):  # Pillow warns of the first, and refuses the second
        noise(side, side).save(flat / "large.png")
        with pytest.raises(TokenoptError, match=r"more than 1000 pixels") as caught:
            open_data(flat, [IMAGE], preprocessing=EIGHT).source.take([10])
        assert caught.value.where == str(flat / "large.png")


def test_sixteen_bits_are_not_cut(flat: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(flat / "0.png")
    with pytest.raises(TokenoptError, match="more than 8 bits"):
        stacked(open_data(flat, [IMAGE], preprocessing=EIGHT))


def test_images_of_a_size_the_model_does_not_take(flat: Path) -> None:
    with pytest.raises(UsageError, match="makes 6 x 6 pixels, the model takes 8 x 8"):
        open_data(flat, [IMAGE], preprocessing=Preprocessing((0.5,), (0.5,), crop=(6, 6)))
    with pytest.raises(UsageError, match="it has 12 x 10 pixels") as caught:
        stacked(open_data(flat, [IMAGE], preprocessing=Preprocessing((0.5,), (0.5,))))
    assert caught.value.where == str(flat / "0.png")


# -- choosing --------------------------------------------------------------------------------------------------------


def test_sample_and_split_depend_on_the_seed_alone(flat: Path) -> None:
    def opened(**options: Any) -> Dataset:
        return open_data(flat, [IMAGE], preprocessing=EIGHT, **options)

    assert torch.equal(stacked(opened(samples=4, seed=3)), stacked(opened(samples=4, seed=3)))
    assert torch.equal(stacked(opened(samples=4, seed=3)), stacked(opened().sample(4, seed=3)))
    assert not torch.equal(stacked(opened(samples=4, seed=3)), stacked(opened(samples=4, seed=4)))
    fit, held = opened().split(0.3, seed=5)
    again = opened().split(0.3, seed=5)
    assert (len(fit), len(held)) == (7, 3)
    assert all(torch.equal(stacked(a), stacked(b)) for a, b in zip((fit, held), again, strict=True))
    assert sorted([*fit.rows, *held.rows]) == list(range(10))
    assert opened().split(0.3, seed=6)[1].rows != held.rows
    nested_fit, nested_held = fit.split(0.5)
    assert not {*nested_fit.rows, *nested_held.rows} & {*held.rows}


def test_too_few(flat: Path) -> None:
    dataset = open_data(flat, [IMAGE], preprocessing=EIGHT)
    with pytest.raises(UsageError, match=r"too few samples: 10[^$]*flat[^$]*11 were asked for"):
        dataset.sample(11)
    with pytest.raises(UsageError, match="too few samples: 1"):
        dataset.sample(1).split(0.5)
    for share in (0.0, 1.0):
        with pytest.raises(UsageError, match="share"):
            dataset.split(share)
    assert [len(part) for part in dataset.sample(2).split(0.01)] == [1, 1]


# -- what Python can iterate -----------------------------------------------------------------------------------------

X, Y = torch.arange(5 * 12.0).reshape(5, 3, 4), torch.tensor([4, 3, 2, 1, 0])


def batches_of_two() -> Iterator[Any]:
    for start in range(0, 5, 2):
        yield X[start : start + 2], Y[start : start + 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(TensorDataset(X, Y), batch_size=2),
        lambda: TensorDataset(X, Y),
        lambda: batches_of_two,
        lambda: list(batches_of_two()),
        lambda: [(x, int(y)) for x, y in zip(X, Y, strict=True)],
        lambda: [{"x": x.numpy(), "labels": y} for x, y in zip(X, Y, strict=True)],
        lambda: [({"x": x}, y) for x, y in batches_of_two()],
        lambda: [([x], y) for x, y in batches_of_two()],
        lambda: {"x": X, "labels": Y},
    ],
)
def test_iterables(make: Callable[[], Any]) -> None:
    dataset = open_data(make(), [ROWS])
    assert len(dataset) == 5 and torch.equal(dataset.labels, Y) and dataset.describe()["labels"]
    for _ in range(2):  # as often as wanted
        batches = list(dataset.batches(3))
        assert [len(batch.inputs[0]) for batch in batches] == [3, 2]
        assert torch.equal(torch.cat([b.inputs[0] for b in batches]), X)
        assert torch.equal(torch.cat([b.labels for b in batches]), Y)
    fit, held = dataset.split(0.4)
    assert torch.equal(stacked(fit), X[list(fit.rows)]) and torch.equal(held.labels, Y[list(held.rows)])


def test_iterables_without_labels() -> None:
    for data in ([X[:3], X[3:]], list(X), X, X.numpy(), [(x,) for x in X], [{"x": X}]):
        dataset = open_data(data, [ROWS])
        assert torch.equal(stacked(dataset), X)
        assert dataset.labels is None and not dataset.describe()["labels"]


def test_several_inputs_are_not_taken_for_labels() -> None:
    ids = torch.arange(25).reshape(5, 5)
    for data, labelled in (([(X, ids)], False), ([(X, ids, Y)], True), ([((X, ids), Y)], True)):
        dataset = open_data(data, [ROWS, IDS])
        assert torch.equal(next(dataset.batches(9)).inputs[1], ids)
        assert (dataset.labels is not None) == labelled


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([X, torch.zeros(2, 3, 5)], r"shape \[2, 3, 5\][^$]*list, item 1"),
        ([(X, Y, Y)], "3 parts"),
        ([(X, Y[:2])], r"labels have shape \[2\]"),
        ([{"y": X}], None),
        (["text"], "no tensor"),
        ([], "too few samples: 0"),
        (batches_of_two(), "only once"),
        (3, "this is no data: a int"),
    ],
)
def test_iterables_that_do_not_fit(data: Any, message: str | None) -> None:
    if message is None:  # a single array needs no name
        assert len(open_data(data, [ROWS])) == 5
        return
    with pytest.raises(UsageError, match=message):
        open_data(data, [ROWS])


def test_a_shuffled_loader_is_refused_when_it_shows() -> None:
    dataset = open_data(DataLoader(TensorDataset(X, Y), batch_size=1, shuffle=True), [ROWS])
    with pytest.raises(UsageError, match=r"shuffle=False"):
        for _ in range(9):
            stacked(dataset)


def test_a_stream_that_ends_early_is_refused() -> None:
    ends = iter((5, 3))

    def stream() -> Iterator[Tensor]:
        yield from X[: next(ends)]

    with pytest.raises(UsageError, match="ended after 3 samples"):
        stacked(open_data(stream, [ROWS]))


def test_inputs_without_samples_are_the_same_for_all_of_a_batch() -> None:
    scale = InputSpec("scale", "float32", (1,))
    items = [(x, torch.tensor([float(i // 2)])) for i, x in enumerate(X)]
    dataset = open_data(items, [ROWS, scale])
    assert [b.inputs[1].item() for b in dataset.batches(2)] == [0, 1, 2]
    with pytest.raises(UsageError, match="'scale' differs between samples"):
        next(dataset.batches(3))


def test_a_sequence_is_read_by_index() -> None:
    class Lazy:
        seen: list[int] = []

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> Tensor:
            self.seen.append(index)
            return X[index % 5]

    dataset = open_data(Lazy(), [ROWS], samples=3)
    stacked(dataset)
    assert len(set(Lazy.seen)) <= 4


def test_a_stream_is_not_read_further_than_needed() -> None:
    read = 0

    def stream() -> Iterator[Tensor]:
        nonlocal read
        for x in X:
            read += 1
            yield x

    batches = open_data(stream, [ROWS]).batches(2)
    read = 0
    assert isinstance(next(batches), Batch) and read == 2


def test_random_data_warns() -> None:
    with pytest.warns(UserWarning, match="noise mean nothing"):
        dataset = open_data("random", [ROWS, IDS], samples=6)
    assert len(dataset) == 6 and dataset.describe()["synthetic"]
    (batch,) = dataset.batches(6)
    assert [tuple(t.shape) for t in batch.inputs] == [(6, 3, 4), (6, 5)] and batch.inputs[1].max() == 1
    fit, held = dataset.split(0.5)
    assert not set(stacked(fit).flatten().tolist()) & set(stacked(held).flatten().tolist())


# -- preprocessing ---------------------------------------------------------------------------------------------------


def timm_model(size: tuple[int, int], **config: Any) -> nn.Module:
    model = nn.Identity()
    defaults = {"mean": (0.48, 0.45, 0.4), "std": (0.22, 0.23, 0.21), "input_size": (3, *size), "architecture": "vit"}
    model.pretrained_cfg = defaults | config
    return model


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(24, 24), (20, 27)])
@pytest.mark.parametrize(("share", "interpolation"), [(0.875, "bicubic"), (0.9, "bilinear"), (1.0, "bicubic")])
def test_preprocessing_is_that_of_timm(mode: str, size: tuple[int, int], share: float, interpolation: str) -> None:
    from timm.data import create_transform, resolve_model_data_config

    model = timm_model(size, crop_mode=mode, crop_pct=share, interpolation=interpolation)
    theirs = create_transform(**resolve_model_data_config(model), is_training=False)
    ours = Preprocessing.from_model(model, None)
    for height, width in ((50, 41), (41, 50), (24, 24), (9, 13)):
        image = noise(height, width)
        torch.testing.assert_close(ours(image), theirs(image), atol=1e-6, rtol=0)


def test_a_timm_model_carries_its_preprocessing(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    torch.save(model, tmp_path / "vit.pt")
    program = run.Source().load(tmp_path / "vit.pt")
    found = find_preprocessing(tmp_path, run.Source().images(program), program.inputs)
    assert found.crop == (32, 32) and found.resize == (35, 35), "of the size that it was built for"
    assert found.mean == (0.5, 0.5, 0.5) and "vit_tiny_patch16_224" in found.source


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ViTImageProcessor", {"size": {"height": 20, "width": 24}}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 30}, "crop_size": {"height": 20, "width": 24}}),
        ("ViTImageProcessor", {"size": {"height": 20, "width": 20}, "do_normalize": False, "do_rescale": False}),
    ],
)
def test_preprocessing_is_that_of_transformers(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    theirs(**settings).save_pretrained(tmp_path)
    for where in (f"hf:{tmp_path}", tmp_path):
        ours = Preprocessing.from_model(where, None)
        image = noise(40, 51)
        expected = torch.as_tensor(theirs(**settings)(image, return_tensors="pt")["pixel_values"][0])
        torch.testing.assert_close(ours(image), expected.float(), atol=1e-5, rtol=1e-6)


def test_an_image_processor_with_steps_of_its_own_is_refused(tmp_path: Path) -> None:
    config = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.9}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="does not know crop_pct"):
        Preprocessing.from_model(f"hf:{tmp_path}", None)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UsageError, match="not understood"):
        Preprocessing.resolve(f"hf:{tmp_path}", (8, 8), mean=(0.5,))
    assert Preprocessing.resolve(f"hf:{tmp_path}", (8, 8), mean=(0.5,), std=(0.5,)).source == "--mean, --std"


def test_options_change_what_the_model_says() -> None:
    found = Preprocessing.resolve(timm_model((8, 8)), (8, 8), mean=(0.1, 0.2, 0.3), resize=(9, 9), fit="stretch")
    assert found.mean == (0.1, 0.2, 0.3) and found.std == (0.22, 0.23, 0.21) and found.fit == "stretch"
    assert found.source == "timm's pretrained_cfg of vit, --mean, --resize"
    alone = Preprocessing.resolve(nn.Identity(), (8, 6), mean=(0.5,), std=(0.5,))
    assert alone.crop == alone.resize == (8, 6) and alone.source == "--mean, --std"
    assert Preprocessing.resolve(nn.Identity(), (8, 8)) is None
    with pytest.raises(UsageError, match="need --std"):
        Preprocessing.resolve(None, (8, 8), mean=(0.5,))


def test_a_folder_without_preprocessing_says_what_to_give(flat: Path) -> None:
    with pytest.raises(UsageError, match="--mean 0.485"):
        open_data(flat, [IMAGE])
    with pytest.raises(UsageError, match="only a folder of images takes --mean"):
        find_preprocessing("data.npz", None, [ROWS], mean=(0.5,))


@pytest.mark.parametrize(
    "config",
    [{"mean": "abc"}, {"std": (0.0, 1.0, 1.0)}, {"mean": (0.5, 0.5)}, {"crop_mode": "?"}, {"crop_pct": -1.0},
     {"interpolation": "random"}, {"mean": (float("nan"),) * 3}],
)  # fmt: skip
def test_settings_that_make_no_sense(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Preprocessing.from_model(timm_model((8, 8), **config), None)


# -- the command line ------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Two attentions over the sixteen 2 x 2 patches of an image."""

    def __init__(self) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        self.vit = VisionTransformer(img_size=8, patch_size=2, num_classes=3, embed_dim=16, depth=2, num_heads=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenopt.program import capture

    torch.manual_seed(0)
    module = Classifier().eval()
    for parameter in module.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return capture(module, torch.randn(2, 3, 8, 8)).save(tmp_path_factory.mktemp("model") / "model.pt2")


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    return (int(end.value.code or 0), *capsys.readouterr())


OPTIONS = ("--mean", "0.5", "--std", "0.25", "--resize", "9")


def test_optimize_on_a_folder(
    model: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(run, "_latency", lambda *_: ())
    (classes / "cat" / "bad.png").write_text("no image")
    arguments = ("optimize", model, "--schedule", "r=2", "--data", classes, "-o", tmp_path / "out", "--to", "onnx")
    code, _, error = command(capsys, *arguments)
    assert code == 2 and "--mean 0.485" in error
    code, _, error = command(capsys, *arguments, *OPTIONS)
    assert code == 1 and "bad.png" in error and "--skip-bad" in error
    code, out, error = command(capsys, *arguments, *OPTIONS, "--skip-bad", "--samples", "4")
    assert code == 0, error
    report = Report.load(tmp_path / "out" / "report.json")
    assert {row["inputs"] for row in report.parity} >= {"random", "data"}
    checked = report.data["checked"]
    assert report.data["fitted"] is None and (checked["samples"], checked["classes"]) == (4, 3)
    assert checked["preprocessing"]["resize"] == [9, 9] and checked["preprocessing"]["crop"] == [8, 8]
    assert "4 samples of" in out and "resize 9x9 cover bicubic, crop 8x8, mean 0.5/0.5/0.5" in out
    code, _, error = command(capsys, "verify", model, model, "--data", classes, *OPTIONS, "--skip-bad")
    assert code == 0, error


def test_what_is_fitted_on_is_not_checked_on(tmp_path: Path) -> None:
    def arrays(name: str, rows: int) -> str:
        np.savez(tmp_path / name, x=np.random.default_rng(rows).normal(size=(rows, 3, 4)))
        return str(tmp_path / name)

    first, second = arrays("a.npz", 10), arrays("b.npz", 4)
    fitted, checked = run.Data(first, seed=1).divide([ROWS], None, True)
    assert (len(fitted), len(checked)) == (8, 2) and not {*fitted.rows} & {*checked.rows}
    assert [None if d is None else len(d) for d in run.Data(first).divide([ROWS], None, False)] == [None, 10]
    fitted, checked = run.Data(first, second, samples=5).divide([ROWS], None, True)
    assert (len(fitted), len(checked)) == (5, 4) and checked.describe()["source"] == second
    with pytest.raises(UsageError, match="would be checked on"):
        run.Data(first, first).divide([ROWS], None, True)
    with pytest.raises(UsageError, match="nothing to fit on"):
        run.Data(None, second).divide([ROWS], None, True)


def test_random_on_the_command_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = command(capsys, "verify", model, model, "--data", "random", "--samples", "3")
    assert code == 0 and "warning: the data is random" in error


@pytest.mark.parametrize(
    "options", [("--mean", "a"), ("--resize", "8x8x8"), ("--crop", "-1"), ("--crop", "0"), ("--samples", "0"),
                ("--std", "0"), ("--samples", "99")]
)  # fmt: skip
def test_options_that_make_no_sense(
    model: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str]
) -> None:
    arguments = ("export", model, "--data", flat, "-o", tmp_path / "out", "--mean", "0.5", "--std", "0.5", *options)
    code, _, error = command(capsys, *arguments)
    assert code == 2 and "unexpected" not in error, error
