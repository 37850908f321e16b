"""Published methods as data: listing, finding and loading recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tokenopt import registry
from tokenopt.attention.pattern import Pattern, parse
from tokenopt.attention.recipe import AttentionRecipe
from tokenopt.errors import UsageError
from tokenopt.tokens.recipe import TokenRecipe

Recipe = TokenRecipe | AttentionRecipe


def names(kind: type[Recipe] | None = None) -> list[str]:
    """The registered recipes, all or those of one kind."""
    found = registry.names("tokenopt.recipes")
    return found if kind is None else [name for name in found if isinstance(get(name), kind)]


def get(recipe: str | Path | Mapping[str, Any] | Recipe | Pattern) -> Recipe:
    """A recipe by its name, from a YAML file, from a mapping, or as it is; a pattern, or its text, is one too.

    Raises:
        UsageError: if there is no such recipe or the file is not one.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Pattern):
        return AttentionRecipe(repr(recipe), recipe.summary(), "", recipe)
    if isinstance(recipe, Mapping):
        return _from_dict(recipe)
    if isinstance(recipe, str) and "(" in recipe:
        return get(parse(recipe))
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml", ".json"):
        try:
            data = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(
                "the recipe file cannot be read", where=str(path), why=str(error).splitlines()[0]
            ) from error
        if not isinstance(data, dict):
            raise UsageError("the recipe file holds no mapping", where=str(path))
        return _from_dict(data.get("recipe", data))
    return registry.load("tokenopt.recipes", str(recipe))


def _from_dict(data: Mapping[str, Any]) -> Recipe:
    kind = AttentionRecipe if isinstance(data, Mapping) and "pattern" in data else TokenRecipe
    return kind.from_dict(data)
