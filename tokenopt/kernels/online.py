"""What the attention kernels share: loading rows of heads, and softmax over blocks of keys as they come.

A head of 80 or 96 elements is read in two chunks, 64 + 16 and 64 + 32, since a tile must be a power of two wide and
padding 80 to 128 would be 1.6 times the work. The softmax is that of Milakov and Gimelshein, Online normalizer
calculation for softmax, arXiv:1805.02867, as FlashAttention uses it (Dao et al., arXiv:2205.14135).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenopt.errors import UsageError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def chunks(dim: int) -> tuple[int, int]:
    """The widths of the two chunks that a head of dim elements is read in; the second is 0 where one suffices."""
    whole = max(16, triton.next_power_of_2(dim))
    first = whole // 2
    rest = max(16, triton.next_power_of_2(dim - first))
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


def exponent_scale(scale: float) -> float:
    """The factor that turns q . k into an exponent of 2; exp2 is one instruction, exp is two."""
    return scale * math.log2(math.e)


def check_operands(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, scale: float) -> None:
    """Raises a UsageError unless query [B, H, N, D], key [B, H, M, D], value [B, H, M, E] and key_bias [B, M] fit."""
    where = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"

    def refuse(why: str, hint: str | None = None) -> None:
        raise UsageError("this attention has no kernel", where=where, why=why, hint=hint)

    if not query.dim() == key.dim() == value.dim() == 4:
        refuse("operands must be [batch, heads, tokens, head dim]")
    if query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]:
        refuse("batch, heads, keys or head dim differ")
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES:
        refuse(
            f"operands are {query.dtype}, {key.dtype}, {value.dtype}", "one of float16, bfloat16 and float32 for all"
        )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, key_bias)):
        refuse("the kernels have no backward pass", "torch.no_grad()")
    if key_bias is not None and key_bias.shape != (key.shape[0], key.shape[2]):
        refuse(f"the key bias is {list(key_bias.shape)}, not [batch, keys]")
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        refuse(f"a head has more than {MAX_HEAD_DIM} elements")
    if query.is_cuda and torch.version.cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        refuse("Triton uses no tensor cores on this device", "a device of compute capability 8.0 or newer")
    if not query.is_cuda and not triton.knobs.runtime.interpret:
        refuse(f"operands are on the {query.device.type}", "a CUDA device")
    if not query.is_cuda and query.dtype == torch.bfloat16:
        refuse("Triton's interpreter multiplies the bits of bfloat16 as integers", "a CUDA device, or float32")
    if not scale > 0:
        refuse(f"scale is {scale}; the running maximum is taken before scaling", "a positive scale")
    for operand in (query, key, value):
        # offsets within a head are 32 bits wide: those of 64 take two registers each
        if (operand.shape[2] - 1) * operand.stride(2) + (operand.shape[3] - 1) * operand.stride(3) >= 2**31:
            refuse("a head spans 2^31 elements or more of memory")


def supported(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None = None) -> bool:
    """Whether a kernel takes these operands."""
    try:
        check_operands(query, key, value, key_bias, 1.0)
    except UsageError:
        return False
    return True


def empty_output(query: Tensor, tokens: int, value: Tensor) -> Tensor:
    """[B, H, tokens, E] in the memory of [B, tokens, H, E], so that putting the heads together again is a view."""
    return query.new_empty(query.shape[0], tokens, query.shape[1], value.shape[3]).transpose(1, 2)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Launches of the block go to the device that x is on."""
    return torch.cuda.device_of(x)


@triton.jit
def load_rows(
    base, rows, row_stride, column_stride, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """Columns FIRST to FIRST + WIDTH of the rows: [rows, WIDTH], 0 where a row is not valid and from column DIM on."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = valid[:, None]
    if FIRST + WIDTH > DIM:
        mask = mask & (columns < DIM)[None, :]
    return tl.load(base + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=mask, other=0.0)


@triton.jit
def store_rows(
    base, rows, row_stride, column_stride, valid, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """The inverse of load_rows."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = valid[:, None]
    if FIRST + WIDTH > DIM:
        mask = mask & (columns < DIM)[None, :]
    at = base + rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(at, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def initial(ROWS: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr):
    """Running maximum, sum and both chunks of the output before any key.

    The maximum is finite, so that a row which has seen no key yet has no inf - inf; E2 = 0 leaves the second unused.
    """
    peak = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    return peak, total, tl.zeros([ROWS, E1], tl.float32), tl.zeros([ROWS, E2 if E2 > 0 else 16], tl.float32)


@triton.jit
def scores(q1, q2, key, rows, row_stride, column_stride, valid, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """q . k of a block of keys: [queries, keys] in float32, not scaled."""
    k1 = load_rows(key, rows, row_stride, column_stride, valid, 0, D1, D)
    s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    if D2 > 0:
        k2 = load_rows(key, rows, row_stride, column_stride, valid, D1, D2, D)
        s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")
    return s


@triton.jit
def accumulate(
    s,
    peak,
    total,
    acc1,
    acc2,
    value,
    bias,
    rows,
    row_stride,
    column_stride,
    bias_stride,
    valid,
    SCALE: tl.constexpr,
    E: tl.constexpr,
    E1: tl.constexpr,
    E2: tl.constexpr,
):
    """Takes a block of keys into the running softmax. s [queries, keys] is q . k, and -inf where a key is not seen."""
    if bias is not None:
        b = tl.load(bias + rows * bias_stride, mask=valid, other=0.0).to(tl.float32)
        s = s * SCALE + (b * 1.4426950408889634)[None, :]
        new_peak = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - new_peak[:, None])
    else:
        new_peak = tl.maximum(peak, tl.max(s, 1) * SCALE)
        p = tl.exp2(s * SCALE - new_peak[:, None])
    alpha = tl.exp2(peak - new_peak)
    total = total * alpha + tl.sum(p, 1)
    v1 = load_rows(value, rows, row_stride, column_stride, valid, 0, E1, E)
    acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * alpha[:, None], input_precision="ieee")
    if E2 > 0:
        v2 = load_rows(value, rows, row_stride, column_stride, valid, E1, E2, E)
        acc2 = tl.dot(p.to(v2.dtype), v2, acc2 * alpha[:, None], input_precision="ieee")
    return new_peak, total, acc1, acc2


@triton.jit
def finish(
    out,
    rows,
    row_stride,
    column_stride,
    valid,
    total,
    acc1,
    acc2,
    E: tl.constexpr,
    E1: tl.constexpr,
    E2: tl.constexpr,
):
    """Divides by the sum and stores. A row that saw no key is 0."""
    weight = 1.0 / tl.where(total == 0.0, 1.0, total)
    store_rows(out, rows, row_stride, column_stride, valid, acc1 * weight[:, None], 0, E1, E)
    if E2 > 0:
        store_rows(out, rows, row_stride, column_stride, valid, acc2 * weight[:, None], E1, E2, E)
