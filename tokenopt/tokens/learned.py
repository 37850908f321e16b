"""Learned scores: small networks that predict an expensive or later score from a token's features."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tokenopt.errors import UsageError
from tokenopt.tokens.plan import Refused


def load_scorer(path: Path, key: str, width: int) -> list[tuple[Tensor, Tensor]]:
    """The layers (weight, bias) of one scorer in a .safetensors file.

    Raises:
        UsageError: if the file cannot be read, or its scorer is of another width.
        Refused: if it holds none of that key.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError("the weights of the score cannot be read", where=str(path), why=str(error)) from error
    layers = []
    while f"{key}.{len(layers)}.weight" in tensors:
        layers.append((tensors[f"{key}.{len(layers)}.weight"], tensors[f"{key}.{len(layers)}.bias"]))
    if not layers:
        raise Refused(f"no score was learned for {key}", "learn it with this layer in the schedule")
    if layers[0][0].shape[1] != width:
        why = f"it is for {layers[0][0].shape[1]} features, and there are {width}"
        raise UsageError("the weights do not fit the score", where=str(path), why=why)
    return layers
