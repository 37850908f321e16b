"""Rewritten graphs equal independent hand-patched models; identity settings equal the dense model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import tokenopt
from tests import references
from tokenopt.errors import IllegalReduction, UsageError
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline, PipelineResult
from tokenopt.program import Program, capture, flatten_tensors
from tokenopt.recipes import get
from tokenopt.small_models import small_model

SCHEDULES = {"constant": [8, 8, 8], "falling": [20, 9, 3], "middle": [0, 24, 0]}
HF = {
    "vit": references.tome_hf_vit,
    "deit": references.tome_hf_vit,
    "dinov2": references.tome_hf_dinov2,
    "dinov2_registers": references.tome_hf_dinov2,
    "clip": references.tome_hf_clip,
    "siglip": references.tome_hf_siglip,
    "yolos": references.tome_hf_yolos,
}


@cache
def timm_model(name: str) -> tuple[torch.nn.Module, Program]:
    arch, options = references.TIMM[name]
    model = references.tiny_timm(arch, **options)
    return model, capture(model, references.images(2))


@cache
def hf_model(name: str, attention: str = "sdpa") -> tuple[torch.nn.Module, Program]:
    model = references.tiny_hf(name, attn_implementation=attention)
    return model, capture(model, {"pixel_values": references.images(2)})


@cache
def bert_model(name: str) -> tuple[torch.nn.Module, Program]:
    model = references.tiny_hf(name)
    ids, mask = references.sentences(2)
    return model, capture(model, {"input_ids": ids, "attention_mask": mask})


def reduce(program: Program, recipe: Any, schedule: Any, **options: Any) -> PipelineResult:
    result = Pipeline([ReduceTokens(recipe, schedule, **options), RemoveDead()]).run(canonical(program))
    result.program.verify()
    return result


def canonical(program: Program) -> Program:
    if id(program) not in _canonical:
        _canonical[id(program)] = (program, Pipeline([FoldConstants(), RaiseAttention()]).run(program).program)
    return _canonical[id(program)][1]


_canonical: dict[int, tuple[Program, Program]] = {}


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- ToMe equals the hand-patched model --------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", list(references.TIMM))
def test_tome_equals_hand_patched_timm(name: str, schedule: str) -> None:
    model, program = timm_model(name)
    result = reduce(program, "tome", {"r": SCHEDULES[schedule]})
    for batch in (1, 3):
        x = references.images(batch, seed=1)
        with torch.no_grad():
            expected = references.tome_timm(model, x, SCHEDULES[schedule])
            dense = model(x)
        assert_close(result.program.flat(x), [expected])
        assert not torch.allclose(dense, expected, atol=1e-4), "the reduction must be visible in the output"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", list(HF))
def test_tome_equals_hand_patched_transformers(name: str, schedule: str) -> None:
    model, program = hf_model(name)
    for short in (False, True):
        result = reduce(program, "tome", {"r": SCHEDULES[schedule]}, short_outputs=short)
        for batch in (1, 3):
            x = references.images(batch, seed=1)
            with torch.no_grad():
                expected = HF[name](model, x, SCHEDULES[schedule], short=short)
            assert_close(result.program.flat(pixel_values=x), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tome_does_not_depend_on_the_spelling_of_attention(attention: str) -> None:
    model, program = hf_model("clip", attention)
    x = references.images(2, seed=3)
    with torch.no_grad():
        expected = references.tome_hf_clip(model, x, [8, 8, 8])
    assert_close(reduce(program, "tome", "r=8").program.flat(pixel_values=x), expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["bert", "minilm"])
def test_tome_with_a_padding_mask(name: str, batch: int) -> None:
    model, program = bert_model(name)
    ids, mask = references.sentences(batch, seed=2)
    reference = references.tome_bert if name == "bert" else references.tome_sentence
    result = reduce(program, "tome", {"r": [4, 3, 2]})
    with torch.no_grad():
        expected = flatten_tensors(reference(model, ids, mask, [4, 3, 2]))
    assert_close(result.program.flat(input_ids=ids, attention_mask=mask), expected)


def test_proportional_attention_can_be_switched_off() -> None:
    model, program = timm_model("vit")
    x = references.images(2, seed=1)
    result = reduce(program, "tome", "r=8", settings={"proportional": False})
    with torch.no_grad():
        plain = references.tome_timm(model, x, [8] * 3, prop_attn=False)
        proportional = references.tome_timm(model, x, [8] * 3)
    assert_close(result.program.flat(x), [plain])
    assert not torch.allclose(plain, proportional, atol=1e-4)


def test_every_sample_keeps_its_own_tokens() -> None:
    """A batch gives what its samples give alone: nothing of the plan is shared."""
    _, program = timm_model("vit")
    reduced = reduce(program, "tome", "r=16").program
    x = references.images(3, seed=5)
    together = reduced.flat(x)[0]
    alone = torch.cat([reduced.flat(row[None])[0] for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_source_says_where_each_patch_went() -> None:
    model, program = timm_model("vit")
    x = references.images(2, seed=1)
    trace: list[Any] = []
    with torch.no_grad():
        references.tome_timm(model, x, [8, 8, 8], trace=trace)
    logits, source = reduce(program, "tome", "r=8", settings={"source": True}).program(x)
    assert source.shape == (2, 64)
    assert torch.equal(source, trace[-1].home[:, 1:] - 1)
    assert_close([logits], [references.tome_timm(model, x, [8, 8, 8])])


# -- EViT and FasterVLM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("fuse", ["pack", "drop"])
@pytest.mark.parametrize("name", ["vit", "deit_distilled", "registers", "clip", "eva02", "dinov3", "beit"])
def test_evit_equals_hand_patched(name: str, fuse: str, batch: int) -> None:
    model, program = timm_model(name)
    result = reduce(program, "evit", {"keep": 0.6, "layers": [0, 2]}, settings={"fuse": fuse})
    x = references.images(batch, seed=1)
    with torch.no_grad():
        expected = references.evit_timm(model, x, 0.6, [0, 2], fuse == "pack")
    assert_close(result.program.flat(x), [expected])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layer", [-1, 1])
def test_fastervlm_equals_hand_patched(layer: int, batch: int) -> None:
    model, program = hf_model("clip")
    result = reduce(program, "fastervlm", "keep=0.3", settings={"score.layer": layer})
    x = references.images(batch, seed=1)
    with torch.no_grad():
        expected = references.fastervlm_clip(model, x, 0.3, layer)
    features = result.program(pixel_values=x).last_hidden_state
    torch.testing.assert_close(features[:, 1:], expected, rtol=1e-5, atol=1e-5)


def test_random_drops_the_same_tokens_for_every_input() -> None:
    _, program = timm_model("vit")
    one = reduce(program, "random", "keep=0.5@1").program
    two = reduce(program, "random", "keep=0.5@1", settings={"score.seed": 1}).program
    x = references.images(2, seed=1)
    assert torch.equal(one.flat(x)[0], reduce(program, "random", "keep=0.5@1").program.flat(x)[0])
    assert not torch.allclose(one.flat(x)[0], two.flat(x)[0])


# -- identity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["tome", "evit", "random"])
@pytest.mark.parametrize("name", list(references.TIMM))
def test_neutral_reductions_equal_the_dense_model(name: str, recipe: str) -> None:
    """The reductions are inserted everywhere and remove nothing: for ToMe a mere permutation of the tokens."""
    model, program = timm_model(name)
    result = Pipeline([ReduceTokens(recipe, neutral=True)]).run(canonical(program))
    if recipe == "evit" and name in ("mean", "siglip", "registers_mean", "rope_mean"):
        assert not result.edits
    else:
        assert len(result.edits) == 3
    x = references.images(3, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(result.program.flat(x)[0], model(x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("schedule", ["r=0", "keep=1.0", {"r": (0, 0.0)}])
def test_identity_schedules_change_nothing(schedule: Any) -> None:
    model, program = timm_model("vit")
    result = reduce(program, "tome", schedule)
    assert not any(e.pass_spec.startswith("reduce-tokens") for e in result.edits)
    x = references.images(2)
    assert torch.equal(result.program.flat(x)[0], model(x))


# -- what is refused, and what is restored -----------------------------------------------------------------------------


def test_outputs_keep_their_shapes_unless_asked() -> None:
    _, program = hf_model("vit")
    x = references.images(2)
    full = reduce(program, "tome", "r=8").program(pixel_values=x)
    short = reduce(program, "tome", "r=8", short_outputs=True).program(pixel_values=x)
    assert full.last_hidden_state.shape == (2, 65, 48)
    assert short.last_hidden_state.shape == (2, 65 - 24, 48)
    torch.testing.assert_close(full.pooler_output, short.pooler_output)


def test_windows_are_refused_with_the_reason() -> None:
    import timm

    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(2, 2), num_heads=(2, 2)
    )
    result = reduce(capture(model, torch.randn(2, 3, 56, 56)), "tome", "r=4")
    assert not any(e.pass_spec.startswith("reduce-tokens") for e in result.edits)
    assert any("windows" in r.why for r in result.refusals)
    assert all(r.why and r.hint for r in result.refusals)


def test_a_pyramid_is_reduced_in_its_last_stage() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 2), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4))
    model = references.perturb(model, 0.05)
    program = capture(model, torch.randn(2, 3, 128, 128))
    result = reduce(program, "tome", "r=3")
    sites = [e.site for e in result.edits if e.pass_spec.startswith("reduce-tokens")]
    assert sites == ["stages.3.blocks.0.attn", "stages.3.blocks.1.attn"]
    x = torch.randn(3, 3, 128, 128)
    neutral = Pipeline([ReduceTokens("tome", neutral=True)]).run(canonical(program)).program
    with torch.no_grad():
        torch.testing.assert_close(neutral.flat(x)[0], model(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(result.program.flat(x)[0], neutral.flat(x)[0])


def test_a_score_that_needs_a_class_token_is_refused_without_one() -> None:
    result = reduce(timm_model("siglip")[1], "evit", "keep=0.5@1")
    assert any("no class token" in r.why for r in result.refusals)


def test_a_missing_score_layer_is_refused() -> None:
    result = reduce(hf_model("clip")[1], "fastervlm", "keep=0.5", settings={"score.layer": 7})
    assert any("no layer 7" in r.why for r in result.refusals)


def test_an_unknown_segment_is_an_error() -> None:
    with pytest.raises(IllegalReduction, match="no segment 'audio'"):
        reduce(timm_model("vit")[1], "tome", "r=2", settings={"segment": "audio"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion": "drop"}, "no setting 'fusion'"),
        ({"fuse": "pack"}, "does not go with"),
        ({"proportional": "yes"}, "is not of type"),
        ({"score": "entropy"}, "no score 'entropy'"),
    ],
)
def test_wrong_settings_say_what_fits(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get("tome").with_settings(settings)


def test_joint_attention_reduces_the_image_alone() -> None:
    """SD3 attends over image and text in one sequence; text tokens must stay what they are."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=24, out_channels=4,
    )  # fmt: skip
    model = references.perturb(model, 0.05)
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 11, 32),
        "pooled_projections": torch.randn(2, 24),
        "timestep": torch.tensor([1, 2]),
    }
    program = capture(model, inputs)
    result = reduce(program, "tome", "r=8")
    edits = [e for e in result.edits if e.pass_spec.startswith("reduce-tokens")]
    assert [(e.before, e.after) for e in edits] == [(64, 56), (56, 48)]
    assert result.program(**inputs).sample.shape == (2, 4, 16, 16)
    neutral = Pipeline([ReduceTokens("tome", neutral=True)]).run(canonical(program)).program
    with torch.no_grad():
        torch.testing.assert_close(neutral.flat(**inputs)[0], model(**inputs).sample, rtol=1e-4, atol=1e-5)


def test_half_precision() -> None:
    arch, options = references.TIMM["vit"]
    model = references.tiny_timm(arch, **options).to(torch.bfloat16)
    program = capture(model, references.images(2).to(torch.bfloat16))
    reduced = reduce(program, "tome", "r=8").program
    out = reduced.flat(references.images(3).to(torch.bfloat16))[0]
    assert out.dtype is torch.bfloat16
    assert torch.isfinite(out).all()


def test_compiles_without_graph_breaks() -> None:
    _, program = timm_model("vit")
    module = reduce(program, "tome", "r=8").program.module()
    x = references.images(2, seed=1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


def test_the_rewritten_module_can_be_fine_tuned() -> None:
    _, program = timm_model("vit")
    module = reduce(program, "tome", "r=8").program.module()
    module(references.images(2)).sum().backward()
    gradients = [p.grad for p in module.parameters()]
    assert gradients
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)


def test_a_program_that_was_reduced_survives_saving(tmp_path: Any) -> None:
    from tokenopt.loading import load_program

    _, program = timm_model("eva02")
    reduced = reduce(program, "tome", "r=8").program
    path = reduced.save(tmp_path / "model.pt2")
    again = load_program(path)
    x = references.images(3)
    assert torch.equal(again.flat(x)[0], reduced.flat(x)[0])
    assert again.provenance == reduced.provenance


def test_short_outputs_of_a_recipe_that_mixes_the_order_are_checked() -> None:
    """With nothing to remove, the order of the outputs is that of the dense model."""
    model, x = small_model()
    result = tokenopt.optimize(model, x, recipe="tome", schedule={"r": [8]}, short_outputs=True)
    assert result.program.outputs[0].shape == ("batch", 57, 32)
    assert result.report.passed and {row["check"] for row in result.report.parity} == {"capture", "identity", "twin"}
