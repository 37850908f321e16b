"""Attention of blocks of queries over a list of blocks of keys each, the form of SpargeAttention and sliding tiles.

Zhang et al., SpargeAttention, arXiv:2502.18137; Zhang et al., Fast Video Generation with Sliding Tile Attention,
arXiv:2502.04507. What is not on the list costs nothing: no score is computed and no key is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenopt.errors import UsageError
from tokenopt.kernels import online, tuning
from tokenopt.kernels.online import accumulate, finish, initial, load_rows, scores


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    query_block: int,
    key_block: int,
    scale: float,
    config: tuning.Config | None = None,
) -> Tensor:
    """Attention in which a block of queries sees only the blocks of keys on its list.

    Args:
        query: [B, H, N, D], any strides; D up to 256.
        key, value: [B, H, M, D] and [B, H, M, E], any strides.
        index: int32 [B or 1, H or 1, ceil(N / query_block), K], the blocks of keys that a block of queries sees: each
            at most once, -1 for none, best at the end. The last blocks may be shorter.
        mask: bool, broadcast to [B, H, N, M]; a query does not see a key where it is False. Only blocks on the list
            are read.
        key_bias: [B, M], added to the scaled logits of a key.
        query_block, key_block: powers of two from 16 on.
        scale: positive.
        config: how to run it; by default what the table says for the device. Its tiles are cut down to the blocks.

    Returns:
        [B, H, N, E] in the memory of [B, N, H, E]; a row that sees no key is 0.

    Raises:
        UsageError: shapes, dtypes or sizes that the kernel does not take.
    """
    online.check_operands(query, key, value, key_bias, scale)
    batch, heads, queries, dim = query.shape
    keys, out_dim = value.shape[2:]
    _check_blocks(query, keys, index, mask, query_block, key_block)
    index = index.expand(batch, heads, -1, -1)
    if mask is not None:
        mask = mask.view(torch.uint8).expand(batch, heads, queries, keys)
    config = config or tuning.lookup("block-sparse", query, tokens=keys)
    tile_queries, tile_keys = min(config.queries, query_block), min(config.keys, key_block)
    out = online.empty_output(query, queries, value)
    grid = (triton.cdiv(queries, tile_queries) * heads * batch,)
    with online.on_device_of(query):
        block_sparse_kernel[grid](
            query,
            key,
            value,
            index,
            mask,
            key_bias,
            heads,
            queries,
            keys,
            index.shape[3],
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *index.stride(),
            *(mask.stride() if mask is not None else (0, 0, 0, 0)),
            *(key_bias.stride() if key_bias is not None else (0, 0)),
            *out.stride(),
            out,
            SCALE=online.exponent_scale(scale),
            QUERY_BLOCK=query_block,
            KEY_BLOCK=key_block,
            QUERIES=tile_queries,
            KEYS=tile_keys,
            SLOTS=triton.next_power_of_2(index.shape[3]),
            D=dim,
            D_CHUNKS=online.chunks(dim),
            E=out_dim,
            E_CHUNKS=online.chunks(out_dim),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def _check_blocks(
    query: Tensor, keys: int, index: Tensor, mask: Tensor | None, query_block: int, key_block: int
) -> None:
    """Raises a UsageError unless index and mask fit."""
    batch, heads, queries, _ = query.shape
    why = None
    if any(block < 16 or block & (block - 1) for block in (query_block, key_block)):
        why = "a block must be a power of two, 16 or more"
    elif index.dim() != 4 or index.shape[0] not in (1, batch) or index.shape[1] not in (1, heads):
        why = "the index must be [batch or 1, heads or 1, query blocks, key blocks seen]"
    elif index.dtype != torch.int32 or index.shape[2] != triton.cdiv(queries, query_block) or not index.shape[3]:
        why = f"the index must be int32 with a list for each of {triton.cdiv(queries, query_block)} blocks of queries"
    elif mask is not None and (
        mask.dtype != torch.bool
        or mask.dim() != 4
        or any(have not in (1, want) for have, want in zip(mask.shape, (batch, heads, queries, keys), strict=True))
    ):
        why = "the mask must be bool and broadcast to [batch, heads, queries, keys]"
    if why:
        where = f"index {index.dtype} {list(index.shape)}, blocks of {query_block} queries and {key_block} keys"
        raise UsageError("this block-sparse attention has no kernel", where=where, why=why)


@triton.jit
def block_sparse_kernel(
    query,
    key,
    value,
    index,
    mask,
    bias,
    heads,
    queries,
    keys,
    slots,
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
    index_b,
    index_h,
    index_n,
    index_k,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    bias_b,
    bias_n,
    out_b,
    out_h,
    out_n,
    out_d,
    out,
    SCALE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SLOTS: tl.constexpr,
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
    PARTS: tl.constexpr = KEY_BLOCK // KEYS
    tiles = tl.cdiv(queries, QUERIES)
    program = tl.program_id(0)
    first = program % tiles * QUERIES
    head = (program // tiles % heads).to(tl.int64)
    sample = (program // (tiles * heads)).to(tl.int64)
    query += sample * query_b + head * query_h
    key += sample * key_b + head * key_h
    value += sample * value_b + head * value_h
    index += sample * index_b + head * index_h + first // QUERY_BLOCK * index_n
    out += sample * out_b + head * out_h
    if mask is not None:
        mask += sample * mask_b + head * mask_h
    if bias is not None:
        bias += sample * bias_b

    row = first + tl.arange(0, QUERIES)
    there = row < queries
    q1 = load_rows(query, row, query_n, query_d, there, 0, D1, D)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(query, row, query_n, query_d, there, D1, D2, D)
    peak, total, acc1, acc2 = initial(QUERIES, E1, E2)

    # the -1 at the end of a list are not visited
    slot = tl.arange(0, SLOTS)
    listed = tl.load(index + slot * index_k, mask=slot < slots, other=-1)
    used = tl.max(tl.where(listed >= 0, slot + 1, 0), 0)
    for part in range(0, used * PARTS):
        block = tl.load(index + part // PARTS * index_k)
        at = block * KEY_BLOCK + part % PARTS * KEYS
        column = at + tl.arange(0, KEYS)
        valid = (column < keys) & (block >= 0)
        s = scores(q1, q2, key, column, key_n, key_d, valid, D, D1, D2)
        if mask is not None:
            # 64 bits: a mask of all queries and keys may be larger than 2^31
            seen = mask + row[:, None].to(tl.int64) * mask_n + column[None, :] * mask_m
            s = tl.where(tl.load(seen, mask=there[:, None] & valid[None, :], other=0) != 0, s, -float("inf"))
        elif (block < 0) | (at + KEYS > keys):
            s = tl.where(valid[None, :], s, -float("inf"))
        peak, total, acc1, acc2 = accumulate(
            s, peak, total, acc1, acc2, value, bias, column, value_n, value_d, bias_n, valid, SCALE, E, E1, E2
        )
    finish(out, row, out_n, out_d, there, total, acc1, acc2, E, E1, E2)
