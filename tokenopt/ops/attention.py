"""Attention in one canonical form, and the few rows of its probabilities that a score needs."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenopt.ops import op
from tokenopt.ops.native import native


@op(
    "(Tensor query, Tensor key, Tensor value, Tensor? bias=None, Tensor? key_bias=None, *, float? scale=None, "
    "bool is_causal=False) -> Tensor"
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Softmax attention, ``softmax(q k^T scale + bias + key_bias) v``.

    Shapes:  query [..., N, D] · key [..., M, D] · value [..., M, E] · bias broadcast to [..., N, M], additive or
             boolean (True is visible) · key_bias [B, M], for 4-D query only  ->  [..., N, E]
    Args:    scale defaults to D ** -0.5.
    Equals:  scaled_dot_product_attention(query, key, value, bias) where key_bias is None.
    """
    if key_bias is not None and bias is None and query.dim() == 4:  # a bias keeps torch off its fast kernels
        compute = native("attention", query, key, value, key_bias)
        if compute is not None:
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            return compute(query, key, value, key_bias, scale=scale, is_causal=is_causal)
    bias = joined_bias(bias, key_bias, query.dtype)
    rank = query.dim()
    if rank == 4:
        return _sdpa(query, key, value, bias, scale, is_causal)
    if rank == 3:
        if bias is not None and bias.dim() == 3:
            bias = bias.unsqueeze(1)
        out = _sdpa(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), bias, scale, is_causal)
        return out.squeeze(1)
    lead = query.shape[1:-2]
    if bias is not None and bias.dim() > 2:
        bias = bias.expand(*query.shape[:-2], *bias.shape[-2:]).flatten(1, -3)
    q, k, v = (t.flatten(1, -3) for t in (query, key, value))
    return _sdpa(q, k, v, bias, scale, is_causal).unflatten(1, lead)


def joined_bias(bias: Tensor | None, key_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bias on all logits with one on the keys [B, M] in it."""
    if key_bias is None:
        return bias
    columns = key_bias[:, None, None, :]
    if bias is None:
        return columns.to(dtype)
    if bias.dtype is torch.bool:
        return torch.where(bias, columns.to(dtype), float("-inf"))
    return bias + columns.to(bias.dtype)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None, is_causal: bool
) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=scale, is_causal=is_causal
    )


@op(
    "(Tensor query, Tensor key, Tensor? bias, Tensor? key_bias, int row, int count, *, float? scale=None, "
    "bool is_causal=False) -> Tensor"
)
def attention_probe(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    row: int,
    count: int,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attention probabilities of a few query rows, averaged over heads and rows; the full matrix is never made.

    Shapes:  query [B, H, N, D] · key [B, H, M, D] · bias broadcast to [B, H, N, M] · key_bias [B, M]
             ->  float32 [B, M], rows sum to 1
    Args:    row, count: the query rows [row, row + count).
             is_causal: query i sees the keys up to i; a bias adds to that.
    """
    if bias is None and (kernel := native("attention_probe", query, key, key_bias)):
        return kernel(query, key, None, key_bias, row, count, scale=scale, is_causal=is_causal)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query[:, :, row : row + count].float() * scale) @ key.float().transpose(-2, -1)
    if bias is not None:
        part = bias[..., row : row + count, :] if bias.dim() > 1 and bias.shape[-2] != 1 else bias
        logits = logits.masked_fill(~part, float("-inf")) if part.dtype is torch.bool else logits + part.float()
    if key_bias is not None:
        logits = logits + key_bias[:, None, None, :].float()
    if is_causal:
        at = torch.arange(row, row + count, device=query.device)[:, None]
        logits = logits.masked_fill(torch.arange(key.shape[2], device=query.device) > at, float("-inf"))
    return logits.softmax(-1).mean((1, 2))
