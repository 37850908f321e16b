"""Rules: what an operation makes of its operands' axes, its effects, and its integers that measure an axis.

Simple operations are rows of text (`einops`-like); the others are short functions ``rule(axes, node) -> Dims``. A
package adds its own with `axis_rule`, or through the entry-point group ``tokenopt.axis_rules``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tokenopt.analysis.axes import Axes, Dims, EffectKind, tensor_operands
from tokenopt.analysis.terms import Terms, length
from tokenopt.errors import UsageError

Rule = Callable[[Axes, fx.Node], Any]

_RULES: dict[str, Rule] = {}


def axis_rule(ops: str, text: str | None = None) -> Any:
    """Registers a rule for one or more operations (``"aten.view aten.reshape"``, with or without overload).

    With ``text`` the rule is a row such as ``"... c, d c -> ... d; contract c"``: one letter per dimension, ``...`` for
    broadcast leading dimensions, equal letters are equal axes, a letter new on the right is a new axis. After ``;``
    come effects on letters: ``attend s``, ``reduce n``, ``layout h w``, ``contract c``. Letters that vanish without an
    effect are barriers. Without ``text`` it decorates ``rule(axes, node) -> dims`` (None means OPAQUE).

    Raises:
        UsageError: if the text is not a row.
    """

    def register(rule: Rule) -> Rule:
        for op in ops.split():
            _RULES[op] = rule
        return rule

    return register(_row(text)) if text is not None else register


def rule_for(target: Any) -> Rule | None:
    """The rule of a call target, by overload name first, then by operation name; pointwise operations need none."""
    name = str(target)
    if target is not None and getattr(target, "__module__", "") == "_operator":
        name = f"operator.{target.__name__}"
    rule = _RULES.get(name) or _RULES.get(name.rsplit(".", 1)[0])
    if rule is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise
    if rule is None:
        from tokenopt.registry import load_axis_rules

        if load_axis_rules():
            return rule_for(target)
    return rule


def template(node: fx.Node) -> str:
    """The row a user would start from to give an operation a rule."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    rows = [" ".join(next(letters) for _ in n.meta["val"].shape) for n in tensor_operands(node)
            if isinstance(n.meta.get("val"), Tensor)]  # fmt: skip
    return f'axis_rule("{node.target}", "{", ".join(rows)} -> ...")'


def _row(text: str) -> Rule:
    body, *clauses = (part.strip() for part in text.split(";"))
    if body.count("->") != 1:
        raise UsageError(f"not an axis rule: {text!r}", why="it needs one '->'", hint='e.g. "b n c, d c -> b n d"')
    left, right = (side.split(",") for side in body.split("->"))
    inputs, output = [s.split() for s in left], right[0].split()
    kinds = {"attend": EffectKind.ATTEND, "reduce": EffectKind.REDUCE, "layout": EffectKind.LAYOUT}
    effects: dict[str, EffectKind | None] = {}
    for clause in clauses:
        word, *letters = clause.split()
        if word not in (*kinds, "contract"):
            raise UsageError(f"not an axis effect: {word!r}", where=text, hint="attend, reduce, layout or contract")
        effects.update(dict.fromkeys(letters, kinds.get(word)))

    def rule(axes: Axes, node: fx.Node) -> Dims:
        named: dict[str, Terms] = {}
        lead: list[list[Terms]] = []
        contracted_with_weight = False
        seen: list[tuple[fx.Node, int, str]] = []
        for operand, letters in zip(tensor_operands(node), inputs, strict=False):
            dims = axes.of(operand)
            tail = [x for x in letters if x != "..."]
            split = len(dims) - len(tail)
            if "..." in letters:
                lead.append(list(dims[:split]))
            contracted_with_weight |= operand not in axes.map.data
            for dim, letter in enumerate(tail, start=split):
                seen.append((operand, dim, letter))
                if letter not in named:
                    named[letter] = dims[dim]
                elif not axes.unify(named[letter], dims[dim]):
                    axes.effect(node, operand, dim, EffectKind.OPAQUE, "operands disagree about this axis")
        for operand, dim, letter in seen:
            if letter in output and letter not in effects:
                continue
            kind = effects.get(letter, EffectKind.LAYOUT)
            if kind is None:  # contracted
                if contracted_with_weight:
                    axes.mark_channel(named[letter])
                axes.effect(node, operand, dim, EffectKind.LAYOUT, "it is summed over with weights of its own")
            else:
                axes.effect(node, operand, dim, kind, f"{node.target} {kind.value}s over it")
        shape = axes.shape(node.meta["val"])
        tail = [x for x in output if x != "..."]
        split = len(shape) - len(tail)
        dims: list[Terms] = broadcast(axes, node, lead, shape[:split]) if "..." in output else []
        for dim, letter in enumerate(tail, start=split):
            dims.append(named[letter] if letter in named else axes.fresh(shape[dim], node, dim))
        return tuple(dims)

    return rule


def broadcast(axes: Axes, node: fx.Node, operands: list[list[Terms]], shape: tuple[int, ...]) -> list[Terms]:
    """Unifies right-aligned dimensions that are not of size 1."""
    out: list[Terms] = []
    for dim in range(len(shape)):
        terms: Terms = ()
        for dims in operands:
            at = dim - len(shape) + len(dims)
            if at < 0 or length(dims[at]) == 1 and shape[dim] != 1:
                continue
            if not terms:
                terms = dims[at]
            elif not axes.unify(terms, dims[at]):
                terms = axes.fresh(shape[dim], node, dim)
        out.append(terms if length(terms) == shape[dim] else axes.fresh(shape[dim], node, dim))
    return out


def pointwise(axes: Axes, node: fx.Node) -> Dims | None:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return None
    shape = axes.shape(value)
    out: list[Terms] = [()] * len(shape)
    for operand in tensor_operands(node):
        dims = axes.of(operand)
        for dim in range(len(dims)):
            at = dim + len(shape) - len(dims)
            if length(dims[dim]) != shape[at] or shape[at] == 1:
                continue
            if not out[at]:
                out[at] = dims[dim]
            elif not axes.unify(out[at], dims[dim]):
                axes.effect(node, operand, dim, EffectKind.OPAQUE, "operands disagree about this axis")
    return tuple(t or axes.fresh(s, node, i) for i, (t, s) in enumerate(zip(out, shape, strict=True)))
