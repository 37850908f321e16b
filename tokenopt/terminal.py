"""What the command line shows: consoles, progress, and tables that are not the report's."""

from __future__ import annotations

import os
import re
import sys
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from tokenopt.report import (
    calibration_lines,
    calibration_table,
    new_table,
    parity_table,
    pattern_table,
    refusal_table,
)

_WIDTH = 160  # of what is piped: tables are folded less than on a terminal of 80


def console(stream: IO[str] | None = None) -> Console:
    """A console that prints text as it is, in colour on a terminal only."""
    stream = stream or sys.stdout
    wide = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(file=stream, width=_WIDTH if wide else None, markup=False, emoji=False, highlight=False)


class Stages:
    """Progress on stderr: a bar on a terminal, a line per stage elsewhere. Call it with (stage, done, total)."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=30))
            self._bar = Progress(
                *columns, MofNCompleteColumn(), TimeElapsedColumn(), console=console(sys.stderr), transient=True
            )

    def __enter__(self) -> Stages:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        if stage != self._stage:
            self._stage = stage
            if self._bar is None:
                print(stage, file=sys.stderr, flush=True)
        if self._bar is not None:
            self._bar.update(self._task, description=stage, completed=done, total=total or None)


def inspection(found: dict[str, Any]) -> RenderableType:
    """Axes, sites, effects, cuts and opaque operations of a model; of a pattern, what it would gain."""
    if found["patterns"]:
        return pattern_table(found["patterns"])
    axes = new_table("axis", "length", "segments", "carried by", right=(1,))
    for axis in found["axes"]:
        axes.add_row(axis["name"], str(axis["length"]), _segments(axis["segments"]), _counted(axis["carried_by"]))
    sites = new_table("attention", "kind", "axis", "queries", "keys", "heads", "head dim", "", right=(3, 4, 5, 6))
    for site in found["sites"]:
        refusal = site["refusal"]
        verdict = "can be reduced" if site["legal"] else f"no: {refusal['why']}" if refusal else "no"
        numbers = (site[k] for k in ("queries", "keys", "heads", "head_dim"))
        cells = [site["id"], site["kind"], site["axis"], *numbers]
        sites.add_row(*("" if c is None else str(c) for c in cells), verdict)
    effects = new_table("axis", "effects")
    for axis, counts in found["effects"].items():
        effects.add_row(axis, _counts(counts))
    cuts = new_table("cut", "after", "axis", "width", "depth", "what follows", "restore before", right=(3, 4))
    for cut in found["cuts"]:
        cuts.add_row(
            cut["site"] or cut["where"],
            cut["after"],
            cut["axis"],
            str(cut["width"]),
            f"{cut['depth']:.2f}",
            _counts(cut["obligations"]),
            ", ".join(cut["restore_before"]),
        )
    opaque = new_table("operation without a rule", "where", "rule to write")
    for item in found["opaque"]:
        opaque.add_row(item["op"], item["where"], item["template"])
    refusals = refusal_table([site["refusal"] for site in found["sites"] if site["refusal"]])
    model = found["model"]
    inputs = ", ".join(f"{i['name']} {i['dtype']}[{', '.join(map(str, i['shape']))}]" for i in model["inputs"])
    raised = sum(bool(site["raised"]) for site in found["sites"])
    legal = sum(bool(site["legal"]) for site in found["sites"])
    summary = (
        f"{model['nodes']} operations on {inputs}\n"
        f"{len(found['sites'])} attention sites, {raised} recognised in full, {legal} can be reduced"
    )
    tables = (axes, sites, effects, cuts, opaque, refusals)
    return Group(Text(summary), *(table for table in tables if table.row_count))


def exported(found: dict[str, Any]) -> RenderableType:
    """What was checked and written."""
    files = new_table("written", "path")
    for runtime, path in found["files"].items():
        files.add_row(runtime, path)
    return Group(parity_table(found["parity"]), files)


def calibrated(found: dict[str, Any]) -> RenderableType:
    """The schedule, and how it compares with fixed ones on data that were not fitted on."""
    return Group(Text("\n".join(calibration_lines(found["calibration"]))), calibration_table(found["calibration"]))


def bench_table(rows: list[dict[str, Any]]) -> RenderableType:
    """One line per model and batch size: median, spread, ratio to the first."""
    table = new_table("model", "runtime", "batch", "threads", "median", "spread", "ratio", right=(2, 3, 4, 5, 6))
    for row in rows:
        table.add_row(
            row["name"],
            row["runtime"],
            str(row["batch"]),
            str(row["threads"]),
            f"{row['median_ms']:.3f} ms",
            f"{row['iqr_ms']:.3f} ms",
            f"{row['ratio']:.2f}x",
        )
    return table


def recipe_table(rows: list[dict[str, Any]]) -> RenderableType:
    """One line per recipe: where it reduces, what it does, and where it was published."""
    table = new_table("recipe", "place", "", "source")
    for row in rows:
        found = re.search(r"arXiv:\S+?(?=[,)\s]|$)", row["paper"])
        table.add_row(row["name"], row["place"], row["summary"], found[0] if found else row["paper"])
    return table


def matrix_table(rows: list[dict[str, Any]]) -> RenderableType:
    """One line per recipe, one column per runtime: the error where it was built, or a word; and the reasons below."""
    runtimes = list(rows[0]["runtimes"]) if rows else []
    table = new_table("recipe", "model", *runtimes, right=tuple(range(2, 2 + len(runtimes))))
    reasons = new_table("recipe", "", "why")
    for row in rows:
        cells = row["runtimes"].values()
        shown = [c["status"] if c["error"] is None else f"{c['status']} {c['error']:.0e}" for c in cells]
        table.add_row(row["recipe"], row["model"], *shown)
        for why in dict.fromkeys((c["status"], c["why"]) for c in cells if c["why"]):
            reasons.add_row(row["recipe"], *why)
    return Group(*(t for t in (table, reasons) if t.row_count))


def name_table(kind: str, rows: list[dict[str, str]]) -> RenderableType:
    """Registered names with a line each."""
    table = new_table(kind, "")
    for row in rows:
        table.add_row(row["name"], row["summary"])
    return table


def _segments(segments: list[dict[str, Any]]) -> str:
    parts = []
    for segment in segments:
        grid = "x".join(map(str, segment["grid"])) if segment["grid"] else str(segment["length"])
        parts.append(f"{segment['name']}({grid}{', protected' if segment['protected'] else ''})")
    return " + ".join(parts)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items() if count)


def _counted(carried_by: Any) -> str:
    return f"{len(carried_by) if isinstance(carried_by, list) else carried_by} values"
