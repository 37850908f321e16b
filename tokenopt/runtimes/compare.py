"""Do two models agree? Statistics per output, checks with a tolerance, and what rounding alone decides."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from tokenopt.errors import ParityError
from tokenopt.program import Program
from tokenopt.runtimes.base import Engine, describe, is_batched, same_specs
from tokenopt.runtimes.eager import EagerEngine

BATCHES = (1, 3)
TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of other dtypes:
TOLERANCE = 1e-4

_FRESH_DRAWS = 4  # of random inputs, while rounding decides every sample of a draw
_NOISE = 16  # units in the last place, on every weight: above what the order of summation changes
_TRIALS = 8


@dataclass(frozen=True)
class Statistics:
    """How far one tensor is from another.

    Args:
        max_abs: largest absolute difference; inf where one is NaN or infinite and the other is not.
        mean_abs: mean absolute difference.
        max_rel: largest difference over the largest magnitude of the reference. For integers and booleans, 0 if all
            are equal and inf otherwise: there is no almost.
        cosine: of the flattened tensors.
        argmax_agreement: share of rows whose largest entry is at the same place; None unless rows are scores of
            classes (two dimensions, more than one class, floating).
    """

    max_abs: float
    mean_abs: float
    max_rel: float
    cosine: float
    argmax_agreement: float | None

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most ``tolerance``, or at most that share of the largest magnitude."""
        return self.max_abs <= tolerance or self.max_rel <= tolerance


def compare(reference: Sequence[Tensor], other: Sequence[Tensor]) -> list[Statistics]:
    """Statistics per output.

    Raises:
        ParityError: if there are more outputs on one side, or their shapes or kinds of dtype differ.
    """
    if len(reference) != len(other):
        raise ParityError(
            "the two models return different things", why=f"{len(reference)} outputs against {len(other)}"
        )
    return [_compare(i, a, b) for i, (a, b) in enumerate(zip(reference, other, strict=True))]


def _compare(index: int, a: Tensor, b: Tensor) -> Statistics:
    if a.shape != b.shape or a.dtype.is_floating_point != b.dtype.is_floating_point:
        raise ParityError(
            "the two models return different things",
            where=f"output {index}",
            why=f"{a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}",
        )
    if a.numel() == 0:
        return Statistics(0.0, 0.0, 0.0, 1.0, None)
    floating, scores = a.dtype.is_floating_point, a.dim() == 2 and a.shape[1] > 1
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    agreement = (a.argmax(-1) == b.argmax(-1)).double().mean().item() if floating and scores else None
    same = (a == b) | (a.isnan() & b.isnan())
    finite = a.isfinite() & b.isfinite()
    difference = torch.where(same, 0.0, torch.where(finite, (a - b).abs(), math.inf))
    max_abs = difference.max().item()
    a, b = a[finite], b[finite]
    scale = a.abs().max().item() if a.numel() else 0.0
    if max_abs == 0:
        max_rel = 0.0
    else:
        max_rel = max_abs / scale if floating and scale > 0 else math.inf
    norms = (a.norm() * b.norm()).item()
    if norms > 0:
        cosine = min(1.0, max(-1.0, (a @ b).item() / norms))
    else:
        cosine = 1.0 if max_abs == 0 or not (a.any() or b.any()) else 0.0
    return Statistics(max_abs, difference.mean().item(), max_rel, cosine, agreement)


@dataclass
class Check:
    """One comparison of a model with its reference.

    Args:
        check: what was compared: the runtime's name.
        inputs: "example", "random", "data"; or "shapes", where nothing could run and only names, dtypes and shapes
            were compared.
        unstable: samples left out because they differ, but rounding alone decides their result: the reference itself
            changes by more than the tolerance when its weights move by a few units in the last place.
        outputs: statistics by output name, over the samples that count.
    """

    check: str
    inputs: str
    batch: int
    tolerance: float
    outputs: dict[str, Statistics] = field(default_factory=dict)
    unstable: int = 0

    @property
    def decided(self) -> bool:
        """Whether at least one sample counts."""
        return self.unstable < max(self.batch, 1)

    @property
    def passed(self) -> bool:
        if not self.decided:
            return self.inputs != "random"  # given inputs may be all ties; random ones are drawn until they are not
        return all(s.within(self.tolerance) for s in self.outputs.values())

    def to_dict(self) -> dict[str, Any]:
        """A row of the report's ``parity``."""
        row: dict[str, Any] = {
            "check": self.check,
            "inputs": self.inputs,
            "batch": self.batch,
            "tolerance": self.tolerance,
            "passed": self.passed,
            "outputs": [{"name": name, **asdict(s)} for name, s in self.outputs.items()],
        }
        return {**row, "unstable": self.unstable} if self.unstable else row


def check_parity(
    reference: Engine, engine: Engine, inputs: Sequence[Tensor], tolerance: float, *, source: str = "data"
) -> Check:
    """Runs both on the same inputs and compares every output.

    If one takes more inputs than the other, behind those that both take, it may return more, too; see `verify`.

    A sample that differs is left out, and counted, if rounding alone decides its result: which tokens are most similar
    is a discrete choice, and a tie that falls the other way is no error of the runtime.

    Raises:
        ParityError: if the results cannot be compared at all.
    """
    names = [spec.name for spec in reference.outputs]
    expected, result = (e(*inputs[: len(e.inputs)]) for e in (reference, engine))
    if len(reference.inputs) != len(engine.inputs):
        more, fewer = (expected, result) if len(reference.inputs) > len(engine.inputs) else (result, expected)
        del more[len(fewer) :]
    batch = next((len(t) for t, spec in zip(inputs, reference.inputs, strict=False) if is_batched(spec)), None)
    batch = next((len(t) for t in inputs if t.dim()), 1) if batch is None else batch
    check = Check(engine.runtime, source, batch, tolerance, _named(names[: len(expected)], expected, result))
    if check.passed:
        return check
    model = next((e for e in (reference, engine) if isinstance(e, EagerEngine)), None)
    if model is None or not all(t.dim() and len(t) == batch for t in expected):
        return check
    unstable = _differing(expected, result, tolerance) & ~_stable(model, inputs, tolerance)
    check.unstable = int(unstable.sum())
    if 0 < check.unstable < batch:
        check.outputs = _named(names[: len(expected)], [t[~unstable] for t in expected], [t[~unstable] for t in result])
    return check


def _named(names: Sequence[str], expected: Sequence[Tensor], result: Sequence[Tensor]) -> dict[str, Statistics]:
    return dict(zip(names, compare(expected, result), strict=True))


def _differing(expected: Sequence[Tensor], result: Sequence[Tensor], tolerance: float) -> Tensor:
    """Which samples of a batch differ in any output; a bool per sample."""
    wrong = torch.zeros(len(expected[0]), dtype=torch.bool)
    for a, b in zip(expected, result, strict=True):
        whole = _compare(0, a, b)
        if not whole.within(tolerance):
            limit = tolerance * max(1.0, whole.max_abs / whole.max_rel) if whole.max_rel > 0 else tolerance
            wrong |= torch.tensor([_compare(0, x, y).max_abs > limit for x, y in zip(a, b, strict=True)])
    return wrong


def _stable(model: EagerEngine, inputs: Sequence[Tensor], tolerance: float) -> Tensor:
    """Which samples keep their result, to the tolerance, when every weight moves by a few units in the last place."""
    inputs = inputs[: len(model.inputs)]
    expected = model(*inputs)
    stable = torch.ones(len(expected[0]), dtype=torch.bool)
    for moved in model.perturbed(_NOISE, _TRIALS):
        stable &= ~_differing(expected, moved(*inputs), tolerance)
    return stable


def default_tolerance(dtypes: Iterable[str]) -> float:
    """What rounding in these dtypes may add up to: 1e-4, or more where one of them is half precision."""
    return max((TOLERANCES.get(getattr(torch, d), TOLERANCE) for d in dtypes), default=TOLERANCE)


def prove(
    program: Program, engine: Engine, tolerance: float | None = None, data: Iterable[Sequence[Tensor]] = ()
) -> list[Check]:
    """Checks a built engine against its program: fresh random inputs, the example and given ones, two batch sizes.

    Raises:
        ParityError: if one of the checks fails.
    """
    reference = EagerEngine.of(program)
    if tolerance is None:
        weights = [v.dtype for v in program.exported.state_dict.values() if isinstance(v, Tensor)]
        specs = [spec.dtype for spec in (*program.inputs, *program.outputs)]
        tolerance = default_tolerance([*specs, *(str(d).removeprefix("torch.") for d in set(weights))])
    given = chain([("example", reference.example)], (("data", batch) for batch in data))
    checks = _checks(reference, engine, reference.random_inputs, given, tolerance)
    require(checks, str(engine.path))
    return checks


def verify(
    a: str | os.PathLike[str] | Engine,
    b: str | os.PathLike[str] | Engine,
    data: Iterable[Sequence[Tensor]] = (),
    tolerance: float | None = None,
) -> list[Check]:
    """Compares any two models: files (.pt2, .onnx, .engine) or engines. The first is the reference.

    One may take more inputs than the other, behind those that both take, and then return more, as a model that a recipe
    has added them to: the other gets the first, and what both return is compared.

    Args:
        data: batches of input tensors, compared besides fresh random ones, one at a time. Inputs that one model alone
            takes are drawn where the data lack them.
        tolerance: see `default_tolerance`.

    Raises:
        ParityError: if the models cannot be compared; a difference is not raised, see ``Check.passed``.
        LoweringError: if one of them cannot run on this machine.
    """
    from tokenopt.runtimes import open as open_engine

    reference, engine = (m if isinstance(m, Engine) else open_engine(m) for m in (a, b))
    require_same_inputs(reference, engine, more=True)
    if tolerance is None:
        specs = (*reference.inputs, *reference.outputs, *engine.outputs)
        tolerance = default_tolerance(spec.dtype for spec in specs)
    source = next((e for e in (reference, engine) if isinstance(e, EagerEngine)), reference)
    wider = max(source, reference, engine, key=lambda e: len(e.inputs))

    def completed(tensors: Sequence[Tensor], batch: int, seed: int) -> list[Tensor]:
        return [*tensors, *wider.random_inputs(batch, seed)[len(tensors) :]]

    def random_inputs(batch: int, seed: int) -> list[Tensor]:
        return completed(source.random_inputs(batch, seed), batch, seed)

    def rows(tensors: Sequence[Tensor]) -> int:
        pairs = zip(tensors, reference.inputs, strict=False)
        return next((len(t) for t, spec in pairs if is_batched(spec)), 1)

    given = (("data", completed(batch, rows(batch), 0)) for batch in data)
    return _checks(reference, engine, random_inputs, given, tolerance)


def require(checks: Sequence[Check], where: str | None = None) -> None:
    """Raises unless all checks passed.

    Raises:
        ParityError: naming the output that differs most, and by how much.
    """
    for check in checks:
        if check.passed:
            continue
        if not check.decided:
            raise ParityError(
                f"{check.check} cannot be compared with its reference",
                where=where,
                why=f"rounding alone decides the result of all {_FRESH_DRAWS} random batches of {check.batch}",
                hint="compare on real data, or set a larger tolerance",
            )
        name, worst = max(check.outputs.items(), key=lambda item: item[1].max_rel)
        raise ParityError(
            f"{check.check} differs from its reference by {worst.max_abs:.2e}",
            where=where,
            why=f"output {name!r}, {check.inputs} inputs, batch {check.batch}: relative {worst.max_rel:.2e}, "
            f"cosine {worst.cosine:.6f}, tolerance {check.tolerance:g}",
            hint="if the difference is acceptable, set a larger tolerance",
        )


def _checks(
    reference: Engine,
    engine: Engine,
    random_inputs: Callable[[int, int], list[Tensor]],
    given: Iterable[tuple[str, Sequence[Tensor]]],
    tolerance: float,
) -> list[Check]:
    sizes = [s for s in reference.batch_sizes(*engine.batch_sizes(*BATCHES)) if s in engine.batch_sizes(s)]
    checks = []
    for size in sizes:
        for draw in range(_FRESH_DRAWS):
            inputs = random_inputs(size, 1000 + 10 * size + draw)
            check = check_parity(reference, engine, inputs, tolerance, source="random")
            if check.decided:
                break
        checks.append(check)
    for source, tensors in given:
        for inputs in _two_sizes(tensors, reference, engine):
            checks.append(check_parity(reference, engine, inputs, tolerance, source=source))
    return checks


def _two_sizes(tensors: Sequence[Tensor], reference: Engine, engine: Engine) -> list[list[Tensor]]:
    """Given inputs as they are and, where the batch may vary, their first row alone; within the engines' limits."""
    pairs = zip_longest(reference.inputs, engine.inputs)
    batched = [all(spec is None or is_batched(spec) for spec in pair) for pair in pairs]
    if not any(batched):
        return [list(tensors)]
    rows = next(len(t) for t, b in zip(tensors, batched, strict=True) if b)
    sizes = set(engine.batch_sizes(1, rows)) & set(range(1, rows + 1))
    return [[t[:n] if b else t for t, b in zip(tensors, batched, strict=True)] for n in sorted(sizes)]


def require_same_inputs(a: Engine, b: Engine, more: bool = False) -> None:
    """Raises ParityError unless both models take tensors of the same dtypes and shapes; one may take ``more``."""
    count = min(len(a.inputs), len(b.inputs)) if more else None
    if not same_specs(a.inputs[:count], b.inputs[:count]):
        raise ParityError(
            "the two models take different inputs",
            where=f"{a.path} and {b.path}",
            why=f"{', '.join(map(describe, a.inputs))} against {', '.join(map(describe, b.inputs))}",
        )
