"""Rows and column sums of attention probabilities, in two launches and without the matrix.

The first launch finds the logarithm of each row's sum, over all heads; the second computes the logits again, column by
column, and adds up what each key gets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenopt.kernels.tiles import block, products


@triton.jit
def _logits(
    query, key, key_bias, rows, columns, row_count, column_count, row_offset, scale, q_n, q_d, k_n, k_d, kb_m,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    logits, _, _ = products(query, key, rows, columns, row_count, column_count, q_n, q_d, k_n, k_d, D, BLOCK_D)
    logits *= scale
    visible = columns < column_count
    if key_bias is not None:
        logits += tl.load(key_bias + columns * kb_m, mask=visible, other=0.0).to(tl.float32)[None, :]
    visible = visible[None, :]
    if CAUSAL:
        visible = visible & (columns[None, :] <= (row_offset + rows)[:, None])
    return tl.where(visible, logits, float("-inf"))


@triton.jit(do_not_specialize=["row_count", "column_count", "row_offset"])
def _row_sums(
    query, key, key_bias, sums, heads, row_count, column_count, row_offset, scale,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, kb_b, kb_m,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """log(sum(exp(logits))) of a tile of rows of one head; -inf for a row that sees no key."""
    tiles = tl.cdiv(row_count, BLOCK_N)
    tile = tl.program_id(0) % tiles
    group = (tl.program_id(0) // tiles).to(tl.int64)
    sample, head = group // heads, group % heads
    query += sample * q_b + head * q_h
    key += sample * k_b + head * k_h
    if key_bias is not None:
        key_bias += sample * kb_b
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    summed = tl.zeros([BLOCK_N], tl.float32)
    end = column_count
    if CAUSAL:
        end = tl.minimum(column_count, row_offset + (tile + 1) * BLOCK_N)
    for first in range(0, end, BLOCK_M):
        logits = _logits(
            query, key, key_bias, rows, first + tl.arange(0, BLOCK_M), row_count, column_count, row_offset, scale,
            q_n, q_d, k_n, k_d, kb_m, CAUSAL, D, BLOCK_D,
        )  # fmt: skip
        new = tl.maximum(largest, tl.max(logits, 1))
        origin = tl.where(new == float("-inf"), 0.0, new)  # -inf minus itself is NaN
        summed = summed * tl.exp(largest - origin) + tl.sum(tl.exp(logits - origin[:, None]), 1)
        largest = new
    out = tl.where(summed == 0, float("-inf"), largest + tl.log(tl.where(summed == 0, 1.0, summed)))
    tl.store(sums + group * row_count + rows, out, mask=rows < row_count)


@triton.jit(do_not_specialize=["row_count", "column_count", "row_offset"])
def _column_sums(
    query, key, key_bias, sums, weight, received, heads, row_count, column_count, row_offset, scale, share,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, kb_b, kb_m, w_b, w_n,
    CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr, EMPTY_IS_ZERO: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a tile of keys receives from all rows of all heads; a row counts ``share``, times its weight."""
    tiles = tl.cdiv(column_count, BLOCK_M)
    tile = tl.program_id(0) % tiles
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    query += sample * q_b
    key += sample * k_b
    sums += sample * heads * row_count
    if key_bias is not None:
        key_bias += sample * kb_b
    if weight is not None:
        weight += sample * w_b
    columns = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    start = 0
    if CAUSAL and EMPTY_IS_ZERO:  # rows before these columns see none of them
        start = tl.maximum(0, tile * BLOCK_M - row_offset) // BLOCK_N * BLOCK_N
    total = tl.zeros([BLOCK_M], tl.float32)
    for head in range(heads):
        for first in range(start, row_count, BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            logits = _logits(
                query + head * q_h, key + head * k_h, key_bias, rows, columns, row_count, column_count, row_offset,
                scale, q_n, q_d, k_n, k_d, kb_m, CAUSAL, D, BLOCK_D,
            )  # fmt: skip
            row_sum = tl.load(sums + head * row_count + rows, mask=rows < row_count, other=0.0)
            given = tl.exp(logits - row_sum[:, None])
            if EMPTY_IS_ZERO:
                given = tl.where(logits == float("-inf"), 0.0, given)
            if EXCLUDE_SELF:
                given = tl.where(rows[:, None] == columns[None, :], 0.0, given)
            given = tl.where((rows < row_count)[:, None], given, 0.0)
            if weight is not None:
                factor = tl.load(weight + rows * w_n, mask=rows < row_count, other=0.0).to(tl.float32)
                given *= factor[:, None]
            total += tl.sum(given, 0)
    tl.store(received + sample * column_count + columns, total * share, mask=columns < column_count)


def _received(
    query: Tensor, key: Tensor, key_bias: Tensor | None, weight: Tensor | None, row: int, count: int,
    scale: float | None, is_causal: bool, exclude_self: bool, empty_is_zero: bool,
) -> Tensor:  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    dtype = torch.promote_types(query.dtype, key.dtype)
    query, key = query[:, :, row : row + count].to(dtype), key.to(dtype)
    samples, heads, rows, size = query.shape
    columns = key.shape[2]
    key = key.expand(samples, heads, columns, size)
    bias_strides = weight_strides = (0, 0)
    if key_bias is not None:
        key_bias = key_bias.expand(samples, columns)
        bias_strides = key_bias.stride()
    if weight is not None:
        weight = weight.expand(samples, rows)
        weight_strides = weight.stride()
    sums = query.new_empty((samples, heads, rows), dtype=torch.float32)
    received = query.new_empty((samples, columns), dtype=torch.float32)
    share = 1 / heads if weight is not None else 1 / (heads * rows)
    strides = (*query.stride(), *key.stride(), *bias_strides)
    tiles = dict(CAUSAL=is_causal, D=size, BLOCK_N=block(rows, 64), BLOCK_M=64, BLOCK_D=block(size, 64))
    with torch.cuda.device_of(query):
        _row_sums[(samples * heads * triton.cdiv(rows, tiles["BLOCK_N"]),)](
            query, key, key_bias, sums, heads, rows, columns, row, scale, *strides, **tiles
        )
        _column_sums[(samples * triton.cdiv(columns, tiles["BLOCK_M"]),)](
            query, key, key_bias, sums, weight, received, heads, rows, columns, row, scale, share, *strides,
            *weight_strides, EXCLUDE_SELF=exclude_self, EMPTY_IS_ZERO=empty_is_zero, **tiles,
        )  # fmt: skip
    return received


def attention_probe(
    query: Tensor,
    key: Tensor,
    bias: None,
    key_bias: Tensor | None,
    row: int,
    count: int,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attention probabilities of a few query rows, averaged over heads and rows.

    Shapes:  query [B, H, N, D] · key [B, H, M, D] · key_bias [B, M], all of any strides  ->  float32 [B, M]
    Equals:  `tokenopt.ops.attention.attention_probe` without a bias.
    """
    assert bias is None, "a bias of two dimensions is for the reference"
    return _received(query, key, key_bias, None, row, count, scale, is_causal, False, empty_is_zero=False)


def attention_received(
    query: Tensor,
    key: Tensor,
    bias: None,
    key_bias: Tensor | None,
    weight: Tensor | None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    exclude_self: bool = False,
) -> Tensor:
    """Attention that each key receives from all queries, ``sum_i weight_i mean_h softmax(...)_hij``.

    Shapes:  query [B, H, N, D] · key [B, H, M, D] · key_bias [B, M] · weight [B or 1, N] (None is the mean), all of any
             strides  ->  float32 [B, M]
    Equals:  `tokenopt.ops.score.attention_received` without a bias.
    """
    assert bias is None, "a bias of two dimensions is for the reference"
    rows = query.shape[2]
    return _received(query, key, key_bias, weight, 0, rows, scale, is_causal, exclude_self, empty_is_zero=True)
