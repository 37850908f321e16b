"""Scores of tokens: float32 [B, N], the larger the more worth keeping.

Positions outside ``[start, stop)`` are protected: whatever they score, nothing reads it. Cosines, softmaxes and sums
are in float32 whatever the inputs are in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenopt.ops import op
from tokenopt.ops.native import native

_ROWS = 64  # of attention probabilities that exist at a time


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 in float32; a zero vector stays zero."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _framed(values: Tensor, start: int, stop: int, total: int) -> Tensor:
    """Values [B, stop - start] of a segment as [B, total], with zeros outside."""
    return values if (start, stop) == (0, total) else F.pad(values, (start, total - stop))


@op(
    "(Tensor query, Tensor key, Tensor? bias, Tensor? key_bias, Tensor? weight, *, float? scale=None, "
    "bool is_causal=False, bool exclude_self=False) -> Tensor"
)
def attention_received(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    weight: Tensor | None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    exclude_self: bool = False,
) -> Tensor:
    """Attention that each key receives from all queries, ``sum_i weight_i mean_h softmax(...)_hij``.

    Shapes:  query [B, H, N, D] · key [B, H, M, D] · bias broadcast to [B, H, N, M], additive or boolean (True is
             visible) · key_bias [B, M] · weight [B or 1, N]  ->  float32 [B, M]
    Args:    weight: of the queries; None is the mean over them, and the result then sums to 1.
             is_causal: query i sees the keys up to i; a bias adds to that.
             exclude_self: leave out what a token gives to itself; needs N = M.
    A query that sees no key gives nothing. At most 64 rows of the attention matrix exist at a time.
    """
    rows, columns = query.shape[2], key.shape[2]
    assert not exclude_self or rows == columns, "without as many keys as queries, no key is a query's own"
    if bias is None and (kernel := native("attention_received", query, key, key_bias, weight)):
        settings = {"scale": scale, "is_causal": is_causal, "exclude_self": exclude_self}
        return kernel(query, key, None, key_bias, weight, **settings)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    masked = is_causal or bias is not None or key_bias is not None
    keys = key.float().transpose(-2, -1)
    column = torch.arange(columns, device=query.device)
    received = None
    for first in range(0, rows, _ROWS):
        last = min(first + _ROWS, rows)
        row = torch.arange(first, last, device=query.device)[:, None]
        logits = (query[:, :, first:last].float() * scale) @ keys
        if bias is not None:
            part = bias[..., first:last, :] if bias.dim() > 1 and bias.shape[-2] != 1 else bias
            logits = torch.where(part, logits, -math.inf) if part.dtype is torch.bool else logits + part.float()
        if key_bias is not None:
            logits = logits + key_bias[:, None, None, :].float()
        if is_causal:
            logits = torch.where(column <= row, logits, -math.inf)
        share = logits.softmax(-1)
        if masked:
            share = torch.where(logits > -math.inf, share, 0.0)  # a row of nothing but -inf is NaN
        share = share.mean(1)
        if exclude_self:
            share = torch.where(column != row, share, 0.0)
        given = (share if weight is None else share * weight[:, first:last, None].float()).sum(1)
        received = given if received is None else received + given
    return received / rows if weight is None else received


@op("(Tensor x) -> Tensor")
def token_norm(x: Tensor) -> Tensor:
    """Euclidean length of each token.

    Shapes:  x [B, N, C]  ->  float32 [B, N]
    """
    return x.float().norm(dim=-1)


@op("(Tensor metric, float margin, float alpha, bool shifted, int start, int stop) -> Tensor")
def token_energy(metric: Tensor, margin: float, alpha: float, shifted: bool, start: int, stop: int) -> Tensor:
    """How many tokens of the segment resemble each one: high in large uniform regions, which are redundant.

    ``E_i = mean_j f(cos_ij)`` over the segment, i itself included; ``f(s) = s`` where ``s >= margin``, and
    ``alpha (exp(s - margin) - 1)`` elsewhere.

    Shapes:  metric [B, N, D]  ->  float32 [B, N], zeros outside the segment
    Args:    shifted: ``f(s) = s - margin`` above the margin, as the authors' code has it: without a jump there.
    Source:  Tran et al., PiToMe, arXiv:2405.16148 (energy score).
    """
    vectors = unit(metric[:, start:stop])
    cosine = vectors @ vectors.transpose(1, 2)
    above = cosine - margin if shifted else cosine
    energy = torch.where(cosine >= margin, above, alpha * ((cosine - margin).exp() - 1)).mean(-1)
    return _framed(energy, start, stop, metric.shape[1])


@op("(Tensor input, Tensor output, bool absolute, int start, int stop) -> Tensor")
def token_transition(input: Tensor, output: Tensor, absolute: bool, start: int, stop: int) -> Tensor:  # noqa: A002
    """How much a module changes each token: ratio of lengths, weighted by the change of direction.

    ``|out| / |in| * softmax(1 - |cos(in, out)|)``, the softmax over the segment.

    Shapes:  input [B, N, C] · output [B, N, C], before the residual sum  ->  float32 [B, N], zeros outside the segment
    Args:    absolute: as the paper has it; False takes ``1 - cos``, as the authors' code does.
    Source:  Li et al., TransPrune, arXiv:2507.20630 (token transition variation).
    """
    before, after = (x[:, start:stop].float() for x in (input, output))
    cosine = (unit(before) * unit(after)).sum(-1)
    turn = (1 - (cosine.abs() if absolute else cosine)).softmax(-1)
    ratio = after.norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)
    return _framed(turn * ratio, start, stop, input.shape[1])


@op("(Tensor x, int start, int stop) -> Tensor")
def centre_similarity(x: Tensor, start: int, stop: int) -> Tensor:
    """Cosine of each token with the mean of the segment.

    Shapes:  x [B, N, C]  ->  float32 [B, N]
    """
    centre = x[:, start:stop].float().mean(1, keepdim=True)
    return (unit(x) * unit(centre)).sum(-1)


@op("(Tensor x, Tensor text) -> Tensor")
def text_similarity(x: Tensor, text: Tensor) -> Tensor:
    """Cosine of each token with the mean of a text's vectors.

    Shapes:  x [B, N, C] · text [B or 1, L, C] or [B or 1, C]  ->  float32 [B, N]
    """
    text = text.float().mean(1, keepdim=True) if text.dim() == 3 else text[:, None]
    return (unit(x) * unit(text)).sum(-1)


def _patches(pixels: Tensor, grid: Sequence[int]) -> Tensor:
    """[B, C, *sizes] as float32 [B, C, prod(grid), pixels of a patch], patches in raster order."""
    sizes, rank = pixels.shape[2:], len(grid)
    assert len(sizes) == rank and all(size % count == 0 for size, count in zip(sizes, grid, strict=True)), (
        "patches tile the image"
    )
    x = pixels.float()
    for i in reversed(range(rank)):
        x = x.unflatten(2 + i, (grid[i], sizes[i] // grid[i]))
    x = x.permute(0, 1, *range(2, 2 + 2 * rank, 2), *range(3, 3 + 2 * rank, 2))
    return x.flatten(2, 1 + rank).flatten(3)


@op("(Tensor pixels, int[] grid) -> Tensor")
def patch_variance(pixels: Tensor, grid: Sequence[int]) -> Tensor:
    """Variance of the pixels of each patch, per channel, then the mean over channels: 0 where a patch is blank.

    Shapes:  pixels [B, C, H, W] or [B, C, T, H, W], of sizes that the grid divides  ->  float32 [B, prod(grid)]
    Source:  Lyu et al., PixelWorld, arXiv:2501.19339 (blank patches).
    """
    x = _patches(pixels, grid)
    return (x - x.mean(-1, keepdim=True)).square().mean(-1).mean(1)


@op("(Tensor pixels, int[] grid, int bins) -> Tensor")
def patch_entropy(pixels: Tensor, grid: Sequence[int], bins: int) -> Tensor:
    """Entropy, in nats, of the histogram of gray values in each patch.

    Gray is the mean over channels; the bins divide its range over the whole image evenly.

    Shapes:  pixels [B, C, H, W] or [B, C, T, H, W], of sizes that the grid divides  ->  float32 [B, prod(grid)]
    Source:  Yang et al., VFlowOpt, arXiv:2508.05211 (patch entropy).
    """
    gray = _patches(pixels.float().mean(1, keepdim=True), grid)[:, 0]
    low, high = gray.amin((1, 2), keepdim=True), gray.amax((1, 2), keepdim=True)
    level = ((gray - low) / (high - low).clamp_min(1e-12) * bins).floor().clamp_max(bins - 1)
    # a histogram is a product of one-hot digits: two of base sqrt(bins) take far less memory than one of base bins
    base = math.isqrt(bins - 1) + 1
    digits = torch.arange(base, device=pixels.device, dtype=torch.float32)
    major = ((level + 0.5) / base).floor()
    minor = level - major * base
    count = (major[..., None, :] == digits[:, None]).float() @ (minor[..., None] == digits).float()
    share = count / gray.shape[-1]
    return -(share * share.clamp_min(1e-12).log()).sum((-2, -1))


@op("(Tensor metric, float threshold, int iterations, int start, int stop) -> Tensor")
def ncut_partition(metric: Tensor, threshold: float, iterations: int, start: int, stop: int) -> Tensor:
    """Normalised cut of the segment in two: positive on the foreground, negative on the rest.

    The graph is ``W = 1`` where cosines exceed the threshold, else 1e-5; y is the eigenvector of the second smallest
    eigenvalue of ``(D - W) y = lambda D y``, with ``y^T D y = 1``. The foreground is the side of its mean that holds
    the largest ``|y|``; the score is y minus its mean, so signed.

    Shapes:  metric [B, N, D]  ->  float32 [B, N], zeros outside the segment
    Args:    iterations: of the power method on the normalised affinity, shifted to be positive, its trivial eigenvector
             deflated. With eigenvalues l2 > l3 of the affinity, the error shrinks by (1 + l3) / (1 + l2) each time.
    Source:  Wang et al., TokenCut, arXiv:2202.11539; Shi and Malik, Normalized Cuts, 2000.
    """
    vectors = unit(metric[:, start:stop])
    affinity = (vectors @ vectors.transpose(1, 2) > threshold).float().clamp_min(1e-5)
    root = affinity.sum(-1, keepdim=True).sqrt()
    trivial = root / root.norm(dim=1, keepdim=True)
    place = torch.arange(stop - start, device=metric.device)
    identity = (place[:, None] == place).float()
    operator = affinity / root / root.transpose(1, 2) + identity - 2 * trivial @ trivial.transpose(1, 2)
    # a chirp starts with a share of every frequency, so of every smooth eigenvector
    turn = (place * (place + 1)) % (2 * (stop - start))
    y = operator @ (turn.float() * (math.pi / (stop - start))).cos()[:, None]
    for _ in range(iterations):
        y = operator @ (y / y.norm(dim=1, keepdim=True).clamp_min(1e-30))
    y = (y / y.norm(dim=1, keepdim=True).clamp_min(1e-30) / root)[..., 0]
    centred = y - y.mean(-1, keepdim=True)
    peak = centred.gather(1, y.abs().argmax(-1, keepdim=True))
    return _framed(torch.where(peak > 0, centred, -centred), start, stop, metric.shape[1])


@op("(Tensor received, float threshold, int start, int stop) -> Tensor")
def sink_rows(received: Tensor, threshold: float, start: int, stop: int) -> Tensor:
    """Weights of the queries whose rows make a score: those tokens that receive most attention, equally.

    They are the tokens of the segment that receive more than ``threshold`` times its mean, or the one that receives
    most if none does.

    Shapes:  received [B, N], from `attention_received`  ->  float32 [B, N], rows sum to 1, zeros outside the segment
    Source:  Yang et al., VFlowOpt, arXiv:2508.05211 (the rows that its score is made of).
    """
    segment = received[:, start:stop].float()
    place = torch.arange(stop - start, device=received.device)
    sinks = (segment > threshold * segment.mean(-1, keepdim=True)).float()
    largest = (place == segment.argmax(-1, keepdim=True)).float()
    chosen = torch.where(sinks.sum(-1, keepdim=True) > 0, sinks, largest)
    return _framed(chosen / chosen.sum(-1, keepdim=True), start, stop, received.shape[1])


@op("(Tensor x, int[] dims) -> Tensor")
def massive_activation(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Largest magnitude of a token's features over their root mean square: beyond about 20 it is an attention sink.

    Shapes:  x [B, N, C]  ->  float32 [B, N]
    Args:    dims: the features to look at; all if empty. The mean square is always that of all.
    Source:  Kang et al., Visual Attention Sink, arXiv:2503.03321.
    """
    x = x.float()
    size = x.square().mean(-1).sqrt().clamp_min(1e-12)
    some = torch.stack([x[..., d] for d in dims], -1) if dims else x
    return some.abs().amax(-1) / size


@op("(Tensor anchor, Tensor rest, int anchors, int reach, int[] grid, int start, int stop) -> Tensor")
def boost_neighbours(
    anchor: Tensor, rest: Tensor, anchors: int, reach: int, grid: Sequence[int], start: int, stop: int
) -> Tensor:
    """The score ``rest``, raised above all others for the best tokens by ``anchor`` and their neighbours in the grid.

    One top-k of the result then takes anchors and neighbours first, and fills up by ``rest``.

    Shapes:  anchor [B, N] · rest [B, N]  ->  float32 [B, N], zeros outside the segment
    Args:    reach: steps from cell to adjacent cell, along rows or columns of the grid (h, w), to the last neighbour.
    Source:  Liu et al., HiPrune, arXiv:2508.00553 (anchors, buffers, registers); here no neighbour is across the end of
             a row.
    """
    height, width = grid
    assert height * width == stop - start, "the segment is the grid"
    score = rest[:, start:stop].float()
    if anchors > 0:
        best = anchor[:, start:stop].float().argsort(dim=-1, descending=True)[:, None, :anchors]
        place = torch.arange(stop - start, device=rest.device)[:, None]
        steps = (place // width - best // width).abs() + (place % width - best % width).abs()
        member = (steps <= reach).float().amax(-1)
        low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
        above = torch.where(high > low, 2 * (high - low), high.abs() + 1)
        score = score + member * above
    return _framed(score, start, stop, rest.shape[1])
