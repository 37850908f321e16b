"""Schedule: how many tokens each layer keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from tokenopt.errors import UsageError

_METRICS = ("flops", "tokens", "latency", "drop")
_BUDGETS = "flops=60%, tokens=60%, latency=0.6x (of the dense model's), latency=4ms, or drop=0.5%"
_FORMS = "r=13, r=16:-1 (r, inflection), r=16,14,12 (a list), keep=0.7@3,6,9 or @0.25,0.5, or a JSON or YAML file"


@dataclass(frozen=True)
class Schedule:
    """How many tokens to remove, layer by layer.

    Attributes:
        r: tokens to remove per layer: one number, an (r, inflection) pair, or a list padded with zeros.
        keep: the share of the reducible tokens that stays, in (0, 1].
        layers: the layers at which ``keep`` applies: numbers from 0, or shares of the depth below 1, written with a
            point (0.5 is layer 6 of 12); None is every layer.

    Source: the pair is that of Bolya et al., arXiv:2210.09461: from r (1 - inflection) falling or rising in equal steps
    so that r is the mean; -1 removes most in the first layers, +1 in the last.
    """

    r: int | tuple[int, float] | list[int] | None = None
    keep: float | None = None
    layers: tuple[int | float, ...] | None = None

    @staticmethod
    def parse(spec: Any) -> Schedule:
        """A schedule from a mapping, a text, a file's path, or a schedule.

        Raises:
            UsageError: if it is none of these forms, or its numbers are out of range.
        """
        if isinstance(spec, Schedule):
            return spec
        if isinstance(spec, Mapping):
            return _from_mapping(spec)
        text = str(spec).strip()
        if text.endswith((".json", ".yaml", ".yml")):
            try:
                data = yaml.safe_load(Path(text).read_text())
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise UsageError(
                    "the schedule file cannot be read", where=text, why=str(error).splitlines()[0]
                ) from error
            if not isinstance(data, Mapping):
                raise UsageError("the schedule file holds no mapping", where=text, hint='e.g. {"r": 13}')
            return _from_mapping(data.get("schedule", data))
        if match := re.fullmatch(r"r=(-?\d+):(-?[\d.]+)", text):
            return _from_mapping({"r": (int(match[1]), float(match[2]))})
        if match := re.fullmatch(r"r=\[?(-?\d+(?:[,;]\s*-?\d+)*)\]?", text):
            values = [int(v) for v in re.split(r"[,;]\s*", match[1])]
            return _from_mapping({"r": values[0] if len(values) == 1 and "[" not in text else values})
        if match := re.fullmatch(r"keep=(-?[\d.]+)(?:@([\d.]+(?:,[\d.]+)*))?", text):
            layers = [float(v) if "." in v else int(v) for v in match[2].split(",")] if match[2] else None
            return _from_mapping({"keep": float(match[1]), "layers": layers})
        raise UsageError(f"not a schedule: {text!r}", hint=_FORMS)

    @property
    def is_identity(self) -> bool:
        """Whether it removes nothing anywhere."""
        if self.keep is not None:
            return self.keep == 1.0
        r = self.r[0] if isinstance(self.r, tuple) else self.r
        return not any(r) if isinstance(r, list) else r == 0

    def identity(self) -> Schedule:
        """The setting of the same form that removes nothing."""
        return Schedule(keep=1.0, layers=self.layers) if self.keep is not None else Schedule(r=0)

    def kept(self, layer: int, count: int, tokens: int) -> int:
        """How many of ``tokens`` reducible tokens layer ``layer`` of ``count`` keeps."""
        if self.keep is not None:
            if self.layers is not None and layer not in {
                int(x * count) if isinstance(x, float) else x for x in self.layers
            }:
                return tokens
            return min(tokens, ceil(round(self.keep * tokens, 6)))
        return max(0, tokens - self._removed(layer, count))

    def scaled(self, factor: float, layers: int) -> Schedule:
        """The same shape, removing ``factor`` times as much in each of ``layers`` layers."""
        if self.keep is not None:
            return Schedule(keep=round(max(1.0 - factor * (1.0 - self.keep), 1e-3), 6), layers=self.layers)
        removed = [0.0]
        for layer in range(layers):
            removed.append(removed[-1] + factor * self._removed(layer, layers))
        return Schedule(r=[round(b) - round(a) for a, b in pairwise(removed)])

    def _removed(self, layer: int, count: int) -> int:
        if isinstance(self.r, list):
            return self.r[layer] if layer < len(self.r) else 0
        if isinstance(self.r, tuple):
            r, inflection = self.r
            low = int(r * (1.0 - inflection))
            step = 0.0 if count == 1 else (2 * r - 2 * low) / (count - 1)
            return r if count == 1 else int(low + step * layer)
        return self.r or 0

    def to_dict(self) -> dict[str, Any]:
        """A mapping that `parse` reads back."""
        if self.keep is not None:
            return {"keep": self.keep, **({"layers": list(self.layers)} if self.layers is not None else {})}
        return {"r": list(self.r) if isinstance(self.r, list) else self.r if isinstance(self.r, int) else
                {"mean": self.r[0], "inflection": self.r[1]}}  # fmt: skip

    def __str__(self) -> str:
        if self.keep is not None:
            return f"keep={self.keep:g}" + (f"@{','.join(map(str, self.layers))}" if self.layers is not None else "")
        if isinstance(self.r, tuple):
            return f"r={self.r[0]}:{self.r[1]:g}"
        return f"r={','.join(map(str, self.r))}" if isinstance(self.r, list) else f"r={self.r}"


@dataclass(frozen=True)
class Budget:
    """What a reduced program may cost, as a share of what the dense one does, or what it may lose.

    Attributes:
        metric: "flops"; "tokens": those that enter attention, summed over layers, or those that leave an encoder;
            "latency", on a runtime; or "drop": what may be lost at the least cost, of accuracy where labels are known,
            else as deviation from the dense model.
        share: in (0, 1].
        milliseconds: instead of a share of the dense model's latency.
    """

    metric: str
    share: float
    milliseconds: float | None = None

    @staticmethod
    def parse(text: Any) -> Budget:
        """A budget from a text such as ``flops=60%``, ``tokens=0.5``, ``latency=0.6x`` or ``latency=4ms``, or itself.

        Raises:
            UsageError: if it is none.
        """
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+\.?\d*|\.\d+)\s*(%|x|ms|)\s*", str(text))
        metric = str(text).partition("=")[0].strip()
        if match is None or metric not in _METRICS or (match[3] == "ms" and metric != "latency"):
            why = f"{metric} is not supported, only {', '.join(_METRICS)}" if metric not in _METRICS else None
            raise UsageError(f"not a budget: {text!r}", why=why, hint=_BUDGETS)
        number = float(match[2])
        if match[3] == "ms" and number > 0:
            return Budget(metric, 1.0, number)
        share = number / (100.0 if match[3] == "%" else 1.0)
        if match[3] == "ms" or not 0.0 < share <= 1.0:
            why = "it is a share of the dense model's, above 0 and up to 1, or milliseconds above 0"
            raise UsageError(f"not a budget: {text!r}", why=why, hint=_BUDGETS)
        return Budget(metric, share)

    def __str__(self) -> str:
        if self.milliseconds is not None:
            return f"{self.metric}={self.milliseconds:g}ms"
        return f"{self.metric}={100 * self.share:g}%"


def _is_layer(x: Any) -> bool:
    return (isinstance(x, int) and not isinstance(x, bool) and x >= 0) or (isinstance(x, float) and 0.0 <= x < 1.0)


def _from_mapping(data: Mapping[str, Any]) -> Schedule:
    text = json.dumps(dict(data), default=str)
    unknown = set(data) - {"r", "keep", "layers"}
    if unknown or ("r" in data) == ("keep" in data):
        raise UsageError(f"not a schedule: {text}", why="it needs either r, or keep and maybe layers", hint=_FORMS)
    if "keep" in data:
        keep, layers = data["keep"], data.get("layers")
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
            raise UsageError(f"not a schedule: {text}", why="keep is a share in (0, 1]", hint=_FORMS)
        if layers is not None and not all(_is_layer(x) for x in layers):
            raise UsageError(
                f"not a schedule: {text}",
                why="layers are numbers from 0 on, or shares of the depth below 1",
                hint=_FORMS,
            )
        return Schedule(keep=float(keep), layers=tuple(layers) if layers is not None else None)
    r = data["r"]
    if "layers" in data:
        raise UsageError(f"not a schedule: {text}", why="layers go with keep", hint="give r as a list, one per layer")
    if isinstance(r, Mapping) and set(r) == {"mean", "inflection"}:
        r = (r["mean"], r["inflection"])
    if isinstance(r, tuple):
        if len(r) != 2 or not isinstance(r[0], int) or r[0] < 0 or not -1 <= r[1] <= 1:
            raise UsageError(f"not a schedule: {text}", why="a pair is (r >= 0, inflection in [-1, 1])", hint=_FORMS)
        return Schedule(r=(r[0], float(r[1])))
    values = r if isinstance(r, list) else [r]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise UsageError(f"not a schedule: {text}", why="r counts tokens, 0 or more", hint=_FORMS)
    return Schedule(r=list(r) if isinstance(r, list) else r)
