"""Answers to "what is this?" and "why was this not rewritten?", from docstrings and reports."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from tokenopt import errors, ops, recipes, registry
from tokenopt.attention.pattern import Pattern
from tokenopt.attention.pattern import names as pattern_names
from tokenopt.attention.recipe import AttentionRecipe
from tokenopt.errors import TokenoptError, UsageError
from tokenopt.report import Report
from tokenopt.schedule import Schedule
from tokenopt.tokens.primitive import Primitive
from tokenopt.tokens.recipe import PARTS, POSITIONS, TokenRecipe

_KINDS = {"pass": "tokenopt.passes", "recipe": "tokenopt.recipes", "runtime": "tokenopt.runtimes",
          "strategy": "tokenopt.strategies"}  # fmt: skip


def explain_name(name: str) -> str:
    """What a pass, recipe, part, runtime, strategy, operation or error class is; of a recipe's file, what it does.

    A part may be given with settings: ``topk``, ``cls_row{layer=-1}``. What is called the same is explained together.

    Raises:
        UsageError: if nothing has that name; it lists what is close. If a part has no such setting.
    """
    if name.endswith((".yaml", ".yml")):
        return "\n".join(_recipe(recipes.get(name)))
    wanted = name.removeprefix("tokenopt::").removeprefix("tokenopt.").removesuffix(".default")
    bare, brace, _ = wanted.partition("{")
    names, found = [], []
    for known, kind, load in _explainable():
        if known == bare and (not brace or kind in PARTS):
            found.append(_describe(kind, known, PARTS[kind].parse(wanted) if brace else load()))
        names.append(known)
    if found:
        return "\n\n".join(found)
    close = difflib.get_close_matches(bare, names, n=5, cutoff=0.5) or sorted(set(names))
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


def recipe_rows() -> list[dict[str, Any]]:
    """Every registered recipe: ``name, summary, place, paper, parts, schedule``; what cannot be loaded says why."""
    rows = []
    for row in summaries(_KINDS["recipe"]):
        try:
            data = recipes.get(row["name"]).to_dict()
            if "pattern" in data:
                parts = {"pattern": ", ".join(data["pattern"].values())}
                rows.append(row | {"place": "pattern", "paper": data["paper"], "parts": parts, "schedule": {}})
                continue
            parts = {kind: data[kind] for kind in PARTS}
            place = next(iter(parts["place"])) if isinstance(parts["place"], dict) else parts["place"]
            row |= {"place": place, "paper": data["paper"], "parts": parts, "schedule": data["schedule"]}
        except Exception:  # the summary says it
            row |= {"place": "", "paper": "", "parts": {}, "schedule": {}}
        rows.append(row)
    return rows


def _explainable() -> Iterator[tuple[str, str, Any]]:
    """(name, kind, loader) of everything that has an explanation."""
    for kind, group in _KINDS.items():
        for name in registry.names(group):
            yield name, kind, lambda group=group, name=name: registry.load(group, name)
    for kind, parts in PARTS.items():
        for name in parts.choices():
            yield name, kind, lambda parts=parts, name=name: parts.parse(name)
    for name in pattern_names():
        yield name, "pattern", lambda name=name: Pattern._known[name]
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, TokenoptError):
            yield name, "error", lambda value=value: value
    for op, reference in ops.references().items():
        yield op.name().removeprefix("tokenopt::").removesuffix(".default"), "operation", lambda f=reference: f


def _describe(kind: str, name: str, value: Any) -> str:
    lines = [f"{name} ({kind})", ""]
    if kind == "recipe":
        return "\n".join(_recipe(value))
    lines.append(inspect.getdoc(value) or "(it has no docstring)")
    if kind in PARTS:
        lines += ["", *_settings(value.all_settings(), "Settings:"), f"Recipes with it: {_users(kind, name)}"]
    if kind == "error":
        lines += ["", f"Exit code: {value.exit_code}"]
    if kind == "pass" and is_dataclass(value):
        options = [(f, f.default_factory() if f.default_factory is not MISSING else f.default) for f in fields(value)]
        lines += ["", "Options:"] * bool(options)
        for option, default in options:
            lines.append(f"  {option.name.replace('_', '-')}" + ("" if default is MISSING else f" = {default}"))
    return "\n".join(lines)


def _recipe(recipe: TokenRecipe | AttentionRecipe) -> list[str]:
    """What a recipe does: its parts, their settings, its schedule, and a model before and after it."""
    if isinstance(recipe, AttentionRecipe):
        return _attention_recipe(recipe)
    lines = [f"{recipe.name} (recipe)", "", recipe.summary or "(it has no summary)"]
    lines += [f"Source: {recipe.paper}"] * bool(recipe.paper)
    lines += [f"Schedule: {Schedule.parse(recipe.schedule) if recipe.schedule else 'none, give one'}", "", "Parts:"]
    parts = [(kind, getattr(recipe, kind)) for kind in PARTS]
    wide = max(len(part.name) for _, part in parts if part is not None)
    lines += [f"  {kind:<8} {part.name:<{wide}}  {part.summary()}" for kind, part in parts if part is not None]
    return [*lines, "", *_settings(recipe.all_settings(), "Settings, for --set:"), "", *_rewrite(recipe)]


def _attention_recipe(recipe: AttentionRecipe) -> list[str]:
    lines = [f"{recipe.name} (recipe)", "", recipe.summary or "(it has no summary)"]
    lines += [f"Source: {recipe.paper}"] * bool(recipe.paper)
    lines += ["", "Patterns, for --set pattern=, or --set with one of their settings:"]
    for where, pattern in recipe.pattern.items():
        subset = "a subset of the keys" if pattern.subset else "a different softmax"
        lines.append(f"  {where:<6} {pattern}: {pattern.summary()} ({subset})")
    return lines


def _settings(settings: Mapping[str, Any], title: str) -> list[str]:
    lines = []
    for key, value in settings.items():
        if isinstance(value, Primitive):
            meaning = value.summary()
        else:
            meaning = POSITIONS.get(value) if key == "position" else None
        shown = getattr(value, "name", value)
        lines.append(f"  {key} = {shown}" + (f": {meaning}" if meaning else ""))
    return [title, *lines] if lines else ["It has no settings."]


def _rewrite(recipe: TokenRecipe) -> list[str]:
    """The part of a model that a recipe rewrites, before and after: its place says where, its other parts what."""
    before, after = [], []
    for line in recipe.place.sketch:
        if line.startswith("{reduce "):
            after += _reduced(recipe, line[8:-1])
        elif line.startswith("{restore "):
            after += _restored(recipe, line[9:-1])
        else:
            before.append(line)
            attends = "attention(" in line and recipe.proportional
            after.append(line.replace(")", ", log(size))") if attends else line)
    while before[-1] == "...":
        before.pop()
    where = f"After, reduced {recipe.place.summary()}:"
    return ["Before:", *(f"  {t}" for t in before), where, *(f"  {t}" for t in after)]


_GIVES = {"": "kept, removed", "places": "kept, removed, into", "soft": "assign, spread",
          "masked": "assign, spread, size"}  # fmt: skip


def _reduced(recipe: TokenRecipe, tokens: str) -> list[str]:
    score, select, fuse = recipe.score, recipe.select, recipe.fuse
    if recipe.place.empties:
        return [f"{tokens} = {tokens} without its {recipe.segment or 'patches'}"]
    lines = [] if score is None else [f"score = {score.name}({tokens})"]
    by_score = score is not None and select.scored is not False
    operands = [tokens] * (not by_score or hasattr(select, "metric")) + ["score"] * by_score
    plan = _GIVES.get(select.gives, select.gives)
    lines.append(f"{plan} = {select.name}({', '.join(operands)})")
    results = f"{tokens}, size" if recipe.proportional else tokens
    lines.append(f"{results} = {fuse.name}({tokens}, {plan}{', score' if fuse.weighs else ''})")
    return lines


def _restored(recipe: TokenRecipe, tokens: str) -> list[str]:
    if not recipe.restore.outputs:
        return [f"# outputs keep the reduced {tokens}"]
    by = {"": "kept", "places": "into"}.get(recipe.select.gives, "spread")
    why = "  # before what needs every token" if "..." in recipe.place.sketch else ""
    return [f"{tokens} = {recipe.restore.name}({tokens}, {by}){why}"]


def _users(kind: str, name: str) -> str:
    found = [row["name"] for row in recipe_rows() if name in _names(row["parts"].get(kind))]
    return ", ".join(found) or "none of those installed"


def _names(data: Any) -> set[str]:
    """The parts in plain data, parts within parts too."""
    if isinstance(data, Mapping):
        return {str(k) for k in data} | {n for v in data.values() for n in _names(v)}
    return {data} if isinstance(data, str) else set()


def _refused(refusal: dict[str, str]) -> str:
    return "\n".join(f"  {key:<6} {refusal[key]}" for key in ("where", "why", "try") if refusal.get(key))


def _summary(value: Any) -> str:
    text = getattr(value, "summary", None) or inspect.getdoc(value) or ""
    return text.strip().split("\n")[0]
