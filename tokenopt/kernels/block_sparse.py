"""Attention of tiles of queries over a list of keys each, as tables name them: what is not listed costs nothing.

The lists are constant, as those of sliding tiles (Zhang et al., arXiv:2502.04507), or are put together from the blocks
that the content chooses (Zhang et al., SpargeAttention, arXiv:2502.18137). Queries and keys are read where they lie, by
their positions, and results are written in place: nothing is gathered in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokenopt.kernels import online, tuning
from tokenopt.kernels.online import accumulate, finish, initial, load_rows, scores
from tokenopt.kernels.tiles import block


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    queries: Tensor,
    keys: Tensor,
    rows: Tensor,
    key_bias: Tensor | None = None,
    *,
    causal: bool,
    scale: float,
    config: tuning.Config | None = None,
) -> Tensor:
    """Attention in which a block of queries sees the blocks of keys on its list, and the tokens in no block.

    Args:
        query, key: [B, H, N, D], any strides; D up to 256.
        value: [B, H, N, E], any strides.
        index: int64 [B, H or 1, T, K], the blocks of keys that a block of queries sees, each once.
        queries, keys: int64 [T, Q], [S, L], the positions of the tokens of each block; -1 for none.
        rows: int64 [R], the positions of tokens that all see.
        key_bias: [B, N], added to the scaled logits of a key.
        causal: no query sees what comes after it.
        scale: positive.
        config: how to run it; by default what the table says for the device. Its tiles are cut down to the blocks.

    Returns:
        [B, H, N, E] in the memory of [B, N, H, E]. A query that sees no key gets 0; what is in no block of queries is
        not written.

    Raises:
        UsageError: shapes, dtypes or sizes that the kernel does not take.
    """
    index = index.expand(*query.shape[:2], -1, -1)
    return _launch(
        query, key, value, queries[None], keys[None], index, rows, None, key_bias, causal=causal, scale=scale,
        config=config,
    )  # fmt: skip


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    scale: float,
    config: tuning.Config | None = None,
) -> Tensor:
    """Attention of each tile of queries over its own list of keys.

    Args:
        queries, keys: int64 [h, T, Q], [h, T, K] positions; h is H, or 1 where all heads share them. A query may be
            in several places.
        mask: additive, [T, Q, K], [H or 1, T, Q, K] or [B or 1, H or 1, T, Q or 1, K].
        others: as of `block_sparse_attention`.

    Returns, Raises:
        as `block_sparse_attention`.
    """
    if mask is not None:
        mask = mask.expand(*query.shape[:2], *queries.shape[1:], keys.shape[2])
    return _launch(
        query, key, value, queries, keys, None, None, mask, key_bias, causal=False, scale=scale, config=config
    )


def supported(query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> bool:
    """Whether the kernel takes these operands: see ops/native.py. Tables and biases are as the operations have them."""
    return online.supported(query, key, value)


def _launch(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, index: Tensor | None,
    rows: Tensor | None, mask: Tensor | None, key_bias: Tensor | None, *, causal: bool, scale: float,
    config: tuning.Config | None,
) -> Tensor:  # fmt: skip
    online.check_operands(query, key, value, key_bias, scale)
    batch, heads, tokens, dim = query.shape
    out_dim = value.shape[3]
    queries, keys = queries.contiguous(), keys.contiguous()
    _, tiles, size = queries.shape
    length = keys.shape[2]
    listed = length if index is None else index.shape[3] * length
    few = 0 if rows is None else rows.shape[0]
    rows = rows if few else None
    config = config or tuning.lookup("block-sparse", query, tokens=tokens)
    tile_queries, tile_keys = block(size, config.queries), block(listed + few, config.keys)
    out = online.empty_output(query, tokens, value)
    apart = lambda table: table.stride(0) if table.shape[0] > 1 else 0  # noqa: E731  (heads may share a table)
    with online.on_device_of(query):
        block_sparse_kernel[(triton.cdiv(size, tile_queries) * tiles * heads * batch,)](
            query,
            key,
            value,
            queries,
            keys,
            index,
            rows,
            mask,
            key_bias,
            heads,
            tiles,
            size,
            listed,
            few,
            *query.stride(),
            *key.stride(),
            *value.stride(),
            apart(queries),
            apart(keys),
            *(index.stride() if index is not None else (0, 0, 0, 0)),
            *(mask.stride() if mask is not None else (0, 0, 0, 0, 0)),
            *(key_bias.stride() if key_bias is not None else (0, 0)),
            *out.stride(),
            out,
            SCALE=online.exponent_scale(scale),
            CAUSAL=causal,
            LENGTH=length,
            QUERIES=tile_queries,
            KEYS=tile_keys,
            D=dim,
            D_CHUNKS=online.chunks(dim),
            E=out_dim,
            E_CHUNKS=online.chunks(out_dim),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


@triton.jit
def _positions(keys, index, rows, first, listed, few, index_k, LENGTH: tl.constexpr, KEYS: tl.constexpr):
    """Where the next keys of a list lie, -1 behind its end: those of the listed blocks, then the tokens in no block."""
    place = first + tl.arange(0, KEYS)
    known = place < listed
    if index is None:
        column = tl.load(keys + place, mask=known, other=-1)
    elif LENGTH % KEYS == 0:  # all of one block
        number = tl.load(index + first // LENGTH * index_k, mask=first < listed, other=0)
        column = tl.load(keys + number * LENGTH + first % LENGTH + tl.arange(0, KEYS), mask=known, other=-1)
    else:
        number = tl.load(index + place // LENGTH * index_k, mask=known, other=0)
        column = tl.load(keys + number * LENGTH + place % LENGTH, mask=known, other=-1)
    if rows is not None:
        beside = tl.load(rows + place - listed, mask=(place >= listed) & (place < listed + few), other=-1)
        column = tl.where(known, column, beside)
    return column.to(tl.int32)


@triton.jit
def block_sparse_kernel(
    query,
    key,
    value,
    queries,
    keys,
    index,
    rows,
    mask,
    bias,
    heads,
    tiles,
    size,
    listed,
    few,
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
    queries_h,
    keys_h,
    index_b,
    index_h,
    index_t,
    index_k,
    mask_b,
    mask_h,
    mask_t,
    mask_q,
    mask_k,
    bias_b,
    bias_n,
    out_b,
    out_h,
    out_n,
    out_d,
    out,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    LENGTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    D_CHUNKS: tl.constexpr,
    E: tl.constexpr,
    E_CHUNKS: tl.constexpr,
):
    """A program computes QUERIES queries of a tile of one head. Launch ceil(size / QUERIES) * tiles * heads * batch.

    size: queries per tile. listed: keys on a tile's list, in blocks of LENGTH where there is an index. few: of rows.
    """
    D1: tl.constexpr = D_CHUNKS[0]
    D2: tl.constexpr = D_CHUNKS[1]
    E1: tl.constexpr = E_CHUNKS[0]
    E2: tl.constexpr = E_CHUNKS[1]
    parts = tl.cdiv(size, QUERIES)
    program = tl.program_id(0)
    at = program % parts * QUERIES + tl.arange(0, QUERIES)
    tile = (program // parts % tiles).to(tl.int64)
    head = (program // (parts * tiles) % heads).to(tl.int64)
    sample = (program // (parts * tiles * heads)).to(tl.int64)
    query += sample * query_b + head * query_h
    key += sample * key_b + head * key_h
    value += sample * value_b + head * value_h
    queries += head * queries_h + tile * size
    keys += head * keys_h
    out += sample * out_b + head * out_h
    if index is not None:
        index += sample * index_b + head * index_h + tile * index_t
    else:
        keys += tile * LENGTH
    if mask is not None:
        mask += sample * mask_b + head * mask_h + tile * mask_t
    if bias is not None:
        bias += sample * bias_b

    row = tl.load(queries + at, mask=at < size, other=-1).to(tl.int32)
    there = row >= 0
    q1 = load_rows(query, row, query_n, query_d, there, 0, D1, D)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(query, row, query_n, query_d, there, D1, D2, D)
    peak, total, acc1, acc2 = initial(QUERIES, E1, E2)

    # positions are read a block ahead, so that the loads of keys and values need not wait for them
    following = _positions(keys, index, rows, 0, listed, few, index_k, LENGTH, KEYS)
    for first in range(0, listed + few, KEYS):
        column = following
        following = _positions(keys, index, rows, first + KEYS, listed, few, index_k, LENGTH, KEYS)
        valid = column >= 0
        seen = valid[None, :]
        if CAUSAL:
            seen = seen & (column[None, :] <= row[:, None])
        s = scores(q1, q2, key, column, key_n, key_d, valid, D, D1, D2)
        if mask is not None:
            place = first + tl.arange(0, KEYS)
            inside = (at < size)[:, None] & (place < listed)[None, :]
            added = tl.load(mask + at[:, None] * mask_q + place[None, :] * mask_k, mask=inside, other=0.0)
            s += added.to(tl.float32) * (1.4426950408889634 / SCALE)
        s = tl.where(seen, s, -float("inf"))
        peak, total, acc1, acc2 = accumulate(
            s, peak, total, acc1, acc2, value, bias, column, value_n, value_d, bias_n, valid, SCALE, E, E1, E2
        )
    finish(out, row, out_n, out_d, there, total, acc1, acc2, E, E1, E2)
