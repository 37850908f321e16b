"""Program: capture, running, copying, saving, and what cannot be captured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tests import references
from tokenopt.errors import AxisConflict, CaptureError
from tokenopt.loading import load_program
from tokenopt.optimization import optimize
from tokenopt.program import Program, capture, flatten_tensors


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(references.tiny_timm(), references.images(2))


def test_any_batch_size_equals_the_model(program: Program) -> None:
    model = references.tiny_timm()
    for batch in (1, 2, 5):
        x = references.images(batch, seed=batch)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x))
    assert program.dynamic_batch
    assert program.inputs[0].shape == ("batch", 3, 32, 32)
    assert program.outputs[0].shape == ("batch", 10)


def test_an_example_of_one_row_is_enough() -> None:
    program = capture(references.tiny_timm(depth=1), references.images(1))
    assert program(references.images(3)).shape == (3, 10)


def test_a_static_batch_stays_static() -> None:
    program = capture(references.tiny_timm(depth=1), references.images(2), dynamic_batch=False)
    assert not program.dynamic_batch
    assert program.inputs[0].shape == (2, 3, 32, 32)
    result = optimize(program, schedule="r=8")
    assert result.changed
    assert result.report.passed


def test_a_clone_is_its_own(program: Program) -> None:
    before = program.digest
    copy = program.clone()
    gelu = next(n for n in copy.graph.nodes if n.target is torch.ops.aten.gelu.default)
    gelu.target = torch.ops.aten.relu.default
    copy.exported.graph_module.recompile()
    x = references.images(2)
    assert not torch.allclose(copy(x), program(x))
    assert program.digest == before != copy.digest


def test_an_input_may_be_called_input() -> None:
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.randn(2, 4))
    assert program.inputs[0].name == "input"
    x = torch.randn(3, 4)
    assert torch.equal(program.clone()(x), program(x))


def test_saving_and_loading_keeps_everything(program: Program, tmp_path: Path) -> None:
    reduced = optimize(program, schedule="r=8").program
    again = load_program(reduced.save(tmp_path / "model.pt2"))
    assert again.digest == reduced.digest
    assert again.provenance == reduced.provenance
    x = references.images(3)
    assert torch.equal(again(x), reduced(x))
    again.verify()


def test_a_wrong_size_is_caught(program: Program) -> None:
    broken = program.clone()
    view = next(n for n in broken.graph.nodes if n.target is torch.ops.aten.reshape.default)
    view.args = (view.args[0], [*view.args[1][:-1], 7])
    with pytest.raises(AxisConflict, match="does not fit together") as error:
        broken.verify()
    assert view.name in str(error.value)


def test_printing_shows_inputs_shapes_and_outputs(program: Program) -> None:
    text = str(program)
    assert text.startswith("program(x: float32['batch', 3, 32, 32])")
    assert "aten.scaled_dot_product_attention" in text
    assert text.splitlines()[-1].startswith("  return %")


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Starred(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0]


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1) + 1


@pytest.mark.parametrize(
    ("model", "message"),
    [(Branching(), "cannot be captured"), (Starred(), r"takes \*args"), (Fixed(), "static")],
)
def test_what_cannot_be_captured_says_why(model: nn.Module, message: str) -> None:
    with pytest.raises(CaptureError, match=message) as error:
        capture(model, torch.randn(2, 6))
    assert error.value.why
    assert error.value.hint


@dataclass
class Late(ModelOutput):
    """As transformers' own: a result of a field that is set last comes last, and made anew where its class has it."""

    first: Tensor | None = None
    second: Tensor | None = None
    third: Tensor | None = None


def test_fields_of_results_keep_their_values(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Late:
            result = Late(first=x + 1, third=(x[:, :2] * 3, None))
            result["second"] = x * 2
            return result

    x, model = torch.randn(3, 4), Model()
    assert list(model(x).keys()) == ["first", "third", "second"]
    program = capture(model, x)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "theirs.pt2")
    for found in (program, load_program(program.save(tmp_path / "ours.pt2")), load_program(tmp_path / "theirs.pt2")):
        result = found(x)
        assert [s.shape for s in found.outputs] == [(found.outputs[0].shape[0], n) for n in (4, 4, 2)]
        for name, expected in (("first", x + 1), ("second", x * 2)):
            assert torch.equal(result[name], expected)
        assert torch.equal(result["third"][0], x[:, :2] * 3) and result["third"][1] is None
        for a, b, c in zip(found.flat(x), flatten_tensors(model(x)), (x + 1, x * 2, x[:, :2] * 3), strict=True):
            assert torch.equal(a, c) and torch.equal(b, c)


@dataclass
class Boxes:
    """A result that looks at what it is made of."""

    count: int
    boxes: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        assert self.boxes.shape[-1] == 4 and self.scores.dim() == 1


torch.export.register_dataclass(Boxes, serialized_type_name="tests.Boxes")


def test_results_that_are_checked_when_they_are_made() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Boxes:
            return Boxes(3, x + 1, x.sum(-1))

    found = capture(Model(), torch.randn(3, 4))(x := torch.randn(5, 4))
    assert found.count == 3 and torch.equal(found.boxes, x + 1) and torch.equal(found.scores, x.sum(-1))
