"""Merging tokens in three launches: two to match, one to merge.

The torch references take about twenty, and write the similarity matrix. Bolya et al., Token Merging, arXiv:2210.09461.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenopt.kernels.tiles import block, products

LONGEST = 2**14  # tokens that `match_bipartite` takes: one program sorts half of them


@triton.jit(do_not_specialize=["a_count", "b_count"])
def _best(
    a, b, best, partner, a_count, b_count, a_b, a_n, a_d, b_b, b_n, b_d,
    D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For each row of a: its largest cosine with a row of b, and which row that is, the first among equals."""
    tiles = tl.cdiv(a_count, BLOCK_A)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_A + tl.arange(0, BLOCK_A)
    a += sample * a_b
    b += sample * b_b
    found = tl.full([BLOCK_A], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_A], tl.int32)
    length = tl.zeros([BLOCK_A], tl.float32)
    for first in range(0, b_count, BLOCK_B):
        columns = first + tl.arange(0, BLOCK_B)
        dot, a_square, b_square = products(a, b, rows, columns, a_count, b_count, a_n, a_d, b_n, b_d, D, BLOCK_D)
        length = tl.maximum(tl.sqrt(a_square), 1e-12)
        cosine = dot * (1 / tl.maximum(tl.sqrt(b_square), 1e-12))[None, :]
        cosine = tl.where(cosine != cosine, float("inf"), cosine)  # torch takes a NaN for the maximum
        cosine = tl.where((columns < b_count)[None, :], cosine, float("-inf"))
        tile, at = tl.max(cosine, 1, return_indices=True)
        better = tile > found
        found = tl.where(better, tile, found)
        where = tl.where(better, first + at, where)
    tl.store(best + sample * a_count + rows, found / length, mask=rows < a_count)
    tl.store(partner + sample * a_count + rows, where, mask=rows < a_count)


@triton.jit(do_not_specialize=["a_count", "r", "start", "stop", "total"])
def _select(best, partner, index, src, dst, a_count, r, start, stop, total, BLOCK: tl.constexpr):
    """The plan of one sample: its r best rows are merged, best first and the first among equals; the rest stays."""
    sample = tl.program_id(0).to(tl.int64)
    best += sample * a_count
    partner += sample * a_count
    index += sample * (total - r)
    src += sample * r
    dst += sample * r
    first_a = start + start % 2
    first_b = start + 1 - start % 2
    stay = a_count - r
    i = tl.arange(0, BLOCK)
    value = tl.load(best + i, mask=i < a_count, other=0.0)
    value = tl.where(value == 0, 0.0, value)  # one zero, not two
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    behind = 0x7FFFFFFFFFFFFFFF
    key = tl.where(i < a_count, ((~ordered).to(tl.int64) << 32) | i, behind)  # all distinct, so the sort is stable
    order = tl.sort(key)
    row = order & 0xFFFFFFFF
    tl.store(src + i, first_a + 2 * row, mask=i < r)
    tl.store(dst + i, start + stay + tl.load(partner + row, mask=i < r, other=0).to(tl.int64), mask=i < r)

    stays = (key >= tl.min(tl.where(i >= r, order, behind), 0)) & (i < a_count)
    place = start + tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(index + place, (first_a + 2 * i).to(tl.int64), mask=stays)
    for first in range(0, total, BLOCK):
        at = first + i
        outside = (at < start) | (at >= stop)
        place = tl.where(at < start, at, tl.where(at >= stop, at - r, start + stay + (at - first_b) // 2))
        tl.store(index + place, at.to(tl.int64), mask=(at < total) & (outside | (at % 2 == 1)))


def match_bipartite(metric: Tensor, r: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching in two launches, without the similarity matrix.

    Shapes:  metric [B, N, D] of any strides, N <= 16384  ->  int64 index [B, N - r] · src [B, r] · dst [B, r]
    Equals:  `tokenopt.ops.tokens.match_bipartite`, with ties broken towards the first position.
    """
    samples, total, size = metric.shape
    a = metric[:, start + start % 2 : stop : 2]
    b = metric[:, start + 1 - start % 2 : stop : 2]
    a_count, b_count = a.shape[1], b.shape[1]
    assert r <= a_count and total <= LONGEST, "no more are merged than there are, and one program sorts them"
    best = metric.new_empty((samples, a_count), dtype=torch.float32)
    partner = metric.new_empty((samples, a_count), dtype=torch.int32)
    index, src, dst = (metric.new_empty((samples, n), dtype=torch.int64) for n in (total - r, r, r))
    with torch.cuda.device_of(metric):
        _best[(samples * triton.cdiv(a_count, 32),)](
            a, b, best, partner, a_count, b_count, *a.stride(), *b.stride(),
            D=size, BLOCK_A=32, BLOCK_B=block(b_count, 64), BLOCK_D=block(size, 64),
        )  # fmt: skip
        length = block(a_count, LONGEST)
        _select[(samples,)](
            best, partner, index, src, dst, a_count, r, start, stop, total,
            BLOCK=length, num_warps=max(1, min(16, length // 128)),
        )  # fmt: skip
    return index, src, dst


@triton.jit(do_not_specialize=["places", "removed"])
def _merge(
    x, weight, index, src, dst, y, total, places, removed, channels, x_b, x_n, x_c, w_b, w_n,
    NORMALIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One place of the output: its own token and all that are merged into it, so that nothing is added atomically."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // places
    place = program % places
    x += sample * x_b
    src += sample * removed
    dst += sample * removed
    if weight is not None:
        weight += sample * w_b
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    own = tl.load(index + program)
    kept = 1.0
    if weight is not None:
        kept = tl.load(weight + own * w_n).to(tl.float32)

    summed = kept
    for first in range(0, removed, BLOCK_R):
        here = tl.load(dst + first + r, mask=first + r < removed, other=-1) == place
        if weight is None:
            summed += tl.sum(here.to(tl.float32), 0)
        else:
            token = tl.load(src + first + r, mask=here, other=0)
            summed += tl.sum(tl.load(weight + token * w_n, mask=here, other=0.0).to(tl.float32), 0)
    tl.store(total + program, summed)
    divisor = summed if NORMALIZE else 1.0

    # the factors are divided, not the sum: a token that nothing is merged into stays what it is, to the bit
    merged = tl.load(x + own * x_n + c * x_c, mask=c < channels, other=0.0).to(tl.float32) * (kept / divisor)
    for first in range(0, removed, BLOCK_R):
        here = (tl.load(dst + first + r, mask=first + r < removed, other=-1) == place).to(tl.int32)
        left = tl.sum(here, 0)
        while left > 0:
            at = tl.argmax(here, 0)
            token = tl.load(src + first + at)
            share = 1.0
            if weight is not None:
                share = tl.load(weight + token * w_n).to(tl.float32)
            row = tl.load(x + token * x_n + c * x_c, mask=c < channels, other=0.0).to(tl.float32)
            merged += row * (share / divisor)
            here = tl.where(r == at, 0, here)
            left -= 1
    tl.store(y + program * channels + c, merged.to(y.dtype.element_ty), mask=c < channels)


def merge_tokens(
    x: Tensor, weight: Tensor | None, index: Tensor, src: Tensor, dst: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Sums weighted tokens into their places, in one launch; with ``normalize``, divides by the summed weight.

    Shapes:  x [B, N, C] · weight [B, N] (None is ones), both of any strides · a plan  ->  y [B, M, C] ·
             total float32 [B, M]
    Equals:  `tokenopt.ops.tokens.merge_tokens`.
    """
    samples, places = index.shape
    channels = x.shape[2]
    y = x.new_empty((samples, places, channels))
    total = x.new_empty((samples, places), dtype=torch.float32)
    columns = block(channels, channels * 2)
    with torch.cuda.device_of(x):
        _merge[(samples * places,)](
            x, weight, *(plan.contiguous() for plan in (index, src, dst)), y, total, places, src.shape[1], channels,
            *x.stride(), *(weight.stride() if weight is not None else (0, 0)),
            NORMALIZE=normalize, BLOCK_C=columns, BLOCK_R=block(src.shape[1], 256),
            num_warps=max(1, min(8, columns // 256)),
        )  # fmt: skip
    return y, total
