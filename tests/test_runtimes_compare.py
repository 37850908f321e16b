"""Statistics, checks and their tolerance, and samples that rounding alone decides."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from tokenopt import capture
from tokenopt.errors import ParityError, UsageError
from tokenopt.program import InputSpec, Program
from tokenopt.runtimes.base import Engine
from tokenopt.runtimes.compare import (
    Check,
    Statistics,
    check_parity,
    compare,
    default_tolerance,
    prove,
    require,
    verify,
)
from tokenopt.runtimes.eager import EagerEngine


@dataclass
class Function(Engine):
    """A function of flat tensors as an engine."""

    call: Callable[..., list[Tensor]] = field(kw_only=True)

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return self.call(*inputs)


def engine_of(program: Program, call: Callable[..., list[Tensor]]) -> Function:
    return Function(None, "function", program.inputs, program.outputs, call=call)


def one(a: Tensor, b: Tensor) -> Statistics:
    (statistics,) = compare([a], [b])
    return statistics


class Choice(nn.Module):
    """Takes the larger of two nearly equal scores: where they tie, the last bit of a sum decides."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 2, bias=False)
        self.scores.weight.data[1] = self.scores.weight.data[0]
        self.scores.weight.data[1, 0] += 1

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.scores(x).unbind(-1)
        return torch.where(a > b, 5.0, -5.0)[:, None] + x


def test_equal_tensors() -> None:
    x = torch.randn(4, 3)
    assert one(x, x.clone()) == Statistics(0.0, 0.0, 0.0, pytest.approx(1.0), 1.0)


def test_known_difference() -> None:
    a = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    found = one(a, a + torch.tensor([[0.0, -1.5], [0.0, 0.5]]))
    assert found.max_abs == 1.5
    assert found.mean_abs == 0.5
    assert found.max_rel == 1.5 / 4
    assert found.argmax_agreement == 0.5
    assert found.cosine == pytest.approx(torch.cosine_similarity(a.flatten(), torch.tensor([1, 0.5, 4, 3.5]), 0).item())


def test_tolerance_is_of_the_largest_value_or_absolute() -> None:
    large = torch.full((2, 3, 4), 1000.0)
    assert one(large, large + 0.05).within(1e-4)
    assert not one(large, large + 0.2).within(1e-4)
    small = torch.full((2, 3, 4), 1e-7)
    assert one(small, 2 * small).within(1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value: float) -> None:
    a = torch.tensor([1.0, value, 3.0])
    assert one(a, a.clone()).within(1e-4)
    for b in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([value, 2.0, 3.0])):
        assert one(a, b).max_abs == math.inf
        assert not one(a, b).within(1e-4)
        assert not one(b, a).within(1e-4)
    assert not one(torch.tensor([math.inf]), torch.tensor([-math.inf])).within(1e-4)


def test_integers_are_equal_or_not() -> None:
    """An id that is off by one is wrong, however large the ids are."""
    ids = torch.tensor([[30000, 1], [2, 3]])
    assert one(ids, ids.clone()).within(1e-4)
    off = one(ids, ids + torch.tensor([[1, 0], [0, 0]]))
    assert off.max_abs == 1.0
    assert not off.within(1e-4)
    assert off.argmax_agreement is None
    assert not one(torch.tensor([True]), torch.tensor([False])).within(1e-4)


def test_empty_and_zero_tensors() -> None:
    assert one(torch.empty(0, 3), torch.empty(0, 3)).within(0)
    assert one(torch.zeros(3), torch.zeros(3)).cosine == 1.0
    assert one(torch.zeros(3), torch.ones(3)).cosine == 0.0


def test_half_precision_is_compared_in_double() -> None:
    a = torch.full((10, 10, 10), 60000.0, dtype=torch.float16)
    assert one(a, a.float()).within(1e-4)


@pytest.mark.parametrize(
    "other",
    [[torch.zeros(2)], [torch.zeros(2), torch.zeros(3, 1)], [torch.zeros(2), torch.zeros(3, dtype=torch.int64)]],
    ids=["count", "shape", "kind"],
)
def test_what_cannot_be_compared(other: list[Tensor]) -> None:
    with pytest.raises(ParityError, match="different things"):
        compare([torch.zeros(2), torch.zeros(3)], other)


def test_default_tolerance() -> None:
    assert default_tolerance(["float32", "int64"]) == 1e-4
    assert default_tolerance(["float32", "float16"]) == 2e-2
    assert default_tolerance([]) == 1e-4


def test_check_as_a_row_of_a_report() -> None:
    check = Check("onnxruntime", "random", 3, 1e-4, {"logits": Statistics(0.1, 0.01, 0.1, 0.9, None)})
    row = check.to_dict()
    assert row["passed"] is False
    assert row["outputs"][0]["name"] == "logits"
    assert "unstable" not in row
    json.dumps(row, allow_nan=False)


def test_prove_looks_at_random_example_and_given_inputs_at_two_batch_sizes() -> None:
    program = capture(nn.Linear(4, 2), torch.randn(2, 4))
    checks = prove(program, engine_of(program, program.flat), data=[[torch.randn(5, 4)]])
    made = [(c.inputs, c.batch) for c in checks]
    assert made == [("random", 1), ("random", 3), ("example", 1), ("example", 2), ("data", 1), ("data", 5)]
    assert all(c.passed for c in checks)


def test_prove_respects_the_batch_an_engine_was_built_for() -> None:
    program = capture(nn.Linear(4, 2), torch.randn(2, 4))
    engine = engine_of(program, program.flat)
    engine.batch_limits = (2, 2)
    assert {c.batch for c in prove(program, engine)} == {2}
    static = capture(nn.Linear(4, 2), torch.randn(2, 4), dynamic_batch=False)
    assert {c.batch for c in prove(static, engine_of(static, static.flat))} == {2}


def test_prove_raises_with_the_worst_output() -> None:
    program = capture(nn.Linear(4, 2), torch.randn(2, 4))
    wrong = engine_of(program, lambda x: [program.flat(x)[0] + (x.shape[0] == 3)])
    with pytest.raises(ParityError, match="differs") as caught:
        prove(program, wrong)
    assert "output_0" in str(caught.value)
    assert "batch 3" in str(caught.value)
    assert caught.value.exit_code == 4


def test_samples_that_rounding_decides_are_left_out_and_counted() -> None:
    program = capture(Choice(), torch.randn(2, 8))
    reference = EagerEngine.of(program)
    x = torch.randn(4, 8)
    x[:, 0] = torch.tensor([1.0, 1e-9, -1.0, 1.0])  # the second sample ties
    flip = torch.tensor([[0.0], [10.0], [0.0], [0.0]])
    check = check_parity(reference, engine_of(program, lambda t: [program.flat(t)[0] + flip]), [x], 1e-4)
    assert check.passed
    assert check.unstable == 1
    assert check.outputs["output_0"].max_abs < 1e-4
    assert check.to_dict()["unstable"] == 1
    everywhere = engine_of(program, lambda t: [program.flat(t)[0] + 10])
    check = check_parity(reference, everywhere, [x], 1e-4)
    assert not check.passed
    assert check.unstable == 1


def test_a_wrong_result_is_never_taken_for_a_tie() -> None:
    program = capture(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(2, 8))
    wrong = engine_of(program, lambda x: [program.flat(x)[0] * 1.001])
    check = check_parity(EagerEngine.of(program), wrong, [torch.randn(3, 8)], 1e-4)
    assert (check.passed, check.unstable) == (False, 0)


def test_ties_alone_prove_nothing() -> None:
    """Given inputs may be nothing but ties; random ones must decide."""
    row = {"output_0": Statistics(10.0, 10.0, 2.0, 0.0, None)}
    assert Check("x", "example", 2, 1e-4, row, unstable=2).passed
    undecided = Check("x", "random", 2, 1e-4, row, unstable=2)
    assert not undecided.passed
    with pytest.raises(ParityError, match="cannot be compared"):
        require([undecided])


def test_perturbing_leaves_the_program_alone() -> None:
    program = capture(nn.Linear(4, 2), torch.randn(2, 4))
    before = {k: v.clone() for k, v in program.exported.state_dict.items()}
    x = torch.randn(2, 4)
    results = [moved(x)[0] for moved in EagerEngine.of(program).perturbed(16, 2)]
    assert not torch.equal(*results)
    assert all(torch.equal(v, program.exported.state_dict[k]) for k, v in before.items())


def test_verify_engines() -> None:
    model = nn.Linear(4, 2)
    a, b = (EagerEngine.of(capture(model, torch.randn(2, 4))) for _ in range(2))
    checks = verify(a, b, data=[[torch.randn(6, 4)]])
    assert [(c.inputs, c.batch) for c in checks] == [("random", 1), ("random", 3), ("data", 1), ("data", 6)]
    assert all(c.passed for c in checks)
    other = EagerEngine.of(capture(nn.Linear(4, 2), torch.randn(2, 4)))
    assert not any(c.passed for c in verify(a, other))
    narrow = EagerEngine.of(capture(nn.Linear(3, 2), torch.randn(2, 3)))
    with pytest.raises(ParityError, match="different inputs"):
        verify(a, narrow)


def test_only_a_model_with_more_inputs_may_return_more() -> None:
    x, more = InputSpec("x", "float32", ("batch", 3)), InputSpec("more", "int64", ("batch",))

    def engine(inputs: tuple[InputSpec, ...], count: int) -> Function:
        outputs = tuple(InputSpec(f"y{i}", "float32", ("batch", 3)) for i in range(count))
        return Function(None, "function", inputs, outputs, call=lambda x, *_: [x] * count)

    one, two, wider = engine((x,), 1), engine((x,), 2), engine((x, more), 2)
    for a, b in ((one, two), (two, one)):
        with pytest.raises(ParityError, match="outputs against"):
            verify(a, b)
    for a, b in ((one, wider), (wider, one)):
        given = [[torch.ones(4, 3)], [torch.ones(2, 3), torch.ones(2, dtype=torch.int64)]]
        checks = verify(a, b, given)
        assert all(c.passed and list(c.outputs) == ["y0"] for c in checks)
        assert [c.batch for c in checks] == [1, 3, 1, 4, 1, 2]
    with pytest.raises(ParityError, match="outputs against"):
        verify(two, engine((x, more), 1))


def test_random_inputs_of_an_engine_fit_it() -> None:
    specs = (
        InputSpec("x", "float16", ("batch", 3)),
        InputSpec("ids", "int64", ("batch", 5)),
        InputSpec("s", "bool", (2,)),
    )
    engine = Function(None, "function", specs, (), call=lambda *t: list(t))
    x, ids, flags = engine(*engine.random_inputs(4))
    assert (x.shape, x.dtype, ids.shape, flags.dtype) == ((4, 3), torch.float16, (4, 5), torch.bool)
    assert set(ids.unique().tolist()) <= {0, 1}


@pytest.mark.parametrize(
    "inputs",
    [[], [torch.zeros(2, 4), torch.zeros(2, 4)], [torch.zeros(2, 5)], [torch.zeros(2, 4, dtype=torch.float64)]],
    ids=["none", "two", "shape", "dtype"],
)
def test_wrong_inputs_are_a_usage_error(inputs: list[Tensor]) -> None:
    engine = EagerEngine.of(capture(nn.Linear(4, 2), torch.randn(2, 4)))
    with pytest.raises(UsageError):
        engine(*inputs)
