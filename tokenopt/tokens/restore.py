"""Restores: where all tokens are needed again, what those get that were removed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from tokenopt.errors import IllegalReduction
from tokenopt.graph import GraphEditor
from tokenopt.tokens.plan import Plan, Refused, Stream
from tokenopt.tokens.primitive import Primitive

aten = torch.ops.aten
ops = torch.ops.tokenopt


class Restore(Primitive, kind="restore"):
    """What removed tokens get where all are needed.

    Attributes:
        outputs: whether outputs of the model are restored, too.
        ends: whether it must happen on the stream itself, behind the last block, and not where a need arises.
        anywhere: whether it goes with every value of the stream's tokens, not with the stream alone.
        together: whether reductions that end at one place are restored at once, from what the first of them has.
    """

    outputs = True
    ends = False
    anywhere = False
    together = False

    def build(self, stream: Stream, plan: Plan) -> Plan:
        """The plan with what is restored from."""
        return plan


@dataclass(frozen=True)
class Copy(Restore, name="copy"):
    """each gets the value of the token it was merged into (or is most like), or its mixture back"""


@dataclass(frozen=True)
class Virtual(Restore, name="virtual"):
    """as copy, and attention with position terms sees all tokens at their positions; its result is averaged back

    For what follows with rotary positions, such as a decoder: its linear layers and norms run on the merged tokens.

    Source: Wang et al., DyMU, arXiv:2504.17040 (virtual token unmerging, the practical form).
    """


@dataclass(frozen=True)
class Nothing(Restore, name="none"):
    """as copy inside the model, but outputs keep the reduced tokens"""

    outputs = False


@dataclass(frozen=True)
class Zero(Restore, name="zero"):
    """each gets zeros: inside attention, it is not updated"""

    ends = True
    anywhere = True

    def build(self, stream: Stream, plan: Plan) -> Plan:
        def zeros(kept: fx.Node, total: int) -> fx.Node:
            shape = [stream.batch, total, *kept.meta["val"].shape[2:]]
            return stream.insert(aten.new_zeros.default, kept, shape)

        return replace(plan, base=zeros)


@dataclass(frozen=True)
class Canvas(Restore, name="canvas"):
    """each keeps the features that it had when it was removed, as a finished token keeps what it said

    Source: Tang et al., Dynamic Token Pruning in Plain Vision Transformers, arXiv:2308.01045.
    """

    ends = True

    def build(self, stream: Stream, plan: Plan) -> Plan:
        return replace(plan, base=lambda kept, total: stream.rows)


@dataclass(frozen=True)
class Interpolate(Restore, name="interpolate"):
    """each gets the mean of the kept ones, weighted by their distance on the grid to the power of -``power``"""

    power: float = 2.0

    def spread(self, editor: GraphEditor, index: fx.Node, grid: tuple[int, ...] | None) -> fx.Node:
        """The weights of the kept tokens (their positions on the grid, [B, M]) in each token: [B, N, M].

        Raises:
            IllegalReduction: if the tokens form no grid.
        """
        if grid is None:
            raise IllegalReduction("tokens that form no grid cannot be interpolated", hint="restore='copy'")
        return editor.insert(index, ops.grid_interpolation.default, index, list(grid), self.power)


@dataclass(frozen=True)
class Cached(Restore, name="cached"):
    """each gets what it had in the previous run: one more input and one more output of the model per place

    For steps that resemble each other, as in diffusion: feed the last outputs back; start with zeros, or with those of
    a step that removes nothing. The input of layer 3 is called cache_3; the outputs follow the model's own, by layer.
    Reductions that end at one place share those of the first: which tokens reach a later one changes from run to run.
    """

    ends = True
    anywhere = True
    together = True
    input: str = "cache"

    def build(self, stream: Stream, plan: Plan) -> Plan:
        name = f"{self.input}_{stream.layer}"
        samples = next(n.meta["val"] for n in stream.editor.program.user_inputs if isinstance(n.meta["val"], Tensor))
        if str(stream.rows.meta["val"].shape[0]) != str(samples.shape[0]):  # compared as text: no guard on a symbol
            why = "its windows or frames are reduced each by itself, and a cache holds one sequence for each sample"
            raise Refused(why, "restore copy")

        def cache(kept: fx.Node, total: int) -> fx.Node:
            value = kept.meta["val"]
            return stream.editor.input(name, (total, *value.shape[2:]), value.dtype)

        return replace(plan, base=cache, returned=f"next_{name}")
