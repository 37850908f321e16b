"""Attention whose pattern depends on its content: which keys a query sees is computed from queries and keys.

All shapes are constant: every query sees a fixed number of blocks of keys, or of keys. The tables of blocks name
positions in the sequence, and -1 where a block is shorter than the others. An attention ``f`` has a reference ``f_bias``
with the same arguments: the bias under which dense attention equals it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenopt.ops import op
from tokenopt.ops.attention import attention, joined_bias
from tokenopt.ops.tiles import attend

_INPUTS = "Tensor query, Tensor key, Tensor value, "
_TABLES = "Tensor queries, Tensor keys, Tensor order, Tensor rows, "
_BIAS = "Tensor? bias=None, Tensor? key_bias=None, "


# -- blocks ------------------------------------------------------------------------------------------------------------


@op(
    "(Tensor query, Tensor key, Tensor queries, Tensor keys, Tensor? forced=None, *, int topk, str heads='joint', "
    "str pool='mean') -> Tensor"
)
def block_route(
    query: Tensor,
    key: Tensor,
    queries: Tensor,
    keys: Tensor,
    forced: Tensor | None = None,
    *,
    topk: int,
    heads: str = "joint",
    pool: str = "mean",
) -> Tensor:
    """The blocks of keys that each block of queries sees: those whose pooled key is most like its pooled query.

    Shapes:  query, key [B, H, N, D] · queries int64 [T, Q] · keys int64 [S, L] · forced [T, S], added to the scores
             ->  int64 [B, h, T, topk], best first; h is H for heads="each", else 1
    Args:    heads: "joint" compares all channels at once, "mean" the means of the heads, "each" every head by itself.
             pool: the "mean" of a block, or that times the square root of its "length".
    Source:  Zhu et al., BiFormer, arXiv:2303.08810, eq. 3 to 5 (joint, mean); Xiong et al., DHSA (mean, length).
    """
    q, k = _pooled(query, queries, pool), _pooled(key, keys, pool)
    if heads == "joint":
        q, k = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (q, k))
    elif heads == "mean":
        q, k = q.mean(1, keepdim=True), k.mean(1, keepdim=True)
    scores = q @ k.transpose(-2, -1)
    return (scores if forced is None else scores + forced.to(scores.dtype)).topk(topk, -1).indices


@op(f"({_INPUTS}Tensor index, {_TABLES}{_BIAS}*, bool causal=False, float? scale=None) -> Tensor")
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    queries: Tensor,
    keys: Tensor,
    order: Tensor,
    rows: Tensor,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each block of queries over its own list of blocks of keys, and over the tokens in no block.

    Shapes:  query, key [B, H, N, D] · value [B, H, N, E] · index int64 [B, H or 1, T, K], blocks of keys ·
             queries int64 [T, Q] · keys int64 [S, L] · order int64 [N] · rows int64 [R] ·
             bias broadcast to [B, H, N, N], additive or boolean · key_bias [B, N]  ->  [B, H, N, E]
    Args:    order: where each token's result lies behind the results of all blocks and those of the rows.
             rows: the tokens in no block (class, register, text): all queries see them, and they see all keys.
             causal: no query sees what comes after it.
             scale defaults to D ** -0.5.
    Equals:  attention(query, key, value, bias) where index lists all blocks.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    total = key.shape[2]
    bias = _of_rank_4(joined_bias(bias, key_bias, query.dtype), total)
    places = _pick(keys[None, None, None], index).flatten(-2)
    places = torch.cat([places, rows.expand(*places.shape[:-1], -1)], -1).unsqueeze(-2)  # [B, h, T, 1, K L + R]
    seen = places >= 0 if keys.numel() + rows.shape[0] > total else None  # else no block is short
    if causal:
        before = places <= queries.unsqueeze(-1)
        seen = before if seen is None else seen & before
    listed = None if bias is None else _listed_bias(bias, queries, keys, rows, index)
    k, v = (_listed(x, keys, rows, index) for x in (key, value))
    out = attend(_blocks(query, queries), k, v, _hidden(listed, seen), scale).flatten(2, 3)
    if rows.shape[0]:
        past = rows.unsqueeze(-1) >= torch.arange(total, device=rows.device) if causal else None
        few = bias if bias is None or bias.shape[2] == 1 else bias.index_select(2, rows)
        few = attention(query.index_select(2, rows), key, value, _hidden(few, past), scale=scale)
        out = torch.cat([out, few], 2)
    return out.index_select(2, order)


_ROUTED = (
    f"({_INPUTS}{_TABLES}Tensor? forced=None, {_BIAS}*, int topk, str heads='joint', str pool='mean', "
    "bool causal=False, float? scale=None) -> Tensor"
)


@op(_ROUTED)
def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    order: Tensor,
    rows: Tensor,
    forced: Tensor | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    topk: int,
    heads: str = "joint",
    pool: str = "mean",
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`block_sparse_attention` over the blocks that `block_route` chooses; it does not look at a bias.

    Shapes:  as of those two
    Equals:  attention(query, key, value, bias) where topk is the number of blocks.
    """
    ops = torch.ops.tokenopt  # through the dispatcher, so that a runtime can have a form of each
    index = ops.block_route(query, key, queries, keys, forced, topk=topk, heads=heads, pool=pool)
    return ops.block_sparse_attention(
        query, key, value, index, queries, keys, order, rows, bias, key_bias, causal=causal, scale=scale
    )


@op(_ROUTED)
def routed_attention_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    order: Tensor,
    rows: Tensor,
    forced: Tensor | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    topk: int,
    heads: str = "joint",
    pool: str = "mean",
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The bias under which dense attention equals `routed_attention`: a check.

    Shapes:  as `routed_attention`  ->  additive [B, H or 1, N, N]
    """
    index = block_route(query, key, queries, keys, forced, topk=topk, heads=heads, pool=pool)
    return _dense_bias(query, index, queries, keys, rows, joined_bias(bias, key_bias, query.dtype), causal)


def _pooled(x: Tensor, blocks: Tensor, pool: str) -> Tensor:
    """[B, H, N, D], int64 [T, Q] -> [B, H, T, D], in single precision at least."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    valid = (blocks >= 0).to(x.dtype)
    count = valid.sum(-1, keepdim=True)
    weight = valid / (count if pool == "mean" else count.sqrt())
    return (weight.unsqueeze(1) @ _blocks(x, blocks)).squeeze(-2)


def _blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """[B, H, N, D], int64 [T, Q] -> [B, H, T, Q, D]; any token where there is none."""
    return x.index_select(2, blocks.clamp(min=0).flatten()).unflatten(2, blocks.shape)


def _listed(x: Tensor, keys: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """The keys or values that each block of queries sees: [B, H, N, D] -> [B, H, T, K L + R, D]."""
    count, size = keys.shape
    chosen = _pick(_blocks(x, keys).unsqueeze(2).flatten(4), index).unflatten(-1, (size, x.shape[-1])).flatten(3, 4)
    few = x.index_select(2, rows).unsqueeze(2).expand(-1, -1, index.shape[2], -1, -1)
    return torch.cat([chosen, few], 3) if rows.shape[0] else chosen


def _listed_bias(bias: Tensor, queries: Tensor, keys: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """The bias of those keys: [B or 1, H or 1, N or 1, N] -> [B, H or 1, T, Q or 1, K L + R]."""
    bias = bias.unsqueeze(2) if bias.shape[2] == 1 else _blocks(bias, queries)  # [B, H, T or 1, Q or 1, N]
    few = bias.index_select(4, rows)
    size = bias.shape[3], keys.shape[1]
    grid = bias.index_select(4, keys.clamp(min=0).flatten()).unflatten(4, keys.shape).transpose(3, 4).flatten(4)
    chosen = _pick(grid, index).unflatten(-1, size).transpose(3, 4).flatten(4)
    return torch.cat([chosen, few.expand(*chosen.shape[:3], -1, -1)], -1)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows by number, one list of them for each of the leading places.

    Shapes:  x [B or 1, H or 1, T or 1, S, F] · index int64 [B, h, T, K]  ->  [B, H or h, T, K, F]
    """
    lead, count = x.shape[:3], x.shape[3]
    first = count * torch.arange(lead[0] * lead[1] * lead[2], device=x.device).view(*lead, 1)
    flat = index + first
    return x.flatten(0, 3).index_select(0, flat.flatten()).view(*flat.shape, x.shape[-1])


def _of_rank_4(bias: Tensor | None, total: int) -> Tensor | None:
    if bias is None:
        return None
    return bias.reshape(*[1] * (4 - bias.dim()), *bias.shape).expand(-1, -1, -1, total)


def _hidden(bias: Tensor | None, seen: Tensor | None) -> Tensor | None:
    """A bias that hides besides what is not seen."""
    if bias is None or seen is None:
        return seen if bias is None else bias
    return bias & seen if bias.dtype is torch.bool else torch.where(seen, bias, float("-inf"))


def _dense_bias(
    query: Tensor, index: Tensor, queries: Tensor, keys: Tensor, rows: Tensor, bias: Tensor | None, causal: bool
) -> Tensor:
    """Additive [B, H or h, N, N]: which tokens see each other, from the numbers of their blocks."""
    position = torch.arange(query.shape[2], device=query.device)
    listed = (index.unsqueeze(-1) == torch.arange(keys.shape[0], device=query.device)).any(-2)  # [B, h, T, S]
    of_query, of_key = ((table.unsqueeze(-1) == position).any(1).to(query.dtype) for table in (queries, keys))
    seen = of_query.T @ listed.to(query.dtype) @ of_key > 0
    other = (position.unsqueeze(-1) == rows).any(-1)
    seen = seen | other | other.unsqueeze(-1)
    if causal:
        seen = seen & (position <= position.unsqueeze(-1))
    bias = query.new_zeros(()) if bias is None else bias
    if bias.dtype is torch.bool:
        seen, bias = seen & bias, query.new_zeros(())
    return torch.where(seen, bias, float("-inf"))
