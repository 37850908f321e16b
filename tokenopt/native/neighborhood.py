"""Neighbourhood attention on the CPU, by the compiled kernel of ``neighborhood.cpp``."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokenopt.errors import UsageError
from tokenopt.native import build

SOURCE = Path(__file__).with_name("neighborhood.cpp")

_Axes = ctypes.c_int64 * 3


class _Problem(ctypes.Structure):
    """``Problem`` of the C++ file, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "dim", "value_dim")),
        *((name, _Axes) for name in ("query_strides", "key_strides", "value_strides")),
        *((name, ctypes.c_int64) for name in ("bias_stride", "start")),
        *((name, _Axes) for name in ("length", "window", "stride", "dilation", "causal")),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_double),
    ]


def reason() -> str | None:
    """Why there is no compiled kernel; None where there is one. The first call compiles it."""
    return build.reason(SOURCE)


def supported(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None = None) -> bool:
    """Whether `neighborhood_attention` takes these tensors and its kernel can be had; the first call compiles it.

    It does not where a gradient is wanted: the kernel has none.
    """
    tensors = [t for t in (query, key, value, key_bias) if t is not None]
    return (
        all(t.device.type == "cpu" and t.dtype is torch.float32 and t.layout is torch.strided for t in tensors)
        and all(t.dim() == 4 for t in tensors[:3])
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and build.load(SOURCE) is not None
    )


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None = None,
    *,
    start: int,
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
) -> Tensor:
    """Softmax attention of the tokens of a grid, each to its window on the grid and to all tokens outside of it.

    Shapes:  query, key [B, H, N, D] · value [B, H, N, E], float32, with any strides; a last one of 1 saves a copy
             · key_bias [B, N], added to the logits  ->  [B, H, G, E], G = prod(grid)
    Args:    start: the grid is the tokens [start, start + G), in raster order, on 1 to 3 axes;
             window, stride, dilation, causal: one per axis, with 1 <= stride <= window and window * dilation <= length.
    Source:  Hassani et al., Neighborhood Attention Transformer, arXiv:2204.07143, and Generalized Neighborhood
             Attention, arXiv:2504.16922; the windows are NATTEN's, and shift inward at the borders.

    Raises:
        UsageError: if the arguments do not fit each other, or there is no kernel (`reason` says why).
    """
    return torch.ops.tokenopt_native.neighborhood_attention(
        query,
        key,
        value,
        key_bias,
        start=start,
        grid=list(grid),
        window=list(window),
        stride=list(stride),
        dilation=list(dilation),
        causal=list(causal),
        scale=scale,
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    start: int,
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
) -> None:
    def require(condition: bool, why: str) -> None:
        if not condition:
            raise UsageError("neighbourhood attention cannot be computed", why=why)

    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        require(tensor.dim() == 4, f"{name} has {tensor.dim()} dimensions, not 4")
        require(tensor.shape[:3] == query.shape[:3], f"{name} is {[*tensor.shape]}, and query {[*query.shape]}")
    require(key.shape[3] == query.shape[3], f"key is {[*key.shape]}, and query {[*query.shape]}")
    batch, _, tokens, _ = query.shape
    if key_bias is not None:
        require(key_bias.shape == (batch, tokens), f"key_bias is {[*key_bias.shape]}, not {[batch, tokens]}")
        tensors["key_bias"] = key_bias
    for name, tensor in tensors.items():
        require(tensor.dtype is torch.float32, f"{name} is {tensor.dtype}, not torch.float32")
        require(tensor.device == query.device, f"{name} is on {tensor.device}, and query on {query.device}")
    require(1 <= len(grid) <= 3, f"the grid has {len(grid)} axes, not 1 to 3")
    for name, values in {"window": window, "stride": stride, "dilation": dilation, "causal": causal}.items():
        require(len(values) == len(grid), f"{name} has {len(values)} values for {len(grid)} axes")
    for n, k, s, d in zip(grid, window, stride, dilation, strict=True):
        require(1 <= s <= k, f"a stride of {s} is not in [1, window = {k}]")
        require(d >= 1 and k * d <= n, f"a window of {k} with dilation {d} is longer than its axis, {n}")
    require(
        0 <= start and start + math.prod(grid) <= tokens,
        f"the grid is the tokens {start} to {start + math.prod(grid)}, of {tokens}",
    )


_library = torch.library.Library("tokenopt_native", "DEF")
_library.define(
    "neighborhood_attention(Tensor query, Tensor key, Tensor value, Tensor? key_bias=None, *, int start, int[] grid, "
    "int[] window, int[] stride, int[] dilation, bool[] causal, float scale) -> Tensor"
)


def _cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None = None,
    *,
    start: int,
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
) -> Tensor:
    _check(query, key, value, key_bias, start, grid, window, stride, dilation, causal)
    library = build.load(SOURCE)
    if library is None:
        raise UsageError("the kernel for neighbourhood attention cannot be built", why=reason())
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    if key_bias is not None and key_bias.stride(1) != 1:
        key_bias = key_bias.contiguous()
    batch, heads, tokens, dim = query.shape
    out = query.new_empty(batch, heads, math.prod(grid), value.shape[3])
    if out.numel() == 0:
        return out

    def axes(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
        """On three axes: those that are missing have length 1, and runs of queries go along the last."""
        *outer, last = values
        return _Axes(*outer, *[1] * (2 - len(outer)), last)

    problem = _Problem(
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        bias=None if key_bias is None else key_bias.data_ptr(),
        out=out.data_ptr(),
        batch=batch,
        heads=heads,
        tokens=tokens,
        dim=dim,
        value_dim=value.shape[3],
        query_strides=query.stride()[:3],
        key_strides=key.stride()[:3],
        value_strides=value.stride()[:3],
        bias_stride=0 if key_bias is None else key_bias.stride(0),
        start=start,
        length=axes(grid),
        window=axes(window),
        stride=axes(stride),
        dilation=axes(dilation),
        causal=axes(causal),
        threads=torch.get_num_threads(),
        scale=scale,
    )
    if library.neighborhood_attention(ctypes.byref(problem)) != 0:
        raise MemoryError("neighbourhood attention: not enough memory for its buffers")
    return out


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None = None,
    *,
    start: int,
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
) -> Tensor:
    _check(query, key, value, key_bias, start, grid, window, stride, dilation, causal)
    return query.new_empty(query.shape[0], query.shape[1], math.prod(grid), value.shape[3])


def _no_gradient(ctx: object, *gradients: Tensor) -> None:
    raise UsageError(
        "neighbourhood attention has no gradient in its compiled kernel", hint="torch.no_grad(), or the portable form"
    )


_library.impl("neighborhood_attention", _cpu, "CPU")
torch.library.register_fake("tokenopt_native::neighborhood_attention", _fake, lib=_library)
torch.library.register_autograd("tokenopt_native::neighborhood_attention", _no_gradient, lib=_library)
