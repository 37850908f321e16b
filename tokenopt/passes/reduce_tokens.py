"""reduce-tokens: applies a token recipe at the cuts of a program and mends everything behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from tokenopt import recipes
from tokenopt.analysis.axes import propagate
from tokenopt.analysis.cuts import StreamCut, contains, find_cuts, offset_in
from tokenopt.analysis.sites import AttentionSite, find_sites
from tokenopt.analysis.terms import Terms
from tokenopt.errors import IllegalReduction, Refusal
from tokenopt.graph import GraphEditor
from tokenopt.pipeline import Pass, PassResult
from tokenopt.program import Program
from tokenopt.schedule import Schedule
from tokenopt.stream import Plan, Stream, StreamRewriter
from tokenopt.tokens.recipe import TokenRecipe

aten = torch.ops.aten
ops = torch.ops.tokenopt


@dataclass(frozen=True)
class ReduceTokens(Pass):
    """Inserts a recipe's reductions between attention and MLP, and discharges every obligation they cause.

    Sizes in reshapes follow the tokens; position terms, masks and biases are gathered per sample; means are weighted by
    size and attention gets the log size as a key bias; before anything that needs every token, tokens are restored.

    Args:
        recipe: a name, a YAML file, or a recipe.
        schedule: how many tokens stay where; the recipe's own by default.
        settings: fields of the recipe to change.
        short_outputs: outputs that carry tokens keep the reduced ones.
        neutral: insert the reductions, but let them remove nothing.

    Rewrite:  x = x + attn(x); y = mlp(x)  ->  x = x + attn(x); x', size = merge_tokens(x, ...); y = mlp(x')
    """

    name: ClassVar[str] = "reduce-tokens"
    recipe: str | TokenRecipe = "tome"
    schedule: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    short_outputs: bool = False
    neutral: bool = False

    def resolved(self) -> tuple[TokenRecipe, Schedule]:
        """The recipe and the schedule that this pass stands for."""
        recipe = recipes.get(self.recipe).with_settings(self.settings)
        return recipe, Schedule.parse(recipe.schedule if self.schedule is None else self.schedule)

    def identity(self) -> ReduceTokens:
        """The same reductions at the same places, removing nothing: what the dense model must equal."""
        return replace(self, neutral=True)

    def run(self, program: Program) -> PassResult:
        recipe, schedule = self.resolved()
        axes = propagate(program)
        sites, _ = find_sites(axes)
        cuts, refusals = find_cuts(axes, sites)
        result = PassResult(refusals=refusals)
        if recipe.segment is not None:
            cuts = _with_segment(cuts, recipe.segment)
        own = [s for s in sites if s.kind in ("self", "joint")]
        groups: dict[Terms, list[StreamCut]] = {}
        for cut in cuts:
            groups.setdefault(cut.segment.terms, []).append(cut)
        editor = GraphEditor(program)
        for segment, group in groups.items():
            if recipe.place == "boundary":
                group = group[-1:]
                if not any(contains(d, segment) for n in program.output_nodes for d in axes.dims(n) or ()):
                    why = f"recipe {recipe.name} shortens the encoder's output, and no output carries these tokens"
                    result.refusals.append(
                        Refusal(group[0].site.id, why, "capture the encoder so that it returns them")
                    )
                    continue
            planner = _Planner(recipe, schedule, own, self.neutral)
            rewriter = StreamRewriter(
                editor, axes, group, planner, attentions={s.node for s in sites}, spec=self.spec,
                short=self.short_outputs or recipe.restore == "none", proportional=recipe.proportional,
            )  # fmt: skip
            rewriter.run()
            if recipe.source:
                rewriter.return_source()
            result.edits += rewriter.edits
            result.refusals += planner.refusals
        editor.finish()
        return result


def _with_segment(cuts: list[StreamCut], name: str) -> list[StreamCut]:
    chosen = []
    for cut in cuts:
        segment = next((s for s in cut.axis.segments if s.name == name and s.length > 1), None)
        if segment is None:
            names = ", ".join(s.name for s in cut.axis.segments)
            raise IllegalReduction(f"there is no segment {name!r}", where=cut.site.id, why=f"it has {names}")
        chosen.append(replace(cut, segment=segment))
    return chosen


class _Planner:
    """Turns a recipe and a schedule into the plan at each cut."""

    def __init__(self, recipe: TokenRecipe, schedule: Schedule, sites: list[AttentionSite], neutral: bool) -> None:
        self.recipe, self.schedule, self.sites, self.neutral = recipe, schedule, sites, neutral
        self.refusals: list[Refusal] = []

    def __call__(self, stream: Stream) -> Plan | None:
        recipe, have = self.recipe, stream.count
        if stream.cut.site.causal and recipe.fuse != "drop":
            why = "causal attention: a merged token would carry what comes after it"
            self.refusals.append(Refusal(stream.cut.site.id, why, "use a recipe that drops tokens"))
            return None
        kept = self.schedule.kept(stream.cut.layer, len(self.sites), have)
        if recipe.select == "bipartite":
            kept = max(kept, have - have // 2)
        kept = have if self.neutral else max(kept, 1)
        packed = recipe.fuse == "pack" and not self.neutral
        if kept + packed >= have and not self.neutral:
            return None
        score = self._score(stream)
        if score is None:
            return None
        if recipe.select == "bipartite":
            plan = stream.insert(ops.match_bipartite.default, score, have - kept, stream.start, stream.stop)
            index, src, dst = (stream.item(plan, i) for i in range(3))
            return Plan(index, src, dst, recipe.fuse)
        if not packed:
            return stream.topk(score, kept)
        plan = stream.insert(ops.select_topk.default, score, kept, stream.start, stream.stop, True)
        index, src = stream.item(plan, 0), stream.item(plan, 1)
        dst = stream.insert(aten.full_like.default, src, stream.start + kept)
        return Plan(index, src, dst, recipe.fuse, self._pack_weight(stream, score, index, kept))

    def _score(self, stream: Stream) -> fx.Node | None:
        """The score of every token of the sequence, [B, total]; for bipartite matching the metric, [B, total, D]."""
        recipe, cut = self.recipe, stream.cut
        if recipe.score == "mean_key":
            key = cut.site.node.args[1]
            return self._of_stream(stream, stream.editor.insert(key, aten.mean.dim, key, [1]))
        if recipe.score == "random":
            generator = torch.Generator().manual_seed(recipe.seed + cut.layer)
            score = stream.constant("random_score", torch.rand(1, stream.total, generator=generator))
            return stream.insert(aten.expand.default, score, [stream.editor.rows(), -1])
        cls = next((s for s in cut.axis.segments if s.name == "cls"), None)
        site = cut.site if recipe.place == "mid" else self._scoring_layer()
        if cls is None or site.axis is None or site.axis.terms != cut.axis.terms:
            why = f"recipe {recipe.name} scores by the class token's attention, and there is no class token"
            self.refusals.append(Refusal(cut.site.id, why, "use a recipe without a class token, such as tome"))
            return None
        query, key, _, *rest = site.node.args
        bias, key_bias = [*rest, None, None][:2]
        score = stream.editor.insert(
            site.node, ops.attention_probe.default, query, key, bias, key_bias, cls.start, 1,
            scale=site.node.kwargs.get("scale"),
        )  # fmt: skip
        return self._of_stream(stream, score)

    def _of_stream(self, stream: Stream, score: fx.Node) -> fx.Node | None:
        """What a site says of its keys, for the stream's tokens alone: a joint attention has others, too."""
        if score.meta["val"].shape[1] == stream.total:
            return score
        start = offset_in(stream.cut.axis.terms, stream.cut.segment.terms)
        if stream.count != stream.total or start is None:
            why = "the attention's sequence and the stream's have different tokens beside the reducible ones"
            self.refusals.append(Refusal(stream.cut.site.id, why, "reduce it with a rule of your own"))
            return None
        return stream.insert(aten.slice.Tensor, score, 1, start, start + stream.count)

    def _scoring_layer(self) -> AttentionSite:
        try:
            return self.sites[self.recipe.score_layer]
        except IndexError:
            raise IllegalReduction(
                f"there is no layer {self.recipe.score_layer} to score with", why=f"the encoder has {len(self.sites)}"
            ) from None

    def _pack_weight(self, stream: Stream, score: fx.Node, index: fx.Node, kept: int) -> fx.Node:
        """Weight 1 for what stays and the score for what is packed, [B, total]."""
        stays = stream.insert(aten.slice.Tensor, index, 1, 0, stream.start + kept)
        if stream.stop < stream.total:
            tail = stream.insert(aten.slice.Tensor, index, 1, stream.start + kept + 1, stream.total)
            stays = stream.insert(aten.cat.default, [stays, tail], 1)
        ones = stream.insert(aten.ones_like.default, stays, dtype=score.meta["val"].dtype)
        return stream.insert(aten.scatter.src, score, 1, stays, ones)
