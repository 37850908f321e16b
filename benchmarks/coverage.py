"""Coverage: what tokenopt finds and does on every architecture of the zoo, as a table.

    python -m benchmarks.coverage [PART-OF-NAME ...] [--onnx] [--engine] [--out benchmarks/results/coverage.md]

Per architecture: attention sites found of those that one forward computes (counted in the zoo), how many are in
canonical form, how many may be reduced, the tokens that enter and leave, the identity error (every reduction inserted,
nothing removed, against the eager model), and the parity of ONNX Runtime and of a TensorRT-RTX engine build. A model
whose sites cannot be reduced shows the first reason.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo import ZOO, Entry
from tokenopt.analysis.axes import propagate
from tokenopt.analysis.cuts import find_cuts
from tokenopt.analysis.sites import find_sites
from tokenopt.errors import TokenoptError
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program, capture, flatten_tensors
from tokenopt.runtimes import get

TOLERANCE = 1e-4


@dataclass
class Row:
    """One line of the table; empty fields were not reached."""

    name: str
    family: str
    sites: str = ""
    raised: str = ""
    legal: str = ""
    tokens: str = ""
    identity: str = ""
    onnxruntime: str = ""
    engine: str = ""
    seconds: float = 0.0
    note: str = ""
    failed: bool = False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--onnx", action="store_true", help="export dense and reduced, and compare in ONNX Runtime")
    parser.add_argument("--engine", action="store_true", help="build a TensorRT-RTX engine of the reduced model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore")
    names = [n for n in ZOO if not options.names or any(part in n for part in options.names)]
    rows = []
    for name in names:
        start = time.perf_counter()
        row = cover(name, ZOO[name], options.onnx, options.engine)
        row.seconds = time.perf_counter() - start
        rows.append(row)
        print(line(row), flush=True)
        if options.out is not None:  # after every row: a run takes long
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(table(rows, options.onnx, options.engine))
    print(table(rows, options.onnx, options.engine))
    return int(any(r.failed for r in rows))


def cover(name: str, entry: Entry, onnx: bool, engine: bool) -> Row:
    """One architecture, as far as it gets."""
    row = Row(name, entry.family)
    try:
        torch.manual_seed(0)
        model, inputs = entry.build()
        program = capture(model, inputs, dynamic_batch=entry.dynamic)
        dense = canonicalize(program).program
        axes = propagate(dense)
        sites, _ = find_sites(axes)
        cuts, refusals = find_cuts(axes, sites)
        constant = _constant_attentions(program)  # a decoder's first layer over learned queries folds away
        row.sites = f"{len(sites) + constant}/{entry.attentions}"
        row.raised = str(sum(s.raised for s in sites))
        row.legal = str(len(cuts))
        row.failed |= len(sites) + constant != entry.attentions or (entry.plain_encoder and not cuts)
        if axes.opaque:
            row.note = f"no axis rule: {', '.join(sorted({str(n.target) for n in axes.opaque}))}"
        if not cuts and refusals:
            row.note = row.note or f"{refusals[-1].where}: {refusals[-1].why}"
        neutral = Pipeline([ReduceTokens("tome", neutral=True)]).run(dense).program
        args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
        error = _difference(flatten_tensors(model(*args, **kwargs)), neutral.flat(*args, **kwargs))
        row.identity = f"{error:.0e}"
        row.failed |= not error < TOLERANCE
        step = ReduceTokens("tome", {"r": max(1, (cuts[0].segment.length // 8) if cuts else 1)})
        reduced = Pipeline([step, RemoveDead()]).run(dense)
        if reduced.edits:
            edits = [e for e in reduced.edits if e.before]
            row.tokens = f"{edits[0].before} -> {edits[-1].after}"
        reduced.program.flat(*args, **kwargs)
        if onnx:
            row.onnxruntime = _parity(reduced.program)
            row.failed |= "x " in row.onnxruntime
        if engine:
            row.engine = _engine(reduced.program)
            row.failed |= row.engine.startswith("x ")
    except TokenoptError as error:
        row.failed = True
        row.note = f"{type(error).__name__}: {error.what} ({error.why})"
    except Exception as error:  # a finding, too: the table must go on
        row.failed = True
        row.note = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    return row


def _constant_attentions(program: Program) -> int:
    """Attentions that do not depend on the inputs."""
    data = propagate(program).data
    fused = torch.ops.aten.scaled_dot_product_attention.default
    return sum(n.target is fused and n not in data for n in program.graph.nodes)


def _difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.numel() and a.is_floating_point():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1.0)))
    return worst


def _parity(program: Program) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            engine = get("onnxruntime").build(program, Path(folder) / "model.onnx")
            args, kwargs = program.example_inputs
            tensors = flatten_tensors((args, kwargs))
            return f"{_difference(program.flat(*args, **kwargs), engine(*tensors)):.0e}"
        except TokenoptError as error:
            return f"x {error.what}"


def _engine(program: Program) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            get("tensorrt-rtx").build(program, Path(folder) / "model.engine")
            return "built"
        except TokenoptError as error:
            return f"x {error.why or error.what}"


def line(row: Row) -> str:
    mark = "FAIL" if row.failed else "ok  "
    parts = [row.sites, row.raised, row.legal, row.tokens, row.identity, row.onnxruntime, row.engine, row.note]
    return f"{mark} {row.name:<40} {' | '.join(p for p in parts if p)}"


def table(rows: list[Row], onnx: bool, engine: bool) -> str:
    """The rows as Markdown, with totals and versions."""
    heads = ["model", "family", "sites", "canonical", "reducible", "tokens", "identity error"]
    heads += ["ONNX Runtime"] * onnx + ["TensorRT-RTX"] * engine + ["why not"]
    lines = [_cells(heads), _cells(["---"] * len(heads))]
    for r in rows:
        cells: list[Any] = [r.name, r.family, r.sites, r.raised, r.legal, r.tokens, r.identity]
        cells += [r.onnxruntime] * onnx + [r.engine] * engine + [r.note]
        lines.append(_cells([str(c).replace("|", "/") for c in cells]))
    good = sum(not r.failed for r in rows)
    reduced = sum(bool(r.tokens) for r in rows)
    return "\n".join([
        "# Coverage", "",
        f"{len(rows)} architectures, {good} without a finding; {reduced} reduced by ToMe.",
        f"Identity error: largest relative difference to the eager model, limit {TOLERANCE:.0e}.",
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}.", "", *lines, "",
    ])  # fmt: skip


def _cells(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


if __name__ == "__main__":
    sys.exit(main())
