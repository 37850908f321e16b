"""Fewer image features for language models: encoders with a projector, and decoders over image and text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import recipe_references as refs
from tests.references import images, perturb, take
from tokenopt import recipes
from tokenopt.errors import CaptureError, IllegalReduction, UsageError
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline, PipelineResult
from tokenopt.program import Program, capture
from tokenopt.tokens.recipe import TokenRecipe

SIZE = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96}


def canonical(program: Program) -> Program:
    return Pipeline([FoldConstants(), RaiseAttention()]).run(program).program


def reduced(program: Program, recipe: Any, schedule: Any = None, **settings: Any) -> PipelineResult:
    return Pipeline([ReduceTokens(recipe, schedule, settings=settings), RemoveDead()]).run(program)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# -- LLaVA: vision tower and projector ---------------------------------------------------------------------------------


class Features(nn.Module):
    """What LLaVA gives its language model: an inner layer's patches, through the projector."""

    def __init__(self, llava: nn.Module) -> None:
        super().__init__()
        self.tower, self.projector = llava.vision_tower, llava.multi_modal_projector
        self.layer = llava.config.vision_feature_layer

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        return self.projector(hidden[:, 1:])


@cache
def features() -> Features:
    import transformers as hf

    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**SIZE, num_hidden_layers=4, image_size=32, patch_size=4),
        text_config=hf.LlamaConfig(**SIZE, num_hidden_layers=1, vocab_size=60),
        image_token_id=59,
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    return Features(perturb(hf.LlavaModel(config), 0.15)).eval()


@cache
def encoder() -> Program:
    return canonical(capture(features(), images(2)))


class Seen:
    """What the module itself computes, its attention spelled out: per layer, as the outputs are needed."""

    def __init__(self, x: Tensor) -> None:
        tower, keys = features().tower, []
        hooks = [layer.self_attn.k_proj.register_forward_hook(lambda *a: keys.append(a[2]))
                 for layer in tower.encoder.layers]  # fmt: skip
        tower.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                found = tower(x, output_hidden_states=True, output_attentions=True)
        finally:
            tower.set_attn_implementation("sdpa")
            for hook in hooks:
                hook.remove()
        self.patches = found.hidden_states[-2][:, 1:]
        self.attention = [a.mean(1) for a in found.attentions[:-1]]
        self.key = keys[-2].unflatten(-1, (3, -1)).mean(2)[:, 1:]

    def project(self, patches: Tensor) -> Tensor:
        with torch.no_grad():
            return features().projector(patches)


def both(recipe: str, keep: float, x: Tensor, **settings: Any) -> list[Tensor]:
    result = reduced(encoder(), recipe, {"keep": keep}, positions=True, **settings)
    result.program.verify()
    return result.program.flat(x)


@pytest.mark.parametrize("batch", [1, 3])
def test_fastervlm_equals_the_module(batch: int) -> None:
    seen = Seen(x := images(batch, seed=1))
    best = seen.attention[-1][:, 0, 1:].topk(20).indices.sort(1).values
    found, positions = both("fastervlm", 20 / 64, x)
    assert positions.dtype is torch.int64 and torch.equal(positions, best)
    close(found, seen.project(take(seen.patches, best)))


@pytest.mark.parametrize("batch", [1, 3])
def test_hiprune_equals_the_module(batch: int) -> None:
    """Anchors by layer 1 of 3 (the last layer of the tower is not read), registers by the last one read."""
    seen = Seen(x := images(batch, seed=1))
    anchor, rest = (seen.attention[i].mean(1)[:, 1:] for i in (1, 2))
    rows = []
    for first, last in zip(anchor, rest, strict=True):
        kept = {i for a in refs.best(first, 2) for i in refs.around((8, 8), a, 1)}
        others = [i for i in refs.best(last, 64) if i not in kept]
        rows.append(sorted([*kept, *others[: 20 - len(kept)]]))
    best = torch.tensor(rows)
    found, positions = both("hiprune", 20 / 64, x, **{"score.share": 0.5})
    assert torch.equal(positions, best)
    close(found, seen.project(take(seen.patches, best)))


@pytest.mark.parametrize("batch", [1, 3])
def test_visionzip_equals_the_module(batch: int) -> None:
    """Of 20 tokens 3 are contextual: every 15th of those that the class token does not look at."""
    seen = Seen(x := images(batch, seed=1))
    tokens, stands = [], []
    for score, key, patches in zip(seen.attention[-1][:, 0, 1:], seen.key, seen.patches, strict=True):
        dominant = refs.best(score, 17)
        rest = [i for i in range(64) if i not in dominant]
        groups = {i: [i] for i in rest[::15][:3]}
        for i in rest:
            if i not in groups:
                groups[refs.nearest(key, i, rest[::15][:3])].append(i)
        groups |= {i: [i] for i in dominant}
        stands.append(sorted(groups))
        tokens.append(torch.stack([patches[groups[i]].mean(0) for i in sorted(groups)]))
    found, positions = both("visionzip", 20 / 64, x)
    assert torch.equal(positions, torch.tensor(stands))
    close(found, seen.project(torch.stack(tokens)))


OUTPUT = [name for name in recipes.names(TokenRecipe) if recipes.get(name).place.name == "output"]
DROPPING = [name for name in OUTPUT if recipes.get(name).fuse.name == "drop"]


@pytest.mark.parametrize("name", OUTPUT)
def test_output_recipes_give_features_in_raster_order(name: str) -> None:
    x = images(3, seed=1)
    found, positions = both(name, 25 / 64, x)
    assert found.shape == (3, 25, 48) and positions.shape == (3, 25)
    assert ((positions[:, 1:] - positions[:, :-1]) > 0).all() and positions.min() >= 0 and positions.max() < 64
    seen = Seen(x)
    if name in DROPPING:
        close(found, seen.project(take(seen.patches, positions)))
    elif name == "pool":
        assert torch.equal(positions[0], positions[2])
        pooled = F.adaptive_avg_pool2d(seen.patches.transpose(1, 2).unflatten(2, (8, 8)), 5).flatten(2).transpose(1, 2)
        close(found, seen.project(pooled))
    else:
        assert (found - seen.project(take(seen.patches, positions))).abs().max() > 1e-3
    with torch.no_grad():
        whole = reduced(encoder(), name, {"keep": 1.0}).program.flat(x)
        assert len(whole) == 1 and torch.equal(whole[0], features()(x))


def test_positions_can_be_renumbered_or_those_of_rings() -> None:
    x = images(3, seed=1)
    found, kept = both("fastervlm", 0.25, x)
    renumbered, numbers = both("fastervlm", 0.25, x, position="renumber")
    assert torch.equal(renumbered, found) and torch.equal(numbers, torch.arange(16).expand(3, -1))
    concentric, rings = both("fastervlm", 0.25, x, position="concentric")
    y, z = kept // 8, kept % 8
    assert torch.equal(concentric, found)
    assert torch.equal(rings, torch.stack([y, 7 - y, z, 7 - z]).amin(0))


def test_merged_features_leave_the_encoder_short_if_asked() -> None:
    x = images(2, seed=1)
    step = ReduceTokens("tome", {"r": [10, 10, 10]}, settings={"positions": True}, short_outputs=True)
    found, positions = Pipeline([step]).run(encoder()).program.flat(x)
    assert found.shape == (2, 34, 48) and positions.shape == (2, 34)
    assert all(len(set(row.tolist())) == 34 for row in positions)


def test_positions_of_what_keeps_all_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="keeps all its tokens"):
        recipes.get("tomesd").with_settings({"positions": True})


# -- Qwen2-VL ----------------------------------------------------------------------------------------------------------


def test_qwen2_vl_is_captured_by_its_own_exporter_and_its_packed_stream_is_refused() -> None:
    """Its images are packed into one sequence without a batch: nothing leaves it, but attention may be reduced."""
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    config = Qwen2VLVisionConfig(depth=2, embed_dim=32, hidden_size=48, num_heads=2, mlp_ratio=2, patch_size=4)
    torch.manual_seed(0)
    model = perturb(qwen.Qwen2VisionTransformerPretrainedModel(config), 0.1)
    inputs = {"hidden_states": torch.randn(128, 96), "grid_thw": torch.tensor([[1, 8, 8], [1, 8, 8]])}
    with pytest.raises(CaptureError, match="data-dependent"):
        capture(model, inputs, dynamic_batch=False)

    exported = DynamoExporter().export_program(model, inputs, DynamoConfig(dynamic=False))[0]
    program = canonical(Program(exported.run_decompositions({})))
    for recipe in ("tome", "fastervlm"):
        result = reduced(program, recipe, "keep=0.5")
        assert not [e for e in result.edits if e.pass_spec.startswith("reduce-tokens")]
        assert all("within windows or frames" in r.why and r.hint for r in result.refusals) and result.refusals

    inside = {"place": "attention{of=qkv}", "select": "bipartite"}
    args, kwargs = program.example_inputs
    with torch.no_grad():
        expected = model(**inputs).pooler_output
    neutral = Pipeline([ReduceTokens("tomesd", settings=inside, neutral=True)]).run(program).program
    close(neutral.flat(*args, **kwargs)[1], expected)
    merged = reduced(program, "tomesd", "keep=0.5", **inside)
    assert [(e.before, e.after) for e in merged.edits if e.pass_spec.startswith("reduce")] == [(64, 32)] * 2
    found = merged.program.flat(*args, **kwargs)[1]
    assert found.shape == expected.shape and (found - expected).abs().max() > 1e-2


# -- decoders over image and text --------------------------------------------------------------------------------------

IMAGE, TEXT = 16, 6


class Block(nn.Module):
    """A pre-norm decoder block with rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(32), nn.RMSNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        turned = []
        for t in (query, key):
            left, right = t.chunk(2, -1)
            turned.append(t * cos + torch.cat([-right, left], -1) * sin)
        return turned[0], turned[1], value

    def feed(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm2(x))))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        attended = F.scaled_dot_product_attention(*self.project(x, cos, sin), attn_mask=mask, is_causal=mask is None)
        return self.feed(x + self.proj(attended.transpose(1, 2).flatten(2)))


class Decoder(nn.Module):
    """A causal model that reads [image; text] and returns logits for the text; causal by flag or by mask."""

    def __init__(self, flag: bool) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(64.0), 10.0 ** -(torch.arange(8) / 4)).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.head, self.flag = nn.RMSNorm(32), nn.Linear(32, 11), flag

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([image, text], 1)
        n = x.shape[1]
        mask = None if self.flag else torch.ones(n, n, dtype=torch.bool).tril()
        for block in self.blocks:
            x = block(x, self.cos[:n], self.sin[:n], mask)
        return self.head(self.norm(x[:, image.shape[1] :]))


@cache
def decoder(flag: bool) -> tuple[Decoder, Program]:
    torch.manual_seed(0)
    model = perturb(Decoder(flag), 0.1)
    return model, canonical(capture(model, prompt(2)))


def prompt(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, IMAGE, 32, generator=generator), torch.randn(batch, TEXT, 32, generator=generator))


def hand_patched(
    model: Decoder, image: Tensor, text: Tensor, kept: Mapping[int, int], rows: int, place: str, position: str
) -> Tensor:
    """One sample after another; before block (or in the middle of block) l only ``kept[l]`` image tokens stay.

    They are those that the last ``rows`` tokens attend to most in block l - 1 (or l itself in the middle).
    """
    results = []
    for sample in zip(image, text, strict=True):
        x, places, score = torch.cat(sample)[None], list(range(IMAGE + TEXT)), None
        for layer, block in enumerate(model.blocks):
            if place != "mid" and layer in kept:
                x, places = _dropped(x, places, score, kept[layer])
            n = x.shape[1]
            at = list(range(n)) if position == "renumber" else places
            query, key, value = block.project(x, model.cos[at], model.sin[at])
            logits = (query @ key.mT / 4).masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
            score = logits.softmax(-1)[0, :, -rows:].mean((0, 1))
            x = x + block.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
            if place == "mid" and layer in kept:
                x, places = _dropped(x, places, score, kept[layer])
            x = block.feed(x)
        results.append(model.head(model.norm(x[0, -TEXT:])))
    return torch.stack(results)


def _dropped(x: Tensor, places: list[int], score: Tensor | None, count: int) -> tuple[Tensor, list[int]]:
    n = len(places)
    best = sorted(refs.best(score[: n - TEXT], count)) if count else []
    stay = [*best, *range(n - TEXT, n)]
    return x[:, stay], [places[i] for i in stay]


@pytest.mark.parametrize("position", ["keep", "renumber"])
@pytest.mark.parametrize(("score", "rows"), [("last_row", 1), ("text_rows", TEXT)])
@pytest.mark.parametrize("place", ["block", "mid"])
@pytest.mark.parametrize("flag", [True, False], ids=["flag", "mask"])
def test_a_decoder_that_drops_image_tokens(flag: bool, place: str, score: str, rows: int, position: str) -> None:
    model, program = decoder(flag)
    recipe = TokenRecipe("drop", "", "", "topk", score, place=place, position=position)
    result = reduced(program, recipe, {"keep": 0.5, "layers": [1, 3]})
    result.program.verify()
    assert [(e.before, e.after) for e in result.edits if e.pass_spec.startswith("reduce")] == [(22, 14), (14, 10)]
    for batch in (1, 3):
        inputs = prompt(batch, seed=3)
        with torch.no_grad():
            expected = hand_patched(model, *inputs, {1: 8, 3: 4}, rows, place, position)
            dense = model(*inputs)
        close(result.program.flat(*inputs)[0], expected)
        assert (dense - expected).abs().max() > 1e-2


def test_renumbering_matters() -> None:
    inputs = prompt(2)
    kept, renumbered = (
        hand_patched(decoder(True)[0], *inputs, {1: 8}, 1, "block", position) for position in ("keep", "renumber")
    )
    assert (kept - renumbered).abs().max() > 1e-3


@pytest.mark.parametrize("position", ["keep", "renumber"])
@pytest.mark.parametrize("layer", [0, 2, 0.875])
@pytest.mark.parametrize("flag", [True, False], ids=["flag", "mask"])
def test_a_decoder_that_all_image_tokens_leave(flag: bool, layer: float, position: str) -> None:
    model, program = decoder(flag)
    recipe = TokenRecipe("exit", "", "", "topk", "last_row", place={"exit": {"layer": layer}}, position=position)
    result = reduced(program, recipe, {"keep": 0.5})
    assert [(e.before, e.after) for e in result.edits if e.pass_spec.startswith("reduce")] == [(22, 6)]
    inputs = prompt(3, seed=3)
    with torch.no_grad():
        expected = hand_patched(model, *inputs, {int(layer * 4) if layer < 1 else layer: 0}, 1, "exit", position)
    close(result.program.flat(*inputs)[0], expected)


def test_merging_is_refused_in_a_causal_model() -> None:
    result = reduced(decoder(True)[1], "tome", "r=2")
    assert not [e for e in result.edits if e.pass_spec.startswith("reduce-tokens")]
    assert all("what comes after it" in r.why for r in result.refusals)


class Numbered(Decoder):
    """The same with positions as an input."""

    def forward(self, image: Tensor, text: Tensor, position_ids: Tensor) -> Tensor:
        x = torch.cat([image, text], 1)
        cos, sin = self.cos[position_ids][:, None], self.sin[position_ids][:, None]
        for block in self.blocks:
            x = block(x, cos, sin, None)
        return self.head(self.norm(x[:, image.shape[1] :]))


def test_positions_that_are_an_input_are_kept_and_not_renumbered() -> None:
    torch.manual_seed(0)
    model = perturb(Numbered(True), 0.1)
    ids = torch.arange(22).expand(2, -1).contiguous()
    program = canonical(capture(model, (*prompt(2), ids)))
    recipe = TokenRecipe("drop", "", "", "topk", "last_row", place="block")
    found = reduced(program, recipe, "keep=0.5@2").program.flat(*prompt(2, seed=3), ids)[0]
    with torch.no_grad():
        close(found, hand_patched(model, *prompt(2, seed=3), {2: 8}, 1, "block", "keep"))
    with pytest.raises(IllegalReduction, match="position terms that are constants"):
        reduced(program, recipe, "keep=0.5@2", position="renumber")
