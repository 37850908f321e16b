"""Attention patterns on models: they equal eager models whose attention is masked, the dense form, and dense attention.

The eager references run the real modules with every call of scaled_dot_product_attention masked by loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.zoo import ZOO
from tests import references
from tokenopt import capture, optimize, runtimes
from tokenopt.attention import AttentionRecipe, Full, Global, Mask, Neighborhood, Nothing, Stripe, on, per_head
from tokenopt.errors import UsageError
from tokenopt.loading import load_program
from tokenopt.optimization import Result
from tokenopt.passes.sparsify_attention import SparsifyAttention
from tokenopt.pipeline import Pipeline, PipelineResult, parse_passes
from tokenopt.program import Program, flatten_tensors
from tokenopt.run import resolved_recipe
from tokenopt.runtimes.tensorrt import TensorRTRTX, read_description

pytestmark = pytest.mark.usefixtures("small_tiles")
rtx = pytest.mark.skipif(TensorRTRTX().available() is not None, reason="tensorrt_rtx is not installed")
Grid = tuple[int, ...]
Sees = Callable[[Grid, Grid, Grid], bool]
CANONICAL = "fold-constants,raise-attention,flatten-grids"

# -- eager models with a mask ------------------------------------------------------------------------------------------


def window(query: Grid, key: Grid, grid: Grid, size: int = 3) -> bool:
    """A window that is shifted inward at borders, in loops."""
    starts = [min(max(q - size // 2, 0), max(n - size, 0)) for q, n in zip(query, grid, strict=True)]
    return all(start <= k < start + size for start, k in zip(starts, key, strict=True))


def sink(query: Grid, key: Grid, grid: Grid) -> bool:
    return query[0] - 7 <= key[0] <= query[0] or key[0] < 2


@dataclass(frozen=True)
class Site:
    """One attention: the grid of its tokens, and how many tokens are before and behind it."""

    grid: Grid
    before: int = 0
    after: int = 0

    def mask(self, sees: Sees) -> Tensor:
        """bool [N, N]: as the predicate says on the grid; all other tokens see and are seen."""
        places = list(product(*map(range, self.grid)))
        total = self.before + prod(self.grid) + self.after
        mask = torch.ones(total, total, dtype=torch.bool)
        for i, query in enumerate(places, self.before):
            for j, key in enumerate(places, self.before):
                mask[i, j] = sees(query, key, self.grid)
        return mask


class Masked(TorchFunctionMode):
    """Masks some of the calls of scaled_dot_product_attention, by their numbers."""

    def __init__(self, masks: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.masks, self.count = masks, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        mask = self.masks.get(self.count)
        self.count += 1
        return func(*args, **kwargs) if mask is None else self._attend(func, mask, *args, **kwargs)

    @staticmethod
    def _attend(
        func: Any, mask: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, **others: Any,
    ) -> Tensor:  # fmt: skip
        mask = mask.tril() if is_causal else mask
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            mask = mask & attn_mask
        elif attn_mask is not None:
            mask = attn_mask.masked_fill(~mask, -torch.inf)
        return func(query, key, value, mask, **others)


# -- families ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A model of the zoo.

    Attributes:
        sites: its attentions in the order of calls; None for those that are refused, with why.
        sees, pattern: the same mask, in loops and as a pattern.
        settings: of the recipe.
        fused: its attentions call scaled_dot_product_attention, where eager models can be masked.
    """

    zoo: str
    sites: Sequence[Site | str]
    sees: Sees = window
    pattern: Mask = field(default_factory=lambda: Neighborhood(3))
    settings: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = True


def thrice(*before_and_after: int, grid: Grid = (8, 8)) -> list[Site | str]:
    return [Site(grid, *before_and_after)] * 3


CROSS = "queries and keys are not the same tokens"
SINK = Neighborhood(8, causal=True) | Global(first=2)
FAMILIES = {
    "vit": Family("timm/vit_tiny_patch16_224", thrice(1)),
    "deit distilled": Family("timm/deit_tiny_distilled_patch16_224", thrice(2)),
    "registers": Family("timm/vit_small_patch14_reg4_dinov2", thrice(5)),
    "dinov3": Family("timm/vit_small_patch16_dinov3", thrice(5)),
    "eva02": Family("timm/eva02_tiny_patch14_224", thrice(1)),
    "beit": Family("timm/beit_base_patch16_224", thrice(1)),
    "siglip": Family("timm/vit_base_patch16_siglip_224", [*thrice(), CROSS]),
    "swin": Family("timm/swin_tiny_patch4_window7_224",
                   [Site((7, 7)), "more dimensions than batch and heads"] * 2 + [Site((7, 7))], fused=False),
    "hf vit": Family("hf/ViT", thrice(1)),
    "hf dinov2": Family("hf/Dinov2", thrice(1)),
    "hf clip": Family("hf/CLIPVision", thrice(1)),
    "hf sam": Family("hf/SamVision", [Site((7, 7)), Site((7, 7)), Site((16, 16))]),
    "bert": Family("hf/Bert", thrice(1, grid=(19,))),
    "sentence": Family("hf/SentenceEncoder", thrice(grid=(20,))),  # windows of nothing but padding
    "llama": Family("hf/Llama", thrice(grid=(20,)), sink, SINK),
    "dit": Family("diffusers/DiTTransformer2DModel", thrice()),
    "pixart": Family("diffusers/PixArtTransformer2DModel", [Site((8, 8)), CROSS] * 2),
    "sd3": Family("diffusers/SD3Transformer2DModel", thrice(0, 11)),
    "flux": Family("diffusers/FluxTransformer2DModel", [Site((8, 8), 11)] * 4, settings={"grid": [8, 8]}),
    "wan": Family("diffusers/WanTransformer3DModel", [Site((3, 8, 8)), CROSS] * 2),
}  # fmt: skip


@cache
def model(name: str) -> torch.nn.Module:
    return ZOO[FAMILIES[name].zoo].build()[0]


@cache
def captured(name: str) -> Program:
    return capture(model(name), ZOO[FAMILIES[name].zoo].build()[1])


@cache
def canonical(name: str) -> Program:
    return Pipeline(parse_passes(CANONICAL)).run(captured(name)).program


@cache
def optimised(name: str) -> Result:
    family = FAMILIES[name]
    return optimize(captured(name), recipe=family.pattern, settings=family.settings, min_speedup=0)


def sparsified(name: str, pattern: Any, **options: Any) -> PipelineResult:
    return Pipeline([SparsifyAttention(pattern, min_speedup=0, **options)]).run(canonical(name))


def eager(name: str, masks: Mapping[int, Tensor], inputs: tuple[Any, Any]) -> list[Tensor]:
    args, kwargs = inputs
    with torch.no_grad(), Masked(masks) as mode:
        found = flatten_tensors(model(name)(*args, **kwargs))
    assert mode.count > max(masks, default=0), "the calls of attention are those of the sites"
    return found


def masks(name: str, sites: slice | None = None) -> dict[int, Tensor]:
    family = FAMILIES[name]
    made = {site: site.mask(family.sees) for site in set(family.sites) if isinstance(site, Site)}
    chosen = range(len(family.sites))[sites or slice(None)]
    return {i: made[family.sites[i]] for i in chosen if isinstance(family.sites[i], Site)}


def close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 2e-5) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_pattern_equals_the_eager_model_under_its_mask(name: str) -> None:
    result, sites = optimised(name), FAMILIES[name].sites
    assert [r["grid"] for r in result.report.patterns] == [list(s.grid) if isinstance(s, Site) else None for s in sites]
    refusals = [r["refusal"] for r in result.report.patterns if r["refusal"]]
    for refusal, why in zip(refusals, [s for s in sites if isinstance(s, str)], strict=True):
        assert why in refusal["why"] and refusal["try"]
    for check in ("capture", "identity", "pattern"):
        assert {r["batch"] for r in result.report.parity if r["check"] == check and r["inputs"] == "random"} == {1, 3}
    for batch in (1, 3) if FAMILIES[name].fused else ():
        args, kwargs = inputs = captured(name).random_inputs(batch, seed=5)
        found = result.program.flat(*args, **kwargs)
        close(found, eager(name, masks(name), inputs))
        assert max(float((a - b).abs().max()) for a, b in zip(found, eager(name, {}, inputs), strict=True)) > 1e-3


FORMS: list[tuple[str, Mask]] = [
    ("vit", Neighborhood(5, border="zero")), ("beit", Neighborhood(5, border="zero")),
    ("beit", per_head([Stripe(rows=1), Stripe(cols=1), Neighborhood(3)])), ("llama", SINK),
    ("vit", per_head([Neighborhood(3, border="zero"), Full(), Stripe(rows=2)])), ("bert", Neighborhood(5, stride=2)),
    ("sd3", on("text", "patch", Nothing()) & Neighborhood(3)), ("vit", Neighborhood(8)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "pattern"), FORMS, ids=lambda v: str(v)[:40])
def test_tiles_equal_the_dense_form_and_the_identity_the_dense_model(name: str, pattern: Mask) -> None:
    found = {form: sparsified(name, pattern, form=form).program for form in ("tiles", "dense", "identity")}
    for program in found.values():
        program.verify()
    for batch in (1, 3) if FAMILIES[name].fused else ():
        args, kwargs = inputs = captured(name).random_inputs(batch, seed=5)
        out = {form: program.flat(*args, **kwargs) for form, program in found.items()}
        close(out["tiles"], out["dense"])
        close(out["identity"], eager(name, {}, inputs))
        whole = pattern == Neighborhood(8)
        assert torch.allclose(out["tiles"][0], out["identity"][0], atol=1e-5) == whole


def test_zero_borders_count_their_keys() -> None:
    """HaloNet's windows: zero keys beyond the border, written out by padding the keys of an eager model."""
    result = sparsified("vit", Neighborhood(3, border="zero"), sites="0")
    near = Site((8, 8), 1).mask(lambda q, k, _: all(abs(a - b) <= 1 for a, b in zip(q, k, strict=True)))
    beyond = torch.cat([torch.zeros(1), 9.0 - near[1:, 1:].sum(1)])
    args, _ = inputs = captured("vit").random_inputs(2, seed=5)

    class Padded(Masked):
        @staticmethod
        def _attend(func: Any, mask: Tensor, query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
            key, value = (torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for x in (key, value))
            bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
            return func(query, key, value, torch.cat([bias, beyond.log()[:, None]], 1))

    with torch.no_grad(), Padded({0: near}):
        expected = flatten_tensors(model("vit")(*args))
    close(result.program.flat(*args), expected)
    assert (eager("vit", {0: near}, inputs)[0] - expected[0]).abs().max() > 1e-3


# -- which attentions, and whether it pays -----------------------------------------------------------------------------


@pytest.mark.parametrize(("sites", "chosen"), [("::2", slice(None, None, 2)), ("-1", slice(2, 3)), ("0,1", slice(2))])
def test_sites_are_selected(sites: str, chosen: slice) -> None:
    by_option = sparsified("vit", Neighborhood(3), sites=sites)
    recipe = AttentionRecipe("mine", "", "", {sites: "Neighborhood(3)"})
    by_mapping = Pipeline([SparsifyAttention(recipe=recipe, min_speedup=0)]).run(canonical("vit"))
    of_recipe = Pipeline([SparsifyAttention(recipe="nat", sites=sites, min_speedup=0)]).run(canonical("vit"))
    args, kwargs = inputs = captured("vit").random_inputs(2, seed=5)
    for result in (by_option, by_mapping):
        close(result.program.flat(*args, **kwargs), eager("vit", masks("vit", chosen), inputs))
    for result in (by_option, by_mapping, of_recipe):
        assert [e.site for e in result.edits] == [f"blocks.{i}.attn" for i in range(3)[chosen]]


def test_each_site_may_have_a_pattern_of_its_own() -> None:
    stripes = Site((8, 8), 1).mask(lambda q, k, _: q[0] == k[0])
    passes = "sparsify-attention{pattern=Neighborhood(3),sites=0,min-speedup=0}"
    passes += ",sparsify-attention{pattern=Stripe(rows=1),sites=2,min-speedup=0}"
    recipe = {"name": "mine", "pattern": {"all": "Neighborhood(3)", "1:": "Stripe(rows=1)", "1": "Full()"}}
    args, kwargs = inputs = captured("vit").random_inputs(2, seed=5)
    expected = eager("vit", {0: masks("vit")[0], 2: stripes}, inputs)
    for steps in (parse_passes(passes), [SparsifyAttention(recipe=recipe, min_speedup=0)]):
        close(Pipeline(steps).run(canonical("vit")).program.flat(*args, **kwargs), expected)


@pytest.mark.parametrize("sites", ["1:", "1:3", ":2", "::2", "0,1:2", "-1", "2"])
def test_slices_in_text_are_no_yaml(sites: str) -> None:
    (step,) = parse_passes(f"sparsify-attention{{pattern=Neighborhood(3),sites={sites},grid=[8, 8],min-speedup=0}}")
    assert str(step.sites) == sites and step.grid == [8, 8] and step.min_speedup == 0


def test_an_attention_gets_one_pattern() -> None:
    once = Pipeline(parse_passes("sparsify-attention{pattern=Stripe(rows=1),sites=0,min-speedup=0}"))
    twice = Pipeline([SparsifyAttention("Neighborhood(3)", min_speedup=0)]).run(once.run(canonical("vit")).program)
    assert [e.site for e in twice.edits] == ["blocks.1.attn", "blocks.2.attn"]
    (refusal,) = twice.refusals
    assert "has a pattern" in refusal.why


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pattern": "Neighborhood(3)", "sites": "7"}, "no attention has the number 7"),
        ({"pattern": "Neighborhood(3)", "sites": "first"}, "not a choice of sites"),
        ({"pattern": "Neighborhood(3)", "sites": "::0"}, "not a choice of sites"),
        ({"pattern": "Neighborhood(3)", "grid": (5, 5)}, "no tokens form a grid of 5 x 5"),
        ({"pattern": "Neighborhood(3)", "grid": "8x8"}, "not a grid"),
        ({"pattern": "Neighborhood(3)", "grid": (8, 0)}, "not a grid"),
        ({"pattern": "Neighborhood(3)", "form": "sparse"}, "no form 'sparse'"),
        ({"pattern": "Neighborhood(3)", "recipe": "nat"}, "a pattern or a recipe"),
        ({}, "a pattern or a recipe"),
        ({"recipe": "tome"}, "reduces tokens"),
        ({"pattern": "Windows(3)"}, "not a pattern"),
        ({"recipe": {"name": "mine", "pattern": "Full()", "window": 3}}, "no key 'window'"),
    ],
    ids=str,
)
def test_wrong_options_are_usage_errors(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Pipeline([SparsifyAttention(**options)]).run(canonical("vit"))


def test_a_recipe_that_keeps_all_tokens_has_no_schedule() -> None:
    with pytest.raises(UsageError, match="keeps all tokens"):
        optimize(captured("vit"), recipe="nat", schedule="r=4")
    with pytest.raises(UsageError, match="no setting 'size'"):
        optimize(captured("vit"), recipe="nat", settings={"size": 3})


def test_settings_change_the_pattern() -> None:
    settings = {"window": [3, 5], "sites": "1:", "stride": 1}
    report = optimize(captured("vit"), recipe="nat", settings=settings, min_speedup=0).report
    assert [(r["site"], r["pattern"]) for r in report.patterns] == [
        (f"blocks.{i}.attn", "Neighborhood((3, 5))") for i in (1, 2)
    ]
    assert report.recipe["settings"]["pattern"] == {"1:": "Neighborhood((3, 5))"}
    assert report.patterns[0]["keys"] == pytest.approx((64 * (15 + 1) + 65) / 65, abs=0.05)


def test_the_least_speedup_is_repeated_from_the_resolved_recipe(tmp_path: Path) -> None:
    recipe = {"name": "mine", "pattern": {"all": "Neighborhood(6)", "1": "Neighborhood(8)"}}
    gains = [c.lowered.predicted for c in SparsifyAttention(recipe=recipe).plan(canonical("vit"))]
    assert gains[1] < gains[0] < 1.1
    least = (gains[0] + gains[1]) / 2
    first = optimize(captured("vit"), recipe=recipe, min_speedup=least).report
    assert [e["site"] for e in first.edits] == ["blocks.0.attn", "blocks.2.attn"]
    path = tmp_path / "recipe.resolved.yaml"
    path.write_text(resolved_recipe(first, None))
    again = optimize(captured("vit"), recipe=str(path)).report
    assert again.recipe["settings"]["min_speedup"] == least and again.patterns == first.patterns
    assert resolved_recipe(again, None) == path.read_text()
    assert len(optimize(captured("vit"), recipe=str(path), min_speedup=0).report.edits) == 3
    assert len(optimize(captured("vit"), recipe=str(path), settings={"min_speedup": 0}).report.edits) == 3
    assert not optimize(captured("vit"), recipe=recipe).report.edits, "the default is 1.1"
    with pytest.raises(UsageError, match="not a speed-up"):
        optimize(captured("vit"), recipe=str(path), settings={"min_speedup": "fast"})


class Causal(torch.nn.Module):
    """Two attentions of the same queries, keys and values: one is told to be causal, the other is masked."""

    def forward(self, x: Tensor) -> Tensor:
        attention = torch.nn.functional.scaled_dot_product_attention
        past = torch.ones(64, 64, dtype=torch.bool).tril()
        return attention(x, x, x, is_causal=True) + attention(x, x, x, attn_mask=past)


def test_dense_attention_skips_what_it_is_told_to() -> None:
    program = Pipeline(parse_passes(CANONICAL)).run(capture(Causal(), torch.randn(2, 2, 64, 8))).program
    told, masked = SparsifyAttention("Neighborhood(8, causal=True)", grid=[64], min_speedup=0).plan(program)
    assert told.layout == replace(masked.layout, skips=True) and masked.layout.causal and not masked.layout.skips
    seen = (7 * 8 / 2 + 57 * 8) / 64
    assert told.to_dict()["keys"] == masked.to_dict()["keys"] == round(seen, 1)
    assert masked.lowered.ideal == pytest.approx(64 / seen)
    assert told.lowered.ideal == pytest.approx((32 * 32 + 32 * 64) / 64 / seen)


def test_what_does_not_pay_is_refused_with_its_numbers() -> None:
    result = optimize(captured("vit"), recipe="Neighborhood(3)", min_speedup=50)
    assert not result.changed and not any(r["check"] == "pattern" for r in result.report.parity)
    inputs, _ = captured("vit").random_inputs(2, seed=5)
    close(result.program.flat(*inputs), eager("vit", {}, (inputs, {})))
    for row in result.report.patterns:
        why = row["refusal"]["why"]
        assert f"{row['predicted']:.2f}x is predicted" in why and "50x asked for" in why
        assert f"(ideal {65 * 65 / (64 * 10 + 65):.2f}x, tiles {row['tile']:.2f}x)" in why
        assert row["predicted"] < row["tile"] < row["ideal"]
    assert [r["where"] for r in result.report.refusals] == [f"blocks.{i}.attn" for i in range(3)]


class Scrambled(torch.nn.Module):
    """Attention over all patches, but window by window: their sequence is not the raster order of the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv = torch.nn.Conv2d(3, 16, 4, 4), torch.nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1).flatten(1, 4)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).mean(2)


def test_tokens_in_no_known_order_are_refused() -> None:
    program = capture(Scrambled(), references.images(2))
    report = optimize(program, recipe="Neighborhood(3)", min_speedup=0).report
    (refusal,) = report.refusals
    assert "64 tokens are not in the order of a grid" in refusal["why"] and refusal["try"] and not report.edits
    told = optimize(program, recipe="Neighborhood(3)", settings={"grid": [8, 8]}, min_speedup=0).report
    assert told.patterns[0]["grid"] == [8, 8], "what the user says is taken"


# -- together with reductions ------------------------------------------------------------------------------------------


def merged(masks: Mapping[int, Tensor], counts: Mapping[int, int], x: Tensor) -> Tensor:
    """The ViT with tokens merged behind some attentions, and some masked: those run on all tokens, and are averaged."""
    vit = model("vit")
    tokens, layers = references.timm_embed(vit, x)
    for i, layer in enumerate(layers):
        if i in masks:
            with Masked({0: masks[i]}):
                attended = layer.attend(references.stream(tokens.restored(), tokens.prefix), None)
            home = tokens.home[..., None].expand_as(attended.x)
            x = torch.zeros_like(tokens.x).scatter_add(1, home, attended.x) / tokens.size[..., None]
        else:
            attended = layer.attend(tokens, references.log_size(tokens))
            x = attended.x
        tokens = replace(tokens, x=x)
        tokens = references.merge(tokens, attended.key, counts[i]) if i in counts else tokens
        tokens = replace(tokens, x=layer.feed(tokens))
    return references.timm_head(vit, tokens)


PATTERN, TOME = "sparsify-attention{pattern=Neighborhood(3),min-speedup=0,sites=%s}", "reduce-tokens{schedule=r=6}"


@pytest.mark.parametrize(
    ("steps", "sites", "counts"),
    [
        ([PATTERN % "0", TOME], {0}, {1: 6, 2: 6}),
        ([PATTERN % "2", TOME], {2}, {0: 6, 1: 6}),
        ([PATTERN % "1", TOME], {1}, {0: 6, 2: 6}),
        ([PATTERN % "all", TOME], {0, 1, 2}, {}),
        ([TOME, PATTERN % "all"], {0}, {0: 6, 1: 6, 2: 6}),
    ],
    ids=str,
)
def test_reductions_and_patterns(steps: list[str], sites: set[int], counts: dict[int, int]) -> None:
    """Tokens are restored before a pattern; an attention over tokens that were reduced gets none."""
    result = optimize(captured("vit"), passes=",".join([CANONICAL, *steps]))
    edits = [(e["pass_spec"].split("{")[0], e["site"]) for e in result.report.edits]
    assert {s for p, s in edits if p == "sparsify-attention"} == {f"blocks.{i}.attn" for i in sites}
    assert {s for p, s in edits if p == "reduce-tokens"} == {f"blocks.{i}.attn" for i in counts}
    whys = {r["where"]: r["why"] for r in result.report.refusals}
    first, wanted = ("sparsify", set(counts)) if steps[0] == TOME else ("reduce", sites)
    for i in range(3):
        if first == "reduce" and i in sites:
            assert "has a pattern" in whys[f"blocks.{i}.attn"]
        if first == "sparsify" and i not in sites:
            assert "not in the order of a grid" in whys[f"blocks.{i}.attn"]
    (x,), _ = captured("vit").random_inputs(3, seed=5)
    with torch.no_grad():
        expected = merged({i: m for i, m in masks("vit").items() if i in sites}, counts, x)
    close(result.program.flat(x), [expected])


# -- files and runtimes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "eva02", "beit", "sentence", "llama"])
def test_onnx_runtime_computes_the_pattern(name: str, tmp_path: Path) -> None:
    program = optimised(name).program
    engine = runtimes.get("onnxruntime").build(program, tmp_path / "model.onnx")
    assert {c.batch for c in engine.parity if c.inputs == "random"} == {1, 3}
    assert all(c.passed and all(s.max_rel < 1e-4 for s in c.outputs.values()) for c in engine.parity)
    if name == "vit":  # the three attentions share their tables
        tables = [numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer]
        contents = [(t.dtype, t.shape, t.tobytes()) for t in tables if t.size > 16]
        assert len(contents) == len(set(contents))


@pytest.mark.tensorrt
@rtx
@pytest.mark.parametrize("name", ["vit", "beit"])
def test_an_engine_is_built(name: str, tmp_path: Path) -> None:
    program = optimised(name).program
    built = runtimes.get("tensorrt-rtx").build(program, tmp_path / "model.engine")
    assert read_description(built.path).outputs == program.outputs


def tables(program: Program) -> list[str]:
    return sorted(name for name in program.exported.constants if name.startswith("pattern_"))


def test_equal_tables_are_stored_once(tmp_path: Path) -> None:
    names = ["pattern_keys", "pattern_mask", "pattern_order", "pattern_queries", "pattern_rows"]
    assert tables(optimised("vit").program) == names
    loaded = load_program(optimised("vit").program.save(tmp_path / "model.pt2"))
    assert tables(loaded) == names
    mixed = Pipeline([SparsifyAttention("Neighborhood(3)", sites="0,1", min_speedup=0),
                      SparsifyAttention("Stripe(rows=1)", sites="2", min_speedup=0)]).run(canonical("vit"))  # fmt: skip
    assert len(tables(mixed.program)) < 2 * len(names) and "pattern_keys_1" in tables(mixed.program)


@pytest.mark.parametrize("name", ["vit", "beit", "sentence"])
def test_a_saved_pattern_runs_at_other_batch_sizes(name: str, tmp_path: Path) -> None:
    program = optimised(name).program
    loaded = load_program(program.save(tmp_path / "model.pt2"))
    for batch in (1, 5):
        args, kwargs = captured(name).random_inputs(batch, seed=7)
        close(loaded.flat(*args, **kwargs), program.flat(*args, **kwargs), 0)
    again = optimize(loaded, recipe="Neighborhood(3)", min_speedup=0)
    assert not again.changed and all("has a pattern" in r["why"] for r in again.report.refusals)
