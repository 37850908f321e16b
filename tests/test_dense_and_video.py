"""Recipes on models for dense prediction and on video models: shapes stay, nothing removed changes nothing, FLOPs fall.

Where a method has a hand-patched form here, the compiled model equals it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo import ZOO, images, perturb
from tests import recipe_references as refs
from tests import references
from tests.references import Attended, Tokens, log_size, merge, stream, take, tome, tome_hf_vit
from tokenopt.analysis.axes import propagate
from tokenopt.analysis.cuts import find_cuts
from tokenopt.analysis.sites import AttentionSite, find_sites
from tokenopt.cost import program_flops
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline, PipelineResult
from tokenopt.program import Program, capture, flatten_tensors
from tokenopt.tokens.recipe import TokenRecipe

INSIDE = "attention{of=qkv}"

# -- models ------------------------------------------------------------------------------------------------------------


class Features(nn.Module):
    """A timm encoder that returns some of its intermediate maps."""

    def __init__(self, model: nn.Module, indices: Sequence[int]) -> None:
        super().__init__()
        self.model, self.indices = model, list(indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(x, indices=self.indices, intermediates_only=True)


class Encoded(nn.Module):
    """The feature map of SAM's encoder, [B, C, H, W]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)


def intermediates() -> tuple[nn.Module, Any]:
    model = references.tiny_timm(depth=4, num_classes=0, global_pool="")
    return Features(model, (0, 2, 3)), (references.images(2),)


def sam() -> tuple[nn.Module, Any]:
    """Windows, then two global blocks in a row, and windows again; biases depend on the queries."""
    import timm

    size = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
    torch.manual_seed(0)
    model = timm.create_model("samvit_base_patch16_224", **size, window_size=4, global_attn_indexes=(1, 2))
    return Encoded(perturb(model, 0.2)), (images(64),)


def mask2former() -> tuple[nn.Module, Any]:
    import transformers as t

    backbone = t.SwinConfig(image_size=32, embed_dim=12, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 2], window_size=4,
                            out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = t.Mask2FormerConfig(
        use_timm_backbone=False, backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32,
        encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32,
        num_queries=5, num_labels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return perturb(t.Mask2FormerForUniversalSegmentation(config), 0.05), {"pixel_values": images(32)}


def vggt() -> tuple[nn.Module, Any]:
    model = refs.tiny_vggt()
    return model, (refs.frames(model),)


BUILDERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "intermediates": intermediates,
    "sam": sam,
    "hf_sam": lambda: ZOO["hf/SamVision"].build(),
    "dpt": lambda: ZOO["hf/DPTForDepthEstimation"].build(),
    "detr": lambda: ZOO["hf/DetrForObjectDetection"].build(),
    "mask2former": mask2former,
    "swin": lambda: ZOO["timm/swin_tiny_patch4_window7_224"].build(),
    "hiera": lambda: ZOO["timm/hiera_tiny_224"].build(),
    "videomae": lambda: ZOO["hf/VideoMAE"].build(),
    "vivit": lambda: ZOO["hf/Vivit"].build(),
    "timesformer": lambda: ZOO["hf/Timesformer"].build(),
    "vjepa2": lambda: ZOO["hf/VJEPA2"].build(),
    "vggt": vggt,
}


@cache
def built(name: str) -> tuple[nn.Module, Any]:
    return BUILDERS[name]()


@cache
def captured(name: str, *, dynamic: bool) -> Program:
    return capture(*built(name), dynamic_batch=dynamic)


@cache
def program(name: str, *, dynamic: bool) -> Program:
    return canonicalize(captured(name, dynamic=dynamic)).program


def sites(name: str) -> dict[str, AttentionSite]:
    dynamic = name in ("vivit", "vggt")  # whatever is captured anyway
    return {s.id: s for s in find_sites(propagate(program(name, dynamic=dynamic)))[0]}


def reduce(name: str, recipe: Any, schedule: Any = None, *, dynamic: bool = True, **options: Any) -> PipelineResult:
    return reduced(program(name, dynamic=dynamic), recipe, schedule, **options)


def reduced(source: Program, recipe: Any, schedule: Any = None, **options: Any) -> PipelineResult:
    return Pipeline([ReduceTokens(recipe, schedule, **options), RemoveDead()]).run(source)


def edits(result: PipelineResult) -> dict[str, tuple[int, int]]:
    return {e.site: (e.before, e.after) for e in result.edits if e.pass_spec.startswith("reduce-tokens")}


def run(found: Program, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a program of batch 2 and of the dense model on the same fresh inputs."""
    args, kwargs = program(name, dynamic=False).random_inputs(2, seed=1)
    with torch.no_grad():
        return found.flat(*args, **kwargs), flatten_tensors(built(name)[0](*args, **kwargs))


def close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- shapes, identity, FLOPs -------------------------------------------------------------------------------------------

COPY = ("tome", "r=6", {})
INTERPOLATE = ("random", "keep=0.5@0.5", {"restore": "interpolate"})
CANVAS = ("random", "keep=0.5@0.5", {"restore": "canvas", "place": "block"})
TOMESD = ("tomesd", None, {"place": "attention"})
TOMESD_QKV = ("tomesd", None, {"place": INSIDE})
TOME_QKV = ("tome", "r=2", {"place": INSIDE})
SPREAD = ("supertoken", None, {})

RUNS: dict[str, list[tuple[str, Any, dict[str, Any]]]] = {
    "intermediates": [COPY, INTERPOLATE, CANVAS, TOMESD],
    "sam": [COPY, ("random", "keep=0.5", {"restore": "interpolate", "place": "block"}), CANVAS, TOMESD, TOMESD_QKV,
            SPREAD, ("semantic-token", "keep=0.25", {"place.first": 1, "place.last": 2})],
    "hf_sam": [("random", "keep=0.5", {}), TOMESD_QKV],
    "dpt": [COPY, INTERPOLATE, CANVAS],
    "detr": [COPY, ("random", "keep=0.5@0", {"restore": "interpolate"}), CANVAS, TOMESD],
    "mask2former": [COPY, TOMESD_QKV],
    "swin": [("tome", "r=20", {}), TOMESD_QKV],
    "videomae": [COPY, INTERPOLATE, CANVAS, TOMESD, SPREAD, ("blank-patch", None, {}), ("fastvggt", "keep=0.3", {})],
    "timesformer": [TOMESD_QKV, TOME_QKV, ("random", "keep=0.5", {"restore": "interpolate", "place": INSIDE}),
                    ("random", "keep=0.5", {"restore": "zero", "place": INSIDE})],
    "vjepa2": [COPY],
}  # fmt: skip
CASES = [pytest.param(name, *case, id=f"{name}-{case[0]}-{i}") for name, cases in RUNS.items()
         for i, case in enumerate(cases)]  # fmt: skip


@pytest.mark.parametrize(("name", "recipe", "schedule", "settings"), CASES)
def test_nothing_removed_is_the_dense_model_and_a_reduction_keeps_its_shapes(
    name: str, recipe: str, schedule: Any, settings: dict[str, Any]
) -> None:
    neutral = reduce(name, recipe, settings=settings, neutral=True, dynamic=False)
    assert edits(neutral)
    assert all(before == after for before, after in edits(neutral).values())
    found, dense = run(neutral.program, name)
    close(found, dense, 2e-5)
    fewer = reduce(name, recipe, schedule, settings=settings, dynamic=False)
    assert edits(fewer)
    assert all(before > after for before, after in edits(fewer).values())
    assert program_flops(fewer.program) < program_flops(program(name, dynamic=False))
    found, dense = run(fewer.program, name)
    assert [f.shape for f in found] == [d.shape for d in dense]
    assert all(f.isfinite().all() for f in found)
    assert max(float((f - d).abs().max()) for f, d in zip(found, dense, strict=True)) > 1e-4


# -- what the analysis names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("videomae", {"32 = patch(2x4x4)"}),
        ("vivit", {"33 = cls(1) + patch(2x4x4)"}),
        ("timesformer", {"4 = patch(4)", "17 = cls(1) + patch(4x4)"}),
        ("vjepa2", {"32 = patch(2x4x4)", "64 = patch(64)"}),
        ("sam", {"16 = patch(4x4)", "64 = patch(8x8)"}),  # though windows split rows and columns
        ("hf_sam", {"49 = patch(7x7)", "256 = patch(16x16)"}),  # of a padded grid
        ("swin", {"49 = patch(7x7)"}),
        ("hiera", {"64 = patch(64)", "16 = patch(16)", "4 = patch(2x2)"}),  # windows first: not in raster order
        ("vggt", {"18 = cls(1) + dist(1) + token(16)", "90 = patch(90)"}),
    ],
)
def test_grids(name: str, axes: set[str]) -> None:
    assert {str(s.axis) for s in sites(name).values()} == axes


def test_special_tokens_of_frames() -> None:
    segment = sites("vggt")["global_blocks.0"].axis.reducible
    assert segment.grid is None
    assert list(segment.special) == [f * 18 + i for f in range(5) for i in (0, 1)]


@pytest.mark.parametrize("name", ["sam", "hf_sam", "swin"])
def test_windows_are_samples(name: str) -> None:
    """However windows, heads and batch are laid out, heads are what the model says."""
    heads = {"sam": {2}, "hf_sam": {3}, "swin": {1, 2, 4}}[name]
    assert {s.heads for s in sites(name).values() if s.node.args[0].meta["val"].dim() == 4} <= heads


@pytest.mark.parametrize("name", ["sam", "swin", "timesformer"])
def test_refusals_say_what_to_do(name: str) -> None:
    canon = program(name, dynamic=False)
    axes = propagate(canon)
    cuts, refusals = find_cuts(axes, find_sites(axes)[0])
    assert {c.site.id for c in cuts} == {"sam": {f"model.blocks.{i}.attn" for i in (1, 2)},
                                         "swin": {"layers.2.blocks.0.attn"}, "timesformer": set()}[name]  # fmt: skip
    assert refusals
    assert all("windows or frames" in r.why and "attention{of=qkv}" in r.hint for r in refusals)


def test_a_grid_is_refused_without_flattening() -> None:
    source = captured("sam", dynamic=False)
    result = reduced(Pipeline([FoldConstants(), RaiseAttention()]).run(source).program, "tome", "r=4")
    assert not edits(result)
    assert any("as a grid, 8 x 8" in r.why and "flatten-grids" in r.hint for r in result.refusals)


def test_what_needs_an_image_is_refused_on_a_video() -> None:
    for recipe in ("hiprune", "vflowopt"):
        result = reduce("videomae", recipe, "keep=0.5", dynamic=False)
        assert not edits(result)
        assert any("2x4x4" in r.why for r in result.refusals)


def test_interpolation_without_a_grid_is_refused() -> None:
    result = reduce("vjepa2", *INTERPOLATE[:2], settings=INTERPOLATE[2], dynamic=False)
    assert any("needs a grid" in r.why and r.where.startswith("predictor") for r in result.refusals)
    settings = {"restore": "interpolate", "place": INSIDE}
    result = reduce("timesformer", "random", "keep=0.5", settings=settings, dynamic=False)
    assert any("needs a grid" in r.why and "temporal" in r.where for r in result.refusals)


def test_short_sequences_are_left_out_with_a_reason() -> None:
    result = reduce("vjepa2", "tomesd", dynamic=False)
    assert not edits(result)
    assert sum("fewer than the 64" in r.why for r in result.refusals) == 3


# -- frames with special tokens ----------------------------------------------------------------------------------------


def test_special_tokens_of_frames_are_not_merged() -> None:
    result = reduce("vggt", "tome", "r=10")
    assert not edits(result)
    assert any("10 special tokens" in r.why and "bipartite_frames" in r.hint for r in result.refusals)


def test_special_tokens_of_frames_stay() -> None:
    recipe = TokenRecipe("received", "", "", score="received", select="topk", positions=True)
    result = reduce("vggt", recipe, {"keep": 0.2, "layers": [3]})
    assert edits(result) == {"global_blocks.1": (90, 18)}
    positions = result.program(*built("vggt")[1])[-1]
    special = [f * 18 + i for f in range(5) for i in (0, 1)]
    assert all(set(special) <= set(row) for row in positions.tolist())
    assert not torch.equal(positions[0], positions[1])


def test_merging_in_cells_of_every_frame() -> None:
    """tomesd on the global attention of VGGT: special tokens take no part."""
    model = built("vggt")[0]
    result = reduce("vggt", "tomesd", "keep=0.5", settings={"place": INSIDE})
    assert edits(result) == {"global_blocks.0": (90, 45), "global_blocks.1": (90, 45)}
    x = refs.frames(model, 3, seed=2)
    with torch.no_grad():
        h = model.embed(x)
        b, s, p, c = h.shape
        for layer, (frame, whole) in enumerate(zip(model.frame_blocks, model.global_blocks, strict=True)):
            h = frame(h.reshape(b * s, p, c), *model.tables(1)).reshape(b, s * p, c)
            cells = frame_cells(5, (4, 4), 2 * layer + 1)
            targets = [f * 18 + 2 + i for f, inner in enumerate(cells) for i in inner]
            sources = [f * 18 + 2 + i for f in range(5) for i in range(16) if f * 18 + 2 + i not in targets]
            plan = [refs.match(row, sources, targets, 45) for row in whole.norm1(h)]
            merged = [heads_of(t, plan) for t in whole.project(whole.norm1(h), *model.tables(s))]
            h = h + refs.copied(whole.attend(*merged), plan, s * p)
            h = (h + whole.mlp(whole.norm2(h))).reshape(b, s, p, c)
        expected = model.norm(h)
    for batch in (1, 3):
        close(result.program.flat(x[:batch]), [expected[:batch]])


def frame_cells(frames: int, grid: tuple[int, int], seed: int) -> list[list[int]]:
    """The targets of tomesd in each frame, drawn one frame after another."""
    generator = torch.Generator().manual_seed(seed)
    return [refs.cell_targets(grid, 2, generator) for _ in range(frames)]


def heads_of(x: Tensor, plan: refs.Plan) -> Tensor:
    """The means of the groups of a plan, [B, H, N, D] -> [B, H, M, D]."""
    return torch.stack([refs.apply(x[:, i], plan) for i in range(x.shape[1])], dim=1)


# -- outputs that nobody reads -----------------------------------------------------------------------------------------


class Aggregator(nn.Module):
    """Stacks the normed output of every block, as VGGT's aggregator; its head reads some of them."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.read = refs.tiny("features"), read

    def forward(self, x: Tensor) -> Tensor:
        h = self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(x)))
        outputs = []
        for block in self.model.blocks:
            h = block(h)
            outputs.append(self.model.norm(h))
        return self.read(torch.stack(outputs))


@pytest.mark.parametrize(
    ("read", "norms", "attentions"),
    [
        (lambda x: x[1] + x[-1], 8 + 2, 4),
        (lambda x: x[:2].mean(0), 4 + 2, 2),
        (lambda x: x[[0, 2]].sum(0), 6 + 2, 3),
        (lambda x: x.unbind(0)[2], 6 + 1, 3),
    ],
)
def test_dead_intermediate_outputs_go(read: Callable[[Tensor], Tensor], norms: int, attentions: int) -> None:
    model, x = Aggregator(read).eval(), references.images(2)
    lean = canonicalize(capture(model, x, dynamic_batch=False)).program
    targets = [str(n.target) for n in lean.graph.nodes if n.op == "call_function"]
    assert sum("layer_norm" in t for t in targets) == norms
    assert sum("tokenopt.attention" in t for t in targets) == attentions
    x = references.images(2, seed=1)
    with torch.no_grad():
        close(lean.flat(x), [model(x)])


# -- SAM: windows, global blocks, biases made from the queries ---------------------------------------------------------


def sam_qkv(attention: nn.Module, h: Tensor) -> list[Tensor]:
    """Query, key and value of [B, N, C], each [B, H, N, D]."""
    b, n, _ = h.shape
    return list(attention.qkv(h).view(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4))


def sam_bias(attention: nn.Module, query: Tensor, side: int) -> Tensor:
    from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

    tables, size = (attention.rel_pos_h, attention.rel_pos_w), (side, side)
    flat = get_decomposed_rel_pos_bias(query.flatten(0, 1), *tables, size, size)
    return flat.view(*query.shape[:2], side * side, side * side)


def rows_and_columns(bias: Tensor, places: Tensor) -> Tensor:
    """[B, H, N, N] at the places [B, M]: [B, H, M, M]."""
    return torch.stack([row[:, at][:, :, at] for row, at in zip(bias, places, strict=True)])


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


def embedded(model: nn.Module, x: Tensor) -> Tensor:
    x = model.patch_embed(x)
    return x if model.pos_embed is None else x + model.pos_embed


@pytest.mark.parametrize("place", ["attention", INSIDE])
def test_tomesd_on_sam(place: str) -> None:
    """Of qkv, windows merge each by itself; of the input, global blocks alone do. Biases are those of what is kept."""
    from timm.models.vision_transformer_sam import window_partition, window_unpartition

    model = built("sam")[0].model
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))

    def merged(block: nn.Module, h: Tensor, layer: int) -> Tensor:
        side = h.shape[1]
        h = h.flatten(1, 2)
        n, attention = h.shape[1], block.attn
        targets = refs.cell_targets((side, side), 2, torch.Generator().manual_seed(layer))
        plan = [refs.match(row, [i for i in range(n) if i not in targets], targets, n // 2) for row in h]
        stands = torch.tensor([[group[0] for group in groups] for groups in plan])
        if place == "attention":  # the bias of a merged query, which all of its tokens ask with
            q, k, v = sam_qkv(attention, refs.apply(h, plan))
            whole = torch.stack([refs.copied(q[:, i], plan, n) for i in range(q.shape[1])], dim=1)
        else:
            whole = sam_qkv(attention, h)[0]
            q, k, v = (heads_of(t, plan) for t in sam_qkv(attention, h))
        bias = rows_and_columns(sam_bias(attention, whole, side), stands)
        return attention.proj(refs.copied(attended(q, k, v, bias), plan, n)).unflatten(1, (side, side))

    result = reduce("sam", "tomesd", "keep=0.5", settings={"place": place})
    assert set(edits(result).values()) == ({(64, 32)} if place == "attention" else {(64, 32), (16, 8)})
    with torch.no_grad():
        h = embedded(model, x)
        for layer, block in enumerate(model.blocks):
            if block.window_size and place == "attention":
                h = block(h)
                continue
            normed = block.norm1(h)
            if block.window_size:
                windows, padded = window_partition(normed, block.window_size)
                update = window_unpartition(merged(block, windows, layer), block.window_size, (8, 8), padded)
            else:
                update = merged(block, normed, layer)
            h = h + update
            h = h + block.mlp(block.norm2(h))
        expected = model.neck(h.permute(0, 3, 1, 2))
    for batch in (1, 3):
        close(result.program.flat(x[:batch]), [expected[:batch]])


def test_tome_on_global_blocks_of_sam() -> None:
    """Two global blocks run on merged tokens, and all come back before the windows behind them."""
    model = built("sam")[0].model
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    result = reduce("sam", "tome", {"r": [0, 20, 9, 0]})
    assert edits(result) == {"model.blocks.1.attn": (64, 44), "model.blocks.2.attn": (44, 35)}
    with torch.no_grad():
        tokens = stream(model.blocks[0](embedded(model, x)).flatten(1, 2))
        for block, r in ((model.blocks[1], 20), (model.blocks[2], 9)):
            q, k, v = sam_qkv(block.attn, block.norm1(tokens.x))
            whole = torch.stack([take(q[:, i], tokens.home) for i in range(q.shape[1])], dim=1)
            bias = rows_and_columns(sam_bias(block.attn, whole, 8), tokens.position)
            if tokens.merged:
                bias = bias + log_size(tokens)
            tokens = replace(tokens, x=tokens.x + block.attn.proj(attended(q, k, v, bias)))
            tokens = merge(tokens, k, r)
            tokens = replace(tokens, x=tokens.x + block.mlp(block.norm2(tokens.x)))
        # The window block adds what windows attended, of all tokens, to the merged ones: the mean of each by size.
        windowed = model.blocks[3]
        full = tokens.restored().unflatten(1, (8, 8))
        update = windowed_update(windowed, full).flatten(1, 2)
        tokens = replace(tokens, x=tokens.x + mean_at_home(update, tokens))
        tokens = replace(tokens, x=tokens.x + windowed.mlp(windowed.norm2(tokens.x)))
        expected = model.neck(tokens.restored().unflatten(1, (8, 8)).permute(0, 3, 1, 2))
    for batch in (1, 3):
        close(result.program.flat(x[:batch]), [expected[:batch]])


def windowed_update(block: nn.Module, h: Tensor) -> Tensor:
    from timm.models.vision_transformer_sam import window_partition, window_unpartition

    windows, padded = window_partition(block.norm1(h), block.window_size)
    return window_unpartition(block.attn(windows), block.window_size, tuple(h.shape[1:3]), padded)


def mean_at_home(x: Tensor, tokens: Tokens) -> Tensor:
    """The mean over the originals that each token stands for: [B, originals, C] -> [B, N, C]."""
    share = F.one_hot(tokens.home, tokens.x.shape[1]).to(x.dtype)
    return (share / share.sum(1, keepdim=True)).mT @ x


# -- video -------------------------------------------------------------------------------------------------------------


def videomae_layers(model: nn.Module) -> list[references.Layer]:
    layers = []
    for block in model.encoder.layer:
        a, output = block.attention.attention, block.output
        project = references._three(a.query, a.key, a.value, a.num_attention_heads)
        mlp = nn.Sequential(block.intermediate, output.dense)
        out = references._plain(block.attention.output.dense)
        layers.append(references.pre_norm(block.layernorm_before, project, out, block.layernorm_after, mlp))
    return layers


def videos() -> Tensor:
    return torch.randn(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("r", [[6, 4, 2], [0, 12, 0]])
def test_tome_on_videomae(r: list[int]) -> None:
    model, x = built("videomae")[0], videos()
    with torch.no_grad():
        expected = tome(stream(model.embeddings(x, None)), videomae_layers(model), r).restored()
    result = reduce("videomae", "tome", {"r": r})
    for batch in (1, 3):
        close(result.program.flat(pixel_values=x[:batch]), [expected[:batch]])


@pytest.mark.parametrize("r", [[6, 4, 2], [0, 12, 0]])
def test_tome_on_vivit(r: list[int]) -> None:
    model, x = built("vivit")[0], videos()
    with torch.no_grad():
        expected = tome_hf_vit(model, x, r)
    result = reduce("vivit", "tome", {"r": r})
    for batch in (1, 3):
        close(result.program.flat(pixel_values=x[:batch]), [e[:batch] for e in expected])


def inside_videomae(x: Tensor, partition: Callable[[int], tuple[Sequence[int], Sequence[int]]], r: int) -> Tensor:
    """VideoMAE with its attentions on merged inputs: ``partition(layer)`` gives sources and targets."""
    model = built("videomae")[0]
    h = model.embeddings(x, None)
    for layer, block in enumerate(model.encoder.layer):
        normed = block.layernorm_before(h)
        plan = [refs.match(row, *partition(layer), r) for row in normed]
        h = h + refs.copied(block.attention(refs.apply(normed, plan)), plan, normed.shape[1])
        h = block.output(block.intermediate(block.layernorm_after(h)), h)
    return h


@pytest.mark.parametrize("place", ["attention", INSIDE])
def test_cells_of_every_frame(place: str) -> None:
    """Plain means of inputs are plain means of queries, keys and values, as projections are linear."""

    def partition(layer: int) -> tuple[list[int], list[int]]:
        targets = [16 * f + i for f, cells in enumerate(frame_cells(2, (4, 4), layer)) for i in cells]
        return [i for i in range(32) if i not in targets], targets

    with torch.no_grad():
        expected = inside_videomae(videos(), partition, 16)
    result = reduce("videomae", "tomesd", "keep=0.5", settings={"place": place})
    close(result.program.flat(pixel_values=videos()), [expected])


def test_later_frames_merge_into_the_first() -> None:
    partition = lambda layer: refs.vggt_partition(2, 0, (4, 4), 2, layer, 0.1)  # noqa: E731
    sources = len(partition(0)[0])
    with torch.no_grad():
        expected = inside_videomae(videos(), partition, sources)
    result = reduce("videomae", "fastvggt")
    assert set(edits(result).values()) == {(32, 32 - sources)}
    close(result.program.flat(pixel_values=videos()), [expected])


@pytest.mark.parametrize(("budget", "counts"), [((), (4, 4)), ((3, 1), (6, 2))])
def test_budgets_per_frame(budget: tuple[int, ...], counts: tuple[int, int]) -> None:
    model, x = built("videomae")[0], videos()
    last: list[Attended] = []
    with torch.no_grad():
        tokens = stream(model.embeddings(x, None))
        for layer in videomae_layers(model):
            last.append(layer.attend(tokens, None))
            tokens = replace(tokens, x=layer.feed(replace(tokens, x=last[-1].x)))
        received = refs.weights_of(last[-1]).mean(dim=(1, 2))
        kept = [[16 * f + i for f, k in enumerate(counts) for i in sorted(refs.best(row[16 * f : 16 * f + 16], k))]
                for row in received]  # fmt: skip
    settings = {"select": "groups", "select.budget": list(budget)}
    result = reduce("videomae", "fopru", "keep=0.25", settings=settings)
    close(result.program.flat(pixel_values=x), [take(tokens.x, torch.tensor(kept))])


def test_pooling_in_three_dimensions() -> None:
    model, x = built("videomae")[0], videos()
    with torch.no_grad():
        grid = model(x).last_hidden_state.transpose(1, 2).unflatten(2, (2, 4, 4))
        expected = F.adaptive_avg_pool3d(grid, (1, 4, 2)).flatten(2).transpose(1, 2)
    close(reduce("videomae", "pool", "keep=0.25").program.flat(pixel_values=x), [expected])


def test_variance_of_tubelets() -> None:
    """The frames of this model's input lie before its channels."""
    model, x = built("videomae")[0], videos()
    x[:, :2, :, :8] *= 0.1  # eight tubelets of the first pair of frames
    result = reduce("videomae", "blank-patch", {"keep": 0.75, "layers": [0]}, short_outputs=True)
    with torch.no_grad():
        h = model.embeddings(x, None)[:, 8:]
        for block in model.encoder.layer:
            h = block(h)
    close(result.program.flat(pixel_values=x), [h])


@contextmanager
def forwards(methods: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules with another forward."""
    try:
        for module, method in methods.items():
            module.forward = method
        yield
    finally:
        for module in methods:
            del module.forward


def test_tomesd_in_every_frame_of_timesformer() -> None:
    """Spatial attention of each frame merges by itself; time has no grid."""
    model, x = built("timesformer")[0], videos()
    result = reduce("timesformer", "tomesd", "keep=0.5", settings={"place": INSIDE})
    assert set(edits(result).values()) == {(17, 9)}
    assert sum("temporal" in r.where for r in result.refusals) == 3

    def spatial(layer: int, module: nn.Module) -> Callable[..., Any]:
        def forward(h: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
            targets = refs.cell_targets((4, 4), 2, torch.Generator().manual_seed(2 * layer + 1))
            sources = [i for i in range(16) if i not in targets]
            plan = [refs.shifted(1, refs.match(row[1:], sources, targets, 8)) for row in h]
            inner = module.attention(refs.apply(h, plan))[0]
            return (module.output(refs.copied(inner, plan, 17)),)

        return forward

    modules = [block.attention for block in model.encoder.layer]
    with forwards({m: spatial(i, m) for i, m in enumerate(modules)}), torch.no_grad():
        expected = model(x).last_hidden_state
    for batch in (1, 3):
        close(result.program.flat(pixel_values=x[:batch]), [expected[:batch]])
