"""Report: what one optimisation did, as data with a versioned schema and as a table for the terminal."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tokenopt.errors import TokenoptError

REPORT_VERSION = 1

_PACKAGES = (
    "tokenopt", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "timm",
    "torchvision", "transformers", "diffusers", "triton",
)  # fmt: skip


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can influence a result, without importing them."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass
class Report:
    """What one optimisation did. Written as ``report.json``, schema version 1.

    Every key is written, and one that an older release did not write is read as empty. A number that is not finite is
    written as null.

    version    1. A reader refuses a version it does not know.
    model      name: where it came from; digest: of graph and weights, before
               inputs, outputs: [{name, dtype, shape}], a string in a shape is a dynamic size
               added_inputs, added_outputs: what the rewritten program takes and returns besides, behind those
    recipe     name; settings: {key: value}; passes: the pass list as text, which makes the same passes again
               short_outputs: whether outputs were left reduced
    schedule   the resolved schedule; it can be given back to ``optimize`` as ``schedule``
    axes       [{name, length, segments: [{name, start, length, grid, protected}], carried_by}], before
    sites      [{id, kind, axis, tokens_before, tokens_after, heads, head_dim, refusal}], one per attention;
               refusal: null or {where, why, try}
    refusals   [{where, why, try}]: everything that was considered and not done
    edits      [{pass_spec, site, before, after}]: everything that was done; before and after count tokens, or null
    patterns   [{site, pattern, op, subset, grid, tokens, keys, ideal, tile, predicted, refusal}]: attention patterns;
               keys that a query sees on average, and the speed-up of that attention if only they cost anything, if all
               pairs that are computed cost the same, and by the cost model; subset: else it is a different softmax
    flops      before, after: floating-point operations of one run at batch size 1, or at the fixed one
    tokens     before, after: [tokens per site]
    parity     [{check, inputs, batch, tolerance, passed, outputs}], the checks that were made
               check: capture (eager model against program), identity (neutral setting against dense program),
               twin (the reductions at their schedule against the dense graph at full length that carries them out),
               or the runtime whose file was compared with the rewritten program
               note: optional; why something was not compared, and what it was proven by instead
               inputs: example, random (fresh), data (given), or shapes: the engine cannot run on this machine, and
               its names, dtypes and shapes alone were compared
               unstable: optional; samples left out because rounding alone decides which of their tokens are merged
               outputs: [{name, max_abs, mean_abs, max_rel, cosine, argmax_agreement}], the last null where rows are
               no scores of classes
    data       empty if none was given; else seed, and fitted, checked: what was learned from, and what the data's rows
               of parity are of, each null or {source, samples, labels (whether known), classes (how many),
               preprocessing ({mean, std, resize, crop, fit, interpolation, scale, source} of images), synthetic,
               skipped: [{file, why}]}; nothing that was learned from is checked on
    latency    [{runtime, batch, threads, before_ms, after_ms, speedup}], medians, measured side by side in one run
    calibration  {} without one; else what a schedule was fitted to, each key there if it is known:
               budget: "flops=60%"; metric: of deviation; data: {samples, batch, ...}, what it was fitted on
               held_out: {samples, deviation, deviation_ci, accuracy, accuracy_dense, accuracy_ci}, on data that it was
               not fitted on; an interval is [low, high] at 95 %, accuracies are shares
               schedule: [{site, tokens_before, tokens_after}], or a mapping as ``schedule``; of a pattern of attention
               {keep}, the share that is seen
               sensitivity: [{site or layer, ratio, deviation}]: each layer reduced alone, to that share of its tokens
               front: [{name, kind, cost, deviation, chosen}], kind: calibrated, baseline, random or fixed; cost: share
               of the dense model's, in the budget's unit
               gate: [{site, kept, why, speedup}]: whether a reduction stays, by what it was measured to gain
               reverted: [{site, why}]; trials: [{number, cost, deviation}]
               effort: {stage: {passes, seconds}}, forward passes over the samples and time of each stage
               command: what repeats it
    diagnostics  {} if there were no data; else of `tokenopt.diagnostics.diagnose`, of the dense model: samples,
               window: rows and columns of a neighbourhood; layers: [{site, axis, tokens, heads, ...}], null if unknown:
               entropy, head_entropy: nats, of the mean over heads of a row of attention, and the mean over heads
               answer_entropy: nats, of what class token or last token attends to among the reducible tokens
               head_diversity: 0 where heads attend alike, 1 where no two attend to the same
               row_similarity: mean cosine of rows with the mean row, both cut at 2 / tokens
               redundancy: mean cosine of rows with the mean of their neighbourhood, keys outside it alone
               segments: [name]; between: [[share]]: of the attention of a segment's queries, on each segment's keys
               intra, inter, flow: per cent of all attention that passes among the reducible tokens, and between them
               and the others; information flow, from 0 at the axis' layer of the least to 1
               sink_dims, sink_share, sink_received, sink_overlap: as of `tokenopt.diagnostics.sinks`
    command    what makes the same files again, as a line for a shell
    files      {role: path}, relative to the report
    timings    {stage: seconds}
    versions   {package: version}
    """

    model: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    axes: list[dict[str, Any]] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    edits: list[dict[str, Any]] = field(default_factory=list)
    patterns: list[dict[str, Any]] = field(default_factory=list)
    flops: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    parity: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    latency: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    files: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=installed_versions)
    version: int = REPORT_VERSION

    @property
    def reduced(self) -> bool:
        """Whether any site sees fewer tokens than before."""
        return self.tokens.get("before") != self.tokens.get("after")

    @property
    def passed(self) -> bool:
        """Whether every check that was made passed."""
        return all(row["passed"] for row in self.parity)

    # -- JSON ----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What ``report.json`` holds: plain lists, dicts, strings and finite numbers."""
        names = ["version", *(f.name for f in fields(self) if f.name != "version")]
        return {name: _plain(getattr(self, name)) for name in names}

    @classmethod
    def from_dict(cls, data: Any, where: str | None = None) -> Report:
        """The report behind a dict.

        Raises:
            TokenoptError: if it is no report, or of a version that this release does not know.
        """
        if not isinstance(data, Mapping) or "version" not in data or "sites" not in data:
            raise TokenoptError("this is not a tokenopt report", where=where, why="it has no 'version' and 'sites'")
        if data["version"] != REPORT_VERSION:
            raise TokenoptError(
                f"the report has version {data['version']!r}",
                where=where,
                why=f"this release of tokenopt reads version {REPORT_VERSION}",
                hint="use the release that wrote it, or run optimize again",
            )
        expected = {f.name: type(getattr(cls(), f.name)) for f in fields(cls)}
        for name, value in data.items():
            if not isinstance(value, expected.get(name, ())):
                raise TokenoptError("the report is malformed", where=where, why=f"its key {name!r} is unexpected")
        return cls(**data)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes ``report.json``; an existing file is replaced at the end."""
        from tokenopt.program import atomic_path  # here, so that reading a report needs no torch

        path = Path(path)
        with atomic_path(path) as partial:
            partial.write_text(dumps(self.to_dict()) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Reads ``report.json``.

        Raises:
            TokenoptError: if it is no report, or of a version that this release does not know.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # malformed JSON or text that is not UTF-8
            raise TokenoptError("this is not a tokenopt report", where=str(path), why=str(error)) from error
        return cls.from_dict(data, str(path))

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """Model, recipe and schedule in one line."""
        from tokenopt.schedule import Schedule

        words = [self.model.get("name"), self.recipe.get("name")]
        if self.schedule:
            words.append(Schedule.parse(self.schedule))
        return ", ".join(str(word) for word in words if word)

    def gains(self) -> list[tuple[str, ...]]:
        """What was gained, as text: (what, before, after, ratio)."""
        rows = []
        before, after = self.tokens.get("before") or [0], self.tokens.get("after") or [0]
        if any(before) and (self.reduced or not self.patterns):
            rows.append(("tokens in the last site", f"{before[-1]}", f"{after[-1]}", ratio(before[-1], after[-1])))
            b, a = sum(before), sum(after)
            rows.append(("tokens in all sites", f"{b}", f"{a}", ratio(b, a)))
        if self.flops.get("before"):
            b, a = self.flops["before"], self.flops["after"]
            rows.append(("GFLOP", f"{b / 1e9:.3g}", f"{a / 1e9:.3g}", ratio(b, a)))
        for row in self.latency:
            name = f"{row['runtime']}, batch {row['batch']}, {plural(row['threads'], 'thread')}"
            b, a = row["before_ms"], row["after_ms"]
            rows.append((name, f"{b:.2f} ms", f"{a:.2f} ms", ratio(b, a)))
        return rows

    # -- terminal ------------------------------------------------------------------------------------------------

    def table(self, folder: str | os.PathLike[str] = "") -> Any:
        """What was gained, checked, refused and written (to ``folder``), as a rich renderable."""
        from rich.console import Group
        from rich.text import Text

        parts = [Text(self.title, style="bold")] if self.title else []
        for verb, key in (("takes", "added_inputs"), ("returns", "added_outputs")):
            added = [f"{s['name']} {s['dtype']}[{', '.join(map(str, s['shape']))}]" for s in self.model.get(key, ())]
            parts += [Text(f"also {verb} {', '.join(added)}")] if added else []
        for use in ("fitted", "checked"):
            parts += [Text(f"{use} on {_data_line(self.data[use])}")] if self.data.get(use) else []
        parts += [Text(line) for line in calibration_lines(self.calibration)]
        return Group(*parts, *(table for table in self._tables(folder) if table.row_count))

    def _tables(self, folder: str | os.PathLike[str]) -> Iterator[Any]:
        gains = new_table("", "before", "after", "gain", right=(1, 2, 3))
        for row in self.gains():
            gains.add_row(*row)
        yield gains
        yield calibration_table(self.calibration)
        yield pattern_table(self.patterns)
        yield parity_table(merged(self.parity))
        yield refusal_table(self.refusals)
        files = new_table("written", "path")
        for role, path in self.files.items():
            files.add_row(role, os.path.join(folder, path))
        yield files


def dumps(value: Any) -> str:
    """ASCII-only JSON; what is not finite becomes null."""
    return json.dumps(_plain(value), indent=2, allow_nan=False)


# -- parts of tables, shared with the other verbs ----------------------------------------------------------------


def calibration_lines(fit: Mapping[str, Any]) -> list[str]:
    """What a calibration minimised, what that took, the latency it measured, and what was taken back."""
    if "fitted" not in fit:
        return []
    lines = [f"recipe {fit['recipe']}, {fit['budget']}, deviation: {fit['metric']}"]
    spent = (
        f"{stage.replace('_', ' ')} {e['passes']:.0f} in {e['seconds']:.1f} s" for stage, e in fit["effort"].items()
    )
    lines.append(f"forward passes over {fit['fitted']['samples']} samples: {', '.join(spent)}")
    if latency := fit["latency"]:
        lines.append(f"{latency['ms']:.3f} ms of {latency['dense_ms']:.3f} ms ({latency['ratio']:.2f}x), "
                     f"{latency['source']}{'' if latency['met'] else '; the budget is not met'}")  # fmt: skip
    return lines + [f"taken back: {row['site']}, {row['why']}" for row in fit["reverted"]]


def calibration_table(fit: Mapping[str, Any]) -> Any:
    """The schedule that was chosen beside fixed ones of its recipe, on the data that were fitted on and on others.

    Of recipes that were not chosen, the best schedule.
    """
    table = new_table("schedule", "cost", "deviation", "held out", "accuracy", right=(1, 2, 3, 4))
    if "fitted" not in fit:
        return table
    held_out = fit["held_out"]
    fixed = held_out.get("fixed", {})
    chosen = {"name": f"chosen: {fit['fitted']['schedule']}", **fit["fitted"]}
    points = [chosen, *(p for p in fit["front"] if p["kind"] != "calibrated" and p["recipe"] == fit["recipe"])]
    for point in points:
        held = held_out if point is chosen else fixed.get(point["name"], {})
        numbers = (held.get("deviation"), held.get("accuracy"))
        cells = [f"{point['deviation']:.4g}", *("" if n is None else f"{n:.4g}" for n in numbers)]
        table.add_row(point["name"], f"{point['cost']:.1%}", *cells)
    least = sorted((p for p in fit["front"] if p["kind"] != "random"), key=lambda p: p["deviation"], reverse=True)
    for recipe, point in {p["recipe"]: p for p in least if p["recipe"] != fit["recipe"]}.items():
        table.add_row(f"{recipe} {point['name']}", f"{point['cost']:.1%}", f"{point['deviation']:.4g}", "", "")
    return table


def new_table(*columns: str, right: tuple[int, ...] = ()) -> Any:
    """An empty rich table whose cells are literal text, folded rather than cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    class LiteralTable(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            """A string is text, not markup: ids such as ``blocks[0]`` stay as they are."""
            super().add_row(*(Text(c) if isinstance(c, str) else c for c in cells), **options)

    table = LiteralTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", overflow="fold")
    return table


PATTERN_COLUMNS = ("attention", "pattern", "tokens", "grid", "keys", "ideal", "tiles", "predicted", "")
PARITY_COLUMNS = ("check", "inputs", "batch", "max abs", "max rel", "cosine", "argmax", "")
REFUSAL_COLUMNS = ("not rewritten", "where", "why", "try")


def pattern_table(rows: list[dict[str, Any]]) -> Any:
    """`pattern_rows` as a table."""
    return _filled(pattern_rows(rows), *PATTERN_COLUMNS, right=(2, 4, 5, 6, 7))


def parity_table(rows: list[dict[str, Any]]) -> Any:
    """`parity_rows` as a table."""
    return _filled(parity_rows(rows), *PARITY_COLUMNS, right=(2, 3, 4, 5, 6))


def refusal_table(refusals: list[dict[str, Any]]) -> Any:
    """`refusal_rows` as a table."""
    return _filled(refusal_rows(refusals), *REFUSAL_COLUMNS, right=(0,))


def _filled(rows: Iterable[tuple[str, ...]], *columns: str, right: tuple[int, ...]) -> Any:
    table = new_table(*columns, right=right)
    for row in rows:
        table.add_row(*row)
    return table


# -- rows of text, shared by the terminal and the page -----------------------------------------------------------


def pattern_rows(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line per kind of attention and pattern: what a query sees, and what that gains."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        why = row["refusal"]["why"] if row["refusal"] else ""
        groups.setdefault((row["pattern"], row["tokens"], str(row["grid"]), row["predicted"], why), []).append(row)
    lines = []
    for (pattern, tokens, _, _, why), found in groups.items():
        row = found[0]
        times = lambda v: "" if v is None else f"{v:.2f}x"  # noqa: E731
        grid = "x".join(map(str, row["grid"])) if row["grid"] else ""
        verdict = f"no: {why}" if why else "applied" if row["subset"] else "applied: a different softmax"
        name = found[0]["site"] if len(found) == 1 else f"{found[0]['site']} ... {found[-1]['site']} ({len(found)})"
        keys = "" if row["keys"] is None else f"{row['keys']:g}"
        gains = (times(row[k]) for k in ("ideal", "tile", "predicted"))
        lines.append((name, pattern, str(tokens), grid, keys, *gains, verdict))
    return lines


def parity_rows(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line per check: its worst output."""
    lines = []
    for row in rows:
        outputs = row.get("outputs", [])

        def worst(key: str, pick: Any, form: str, outputs: list[dict[str, Any]] = outputs) -> str:
            values = [o[key] for o in outputs]
            if key == "argmax_agreement":  # null where rows are no scores of classes
                values = [v for v in values if v is not None]
            return "" if not values else "not finite" if None in values else form.format(pick(values))

        verdict = "passed" if row["passed"] else f"FAILED (tolerance {row['tolerance']:g})"
        if row["inputs"] == "shapes":
            verdict = "built and read back; cannot run here"
        if row.get("note"):
            verdict = row["note"]
        if row.get("unstable"):
            verdict += f", {plural(row['unstable'], 'tie')} left out"
        lines.append((
            row["check"],
            row["inputs"],
            str(row["batch"] or ""),
            worst("max_abs", max, "{:.1e}"),
            worst("max_rel", max, "{:.1e}"),
            worst("cosine", min, "{:.6f}"),
            worst("argmax_agreement", min, "{:.1%}"),
            verdict,
        ))  # fmt: skip
    return lines


def refusal_rows(refusals: list[dict[str, Any]], most: int = 3) -> list[tuple[str, ...]]:
    """Refusals grouped by their reason: how many, where (``most`` of them), why, what to try."""
    groups: dict[tuple[str, str], list[str]] = {}
    for refusal in refusals:
        groups.setdefault((refusal["why"], refusal.get("try", "")), []).append(refusal["where"])
    lines = []
    for (why, hint), places in groups.items():
        places = list(dict.fromkeys(places))
        shown = ", ".join(places[:most]) + (f" and {len(places) - most} more" if len(places) > most else "")
        lines.append((str(len(places)), shown, why, hint))
    return lines


def ratio(before: float | None, after: float | None) -> str:
    """How many times smaller: ``1.67x``."""
    return f"{before / after:.2f}x" if before and after else ""


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _data_line(data: Mapping[str, Any]) -> str:
    """Samples in a line: how many, where from, and how images were made into inputs."""
    words = [f"{plural(data['samples'], 'sample')} of {data['source']}"]
    words += [f"{data['classes']} classes"] if data["classes"] else []
    if skipped := data["skipped"]:
        more = ", ..." if len(skipped) > 3 else ""
        words.append(f"{plural(len(skipped), 'file')} skipped ({', '.join(s['file'] for s in skipped[:3])}{more})")
    if images := data["preprocessing"]:
        for name, how in (("resize", f" {images['fit']} {images['interpolation']}"), ("crop", "")):
            words += ["{} {}x{}{}".format(name, *images[name], how)] if images[name] else []
        words += [f"{name} {'/'.join(f'{v:.4g}' for v in images[name])}" for name in ("mean", "std")]
        words.append(f"by {images['source']}")
    return ", ".join(words)


def merged(parity: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per check, over all its inputs and batch sizes."""
    merged = []
    for name in dict.fromkeys(row["check"] for row in parity):
        rows = [row for row in parity if row["check"] == name]
        merged.append(
            {
                "check": name,
                "inputs": ", ".join(dict.fromkeys(row["inputs"] for row in rows)),
                "batch": ", ".join(str(batch) for batch in sorted({row["batch"] for row in rows if row["batch"]})),
                "tolerance": max(row["tolerance"] for row in rows),
                "passed": all(row["passed"] for row in rows),
                "unstable": sum(row.get("unstable", 0) for row in rows),
                "outputs": [output for row in rows for output in row["outputs"]],
                "note": next((row["note"] for row in rows if row.get("note")), ""),
            }
        )
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item"):  # a number of numpy or torch
        return _plain(value.item())
    return str(value)
