"""Inputs and outputs that a recipe adds: checked, reported, exported, and timed beside the dense model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tokenopt import cli, load, optimize, run, runtimes
from tokenopt.data import open_data
from tokenopt.program import capture
from tokenopt.report import Report
from tokenopt.runtimes.bench import bench
from tokenopt.small_models import small_model

CACHED = {
    "name": "cached", "select": "bipartite_grid", "fuse": "mean", "restore": "cached", "place": "attention",
    "schedule": {"keep": 0.5, "layers": [0, 2]},
}  # fmt: skip


def test_a_text_conditions_what_stays() -> None:
    model, x = small_model()
    settings = {"score": "text", "source": True, "positions": True}
    result = optimize(model, x, recipe="cdpruner", settings=settings)
    assert [row["check"] for row in result.report.parity].count("identity") == 4
    assert all(row["passed"] for row in result.report.parity)
    program = result.program
    assert [i.name for i in program.inputs] == ["image", "text_embedding"]
    assert [o.name for o in program.outputs] == ["output_0", "source", "positions"]
    assert [i["name"] for i in result.report.model["added_inputs"]] == ["text_embedding"]
    assert result.report.model["added_outputs"][0] == {"name": "source", "dtype": "int64", "shape": ("batch", 64)}
    features = model(x)
    one, _, positions = program.flat(x, text_embedding=features[:, 5])
    other, _, others = program.flat(x, text_embedding=features[:, 60])
    assert not torch.equal(positions, others) and one.shape == other.shape
    torch.testing.assert_close(one[:, 1:], features[torch.arange(2)[:, None], positions + 1], rtol=1e-5, atol=1e-5)


def test_names_survive_a_file(tmp_path: Path) -> None:
    model, x = small_model()
    result = optimize(model, x, recipe="trajectory", settings={"source": True}, schedule={"keep": 0.1, "layers": [0]})
    path = result.program.save(tmp_path / "model.pt2")
    assert load(path).outputs == result.program.outputs and load(path).inputs == result.program.inputs
    assert load(path).clone().outputs[1].name == "source"
    engine = runtimes.export(result.program, tmp_path / "model.onnx")
    assert [i.name for i in engine.inputs] == ["image", "ids"]
    assert [o.name for o in engine.outputs] == ["output_0", "source"]


def test_what_was_kept_from_the_previous_step(tmp_path: Path) -> None:
    """Fed back, the outputs of one step are the inputs of the next: removed tokens get their old update."""
    model, x = small_model()
    result = optimize(model, x, recipe=CACHED)
    assert [i.name for i in result.program.inputs] == ["image", "cache_0", "cache_2"]
    assert [o.name for o in result.program.outputs] == ["output_0", "next_cache_0", "next_cache_2"]
    zeros = {f"cache_{i}": torch.zeros(2, 65, 32) for i in (0, 2)}
    _, *kept = result.program.flat(x, **zeros)
    _, *again = result.program.flat(x, cache_0=kept[0], cache_2=kept[1])
    torch.testing.assert_close(again[0], kept[0])
    engine = runtimes.export(result.program, tmp_path / "model.onnx")
    assert [i.name for i in engine.inputs] == ["image", "cache_0", "cache_2"]


def test_reductions_that_end_together_keep_one_thing_for_every_token() -> None:
    """Which tokens reach the second reduction depends on the image: its places mean other tokens in another run."""
    model, x = small_model()
    recipe = CACHED | {"select": "topk", "score": "energy", "fuse": "drop", "place": "block", "positions": True}
    recipe["schedule"] = {"keep": 0.5, "layers": [1, 2]}
    program = optimize(model, x, recipe=recipe).program
    assert [i.name for i in program.inputs] == ["image", "cache_1"]
    assert [o.name for o in program.outputs] == ["output_0", "next_cache_1", "positions"]
    canvas = optimize(model, x, recipe=recipe | {"restore": "canvas"}).program
    generator = torch.Generator().manual_seed(3)
    cache, before = torch.randn(2, 65, 32, generator=generator), None
    for image in torch.randn(3, 2, 3, 32, 32, generator=generator):
        out, found, positions = program.flat(image, cache_1=cache)
        left = torch.cat([torch.zeros(2, 1, dtype=torch.int64), positions + 1], 1)
        assert left.shape == (2, 1 + 16) and (before is None or not torch.equal(left, before))
        gone = torch.ones(2, 65, dtype=torch.bool).scatter(1, left, False)
        torch.testing.assert_close(found[gone], cache[gone])
        torch.testing.assert_close(out, model.norm(found))
        expected, theirs = canvas.flat(image)
        assert torch.equal(theirs, positions)
        torch.testing.assert_close(out[~gone], expected[~gone])
        cache, before = found, left


def test_a_dense_model_beside_one_with_more_inputs() -> None:
    model, x = small_model()
    result = optimize(model, x, recipe="trajectory")
    engines = [runtimes.eager.EagerEngine.of(p) for p in (result.dense, result.program)]
    assert len(bench(engines, rounds=1, warmup=1)) == 2
    assert len(bench(engines[::-1], rounds=1, warmup=1)) == 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and models that a recipe has added an input, or inputs and outputs to."""
    folder = tmp_path_factory.mktemp("models")
    model, x = small_model()
    results = {"ids": optimize(model, x, recipe="trajectory"), "cached": optimize(model, x, recipe=CACHED)}
    results["ids"].dense.save(folder / "dense.pt2")
    for name, result in results.items():
        result.program.save(folder / f"{name}.pt2")
    runtimes.export(results["ids"].program, folder / "ids.onnx")
    images, ids = np.random.default_rng(0).normal(size=(5, 3, 32, 32)), np.arange(5 * 64).reshape(5, 64) % 16
    np.savez(folder / "image.npz", image=images)
    np.savez(folder / "both.npz", image=images, ids=ids)
    return folder


def verified(files: Path, a: str, b: str, data: str | None = None, tolerance: float = 1e9) -> list[dict[str, object]]:
    given = run.Data(None if data is None else str(files / data))
    paths = (files / a, files / b)
    return run.verify_models(*paths, source=run.Source(), data=given, tolerance=tolerance, progress=lambda *_: None)


@pytest.mark.parametrize(("a", "b"), [("dense.pt2", "ids.pt2"), ("ids.onnx", "dense.pt2"), ("dense.pt2", "cached.pt2")])
def test_a_dense_model_is_compared_with_one_with_more_inputs(files: Path, a: str, b: str) -> None:
    rows = verified(files, a, b, "image.npz")
    assert [row["inputs"] for row in rows] == ["random", "random", "data", "data"]
    assert all([o["name"] for o in row["outputs"]] == ["output_0"] for row in rows)
    assert all(row["outputs"][0]["max_abs"] > 0.01 for row in rows)
    assert not any(row["passed"] for row in verified(files, a, b, tolerance=1e-4))


def test_each_model_gets_its_inputs_from_the_data(files: Path) -> None:
    dense, reduced = load(files / "dense.pt2"), load(files / "ids.pt2")
    with np.load(files / "both.npz") as data:
        image, ids = torch.from_numpy(data["image"]).float(), torch.from_numpy(data["ids"])
    wanted = (dense.flat(image)[0] - reduced.flat(image, ids=ids)[0]).abs().max().item()
    found = verified(files, "dense.pt2", "ids.pt2", "both.npz")[-1]
    assert found["batch"] == 5 and found["outputs"][0]["max_abs"] == pytest.approx(wanted, rel=1e-4)


def test_a_name_that_the_model_has_already() -> None:
    class Named(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, source: Tensor) -> Tensor:
            return self.model(source)

    model, x = small_model()
    result = optimize(capture(Named(model), x), recipe="fopru", settings={"source": True})
    assert [o.name for o in result.program.outputs] == ["output_0", "source_1"]


def test_inputs_that_the_data_lacks_are_those_of_the_example(tmp_path: Path) -> None:
    model, x = small_model()
    result = optimize(model, x, recipe="trajectory")
    np.savez(tmp_path / "data.npz", image=np.zeros((5, 3, 32, 32)))
    data = open_data(tmp_path / "data.npz", result.dense.inputs)
    ((image, ids),) = run._completed([[torch.zeros(5, 3, 32, 32)]], data, result)
    assert torch.equal(ids[4], result.program.example_inputs[1]["ids"][0]) and ids.shape == (5, 64)


def test_the_command_line(tmp_path: Path) -> None:
    model, x = small_model()
    capture(model, x).save(tmp_path / "dense.pt2")
    images, ids = np.random.default_rng(0).normal(size=(5, 3, 32, 32)), np.arange(5 * 64).reshape(5, 64) % 16
    np.savez(tmp_path / "data.npz", image=images, ids=ids)
    arguments = ["optimize", tmp_path / "dense.pt2", "--recipe", "trajectory", "--data", tmp_path / "data.npz"]
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments), "-o", str(tmp_path / "out"), "--threads", "1"])
    assert end.value.code == 0
    report = Report.load(tmp_path / "out" / "report.json")
    assert report.passed and {row["inputs"] for row in report.parity} >= {"random", "data"}
    assert [i["name"] for i in report.model["added_inputs"]] == ["ids"]
    assert [row["runtime"] for row in report.latency] == ["eager", "onnxruntime"]
