"""Rule: a rewrite as a check and an action, tried on every cut, attention site or node."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from torch import fx

from tokenopt.analysis.axes import propagate
from tokenopt.analysis.cuts import StreamCut, find_cuts
from tokenopt.analysis.sites import AttentionSite, find_sites
from tokenopt.errors import Refusal, UsageError
from tokenopt.graph import GraphEditor, module_path
from tokenopt.pipeline import Pass, PassResult
from tokenopt.program import Edit, Program
from tokenopt.stream import StreamRewriter
from tokenopt.tokens.place import Mid
from tokenopt.tokens.plan import Plan, Stream


@dataclass(frozen=True)
class Match:
    """The rule applies; ``bindings`` are handed to its ``rewrite``."""

    bindings: dict[str, Any] = field(default_factory=dict)


def ok(**bindings: Any) -> Match:
    """From `Rule.check`: rewrite, with these arguments."""
    return Match(bindings)


def refuse(why: str, hint: str = "") -> Refusal:
    """From `Rule.check`: leave it, for this reason."""
    return Refusal("", why, hint)


class Rule(Pass):
    """A pass that is tried on one kind of thing, given by the annotation of ``check``'s first argument.

    - ``check(self, cut: StreamCut)`` and ``rewrite(self, stream: Stream, **bindings) -> Plan``: reduces tokens;
    - ``check(self, site: AttentionSite)`` and ``rewrite(self, editor: GraphEditor, site, **bindings)``;
    - ``check(self, node: fx.Node)`` and ``rewrite(self, editor: GraphEditor, node, **bindings)``.

    ``check`` returns `ok` or `refuse`. Subclasses are frozen dataclasses; give them a ``name``.
    """

    def check(self, subject: Any) -> Match | Refusal:
        raise NotImplementedError(f"{type(self).__name__} must define check")

    def rewrite(self, *args: Any, **bindings: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define rewrite")

    def run(self, program: Program) -> PassResult:
        kind = _subject(type(self))
        result = PassResult()
        editor = GraphEditor(program)
        if kind is fx.Node:
            self._on_each(editor, [n for n in program.graph.nodes if n.op == "call_function"], result)
        else:
            axes = propagate(program)
            sites, _ = find_sites(axes)
            if kind is AttentionSite:
                self._on_each(editor, [s for s in sites if s.raised], result)
            else:
                cuts, result.refusals = find_cuts(axes, sites)
                self._on_cuts(editor, axes, sites, cuts, result)
        editor.finish()
        return result

    def _try(self, subject: Any, where: str, result: PassResult) -> dict[str, Any] | None:
        outcome = self.check(subject)
        if isinstance(outcome, Refusal):
            result.refusals.append(Refusal(where, outcome.why, outcome.hint))
            return None
        return outcome.bindings

    def _on_each(self, editor: GraphEditor, subjects: list[Any], result: PassResult) -> None:
        for subject in subjects:
            where = subject.id if isinstance(subject, AttentionSite) else module_path(subject) or subject.name
            bindings = self._try(subject, where, result)
            if bindings is not None:
                self.rewrite(editor, subject, **bindings)
                result.edits.append(Edit(self.spec, where))

    def _on_cuts(
        self, editor: GraphEditor, axes: Any, sites: list[AttentionSite], cuts: list[StreamCut], result: PassResult
    ) -> None:
        accepted: dict[str, dict[str, Any]] = {}
        for cut in cuts:
            bindings = self._try(cut, cut.site.id, result)
            if bindings is not None:
                accepted[cut.site.id] = bindings
        groups: dict[Any, list[StreamCut]] = {}
        for cut in cuts:
            if cut.site.id in accepted:
                groups.setdefault(cut.segment.terms, []).append(cut)

        def plan(stream: Stream) -> Plan | None:
            return self.rewrite(stream, **accepted[stream.cut.site.id])

        for group in groups.values():
            regions = Mid().regions(group, sites, False)
            rewriter = StreamRewriter(editor, axes, regions, group[0].segment, plan, sites=sites, spec=self.spec)
            rewriter.run()
            result.edits += rewriter.edits


def _subject(rule: type[Rule]) -> type:
    parameters = list(inspect.signature(rule.check).parameters)
    kind = get_type_hints(rule.check).get(parameters[1]) if len(parameters) > 1 else None
    if kind not in (StreamCut, AttentionSite, fx.Node):
        raise UsageError(
            f"{rule.__name__}.check must say what it is tried on",
            hint="annotate its first argument with StreamCut, AttentionSite or torch.fx.Node",
        )
    return kind
