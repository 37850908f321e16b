"""TokenRecipe: a published reduction as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_type_hints

from tokenopt.errors import UsageError

CHOICES: dict[str, dict[str, str]] = {
    "score": {
        "mean_key": "similarity of the keys, averaged over heads",
        "cls_row": "how much the class token attends to a token, averaged over heads",
        "random": "fixed pseudo-random numbers per position",
    },
    "select": {
        "bipartite": "even positions go to their most similar odd position, the best pairs first",
        "topk": "the best-scored tokens stay, in their original order",
    },
    "fuse": {
        "weighted": "the mean of the originals each token stands for",
        "pack": "all others become one token, summed with their scores as weights",
        "drop": "the others are dropped",
    },
    "restore": {
        "copy": "where all tokens are needed, each gets its merged token's (or nearest kept token's) value",
        "none": "as copy inside the model, but outputs keep the reduced tokens",
    },
    "place": {
        "mid": "between attention and MLP of each scheduled layer",
        "boundary": "once, where the encoder's features leave the graph",
    },
}


@dataclass(frozen=True)
class TokenRecipe:
    """How tokens are scored, selected, fused and restored, and where. How many is the schedule's business.

    Attributes:
        name, summary, paper: what it is called, does, and where it was published.
        score, select, fuse, restore, place: one of `CHOICES` each.
        proportional: add the log of each token's size to its attention logits (for merged tokens).
        score_layer: for place "boundary", the layer whose attention gives the score; negative counts from the last.
        segment: the segment to reduce; the patches by default.
        seed: of score "random".
        source: also return which reduced token each original token went to.
        schedule: the default schedule.

    Raises:
        UsageError: for an unknown choice or a combination that has no meaning.
    """

    name: str
    summary: str
    paper: str
    score: str
    select: str
    fuse: str
    restore: str = "copy"
    place: str = "mid"
    proportional: bool = False
    score_layer: int = -1
    segment: str | None = None
    seed: int = 0
    source: bool = False
    schedule: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"recipe {self.name}: there is no {name} {getattr(self, name)!r}",
                    hint=f"one of {', '.join(choices)}",
                )
        if (self.select == "bipartite") != (self.score == "mean_key"):
            raise UsageError(
                f"recipe {self.name}: select {self.select!r} does not go with score {self.score!r}",
                hint="bipartite goes with mean_key; topk with cls_row or random",
            )
        if (self.select == "bipartite") != (self.fuse == "weighted"):
            raise UsageError(
                f"recipe {self.name}: fuse {self.fuse!r} does not go with select {self.select!r}",
                hint="bipartite goes with weighted; topk with drop or pack",
            )
        if self.fuse == "pack" and self.score == "random":
            raise UsageError(f"recipe {self.name}: fuse 'pack' needs a score that is a weight", hint="score cls_row")
        if self.proportional and self.fuse != "weighted":
            raise UsageError(f"recipe {self.name}: proportional attention needs merged sizes", hint="fuse weighted")

    def with_settings(self, settings: Mapping[str, Any]) -> TokenRecipe:
        """This recipe with some fields changed.

        Raises:
            UsageError: for an unknown field or a value of the wrong type.
        """
        types = get_type_hints(TokenRecipe)
        known = [f.name for f in fields(self) if f.name not in ("name", "summary", "paper", "schedule")]
        for key, value in settings.items():
            if key not in known:
                raise UsageError(f"recipe {self.name} has no setting {key!r}", hint=f"its settings: {', '.join(known)}")
            wanted = types[key]
            fits = isinstance(value, wanted) and (wanted is not int or not isinstance(value, bool))
            if not fits:
                raise UsageError(f"setting {key}={value!r} of recipe {self.name} is not of type {wanted}")
        return replace(self, **settings)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "schedule": dict(self.schedule)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TokenRecipe:
        """Raises: UsageError for unknown or missing keys."""
        known = {f.name for f in fields(TokenRecipe)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise UsageError(f"a recipe has no key {unknown[0]!r}", hint=f"its keys: {', '.join(sorted(known))}")
        missing = [n for n in ("name", "score", "select", "fuse") if n not in data]
        if missing:
            raise UsageError(f"the recipe lacks {', '.join(missing)}")
        return TokenRecipe(**{"summary": "", "paper": "", **data})
