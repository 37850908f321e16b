"""``import tokenopt`` needs torch alone, and is fast."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import tokenopt

# The other dependencies and the extras, without networkx and triton, which torch itself depends on.
OTHERS = (
    "onnx onnxscript onnxruntime typer rich safetensors yaml timm torchvision transformers diffusers tensorrt "
    "tensorrt_rtx sklearn PIL optuna ray"
).split()

PUBLIC = """
AttentionSite Pass Pipeline Program Report Rule Schedule StreamCut TokenRecipe TokenoptError attention axis_rule
calibrate capture export inspect load ok optimize recipes refuse runtimes
""".split()


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_alone_is_enough() -> None:
    """With all other packages missing, tokenopt imports, captures a model and says what is wrong with another."""
    run(
        f"""
import sys, torch
sys.modules.update(dict.fromkeys({OTHERS!r}))  # None: importing it raises ImportError
import tokenopt
assert len(tokenopt.capture(torch.nn.Linear(2, 3), torch.randn(2, 2)).outputs) == 1
try:
    tokenopt.capture(torch.nn.Linear(2, 3), torch.randn(2, 5))
except tokenopt.TokenoptError as error:
    assert "cannot be captured" in str(error)
"""
    )


def test_import_is_fast_and_loads_nothing_else() -> None:
    """Under a fifth of a second beyond ``import torch``: the median, since the first may read from a cold disk."""
    code = """
import json, sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import tokenopt
print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))
"""
    results = [json.loads(run(code)) for _ in range(3)]
    assert statistics.median(seconds for seconds, _ in results) < 0.2
    assert not {name.partition(".")[0] for _, names in results for name in names} & set(OTHERS)


def test_public_names() -> None:
    """Every public name resolves; one is added or removed on purpose only."""
    assert sorted(tokenopt.__all__) == sorted(PUBLIC)
    assert len(PUBLIC) <= 22
    for name in PUBLIC:
        assert getattr(tokenopt, name) is not None
