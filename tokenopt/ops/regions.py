"""Attention within regions that are given at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenopt.ops import op
from tokenopt.ops.attention import attention


@op("(Tensor query, Tensor key, Tensor value, Tensor regions, *, int start, float? scale=None) -> Tensor")
def region_attention(
    query: Tensor, key: Tensor, value: Tensor, regions: Tensor, *, start: int, scale: float | None = None
) -> Tensor:
    """Softmax attention in which tokens of two different regions do not see each other.

    Shapes:  query, key [B, H, N, D] · value [B, H, N, E] · regions int64 [B, n]  ->  [B, H, N, E]
    Args:    regions: of the tokens [start, start + n); 0 is none. Tokens of none see and are seen by all.
             scale defaults to D ** -0.5.
    Equals:  attention(query, key, value) where all regions are 0.
    Source:  He et al., Isolation and Reposition Attention, arXiv:2411.19261 (isolation).
    """
    behind = query.shape[2] - start - regions.shape[1]
    ids = torch.nn.functional.pad(regions, (start, behind))
    rows, columns = ids[:, None, :, None], ids[:, None, None, :]
    seen = (rows == columns) | (rows == 0) | (columns == 0)
    return attention(query, key, value, seen, scale=scale)
