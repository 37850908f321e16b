"""Kernels for the CPU in C++, compiled by the system's compiler when they are first used.

Nothing else needs this package: without a compiler `reason` says so, and the portable operations do the same work.
"""

from __future__ import annotations

from tokenopt.native.neighborhood import neighborhood_attention, reason, supported

__all__ = ["neighborhood_attention", "reason", "supported"]
