"""The algebra of attention patterns, and their text: ``(Neighborhood(7) | Global("cls")) & Stripe(rows=8)``."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, partial
from itertools import product
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from tokenopt.attention.layout import Layout, Tokens
from tokenopt.errors import UsageError


class Refused(Exception):
    """Why a pattern cannot be applied to an attention, and what to try."""

    def __init__(self, why: str, hint: str = "") -> None:
        super().__init__(why)
        self.why, self.hint = why, hint


@dataclass(frozen=True)
class Lowered:
    """A pattern on one layout, as a call of one operation on (query, key, value, ...).

    Attributes:
        op: name of the operation, ``tokenopt::<op>``.
        tensors: its constant operands by the names of its arguments.
        settings: its other arguments.
        ideal, tile, predicted: speed-up of this attention over dense attention if only seen pairs cost anything, if
            every computed pair costs as much as a dense one, and by the cost model.
        tiles: the tables, where the operation is attention in tiles: a bias of the attention is cut along them.
        inputs: operands that the program's user gives: (name of the input, shape without the batch, dtype) by the names
            of the operation's arguments.
        dense: name of an operation on the same operands that gives the bias under which dense attention equals it,
            where that depends on the content.
    """

    op: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    ideal: float
    tile: float
    predicted: float
    tiles: Any = None
    inputs: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    dense: str = ""


class Pattern:
    """What each query of an attention computes instead of softmax over all keys. Frozen dataclasses.

    Attributes:
        subset: whether it is the softmax over a subset of the keys, and so equals dense attention where that is all of
            them. The others are a different softmax.
        masked: whether dense attention under some mask equals it, which is then compared with it.

    Raises:
        UsageError: for a setting of the wrong type.
    """

    subset: ClassVar[bool] = False
    masked: ClassVar[bool] = False
    _known: ClassVar[dict[str, type[Pattern]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Pattern._known[cls.__name__] = cls

    def __post_init__(self) -> None:
        for name, wanted in _types(type(self)).items():
            value = _frozen(getattr(self, name))
            if not _fits(value, wanted):
                names = " or ".join(getattr(o, "__name__", str(o)) for o in get_args(wanted) or (wanted,))
                raise UsageError(f"{name}={value!r} of {type(self).__name__} is not of type {names}")
            object.__setattr__(self, name, value)

    def lower(self, layout: Layout) -> Lowered:
        """The operation and its tables on one layout.

        Raises:
            Refused: if it means nothing there.
        """
        raise NotImplementedError

    def whole(self, layout: Layout, lowered: Lowered) -> Lowered:
        """What it was lowered to, computed in the same way with all keys: dense attention. Only of a subset."""
        raise NotImplementedError

    @property
    def unfitted(self) -> bool:
        """Whether it has to be fitted on data before it can be lowered."""
        return False

    def at(self, share: float) -> Pattern | None:
        """The pattern with the number that says how much is seen set to a share; None where there is no such number.

        A larger share sees as much or more. A pattern made of others has the numbers of these.
        """
        found = self.with_parts(lambda part: part.at(share) or part)
        return None if found is self else found

    def with_parts(self, change: Callable[[Pattern], Pattern]) -> Pattern:
        """The pattern with those that it is made of changed; itself where none is."""
        found = {}
        for f in fields(self):  # type: ignore[arg-type]  # every pattern is a dataclass, their base is not
            value = getattr(self, f.name)
            parts = value if isinstance(value, tuple) else (value,)
            changed = tuple(change(part) if isinstance(part, Pattern) else part for part in parts)
            if any(new is not old for new, old in zip(changed, parts, strict=True)):
                found[f.name] = changed if isinstance(value, tuple) else changed[0]
        return replace(self, **found) if found else self

    def fit(self, layout: Layout, query: Tensor, key: Tensor) -> tuple[Pattern, dict[str, Tensor]]:
        """The pattern fitted on queries and keys [B, H, N, D] of one attention, and its weights by name.

        Where there are weights, the pattern has the fields ``weights``, the file they are in, and ``site``, the number
        of the attention that they are for.
        """
        raise NotImplementedError

    @classmethod
    def summary(cls) -> str:
        return (inspect.getdoc(cls) or "").split("\n")[0]

    def __repr__(self) -> str:
        parts = []
        for position, f in enumerate(fields(self)):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if f.default is MISSING and position == len(parts):
                parts.append(_text(value))
            elif f.default is MISSING or value != f.default:
                parts.append(f"{f.name}={_text(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    __str__ = __repr__


class Mask(Pattern):
    """A pattern that says of every pair of tokens whether the query sees the key.

    Attributes:
        anywhere: whether it asks for no place on the grid, and so can be of tokens that have none.
    """

    subset: ClassVar[bool] = True
    masked: ClassVar[bool] = True
    anywhere: ClassVar[bool] = False

    def lower(self, layout: Layout) -> Lowered:
        """Attention in tiles."""
        from tokenopt.attention.tiles import tile

        return tile(self, layout).lowered()

    def whole(self, layout: Layout, lowered: Lowered) -> Lowered:
        """The same tiles, each with all keys."""
        from tokenopt.attention.masks import Full
        from tokenopt.attention.tiles import tile_as

        return tile_as(Full(), layout, lowered.tiles.queries).lowered()

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        """bool [Q, K]: whether each query on the grid sees each key on the grid; elsewhere it does not matter."""
        raise NotImplementedError

    def visible(self, query: Tokens, key: Tokens) -> Tensor:
        """bool [Q, K]: `allows` on the grid; all other tokens see and are seen."""
        return self.allows(query, key) | ~(query.on_grid[:, None] & key.on_grid)

    def by_head(self, heads: int) -> Sequence[Mask]:
        """The patterns of each head, or the one of all."""
        return (self,)

    def check(self, layout: Layout) -> None:
        """Raises: Refused if it means nothing on this grid."""

    def tilings(self, layout: Layout) -> Iterator[Tensor]:
        """Ways to cut the grid into tiles of queries that see much the same: int64 [T, Q], numbers in raster order.

        A short tile repeats its last query.
        """
        yield from box_tilings(layout.grid)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)


_BOXES = {
    1: ((64,), (32,), (128,)),
    2: ((8, 8), (16, 16), (8, 16), (4, 16), (4, 8), (4, 4), (8, 0), (4, 0)),
    3: ((4, 4, 4), (2, 8, 8), (1, 8, 8), (4, 8, 8), (1, 0, 0)),
}
_LARGE = 8192  # tokens above which few tilings are tried


def box_tilings(
    grid: tuple[int, ...], dilation: Sequence[int] = (), shapes: Sequence[tuple[int, ...]] = ()
) -> Iterator[Tensor]:
    """Tilings of a grid into boxes of a few shapes, each within one group of a dilation; 0 stands for a whole axis."""
    dilation = tuple(dilation) or (1,) * len(grid)
    known = (*shapes, *_BOXES[len(grid)])
    sizes = dict.fromkeys(tuple(min(t or n, n) for t, n in zip(box, grid, strict=True)) for box in known)
    limit = len(sizes) if torch.Size(grid).numel() <= _LARGE else 2
    for box in list(sizes)[:limit]:
        axes = [list(_runs(n, t, d)) for n, t, d in zip(grid, box, dilation, strict=True)]
        tiles = []
        for runs in product(*axes):
            number = torch.zeros((1,) * len(grid), dtype=torch.int64)
            for axis, (run, n) in enumerate(zip(runs, grid, strict=True)):
                number = number * n + run.reshape([-1 if a == axis else 1 for a in range(len(grid))])
            tiles.append(number.flatten())
        yield _padded(tiles)


def _runs(length: int, size: int, dilation: int) -> Iterator[Tensor]:
    """Runs of ``size`` coordinates of one axis, each within one group of the dilation."""
    for group in range(min(dilation, length)):
        yield from torch.arange(group, length, dilation).split(size)


def _padded(tiles: Sequence[Tensor]) -> Tensor:
    longest = max(len(t) for t in tiles)
    return torch.stack([torch.cat([t, t[-1:].expand(longest - len(t))]) for t in tiles])


@dataclass(frozen=True, repr=False)
class _Pair(Mask):
    a: Mask
    b: Mask

    def by_head(self, heads: int) -> Sequence[Mask]:
        a, b = self.a.by_head(heads), self.b.by_head(heads)
        count = max(len(a), len(b))
        every = lambda parts: parts * count if len(parts) == 1 else parts  # noqa: E731
        return [type(self)(x, y) for x, y in zip(every(a), every(b), strict=True)]

    def check(self, layout: Layout) -> None:
        for pattern in (self.a, self.b):
            _check_within(pattern, layout)

    def tilings(self, layout: Layout) -> Iterator[Tensor]:
        yield from self.a.tilings(layout)
        yield from self.b.tilings(layout)

    def __repr__(self) -> str:
        return f"({self.a} {self.sign} {self.b})"

    __str__ = __repr__
    sign: ClassVar[str] = ""


class Or(_Pair):
    """A key is seen that either pattern lets the query see."""

    sign = "|"

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        return self.a.allows(query, key) | self.b.allows(query, key)

    def visible(self, query: Tokens, key: Tokens) -> Tensor:
        return self.a.visible(query, key) | self.b.visible(query, key)


class And(_Pair):
    """A key is seen that both patterns let the query see."""

    sign = "&"

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        return self.a.allows(query, key) & self.b.allows(query, key)

    def visible(self, query: Tokens, key: Tokens) -> Tensor:
        return self.a.visible(query, key) & self.b.visible(query, key)


@dataclass(frozen=True, repr=False)
class PerHead(Mask):
    """Each head, or each run of heads, has a pattern of its own.

    Attributes:
        patterns: one for each of as many equal runs of heads.
    """

    patterns: tuple[Mask, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.patterns:
            raise UsageError("per_head needs a pattern", hint="per_head([Stripe(rows=1), Stripe(cols=1)])")

    def by_head(self, heads: int) -> Sequence[Mask]:
        share, rest = divmod(heads, len(self.patterns))
        if rest:
            raise Refused(f"{heads} heads cannot be shared by {len(self.patterns)} patterns", "as many, or a divisor")
        parts = [tuple(p.by_head(share)) for p in self.patterns]
        return [inner for part in parts for inner in (part if len(part) > 1 else part * share)]

    def check(self, layout: Layout) -> None:
        for pattern in self.patterns:
            pattern.check(layout)


@dataclass(frozen=True, repr=False)
class On(Mask):
    """Applies a pattern to the queries of one segment and the keys of one; all other pairs see each other.

    Attributes:
        query, key: names of segments: patch, cls, registers, text, ...
    """

    query: str
    key: str
    pattern: Mask

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        return self.visible(query, key)

    def visible(self, query: Tokens, key: Tokens) -> Tensor:
        return self.pattern.allows(query, key) | ~(_within(self.query, query)[:, None] & _within(self.key, key))

    def by_head(self, heads: int) -> Sequence[Mask]:
        return [replace(self, pattern=p) for p in self.pattern.by_head(heads)]

    def check(self, layout: Layout) -> None:
        for name in (self.query, self.key):
            found = layout.segment(name)
            if found is None:
                raise Refused(f"there is no segment '{name}'", f"one of {', '.join(s[0] for s in layout.segments)}")
            if not self.pattern.anywhere and found != (layout.start, layout.count):
                raise Refused(f"{self.pattern} is on a grid, and '{name}' is not", "Nothing() or Full() are not")
        _check_within(self.pattern, layout)

    def tilings(self, layout: Layout) -> Iterator[Tensor]:
        yield from self.pattern.tilings(layout)


def _within(name: str, tokens: Tokens) -> Tensor:
    start, length = tokens.layout.segment(name) or (0, 0)
    return (tokens.index >= start) & (tokens.index < start + length)


@dataclass(frozen=True, repr=False)
class Permuted(Mask):
    """A pattern on the grid in another order.

    Attributes:
        pattern: it sees the new grid.
        axes: the order of the axes, ``(1, 0)`` for columns first; or "diagonal": one axis, along anti-diagonals.
        roll: places by which each axis is rolled before; tokens that wrap around see none of those that do not, as in
            the shifted windows of Swin (Liu et al., arXiv:2103.14030).
        flat: the new grid has one axis, the tokens in raster order of the others.
    """

    pattern: Mask
    axes: tuple[int, ...] | str = ()
    roll: int | tuple[int, ...] = 0
    flat: bool = False

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        moved = [self._moved(t) for t in (query, key)]
        allowed = self.pattern.allows(*moved)
        for axis, (shift, n) in enumerate(zip(each(self.roll, len(query.grid)), query.grid, strict=True)):
            a, b = (t.coords[axis] < shift % n for t in (query, key))
            allowed = allowed & (a[:, None] == b)
        return allowed

    def by_head(self, heads: int) -> Sequence[Mask]:
        return [replace(self, pattern=p) for p in self.pattern.by_head(heads)]

    def check(self, layout: Layout) -> None:
        rank = len(layout.grid)
        if self.axes == "diagonal":
            if rank != 2:
                raise Refused("anti-diagonals need a grid of two axes", "name the axes")
        elif self.axes and sorted(self.axes) != list(range(rank)):
            raise Refused(f"the grid has {rank} axes, and not {self.axes}", f"an order of {tuple(range(rank))}")
        _check_within(self.pattern, self._layout(layout))

    def tilings(self, layout: Layout) -> Iterator[Tensor]:
        inner = self._layout(layout)
        number = self._moved(layout.at(torch.arange(layout.start, layout.start + layout.count))).raster()
        place = number.long().argsort()
        for tiling in self.pattern.tilings(inner):
            yield place[tiling]

    def _layout(self, layout: Layout) -> Layout:
        return replace(layout, grid=self._moved(layout.at(torch.arange(1))).grid)

    def _moved(self, tokens: Tokens) -> Tokens:
        coords, grid = tokens.coords, tokens.grid
        shifts = each(self.roll, len(grid))
        coords = tuple((c - s) % n for c, s, n in zip(coords, shifts, grid, strict=True))
        if self.axes == "diagonal":
            return tokens.moved((_antidiagonal(grid)[coords[0].long(), coords[1].long()],), (torch.Size(grid).numel(),))
        if self.axes:
            coords, grid = tuple(coords[a] for a in self.axes), tuple(grid[a] for a in self.axes)
        tokens = tokens.moved(coords, grid)
        return tokens.moved((tokens.raster(),), (torch.Size(grid).numel(),)) if self.flat else tokens


def _antidiagonal(grid: tuple[int, ...]) -> Tensor:
    """int32 [H, W]: the number of each place along the anti-diagonals."""
    rows, columns = (torch.arange(n) for n in grid)
    key = (rows[:, None] + columns) * grid[0] + rows[:, None]
    return key.flatten().argsort().argsort().reshape(grid).to(torch.int32)


def each(value: Any, rank: int) -> tuple[Any, ...]:
    """A setting for every axis: one value stands for all.

    Raises:
        Refused: if there are as many as there are other axes.
    """
    if not isinstance(value, (tuple, list)):
        return (value,) * rank
    if len(value) != rank:
        raise Refused(f"the grid has {rank} axes, and the pattern {len(value)}: {tuple(value)}", "one value for all")
    return tuple(value)


def _check_within(pattern: Mask, layout: Layout) -> None:
    """Raises: Refused if a pattern means nothing within another one on this layout."""
    if getattr(pattern, "border", "") == "zero":
        raise Refused("zero keys beyond the border are no mask, to be joined with others", "border='truncate'")
    pattern.check(layout)


def per_head(patterns: Sequence[Mask]) -> PerHead:
    """The patterns of equal runs of heads."""
    return PerHead(tuple(patterns))


def on(query: str, key: str, pattern: Mask) -> On:
    """A pattern for the queries of one segment and the keys of one."""
    return On(query, key, pattern)


def permuted(order: Any, pattern: Mask, *, flat: bool = False) -> Permuted:
    """A pattern on the grid in another order of its axes, or along its anti-diagonals."""
    return Permuted(pattern, order if isinstance(order, str) else tuple(order), flat=flat)


_DEPTH = 60  # of a text; more than any pattern needs
_FUNCTIONS = {"per_head": per_head, "on": on, "permuted": permuted}


def parse(text: str | Pattern) -> Pattern:
    """A pattern from its text, which is that of the Python expression; nothing but patterns and constants is read.

    Raises:
        UsageError: if it is none.
    """
    if isinstance(text, Pattern):
        return text
    try:
        found = _evaluate(ast.parse(str(text).strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"not a pattern: {text!r}", why=str(error).split("\n")[0], hint="Neighborhood(7)") from error
    if not isinstance(found, Pattern):
        raise UsageError(f"not a pattern: {text!r}", hint=f"one of {', '.join(names())}")
    return found


def names() -> list[str]:
    """The patterns there are."""
    return sorted(n for n in Pattern._known if not n.startswith("_") and n not in ("Learned", "Mask", "Or", "And"))


def _evaluate(node: ast.expr, depth: int = 0) -> Any:
    if depth > _DEPTH:
        raise ValueError(f"it is nested more than {_DEPTH} deep")
    evaluate = partial(_evaluate, depth=depth + 1)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        a, b = evaluate(node.left), evaluate(node.right)
        if not (isinstance(a, Mask) and isinstance(b, Mask)):
            raise ValueError("only masks are combined")
        return Or(a, b) if isinstance(node.op, ast.BitOr) else And(a, b)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        factory = _FUNCTIONS.get(node.func.id) or Pattern._known.get(node.func.id)
        if factory is None or node.func.id not in (*_FUNCTIONS, *names()):
            raise ValueError(f"there is no {node.func.id}; there are {', '.join(names())}")
        if any(k.arg is None for k in node.keywords):
            raise ValueError("** is not read")
        return factory(*map(evaluate, node.args), **{k.arg: evaluate(k.value) for k in node.keywords})
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(map(evaluate, node.elts))
    return ast.literal_eval(node)


def _text(value: Any) -> str:
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, tuple) and any(
        isinstance(v, Pattern) for v in value) else repr(value)  # fmt: skip


@cache
def _types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of a type: a class, a tuple of one, or a union."""
    if get_origin(wanted) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(wanted))
    if get_origin(wanted) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(wanted)[0]) for v in value)
    if wanted in (int, bool):
        return type(value) is wanted and abs(value) < 2**31
    if wanted is float:
        return type(value) is float or _fits(value, int)
    return not isinstance(wanted, type) or isinstance(value, wanted)
