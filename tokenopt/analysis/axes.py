"""Names every dimension of every value: which dimensions carry tokens, and what each operation does to them.

A dimension is an ordered list of *terms*. A term is a `Factor` (an atom: one size, one meaning) or a `Cat` (a
concatenation of lists). A flattened image is ``(h w)``, a packed projection ``(3 head d)``, a sequence with a class
token ``Cat((), (h w))``; a dimension of size 1 is the empty list. Operations unify dimensions that must be the same:
factors are unification variables that get bound to finer lists when a reshape or a slice splits them, so that what is
learned late (a 196 is 14 x 14, token 0 is read alone) is known everywhere. After propagation, equal lists mean equal
axes, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from tokenopt.analysis.terms import Cat, Dims, Factor, Term, Terms, bind, factors, join, length, part_of, resolve
from tokenopt.program import Program


class EffectKind(Enum):
    """What an operation does to an axis, and so what a reduction of that axis owes it."""

    PASS = "pass"
    ATTEND = "attend"
    ALIGN = "align"
    REDUCE = "reduce"
    SEGMENT = "segment"
    SLICE = "slice"
    LAYOUT = "layout"
    OUTPUT = "output"
    OPAQUE = "opaque"


#: Kinds before which every token must be present again.
BARRIERS = frozenset({EffectKind.SLICE, EffectKind.LAYOUT, EffectKind.OUTPUT, EffectKind.OPAQUE})


@dataclass(frozen=True)
class Effect:
    """``node`` treats dimension ``dim`` of its operand in the way of ``kind``, because of ``why``."""

    node: fx.Node
    operand: fx.Node
    dim: int
    kind: EffectKind
    why: str = ""


@dataclass(frozen=True)
class Literal:
    """An integer argument that measures an axis: the sum of the lengths of ``lists``, negated if ``sign`` is -1."""

    path: tuple[int, ...]
    lists: tuple[Terms, ...]
    sign: int = 1


@dataclass
class AxisMap:
    """The result of `propagate`.

    Attributes:
        program: the analysed program (positions in its graph must not have changed since).
        data: values that depend on the user's inputs.
        batch: the terms of the batch dimension.
        opaque: operations without a rule.
    """

    program: Program
    data: set[fx.Node] = field(default_factory=set)
    batch: Terms = ()
    opaque: list[fx.Node] = field(default_factory=list)
    _dims: dict[fx.Node, Any] = field(default_factory=dict)
    _effects: dict[fx.Node, list[Effect]] = field(default_factory=dict)
    _literals: dict[fx.Node, list[Literal]] = field(default_factory=dict)
    _resolved: dict[fx.Node, Any] = field(default_factory=dict)

    def dims(self, node: fx.Node) -> Dims | None:
        """The terms of each dimension of a value; None for anything that is not one tensor."""
        if node not in self._resolved:
            dims = self._dims.get(node)
            single = dims is not None and (not dims or isinstance(dims[0], tuple)) and not isinstance(dims, list)
            self._resolved[node] = tuple(resolve(d) for d in dims) if single else None
        return self._resolved[node]

    def results(self, node: fx.Node) -> list[Dims]:
        """The terms of each dimension of each tensor that a node returns."""
        dims = self._dims.get(node)
        if isinstance(dims, list):
            return [tuple(resolve(t) for t in d) for d in dims if d is not None]
        return [] if dims is None else [self.dims(node)]

    def alias(self, node: fx.Node, like: fx.Node) -> None:
        """Lets a new node have the axes of another."""
        self._dims[node] = self._dims[like]
        if like in self.data:
            self.data.add(node)

    def effects(self, node: fx.Node) -> list[Effect]:
        """The effects of an operation on the dimensions of its operands, other than PASS."""
        return self._effects.get(node, [])

    def literals(self, node: fx.Node) -> list[Literal]:
        """The integers in an operation's arguments that measure an axis."""
        return [Literal(x.path, tuple(resolve(t) for t in x.lists), x.sign) for x in self._literals.get(node, [])]


class Axes:
    """The state of one propagation; what axis rules are written against."""

    def __init__(self, program: Program) -> None:
        self.map = AxisMap(program)
        self._primes: dict[str, int] = {}

    # -- what a rule reads ---------------------------------------------------------------------------------------

    def of(self, node: fx.Node) -> Dims:
        """The resolved terms of each dimension of an operand."""
        return tuple(resolve(d) for d in self.map._dims[node])

    def size(self, value: Any) -> int:
        """A size as an integer; every symbol of a dynamic size stands for a large prime of its own."""
        if isinstance(value, int):
            return value
        expr = value.node.expr
        for symbol in expr.free_symbols:
            self._primes.setdefault(str(symbol), _PRIMES[len(self._primes) % len(_PRIMES)])
        return int(expr.subs({s: self._primes[str(s)] for s in expr.free_symbols}))

    def shape(self, value: Tensor) -> tuple[int, ...]:
        return tuple(self.size(s) for s in value.shape)

    # -- what a rule says ----------------------------------------------------------------------------------------

    def fresh(self, size: int, node: fx.Node, dim: int, *, channel: bool = False) -> Terms:
        """A new, unrelated dimension."""
        return () if size == 1 else (Factor(size, node, dim, channel, node in self.map.data),)

    def effect(self, node: fx.Node, operand: fx.Node, dim: int, kind: EffectKind, why: str = "") -> None:
        self.map._effects.setdefault(node, []).append(Effect(node, operand, dim, kind, why))

    def literal(self, node: fx.Node, path: tuple[int, ...], *lists: Terms, sign: int = 1) -> None:
        self.map._literals.setdefault(node, []).append(Literal(path, lists, sign))

    def mark_channel(self, terms: Terms) -> None:
        for factor in factors(resolve(terms)):
            factor.channel = True

    def unify(self, a: Terms, b: Terms) -> bool:
        """Makes two lists equal by binding factors; False (and possibly partly bound) if their structures clash."""
        left, right = list(resolve(a))[::-1], list(resolve(b))[::-1]
        while left and right:
            x, y = left.pop(), right.pop()
            if isinstance(x, Factor) and x.bound is not None:
                left.extend(resolve((x,))[::-1])
                right.append(y)
            elif isinstance(y, Factor) and y.bound is not None:
                right.extend(resolve((y,))[::-1])
                left.append(x)
            elif x == y:
                continue
            elif x.size == y.size:
                if isinstance(x, Factor):
                    bind(x, (y,))
                elif isinstance(y, Factor):
                    bind(y, (x,))
                elif not self._unify_parts(x, y):
                    return False
            elif isinstance(x, Factor) and x.size % y.size == 0:
                rest = part_of(x, x.size // y.size)
                bind(x, (y, rest))
                left.append(rest)
            elif isinstance(y, Factor) and y.size % x.size == 0:
                rest = part_of(y, y.size // x.size)
                bind(y, (x, rest))
                right.append(rest)
            else:
                return False
        return not left and not right

    def _unify_parts(self, x: Cat, y: Cat) -> bool:
        left, right = list(x.parts)[::-1], list(y.parts)[::-1]
        while left and right:
            p, q = resolve(left.pop()), resolve(right.pop())
            if length(p) == length(q):
                if not self.unify(p, q):
                    return False
            elif length(p) > length(q) and (cut := self.split(p, length(q))):
                if not self.unify(cut[0], q):
                    return False
                left.append(cut[1])
            elif length(p) < length(q) and (cut := self.split(q, length(p))):
                if not self.unify(p, cut[0]):
                    return False
                right.append(cut[1])
            else:
                return False
        return not left and not right

    def split(self, terms: Terms, at: int) -> tuple[Terms, Terms] | None:
        """Cuts a dimension in two at an offset, by binding its one atom; None if that is not possible."""
        terms = resolve(terms)
        if len(terms) != 1:
            return None
        term = terms[0]
        if isinstance(term, Factor):
            head = () if at == 1 else (part_of(term, at),)
            tail = () if term.size - at == 1 else (part_of(term, term.size - at),)
            bind(term, (Cat((head, tail)),))
            return head, tail
        before: list[Terms] = []
        offset = 0
        for i, part in enumerate(term.parts):
            size = length(part)
            if offset == at:
                return join(before), join(term.parts[i:])
            if offset + size > at:
                cut = self.split(part, at - offset)
                if cut is None:
                    return None
                return join([*before, cut[0]]), join([cut[1], *term.parts[i + 1 :]])
            before.append(part)
            offset += size
        return None

    def take(self, terms: Terms, start: int, count: int) -> Terms | None:
        """The list of a contiguous slice of a dimension; None if the slice does not follow its structure."""
        terms = resolve(terms)
        total = length(terms)
        if start == 0 and count == total:
            return terms
        if len(terms) > 1:
            inner = length(terms[1:])
            if count == inner and start % inner == 0:
                return terms[1:]
            return None
        if start:
            cut = self.split(terms, start)
            if cut is None:
                return None
            terms = resolve(cut[1])
        if count < length(terms):
            cut = self.split(terms, count)
            if cut is None:
                return None
            terms = resolve(cut[0])
        return terms

    def regroup(self, dims: Dims, shape: Sequence[int], node: fx.Node, operand: fx.Node) -> Dims:
        """The dimensions of a reshape: the same terms, cut anew. What does not align becomes fresh, with LAYOUT."""
        flat = [t for d in dims for t in d][::-1]
        out: list[Terms] = []
        for size in shape:
            current: list[Term] = []
            have = 1
            while have < size:
                if not flat:
                    return self._broken_reshape(dims, shape, node, operand)
                term = flat.pop()
                if isinstance(term, Factor) and term.bound is not None:
                    flat.extend(resolve((term,))[::-1])
                    continue
                if size % (have * term.size) == 0:
                    current.append(term)
                    have *= term.size
                elif isinstance(term, Factor) and size % have == 0 and term.size % (size // have) == 0:
                    head = part_of(term, size // have)
                    tail = part_of(term, term.size * have // size)
                    bind(term, (head, tail))
                    flat.append(tail)
                    current.append(head)
                    have = size
                else:
                    return self._broken_reshape(dims, shape, node, operand)
            out.append(tuple(current))
        return tuple(out)

    def _broken_reshape(self, dims: Dims, shape: Sequence[int], node: fx.Node, operand: fx.Node) -> Dims:
        head = 0
        while head < min(len(dims), len(shape)) and length(dims[head]) == shape[head]:
            head += 1
        tail = 0
        while tail < min(len(dims), len(shape)) - head and length(dims[-1 - tail]) == shape[-1 - tail]:
            tail += 1
        for dim in range(head, len(dims) - tail):
            self.effect(node, operand, dim, EffectKind.LAYOUT, "a reshape cuts across this axis")
        middle = [self.fresh(shape[i], node, i) for i in range(head, len(shape) - tail)]
        return (*dims[:head], *middle, *(dims[len(dims) - tail :] if tail else ()))


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The operands of a node that are tensors or lists of tensors (sizes and other scalars are not)."""
    return [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), _SCALARS)]


def propagate(program: Program) -> AxisMap:
    """Names the axes of every value in the program.

    Linear in the number of nodes. Operations without a rule give fresh axes and an OPAQUE effect.
    """
    from tokenopt.analysis.axis_rules import rule_for

    axes = Axes(program)
    result = axes.map
    user_inputs = set(program.user_inputs)
    rows: dict[int, Terms] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if isinstance(value, Tensor):
                shape = axes.shape(value)
                if node in user_inputs:
                    result.data.add(node)
                result._dims[node] = tuple(axes.fresh(s, node, i) for i, s in enumerate(shape))
                if node in user_inputs and shape:  # inputs share their batch dimension, which comes first
                    rows.setdefault(shape[0], result._dims[node][0])
                    result._dims[node] = (rows[shape[0]], *result._dims[node][1:])
            continue
        if node.op == "output":
            for operand in program.output_nodes:
                for dim in range(len(result._dims.get(operand) or ())):
                    axes.effect(node, operand, dim, EffectKind.OUTPUT, "the model returns it")
            continue
        if node.op != "call_function" or isinstance(value, _SCALARS):
            continue
        operands = tensor_operands(node)
        if not _makes_new_values(node) and any(n in result.data for n in operands):
            result.data.add(node)
        if value is None:
            continue
        rule = rule_for(node.target)
        dims = rule(axes, node) if rule is not None else None
        if dims is None:
            result.opaque.append(node)
            dims = _opaque(axes, node, operands)
        result._dims[node] = dims
    result.batch = _batch(axes, program)
    return result


def _opaque(axes: Axes, node: fx.Node, operands: list[fx.Node]) -> Any:
    for operand in operands:
        dims = axes.map._dims.get(operand)
        for dim in range(len(dims) if isinstance(dims, tuple) else 0):
            axes.effect(node, operand, dim, EffectKind.OPAQUE, f"no axis rule for {node.target}")
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return tuple(axes.fresh(s, node, i) for i, s in enumerate(axes.shape(value)))
    return [
        tuple(axes.fresh(s, node, i) for i, s in enumerate(axes.shape(v))) if isinstance(v, Tensor) else None
        for v in value
    ]


def _makes_new_values(node: fx.Node) -> bool:
    """zeros_like and its kin read a shape, not values."""
    name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""
    return name.startswith("new_") or name in {
        "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"
    }  # fmt: skip


def _batch(axes: Axes, program: Program) -> Terms:
    for node in program.user_inputs:
        dims = axes.map._dims.get(node)
        if dims:
            return resolve(dims[0])
    return ()


_SCALARS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
_PRIMES = (7919, 7927, 7933, 7937, 7949, 7951, 7963, 7993, 8009, 8011, 8017, 8039)
