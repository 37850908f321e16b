"""Passes, what they return, and running them one after another."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

import yaml

from tokenopt import registry
from tokenopt.errors import Refusal, UsageError
from tokenopt.program import Edit, Program
from tokenopt.tokens.plan import Record


@dataclass
class PassResult:
    """What one pass did. ``edits`` is empty where nothing changed; ``record`` is of reductions, for their proof."""

    edits: list[Edit] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    record: Record = field(default_factory=Record)

    @property
    def changed(self) -> bool:
        return bool(self.edits)


class Pass:
    """A rewrite of a whole program. Subclasses are frozen dataclasses; their fields are their options.

    ``name`` is what the command line calls it; ``run`` may mutate the program it is given.
    """

    name: ClassVar[str]

    def run(self, program: Program) -> PassResult:
        raise NotImplementedError(f"{type(self).__name__} must define run")

    @property
    def spec(self) -> str:
        """The text that makes this pass again: ``reduce-tokens{recipe=tome}``."""
        options = []
        for f in fields(self) if is_dataclass(self) else ():
            value = getattr(self, f.name)
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if value != default:
                options.append(f"{f.name.replace('_', '-')}={value}")
        return f"{self.name}{{{','.join(options)}}}" if options else self.name


Hook = Callable[[Pass, PassResult, float], None]


@dataclass
class PipelineResult:
    """The rewritten program with everything the passes changed and refused, and the seconds each took.

    ``records`` are of the passes that reduced tokens, in order.
    """

    program: Program
    edits: list[Edit]
    refusals: list[Refusal]
    timings: dict[str, float]
    records: list[Record] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return bool(self.edits)


@dataclass
class Pipeline:
    """Runs passes in order on a copy of a program.

    Args:
        passes: objects, or one text such as ``"raise-attention,reduce-tokens{recipe=tome}"``.
        hook: called after each pass with (pass, result, seconds).
    """

    passes: Iterable[Pass] | str
    hook: Hook | None = None

    def run(self, program: Program) -> PipelineResult:
        """Raises: whatever a pass raises; the given program is never changed."""
        passes = parse_passes(self.passes) if isinstance(self.passes, str) else list(self.passes)
        program = program.clone()
        result = PipelineResult(program, [], [], {})
        for step in passes:
            start = time.perf_counter()
            done = step.run(program)
            program.graph.lint()
            seconds = time.perf_counter() - start
            result.timings[step.name] = result.timings.get(step.name, 0.0) + seconds
            result.edits += done.edits
            result.refusals += done.refusals
            result.records += [done.record] if done.record.reductions else []
            program.provenance += done.edits
            if self.hook is not None:
                self.hook(step, done, seconds)
        program.exported.graph_module.recompile()  # its code; passes change the graph alone
        return result


def parse_passes(text: str) -> list[Pass]:
    """Passes from their text.

    Raises:
        UsageError: for an unknown pass or option, or text that is not a list of passes.
    """
    passes: list[Pass] = []
    rest = text.strip()
    while rest:
        match = re.match(r"([\w-]+)\s*(\{([^{}]*)\})?\s*(,|$)\s*", rest)
        if match is None:
            raise UsageError(f"not a list of passes: {rest!r}", hint="e.g. raise-attention,reduce-tokens{recipe=tome}")
        passes.append(make_pass(match[1], _options(match[3] or "", match[1])))
        rest = rest[match.end() :]
    return passes


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """One pass by its registered name.

    Raises:
        UsageError: for an unknown name or option.
    """
    factory = registry.load("tokenopt.passes", name)
    known = {f.name for f in fields(factory)} if is_dataclass(factory) else set()
    unknown = sorted(set(options) - known)
    if unknown:
        known_text = ", ".join(sorted(known)) or "none"
        raise UsageError(f"pass {name} has no option {unknown[0]!r}", hint=f"its options: {known_text}")
    return factory(**options)


def _options(text: str, name: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in _split(text))):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"option {item!r} of pass {name} has no value", hint="write key=value")
        options[key.strip().replace("-", "_")] = read_value(value)
    return options


def read_value(text: str) -> Any:
    """A setting in YAML, but for slices: ``1:`` is no mapping, and ``1:3`` not 63.

    Raises:
        yaml.YAMLError: if it is none.
    """
    return text.strip() if re.fullmatch(r"[\s\d,:-]*\d?:[\s\d,:-]*", text) else yaml.safe_load(text)


def _split(text: str) -> list[str]:
    """The options of a pass; what stands in brackets, as the settings of a pattern do, belongs to one option."""
    starts, depth = [0], 0
    for i, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0 and re.match(r"[ ,]+[\w-]+=", text[i:]) and text[i - 1 : i] not in (",", " "):
            starts.append(i)
    return [text[a:b].strip(" ,") for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
