"""Merging inside the self-attention of denoisers: the recipes equal hooks on the attention modules of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo import ZOO, call
from tests import recipe_references as refs
from tests.references import images, perturb
from tokenopt.errors import IllegalReduction, UsageError
from tokenopt.optimization import optimize
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline, PipelineResult
from tokenopt.program import Program, capture, flatten_tensors
from tokenopt.recipes import get

WORDS, SIDE = 11, 8
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "out_channels": 4, "in_channels": 4}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Flux(nn.Module):
    """Flux with the ids of its positions, which have no batch dimension, as constants."""

    def __init__(self, flux: nn.Module) -> None:
        super().__init__()
        self.flux = flux
        side = torch.arange(float(SIDE))
        self.register_buffer("image_ids", torch.cartesian_prod(torch.zeros(1), side, side))
        self.register_buffer("text_ids", torch.zeros(WORDS, 3))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        states = (hidden_states, encoder_hidden_states, pooled, timestep)
        return self.flux(*states, img_ids=self.image_ids, txt_ids=self.text_ids, return_dict=False)[0]


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(**SMALL, num_layers=2, sample_size=2 * SIDE, num_embeds_ada_norm=10)


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        **SMALL, num_layers=2, sample_size=2 * SIDE, cross_attention_dim=32, caption_channels=24
    )


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        **SMALL, num_layers=2, sample_size=2 * SIDE, joint_attention_dim=24, caption_projection_dim=32,
        pooled_projection_dim=16, pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return Flux(
        FluxTransformer2DModel(**SMALL, num_layers=1, num_single_layers=2, joint_attention_dim=24,
                               pooled_projection_dim=16, axes_dims_rope=(4, 4, 8))
    )  # fmt: skip


def _unet() -> nn.Module:
    return ZOO["diffusers/UNet2DConditionModel"].build()[0]


def _inputs(kind: str, batch: int, seed: int) -> dict[str, Tensor]:
    latents, text = randn(batch, 4, 2 * SIDE, 2 * SIDE, seed=seed), randn(batch, WORDS, 24, seed=seed + 1)
    step = torch.tensor([3, 7, 5])[:batch]
    if kind == "dit":
        return {"hidden_states": latents, "timestep": step, "class_labels": torch.tensor([1, 2, 9])[:batch]}
    if kind == "unet":
        return {"sample": latents, "timestep": step, "encoder_hidden_states": text}
    if kind == "pixart":
        mask = torch.arange(WORDS) < torch.tensor([[WORDS], [6], [8]])[:batch]
        more = {"encoder_attention_mask": mask.long()}
    elif kind == "sd3":
        more = {"pooled_projections": randn(batch, 16, seed=seed + 2)}
    else:
        latents = randn(batch, SIDE * SIDE, 4, seed=seed)
        step = step / 10
        return {"hidden_states": latents, "encoder_hidden_states": text, "pooled": randn(batch, 16), "timestep": step}
    return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": step, **more}


@dataclass(frozen=True)
class Denoiser:
    """A denoiser: how to make it, its attentions (path, tokens of text before the image's), and what it needs."""

    make: Callable[[], nn.Module]
    attentions: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    side: int = SIDE
    layers: tuple[int, ...] | None = None
    dynamic: bool = True


_BLOCKS = {"transformer_blocks.0.attn1": 0, "transformer_blocks.1.attn1": 0}
_UNET = (
    "down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"
)  # fmt: skip
DENOISERS = {
    "dit": Denoiser(_dit, _BLOCKS),
    "pixart": Denoiser(_pixart, _BLOCKS),
    "sd3": Denoiser(
        _sd3, {"transformer_blocks.0.attn": 0, "transformer_blocks.0.attn2": 0, "transformer_blocks.1.attn": 0}
    ),
    "flux": Denoiser(
        _flux,
        {"flux.transformer_blocks.0.attn": 0, "flux.single_transformer_blocks.0.attn": WORDS,
         "flux.single_transformer_blocks.1.attn": WORDS},
        {"grid": (SIDE, SIDE)},
    ),  # fmt: skip
    # the middle block has a quarter of the tokens: only the others are merged
    "unet": Denoiser(
        _unet, {f"{p}.transformer_blocks.0.attn1": 0 for p in _UNET}, side=2 * SIDE, layers=(0, 2, 3), dynamic=False
    ),
}


@cache
def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return perturb(DENOISERS[kind].make(), 0.1)


@cache
def program(kind: str) -> Program:
    captured = capture(model(kind), _inputs(kind, 2, 0), dynamic_batch=DENOISERS[kind].dynamic)
    return Pipeline([FoldConstants(), RaiseAttention()]).run(captured).program


def reduce(kind: str, recipe: str, schedule: Any = None, neutral: bool = False, **settings: Any) -> PipelineResult:
    settings = {**DENOISERS[kind].settings, **settings}
    key = (kind, recipe, str(schedule), neutral, str(settings))
    if key not in _reduced:
        steps = [ReduceTokens(recipe, schedule, settings=settings, neutral=neutral), RemoveDead()]
        _reduced[key] = Pipeline(steps).run(program(kind))
    return _reduced[key]


_reduced: dict[Any, PipelineResult] = {}


def edits(result: PipelineResult) -> dict[str, tuple[int | None, int | None]]:
    return {e.site: (e.before, e.after) for e in result.edits if e.pass_spec.startswith("reduce-tokens")}


def dense(kind: str, inputs: dict[str, Tensor]) -> Tensor:
    return flatten_tensors(call(model(kind), inputs))[0]


# -- hooks -------------------------------------------------------------------------------------------------------------

Fewer = tuple[Tensor, list[int], Callable[[Tensor], Tensor]]
"""Fewer tokens [m, C], the position that each stands at, and how [m, C'] becomes [n, C'] again."""


def merged(keep: float, cell: int, seed: int, restore: str = "copy", cache: list[Tensor] | None = None) -> Any:
    """Token merging for stable diffusion: ``method(tokens [n, C], side, layer, sample)``."""

    def method(h: Tensor, side: int, layer: int, sample: int) -> Fewer:
        targets = refs.cell_targets((side, side), cell, torch.Generator().manual_seed(seed + layer))
        sources = [i for i in range(len(h)) if i not in targets]
        groups = refs.match(h, sources, targets, len(h) - refs.count(keep, len(h)))

        def back(y: Tensor) -> Tensor:
            if restore == "copy":
                return refs.copied(y[None], [groups], len(h))[0]
            full = torch.zeros(len(h), y.shape[1]) if restore == "zero" else cache[layer][sample].clone()
            for row, group in zip(y, groups, strict=True):
                full[group[0]] = row
            return full

        return refs.apply(h[None], [groups])[0], [g[0] for g in groups], back

    return method


def associated(keep: float) -> Any:
    """Super tokens."""

    def method(h: Tensor, side: int, layer: int, sample: int) -> Fewer:
        cells = refs.grid_cells((side, side), refs.count(keep, len(h)))
        tokens, belongs = refs.association(h, (side, side), cells, local=True)
        middle = [
            int((i + 0.5) * side / cells[0]) * side + int((j + 0.5) * side / cells[1])
            for i in range(cells[0])
            for j in range(cells[1])
        ]
        return tokens, middle, lambda y: belongs @ y

    return method


@contextmanager
def patched(kind: str, method: Any, record: dict[int, Tensor] | None = None) -> Iterator[nn.Module]:
    """The model with every attention run on fewer image tokens, one sample after another."""
    denoiser = DENOISERS[kind]
    changed = []
    for layer, (path, before) in enumerate(denoiser.attentions.items()):
        if denoiser.layers is None or layer in denoiser.layers:
            attention = model(kind).get_submodule(path)
            attention.forward = _fewer(attention.forward, method, denoiser.side, layer, before, record)
            changed.append(attention)
    try:
        yield model(kind)
    finally:
        for attention in changed:
            del attention.forward


def _fewer(forward: Any, method: Any, side: int, layer: int, before: int, record: dict[int, Tensor] | None) -> Any:
    def run(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> Any:
        results = []
        for sample, row in enumerate(hidden_states):
            tokens, positions, back = method(row[before:], side, layer, sample)
            text = before if encoder_hidden_states is None else encoder_hidden_states.shape[1]
            if encoder_hidden_states is not None:
                others["encoder_hidden_states"] = encoder_hidden_states[sample : sample + 1]
            if image_rotary_emb is not None:
                rows = [*range(text), *(text + p for p in positions)]
                others["image_rotary_emb"] = tuple(table[rows] for table in image_rotary_emb)
            found = forward(torch.cat([row[:before], tokens])[None], **others)
            image, *rest = found if isinstance(found, tuple) else (found,)
            results.append([torch.cat([image[0, :before], back(image[0, before:])]), *(r[0] for r in rest)])
        stacked = tuple(torch.stack(rows) for rows in zip(*results, strict=True))
        if record is not None:
            record[layer] = stacked[0]
        return stacked if len(stacked) > 1 else stacked[0]

    return run


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# -- the recipes equal the hooks ---------------------------------------------------------------------------------------

TOMESD = [(kind, 0.5, {}) for kind in DENOISERS] + [("dit", 0.3, {"select.cell": 4, "select.seed": 5})]


@pytest.mark.parametrize(("kind", "keep", "settings"), TOMESD, ids=lambda v: str(v) if v else "")
def test_tomesd_equals_hooked_attention(kind: str, keep: float, settings: dict[str, Any]) -> None:
    result = reduce(kind, "tomesd", {"keep": keep} if settings else None, **settings)
    result.program.verify()
    assert len(edits(result)) == len(DENOISERS[kind].layers or DENOISERS[kind].attentions)
    method = merged(keep, settings.get("select.cell", 2), settings.get("select.seed", 0))
    for batch in (1, 3) if DENOISERS[kind].dynamic else (2,):
        inputs = _inputs(kind, batch, 4)
        with patched(kind, method):
            expected = dense(kind, inputs)
        close(result.program.flat(**inputs)[0], expected)
        assert (expected - dense(kind, inputs)).abs().max() > 1e-2


def test_agentsd_equals_hooked_attention() -> None:
    inputs = _inputs("pixart", 2, 4)
    for name, keep, cell in (("agentsd", 0.6, 4), ("agentsd-late", 0.5, 2)):
        with patched("pixart", merged(keep, cell, 0)):
            expected = dense("pixart", inputs)
        close(reduce("pixart", name).program.flat(**inputs)[0], expected)


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_supertoken_equals_hooked_attention(kind: str) -> None:
    inputs = _inputs(kind, 2, 4)
    with patched(kind, associated(0.25)):
        expected = dense(kind, inputs)
    close(reduce(kind, "supertoken").program.flat(**inputs)[0], expected)


@pytest.mark.parametrize("recipe", ["tomesd", "supertoken"])
@pytest.mark.parametrize("kind", list(DENOISERS))
def test_neutral_reductions_equal_the_dense_model(kind: str, recipe: str) -> None:
    result = reduce(kind, recipe, neutral=True)
    assert edits(result)
    inputs = _inputs(kind, 3 if DENOISERS[kind].dynamic else 2, 4)
    close(result.program.flat(**inputs)[0], dense(kind, inputs))


# -- what is merged, and what is not -----------------------------------------------------------------------------------


def test_text_is_protected() -> None:
    """In joint blocks the image's stream is merged, in single-stream blocks its part of the common sequence."""
    image, both = (64, 32), (WORDS + 64, WORDS + 32)
    assert list(edits(reduce("sd3", "tomesd")).values()) == [image] * 3
    assert list(edits(reduce("flux", "tomesd")).values()) == [image, both, both]


def test_only_the_highest_resolution_of_a_unet_is_merged() -> None:
    highest = edits(reduce("unet", "tomesd"))
    assert set(highest.values()) == {(256, 128)} and len(highest) == 3
    every = edits(reduce("unet", "tomesd", place="attention{downsample=2}"))
    assert every == {**highest, "mid_block.attentions.0.transformer_blocks.0.attn1": (64, 32)}
    assert edits(reduce("unet", "tomesd", place="attention")) == every


def test_the_partition_is_fixed() -> None:
    """Sources and targets are constants of the graph, one row for all samples: both halves of guidance share them."""
    reduced = reduce("pixart", "tomesd").program
    nodes = [n for n in reduced.graph.nodes if n.target is torch.ops.tokenopt.match_partition.default]
    assert len(nodes) == 2
    for node in nodes:
        sources, targets = (reduced.constant(n) for n in node.args[1:3])
        assert sources.shape == (1, 48) and targets.shape == (1, 16)
        assert sorted([*sources[0].tolist(), *targets[0].tolist()]) == list(range(64))
    half = _inputs("pixart", 2, 4)
    other = {**half, "encoder_hidden_states": torch.zeros(2, WORDS, 24)}
    guided = reduced.flat(**{name: torch.cat([half[name], other[name]]) for name in half})[0]
    close(guided[:2], reduced.flat(**half)[0])
    close(guided[2:], reduced.flat(**other)[0])


def test_a_grid_that_the_graph_does_not_show_must_be_said() -> None:
    result = reduce("flux", "tomesd", grid=None)
    assert not edits(result)
    assert all("does not show it" in r.why and "grid=" in r.hint for r in result.refusals)
    with pytest.raises(UsageError, match="no tokens form a grid of 5 x 5"):
        reduce("flux", "tomesd", grid=(5, 5))


# -- restores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_restore_zero_does_not_update_removed_tokens(kind: str) -> None:
    inputs = _inputs(kind, 2, 4)
    with patched(kind, merged(0.5, 2, 0, "zero")):
        expected = dense(kind, inputs)
    close(reduce(kind, "tomesd", restore="zero").program.flat(**inputs)[0], expected)


def test_restore_cached_is_fed_its_own_outputs() -> None:
    result = reduce("dit", "tomesd", restore="cached")
    program = result.program
    assert [i.name for i in program.inputs][-2:] == ["cache_0", "cache_1"]
    first = _inputs("dit", 2, 4)
    second = {**_inputs("dit", 2, 8), "timestep": torch.tensor([6, 1])}
    empty = {f"cache_{i}": torch.zeros(2, 64, 32) for i in range(2)}
    found, *caches = program.flat(**first, **empty)
    close(found, reduce("dit", "tomesd", restore="zero").program.flat(**first)[0])
    assert [c.shape for c in caches] == [(2, 64, 32)] * 2

    # removed tokens have what they had, so the same step again changes nothing
    fed = dict(zip(empty, caches, strict=True))
    again, *same = program.flat(**first, **fed)
    close(again, found)
    for one, before in zip(same, caches, strict=True):
        close(one, before)

    # what another step adds to the stream is what the cache holds, whatever the gate of that step
    with patched("dit", merged(0.5, 2, 0, "cached", [c / _gate(second, i) for i, c in enumerate(caches)])):
        expected = dense("dit", second)
    close(program.flat(**second, **fed)[0], expected)
    assert (_gate(first, 0) - _gate(second, 0)).abs().max() > 1e-2
    result, *more = program(**second, **fed)
    assert torch.equal(result.sample, program.flat(**second, **fed)[0]) and len(more) == 2


def _gate(inputs: dict[str, Tensor], layer: int) -> Tensor:
    """What a block of DiT multiplies its attention with, [B, 1, C]."""
    norm = model("dit").transformer_blocks[layer].norm1
    with torch.no_grad():
        normed = norm(torch.zeros(2, 64, 32), inputs["timestep"], inputs["class_labels"], hidden_dtype=torch.float32)
    return normed[1][:, None]


def test_a_cache_inside_attention_itself() -> None:
    """Queries, keys and values are reduced instead of their input: the cache holds what attention gave."""
    program = reduce("dit", "tomesd", place="attention{of=qkv}", restore="cached").program
    inputs = _inputs("dit", 2, 4)
    empty = {f"cache_{i}": torch.zeros(2, 64, 32) for i in range(2)}
    found, *caches = program.flat(**inputs, **empty)
    again, *same = program.flat(**inputs, **dict(zip(empty, caches, strict=True)))
    close(again, found)
    close(same[1], caches[1])


def test_features_of_their_own_are_refused_inside_attention() -> None:
    with pytest.raises(UsageError, match="inside attention"):
        get("tomesd").with_settings({"restore": "canvas"})


class Tapped(nn.Module):
    """A vision transformer that returns its tokens in the middle, too."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = refs.tiny("features", depth=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.vit._pos_embed(self.vit.patch_embed(x))
        middle = self.vit.blocks[0](x)
        return middle, self.vit.blocks[1](middle)


def test_a_cache_for_two_values_is_refused() -> None:
    """Tokens that leave a range of blocks and are needed in the middle of it would need two caches."""
    captured = capture(Tapped(), (images(2),))
    settings = {"select": "bipartite{metric=hidden}", "place": "range{first=0, last=1}", "restore": "cached"}
    steps = [FoldConstants(), RaiseAttention(), ReduceTokens("tomesd", settings=settings)]
    with pytest.raises(IllegalReduction, match="one sequence of tokens per place"):
        Pipeline(steps).run(captured)


def test_optimize_checks_a_denoiser() -> None:
    result = optimize(model("dit"), _inputs("dit", 2, 0), recipe="tomesd")
    assert result.changed
    assert [e["after"] for e in result.report.to_dict()["edits"]] == [32, 32]
