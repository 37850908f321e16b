"""Places: where in a model tokens are reduced, and where they come back."""

from __future__ import annotations

from dataclasses import dataclass

from tokenopt.analysis.cuts import StreamCut, features_behind
from tokenopt.analysis.sites import AttentionSite
from tokenopt.tokens.plan import Refused, Region, layer_number
from tokenopt.tokens.primitive import Primitive


class Place(Primitive, kind="place"):
    """Where tokens are reduced.

    Attributes:
        streams: whether it reduces the stream, which needs a legal cut; inside attention it does not.
        outputs: whether it is the model's outputs that it shortens.
        empties: whether it removes the whole segment, whatever the schedule says.
        sketch: the lines of a model that it is about, for people to read; "{reduce x}" and "{restore x}" are what a
            recipe inserts.
    """

    streams = True
    outputs = False
    empties = False
    sketch: tuple[str, ...] = ("...", "{reduce x}", "...", "{restore x}")

    def regions(self, cuts: list[StreamCut], sites: list[AttentionSite], hoist: bool) -> list[Region]:
        """The stretches that run on fewer tokens, in order.

        Args:
            cuts: those of one segment, in order.
            sites: the attentions over its sequence.
            hoist: nothing but attention decides, and nothing is fused: a reduction commutes with what is per token.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Mid(Place, name="mid"):
    """between attention and MLP of each scheduled layer"""

    sketch = ("x = x + attention(x)", "{reduce x}", "x = x + mlp(x)", "...", "{restore x}")

    def regions(self, cuts: list[StreamCut], sites: list[AttentionSite], hoist: bool) -> list[Region]:
        return [Region(c.site, c.layer, c.after, known=c.site, cut=c) for c in cuts]


@dataclass(frozen=True)
class Block(Place, name="block"):
    """before each scheduled layer, between blocks"""

    sketch = ("{reduce x}", "x = x + attention(x)", "x = x + mlp(x)", "...", "{restore x}")

    def regions(self, cuts: list[StreamCut], sites: list[AttentionSite], hoist: bool) -> list[Region]:
        return [Region(c.site, c.layer, c.entry, known=_before(c.layer, sites), cut=c) for c in cuts]


@dataclass(frozen=True)
class Range(Place, name="range"):
    """before one layer, once; behind another all tokens come back

    Args:
        first, last: numbers from 0, negative ones from the last, or shares of the depth.
    """

    first: int | float = 0.5
    last: int | float = -1

    sketch = ("{reduce x}", "for block in blocks[first to last]:", "    x = block(x)", "{restore x}")

    def regions(self, cuts: list[StreamCut], sites: list[AttentionSite], hoist: bool) -> list[Region]:
        layers = len(sites)
        first, last = layer_number(self.first, layers), layer_number(self.last, layers)
        inside = [c for c in cuts if first <= c.layer <= last]
        if not inside:
            raise Refused(f"no layer from {first} to {last} can be reduced", f"there are layers 0 to {layers - 1}")
        begin, end = inside[0], inside[-1]
        return [Region(begin.site, begin.layer, begin.entry, end.leave, _before(begin.layer, sites), cut=begin)]


@dataclass(frozen=True)
class Attention(Place, name="attention"):
    """inside each scheduled attention: the stream itself keeps all its tokens

    Args:
        of: "input" reduces what queries, keys and values are projected from, "qkv" these three themselves.
        downsample: only where the sequence is at least the longest one divided by the square of this.
    """

    of: str = "input"
    downsample: int = 0

    streams = False

    @property
    def sketch(self) -> tuple[str, ...]:
        if self.of == "qkv":
            inside = ("q, k, v = qkv(norm(x))", "{reduce q, k, v}", "h = attention(q, k, v)", "{restore h}")
            return (*inside, "x = x + projection(h)")
        return ("h = norm(x)", "{reduce h}", "h = attention(h)", "{restore h}", "x = x + h")

    def regions(self, cuts: list[StreamCut], sites: list[AttentionSite], hoist: bool) -> list[Region]:
        if self.of not in ("input", "qkv"):
            raise Refused(f"attention has no {self.of!r} to reduce", "of=input or of=qkv")
        if self.of == "qkv":
            return [Region(s, i, None, known=s) for i, s in enumerate(sites)]
        return [
            Region(c.site, c.layer, c.input, c.update, _before(c.layer, sites), c.update, c)
            for c in cuts
            if c.input is not None
        ]


@dataclass(frozen=True)
class Output(Place, name="output"):
    """once, where the encoder's features leave"""

    outputs = True
    sketch = ("x = encoder(image)", "{reduce x}", "return x")

    def regions(self, cuts: list[StreamCut], sites: list[AttentionSite], hoist: bool) -> list[Region]:
        last = cuts[-1]
        after = last.after if hoist else features_behind(last.leave)
        return [Region(last.site, last.layer, after, known=last.site, cut=last)]


@dataclass(frozen=True)
class Exit(Place, name="exit"):
    """before one layer all tokens of the segment leave for good

    Args:
        layer: a number from 0, a negative one from the last, or a share of the depth.
    Source: the static form of DyVTE (Wu et al., arXiv:2411.19628) and of ToDRE's second stage (arXiv:2505.18757).
    """

    layer: int | float = 0.875

    empties = True
    sketch = ("{reduce x}", "for block in blocks[layer to last]:", "    x = block(x)", "{restore x}")

    def regions(self, cuts: list[StreamCut], sites: list[AttentionSite], hoist: bool) -> list[Region]:
        number = layer_number(self.layer, len(sites))
        return [
            Region(c.site, c.layer, c.entry, known=_before(c.layer, sites), cut=c) for c in cuts if c.layer == number
        ]


def _before(layer: int, sites: list[AttentionSite]) -> AttentionSite | None:
    return sites[layer - 1] if layer else None
