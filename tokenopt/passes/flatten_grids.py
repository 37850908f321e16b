"""flatten-grids: a stream of tokens kept as a grid becomes a sequence, where attention reads all of it as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tokenopt.analysis.axes import AxisMap, propagate, tensor_operands
from tokenopt.analysis.sites import find_sites
from tokenopt.analysis.terms import Terms, length
from tokenopt.graph import GraphEditor
from tokenopt.pipeline import Pass, PassResult
from tokenopt.program import Edit, Program

aten = torch.ops.aten

_SAME = {aten.clone.default, aten.dropout.default, aten._to_copy.default, aten.to.dtype, aten.contiguous.default}
_LAST = {aten.linear.default, aten.layer_norm.default, aten.rms_norm.default}
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclass(frozen=True)
class FlattenGrids(Pass):
    """Computes what is per token on [B, H W, C] instead of [B, H, W, C], in models where some attention is over H W.

    Norms, projections, MLPs and residual sums of such models (SAM and ViTDet, the last stage of Swin) are then those of
    a sequence, and its tokens can be reduced; windows and convolutions get the grid as before.

    Rewrite:  linear(x)  ->  unflatten(linear(flatten(x)))
    """

    name: ClassVar[str] = "flatten-grids"

    def run(self, program: Program) -> PassResult:
        axes = propagate(program)
        editor = GraphEditor(program)
        sites = [s for s in find_sites(axes)[0] if s.raised and s.kind == "self" and s.axis is not None]
        sequences = {s.axis.terms: s.id for s in sites if axes.dims(s.node.args[0])[0] == axes.batch}
        edits = []
        for terms, where in sequences.items():
            count = _Flattening(editor, axes, terms).run() if len(terms) > 1 else 0
            if count:
                edits.append(Edit(self.spec, where, count))
        if edits:
            editor.finish()
        return PassResult(edits)


class _Flattening:
    """One walk that gives every value of a grid, as far as it is computed per token, a flat twin."""

    def __init__(self, editor: GraphEditor, axes: AxisMap, terms: Terms) -> None:
        self.editor, self.axes, self.terms = editor, axes, terms
        self.flat: dict[fx.Node, fx.Node] = {}

    def run(self) -> int:
        """How many operations were rewritten; none if no sum of two streams is among them."""
        nodes = [n for n in self.editor.graph.nodes if n.op == "call_function"]
        per_token = [n for n in nodes if self._is_grid(n) and self._is_per_token(n)]
        if not any(n.target is aten.add.Tensor and len(self._grids(n)) == 2 for n in per_token):
            return 0
        chosen = set(per_token)
        for node in nodes:
            if node in chosen:
                self._twin(node)
            elif node.target in _RESHAPES and node.args[0] in self.flat:
                node.args = (self.flat[node.args[0]], *node.args[1:])
        return len(per_token)

    def _is_grid(self, node: fx.Node) -> bool:
        """Whether a value is [rows, ...grid, C], its grid the sequence and C features."""
        dims = self.axes.dims(node) if isinstance(node.meta.get("val"), Tensor) else None
        return dims is not None and len(dims) > 3 and sum(dims[1:-1], ()) == self.terms and all(dims[1:-1])

    def _is_per_token(self, node: fx.Node) -> bool:
        rank = node.meta["val"].dim()
        if node.target in _LAST:
            per_token = node.target is aten.linear.default or len(node.args[1]) == 1
            return per_token and self._is_grid(node.args[0])
        if node.target not in _SAME and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            return False
        others = [n for n in tensor_operands(node) if not self._is_grid(n)]
        return bool(self._grids(node)) and all(_is_spread(n.meta["val"], rank) for n in others)

    def _grids(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in tensor_operands(node) if self._is_grid(n)]

    def _twin(self, node: fx.Node) -> None:
        rank = node.meta["val"].dim()
        whole = [n for n in tensor_operands(node) if n.meta["val"].dim() == rank]
        swap = {n: self._flat(n) for n in whole}
        args, kwargs = (fx.map_arg(a, lambda n: swap.get(n, n)) for a in (node.args, node.kwargs))
        twin = self.editor.insert(node, node.target, *args, **kwargs)
        grid = self.editor.insert(twin, aten.unflatten.int, twin, 1, [length(d) for d in self.axes.dims(node)[1:-1]])
        self.axes.alias(grid, node)
        self.flat[grid] = twin
        node.replace_all_uses_with(grid)

    def _flat(self, node: fx.Node) -> fx.Node:
        if node not in self.flat:
            sizes = _flat_sizes(node)
            if sizes is not None:
                self.flat[node] = self.editor.insert(node, aten.reshape.default, node.args[0], sizes)
            else:
                rank = node.meta["val"].dim()
                self.flat[node] = self.editor.insert(node, aten.flatten.using_ints, node, 1, rank - 2)
        return self.flat[node]


def _is_spread(value: Any, rank: int) -> bool:
    """Whether an operand is the same for all tokens of a sample, and still is where the grid is flat."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return True
    return value.dim() == rank and all(s == 1 for s in value.shape[1:-1])


def _flat_sizes(node: fx.Node) -> list[Any] | None:
    """The sizes of a reshape to a grid, with the grid flat."""
    if node.target not in _RESHAPES:
        return None
    first, *grid, last = node.args[1]
    if not all(isinstance(s, int) and s > 0 for s in grid):
        return None
    return [first, torch.Size(grid).numel(), last]
