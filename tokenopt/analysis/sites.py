"""Attention sites, and the token axes that they attend over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, fx

from tokenopt import ops
from tokenopt.analysis.attention import SOFTMAX, match_attention, unmatched_products
from tokenopt.analysis.axes import AxisMap
from tokenopt.analysis.terms import Cat, Factor, Terms, factors, length
from tokenopt.errors import Refusal, UsageError
from tokenopt.graph import module_path
from tokenopt.program import Program


@dataclass(frozen=True)
class Segment:
    """A run of tokens with one meaning. Protected ones (class token, registers, text) are never reduced.

    Attributes:
        grid: the sizes of the grid that its tokens are in raster order of: rows and columns, or frames before them.
        special: positions within it of tokens that no input gave, as the class token of every frame of a video;
            ``frame`` is the grid of the patches of one frame then.
    """

    name: str
    start: int
    length: int
    grid: tuple[int, ...] | None
    protected: bool
    terms: Terms
    special: tuple[int, ...] = ()
    frame: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TokenAxis:
    """A sequence that attention runs over: ``197 = cls(1) + patch(14x14)``."""

    name: str
    terms: Terms
    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        return length(self.terms)

    @property
    def reducible(self) -> Segment | None:
        """The one segment whose tokens may be reduced."""
        return next((s for s in self.segments if not s.protected), None)

    def __str__(self) -> str:
        parts = [f"{s.name}({'x'.join(map(str, s.grid)) if s.grid else s.length})" for s in self.segments]
        return f"{self.length} = {' + '.join(parts)}"


@dataclass(frozen=True)
class AttentionSite:
    """One attention: who attends to whom.

    Attributes:
        id: the module path, unique in the program.
        kind: self, cross, joint (several data segments), channel, or linear.
        causal: whether no query sees what comes after it.
        refusal: why it is not in canonical form, if it is not.
    """

    id: str
    node: fx.Node
    kind: str
    axis: TokenAxis | None
    queries: int
    keys: int
    heads: int
    head_dim: int
    refusal: Refusal | None = None
    causal: bool = False

    @property
    def raised(self) -> bool:
        return self.refusal is None

    @property
    def known(self) -> bool:
        """Whether it is an operation of attention: dense, or in tiles after a pattern."""
        return self.node.target in ops.attentions()


def find_sites(axes: AxisMap) -> tuple[list[AttentionSite], list[TokenAxis]]:
    """Every attention of a program in order (raised or not), and the token axes they run over.

    Run it after raise-attention: what is left as softmax is listed with the reason.
    """
    program = axes.program
    unmatched = {node: (kind, why) for node, kind, why in unmatched_products(axes)}
    sites: list[AttentionSite] = []
    token_axes: dict[Terms, TokenAxis] = {}
    taken: dict[str, int] = {}

    def unique(node: fx.Node) -> str:
        path = module_path(node) or node.name
        taken[path] = taken.get(path, 0) + 1
        return path if taken[path] == 1 else f"{path}#{taken[path]}"

    def axis_of(terms: Terms) -> TokenAxis:
        if terms not in token_axes:
            segments = _segments(axes, terms)
            token_axes[terms] = TokenAxis(_axis_name(segments, token_axes), terms, segments)
        return token_axes[terms]

    for node in program.graph.nodes:
        if node.target in ops.attentions():
            query, key = axes.dims(node.args[0]), axes.dims(node.args[1])
            shape = node.args[0].meta["val"].shape
            axis, other = query[-2], key[-2]
            kind = "self" if axis == other else "cross"
            token_axis = axis_of(axis) if length(axis) > 1 else axis_of(other) if length(other) > 1 else None
            if (
                kind == "self"
                and token_axis
                and sum(s.name in ("patch", "text", "token") for s in token_axis.segments) > 1
            ):
                kind = "joint"
            heads = shape[1] if len(shape) >= 4 and isinstance(shape[1], int) else 1
            site = AttentionSite(unique(node), node, kind, token_axis, length(axis), length(other), heads,
                                 int(shape[-1]), causal=_is_causal(program, node))  # fmt: skip
            if node.target is not torch.ops.tokenopt.attention.default:
                why = "its attention has a pattern, whose tables name the places of all tokens"
                site = replace(site, refusal=Refusal(site.id, why, "the pattern at other sites: sites=..."))
            sites.append(site)
        elif node.target in SOFTMAX and node in axes.data:
            match = match_attention(axes, node)
            if match is None:
                continue
            refusal = match if isinstance(match, Refusal) else Refusal(module_path(node), "not in canonical form",
                                                                       "run raise-attention first")  # fmt: skip
            kind = "channel" if refusal.why.startswith("channel") else "self"
            sites.append(_unraised(unique(node), node, kind, refusal, node.args[0].meta["val"]))
        elif node in unmatched:
            kind, why = unmatched[node]
            refusal = Refusal(module_path(node) or node.name, why, "it stays as it is")
            sites.append(_unraised(unique(node), node, kind, refusal, node.meta["val"]))
    return sites, list(token_axes.values())


def with_grid(sites: list[AttentionSite], grid: tuple[int, ...]) -> list[AttentionSite]:
    """The sites, those over a segment of that many tokens with its grid, where the graph does not show it.

    Raises:
        UsageError: if no tokens form it.
    """
    chosen, fits = [], False
    for site in sites:
        axis = site.axis
        if axis is not None:
            segments = tuple(
                replace(s, grid=grid) if s.length == prod(grid) and not s.protected else s for s in axis.segments
            )
            fits |= segments != axis.segments or any(s.grid == grid for s in segments)
            site = replace(site, axis=replace(axis, segments=segments))
        chosen.append(site)
    if not fits:
        segments = [s.axis.reducible for s in sites if s.axis is not None]
        lengths = ", ".join(map(str, sorted({s.length for s in segments if s is not None})))
        raise UsageError(f"no tokens form a grid of {' x '.join(map(str, grid))}", why=f"there are {lengths}")
    return chosen


def _is_causal(program: Program, node: fx.Node) -> bool:
    """Whether an attention is told so, or a constant in its mask hides all that lies above the diagonal."""
    if node.kwargs.get("is_causal"):
        return True
    bias = node.args[3] if len(node.args) > 3 else None
    stack = [bias] if bias is not None else []
    for _ in range(24):
        if not stack:
            return False
        current = stack.pop()
        value = program.constant(current)
        if value is not None and _hides_above_diagonal(value):
            return True
        stack.extend(n for n in current.all_input_nodes if isinstance(n.meta.get("val"), Tensor))
    return False


def _hides_above_diagonal(value: Tensor) -> bool:
    if value.dim() < 2 or value.shape[-1] != value.shape[-2] or value.shape[-1] < 2:
        return False
    hidden = ~value if value.dtype is torch.bool else value < -1e4
    above = torch.ones(value.shape[-2:], dtype=torch.bool).triu(1)
    return bool(hidden[..., above].all()) and not bool(hidden[..., ~above].all())


def _unraised(name: str, node: fx.Node, kind: str, refusal: Refusal, logits: Tensor) -> AttentionSite:
    size = [s if isinstance(s, int) else 1 for s in logits.shape]
    heads = size[1] if len(size) >= 4 else 1
    return AttentionSite(name, node, kind, None, size[-2] if len(size) > 1 else 1, size[-1], heads, 0, refusal)


def _segments(axes: AxisMap, terms: Terms) -> tuple[Segment, ...]:
    parts = terms[0].parts if len(terms) == 1 and isinstance(terms[0], Cat) else (terms,)
    data = [length(p) > 1 and any(f.data for f in factors(p)) for p in parts]
    names = [_data_name(axes, p) if d else "" for p, d in zip(parts, data, strict=True)]
    candidates = [i for i, d in enumerate(data) if d]
    chosen = max(candidates, key=lambda i: (names[i] == "patch", names[i] != "text", length(parts[i])), default=None)
    segments: list[Segment] = []
    offset = 0
    names_of_one = ["dist", "cls"]
    for i, part in enumerate(parts):
        size = length(part)
        if data[i]:
            name = names[i]
        elif size == 1 and names_of_one and i < 2:
            name = names_of_one.pop()
        else:
            name = "registers" if offset < _offset(parts, chosen) else "queries"
        special = tuple(_special(part))
        segments.append(Segment(name, offset, size, _grid(axes, part), i != chosen, part, special,
                                _frame(axes, part, special)))  # fmt: skip
        offset += size
    return tuple(segments)


def _grid(axes: AxisMap, part: Terms) -> tuple[int, ...] | None:
    """The sizes of the grid that a run of tokens is in raster order of; None where it is none.

    The grid is that of the first value that has its rows and columns apart: what windows make of them later, smaller
    factors, maybe in another order, is a part of it.
    """
    if len(part) < 2 or any(isinstance(t, Cat) for t in part):
        return None
    atoms = set(part)
    for node in axes.program.graph.nodes:
        dims = axes.dims(node) if isinstance(node.meta.get("val"), Tensor) else None
        runs = [run for d in dims or () if (run := tuple(t for t in d if t in atoms))]
        if len(runs) > 1 and sum(map(len, runs)) == len(part) and set().union(*runs) == atoms:
            return tuple(length(r) for r in runs) if sum(runs, ()) == part and len(runs) < 4 else None
    return tuple(t.size for t in part) if len(part) < 4 else None


def _frame(axes: AxisMap, part: Terms, special: tuple[int, ...]) -> tuple[int, ...] | None:
    """The grid of the patches of one frame, where special tokens lie between those of the frames."""
    if not special:
        return None
    count = (length(part) - len(special)) // length(part[:-1])
    return next((_grid(axes, p) for p in part[-1].parts if length(p) == count), None)


def _special(part: Terms) -> Iterator[int]:
    """Where in a run of tokens lie those that no input gave, repeated for every frame."""
    if not part or not isinstance(part[-1], Cat):
        return
    inner = part[-1]
    gave = [any(f.data for f in factors(p)) for p in inner.parts]
    lengths = [length(p) for p in inner.parts]
    for frame in range(length(part[:-1])):
        place = frame * inner.size
        for given, count in zip(gave, lengths, strict=True):
            if not given:
                yield from range(place, place + count)
            place += count


def _offset(parts: tuple[Terms, ...], chosen: int | None) -> int:
    return sum(length(p) for p in parts[:chosen]) if chosen is not None else 0


def _data_name(axes: AxisMap, part: Terms) -> str:
    if len(part) > 1:
        return "patch"
    factor = part[0]
    inputs = {n.name: n for n in axes.program.user_inputs}
    if isinstance(factor, Factor) and factor.origin.name in inputs:
        node = inputs[factor.origin.name]
        if not node.meta["val"].dtype.is_floating_point or "encoder_hidden" in node.name or "text" in node.name:
            return "text"
    elif all(not n.meta["val"].dtype.is_floating_point for n in inputs.values()):
        return "text"
    return "patch" if _has_image(inputs) and factor.origin.name not in inputs else "token"


def _has_image(inputs: dict[str, fx.Node]) -> bool:
    return any(len(n.meta["val"].shape) >= 4 for n in inputs.values())


def _axis_name(segments: tuple[Segment, ...], taken: dict[Terms, TokenAxis]) -> str:
    main = next((s.name for s in segments if not s.protected), segments[-1].name)
    names = {a.name for a in taken.values()}
    if main not in names:
        return main
    return next(f"{main}{i}" for i in range(2, len(names) + 3) if f"{main}{i}" not in names)
