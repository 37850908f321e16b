"""What every test starts from: a fixed seed, one thread, no network, and skips for what the machine lacks."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers and timm are imported: no test may download
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells have it in the background; some tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
gc.set_threshold(20_000)  # tracing makes objects by the million: at Python's own 700 it collects a tenth of the time

_NEEDS = {
    "gpu": (torch.cuda.is_available, "no CUDA device"),
    "tensorrt": (
        lambda: any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")),
        "neither tensorrt nor tensorrt_rtx is installed",
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked with something this machine does not have."""
    for marker, (available, reason) in _NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """The same random numbers in every test, whatever ran before it and in which process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _conversions() -> Iterator[None]:
    """The table of conversions to ONNX is made once: torch makes it for every export, in a good half second."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(lru_cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="module")
def small_tiles() -> Iterator[None]:
    """Small grids are cut as large ones are: tiles and gathered keys cost nothing but pairs; short runs of tokens."""
    from tokenopt.attention import pattern, tiles
    from tokenopt.passes import sparsify_attention

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_TILE", 0.0)
        patch.setattr(tiles, "_KEY", 0.0)
        patch.setitem(pattern._BOXES, 1, ((8,), (5,)))
        sparsify_attention._shared.cache_clear()
        yield
    sparsify_attention._shared.cache_clear()
