"""Scores: how much a token is worth keeping. Larger is better; one number per token, float32 [B, N].

Scores from attention read a few rows, or weighted sums of rows, of one layer's probabilities; no other layer gives up
its fused attention, and no N x N matrix is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tokenopt.analysis.axes import tensor_operands
from tokenopt.analysis.sites import AttentionSite
from tokenopt.tokens.learned import load_scorer
from tokenopt.tokens.plan import Refused, Stream, logits_of
from tokenopt.tokens.primitive import Primitive

aten = torch.ops.aten
ops = torch.ops.tokenopt


class Score(Primitive, kind="score"):
    """How much each token is worth keeping.

    ``reads_rows`` says whether it looks at the tokens themselves, rather than at an attention or the input.
    """

    reads_rows = False

    def build(self, stream: Stream) -> fx.Node:
        """The score of every token of the sequence, [B, total]. Raises: Refused."""
        raise NotImplementedError


@dataclass(frozen=True)
class ClassRow(Score, name="cls_row"):
    """how much the class token attends to a token, averaged over heads

    Args:
        otherwise: "received" takes the attention received from all tokens where there is no class token.
    """

    layer: int | float | None = None
    otherwise: str = "refuse"

    def build(self, stream: Stream) -> fx.Node:
        site = stream.site(self.layer)
        cls = stream.special("cls", site) if site.axis is not None else None
        if cls is None and self.otherwise == "received":
            return stream.received(site)
        if cls is None:
            why = "it scores by the class token's attention, and there is no class token"
            raise Refused(why, "score with received, or use a recipe without a class token, such as tome")
        return stream.probe(site, cls.start)


@dataclass(frozen=True)
class LastRow(Score, name="last_row"):
    """how much the last token attends to a token, averaged over heads"""

    layer: int | float | None = None

    def build(self, stream: Stream) -> fx.Node:
        site = stream.site(self.layer)
        return stream.probe(site, site.node.args[0].meta["val"].shape[-2] - 1)


@dataclass(frozen=True)
class SegmentRows(Score, name="text_rows"):
    """how much the tokens of another segment, the text by default, attend to a token"""

    layer: int | float | None = None
    segment: str = "text"

    def build(self, stream: Stream) -> fx.Node:
        site = stream.site(self.layer)
        named = [s for s in site.axis.segments if s.name == self.segment]
        if not named:
            names = ", ".join(s.name for s in site.axis.segments)
            raise Refused(f"{site.id} has no segment {self.segment!r}, but {names}", "name one of them")
        rows = named[-1]  # a question comes behind the image, a system prompt before
        if site.causal and rows.start < stream.segment.start:
            raise Refused(f"segment {self.segment!r} comes before the tokens and does not see them", "score=last_row")
        start = rows.start
        if rows.start > stream.segment.start:  # behind the reduced tokens
            start += site.node.args[0].meta["val"].shape[-2] - site.axis.length
        return stream.probe(site, start, rows.length)


@dataclass(frozen=True)
class Received(Score, name="received"):
    """how much all tokens attend to a token, on average; needs no class token"""

    layer: int | float | None = None

    def build(self, stream: Stream) -> fx.Node:
        return stream.received(stream.site(self.layer))


@dataclass(frozen=True)
class SentMass(Score, name="sent_mass"):
    """how much of a token's value is sent to other tokens: what they attend to it, without itself

    Source: the message passing of DependencyViT (Ding et al., Visual Dependency Transformers, arXiv:2304.03282) without
    its learned gates, which an ordinary model does not have.
    """

    layer: int | float | None = None

    def build(self, stream: Stream) -> fx.Node:
        return stream.received(stream.site(self.layer), exclude_self=True)


@dataclass(frozen=True)
class SinkRows(Score, name="sink_rows"):
    """what the attention sinks attend to: the rows of the tokens that receive more than ``threshold`` times the mean

    Source: Yang et al., VFlowOpt, arXiv:2508.05211. If no token receives so much, the one that receives most.
    """

    layer: int | float | None = None
    threshold: float = 30.0

    def build(self, stream: Stream) -> fx.Node:
        site = stream.site(self.layer)
        if site.axis is None or site.kind != "self":
            raise Refused(f"{site.id} attends over several streams", "score with received")
        logits, options = logits_of(site)
        insert = stream.editor.insert
        received = insert(site.node, ops.attention_received.default, *logits, None, **options)
        start, total = stream.segment.start, site.node.args[1].meta["val"].shape[-2]
        stop = total - (site.axis.length - start - stream.segment.length)
        return stream.received(site, insert(received, ops.sink_rows.default, received, self.threshold, start, stop))


@dataclass(frozen=True)
class Accumulated(Score, name="accumulated"):
    """another score summed over layers, from a share of the depth to the latest layer"""

    of: Score = field(default_factory=ClassRow)
    since: float = 0.0

    def build(self, stream: Stream) -> fx.Node:
        if not hasattr(self.of, "layer"):
            raise Refused(f"score {self.of.name} is not that of one layer", "accumulate a score from attention")
        last = stream.sites.index(stream.site())
        first = min(int(self.since * len(stream.sites)), last)
        scores = [replace(self.of, layer=layer).build(stream) for layer in range(first, last + 1)]
        total = scores[0]
        for score in scores[1:]:
            total = stream.insert(aten.add.Tensor, total, score)
        return total


@dataclass(frozen=True)
class Rollout(Score, name="rollout"):
    """how much a token reaches the class token (or all, without one) through the layers up to here

    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, arXiv:2005.00928, as in DCAL (Zhu et al.,
    arXiv:2205.02151): the product over layers of (A + I) / 2. It is read as one row, from the last layer back.
    """

    layer: int | float | None = None

    def build(self, stream: Stream) -> fx.Node:
        last = stream.site(self.layer)
        sites = stream.sites[: stream.sites.index(last) + 1]
        lengths = {s.node.args[1].meta["val"].shape[-2] for s in sites}
        if len(lengths) != 1 or any(s.axis is None or s.axis.terms != last.axis.terms for s in sites):
            raise Refused("rollout needs the same tokens in all layers up to here", "reduce at one layer only")
        count = lengths.pop()
        cls = stream.special("cls", last)
        row = torch.full((1, count), 1.0 / count)
        if cls is not None:
            row = torch.zeros(1, count)
            row[0, cls.start] = 1.0
        weight = stream.constant("rollout", row)
        for site in reversed(sites):
            logits, options = logits_of(site)
            if site is last and cls is not None:  # one row is all that is read of it
                read = stream.insert(ops.attention_probe.default, *logits, cls.start, 1, **options)
            else:
                read = stream.insert(ops.attention_received.default, *logits, weight, **options)
            passed = stream.insert(aten.mul.Tensor, read, 0.5)
            weight = stream.insert(aten.add.Tensor, passed, stream.insert(aten.mul.Tensor, weight, 0.5))
        return stream.of_keys(weight, last)


@dataclass(frozen=True)
class Norm(Score, name="norm"):
    """the length of a token's key (of the latest attention, averaged over heads) or of its features"""

    of: str = "key"

    @property
    def reads_rows(self) -> bool:
        return self.of == "hidden"

    def build(self, stream: Stream) -> fx.Node:
        return stream.insert(ops.token_norm.default, features(stream, self.of))


@dataclass(frozen=True)
class Energy(Score, name="energy"):
    """minus PiToMe's energy: a token is worth less the more tokens are like it

    The margin is ``margin`` (1 - depth): 0.9 in the first layer. ``shifted`` subtracts the margin from similarities
    above it, as the official code does and the paper does not.

    Source: Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, arXiv:2405.16148.
    """

    margin: float = 0.9
    alpha: float = 1.0
    shifted: bool = False

    def build(self, stream: Stream) -> fx.Node:
        return stream.insert(aten.neg.default, self.energy(stream))

    def energy(self, stream: Stream) -> fx.Node:
        margin = self.margin * (1.0 - stream.layer / len(stream.sites))
        return stream.insert(ops.token_energy.default, features(stream, "key"), margin, self.alpha, self.shifted,
                             stream.start, stream.stop)  # fmt: skip


@dataclass(frozen=True)
class Transition(Score, name="transition"):
    """how much attention and MLP change a token, in direction and length, summed over the blocks before this place

    ``absolute`` takes the size of the cosine, as the paper does; the official code takes the cosine.

    Source: Li et al., TransPrune, arXiv:2507.20630.
    """

    since: float = 0.0
    absolute: bool = True

    def build(self, stream: Stream) -> fx.Node:
        last = stream.sites.index(stream.site())
        first = min(int(self.since * len(stream.sites)), last)
        total: fx.Node | None = None
        for site in stream.sites[first : last + 1]:
            for before, after in self._modules(stream, site):
                if before.meta["val"].shape[1] != after.meta["val"].shape[1]:
                    raise Refused(f"in {site.id} all tokens come back, and it reads fewer", "use another score")
                start, stop = stream.start, before.meta["val"].shape[1] - (stream.total - stream.stop)
                change = stream.insert(ops.token_transition.default, before, after, self.absolute, start, stop)
                change = stream.of_keys(change, site)
                total = change if total is None else stream.insert(aten.add.Tensor, total, change)
        if total is None:
            raise Refused("no residual module lies before this place", "reduce later")
        return total

    def _modules(self, stream: Stream, site: AttentionSite) -> list[tuple[fx.Node, fx.Node]]:
        """(input, output) of the attention and of the MLP of a block, between norm and residual sum."""
        cut = next((c for c in stream.cuts if c.site is site), None)
        if cut is None or cut.input is None:
            raise Refused(f"{site.id} does not add to a stream of tokens", "use another score")
        pairs = [(stream.reduced(cut.input), cut.update)]
        if cut.leave is not cut.after and cut.leave < stream.rows or cut.leave is stream.rows:
            total = cut.leave if cut.leave.target is aten.add.Tensor else cut.leave.all_input_nodes[0]
            before = _normed(stream.reduced(cut.after), total)
            added = [n for n in tensor_operands(total) if n > cut.after and n is not before]
            if total.target is aten.add.Tensor and added:
                pairs.append((before, added[0]))
        return pairs


def _normed(stream: fx.Node, total: fx.Node) -> fx.Node:
    """What the module reads that a residual sum adds: the norm of the stream, or the stream itself."""
    norms = [n for n in stream.users if "norm" in str(n.target) and n < total]
    return norms[0] if norms else stream


@dataclass(frozen=True)
class Pixels(Score, name="pixels"):
    """the variance or the entropy of the pixels of a patch

    Source: variance as in PixelWorld (Lyu et al., arXiv:2501.19339), entropy as in VFlowOpt (arXiv:2508.05211), of the
    gray values in 256 steps between the image's extremes.
    """

    of: str = "variance"

    def build(self, stream: Stream) -> fx.Node:
        if self.of not in ("variance", "entropy"):
            raise Refused(f"pixels have no {self.of!r} here", "of=variance or of=entropy")
        grid = stream.grid
        inputs = [_pixels(stream, n, grid) for n in stream.editor.program.user_inputs]
        image = next((n for n in inputs if n is not None), None)
        if image is None:
            raise Refused("no input of the model is an image that these tokens tile", "use a score from attention")
        if self.of == "variance":
            score = stream.insert(ops.patch_variance.default, image, list(grid))
        else:
            score = stream.insert(ops.patch_entropy.default, image, list(grid), 256)
        return padded(stream, score)


def _pixels(stream: Stream, node: fx.Node, grid: tuple[int, ...]) -> fx.Node | None:
    """An input that a grid tiles, as [B, C, ...]; the channels of a video may lie behind its frames."""
    sizes = node.meta["val"].shape[1:]
    if len(grid) < 2 or len(sizes) != len(grid) + 1 or not all(isinstance(s, int) for s in sizes):
        return None
    tiles = lambda which: all(s % g == 0 for s, g in zip(which, grid, strict=True))  # noqa: E731
    first, behind = tiles(sizes[1:]), len(grid) == 3 and tiles((sizes[0], *sizes[2:]))
    if first and (not behind or sizes[0] <= sizes[1]):  # of two readings, the one of fewer channels
        return node
    return stream.editor.insert(node, aten.permute.default, node, [0, 2, 1, 3, 4]) if behind else None


@dataclass(frozen=True)
class Centre(Score, name="centre"):
    """how unlike a token is to the mean of all of them; needs no class token"""

    reads_rows = True

    def build(self, stream: Stream) -> fx.Node:
        similar = stream.insert(ops.centre_similarity.default, stream.rows, stream.start, stream.stop)
        return stream.insert(aten.neg.default, similar)


@dataclass(frozen=True)
class Text(Score, name="text"):
    """how similar a token is to a text, whose embedding becomes one more input of the model, of shape [B, C]"""

    reads_rows = True

    def build(self, stream: Stream) -> fx.Node:
        width = stream.rows.meta["val"].shape[-1]
        text = stream.editor.input("text_embedding", (width,), stream.rows.meta["val"].dtype)
        return stream.insert(ops.text_similarity.default, stream.rows, text)


@dataclass(frozen=True)
class Foreground(Score, name="ncut"):
    """on which side of a normalised cut of the keys a token lies: the foreground is positive

    Source: Wang et al., TokenCut, arXiv:2209.00383; the eigenvector by ``iterations`` of power iteration.
    """

    layer: int | float | None = None
    threshold: float = 0.2
    iterations: int = 50

    def build(self, stream: Stream) -> fx.Node:
        keys = stream.keys(stream.site(self.layer))
        return stream.insert(ops.ncut_partition.default, keys, self.threshold, self.iterations, stream.start,
                             stream.stop)  # fmt: skip


@dataclass(frozen=True)
class Anchored(Score, name="anchored"):
    """the best tokens by one score with their neighbours on the grid first, then the others by another score

    Args:
        share: K kept tokens have share K / 5 anchors.
        reach: how many steps away, up, down, left and right, a neighbour is.
    Source: Liu et al., HiPrune, arXiv:2508.00553: anchors, buffers and registers.
    """

    anchor: Score = field(default_factory=lambda: Received(layer=0.35))
    rest: Score = field(default_factory=lambda: Received())
    share: float = 0.1
    reach: int = 1

    def build(self, stream: Stream) -> fx.Node:
        raise Refused("how many anchors there are depends on how many tokens are kept", "select with topk")

    def build_for(self, stream: Stream, keep: int) -> fx.Node:
        """The score, where ``keep`` tokens are to be kept."""
        anchors = round(self.share * keep / 5)
        anchor, rest = self.anchor.build(stream), self.rest.build(stream)
        return stream.insert(ops.boost_neighbours.default, anchor, rest, anchors, self.reach, list(stream.image),
                             stream.start, stream.stop)  # fmt: skip


@dataclass(frozen=True)
class WithoutSinks(Score, name="without_sinks"):
    """another score, but attention sinks, the tokens with massive activations, come last

    Args:
        threshold: a token is a sink if one of its features exceeds this many times their root mean square.
        dims: the features to look at; all by default. `tokenopt.diagnostics.sinks` finds them on data.
    Source: Kang et al., See What You Are Told, arXiv:2503.03321; what to do with them: DAMRO, arXiv:2410.04514.
    """

    of: Score = field(default_factory=ClassRow)
    threshold: float = 20.0
    dims: tuple[int, ...] = ()

    reads_rows = True

    def build(self, stream: Stream) -> fx.Node:
        score = self.of.build(stream)
        strength = stream.insert(ops.massive_activation.default, stream.rows, list(self.dims))
        sink = stream.insert(aten.gt.Scalar, strength, self.threshold)
        return stream.insert(aten.masked_fill.Scalar, score, sink, -1e30)


@dataclass(frozen=True)
class Learned(Score, name="learned"):
    """a small trained network on the token's features, distilled on data from an expensive or later score

    Args:
        target: what it is trained to predict: "received" (the attention a token receives in the last layer) or
            "confidence" (minus the largest class probability of the token's own prediction in the model's output).
        weights: a .safetensors file with the network; `tokenopt.tokens.learned.distil` makes it from data, and so does
            `tokenopt.optimize` when it is given data.
        hidden: the width of its hidden layer; 0 is a linear probe.
    Source: Tang et al., CoViPAL, arXiv:2508.17243 (stage 1); the confidence as in Tang et al., DToP, arXiv:2308.01045.
    """

    target: str = "received"
    weights: str | None = None
    hidden: int = 64

    reads_rows = True

    def build(self, stream: Stream) -> fx.Node:
        if self.weights is None:
            raise Refused("the learned score has no weights yet", "give calibration data (--data), or weights=FILE")
        key = f"layer{stream.layer}"
        layers = load_scorer(Path(self.weights), key, stream.rows.meta["val"].shape[-1])
        node = stream.insert(aten.to.dtype, stream.rows, torch.float32)
        for i, (weight, bias) in enumerate(layers):
            node = stream.insert(aten.gelu.default, node) if i else node
            node = stream.insert(
                aten.linear.default, node, self._constant(stream, weight), self._constant(stream, bias)
            )
        return stream.insert(aten.squeeze.dim, node, -1)

    def _constant(self, stream: Stream, value: Tensor) -> fx.Node:
        return stream.constant("scorer", value)


@dataclass(frozen=True)
class Random(Score, name="random"):
    """fixed pseudo-random numbers per position, other ones in each layer"""

    seed: int = 0

    def build(self, stream: Stream) -> fx.Node:
        generator = torch.Generator().manual_seed(self.seed + stream.layer)
        numbers = torch.rand(1, stream.total, generator=generator)
        return stream.per_sample(stream.constant("random_score", numbers))


@dataclass(frozen=True)
class UniformGrid(Score, name="uniform_grid"):
    """an even sub-grid of the patches first: the baseline that uses position alone"""

    def build(self, stream: Stream) -> fx.Node:
        raise Refused("the sub-grid depends on how many tokens are kept", "select with topk")

    def build_for(self, stream: Stream, keep: int) -> fx.Node:
        """The score, where ``keep`` tokens are to be kept: the tokens in the order that fills the grid evenly."""
        grid = stream.segment.grid if stream.count == stream.segment.length else None
        width = grid[-1] if grid else stream.count
        score = torch.zeros(1, stream.total)
        score[0, [stream.start + i for i in even_grid(keep, stream.count // width, width)]] = 1.0
        return stream.per_sample(stream.constant("uniform_grid", score))


def even_grid(count: int, height: int, width: int) -> list[int]:
    """``count`` positions of a grid in raster order, spread evenly: over rows, and over the columns of each row."""
    rows = min(height, ceil((count * height / width) ** 0.5))
    places = []
    for i in range(rows):
        columns = (i + 1) * count // rows - i * count // rows
        y = _middle(i, rows, height)
        places += [y * width + _middle(j, columns, width) for j in range(columns)]
    return places


def _middle(i: int, parts: int, size: int) -> int:
    """The place nearest to the middle of the i-th of equal parts; of two, the first."""
    return ceil((2 * i + 1) * size / (2 * parts)) - 1


def features(stream: Stream, of: str) -> fx.Node:
    """What tokens are compared by, [B, total, D]: "key" (of the latest attention, averaged over heads) or "hidden"."""
    if of == "hidden":
        return stream.rows
    if of == "key":
        return stream.keys(stream.site())
    raise Refused(f"tokens have no {of!r} to compare", "metric=key or metric=hidden")


def padded(stream: Stream, score: fx.Node) -> fx.Node:
    """A score of the segment alone, with zeros for the protected tokens around it."""
    behind = stream.total - stream.stop
    if not stream.start and not behind:
        return score
    around = [score]
    for place, count in ((0, stream.start), (2, behind)):
        if count:
            around.insert(place, stream.insert(aten.new_zeros.default, score, [stream.batch, count]))
    return stream.insert(aten.cat.default, around, 1)


def build(score: Any, stream: Stream, keep: int) -> fx.Node:
    """The score of every token, [B, total], where ``keep`` tokens of the segment are to be kept."""
    return score.build_for(stream, keep) if hasattr(score, "build_for") else score.build(stream)
