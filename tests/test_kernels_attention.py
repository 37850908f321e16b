"""The Triton kernels equal attention with a mask written out from NATTEN's definition, and compile for every device.

The cases run on a GPU where there is one. Otherwise Triton's interpreter runs them, in a process of its own: it takes
the place of Triton's compiler for whatever is imported after it was chosen.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from tokenopt.errors import UsageError  # noqa: E402
from tokenopt.kernels import aot, block_sparse, neighborhood, online, tuning  # noqa: E402
from tokenopt.kernels.block_sparse import (  # noqa: E402
    block_sparse_attention,
    block_sparse_kernel,
    tiled_attention,
)
from tokenopt.kernels.flash import attention, flash_kernel  # noqa: E402
from tokenopt.kernels.neighborhood import neighborhood_attention, neighborhood_kernel  # noqa: E402
from tokenopt.kernels.tuning import Config  # noqa: E402
from tokenopt.runtimes.plugins import NeighborhoodAttention, kernel_constants  # noqa: E402


def _version(package: Any) -> tuple[int, int]:
    return tuple(map(int, package.__version__.split(".")[:2]))


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device; see test_cases_in_the_interpreter"
)
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")

SMALL = Config(16, 16, 4, 2)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@compiled
@pytest.mark.skipif(
    _version(triton) < (3, 7) and _version(numpy) >= (2, 4), reason="this interpreter fails at range() with this numpy"
)
def test_cases_in_the_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "case", __file__],
        cwd=Path(__file__).parents[1],
        env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout).group(1)) > 90


# -- reference ---------------------------------------------------------------------------------------------------------


def sees(i: int, m: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """Whether the query at i sees the key at m along an axis: NATTEN's reference, csrc/.../reference/mask.hpp."""
    group, j = i % dilation, i // dilation
    if m % dilation != group:
        return False
    m = m // dilation
    length = length // dilation + (group < length % dilation)
    if causal:
        leader = min((j // stride) * stride + stride - 1, length - 1)
        return max(leader - (window - 1), 0) <= m <= j
    left, right = window // 2, window // 2 - 1 + window % 2
    leader = min((j // stride) * stride + stride // 2, length - 1)
    first = max(leader - left, 0)
    if leader + right >= length:
        first += length - right - leader - 1
    return first <= m < first + window


@functools.cache
def seen_on_grid(grid, window, stride, dilation, causal) -> Tensor:
    """bool [G, G]."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for length, *rest in zip(grid, window, stride, dilation, causal, strict=True):
        axis = torch.tensor([[sees(i, m, length, *rest) for m in range(length)] for i in range(length)])
        mask = (mask[:, None, :, None] & axis[None, :, None, :]).reshape(len(mask) * length, -1)
    return mask


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention in float64; 0 where nothing is seen."""
    logits = query.double() @ key.double().mT * scale
    if bias is not None:
        logits = logits + bias.double()[:, None, None]
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    return weights @ value.double()


def operands(
    batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, layout: str = "bnhd", names: int = 3
) -> tuple[Tensor, ...]:
    """[B, H, N, D] each, in a layout of memory with NaN all around: what is read beyond an operand shows."""
    padded = {
        "bnhd": ((batch, tokens + 4, heads, dim + 3), (0, 2, 1, 3)),
        "bhdn": ((batch, heads, dim + 3, tokens + 4), (0, 1, 3, 2)),
        "nbhd": ((tokens + 4, batch, heads, dim + 3), (1, 2, 0, 3)),
    }
    shape, order = padded[layout]
    result = []
    for _ in range(names):
        x = torch.full(shape, math.nan, device=DEVICE, dtype=dtype).permute(order)[:, :, 2 : tokens + 2, 1 : dim + 1]
        result.append(x.copy_(torch.randn(x.shape)))
    return tuple(result)


def close(result: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("length", "window", "stride", "dilation", "causal", "rows"),
    [
        (8, 3, 1, 1, False, {0: (0, 2), 1: (0, 2), 2: (1, 3), 6: (5, 7), 7: (5, 7)}),
        (8, 4, 1, 1, False, {0: (0, 3), 2: (0, 3), 3: (1, 4), 4: (2, 5), 5: (3, 6), 6: (4, 7), 7: (4, 7)}),
        (8, 4, 2, 1, False, {0: (0, 3), 1: (0, 3), 2: (1, 4), 3: (1, 4), 4: (3, 6), 6: (4, 7), 7: (4, 7)}),
        (8, 4, 4, 1, False, {0: (0, 3), 3: (0, 3), 4: (4, 7), 7: (4, 7)}),
        (8, 4, 1, 1, True, {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (0, 3), 4: (1, 4)}),
        (8, 4, 2, 1, True, {4: (2, 4), 5: (2, 5), 6: (4, 6), 7: (4, 7)}),
        (7, 3, 3, 1, False, {6: (4, 6)}),
        (9, 3, 1, 2, False, {0: (0, 4), 1: (1, 5), 2: (0, 4), 3: (1, 5), 4: (2, 6), 7: (3, 7), 8: (4, 8)}),
    ],
)
def test_reference_and_tiles_have_the_rows_of_natten(length, window, stride, dilation, causal, rows) -> None:
    for i, (first, last) in rows.items():
        wanted = list(range(first, last + 1, dilation))
        assert [m for m in range(length) if sees(i, m, length, window, stride, dilation, causal)] == wanted
        members = range(i % dilation, length, dilation)
        begin, end = neighborhood._interval(i // dilation, len(members), window, stride, causal)
        assert list(members[begin:end]) == wanted


# -- neighbourhoods ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A grid and its windows, tokens in front of it and behind it, and how the operands are."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    causal: tuple[bool, ...] = ()
    front: int = 0
    behind: int = 0
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    layout: str = "bnhd"
    bias: bool = False
    config: Config | None = SMALL

    def windows(self) -> dict[str, Any]:
        ones = (1,) * len(self.grid)
        return {
            "grid": self.grid,
            "window": self.window,
            "stride": self.stride or ones,
            "dilation": self.dilation or ones,
            "causal": self.causal or (False,) * len(self.grid),
        }

    def check(self, batch: int = 1, heads: int = 2) -> None:
        cells = math.prod(self.grid)
        tokens = self.front + cells + self.behind
        dim, out_dim = self.dims
        q, k = operands(batch, heads, tokens, dim, self.dtype, self.layout, 2)
        (v,) = operands(batch, heads, tokens, out_dim, self.dtype, self.layout, 1)
        bias = torch.randn(batch, tokens, device=DEVICE) * 2 if self.bias else None
        scale = dim**-0.5
        result = neighborhood_attention(
            q, k, v, bias, start=self.front, **self.windows(), scale=scale, config=self.config
        )
        seen = torch.ones(cells, tokens, dtype=torch.bool)
        seen[:, self.front : self.front + cells] = seen_on_grid(**self.windows())
        wanted = dense(q[:, :, self.front : self.front + cells], k, v, seen.to(DEVICE), bias, scale)
        assert result.transpose(1, 2).is_contiguous()
        close(result, wanted, self.dtype)


half = torch.float16
CASES = {
    "1d": Case((37,), (5,)),
    "1d even": Case((37,), (6,)),
    "1d stride": Case((37,), (7,), (3,)),
    "1d stride = window": Case((32,), (8,), (8,)),
    "1d dilation": Case((37,), (4,), dilation=(3,)),
    "1d causal": Case((37,), (5,), causal=(True,)),
    "1d causal stride": Case((37,), (6,), (4,), causal=(True,)),
    "1d full blocks": Case((64,), (40,)),
    "1d whole": Case((32,), (32,)),
    "1d one key": Case((19,), (1,)),
    "2d": Case((7, 9), (3, 3)),
    "2d even": Case((7, 9), (4, 6)),
    "2d uneven tiles": Case((5, 14), (5, 9), (1, 8)),
    "2d stride": Case((10, 7), (5, 4), (3, 4)),
    "2d stride = tile": Case((8, 12), (4, 8), (4, 4)),
    "2d dilation": Case((9, 10), (3, 3), dilation=(2, 3)),
    "2d dilation to the brim": Case((6, 9), (3, 3), dilation=(2, 3)),
    "2d causal": Case((9, 8), (3, 5), causal=(True, False)),
    "2d causal both": Case((7, 6), (4, 5), (2, 3), causal=(True, True)),
    "2d causal dilation": Case((9, 9), (4, 3), (2, 3), (2, 3), (False, True)),
    "2d full blocks": Case((9, 10), (7, 9)),
    "2d whole": Case((6, 7), (6, 7)),
    "2d one row": Case((1, 20), (1, 7)),
    "3d": Case((3, 4, 5), (3, 3, 3)),
    "3d everything": Case((6, 4, 7), (2, 3, 3), (1, 2, 3), (3, 1, 2), (True, False, False)),
    "3d causal": Case((5, 4, 4), (4, 2, 3), (2, 1, 3), causal=(True, True, True)),
    "token in front": Case((6, 6), (3, 3), front=1),
    "tokens behind": Case((6, 6), (3, 3), behind=19),
    "tokens around": Case((5, 7), (3, 5), front=5, behind=16, bias=True),
    "tokens around, dilation": Case((6, 8), (3, 3), dilation=(2, 2), front=17, behind=2, bias=True),
    "bias": Case((7, 5), (5, 3), bias=True),
    "head dim 32": Case((6, 5), (3, 3), dims=(32, 32), dtype=half),
    "head dim 64": Case((6, 5), (3, 3), dims=(64, 64), dtype=half, front=1),
    "head dim 80": Case((6, 5), (3, 3), dims=(80, 80), dtype=half, behind=3, bias=True),
    "head dim 96": Case((6, 5), (3, 3), dims=(96, 96), dtype=half, front=1),
    "head dim 128": Case((6, 5), (3, 3), dims=(128, 128), dtype=half),
    "head dim 72 in float32": Case((6, 5), (3, 3), dims=(72, 72)),
    "head dim 80 in float32": Case((6, 5), (3, 3), dims=(80, 80), front=1),
    "head dim 8": Case((6, 5), (3, 3), dims=(8, 24)),
    "values narrower": Case((6, 5), (3, 3), dims=(48, 16), front=1),
    "values wider": Case((6, 5), (3, 3), dims=(16, 80)),
    "channels first": Case((6, 5), (3, 3), layout="bhdn", front=1, bias=True),
    "tokens first": Case((6, 5), (3, 3), layout="nbhd", behind=1),
    "default tiles": Case((12, 9), (5, 5), front=1, behind=2, config=None),
    "default tiles in half": Case((12, 9), (5, 5), dtype=half, config=None, bias=True),
    "default tiles, dilation": Case((11, 9), (3, 3), dilation=(3, 2), config=None),
    "uneven tile and block": Case((9, 10), (3, 4), config=Config(32, 16, 4, 1), front=1),
    "large block": Case((9, 10), (5, 4), config=Config(16, 64, 4, 1), behind=1),
}


@on_device
@pytest.mark.parametrize("name", CASES)
def test_neighborhood_case(name: str) -> None:
    CASES[name].check()


@on_device
@pytest.mark.parametrize("seed", range(8))
def test_neighborhood_random_case(seed: int) -> None:
    draw = random.Random(seed)
    axes = draw.choice((1, 2, 2, 3))
    window = tuple(draw.randint(2, (14, 5, 3)[axes - 1]) for _ in range(axes))
    dilation = tuple(draw.randint(1, 3) for _ in range(axes))
    Case(
        grid=tuple(w * d + draw.randint(0, (20, 4, 2)[axes - 1]) for w, d in zip(window, dilation, strict=True)),
        window=window,
        stride=tuple(draw.randint(1, w) for w in window),
        dilation=dilation,
        causal=tuple(draw.random() < 0.3 for _ in range(axes)),
        front=draw.choice((0, 1, 5)),
        behind=draw.choice((0, 0, 18)),
        bias=draw.random() < 0.5,
        config=draw.choice((SMALL, Config(16, 32, 4, 1), Config(32, 16, 4, 1))),
    ).check(batch=1 + seed % 2, heads=1)


@on_device
@pytest.mark.parametrize("biased", [False, True])
def test_plugin_case(biased: bool) -> None:
    case = CASES["tokens around"]
    problem = NeighborhoodAttention(
        heads=2, tokens=56, dim=16, out_dim=32, start=5, **case.windows(), scale=0.25, biased=biased
    )
    q, k, v = (torch.randn(3, 56, 2, dim, device=DEVICE) for dim in (16, 16, 32))
    bias = torch.randn(3, 56, device=DEVICE) if biased else None
    out = torch.empty(3, 35, 2, 32, device=DEVICE)
    constants = kernel_constants(problem, SMALL)
    arguments = constants | ({"bias": bias} if biased else {})
    neighborhood_kernel[(constants["TILES"] * 2 * 3,)](query=q, key=k, value=v, heads=2, out=out, **arguments)
    seen = torch.ones(35, 56, dtype=torch.bool)
    seen[:, 5:40] = seen_on_grid(**case.windows())
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    close(out.transpose(1, 2), dense(q[:, :, 5:40], k, v, seen.to(DEVICE), bias, 0.25), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize(
    ("grid", "window", "stride", "dilation", "causal"),
    [
        ((32, 32), (7, 7), (1, 1), (1, 1), (False, False)),
        ((33, 29), (13, 8), (1, 3), (1, 2), (False, False)),
        ((48, 40), (16, 16), (8, 8), (1, 1), (False, False)),
        ((40, 36), (35, 33), (1, 1), (1, 1), (False, True)),
        ((13, 11, 9), (3, 4, 3), (2, 3, 3), (3, 2, 2), (True, False, False)),
        ((1250,), (82,), (3,), (5,), (False,)),
    ],
)
def test_neighborhood_on_gpu(grid, window, stride, dilation, causal, dim, dtype) -> None:
    for front, behind, config in ((0, 0, None), (1, 77, None), (5, 0, SMALL)):
        case = Case(grid, window, stride, dilation, causal, front, behind, (dim, dim), dtype, bias=True, config=config)
        case.check(batch=2, heads=3)


def test_boxes_need_the_fewest_blocks() -> None:
    plain = ((1, 1, 1), (1, 1, 1), (False,) * 3)
    assert neighborhood.boxes((1, 32, 32), (1, 7, 7), *plain, 64, 64) == ((1, 8, 8), (1, 4, 16))
    assert neighborhood.boxes((1, 64, 64), (1, 8, 8), (1, 8, 8), (1, 1, 1), (False,) * 3, 64, 64)[0] == (1, 8, 8)
    assert neighborhood.boxes((1, 1, 500), (1, 1, 9), *plain, 64, 32) == ((1, 1, 64), (1, 1, 32))
    blocked = ((1, 64, 64), (1, 8, 8), (1, 8, 8), *plain[1:])
    assert neighborhood.visited_blocks(*blocked, (1, 8, 8), (1, 8, 8)) == 64
    interior, borders = 2 * 4, 2 * 3  # tiles of 8 along 32 with windows of 7 see 11, 14, 14 and 11 keys
    assert neighborhood.visited_blocks((1, 1, 32), (1, 1, 7), *plain, (1, 1, 8), (1, 1, 4)) == interior + borders
    for volume in (16, 128):
        assert {math.prod(shape) for shape in neighborhood._factorings(volume)} == {volume}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"window": (5, 3)}, "more than the grid"),
        ({"window": (3, 2), "dilation": (1, 3)}, "more than the grid"),
        ({"stride": (4, 1)}, "at most the window"),
        ({"grid": (5, 5)}, "do not hold"),
        ({"start": 2}, "do not hold"),
        ({"grid": (20,)}, "same 1 to 3 axes"),
    ],
)
def test_windows_without_meaning_are_refused(change: dict[str, Any], why: str) -> None:
    windows = Case((4, 5), (3, 3)).windows() | {"start": 1} | change
    with pytest.raises(UsageError, match=why):
        neighborhood.check_windows(21, 21, **windows)


# -- dense and block-sparse --------------------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize(
    ("queries", "keys", "dims", "dtype", "causal", "bias", "layout"),
    [
        (21, 21, (16, 16), torch.float32, False, False, "bnhd"),
        (21, 37, (16, 16), torch.float32, False, True, "bnhd"),
        (33, 16, (32, 32), half, False, True, "bhdn"),
        (48, 48, (16, 16), torch.float32, True, False, "bnhd"),
        (50, 35, (16, 16), torch.float32, True, True, "nbhd"),
        (35, 50, (16, 16), torch.float32, True, True, "bnhd"),
        (17, 33, (64, 64), half, False, True, "bnhd"),
        (17, 33, (80, 80), torch.float32, True, True, "bnhd"),
        (17, 33, (80, 80), half, False, False, "bnhd"),
        (17, 33, (96, 64), half, False, True, "bnhd"),
        (17, 33, (128, 128), half, True, True, "bnhd"),
        (1, 5, (24, 8), torch.float32, False, True, "bnhd"),
    ],
)
@pytest.mark.parametrize("config", [SMALL, None])
def test_dense_case(queries, keys, dims, dtype, causal, bias, layout, config) -> None:
    (q,) = operands(2, 2, queries, dims[0], dtype, layout, 1)
    (k,) = operands(2, 2, keys, dims[0], dtype, layout, 1)
    (v,) = operands(2, 2, keys, dims[1], dtype, layout, 1)
    key_bias = torch.randn(2, keys, device=DEVICE) if bias else None
    seen = torch.ones(queries, keys, dtype=torch.bool, device=DEVICE)
    if causal:
        seen = seen.tril()
    result = attention(q, k, v, key_bias, scale=0.2, is_causal=causal, config=config)
    assert result.transpose(1, 2).is_contiguous()
    close(result, dense(q, k, v, seen, key_bias, 0.2), dtype)


@on_device
def test_dense_case_with_large_logits_and_hidden_keys() -> None:
    q, k, v = operands(2, 2, 40, 16, torch.float32)
    bias = torch.randn(2, 40, device=DEVICE)
    bias[0, :20] = -math.inf  # the first block of keys, in full
    bias[1] = -math.inf
    seen = torch.ones(40, 40, dtype=torch.bool, device=DEVICE)
    result = attention(q * 10, k, v, bias, scale=1.0, config=SMALL)
    close(result, dense(q * 10, k, v, seen, bias, 1.0), torch.float32)
    assert not result[1].any()


def some_blocks(tokens: int, size: int, rows: int) -> tuple[Tensor, Tensor]:
    """Tokens in any order cut into blocks, the last of which may be short, and so many tokens that are in none."""
    order = torch.randperm(tokens)
    blocks = torch.full((-(-(tokens - rows) // size), size), -1)
    blocks.view(-1)[: tokens - rows] = order[rows:]
    return blocks.to(DEVICE), order[:rows].to(DEVICE)


def seen_in_blocks(index: Tensor, queries: Tensor, keys: Tensor, rows: Tensor, tokens: int, causal: bool) -> Tensor:
    """bool [B, H, N, N], in loops; False where the query is in no block."""
    seen = torch.zeros(*index.shape[:2], tokens, tokens, dtype=torch.bool)
    lists, queries, keys, rows = (table.tolist() for table in (index, queries, keys, rows))
    for b, h, t in itertools.product(*map(range, index.shape[:3])):
        listed = [m for block in lists[b][h][t] for m in keys[block] if m >= 0] + rows
        for i in (i for i in queries[t] if i >= 0):
            seen[b, h, i, [m for m in listed if not causal or m <= i]] = True
    return seen.to(DEVICE)


@on_device
@pytest.mark.parametrize(
    ("tokens", "blocks", "listed", "rows", "shared", "causal", "bias", "dims", "dtype", "config"),
    [
        (48, (16, 16), 2, 0, False, False, False, (16, 16), torch.float32, SMALL),
        (53, (7, 9), 3, 1, True, False, True, (16, 16), torch.float32, SMALL),
        (53, (7, 9), 3, 3, False, True, True, (16, 16), torch.float32, SMALL),
        (41, (20, 5), 5, 0, True, True, False, (16, 16), torch.float32, Config(16, 32, 4, 1)),
        (60, (16, 1), 21, 2, False, False, True, (80, 80), torch.float32, Config(16, 16, 4, 1)),  # single keys
        (70, (32, 16), 2, 18, True, False, True, (64, 96), half, Config(32, 16, 4, 1)),
        (130, (64, 32), 2, 1, False, True, True, (32, 32), half, None),
    ],
)
def test_block_sparse_case(tokens, blocks, listed, rows, shared, causal, bias, dims, dtype, config) -> None:
    q, k = operands(2, 2, tokens, dims[0], dtype, names=2)
    (v,) = operands(2, 2, tokens, dims[1], dtype, names=1)
    queries, others = some_blocks(tokens, blocks[0], rows)
    keys = torch.full((-(-(tokens - rows) // blocks[1]), blocks[1]), -1, device=DEVICE)
    among = torch.tensor([i for i in range(tokens) if i not in others.tolist()], device=DEVICE)
    keys.view(-1)[: len(among)] = among
    lead = (2, 1 if shared else 2, len(queries))
    index = torch.rand(*lead, len(keys)).topk(listed, -1).indices.to(DEVICE)
    key_bias = torch.randn(2, tokens, device=DEVICE) if bias else None
    result = block_sparse_attention(
        q, k, v, index, queries, keys, others, key_bias, causal=causal, scale=0.2, config=config
    )
    seen = seen_in_blocks(index, queries, keys, others, tokens, causal)
    assert result.transpose(1, 2).is_contiguous()
    in_blocks = queries[queries >= 0]
    close(result[:, :, in_blocks], dense(q, k, v, seen, key_bias, 0.2)[:, :, in_blocks], dtype)


@on_device
@pytest.mark.parametrize(
    ("tiles", "size", "listed", "heads", "mask", "bias", "dtype", "config"),
    [
        (3, 16, 16, 1, None, False, torch.float32, SMALL),
        (4, 11, 23, 1, (4, 11, 23), True, torch.float32, SMALL),
        (4, 11, 23, 2, (2, 4, 11, 23), False, torch.float32, Config(16, 32, 4, 1)),
        (4, 11, 37, 1, (2, 1, 4, 1, 37), True, torch.float32, SMALL),
        (5, 20, 40, 2, (2, 2, 5, 20, 40), False, half, None),
    ],
)
def test_tiled_case(tiles, size, listed, heads, mask, bias, dtype, config) -> None:
    """Every query is in one tile, the last of which is short and repeats its last query."""
    tokens = tiles * size - 3
    q, k, v = operands(2, 2, tokens, 16, dtype)
    order = torch.stack([torch.randperm(tokens) for _ in range(heads)])
    queries = torch.cat([order, order[:, -1:].expand(-1, 3)], 1).reshape(heads, tiles, size)
    keys = torch.rand(heads, tiles, tokens).topk(listed, -1).indices
    added = None if mask is None else torch.randn(mask).masked_fill_(torch.rand(mask) < 0.4, -math.inf)
    key_bias = torch.randn(2, tokens, device=DEVICE) if bias else None
    whole = torch.zeros(2, 2, tiles, size, listed) if added is None else added.expand(2, 2, tiles, size, listed)
    logits = torch.full((2, 2, tokens, tokens), -math.inf)
    for b, h, t, i in itertools.product(range(2), range(2), range(tiles), range(size)):
        of = h % heads
        if t < tiles - 1 or i < size - 3:
            logits[b, h, queries[of, t, i], keys[of, t]] = whole[b, h, t, i]
        else:  # a query that is repeated sees the same
            whole = whole.clone()
            whole[:, :, t, i] = whole[:, :, t, size - 4]
    added = None if added is None else whole.to(DEVICE, dtype)
    result = tiled_attention(q, k, v, queries.to(DEVICE), keys.to(DEVICE), added, key_bias, scale=0.2, config=config)
    logits = logits.to(DEVICE, torch.float64) + q.double() @ k.double().mT * 0.2
    logits = logits if key_bias is None else logits + key_bias[:, None, None]
    close(result, logits.softmax(-1).nan_to_num(0.0) @ v.double(), dtype)


@on_device
@pytest.mark.parametrize("size", [1, 3])
def test_operations_take_the_kernel_case(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered for the CPU, where only the interpreter runs it, as it is for CUDA: the same as the references."""
    from tokenopt.attention import Layout, Neighborhood, Routed, Stripe, per_head
    from tokenopt.ops import native

    calls: list[str] = []
    kernels = {name: getattr(block_sparse, name) for name in ("block_sparse_attention", "tiled_attention")}
    for name, kernel in kernels.items():
        assert native._KERNELS[name, "cuda"] == f"tokenopt.kernels.block_sparse:{name}"
        monkeypatch.setattr(block_sparse, name, lambda *a, of=name, run=kernel, **o: calls.append(of) or run(*a, **o))
    if INTERPRETED:
        here = {(name, "cpu"): native._KERNELS[name, "cuda"] for name in kernels}
        monkeypatch.setattr(native, "_KERNELS", here)
    native._load.cache_clear()
    layout = Layout(36 + size, size, (6, 6), heads=2, head_dim=16)
    causal = dataclasses.replace(layout, causal=True)
    q, k, v = (torch.randn(2, 2, 36 + size, 16, device=DEVICE) for _ in range(3))
    key_bias = {"key_bias": torch.randn(2, 36 + size, device=DEVICE)}
    bias = {"bias": torch.randn(36 + size, 36 + size, device=DEVICE)}
    boxes, runs = Routed(4, topk=2), Routed(8, topk=5, key_block=3, heads="each", flat=True)
    stripes = per_head([Stripe(rows=2), Stripe(cols=3)])
    cases = [
        *((boxes, layout, given, "block_sparse_attention") for given in ({}, key_bias)),  # some boxes are short
        *((runs, causal, given, "block_sparse_attention") for given in ({}, key_bias)),
        *((stripes, layout, given, "tiled_attention") for given in ({}, key_bias)),
        (Stripe(rows=2), causal, key_bias, "tiled_attention"),
        (boxes, layout, bias, None),  # there is no kernel with a bias on all logits,
        (Neighborhood(3, border="zero"), layout, {}, None),  # nor with zero keys beyond the border
    ]
    try:
        for pattern, where, given, taken in cases:
            lowered = pattern.lower(where)
            operation = getattr(torch.ops.tokenopt, lowered.op)
            tensors = {n: t.float() if t.dtype.is_floating_point else t for n, t in lowered.tensors.items()}
            names = [a.name for a in operation.default._schema.arguments[3:] if not a.kwarg_only]
            arguments = [t if t is None else t.to(DEVICE) for t in map((tensors | given).get, names)]
            found = operation(q, k, v, *arguments, **lowered.settings)
            assert calls == [taken] * (taken is not None), pattern
            with native.disabled():
                close(found, operation(q, k, v, *arguments, **lowered.settings).double(), torch.float32)
            assert len(calls) == (taken is not None)
            calls.clear()
    finally:
        native._load.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
def test_dense_and_block_sparse_on_gpu(dim: int, dtype: torch.dtype) -> None:
    q, k, v = operands(2, 3, 577, dim, dtype)
    bias = torch.randn(2, 577, device=DEVICE)
    seen = torch.ones(577, 577, dtype=torch.bool, device=DEVICE)
    for causal in (False, True):
        result = attention(q, k, v, bias, scale=dim**-0.5, is_causal=causal)
        close(result, dense(q, k, v, seen.tril() if causal else seen, bias, dim**-0.5), dtype)
    (queries, none), (keys, _) = some_blocks(577, 128, 0), some_blocks(577, 64, 0)
    index = torch.rand(2, 3, 5, 10).topk(6, -1).indices.to(DEVICE)
    result = block_sparse_attention(q, k, v, index, queries, keys, none, bias, causal=True, scale=dim**-0.5)
    seen = seen_in_blocks(index, queries, keys, none, 577, True)
    close(result, dense(q, k, v, seen, bias, dim**-0.5), dtype)


@on_device
def test_case_of_operands_that_do_not_fit() -> None:
    q, k, v = operands(2, 2, 20, 16, torch.float32)
    with pytest.raises(UsageError, match="heads"):
        attention(q, k[:, :1], v, scale=1.0)
    with pytest.raises(UsageError, match="key bias"):
        attention(q, k, v, torch.zeros(2, 19, device=DEVICE), scale=1.0)
    with pytest.raises(UsageError, match="float16"):
        attention(q, k, v.half(), scale=1.0)
    with pytest.raises(UsageError, match="no backward"):
        attention(q, k, v.requires_grad_(), scale=1.0)
    v.requires_grad_(False)
    with pytest.raises(UsageError, match="positive"):
        attention(q, k, v, scale=0.0)
    if INTERPRETED:
        with pytest.raises(UsageError, match="interpreter"):
            attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=1.0)
    table = torch.arange(20, device=DEVICE).reshape(1, 1, 20)
    with pytest.raises(UsageError, match="positive"):
        tiled_attention(q, k, v, table, table, scale=-1.0)


@compiled
def test_operands_on_the_cpu_are_refused() -> None:
    x = torch.zeros(1, 1, 4, 16)
    with pytest.raises(UsageError, match="CUDA device"):
        attention(x, x, x, scale=1.0)


# -- compiled without a GPU --------------------------------------------------------------------------------------------

CONTIGUOUS = {f"{name}_d": 1 for name in ("query", "key", "value", "out")}
NO_BIAS = {"bias": None, "bias_b": 0, "bias_n": 0}
NO_MASK = {"mask": None} | {f"mask_{axis}": 0 for axis in "bhtqk"}
MASKED = {"index": None, "rows": None} | {f"index_{axis}": 0 for axis in "bhtk"}


def signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    types = {"bias": "*fp32", "mask": f"*{dtype}"}
    types |= dict.fromkeys(("index", "queries", "keys", "rows"), "*i64") if kernel is block_sparse_kernel else {}
    types |= dict.fromkeys(("query", "key", "value", "out"), f"*{dtype}:16")
    types |= {f"{name}_{axis}": "i32:16" for name in ("query", "key", "value", "out") for axis in "bhn"}
    return {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}


def head(dim: int) -> dict[str, Any]:
    return {"SCALE": dim**-0.5, "D": dim, "E": dim, "D_CHUNKS": online.chunks(dim), "E_CHUNKS": online.chunks(dim)}


def windowed(config: Config, dim: int, extra: bool, axes: int = 2) -> dict[str, Any]:
    windows = Case((16,) * axes, (7,) * axes).windows()
    constants = neighborhood.launch_constants(**windows, extra=extra, dim=dim, out_dim=dim, config=config)
    return constants | {"SCALE": dim**-0.5}


@compiled
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_kernels_compile_for(capability: int) -> None:
    config = Config(64, 64, 4, 2)
    block = {"QUERIES": 64, "KEYS": 64}
    lists = block | {"LENGTH": 128, "CAUSAL": True} | NO_MASK
    for kernel, constants, dtype in (
        (neighborhood_kernel, windowed(config, 64, extra=True), "fp16"),
        (neighborhood_kernel, windowed(config, 80, extra=False, axes=3) | NO_BIAS, "bf16"),
        (flash_kernel, head(96) | block | {"CAUSAL": True}, "fp16"),
        (block_sparse_kernel, head(64) | lists, "bf16"),
        (block_sparse_kernel, head(64) | lists | {"CAUSAL": False} | MASKED | NO_BIAS, "fp16"),
    ):
        constants = constants | CONTIGUOUS
        types = signature(kernel, constants, dtype)
        result = aot.ptx(kernel, types, constants, capability, num_warps=4, num_stages=2)
        assert f".target sm_{capability}" in result.text
        entry = result.text[result.text.index(".entry") :].split(")")[0]
        assert result.name in entry and entry.count(".param") == len(types)
        assert "cp.async" in result.text, "the loads of the next block do not overlap with this one"
        assert ".loc" not in result.text
        assert result.shared <= 99 * 1024 and result.num_warps == 4


@compiled
def test_kernels_compile_with_sizes_of_one() -> None:
    """Triton's launcher makes a constant of every integer argument that is 1."""
    config = Config(16, 16, 4, 2)
    block = head(16) | {"QUERIES": 16, "KEYS": 16}
    lists = block | {"LENGTH": 1, "CAUSAL": False} | NO_MASK
    strides = [f"{name}_{axis}" for name in ("query", "key", "value", "index") for axis in "bhnt"]
    for kernel, constants in (
        (neighborhood_kernel, windowed(config, 16, extra=True)),
        (flash_kernel, block | {"CAUSAL": False}),
        (flash_kernel, block | {"CAUSAL": True}),
        (block_sparse_kernel, lists),
    ):
        counts = {"heads", "start_token", "extras", "tiles", "size", "listed", "few"}
        counts |= {"queries", "keys"} if kernel is flash_kernel else set()
        sizes = (counts | {*strides}) & set(kernel.arg_names)
        constants = constants | CONTIGUOUS | dict.fromkeys(sizes, 1)
        aot.ptx(kernel, signature(kernel, constants, "fp16"), constants, 80)


@compiled
@pytest.mark.parametrize(("dim", "bits"), [(64, 16), (80, 16), (128, 16), (256, 16), (64, 32)])
def test_shipped_tiles_fit_the_smallest_device(dim: int, bits: int) -> None:
    kernels = {"neighborhood": neighborhood_kernel, "flash": flash_kernel, "block-sparse": block_sparse_kernel}
    for name, kernel in kernels.items():
        dtype = torch.float16 if bits == 16 else torch.float32
        config = tuning.lookup_for(name, 89, dtype, dim, 1024, 48 if name == "neighborhood" else 0)
        block = head(dim) | {"QUERIES": config.queries, "KEYS": config.keys}
        constants = (
            CONTIGUOUS
            | {
                "neighborhood": windowed(config, dim, extra=False),
                "flash": block | {"CAUSAL": False},
                "block-sparse": block | {"LENGTH": 128, "CAUSAL": True} | NO_MASK,
            }[name]
        )
        types = signature(kernel, constants, f"fp{bits}")
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        assert aot.ptx(kernel, types, constants, 89, **options).shared <= 99 * 1024


@compiled
def test_arguments_are_given_once() -> None:
    constants = windowed(SMALL, 64, extra=False) | CONTIGUOUS
    types = signature(neighborhood_kernel, constants, "fp16")
    with pytest.raises(ValueError, match="each as an argument or as a constant"):
        aot.ptx(neighborhood_kernel, types, constants | {"heads": 12}, 80)


def test_scratch_is_dropped_unless_used() -> None:
    text = ".version 8\n.visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{ ld [k_param_0]; }"
    assert aot._without_scratch(text, 1) == (
        ".version 8\n.visible .entry k(\n\t.param .u64 k_param_0\n)\n{ ld [k_param_0]; }"
    )
    with pytest.raises(ValueError, match="not given"):
        aot._without_scratch(text, 0)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_every_problem() -> None:
    for kernel, capability, dtype, dim, tokens, window in itertools.product(
        ("flash", "block-sparse", "neighborhood"),
        (75, 80, 90, 120),
        (torch.float16, torch.bfloat16, torch.float32),
        (16, 64, 80, 256),
        (49, 1024, 100000),
        (0, 7, 80),
    ):
        config = tuning.lookup_for(kernel, capability, dtype, dim, tokens, window)
        assert all(size >= 16 and size & (size - 1) == 0 for size in (config.queries, config.keys))


def test_rows_of_the_table_ask_for_what_problems_have() -> None:
    table = tuning._table()
    assert "not been measured" in table["provenance"]
    for row in table["rows"]:
        dtype = torch.float32 if row["if"].get("bits") == 32 else torch.float16
        problem = tuning._problem(row["if"]["kernel"], 80, dtype, 64, 1024, 7)
        assert row["if"].keys() <= problem.keys()
        Config(**row["use"])
    for bits, dim in ((16, 64), (16, 256), (32, 128)):
        assert len(set(tuning.candidates(bits, dim))) >= 2


@compiled
def test_tuning_writes_rows_that_are_then_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(run: Any, return_mode: str) -> float:
        return run()

    def run(config: Config) -> float:
        if config.keys == 128:
            raise triton.runtime.errors.OutOfResources(300000, 200000, "shared memory")
        return 1.0 if config == Config(128, 32, 4, 3) else 2.0

    monkeypatch.setattr("triton.testing.do_bench", timed)
    monkeypatch.setattr(tuning, "_problems", lambda *problem: [("neighborhood", 1024, 7, run)])
    for name, value in (("current_device", 0), ("get_device_capability", (9, 0)), ("get_device_name", "a device")):
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    table = tmp_path / "tuning.json"
    for _ in range(2):  # the second measurement takes the place of the first
        tuning.tune(table)
        monkeypatch.setattr(tuning, "TABLE", table)
    try:
        assert sum("measured" in row for row in json.loads(table.read_text())["rows"]) == 1
        take = functools.partial(tuning.lookup_for, "neighborhood", dtype=torch.float16, head_dim=64, window=8)
        assert take(capability=90, tokens=900) == Config(128, 32, 4, 3)
        assert take(capability=80, tokens=900) == take(capability=90, tokens=5000) == Config(64, 64, 4, 2)
    finally:
        monkeypatch.undo()
        tuning._table.cache_clear()
        tuning._lookup.cache_clear()
