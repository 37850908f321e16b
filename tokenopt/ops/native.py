"""Kernels that compute what an operation's reference computes, where tensors are on a device that has one.

References stay the meaning of every operation, and what tracing, exporting and differentiating see; a kernel is called
only with plain tensors of values. ``TOKENOPT_KERNELS=0`` in the environment turns all of them off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_KERNELS = {
    ("neighborhood_attention", "cpu"): "tokenopt.native.neighborhood",
    ("neighborhood_attention", "cuda"): "tokenopt.kernels.neighborhood",
}
_enabled = os.environ.get("TOKENOPT_KERNELS", "1") != "0"


def kernel(name: str, *tensors: Tensor | None) -> Callable[..., Any] | None:
    """The kernel of an operation for these tensors; None where the reference computes it."""
    given = [t for t in tensors if t is not None]
    if not _enabled or torch.compiler.is_compiling() or any(type(t) not in _PLAIN for t in given):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return None
    if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:  # fake tensors, tracing
        return None
    module = _module(name, given[0].device.type)
    return getattr(module, name) if module is not None and module.supported(*given) else None


_PLAIN = (Tensor, torch.nn.Parameter)


@cache
def _module(name: str, device: str) -> Any:
    path = _KERNELS.get((name, device))
    if path is None or (device == "cuda" and find_spec("triton") is None):
        return None
    return import_module(path)


@contextmanager
def disabled() -> Iterator[None]:
    """References only."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
