"""TensorRT engines, by ``tensorrt`` or by ``tensorrt_rtx``, which have the same interface.

``tensorrt_rtx`` builds without a GPU, for a named compute capability; to run an engine takes a GPU with either.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import mmap
import re
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenopt.errors import LoweringError, UsageError
from tokenopt.program import InputSpec, Program
from tokenopt.runtimes import onnx as onnx_runtime
from tokenopt.runtimes.base import Capabilities, Engine, replacing, require_same_interface, same_specs
from tokenopt.runtimes.plugins import NeighborhoodAttention, problems_of, write_plugins

BATCH_PROFILE = (1, 8, 64)
COMPUTE_CAPABILITY = "8.9"

_BUILDER = Path(__file__).with_name("tensorrt_build.py")
_MARKER = "tokenopt-engine:"
_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "INT8": "int8",
    "UINT8": "uint8", "BOOL": "bool", "FP8": "float8_e4m3fn",
}  # fmt: skip


@dataclass(frozen=True)
class Description:
    """What an engine says of itself: the package and version that built it, for which GPUs, and its interface."""

    module: str
    version: str
    compute_capability: str | None
    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    batch: tuple[int, int, int] | None


@dataclass
class TensorRTEngine(Engine):
    """A serialised engine. Its interface is known everywhere; to run it takes a GPU."""

    description: Description = field(kw_only=True)
    _opened: tuple[Any, ...] = field(default=(), init=False, repr=False)

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def unavailable(self) -> str | None:
        module = self.description.module
        if importlib.util.find_spec(module) is None:
            return f"it was built by {module}, which is not installed"
        if not torch.cuda.is_available():
            return f"an engine of {module} runs on an NVIDIA GPU, and there is none"
        here, wanted = ".".join(map(str, torch.cuda.get_device_capability())), self.description.compute_capability
        if wanted not in (None, here):
            return f"it was built for compute capability {wanted}, and the GPU here has {here}"
        return None

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self._opened = self._opened or self._open()
        *_, context, stream = self._opened
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Held until the stream is done: TensorRT knows addresses only.
            held = [value.to("cuda").contiguous() for value in inputs]
            for spec, value in zip(self.inputs, held, strict=True):
                context.set_input_shape(spec.name, tuple(value.shape))
                context.set_tensor_address(spec.name, value.data_ptr())
            outputs = []
            for spec in self.outputs:
                shape = tuple(context.get_tensor_shape(spec.name))
                outputs.append(torch.empty(shape, dtype=getattr(torch, spec.dtype), device="cuda"))
                context.set_tensor_address(spec.name, outputs[-1].data_ptr())
            if not context.execute_async_v3(stream.cuda_stream):
                raise LoweringError("the engine failed to run", where=str(self.path))
            outputs = [value.to(inputs[0].device) for value in outputs] if inputs else outputs
        stream.synchronize()
        return outputs

    def _open(self) -> tuple[Any, ...]:
        """Runtime and engine, which a context needs alive, the context and a stream; if the engine is what it says."""
        trt = importlib.import_module(self.description.module)
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(Path(self.path).read_bytes())
        if engine is None:
            raise LoweringError(
                "the engine cannot be opened",
                where=str(self.path),
                why=f"it was built by {self.description.module} {self.description.version} for compute capability "
                f"{self.description.compute_capability or 'of another machine'}; this is {trt.__version__} on "
                f"{'.'.join(map(str, torch.cuda.get_device_capability()))}",
                hint="build it again on this machine",
            )
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found: dict[bool, list[InputSpec]] = {True: [], False: []}
        for name in names:
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            spec = _spec(name, engine.get_tensor_dtype(name).name, engine.get_tensor_shape(name))
            found[is_input].append(spec)
        for said, there in ((self.inputs, found[True]), (self.outputs, found[False])):
            order = {spec.name: spec for spec in there}
            there = [order[spec.name] for spec in said if spec.name in order]
            if len(order) != len(said) or not same_specs(said, there):
                raise LoweringError("the engine is not what it says it is", where=str(self.path), why=f"it has {names}")
        return runtime, engine, engine.create_execution_context(), torch.cuda.Stream()


class TensorRT:
    """TensorRT. Builds and runs on a machine with an NVIDIA GPU, for that GPU."""

    name = "tensorrt"
    suffix = ".engine"
    module = "tensorrt"
    capabilities = Capabilities(
        max_topk=3840, scatter_reduce=False, data_dependent_shapes=False, attention_windows=False
    )

    _needs_gpu = True

    def available(self) -> str | None:
        if importlib.util.find_spec(self.module) is None:
            return f"the package {self.module.replace('_', '-')} is not installed: pip install tokenopt[{self.name}]"
        if self._needs_gpu and not torch.cuda.is_available():
            return f"{self.module} builds engines on a machine with an NVIDIA GPU only"
        return None

    def build(
        self,
        program: Program,
        path: Path,
        *,
        opset: int = onnx_runtime.OPSET,
        compute_capability: str | None = None,
        batch_profile: tuple[int, int, int] = BATCH_PROFILE,
        tf32: bool = False,
        plugins: bool = False,
        tolerance: float | None = None,
        data: Sequence[Sequence[Tensor]] = (),
        source: Engine | None = None,
    ) -> TensorRTEngine:
        """Exports to ONNX, proves that in ONNX Runtime, builds an engine from it and reads its interface back.

        Where there is a GPU the engine itself is run and compared with the program, too.

        Args:
            opset: of the ONNX file in between.
            compute_capability: of the GPU to build for, "8.9" for instance; by default that of this machine's GPU, and
                8.9 where there is none.
            batch_profile: the smallest, the usual and the largest batch size, where the batch is dynamic.
            tf32: lets single-precision products round their operands to 10 bits, which is faster.
            plugins: attention in windows runs as Triton kernels, which the engine holds, instead of in tiles; see
                `plugins.write_plugins`. It takes triton, and has not been run with TensorRT yet.
            tolerance: see `prove`.
            data: batches of inputs to compare on besides random ones and the example.
            source: the program as an ONNX file that was proved already, instead of a new one; one of a program with
                attention patterns is written with ``cpu`` and ``named`` False.

        Raises:
            LoweringError: if TensorRT is not there, cannot express the program, or fails; with its messages.
            ParityError: if the file or the engine computes something else.
        """
        from tokenopt.runtimes.compare import Check, prove

        path = Path(path)
        reason = self.available()
        if reason is not None:
            raise LoweringError(f"{self.name} cannot be used", why=reason)
        low, usual, high = batch_profile
        if not 1 <= low <= usual <= high:
            raise UsageError("the batch profile is not in order", why=str(batch_profile), hint="for instance 1, 8, 64")
        capability = self._capability(compute_capability)
        problems = self._problems(program) if plugins else {}
        with replacing(path) as staged, tempfile.TemporaryDirectory(prefix=".onnx-", dir=staged.parent) as scratch:
            if source is None:
                onnx_path = Path(scratch) / "model.onnx"
                source = onnx_runtime.Onnx().build(
                    program, onnx_path, opset=opset, cpu=False, named=False, tolerance=tolerance, data=data
                )
            network, module = source.path, None
            if problems:
                network, module = Path(scratch) / "plugins.onnx", Path(scratch) / "tokenopt_plugins.py"
                onnx_runtime.write(program, network, opset, cpu=False, named=False, plugins=True)
                write_plugins(module, list(problems), dtypes=[*set(problems.values())], capabilities=[_device()])
            self._require_expressible(network)
            self._build(network, staged, capability, batch_profile, tf32, module)
            engine = self.load(staged)
            require_same_interface(program, engine.inputs, engine.outputs, str(path))
            engine.parity = list(source.parity)
            if engine.runnable:
                engine.parity += prove(program, engine, tolerance, data)
            else:
                engine.parity.append(Check(self.name, "shapes", 0, source.parity[0].tolerance))
        engine.path = path
        return engine

    def load(self, path: Path, *, threads: int | None = None) -> TensorRTEngine:
        """Opens an engine that tokenopt built, with either package.

        Raises:
            LoweringError: if the file is none.
        """
        path = Path(path)
        description = read_description(path)
        batch = description.batch
        return TensorRTEngine(
            path,
            description.module.replace("_", "-"),
            description.inputs,
            description.outputs,
            batch_limits=(1, None) if batch is None else (batch[0], batch[2]),
            description=description,
        )

    def _capability(self, wanted: str | None) -> str | None:
        if wanted is not None:
            raise UsageError("tensorrt builds for this machine's GPU", hint="drop the compute capability")
        return None

    def _problems(self, program: Program) -> dict[NeighborhoodAttention, torch.dtype]:
        """The attentions of a program that plugins compute."""
        problems = problems_of(program)
        if not problems:
            why = "plugins are for Neighborhood patterns, on attention without a bias"
            raise LoweringError("no attention of this program is for a plugin", why=why, hint="leave plugins out")
        return problems

    def _require_expressible(self, path: Path) -> None:
        import onnx

        model = onnx.load(path, load_external_data=False)
        onnx_runtime.require_expressible(model, self.capabilities, self.name)

    def _build(
        self, source: Path, path: Path, capability: str | None, batch: tuple[int, int, int], tf32: bool,
        plugins: Path | None = None,
    ) -> None:  # fmt: skip
        request = {
            "module": self.module,
            "onnx": str(source),
            "engine": str(path),
            "batch": batch,
            "compute_capability": capability,
            "tf32": tf32,
            "plugins": None if plugins is None else str(plugins),
            "marker": _MARKER,
        }
        # -P: the script's folder, in which modules are called onnx and tensorrt, is not searched.
        done = subprocess.run(
            [sys.executable, "-P", str(_BUILDER)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            why, where = _failure(done)
            raise LoweringError(
                f"{self.name} cannot build the engine",
                where=where,
                why=why,
                hint="another opset or runtime may do; TensorRT's documentation explains its messages",
            )


class TensorRTRTX(TensorRT):
    """TensorRT for RTX. Builds on any machine, for a named compute capability; runs on an NVIDIA GPU."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"
    _needs_gpu = False

    def _capability(self, wanted: str | None) -> str | None:
        if wanted is not None and not re.fullmatch(r"\d+\.\d", wanted):
            raise UsageError(f"{wanted!r} is no compute capability", hint=f"for instance {COMPUTE_CAPABILITY}")
        return wanted if wanted or torch.cuda.is_available() else COMPUTE_CAPABILITY

    def _problems(self, program: Program) -> dict[NeighborhoodAttention, torch.dtype]:
        raise UsageError("tensorrt-rtx has no plugins in Python", hint="build for tensorrt, or leave plugins out")


def _device() -> int:
    """The compute capability of the GPU here: 89 is sm_89."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def read_description(path: Path) -> Description:
    """What an engine says of itself, read from its file without TensorRT and without a GPU.

    Raises:
        LoweringError: if the file is no engine, or none of tokenopt's.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = re.search(rb"%s([A-Za-z0-9+/=]+);" % _MARKER.encode(), data)
            text = found.group(1) if found else None
    except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
        raise LoweringError("the engine cannot be read", where=str(path), why=str(error)) from error
    try:
        if text is None:
            raise ValueError("it has no description")
        raw = json.loads(zlib.decompress(base64.b64decode(text)))
    except (ValueError, zlib.error) as error:
        raise LoweringError(
            "this is not an engine that tokenopt built", where=str(path), why=str(error), hint="export it again"
        ) from error
    return Description(
        raw["module"],
        raw["version"],
        raw["compute_capability"],
        tuple(_spec(*spec) for spec in raw["inputs"]),
        tuple(_spec(*spec) for spec in raw["outputs"]),
        None if raw["batch"] is None else tuple(raw["batch"]),
    )


def _spec(name: str, dtype: str, shape: Sequence[int]) -> InputSpec:
    return InputSpec(name, _DTYPES.get(dtype, dtype.lower()), tuple("batch" if s == -1 else int(s) for s in shape))


def _failure(done: subprocess.CompletedProcess[str]) -> tuple[str, str | None]:
    """Why a build failed, with TensorRT's messages, and at which node."""
    log = [re.sub(r"^\[[^\]]*\] ", "", line) for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode < 0:
        reason = f"the builder was ended by {signal.Signals(-done.returncode).name}"
    elif log and log[-1].startswith('{"error"'):
        failure = json.loads(log.pop())
        if failure["where"] is not None:  # what TensorRT logged then says the same at length
            return failure["error"], failure["where"]
        reason = failure["error"]
    else:
        reason = f"the builder ended with code {done.returncode}"
    return "\n".join([reason, *(f"         {line[:300]}" for line in log[-5:])]), None
