"""Token recipes: score x select x fuse x restore at place, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from tokenopt.errors import UsageError
from tokenopt.tokens.fuse import Drop, Fuse
from tokenopt.tokens.place import Mid, Place
from tokenopt.tokens.primitive import Primitive, convert
from tokenopt.tokens.restore import Copy, Restore
from tokenopt.tokens.score import Score
from tokenopt.tokens.select import Select

PARTS: dict[str, type[Primitive]] = {
    "score": Score, "select": Select, "fuse": Fuse, "restore": Restore, "place": Place
}  # fmt: skip

POSITIONS = {
    "keep": "kept tokens keep their original positions",
    "renumber": "kept tokens are numbered from 0 on; in causal attention those behind them move up",
    "concentric": "kept tokens have the number of their ring on the grid, the outermost is 0",
}


@dataclass(frozen=True)
class TokenRecipe:
    """How tokens are scored, selected, fused and restored, and where. How many is the schedule's business.

    Attributes:
        name, summary, paper: what it is called, does, and where it was published.
        score, select, fuse, restore, place: its parts; given as text or plain data, they are read.
        position: what position terms (RoPE, relative bias) kept tokens get: keep, renumber or concentric (Xing et al.,
            Mitigating Object Hallucination via Concentric Causal Attention, arXiv:2410.15926).
        proportional: add the log of each token's size to its attention logits (for merged tokens).
        segment: the segment to reduce; the patches by default.
        grid: the grid that its tokens form in raster order, where the graph does not show it: (height, width), or with
            frames first.
        source: also return which reduced token each original token went to, int64 [B, N].
        positions: also return the positions of the kept tokens, int64 [B, K].
        schedule: the default schedule, as a mapping or a text; without one, it has to be given.

    Raises:
        UsageError: for an unknown part or a combination that has no meaning.
    """

    name: str
    summary: str
    paper: str
    select: Select
    score: Score | None = None
    fuse: Fuse = field(default_factory=Drop)
    restore: Restore = field(default_factory=Copy)
    place: Place = field(default_factory=Mid)
    position: str = "keep"
    proportional: bool = False
    segment: str | None = None
    grid: tuple[int, ...] | None = None
    source: bool = False
    positions: bool = False
    schedule: Mapping[str, Any] | str = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for kind, part in PARTS.items():
            value = getattr(self, kind)
            if value is not None or kind != "score":
                object.__setattr__(self, kind, part.parse(value))
        self._check()

    def _check(self) -> None:
        wrong, select, fuse = self._wrong, self.select, self.fuse
        if select.scored and self.score is None:
            raise wrong(f"select '{select.name}' needs a score", "name one, or use a select without")
        if select.scored is False and self.score is not None and not fuse.weighs:
            raise wrong(
                f"select '{select.name}' does not go with score '{self.score.name}'",
                f"it takes none; a score goes with {_names(Select, lambda s: s.scored is not False)}",
            )
        if select.gives not in fuse.takes:
            raise wrong(
                f"fuse '{fuse.name}' does not go with select '{select.name}'",
                f"one of {_names(Fuse, lambda f: select.gives in f.takes)}",
            )
        if fuse.weighs and (self.score is None or self.score.name in ("random", "uniform_grid", "norm")):
            raise wrong(f"fuse '{fuse.name}' needs a score that is a weight", "score cls_row or received")
        if self.proportional and fuse.name != "weighted":
            raise wrong("proportional attention needs merged sizes", "fuse weighted")
        if self.position not in POSITIONS:
            raise wrong(f"there is no position {self.position!r}", f"one of {', '.join(POSITIONS)}")
        if self.restore.ends and self.place.name in ("mid", "output"):
            raise wrong(
                f"restore '{self.restore.name}' does not go with place '{self.place.name}'",
                "place block, range, attention or exit",
            )
        if self.place.name == "attention" and (self.source or self.positions):
            raise wrong("inside attention the stream keeps all its tokens", "no source and no positions")
        if self.place.name == "attention" and self.restore.name == "canvas":
            raise wrong("inside attention removed tokens have no features of their own to keep", "restore zero or copy")
        if self.place.outputs and self.restore.outputs:
            raise wrong(f"place '{self.place.name}' shortens outputs, and restore '{self.restore.name}' undoes it",
                        "restore none")  # fmt: skip

    def _wrong(self, what: str, hint: str) -> UsageError:
        return UsageError(f"recipe {self.name}: {what}", hint=hint)

    @property
    def hoists(self) -> bool:
        """Whether what is kept does not depend on the tokens' features at the place, nor changes them."""
        reads = self.select.reads_rows or (self.score is not None and self.score.reads_rows)
        return self.fuse.name == "drop" and not reads

    def with_settings(self, settings: Mapping[str, Any]) -> TokenRecipe:
        """This recipe with some settings changed: ``proportional``, ``fuse``, ``select.seed``, ...

        Raises:
            UsageError: for an unknown setting or a value of the wrong type.
        """
        types = get_type_hints(TokenRecipe)
        known = [f.name for f in fields(self) if f.name not in ("name", "summary", "paper", "schedule")]
        changed: dict[str, Any] = {}
        for key, value in settings.items():
            whole, dot, inner = key.partition(".")
            if whole not in known or (dot and whole not in PARTS):
                has = [*(k for k in known if k in PARTS), *self.all_settings()]
                raise UsageError(f"recipe {self.name} has no setting {key!r}", hint=f"its settings: {', '.join(has)}")
            if dot:
                changed[whole] = _with(changed.get(whole, getattr(self, whole)), inner, value, self.name)
            elif whole in PARTS and value is not None:
                changed[whole] = PARTS[whole].parse(value)
            else:
                changed[whole] = convert(types[whole], value, f"{key}={value!r} of recipe {self.name}")
        return replace(self, **changed)

    def all_settings(self) -> dict[str, Any]:
        """What `with_settings` can change, but for whole parts: ``select.metric``, ``score.of.layer``, ``position``."""
        parts = {kind: getattr(self, kind) for kind in PARTS}
        found = {k: v for kind, part in parts.items() if part is not None for k, v in part.all_settings(kind).items()}
        own = (f.name for f in fields(self) if f.name not in (*PARTS, "name", "summary", "paper", "schedule"))
        return {**found, **{name: getattr(self, name) for name in own}}

    def __str__(self) -> str:
        return self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        for kind in PARTS:
            data[kind] = data[kind].to_data() if data[kind] is not None else None
        return {**data, "schedule": dict(self.schedule) if isinstance(self.schedule, Mapping) else self.schedule}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TokenRecipe:
        """Raises: UsageError for unknown or missing keys, parts and settings that do not exist, or wrong types."""
        if not isinstance(data, Mapping):
            raise UsageError("a recipe is a mapping", why=f"{data!r} is none", hint="{name: mine, select: bipartite}")
        known = {f.name for f in fields(TokenRecipe)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise UsageError(f"a recipe has no key {unknown[0]!r}", hint=f"its keys: {', '.join(sorted(known))}")
        missing = [n for n in ("name", "select") if n not in data]
        if missing:
            raise UsageError(f"the recipe lacks {', '.join(missing)}")
        types = get_type_hints(TokenRecipe)
        values = {"summary": "", "paper": "", **data}
        for key in set(values) - {*PARTS, "schedule"}:
            values[key] = convert(types[key], values[key], f"{key}={values[key]!r} of the recipe")
        if not isinstance(values.get("schedule", {}), (Mapping, str)):
            raise UsageError("the schedule of the recipe is none", why=f"{data['schedule']!r}", hint="e.g. {r: 13}")
        return TokenRecipe(**values)


def _with(part: Primitive | None, path: str, value: Any, recipe: str) -> Primitive:
    """A part with one setting changed; ``rest.layer`` is a setting of a part within it."""
    if part is None:
        raise UsageError(f"recipe {recipe} has no score to set {path!r} of", hint="set score first")
    name, dot, inner = path.partition(".")
    if dot:
        value = _with(getattr(part, name, None), inner, value, recipe)
    return replace(part, **{name: part.checked(name, value)})


def _names(kind: type[Primitive], fits: Any) -> str:
    return ", ".join(name for name, part in kind._parts.items() if fits(part))
