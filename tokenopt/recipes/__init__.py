"""Published methods as data: listing, finding and loading recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tokenopt import registry
from tokenopt.errors import UsageError
from tokenopt.tokens.recipe import TokenRecipe


def names() -> list[str]:
    """The registered recipes."""
    return registry.names("tokenopt.recipes")


def get(recipe: str | Path | Mapping[str, Any] | TokenRecipe) -> TokenRecipe:
    """A recipe by its name, from a YAML file, from a mapping, or as it is.

    Raises:
        UsageError: if there is no such recipe or the file is not one.
    """
    if isinstance(recipe, TokenRecipe):
        return recipe
    if isinstance(recipe, Mapping):
        return TokenRecipe.from_dict(recipe)
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
        return TokenRecipe.from_dict(data.get("recipe", data))
    return registry.load("tokenopt.recipes", str(recipe))
