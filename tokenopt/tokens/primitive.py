"""Primitives: the named, printable parts that recipes are made of.

A part is a frozen dataclass; its fields are its settings. It is written as its name, ``topk``, or with settings,
``cls_row{layer=-1}``; in YAML also ``{cls_row: {layer: -1}}``. Parts may contain parts.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import yaml

from tokenopt.errors import UsageError


class Primitive:
    """Base of all parts of a recipe. A kind of part (score, select, ...) is a direct subclass, a part one of those.

    Attributes:
        kind: score, select, fuse, restore or place.
        name: what recipes call the part.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    _parts: ClassVar[dict[str, type[Primitive]]]

    def __init_subclass__(cls, *, kind: str | None = None, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if kind is not None:
            cls.kind, cls._parts = kind, {}
        if name is not None:
            taken = cls._parts.get(name)
            assert taken is None or taken.__qualname__ == cls.__qualname__, f"two parts are called {name}"
            cls.name = name
            cls._parts[name] = cls

    @classmethod
    def choices(cls) -> dict[str, str]:
        """The parts of this kind, by name, with what each does."""
        return {name: part.summary() for name, part in cls._parts.items()}

    @classmethod
    def summary(cls) -> str:
        return (inspect.getdoc(cls) or "").split("\n")[0]

    def settings(self) -> dict[str, Any]:
        """Its fields that differ from their defaults, as plain data."""
        changed = {}
        for f in fields(self):
            value = getattr(self, f.name)
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if value != default:
                changed[f.name] = value.to_data() if isinstance(value, Primitive) else _plain(value)
        return changed

    def all_settings(self, path: str = "") -> dict[str, Any]:
        """All its fields by their paths, those of parts within it too: ``rest.layer``."""
        found: dict[str, Any] = {}
        for f in fields(self):
            value, name = getattr(self, f.name), f"{path}.{f.name}" if path else f.name
            found[name] = value
            found |= value.all_settings(name) if isinstance(value, Primitive) else {}
        return found

    def to_data(self) -> Any:
        """What `parse` reads back: the name, or a mapping of the name to settings."""
        settings = self.settings()
        return {self.name: settings} if settings else self.name

    def __str__(self) -> str:
        text = ", ".join(f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self) if f.name in self.settings())
        return f"{self.name}{{{text}}}" if text else self.name

    @classmethod
    def parse(cls, value: Any) -> Any:
        """A part of this kind from its name, text, mapping, or itself.

        Raises:
            UsageError: for an unknown part or setting, or a setting of the wrong type.
        """
        if isinstance(value, cls):
            return value
        settings: Mapping[str, Any] = {}
        if isinstance(value, str) and (match := re.fullmatch(r"\s*([\w-]+)\s*\{(.*)\}\s*", value, re.S)):
            value, settings = match[1], _read_settings(match[2], cls.kind)
        elif isinstance(value, Mapping) and len(value) == 1:
            value, settings = next(iter(value.items()))
            settings = settings or {}
        known = cls._parts.get(value) if isinstance(value, str) else None
        if known is None:
            raise UsageError(f"there is no {cls.kind} {value!r}", hint=f"one of {', '.join(cls._parts)}")
        if not isinstance(settings, Mapping):
            raise UsageError(f"the settings of {cls.kind} {value} are not a mapping", why=f"{settings!r}")
        return known(**{k: known.checked(k, v) for k, v in settings.items()})

    @classmethod
    def checked(cls, key: str, value: Any) -> Any:
        """A value for one of its fields, converted from plain data.

        Raises:
            UsageError: for an unknown field or a value of the wrong type.
        """
        types = _types(cls)
        if key not in types:
            has = f"its settings: {', '.join(types)}" if types else "it has none"
            raise UsageError(f"{cls.kind} {cls.name} has no setting {key!r}", hint=has)
        return convert(types[key], value, f"{key}={value!r} of {cls.kind} {cls.name}")


def convert(wanted: Any, value: Any, what: str) -> Any:
    """Plain data as a value of a type hint: numbers, texts, tuples of them, parts, or None where that is allowed.

    Raises:
        UsageError: if it is of another type.
    """
    options = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if isinstance(option, type) and issubclass(option, Primitive):
            return option.parse(value)
        if get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(convert(get_args(option)[0], v, what) for v in value)
        if option is float and isinstance(value, int) and not isinstance(value, bool) and int not in options:
            return float(value)
        if isinstance(option, type) and isinstance(value, option) and (option is bool) == isinstance(value, bool):
            return value
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise UsageError(f"setting {what} is not of type {names}")


@cache
def _types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _read_settings(text: str, kind: str) -> Mapping[str, Any]:
    """``a=1, b=topk{k=2}`` as a mapping."""
    settings: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in _split(text))):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"setting {item!r} of a {kind} has no value", hint="write key=value")
        value = value.strip()
        settings[key.strip()] = value if "{" in value else yaml.safe_load(value)
    return settings


def _split(text: str) -> list[str]:
    """At commas that are in no bracket."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
