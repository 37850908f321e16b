"""Workers: a fit on a Ray cluster, of which a process is killed, is that of one process; errors arrive as they are."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor, nn

from tests import recipe_references as refs
from tests.references import images
from tokenopt import calibration, cli, fitting
from tokenopt.calibration import Calibration, Search, metrics
from tokenopt.calibration import problem as problem_module
from tokenopt.calibration import workers as workers_module
from tokenopt.calibration.problem import Task
from tokenopt.errors import TokenoptError, UsageError
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.program import Program, capture

KILLED = "TOKENOPT_TEST_KILLED"  # a file, in the environment of the cluster alone


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A local cluster of two workers, and where one that is killed writes its number."""
    path = tmp_path_factory.mktemp("cluster") / "killed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KILLED, str(path))
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield path
    ray.shutdown()


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(refs.tiny("head", depth=2), images(2))


def fit(program: Program, metric: str = "deadly", **options: Any) -> Calibration:
    inputs = images(8, seed=3)
    data = {"x": inputs, "labels": program.module()(inputs).argmax(1)}
    options |= {"budget": "flops=80%", "calibrator": Search(trials=2), "metric": f"{__name__}:{metric}"}
    return calibration.fit(program, "random", data, **options)


# -- what workers compute ----------------------------------------------------------------------------------------------

calls = 0


def deadly(outputs: list[Tensor], dense: list[Tensor]) -> Tensor:
    """A metric that kills the first worker which computes it for the fifth time."""
    global calls
    calls += 1
    if KILLED in os.environ and calls == 5:
        try:
            with open(os.environ[KILLED], "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return metrics.relative(outputs[0], dense[0])


def refused(outputs: list[Tensor], dense: list[Tensor]) -> Tensor:
    raise UsageError("outputs of another kind", why="of what they are", hint="another metric")


def broken(outputs: list[Tensor], dense: list[Tensor]) -> Tensor:
    return outputs[0] @ dense[0]


def slow_square(number: int) -> int:
    """The later, the faster."""
    time.sleep(0.3 / (1 + number))
    return number**2


def asleep(number: int) -> None:
    for _ in range(6000):
        time.sleep(0.1)


def death(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# -- Ray ---------------------------------------------------------------------------------------------------------------


def test_a_fit_with_a_killed_worker_is_that_of_one_process(
    killed: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem_module, "_BATCH", 4)
    here = fit(program)
    assert not killed.exists()
    there = fit(program, workers="ray")
    assert int(killed.read_text()) != os.getpid()
    for spent in (*here.effort.values(), *there.effort.values()):
        spent["seconds"] = 0.0
    assert there == here
    assert ray.is_initialized()  # who started it shuts it down


def test_a_task_brings_the_files_that_its_pass_reads(tmp_path: Path) -> None:
    """Another machine has not what was learned on this one."""
    path = tmp_path / "learned" / "scorer.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    task = Task(3, "r=1", ReduceTokens("random"), [images(2)], None, None, (path,))
    sent = pickle.dumps(task)
    shutil.rmtree(path.parent)
    received = pickle.loads(sent)
    assert path.read_bytes() == b"weights" and received.files == (path,)
    assert received[:3] == task[:3] and torch.equal(received.inputs[0], task.inputs[0])
    path.write_bytes(b"of another fit")
    pickle.loads(sent)
    assert path.read_bytes() == b"weights"


def test_what_was_learned_goes_to_the_workers(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_train", lambda x, *_: (nn.Sequential(nn.Linear(x.shape[1], 1)), 0.0))
    recipe = {"name": "mine", "score": {"learned": {"hidden": 0}}, "select": "topk", "place": "block",
              "schedule": {"r": 8}}  # fmt: skip
    sent: list[int] = []
    reduce = Task.__reduce__
    monkeypatch.setattr(Task, "__reduce__", lambda task: sent.append(len(task.files)) or reduce(task))
    model = capture(refs.tiny("head", depth=2), images(2))
    given = {"budget": "flops=80%", "calibrator": Search(trials=1)}
    found = calibration.fit(model, recipe, {"x": images(4, seed=3)}, workers="ray", **given)
    assert set(sent) == {0, 1}  # the recipe that chooses at random has learned nothing
    assert found.chosen.cost <= 0.8


def test_errors_of_workers_arrive_as_they_are(killed: Path, program: Program) -> None:
    with pytest.raises(UsageError) as refusal:
        fit(program, "refused", workers="ray")
    assert type(refusal.value) is UsageError
    assert str(refusal.value) == "outputs of another kind\n  why    of what they are\n  try    another metric"
    assert refusal.value.hint == "another metric"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as failure:
        fit(program, "broken", workers="ray")
    assert type(failure.value) is RuntimeError and "broken" in str(failure.value.__cause__)


def test_answers_are_in_order_and_items_read_as_needed(killed: Path) -> None:
    read = []
    with calibration.named_workers("ray") as pool:
        answers = pool.map(slow_square, (read.append(n) or n for n in range(9)))
        assert next(answers) == 0 and len(read) == 4
        assert list(answers) == [n**2 for n in range(1, 9)]


def test_ctrl_c_ends_what_workers_do(killed: Path) -> None:
    with calibration.named_workers("ray") as pool:
        start = time.monotonic()
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            list(pool.map(asleep, range(9)))
        assert list(pool.map(slow_square, [3])) == [9]
        assert time.monotonic() - start < 60


def test_workers_that_always_die_are_an_error(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_RETRIES", 0)
    with calibration.named_workers("ray") as pool, pytest.raises(TokenoptError, match="workers died"):
        list(pool.map(death, [0]))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["dask", "ray:", "raylet", ""])
def test_there_are_no_other_workers(text: str) -> None:
    with pytest.raises(UsageError, match="no workers"):
        calibration.named_workers(text)


def test_without_ray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'tokenopt\[distributed\]'"):
        calibration.named_workers("ray")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1", "127.0.0.1:99999"])
def test_no_cluster_is_said_at_once(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    start = time.monotonic()
    with pytest.raises(UsageError, match="no Ray cluster"), calibration.named_workers(f"ray:{address}"):
        pass
    assert time.monotonic() - start < 30


def test_the_command_line_refuses_workers_with_nothing_to_do(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = program.save(tmp_path / "model.pt2"), tmp_path / "data.npz"
    np.savez(data, x=torch.zeros(4, 3, 32, 32).numpy())

    def asked(*_: Any, workers: str | None, **__: Any) -> None:
        raise UsageError(f"fit with {workers}")

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in (*arguments, "-o", tmp_path / "out")])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "workers have nothing to do" in run("optimize", model, "--workers", "ray", "--data", data)
    assert "workers have nothing to do" in run("optimize", model, "--workers", "ray", "--budget", "flops=80%")
    assert "no workers 'dask'" in run("calibrate", model, "--workers", "dask", "--data", data, "--max-drop", "1%")
    monkeypatch.setattr(calibration, "fit", asked)
    given = [model, "--workers", "ray", "--data", data, "--budget", "flops=80%"]
    for recipe in ("tome", "dtop"):  # which learns a score
        for verb in ("optimize", "calibrate"):
            assert "fit with ray" in run(verb, *given, "--recipe", recipe)
