"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """Processor, cores, and versions of torch and Python."""
    return f"{_processor()}, {os.cpu_count()} cores; torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(":")[1].strip() for x in text.splitlines() if x.startswith("model name")), platform.machine())
