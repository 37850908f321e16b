"""The command line, verb by verb, in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer

from tokenopt import cli, run, terminal
from tokenopt.errors import UsageError
from tokenopt.program import capture
from tokenopt.report import Report

SHAPE = ("--input-shape", "1x1x16x16")
Cli = Callable[..., SimpleNamespace]


def tiny_vit() -> VisionTransformer:
    """17 tokens of width 32 through 2 blocks, no weight zero."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2
    )
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vit.pt, mlp.pt and data.npz."""
    folder = tmp_path_factory.mktemp("models")
    torch.save(tiny_vit(), folder / "vit.pt")
    torch.save(Mlp(16).eval(), folder / "mlp.pt")  # nothing to reduce
    np.savez(folder / "data.npz", x=np.random.default_rng(0).normal(size=(5, 1, 16, 16)).astype(np.float32))
    return folder


@pytest.fixture
def tokenopt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs the command line, checks its exit code and returns ``out``, ``err`` and ``json()``."""
    monkeypatch.setenv("COLUMNS", "160")  # so that tables do not fold what is looked for

    def call(*arguments: object, code: int = 0) -> SimpleNamespace:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert end.value.code == code, err
        assert "Traceback" not in err and "\x1b" not in out + err
        return SimpleNamespace(out=out, err=err, json=lambda: json.loads(out))

    return call


@pytest.fixture(scope="module")
def optimised(models: Path) -> Path:
    """What one run of optimize leaves."""
    out = models / "out"
    arguments = ["optimize", models / "vit.pt", *SHAPE, "--schedule", "r=4", "--data", models / "data.npz", "-o", out]
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments), "--threads", "1"])
    assert end.value.code == 0
    return out


# -- optimize --------------------------------------------------------------------------------------------------------


def test_optimize_leaves_its_files_and_no_others(optimised: Path) -> None:
    names = {p.name for p in optimised.iterdir()}
    assert names == {"model.pt2", "model.onnx", "recipe.resolved.yaml", "report.json", "report.html"}
    assert set(Report.load(optimised / "report.json").files.values()) == names


def test_optimize_proves_and_times_every_export(optimised: Path) -> None:
    report = Report.load(optimised / "report.json")
    assert report.passed and report.reduced
    assert report.tokens == {"before": [17, 17], "after": [17, 13]}
    assert report.flops["after"] < report.flops["before"]
    for check in ("capture", "identity", "eager", "onnxruntime"):
        rows = [row for row in report.parity if row["check"] == check]
        assert {row["inputs"] for row in rows} >= {"random", "data"}
        assert len({row["batch"] for row in rows if row["inputs"] == "random"}) == 2
        assert all(row["outputs"][0]["cosine"] > 0.999 for row in rows)
    assert [(row["runtime"], row["batch"], row["threads"]) for row in report.latency] == [
        ("eager", 1, 1),
        ("onnxruntime", 1, 1),
    ]
    assert all(row["speedup"] == pytest.approx(row["before_ms"] / row["after_ms"]) for row in report.latency)


def test_optimize_again_from_the_resolved_recipe(models: Path, optimised: Path, tokenopt: Cli, tmp_path: Path) -> None:
    recipe = optimised / "recipe.resolved.yaml"
    result = tokenopt("optimize", models / "vit.pt", *SHAPE, "--recipe", recipe, "-o", tmp_path, "--json")
    report = Report.load(tmp_path / "report.json")
    assert result.json() == report.to_dict()
    assert "onnxruntime" in result.err, "progress goes to stderr"
    assert report.tokens == Report.load(optimised / "report.json").tokens
    again = yaml.safe_load((tmp_path / "recipe.resolved.yaml").read_text())
    assert again == yaml.safe_load(recipe.read_text())


def test_passes_within_a_budget_are_repeated(models: Path, tokenopt: Cli, tmp_path: Path) -> None:
    """The resolved recipe says what was found, so that the budget need not be given again."""
    call = ("optimize", models / "vit.pt", *SHAPE, "-o")
    passes = "raise-attention,reduce-tokens{recipe=tome},remove-dead"
    tokenopt(*call, tmp_path / "first", "--passes", passes, "--budget", "flops=90%")
    resolved = tmp_path / "first" / "recipe.resolved.yaml"
    assert "{schedule=r=" in yaml.safe_load(resolved.read_text())["passes"]
    tokenopt(*call, tmp_path / "again", "--recipe", resolved)
    first, again = (Report.load(tmp_path / name / "report.json") for name in ("first", "again"))
    assert first.flops == again.flops and first.edits == again.edits
    assert first.flops["after"] <= 0.9 * first.flops["before"]
    assert (tmp_path / "again" / "recipe.resolved.yaml").read_text() == resolved.read_text()


def test_nothing_changed_is_exit_code_3(models: Path, tokenopt: Cli, tmp_path: Path) -> None:
    result = tokenopt("optimize", models / "mlp.pt", *SHAPE, "-o", tmp_path / "new", code=3)
    assert "nothing was changed" in result.err
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"report.json", "report.html"}
    assert not Report.load(tmp_path / "new" / "report.json").reduced


def test_nothing_changed_keeps_an_earlier_run(models: Path, tokenopt: Cli, tmp_path: Path) -> None:
    for name in ("model.pt2", "report.json"):
        (tmp_path / name).write_text("old")
    tokenopt("optimize", models / "vit.pt", *SHAPE, "--schedule", "r=0", "-o", tmp_path, code=3)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"model.pt2": "old", "report.json": "old"}


def test_files_of_an_earlier_run_do_not_outlive_it(tmp_path: Path) -> None:
    Report(files={"program": "model.pt2", "engine": "model.engine", "other": "../x", "mine": "notes.txt"}).save(
        tmp_path / "report.json"
    )
    assert run._earlier_files(tmp_path) == ["model.engine", "model.pt2"]
    (tmp_path / "report.json").write_text("no report")
    assert run._earlier_files(tmp_path) == []


def test_passes_are_repeated_from_the_resolved_recipe(tmp_path: Path) -> None:
    report = Report(model={"digest": "0"})
    path = tmp_path / "recipe.resolved.yaml"
    path.write_text(run.resolved_recipe(report, "raise-attention,reduce-tokens{recipe=tome}"))
    assert run._resolved_passes(str(path)) == "raise-attention,reduce-tokens{recipe=tome}"
    assert run._resolved_passes("tome") is None


@pytest.mark.parametrize("given", [{"recipe": "tome"}, {"schedule": "r=1"}, {"min_speedup": 0.0}, {"short": True}])
def test_what_a_list_of_passes_does_not_take(given: dict[str, Any]) -> None:
    options = {"recipe": None, "schedule": None, "settings": {}, "min_speedup": None, "short": False} | given
    recipe, schedule, settings, least, short = options.values()
    with pytest.raises(UsageError, match="says all there is to do"):
        run._check_method(recipe, schedule, settings, "raise-attention", least, short)
    assert not run._check_method(None, None, {}, "raise-attention", None, False)


# -- the other verbs -------------------------------------------------------------------------------------------------


def test_inspect(models: Path, tokenopt: Cli) -> None:
    found = tokenopt("inspect", models / "vit.pt", *SHAPE, "--json").json()
    assert {"model", "axes", "sites", "effects", "cuts", "opaque"} <= found.keys()
    assert [s["id"] for s in found["sites"]] == ["blocks.0.attn", "blocks.1.attn"]
    text = tokenopt("inspect", models / "vit.pt", *SHAPE).out
    for part in ("2 attention sites", "blocks.1.attn", "cls(1, protected) + patch(4x4)", "can be reduced"):
        assert part in text


def test_inspect_without_attention_is_exit_code_3(models: Path, tokenopt: Cli) -> None:
    assert tokenopt("inspect", models / "mlp.pt", *SHAPE, "--json", code=3).json()["sites"] == []


def test_export(optimised: Path, tokenopt: Cli, tmp_path: Path) -> None:
    found = tokenopt("export", optimised / "model.pt2", "--to", "ort,ort", "-o", tmp_path / "deep" / "er", "--json")
    path = tmp_path / "deep" / "er" / "model.onnx"
    assert found.json()["files"] == {"onnx": str(path)}
    assert all(row["passed"] for row in found.json()["parity"])
    assert path.stat().st_size > 0


def test_bench(optimised: Path, tokenopt: Cli) -> None:
    paths = [str(optimised / name) for name in ("model.onnx", "model.pt2")]
    rows = tokenopt("bench", *paths, "--batch", "1,2", "--threads", "1", "--json").json()
    assert [(r["name"], r["batch"]) for r in rows] == [(p, b) for b in (1, 2) for p in paths]
    assert rows[0]["ratio"] == 1.0 and all(r["median_ms"] > 0 and r["threads"] == 1 for r in rows)


def test_verify(models: Path, optimised: Path, tokenopt: Cli) -> None:
    same = tokenopt("verify", optimised / "model.pt2", optimised / "model.onnx", "--data", models / "data.npz")
    assert "passed" in same.out and "data" in same.out
    other = tokenopt("verify", models / "vit.pt", optimised / "model.onnx", *SHAPE, "--json", code=4)
    assert not any(row["passed"] for row in other.json()) and "differ" in other.err
    tokenopt("verify", models / "vit.pt", optimised / "model.onnx", *SHAPE, "--tolerance", "10")


def test_explain_report(optimised: Path, tokenopt: Cli) -> None:
    report = optimised / "report.json"
    assert "17 -> 13 tokens" in tokenopt("explain", report, "--site", "blocks.0.attn").out
    assert str(optimised / "model.onnx") in tokenopt("explain", report).out
    assert "blocks.0.attn, blocks.1.attn" in tokenopt("explain", report, "--site", "attn", code=2).err
    assert "no site 'blocks.9'" in tokenopt("explain", report, "--site", "blocks.9", code=2).err


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("reduce-tokens", "Options:"),
        ("tome", "Source: Bolya"),
        ("onnxruntime", "(runtime)"),
        ("tokenopt::merge_tokens", "Shapes:"),
        ("ParityError", "Exit code: 4"),
    ],
)
def test_explain_name(tokenopt: Cli, name: str, part: str) -> None:
    assert part in tokenopt("explain", name).out


def test_lists(tokenopt: Cli) -> None:
    out = tokenopt("recipes").out
    assert any("tome" in t and "mid" in t and "arXiv:2210.09461" in t for t in out.splitlines()), "one line each"
    assert {"name", "summary", "place", "paper", "parts", "schedule"} == set(tokenopt("recipes", "--json").json()[0])
    assert {"name", "summary"} == set(tokenopt("passes", "--json").json()[0])


def test_the_matrix_of_recipes_and_runtimes(tokenopt: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenopt import matrix

    ok, refused = {"status": "ok", "error": 2e-7, "why": ""}, {"status": "refused", "error": None, "why": "no [form]"}
    rows = [{"recipe": "tome", "model": "image", "runtimes": {"eager": ok, "onnxruntime": refused}}]
    monkeypatch.setattr(matrix, "recipe_matrix", lambda progress: rows)
    assert tokenopt("recipes", "--matrix", "--json").json() == rows
    out = tokenopt("recipes", "--matrix").out
    assert "ok 2e-07" in out and "no [form]" in out


MINE = {
    "text": "name: mine\nscore: cls_row{layer=-1}\nselect: topk\nfuse: drop\nplace: output\nrestore: none\n",
    "mapping": "name: mine\nselect: {bipartite_grid: {seed: 3}}\nfuse: {mean: {metric: hidden}}\nplace: attention\n",
}


@pytest.mark.parametrize(("form", "setting"), [("text", "score.layer=0"), ("mapping", "select.cell=4")])
def test_a_recipe_of_ones_own(models: Path, tokenopt: Cli, tmp_path: Path, form: str, setting: str) -> None:
    path, model, out = tmp_path / "mine.yaml", tmp_path / "features.pt2", tmp_path / "out"
    path.write_text(MINE[form])
    vit = tiny_vit()
    vit.reset_classifier(0, "")
    capture(vit, torch.randn(2, 1, 16, 16)).save(model)
    arguments = ["optimize", model, "--recipe", path, "--set", setting, "-o", out]
    assert "has no schedule" in tokenopt(*arguments, code=2).err
    report = tokenopt(*arguments, "--schedule", "keep=0.5", "--json").json()
    assert report["recipe"]["name"] == "mine" and report["edits"]
    kind, value = setting.partition("=")[0].split("."), int(setting.partition("=")[2])
    (settings,) = report["recipe"]["settings"][kind[0]].values()
    assert settings[kind[1]] == value


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("select: topk", "lacks name"),
        ("name: mine", "lacks select"),
        ("name: mine\nselect: topkk", "one of topk"),
        ("name: mine\nselect: topk", "needs a score"),
        ("name: mine\nselect: pool", "one of mix"),
        ("name: mine\nselect: 3", "no select 3"),
        ("name: mine\nselect: bipartite{metrik=key}", "its settings: metric"),
        ("name: mine\nselect: {bipartite_grid: {cell: big}}", "not of type int"),
        ("name: mine\nselect: {bipartite_grid: 4}", "not a mapping"),
        ("name: mine\nselect: bipartite\nproportional: please", "not of type bool"),
        ("name: mine\nselect: bipartite\nposition: 4", "position=4"),
        ("name: mine\nselect: bipartite\nposition: middle", "keep, renumber"),
        ("name: mine\nselect: bipartite\nschedule: 4", "schedule of the recipe"),
        ("name: mine\nselect: bipartite\nspeed: 4", "no key 'speed'"),
        ("recipe: tome", "a recipe is a mapping"),
        ("- tome", "no mapping"),
        ("name: [mine", "cannot be read"),
    ],
)
def test_wrong_recipe_files_are_exit_code_2(tokenopt: Cli, tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert part in tokenopt("optimize", "vit.pt", "--recipe", path, "-o", tmp_path / "out", code=2).err


@pytest.mark.tensorrt
def test_export_to_tensorrt_without_a_gpu(optimised: Path, tokenopt: Cli, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    arguments = ["--to", "onnx,tensorrt-rtx", "--compute-capability", "8.9", "-o", tmp_path]
    result = tokenopt("export", optimised / "model.pt2", *arguments)
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.rtx.engine"}
    assert "built and read back; cannot run here" in result.out or torch.cuda.is_available()


# -- usage and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["optimize", "vit.pt"], "-o"),
        (["nothing"], "nothing"),
        (["optimize", "vit.pt", "-o", "out", "--to", "onnx,tflite"], "'tflite'"),
        (["optimize", "vit.pt", "-o", "out", "--to", "onnx,ort"], "both model.onnx"),
        (["optimize", "vit.pt", "-o", "out", "--batch", "1,x"], "batch sizes"),
        (["optimize", "vit.pt", "-o", "out", "--set", "proportional"], "key=value"),
        (["optimize", "vit.pt", "-o", "out", "--set", "speed=2"], "no setting 'speed'"),
        (["optimize", "vit.pt", "-o", "out", "--set", "selct.cell=4"], "select.metric"),
        (["optimize", "vit.pt", "-o", "out", "--set", "select.cell=4"], "its settings: metric"),
        (["optimize", "vit.pt", "-o", "out", "--set", "select=topkk"], "one of topk"),
        (["optimize", "vit.pt", "-o", "out", "--set", "score.layer=1"], "set score first"),
        (["optimize", "vit.pt", "-o", "out", "--set", "select.metric=3"], "not of type str"),
        (["optimize", "vit.pt", "-o", "out", "--recipe", "tomato"], "'tomato'"),
        (["optimize", "vit.pt", "-o", "out", "--schedule", "fast"], "schedule"),
        (["optimize", "vit.pt", "-o", "out", "--passes", "vanish"], "'vanish'"),
        (["optimize", "vit.pt", "-o", "out", "--passes", "raise-attention", "--schedule", "r=4"], "option"),
        (["optimize", "vit.pt", "-o", "out", "--threads", "0"], "--threads"),
        (["explain", "tomee"], "tome"),
        (["explain", "topk{k=3}"], "no setting 'k'"),
        (["explain", "absent.json", "--site", "blocks.0"], "no such report"),
    ],
)
def test_usage_errors_are_exit_code_2(tokenopt: Cli, arguments: list[str], part: str) -> None:
    assert part in tokenopt(*arguments, code=2).err


def test_the_model_is_not_overwritten(models: Path, tokenopt: Cli, tmp_path: Path) -> None:
    content = (models / "vit.pt").read_bytes()
    (tmp_path / "model.pt2").write_bytes(content)
    result = tokenopt("optimize", tmp_path / "model.pt2", "-o", tmp_path, code=2)
    assert "would be overwritten" in result.err
    assert (tmp_path / "model.pt2").read_bytes() == content


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (ValueError("some\nthing"), "unexpected ValueError: some thing (TOKENOPT_DEBUG=1"),
        (MemoryError(), "out of memory"),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied: /x"),
    ],
)
def test_unexpected_errors_are_one_line(
    tokenopt: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception, part: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(run, "inspect_model", fail)
    err = tokenopt("inspect", "x.pt", code=1).err
    assert part in err and err.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TOKENOPT_DEBUG", "1")
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", "/absent.pt"])
    err = capsys.readouterr().err
    assert end.value.code == 1 and "Traceback" in err and "error: " in err


def test_progress_is_a_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    for stream, has_bar in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        with terminal.Stages() as progress:
            progress("load", 0, 0)
            progress("rewrite", 1, 3)
        assert ("\x1b" in stream.getvalue()) is has_bar
        assert "rewrite" in stream.getvalue()
    assert stream.getvalue() == "load\nrewrite\n"


def test_a_missing_runtime_is_said_before_any_work(
    tokenopt: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tokenopt.runtimes.tensorrt import TensorRT

    monkeypatch.setattr(TensorRT, "available", lambda self: "it is not installed")
    err = tokenopt("optimize", "absent.pt", "--to", "tensorrt", "-o", tmp_path / "out", code=1).err
    assert "tensorrt cannot build here" in err and "it is not installed" in err
    assert not (tmp_path / "out").exists()


# -- attention patterns ----------------------------------------------------------------------------------------------


def test_inspect_shows_what_a_pattern_would_gain(models: Path, tokenopt: Cli) -> None:
    rows = tokenopt("inspect", models / "vit.pt", *SHAPE, "--pattern", "Neighborhood(3)", "--json").json()["patterns"]
    assert [(r["site"], r["grid"], r["tokens"]) for r in rows] == [(f"blocks.{i}.attn", [4, 4], 17) for i in range(2)]
    assert all(r["ideal"] == pytest.approx(17 * 17 / (16 * 10 + 17)) for r in rows)
    assert all("1.1x asked for" in r["refusal"]["why"] for r in rows)
    assert "Neighborhood(7)" in tokenopt("inspect", models / "vit.pt", *SHAPE, "--pattern", "nat").out
    assert "not a pattern" in tokenopt("inspect", models / "vit.pt", *SHAPE, "--pattern", "Windows(3)", code=2).err


def test_optimize_with_a_pattern(models: Path, tokenopt: Cli, tmp_path: Path) -> None:
    arguments = ("--recipe", "nat", "--set", "window=3", "--set", "sites=1:", "--min-speedup", "0", "--threads", "1")
    tokenopt("optimize", models / "vit.pt", *SHAPE, *arguments, "-o", tmp_path)
    report = Report.load(tmp_path / "report.json")
    assert report.passed and [e["site"] for e in report.edits] == ["blocks.1.attn"]
    assert {r["check"] for r in report.parity} == {"capture", "identity", "pattern", "eager", "onnxruntime"}
    resolved = yaml.safe_load((tmp_path / "recipe.resolved.yaml").read_text())
    assert resolved["recipe"]["pattern"] == {"1:": "Neighborhood(3)"}


def test_optimize_with_a_pattern_that_does_not_pay(models: Path, tokenopt: Cli, tmp_path: Path) -> None:
    result = tokenopt("optimize", models / "vit.pt", *SHAPE, "--recipe", "nat", "-o", tmp_path, code=cli.UNCHANGED)
    assert "nothing was changed" in result.err
    refusals = Report.load(tmp_path / "report.json").refusals
    assert len(refusals) == 2 and all("1.00x, tiles" in r["why"] and "1.1x asked for" in r["why"] for r in refusals)


def test_optimize_with_passes_that_hold_a_pattern(models: Path, tokenopt: Cli, tmp_path: Path) -> None:
    pattern = "Neighborhood((3, 4), stride=2) | Global(first=1)"
    passes = f"fold-constants,raise-attention,sparsify-attention{{pattern={pattern},min-speedup=0,sites=0}}"
    tokenopt("optimize", models / "vit.pt", *SHAPE, "--passes", passes, "--to", "onnx", "-o", tmp_path)
    report = Report.load(tmp_path / "report.json")
    assert [(r["site"], r["pattern"]) for r in report.patterns] == [("blocks.0.attn", f"({pattern})")]
