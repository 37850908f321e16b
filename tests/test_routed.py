"""Patterns that depend on the content, against the papers' formulas in loops, dense attention, and the runtimes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenopt import Program, capture, optimize, recipes, run, runtimes
from tokenopt.attention import AttentionRecipe, Layout, Pattern, Predicted, Routed, Sorted, parse
from tokenopt.attention.pattern import Lowered, Refused
from tokenopt.cost import node_flops
from tokenopt.errors import UsageError
from tokenopt.fitting import fit_patterns, needs_data
from tokenopt.loading import load_program
from tokenopt.ops import attentions
from tokenopt.passes.sparsify_attention import SparsifyAttention
from tokenopt.pipeline import Pipeline, parse_passes
from tokenopt.recipes.attention import BIFORMER, CATANET, DHSA, SPARGE, SPARSIFINER, VSA
from tokenopt.runtimes.base import Engine
from tokenopt.runtimes.tensorrt import TensorRTRTX

ops = torch.ops.tokenopt
rtx = pytest.mark.skipif(TensorRTRTX().available() is not None, reason="tensorrt_rtx is not installed")

GRIDS = {
    "run": Layout(23, 0, (23,), heads=2, head_dim=8),
    "grid": Layout(1 + 30 + 2, 1, (5, 6), heads=2, head_dim=8),
    "video": Layout(2 + 45, 2, (3, 3, 5), heads=2, head_dim=8),
}
ROUTED = {
    "biformer": Routed(2, topk=2),
    "dhsa": Routed(5, topk=5, key_block=3, score="length", heads="mean", first=1, local=1, flat=True),
    "sparge": Routed(4, topk=3, key_block=2, heads="each", flat=True),
    "boxes": Routed(3, topk=3, key_block=2, heads="each", first=1),
}


def operands(layout: Layout, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, layout.heads, layout.total, layout.head_dim)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    return query, key, value


def call(lowered: Lowered, *tensors: Tensor, **more: Tensor | None) -> Tensor:
    return getattr(ops, lowered.op)(*tensors, **lowered.tensors, **lowered.settings, **more)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def over(seen: Iterable[int], q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """One query over a list of keys."""
    seen = list(seen)
    logits = torch.stack([q @ k[j] * len(q) ** -0.5 + (0.0 if bias is None else bias[j]) for j in seen])
    return logits.softmax(0) @ torch.stack([v[j] for j in seen])


# -- blocks, chosen by the product of their means ----------------------------------------------------------------------


def boxes(layout: Layout, size: tuple[int, ...]) -> list[list[int]]:
    """Positions of the tokens of every box of the grid."""
    starts = product(*(range(0, n, s) for n, s in zip(layout.grid, size, strict=True)))
    found = []
    for corner in starts:
        cells = product(*(range(c, min(c + s, n)) for c, s, n in zip(corner, size, layout.grid, strict=True)))
        members = []
        for cell in cells:
            number = 0
            for c, n in zip(cell, layout.grid, strict=True):
                number = number * n + c
            members.append(layout.start + number)
        found.append(members)
    return found


def routed(pattern: Routed, layout: Layout, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Pattern and attention of every query by itself, from the words of `Routed`."""
    grid = replace(layout, grid=(layout.count,)) if pattern.flat else layout
    per_axis = lambda size: size if isinstance(size, tuple) else (size,) * len(grid.grid)  # noqa: E731
    key_size = per_axis(pattern.key_block or pattern.block)
    blocks, key_blocks = boxes(grid, per_axis(pattern.block)), boxes(grid, key_size)
    coords = lambda p: [int(c) for c in grid.at(torch.tensor([p])).coords]  # noqa: E731
    local = max(pattern.local, 1) if layout.causal else pattern.local
    bias = torch.zeros(layout.total, layout.total) if bias is None else bias
    out = torch.zeros_like(v)
    others = layout.others

    def away(a: list[int], b: list[int]) -> int:
        """Blocks of keys that b begins behind a's last token, or ends before its first."""
        most = 0
        for axis, size in enumerate(key_size):
            x, y = ([coords(p)[axis] for p in part] for part in (a, b))
            gap = max(min(y) - max(x), min(x) - max(y), 0)
            most = max(most, -(-gap // size))
        return most

    def pooled(x: Tensor, members: list[int]) -> Tensor:  # [H, N, D] -> [H, D]
        mean = sum(x[:, p] for p in members) / len(members)
        return mean * len(members) ** 0.5 if pattern.score == "length" else mean

    for b, h in product(range(q.shape[0]), range(layout.heads)):
        for block in blocks:
            chosen, scored = [], []
            for number, keys in enumerate(key_blocks):
                if layout.causal and min(keys) > max(block):
                    continue
                if number < pattern.first or away(block, keys) < local:
                    chosen.append(keys)
                    continue
                a, c = pooled(q[b], block), pooled(k[b], keys)
                score = {"joint": (a * c).sum(), "mean": a.mean(0) @ c.mean(0), "each": a[h] @ c[h]}[pattern.heads]
                scored.append((float(score), keys))
            scored.sort(key=lambda pair: -pair[0])
            chosen += [keys for _, keys in scored[: pattern.topk - len(chosen)]]
            for i in block:
                seen = [j for keys in [*chosen, others] for j in keys if not layout.causal or j <= i]
                out[b, h, i] = over(seen, q[b, h, i], k[b, h], v[b, h], bias[i])
        for i in others:
            seen = range(i + 1 if layout.causal else layout.total)
            out[b, h, i] = over(seen, q[b, h, i], k[b, h], v[b, h], bias[i])
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", GRIDS)
@pytest.mark.parametrize("name", ROUTED)
def test_routed_attention_is_the_papers(name: str, layout: str, causal: bool) -> None:
    pattern, at = ROUTED[name], replace(GRIDS[layout], causal=causal)
    if causal and name in ("sparge", "boxes"):
        pattern = replace(pattern, topk=9)  # its own blocks of keys, and a few
    q, k, v = operands(at)
    close(call(pattern.lower(at), q, k, v), routed(pattern, at, q, k, v))


def test_a_bias_is_added_to_the_pairs_that_are_seen() -> None:
    at, bias = replace(GRIDS["grid"], causal=True), torch.randn(33, 33)
    q, k, v = operands(at)
    pattern = ROUTED["sparge"]
    expected = routed(pattern, at, q, k, v, bias)
    close(call(pattern.lower(at), q, k, v, bias=bias), expected)
    hidden = bias > -1
    expected = routed(pattern, at, q, k, v, torch.zeros(33, 33).masked_fill(~hidden, float("-inf")))
    visible = call(pattern.lower(at), q, k, v, bias=hidden)
    close(visible, expected.nan_to_num())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [None, (33,), (33, 33), (2, 33, 33), (2, 1, 1, 33), (2, 2, 33, 33)])
@pytest.mark.parametrize("name", ROUTED)
def test_routed_attention_is_dense_attention_under_its_bias(
    name: str, shape: tuple[int, ...] | None, causal: bool
) -> None:
    """With every shape of a bias, and one per key; with all blocks it is dense attention."""
    at = replace(GRIDS["grid"], causal=causal)
    pattern = replace(ROUTED[name], topk=8)
    q, k, v = operands(at)
    given = {"bias": None if shape is None else torch.randn(shape), "key_bias": torch.randn(2, 33)}
    lowered = pattern.lower(at)
    dense = call(replace(lowered, op=lowered.dense), q, k, v, **given)
    assert bool((dense == float("-inf")).any())
    close(call(lowered, q, k, v, **given), ops.attention(q, k, v, dense))
    whole = pattern.whole(at, lowered)
    bias = given["bias"]
    if causal:
        past = torch.ones(33, 33, dtype=torch.bool).tril()
        bias = torch.where(past, torch.zeros(()) if bias is None else bias, float("-inf"))
    close(call(whole, q, k, v, **given), ops.attention(q, k, v, bias, given["key_bias"]))


def test_the_count_of_blocks_holds_the_share_of_the_attention() -> None:
    at = Layout(48, 0, (48,), heads=2, head_dim=8)
    q, k, v = operands(at)
    q = q * 3
    fitted, weights = Routed(6, mass=0.6, key_block=4, heads="each").fit(at, q, k)
    assert not weights and fitted.mass is None
    probabilities = (q @ k.mT * 8**-0.5).softmax(-1)
    for topk, enough in ((fitted.topk, True), (fitted.topk - 1, False)):
        lowered = replace(fitted, topk=topk).lower(at)
        seen = call(replace(lowered, op=lowered.dense), q, k, v) == 0
        assert ((probabilities * seen).sum(-1).mean() >= 0.6) == enough
    assert Routed(6, mass=1.0).fit(at, q, k)[0].topk == 8


# -- chunks of tokens that are sorted by their nearest centre ----------------------------------------------------------


def fitted(pattern: Pattern, layout: Layout, folder: Path, *tensors: Tensor, site: int = 3) -> Pattern:
    found, weights = pattern.fit(layout, *tensors)
    save_file({f"site{site}.{name}": value.contiguous() for name, value in weights.items()}, folder / "weights")
    return replace(found, weights=str(folder / "weights"), site=site)


def weights_of(pattern: Pattern) -> dict[str, Tensor]:
    return {name.split(".")[1]: value for name, value in load_file(pattern.weights).items()}


@pytest.mark.parametrize("chunk", [5, 6])  # with a short one at the end, and without
@pytest.mark.parametrize("layout", GRIDS)
def test_sorted_attention_is_the_papers(layout: str, chunk: int, tmp_path: Path) -> None:
    at = GRIDS[layout]
    q, k, v = operands(at)
    pattern = fitted(Sorted(4, chunk=chunk), at, tmp_path, *operands(at, 8, seed=1)[:2])
    centres = weights_of(pattern)["centres"]
    lowered = pattern.lower(at)
    out = torch.zeros_like(v)
    grid = range(at.start, at.start + at.count)
    for b in range(2):
        nearest = {}
        for i in grid:
            token = torch.cat([k[b, h, i] for h in range(at.heads)])
            nearest[i] = max(range(4), key=lambda c: float(torch.cosine_similarity(token, centres[c], dim=0)))
        line = sorted(grid, key=lambda i: nearest[i])  # stable
        chunks = [line[i : i + chunk] for i in range(0, len(line), chunk)]
        chunks.append([])
        for h, (number, members) in product(range(at.heads), enumerate(chunks[:-1])):
            for i in members:
                out[b, h, i] = over([*members, *chunks[number + 1], *at.others], q[b, h, i], k[b, h], v[b, h])
        for h, i in product(range(at.heads), at.others):
            out[b, h, i] = over(range(at.total), q[b, h, i], k[b, h], v[b, h])
    close(call(lowered, q, k, v), out)
    key_bias = torch.randn(2, at.total)
    bias = call(replace(lowered, op=lowered.dense), q, k, v, key_bias=key_bias)
    close(call(lowered, q, k, v, key_bias=key_bias), ops.attention(q, k, v, bias))
    whole = pattern.whole(at, lowered)
    close(call(whole, q, k, v, key_bias=key_bias), ops.attention(q, k, v, None, key_bias))


def test_centres_are_those_of_groups(tmp_path: Path) -> None:
    at = Layout(40, 0, (40,), heads=2, head_dim=8)
    groups = torch.nn.functional.normalize(torch.randn(4, 16), dim=-1)
    tokens = 3 * groups[torch.randint(4, (6, 40))] + 0.05 * torch.randn(6, 40, 16)
    keys = tokens.unflatten(2, (2, 8)).transpose(1, 2)
    _, weights = Sorted(4).fit(at, keys, keys)
    cosines = torch.nn.functional.normalize(weights["centres"], dim=-1) @ groups.T
    assert bool((cosines.amax(0) > 0.99).all())
    with pytest.raises(UsageError, match="more data"):
        Sorted(4).fit(at, keys[:0], keys[:0])


# -- keys, by a prediction of the attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("layout", ["run", "grid"])
def test_predicted_attention_is_the_papers(layout: str, tile: int, tmp_path: Path) -> None:
    at = GRIDS[layout]
    q, k, v = operands(at)
    given = Predicted(6, keep=0.3, tile=tile, coefficients=3)
    pattern = fitted(given, at, tmp_path, *operands(at, 2, seed=1)[:2])
    learned = weights_of(pattern)
    lowered = pattern.lower(at)
    out, start = torch.zeros_like(v), at.start
    few = math.ceil(0.3 * at.count)
    for b, h in product(range(2), range(at.heads)):
        small = k[b, h, start : start + at.count] @ learned["key_weight"]
        for block in boxes(at, (tile,) * len(at.grid)):
            approximate = torch.zeros(at.count)
            for i in block:
                logits = q[b, h, i] @ learned["query_weight"] @ small.T @ learned["project"] * at.heads**-0.5
                coefficients = logits.softmax(0)
                for number in coefficients.argsort(descending=True)[:3]:
                    approximate += coefficients[number] * learned["basis"][number]
            seen = [start + int(j) for j in approximate.argsort(descending=True)[:few]]
            for i in block:
                out[b, h, i] = over([*seen, *at.others], q[b, h, i], k[b, h], v[b, h])
        for i in at.others:
            out[b, h, i] = over(range(at.total), q[b, h, i], k[b, h], v[b, h])
    close(call(lowered, q, k, v), out)
    given = {"bias": torch.randn(at.total, at.total), "key_bias": torch.randn(2, at.total)}
    bias = call(replace(lowered, op=lowered.dense), q, k, v, **given)
    close(call(lowered, q, k, v, **given), ops.attention(q, k, v, bias))
    close(call(pattern.whole(at, lowered), q, k, v, **given), ops.attention(q, k, v, given["bias"], given["key_bias"]))


def test_a_prediction_learns_where_attention_goes() -> None:
    """Attention that is local, and follows the content a little: fresh samples, against keys by chance."""
    at = Layout(36, 0, (6, 6), heads=2, head_dim=16)
    place = torch.nn.functional.normalize(torch.randn(36, 16), dim=-1) * 6
    fresh = lambda seed: [place + x for x in operands(at, 16, seed)[:2]]  # noqa: E731
    pattern = Predicted(12, keep=0.25, coefficients=4)
    _, weights = pattern.fit(at, *fresh(1))
    q, k = fresh(2)
    table = torch.arange(36).unsqueeze(-1)
    index = ops.predict_route(q, k, table, table, *weights.values(), topk=9, coefficients=4)
    probabilities = (q @ k.mT / 4).softmax(-1)
    assert probabilities.gather(-1, index).sum(-1).mean() > 0.6, "by chance it is a quarter"


@pytest.mark.parametrize("pattern", [Sorted(4, chunk=8), Predicted(4, keep=0.3)])
def test_weights_are_for_one_attention(pattern: Pattern, tmp_path: Path) -> None:
    at = GRIDS["grid"]
    found = fitted(pattern, at, tmp_path, *operands(at)[:2])
    for layout, changed, why in (
        (at, replace(found, site=4), "no weights for attention 4"),
        (replace(at, head_dim=16), found, "features"),
    ):
        with pytest.raises(Refused, match=why):
            changed.lower(layout)
    (tmp_path / "weights").write_bytes(b"none")
    with pytest.raises(UsageError, match="cannot be read"):
        found.lower(at)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ROUTED)
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    """Blocks are chosen in single precision at least: half precision rounds the result, not the choice."""
    at = GRIDS["grid"]
    lowered = replace(ROUTED[name], topk=6).lower(at)
    rounded = [x.to(dtype) for x in operands(at)]
    tables = {n: t.to(dtype) if t.is_floating_point() else t for n, t in lowered.tensors.items()}
    found = call(replace(lowered, tensors=tables), *rounded)
    assert found.dtype is dtype
    tolerance = 2e-2 if dtype is torch.bfloat16 else 5e-3
    torch.testing.assert_close(found.float(), call(lowered, *(x.float() for x in rounded)), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("pattern", "layout", "why"),
    [
        (Routed((4, 4), topk=2), GRIDS["run"], "the grid has 1 axes"),
        (Routed(4, mass=0.5), GRIDS["run"], "learned from data"),
        (Routed(4, topk=2, first=2, local=1), GRIDS["run"], "first and local are 3 blocks"),
        (Sorted(4), GRIDS["run"], "fitted on data"),
        (Sorted(4, weights="w"), replace(GRIDS["run"], causal=True), "no order in time"),
        (Predicted(4), GRIDS["run"], "fitted on data"),
        (Predicted(4, weights="w"), replace(GRIDS["run"], causal=True), "does not know the past"),
    ],
)
def test_what_means_nothing_is_refused(pattern: Pattern, layout: Layout, why: str) -> None:
    with pytest.raises(Refused, match=why) as caught:
        pattern.lower(layout)
    assert caught.value.hint


@pytest.mark.parametrize(
    "text", ["Routed(4)", "Routed(0, topk=1)", "Routed(4, topk=0)", "Routed(4, mass=2)", "Routed(4, 2, heads='all')",
             "Sorted(0)", "Predicted(keep=0)", "Predicted(0)"]
)  # fmt: skip
def test_what_is_no_pattern_is_an_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


# -- whole models ------------------------------------------------------------------------------------------------------


def perturbed(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def vit() -> Program:
    import timm

    torch.manual_seed(0)
    options = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return capture(perturbed(timm.create_model("vit_tiny_patch16_224", **options)), (images(2),))


@pytest.fixture(scope="module")
def decoder() -> Program:
    from transformers import LlamaConfig, LlamaForCausalLM

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids=input_ids).logits

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, use_cache=False,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    return capture(Logits(perturbed(LlamaForCausalLM(config))), (torch.randint(0, 50, (2, 40)),))


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


MODELS = {
    "biformer": ("vit", BIFORMER.with_settings({"block": 3, "topk": 2})),
    "sparge": ("vit", SPARGE.with_settings({"block": 16, "key_block": 8, "mass": 0.5})),
    "catanet": ("vit", CATANET.with_settings({"centres": 8, "chunk": 10})),
    "sparsifiner": ("vit", SPARSIFINER.with_settings({"rank": 8})),
    "dhsa": ("decoder", DHSA.with_settings({"block": 8, "key_block": 4, "topk": 5, "first": 1})),
}


def small(name: str, request: pytest.FixtureRequest) -> tuple[Program, AttentionRecipe, list[list[Tensor]]]:
    model, recipe = MODELS[name]
    return request.getfixturevalue(model), recipe, [[images(2, seed)] for seed in (1, 2)]


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_of_a_model(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The identity and the pattern's own mask are checked by `optimize`."""
    program, recipe, data = small(name, request)
    result = optimize(program, recipe=recipe, min_speedup=0, data=data, weights=tmp_path / "weights.safetensors")
    checks = {row["check"] for row in result.report.parity}
    assert {"identity", "pattern"} <= checks
    assert all(row["passed"] for row in result.report.parity)
    assert [row["refusal"] for row in result.report.patterns] == [None, None]
    inputs = program.random_inputs(2)[0]
    assert not torch.allclose(result.program.flat(*inputs)[0], program.flat(*inputs)[0], atol=1e-3)
    called = [n for n in result.program.graph.nodes if n.target in attentions()]
    assert len(called) == 2 and all(n.args[3:7] == called[0].args[3:7] for n in called), "layers share their tables"
    if name == "dhsa":
        why = "a plain causal mask is not carried along: no bias comes behind the forced blocks"
        assert all(len(n.args) == 8 and n.kwargs["causal"] for n in called), why


def test_patterns_that_learn_need_data(vit: Program, tmp_path: Path) -> None:
    recipe = MODELS["sparge"][1]
    assert needs_data(recipe)
    with pytest.raises(UsageError, match="learns from data"):
        optimize(vit, recipe=recipe)
    with pytest.raises(UsageError, match="no data"):
        fit_patterns(recipe, vit, [], tmp_path / "weights.safetensors")
    raised = Pipeline(parse_passes("fold-constants,raise-attention,flatten-grids")).run(vit).program
    result = SparsifyAttention(recipe=recipe, min_speedup=0).run(raised)
    assert len(result.refusals) == 2 and "learned from data" in result.refusals[0].why


def test_a_folder_holds_what_was_learned(vit: Program, tmp_path: Path) -> None:
    """The recipe that a run leaves names the weights beside it, and repeats the run without data."""
    out, again = tmp_path / "out", tmp_path / "again"
    vit.save(tmp_path / "model.pt2")
    save_file({vit.inputs[0].name: images(4)}, tmp_path / "data.safetensors")
    options = {
        "source": run.Source(), "build": run.Build(()), "schedule": None, "budget": None, "settings": {},
        "passes": None, "min_speedup": 0.0, "short_outputs": False, "batch_sizes": [], "threads": 1,
        "fitting": run.Fitting(), "progress": lambda *_: None,
    }  # fmt: skip
    recipe, data = "Sorted(8, chunk=10)", run.Data(str(tmp_path / "data.safetensors"))
    report = run.optimize_model(tmp_path / "model.pt2", out, recipe=recipe, data=data, **options).report
    assert report.files["scorer"] == run.SCORER
    assert [parse(row["pattern"]).weights for row in report.patterns] == [str(out / run.SCORER)] * 2
    run.optimize_model(tmp_path / "model.pt2", again, recipe=str(out / run.RECIPE), data=run.Data(), **options)
    first, second = (load_program(folder / run.PROGRAM) for folder in (out, again))
    assert torch.equal(first.flat(images(2, 9))[0], second.flat(images(2, 9))[0])


def test_slow_patterns_are_refused(vit: Program) -> None:
    result = optimize(vit, recipe=MODELS["biformer"][1])
    assert not result.changed
    assert "is predicted for this attention" in result.report.refusals[0]["why"]
    assert Routed(8, topk=4).lower(Layout(4097, 1, (64, 64), heads=12)).predicted > 4


def test_flops_of_what_is_computed(vit: Program) -> None:
    result = optimize(vit, recipe=Routed(4, topk=2), min_speedup=0)
    node = next(n for n in result.program.graph.nodes if n.target is ops.routed_attention.default)
    attention = 2 * (4 * 16 * (2 * 16 + 1) + 65) * (16 + 16)  # per head: 64 patches over 33 keys, the class over 65
    routing = 2 * (65 + 65 + 4 * 4) * 16
    assert node_flops(node) == 2 * (attention + routing)


# -- runtimes ----------------------------------------------------------------------------------------------------------


class Each(nn.Module):
    """All patterns on the same queries, keys and values; one is causal, and one has a bias."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        at, (query, key, _) = GRIDS["grid"], operands(GRIDS["grid"])
        causal = replace(at, causal=True)
        self.calls = [ROUTED["biformer"].lower(at), ROUTED["dhsa"].lower(causal)]
        for pattern in (Sorted(4, chunk=8), Predicted(4, keep=0.3, tile=2)):
            self.calls.append(fitted(pattern, at, folder, query, key).lower(at))
        self.bias = nn.Buffer(torch.randn(2, 33, 33))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        biased = call(self.calls[0], query, key, value, bias=self.bias)
        return biased, *(call(lowered, query, key, value) for lowered in self.calls[1:])


@pytest.fixture(scope="module")
def each(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return capture(Each(tmp_path_factory.mktemp("weights")), operands(GRIDS["grid"]))


@pytest.fixture(scope="module")
def exported(each: Program, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return runtimes.get("onnx").build(each, tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_onnx_runtime_computes_the_same(each: Program, exported: Engine) -> None:
    assert all(c.passed for c in exported.parity)
    inputs = operands(GRIDS["grid"], 3, seed=5)
    for found, expected in zip(exported(*inputs), each.flat(*inputs), strict=True):
        close(found, expected)


@pytest.mark.tensorrt
@rtx
def test_an_engine_is_built(each: Program, tmp_path: Path) -> None:
    engine = TensorRTRTX().build(each, tmp_path / "model.engine")
    assert all(c.passed for c in engine.parity)


@pytest.mark.parametrize("recipe", [BIFORMER, CATANET, DHSA, SPARGE, SPARSIFINER, VSA], ids=str)
def test_recipes_are_data(recipe: AttentionRecipe) -> None:
    assert recipes.get(recipe.to_dict()) == recipe
