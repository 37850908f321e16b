"""How large the tiles of a kernel are and how many warps work on one: a table, shipped as tuning.json.

A row holds for the problems that match all of its keys; of the rows that match, the one with the most keys is taken.
Rows without "measured" were chosen by hand and have not been measured. `python -m tokenopt.kernels.tuning` measures on
the GPU at hand and adds rows for it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("tuning.json")
TOKEN_CLASSES = (256, 1024, 4096, 16384)
WINDOW_CLASSES = (8, 16, 32)


@dataclass(frozen=True)
class Config:
    """One way to run a kernel.

    queries, keys: per tile, powers of two from 16 on.
    num_warps: of 32 threads, per program.
    num_stages: blocks of keys in flight.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def lookup(kernel: str, query: Tensor, *, tokens: int, window: int = 0) -> Config:
    """The table's choice for attention of query [B, H, N, D] over a number of tokens, with windows of at most `window`
    keys along an axis (0 = no windows)."""
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (0, 0)
    return _lookup(kernel, capability[0] * 10 + capability[1], query.dtype, query.shape[3], tokens, window)


def lookup_for(kernel: str, capability: int, dtype: torch.dtype, head_dim: int, tokens: int, window: int = 0) -> Config:
    """As lookup, for a device that is not at hand: capability 89 is sm_89."""
    return _lookup(kernel, capability, dtype, head_dim, tokens, window)


@functools.lru_cache(maxsize=4096)
def _lookup(kernel: str, capability: int, dtype: torch.dtype, head_dim: int, tokens: int, window: int) -> Config:
    problem = _problem(kernel, capability, dtype, head_dim, tokens, window)
    rows = [row for row in _table()["rows"] if row["if"].items() <= problem.items()]
    assert rows, "the table has a row without keys other than the kernel"
    return Config(**max(rows, key=lambda row: len(row["if"]))["use"])


def _problem(kernel: str, capability: int, dtype: torch.dtype, dim: int, tokens: int, window: int) -> dict[str, Any]:
    """What a row may ask for."""
    return {
        "kernel": kernel,
        "capability": capability,
        "bits": torch.finfo(dtype).bits,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": _class_of(dim, (32, 64, 128)),
        "tokens": _class_of(tokens, TOKEN_CLASSES),
        "window": _class_of(window, WINDOW_CLASSES) if window else 0,
    }


def _class_of(size: int, bounds: tuple[int, ...]) -> str:
    """The class of a size: "<= 64", or "> 128" beyond the last bound."""
    return next((f"<= {bound}" for bound in bounds if size <= bound), f"> {bounds[-1]}")


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def candidates(bits: int, head_dim: int) -> Iterator[Config]:
    """What is worth measuring."""
    for (queries, warps), keys, stages in itertools.product(((64, 4), (128, 4), (128, 8)), (32, 64, 128), (2, 3)):
        # the queries and the stages of keys and values must fit in the 227 KB that the largest devices have
        if (2 * keys * stages + queries) * head_dim * bits // 8 <= 227 * 1024:
            yield Config(queries, keys, warps, stages)


def tune(
    path: Path = TABLE, *, dtypes: Sequence[torch.dtype] = (torch.float16,), head_dims: Sequence[int] = (64,)
) -> None:
    """Measures every candidate on the current CUDA device and writes the table with a row per problem to path.

    A candidate that does not fit the device is skipped. Times are medians of triton.testing.do_bench. Compiling takes
    most of the time: there are about 400 kernels per element type and head dim.
    """
    import triton
    from triton.testing import do_bench

    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    table = json.loads(TABLE.read_text())
    for dtype, dim in itertools.product(dtypes, head_dims):
        for kernel, tokens, window, run in _problems(device, dtype, dim):
            times: dict[Config, float] = {}
            for config in candidates(torch.finfo(dtype).bits, dim):
                try:
                    times[config] = do_bench(functools.partial(run, config), return_mode="median")
                except triton.runtime.errors.OutOfResources:
                    continue
            best = min(times, key=times.__getitem__)
            asked = _problem(kernel, 10 * major + minor, dtype, dim, tokens, window)
            row = {
                "if": asked,
                "use": asdict(best),
                "measured": {
                    "device": torch.cuda.get_device_name(device),
                    "triton": triton.__version__,
                    "milliseconds": round(times[best], 4),
                },
            }
            table["rows"] = [old for old in table["rows"] if old["if"] != asked] + [row]
            print(f"{kernel} {dtype} {dim} {tokens} {window}: {best} {times[best]:.3f} ms", flush=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    _table.cache_clear()
    _lookup.cache_clear()


def _problems(
    device: torch.device, dtype: torch.dtype, dim: int
) -> Iterator[tuple[str, int, int, Callable[[Config], Tensor]]]:
    """(kernel, tokens, window, run) at 12 heads, of all classes of tokens and windows."""
    from tokenopt.kernels.block_sparse import block_sparse_attention
    from tokenopt.kernels.flash import attention
    from tokenopt.kernels.neighborhood import neighborhood_attention

    for side in (16, 32, 64, 128):
        tokens = side * side
        batch = max(1, 32768 // tokens)
        q, k, v = (torch.randn(batch, tokens, 12, dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
        bias = torch.zeros(batch, tokens, device=device)
        run = functools.partial(attention, q, k, v, bias, scale=dim**-0.5)
        yield "flash", tokens, 0, lambda config, run=run: run(config=config)

        blocks = torch.arange(tokens, device=device).reshape(-1, 128)
        lists = torch.stack([torch.randperm(len(blocks))[: max(1, len(blocks) // 4)] for _ in blocks])
        lists = lists.to(device).expand(batch, 1, -1, -1)
        run = functools.partial(block_sparse_attention, q, k, v, lists, blocks, blocks, blocks[0, :0])
        yield "block-sparse", tokens, 0, lambda config, run=run: run(causal=False, scale=dim**-0.5, config=config)

        axes = {"grid": (side, side), "stride": (1, 1), "dilation": (1, 1), "causal": (False, False)}
        run = functools.partial(neighborhood_attention, q, k, v, start=0, **axes, scale=dim**-0.5)
        for window in (w for w in (7, 13, 21, 48) if w < side):
            yield (
                "neighborhood",
                tokens,
                window,
                lambda config, run=run, window=window: run(window=(window, window), config=config),
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures the attention kernels on the current GPU.")
    parser.add_argument("--out", type=Path, default=TABLE, help="where the table is written; default: %(default)s")
    parser.add_argument("--dtypes", nargs="+", default=["float16"], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64])
    options = parser.parse_args()
    tune(options.out, dtypes=[getattr(torch, name) for name in options.dtypes], head_dims=options.head_dims)
