"""What a recipe learns from data before a program is rewritten: scores, similarity thresholds, attention patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tokenopt.attention.layout import Layout
from tokenopt.attention.pattern import Pattern
from tokenopt.attention.pattern import Refused as PatternRefused
from tokenopt.attention.recipe import AttentionRecipe
from tokenopt.errors import UsageError
from tokenopt.graph import add_output
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.passes.reduce_tokens import Planner, ReduceTokens
from tokenopt.passes.sparsify_attention import layout_of, numbered_sites
from tokenopt.program import Program, flatten_tensors
from tokenopt.schedule import Schedule
from tokenopt.tokens.plan import Plan, Refused, Stream, logits_of
from tokenopt.tokens.recipe import TokenRecipe
from tokenopt.tokens.score import Learned
from tokenopt.tokens.select import Threshold

aten = torch.ops.aten
ops = torch.ops.tokenopt

_KEPT = 2**29  # bytes of queries and keys that patterns are fitted to; one batch may be more

Batches = Iterable[Sequence[Tensor]]


def needs_data(recipe: TokenRecipe | AttentionRecipe) -> bool:
    """Whether a recipe has parts that have to be fitted on data first."""
    if isinstance(recipe, AttentionRecipe):
        return any(pattern.unfitted for pattern in recipe.pattern.values())
    score, select = recipe.score, recipe.select
    return (isinstance(score, Learned) and score.weights is None) or (
        isinstance(select, Threshold) and not select.values
    )


def fit(recipe: TokenRecipe, schedule: Schedule, program: Program, batches: Batches, path: Path) -> TokenRecipe:
    """The recipe with its parts fitted on data.

    Args:
        batches: inputs of the program, as flat tensors.
        path: where the weights of a learned score are written (.safetensors).

    Raises:
        UsageError: if there is nothing to learn from.
    """
    if isinstance(recipe.select, Threshold):
        values = fit_thresholds(recipe, schedule, program, batches)
        return replace(recipe, select=replace(recipe.select, values=tuple(values)))
    distil(recipe, schedule, program, batches, path)
    return replace(recipe, score=replace(recipe.score, weights=str(path)))


# -- looking -----------------------------------------------------------------------------------------------------------


@dataclass
class _Observer(Planner):
    """Adds outputs at a recipe's places; ``look`` gives them, and may give a plan."""

    look: Callable[[Stream], tuple[list[fx.Node], Plan | None]] = field(kw_only=True)
    seen: list[tuple[int, Stream]] = field(default_factory=list)

    def __call__(self, stream: Stream) -> Plan | None:
        if self.kept(stream) >= stream.count:
            return None
        try:
            nodes, plan = self.look(stream)
        except Refused as refused:
            raise UsageError(
                f"recipe {self.recipe.name} cannot be fitted here", why=refused.why, hint=refused.hint
            ) from None
        for node in nodes:
            add_output(stream.editor.program, node, "seen")
        self.seen.append((stream.layer, stream))
        return plan


def _observe(
    recipe: TokenRecipe, schedule: Schedule, program: Program,
    look: Callable[[Stream], tuple[list[fx.Node], Plan | None]],
) -> tuple[Program, list[tuple[int, Stream]]]:  # fmt: skip
    """The dense program with more outputs, and the places that they are from."""
    seeing = canonicalize(program).program
    observer = _Observer(recipe, schedule, look=look)
    ReduceTokens(recipe).apply(seeing, observer)
    if not observer.seen:
        raise UsageError(f"recipe {recipe.name} reduces nothing on this model, so there is nothing to fit")
    return seeing, observer.seen


def _run(program: Program, batch: Sequence[Tensor]) -> list[Tensor]:
    args, kwargs = program.bind(batch)
    return flatten_tensors(program(*args, **kwargs))


# -- thresholds --------------------------------------------------------------------------------------------------------


def fit_thresholds(recipe: TokenRecipe, schedule: Schedule, program: Program, batches: Batches) -> list[float]:
    """The similarity above which tokens merge, layer by layer, so that on average as many do as the schedule says.

    In each layer the edges of all samples of a batch are ranked together, the threshold is the similarity of the last
    one that merges, and the batch goes on with what it merges; thresholds are averaged over batches.

    Source: Wang et al., DyMU, arXiv:2504.17040.
    """

    def ranked(stream: Stream, similarity: fx.Node) -> list[fx.Node]:
        removed = stream.count - schedule.kept(stream.layer, len(stream.sites), stream.count)
        return [stream.insert(ops.shared_threshold.default, similarity, removed)] * 2

    by_layer = _edges(recipe, schedule, program, batches, ranked)
    return [by_layer.get(layer, 2.0) for layer in range(max(by_layer) + 1)]  # 2 is above every cosine


def threshold_counts(recipe: TokenRecipe, schedule: Schedule, program: Program, batches: Batches) -> dict[int, float]:
    """How many tokens the thresholds of a recipe merge in each layer, mean over samples."""

    def counted(stream: Stream, similarity: fx.Node) -> list[fx.Node]:
        threshold = stream.constant("threshold", torch.tensor(recipe.select.values[stream.layer]))
        above = stream.insert(aten.gt.Tensor, similarity, threshold)
        merged = stream.insert(aten.sum.dim_IntList, above, [1])
        return [threshold, merged]

    return _edges(recipe, schedule, program, batches, counted)


def _edges(
    recipe: TokenRecipe, schedule: Schedule, program: Program, batches: Batches,
    choose: Callable[[Stream, fx.Node], list[fx.Node]],
) -> dict[int, float]:  # fmt: skip
    """By layer, the mean over batches of what is chosen to be seen.

    Args:
        choose: for a place, and the similarity of each token to its best partner there: the threshold above which the
            batch merges, and what is to be seen.
    """
    select = recipe.select
    assert isinstance(select, Threshold), "only a threshold has thresholds"

    def look(stream: Stream) -> tuple[list[fx.Node], Plan]:
        metric = stream.keys(stream.site()) if select.metric == "key" else stream.rows
        edges = stream.insert(ops.best_partners.default, metric, stream.size, stream.start, stream.stop)
        threshold, value = choose(stream, stream.items(edges, 1)[0])
        merged = recipe.fuse.build(stream, select.masked(stream, threshold), None, False)
        return [value], recipe.restore.build(stream, merged)

    seeing, seen = _observe(recipe, schedule, program, look)
    total, count = torch.zeros(len(seen)), 0
    for batch in batches:
        found = _run(seeing, batch)[-len(seen) :]
        total += torch.stack([f.float().mean() for f in found])
        count += 1
    if not count:
        raise UsageError("there is no data to fit thresholds on")
    return dict(zip((layer for layer, _ in seen), (total / count).tolist(), strict=True))


# -- attention patterns ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attended:
    """What attentions compute on data: of ``count`` in all, by number, layout, queries and keys [B, H, N, D]."""

    count: int
    operands: dict[int, tuple[Layout, Tensor, Tensor]]


def fit_patterns(recipe: AttentionRecipe, program: Program, batches: Batches, path: Path) -> AttentionRecipe:
    """The recipe with a pattern of its own for every attention, fitted on its queries and keys in the dense program.

    Attentions that a pattern cannot be applied to keep it as it is, and are refused where it is applied.

    Args:
        batches: inputs of the program, as flat tensors; no labels.
        path: where weights are written, if there are any (.safetensors), as ``site<number>.<name>``.

    Raises:
        UsageError: if there is no data, or no attention to fit.
    """
    return fit_to(recipe, attended(recipe, program, batches), path)


def attended(recipe: AttentionRecipe, program: Program, batches: Batches) -> Attended:
    """What the attentions compute that a recipe's patterns are fitted to, on some of the batches if they are many.

    Raises:
        UsageError: if there is no data, or no attention to fit.
    """
    seeing = canonicalize(program).program
    sites = numbered_sites(seeing)
    layouts: dict[int, Layout] = {}
    for i, site in enumerate(sites):
        pattern = recipe.pattern_at(i, len(sites))
        try:
            layouts |= {i: layout_of(site)} if pattern is not None and pattern.unfitted else {}
        except PatternRefused:
            continue
    if not layouts:
        raise UsageError(f"recipe {recipe.name} suits no attention of this model, so there is nothing to fit")
    for i in layouts:
        for node in sites[i].node.args[:2]:
            add_output(seeing, node, "seen")
    seen, every = [], 1
    for number, batch in enumerate(batches):
        if number % every:
            continue
        seen.append(_run(seeing, batch)[-2 * len(layouts) :])
        while len(seen) > 1 and sum(t.nbytes for found in seen for t in found) > _KEPT:
            seen, every = seen[::2], 2 * every  # all over the data still
    if not seen:
        raise UsageError("there is no data to fit patterns on")
    operands = [torch.cat([found[i].float() for found in seen]) for i in range(2 * len(layouts))]
    pairs = zip(layouts.items(), operands[::2], operands[1::2], strict=True)
    return Attended(len(sites), {i: (layout, query, key) for (i, layout), query, key in pairs})


def fit_to(recipe: AttentionRecipe, seen: Attended, path: Path) -> AttentionRecipe:
    """The recipe with its patterns fitted to what was seen; see `fit_patterns`."""
    from safetensors.torch import save_file

    patterns = {i: p for i in range(seen.count) if (p := recipe.pattern_at(i, seen.count)) is not None}
    weights: dict[str, Tensor] = {}
    for i, (layout, query, key) in seen.operands.items():
        patterns[i], learned = _fitted(patterns[i], layout, query, key, path, i)
        weights |= {f"site{i}.{name}": value.contiguous() for name, value in learned.items()}
    if weights:
        save_file(weights, path)
    return replace(recipe, pattern={str(i): p for i, p in patterns.items()})


def _fitted(
    pattern: Pattern, layout: Layout, query: Tensor, key: Tensor, path: Path, site: int
) -> tuple[Pattern, dict[str, Tensor]]:
    try:
        fitted, weights = pattern.fit(layout, query, key)
    except PatternRefused:
        return pattern, {}
    return replace(fitted, weights=str(path), site=site) if weights else fitted, weights


# -- learned scores ----------------------------------------------------------------------------------------------------


def distil(
    recipe: TokenRecipe, schedule: Schedule, program: Program, batches: Batches, path: Path, *,
    tokens: int = 20000, steps: int = 400, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Trains a recipe's learned score at each of its places on what the dense program computes, and writes it.

    Args:
        batches: inputs of the program, as flat tensors; no labels.
        path: the .safetensors file to write.
        tokens: at most as many are kept for each place.
        steps: of AdamW, on 1024 tokens each.

    Returns:
        For each place, by its name in the file, the rank correlation of prediction and target on every fifth token,
        which is not trained on.

    Raises:
        UsageError: if there is no data, or the target is not to be had from this model.
    """
    from safetensors.torch import save_file

    score = recipe.score
    assert isinstance(score, Learned), "only a learned score is learned"
    if score.target not in ("received", "confidence"):
        raise UsageError(f"a score cannot learn {score.target!r}", hint="target=received or target=confidence")

    def look(stream: Stream) -> tuple[list[fx.Node], None]:
        segment = stream.insert(aten.slice.Tensor, stream.rows, 1, stream.start, stream.stop)
        if score.target == "confidence":
            return [segment], None
        site, first = stream.sites[-1], stream.segment.start
        logits, options = logits_of(site)
        insert = stream.editor.insert
        node = insert(site.node, ops.attention_received.default, *logits, None, **options)
        return [segment, insert(node, aten.slice.Tensor, node, 1, first, first + stream.count)], None

    seeing, seen = _observe(recipe, schedule, program, look)
    per_place = 1 if score.target == "confidence" else 2
    features: list[list[Tensor]] = [[] for _ in seen]
    targets: list[list[Tensor]] = [[] for _ in seen]
    for batch in batches:
        found = _run(seeing, batch)
        outputs, extra = found[: -per_place * len(seen)], found[-per_place * len(seen) :]
        for i, (_, stream) in enumerate(seen):
            features[i].append(extra[per_place * i].float().flatten(0, 1))
            wanted = -_confidence(outputs, stream) if score.target == "confidence" else extra[per_place * i + 1]
            targets[i].append(wanted.float().flatten())
    if not features[0]:
        raise UsageError("there is no data to learn a score from")
    weights: dict[str, Tensor] = {}
    quality: dict[str, float] = {}
    for (layer, _), x, y in zip(seen, features, targets, strict=True):
        network, rank = _train(torch.cat(x), torch.cat(y), score.hidden, tokens, steps, seed)
        layers = [m for m in network if isinstance(m, nn.Linear)]
        for i, linear in enumerate(layers):
            weights[f"layer{layer}.{i}.weight"] = linear.weight.detach().contiguous()
            weights[f"layer{layer}.{i}.bias"] = linear.bias.detach().contiguous()
        quality[f"layer{layer}"] = rank
    save_file(weights, path)
    return quality


def _confidence(outputs: Sequence[Tensor], stream: Stream) -> Tensor:
    """The largest class probability of each token's own prediction, [B, n], from an output that has one per token."""
    grid = stream.segment.grid
    for out in outputs:
        if out.dim() == 3 and out.shape[1] in (stream.total, stream.count):
            first = stream.start if out.shape[1] == stream.total else 0
            return out[:, first : first + stream.count].float().softmax(-1).amax(-1)
        if (
            out.dim() == 4
            and grid
            and len(grid) == 2
            and all(s % g == 0 for s, g in zip(out.shape[2:], grid, strict=True))
        ):
            return F.adaptive_avg_pool2d(out.float().softmax(1).amax(1, keepdim=True), grid).flatten(1)
    raise UsageError(
        "no output of the model is a prediction for each token",
        why=f"the outputs are {', '.join(str(list(o.shape)) for o in outputs)}; there are {stream.count} tokens",
        hint="target=received needs none",
    )


def _train(x: Tensor, y: Tensor, hidden: int, tokens: int, steps: int, seed: int) -> tuple[nn.Sequential, float]:
    """A network that predicts y [T] from x [T, C], and the rank correlation on what it was not trained on."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randperm(len(x), generator=generator)[:tokens]
    x, y = x[pick], y[pick]
    held = torch.arange(len(x)) % 5 == 0
    mean, scale = x[~held].mean(0), x[~held].std(0).clamp_min(1e-6)
    wanted = (y - y[~held].mean()) / y[~held].std().clamp_min(1e-12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [x.shape[1], *([hidden] if hidden else []), 1]
        layers: list[nn.Module] = []
        for i in range(len(widths) - 1):
            layers += [nn.GELU(), nn.Linear(widths[i], widths[i + 1])] if i else [nn.Linear(widths[i], widths[i + 1])]
        network = nn.Sequential(*layers)
    train_x, train_y = ((x - mean) / scale)[~held], wanted[~held]
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(train_x), (min(1024, len(train_x)),), generator=generator)
            loss = F.mse_loss(network(train_x[rows]).squeeze(-1), train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    first: Any = network[0]
    with torch.no_grad():  # the scaling of the features goes into the first layer
        first.weight /= scale
        first.bias -= first.weight @ mean
        predicted = network(x[held]).squeeze(-1)
    return network, _rank_correlation(predicted, y[held])


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1]) if len(a) > 1 else 1.0
