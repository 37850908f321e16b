"""Dense attention with a bias per key, without the mask of N x N that keeps others off their fast path.

Proportional attention of merged tokens adds the logarithm of a token's size to its logits (Bolya et al., Token Merging,
ICLR 2023, arXiv:2210.09461, equation 1). The kernel is that of Dao, FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokenopt.kernels import online, tuning
from tokenopt.kernels.online import accumulate, finish, initial, load_rows, scores, supported  # noqa: F401  (a part of the module: see ops/native.py)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    config: tuning.Config | None = None,
) -> Tensor:
    """softmax(scale * query @ key^T + key_bias) @ value.

    Args:
        query: [B, H, N, D], any strides; D up to 256.
        key, value: [B, H, M, D] and [B, H, M, E], any strides.
        key_bias: [B, M], added to the scaled logits of a key; -inf hides it.
        scale: positive.
        is_causal: query i sees keys 0 to i, as in torch's scaled_dot_product_attention.
        config: how to run it; by default what the table says for the device.

    Returns:
        [B, H, N, E] in the memory of [B, N, H, E]; a row that sees no key is 0.

    Raises:
        UsageError: shapes, dtypes or sizes that the kernel does not take.
    """
    online.check_operands(query, key, value, key_bias, scale)
    batch, heads, queries, dim = query.shape
    keys, out_dim = value.shape[2:]
    config = config or tuning.lookup("flash", query, tokens=keys)
    out = online.empty_output(query, queries, value)
    grid = (triton.cdiv(queries, config.queries) * heads * batch,)
    with online.on_device_of(query):
        flash_kernel[grid](
            query,
            key,
            value,
            key_bias,
            heads,
            queries,
            keys,
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *(key_bias.stride() if key_bias is not None else (0, 0)),
            *out.stride(),
            out,
            SCALE=online.exponent_scale(scale),
            CAUSAL=is_causal,
            QUERIES=config.queries,
            KEYS=config.keys,
            D=dim,
            D_CHUNKS=online.chunks(dim),
            E=out_dim,
            E_CHUNKS=online.chunks(out_dim),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


@triton.jit
def flash_kernel(
    query,
    key,
    value,
    bias,
    heads,
    queries,
    keys,
    query_b,
    query_h,
    query_n,
    query_d,
    key_b,
    key_h,
    key_n,
    key_d,
    value_b,
    value_h,
    value_n,
    value_d,
    bias_b,
    bias_n,
    out_b,
    out_h,
    out_n,
    out_d,
    out,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    D_CHUNKS: tl.constexpr,
    E: tl.constexpr,
    E_CHUNKS: tl.constexpr,
):
    """A program computes QUERIES queries of one head. Launch ceil(queries / QUERIES) * heads * batch programs."""
    D1: tl.constexpr = D_CHUNKS[0]
    D2: tl.constexpr = D_CHUNKS[1]
    E1: tl.constexpr = E_CHUNKS[0]
    E2: tl.constexpr = E_CHUNKS[1]
    tiles = tl.cdiv(queries, QUERIES)
    program = tl.program_id(0)
    first = program % tiles * QUERIES
    head = (program // tiles % heads).to(tl.int64)
    sample = (program // (tiles * heads)).to(tl.int64)
    query += sample * query_b + head * query_h
    key += sample * key_b + head * key_h
    value += sample * value_b + head * value_h
    out += sample * out_b + head * out_h
    if bias is not None:
        bias += sample * bias_b

    row = first + tl.arange(0, QUERIES)
    there = row < queries
    q1 = load_rows(query, row, query_n, query_d, there, 0, D1, D)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(query, row, query_n, query_d, there, D1, D2, D)
    peak, total, acc1, acc2 = initial(QUERIES, E1, E2)

    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + QUERIES)
    for at in range(0, end, KEYS):
        column = at + tl.arange(0, KEYS)
        valid = column < keys
        s = scores(q1, q2, key, column, key_n, key_d, valid, D, D1, D2)
        full = at + KEYS <= keys
        if CAUSAL:
            full = full & (at + KEYS <= first + 1)
        if not full:
            seen = valid[None, :]
            if CAUSAL:
                seen = seen & (column[None, :] <= row[:, None])
            s = tl.where(seen, s, -float("inf"))
        peak, total, acc1, acc2 = accumulate(
            s, peak, total, acc1, acc2, value, bias, column, value_n, value_d, bias_n, valid, SCALE, E, E1, E2
        )
    finish(out, row, out_n, out_d, there, total, acc1, acc2, E, E1, E2)
