"""The twin: what a rewritten program must equal at its real schedule, computed at full length.

The twin runs the dense graph. At each cut the plan that the rewritten program made is carried out without shortening
anything: merged tokens stay, each a copy of what they became; dropped tokens stay as copies of a kept one, but no
attention sees their keys and no mean counts them. Behind the cut everything is the dense graph. Where the sizes of
merged tokens are counted, an attention that sees every copy is an attention that sees one with the log of its size;
elsewhere the copies are absent, too.

Which values have tokens that are absent, and along which dimension, is not taken from the analysis of axes, which is
what is to be proven: a *shadow* of each value, with NaN in place of tokens that are absent, goes through the same
operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from tokenopt.errors import ParityError
from tokenopt.graph import module_path
from tokenopt.program import Program, flatten_tensors
from tokenopt.runtimes.compare import TOLERANCE, Check, compare, require
from tokenopt.tokens.plan import Record, Reduction

aten = torch.ops.aten
attention = torch.ops.tokenopt.attention.default

_NAN = float("nan")
_VISIBLE = 1e-4  # of the largest magnitude: a difference that rounding does not make
_SAMPLES, _SEED = 2, 2000  # of random inputs
_HIDDEN = -1e3  # a bias of less hides a key: it is a mask and says nothing of positions


class NoTwin(Exception):
    """A program whose twin is not known; the message is the reason."""


def runs(program: Program, tensors: Sequence[Tensor], watch: set[str]) -> tuple[list[Tensor], dict[str, Any]]:
    """The outputs of a rewritten program as it stands in its graph, and the values of some of its nodes by name.

    Raises:
        ParityError: if it does not run, with the operation that fails.
    """
    run = _Run(program, watch)
    try:
        return run.call(tensors), run.kept
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise ParityError(
            "the rewritten program does not run", where=_label(run.at_node), why=" ".join(str(error).split())[:300],
            hint="another schedule or place of the recipe",
        ) from error  # fmt: skip


class _Run(fx.Interpreter):
    """Runs a program's graph as it is, whether its code is up to date or not."""

    def __init__(self, program: Program, watch: set[str]) -> None:
        super().__init__(program.exported.graph_module, graph=program.graph)
        self.extra_traceback = False
        self.program, self.watch = program, watch
        self.at_node = next(iter(program.graph.nodes))
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.at_node = n
        value = super().run_node(n)
        if n.name in self.watch:
            self.kept[n.name] = value
        return value

    def call(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        given, leaves = iter(tensors), iter(pytree.tree_leaves(self.program.example_inputs))
        users = set(self.program.user_inputs)
        values = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node in users:
                leaf = next(leaves)
                values.append(next(given) if isinstance(leaf, Tensor) else leaf)
            elif node.op == "placeholder":
                values.append(self.program.constant(node))
        with torch.no_grad():
            out = self.run(*values, enable_io_processing=False)
        return [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)]


# -- the tokens after a reduction --------------------------------------------------------------------------------------


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows [R, M, C] of x [R, N, C] at an index [B, M]; R is a multiple of B, whose samples lie together."""
    index = index.repeat_interleave(x.shape[0] // index.shape[0], 0)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


@dataclass(eq=False)
class _State:
    """The n tokens of a segment after some reductions, of which ``count`` are left. Positions are those of the segment.

    Attributes:
        standing: [B, count], the original that each token left stands at.
        member: [B, n], the token left that each original is a part of; -1 if it was dropped.
        copied: [B, n], the token left that each original is a copy of.
        sized: whether the copies count.
        weight: [B, n], what each original counts.
        gone: [B, count], tokens that hold nothing.
    """

    reduction: Reduction
    parent: _State | None
    standing: Tensor
    member: Tensor
    copied: Tensor
    sized: bool
    weight: Tensor
    gone: Tensor
    parts: dict[str, Tensor]
    shape: torch.Size
    canvas: Tensor | None = None

    @property
    def n(self) -> int:
        return self.member.shape[1]

    @cached_property
    def absent(self) -> Tensor:
        """[B, n], whether an original is not what a token left stands at."""
        absent = torch.ones_like(self.member, dtype=torch.bool)
        there = torch.where(self.gone, self.n, self.standing)  # one more place, for what holds nothing
        return torch.cat([absent, absent[:, :1]], 1).scatter(1, there, False)[:, : self.n]

    @cached_property
    def origin(self) -> Tensor:
        """[B, n], the original whose place each original is seen at."""
        return self.standing.gather(1, self.copied) if self.reduction.count else _arange(self.member)

    @cached_property
    def placed(self) -> Tensor:
        """[B, n], the position whose terms each original has."""
        kind = self.reduction.position
        if kind == "keep" or not self.reduction.count:
            return self.origin
        at = self.parts["positions"] if "positions" in self.parts else _arange(self.standing)
        return at.gather(1, self.copied)

    @property
    def chain(self) -> Iterator[_State]:
        state: _State | None = self
        while state is not None:
            yield state
            state = state.parent

    def merge(self, x: Tensor) -> Tensor:
        """Rows [R, n, C] before the reduction, as copies of what they became."""
        reduction = self.reduction
        if not reduction.count:
            return x
        if reduction.fuse == "drop":
            return _rows(x, self.origin)
        wide = x.double()
        each = x.shape[0] // self.member.shape[0]
        if self.sized and reduction.fuse in ("sized", "soft"):
            groups = torch.arange(reduction.count)[None, :, None] == self.member[:, None]
            share = groups * self.weight[:, None].double()
            share = share / share.sum(-1, keepdim=True).clamp_min(1e-12)
            new = share.repeat_interleave(each, 0) @ wide
        else:
            old = wide if self.parent is None else _rows(wide, self.parent.standing)
            new = self.mixture.repeat_interleave(each, 0) @ old
        return _rows(new, self.copied).to(x.dtype)

    @cached_property
    def mixture(self) -> Tensor:
        """[B, count, before], the share that each token before the reduction has in each one left."""
        reduction, parts = self.reduction, self.parts
        if reduction.fuse == "soft":
            return parts["assign"].double().expand(self.member.shape[0], -1, -1)
        home = self._home
        share = (torch.arange(reduction.count)[None, :, None] == home[:, None]).double()
        if "weight" in parts:
            first = reduction.start
            share = share * parts["weight"][:, None, first : first + reduction.before].double()
        return share / share.sum(-1, keepdim=True) if reduction.fuse == "mean" else share

    @cached_property
    def _home(self) -> Tensor:
        return _homes(self.reduction, self.parts)[0]


def _arange(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1]).expand_as(like)


def _homes(reduction: Reduction, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Where each token before a reduction is afterwards, -1 if nowhere, and what it is a copy of: [B, before] twice."""
    start, before, count = reduction.start, reduction.before, reduction.count
    kept = parts["index"][:, start : start + count] - start
    home = torch.full((kept.shape[0], before), -1)
    home = home.scatter(1, kept, _arange(kept))
    if reduction.fuse == "soft":
        spread = parts["spread"]
        if "size" in parts:  # hard groups, of any number
            home = parts["assign"].argmax(1).expand(len(kept), -1).clone()
            return torch.where((parts["assign"].sum(1) > 0).expand_as(home), home, -1), home
        copied = parts["dst"] - start if "dst" in parts else None
        if spread is not None:
            copied = spread.argmax(-1).expand(len(kept), -1)
        return home, copied.scatter(1, kept, _arange(kept))
    src = parts.get("src")
    if src is None and count < before:
        gone = (home < 0).to(torch.int8).sort(-1, descending=True, stable=True).indices
        src = gone[:, : before - count] + start
    copied = home
    if "dst" in parts:
        home = copied = home.scatter(1, src - start, parts["dst"] - start)
    elif "nearest" in parts:
        copied = home.scatter(1, src - start, parts["nearest"] - start)
    return home, copied.clamp_min(0)


def check_plan(reduction: Reduction, parts: dict[str, Tensor]) -> None:
    """Checks that a plan says of every token where it goes.

    Raises:
        ParityError: if kept and removed ones are no permutation, a destination is not there, or protected ones move.
    """

    def wrong(why: str) -> ParityError:
        return ParityError("a reduction has no valid plan", where=reduction.site, why=why)

    index, total = parts["index"], reduction.total
    stop, left = reduction.start + reduction.before, reduction.total - reduction.before + reduction.count
    if index.shape[1] != left or ((index < 0) | (index >= total)).any():
        raise wrong(f"it keeps {index.shape[1]} tokens of {total} where {left} are meant, or some that are not there")
    order = _arange(parts["index"])
    head, tail = slice(0, reduction.start), slice(reduction.start + reduction.count, None)
    ends = order[:, tail] + reduction.before - reduction.count
    if (index[:, head] != order[:, head]).any() or (index[:, tail] != ends).any():
        raise wrong(f"tokens outside of [{reduction.start}, {stop}), which are protected, change their places")
    if reduction.fuse == "soft":
        for part in ("assign", "spread", "size"):
            if part in parts and not (parts[part].isfinite().all() and (parts[part] >= 0).all()):
                raise wrong(f"a weight of its {part} is negative or not finite")
        return
    every = index if "src" not in parts else torch.cat([index, parts["src"]], 1)
    every = every.sort(-1).values
    if (every[:, 1:] == every[:, :-1]).any() or ("src" in parts and every.shape[1] != total):
        raise wrong("tokens that are kept and removed are not all tokens, each once")
    for part in ("dst", "nearest"):
        if part in parts and ((parts[part] < 0) | (parts[part] >= left)).any():
            raise wrong("tokens are merged into places that are not there")


# -- following them ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Shadow:
    """A value with NaN where tokens are absent, and since which reduction."""

    value: Any
    state: _State

    @cached_property
    def share(self) -> float:
        """How much of it is NaN; the most of several."""
        return max(map(_share, pytree.tree_leaves(self.value)))


@dataclass(frozen=True)
class _Where:
    """The sequence of a segment in a value: dimensions ``first`` to ``last`` as one, from ``offset``; and its batch."""

    batch: int
    first: int
    last: int
    offset: int


_CUTTING = {"slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow", "tensor_split"}
_KEEPING = {
    "view", "reshape", "permute", "transpose", "expand", "expand_as", "unsqueeze", "squeeze", "flatten", "unflatten",
    "clone", "contiguous", "detach", "alias", "t", "cat", "stack", "_to_copy", "to", "movedim", "view_as", "type_as",
    "repeat", "repeat_interleave", "lift_fresh_copy", "_unsafe_view", "pad", "constant_pad_nd",
}  # fmt: skip
_MIXING = {
    "gather", "index_select", "index", "take_along_dim", "roll", "flip", "masked_select", "embedding", "topk", "sort",
    "argsort", "argmax", "argmin", "sum", "cumsum",
}  # fmt: skip
_WEIGHING = {
    "linear", "layer_norm", "native_layer_norm", "rms_norm", "conv2d", "conv1d", "batch_norm", "addmm", "baddbmm",
    "matmul", "bmm", "mm", "einsum",
}  # fmt: skip


def _name(target: Any) -> str:
    return target._schema.name.split("::")[1] if hasattr(target, "_schema") else target.__name__


class Twin(_Run):
    """Runs the dense graph with the plans of a rewritten one.

    Args:
        record: what was done, and to which program.
        values: of the plans' nodes, by name, from a run of the rewritten program on the same inputs.
        compare: is told of every operation and what it gives, for the tokens that are left.
    """

    def __init__(
        self, record: Record, values: dict[str, Tensor], compare: Callable[[fx.Node, Tensor], None] | None = None
    ) -> None:
        dense = record.before
        super().__init__(dense, set())
        self.record, self.values, self.compare = record, values, compare
        self.at: dict[str, list[int]] = {}
        for i, reduction in enumerate(record.reductions):
            self.at.setdefault(reduction.at, []).append(i)
        self.states: dict[int, _State] = {}
        self.shadows: dict[fx.Node, _Shadow] = {}
        self.beside: dict[fx.Node, tuple[Tensor, _Shadow, frozenset[str]]] = {}
        self.until: dict[str, _State] = {}
        self.outputs: list[tuple[Tensor, _Shadow | None]] = []
        self.data: set[fx.Node] = set()
        self.learned: set[fx.Node] = set()
        users = set(dense.user_inputs)
        for node in dense.graph.nodes:
            sized = isinstance(node.meta.get("val"), (int, torch.SymInt))  # sizes are no data
            if node in users or (not sized and any(n in self.data for n in node.all_input_nodes)):
                self.data.add(node)
            if node.target is attention or any(n in self.learned for n in node.all_input_nodes):
                self.learned.add(node)

    def run_node(self, n: fx.Node) -> Any:
        self.at_node = n
        if n.op == "output":
            self.outputs = [
                (self.env[a], self.shadows.get(a))
                for a in pytree.tree_leaves(n.args[0])
                if isinstance(a, fx.Node) and isinstance(self.env[a], Tensor)
            ]
        if n.op != "call_function":
            value = super().run_node(n)
        else:
            value = self._visit(n)
        for i in self.at.get(n.name, ()):
            if not self.record.reductions[i].inside:
                value = self._cut(n, value, i)
        if self.compare is not None and n.op == "call_function" and isinstance(value, Tensor):
            self._show(n, value)
        if n.name in self.until and n in self.shadows:
            value = self._fill(n, value, self.shadows.pop(n))
        return value

    def _show(self, node: fx.Node, value: Tensor) -> None:
        shadow = self.shadows.get(node)
        if node.name in self.at and shadow is not None:  # reduced right here, by another operation
            return
        if shadow is not None and (where := self._locate(node, shadow.value, shadow.state)) is not None:
            if where.first != where.last:
                return
            value = self._moved(value, shadow.value, where, lambda x: _rows(x, shadow.state.standing), shadow.state.n)
        self.compare(node, value)

    def _visit(self, node: fx.Node) -> Any:
        values: dict[fx.Node, Any] = {}
        shadows: dict[fx.Node, _Shadow] = {}
        for operand in node.all_input_nodes:
            value, shadow = self.env[operand], self.shadows.get(operand)
            if operand in self.beside and node.name in self.beside[operand][2]:
                value, shadow = self.beside[operand][:2]
            if shadow is not None and (node.name, operand.name) in self.record.restored:
                value, shadow, before = self._fill(operand, value, shadow), None, shadow
                if node.name in self.record.averaged:
                    averaged = before.state
            values[operand] = value
            if shadow is not None:
                shadows[operand] = shadow
        inside = [i for i in self.at.get(node.name, ()) if self.record.reductions[i].inside]
        if inside:
            return self._inside(node, self.record.reductions[inside[0]], values)
        if node.name in self.record.averaged:
            return self._averaged(node, self._attend(node, values, {}), averaged)
        if not shadows:
            return self._apply(node, values.__getitem__)
        return self._follow(node, values, shadows)

    @staticmethod
    def _apply(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        return node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))

    def _follow(self, node: fx.Node, values: dict[fx.Node, Any], shadows: dict[fx.Node, _Shadow]) -> Any:
        """An operation of which some operands have absent tokens."""
        for operand, shadow in list(shadows.items()):
            state = self._latest(node, shadow.state, shadows)
            if shadow.state is not state:
                values[operand], shadows[operand] = self._bring(operand, values[operand], shadow, state)
        shaded = lambda n: shadows[n].value if n in shadows else values[n]  # noqa: E731
        name = _name(node.target)
        if name == "getitem":
            return self._mark(node, values[node.args[0]][node.args[1]], shaded(node.args[0])[node.args[1]], state)
        if node.target is attention:
            return self._attend(node, values, shadows)
        if name in _MIXING:
            return self._full(node, values, shadows)
        if name in _CUTTING:
            return self._cut_off(node, values, shadows, state)
        if name == "mean":
            return self._mean(node, values, shadows, state)
        shadow = self._apply(node, shaded)
        if name not in _WEIGHING:
            others = [n for n in values if n not in shadows and isinstance(values[n], Tensor) and values[n].dim()]
            where = self._locate(node, shadow, state) if others and _nan(shadow) else None
            for other in others if where is not None else ():
                if other in self.learned and other in self.data:
                    values[other] = self._reduced(values[other], shadow, where, state)
                elif other not in self.data and name != "cat":  # position terms
                    placed = lambda x: _rows(x, state.placed)  # noqa: E731
                    values[other] = self._moved(values[other], shadow, where, placed, state.n)
        marked = _Shadow(shadow, state)
        if name not in _KEEPING and marked.share > max(s.share for s in shadows.values()) + 1e-6:
            return self._full(node, values, shadows)  # it mixes tokens: it sees the copies
        return self._mark(node, self._apply(node, values.__getitem__), marked, state)

    @staticmethod
    def _latest(node: fx.Node, state: _State, shadows: dict[fx.Node, _Shadow]) -> _State:
        """The last reduction of the same tokens that reaches an operation."""
        related = []
        for other in (s.state for s in shadows.values()):
            if other in state.chain or state in other.chain:
                related.append(other)
            elif node.target is not attention:  # whose queries and keys may be of two sequences
                raise NoTwin(f"{_label(node)} joins tokens of two reductions")
        return max(related, key=lambda s: sum(1 for _ in s.chain))

    def _mark(self, node: fx.Node, value: Any, shadow: Any, state: _State) -> Any:
        shadow = shadow if isinstance(shadow, _Shadow) else _Shadow(shadow, state)
        if shadow.share:
            self.shadows[node] = shadow
        return value

    def _full(self, node: fx.Node, values: dict[fx.Node, Any], shadows: dict[fx.Node, _Shadow]) -> Any:
        """The operation on all tokens."""
        filled = {n: self._fill(n, v, shadows[n]) if n in shadows else v for n, v in values.items()}
        return self._apply(node, filled.__getitem__)

    def _cut_off(
        self, node: fx.Node, values: dict[fx.Node, Any], shadows: dict[fx.Node, _Shadow], state: _State
    ) -> Any:
        """A part of a value: of another dimension, of other tokens, or of all tokens of the segment together."""
        (operand,) = shadows
        shadow = shadows[operand].value
        dim = _argument(node, "dim", 0) % shadow.dim()
        missing = shadow.isnan()
        cut = self._apply(node, lambda n: shadows[n].value if n in shadows else values[n])
        same_for_all = bool((missing == missing.narrow(dim, 0, 1)).all())
        parts = [cut] if isinstance(cut, Tensor) else cut
        whole = max(int(p.isnan().sum()) for p in parts) == int(missing.sum())
        if same_for_all or whole:
            return self._mark(node, self._apply(node, values.__getitem__), cut, state)
        if isinstance(cut, Tensor) and not _nan(cut) and not self._tears(node, operand, shadow, dim, cut, state):
            return self._apply(node, values.__getitem__)
        return self._full(node, values, shadows)

    def _tears(self, node: fx.Node, operand: fx.Node, shadow: Tensor, dim: int, cut: Tensor, state: _State) -> bool:
        """Whether what is read of a value are tokens of the segment."""
        where = self._locate(operand, shadow, state)
        if where is None or not where.first == where.last == dim:
            return True
        index = torch.arange(shadow.shape[dim]).reshape([-1 if i == dim else 1 for i in range(shadow.dim())])
        read = self._apply(node, lambda n: index.expand_as(shadow)).flatten()
        return bool(((read >= where.offset) & (read < where.offset + state.n)).any())

    def _mean(self, node: fx.Node, values: dict[fx.Node, Any], shadows: dict[fx.Node, _Shadow], state: _State) -> Any:
        """A mean over tokens counts those present, and what was merged by size as often as it is there."""
        (operand,) = shadows
        shadow = shadows[operand].value
        shaded = self._apply(node, lambda n: shadow)
        if shaded.isnan().any() and _share(shaded) <= _share(shadow) + 1e-6:  # it is over something else
            return self._mark(node, self._apply(node, values.__getitem__), shaded, state)
        if state.sized and not state.gone.any():
            return self._apply(node, values.__getitem__)
        dims = _argument(node, "dim", None)
        if state.sized:
            raise NoTwin(f"{_label(node)} counts tokens, of which some places hold none")
        result = shadow.double().nanmean(dim=dims, keepdim=_argument(node, "keepdim", False))
        return result.to(values[operand].dtype)

    # -- attention -----------------------------------------------------------------------------------------------------

    def _attend(self, node: fx.Node, values: dict[fx.Node, Any], shadows: dict[fx.Node, _Shadow]) -> Tensor:
        """An attention that sees tokens that are present, or every copy where sizes are counted."""
        operands = [*node.args, None, None, None][:5]
        query, key, value, bias, key_bias = (None if n is None else values[n] for n in operands)
        of_query, of_key = (shadows.get(n) for n in operands[:2])
        scale = node.kwargs.get("scale") or query.shape[-1] ** -0.5
        wide = torch.promote_types(query.dtype, torch.float32)
        logits = query.to(wide) @ key.to(wide).transpose(-1, -2) * scale
        if bias is not None:
            bias = self._positioned(node, _additive(bias), operands, shadows, logits.shape)
            logits = logits + bias
        if key_bias is not None:
            logits = logits + key_bias[:, None, None, :]
        if node.kwargs.get("is_causal"):
            logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
        if of_key is not None:
            missing = of_key.value.isnan().any(-1)
            counted = of_key.state.sized and of_key.state.reduction.proportional
            if counted and of_key.state.gone.any():
                raise NoTwin(f"{_label(node)} sees places that hold no token")
            if not counted:
                logits = logits.masked_fill(missing.unsqueeze(-2), float("-inf"))
        out = (_softmax(logits) @ value.to(logits.dtype)).to(query.dtype)
        if of_query is None:
            return out
        shadow, state = torch.where(of_query.value.isnan().any(-1, keepdim=True), _NAN, out), of_query.state
        if (not state.sized or (state.member < 0).any()) and _nan(shadow):
            # who is no part of a token left is a copy of the one that it would be restored from
            where = self._where(operands[0], shadow, state, "the result of an attention")
            lost = (state.member < 0)[..., None] if state.sized else torch.ones(1, 1, 1, dtype=torch.bool)
            each = lambda x: lost.repeat_interleave(x.shape[0] // len(lost), 0) if len(lost) > 1 else lost  # noqa: E731
            out = self._moved(out, shadow, where, lambda x: torch.where(each(x), _rows(x, state.origin), x), state.n)
        return self._mark(node, out, shadow, state)

    def _positioned(
        self, node: fx.Node, bias: Tensor, operands: list[fx.Node | None], shadows: dict[fx.Node, _Shadow],
        shape: torch.Size,
    ) -> Tensor:  # fmt: skip
        """A bias on logits: of positions, copies have what they are copies of; of masks, each token its own."""
        if not self._of_positions(operands[3], operands[0]) or (bias < _HIDDEN).any():
            return bias
        full = bias.expand(shape)
        for operand, dim in ((operands[0], -2), (operands[1], -1)):
            shadow = shadows.get(operand)
            if shadow is None:
                continue
            missing = shadow.value.isnan().any(-1, keepdim=True)
            where = self._where(operand, torch.where(missing, _NAN, 0.0), shadow.state, "the bias of an attention")
            count = shape[dim]
            at = torch.arange(count).repeat(missing.shape[where.batch], 1)
            each = len(at) // len(shadow.state.placed)
            at[:, where.offset : where.offset + shadow.state.n] = (
                shadow.state.placed.repeat_interleave(each, 0) + where.offset
            )
            view = [1] * len(shape)
            view[where.batch], view[dim] = at.shape
            full = full.gather(len(shape) + dim, at.reshape(view).expand(shape))
        return full

    def _of_positions(self, bias: fx.Node, query: fx.Node) -> bool:
        """Whether a bias is a constant, or made from what the queries are, and so is of their positions."""
        return bias not in self.data or bool(self._above(bias) & self._above(query))

    def _above(self, node: fx.Node) -> set[fx.Node]:
        seen, stack = {node}, [node]
        while stack:
            for operand in stack.pop().all_input_nodes:
                computed = operand.op == "call_function" and isinstance(operand.meta.get("val"), Tensor)
                if computed and operand in self.data and operand not in seen:
                    seen.add(operand)
                    stack.append(operand)
        return seen

    def _averaged(self, node: fx.Node, out: Tensor, state: _State) -> Tensor:
        """The result [B, H, N, D] of an attention of all tokens at their places, averaged in each group."""
        if out.dim() != 4:
            raise NoTwin(f"{_label(node)} is no attention of one sequence")
        start, heads = state.reduction.start, out.shape[1]
        rows = out.transpose(1, 2).flatten(2)
        new = rows.clone()
        one = torch.arange(state.reduction.count)[None, :, None] == state.member[:, None]
        share = one * state.weight[:, None].double()
        share = share / share.sum(-1, keepdim=True).clamp_min(1e-12)
        segment = share @ rows[:, start : start + state.n].double()
        new[:, start : start + state.n] = _rows(segment, state.copied).to(out.dtype)
        back = lambda x: x.unflatten(2, (heads, -1)).transpose(1, 2)  # noqa: E731
        shadow = new.clone()
        shadow[:, start : start + state.n].masked_fill_(state.absent[..., None], _NAN)
        return self._mark(node, back(new), back(shadow), state)

    def _inside(self, node: fx.Node, reduction: Reduction, values: dict[fx.Node, Any]) -> Tensor:
        """Attention among groups: every query is its group's, and so is every key, or as many as it has members."""
        parts = self._parts(reduction)
        query, key, value, bias = (None if n is None else values[n] for n in [*node.args, None][:4])
        bias = None if bias is None else _additive(bias).expand(*query.shape[:-1], key.shape[-2])
        placed = bias is not None and self._of_positions(node.args[3], node.args[0]) and (bias > _HIDDEN).all()
        apart = None
        if query.dim() != 4:
            (window,) = reduction.dims
            apart = (query.shape[0], query.shape[window])
            together = lambda x: x.movedim(window, 1).flatten(0, 1)  # noqa: E731
            query, key, value, bias = (None if x is None else together(x) for x in (query, key, value, bias))
        rows, heads, total, _ = query.shape
        start, before, count = reduction.start, reduction.before, reduction.count
        home, copied = _homes(reduction, parts)
        around = lambda middle: torch.cat(  # noqa: E731
            [torch.arange(start).expand(rows, -1), middle, torch.arange(start + count, total - before + count).expand(
                rows, -1)], 1)  # fmt: skip
        left = total - before + count
        if reduction.fuse == "soft":
            group = torch.zeros(rows, left, total, dtype=torch.float64)
            group[:, :start, :start] = torch.eye(start)
            group[:, start : start + count, start : start + before] = parts["assign"].double()
            group[:, start + count :, start + before :] = torch.eye(total - start - before)
        else:
            lifted = torch.where(home < 0, -1, home + start)
            member = around(lifted)
            weight = parts["weight"].double() if "weight" in parts else torch.ones(rows, total, dtype=torch.float64)
            group = (member[:, None] == torch.arange(left)[None, :, None]) * weight[:, None]
            if reduction.fuse != "sum":
                group = group / group.sum(-1, keepdim=True)
        copies = around(copied + start)
        soft = reduction.fuse == "soft"
        fused = lambda x: torch.einsum("bmn,bhnd->bhmd", group, x.double())  # noqa: E731
        each = lambda x: x if soft else x.gather(2, copies[:, None, :, None].expand(-1, heads, -1, x.shape[-1]))  # noqa: E731
        query, key, value = (each(fused(x)) for x in (query, key, value))
        scale = node.kwargs.get("scale") or query.shape[-1] ** -0.5
        logits = query @ key.transpose(-1, -2) * scale
        if node.kwargs.get("is_causal"):
            logits = logits.masked_fill(~torch.ones(total, total, dtype=torch.bool).tril(), float("-inf"))
        if bias is not None:
            index = parts["index"]
            where = index if soft else index.gather(1, copies)
            if soft or placed:
                bias = bias.gather(2, where[:, None, :, None].expand(-1, heads, -1, bias.shape[-1]))
                bias = bias.gather(3, where[:, None, None].expand(-1, heads, bias.shape[2], -1))
            logits = logits + bias
        if not soft and not (reduction.fuse == "sized" and reduction.proportional):
            present = torch.zeros(rows, total, dtype=torch.bool).scatter(1, parts["index"], True)
            logits = logits.masked_fill(~present[:, None, None], float("-inf"))
        out = _softmax(logits) @ value
        if soft or "spread" in parts:
            spread = torch.zeros(rows, total, left, dtype=torch.float64)
            spread[:, :start, :start] = torch.eye(start)
            spread[:, start : start + before, start : start + count] = parts["spread"].double()
            spread[:, start + before :, start + count :] = torch.eye(total - start - before)
            if not soft:
                out = out.gather(2, parts["index"][:, None, :, None].expand(-1, heads, -1, out.shape[-1]))
            out = torch.einsum("bnm,bhmd->bhnd", spread, out)
        if "base" in parts:
            base = parts["base"].unflatten(2, (heads, -1)).transpose(1, 2).double()
            removed = torch.ones(rows, total, dtype=torch.bool).scatter(1, parts["index"], False)
            out = torch.where(removed[:, None, :, None], base, out)
        out = out.to(values[node.args[0]].dtype)
        return out if apart is None else out.unflatten(0, apart).movedim(1, reduction.dims[0])

    # -- where tokens are ----------------------------------------------------------------------------------------------

    def _where(self, node: fx.Node, shadow: Tensor, state: _State, what: str) -> _Where:
        where = self._locate(node, shadow, state)
        if where is None:
            raise NoTwin(f"the tokens of {what} ({_label(node)}) are in no order that is known")
        return where

    def _locate(self, node: fx.Node, shadow: Tensor, state: _State) -> _Where | None:
        """Where the NaN of a shadow say that the segment is; ``node`` has the same dimensions up to the last."""
        absent, missing = state.absent, shadow.isnan()
        batch, shape = len(absent), shadow.shape
        value = node.meta.get("val")
        symbolic = [
            i for i, size in enumerate(value.shape if isinstance(value, Tensor) else ())
            if not isinstance(size, int) and value.dim() == shadow.dim()
        ]  # fmt: skip
        for at in symbolic or [i for i, size in enumerate(shape) if size >= batch and size % batch == 0]:
            expected = absent.repeat_interleave(shape[at] // batch, 0)
            for first in range(shadow.dim()):
                for last in range(first, shadow.dim()):
                    size = shape[first : last + 1].numel()
                    if first <= at <= last or size < state.n:
                        continue
                    x = missing.movedim((at, *range(first, last + 1)), tuple(range(last - first + 2)))
                    x = x.reshape(shape[at], size, -1)
                    some = x.any(-1)
                    if not (some == x.all(-1)).all():
                        continue
                    for offset in range(size - state.n + 1):
                        stop = offset + state.n
                        if some[:, :offset].any() or not some[:, offset:].any():
                            break
                        if (some[:, offset:stop] == expected).all() and not some[:, stop:].any():
                            return _Where(at, first, last, offset)
        return None

    @staticmethod
    def _moved(value: Tensor, shadow: Tensor, where: _Where, change: Callable[[Tensor], Tensor], n: int) -> Tensor:
        """A value that is broadcast beside a shadow, with the rows [R, n, C] of the segment changed."""
        value = value.reshape([1] * (shadow.dim() - value.dim()) + list(value.shape))
        tokens = range(where.first, where.last + 1)
        if any(value.shape[d] != shadow.shape[d] for d in tokens):
            return value
        if value.shape[where.batch] == 1:
            value = value.expand(*(shadow.shape[d] if d == where.batch else -1 for d in range(value.dim())))
        order = [where.batch, *tokens, *(d for d in range(value.dim()) if d != where.batch and d not in tokens)]
        front = value.permute(order)
        flat = front.flatten(1, len(tokens))
        flat = flat.flatten(2) if flat.dim() > 2 else flat[..., None]
        stop = where.offset + n
        flat = torch.cat([flat[:, : where.offset], change(flat[:, where.offset : stop]), flat[:, stop:]], 1)
        if flat.shape[1] == front.shape[1 : 1 + len(tokens)].numel():
            flat = flat.reshape(front.shape)
        elif len(tokens) == 1:
            flat = flat.reshape(len(flat), -1, *front.shape[2:])
        else:
            raise NoTwin("fewer tokens of a grid are returned")
        return flat.permute([order.index(d) for d in range(len(order))])

    def _reduced(
        self, value: Tensor, shadow: Tensor, where: _Where, state: _State, since: _State | None = None
    ) -> Tensor:
        """A value of the stream that went around some reductions, reduced alike."""
        steps = []
        for step in state.chain:
            if step is since:
                break
            steps.append(step)
        for step in reversed(steps):
            mixes = step.reduction.fuse in ("sized", "mean") and value.dim() == 3 and value.shape == step.shape
            mixes |= step.reduction.fuse == "soft" and "spread" in step.parts
            change = step.merge if mixes else lambda x, step=step: _rows(x, step.origin)
            value = self._moved(value, shadow, where, change, step.n)
        return value

    def _bring(self, node: fx.Node, value: Tensor, shadow: _Shadow, state: _State) -> tuple[Tensor, _Shadow]:
        """A value from before some reductions."""
        where = self._where(node, shadow.value, shadow.state, "a value that goes around a reduction")
        value = self._reduced(value, shadow.value, where, state, shadow.state)
        absent = lambda x: x.masked_fill(  # noqa: E731
            state.absent.repeat_interleave(x.shape[0] // len(state.absent), 0)[..., None], _NAN
        )
        return value, _Shadow(self._moved(shadow.value, shadow.value, where, absent, state.n), state)

    # -- reducing and restoring ----------------------------------------------------------------------------------------

    def _parts(self, reduction: Reduction) -> dict[str, Tensor]:
        parts = {part: self.values[name] for part, name in reduction.nodes.items() if name in self.values}
        check_plan(reduction, parts)
        return parts

    def _cut(self, node: fx.Node, value: Tensor, number: int) -> Tensor:
        reduction = self.record.reductions[number]
        parts = self._parts(reduction)
        parent = None if reduction.parent is None else self.states[reduction.parent]
        batch_dim, token_dim = reduction.dims
        x = value.movedim((batch_dim, token_dim), (0, 1))
        samples, n = x.shape[0], reduction.before if parent is None else parent.n
        home, copied = _homes(reduction, parts) if reduction.count else (torch.full((samples, n), -1),) * 2
        start, count = reduction.start, reduction.count
        kept = parts["index"][:, start : start + count] - start
        if parent is None:
            standing, member = kept, home
            weight = torch.ones(samples, n)
            if "size_before" in parts:
                weight = parts["size_before"][:, start : start + n]
        else:
            standing, weight = parent.standing.gather(1, kept), parent.weight
            member = torch.where(parent.member < 0, -1, home.gather(1, parent.member.clamp_min(0)))
            copied = copied.gather(1, parent.copied)
        gone = torch.zeros(samples, count, dtype=torch.bool)
        if "size" in parts:
            gone = parts["size"][:, start : start + count] == 0
        sized = reduction.fuse == "sized" or (reduction.fuse == "soft" and "size" in parts)
        state = _State(reduction, parent, standing, member, copied, sized, weight, gone, parts, value.shape)
        self.states[number] = state
        shadow = self.shadows.get(node)
        if shadow is not None and shadow.state is not parent:
            value, shadow = self._bring(node, value, shadow, parent)
            x = value.movedim((batch_dim, token_dim), (0, 1))
        if reduction.restore == "canvas":
            state.canvas = value if shadow is None else torch.where(shadow.value.isnan(), parent.canvas, value)
        segment = slice(start, start + n)
        new = x.clone()
        new[:, segment] = state.merge(x[:, segment])
        missing = new.clone()
        missing[:, segment] = new[:, segment].masked_fill(state.absent[..., None], _NAN)
        new, missing = (t.movedim((0, 1), (batch_dim, token_dim)) for t in (new, missing))
        if reduction.until is not None:
            self.until[reduction.until] = state
        if reduction.readers is not None:
            self.beside[node] = (new, _Shadow(missing, state), reduction.readers)
            return value
        self.shadows.pop(node, None)
        return self._mark(node, new, missing, state)

    def left(self, node: fx.Node, value: Tensor, shadow: _Shadow) -> Tensor:
        """A value without what is absent, in the order of the tokens left."""
        where = self._where(node, shadow.value, shadow.state, "an output")
        return self._moved(value, shadow.value, where, lambda x: _rows(x, shadow.state.standing), shadow.state.n)

    def returned(self, node: fx.Node, value: Tensor, shadow: _Shadow | None, like: Tensor) -> Tensor:
        """An output, with as many tokens as what it is compared with."""
        if shadow is None:
            return value
        return self._fill(node, value, shadow) if value.shape == like.shape else self.left(node, value, shadow)

    def _fill(self, node: fx.Node, value: Any, shadow: _Shadow) -> Any:
        """A value with what is restored in place of what is absent."""
        state, missing = shadow.state, shadow.value
        if not isinstance(value, Tensor):
            return value
        restore = state.reduction.restore
        if restore == "zero":
            return value.masked_fill(missing.isnan(), 0.0)
        if state.canvas is not None and value.shape == state.canvas.shape:
            return torch.where(missing.isnan(), state.canvas, value)
        steps = list(state.chain)
        if restore == "cached" and "base" in steps[-1].parts:
            return torch.where(missing.isnan(), steps[-1].parts["base"].expand_as(value), value)
        if "whole" not in state.parts and not any("spread" in s.parts for s in steps):
            return value  # the copies
        if not _nan(missing):
            return value
        where = self._where(node, missing, state, "a value that is restored")

        def change(x: Tensor) -> Tensor:
            rows = _rows(x, state.standing).double()
            each = lambda m: m.double().expand(len(state.member), -1, -1).repeat_interleave(  # noqa: E731
                x.shape[0] // len(state.member), 0)  # fmt: skip
            if "whole" in state.parts:
                return (each(state.parts["whole"]) @ rows).to(x.dtype)
            for step in steps:
                if "spread" in step.parts:
                    rows = each(step.parts["spread"]) @ rows
                else:
                    rows = _rows(rows, _homes(step.reduction, step.parts)[1])
            return rows.to(x.dtype)

        return self._moved(value, missing, where, change, state.n)


def _softmax(logits: Tensor) -> Tensor:
    """A softmax that is zero where no key is seen, as that of `tokenopt.attention`."""
    return logits.softmax(-1).masked_fill((logits == float("-inf")).all(-1, keepdim=True), 0.0)


def _additive(bias: Tensor) -> Tensor:
    if bias.dtype is torch.bool:
        return torch.zeros(bias.shape, dtype=torch.float64).masked_fill(~bias, float("-inf"))
    return bias.double()


def _nan(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point and bool(value.isnan().any())


def _share(value: Any) -> float:
    """How much of a value is NaN."""
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point or not value.numel():
        return 0.0
    return int(torch.count_nonzero(value != value)) / value.numel()


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """An argument by its name in the operation's schema."""
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, default)
    return default


def _label(node: fx.Node) -> str:
    return f"{node.name} ({module_path(node) or node.target})"


# -- comparing ---------------------------------------------------------------------------------------------------------


def _compared(
    source: str, tensors: Sequence[Tensor], names: Sequence[str], expected: list[Tensor], results: list[Tensor]
) -> Check:
    outputs = dict(zip(names, compare(expected, results), strict=True))
    return Check("twin", source, len(tensors[0]), TOLERANCE, outputs)


def prove_twin(record: Record, rewritten: Program, given: Sequence[Tensor] | None = None) -> list[dict[str, Any]]:
    """Checks reductions at their real schedule: rows of a report's ``parity``.

    Args:
        record: what was done to which program.
        rewritten: the program that must equal the twin: ``record.after``, or what is left of it in the end.
        given: inputs to check on beside random and example ones, as flat tensors for the dense program.

    Raises:
        ParityError: if the program does not run, a plan is no plan or results differ; naming the first operation that
            differs.
    """
    dense = record.before
    drawn = flatten_tensors(dense.random_inputs(_SAMPLES, _SEED))
    rows = []
    own = ("example", flatten_tensors(dense.example_inputs)) if given is None else ("data", dense.complete(given))
    for source, tensors in (("random", drawn), own):
        try:
            expected, results = expected_of(record, tensors)
        except NoTwin as reason:
            return [{"check": "twin", "inputs": "none", "batch": None, "tolerance": TOLERANCE, "passed": True,
                     "outputs": [], "note": f"no twin: {reason}; proven by the identity and influence"}]  # fmt: skip
        if rewritten is not record.after:
            args, kwargs = rewritten.bind(rewritten.complete(tensors))
            results = rewritten.flat(*args, **kwargs)[: len(expected)]
        names = [spec.name for spec in dense.outputs]
        check = _compared(source, tensors, names, expected, results)
        if not check.passed:
            require([check], first_difference(record, tensors))
        rows.append(check.to_dict())
    return rows


def expected_of(record: Record, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What a rewritten program must return for some inputs of the one before it, and what it returns.

    Raises:
        NoTwin: if the twin is not known.
        ParityError: if a plan is no plan.
    """
    names = {name for reduction in record.reductions for name in reduction.nodes.values()}
    results, values = runs(record.after, record.after.complete(tensors), names)
    twin = Twin(record, values)
    try:
        twin.call(tensors)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise NoTwin(f"{_label(twin.at_node)} cannot be followed ({' '.join(str(error).split())[:200]})") from error
    pairs = zip(record.before.output_nodes, twin.outputs, results, strict=False)
    return [twin.returned(node, *output, result) for node, output, result in pairs], results[: len(twin.outputs)]


def first_difference(record: Record, tensors: Sequence[Tensor]) -> str | None:
    """The first operation at which a rewritten program differs from its twin, for people to read."""
    names = {n.name for n in record.before.graph.nodes} | {n for r in record.reductions for n in r.nodes.values()}
    _, values = runs(record.after, record.after.complete(tensors), names)
    found: list[str] = []

    def compare(node: fx.Node, expected: Tensor) -> None:
        value = values.get(node.name)
        if found or not isinstance(value, Tensor) or value.shape != expected.shape:
            return
        difference = (value.double() - expected.double()).abs().max() if value.numel() else torch.zeros(())
        if not difference <= _VISIBLE * expected.double().abs().max():
            found.append(_label(node))

    Twin(record, values, compare).call(tensors)
    return found[0] if found else None
