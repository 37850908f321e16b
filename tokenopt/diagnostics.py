"""What the analysis papers look at before tokens are dropped: attention sinks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tokenopt.analysis.axes import propagate
from tokenopt.analysis.cuts import StreamCut, find_cuts
from tokenopt.analysis.sites import find_sites
from tokenopt.graph import GraphEditor, add_output
from tokenopt.passes.flatten_grids import FlattenGrids
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program, flatten_tensors
from tokenopt.tokens.plan import Refused, logits_of

aten = torch.ops.aten
ops = torch.ops.tokenopt


def sinks(
    program: Program, batches: Iterable[Sequence[Tensor]], *, threshold: float = 20.0, top: float = 0.25
) -> list[dict[str, Any]]:
    """Attention sinks layer by layer, in one pass over data: tokens with massive activations, and what they attract.

    Args:
        batches: inputs of the program, as flat tensors.
        threshold: a token is a sink if one feature exceeds this many times the root mean square of its features.
        top: the share of the tokens that a score by received attention would keep.

    Returns:
        For each layer whose tokens can be reduced ``{site, dims, share, received, overlap}``: the features that are
        massive, most often first (for score ``without_sinks``); the share of the reducible tokens that are sinks; the
        share of the attention that these receive; and the share of sinks among the ``top`` most attended tokens. A
        high overlap says that a score by attention keeps sinks.

    Source: Kang et al., See What You Are Told, arXiv:2503.03321, sec. 4; Gong et al., DAMRO, arXiv:2410.04514.
    """
    seeing = Pipeline([FoldConstants(), RaiseAttention(), FlattenGrids()]).run(program).program
    axes = propagate(seeing)
    cuts, _ = find_cuts(axes, find_sites(axes)[0], paying=False)
    editor = GraphEditor(seeing)
    seen: list[StreamCut] = []
    for cut in cuts:
        try:
            nodes = (cut.entry, _received(editor, cut))
        except Refused:
            continue
        for node in nodes:
            add_output(seeing, node, "seen")
        seen.append(cut)
    totals = [_Total() for _ in seen]
    for batch in batches:
        args, kwargs = seeing.bind(batch)
        found = flatten_tensors(seeing(*args, **kwargs))[-2 * len(seen) :]
        for i, (cut, total) in enumerate(zip(seen, totals, strict=True)):
            first = cut.segment.start
            rows, received = (f[:, first : first + cut.segment.length].float() for f in found[2 * i : 2 * i + 2])
            total.add(rows, received, threshold, top)
    return [{"site": cut.site.id, **total.result()} for cut, total in zip(seen, totals, strict=True)]


def _received(editor: GraphEditor, cut: StreamCut) -> fx.Node:
    logits, options = logits_of(cut.site)
    return editor.insert(cut.site.node, ops.attention_received.default, *logits, None, **options)


class _Total:
    """Counts over batches."""

    def __init__(self) -> None:
        self.massive: Tensor | None = None
        self.sinks = self.tokens = self.kept_sinks = self.kept = 0.0
        self.received = self.all_received = 0.0

    def add(self, rows: Tensor, received: Tensor, threshold: float, top: float) -> None:
        strength = rows.abs() / rows.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        massive = strength > threshold
        sink = massive.any(-1)
        count = max(1, round(top * rows.shape[1]))
        kept = received.topk(count, dim=1).indices
        counts = massive.sum((0, 1)).double()
        self.massive = counts if self.massive is None else self.massive + counts
        self.sinks += float(sink.sum())
        self.tokens += sink.numel()
        self.kept_sinks += float(sink.gather(1, kept).sum())
        self.kept += kept.numel()
        self.received += float((received * sink).sum())
        self.all_received += float(received.sum())

    def result(self) -> dict[str, Any]:
        order = (
            [] if self.massive is None else [int(d) for d in self.massive.argsort(descending=True) if self.massive[d]]
        )
        return {
            "dims": order,
            "share": self.sinks / max(self.tokens, 1.0),
            "received": self.received / max(self.all_received, 1e-12),
            "overlap": self.kept_sinks / max(self.kept, 1.0),
        }
