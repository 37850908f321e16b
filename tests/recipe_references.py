"""Hand-patched token reductions beyond ToMe, EViT and FasterVLM, one sample and one token at a time where clearer.

Every function runs a tiny timm VisionTransformer of ``tiny`` (or ``TinyVGGT``) block by block and reduces its tokens as
the paper says. As in ``references.py``, nothing is imported from tokenopt: an error there cannot hide here.

Conventions, where the papers leave a choice:

* A *plan* is, per sample, a list of groups; a group is the list of token positions that become one token, and its first
  position is the one that it stands at. Positions that are in no group are dropped.
* Groups are in ascending order of the positions they stand at; only ToMe's alternating matching has another order.
* Prefix tokens (class) are groups of their own, first, and neither receive nor go.
* ``keep`` is the share of the patches present that stays, rounded up. Ties go to the lowest position.
* ``layer`` counts blocks from 0; a reduction *between blocks* at layer l is before block l, one *mid* is between its
  attention and its MLP, after the residual sum.
* Output recipes return the features behind the final norm, [B, prefix + K, C].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo import perturb
from tests.references import Attended, Tokens, log_size, take, timm_embed, tiny_timm, tome_timm

Group = list[int]
Plan = list[list[Group]]

# -- tiny models -------------------------------------------------------------------------------------------------------


def tiny(kind: str = "head", **options: Any) -> nn.Module:
    """A VisionTransformer of 4 blocks, 32 wide, 2 heads, on 32 x 32 pixels: an 8 x 8 grid of patches.

    Kinds: ``head`` (class token, 10 logits), ``features`` (class token, all features), ``plain`` (no class token, all
    features).
    """
    size: dict[str, Any] = {"depth": 4, "embed_dim": 32, "num_heads": 2}
    kinds: dict[str, dict[str, Any]] = {
        "head": {},
        "features": {"num_classes": 0, "global_pool": ""},
        "plain": {"num_classes": 0, "global_pool": "", "class_token": False},
    }
    return tiny_timm(scale=0.2, **size | kinds[kind] | options)


class WithIds(nn.Module):
    """A vision model with a second input that it does not read: the trajectory of every patch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.model(x)


# -- plans -------------------------------------------------------------------------------------------------------------


def mean_of(x: Tensor, group: Group, weight: Tensor | None = None) -> Tensor:
    """The mean of the rows of ``x`` [N, C] in a group, weighted by ``weight`` [N]."""
    if weight is None:
        return x[group].mean(dim=0)
    return (x[group] * weight[group, None]).sum(dim=0) / weight[group].sum()


def apply(x: Tensor, plan: Plan, weight: Tensor | None = None) -> Tensor:
    """The mean of every group. Shapes: x [B, N, C], weight [B, N] -> [B, groups, C]."""
    rows = []
    for b, groups in enumerate(plan):
        rows.append(torch.stack([mean_of(x[b], g, None if weight is None else weight[b]) for g in groups]))
    return torch.stack(rows)


def reduce(tokens: Tokens, plan: Plan, by_size: bool = False) -> Tokens:
    """The stream after a plan; the mean of a group is by size or plain."""
    home = torch.full_like(tokens.position, -1)
    for b, groups in enumerate(plan):
        for place, group in enumerate(groups):
            home[b, group] = place
    stands = torch.tensor([[group[0] for group in groups] for groups in plan])
    size = torch.stack([torch.stack([tokens.size[b, g].sum() for g in groups]) for b, groups in enumerate(plan)])
    return replace(
        tokens,
        x=apply(tokens.x, plan, tokens.size if by_size else None),
        size=size,
        position=take(tokens.position, stands),
        home=torch.where(tokens.home >= 0, take(home, tokens.home.clamp(min=0)), -1),
    )


def copied(y: Tensor, plan: Plan, n: int) -> Tensor:
    """The token of its group for every original token, [B, groups, C] -> [B, n, C]."""
    out = y.new_full((len(y), n, y.shape[2]), math.nan)
    for b, groups in enumerate(plan):
        for place, group in enumerate(groups):
            out[b, group] = y[b, place]
    assert not out.isnan().any(), "a token without a group has nothing to copy"
    return out


def ordered(groups: Sequence[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: group[0])


def singles(prefix: int, patches: Sequence[int]) -> list[Group]:
    """The prefix and the given patches (numbered from 0), each for itself."""
    return [[i] for i in range(prefix)] + [[prefix + p] for p in sorted(patches)]


def shifted(prefix: int, groups: Sequence[Group]) -> list[Group]:
    """The prefix, each token for itself, and groups of patches (numbered from 0)."""
    return [[i] for i in range(prefix)] + ordered([[prefix + p for p in group] for group in groups])


def count(keep: float, n: int) -> int:
    return math.ceil(round(keep * n, 6))


def best(score: Tensor, k: int) -> list[int]:
    """The positions of the ``k`` largest of ``score`` [n], the best first."""
    return score.argsort(descending=True, stable=True)[:k].tolist()


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def nearest(metric: Tensor, source: int, targets: Sequence[int]) -> int:
    """The target most similar (cosine) to ``source`` among the rows of ``metric`` [N, D]."""
    return targets[int((unit(metric[list(targets)]) @ unit(metric[source])).argmax())]


def match(metric: Tensor, sources: Sequence[int], targets: Sequence[int], r: int) -> list[Group]:
    """Groups of all rows of ``metric`` [N, D], the ``r`` sources nearest to a target having gone to it."""
    sources, targets = list(sources), list(targets)
    groups = {i: [i] for i in range(len(metric))}
    if sources and targets:
        similarity = unit(metric[sources]) @ unit(metric[targets]).T
        value, which = similarity.max(dim=1)
        for i in best(value, r):
            groups[targets[int(which[i])]].append(sources[i])
            del groups[sources[i]]
    return ordered(list(groups.values()))


def grid_of(model: nn.Module) -> tuple[int, int]:
    return tuple(model.patch_embed.grid_size)


def grid_cells(grid: tuple[int, int], kept: int) -> tuple[int, int]:
    """The split of a grid into at most ``kept`` cells, with about the grid's own aspect."""
    h, w = grid
    rows = max(1, min(h, math.floor(h * math.sqrt(kept / (h * w)) + 1e-9)))
    return rows, min(w, kept // rows)


# -- what an unreduced run shows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """Per layer: attention [B, H, N, N], mean keys [B, N, D]; at the end: features [B, N, C] behind the final norm."""

    attention: list[Tensor]
    key: list[Tensor]
    features: Tensor
    prefix: int

    def class_row(self, layer: int) -> Tensor:
        """The attention of the class token to the patches, mean over heads, [B, n]."""
        assert self.prefix, "there is no class token"
        return self.attention[layer].mean(dim=1)[:, 0, self.prefix :]

    def received(self, layer: int) -> Tensor:
        """The attention that patches get, mean over heads and all queries, [B, n]."""
        return self.attention[layer].mean(dim=(1, 2))[:, self.prefix :]

    @property
    def patches(self) -> Tensor:
        return self.features[:, self.prefix :]

    def patch_keys(self, layer: int) -> Tensor:
        return self.key[layer][:, self.prefix :]


def weights_of(attended: Attended) -> Tensor:
    """The attention weights, [B, H, N, N]."""
    logits = attended.query @ attended.key.mT * attended.scale
    return (logits if attended.bias is None else logits + attended.bias).softmax(dim=-1)


def see(model: nn.Module, x: Tensor) -> Seen:
    tokens, layers = timm_embed(model, x)
    attention, key = [], []
    for layer in layers:
        attended = layer.attend(tokens, None)
        attention.append(weights_of(attended))
        key.append(attended.key.mean(dim=1))
        tokens = replace(tokens, x=layer.feed(replace(tokens, x=attended.x)))
    return Seen(attention, key, model.norm(tokens.x), tokens.prefix)


def finish(model: nn.Module, tokens: Tokens, short: bool) -> Tensor:
    """Logits of a model with a head, else the features: the reduced ones if ``short``, or every original token's."""
    if model.global_pool:
        assert model.global_pool == "token", "a mean would have to be weighted"
        return model.forward_head(model.norm(tokens.x))
    return model.norm(tokens.x if short else tokens.restored())


# -- inside attention --------------------------------------------------------------------------------------------------


def attend_on(
    model: nn.Module, x: Tensor, method: Callable[[Tensor, int], tuple[Tensor, Callable[[Tensor], Tensor]]]
) -> Tensor:
    """Runs the model with every attention on fewer tokens.

    ``method(normed tokens [B, N, C], layer)`` gives the fewer tokens [B, M, C] and how to make [B, M, C] full again.
    """
    x = timm_embed(model, x)[0].x
    for layer, block in enumerate(model.blocks):
        fewer, back = method(block.norm1(x), layer)
        x = x + block.ls1(back(block.attn(fewer)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


def cell_targets(grid: tuple[int, int], cell: int, generator: torch.Generator | None) -> list[int]:
    """One position per full cell of cell x cell patches: at random, or the top left one."""
    h, w = grid
    offsets = torch.zeros(h // cell, w // cell, dtype=torch.int64)
    if generator is not None:
        offsets = torch.randint(cell * cell, (h // cell, w // cell), generator=generator)
    targets = []
    for i, j in product(range(h // cell), range(w // cell)):
        down, right = divmod(int(offsets[i, j]), cell)
        targets.append((i * cell + down) * w + j * cell + right)
    return sorted(targets)


def tomesd(
    model: nn.Module, x: Tensor, keep: float = 0.5, cell: int = 2, seed: int | None = 0, layers: Any = None
) -> Tensor:
    """Bolya and Hoffman, Token Merging for Fast Stable Diffusion, arXiv:2303.17604: the qkv input is merged by itself.

    Plain means, no sizes; the result is copied back to all tokens before the residual sum.
    """
    grid, prefix = grid_of(model), model.num_prefix_tokens
    n = grid[0] * grid[1]

    def method(h: Tensor, layer: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        generator = None if seed is None else torch.Generator().manual_seed(seed + layer)
        targets = cell_targets(grid, cell, generator)
        sources = [i for i in range(n) if i not in targets]
        r = n - count(keep, n) if layers is None or layer in layers else 0
        plan = [shifted(prefix, match(row[prefix:], sources, targets, r)) for row in h]
        return apply(h, plan), lambda y: copied(y, plan, h.shape[1])

    return attend_on(model, x, method)


def agentsd(model: nn.Module, x: Tensor, keep: float = 0.6, cell: int = 4, seed: int | None = 0) -> Tensor:
    """Han et al., Agent Attention, arXiv:2312.08874: the early steps of AgentSD, merging alone."""
    return tomesd(model, x, keep, cell, seed)


def agentsd_late(model: nn.Module, x: Tensor, keep: float = 0.5, cell: int = 2, seed: int | None = 0) -> Tensor:
    """The late steps of AgentSD."""
    return tomesd(model, x, keep, cell, seed)


def bounds(length: int, cells: int, i: int) -> range:
    """What cell ``i`` covers of an axis in adaptive average pooling; cells may overlap."""
    return range(i * length // cells, -((i + 1) * -length // cells))


def pooled(x: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """The mean of every cell. Shapes: x [n, C] in raster order -> [cells, C]."""
    rows = []
    for i, j in product(range(cells[0]), range(cells[1])):
        members = [a * grid[1] + b for a in bounds(grid[0], cells[0], i) for b in bounds(grid[1], cells[1], j)]
        rows.append(x[members].mean(dim=0))
    return torch.stack(rows)


def association(
    x: Tensor, grid: tuple[int, int], cells: tuple[int, int], local: bool, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """Super tokens of one sample and how much each token belongs to each: [n, C] -> [m, C], [n, m].

    Huang et al., Vision Transformer with Super Token Sampling, arXiv:2211.11167. There are no cells outside the
    grid, and the token's own cell is the one that its centre lies in.
    """
    seeds = pooled(x, grid, cells)
    for _ in range(iterations):
        belongs = torch.zeros(len(x), len(seeds))
        for token, (a, b) in enumerate(product(range(grid[0]), range(grid[1]))):
            own = ((2 * a + 1) * cells[0] // (2 * grid[0]), (2 * b + 1) * cells[1] // (2 * grid[1]))
            around = [
                i * cells[1] + j
                for i, j in product(range(cells[0]), range(cells[1]))
                if not local or max(abs(i - own[0]), abs(j - own[1])) <= 1
            ]
            logits = seeds[around] @ x[token] / math.sqrt(x.shape[1])
            belongs[token, around] = logits.softmax(dim=0)
        seeds = belongs.T @ x / (belongs.sum(dim=0)[:, None] + 1e-12)
    return seeds, belongs


def supertoken(model: nn.Module, x: Tensor, keep: float = 0.25, iterations: int = 1, local: bool = True) -> Tensor:
    """Super token attention: pool by a soft association, attend, spread by the same association."""
    grid, prefix = grid_of(model), model.num_prefix_tokens
    n = grid[0] * grid[1]
    cells = grid_cells(grid, count(keep, n))

    def method(h: Tensor, layer: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if count(keep, n) >= n:
            return h, lambda y: y
        pairs = [association(row[prefix:], grid, cells, local, iterations) for row in h]
        fewer = torch.stack([torch.cat([row[:prefix], s]) for row, (s, _) in zip(h, pairs, strict=True)])

        def back(y: Tensor) -> Tensor:
            return torch.stack([torch.cat([r[:prefix], a @ r[prefix:]]) for r, (_, a) in zip(y, pairs, strict=True)])

        return fewer, back

    return attend_on(model, x, method)


def semantic_token(model: nn.Module, x: Tensor, keep: float, first: int, last: int) -> Tensor:
    """Chang et al., Making Vision Transformers Efficient from a Token Sparsification View, arXiv:2303.08685.

    Without its learned attention: blocks ``first`` to ``last`` run on pooled seeds after one soft assignment of all
    tokens to them, and every token then gets its share of what they became.
    """
    grid, prefix = grid_of(model), model.num_prefix_tokens
    n = grid[0] * grid[1]
    cells = grid_cells(grid, count(keep, n))
    x = timm_embed(model, x)[0].x
    pairs = None
    for layer, block in enumerate(model.blocks):
        if layer == first and count(keep, n) < n:
            pairs = [association(row[prefix:], grid, cells, local=False) for row in x]
            x = torch.stack([torch.cat([row[:prefix], s]) for row, (s, _) in zip(x, pairs, strict=True)])
        x = block(x)
        if layer == last and pairs is not None:
            x = torch.stack([torch.cat([r[:prefix], a @ r[prefix:]]) for r, (_, a) in zip(x, pairs, strict=True)])
    return model.forward_head(model.norm(x))


# -- between attention and MLP -----------------------------------------------------------------------------------------


def mid(
    model: nn.Module,
    x: Tensor,
    method: Callable[[Tokens, Attended, int], Tokens],
    proportional: bool = False,
    short: bool = True,
    trace: list[Tokens] | None = None,
) -> Tensor:
    """Runs the model with ``method(tokens after attention, what attention saw, layer)`` before every MLP."""
    tokens, blocks = timm_embed(model, x)
    for layer, block in enumerate(blocks):
        attended = block.attend(tokens, log_size(tokens) if proportional else None)
        tokens = method(replace(tokens, x=attended.x), attended, layer)
        tokens = replace(tokens, x=block.feed(tokens))
        if trace is not None:
            trace.append(tokens)
    return finish(model, tokens, short)


def energy(metric: Tensor, margin: float, alpha: float = 1.0, shift: bool = False) -> Tensor:
    """PiToMe's energy of the rows of ``metric`` [n, D], each among its own neighbours; ``shift``: as in its code."""
    similarity = unit(metric) @ unit(metric).T
    far = alpha * ((similarity - margin).exp() - 1)
    return torch.where(similarity >= margin, similarity - margin if shift else similarity, far).mean(dim=1)


def pitome(
    model: nn.Module,
    x: Tensor,
    r: Sequence[int],
    alpha: float = 1.0,
    shift: bool = False,
    short: bool = True,
    trace: list[Tokens] | None = None,
) -> Tensor:
    """Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, arXiv:2405.16148.

    The 2 r patches of highest energy, by rank in turn sources and targets; every source goes, weighted by size.
    """

    def method(tokens: Tokens, attended: Attended, layer: int) -> Tokens:
        metric, prefix = attended.key.mean(dim=1), tokens.prefix
        n = tokens.x.shape[1] - prefix
        merged = min(r[layer], n // 2)
        margin = 0.9 - 0.9 * layer / len(model.blocks)
        plan = []
        for keys in metric[:, prefix:]:
            ranked = best(energy(keys, margin, alpha, shift), 2 * merged)
            plan.append(shifted(prefix, match(keys, ranked[::2], ranked[1::2], merged)))
        return reduce(tokens, plan, by_size=True)

    return mid(model, x, method, proportional=True, short=short, trace=trace)


def dymu(model: nn.Module, x: Tensor, r: Sequence[int], short: bool = True) -> Tensor:
    """Wang et al., DyMU, arXiv:2504.17040, with a fixed number per layer: ToMe with proportional attention."""
    trace: list[Tokens] = []
    if model.global_pool:
        return tome_timm(model, x, r)
    try:
        model.global_pool = "token"  # tome_timm wants a head; its stream is what we are after
        tome_timm(model, x, r, trace=trace)
    finally:
        model.global_pool = ""
    return finish(model, trace[-1], short)


def dependency(
    model: nn.Module,
    x: Tensor,
    keep: float,
    layers: Sequence[int],
    short: bool = True,
    trace: list[Tokens] | None = None,
) -> Tensor:
    """Ding et al., DependencyViT, arXiv:2304.03282: who sends little goes to the parent it is most similar to.

    What a token sends to the others (in reversed attention) is what they pay to it here: a column of the attention
    matrix without the diagonal.
    """

    def method(tokens: Tokens, attended: Attended, layer: int) -> Tokens:
        if layer not in layers:
            return tokens
        prefix, n = tokens.prefix, tokens.x.shape[1] - tokens.prefix
        weights = weights_of(attended).mean(dim=1)
        sent = (weights - torch.diag_embed(weights.diagonal(dim1=1, dim2=2))).mean(dim=1)[:, prefix:]
        metric = attended.key.mean(dim=1)[:, prefix:]
        plan = []
        for score, keys in zip(sent, metric, strict=True):
            kept = sorted(best(score, count(keep, n)))
            groups = {k: [k] for k in kept}
            for i in range(n):
                if i not in groups:
                    groups[nearest(keys, i, kept)].append(i)
            plan.append(shifted(prefix, list(groups.values())))
        return reduce(tokens, plan)

    return mid(model, x, method, short=short, trace=trace)


def _drop(tokens: Tokens, score: Tensor, keep: float) -> Tokens:
    """The best patches by ``score`` [B, n] alone."""
    k = count(keep, score.shape[1])
    return reduce(tokens, [singles(tokens.prefix, best(row, k)) for row in score])


def rollout(model: nn.Module, x: Tensor, keep: float = 0.5, layer: int | None = None, short: bool = True) -> Tensor:
    """Abnar and Zuidema, Quantifying Attention Flow in Transformers, arXiv:2005.00928, as a score (DCAL).

    By the class token's row, or the mean over all rows where there is none.
    """
    at = len(model.blocks) // 2 if layer is None else layer
    flow: list[Tensor] = []

    def method(tokens: Tokens, attended: Attended, layer: int) -> Tokens:
        if layer > at:
            return tokens
        step = 0.5 * weights_of(attended).mean(dim=1) + 0.5 * torch.eye(tokens.x.shape[1])
        flow.append(step @ flow[-1] if flow else step)
        if layer < at:
            return tokens
        rows = flow[-1][:, 0] if tokens.prefix else flow[-1].mean(dim=1)
        return _drop(tokens, rows[:, tokens.prefix :], keep)

    return mid(model, x, method, short=short)


def ncut(metric: Tensor, threshold: float) -> Tensor:
    """How far each row of ``metric`` [n, D] is on the foreground's side, [n], by an exact eigendecomposition.

    Wang et al., TokenCut, arXiv:2202.11539: the second smallest eigenvector of (D - W) y = l D y.
    """
    similarity = unit(metric) @ unit(metric).T
    weight = torch.where(similarity > threshold, 1.0, 1e-5).double()
    degree = weight.sum(dim=1)
    laplacian = torch.eye(len(metric)).double() - weight / (degree[:, None] * degree).sqrt()
    y = torch.linalg.eigh(laplacian).eigenvectors[:, 1] / degree.sqrt()
    y = y if y[y.abs().argmax()] > 0 else -y
    return (y - y.mean()).to(metric.dtype)


def tokencut(
    model: nn.Module, x: Tensor, keep: float = 0.5, layer: int | None = None, threshold: float = 0.2, short: bool = True
) -> Tensor:
    """The foreground side of the normalised cut of the mean keys stays."""
    at = 3 * len(model.blocks) // 4 if layer is None else layer

    def method(tokens: Tokens, attended: Attended, layer: int) -> Tokens:
        if layer != at:
            return tokens
        metric = attended.key.mean(dim=1)[:, tokens.prefix :]
        return _drop(tokens, torch.stack([ncut(keys, threshold) for keys in metric]), keep)

    return mid(model, x, method, short=short)


def uniform_positions(grid: tuple[int, int], kept: int) -> list[int]:
    """``kept`` patches nearest to an even grid of points: ceil(sqrt(kept h / w)) rows that share the points evenly."""
    h, w = grid
    rows = min(h, math.ceil(math.sqrt(kept * h / w) - 1e-9))
    cuts = [i * kept // rows for i in range(rows + 1)]
    chosen: list[int] = []
    for row, (low, high) in enumerate(pairwise(cuts)):
        y = (row + 0.5) * h / rows - 0.5
        for j in range(high - low):
            x = (j + 0.5) * w / (high - low) - 0.5
            free = [i for i in range(h * w) if i not in chosen]
            chosen.append(min(free, key=lambda i, x=x, y=y: (i // w - y) ** 2 + (i % w - x) ** 2))
    return sorted(chosen)


def uniform_grid(model: nn.Module, x: Tensor, keep: float, layer: int, short: bool = True) -> Tensor:
    """The baseline that looks at nothing: evenly spaced patches stay."""
    grid = grid_of(model)
    kept = uniform_positions(grid, count(keep, grid[0] * grid[1]))

    def method(tokens: Tokens, attended: Attended, layer_: int) -> Tokens:
        return reduce(tokens, [singles(tokens.prefix, kept)] * len(tokens.x)) if layer_ == layer else tokens

    return mid(model, x, method, short=short)


# -- between blocks ----------------------------------------------------------------------------------------------------


def run(model: nn.Module, tokens: Tokens, short: bool, start: int = 0) -> Tensor:
    x = tokens.x
    for block in model.blocks[start:]:
        x = block(x)
    return finish(model, replace(tokens, x=x), short)


def patch_variance(pixels: Tensor, patch: int) -> Tensor:
    """The variance of each patch, mean over channels: [C, H, W] -> [n] in raster order."""
    h, w = pixels.shape[1] // patch, pixels.shape[2] // patch
    values = []
    for i, j in product(range(h), range(w)):
        cut = pixels[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].reshape(len(pixels), -1)
        values.append(((cut - cut.mean(dim=1, keepdim=True)) ** 2).mean(dim=1).mean())
    return torch.stack(values)


def blank_patch(model: nn.Module, x: Tensor, keep: float, short: bool = True) -> Tensor:
    """Lyu et al., PixelWorld, arXiv:2501.19339: patches of little variance do not enter the first block."""
    tokens = timm_embed(model, x)[0]
    score = torch.stack([patch_variance(image, model.patch_embed.patch_size[0]) for image in x])
    return run(model, _drop(tokens, score, keep), short)


def trajectory(model: nn.Module, x: Tensor, ids: Tensor, kept: int, short: bool = True) -> Tensor:
    """Zheng et al., One Trajectory, One Token, arXiv:2505.23617: the patches of an id enter as their mean.

    Shapes: ids int64 [B, n] in [0, kept), every id somewhere in every sample; the tokens are in the order of the ids.
    """
    tokens = timm_embed(model, x)[0]
    plan = []
    for row in ids.tolist():
        groups = [[tokens.prefix + p for p, i in enumerate(row) if i == k] for k in range(kept)]
        assert all(groups), "an id without patches has no mean"
        plan.append([[i] for i in range(tokens.prefix)] + groups)
    return run(model, reduce(tokens, plan), short)


def turning(before: Tensor, after: Tensor, absolute: bool) -> Tensor:
    """TransPrune's token transition of one module: [B, n, C] in and out -> [B, n].

    The growth |out| / |in|, weighted by the softmax over tokens of 1 - |cos| (the paper) or 1 - cos (its code).
    """
    cosine = F.cosine_similarity(before, after, dim=-1)
    weight = (1 - (cosine.abs() if absolute else cosine)).softmax(dim=-1)
    return weight * after.norm(dim=-1) / before.norm(dim=-1)


def transition(
    model: nn.Module, x: Tensor, keep: float = 0.5, layer: int | None = None, absolute: bool = True, short: bool = True
) -> Tensor:
    """Li et al., TransPrune, arXiv:2507.20630, without text: what the blocks before ``layer`` change most stays."""
    at = len(model.blocks) // 2 if layer is None else layer
    tokens = timm_embed(model, x)[0]
    x, prefix = tokens.x, tokens.prefix
    score = torch.zeros(x.shape[0], x.shape[1] - prefix)
    for block in model.blocks[:at]:
        before = block.norm1(x)
        after = block.attn(before)
        score = score + turning(before[:, prefix:], after[:, prefix:], absolute)
        x = x + block.ls1(after)
        before = block.norm2(x)
        after = block.mlp(before)
        score = score + turning(before[:, prefix:], after[:, prefix:], absolute)
        x = x + block.ls2(after)
    return run(model, _drop(replace(tokens, x=x), score, keep), short, start=at)


def canvas(
    model: nn.Module, x: Tensor, scores_fn: Callable[[Tensor], Tensor], keep: float, layers: Sequence[int]
) -> Tensor:
    """Tang et al., Dynamic Token Pruning, arXiv:2308.01045, with a fixed number: confident patches are finished.

    ``scores_fn`` gives the confidence [B, n] of hidden states [B, n, C]. Before each of the layers the least confident
    stay; the finished ones are out of all later blocks, and keep the features that they have (before the final norm).
    """
    tokens = timm_embed(model, x)[0]
    x, prefix = tokens.x, tokens.prefix
    board = x.clone()
    alive = torch.arange(x.shape[1]).repeat(len(x), 1)
    for layer, block in enumerate(model.blocks):
        if layer in layers:
            n = x.shape[1] - prefix
            score = scores_fn(x[:, prefix:])
            stays = torch.tensor([sum(singles(prefix, best(-row, count(keep, n))), []) for row in score])
            for b in range(len(x)):
                board[b, alive[b]] = x[b]
            x, alive = take(x, stays), take(alive, stays)
        x = block(x)
    for b in range(len(x)):
        board[b, alive[b]] = x[b]
    return model.forward_head(model.norm(board))


# -- the output features -----------------------------------------------------------------------------------------------


def output(seen: Seen, plan: Plan, weight: Tensor | None = None) -> Tensor:
    """The features of a plan of patches (numbered from 0), behind the prefix; ``weight`` [B, n]."""
    return torch.cat([seen.features[:, : seen.prefix], apply(seen.patches, plan, weight)], dim=1)


def chosen(seen: Seen, patches: Sequence[Sequence[int]]) -> Tensor:
    """The features of some patches alone."""
    return output(seen, [singles(0, row) for row in patches])


def vtc_cls(model: nn.Module, x: Tensor, keep: float) -> Tensor:
    """Wang et al., [CLS] Token Tells Everything Needed for Training-free Efficient MLLMs, arXiv:2412.05819."""
    seen = see(model, x)
    layers = range(len(model.blocks) // 2, len(model.blocks))
    score = torch.stack([seen.class_row(layer) for layer in layers]).sum(dim=0)
    return chosen(seen, [best(row, count(keep, score.shape[1])) for row in score])


def around(grid: tuple[int, int], centre: int, reach: int) -> list[int]:
    """The patches that at most ``reach`` steps to a neighbour above, below, left or right lead to, and the centre."""
    w = grid[1]
    return [i for i in range(grid[0] * w) if abs(i // w - centre // w) + abs(i % w - centre % w) <= reach]


def hiprune(model: nn.Module, x: Tensor, keep: float, share: float = 0.1, reach: int = 1) -> Tensor:
    """Liu et al., HiPrune, arXiv:2508.00553: anchors of a middle layer, their neighbours, the last layer's best."""
    seen, (h, w) = see(model, x), grid_of(model)
    early, late = seen.received(round(0.375 * len(model.blocks)) - 1), seen.received(-1)
    k = count(keep, h * w)
    rows = []
    for anchor, rest in zip(early, late, strict=True):
        first: set[int] = set()
        for a in best(anchor, round(share * k / 5)):
            first.update(around((h, w), a, reach))
        ranked = best(rest, h * w)
        rows.append(([i for i in ranked if i in first] + [i for i in ranked if i not in first])[:k])
    return chosen(seen, rows)


def fopru(model: nn.Module, x: Tensor, keep: float, rows: bool = False) -> Tensor:
    """Jiang et al., FoPru, arXiv:2411.14164: the patches, or the whole rows of the image, that get most attention."""
    seen, (h, w) = see(model, x), grid_of(model)
    k = count(keep, h * w)
    kept = []
    for score in seen.received(-1):
        if rows:
            lines = best(score.view(h, w).mean(dim=1), k // w)
            kept.append([line * w + j for line in lines for j in range(w)])
        else:
            kept.append(best(score, k))
    return chosen(seen, kept)


def farthest(metric: Tensor, k: int, max_sum: bool, pivot: int | None) -> list[int]:
    """``k`` rows of ``metric`` [n, D] far from each other by cosine, the first chosen first.

    The next is the one least similar to its nearest chosen one, or (``max_sum``) to all the chosen in sum. Without a
    pivot the first is the one whose nearest other is farthest.
    """
    similarity = unit(metric) @ unit(metric).T
    n = len(metric)
    if pivot is None:
        pivot = min(range(n), key=lambda i: max(float(similarity[i, j]) for j in range(n) if j != i))
    picked = [pivot]
    while len(picked) < k:
        crowd = similarity[:, picked].sum(dim=1) if max_sum else similarity[:, picked].max(dim=1).values
        picked.append(min((i for i in range(n) if i not in picked), key=lambda i: float(crowd[i])))
    return picked


def todre(model: nn.Module, x: Tensor, keep: float) -> Tensor:
    """Li et al., ToDRE, arXiv:2505.18757 (v2), stage 1: greedy max-sum diversity from the class token's favourite."""
    seen = see(model, x)
    score = seen.class_row(-1) if seen.prefix else seen.received(-1)
    k = count(keep, score.shape[1])
    return chosen(seen, [farthest(f, k, True, int(row.argmax())) for f, row in zip(seen.patches, score, strict=True)])


def divprune(model: nn.Module, x: Tensor, keep: float) -> Tensor:
    """Alvar et al., DivPrune, arXiv:2503.02175: greedy max-min diversity."""
    seen = see(model, x)
    return chosen(seen, [farthest(f, count(keep, len(f)), False, None) for f in seen.patches])


def dpp(metric: Tensor, relevance: Tensor | None, k: int) -> list[int]:
    """The greedy mode of a determinantal point process over the rows of ``metric`` [n, D], by its determinants."""
    directions = F.normalize(metric.double(), dim=-1)
    kernel = (directions @ directions.T).fill_diagonal_(1.0)  # exactly: without relevance all first picks are equal
    if relevance is not None:
        r = relevance.double()
        r = (r - r.min() + 1e-6) / (r.max() - r.min())
        kernel = r[:, None] * kernel * r
    picked: list[int] = []
    for _ in range(k):
        free = [i for i in range(len(metric)) if i not in picked]
        minors = torch.stack([kernel[picked + [i]][:, picked + [i]] for i in free])
        picked.append(free[int(torch.linalg.slogdet(minors).logabsdet.argmax())])
    return picked


def cdpruner(model: nn.Module, x: Tensor, keep: float, text: Tensor | None = None) -> Tensor:
    """Zhang et al., CDPruner, arXiv:2506.10967: diversity, conditioned on the similarity to ``text`` [B, L, C]."""
    seen = see(model, x)
    rows = []
    for b, f in enumerate(seen.patches):
        relevance = None if text is None else F.cosine_similarity(f, text[b].mean(dim=0)[None], dim=-1)
        rows.append(dpp(f, relevance, count(keep, len(f))))
    return chosen(seen, rows)


def sink_score(attention: Tensor, prefix: int, threshold: float) -> Tensor:
    """Where the sinks among the patches look, [N, N] (mean over heads) -> [n].

    Sinks get more than ``threshold`` times the mean; if none does, the one that gets most is it.
    """
    received = attention.mean(dim=0)[prefix:]
    sinks = [i for i, value in enumerate(received) if value > threshold * received.mean()]
    sinks = sinks or [int(received.argmax())]
    return attention[[prefix + i for i in sinks], prefix:].mean(dim=0)


def recycled(score: Tensor, grid: tuple[int, int], cell: int, k: int) -> list[Group]:
    """The ``k`` best patches, and one group per cell for the others, with the lowest of its cell at its head."""
    h, w = grid
    columns = math.ceil(w / cell)
    members: dict[int, list[int]] = {}
    for i in range(h * w):
        members.setdefault(i // w // cell * columns + i % w // cell, []).append(i)
    lowest = {c: min(m, key=lambda i: float(score[i])) for c, m in members.items()}
    kept = [i for i in best(score, h * w) if i not in lowest.values()][:k]
    groups = [[i] for i in kept]
    for c, m in members.items():
        groups.append([lowest[c], *(i for i in m if i != lowest[c] and i not in kept)])
    return ordered(groups)


def vflowopt(model: nn.Module, x: Tensor, keep: float, cell: int, threshold: float = 30.0) -> Tensor:
    """Yang et al., VFlowOpt, arXiv:2508.05211: pruning by where the sinks look, cells recycling what is pruned."""
    seen, grid = see(model, x), grid_of(model)
    n = grid[0] * grid[1]
    cells = math.ceil(grid[0] / cell) * math.ceil(grid[1] / cell)
    k = count(keep, n)
    if k >= n:
        return seen.features
    score = torch.stack([sink_score(a.mean(dim=0), seen.prefix, threshold) for a in seen.attention[-1]])
    return output(seen, [recycled(row, grid, cell, k - cells) for row in score], score)


def contextual(score: Tensor, metric: Tensor, dominant: int, targets: int) -> list[Group]:
    """VisionZip's groups: ``dominant`` best patches; of the others evenly spaced ``targets``, and who is near them."""
    kept = best(score, dominant)
    rest = [i for i in range(len(score)) if i not in kept]
    if not targets:
        return ordered([[i] for i in kept])
    step = max(1, len(rest) // targets)
    groups = {i: [i] for i in rest[::step][:targets]}
    heads = list(groups)
    for i in rest:
        if i not in groups:
            groups[nearest(metric, i, heads)].append(i)
    return ordered([[i] for i in kept] + list(groups.values()))


def visionzip(model: nn.Module, x: Tensor, keep: float, share: float = 0.16, sum_: bool = False) -> Tensor:
    """Yang et al., VisionZip, arXiv:2412.04467; ``sum_``: target plus the mean of its others, as its code does."""
    seen = see(model, x)
    score, keys = seen.class_row(-1), seen.patch_keys(-1)
    n = score.shape[1]
    k = count(keep, n)
    targets = round(share * k) if k < n else 0
    plan = [contextual(s, m, k - targets, targets) for s, m in zip(score, keys, strict=True)]
    if not sum_:
        return output(seen, plan)
    rows = []
    for f, groups in zip(seen.patches, plan, strict=True):
        rows.append(torch.stack([f[g[0]] + (f[g[1:]].mean(dim=0) if len(g) > 1 else 0) for g in groups]))
    return torch.cat([seen.features[:, : seen.prefix], torch.stack(rows)], dim=1)


def vispruner(model: nn.Module, x: Tensor, keep: float, step: int = 8) -> Tensor:
    """Zhang et al., Beyond Text-Visual Attention (VisPruner), arXiv:2412.01818 v2: half important, half diverse."""
    seen = see(model, x)
    score = seen.class_row(-1)
    k = count(keep, score.shape[1])
    kept = []
    for row, f in zip(score, seen.patches, strict=True):
        important = best(row, k // 2)
        rest = [i for i in range(len(row)) if i not in important]
        while len(rest) > k - k // 2:
            even, odd = rest[::2], rest[1::2]
            closest = (unit(f[even]) @ unit(f[odd]).T).max(dim=1).values
            gone = {even[i] for i in best(closest, min(step, len(rest) - (k - k // 2)))}
            rest = [i for i in rest if i not in gone]
        kept.append(important + rest)
    return chosen(seen, kept)


def prumerge(model: nn.Module, x: Tensor, keep: float, neighbours: int = 32) -> Tensor:
    """Shang et al., LLaVA-PruMerge, arXiv:2403.15388: kept patches take up the removed ones nearest to them by key.

    Those come with their raw scores as weights; a removed patch may go to several kept ones.
    """
    seen = see(model, x)
    score, keys = seen.class_row(-1), seen.patch_keys(-1)
    k = count(keep, score.shape[1])
    rows = []
    for s, m, f in zip(score, keys, seen.patches, strict=True):
        kept = sorted(best(s, k))
        gone = [i for i in range(len(s)) if i not in kept]
        new = []
        for p in kept:
            near = [gone[i] for i in best(unit(m[gone]) @ unit(m[p]), neighbours)] if gone else []
            new.append(f[p] + sum((s[q] * f[q] for q in near), torch.zeros_like(f[p])))
        rows.append(torch.stack(new))
    return torch.cat([seen.features[:, : seen.prefix], torch.stack(rows)], dim=1)


def pool(model: nn.Module, x: Tensor, keep: float) -> Tensor:
    """Adaptive average pooling of the features to at most ``keep`` of the grid (TokenFLEX, arXiv:2504.03154)."""
    seen, grid = see(model, x), grid_of(model)
    cells = grid_cells(grid, count(keep, grid[0] * grid[1]))
    return torch.cat([seen.features[:, : seen.prefix], torch.stack([pooled(f, grid, cells) for f in seen.patches])], 1)


# -- FastVGGT: Shen et al., arXiv:2509.02560 ---------------------------------------------------------------------------


class _Block(nn.Module):
    """A pre-norm block of width C with its own norm, attention and MLP; the rotation is given per call."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def project(self, h: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [B, H, N, D], the first two rotated by [N, D / 2] cosines and sines."""
        b, n, c = h.shape
        q, k, v = self.qkv(h).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return _turn(q, cosine, sine), _turn(k, cosine, sine), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(y.reshape(y.shape[0], y.shape[1], -1))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.attend(*self.project(self.norm1(x), cosine, sine))
        return x + self.mlp(self.norm2(x))


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1)


class TinyVGGT(nn.Module):
    """Frame attention and global attention in turn, as in VGGT (Wang et al., arXiv:2503.11651).

    Input: patch tokens [B, S, h * w, C] of S frames. Every frame gets a camera token and a register in front (P tokens
    then); frame attention is over [B * S, P, C], global attention over [B, S * P, C]. Output: [B, S, P, C].
    """

    def __init__(
        self,
        frames: int = 5,
        grid: tuple[int, int] = (4, 4),
        width: int = 32,
        heads: int = 2,
        depth: int = 2,
        rope: bool = True,
    ) -> None:
        super().__init__()
        self.frames, self.grid, self.special = frames, grid, 2
        self.camera = nn.Parameter(torch.randn(1, 1, 1, width))
        self.register = nn.Parameter(torch.randn(1, 1, 1, width))
        self.frame_blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.global_blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        half = width // heads // 2
        speed = 10.0 ** -torch.arange(half // 2).div(half // 2)
        place = torch.zeros(self.special + grid[0] * grid[1], 2)
        place[self.special :] = torch.tensor([[i + 1.0, j + 1.0] for i in range(grid[0]) for j in range(grid[1])])
        angle = (place[:, :, None] * speed).flatten(1) * float(rope)  # special tokens are at (0, 0)
        self.register_buffer("cosine", angle.cos())
        self.register_buffer("sine", angle.sin())

    def embed(self, x: Tensor) -> Tensor:
        b, s = x.shape[:2]
        return torch.cat([self.camera.expand(b, s, -1, -1), self.register.expand(b, s, -1, -1), x], dim=2)

    def tables(self, frames: int) -> tuple[Tensor, Tensor]:
        return self.cosine.repeat(frames, 1), self.sine.repeat(frames, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, s = x.shape[:2]
        x = self.embed(x)
        p, c = x.shape[2:]
        for frame, whole in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = frame(x.reshape(b * s, p, c), *self.tables(1))
            x = whole(x.reshape(b, s * p, c), *self.tables(self.frames)).reshape(b, s, p, c)
        return self.norm(x)


def tiny_vggt(**options: Any) -> TinyVGGT:
    torch.manual_seed(0)
    return perturb(TinyVGGT(**options), 0.1)


def frames(model: TinyVGGT, batch: int = 2, seed: int = 0) -> Tensor:
    """Random patch tokens for a TinyVGGT."""
    n = model.grid[0] * model.grid[1]
    return torch.randn(batch, model.frames, n, model.norm.weight.numel(), generator=torch.Generator().manual_seed(seed))


def vggt_partition(
    frame_count: int, special: int, grid: tuple[int, int], cell: int, seed: int | None, protect: float
) -> tuple[list[int], list[int]]:
    """Sources and targets among the tokens of all frames in one sequence.

    Targets: frame 0, the special tokens of all frames, and one patch per cell of each other frame. Every
    N // int(protect N)-th token of the sequence is no source (and, unless it is a target, no target either).
    """
    p = special + grid[0] * grid[1]
    n = frame_count * p
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    targets = list(range(p))
    sources = []
    salient = range(0, n, n // int(protect * n)) if int(protect * n) else ()
    for f in range(1, frame_count):
        here = [f * p + special + i for i in cell_targets(grid, cell, generator)]
        targets += [*range(f * p, f * p + special), *here]
        patches = range(f * p + special, (f + 1) * p)
        sources += [i for i in patches if i not in here and i not in salient]
    return sources, targets


def fastvggt(
    model: TinyVGGT,
    x: Tensor,
    ratio: float = 0.9,
    protect: float = 0.1,
    cell: int = 2,
    seed: int | None = 33,
) -> Tensor:
    """Global attention on merged queries, keys and values (after RoPE), copied back before the residual sum.

    Tokens are matched by what enters the projections; means are plain. The seed of a global attention is ``seed`` plus
    its number among all attentions of the model.
    """
    b, s = x.shape[:2]
    x = model.embed(x)
    p, c = x.shape[2:]
    layer = 0
    for frame, whole in zip(model.frame_blocks, model.global_blocks, strict=True):
        x = frame(x.reshape(b * s, p, c), *model.tables(1)).reshape(b, s * p, c)
        layer += 1
        h = whole.norm1(x)
        step_seed = None if seed is None else seed + layer
        sources, targets = vggt_partition(s, model.special, model.grid, cell, step_seed, protect)
        r = min(int(ratio * s * p), len(sources))
        plan = [match(row, sources, targets, r) for row in h]
        q, k, v = whole.project(h, *model.tables(s))
        merged = [torch.stack([apply(t[:, i], plan) for i in range(whole.heads)], dim=1) for t in (q, k, v)]
        x = x + copied(whole.attend(*merged), plan, s * p)
        x = (x + whole.mlp(whole.norm2(x))).reshape(b, s, p, c)
        layer += 1
    return model.norm(x)
