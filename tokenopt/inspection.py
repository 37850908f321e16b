"""inspect: what the analysis knows about a program, as plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from tokenopt.analysis.axes import AxisMap, propagate, tensor_operands
from tokenopt.analysis.axis_rules import template
from tokenopt.analysis.cuts import StreamCut, carries, contains, decide, find_cuts
from tokenopt.analysis.sites import AttentionSite, Segment, TokenAxis, find_sites
from tokenopt.errors import Refusal
from tokenopt.graph import module_path
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.passes.sparsify_attention import SparsifyAttention
from tokenopt.program import Program


def inspect(program: Program, pattern: Any = None) -> dict[str, Any]:
    """Axes, sites, effects and cuts of a program, and for every site what is legal or why not. JSON-ready.

    Constants are folded and attention is raised on a copy first, as `optimize` does.

    Args:
        pattern: an attention pattern, its text or a recipe of patterns: what it would gain at every attention.

    Returns:
        ``model`` {inputs, outputs, nodes} · ``axes`` [{name, length, segments, carried_by}] · ``sites`` [{id, kind,
        axis, queries, keys, heads, head_dim, raised, legal, refusal}] · ``effects`` {axis: {effect: count}} · ``cuts``
        [{site, after, where, axis, width, depth, obligations, restore_before}] · ``opaque`` [{node, op, where,
        template}] · ``patterns`` as in a report
    """
    canonical = canonicalize(program).program
    axes = propagate(canonical)
    sites, token_axes = find_sites(axes)
    cuts, refusals = find_cuts(axes, sites)
    return {
        "model": {
            "inputs": [asdict(i) for i in program.inputs],
            "outputs": [asdict(o) for o in program.outputs],
            "nodes": sum(n.op == "call_function" for n in canonical.graph.nodes),
        },
        "axes": [axis_dict(axes, a) for a in token_axes],
        "sites": [_site_dict(s, cuts, refusals) for s in sites],
        "effects": {a.name: _effects(axes, a.reducible) for a in token_axes if a.reducible is not None},
        "cuts": [_cut_dict(c) for c in cuts],
        "opaque": [
            {"node": n.name, "op": str(n.target), "where": module_path(n), "template": template(n)} for n in axes.opaque
        ],
        "patterns": [] if pattern is None else [c.to_dict() for c in SparsifyAttention(recipe=pattern).plan(canonical)],
    }


def axis_dict(axes: AxisMap, axis: TokenAxis) -> dict[str, Any]:
    """A token axis as plain data."""
    return {
        "name": axis.name,
        "length": axis.length,
        "segments": [
            {
                "name": s.name,
                "start": s.start,
                "length": s.length,
                "grid": list(s.grid) if s.grid else None,
                "protected": s.protected,
            }
            for s in axis.segments
        ],
        "carried_by": carries(axes, axis.terms),
    }


def _site_dict(site: AttentionSite, cuts: list[StreamCut], refusals: list[Refusal]) -> dict[str, Any]:
    legal = any(c.site is site for c in cuts)
    refusal = None if legal else refusal_of(site, refusals)
    return {
        "id": site.id,
        "kind": site.kind,
        "axis": site.axis.name if site.axis else None,
        "queries": site.queries,
        "keys": site.keys,
        "heads": site.heads,
        "head_dim": site.head_dim,
        "raised": site.raised,
        "legal": legal,
        "refusal": refusal.to_dict() if refusal else None,
    }


def refusal_of(site: AttentionSite, refusals: list[Refusal]) -> Refusal | None:
    """Why a site was refused: its own reason, or that of its place in the model."""
    if site.refusal is not None:
        return site.refusal
    return next((r for r in refusals if r.where == site.id), None)


def _cut_dict(cut: StreamCut) -> dict[str, Any]:
    return {
        "site": cut.site.id,
        "after": cut.after.name,
        "where": module_path(cut.after) or cut.after.name,
        "axis": cut.axis.name,
        "width": cut.width,
        "depth": round(cut.depth, 4),
        "obligations": dict(cut.obligations),
        "restore_before": [f"{module_path(e.node) or e.node.name} ({e.node.target})" for e in cut.restores],
    }


def _effects(axes: AxisMap, segment: Segment) -> dict[str, int]:
    """How often each effect befalls the reducible tokens of an axis."""
    counts: Counter[str] = Counter()
    for node in axes.program.graph.nodes:
        operands = [
            n for n in tensor_operands(node) if (d := axes.dims(n)) and any(contains(t, segment.terms) for t in d)
        ]
        if not operands or node.op == "placeholder":
            continue
        data = [n for n in operands if n in axes.data]
        if not data:
            continue
        decision = decide(axes, node, segment.terms, data)
        if decision.barrier is not None:
            counts[decision.barrier.kind.value] += 1
            continue
        counts["align"] += len(decision.align)
        counts["reduce"] += bool(decision.means)
        counts["attend"] += decision.attends
        counts["segment"] += decision.segments
        counts["pass"] += not (decision.align or decision.means or decision.attends or decision.segments)
    return {k: v for k, v in sorted(counts.items()) if v}
