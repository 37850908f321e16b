"""What the analysis papers look at before tokens are dropped: how attention is spread, repeated and trapped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx

from tokenopt.analysis.axes import propagate
from tokenopt.analysis.cuts import StreamCut, find_cuts
from tokenopt.analysis.sites import AttentionSite, Segment, find_sites
from tokenopt.errors import UsageError
from tokenopt.graph import GraphEditor, add_output
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.program import Program, flatten_tensors
from tokenopt.tokens.plan import Refused, logits_of

aten = torch.ops.aten
ops = torch.ops.tokenopt

_ROWS = 64  # of attention probabilities that exist at a time
_WINDOW = 4  # rows and columns of a neighbourhood
_ALL_ACTIVE, _VOTES = 2, 0.4  # layers that keep all heads, and the share of the votes that an active head exceeds


def diagnose(program: Program, batches: Iterable[Sequence[Tensor]]) -> dict[str, Any]:
    """How attention is spread, layer by layer: what is redundant, and where tokens stop mattering.

    Two passes over the data; of each attention, 64 rows of all heads and samples exist at a time.

    Args:
        batches: inputs of the program, as flat tensors. A few samples are enough.

    Returns:
        A report's ``diagnostics`` (see `Report`); {} where nothing attends among tokens of the input.

    Source: entropy: Ge et al., CARVE (contrastive attention); row_similarity: Guo et al., Robustifying Token Attention
        for Vision Transformers, arXiv:2303.11126; redundancy: Wang et al., Qihoo-T2X, arXiv:2409.04005;
        between: ToDRE, arXiv:2505.18757, stage 2; intra, inter and flow: AdaToken-3D, with its weights 0.7, 0.3; 0.73;
        0.4, 0.3, 0.3. head_diversity is the Jensen-Shannon divergence of the heads' rows over ln(heads).
    """
    batches = [list(batch) for batch in batches]
    seeing = canonicalize(program).program
    sites = [s for s in find_sites(propagate(seeing))[0] if _watched(s)]
    if not sites or not batches:
        return {}
    watch = _Watch(seeing.module(), {s.node.name: _Spread(s) for s in sites})
    with torch.no_grad():
        for batch in batches:
            watch.run(*pytree.tree_leaves(seeing.bind(batch)), enable_io_processing=False)
    trapped = {row.pop("site"): row for row in sinks(program, batches)}
    layers = []
    for site in sites:
        found = trapped.get(site.id, dict.fromkeys(("dims", "share", "received", "overlap")))
        row = {"site": site.id, "axis": site.axis.name, "tokens": site.queries, "heads": site.heads}
        row |= watch.spreads[site.node.name].result()
        layers.append(row | {f"sink_{key}": value for key, value in found.items()})
    for axis in {row["axis"] for row in layers}:
        _add_flow([row for row in layers if row["axis"] == axis])
    samples = sum(len(batch[0]) for batch in batches)
    return {"samples": samples, "window": _WINDOW, "layers": layers}


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

    Source: Kang et al., See What You Are Told, arXiv:2503.03321; Gong et al., DAMRO, arXiv:2410.04514.
    """
    seeing = canonicalize(program).program
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


def head_thresholds(
    program: Program, batches: Iterable[Sequence[Tensor]], segment: str
) -> dict[tuple[int, int], float]:
    """From which threshold on a head, (layer, head), does not need the tokens of a segment.

    Each sample votes for a head that gives the segment more than a threshold times what it gives all other tokens. In
    causal attention that is what the last token gives, which answers; elsewhere the mean of the tokens beside the
    segment. Heads are active that get more than 40 % of the votes, and so are all of the first two layers.

    Args:
        batches: inputs of the program, as flat tensors.

    Returns:
        The least threshold at which each head of the other layers is inactive.

    Raises:
        UsageError: if there are no data, or no attention has such a segment among others.

    Source: Zhang et al., Treat Visual Tokens as Text?, arXiv:2410.06169 (YOPO), with the numbers of its code.
    """
    seeing = canonicalize(program).program
    sites = [s for s in find_sites(propagate(seeing))[0] if s.kind in ("self", "joint")]
    votes: dict[str, _Votes] = {}
    for layer, site in enumerate(sites):
        found = next((s for s in site.axis.segments if s.name == segment), None) if _watched(site) else None
        if layer >= _ALL_ACTIVE and found is not None and found.length < site.keys:
            votes[site.node.name] = _Votes(layer, site, found)
    if not votes:
        why = f"behind the first {_ALL_ACTIVE} layers none has a segment {segment!r} among others"
        raise UsageError("there are no heads to vote on", why=why, hint="inspect shows the segments")
    watch = _Watch(seeing.module(), votes)
    with torch.no_grad():
        for batch in batches:
            watch.run(*pytree.tree_leaves(seeing.bind(batch)), enable_io_processing=False)
    if not all(v.ratios for v in votes.values()):
        raise UsageError("there are no data to vote on heads")
    return {(v.layer, head): least for v in votes.values() for head, least in enumerate(v.thresholds())}


class _Votes:
    """Votes for the heads of one attention."""

    def __init__(self, layer: int, site: AttentionSite, segment: Segment) -> None:
        self.layer = layer
        self.columns = slice(segment.start, segment.start + segment.length)
        others = torch.tensor(sorted({*range(site.queries)} - {*range(self.columns.start, self.columns.stop)}))
        self.rows = torch.tensor([site.queries - 1]) if site.causal else others
        self.ratios: list[Tensor] = []  # [B, H] of each batch

    def add(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """What one batch adds."""
        query, key, _, bias, key_bias = [*args, None, None][:5]
        share = _probabilities(query, key, bias, key_bias, self.rows.to(query.device), kwargs)
        given = share[..., self.columns].sum(-1).mean(2)
        self.ratios.append((given / (1 - given).clamp_min(0.0)).cpu())  # a sum of shares may be a little above 1

    def thresholds(self) -> list[float]:
        """Of each head, the least that no more samples exceed than may."""
        ratios = torch.cat(self.ratios).sort(0).values
        return ratios[-1 - int(_VOTES * len(ratios))].tolist()


def _watched(site: AttentionSite) -> bool:
    """Whether an attention is one per sample among the tokens of a sequence with reducible ones."""
    axis = site.axis
    if not site.raised or site.kind not in ("self", "joint") or axis is None or axis.reducible is None:
        return False
    return site.queries == site.keys == axis.length and site.node.args[0].meta["val"].dim() == 4


class _Watch(fx.Interpreter):
    """Runs a program and shows the operands of its attentions; every other value lives as long as it is needed."""

    def __init__(self, module: torch.nn.Module, spreads: Mapping[str, _Spread | _Votes]) -> None:
        super().__init__(module)
        self.spreads = spreads

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.spreads:
            self.spreads[n.name].add(*self.fetch_args_kwargs_from_env(n))
        return super().run_node(n)


class _Spread:
    """How one attention is spread, summed over samples."""

    def __init__(self, site: AttentionSite) -> None:
        self.axis, self.count, self.heads = site.axis, site.queries, site.heads
        self.body = self.axis.reducible
        self.answer = next((s.start for s in self.axis.segments if s.name == "cls"), None)
        if self.answer is None and site.causal:
            self.answer = self.count - 1
        self.neighbours = list(_neighbourhoods(self.body))
        inside = torch.arange(self.body.start, self.body.start + self.body.length)
        outside = torch.tensor(sorted({*range(self.count)} - {*inside.tolist()}), dtype=torch.int64)
        self.rows = [(rows, True) for rows in self.neighbours] or [(rows, False) for rows in inside.split(_ROWS)]
        self.rows += [(rows, False) for rows in outside.split(_ROWS) if len(rows)]
        self.sums: dict[str, float] = {}
        self.mass = torch.zeros(len(self.axis.segments), len(self.axis.segments), dtype=torch.float64)
        self.samples = 0

    def add(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """What one batch adds: [B, heads, rows, keys] at a time."""
        query, key, _, bias, key_bias = [*args, None, None][:5]
        total = unit = 0
        for rows, near in self.rows:
            share = _probabilities(query, key, bias, key_bias, rows.to(query.device), kwargs)
            mean = share.mean(1)
            self._count("entropy", _entropy(mean).sum(1))
            self._count("head_entropy", _entropy(share).mean(1).sum(1))
            cut = torch.where(mean > 2 / self.count, mean, 0.0)
            total = total + cut.sum(1)
            unit = unit + F.normalize(cut, dim=-1).sum(1)
            if near:
                far = share.index_fill(3, rows.to(share.device), 0.0)
                self._count("redundancy", F.cosine_similarity(far, far.mean(2, keepdim=True), dim=-1).mean(1).sum(1))
            if self.answer is not None and (at := (rows == self.answer).nonzero()).numel():
                seen = mean[:, int(at), self.body.start : self.body.start + self.body.length]
                self._count("answer_entropy", _entropy(seen / seen.sum(-1, keepdim=True).clamp_min(1e-12)))
            ends = [s.start for s in self.axis.segments] + [self.count]
            columns = torch.stack([mean[..., a:b].sum(-1).sum(0) for a, b in zip(ends, ends[1:], strict=False)], -1)
            owner = torch.bucketize(rows, torch.tensor(ends), right=True) - 1
            self.mass.index_add_(0, owner, columns.double().cpu())
        self._count("row_similarity", (F.normalize(total, dim=-1) * unit).sum(-1))
        self.samples += len(query)

    def _count(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())

    def result(self) -> dict[str, Any]:
        mean = {name: value / max(self.samples, 1) for name, value in self.sums.items()}
        heads = (mean["entropy"] - mean["head_entropy"]) / self.count
        lengths = torch.tensor([s.length for s in self.axis.segments], dtype=torch.float64)
        mass = self.mass / max(self.samples, 1)
        i = self.axis.segments.index(self.body)
        inside, read, given = mass[i, i], mass[i].sum() - mass[i, i], mass[:, i].sum() - mass[i, i]
        return {
            "entropy": mean["entropy"] / self.count,
            "head_entropy": mean["head_entropy"] / self.count,
            "answer_entropy": mean.get("answer_entropy"),
            "head_diversity": heads / math.log(self.heads) if self.heads > 1 else None,
            "row_similarity": mean["row_similarity"] / self.count,
            "redundancy": mean["redundancy"] / self.body.length if self.neighbours else None,
            "segments": [s.name for s in self.axis.segments],
            "between": (mass / lengths[:, None]).tolist(),
            "intra": 100 * float(inside) / self.count,
            "inter": 100 * float(0.7 * read + 0.3 * given) / self.count,
        }


def _neighbourhoods(segment: Segment) -> Iterator[Tensor]:
    """Positions of the tokens of each window of a grid, or of each run where there is none; a lone one is none."""
    height, width = (segment.grid or (1, segment.length))[-2:]
    if segment.length % (height * width):
        height, width = 1, segment.length
    place = torch.arange(segment.length).view(-1, height, width) + segment.start
    high, wide = (_WINDOW, _WINDOW) if height > 1 else (1, _WINDOW**2)
    for frame in place:
        for band in frame.split(high, 0):
            for window in band.split(wide, 1):
                yield window.flatten()


def _probabilities(
    query: Tensor, key: Tensor, bias: Tensor | None, key_bias: Tensor | None, rows: Tensor, options: dict[str, Any]
) -> Tensor:
    """Some rows of attention, [B, H, rows, keys] in float32; a query that sees no key gives nothing."""
    scale = options.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query[:, :, rows].float() * scale) @ key.float().transpose(-2, -1)
    if bias is not None:
        part = bias[..., rows, :] if bias.dim() > 1 and bias.shape[-2] != 1 else bias
        logits = logits.masked_fill(~part, -math.inf) if part.dtype is torch.bool else logits + part.float()
    if key_bias is not None:
        logits = logits + key_bias[:, None, None, :].float()
    if options.get("is_causal"):
        column = torch.arange(key.shape[2], device=rows.device)
        logits = logits.masked_fill(column > rows[:, None], -math.inf)
    return logits.softmax(-1).nan_to_num(0.0)


def _entropy(share: Tensor) -> Tensor:
    """In nats, of the last dimension."""
    return torch.special.entr(share).sum(-1)


def _add_flow(layers: list[dict[str, Any]]) -> None:
    """The information flow of each layer of one axis, 0.4 intra + 0.3 inter + 0.3 (all intra so far), from 0 to 1."""
    flow, before = [], 0.0
    for i, row in enumerate(layers):
        before += row["intra"] * (0.73 if i else 1.0)
        flow.append(0.4 * row["intra"] + 0.3 * row["inter"] + 0.3 * before)
    low, high = min(flow), max(flow)
    for row, value in zip(layers, flow, strict=True):
        row["flow"] = (value - low) / (high - low) if high > low else 0.0


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
