"""Attention recipes: patterns at chosen sites, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from tokenopt.attention.pattern import Pattern, parse
from tokenopt.errors import UsageError


@dataclass(frozen=True)
class AttentionRecipe:
    """Which attention computes what instead of softmax over all keys.

    Attributes:
        name, summary, paper: what it is called, does, and where it was published.
        pattern: of all sites, or of each of some: a pattern, its text, or a mapping of sites to patterns.
        sites: which attentions, counted from 0: "all", "0,2,-1", or a slice such as "::2".
        grid: the grid that their tokens form in raster order, where the graph does not show it: (height, width), or
            with frames first.
        min_speedup: what the cost model must promise of an attention; None leaves it to the pass.

    Raises:
        UsageError: for a text that is no pattern, or what is no choice of sites, grid or speed-up.
    """

    name: str
    summary: str
    paper: str
    pattern: Pattern | str | Mapping[str, Pattern | str]
    sites: str = "all"
    grid: tuple[int, ...] | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        given = self.pattern if isinstance(self.pattern, Mapping) else {self.sites: self.pattern}
        object.__setattr__(self, "pattern", {str(where): parse(p) for where, p in given.items()})
        for where in self.pattern:
            site_numbers(where, 1)
        if self.grid is not None:
            sizes = tuple(self.grid) if isinstance(self.grid, (list, tuple)) else ()
            if not 0 < len(sizes) < 4 or not all(type(n) is int and n > 0 for n in sizes):
                raise UsageError(f"not a grid: {self.grid!r}", hint="(height, width), or (frames, height, width)")
            object.__setattr__(self, "grid", sizes)
        if self.min_speedup is not None and (type(self.min_speedup) not in (int, float) or self.min_speedup < 0):
            raise UsageError(f"not a speed-up: {self.min_speedup!r}", hint="1.1, or 0 for every attention")

    def __hash__(self) -> int:
        return hash((self.name, repr(self.pattern)))

    def pattern_at(self, number: int, count: int) -> Pattern | None:
        """The pattern of one of ``count`` sites; the last that names it."""
        found = [p for where, p in self.pattern.items() if number in site_numbers(where, count)]
        return found[-1] if found else None

    def at(self, share: float) -> AttentionRecipe | None:
        """This recipe with the density of its patterns set (see `Pattern.at`); None if none of them has one."""
        found = {where: p.at(share) for where, p in self.pattern.items()}
        if not any(found.values()):
            return None
        return replace(self, pattern={where: new or self.pattern[where] for where, new in found.items()})

    def with_settings(self, settings: Mapping[str, Any]) -> AttentionRecipe:
        """This recipe with settings changed: ``pattern``, ``sites``, ``grid``, ``min_speedup``, or a field of its
        patterns.

        Raises:
            UsageError: for a setting that no pattern has.
        """
        known = ("pattern", "sites", "grid", "min_speedup")
        whole = {key: value for key, value in settings.items() if key in known}
        if "pattern" in whole:
            recipe = replace(self, **whole)
        else:
            recipe = replace(self, **{key: value for key, value in whole.items() if key != "sites"})
        if "sites" in whole:
            if len(recipe.pattern) > 1:
                why = f"it has patterns for {', '.join(recipe.pattern)}"
                raise UsageError(f"recipe {self.name} is for several sites", why=why, hint="--set pattern=...")
            recipe = replace(recipe, pattern=next(iter(recipe.pattern.values())), sites=str(whole["sites"]))
        for key, value in settings.items():
            if key not in whole:
                value = tuple(value) if isinstance(value, list) else value
                changed = {where: with_field(p, key, value) for where, p in recipe.pattern.items()}
                if not any(key in field_names(p) for p in recipe.pattern.values()):
                    inner = sorted({f for p in recipe.pattern.values() for f in field_names(p)})
                    hint = f"its settings: {', '.join([*known, *inner])}"
                    raise UsageError(f"recipe {self.name} has no setting {key!r}", hint=hint)
                recipe = replace(recipe, pattern=changed)
        return recipe

    def __str__(self) -> str:
        return self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        return {"name": self.name, "summary": self.summary, "paper": self.paper,
                "pattern": {where: repr(p) for where, p in self.pattern.items()},
                **({"grid": list(self.grid)} if self.grid else {}),
                **({} if self.min_speedup is None else {"min_speedup": self.min_speedup})}  # fmt: skip

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> AttentionRecipe:
        """Raises: UsageError for unknown or missing keys, or what is no pattern."""
        known = [f.name for f in fields(AttentionRecipe)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise UsageError(f"an attention recipe has no key {unknown[0]!r}", hint=", ".join(known))
        if not {"name", "pattern"} <= set(data):
            raise UsageError("an attention recipe needs a name and a pattern")
        return AttentionRecipe(**{"summary": "", "paper": "", **data})


def site_numbers(text: str, count: int) -> set[int]:
    """The numbers of sites that a text names, of ``count``.

    Raises:
        UsageError: if it is not "all", numbers or a slice.
    """
    numbers: set[int] = set()
    for part in str(text).split(","):
        part = part.strip()
        try:
            if part == "all":
                numbers |= set(range(count))
            elif ":" in part:
                numbers |= set(range(count)[slice(*(int(p) if p.strip() else None for p in part.split(":")))])
            else:
                numbers |= {int(part) % count if -count <= int(part) < count else -1} - {-1}
        except (ValueError, TypeError) as error:
            raise UsageError(f"not a choice of sites: {text!r}", hint="all, 0,2,-1 or ::2") from error
    return numbers


def field_names(pattern: Pattern) -> set[str]:
    """The settings of a pattern and of those within it."""
    own = {f.name: getattr(pattern, f.name) for f in fields(pattern)}
    inner = [v for value in own.values() for v in (value if isinstance(value, tuple) else (value,))]
    return {n for n, v in own.items() if not isinstance(v, Pattern)}.union(
        *(field_names(v) for v in inner if isinstance(v, Pattern)))  # fmt: skip


def with_field(pattern: Pattern, name: str, value: Any) -> Pattern:
    """A pattern with one setting changed, in all patterns within it that have it."""
    pattern = pattern.with_parts(lambda part: with_field(part, name, value))
    return replace(pattern, **{name: value}) if name in {f.name for f in fields(pattern)} else pattern
