"""The attention kernels against torch's dense attention on a GPU, in one run, as ratios.

    python -m benchmarks.kernels [--dtype float16] [--heads 12] [--head-dim 64] [--batch 8]

Neighbourhoods are compared with dense attention over all tokens without a mask, torch's fastest; the bound is the ratio
of the scores that are computed, with the blocks of keys that the kernel visits. Attention with a bias per key is
compared with torch's, which takes it as a mask, and with dense attention without one. A step of token merging, that is
matching and merging, is compared with the references of its operations. Times are medians. Without a GPU the exit
status is 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from triton.testing import do_bench

from tokenopt.kernels import neighborhood, reduce, tuning
from tokenopt.kernels.flash import attention
from tokenopt.kernels.neighborhood import neighborhood_attention
from tokenopt.ops import native, tokens


def median(run: Callable[[], Any]) -> float:
    """Milliseconds."""
    return do_bench(run, return_mode="median")


def launches(run: Callable[[], Any]) -> int:
    """Kernels that a call starts on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type is torch.autograd.DeviceType.CUDA for event in profile.events())


def merging(batch: int, size: int, dtype: torch.dtype) -> None:
    """Prints the table of one step of Token Merging that removes an eighth, with a class token."""
    print("\n| tokens | channels | launches | reference | ms | reference ms | speed-up |")
    print("|---|---|---|---|---|---|---|")
    for count in (197, 577, 1025, 4097):
        for channels in (384, 768, 1024):
            metric = torch.randn(batch, count, size, device="cuda", dtype=dtype)
            x = torch.randn(batch, count, channels, device="cuda", dtype=dtype)
            weight = torch.ones(batch, count, device="cuda")

            def fused(metric=metric, x=x, weight=weight) -> Any:
                plan = reduce.match_bipartite(metric, metric.shape[1] // 8, 1, metric.shape[1])
                return reduce.merge_tokens(x, weight, *plan, True)

            def reference(metric=metric, x=x, weight=weight) -> Any:
                plan = tokens.match_bipartite(metric, metric.shape[1] // 8, 1, metric.shape[1])
                return tokens.merge_tokens(x, weight, *plan, True)

            with native.disabled():
                ours, theirs = median(fused), median(reference)
                counts = f"{launches(fused)} | {launches(reference)}"
            print(f"| {count} | {channels} | {counts} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f}x |")


def bound(side: int, window: int, stride: int, config: tuning.Config) -> float:
    """Scores of dense attention over those the kernel computes."""
    axes = ((1, side, side), (1, window, window), (1, stride, stride), (1, 1, 1), (False,) * 3)
    query_box, key_box = neighborhood.boxes(*axes, config.queries, config.keys)
    blocks = neighborhood.visited_blocks(*axes, query_box, key_box)
    return side**4 / (blocks * config.queries * config.keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU to measure on", file=sys.stderr)
        sys.exit(2)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options}\n")

    def operands(tokens: int) -> list[torch.Tensor]:
        shape = (options.batch, tokens, options.heads, options.head_dim)
        dtype = getattr(torch, options.dtype)
        return [torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3)]

    print("| grid | window | stride | dense ms | kernel ms | speed-up | bound |\n|---|---|---|---|---|---|---|")
    for side in (16, 32, 64, 128):
        q, k, v = operands(side * side)
        dense = median(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))
        for window, stride in ((7, 1), (8, 8), (13, 1), (16, 8), (16, 16), (21, 1), (48, 1)):
            if window > side:
                continue
            config = tuning.lookup("neighborhood", q, tokens=side * side, window=window)
            windows = {"window": (window,) * 2, "stride": (stride,) * 2, "dilation": (1, 1), "causal": (False, False)}
            time = median(
                lambda q=q, k=k, v=v, side=side, windows=windows: neighborhood_attention(
                    q, k, v, start=0, grid=(side, side), **windows, scale=options.head_dim**-0.5
                )
            )
            ratio = bound(side, window, stride, config)
            cells = f"{side} x {side} | {window} | {stride} | {dense:.3f} | {time:.3f}"
            print(f"| {cells} | {dense / time:.2f}x | {ratio:.2f}x |")

    print(
        "\n| tokens | dense ms | with a mask ms | kernel ms | against mask | against dense |\n|---|---|---|---|---|---|"
    )
    for count in (197, 577, 1025, 4097):
        q, k, v = operands(count)
        bias = torch.randn(options.batch, count, device="cuda")
        mask = bias[:, None, None].to(q.dtype).expand(-1, -1, count, -1)
        dense = median(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))
        masked = median(lambda q=q, k=k, v=v, mask=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        time = median(lambda q=q, k=k, v=v, bias=bias: attention(q, k, v, bias, scale=options.head_dim**-0.5))
        print(f"| {count} | {dense:.3f} | {masked:.3f} | {time:.3f} | {masked / time:.2f}x | {dense / time:.2f}x |")
    merging(options.batch, options.head_dim, getattr(torch, options.dtype))


if __name__ == "__main__":
    main()
