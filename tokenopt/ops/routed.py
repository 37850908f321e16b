"""Attention whose pattern depends on its content: which keys a query sees is computed from queries and keys.

All shapes are constant: every query sees a fixed number of blocks of keys, or of keys. The tables of blocks name
positions in the sequence, and -1 where a block is shorter than the others. An attention ``f`` has a reference
``f_bias`` with the same arguments: the bias under which dense attention equals it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenopt.ops import native, op
from tokenopt.ops.attention import attention, joined_bias
from tokenopt.ops.tiles import attend, tiled_attention

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
    Source:  Zhu et al., BiFormer, arXiv:2303.08810 (joint, mean); Xiong et al., DHSA (mean, length).
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
    compute = None
    if bias is None:
        compute = native.native("block_sparse_attention", query, key, value, index, queries, keys, rows, key_bias)
    bias = _of_rank_4(joined_bias(bias, key_bias, query.dtype), total)
    few = None
    if rows.shape[0]:
        past = rows.unsqueeze(-1) >= torch.arange(total, device=rows.device) if causal else None
        theirs = bias if bias is None or bias.shape[2] == 1 else bias.index_select(2, rows)
        few = attention(query.index_select(2, rows), key, value, _hidden(theirs, past), scale=scale)
    if compute is not None:
        out = compute(query, key, value, index, queries, keys, rows, key_bias, causal=causal, scale=scale)
        return out if few is None else out.index_copy_(2, rows, few)
    places = _pick(keys[None, None, None], index).flatten(-2)
    places = torch.cat([places, rows.expand(*places.shape[:-1], -1)], -1)  # [B, h, T, K L + R]
    seen = None
    if keys.numel() + rows.shape[0] > total:  # a block is short
        seen = (places >= 0).unsqueeze(-2)
    if causal:
        past = places.unsqueeze(-2) <= queries.unsqueeze(-1)
        seen = past if seen is None else seen & past
    places = places.clamp(min=0)
    k, v = (_pick(x.unsqueeze(2), places) for x in (key, value))
    listed = None
    if bias is not None:
        of_query = bias.unsqueeze(2) if bias.shape[2] == 1 else _blocks(bias, queries)  # [B, H, T, Q, N]
        listed = _pick(of_query.transpose(-2, -1), places).transpose(-2, -1)
    out = attend(_blocks(query, queries), k, v, _hidden(listed, seen), scale).flatten(2, 3)
    return (out if few is None else torch.cat([out, few], 2)).index_select(2, order)


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


# -- keys, by a prediction ---------------------------------------------------------------------------------------------


_PREDICTED = (
    f"({_INPUTS}{_TABLES}Tensor query_weight, Tensor key_weight, Tensor project, Tensor basis, {_BIAS}*, int topk, "
    "int coefficients, float? scale=None) -> Tensor"
)


@op(
    "(Tensor query, Tensor key, Tensor queries, Tensor keys, Tensor query_weight, Tensor key_weight, Tensor project, "
    "Tensor basis, *, int topk, int coefficients) -> Tensor"
)
def predict_route(
    query: Tensor,
    key: Tensor,
    queries: Tensor,
    keys: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    project: Tensor,
    basis: Tensor,
    *,
    topk: int,
    coefficients: int,
) -> Tensor:
    """The keys that a predicted attention of low rank gives most to, summed over each block of queries.

    Shapes:  query, key [B, H, N, D] · queries int64 [T, Q] · keys int64 [S, 1] · query_weight, key_weight [D, P] ·
             project [S, R] · basis [R, S], not negative  ->  int64 [B, H, T, topk], best first
    Args:    coefficients: of so many rows of the basis, the largest, a query's attention is the sum.
    Source:  Wei et al., Sparsifiner, arXiv:2303.13755: coefficients softmax(s (q W_q) (k W_k)^T P), their
             largest, times a basis; s is H ** -0.5 as in the authors' code.
    """
    q, k = _blocks(query, queries).flatten(2, 3) @ query_weight, key.index_select(2, keys[:, 0]) @ key_weight
    weights = (q @ (k.transpose(-2, -1) @ project) * query.shape[1] ** -0.5).softmax(-1)
    least = weights.topk(coefficients, -1).values[..., -1:]
    weights = torch.where(weights >= least, weights, 0.0).unflatten(2, queries.shape)
    of_block = (weights * (queries >= 0).to(weights.dtype).unsqueeze(-1)).sum(3)
    return (of_block @ basis).topk(topk, -1).indices


@op(_PREDICTED)
def predicted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    order: Tensor,
    rows: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    project: Tensor,
    basis: Tensor,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    topk: int,
    coefficients: int,
    scale: float | None = None,
) -> Tensor:
    """`block_sparse_attention` over the keys that `predict_route` chooses; it does not look at a bias.

    Shapes:  as of those two
    Equals:  attention(query, key, value, bias) where topk is the number of keys in blocks.
    """
    ops = torch.ops.tokenopt
    learned = query_weight, key_weight, project, basis
    index = ops.predict_route(query, key, queries, keys, *learned, topk=topk, coefficients=coefficients)
    return ops.block_sparse_attention(query, key, value, index, queries, keys, order, rows, bias, key_bias, scale=scale)


@op(_PREDICTED)
def predicted_attention_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    order: Tensor,
    rows: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    project: Tensor,
    basis: Tensor,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    topk: int,
    coefficients: int,
    scale: float | None = None,
) -> Tensor:
    """The bias under which dense attention equals `predicted_attention`: a check.

    Shapes:  as `predicted_attention`  ->  additive [B, H, N, N]
    """
    learned = query_weight, key_weight, project, basis
    index = predict_route(query, key, queries, keys, *learned, topk=topk, coefficients=coefficients)
    return _dense_bias(query, index, queries, keys, rows, joined_bias(bias, key_bias, query.dtype), False)


# -- chunks of sorted tokens -------------------------------------------------------------------------------------------


_SORTED = (
    f"({_INPUTS}{_TABLES}Tensor centres, Tensor? mask=None, Tensor? key_bias=None, *, int start, int stop, int chunk, "
    "float? scale=None) -> Tensor"
)


@op("(Tensor key, Tensor centres, int start, int stop) -> Tensor")
def sorted_places(key: Tensor, centres: Tensor, start: int, stop: int) -> Tensor:
    """Where each token goes if those in [start, stop) are sorted by the centre nearest to their key; ties keep order.

    Shapes:  key [B, H, N, D] · centres [m, H D], of unit length  ->  int64 [B, N]
    Source:  Liu et al., CATANet, arXiv:2503.06896.
    """
    tokens = key[:, :, start:stop].transpose(1, 2).flatten(2)
    nearest = (tokens @ centres.T).argmax(-1, keepdim=True)  # by cosine: the length of a key changes no order
    member = (nearest == torch.arange(centres.shape[0], device=key.device)).float()  # [B, n, m]
    among, sizes = member.cumsum(1), member.sum(1, keepdim=True)
    before = sizes.cumsum(2) - sizes
    places = (member * (among + before)).sum(-1).long() - 1 + start
    every = torch.arange(key.shape[2], device=key.device).expand(key.shape[0], -1)
    return torch.cat([every[:, :start], places, every[:, stop:]], 1)


@op(_SORTED)
def sorted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    order: Tensor,
    rows: Tensor,
    centres: Tensor,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    start: int,
    stop: int,
    chunk: int,
    scale: float | None = None,
) -> Tensor:
    """`tiled_attention` of tokens that are sorted by their nearest centre: each chunk sees itself and the next.

    Shapes:  as `tiled_attention`, whose tables are for the sorted tokens · centres [m, H D], of unit length
    Args:    start, stop: the tokens that are sorted; the others stay, see all and are seen by all.
             chunk: tokens per chunk; it says what the tables say.
    Equals:  attention(query, key, value) where all are one chunk.
    """
    places = torch.ops.tokenopt.sorted_places(key, centres, start, stop)
    every = torch.arange(key.shape[2], device=key.device).expand_as(places)
    token = torch.zeros_like(places).scatter(1, places, every)
    q, k, v = (_moved(x, token) for x in (query, key, value))
    key_bias = None if key_bias is None else key_bias.gather(1, token)
    out = tiled_attention(q, k, v, queries, keys, order, rows, mask, None, None, key_bias, scale=scale)
    return _moved(out, places)


def _moved(x: Tensor, index: Tensor) -> Tensor:
    """Reads tokens of all heads by a per-sample index: [B, H, N, D], int64 [B, N] -> [B, H, N, D]."""
    moved = torch.ops.tokenopt.take_tokens(x.transpose(1, 2).flatten(2), index)
    return moved.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


@op(_SORTED)
def sorted_attention_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    order: Tensor,
    rows: Tensor,
    centres: Tensor,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    start: int,
    stop: int,
    chunk: int,
    scale: float | None = None,
) -> Tensor:
    """The bias under which dense attention equals `sorted_attention`: a check.

    Shapes:  as `sorted_attention`  ->  additive [B, 1, N, N]
    """
    number = (sorted_places(key, centres, start, stop) - start) // chunk
    ahead = number.unsqueeze(1) - number.unsqueeze(2)
    position = torch.arange(key.shape[2], device=key.device)
    other = (position < start) | (position >= stop)
    seen = (ahead == 0) | (ahead == 1) | other | other.unsqueeze(-1)
    bias = query.new_zeros(()) if key_bias is None else joined_bias(None, key_bias, query.dtype)
    return torch.where(seen.unsqueeze(1), bias, float("-inf"))


# -- tables of blocks --------------------------------------------------------------------------------------------------


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
