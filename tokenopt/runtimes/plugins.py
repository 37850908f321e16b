"""Writes TensorRT plugins for the attention kernels: one Python file, to be imported before a network is built.

The plugins are quickly deployable ones, compiled ahead of time (`tensorrt.plugin.aot_impl`): the file holds PTX for
each problem, element type and device, TensorRT copies it into the engine, and the engine needs neither Python nor the
file. Writing the file needs triton and no GPU; importing it needs tensorrt, from 10.9 on, and from 10.10 on for the
ONNX parser to find an operator by its domain. TensorRT-RTX has no Python plugins. TensorRT 11.1 and 11.2 are reported
to leak memory when the shapes of such a plugin change between runs (github.com/NVIDIA/TensorRT/issues/4849).
`TensorRT.build` does all that when it is asked for plugins: it writes the network with their nodes, and the file.

**Not yet run with TensorRT.** Checked are the constants against the kernel in Triton's interpreter, the PTX with ptxas,
the order of arguments and the launch against a stand-in for `tensorrt.plugin`, and the network with its nodes computed
in NumPy.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenopt.errors import LoweringError, UsageError
from tokenopt.ops.attention import attention

if TYPE_CHECKING:
    from tokenopt.kernels.aot import Ptx
    from tokenopt.kernels.tuning import Config
    from tokenopt.program import Program

# A launch with more than 48 KB of dynamic shared memory has to be asked for, and nothing says that TensorRT does so.
SHARED_LIMIT = 48 * 1024
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class NeighborhoodAttention:
    """A node of a network: everything but the batch is fixed.

    heads, tokens, dim, out_dim: query and key are [batch, tokens, heads, dim], value ends in out_dim.
    start, grid, window, stride, dilation, causal, scale: as in tokenopt.kernels.neighborhood.
    biased: there is a fourth input, the key bias, float32 [batch, tokens].
    """

    heads: int
    tokens: int
    dim: int
    out_dim: int
    start: int
    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    scale: float
    biased: bool = False

    @staticmethod
    def of(
        query: Tensor, value: Tensor, key_bias: Tensor | None, *, start: int, grid: Sequence[int],
        window: Sequence[int], stride: Sequence[int], dilation: Sequence[int], causal: Sequence[bool],
        scale: float | None = None,
    ) -> NeighborhoodAttention:  # fmt: skip
        """The node of a call of `tokenopt::neighborhood_attention`; its tensors may be fake."""
        _, heads, tokens, dim = query.shape
        axes = (tuple(map(int, sizes)) for sizes in (grid, window, stride, dilation))
        scale = dim**-0.5 if scale is None else scale
        return NeighborhoodAttention(
            heads, tokens, dim, value.shape[3], start, *axes, tuple(map(bool, causal)), scale, key_bias is not None
        )

    @property
    def name(self) -> str:
        """The value of the node's attribute `problem`, by which the plugin finds its kernel."""

        def times(sizes: tuple[int, ...]) -> str:
            return "x".join(str(int(size)) for size in sizes)

        return (
            f"grid{times(self.grid)}-window{times(self.window)}-stride{times(self.stride)}"
            f"-dilation{times(self.dilation)}-causal{times(self.causal)}-start{self.start}-tokens{self.tokens}"
            f"-heads{self.heads}-dim{self.dim}-out{self.out_dim}-scale{self.scale!r}{'-biased' * self.biased}"
        )


def problems_of(program: Program) -> dict[NeighborhoodAttention, torch.dtype]:
    """The attentions of a program that are nodes of plugins, and the types of their elements."""
    found = {}
    for node in program.graph.nodes:
        if node.target is torch.ops.tokenopt.neighborhood_attention.default:
            query, _, value, *tables = (None if n is None else n.meta["val"] for n in node.args)
            key_bias = tables[5] if len(tables) > 5 else None
            found[NeighborhoodAttention.of(query, value, key_bias, **node.kwargs)] = query.dtype
    return found


def plugin_node(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, order: Tensor, rows: Tensor,
    mask: Tensor | None = None, key_bias: Tensor | None = None, *, start: int, **axes: Any,
) -> Tensor:  # fmt: skip
    """`tokenopt::neighborhood_attention` as a node of a plugin, which reads the grid in place and needs no tables."""
    from torch.onnx import ops as onnx_ops

    problem = NeighborhoodAttention.of(query, value, key_bias, start=start, **axes)
    inputs = [x.transpose(1, 2) for x in (query, key, value)]
    name = "tokenopt::neighborhood_attention"
    if key_bias is not None:
        name, inputs = f"{name}_biased", [*inputs, key_bias.float()]
    shape = (query.shape[0], *_shapes(problem)[1])
    out = onnx_ops.symbolic(name, inputs, {"problem": problem.name}, dtype=query.dtype, shape=shape).transpose(1, 2)
    if not rows.shape[0]:
        return out
    few = attention(query.index_select(2, rows), key, value, None, key_bias, scale=problem.scale)
    return torch.cat([few[:, :, :start], out, few[:, :, start:]], 2)


def write_plugins(
    path: Path,
    problems: Sequence[NeighborhoodAttention],
    *,
    dtypes: Sequence[torch.dtype] = (torch.float16,),
    capabilities: Sequence[int] = (80, 89, 90, 100),
) -> None:
    """Compiles a kernel for every problem, element type and device, and writes the file with the plugins.

    The node is `tokenopt::neighborhood_attention(query, key, value, problem="...")`, or
    `tokenopt::neighborhood_attention_biased(query, key, value, key_bias, problem="...")`: in ONNX the domain and the
    type of the operator. It gives [batch, prod(grid), heads, out_dim].

    Args:
        path: of the Python file.
        capabilities: 89 is sm_89. A device that is not among them runs the best one below 90, which any later device
            can: include 80.

    Raises:
        UsageError: windows without a meaning, or sizes that the kernel does not take.
        LoweringError: no tile of a problem fits in 48 KB of shared memory.
    """
    kernels = {}
    for problem, dtype, capability in itertools.product(dict.fromkeys(problems), dtypes, capabilities):
        ptx, constants = compile_problem(problem, dtype, capability)
        packed = base64.b85encode(zlib.compress(ptx.text.encode(), 9)).decode()
        launch = (ptx.name, 32 * ptx.num_warps, ptx.shared, constants["TILES"] * problem.heads)
        kernels[problem.name, str(dtype).removeprefix("torch."), capability] = (*launch, packed)
    table = {problem.name: _shapes(problem) for problem in problems}
    lines = [
        _HEADER,
        "PROBLEMS = {",
        *(f"    {name!r}: {shapes!r}," for name, shapes in table.items()),
        "}",
        "",
        "# (problem, type, capability): (entry, threads, bytes of shared memory, programs per sample, PTX)",
        "KERNELS = {",
        *(f"    {key!r}: {kernel!r}," for key, kernel in kernels.items()),
        "}",
        _BODY,
    ]
    path.write_text("\n".join(lines))


def compile_problem(problem: NeighborhoodAttention, dtype: torch.dtype, capability: int) -> tuple[Ptx, dict[str, Any]]:
    """The kernel, and the constants that are compiled into it. Its arguments are the inputs, heads, and the output."""
    from tokenopt.kernels import aot, neighborhood, tuning

    window = max(problem.window)
    first = tuning.lookup_for("neighborhood", capability, dtype, problem.dim, math.prod(problem.grid), window)
    for keys, stages in itertools.product((first.keys, 32, 16), (first.num_stages, 1)):
        config = dataclasses.replace(first, keys=min(keys, first.keys), num_stages=min(stages, first.num_stages))
        constants = kernel_constants(problem, config)
        pointer = f"*{_TYPES[dtype]}:16"
        signature = {"query": pointer, "key": pointer, "value": pointer, "heads": "i32", "out": pointer}
        if problem.biased:
            signature["bias"] = "*fp32:16"
        ptx = aot.ptx(
            neighborhood.neighborhood_kernel,
            signature,
            constants,
            capability,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if ptx.shared <= SHARED_LIMIT:
            return ptx, constants
    raise LoweringError(
        f"no plugin for heads of {problem.dim} elements in {dtype}",
        where=problem.name,
        why=f"its tiles need {ptx.shared} bytes of shared memory, more than {SHARED_LIMIT}",
    )


def kernel_constants(problem: NeighborhoodAttention, config: Config) -> dict[str, Any]:
    """All arguments of the kernel but its tensors and heads, for contiguous tensors."""
    from tokenopt.kernels import neighborhood, online

    if max(problem.dim, problem.out_dim) > online.MAX_HEAD_DIM or not problem.scale > 0:
        why = f"a head may have {online.MAX_HEAD_DIM} elements, and the scale must be positive"
        raise UsageError("this attention has no kernel", where=problem.name, why=why)
    windows = (problem.grid, problem.window, problem.stride, problem.dilation, problem.causal)
    neighborhood.check_windows(problem.tokens, problem.tokens, problem.start, *windows)
    cells = math.prod(problem.grid)
    constants = neighborhood.launch_constants(
        *windows, extra=problem.tokens > cells, dim=problem.dim, out_dim=problem.out_dim, config=config
    )
    strides: dict[str, Any] = {}
    for name, tokens, width in (
        ("query", problem.tokens, problem.dim),
        ("key", problem.tokens, problem.dim),
        ("value", problem.tokens, problem.out_dim),
        ("out", cells, problem.out_dim),
    ):
        row = problem.heads * width
        strides |= {f"{name}_b": tokens * row, f"{name}_h": width, f"{name}_n": row, f"{name}_d": 1}
    strides |= {"bias_b": problem.tokens, "bias_n": 1} if problem.biased else {"bias": None, "bias_b": 0, "bias_n": 0}
    places = {"start_token": problem.start, "extras": problem.tokens - cells}
    return constants | strides | places | {"SCALE": online.exponent_scale(problem.scale)}


def _shapes(problem: NeighborhoodAttention) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the query and of the output, less the batch."""
    return (problem.tokens, problem.heads, problem.dim), (math.prod(problem.grid), problem.heads, problem.out_dim)


_HEADER = '''"""TensorRT plugins of tokenopt, written by tokenopt.runtimes.plugins; do not edit.

Import this file before a network with these operators is parsed or built, with TensorRT 10.10 or newer. The engine
holds the kernels and needs nothing of this file. Not yet run with TensorRT.
"""

# Annotations must be objects here, as tensorrt.plugin reads them: no `from __future__ import annotations`.
import base64
import ctypes
import os
import zlib

import tensorrt as trt
import tensorrt.plugin as trtp

# (query, output) of a problem, less the batch'''

_BODY = '''
TYPES = {trt.float16: "float16", trt.bfloat16: "bfloat16", trt.float32: "float32"}
NAMES = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}


def capability():
    """Of the current device: 89 is sm_89."""
    cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuCtxGetDevice(ctypes.byref(device)) != 0:  # no context yet
        cuda.cuInit(0)
        cuda.cuDeviceGet(ctypes.byref(device), 0)
    for attribute, value in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            raise RuntimeError("the compute capability of the device cannot be read")
    return 10 * major.value + minor.value


def find(problem, dtype):
    """The kernel for this device. PTX for 90 and later runs on exactly that device, older PTX on all later ones."""
    device = capability()
    there = [at for name, of, at in KERNELS if name == problem and of == TYPES[dtype]]
    fitting = [at for at in there if at == device or at < min(device, 90)]
    if not fitting:
        raise ValueError(f"no kernel in this file for {problem} in {TYPES[dtype]} on sm_{device}; it has {there}")
    return KERNELS[problem, TYPES[dtype], max(fitting)]


def describe(query, problem):
    if problem not in PROBLEMS:
        raise ValueError(f"this file has no problem {problem}; it has {list(PROBLEMS)}")
    return trtp.from_shape_expr((query.shape_expr[0], *PROBLEMS[problem][1]), dtype=query.dtype)


def launch(query, problem):
    for axis, size in enumerate(PROBLEMS[problem][0], 1):
        have = query.shape_expr[axis]
        if not have.is_fake and have.is_constant and have.constant_value() != size:
            raise ValueError(f"axis {axis} of the query is {have.constant_value()}, not {size} as in {problem}")
    entry, threads, shared, programs, packed = find(problem, query.dtype)
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x = query.shape_expr[0] * programs
    parameters.block_x = threads
    parameters.shared_mem = shared
    extra = trtp.SymIntExprs(1)
    extra[0] = trtp.SymInt32(PROBLEMS[problem][0][1])  # heads
    return entry.encode(), zlib.decompress(base64.b85decode(packed)), parameters, extra


def types(inputs, bias):
    """Queries, keys, values and outputs of one type, and a key bias in float32."""
    one = "|".join(NAMES[of] for of in dict.fromkeys(of for _, of, _ in KERNELS))
    return [trtp.AutoTuneCombination(",".join([one] * inputs + ["FP32"] * bias + [one]))]


@trtp.register("tokenopt::neighborhood_attention")
def _(query: trtp.TensorDesc, key: trtp.TensorDesc, value: trtp.TensorDesc, problem: str) -> trtp.TensorDesc:
    return describe(query, problem)


@trtp.autotune("tokenopt::neighborhood_attention")
def _(query, key, value, problem, outputs):
    return types(3, bias=0)


@trtp.aot_impl("tokenopt::neighborhood_attention")
def _(query, key, value, problem, outputs, tactic):
    return launch(query, problem)


@trtp.register("tokenopt::neighborhood_attention_biased")
def _(
    query: trtp.TensorDesc, key: trtp.TensorDesc, value: trtp.TensorDesc, key_bias: trtp.TensorDesc, problem: str
) -> trtp.TensorDesc:
    return describe(query, problem)


@trtp.autotune("tokenopt::neighborhood_attention_biased")
def _(query, key, value, key_bias, problem, outputs):
    return types(3, bias=1)


@trtp.aot_impl("tokenopt::neighborhood_attention_biased")
def _(query, key, value, key_bias, problem, outputs, tactic):
    return launch(query, problem)
'''
