"""Building blocks of the Triton kernels. Valid for Triton 3.6 to 3.8."""

from __future__ import annotations

import triton
import triton.language as tl


def block(size: int, most: int) -> int:
    """The power of two that covers a size, at least 16 (what ``tl.dot`` needs) and at most ``most``."""
    return max(16, min(most, triton.next_power_of_2(size)))


@triton.jit
def products(
    a, b, rows, columns, row_count, column_count, a_n, a_d, b_n, b_d, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows of a times rows of b: products [rows, columns] and the squared lengths of both, all in float32.

    Products of half-precision numbers are exact in float32, so nothing is lost by leaving them to the tensor cores.
    """
    dot = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    a_square = tl.zeros([rows.shape[0]], tl.float32)
    b_square = tl.zeros([columns.shape[0]], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = tl.load(
            a + rows.to(tl.int64)[:, None] * a_n + d[None, :] * a_d,
            mask=(rows < row_count)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        y = tl.load(
            b + columns.to(tl.int64)[:, None] * b_n + d[None, :] * b_d,
            mask=(columns < column_count)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        dot = tl.dot(x, tl.trans(y), dot, input_precision="ieee")
        a_square += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        b_square += tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
    return dot, a_square, b_square
