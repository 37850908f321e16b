"""Neighborhood attention on a grid of 1 to 3 axes, with tokens beside the grid that every query sees.

Semantics are those of NATTEN to the letter: Hassani et al., Neighborhood Attention Transformer, CVPR 2023,
arXiv:2204.07143, and Generalized Neighborhood Attention, arXiv:2504.16922, for strides. A window at a border moves
inward and keeps its size; a causal one is cut off instead.

A program computes a box of queries of one dilation group and reads the halo of keys around it in place. What a query
sees along an axis is an interval, so a mask is two comparisons per axis, and a block of keys that all queries of the
box see needs none.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from tokenopt.errors import UsageError
from tokenopt.kernels import online, tuning
from tokenopt.kernels.online import accumulate, finish, initial, load_rows, scores, supported  # noqa: F401  (a part of the module: see ops/native.py)

Axes = tuple[int, int, int]


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None = None,
    *,
    start: int,
    grid: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    scale: float,
    config: tuning.Config | None = None,
) -> Tensor:
    """Attention of the queries of a grid over their windows and over all tokens beside the grid, in one softmax.

    Args:
        query, key: [B, H, N, D], any strides; D up to 256.
        value: [B, H, N, E], any strides.
        key_bias: [B, N], added to the scaled logits of a key.
        start: the grid is the tokens from start on, prod(grid) of them in raster order.
        grid: length of each of 1 to 3 axes.
        window: keys per axis that a query sees; window * dilation <= grid.
        stride: neighbouring queries per axis that share a window, 1 <= stride <= window.
        dilation: distance of the keys of a window along an axis.
        causal: per axis, whether a query sees no key after itself.
        scale: positive.
        config: how to run it; by default what the table says for the device.

    Returns:
        [B, H, prod(grid), E] in the memory of [B, prod(grid), H, E].

    Raises:
        UsageError: shapes, dtypes or windows that NATTEN does not define or the kernel does not take.
    """
    online.check_operands(query, key, value, key_bias, scale)
    check_windows(query.shape[2], key.shape[2], start, grid, window, stride, dilation, causal)
    batch, heads, tokens, dim = query.shape
    cells = math.prod(grid)
    config = config or tuning.lookup("neighborhood", query, tokens=cells, window=max(window))
    out = online.empty_output(query, cells, value)
    constants = launch_constants(
        grid, window, stride, dilation, causal, extra=tokens > cells, dim=dim, out_dim=value.shape[3], config=config
    )
    with online.on_device_of(query):
        neighborhood_kernel[(constants["TILES"] * heads * batch,)](
            query,
            key,
            value,
            key_bias,
            heads,
            start,
            tokens - cells,
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *(key_bias.stride() if key_bias is not None else (0, 0)),
            *out.stride(),
            out,
            SCALE=online.exponent_scale(scale),
            **constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def check_windows(
    queries: int,
    keys: int,
    start: int,
    grid: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
) -> None:
    """Raises a UsageError unless the windows are what NATTEN defines."""
    where = f"grid {grid}, window {window}, stride {stride}, dilation {dilation}, causal {causal}"
    why = None
    if not 1 <= len(grid) <= 3 or not len(grid) == len(window) == len(stride) == len(dilation) == len(causal):
        why = "grid, window, stride, dilation and causal need the same 1 to 3 axes"
    elif queries != keys or start < 0 or start + math.prod(grid) > keys:
        why = f"{queries} queries and {keys} keys do not hold {math.prod(grid)} tokens of a grid from {start} on"
    elif any(w < 1 or not 1 <= s <= w for w, s in zip(window, stride, strict=True)):
        why = "a stride must be at least 1 and at most the window"
    elif any(d < 1 or w * d > length for length, w, d in zip(grid, window, dilation, strict=True)):
        why = "a window times its dilation is more than the grid"
    if why:
        raise UsageError("these windows have no meaning", where=where, why=why)


def launch_constants(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    *,
    extra: bool,
    dim: int,
    out_dim: int,
    config: tuning.Config,
) -> dict[str, object]:
    """The compile-time arguments of neighborhood_kernel, less SCALE. It is launched TILES * heads * batch times."""
    front = (1,) * (3 - len(grid))
    axes = (front + grid, front + window, front + stride, front + dilation, (False,) * len(front) + causal)
    query_box, key_box = boxes(*axes, config.queries, config.keys)
    counts = tuple(d * _tiles(length, d, box) for length, d, box in zip(axes[0], axes[3], query_box, strict=True))
    return {
        "GRID": axes[0],
        "WINDOW": axes[1],
        "STRIDE": axes[2],
        "DILATION": axes[3],
        "CAUSAL": axes[4],
        "EXTRA": extra,
        "COUNTS": counts,
        "TILES": math.prod(counts),
        "QUERY_BOX": query_box,
        "KEY_BOX": key_box,
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "D": dim,
        "D_CHUNKS": online.chunks(dim),
        "E": out_dim,
        "E_CHUNKS": online.chunks(out_dim),
    }


@functools.lru_cache(maxsize=1024)
def boxes(
    grid: Axes,
    window: Axes,
    stride: Axes,
    dilation: Axes,
    causal: tuple[bool, bool, bool],
    queries: int,
    keys: int,
) -> tuple[Axes, Axes]:
    """The shapes of a tile of queries and of a block of keys that need the fewest blocks, counted to the end.

    queries, keys: their volumes, powers of two. Of equals those that are longest along the last axis are taken.
    """

    axes = (grid, window, stride, dilation, causal)
    pairs = itertools.product(_factorings(queries), _factorings(keys))
    return min(pairs, key=lambda pair: visited_blocks(*axes, *pair))


def visited_blocks(
    grid: Axes,
    window: Axes,
    stride: Axes,
    dilation: Axes,
    causal: tuple[bool, bool, bool],
    query_box: Axes,
    key_box: Axes,
) -> int:
    """Blocks of keys that all tiles of queries of a head visit, borders included."""
    return math.prod(map(_visits, grid, window, stride, dilation, causal, query_box, key_box))


@functools.lru_cache(maxsize=4096)
def _visits(length: int, window: int, stride: int, dilation: int, causal: bool, box: int, block: int) -> int:
    """visited_blocks of one axis."""
    total = 0
    for group in range(dilation):
        members = (length - group - 1) // dilation + 1
        for first in range(0, members, box):
            begin, _ = _interval(first, members, window, stride, causal)
            _, end = _interval(min(first + box, members) - 1, members, window, stride, causal)
            total += triton.cdiv(end - begin, block)
    return total


def _factorings(volume: int) -> Iterator[Axes]:
    """Triples of powers of two with that product, the longest last axis first."""
    bits = volume.bit_length() - 1
    for last in range(bits, -1, -1):
        for middle in range(bits - last, -1, -1):
            yield 1 << (bits - last - middle), 1 << middle, 1 << last


def _tiles(length: int, dilation: int, box: int) -> int:
    """Tiles along an axis of the longest dilation group."""
    return triton.cdiv(triton.cdiv(length, dilation), box)


def _interval(j: int, length: int, window: int, stride: int, causal: bool) -> tuple[int, int]:
    """What `interval` computes in the kernel."""
    leader = min(j // stride * stride + (stride - 1 if causal else stride // 2), length - 1)
    if causal:
        return max(leader - window + 1, 0), j + 1
    first = min(max(leader - window // 2, 0), length - window)
    return first, first + window


@triton.jit
def interval(j, length, WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The first key that coordinate j of a dilation group sees, and the first after it that it does not see."""
    if CAUSAL:
        leader = tl.minimum(j // STRIDE * STRIDE + (STRIDE - 1), length - 1)
        begin = tl.maximum(leader - (WINDOW - 1), 0)
        end = j + 1
    else:
        leader = tl.minimum(j // STRIDE * STRIDE + STRIDE // 2, length - 1)
        begin = tl.minimum(tl.maximum(leader - WINDOW // 2, 0), length - WINDOW)
        end = begin + WINDOW
    return begin, end


@triton.jit
def place(position, GRID: tl.constexpr, DILATION: tl.constexpr, COUNT: tl.constexpr, BOX: tl.constexpr):
    """Along an axis: dilation group, its length, and the first coordinate of the tile at a position of COUNT."""
    group = position // (COUNT // DILATION)
    length = GRID // DILATION + (group < GRID % DILATION).to(tl.int32)
    return group, length, position % (COUNT // DILATION) * BOX


@triton.jit
def halo(first, length, BOX: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """Along an axis: the interval that some query of a tile sees, and the one that every query sees."""
    begin, common_end = interval(tl.minimum(first, length - 1), length, WINDOW, STRIDE, CAUSAL)
    common_begin, end = interval(tl.minimum(first + BOX, length) - 1, length, WINDOW, STRIDE, CAUSAL)
    return begin, end, common_begin, common_end


@triton.jit
def token(x0, x1, x2, g0, g1, g2, GRID: tl.constexpr, DILATION: tl.constexpr):
    """The raster index in the grid of coordinates within dilation groups."""
    row = (x0 * DILATION[0] + g0) * GRID[1] + x1 * DILATION[1] + g1
    return row * GRID[2] + x2 * DILATION[2] + g2


@triton.jit
def neighborhood_kernel(
    query,
    key,
    value,
    bias,
    heads,
    start_token,
    extras,
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
    GRID: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXTRA: tl.constexpr,
    COUNTS: tl.constexpr,
    TILES: tl.constexpr,
    QUERY_BOX: tl.constexpr,
    KEY_BOX: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    D_CHUNKS: tl.constexpr,
    E: tl.constexpr,
    E_CHUNKS: tl.constexpr,
):
    """A program computes one box of queries of one head; the boxes of a head follow each other.

    Outputs come last and all else is an int32, as an ahead-of-time plugin of TensorRT passes them.
    """
    D1: tl.constexpr = D_CHUNKS[0]
    D2: tl.constexpr = D_CHUNKS[1]
    E1: tl.constexpr = E_CHUNKS[0]
    E2: tl.constexpr = E_CHUNKS[1]
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES % heads).to(tl.int64)
    sample = (program // (TILES * heads)).to(tl.int64)
    query += sample * query_b + head * query_h
    key += sample * key_b + head * key_h
    value += sample * value_b + head * value_h
    out += sample * out_b + head * out_h
    if bias is not None:
        bias += sample * bias_b

    # where the box is, and what its queries see
    g0, length0, first0 = place(tile // (COUNTS[1] * COUNTS[2]), GRID[0], DILATION[0], COUNTS[0], QUERY_BOX[0])
    g1, length1, first1 = place(tile // COUNTS[2] % COUNTS[1], GRID[1], DILATION[1], COUNTS[1], QUERY_BOX[1])
    g2, length2, first2 = place(tile % COUNTS[2], GRID[2], DILATION[2], COUNTS[2], QUERY_BOX[2])
    begin0, end0, all_begin0, all_end0 = halo(first0, length0, QUERY_BOX[0], WINDOW[0], STRIDE[0], CAUSAL[0])
    begin1, end1, all_begin1, all_end1 = halo(first1, length1, QUERY_BOX[1], WINDOW[1], STRIDE[1], CAUSAL[1])
    begin2, end2, all_begin2, all_end2 = halo(first2, length2, QUERY_BOX[2], WINDOW[2], STRIDE[2], CAUSAL[2])

    i = tl.arange(0, QUERIES)
    j0 = first0 + i // (QUERY_BOX[1] * QUERY_BOX[2])
    j1 = first1 + i // QUERY_BOX[2] % QUERY_BOX[1]
    j2 = first2 + i % QUERY_BOX[2]
    there = (j0 < length0) & (j1 < length1) & (j2 < length2)
    low0, high0 = interval(j0, length0, WINDOW[0], STRIDE[0], CAUSAL[0])
    low1, high1 = interval(j1, length1, WINDOW[1], STRIDE[1], CAUSAL[1])
    low2, high2 = interval(j2, length2, WINDOW[2], STRIDE[2], CAUSAL[2])
    cell = token(j0, j1, j2, g0, g1, g2, GRID, DILATION)
    q1 = load_rows(query, start_token + cell, query_n, query_d, there, 0, D1, D)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(query, start_token + cell, query_n, query_d, there, D1, D2, D)
    peak, total, acc1, acc2 = initial(QUERIES, E1, E2)

    # the halo, in blocks from its first corner on
    n = tl.arange(0, KEYS)
    n0 = n // (KEY_BOX[1] * KEY_BOX[2])
    n1 = n // KEY_BOX[2] % KEY_BOX[1]
    n2 = n % KEY_BOX[2]
    blocks1 = tl.cdiv(end1 - begin1, KEY_BOX[1])
    blocks2 = tl.cdiv(end2 - begin2, KEY_BOX[2])
    for block in range(0, tl.cdiv(end0 - begin0, KEY_BOX[0]) * blocks1 * blocks2):
        at0 = begin0 + block // (blocks1 * blocks2) * KEY_BOX[0]
        at1 = begin1 + block // blocks2 % blocks1 * KEY_BOX[1]
        at2 = begin2 + block % blocks2 * KEY_BOX[2]
        x0 = at0 + n0
        x1 = at1 + n1
        x2 = at2 + n2
        valid = (x0 < end0) & (x1 < end1) & (x2 < end2)
        row = start_token + token(x0, x1, x2, g0, g1, g2, GRID, DILATION)
        s = scores(q1, q2, key, row, key_n, key_d, valid, D, D1, D2)
        full = (at0 >= all_begin0) & (at0 + KEY_BOX[0] <= all_end0)
        full = full & (at1 >= all_begin1) & (at1 + KEY_BOX[1] <= all_end1)
        full = full & (at2 >= all_begin2) & (at2 + KEY_BOX[2] <= all_end2)
        if not full:
            # an axis of one cell hides nothing, except from the part of a block that sticks out
            seen = (x2[None, :] >= low2[:, None]) & (x2[None, :] < high2[:, None])
            if GRID[1] > 1 or KEY_BOX[1] > 1:
                seen = seen & (x1[None, :] >= low1[:, None]) & (x1[None, :] < high1[:, None])
            if GRID[0] > 1 or KEY_BOX[0] > 1:
                seen = seen & (x0[None, :] >= low0[:, None]) & (x0[None, :] < high0[:, None])
            s = tl.where(seen, s, -float("inf"))
        peak, total, acc1, acc2 = accumulate(
            s, peak, total, acc1, acc2, value, bias, row, value_n, value_d, bias_n, valid, SCALE, E, E1, E2
        )

    # the tokens in front of the grid and behind it
    if EXTRA:
        for first in range(0, extras, KEYS):
            x = first + n
            valid = x < extras
            row = tl.where(x < start_token, x, x + GRID[0] * GRID[1] * GRID[2])
            s = scores(q1, q2, key, row, key_n, key_d, valid, D, D1, D2)
            if first + KEYS > extras:
                s = tl.where(valid[None, :], s, -float("inf"))
            peak, total, acc1, acc2 = accumulate(
                s, peak, total, acc1, acc2, value, bias, row, value_n, value_d, bias_n, valid, SCALE, E, E1, E2
            )
    finish(out, cell, out_n, out_d, there, total, acc1, acc2, E, E1, E2)
