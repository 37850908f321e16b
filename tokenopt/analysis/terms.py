"""The algebra of dimensions: ordered lists of factors and concatenations.

Factors are unification variables: they get bound to finer lists when a reshape or a slice splits them, so that what is
learned late (a 196 is 14 x 14, token 0 is read alone) is known everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx


class Factor:
    """An atom of a dimension.

    ``channel`` marks features (contracted with weights), ``data`` positions of something computed from the inputs (the
    patches, unlike the registers); ``origin`` is where it arose.
    """

    __slots__ = ("bound", "channel", "data", "dim", "origin", "size")

    def __init__(self, size: int, origin: fx.Node, dim: int, channel: bool = False, data: bool = False) -> None:
        self.size, self.origin, self.dim, self.channel, self.data = size, origin, dim, channel, data
        self.bound: tuple[Term, ...] | None = None

    def __repr__(self) -> str:
        return f"{self.origin.name}.{self.dim}:{self.size}"


@dataclass(frozen=True)
class Cat:
    """A concatenation: one list of terms per part."""

    parts: tuple[tuple[Term, ...], ...]

    @property
    def size(self) -> int:
        return sum(length(p) for p in self.parts)


Term = Factor | Cat
Terms = tuple[Term, ...]
Dims = tuple[Terms, ...]


def length(terms: Terms) -> int:
    """The size of a dimension with these terms."""
    return prod(t.size for t in terms)


def resolve(terms: Iterable[Term]) -> Terms:
    """Replaces bound factors by what they are bound to, recursively."""
    out: list[Term] = []
    for term in terms:
        if isinstance(term, Factor):
            if term.bound is None:
                out.append(term)
            else:
                term.bound = resolve(term.bound)
                out.extend(term.bound)
        else:
            out.append(concatenate([resolve(p) for p in term.parts]))
    return tuple(out)


def concatenate(parts: Sequence[Terms]) -> Cat:
    """A Cat of the parts, nested concatenations flattened."""
    flat: list[Terms] = []
    for part in parts:
        if len(part) == 1 and isinstance(part[0], Cat):
            flat.extend(part[0].parts)
        else:
            flat.append(tuple(part))
    return Cat(tuple(flat))


def factors(terms: Iterable[Term]) -> Iterator[Factor]:
    """All atoms of a list, also inside concatenations."""
    for term in terms:
        if isinstance(term, Factor):
            yield term
        else:
            for part in term.parts:
                yield from factors(part)


def is_channel(terms: Terms) -> bool:
    """Whether a dimension is made of features only."""
    atoms = list(factors(resolve(terms)))
    return bool(atoms) and all(a.channel for a in atoms)


def part_of(factor: Factor, size: int) -> Factor:
    """A piece of a factor that is being split."""
    return Factor(size, factor.origin, factor.dim, factor.channel, factor.data)


def bind(factor: Factor, terms: Terms) -> None:
    """Says that a factor is this list of terms, which inherit what it is known to be."""
    factor.bound = terms
    data = factor.data and not any(isinstance(t, Cat) for t in terms)  # the parts of a sequence differ in that
    for inner in factors(terms):
        inner.channel |= factor.channel
        inner.data |= data


def join(parts: Sequence[Terms]) -> Terms:
    return tuple(parts[0]) if len(parts) == 1 else (concatenate(parts),)
