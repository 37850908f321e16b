"""The page of a report: complete, harmless whatever a report holds, and whole without a network."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tests.recipe_references import tiny
from tests.references import images, timm_embed, tome
from tests.test_report import example_report
from tokenopt.gallery import DROPPED, Sample, Stage, gallery
from tokenopt.html import charts, render
from tokenopt.optimization import optimize
from tokenopt.report import Report

VOID = {"meta", "br", "img", "hr", "link", "input"}
SVG = {"path", "rect", "circle", "image", "use", "text", "g", "desc"}


class Page(HTMLParser):
    """What a page is made of; an element that is not closed in order is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def full_report(name: str = "vit.pt") -> Report:
    """Something in every section, with a name of one's choice wherever a name can be."""
    report = example_report()
    sites = [name, f"{name}.1"]
    report.model["name"] = report.files[name] = name
    report.timings[name] = 1.5
    report.sites = [{**row, "id": site} for row, site in zip(report.sites, sites, strict=True)]
    report.refusals += [{"where": name, "why": name, "try": name}]
    report.parity[0]["check"] = report.latency[0]["runtime"] = name
    report.patterns = [{"site": name, "pattern": name, "op": "", "tokens": 64, "keys": 9.0, "grid": [8, 8],
                        "ideal": 7.1, "tile": 2.0, "predicted": 1.5, "subset": True, "refusal": None}]  # fmt: skip
    report.command = f"tokenopt optimize {name}"
    report.calibration = {
        "budget": "flops=60%",
        "metric": name,
        "data": {"samples": 512},
        "held_out": {"samples": 450, "deviation": 0.04, "deviation_ci": [0.03, 0.05], "accuracy": 0.967,
                     "accuracy_dense": 0.969, "accuracy_ci": [0.949, 0.981]},
        "schedule": [{"site": s, "tokens_before": 197, "tokens_after": 184 - 60 * i} for i, s in enumerate(sites)],
        "sensitivity": [{"site": s, "ratio": r, "deviation": 1 - r} for s in sites for r in (0.5, 0.75)],
        "front": [
            {"name": name, "kind": name, "cost": 0.9, "deviation": 0.3, "chosen": False},
            {"name": "r=8", "kind": "calibrated", "cost": 0.6, "deviation": 0.04, "chosen": True},
            {"name": "random", "kind": "random", "cost": 0.6, "deviation": 0.4, "chosen": False},
        ],
        "gate": [{"site": name, "kept": False, "why": name, "speedup": 0.9}],
        "reverted": [{"site": name, "why": name}],
        "trials": [{"number": i, "cost": 0.6, "deviation": 1 / (i + 1)} for i in range(5)],
    }  # fmt: skip
    known = {"entropy": 4.0, "head_entropy": 3.0, "answer_entropy": None, "head_diversity": 0.1, "row_similarity": 0.5,
             "redundancy": 0.9, "intra": 90.0, "inter": 3.0, "flow": 0.0, "sink_dims": [7], "sink_share": 0.01,
             "sink_received": 0.3, "sink_overlap": 0.05}  # fmt: skip
    between = {"segments": ["cls", name], "between": [[0.1, 0.9], [0.2, 0.8]]}
    layers = [{"site": site, "tokens": 197, "heads": 6, **known, **between} for site in sites]
    report.diagnostics = {"samples": 8, "window": 4, "layers": layers}
    return report


def one_sample(site: str = "blocks.0") -> Sample:
    colours = ((0, 0, 0), (200, 100, 0), (9, 9, 9), (9, 9, 9))
    return Sample(3, 0.25, True, b"\x89PNG", (Stage(site, 2, (2, 2), (0, 0, 1, DROPPED), colours),))


SECTIONS = ["gains", "held-out-data", "schedule", "sensitivity", "pareto-front", "kept-by-measurement", "gallery",
            "attention-patterns", "diagnostics", "refusals", "checks", "reproduce"]  # fmt: skip


def test_a_full_report_has_every_section() -> None:
    page = Page(render(full_report(), [one_sample()]))
    assert [i for i in page.ids if not i.startswith("sample")] == SECTIONS
    for text in ("96.7%", "94.9% to 98.1%", "2.00x", "calibrated", "chosen", "tokenopt optimize vit.pt",
                 "another class", "a convolution reads the grid", "cls to vit.pt"):  # fmt: skip
        assert text in page.text, text
    assert page.tags.count("svg") == page.tags.count("figure") == 9, "seven charts, and a sample before and after"
    images = [v for tag, name, v in page.attributes if tag == "svg" and name == "role"]
    assert images == ["img"] * 9
    assert len(set(page.ids)) == len(page.ids)


def test_sections_appear_only_with_their_data() -> None:
    assert [i for i in Page(render(example_report())).ids] == ["gains", "schedule", "refusals", "checks", "reproduce"]
    assert Page(render(Report(versions={}))).ids == []


def test_an_older_report_is_read_and_shown() -> None:
    data = example_report().to_dict()
    for key in ("calibration", "diagnostics", "command"):
        del data[key]
    report = Report.from_dict(data)
    assert (report.calibration, report.diagnostics, report.command) == ({}, {}, "")
    assert "2.00x" in render(report)
    assert Report.from_dict(full_report().to_dict()) == full_report()


def test_layers_and_schedules_as_the_search_names_them() -> None:
    report = example_report()
    sensitivity = [{"layer": 1, "ratio": 0.5, "deviation": 0.1}]
    report.calibration = {"schedule": {"keep": [0.7, 0.5]}, "sensitivity": sensitivity}
    assert [i for i in Page(render(report)).ids][:3] == ["gains", "schedule", "sensitivity"]


HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "</style>")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text(name: str) -> None:
    page = render(full_report(name), [one_sample(name)])
    found = Page(page)
    assert "script" not in found.tags and "img" not in found.tags and found.tags.count("style") == 1
    assert not [a for _, a, _ in found.attributes if a.startswith("on") or a == "style"]
    assert found.text.count(name) > 10


def test_nothing_comes_from_elsewhere() -> None:
    page = render(full_report(), [one_sample()])
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", page)
    for tag, name, value in Page(page).attributes:
        if name in ("href", "src"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
    policy = next(v for tag, name, v in Page(page).attributes if tag == "meta" and "default-src" in v)
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_references_are_there_and_the_page_is_small() -> None:
    found = Page(page := render(full_report(), [one_sample()]))
    for _, name, value in found.attributes:
        if name == "href" and value.startswith("#"):
            assert value[1:] in found.ids
    assert len(page) < 60_000


def test_numbers_that_are_missing_leave_a_gap() -> None:
    report = full_report()
    for row in report.diagnostics["layers"]:
        row |= {key: None for key, value in row.items() if isinstance(value, float)}
    report.calibration["front"][0]["deviation"] = report.calibration["sensitivity"][0]["deviation"] = None
    report.calibration["held_out"]["accuracy_ci"] = None
    Page(render(report))


def test_schedules_of_other_recipes_have_a_mark_of_their_own() -> None:
    report = full_report()
    rows = [{"name": "r=8", "kind": "calibrated", "cost": 0.6, "deviation": d, "recipe": r, "chosen": r == "tome"}
            for r, d in (("tome", 0.04), ("evit", 0.05))]  # fmt: skip
    report.calibration["front"] = rows
    page = render(report)
    marks = re.findall(r"<title>([^<]*)</title>[^>]*>?[^<]*</path>|class=\"mark (k-[a-z-]+)\"", page)
    assert [m[1] for m in marks if m[1]] == ["k-other-recipe", "k-calibrated"]  # the chosen one is drawn last
    assert "evit r=8 (other-recipe)" in page and "tome r=8 (calibrated)" in page


# -- charts ------------------------------------------------------------------------------------------------------------


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.5), (4.0, 1.0), (0.5, 9.0)]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert charts.front(points) == sorted(set(points) - beaten)


@pytest.mark.parametrize("low, high", [(0, 1), (0, 197), (0.45, 0.85), (3, 3), (0, 1e-7), (-2, 5), (12345, 98765)])
def test_ticks_are_round_and_cover_the_range(low: float, high: float) -> None:
    for whole in (False, True):
        ticks = charts._ticks(low, high, 6, whole)
        assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 1 <= len(ticks) <= 9
        assert not whole or all(t == int(t) for t in ticks)


def test_a_stage_dims_fills_and_outlines() -> None:
    sample = one_sample()
    svg = str(charts.patches(sample, sample.stages[0]))
    assert 'fill="#643200"' in svg, "the mean colour of the two that are one token"
    assert '<path d="M0 0h2v1h-2z"' in svg and '<path d="M1 1h1v1h-1z" class="gone"' in svg
    assert '<path d="M0 1h1M1 1h1" class="edge"' in svg


# -- gallery -----------------------------------------------------------------------------------------------------------


def test_merged_patches_are_those_of_the_reference() -> None:
    """Stage by stage as the model that is patched by hand."""
    model, x = tiny("head"), images(4)
    result = optimize(model, x, recipe="tome", schedule={"r": 8})
    samples = gallery(result, x, count=2)
    assert sorted(s.number for s in samples) == [0, 1, 2, 3]
    assert [s.deviation for s in samples] == sorted(s.deviation for s in samples)
    tokens, layers = timm_embed(model, x)
    for depth in range(1, len(layers) + 1):
        home = tome(tokens, layers[:depth], [8] * depth).home[:, 1:]
        for sample in samples:
            stage = sample.stages[depth - 1]
            assert stage.left == len(set(stage.groups)) == 64 - 8 * depth and stage.site == f"blocks.{depth - 1}.attn"
            expected = home[sample.number].tolist()
            assert len(set(zip(expected, stage.groups, strict=True))) == stage.left, "the same partition"


def test_dropped_patches_are_counted_stage_by_stage() -> None:
    model, x = tiny("head"), images(3)
    result = optimize(model, x, recipe="random", schedule={"r": 8})
    best, worst = gallery(result, x, count=1)
    for sample in (best, worst):
        assert [stage.groups.count(DROPPED) for stage in sample.stages] == [8, 16, 24, 32]
        for earlier, later in zip(sample.stages, sample.stages[1:], strict=False):
            assert all(b == DROPPED for a, b in zip(earlier.groups, later.groups, strict=True) if a == DROPPED)
    dense, reduced = model(x), result.program(x)
    expected = (dense - reduced).norm(dim=1) / dense.norm(dim=1)
    torch.testing.assert_close(torch.tensor([best.deviation, worst.deviation]), torch.stack(expected.aminmax()))


@pytest.mark.parametrize("first, left, dropped", [("evit", [33, 17], 0), ("random", [32, 16], 32)])
def test_two_passes_continue_each_other(first: str, left: list[int], dropped: int) -> None:
    model, x = tiny("head"), images(2)
    passes = (
        f"fold-constants,raise-attention,flatten-grids,reduce-tokens{{recipe={first},schedule=keep=0.5@0}},"
        "reduce-tokens{recipe=tome,schedule=keep=0.5@2},remove-dead"
    )
    for sample in gallery(optimize(model, x, passes=passes), x):
        assert [stage.left for stage in sample.stages] == left
        assert [len(set(stage.groups) - {DROPPED}) for stage in sample.stages] == left
        assert [stage.groups.count(DROPPED) for stage in sample.stages] == [dropped, dropped]
        for a, b in zip(*(stage.groups for stage in sample.stages), strict=True):
            assert (a == DROPPED) == (b == DROPPED)
        merged = {pair for pair in zip(*(stage.groups for stage in sample.stages), strict=True)}
        assert len({a for a, _ in merged}) == len(merged), "what is one token stays one"


def test_no_gallery_where_there_is_nothing_to_draw() -> None:
    model, x = tiny("head"), images(2)
    assert gallery(optimize(model, x, recipe="tome", schedule={"r": 0}), x) == []
    assert gallery(optimize(model, x, schedule={"r": 8}), x[:, 0]) == []


def test_the_picture_is_the_image() -> None:
    model, x = tiny("head"), images(2)
    sample = gallery(optimize(model, x, schedule={"r": 8}), x)[0]
    width, height = struct.unpack(">II", sample.picture[16:24])
    content = zlib.decompress(sample.picture[sample.picture.index(b"IDAT") + 4 : -16])
    lines = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(height, -1)
    assert (lines[:, 0] == 2).all(), "the filter that adds the line above"
    pixels = lines[:, 1:].long().cumsum(0).remainder(256).view(height, width, 3)
    image = x[sample.number].permute(1, 2, 0)
    expected = (image - image.min()) / (image.max() - image.min()) * 255
    torch.testing.assert_close(pixels.float(), expected, atol=0.51, rtol=0)


# -- in a browser ------------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width, dark", [(1200, False), (390, True)])
def test_a_browser_draws_it(tmp_path: Path, width: int, dark: bool) -> None:
    """It is drawn at both widths and in both schemes: its background is that of the style sheet, and not all of it."""
    pytest.importorskip("PIL")
    from PIL import Image

    (tmp_path / "report.html").write_text(render(full_report(), [one_sample()]), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    options = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},3000", scheme,
               f"--screenshot={tmp_path / 'page.png'}"]  # fmt: skip
    command = [BROWSER, *FLAGS, *options, (tmp_path / "report.html").as_uri()]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert (tmp_path / "page.png").exists(), done.stderr.decode(errors="replace")[-2000:]
    page = Image.open(tmp_path / "page.png").convert("RGB")
    assert page.size[0] == width
    background = (0x13, 0x16, 0x18) if dark else (0xF7, 0xF7, 0xF5)
    assert page.getpixel((2, 2)) == background, "styles apply under the policy"
    accent = (0x56, 0xB6, 0xDA) if dark else (0x0A, 0x6A, 0x8F)
    assert sum(count for count, colour in page.getcolors(1 << 24) if colour == accent) > 500, "bars and lines"
