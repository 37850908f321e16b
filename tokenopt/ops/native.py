"""Native kernels of operations: who has one, and when it may stand in for the torch reference."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# (operation, device type) -> "module:function". A module that cannot work on this machine raises ImportError when it is
# imported, and the reference is used; one that takes some tensors only has a function ``supported`` of them.
_KERNELS = {
    ("attention", "cuda"): "tokenopt.kernels.flash:attention",
    ("neighborhood_attention", "cpu"): "tokenopt.native.neighborhood:neighborhood_attention",
    ("neighborhood_attention", "cuda"): "tokenopt.kernels.neighborhood:neighborhood_attention",
    ("block_sparse_attention", "cuda"): "tokenopt.kernels.block_sparse:block_sparse_attention",
    ("tiled_attention", "cuda"): "tokenopt.kernels.block_sparse:tiled_attention",
    ("attention_probe", "cuda"): "tokenopt.kernels.probe:attention_probe",
    ("attention_received", "cuda"): "tokenopt.kernels.probe:attention_received",
    ("match_bipartite", "cuda"): "tokenopt.kernels.reduce:match_bipartite",
    ("merge_tokens", "cuda"): "tokenopt.kernels.reduce:merge_tokens",
}
_off = False
_DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool}


def native(name: str, *tensors: Tensor | None) -> Callable[..., Any] | None:
    """The kernel of an operation for these tensors, or None: then the reference has to do it.

    A kernel is opaque, so it is only for plain tensors of one device that nobody traces, differentiates or transforms.
    ``TOKENOPT_KERNELS=0`` turns all kernels off.

    Args:    tensors: all that the kernel would read; None stands for one that is not given.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    target = _KERNELS.get((name, given[0].device.type))
    if target is None or _off or os.environ.get("TOKENOPT_KERNELS") == "0" or _observed():
        return None
    device = given[0].device
    if not all(_plain(tensor) and tensor.device == device for tensor in given):
        return None
    kernel, supported = _load(target) if device.type != "cuda" or _triton_runs(device) else (None, None)
    return kernel if supported is None or supported(*given) else None


@contextmanager
def disabled() -> Iterator[None]:
    """References only."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def _plain(tensor: Tensor) -> bool:
    """A tensor with memory of its own that no gradient flows through: no fake, functional or other subclass."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype in _DTYPES
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and not torch._is_functional_tensor(tensor)
    )


def _observed() -> bool:
    """Whether something follows the operations: a tracer, a dispatch mode, a transform of torch.func, forward AD."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


@functools.cache
def _load(target: str) -> tuple[Callable[..., Any] | None, Callable[..., bool] | None]:
    """The kernel, and what says which tensors it takes."""
    name, _, function = target.partition(":")
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None, None
    return getattr(module, function), getattr(module, "supported", None)


@functools.cache
def _triton_runs(device: torch.device) -> bool:
    """Whether Triton is there, has what it needs (a C compiler), and knows the device well (Ampere or newer)."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        import triton

        triton.runtime.driver.active.get_current_target()
    except ImportError:
        return False
    except Exception as error:  # whatever a compiler may fail with
        warnings.warn(f"Triton does not work here ({error}); operations run as torch references", stacklevel=2)
        return False
    return True
