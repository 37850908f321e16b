"""Timing side by side: interleaved rounds, medians and spread, ratio to the first."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tokenopt import capture, runtimes
from tokenopt.errors import ParityError, UsageError
from tokenopt.runtimes import bench as module
from tokenopt.runtimes.bench import bench, benchmark
from tokenopt.runtimes.eager import EagerEngine


class Scale(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_medians_and_ratio() -> None:
    slow, fast = benchmark({"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.005)}, rounds=7, warmup=1)
    assert (slow.name, fast.name, slow.rounds) == ("slow", "fast", 7)
    assert slow.ratio == 1.0
    assert 20 <= slow.median_ms < 60
    assert fast.median_ms < slow.median_ms
    assert fast.ratio == pytest.approx(slow.median_ms / fast.median_ms, rel=0.3)
    assert slow.iqr_ms >= 0


def test_ratios_are_of_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down in the middle slows both: by medians alone the second would look slower."""
    spent = {"a": [2.0, 2, 2, 2, 40, 40], "b": [1.0, 1, 1, 20, 20, 20]}  # how long it takes, then five rounds
    monkeypatch.setattr(module, "_seconds", lambda call, repeats: call())
    first, second = benchmark({name: lambda t=times: t.pop(0) for name, times in spent.items()}, 5, warmup=0)
    assert (first.ratio, second.ratio) == (1.0, 2.0)
    assert first.median_ms < second.median_ms


def test_rounds_are_interleaved_and_rotate() -> None:
    calls: list[str] = []

    def model(name: str) -> object:
        def call() -> None:
            calls.append(name)
            time.sleep(0.003)

        return call

    benchmark({name: model(name) for name in "abc"}, rounds=3, warmup=0)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # how long each takes, then three rounds


def test_a_short_call_is_repeated() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    benchmark({"short": call}, rounds=2, warmup=1)
    assert count > 100


def test_nothing_to_measure() -> None:
    with pytest.raises(UsageError):
        benchmark({})
    with pytest.raises(UsageError):
        benchmark({"a": lambda: None}, rounds=0)


def test_files_of_several_runtimes(tmp_path: Path) -> None:
    program = capture(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), torch.randn(2, 3, 8))
    paths = [tmp_path / name for name in ("model.pt2", "model.onnx")]
    for path in paths:
        runtimes.export(program, path)
    before = torch.get_num_threads()
    rows = bench([*paths, paths[1]], batches=(1, 4), threads=1, rounds=3, warmup=1)
    assert torch.get_num_threads() == before
    assert [row["batch"] for row in rows] == [1, 1, 1, 4, 4, 4]
    assert [row["name"] for row in rows[:3]] == [str(paths[0]), str(paths[1]), f"{paths[1]} (2)"]
    assert [row["runtime"] for row in rows[:3]] == ["eager", "onnxruntime", "onnxruntime"]
    assert set(rows[0]) == {"name", "runtime", "batch", "threads", "median_ms", "iqr_ms", "ratio", "rounds"}
    assert all(row["median_ms"] > 0 and row["threads"] == 1 for row in rows)


def test_given_inputs_are_cut_or_repeated_to_the_batch() -> None:
    seen: list[torch.Tensor] = []

    class Watched(EagerEngine):
        def _run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            seen.append(inputs[0])
            return super()._run(inputs)

    engine = Watched.of(capture(Scale(), torch.randn(2, 4)))
    data = torch.randn(3, 4)
    bench([engine], batches=(2, 5), rounds=1, warmup=0, inputs=[data])
    assert torch.equal(seen[0], data[:2])
    assert torch.equal(seen[-1], torch.cat([data, data[:2]]))


def test_models_must_take_the_same_inputs() -> None:
    engines = [EagerEngine.of(capture(Scale(), torch.randn(2, n))) for n in (4, 5)]
    with pytest.raises(ParityError, match="different inputs"):
        bench(engines)
