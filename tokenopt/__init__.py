"""tokenopt: a compiler for the tokens of transformers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "calibrate": "tokenopt.calibration",
    "capture": "tokenopt.program",
    "Program": "tokenopt.program",
    "load": "tokenopt.loading:load_program",
    "inspect": "tokenopt.inspection",
    "optimize": "tokenopt.optimization",
    "export": "tokenopt.runtimes",
    "Pipeline": "tokenopt.pipeline",
    "Pass": "tokenopt.pipeline",
    "Rule": "tokenopt.rewrite",
    "StreamCut": "tokenopt.analysis.cuts",
    "AttentionSite": "tokenopt.analysis.sites",
    "ok": "tokenopt.rewrite",
    "refuse": "tokenopt.rewrite",
    "axis_rule": "tokenopt.analysis.axis_rules",
    "TokenRecipe": "tokenopt.tokens.recipe",
    "Schedule": "tokenopt.schedule",
    "Report": "tokenopt.report",
    "TokenoptError": "tokenopt.errors",
    "attention": "tokenopt",
    "recipes": "tokenopt",
    "runtimes": "tokenopt",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``import tokenopt`` costs next to nothing."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'tokenopt' has no attribute {name!r}")
    if home == "tokenopt":
        return import_module(f"tokenopt.{name}")
    module, _, attribute = home.partition(":")
    value = getattr(import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
