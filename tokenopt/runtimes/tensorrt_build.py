"""Builds one engine, in a process of its own: TensorRT ends the process at some inputs instead of raising.

Run as a script, with a JSON request on standard input: ``module`` ("tensorrt" or "tensorrt_rtx"), ``onnx``, ``engine``,
``batch`` (the smallest, usual and largest), ``compute_capability`` ("8.9" or null, the one of this machine's GPU),
``tf32``, ``plugins`` (a Python file to import first, or null), ``marker``. TensorRT's messages go to standard error,
and last, if it failed, a line ``{"error": ..., "where": ...}``. It imports nothing of tokenopt, and so starts fast.

The engine carries its own description: its name is ``marker``, then what the builder knows of its inputs and outputs as
compressed JSON, then a semicolon. Without a GPU no engine can be deserialised, but its name can be read from the file.
"""

from __future__ import annotations

import base64
import importlib
import json
import sys
import zlib
from pathlib import Path
from typing import Any

NAME_LIMIT = 4095  # bytes of a network's name


class Failure(Exception):
    """Why no engine was built, and where."""

    def __init__(self, error: str, where: str | None = None) -> None:
        super().__init__(error)
        self.where = where


def main() -> int:
    """Builds what the request on standard input asks for."""
    try:
        build(json.load(sys.stdin))
    except Failure as failure:
        print(json.dumps({"error": str(failure), "where": failure.where}), file=sys.stderr)
        return 1
    return 0


def build(request: dict[str, Any]) -> None:
    """Parses, builds and writes one engine."""
    trt = importlib.import_module(request["module"])
    if request["plugins"] is not None:
        plugins = Path(request["plugins"])
        sys.path.insert(0, str(plugins.parent))
        importlib.import_module(plugins.stem)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(request["onnx"]):
        error = parser.get_error(0)
        where = " ".join(text for text in (error.node_operator(), error.node_name()) if text)
        why = error.desc()
        if why == "false":  # the text of an assertion that cannot hold
            why = f"it knows no such node ({error.code().name})"
        raise Failure(why, where or None)
    _allow_decomposed_attention(trt, network)
    config = builder.create_builder_config()
    if not request["tf32"] and hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    if request["compute_capability"] is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(trt, request["compute_capability"]), 0)
    profile = _add_profile(builder, config, network, request["batch"])
    name = request["marker"] + _describe(trt, network, profile, request) + ";"
    if len(name) > NAME_LIMIT:
        raise Failure(f"its {network.num_inputs + network.num_outputs} inputs and outputs do not fit in its name")
    network.name = name
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Failure("the builder found no implementation")
    with open(request["engine"], "wb") as file:
        file.write(engine)


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Attention for which there is no dedicated kernel, in single precision for instance, is built from others."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for i in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(i)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _capability(trt: Any, text: str) -> Any:
    name = f"SM{text.replace('.', '')}"
    known = getattr(trt, "ComputeCapability", None)
    if known is None or name not in known.__members__:
        names = [n.removeprefix("SM") for n in getattr(known, "__members__", ()) if n.startswith("SM")]
        raise Failure(f"compute capability {text} is not among {', '.join(f'{n[:-1]}.{n[-1]}' for n in names)}")
    return known.__members__[name]


def _add_profile(builder: Any, config: Any, network: Any, batch: list[int]) -> dict[str, list[int]]:
    """One profile in which the batch, the only dynamic size, varies. Returns the batched inputs' names."""
    names = []
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = list(tensor.shape)
        if -1 in shape[1:]:
            raise Failure("only the first size of an input may vary", tensor.name)
        if shape and shape[0] == -1:
            profile.set_shape(tensor.name, *([rows, *shape[1:]] for rows in batch))
            names.append(tensor.name)
    if names:
        config.add_optimization_profile(profile)
    return {name: [list(shape)[0] for shape in profile.get_shape(name)] for name in names}


def _describe(trt: Any, network: Any, profile: dict[str, list[int]], request: dict[str, Any]) -> str:
    def specs(count: int, get: Any) -> list[Any]:
        return [[get(i).name, get(i).dtype.name, list(get(i).shape)] for i in range(count)]

    description = {
        "module": request["module"],
        "version": trt.__version__,
        "compute_capability": request["compute_capability"],
        "inputs": specs(network.num_inputs, network.get_input),
        "outputs": specs(network.num_outputs, network.get_output),
        "batch": next(iter(profile.values()), None),
    }
    return base64.b64encode(zlib.compress(json.dumps(description).encode(), 9)).decode()


if __name__ == "__main__":
    sys.exit(main())
