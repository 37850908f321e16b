"""The demonstration runs as the Makefile has it, and the samples run on what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """``make demo`` with one epoch of training: its folder and what it printed."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    out = tmp_path_factory.mktemp("demo")
    variables = [f"VENV={sys.prefix}", f"OUT={out}", "EPOCHS=1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")} | {"COLUMNS": "300"}  # none folded
    done = subprocess.run(
        ["make", "--assume-old", f"{sys.prefix}/.installed", "demo", *variables],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_demo_ends_with_the_gains_and_the_paths(demo: tuple[Path, str]) -> None:
    out, printed = demo
    for name in ("model.pt2", "model.onnx", "recipe.resolved.yaml", "report.json", "report.html"):
        assert (out / "optimized" / name).is_file()
        assert str(out / "optimized" / name) in printed
    report = json.loads((out / "optimized" / "report.json").read_text())
    assert all(row["passed"] for row in report["parity"])
    assert report["tokens"] == {"before": [65] * 6, "after": [65, 57, 49, 41, 33, 25]}
    assert report["flops"]["after"] < report["flops"]["before"]


def test_accuracy(demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = demo
    monkeypatch.syspath_prepend(ROOT / "samples")
    import accuracy

    monkeypatch.setattr(accuracy, "SETTINGS", accuracy.SETTINGS[:2])
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--model", str(out / "digits.pt")])
    accuracy.main()
    dense, reduced = capsys.readouterr().out.splitlines()
    assert "r=0" in dense and "1.00x" in dense
    assert "r=4" in reduced and "1.25x" in reduced
