"""reduce-tokens: applies a token recipe at the cuts of a program and mends everything behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from tokenopt import recipes
from tokenopt.analysis.axes import AxisMap, propagate
from tokenopt.analysis.cuts import StreamCut, contains, find_cuts
from tokenopt.analysis.sites import AttentionSite, Segment, find_sites, with_grid
from tokenopt.analysis.terms import Terms, length
from tokenopt.errors import IllegalReduction, Refusal, UsageError
from tokenopt.graph import GraphEditor, sync_outputs
from tokenopt.inside import reduce_inside
from tokenopt.pipeline import Pass, PassResult
from tokenopt.program import Program
from tokenopt.schedule import Schedule
from tokenopt.stream import StreamRewriter
from tokenopt.tokens.place import Attention, Place
from tokenopt.tokens.plan import Plan, Refused, Stream
from tokenopt.tokens.recipe import TokenRecipe
from tokenopt.tokens.score import build
from tokenopt.tokens.select import around

aten = torch.ops.aten


@dataclass(frozen=True)
class ReduceTokens(Pass):
    """Inserts a recipe's reductions at its place, and discharges every obligation they cause.

    Sizes in reshapes follow the tokens; position terms, masks and biases are gathered per sample; means are weighted by
    size and attention gets the log size as a key bias; before anything that needs every token, tokens are restored.

    Args:
        recipe: a name, a YAML file, or a recipe.
        schedule: how many tokens stay where; the recipe's own by default.
        settings: fields of the recipe to change.
        short_outputs: outputs that carry tokens keep the reduced ones.
        neutral: insert the reductions, but let them remove nothing.
        stages: also return, for each reduction, which tokens stay and which one each goes to; for looking, not for use.

    Rewrite:  x = x + attn(x); y = mlp(x)  ->  x = x + attn(x); x', size = merge_tokens(x, ...); y = mlp(x')
    """

    name: ClassVar[str] = "reduce-tokens"
    recipe: str | TokenRecipe = "tome"
    schedule: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    short_outputs: bool = False
    neutral: bool = False
    stages: bool = False

    def resolved(self) -> tuple[TokenRecipe, Schedule]:
        """The recipe and the schedule that this pass stands for."""
        recipe = recipes.get(self.recipe).with_settings(self.settings)
        if self.schedule is None and not recipe.schedule:
            raise UsageError(f"recipe {recipe.name} has no schedule", hint="give one, such as --schedule keep=0.5")
        return recipe, Schedule.parse(recipe.schedule if self.schedule is None else self.schedule)

    def identity(self) -> ReduceTokens:
        """The same reductions at the same places, removing nothing: what the dense model must equal."""
        return replace(self, neutral=True)

    def run(self, program: Program) -> PassResult:
        return self.apply(program, Planner(*self.resolved(), self.neutral))

    def apply(self, program: Program, planner: Planner) -> PassResult:
        """Visits the recipe's places with a planner of one's own; one that plans nothing only looks."""
        recipe, before = planner.recipe, program.clone()
        axes = propagate(program)
        sites, _ = find_sites(axes)
        if recipe.grid is not None:
            sites = with_grid(sites, recipe.grid)
        own = [s for s in sites if s.kind in ("self", "joint")]
        place = recipe.place
        cuts, refusals = find_cuts(axes, sites, paying=place.streams)
        result = PassResult(refusals=refusals if place.streams or place.of == "input" else [])
        editor = GraphEditor(program)
        if isinstance(place, Attention) and place.of == "qkv":
            self._inside(editor, axes, own, cuts, planner, result)
        else:
            if recipe.segment is not None:
                cuts = _with_segment(cuts, recipe.segment)
            groups: dict[Terms, list[StreamCut]] = {}
            for cut in cuts:
                groups.setdefault(cut.segment.terms, []).append(cut)
            for terms, group in groups.items():
                why = _too_short(length(terms), map(length, groups), place)
                if why is not None:
                    result.refusals += [Refusal(cut.site.id, *why) for cut in group]
                else:
                    self._stream(editor, axes, own, group, planner, result)
        if result.record.reductions:
            sync_outputs(program)
            result.record.before, result.record.after = before, program.clone()
        editor.finish()
        result.refusals += planner.refusals
        return result

    def _stream(
        self, editor: GraphEditor, axes: AxisMap, sites: list[AttentionSite], cuts: list[StreamCut], planner: Planner,
        result: PassResult,
    ) -> None:  # fmt: skip
        recipe, segment = planner.recipe, cuts[0].segment
        place, restore = recipe.place, recipe.restore
        returned = [d for n in editor.program.output_nodes for d in axes.dims(n) or ()]
        if place.outputs and not any(contains(d, segment.terms) for d in returned):
            why = f"recipe {recipe.name} shortens the encoder's output, and no output carries these tokens"
            hint = "capture the encoder so that it returns them"
            result.refusals.append(Refusal(cuts[0].site.id, why, hint))
            return
        try:
            if (why := _no_grid(segment, recipe)) is not None:
                raise Refused(*why)
            regions = place.regions(cuts, sites, recipe.hoists)
        except Refused as refused:
            result.refusals.append(Refusal(cuts[0].site.id, refused.why, refused.hint))
            return
        if restore.ends:
            regions = [r if r.until is not None else replace(r, until=cuts[-1].leave) for r in regions]
        # with nothing to remove, outputs are those of the dense model in its order, too
        short = (self.short_outputs or not restore.outputs) and not (self.neutral and recipe.select.permutes)
        rewriter = StreamRewriter(
            editor, axes, regions, segment, planner, sites=sites, spec=self.spec, restore=restore,
            short=short, proportional=recipe.proportional, position=recipe.position,
        )  # fmt: skip
        rewriter.run()
        if recipe.source:
            rewriter.return_source()
        if recipe.positions:
            rewriter.return_positions()
        if self.stages:
            rewriter.return_stages()
        rewriter.note(result.record)
        result.edits += rewriter.edits
        result.refusals += rewriter.refusals

    def _inside(
        self, editor: GraphEditor, axes: AxisMap, sites: list[AttentionSite], cuts: list[StreamCut], planner: Planner,
        result: PassResult,
    ) -> None:  # fmt: skip
        recipe, on_stream = planner.recipe, {c.site: c for c in cuts}
        longest = max((s.axis.reducible.length for s in sites if s.axis and s.axis.reducible), default=0)
        for region in recipe.place.regions(cuts, sites, False):
            site, why = region.site, _not_inside(region.site, longest, recipe)
            try:
                if why is not None:
                    raise Refused(*why)
                done = reduce_inside(
                    editor, axes, replace(region, cut=on_stream.get(site)), sites, planner, spec=self.spec,
                    proportional=recipe.proportional, restore=recipe.restore,
                )  # fmt: skip
            except Refused as refused:
                result.refusals.append(Refusal(site.id, refused.why, refused.hint))
                continue
            if done is not None:
                edit, reduction = done
                result.edits.append(edit)
                result.record.reductions.append(reduction)


def _not_inside(site: AttentionSite, longest: int, recipe: TokenRecipe) -> tuple[str, str] | None:
    """Why queries, keys and values of an attention cannot be reduced, and what to do."""
    if site.refusal is not None:
        return site.refusal.why, site.refusal.hint
    if site.axis is None or site.axis.reducible is None:
        return "no segment of its tokens comes from the input", "nothing to reduce here"
    segment = site.axis.reducible
    return _too_short(segment.length, [longest], recipe.place) or _no_grid(segment, recipe)


def _no_grid(segment: Segment, recipe: TokenRecipe) -> tuple[str, str] | None:
    if segment.grid is None and hasattr(recipe.restore, "spread"):
        why = f"restore '{recipe.restore.name}' needs a grid, and these {segment.length} tokens form none"
        return why, "restore copy"
    return None


def _too_short(count: int, counts: Iterable[int], place: Place) -> tuple[str, str] | None:
    """Why a sequence is left out by a place inside attention that takes the longest ones only."""
    longest = max(counts, default=0)
    if not isinstance(place, Attention) or not place.downsample or count * place.downsample**2 >= longest:
        return None
    return f"its {count} tokens are fewer than the {longest} of the longest sequence", "place=attention reduces all"


def _with_segment(cuts: list[StreamCut], name: str) -> list[StreamCut]:
    chosen = []
    for cut in cuts:
        segment = next((s for s in cut.axis.segments if s.name == name and s.length > 1), None)
        if segment is None:
            names = ", ".join(s.name for s in cut.axis.segments)
            raise IllegalReduction(f"there is no segment {name!r}", where=cut.site.id, why=f"it has {names}")
        chosen.append(replace(cut, segment=segment))
    return chosen


def _sparing(stream: Stream, score: fx.Node) -> fx.Node:
    """A score by which the special tokens within the segment come first."""
    first = torch.zeros(1, stream.total, dtype=torch.bool)
    first[0, [stream.start + i for i in stream.segment.special]] = True
    return stream.insert(aten.masked_fill.Scalar, score, stream.constant("special", first), float("inf"))


@dataclass
class Planner:
    """Turns a recipe and a schedule into the plan at each place.

    Attributes:
        neutral: plan the removal of nothing.
        refusals: what could not be planned.
    """

    recipe: TokenRecipe
    schedule: Schedule
    neutral: bool = False
    refusals: list[Refusal] = field(default_factory=list)

    def kept(self, stream: Stream) -> int:
        """How many tokens the schedule keeps at a place."""
        return self.schedule.kept(stream.layer, len(stream.sites), stream.count)

    def __call__(self, stream: Stream) -> Plan | None:
        recipe, have, site = self.recipe, stream.count, stream.region.site
        try:
            if site.causal and recipe.fuse.name != "drop":
                why = "causal attention: a merged token would carry what comes after it"
                raise Refused(why, "use a recipe that drops tokens")
            if recipe.place.empties:
                return None if self.neutral or self.schedule.is_identity else self._emptied(stream)
            kept = self.kept(stream)
            if kept >= have and not self.neutral:
                return None
            special = len(stream.segment.special)
            if special and (have < stream.segment.length or not recipe.select.spares):
                why = f"{special} special tokens lie between the others, one or more per frame"
                raise Refused(why, "once, before other reductions: select bipartite_grid, bipartite_frames or topk")
            kept = have if self.neutral else max(recipe.select.fit(stream, kept), special)
            if kept + recipe.fuse.extra >= have and not self.neutral and recipe.select.gives != "masked":
                return None
            score = build(recipe.score, stream, kept) if recipe.score is not None else None
            if score is not None and special:
                score = _sparing(stream, score)
            chosen = recipe.select.neutral(stream, score) if self.neutral else recipe.select.build(stream, score, kept)
            return recipe.restore.build(stream, recipe.fuse.build(stream, chosen, score, self.neutral))
        except Refused as refused:
            self.refusals.append(Refusal(site.id, f"recipe {recipe.name}: {refused.why}", refused.hint))
            return None

    def _emptied(self, stream: Stream) -> Plan:
        """Nothing of the segment stays."""
        if stream.total == stream.count:
            raise Refused("there would be no token left", "reduce a segment of a longer sequence")
        nothing = torch.zeros(0, dtype=torch.int64)
        return self.recipe.restore.build(stream, Plan(around(stream, nothing)))
