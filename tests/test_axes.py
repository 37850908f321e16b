"""The axes of real graphs: segments, grids, effects, cuts, refusals; and rules that users add."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import Tensor, nn

from tests import references
from tokenopt.analysis.axes import EffectKind, propagate
from tokenopt.analysis.axis_rules import axis_rule
from tokenopt.analysis.cuts import find_cuts
from tokenopt.analysis.sites import find_sites
from tokenopt.errors import UsageError
from tokenopt.inspection import inspect
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.pipeline import Pipeline
from tokenopt.program import Program, capture


def canonical(model: nn.Module, inputs: object) -> Program:
    return Pipeline([FoldConstants(), RaiseAttention()]).run(capture(model, inputs)).program


SEGMENTS = {
    "vit": "65 = cls(1) + patch(8x8)",
    "deit_distilled": "66 = cls(1) + dist(1) + patch(8x8)",
    "registers": "69 = cls(1) + registers(4) + patch(8x8)",
    "mean": "64 = patch(8x8)",
    "eva02": "65 = cls(1) + patch(8x8)",
    "dinov3": "69 = cls(1) + registers(4) + patch(8x8)",
    "beit": "65 = cls(1) + patch(8x8)",
}


@pytest.mark.parametrize("name", list(SEGMENTS))
def test_segments_of_timm_models(name: str) -> None:
    arch, options = references.TIMM[name]
    program = canonical(references.tiny_timm(arch, **options), references.images(2))
    axes = propagate(program)
    sites, token_axes = find_sites(axes)
    assert not axes.opaque
    assert [s.kind for s in sites] == ["self"] * 3
    assert [str(a) for a in token_axes] == [SEGMENTS[name]]
    cuts, refusals = find_cuts(axes, sites)
    assert [(c.width, c.chained) for c in cuts] == [(1, True), (1, True), (1, False)]
    assert not refusals


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deit", "66 = cls(1) + dist(1) + patch(8x8)"),
        ("dinov2_registers", "69 = cls(1) + registers(4) + patch(8x8)"),
        ("yolos", "70 = cls(1) + patch(8x8) + queries(5)"),
        ("siglip", "64 = patch(8x8)"),
    ],
)
def test_segments_of_transformers_models(name: str, text: str) -> None:
    program = canonical(references.tiny_hf(name), {"pixel_values": references.images(2)})
    _, token_axes = find_sites(propagate(program))
    assert str(token_axes[0]) == text


def test_a_token_that_is_read_alone_is_protected() -> None:
    """BERT's first token has no weights of its own; that the pooler reads it makes it a segment."""
    ids, mask = references.sentences(2)
    program = canonical(references.tiny_hf("bert"), {"input_ids": ids, "attention_mask": mask})
    _, token_axes = find_sites(propagate(program))
    assert str(token_axes[0]) == "20 = cls(1) + text(19)"


def test_rotary_tables_and_biases_are_obligations() -> None:
    arch, options = references.TIMM["eva02"]
    rope = canonical(references.tiny_timm(arch, **options), references.images(2))
    axes = propagate(rope)
    cuts, _ = find_cuts(axes, find_sites(axes)[0])
    assert cuts[0].obligations["gather-operand"] == 4
    assert cuts[0].obligations["rebase-segment"] == 4
    assert cuts[0].obligations["add-size-bias"] == 1
    arch, options = references.TIMM["mean"]
    mean = canonical(references.tiny_timm(arch, **options), references.images(2))
    axes = propagate(mean)
    assert find_cuts(axes, find_sites(axes)[0])[0][-1].obligations["weight-mean"] == 1


def test_inspection_is_plain_data_and_names_the_grid_reader() -> None:
    import timm

    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4))
    found = inspect(capture(model, torch.randn(2, 3, 64, 64)))
    json.dumps(found)
    assert len(found["sites"]) == 4
    for site in found["sites"]:
        assert site["legal"] or site["refusal"]["why"]
    assert found["effects"]["patch"]["layout"] > 0
    assert found["cuts"] == [] or all(c["restore_before"] for c in found["cuts"])


class Toy(nn.Module):
    """One attention over tokens, then whatever ``tail`` does with them."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Linear(16, 16)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mlp(x)
        return self.tail(x)


class Lambda(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: x.cumsum(1)[:, 0], EffectKind.LAYOUT),
        (lambda x: x.roll(1, 1).mean(1), EffectKind.LAYOUT),
        (lambda x: nn.functional.pad(x, (0, 0, 1, 0)).mean(1), EffectKind.LAYOUT),
        (lambda x: x[:, ::2].mean(1), EffectKind.SLICE),
        (lambda x: x.view(-1, 3, 4, 16).amax(1).mean(1), EffectKind.LAYOUT),
        (lambda x: x.flatten(1) @ torch.ones(12 * 16, 2), EffectKind.LAYOUT),
        (lambda x: x.std(1), EffectKind.LAYOUT),
        (lambda x: x, EffectKind.OUTPUT),
    ],
)
def test_what_needs_every_token_is_a_barrier(function, kind: EffectKind) -> None:
    program = canonical(Toy(Lambda(function)), torch.randn(2, 12, 6))
    axes = propagate(program)
    cuts, _ = find_cuts(axes, find_sites(axes)[0])
    assert [e.kind for e in cuts[0].restores] == [kind]


def test_an_operation_without_a_rule_is_opaque_until_a_user_adds_one() -> None:
    if not hasattr(torch.ops.tokenopt_test, "twist"):
        torch.library.define("tokenopt_test::twist", "(Tensor x) -> Tensor")
        torch.library.impl("tokenopt_test::twist", "CompositeExplicitAutograd")(lambda x: x * 2 + 1)
        torch.library.register_fake("tokenopt_test::twist", lambda x: torch.empty_like(x))
    model = Toy(Lambda(lambda x: torch.ops.tokenopt_test.twist(x).mean(1)))
    found = inspect(capture(model, torch.randn(2, 12, 6)))
    assert [o["op"] for o in found["opaque"]] == ["tokenopt_test.twist.default"]
    assert found["opaque"][0]["template"] == 'axis_rule("tokenopt_test.twist.default", "a b c -> ...")'
    assert "tokenopt_test.twist" in found["cuts"][0]["restore_before"][0]
    axis_rule("tokenopt_test.twist", "b n c -> b n c")
    found = inspect(capture(model, torch.randn(2, 12, 6)))
    assert not found["opaque"]
    assert not found["cuts"][0]["restore_before"]


@pytest.mark.parametrize("text", ["b n c", "b n -> b n ; squash n"])
def test_a_malformed_rule_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        axis_rule("tokenopt_test.never", text)


def test_constants_fold_only_where_they_do_not_depend_on_the_batch() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            same = (self.table[[0, 1, 2]] * 2).expand(x.shape[0], 3, 8) + 1
            counted = torch.arange(x.shape[0]).float()[:, None, None]
            return x * same + counted

    model = Positions()
    result = Pipeline([FoldConstants()]).run(capture(model, torch.randn(2, 3, 8)))
    assert len(result.edits) == 1
    x = torch.randn(5, 3, 8)
    torch.testing.assert_close(result.program(x), model(x).detach())


def test_analysis_is_linear_in_the_depth() -> None:
    """Not a benchmark: four times the layers must not cost sixteen times the time."""
    seconds = []
    for depth in (3, 12):
        program = canonical(references.tiny_timm(depth=depth), references.images(2))
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            axes = propagate(program)
            find_cuts(axes, find_sites(axes)[0])
            best = min(best, time.perf_counter() - start)
        seconds.append(best)
    assert seconds[1] < 10 * seconds[0]


def test_numbers_read_from_constants_become_literals() -> None:
    """Some models size tensors by ``.item()`` of a buffer; such sizes must not stay unknown."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor(3))

        def forward(self, x: Tensor) -> Tensor:
            count = self.count.item()
            torch._check(count >= 2)
            torch._check(count <= 8)
            return x[:, None].expand(-1, count, -1).mean(1) + 1

    model = Sized()
    program = Pipeline([FoldConstants()]).run(capture(model, torch.randn(2, 4))).program
    assert not any("item" in str(n.target) or "_local_scalar_dense" in str(n.target) for n in program.graph.nodes)
    x = torch.randn(5, 4)
    torch.testing.assert_close(program(x), model(x))
