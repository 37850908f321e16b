"""The report: its schema, its JSON, and its table."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenopt.errors import TokenoptError
from tokenopt.report import REPORT_VERSION, Report, dumps, parity_table, refusal_table
from tokenopt.terminal import console


def example_report() -> Report:
    """A report with something in every section."""
    refusal = {"where": "stages.0.blocks.1", "why": "a convolution reads the grid", "try": "reduce later"}
    site = {"kind": "self", "axis": "img", "heads": 6, "head_dim": 64}
    return Report(
        model={"name": "vit.pt", "digest": "0123", "inputs": [], "outputs": []},
        recipe={"name": "tome", "settings": {"seed": 0}, "passes": "raise-attention", "short_outputs": False},
        schedule={"r": 13},
        axes=[{"name": "img", "length": 197, "segments": [], "carried_by": 20}],
        sites=[
            {"id": "blocks.0.attn", "tokens_before": 197, "tokens_after": 184, "refusal": None, **site},
            {"id": "blocks.1.attn", "tokens_before": 197, "tokens_after": 184, "refusal": refusal, **site},
        ],
        refusals=[refusal, {**refusal, "where": "stages.0.blocks.2"}],
        edits=[{"pass_spec": "reduce-tokens", "site": "blocks.0.attn", "before": 197, "after": 184}],
        flops={"before": 9.2e9, "after": 4.6e9},
        tokens={"before": [197, 197], "after": [197, 184]},
        parity=[
            {
                "check": "onnxruntime",
                "inputs": "random",
                "batch": 3,
                "tolerance": 1e-4,
                "passed": True,
                "outputs": [
                    {"name": "output_0", "max_abs": 3e-6, "mean_abs": 1e-7, "max_rel": 1e-6, "cosine": 1.0,
                     "argmax_agreement": None}
                ],
            }
        ],
        latency=[
            {"runtime": "eager", "batch": 1, "threads": 1, "before_ms": 20.0, "after_ms": 10.0, "speedup": 2.0}
        ],
        files={"program": "model.pt2"},
        timings={"rewrite": 0.5},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def text_of(renderable: object) -> str:
    """What a renderable looks like where stdout is a pipe that takes ASCII only."""
    stream = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii")
    console(stream).print(renderable)
    stream.flush()
    return raw.getvalue().decode()


def test_round_trip(tmp_path: Path) -> None:
    report = example_report()
    path = report.save(tmp_path / "out" / "report.json")
    assert Report.load(path) == report
    assert json.loads(path.read_text()) == report.to_dict()
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_every_key_is_always_there_and_documented() -> None:
    data = Report().to_dict()
    assert data["version"] == REPORT_VERSION
    assert data["versions"]["torch"]
    assert data.keys() == example_report().to_dict().keys()
    for key in data:
        assert f"    {key} " in Report.__doc__, f"{key} is not in the docstring"


def test_json_holds_plain_finite_ascii_values() -> None:
    report = Report(
        model={"name": "vit-ü-模型"},
        flops={"before": torch.tensor(2.0), "after": math.inf},
        tokens={"before": (1, 2), "after": [math.nan]},
        files={"program": Path("model.pt2")},
    )
    data = json.loads(dumps(report.to_dict()))
    assert data["flops"] == {"before": 2.0, "after": None}
    assert data["tokens"] == {"before": [1, 2], "after": [None]}
    assert data["files"] == {"program": "model.pt2"}
    assert data["model"]["name"] == "vit-ü-模型"
    assert dumps(report.to_dict()).isascii()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a tokenopt report"),
        ("{", "not a tokenopt report"),
        ("[1, 2]", "not a tokenopt report"),
        ("{}", "not a tokenopt report"),
        ('{"version": 99, "sites": []}', "version 99"),
        ('{"version": 1, "sites": 3}', "malformed"),
        ('{"version": 1, "sites": [], "save": {}}', "malformed"),
        ("\udcff\udcfe", "not a tokenopt report"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(TokenoptError, match=message) as caught:
        Report.load(path)
    assert str(path) in str(caught.value)


def test_table_shows_gains_checks_refusals_and_files() -> None:
    text = text_of(example_report().table("out"))
    for part in ("vit.pt, tome, r=13", "197", "184", "2.00x", "onnxruntime", "passed", "out/model.pt2"):
        assert part in text
    assert "stages.0.blocks.1, stages.0.blocks.2" in text, "refusals with one reason are one row"


def test_table_of_an_empty_report() -> None:
    assert text_of(Report().table()).strip() == ""


def test_failed_and_unstable_checks_stand_out() -> None:
    row = example_report().parity[0]
    outputs = [{**row["outputs"][0], "max_abs": None}]
    text = text_of(parity_table([{**row, "passed": False, "outputs": outputs}, {**row, "unstable": 1}]))
    assert "FAILED (tolerance 0.0001)" in text
    assert "not finite" in text
    assert "1 tie left out" in text


def test_names_are_not_taken_for_markup() -> None:
    text = text_of(refusal_table([{"where": "blocks[0].[bold]attn", "why": "[/]", "try": ":smile:"}]))
    assert "blocks[0].[bold]attn" in text and "[/]" in text and ":smile:" in text


def test_reading_a_report_needs_no_torch() -> None:
    code = "import sys, tokenopt.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
