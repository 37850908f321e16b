"""Attention patterns against dense attention, one attention at a time and in whole models, side by side in one run.

    python -m benchmarks.attention [--sides 32 64] [--windows 7 13] [--threads 1] [--rounds 9] [--flex] [--models 512]
                                   [--cuda] [--out FILE]

One attention of 6 heads of 64 features over side x side tokens, batch 1, float32. In ONNX Runtime the baseline is the
faster of its dense forms (matrix products that it fuses, or the ``Attention`` node), and in torch
scaled_dot_product_attention. *C++* is the kernel that eager torch uses on the CPU where there is a compiler, *tiles*
the portable form, *masked* dense attention under the pattern's mask, *flex* compiled FlexAttention with its block mask
(``--flex``: it compiles for half a minute per row). Whole models are ViT-S at sizes in pixels, every attention a window
of 7. With ``--cuda`` the same rows run on the GPU in float16, against the flash and cuDNN kernels, FlexAttention with a
block mask, and NATTEN where it is installed.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenopt
from benchmarks.machine import machine
from tokenopt.attention import Layout, Neighborhood
from tokenopt.attention.tiles import additive, reference_mask
from tokenopt.runtimes import get
from tokenopt.runtimes import open as open_engine
from tokenopt.runtimes.bench import Timing, benchmark

HEADS, HEAD_DIM = 6, 64
GRIDS = {"cuda": ((32, 64, 128), (7, 13, 21, 31), (64, 128)), "cpu": ((32, 64), (7, 13), (64,))}


class Dense(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class Pattern(torch.nn.Module):
    """The operation that a pattern becomes on a grid of tokens."""

    def __init__(self, pattern: Neighborhood, layout: Layout) -> None:
        super().__init__()
        lowered = pattern.lower(layout)
        self.target, self.settings = getattr(torch.ops.tokenopt, lowered.op), lowered.settings
        self.predicted, self.ideal, self.tile = lowered.predicted, lowered.ideal, lowered.tile
        self.names = list(lowered.tensors)
        for name, tensor in lowered.tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tables = {name: getattr(self, name) for name in self.names}
        return self.target(query, key, value, **tables, **self.settings)


def tokens(side: int, heads: int = HEADS, head_dim: int = HEAD_DIM) -> tuple[Layout, list[Tensor]]:
    """A square grid, and its queries, keys and values as a model has them: views of [B, N, H, D]."""
    layout = Layout(side * side, 0, (side, side), (("patch", 0, side * side),), heads, head_dim)
    return layout, [torch.randn(1, side * side, heads, head_dim).transpose(1, 2) for _ in range(3)]


def onnxruntime_row(side: int, window: int, threads: int, rounds: int) -> list[str]:
    layout, inputs = tokens(side)
    inputs = [x.contiguous() for x in inputs]
    pattern = Pattern(Neighborhood(window), layout)
    with tempfile.TemporaryDirectory() as folder:
        engines = {}
        for name, module, opset in (("products", Dense(), 20), ("node", Dense(), 23), ("pattern", pattern, 20)):
            path = Path(folder) / f"{name}.onnx"
            get("onnxruntime").build(tokenopt.capture(module.eval(), inputs, dynamic_batch=False), path, opset=opset)
            engines[name] = open_engine(path, threads=threads)
        timings = benchmark({n: lambda e=e: e(*inputs) for n, e in engines.items()}, rounds=rounds, warmup=1)
    found = {t.name: t for t in timings}
    dense = min((found["products"], found["node"]), key=lambda t: t.median_ms)
    ratio = dense.median_ms / found["pattern"].median_ms
    return [f"{side}x{side}", str(window), _ms(dense), dense.name, _ms(found["pattern"]), f"**{ratio:.2f}x**",
            f"{pattern.predicted:.2f}x", f"{pattern.ideal:.1f}x", f"{pattern.tile:.1f}x"]  # fmt: skip


def torch_row(side: int, window: int, rounds: int, flex: bool) -> list[str]:
    from tokenopt.ops import native

    layout, inputs = tokens(side)
    pattern = Pattern(Neighborhood(window), layout)
    mask = additive(reference_mask(Neighborhood(window), layout))[None]
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.scaled_dot_product_attention(*inputs),
        "masked": lambda: F.scaled_dot_product_attention(*inputs, attn_mask=mask),
        "native": lambda: pattern(*inputs),
    }

    def portable() -> Tensor:
        with native.disabled():
            return pattern(*inputs)

    calls["tiles"] = portable
    if flex:
        calls["flex"] = _flex(layout, window, inputs)
    expected = calls["masked"]()
    for name in set(calls) - {"dense"}:
        torch.testing.assert_close(calls[name](), expected, rtol=1e-4, atol=1e-5)
    found = {t.name: t for t in benchmark(calls, rounds=rounds, warmup=1)}
    times = lambda name: f"{found[name].ratio:.2f}x" if name in found else ""  # noqa: E731
    gain = found["tiles"].median_ms / found["native"].median_ms
    return [f"{side}x{side}", str(window), _ms(found["dense"]), times("masked"), times("flex"), times("tiles"),
            f"**{times('native')}**", f"{gain:.2f}x"]  # fmt: skip


def _flex(layout: Layout, window: int, inputs: list[Tensor]) -> Callable[[], Tensor]:
    """FlexAttention with a mask of intervals per axis, compiled; its block mask is built once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    height, width = layout.grid
    clamp = lambda at, size: (at - window // 2).clamp(0, size - window)  # noqa: E731

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        dy, dx = k // width - clamp(q // width, height), k % width - clamp(q % width, width)
        return (dy >= 0) & (dy < window) & (dx >= 0) & (dx < window)

    device = inputs[0].device
    block = create_block_mask(allowed, None, None, layout.total, layout.total, device=device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*inputs, block_mask=block)


def model_row(size: int, threads: int, rounds: int) -> list[str]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", img_size=size).eval()
    result = tokenopt.optimize(model, torch.randn(2, 3, size, size), recipe=Neighborhood(7))
    x = torch.randn(1, 3, size, size)
    flops = result.report.flops["before"] / result.report.flops["after"]
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: result.dense(x), "eager pattern": lambda: result.program(x)}
    with tempfile.TemporaryDirectory() as folder:
        for name, program in (("ort", result.dense), ("ort pattern", result.program)):
            path = Path(folder) / f"{name}.onnx"
            get("onnxruntime").build(program, path)
            engine = open_engine(path, threads=threads)
            calls[name] = lambda e=engine: e(x)
        found = {t.name: t for t in benchmark(calls, rounds=rounds, warmup=1)}
    cells = [f"ViT-S/16 {size}", f"{(size // 16) ** 2 + 1}", f"{flops:.2f}x"]
    for name in ("eager", "ort"):
        dense, pattern = found[name], found[f"{name} pattern"]
        cells += [_ms(dense), _ms(pattern), f"**{dense.median_ms / pattern.median_ms:.2f}x**"]
    return cells


def cuda_row(side: int, window: int, head_dim: int, flex: bool) -> list[str]:
    """Microseconds on the GPU, by CUDA events; batch 8, 12 heads, float16."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from triton.testing import do_bench

    layout, inputs = tokens(side, 12, head_dim)
    inputs = [x.repeat(8, 1, 1, 1).to("cuda", torch.float16) for x in inputs]
    pattern = Pattern(Neighborhood(window), layout).cuda()

    def fused(kind: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(*inputs)

        return call

    calls = {"flash": fused(SDPBackend.FLASH_ATTENTION), "cudnn": fused(SDPBackend.CUDNN_ATTENTION),
             "tokenopt": lambda: pattern(*inputs)}  # fmt: skip
    if flex:
        calls["flex"] = _flex(layout, window, inputs)
    try:
        from natten import na2d

        heads_last = [x.transpose(1, 2).unflatten(1, (side, side)).contiguous() for x in inputs]
        calls["natten"] = lambda: na2d(*heads_last, kernel_size=window)
    except ImportError:
        pass
    found: dict[str, float] = {}
    for name, call in calls.items():
        try:
            found[name] = do_bench(call) * 1e3
        except RuntimeError:  # a kernel that this GPU or shape has not
            continue
    ours = found["tokenopt"]
    others = [f"{found[n] / ours:.2f}x" if n in found else "" for n in ("flash", "cudnn", "flex", "natten")]
    bound = pattern.tile * ours / min(found[n] for n in ("flash", "cudnn") if n in found)
    return [f"{side}x{side}", str(window), str(head_dim), f"{ours:.0f}", *others, f"{1 / bound:.0%}"]


def _ms(timing: Timing) -> str:
    return f"{timing.median_ms:.1f} ({timing.iqr_ms:.1f})"


def tables(options: argparse.Namespace) -> Iterator[str]:
    """Lines of markdown, as they are measured."""
    kind = "cuda" if options.cuda else "cpu"
    sides, windows, dims = GRIDS[kind]
    sides, windows = options.sides or sides, options.windows or windows
    cases = [(side, window) for side in sides for window in windows]
    yield from ["# Attention patterns", ""]
    if options.cuda:
        yield f"{torch.cuda.get_device_name()}, float16, batch 8, 12 heads; torch {torch.__version__}."
        heads = ["tokens", "window", "head dim", "us", "flash", "cuDNN", "flex", "NATTEN", "of the tile bound"]
        yield from _head(heads)
        for side, window in cases:
            for head_dim in dims:
                yield _line(cuda_row(side, window, head_dim, options.flex))
        return
    yield f"{options.threads} thread(s), float32, batch 1, {HEADS} heads of {HEAD_DIM}, {options.rounds} interleaved"
    yield f"rounds, median (IQR) in ms; {machine()}."
    yield from ["", "## ONNX Runtime", ""]
    heads = ["tokens", "window", "dense", "dense form", "tiles", "speed-up", "predicted", "ideal", "tile bound"]
    yield from _head(heads)
    for side, window in cases:
        yield _line(onnxruntime_row(side, window, options.threads, options.rounds))
    yield from ["", "## torch", ""]
    yield from _head(["tokens", "window", "dense", "masked", "flex", "tiles", "C++", "C++ over tiles"])
    for side, window in cases:
        yield _line(torch_row(side, window, options.rounds, options.flex))
    yield from ["", "## Whole models", ""]
    yield from _head(["model", "tokens", "FLOP ratio", "torch", "pattern", "", "ONNX Runtime", "pattern", ""])
    for size in options.models:
        yield _line(model_row(size, options.threads, options.rounds))


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), "|---" * len(cells) + "|"]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", type=int)
    parser.add_argument("--windows", nargs="+", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--flex", action="store_true")
    parser.add_argument("--models", nargs="*", type=int, default=[512, 1024])
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.cuda and not torch.cuda.is_available():
        parser.exit(2, "there is no CUDA device\n")
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    lines = []
    for line in tables(options):
        lines.append(line)
        print(line, flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
