"""Every error a user can meet: what happened, where, why, and what to try."""

from __future__ import annotations

from dataclasses import dataclass


class TokenoptError(Exception):
    """Base of all tokenopt errors.

    Args:
        what: one sentence, what could not be done.
        where: node, module path or file it concerns.
        why: the reason.
        hint: what to try instead.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        lines = [what]
        for label, text in (("where", where), ("why", why), ("try", hint)):
            if text:
                lines.append(f"  {label:<6} {text}")
        super().__init__("\n".join(lines))


class UsageError(TokenoptError):
    """An argument, option or schedule that makes no sense."""

    exit_code = 2


class CaptureError(TokenoptError):
    """A model file that cannot be read, or a model that cannot be traced."""


class AxisConflict(TokenoptError):
    """The graph and its named axes disagree."""


class IllegalReduction(TokenoptError):
    """Tokens cannot be removed at the place that was asked for."""


class UnsupportedOp(TokenoptError):
    """An operation for which no axis rule is known."""


class LoweringError(TokenoptError):
    """A runtime cannot express or build the program."""


class ParityError(TokenoptError):
    """Two models that must agree do not."""

    exit_code = 4


class BudgetError(TokenoptError):
    """No setting meets the budget."""

    exit_code = 5


@dataclass(frozen=True)
class Refusal:
    """Why something was not rewritten: where, why, and what to try. Reported, not raised."""

    where: str
    why: str
    hint: str = ""

    def to_dict(self) -> dict[str, str]:
        return {"where": self.where, "why": self.why, "try": self.hint}
