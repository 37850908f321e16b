"""Entry-point registry: built-ins and plug-ins are listed the same way, and loaded only when used."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tokenopt.errors import TokenoptError, UsageError

GROUPS = {
    "tokenopt.passes": "pass", "tokenopt.recipes": "recipe", "tokenopt.runtimes": "runtime",
    "tokenopt.axis_rules": "axis rule", "tokenopt.patterns": "pattern", "tokenopt.strategies": "strategy",
}  # fmt: skip
"""What the entries of each group are called in messages."""


@cache
def _points(group: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = found.get(point.name)
        if other is not None and other.value != point.value:
            raise TokenoptError(
                f"two packages register {point.name!r} in {group}",
                why=f"{_package(other)} ({other.value}) and {_package(point)} ({point.value})",
                hint="uninstall one of them",
            )
        found[point.name] = point
    return found


def names(group: str) -> list[str]:
    """The registered names of a group, without importing what they stand for."""
    return sorted(_points(group))


def load(group: str, name: str) -> Any:
    """The object registered under a name.

    Raises:
        UsageError: if there is no such name; it lists those there are.
    """
    point = _points(group).get(name)
    if point is None:
        raise UsageError(
            f"there is no {GROUPS[group]} {name!r}", hint=f"one of: {', '.join(names(group)) or '(none installed)'}"
        )
    return point.load()


_loaded: set[str] = set()


def load_axis_rules() -> bool:
    """Imports every module that registers axis rules; True if there were new ones."""
    fresh = [n for n in names("tokenopt.axis_rules") if n not in _loaded]
    for name in fresh:
        _loaded.add(name)
        load("tokenopt.axis_rules", name)
    return bool(fresh)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown package"
