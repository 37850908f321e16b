"""The recipes equal the hand-patched models of ``recipe_references.py``, which are themselves checked here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import recipe_references as refs
from tests.references import Tokens, images

if TYPE_CHECKING:  # the hand-patched models are checked whatever state the compiler is in
    from tokenopt.pipeline import PipelineResult
    from tokenopt.program import Program

PATCHES = 64
NONE = 1.0
"""The share kept by the schedules that change nothing."""
REMOVED = {0.5: [8, 8, 8, 8], 0.3: [20, 9, 3, 0], NONE: [0, 0, 0, 0]}
"""For recipes that remove a number per layer: their schedules in place of a share kept."""


# -- models ------------------------------------------------------------------------------------------------------------


@cache
def model(kind: str) -> nn.Module:
    if kind == "vggt":
        return refs.tiny_vggt()
    if kind.startswith("ids_"):
        return refs.WithIds(model(kind.removeprefix("ids_"))).eval()
    if kind.endswith("_wide"):
        return refs.tiny(kind.removesuffix("_wide"), embed_dim=64)
    return refs.tiny(kind)


def inputs(kind: str, batch: int, keep: float) -> tuple[Tensor, ...]:
    """The same samples for every batch size."""
    if kind == "vggt":
        return (refs.frames(model(kind), 3, seed=1)[:batch],)
    x = images(3, seed=1)[:batch]
    if not kind.startswith("ids_"):
        return (x,)
    generator = torch.Generator().manual_seed(2)
    kept = refs.count(keep, PATCHES)
    rows = []
    for _ in range(3):  # every id has a patch
        ids = torch.cat([torch.arange(kept), torch.randint(kept, (PATCHES - kept,), generator=generator)])
        rows.append(ids[torch.randperm(PATCHES, generator=generator)])
    return x, torch.stack(rows)[:batch]


@cache
def program(kind: str) -> Program:
    from tokenopt.passes.fold_constants import FoldConstants
    from tokenopt.passes.raise_attention import RaiseAttention
    from tokenopt.pipeline import Pipeline
    from tokenopt.program import capture

    captured = capture(model(kind), inputs(kind, 2, 0.5))
    return Pipeline([FoldConstants(), RaiseAttention()]).run(captured).program


def reduce(kind: str, recipe: str, schedule: Any, settings: Mapping[str, Any], short: bool) -> PipelineResult:
    from tokenopt import recipes
    from tokenopt.passes.reduce_tokens import ReduceTokens
    from tokenopt.passes.remove_dead import RemoveDead
    from tokenopt.pipeline import Pipeline

    steps = [ReduceTokens(recipes.get(recipe), schedule, settings=dict(settings), short_outputs=short), RemoveDead()]
    result = Pipeline(steps).run(program(kind))
    result.program.verify()
    return result


# -- the cases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A recipe on a model, and the hand-patched model: ``reference(model, *inputs, keep)``."""

    recipe: str
    kind: str
    reference: Callable[..., Tensor]
    layers: tuple[int, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    short: bool = True
    keeps: tuple[float, ...] = (0.5, 0.3)
    by_number: bool = False
    note: str = ""

    def schedule(self, keep: float) -> dict[str, Any]:
        if self.by_number:
            return {"r": REMOVED[keep]}
        return {"keep": keep} if self.layers is None else {"keep": keep, "layers": list(self.layers)}

    def expected(self, batch: int, keep: float) -> Tensor:
        vision = model(self.kind.removeprefix("ids_"))
        with torch.no_grad():
            return self.reference(vision, *inputs(self.kind, batch, keep), keep)

    def __str__(self) -> str:
        words = [self.recipe, self.kind, self.note, "" if self.short else "restored"]
        return "-".join(word for word in words if word)


def _output_cases() -> Iterator[Case]:
    """What is removed where the features leave."""
    either, with_class = ("features", "plain"), ("features",)
    yield from (Case("vtc-cls", kind, lambda m, x, keep: refs.vtc_cls(m, x, keep)) for kind in with_class)
    for kind in either:
        yield Case("hiprune", kind, lambda m, x, keep: refs.hiprune(m, x, keep))
        for share, reach in ((0.5, 1), (0.5, 2), (3.0, 1)):  # the last: more anchors and neighbours than places
            yield Case(
                "hiprune",
                kind,
                lambda m, x, keep, s=share, r=reach: refs.hiprune(m, x, keep, s, r),
                settings={"score.share": share, "score.reach": reach},
                note=f"share{share}-reach{reach}",
            )
        yield Case("fopru", kind, lambda m, x, keep: refs.fopru(m, x, keep))
        yield Case(
            "fopru",
            kind,
            lambda m, x, keep: refs.fopru(m, x, keep, rows=True),
            settings={"select": "rows"},
            note="rows",
        )
        yield Case("todre", kind, lambda m, x, keep: refs.todre(m, x, keep))
        yield Case("divprune", kind, lambda m, x, keep: refs.divprune(m, x, keep))
        # Wider than the number kept, or the last determinants are rounding alone.
        yield Case("cdpruner", f"{kind}_wide", lambda m, x, keep: refs.cdpruner(m, x, keep))
        for cell, threshold in ((4, 30.0), (3, 30.0), (4, 1.3)):
            yield Case(
                "vflowopt",
                kind,
                lambda m, x, keep, c=cell, t=threshold: refs.vflowopt(m, x, keep, c, t),
                settings={"select.cell": cell, "score.threshold": threshold},
                note=f"cell{cell}-threshold{threshold}",
            )
        for keep in (0.25, 0.15, 0.6):  # 4 x 4, 3 x 3 and 6 x 6 cells, however the split is rounded
            yield Case("pool", kind, lambda m, x, keep: refs.pool(m, x, keep), keeps=(keep,), note=f"keep{keep}")
    yield Case("visionzip", "features", lambda m, x, keep: refs.visionzip(m, x, keep))
    yield Case(
        "visionzip",
        "features",
        lambda m, x, keep: refs.visionzip(m, x, keep, sum_=True),
        settings={"fuse.added": True},
        note="sum",
    )
    yield Case("vispruner", "features", lambda m, x, keep: refs.vispruner(m, x, keep))
    yield Case(
        "vispruner",
        "features",
        lambda m, x, keep: refs.vispruner(m, x, keep, step=3),
        settings={"select.step": 3},
        note="step3",
    )
    yield Case("prumerge", "features", lambda m, x, keep: refs.prumerge(m, x, keep))
    yield Case(
        "prumerge",
        "features",
        lambda m, x, keep: refs.prumerge(m, x, keep, neighbours=4),
        settings={"fuse.count": 4},
        note="neighbours4",
    )


def _inside_cases() -> Iterator[Case]:
    """What is removed for the length of an attention."""
    for kind in ("head", "features", "plain"):
        for seed in (None, 3):
            note = "first" if seed is None else f"seed{seed}"
            yield Case(
                "tomesd",
                kind,
                lambda m, x, keep, s=seed: refs.tomesd(m, x, keep, seed=s),
                settings={"select.seed": seed},
                note=note,
            )
        yield Case(
            "tomesd",
            kind,
            lambda m, x, keep: refs.tomesd(m, x, keep, cell=3, seed=3),
            settings={"select.seed": 3, "select.cell": 3},  # the last two rows and columns fill no cell
            note="cell3",
        )
        for name, reference in (("agentsd", refs.agentsd), ("agentsd-late", refs.agentsd_late)):
            yield Case(
                name,
                kind,
                lambda m, x, keep, f=reference: f(m, x, keep, seed=3),
                settings={"select.seed": 3},
                keeps=(0.6, 0.5),
            )
        for keep in (0.25, 0.15, 0.6):
            yield Case(
                "supertoken", kind, lambda m, x, keep: refs.supertoken(m, x, keep), keeps=(keep,), note=f"keep{keep}"
            )
            yield Case(
                "semantic-token",
                kind,
                lambda m, x, keep: refs.semantic_token(m, x, keep, 1, 2),
                settings={"place.first": 1, "place.last": 2},
                keeps=(keep,),
                note=f"keep{keep}",
            )


def _stream_cases() -> Iterator[Case]:
    """What is removed from the stream for good."""
    for kind, short in (("head", True), ("features", True), ("features", False), ("plain", True)):
        yield Case(
            "pitome", kind, lambda m, x, keep, s=short: refs.pitome(m, x, REMOVED[keep], short=s), short=short,
            by_number=True,
        )  # fmt: skip
        yield Case(
            "dymu", kind, lambda m, x, keep, s=short: refs.dymu(m, x, REMOVED[keep], short=s), short=short,
            by_number=True,
        )  # fmt: skip
        yield Case(
            "dependency", kind, lambda m, x, keep, s=short: refs.dependency(m, x, keep, (0, 2), short=s), (0, 2),
            short=short,
        )  # fmt: skip
    for kind in ("head", "features", "plain"):
        yield Case(
            "trajectory",
            f"ids_{kind}",
            lambda m, x, ids, keep: refs.trajectory(m, x, ids, refs.count(keep, PATCHES), short=False),
            (0,),
            short=False,  # every patch gets its trajectory's features, whatever the order of the tokens
        )
        yield Case("blank-patch", kind, lambda m, x, keep: refs.blank_patch(m, x, keep), (0,))
        yield Case("rollout", kind, lambda m, x, keep: refs.rollout(m, x, keep), (2,))
        yield Case("rollout", kind, lambda m, x, keep: refs.rollout(m, x, keep, 0), (0,), note="layer0")
        yield Case("transition", kind, lambda m, x, keep: refs.transition(m, x, keep), (2,))
        yield Case("transition", kind, lambda m, x, keep: refs.transition(m, x, keep, 1), (1,), note="layer1")
        yield Case(
            "transition",
            kind,
            lambda m, x, keep: refs.transition(m, x, keep, absolute=False),
            (2,),
            settings={"score.absolute": False},
            note="signed",
        )
        yield Case("uniform-grid", kind, lambda m, x, keep: refs.uniform_grid(m, x, keep, 1), (1,),
                   settings={"place": "mid"})  # fmt: skip
        # Confident is whose norm is small, so that there is nothing to learn: what stays has the largest.
        for layers in ((1,), (1, 3)):
            yield Case(
                "dtop",
                kind,
                lambda m, x, keep, at=layers: refs.canvas(m, x, lambda h: -h.norm(dim=-1), keep, at),
                layers,
                settings={"score": "norm{of=hidden}"},
                short=False,
                keeps=(0.4, 0.3),
                note="layers" + "".join(map(str, layers)),
            )
    # Thresholds at which no two patches have the same neighbours, and power iteration converges.
    for kind, layer, threshold in (("head", 2, 0.4), ("features", 3, 0.4), ("plain", 3, 0.3)):
        yield Case(
            "tokencut",
            kind,
            lambda m, x, keep, at=layer, t=threshold: refs.tokencut(m, x, keep, at, t),
            (layer,),
            settings={"score.threshold": threshold, "score.iterations": 300},
        )


def _video_cases() -> Iterator[Case]:
    for seed in (None, 33):
        yield Case(
            "fastvggt",
            "vggt",
            lambda m, x, keep, s=seed: refs.fastvggt(m, x, 0.0 if keep == NONE else 0.9, seed=s),
            settings={"select.seed": seed},
            keeps=(0.1,),
            note="first" if seed is None else f"seed{seed}",
        )


CASES = [*_output_cases(), *_inside_cases(), *_stream_cases(), *_video_cases()]
IDENTITY = list({case.recipe: case for case in CASES}.values())
assert len({str(case) for case in CASES}) == len(CASES)
RUNS = [pytest.param(case, keep, id=f"{case}-{keep}") for case in CASES for keep in case.keeps]


# A rewrite takes a second or two: each case once, and the first of each recipe with all its schedules.
FIRST = {case.recipe: case for case in reversed(CASES)}
REWRITES = [
    pytest.param(case, keep, id=f"{case}-{keep}")
    for case in CASES
    for keep in (case.keeps if FIRST[case.recipe] is case else case.keeps[:1])
]


# -- the compiler equals the hand-patched models -----------------------------------------------------------------------


@pytest.mark.parametrize(("case", "keep"), REWRITES)
def test_recipe_equals_hand_patched(case: Case, keep: float) -> None:
    result = reduce(case.kind, case.recipe, case.schedule(keep), case.settings, case.short)
    assert any(e.pass_spec.startswith("reduce-tokens") for e in result.edits), [str(r) for r in result.refusals]
    for batch in (1, 3):
        with torch.no_grad():
            (found,) = result.program.flat(*inputs(case.kind, batch, keep))
        torch.testing.assert_close(found, case.expected(batch, keep), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", IDENTITY, ids=str)
def test_identity_schedules_change_nothing(case: Case) -> None:
    result = reduce(case.kind, case.recipe, case.schedule(NONE), case.settings, case.short)
    assert not any(e.pass_spec.startswith("reduce-tokens") for e in result.edits)
    given = inputs(case.kind, 3, NONE)
    with torch.no_grad():
        assert torch.equal(result.program.flat(*given)[0], model(case.kind)(*given))


# -- the hand-patched models equal what is simpler still ---------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_that_keeps_all_equals_the_model(case: Case) -> None:
    with torch.no_grad():
        dense = model(case.kind)(*inputs(case.kind, 3, NONE))
    torch.testing.assert_close(case.expected(3, NONE), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("case", "keep"), RUNS)
def test_reference_reduces(case: Case, keep: float) -> None:
    """It has the shape that the schedule says, and is not the dense model."""
    with torch.no_grad():
        dense = model(case.kind)(*inputs(case.kind, 3, keep))
    found = case.expected(3, keep)
    if found.shape != dense.shape:
        prefix = model(case.kind.removeprefix("ids_")).num_prefix_tokens
        kept = PATCHES - sum(REMOVED[keep]) if case.by_number else refs.count(keep, PATCHES)
        if case.recipe == "dependency":
            kept = refs.count(keep, kept)
        wanted = {kept, kept // 8 * 8} if case.note == "rows" else {kept}
        wanted |= {side * side for side in (3, 4, 6)} if case.recipe == "pool" else set()
        assert found.shape[1] - prefix in wanted
    else:
        assert (found - dense).abs().max() > 1e-3


@contextmanager
def double(module: nn.Module) -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield module.double()
    finally:
        torch.set_default_dtype(torch.float32)
        module.float()


@pytest.mark.parametrize(("case", "keep"), RUNS)
def test_decisions_do_not_hang_on_rounding(case: Case, keep: float) -> None:
    """In double precision the same tokens stay and merge: a difference found above is an error, not a near tie."""
    single = case.expected(3, keep)
    given = [t.double() if t.is_floating_point() else t for t in inputs(case.kind, 3, keep)]
    with double(model(case.kind.removeprefix("ids_"))) as exact, torch.no_grad():
        found = case.reference(exact, *given, keep)
    torch.testing.assert_close(found.float(), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["features", "plain"])
def test_an_unreduced_run_shows_what_the_model_computes(kind: str) -> None:
    vision, x = model(kind), images(2)
    caught: list[Tensor] = []
    handles = [block.attn.register_forward_hook(lambda *a: caught.append(a[2])) for block in vision.blocks]
    with torch.no_grad():
        seen = refs.see(vision, x)
        assert torch.equal(seen.features, vision(x))
        for handle in handles:
            handle.remove()
        h = vision.norm_pre(vision._pos_embed(vision.patch_embed(x)))
        for block, attention, key, mixed in zip(vision.blocks, seen.attention, seen.key, caught, strict=True):
            n = h.shape[1]
            query, keys, value = block.attn.qkv(block.norm1(h)).view(2, n, 3, 2, 16).unbind(2)
            torch.testing.assert_close(key, keys.mean(2))
            assert attention.shape == (2, 2, n, n)
            torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, n))
            again = block.attn.proj(torch.einsum("bhij,bjhd->bihd", attention, value).flatten(2))
            torch.testing.assert_close(again, mixed, rtol=1e-5, atol=1e-5)
            h = block(h)
    assert seen.received(1).shape == (2, PATCHES)


# -- plans -------------------------------------------------------------------------------------------------------------


def is_partition(groups: list[list[int]], n: int) -> bool:
    heads = [group[0] for group in groups]
    return sorted(sum(groups, [])) == list(range(n)) and heads == sorted(heads)


def test_matches_are_partitions_with_the_sums_of_all() -> None:
    x, metric = torch.randn(2, 12, 3), torch.randn(2, 12, 4)
    plan = [refs.match(m, range(0, 12, 3), [1, 2, 7], 3) for m in metric]
    assert all(is_partition(groups, 12) and len(groups) == 9 for groups in plan)
    sizes = torch.tensor([[float(len(g)) for g in groups] for groups in plan])
    torch.testing.assert_close((refs.apply(x, plan) * sizes[..., None]).sum(1), x.sum(1))
    back = refs.copied(refs.apply(x, plan), plan, 12)
    torch.testing.assert_close(back.sum(1), x.sum(1))
    metric[0, 7], metric[0, 6] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([3.0, 0, 0, 0])
    assert [7, 6] in refs.match(metric[0], range(0, 12, 3), [1, 2, 7], 1)


@pytest.mark.parametrize("name", ["pitome", "dependency"])
def test_merged_streams_conserve_their_tokens(name: str) -> None:
    trace: list[Tokens] = []
    with torch.no_grad():
        if name == "pitome":
            refs.pitome(model("features"), images(3), [9, 20, 0, 40], trace=trace)
        else:
            refs.dependency(model("features"), images(3), 0.6, (0, 2), trace=trace)
    lengths = [t.x.shape[1] - 1 for t in trace]
    assert lengths == ([55, 35, 35, 18] if name == "pitome" else [39, 39, 24, 24])
    for tokens in trace:
        assert (tokens.size.sum(1) == 1 + PATCHES).all() and (tokens.size[:, 0] == 1).all()
        for row in range(3):
            assert torch.equal(tokens.home[row].bincount(minlength=tokens.x.shape[1]).float(), tokens.size[row])
            assert torch.equal(tokens.home[row, tokens.position[row]], torch.arange(tokens.x.shape[1]))
            assert tokens.position[row].tolist() == sorted(tokens.position[row].tolist())


def test_one_target_per_cell() -> None:
    assert refs.cell_targets((4, 6), 2, None) == [0, 2, 4, 12, 14, 16]
    assert refs.cell_targets((5, 5), 2, None) == [0, 2, 10, 12]
    for seed in range(5):
        targets = refs.cell_targets((8, 8), 2, torch.Generator().manual_seed(seed))
        assert sorted((t // 16, t % 8 // 2) for t in targets) == [(i, j) for i in range(4) for j in range(4)]


def test_recycled_cells() -> None:
    score = torch.rand(35)
    groups = refs.recycled(score, (5, 7), 3, 11)
    assert is_partition(groups, 35) and len(groups) == 11 + 6
    alone, cells = groups, [g for g in groups if len(g) > 1]
    for group in cells:
        assert len({(i // 7 // 3, i % 7 // 3) for i in group}) == 1
        assert all(score[group[0]] <= score[i] for i in group)
    rest = [i for g in cells for i in g]
    lowest = sorted(rest, key=lambda i: -float(score[i]))[0]
    kept = [g[0] for g in alone if len(g) == 1]
    assert sum(bool(score[i] < score[lowest]) for i in kept) <= 6  # cells of which nothing else is removed


def test_contextual_targets_are_evenly_spaced() -> None:
    score = torch.arange(20.0)
    groups = refs.contextual(score, torch.randn(20, 4), 6, 4)
    assert is_partition(groups, 20) and len(groups) == 10
    assert [g[0] for g in groups] == [0, 3, 6, 9, *range(14, 20)]
    assert all(len(g) == 1 for g in groups[4:])


def circle(*degrees: float) -> Tensor:
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_farthest() -> None:
    points = circle(0, 10, 80, 170, 175)
    assert refs.farthest(points, 3, False, None) == [2, 4, 0]  # 80 is 70 from its nearest; 175 is 95 away; then 0
    assert refs.farthest(points, 3, False, 0) == [0, 4, 2]
    # After 0 and 175 the sums are cos 10 + cos 165, cos 80 + cos 95, cos 170 + cos 5.
    assert refs.farthest(points, 3, True, 0) == [0, 4, 3]


def test_dpp_takes_no_direction_twice() -> None:
    metric = torch.tensor([[2.0, 0, 0], [3, 0.01, 0], [0, 5, 0.1], [0, 1, 0], [0, 0.2, 1]])
    picked = refs.dpp(metric, None, 3)
    assert picked == [0, 2, 4]
    assert refs.dpp(metric, torch.tensor([0.0, 1, 0.2, 0.6, 0.1]), 2) == [1, 3]


def test_ncut_finds_the_smaller_side() -> None:
    near = circle(*torch.linspace(0, 20, 12).tolist(), *torch.linspace(90, 100, 5).tolist())
    for order in (torch.arange(17), torch.randperm(17)):
        score = refs.ncut(near[order], 0.5)
        assert sorted(score.topk(5).indices.tolist()) == sorted((order >= 12).nonzero().flatten().tolist())
        assert abs(float(score.mean())) < 1e-5


def test_around_does_not_wrap() -> None:
    assert refs.around((3, 4), 7, 1) == [3, 6, 7, 11]
    assert refs.around((3, 4), 0, 2) == [0, 1, 2, 4, 5, 8]


@pytest.mark.parametrize("cells", [(1, 1), (2, 4), (3, 3), (5, 6), (8, 8)])
def test_pooled_is_adaptive_pooling(cells: tuple[int, int]) -> None:
    x = torch.randn(8 * 8, 5)
    expected = F.adaptive_avg_pool2d(x.T.view(1, 5, 8, 8), cells)[0].flatten(1).T
    torch.testing.assert_close(refs.pooled(x, (8, 8), cells), expected)


@pytest.mark.parametrize("local", [True, False])
def test_association(local: bool) -> None:
    x = torch.randn(64, 5)
    seeds, belongs = refs.association(x, (8, 8), (4, 4), local)
    torch.testing.assert_close(belongs.sum(1), torch.ones(64))
    torch.testing.assert_close(belongs.sum(0) @ seeds, x.sum(0))
    support = (belongs > 0).sum(1).view(8, 8)
    assert support.tolist()[0] == ([4, 4, 6, 6, 6, 6, 4, 4] if local else [16] * 8)
    same, belongs = refs.association(torch.ones(64, 5), (8, 8), (3, 3), local)
    torch.testing.assert_close(belongs @ same, torch.ones(64, 5))


def test_grid_cells_fit() -> None:
    assert [refs.grid_cells((8, 8), k) for k in (1, 10, 16, 39, 64)] == [(1, 1), (3, 3), (4, 4), (6, 6), (8, 8)]
    for k in range(1, 97):
        rows, columns = refs.grid_cells((6, 16), k)
        assert 1 <= rows <= 6 and 1 <= columns <= 16 and rows * columns <= k


def test_uniform_positions() -> None:
    assert refs.uniform_positions((8, 8), 64) == list(range(64))
    assert refs.uniform_positions((4, 4), 4) == [0, 2, 8, 10]
    for k in range(1, 64):
        positions = refs.uniform_positions((8, 8), k)
        assert len(set(positions)) == k
        gaps = [min((p // 8 - i // 8) ** 2 + (p % 8 - i % 8) ** 2 for p in positions) for i in range(PATCHES)]
        assert max(gaps) <= 64 / k + 1


def test_patch_variance() -> None:
    image = images(1)[0]
    image[:, 8:12, 4:8] = 0.3
    variance = refs.patch_variance(image, 4)
    expected = F.unfold(image[:, None], 4, stride=4).var(dim=1, correction=0).mean(0)
    torch.testing.assert_close(variance, expected)
    assert int(variance.argmin()) == 2 * 8 + 1


def test_sinks() -> None:
    attention = torch.full((5, 5), 0.05)
    attention[:, 3] = 0.8
    attention[3] = torch.tensor([0.2, 0.3, 0.1, 0.15, 0.25])
    torch.testing.assert_close(refs.sink_score(attention, 1, 2.0), attention[3, 1:])
    torch.testing.assert_close(refs.sink_score(attention, 1, 30.0), attention[3, 1:])
    torch.testing.assert_close(refs.sink_score(attention, 1, 0.0), attention[1:, 1:].mean(0))


def test_finished_tokens_keep_their_features() -> None:
    vision, x = model("features"), images(2)
    with torch.no_grad():
        h = refs.timm_embed(vision, x)[0].x
        for block in vision.blocks[:2]:
            h = block(h)
        norms = h[:, 1:].norm(dim=-1)
        found = refs.canvas(vision, x, lambda hidden: hidden.norm(dim=-1), 0.25, [2])
        finished = [row.argsort()[16:] + 1 for row in norms]
        for b in range(2):
            torch.testing.assert_close(found[b, finished[b]], vision.norm(h)[b, finished[b]])
            stays = torch.cat([torch.tensor([0]), (row := norms[b]).argsort()[:16].sort().values + 1])
            assert row.numel() == PATCHES
            y = h[b : b + 1, stays]
            for block in vision.blocks[2:]:
                y = block(y)
            torch.testing.assert_close(found[b, stays], vision.norm(y)[0], rtol=1e-5, atol=1e-5)


def test_transitions_are_those_of_the_modules() -> None:
    """What hooks see of the first two blocks ranks the tokens that stay."""
    vision, x = model("features"), images(2)
    score = torch.zeros(2, PATCHES)
    handles = []

    def watch(module: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> None:
        nonlocal score
        a, b = given[0][:, 1:], found[:, 1:]
        cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        score = score + (1 - cosine.abs()).softmax(-1) * b.norm(dim=-1) / a.norm(dim=-1)

    for block in vision.blocks[:2]:
        handles += [block.attn.register_forward_hook(watch), block.mlp.register_forward_hook(watch)]
    with torch.no_grad():
        h = refs.timm_embed(vision, x)[0].x
        for block in vision.blocks[:2]:
            h = block(h)
        for handle in handles:
            handle.remove()
        stays = score.topk(20).indices.sort(1).values + 1
        y = refs.take(h, torch.cat([torch.zeros(2, 1, dtype=torch.int64), stays], 1))
        for block in vision.blocks[2:]:
            y = block(y)
        torch.testing.assert_close(refs.transition(vision, x, 0.3), vision.norm(y), rtol=1e-5, atol=1e-5)


def test_text_conditions_cdpruner() -> None:
    vision, x = model("features"), images(2)
    with torch.no_grad():
        features = vision(x)
        text = features[:, [5]]  # what resembles the text most comes first
        one = refs.cdpruner(vision, x, 1 / PATCHES, text)
    torch.testing.assert_close(one[:, 1], features[:, 5])


def test_vggt_partition() -> None:
    sources, targets = refs.vggt_partition(5, 2, (4, 4), 2, 33, 0.1)
    assert len(targets) == 18 + 4 * (2 + 4) and set(range(18)) <= set(targets)
    assert not {i for i in sources if i % 18 < 2 or i % 10 == 0} and not set(sources) & set(targets)
    rest = set(range(90)) - set(sources) - set(targets)
    assert all(i % 10 == 0 for i in rest)
    assert refs.vggt_partition(5, 2, (4, 4), 2, None, 0.0)[0] == [
        f * 18 + 2 + i for f in range(1, 5) for i in range(16) if i not in (0, 2, 8, 10)
    ]


def test_vggt_alternates() -> None:
    """Frames meet in global attention alone, and places are told apart by rotation."""
    vggt, x = model("vggt"), refs.frames(model("vggt"), 1)
    with torch.no_grad():
        other = x.clone()
        other[:, 4] = other[:, 3]
        assert not torch.allclose(vggt(x)[:, 0], vggt(other)[:, 0], atol=1e-3)
        blocks = [block.proj for block in vggt.global_blocks]
        kept = [(p.weight.clone(), p.bias.clone()) for p in blocks]
        for p in blocks:
            p.weight.zero_()
        torch.testing.assert_close(vggt(x)[:, :4], vggt(other)[:, :4])
        for p, (weight, bias) in zip(blocks, kept, strict=True):
            p.weight.copy_(weight)
            p.bias.copy_(bias)
        swapped = vggt(x[:, :, [1, 0, *range(2, 16)]])
        assert not torch.allclose(swapped[:, :, 2], vggt(x)[:, :, 3], atol=1e-3)
        flat = refs.tiny_vggt(rope=False)
        swapped = flat(x[:, :, [1, 0, *range(2, 16)]])
        torch.testing.assert_close(swapped[:, :, 2], flat(x)[:, :, 3], rtol=1e-5, atol=1e-5)


# -- options matter ----------------------------------------------------------------------------------------------------


def test_options_matter() -> None:
    """The tiny models are not so tame that an error of a method would hide below the tolerance of a comparison."""
    head, features, x = model("head"), model("features"), images(2, seed=1)
    with torch.no_grad():
        families = [
            [refs.tomesd(head, x, 0.5, seed=s) for s in (None, 3, 4)] + [refs.agentsd(head, x, 0.5, seed=3)],
            [
                refs.pitome(head, x, [8] * 4),
                refs.pitome(head, x, [8] * 4, shift=True),
                refs.pitome(head, x, [8] * 4, alpha=0.1),
                refs.dymu(head, x, [8] * 4),
            ],
            [refs.supertoken(head, x, 0.25, n, local) for n in (1, 2) for local in (True, False)],
            [refs.semantic_token(head, x, 0.25, *span) for span in ((0, 1), (1, 2), (1, 3))],
            [refs.transition(head, x, 0.5, layer) for layer in (1, 2, 3)] + [refs.transition(head, x, absolute=False)],
            [refs.rollout(head, x, 0.5, layer) for layer in (0, 1, 2)],
            [refs.visionzip(features, x, 0.5), refs.visionzip(features, x, 0.5, sum_=True)],
            [refs.prumerge(features, x, 0.5, n) for n in (0, 1, 8, 32)],
            [refs.vflowopt(features, x, 0.5, 4, t) for t in (0.0, 1.3, 30.0)],
            [refs.vispruner(features, x, 0.5, step) for step in (1, 3, 8)],
            [
                refs.fopru(features, x, 0.5),
                refs.fopru(features, x, 0.5, rows=True),
                refs.vtc_cls(features, x, 0.5),
                refs.hiprune(features, x, 0.5),
                refs.hiprune(features, x, 0.5, 0.5),
                refs.hiprune(features, x, 0.5, 0.5, 2),
                refs.todre(features, x, 0.5),
                refs.divprune(features, x, 0.5),
                refs.cdpruner(features, x, 0.5),
            ],
            [refs.fastvggt(model("vggt"), refs.frames(model("vggt")), seed=s) for s in (None, 33, 34)],
        ]
    for family in families:
        for i, one in enumerate(family):
            for another in family[:i]:
                assert (one - another).abs().max() > 1e-4, (len(families), i)
