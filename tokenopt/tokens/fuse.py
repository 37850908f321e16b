"""Fuses: what becomes of removed tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from tokenopt.tokens.plan import Plan, Stream
from tokenopt.tokens.primitive import Primitive
from tokenopt.tokens.score import features

aten = torch.ops.aten
ops = torch.ops.tokenopt


class Fuse(Primitive, kind="fuse"):
    """What becomes of removed tokens.

    Attributes:
        takes: the selects it goes with, by what they give.
        weighs: whether it needs a score that is a weight.
    """

    takes: tuple[str, ...] = ("", "places")
    weighs = False
    extra = 0  # places beside the kept ones

    def build(self, stream: Stream, plan: Plan, score: fx.Node | None, neutral: bool) -> Plan:
        """The plan with what is fused how."""
        raise NotImplementedError


@dataclass(frozen=True)
class Drop(Fuse, name="drop"):
    """they are dropped"""

    def build(self, stream: Stream, plan: Plan, score: fx.Node | None, neutral: bool) -> Plan:
        return plan


def _placed(stream: Stream, plan: Plan, metric: str) -> Plan:
    """A plan that says where each removed token goes: to the most similar kept one, unless the select says it."""
    if plan.dst is not None:
        return plan
    kept = plan.index.meta["val"].shape[1] - (stream.total - stream.count)
    dst = stream.insert(ops.nearest_tokens.default, features(stream, metric), plan.index, plan.src, stream.start, kept)
    return replace(plan, dst=dst)


@dataclass(frozen=True)
class Weighted(Fuse, name="weighted"):
    """they are averaged into the token they go to, weighted by how many originals each stands for

    Args:
        metric: by what a removed token finds the kept one it goes to, if the select does not say.
    """

    metric: str = "key"

    takes = ("", "places", "masked")

    def build(self, stream: Stream, plan: Plan, score: fx.Node | None, neutral: bool) -> Plan:
        if plan.assign is not None:
            return replace(plan, fuse="soft")
        return replace(_placed(stream, plan, self.metric), fuse="sized")


@dataclass(frozen=True)
class Mean(Fuse, name="mean"):
    """they are averaged into the token they go to, all alike

    Args:
        metric: as in weighted.
        added: the token becomes itself plus the mean of those that go to it, as the official code of VisionZip does.
    """

    metric: str = "key"
    added: bool = False

    def build(self, stream: Stream, plan: Plan, score: fx.Node | None, neutral: bool) -> Plan:
        plan = _placed(stream, plan, self.metric)
        if not self.added:
            return replace(plan, fuse="mean")
        return replace(plan, fuse="sum", weight=stream.insert(ops.shares.default, plan.index, plan.src, plan.dst))


@dataclass(frozen=True)
class ScoreMean(Fuse, name="score_mean"):
    """they are averaged into the token they go to, weighted by score

    Source: the recycling of VFlowOpt (Yang et al., arXiv:2508.05211).
    """

    takes = ("places",)
    weighs = True

    def build(self, stream: Stream, plan: Plan, score: fx.Node | None, neutral: bool) -> Plan:
        return replace(plan, fuse="mean", weight=stream.insert(aten.clamp_min.default, score, 1e-12))


@dataclass(frozen=True)
class Neighbours(Fuse, name="neighbours"):
    """each kept token takes in its most similar removed ones, weighted by score; one may go to several

    Args:
        count: how many each takes in.
        metric: by what they are compared.
    Source: Shang et al., LLaVA-PruMerge, arXiv:2403.15388.
    """

    count: int = 32
    metric: str = "key"

    takes = ("",)
    weighs = True

    def build(self, stream: Stream, plan: Plan, score: fx.Node | None, neutral: bool) -> Plan:
        removed = plan.src.meta["val"].shape[1]
        if not removed:
            return plan
        kept = plan.index.meta["val"].shape[1] - (stream.total - stream.count)
        index = stream.insert(aten.slice.Tensor, plan.index, 1, stream.start, stream.start + kept)
        index = stream.insert(aten.sub.Tensor, index, stream.start)
        assign = stream.insert(ops.neighbour_weights.default, features(stream, self.metric), score, index,
                               min(self.count, removed), stream.start, stream.stop)  # fmt: skip
        return replace(_placed(stream, plan, self.metric), fuse="soft", assign=assign)


@dataclass(frozen=True)
class Pack(Fuse, name="pack"):
    """all of them become one more token, summed with their scores as weights

    Source: Liang et al., EViT, arXiv:2202.07800.
    """

    takes = ("",)
    weighs = True
    extra = 1

    def build(self, stream: Stream, plan: Plan, score: fx.Node | None, neutral: bool) -> Plan:
        if neutral:
            return plan
        kept = plan.index.meta["val"].shape[1] - (stream.total - stream.count)
        node = stream.insert(ops.select_topk.default, score, kept, stream.start, stream.stop, True)
        index, src = stream.items(node, 2)
        dst = stream.insert(aten.full_like.default, src, stream.start + kept)
        stays = stream.insert(aten.slice.Tensor, index, 1, 0, stream.start + kept)
        if stream.stop < stream.total:
            tail = stream.insert(aten.slice.Tensor, index, 1, stream.start + kept + 1, stream.total)
            stays = stream.insert(aten.cat.default, [stays, tail], 1)
        # 1 for what stays, the score for what is packed
        ones = stream.insert(aten.ones_like.default, stays, dtype=score.meta["val"].dtype)
        weight = stream.insert(aten.scatter.src, score, 1, stays, ones)
        return Plan(index, src, dst, "sum", weight)


@dataclass(frozen=True)
class Mix(Fuse, name="mix"):
    """new tokens are the mixtures that the select makes"""

    takes = ("soft",)

    def build(self, stream: Stream, plan: Plan, score: fx.Node | None, neutral: bool) -> Plan:
        return replace(plan, fuse="soft")
