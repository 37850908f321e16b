"""Answers to "what is this?" and "why was this not rewritten?", from docstrings and reports."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from tokenopt import errors, registry
from tokenopt.errors import TokenoptError, UsageError
from tokenopt.report import Report

_KINDS = {"pass": "tokenopt.passes", "recipe": "tokenopt.recipes", "runtime": "tokenopt.runtimes"}


def explain_name(name: str) -> str:
    """What a pass, recipe, runtime, operation or error class is, from its docstring.

    Raises:
        UsageError: if nothing has that name; it lists what is close.
    """
    wanted = name.removeprefix("tokenopt::").removeprefix("tokenopt.").removesuffix(".default")
    names = []
    for known, kind, load in _explainable():
        if known == wanted:
            return _describe(kind, known, load())
        names.append(known)
    close = difflib.get_close_matches(wanted, names, n=5, cutoff=0.5) or sorted(names)
    raise UsageError(f"nothing is called {name!r}", hint=f"one of: {', '.join(close)}; or a report and --site ID")


def explain_site(report: Report, site_id: str) -> str:
    """What was done at a site, or why nothing was. A part of the id is enough where it is unique.

    Raises:
        UsageError: if the report has no such site, or several.
    """
    ids = [site["id"] for site in report.sites]
    matches = [i for i in ids if i == site_id] or [i for i in ids if f".{site_id}." in f".{i}."]
    others = [r for r in report.refusals if f".{site_id}." in f".{r['where']}."]
    if not matches and others:
        return "\n".join(_refused(refusal) for refusal in others)
    if not matches:
        close = difflib.get_close_matches(site_id, ids, n=5, cutoff=0.3) or ids[:10] or ["(it has no sites)"]
        raise UsageError(f"the report has no site {site_id!r}", hint=f"one of: {', '.join(close)}")
    if len(matches) > 1:
        raise UsageError(f"{site_id!r} is {len(matches)} sites", hint=f"one of: {', '.join(matches)}")
    site = next(s for s in report.sites if s["id"] == matches[0])
    before, after = site["tokens_before"], site["tokens_after"]
    lines = [f"{site['id']}: {site['kind']} attention on axis {site['axis']}, {before} tokens before, {after} after"]
    if site["refusal"]:
        return "\n".join([*lines, "not rewritten", _refused(site["refusal"])])
    edits = [e for e in report.edits if e["site"] == site["id"] and e["before"] != e["after"]]
    lines += [f"{e['pass_spec']}: {e['before']} -> {e['after']} tokens" for e in edits]
    if not edits and before == after:
        lines.append("not refused: the schedule asks for no reduction here or before it")
    elif not edits:
        lines.append("not reduced itself: it sees the tokens that earlier sites kept")
    return "\n".join(lines)


def summaries(group: str) -> list[dict[str, str]]:
    """Name and first sentence of everything registered in a group; what cannot be loaded says why."""
    rows = []
    for name in registry.names(group):
        try:
            summary = _summary(registry.load(group, name))
        except Exception as error:  # a broken plug-in must not hide the others
            summary = f"cannot be loaded: {type(error).__name__}: {error}"
        rows.append({"name": name, "summary": summary})
    return rows


def _explainable() -> Iterator[tuple[str, str, Any]]:
    """(name, kind, loader) of everything that has an explanation; what needs torch comes last."""
    for kind, group in _KINDS.items():
        for name in registry.names(group):
            yield name, kind, lambda group=group, name=name: registry.load(group, name)
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, TokenoptError):
            yield name, "error", lambda value=value: value
    from tokenopt import ops

    for op, reference in ops.references().items():
        yield op.name().removeprefix("tokenopt::").removesuffix(".default"), "operation", lambda f=reference: f


def _describe(kind: str, name: str, value: Any) -> str:
    lines = [f"{name} ({kind})", ""]
    if kind == "recipe":
        settings = {f.name: getattr(value, f.name) for f in fields(value)}
        lines += [f"{settings.pop('summary')}", f"Source: {settings.pop('paper')}", ""]
        lines += [f"  {key} = {_choice(key, text)}" for key, text in settings.items() if key != "name"]
        return "\n".join(lines)
    lines.append(inspect.getdoc(value) or "(it has no docstring)")
    if kind == "error":
        lines += ["", f"Exit code: {value.exit_code}"]
    if kind == "pass" and is_dataclass(value):
        options = [(f, f.default_factory() if f.default_factory is not MISSING else f.default) for f in fields(value)]
        lines += ["", "Options:"] * bool(options)
        for option, default in options:
            lines.append(f"  {option.name.replace('_', '-')}" + ("" if default is MISSING else f" = {default}"))
    return "\n".join(lines)


def _choice(key: str, value: Any) -> str:
    from tokenopt.tokens.recipe import CHOICES

    meaning = CHOICES.get(key, {}).get(value) if isinstance(value, str) else None
    return f"{value}: {meaning}" if meaning else f"{value}"


def _refused(refusal: dict[str, str]) -> str:
    return "\n".join(f"  {key:<6} {refusal[key]}" for key in ("where", "why", "try") if refusal.get(key))


def _summary(value: Any) -> str:
    text = getattr(value, "summary", None) or inspect.getdoc(value) or ""
    return text.strip().split("\n")[0]
