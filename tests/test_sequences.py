"""One reduction after another: each knows what the ones before left, and how many originals their tokens stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import recipe_references as refs
from tests import references
from tests.references import Attended, Layer, Tokens, images, take
from tokenopt.analysis.axes import propagate
from tokenopt.analysis.sites import find_sites
from tokenopt.errors import IllegalReduction
from tokenopt.loading import load_program
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline, PipelineResult
from tokenopt.program import Program, capture

TOME, LATER = {"r": [9, 7, 0, 0]}, {"r": [0, 0, 6, 5]}


@cache
def model(kind: str) -> nn.Module:
    """A tiny model of 4 blocks: one of `refs.tiny`, or of `references.TIMM`."""
    if kind in ("head", "features"):
        return refs.tiny(kind)
    arch, options = references.TIMM[kind]
    return references.tiny_timm(arch, **options, depth=4, embed_dim=32, num_heads=2)


@cache
def program(kind: str) -> Program:
    return Pipeline([FoldConstants(), RaiseAttention()]).run(capture(model(kind), images(2))).program


def sequence(kind: str | Program, *steps: ReduceTokens) -> PipelineResult:
    given = program(kind) if isinstance(kind, str) else kind
    result = Pipeline([*steps, RemoveDead()]).run(given)
    result.program.verify()
    return result


def tome(schedule: Any = None, **settings: Any) -> ReduceTokens:
    return ReduceTokens("tome", schedule or TOME, settings=settings)


def changes(result: PipelineResult) -> list[tuple[int | None, int | None]]:
    return [(e.before, e.after) for e in result.edits if e.pass_spec.startswith("reduce-tokens")]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# -- hand-patched ------------------------------------------------------------------------------------------------------

Step = Callable[[Tokens, Attended], Tokens]


def merging(count: int) -> Step:
    """ToMe: by size, whatever merged before."""
    return lambda tokens, attended: references.merge(tokens, attended.key, count)


def dropping(keep: float, packed: bool) -> Step:
    """EViT on tokens that stand for several; the packed one counts what the best of its tokens did."""

    def step(tokens: Tokens, attended: Attended) -> Tokens:
        score = attended.class_row()
        after = references.drop_inattentive(tokens, score, keep, packed)
        place = torch.arange(tokens.x.shape[1]).expand(tokens.x.shape[:2])
        marked = references.drop_inattentive(replace(tokens, position=place), score, keep, packed)
        return replace(after, size=take(tokens.size, marked.position))

    return step


def run(kind: str, x: Tensor, steps: dict[int, Step], count: bool = True, tokens: Tokens | None = None) -> Tokens:
    """The stream before the final norm, with a step between attention and MLP of some blocks."""
    given, layers = references.timm_embed(model(kind), x)
    tokens = tokens or given
    for i, layer in enumerate(layers):
        tokens = _block(layer, tokens, steps.get(i), count)
    return tokens


def _block(layer: Layer, tokens: Tokens, step: Step | None, count: bool) -> Tokens:
    attended = layer.attend(tokens, tokens.size.log()[:, None, None] if count else None)
    tokens = replace(tokens, x=attended.x)
    if step is not None:
        tokens = step(tokens, attended)
    return replace(tokens, x=layer.feed(tokens))


def head(kind: str, tokens: Tokens, count: bool = True) -> Tensor:
    return references.timm_head(model(kind), tokens, count)


# -- the axes of what is left ------------------------------------------------------------------------------------------


def test_protected_tokens_are_known_behind_a_reduction() -> None:
    once = {
        ("registers", "tome"): "cls(1) + registers(4) + patch",
        ("registers", "fopru"): "cls(1) + registers(4) + patch",
        ("deit_distilled", "random"): "cls(1) + dist(1) + patch",
        ("mean", "uniform-grid"): "patch",
        ("head", "supertoken"): "cls(1) + patch",
        ("registers", "blank-patch"): "cls(1) + registers(4) + patch",
    }
    for (kind, recipe), text in once.items():
        settings = {"place": "mid"} if recipe in ("fopru", "supertoken") else {}
        schedule = {"r": 8} if recipe == "tome" else {"keep": 0.5, "layers": [0]}
        result = sequence(kind, ReduceTokens(recipe, schedule, settings={**settings}))
        assert len(changes(result)) > 0, (recipe, result.refusals)
        axis = find_sites(propagate(result.program))[0][-1].axis
        kept = axis.reducible.length
        assert str(axis).endswith(text + (f"({kept})")), (recipe, str(axis))
        assert axis.length - kept == sum(s.length for s in axis.segments if s.protected)


# -- two reductions equal a model patched by hand ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["head", "registers", "mean"])
def test_blank_patches_then_tome(kind: str) -> None:
    result = sequence(kind, ReduceTokens("blank-patch", "keep=0.7@0"), tome({"r": [6, 5, 4, 3]}))
    prefix = model(kind).num_prefix_tokens
    assert changes(result) == [(64 + prefix, 45 + prefix), *((prefix + a, prefix + b) for a, b in
                               ((45, 39), (39, 34), (34, 30), (30, 27)))]  # fmt: skip
    x = images(3, seed=1)
    with torch.no_grad():
        tokens = references.timm_embed(model(kind), x)[0]
        best = [sorted(prefix + i for i in refs.best(refs.patch_variance(image, 4), 45)) for image in x]
        stay = torch.tensor([[*range(prefix), *row] for row in best])
        left = Tokens(take(tokens.x, stay), torch.ones(stay.shape), stay, tokens.home[:, :stay.shape[1]], prefix)
        left = run(kind, x, dict(enumerate(map(merging, (6, 5, 4, 3)))), tokens=left)
        close(result.program.flat(x)[0], head(kind, left))


@pytest.mark.parametrize("fuse", ["drop", "pack"])
@pytest.mark.parametrize("kind", ["head", "registers", "eva02", "beit"])
def test_tome_then_evit(kind: str, fuse: str) -> None:
    """Attention behind both counts what the first merged: of the tokens that the second kept."""
    second = ReduceTokens("evit", "keep=0.6@2", settings={"fuse": fuse})
    result = sequence(kind, tome(), second)
    assert len(changes(result)) == 3
    for batch in (1, 3):
        x = images(batch, seed=1)
        with torch.no_grad():
            tokens = run(kind, x, {0: merging(9), 1: merging(7), 2: dropping(0.6, fuse == "pack")})
            expected = head(kind, tokens)
        close(result.program.flat(x)[0], expected)
    with torch.no_grad():  # the sizes matter
        uncounted = run(kind, x, {0: merging(9), 1: merging(7), 2: dropping(0.6, fuse == "pack")}, count=False)
        assert (head(kind, uncounted) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["head", "registers", "mean", "eva02", "beit", "siglip"])
def test_tome_then_tome_is_tome(kind: str) -> None:
    """Two passes over the layers are one: sizes add up, in means and in attention pooling, too."""
    both = sequence(kind, tome(), tome(LATER))
    once = sequence(kind, tome({"r": [9, 7, 6, 5]}))
    assert changes(both) == changes(once)
    x = images(3, seed=1)
    close(both.program.flat(x)[0], once.program.flat(x)[0])
    with torch.no_grad():
        tokens = run(kind, x, dict(enumerate(map(merging, (9, 7, 6, 5)))))
        close(both.program.flat(x)[0], head(kind, tokens))


def test_three_reductions() -> None:
    steps = (tome({"r": [9]}), ReduceTokens("evit", "keep=0.7@1", settings={"fuse": "drop"}), tome(LATER))
    result = sequence("beit", *steps)
    assert len(changes(result)) == 4
    x = images(3, seed=1)
    with torch.no_grad():
        tokens = run("beit", x, {0: merging(9), 1: dropping(0.7, False), 2: merging(6), 3: merging(5)})
        close(result.program.flat(x)[0], head("beit", tokens))


@pytest.mark.parametrize("kind", ["head", "registers"])
def test_tokens_merged_inside_attention_then_evit(kind: str) -> None:
    """The first block attends on fewer tokens, the third drops some: the stream between them has all."""
    inside = ReduceTokens("tomesd", "keep=0.5@0")
    result = sequence(kind, inside, ReduceTokens("evit", "keep=0.6@2"))
    x, vit = images(3, seed=1), model(kind)
    with torch.no_grad():
        tokens, layers = references.timm_embed(vit, x)
        block, prefix = vit.blocks[0], tokens.prefix
        h = block.norm1(tokens.x)
        targets = refs.cell_targets((8, 8), 2, torch.Generator().manual_seed(0))
        sources = [i for i in range(64) if i not in targets]
        plan = [refs.shifted(prefix, refs.match(row[prefix:], sources, targets, 32)) for row in h]
        y = tokens.x + block.ls1(refs.copied(block.attn(refs.apply(h, plan)), plan, h.shape[1]))
        tokens = replace(tokens, x=y + block.ls2(block.mlp(block.norm2(y))))
        for i, layer in enumerate(layers[1:], 1):
            tokens = _block(layer, tokens, dropping(0.6, True) if i == 2 else None, False)
        close(result.program.flat(x)[0], head(kind, tokens, False))


def test_merging_inside_attention_to_merged_tokens() -> None:
    """A kept place counts what the token there does; the means inside attention are plain."""
    inside = ReduceTokens("tomesd", "keep=0.6@2", settings={"select": "bipartite{metric=hidden}", "place": "attention"})
    result = sequence("head", tome(), inside)
    assert changes(result)[2] == (49, 30)
    x, vit = images(3, seed=1), model("head")
    with torch.no_grad():
        tokens, layers = references.timm_embed(vit, x)
        for layer, count in zip(layers[:2], (9, 7), strict=True):
            tokens = _block(layer, tokens, merging(count), True)
        block, h = vit.blocks[2], vit.blocks[2].norm1(tokens.x)
        plan, orders = [], []
        for row in h:
            sources, destinations, order = references.bipartite_match(row[None], 19, prefix=1)
            groups = {int(i): [int(i)] for i in order[0]}
            for s, d in zip(sources[0].tolist(), destinations[0].tolist(), strict=True):
                groups[d].append(s)
            plan.append(list(groups.values()))
            orders.append(order[0])
        fewer, bias = refs.apply(h, plan), take(tokens.size, torch.stack(orders)).log()[:, None, None]
        query, key, value = block.attn.qkv(fewer).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        attended = block.attn.proj(references.attention(query, key, value, bias, 0.25))
        y = tokens.x + refs.copied(attended, plan, h.shape[1])
        tokens = replace(tokens, x=y + block.mlp(block.norm2(y)))
        tokens = _block(layers[3], tokens, None, True)
        close(result.program.flat(x)[0], head("head", tokens))


def test_fastervlm_at_the_output_after_tome() -> None:
    first = ReduceTokens("tome", {"r": [9, 7, 5, 0]}, short_outputs=True)
    result = sequence("features", first, ReduceTokens("fastervlm", "keep=0.5", settings={"positions": True}))
    x = images(3, seed=1)
    found, positions = result.program.flat(x)
    with torch.no_grad():
        tokens, layers = references.timm_embed(model("features"), x)
        for layer, count in zip(layers[:3], (9, 7, 5), strict=True):
            tokens = _block(layer, tokens, merging(count), True)
        attended = layers[3].attend(tokens, tokens.size.log()[:, None, None])
        best = attended.class_row()[:, 1:].topk(22).indices.sort(1).values + 1
        features = model("features").norm(layers[3].feed(replace(tokens, x=attended.x)))
    close(found, torch.cat([features[:, :1], take(features, best)], 1))
    assert torch.equal(positions, take(tokens.position, best) - 1)


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_sizes_that_no_attention_counted_are_known() -> None:
    """The first pass merges by size without proportional attention; the second weighs and counts what it left."""
    result = sequence("mean", tome({"r": [9]}, proportional=False), tome({"r": [0, 0, 6]}))
    x = images(3, seed=1)
    with torch.no_grad():
        tokens, layers = references.timm_embed(model("mean"), x)
        for i, layer in enumerate(layers):
            step = {0: merging(9), 2: merging(6)}.get(i)
            tokens = _block(layer, tokens, step, count=i == 3)
        close(result.program.flat(x)[0], head("mean", tokens))


def test_sizes_survive_saving(tmp_path: Path) -> None:
    first = sequence("mean", tome(proportional=False)).program
    loaded = load_program(first.save(tmp_path / "model.pt2"))
    x = images(3, seed=1)
    again = sequence(loaded, tome(LATER)).program.flat(x)[0]
    assert torch.equal(again, sequence(first, tome(LATER)).program.flat(x)[0])
    close(again, sequence("mean", tome(proportional=False), tome(LATER)).program.flat(x)[0])


@pytest.mark.parametrize("kind", ["registers", "beit"])
def test_a_second_reduction_that_removes_nothing_changes_nothing(kind: str) -> None:
    x = images(3, seed=1)
    expected = sequence(kind, tome()).program.flat(x)[0]
    for recipe in ("tome", "evit", "dependency"):
        second = ReduceTokens(recipe, "keep=0.5@2,3" if recipe != "tome" else LATER, neutral=True)
        result = sequence(kind, tome(), second)
        assert len(changes(result)) == 4
        close(result.program.flat(x)[0], expected)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(kind: str, *steps: ReduceTokens) -> list[str]:
    result = sequence(kind, *steps)
    assert all(e.pass_spec != steps[-1].spec for e in result.edits)
    assert all(r.hint for r in result.refusals)
    return [r.why for r in result.refusals]


def test_mixtures_of_merged_tokens_are_refused() -> None:
    soft = ReduceTokens("trajectory", "keep=0.2@2", settings={"place": "block"})
    assert any("counts each as one" in why for why in refused("head", tome(), soft))


def test_what_needs_the_grid_is_refused_behind_a_reduction() -> None:
    assert any("grid" in why for why in refused("head", tome(), ReduceTokens("supertoken", "keep=0.5@2")))


def test_a_score_from_before_the_first_reduction_is_refused() -> None:
    late = ReduceTokens("evit", "keep=0.5@3", settings={"score.layer": 0, "fuse": "drop"})
    assert any("does not attend over these tokens" in why for why in refused("head", tome(), late))


def test_an_output_that_another_recipe_shortens_is_refused() -> None:
    every = ReduceTokens("tome", "r=5", short_outputs=True)
    whys = refused("features", every, ReduceTokens("fastervlm", "keep=0.5"))
    assert all("merge_tokens.default) needs all" in why for why in whys) and whys


def test_where_tokens_went_is_refused_behind_a_reduction() -> None:
    with pytest.raises(IllegalReduction, match="reduced before"):
        sequence("head", tome(), tome(LATER, source=True))
