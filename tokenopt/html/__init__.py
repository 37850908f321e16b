"""A report as one page that needs nothing else: no script, no network, light and dark."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from tokenopt.html import charts
from tokenopt.html.charts import Mark, Series
from tokenopt.report import (
    PARITY_COLUMNS,
    PATTERN_COLUMNS,
    REFUSAL_COLUMNS,
    Report,
    merged,
    parity_rows,
    pattern_rows,
    ratio,
    refusal_rows,
)  # fmt: skip

if TYPE_CHECKING:
    from tokenopt.gallery import Sample, Stage

_KINDS = ("calibrated", "other-recipe", "random", "fixed")
_STAGES = 12  # of a sample that are drawn, evenly chosen
_OPEN = 12  # rows of a table of values beside its chart that are shown without a click
_HERE = Path(__file__).parent


@dataclass
class Table:
    """Rows of text; ``right`` are the columns of numbers; a folded one is opened by a click."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()
    fold: str = ""


@dataclass
class Strip:
    """One sample of the gallery: what to say of it, and (picture, caption) at each stage."""

    caption: str
    frames: list[tuple[Markup, str]]


@dataclass
class Section:
    """One part of the page; a half one shares its row with another, a paired one has its table beside its figure."""

    title: str
    lead: str = ""
    figures: list[Markup] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)
    code: str = ""
    half: bool = False
    paired: bool = False

    @property
    def id(self) -> str:
        return self.title.lower().replace(" ", "-")

    @property
    def empty(self) -> bool:
        return not (self.figures or self.tables or self.strips or self.code)


def render(report: Report, gallery: Sequence[Sample] | None = None) -> str:
    """The page of a report; sections appear where their data are there.

    Args:
        gallery: of `tokenopt.gallery.gallery`.
    """
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'",
        style=Markup(style),
        report=report,
        tiles=list(_tiles(report)),
        sections=[s for s in _sections(report, gallery or []) if not s.empty],
    )


def _tiles(report: Report) -> Iterator[tuple[str, str, str]]:
    """The few numbers to see first: (number, of what, beside it)."""
    before, after = report.tokens.get("before") or [], report.tokens.get("after") or []
    if sum(before) and report.reduced:
        yield ratio(sum(before), sum(after)), "fewer tokens", f"{sum(before)} to {sum(after)} in all attentions"
    if report.flops.get("before"):
        b, a = report.flops["before"], report.flops["after"]
        yield ratio(b, a), "fewer FLOPs", f"{b / 1e9:.3g} to {a / 1e9:.3g} GFLOP per sample"
    for runtime in dict.fromkeys(row["runtime"] for row in report.latency):
        rows = [row for row in report.latency if row["runtime"] == runtime and row["before_ms"] and row["after_ms"]]
        if rows:
            rows.sort(key=lambda row: row["before_ms"] / row["after_ms"])
            ends = dict.fromkeys(f"{row['before_ms'] / row['after_ms']:.2f}" for row in (rows[0], rows[-1]))
            batches = ", ".join(str(batch) for batch in sorted({row["batch"] for row in rows}))
            yield "\u2013".join(ends) + "x", f"speed-up in {runtime}", f"measured at batch {batches}"
    held = report.calibration.get("held_out") or {}
    if held.get("accuracy") is not None:
        words = [f"dense {held['accuracy_dense']:.1%}"] if held.get("accuracy_dense") is not None else []
        words += [interval] if (interval := _interval(held, "accuracy", "{:.1%}")) else []
        yield f"{held['accuracy']:.1%}", "held-out accuracy", "; ".join(words)
    elif held.get("deviation") is not None:
        yield _number(held["deviation"]), "held-out deviation", _interval(held, "deviation", "{:.3g}")
    if report.parity:
        checks = merged(report.parity)
        passed = sum(row["passed"] for row in checks)
        yield f"{passed} of {len(checks)}", "checks passed", ", ".join(row["check"] for row in checks)


def _sections(report: Report, gallery: Sequence[Sample]) -> Iterator[Section]:
    yield _gains(report)
    yield _held_out(report.calibration)
    yield _schedule(report)
    yield _sensitivity(report.calibration)
    yield _front(report.calibration)
    yield _gate(report.calibration)
    yield _gallery(gallery)
    yield _patterns(report)
    yield _diagnostics(report.diagnostics)
    yield _refusals(report)
    yield _parity(report)
    yield _reproduce(report)


def _gains(report: Report) -> Section:
    rows = report.gains()
    section = Section("Gains", tables=[Table(("", "before", "after", "gain"), rows, (1, 2, 3))] if rows else [])
    speed = [(f"{r['runtime']}, batch {r['batch']}", r["before_ms"] / r["after_ms"],
              ratio(r["before_ms"], r["after_ms"])) for r in report.latency if r["after_ms"]]  # fmt: skip
    if speed:
        section.lead = "Latencies are medians, measured side by side in one run. The line is the dense model."
        section.paired = bool(rows)
        section.figures.append(charts.bars("Speed-up by runtime and batch size", speed))
    return section


def _held_out(found: Mapping[str, Any]) -> Section:
    section, held = Section("Held-out data"), found.get("held_out") or {}
    rows = []
    if held.get("accuracy") is not None:
        interval = _interval(held, "accuracy", "{:.1%}")
        rows.append(("accuracy", _percent(held.get("accuracy_dense")), _percent(held["accuracy"]), interval))
    if held.get("deviation") is not None:
        metric = str(found.get("metric") or "")
        name = f"deviation ({metric})" if metric else "deviation"
        rows.append((name, "", _number(held["deviation"]), _interval(held, "deviation", "{:.3g}")))
    if rows:
        section.tables.append(Table(("", "dense", "reduced", "95 % interval"), rows, (1, 2, 3)))
        data = found.get("data") or {}
        words = [f"On {held['samples']} samples that the schedule was not fitted to." if held.get("samples") else "",
                 f"Fitted to {data['samples']} others" if data.get("samples") else "",
                 f"under the budget {found['budget']}." if found.get("budget") else ""]  # fmt: skip
        section.lead = " ".join(filter(None, words))
    return section


def _schedule(report: Report) -> Section:
    beside = bool(report.calibration.get("sensitivity"))
    section = Section("Schedule", half=beside, paired=not beside)
    given = report.calibration.get("schedule")
    rows = given if isinstance(given, list) and given else [
        {"site": s["id"], "tokens_before": s["tokens_before"], "tokens_after": s["tokens_after"]} for s in report.sites
    ]  # fmt: skip
    if not rows or not (report.reduced or isinstance(given, list)):
        return section
    section.lead = "Tokens that each attention lets through, in the order of the model."
    lines = [("dense", "tokens_before", "dashed muted"), ("reduced", "tokens_after", "")]
    series = [Series(name, list(enumerate(r[key] for r in rows)), style, "middle") for name, key, style in lines]
    section.figures.append(charts.lines("Tokens per layer", series[::-1], "attention", "tokens"))
    cells = [(i, r["site"], r["tokens_before"], r["tokens_after"], f"{r['tokens_after'] / r['tokens_before']:.0%}"
              if r["tokens_before"] else "") for i, r in enumerate(rows)]  # fmt: skip
    fold = "Values" if beside or len(rows) > _OPEN else ""
    section.tables.append(Table(("", "attention", "before", "after", "left"), _text(cells), (0, 2, 3, 4), fold))
    return section


def _sensitivity(found: Mapping[str, Any]) -> Section:
    section, rows = Section("Sensitivity", half=True), found.get("sensitivity") or []
    if not rows:
        return section
    places = list(dict.fromkeys(str(r.get("site", r.get("layer"))) for r in rows))
    ratios = sorted({r["ratio"] for r in rows}, reverse=True)
    value = {(str(r.get("site", r.get("layer"))), r["ratio"]): r["deviation"] for r in rows}
    series = [
        Series(f"{share:.0%} kept", [(i, v) for i, p in enumerate(places) if (v := value.get((p, share))) is not None])
        for share in ratios
    ]
    section.lead = "What it costs to reduce one layer alone, to a share of its tokens. Where it is low, tokens can go."
    section.figures.append(charts.lines("Deviation by layer", series, "attention", "deviation"))
    cells = [(i, p, *(_number(value.get((p, share))) for share in ratios)) for i, p in enumerate(places)]
    columns = ("", "attention", *(f"{share:.0%}" for share in ratios))
    section.tables.append(Table(columns, _text(cells), (0, *range(2, len(columns))), "Values"))
    return section


def _front(found: Mapping[str, Any]) -> Section:
    section, points, marks = Section("Pareto front"), found.get("front") or [], []
    points = [p for p in points if p.get("cost") is not None and p.get("deviation") is not None]
    if points:
        chosen = next((p.get("recipe") for p in points if p.get("chosen")), None)
        for p in points:
            other = p.get("recipe") != chosen and p["kind"] == "calibrated"
            kind = "other-recipe" if other else p["kind"] if p["kind"] in _KINDS else "fixed"
            name = f"{p['recipe']} {p['name']}" if p.get("recipe") else str(p["name"])
            marks.append(Mark(name, kind, 100 * p["cost"], p["deviation"], bool(p.get("chosen"))))
        section.lead = "Cost against deviation: what lies lower and further left is better. The line is the front."
        unit = str(found.get("budget") or "cost").split("=")[0]
        section.figures.append(charts.scatter("Schedules tried", marks, f"{unit}, % of dense", "deviation"))
        order = sorted(points, key=lambda p: (not p.get("chosen"), p["cost"]))
        cells = [(p.get("recipe"), p["name"], p["kind"], _percent(p["cost"]), _number(p["deviation"]),
                  "chosen" if p.get("chosen") else "") for p in order]  # fmt: skip
        heads = ("recipe", "schedule", "kind", "cost", "deviation", "")
        section.tables.append(Table(heads, _text(cells), (3, 4), "Values"))
    trials = [t for t in found.get("trials") or [] if t.get("deviation") is not None]
    if len(trials) > 1:
        best = [min(t["deviation"] for t in trials[: i + 1]) for i in range(len(trials))]
        numbers = [t["number"] for t in trials]
        series = [Series("best so far", list(zip(numbers, best, strict=True)), "plain", "after"),
                  Series("trial", [(t["number"], t["deviation"]) for t in trials], "dots")]  # fmt: skip
        section.figures.append(charts.lines("Search", series, "trial", "deviation"))
    if effort := found.get("effort"):
        cells = [(stage.replace("_", " "), f"{e['passes']:.1f}", f"{e['seconds']:.1f}") for stage, e in effort.items()]
        section.tables.append(Table(("stage", "passes over the data", "seconds"), cells, (1, 2), "Effort"))
    return section


def _gate(found: Mapping[str, Any]) -> Section:
    section = Section("Kept by measurement")
    if rows := found.get("gate"):
        cells = [(r["site"], "kept" if r["kept"] else "left out", _times(r.get("speedup")), r.get("why")) for r in rows]
        section.tables.append(Table(("attention", "", "measured", "why"), _text(cells), (2,)))
    if rows := found.get("reverted"):
        cells = [(r.get("site"), r.get("why")) for r in rows]
        section.tables.append(Table(("reverted", "why"), _text(cells)))
    return section


def _gallery(samples: Sequence[Sample]) -> Section:
    section = Section("Gallery")
    if not samples:
        return section
    dropping = any(charts.DROPPED in stage.groups for s in samples for stage in s.stages)
    what = "Dimmed patches are gone." if dropping else "Patches of one token share its mean colour and an outline."
    section.lead = f"From the samples whose outputs changed least to those that changed most. {what}"
    half = -(-len(samples) // 2)
    for i, sample in enumerate(samples):
        same = {None: "", True: ", another class", False: ", the same class"}[sample.changed]
        rank = "changed least" if i < half else "changed most"
        strip = Strip(f"Sample {sample.number}, {rank}: deviation {sample.deviation:.3g}{same}",
                      [(charts.picture(sample), "input")])  # fmt: skip
        for stage in _even(sample.stages):
            strip.frames.append((charts.patches(sample, stage), f"{stage.site}: {stage.left}"))
        section.strips.append(strip)
    return section


def _even(stages: Sequence[Stage]) -> Sequence[Stage]:
    """At most `_STAGES` of them, the last among them."""
    if len(stages) <= _STAGES:
        return stages
    return [stages[round(i * (len(stages) - 1) / (_STAGES - 1))] for i in range(_STAGES)]


def _patterns(report: Report) -> Section:
    section, rows = Section("Attention patterns"), pattern_rows(report.patterns)
    if rows:
        section.tables.append(Table(PATTERN_COLUMNS, rows, (2, 4, 5, 6, 7)))
    return section


# label, key, what counts as full (None: the greatest value)
_STRIPS = (
    ("entropy", "entropy", None),
    ("answer entropy", "answer_entropy", None),
    ("head diversity", "head_diversity", 1.0),
    ("row similarity", "row_similarity", 1.0),
    ("redundancy", "redundancy", 1.0),
    ("sinks", "sink_share", None),
    ("attention to sinks", "sink_received", 1.0),
    ("sinks at the top", "sink_overlap", 1.0),
    ("information flow", "flow", 1.0),
)


def _diagnostics(found: Mapping[str, Any]) -> Section:
    section, layers = Section("Diagnostics"), found.get("layers") or []
    if not layers:
        return section
    sites = [str(row["site"]) for row in layers]
    strips = []
    for label, key, full in _STRIPS:
        values = [row.get(key) for row in layers]
        known = [v for v in values if v is not None]
        if known and max(known) > 0:
            strips.append((label, values, full or max(known)))
    section.lead = (
        f"Of the dense model's attention, on {found.get('samples', '?')} samples. Row similarity and redundancy near 1 "
        "say that tokens see the same; sinks at the top say that a score by attention would keep them."
    )
    section.figures.append(charts.heat("Attention by layer", sites, strips, "attention"))
    flows: dict[str, list[tuple[float, float]]] = {}
    for i, row in enumerate(layers):
        names = row.get("segments") or []
        for a, shares in zip(names, row.get("between") or [], strict=False):
            for b, value in zip(names, shares, strict=False):
                if a != b and value is not None:
                    flows.setdefault(f"{a} to {b}", []).append((i, value))
    if flows:
        series = [Series(name, points) for name, points in flows.items()]
        section.figures.append(charts.lines("Attention between segments", series, "attention", "share"))
    values = {label: values for label, values, _ in strips}
    values |= {"% among them": [r.get("intra") for r in layers], "% with others": [r.get("inter") for r in layers]}
    values |= {name: [dict(points).get(i) for i in range(len(layers))] for name, points in flows.items()}
    columns = ["", "attention", *values]
    cells = [(i, site, *(_number(column[i]) for column in values.values())) for i, site in enumerate(sites)]
    section.tables.append(Table(columns, _text(cells), (0, *range(2, len(columns))), "Values"))
    return section


def _refusals(report: Report) -> Section:
    section, rows = Section("Refusals", "Considered, and not done."), refusal_rows(report.refusals, most=8)
    if rows:
        section.tables.append(Table(("", *REFUSAL_COLUMNS[1:]), rows, (0,)))
    return section


def _parity(report: Report) -> Section:
    section, rows = Section("Checks"), parity_rows(merged(report.parity))
    if rows:
        section.lead = (
            "Capture compares the graph with the model, identity the rewritten graph that removes nothing with the "
            "dense one, twin the reductions as they are with the dense graph at full length in which merged tokens are "
            "copies and dropped ones are unseen, and a runtime its file with the rewritten program; the worst output "
            "of each."
        )
        section.tables.append(Table(PARITY_COLUMNS, rows, (2, 3, 4, 5, 6)))
    return section


def _reproduce(report: Report) -> Section:
    section = Section("Reproduce", code=str(report.calibration.get("command") or report.command))
    if report.recipe:
        settings = report.recipe.get("settings") or {}
        changed = {k: v for k, v in settings.items() if v not in (None, False, {}) and k not in ("paper", "schedule")}
        summary = changed.pop("summary", "")
        rows = [("model", report.model.get("name")), ("digest", report.model.get("digest")),
                ("recipe", ": ".join(str(v) for v in (report.recipe.get("name"), summary) if v)),
                ("paper", settings.get("paper")),
                ("parts", ", ".join(f"{k}={v if isinstance(v, str) else _plain(v)}" for k, v in changed.items())),
                ("schedule", _plain(report.schedule) if report.schedule else ""),
                ("passes", report.recipe.get("passes"))]  # fmt: skip
        section.tables.append(Table(("", ""), _text(r for r in rows if r[1])))
    if report.files:
        section.tables.append(Table(("file", "path"), _text(report.files.items())))
    if report.versions:
        section.tables.append(Table(("package", "version"), _text(report.versions.items()), fold="Versions"))
    if report.timings:
        cells = [(name, f"{value:.2f}") for name, value in report.timings.items()]
        section.tables.append(Table(("stage", "seconds"), cells, (1,), "Timings"))
    return section


def _text(rows: Any) -> list[tuple[str, ...]]:
    return [tuple("" if cell is None else str(cell) for cell in row) for row in rows]


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _interval(found: Mapping[str, Any], key: str, form: str) -> str:
    """A confidence interval as text."""
    ends = found.get(f"{key}_ci")
    if not ends or None in ends:
        return ""
    return f"{form.format(ends[0])} to {form.format(ends[1])}"
