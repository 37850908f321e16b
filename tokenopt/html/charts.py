"""Charts as inline SVG: plain functions from numbers to markup. Colours are classes, which the style sheet defines.

Every chart has a title and a description for those who do not see it; the numbers stand in a table beside it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from tokenopt.gallery import Sample, Stage

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 14, 44
_DOTS = 60  # in a line that has more, single points are not marked
_COLOURS = 6  # classes c0 ... c5
DROPPED = -1

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        style: classes beside its colour: ``dashed``, ``muted``, ``dots`` without a line, ``plain`` without dots.
        step: level ``after`` each point up to the next, or around each with the steps in the ``middle``.
    """

    name: str
    points: Sequence[Point]
    style: str = ""
    step: str = ""


@dataclass(frozen=True)
class Mark:
    """One point of a scatter plot; ``kind`` is its class and its shape."""

    name: str
    kind: str
    x: float
    y: float
    chosen: bool = False


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element; what is not markup is escaped, ``_`` in names is ``-``, and None is left out."""
    pairs = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items() if v is not None)
    opening = Markup("").join(Markup(' {}="{}"').format(k, _number(v)) for k, v in pairs)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), opening, Markup("").join(map(escape, children)))


def lines(title: str, series: Sequence[Series], x_label: str, y_label: str, *, whole: bool = True) -> Markup:
    """Lines over a common x axis, the y axis from zero on; a legend where there are several.

    Args:
        whole: x counts something, so ticks are integers.
    """
    series = [s for s in series if s.points]
    room = 0.5 if any(s.step == "middle" for s in series) else 0.0
    frame = _Frame.around([(x + side, y) for s in series for x, y in s.points for side in (-room, room)], whole)
    body = [frame.axes(x_label, y_label)]
    for i, one in enumerate(series):
        style = f"line {one.style} c{i % _COLOURS}"
        places = [frame.place(*p) for p in one.points]
        path = _stepped([frame.place(*p) for p in _spread(one.points, one.step)]) if one.step else places
        if "dots" not in one.style:
            body.append(tag("path", d=_path(path), class_=style))
        if "dots" in one.style or (len(places) <= _DOTS and "plain" not in one.style):
            for (x, y), (px, py) in zip(one.points, places, strict=True):
                hint = tag("title", f"{one.name}: {_text(y)} at {_text(x)}")
                body.append(tag("circle", hint, cx=px, cy=py, r=2.6, class_=f"dot {one.style} c{i % _COLOURS}"))
    names = ", ".join(s.name for s in series)
    chart = _svg(title, f"{y_label} over {x_label}: {names}", body)
    legend = [(s.name, f"key {s.style} c{i % _COLOURS}") for i, s in enumerate(series)]
    return _figure(title, chart, legend if len(series) > 1 else [])


def scatter(title: str, marks: Sequence[Mark], x_label: str, y_label: str) -> Markup:
    """Points by kind, with the Pareto front (less is better on both axes) as a line, a ring around the chosen one."""
    frame = _Frame.around([(m.x, m.y) for m in marks], whole=False)
    body = [frame.axes(x_label, y_label)]
    edge = [frame.place(*p) for p in front((m.x, m.y) for m in marks)]
    body.append(tag("path", d=_path(_stepped(edge)), class_="line front"))
    for mark in sorted(marks, key=lambda m: m.chosen):
        x, y = frame.place(mark.x, mark.y)
        hint = tag("title", f"{mark.name} ({mark.kind}): {_text(mark.y)} at {_text(mark.x)}")
        body.append(tag("path", hint, d=_shape(mark.kind, x, y), class_=f"mark k-{mark.kind}"))
        if mark.chosen:
            body.append(tag("circle", cx=x, cy=y, r=9, class_="ring"))
    kinds = list(dict.fromkeys(m.kind for m in marks))
    description = f"{y_label} over {x_label}, {len(marks)} points: {', '.join(kinds)}"
    legend = [(kind.replace("-", " "), f"key k-{kind}") for kind in kinds]
    legend += [("chosen", "key chosen")] if any(m.chosen for m in marks) else []
    return _figure(title, _svg(title, description, body), legend)


def bars(title: str, rows: Sequence[tuple[str, float, str]], baseline: float = 1.0) -> Markup:
    """Horizontal bars of (label, value, text), with a line at ``baseline``."""
    top = max([baseline, *(v for _, v, _ in rows)]) * 1.02
    height, left, right = 28 * len(rows) + 10, 0, 64
    scale = (WIDTH - left - right) / top
    body = []
    for i, (label, value, text) in enumerate(rows):
        y = 28 * i + 6
        body.append(tag("rect", tag("title", f"{label}: {text}"), x=left, y=y + 14, width=max(value * scale, 1.0),
                        height=7, rx=2, class_="bar" if value >= baseline else "bar worse"))  # fmt: skip
        body.append(tag("text", label, x=left, y=y + 9))
        body.append(tag("text", text, x=WIDTH, y=y + 21, text_anchor="end", class_="strong"))
    at = left + baseline * scale
    body.append(tag("path", d=f"M{at:.1f} 4V{height - 2}", class_="base"))
    return _figure(title, _svg(title, ", ".join(f"{label} {text}" for label, _, text in rows), body, height), [])


def heat(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None], float]], x_label: str
) -> Markup:
    """Rows of (label, values, what counts as full) as strips of cells, darker where greater."""
    left, cell, gap = 150, 20, 4
    width = (WIDTH - left) / max(len(columns), 1)
    body = []
    for j, (label, values, full) in enumerate(rows):
        y = j * (cell + gap)
        body.append(tag("text", label, x=left - 8, y=y + 14, text_anchor="end"))
        for i, value in enumerate(values):
            if value is not None:
                level = min(max(value / full, 0.0), 1.0) if full else 0.0
                hint = tag("title", f"{label}, {columns[i]}: {_text(value)}")
                body.append(tag("rect", hint, x=left + i * width + 0.5, y=y, width=max(width - 1, 1.0), height=cell,
                                fill_opacity=round(0.07 + 0.93 * level, 3), class_="cell"))  # fmt: skip
    bottom = len(rows) * (cell + gap) + 12
    for i in _shown(len(columns)):
        body.append(tag("text", i, x=left + (i + 0.5) * width, y=bottom, text_anchor="middle", class_="tick"))
    body.append(tag("text", x_label, x=left - 8, y=bottom, text_anchor="end", class_="tick"))
    description = f"{', '.join(label for label, _, _ in rows)}, by {x_label}"
    return _figure(title, _svg(title, description, body, bottom + 6), [])


# -- pictures ----------------------------------------------------------------------------------------------------------


def picture(sample: Sample) -> Markup:
    """The image itself; its stages refer to it."""
    height, width = sample.stages[0].grid
    data = base64.b64encode(sample.picture).decode()
    image = tag("image", id=f"sample-{sample.number}", href=f"data:image/png;base64,{data}", width=width,
                height=height, preserveAspectRatio="none")  # fmt: skip
    return tag("svg", tag("title", f"sample {sample.number}"), image, viewBox=f"0 0 {width} {height}", role="img")


def patches(sample: Sample, stage: Stage) -> Markup:
    """The image with dropped patches dimmed, and merged ones in their mean colour, outlined together."""
    height, width = stage.grid
    first = sample.stages[0].grid
    scale = None if first == stage.grid else f"scale({width / first[1]} {height / first[0]})"
    members: dict[int, list[int]] = {}
    for i, group in enumerate(stage.groups):
        members.setdefault(group, []).append(i)
    gone = members.pop(DROPPED, [])
    merged = [cells for cells in members.values() if len(cells) > 1]
    body = [tag("use", href=f"#sample-{sample.number}", transform=scale)]
    for cells in merged:
        red, green, blue = (round(sum(stage.colours[c][k] for c in cells) / len(cells)) for k in range(3))
        body.append(tag("path", d=_cells(cells, width), fill=f"#{red:02x}{green:02x}{blue:02x}"))
    if gone:
        body.append(tag("path", d=_cells(gone, width), class_="gone"))
    if merged:
        inside = {c for cells in merged for c in cells}
        body.append(tag("path", d=_borders(stage.groups, inside, height, width), class_="edge"))
    parts = [f"{len(gone)} of {height * width} patches dropped"] if gone else []
    parts += [f"{sum(map(len, merged))} patches merged into {len(merged)}"] if merged else []
    title = f"sample {sample.number} behind {stage.site}: {stage.left} tokens left; {', '.join(parts)}"
    return tag("svg", tag("title", title), *body, viewBox=f"0 0 {width} {height}", role="img")


def _cells(cells: Iterable[int], width: int) -> str:
    """The outline of cells of a grid, one rectangle for each run in a row."""
    runs: list[list[int]] = []
    for c in sorted(cells):
        if runs and c == runs[-1][0] + runs[-1][1] and c % width:
            runs[-1][1] += 1
        else:
            runs.append([c, 1])
    return "".join(f"M{c % width} {c // width}h{n}v1h-{n}z" for c, n in runs)


def _borders(groups: Sequence[int], inside: set[int], height: int, width: int) -> str:
    """The lines between cells of different groups, around the cells ``inside``."""
    parts = []
    for y in range(height):
        for x in range(width):
            here = y * width + x
            for other, line in ((here + 1, f"M{x + 1} {y}v1"), (here + width, f"M{x} {y + 1}h1")):
                if other >= height * width or (other == here + 1 and x + 1 == width):
                    continue
                if groups[here] != groups[other] and (here in inside or other in inside):
                    parts.append(line)
    return "".join(parts)


# -- frames ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """The plotting area: from data to places on it."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]

    @classmethod
    def around(cls, points: Sequence[Point], whole: bool) -> _Frame:
        """A frame that holds all points, and zero on the y axis."""
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)
        margin = 0.0 if whole and high > low else (high - low) * 0.05 or 0.5
        x_ticks = _ticks(low, high, 7, whole)
        y_ticks = _ticks(min([0.0, *ys]), max([*ys, 0.0]) or 1.0, 5, False)
        top = max([*ys, y_ticks[-1]])
        return cls((low - margin, high + margin), (min(y_ticks[0], *ys, 0.0), top), x_ticks, y_ticks)

    def place(self, x: float, y: float) -> Point:
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_label: str, y_label: str) -> Markup:
        parts = []
        for value in self.y_ticks:
            y = self.place(self.x[0], value)[1]
            parts.append(tag("path", d=f"M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}", class_="grid"))
            parts.append(tag("text", _text(value), x=_LEFT - 6, y=y + 4, text_anchor="end", class_="tick"))
        for value in self.x_ticks:
            x = self.place(value, self.y[0])[0]
            if _LEFT - 1 <= x <= WIDTH - _RIGHT + 1:
                parts.append(tag("text", _text(value), x=x, y=HEIGHT - 27, text_anchor="middle", class_="tick"))
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(tag("text", x_label, x=middle, y=HEIGHT - 8, text_anchor="middle", class_="label"))
        turn = f"translate(12 {(HEIGHT - _BOTTOM + _TOP) / 2}) rotate(-90)"
        parts.append(tag("text", y_label, transform=turn, text_anchor="middle", class_="label"))
        return tag("g", *parts)


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other is below in both, by rising x."""
    kept: list[Point] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def _ticks(low: float, high: float, most: int, whole: bool) -> tuple[float, ...]:
    """Round numbers that cover a range, at most about ``most`` of them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.floor(low / step + 1e-9)
    ticks = []
    for i in count(first):
        ticks.append(round(i * step, 12))
        if i * step >= high - 1e-9 * span:
            return tuple(ticks)
    return ()


def _shown(columns: int) -> range:
    """Which columns get a number."""
    return range(0, columns, max(1, math.ceil(columns / 12)))


def _stepped(places: Sequence[Point]) -> list[Point]:
    """A path that stays level from each point to the next."""
    path: list[Point] = []
    for x, y in places:
        if path:
            path.append((x, path[-1][1]))
        path.append((x, y))
    return path


def _spread(points: Sequence[Point], step: str) -> list[Point]:
    """The points that steps start and end at."""
    if step != "middle":
        return list(points)
    return [*((x - 0.5, y) for x, y in points), (points[-1][0] + 0.5, points[-1][1])]


def _path(places: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""


def _shape(kind: str, x: float, y: float) -> str:
    """A disc: calibrated; a diamond: so with another recipe; a cross: random; a square: a fixed schedule."""
    if kind == "random":
        return f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
    if kind == "fixed":
        return f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z"
    if kind == "other-recipe":
        return f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"
    return f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"


def _svg(title: str, description: str, body: Sequence[Markup], height: float = HEIGHT) -> Markup:
    return tag("svg", tag("title", title), tag("desc", description), *body, viewBox=f"0 0 {WIDTH} {height}",
               role="img", class_="chart")  # fmt: skip


def _figure(title: str, chart: Markup, legend: Sequence[tuple[str, str]]) -> Markup:
    keys = [tag("li", tag("span", class_=style), name) for name, style in legend]
    return tag("figure", tag("figcaption", title), chart, *([tag("ul", *keys, class_="legend")] if keys else []))


def _number(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _text(value: float) -> str:
    return f"{value:.4g}"
