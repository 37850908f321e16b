"""The references are right: they equal the plain models when nothing is reduced, and slow loops when something is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.zoo import perturb
from tests.references import (
    TIMM,
    Tokens,
    attention,
    bipartite_match,
    drop_inattentive,
    evit_timm,
    fastervlm_clip,
    images,
    log_size,
    merge,
    sentences,
    stream,
    take,
    timm_embed,
    tiny_hf,
    tiny_timm,
    tome_bert,
    tome_hf_clip,
    tome_hf_dinov2,
    tome_hf_siglip,
    tome_hf_vit,
    tome_hf_yolos,
    tome_sentence,
    tome_timm,
)

pytest.importorskip("timm")
pytest.importorskip("transformers")

HF: dict[str, Callable[..., list[Tensor]]] = {
    "vit": tome_hf_vit,
    "deit": tome_hf_vit,
    "dinov2": tome_hf_dinov2,
    "dinov2_registers": tome_hf_dinov2,
    "clip": tome_hf_clip,
    "siglip": tome_hf_siglip,
    "yolos": tome_hf_yolos,
}
# The plain model takes another kernel here (a mask of rank 3, the fused path of nn.MultiheadAttention).
OTHER_KERNEL = {"beit_shared", "siglip"}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def assert_equal(found: Tensor, expected: Tensor, exact: bool) -> None:
    """Bit by bit, or up to the rounding of another kernel."""
    torch.testing.assert_close(found, expected, atol=0 if exact else 3e-6, rtol=0)


# -- nothing reduced ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIMM)
def test_timm_without_merging_is_the_plain_model(name: str) -> None:
    model, x = tiny_timm(TIMM[name][0], **TIMM[name][1]), images(3)
    assert_equal(tome_timm(model, x, [0, 0, 0]), model(x), name not in OTHER_KERNEL)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", HF)
def test_transformers_without_merging_is_the_plain_model(name: str, implementation: str) -> None:
    model, x = tiny_hf(name, attn_implementation=implementation), images(3)
    expected = model(x).to_tuple()
    found = HF[name](model, x, [0, 0, 0])
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert_equal(f, e, implementation == "sdpa" and name not in OTHER_KERNEL)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_text_without_merging_is_the_plain_model(implementation: str) -> None:
    ids, mask = sentences(3)
    bert = tiny_hf("bert", attn_implementation=implementation)
    for after_norm in (False, True):
        found = tome_bert(bert, ids, mask, [0, 0, 0], after_norm=after_norm)
        for f, e in zip(found, bert(input_ids=ids, attention_mask=mask).to_tuple(), strict=True):
            assert_equal(f, e, implementation == "sdpa")
    minilm = tiny_hf("minilm", attn_implementation=implementation)
    assert_equal(tome_sentence(minilm, ids, mask, [0, 0, 0]), minilm(ids, mask), implementation == "sdpa")


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", ["vit", "deit_distilled", "registers", "eva02", "beit"])
def test_keeping_everything_is_the_plain_model(name: str, fuse: bool) -> None:
    model, x = tiny_timm(TIMM[name][0], **TIMM[name][1]), images()
    assert_equal(evit_timm(model, x, 1.0, [0, 1, 2], fuse), model(x), True)


def test_keeping_every_feature_is_the_plain_tower() -> None:
    model, x = tiny_hf("clip"), images()
    assert_equal(fastervlm_clip(model, x, 1.0, -2), model(x).last_hidden_state[:, 1:], True)


# -- against loops -----------------------------------------------------------------------------------------------------


def loop_match(metric: Tensor, r: int, prefix: int, suffix: int) -> tuple[list[int], list[int], list[int]]:
    """``bipartite_match`` for one sample, one pair at a time."""
    n = len(metric)
    free = range(prefix, n - suffix)
    edges = []
    for source in range(0, n, 2):
        best = None
        for destination in range(1, n, 2):
            if source in free and destination in free:
                a, b = metric[source].double(), metric[destination].double()
                similarity = round(float(a @ b / (a.norm() * b.norm())), 12)
                if best is None or similarity > best[0]:
                    best = (similarity, destination)
        if best is not None:
            edges.append((-best[0], source, best[1]))
    chosen = sorted(edges)[:r]
    sources = [source for _, source, _ in chosen]
    if not chosen:
        return [], [], list(range(n))
    rest = [i for i in free if i % 2 == 0 and i not in sources] + [i for i in free if i % 2]
    return sources, [d for *_, d in chosen], [*range(prefix), *rest, *range(n - suffix, n)]


@pytest.mark.parametrize("prefix,suffix", [(0, 0), (1, 0), (2, 0), (5, 0), (0, 1), (1, 5), (3, 4)])
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_match_equals_loops(prefix: int, suffix: int, kind: str) -> None:
    for n in range(prefix + suffix, prefix + suffix + 14):
        for r in (0, 1, 2, 3, 100):
            if not n:
                continue
            # Unit vectors along the axes have exact similarities, most of them equal.
            axis = (
                F.one_hot(torch.randint(3, (2, n)), 3).float() * torch.tensor([1.0, -1.0])[torch.randint(2, (2, n, 1))]
            )
            metric = axis if kind == "ties" else torch.randn(2, n, 6)
            found = bipartite_match(metric, r, prefix, suffix)
            for row in range(2):
                expected = loop_match(metric[row], r, prefix, suffix)
                assert tuple(part[row].tolist() for part in found) == expected, (n, r)


def test_merge_equals_loops() -> None:
    """Two merges after another; values, sizes, positions and members of every token."""
    x = torch.randn(3, 19, 5, dtype=torch.float64)
    tokens = stream(x, prefix=1, suffix=2)
    expected = [[{"x": x[b, i], "members": [i], "position": i} for i in range(19)] for b in range(3)]
    for r in (4, 5):
        keys = torch.randn(3, 2, tokens.x.shape[1], 4)
        tokens = merge(tokens, keys, r)
        for row in range(3):
            old = expected[row]
            sources, destinations, order = loop_match(keys[row].mean(0), r, 1, 2)
            for s, d in zip(sources, destinations, strict=True):
                a, b = len(old[s]["members"]), len(old[d]["members"])
                old[d] = {
                    "x": (old[s]["x"] * a + old[d]["x"] * b) / (a + b),
                    "members": old[d]["members"] + old[s]["members"],
                    "position": old[d]["position"],
                }
            expected[row] = [old[i] for i in order]
    for row in range(3):
        for i, token in enumerate(expected[row]):
            torch.testing.assert_close(tokens.x[row, i], token["x"])
            assert tokens.size[row, i] == len(token["members"])
            assert tokens.position[row, i] == token["position"]
            assert (tokens.home[row] == i).nonzero().flatten().tolist() == sorted(token["members"])
            # A mean by size of means by size is the mean of all members.
            torch.testing.assert_close(tokens.x[row, i], x[row, token["members"]].mean(0))


def loop_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """[H, N, D] and a bias [H, N, N] -> [N, H * D], one query at a time."""
    count, n, _ = query.shape
    rows = []
    for i in range(n):
        parts = []
        for h in range(count):
            logits = torch.stack([query[h, i] @ key[h, j] for j in range(n)]) / math.sqrt(query.shape[-1])
            weights = (logits + bias[h, i]).exp()
            parts.append((weights[:, None] * value[h]).sum(0) / weights.sum())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def test_timm_equals_loops() -> None:
    """All of ToMe in a plain ViT, token by token and without batches."""
    model, x = tiny_timm(), images(2)
    embedded = timm_embed(model, x)[0].x
    logits = []
    for row in range(2):
        tokens, sizes = list(embedded[row]), [1] * embedded.shape[1]
        for block, r in zip(model.blocks, [9, 60, 3], strict=True):
            n = len(tokens)
            joined = torch.stack([block.attn.qkv(block.norm1(t)) for t in tokens]).view(n, 3, 3, 16)
            query, key, value = joined.permute(1, 2, 0, 3)
            bias = torch.tensor([math.log(s) for s in sizes]).expand(3, n, n)
            mixed = loop_attention(query, key, value, bias)
            tokens = [t + block.attn.proj(m) for t, m in zip(tokens, mixed, strict=True)]
            sources, destinations, order = loop_match(key.mean(0), r, 1, 0)
            for s, d in zip(sources, destinations, strict=True):
                tokens[d] = (tokens[d] * sizes[d] + tokens[s] * sizes[s]) / (sizes[d] + sizes[s])
                sizes[d] += sizes[s]
            tokens, sizes = [tokens[i] for i in order], [sizes[i] for i in order]
            tokens = [t + block.mlp(block.norm2(t)) for t in tokens]
        logits.append(model.head(model.norm(tokens[0])))
    torch.testing.assert_close(tome_timm(model, x, [9, 60, 3]), torch.stack(logits), atol=3e-6, rtol=0)


def test_bert_equals_loops() -> None:
    """ToMe between residual sum and norm of a post-norm block; keys are masked as their representatives are."""
    model, (ids, mask) = tiny_hf("bert"), sentences(2, length=11)
    found = tome_bert(model, ids, mask, [3, 2, 1], short=True)
    embedded = model.embeddings(ids)
    for row in range(2):
        tokens, sizes, places = list(embedded[row]), [1] * 11, list(range(11))
        for block, r in zip(model.encoder.layer, [3, 2, 1], strict=True):
            a, n = block.attention.self, len(tokens)
            x = torch.stack(tokens)
            query, key, value = (p(x).view(n, 3, 16).transpose(0, 1) for p in (a.query, a.key, a.value))
            real = [math.log(s) if mask[row, p] else -math.inf for s, p in zip(sizes, places, strict=True)]
            mixed = loop_attention(query, key, value, torch.tensor(real).expand(3, n, n))
            tokens = list(x + block.attention.output.dense(mixed))
            sources, destinations, order = loop_match(key.mean(0), r, 1, 0)
            for s, d in zip(sources, destinations, strict=True):
                tokens[d] = (tokens[d] * sizes[d] + tokens[s] * sizes[s]) / (sizes[d] + sizes[s])
                sizes[d] += sizes[s]
            tokens, sizes, places = ([old[i] for i in order] for old in (tokens, sizes, places))
            y = block.attention.output.LayerNorm(torch.stack(tokens))
            tokens = list(block.output.LayerNorm(block.output.dense(block.intermediate(y)) + y))
        torch.testing.assert_close(found[0][row], torch.stack(tokens), atol=3e-6, rtol=0)


def test_drop_inattentive_equals_loops() -> None:
    x = torch.randn(3, 12, 4)
    for keep, fuse, prefix, suffix in [(0.5, False, 1, 0), (0.5, True, 1, 0), (0.3, True, 2, 3), (0.01, True, 1, 1)]:
        tokens = stream(x, prefix, suffix)
        expected = [[{"x": x[row, i], "members": [i], "position": i} for i in range(12)] for row in range(3)]
        for _ in range(2):  # the fused token competes in the second round
            score = torch.rand(3, tokens.x.shape[1])
            tokens = drop_inattentive(tokens, score, keep, fuse)
            for row in range(3):
                old, n = expected[row], len(expected[row])
                patches = list(range(prefix, n - suffix))
                count = math.ceil(keep * len(patches))
                kept = sorted(sorted(patches, key=lambda i, row=row: -score[row, i])[:count])
                dropped = [i for i in patches if i not in kept]
                expected[row] = [old[i] for i in [*range(prefix), *kept, *range(n - suffix, n)]]
                if fuse and dropped:
                    extra = sum(score[row, i] * old[i]["x"] for i in dropped)
                    members = [m for i in dropped for m in old[i]["members"]]
                    best = max(dropped, key=lambda i, row=row: score[row, i])
                    extra_token = {"x": extra, "members": members, "position": old[best]["position"]}
                    expected[row].insert(prefix + count, extra_token)
        for row in range(3):
            homes = [-1] * 12
            for i, token in enumerate(expected[row]):
                torch.testing.assert_close(tokens.x[row, i], token["x"])
                assert tokens.position[row, i] == token["position"]
                for member in token["members"]:
                    homes[member] = i
            assert tokens.home[row].tolist() == homes


def test_class_attention_is_what_transformers_reports() -> None:
    """FasterVLM by the attention maps of the eager model."""
    model, x = tiny_hf("clip", attn_implementation="eager"), images(3)
    for layer in (0, 1, -1, -2):
        result = model(x, output_attentions=True)
        score = result.attentions[layer].mean(1)[:, 0, 1:]
        for keep in (0.1, 0.37, 0.9):
            count = math.ceil(keep * 64)
            expected = [
                result.last_hidden_state[row, 1:][sorted(score[row].topk(count).indices.tolist())] for row in range(3)
            ]
            torch.testing.assert_close(fastervlm_clip(model, x, keep, layer), torch.stack(expected), atol=3e-6, rtol=0)


# -- position terms: the real attention modules, one sample at a time, on tables cut by hand ---------------------------


@pytest.mark.parametrize("name", ["eva02", "dinov3", "rope_mean", "rope_mixed", "beit", "beit_shared"])
@pytest.mark.parametrize("prop_attn", [True, False])
def test_position_terms_follow_the_tokens(name: str, prop_attn: bool) -> None:
    model, x = tiny_timm(TIMM[name][0], **TIMM[name][1]), images(2)
    trace: list[Tokens] = []
    tome_timm(model, x, [9, 12, 5], prop_attn, trace)
    for row in range(2):
        tokens = timm_embed(model, x)[0]
        for i, block in enumerate(model.blocks):
            if i:
                tokens = trace[i - 1]
            value, place, start = tokens.x[row : row + 1], tokens.position[row], tokens.prefix
            bias = tokens.size[row].log()[None, None, None, :] if prop_attn and i else None
            if name.startswith("beit"):
                attended = _beit_attention(model, block, value, place, bias)
            else:
                rope = model._pos_embed(model.patch_embed(x))[1]
                rope = rope[i] if rope.dim() == 4 else rope
                rope = torch.stack([rope[..., p - start, :] for p in place[start:].tolist()], dim=-2)
                attended = block.attn(block.norm1(value), rope=rope, attn_mask=bias)
                attended = attended if block.gamma_1 is None else block.gamma_1 * attended
            after = timm_embed(model, x)[1][i].attend(tokens, log_size(tokens) if prop_attn else None)
            torch.testing.assert_close(after.x[row], (value + attended)[0], atol=3e-6, rtol=0)


def _beit_attention(model, block, value: Tensor, place: Tensor, bias: Tensor | None) -> Tensor:
    """The block's own attention with its relative position bias replaced by the rows and columns of ``place``."""
    attn, whole = block.attn, None
    if attn.relative_position_bias_table is not None:
        whole = attn._get_rel_pos_bias()[0]
    if model.rel_pos_bias is not None:
        whole = model.rel_pos_bias() if whole is None else whole + model.rel_pos_bias()
    cut = torch.stack([torch.stack([head[p, place] for p in place.tolist()]) for head in whole])[None]
    own, attn.relative_position_bias_table = attn.relative_position_bias_table, None
    attended = attn(block.norm1(value), shared_rel_pos_bias=cut if bias is None else cut + bias)
    attn.relative_position_bias_table = own
    return attended if block.gamma_1 is None else block.gamma_1 * attended


# -- invariants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [[3, 3, 3], [9, 0, 5], [1000, 1000, 1000]])
@pytest.mark.parametrize("name", [*TIMM, *HF, "bert", "minilm"])
def test_tokens_are_conserved(name: str, r: list[int]) -> None:
    """Sizes sum to the original count, every original token has a home, protected ones stay alone and in place."""
    trace: list[Tokens] = []
    if name in TIMM:
        tome_timm(tiny_timm(TIMM[name][0], **TIMM[name][1]), images(3), r, trace=trace)
    elif name in HF:
        HF[name](tiny_hf(name), images(3), r, trace=trace)
    else:
        (tome_bert if name == "bert" else tome_sentence)(tiny_hf(name), *sentences(3), r, trace=trace)
    n0, before = trace[0].home.shape[1], trace[0].home.shape[1]
    for tokens, count in zip(trace, r, strict=True):
        n, first, last = tokens.x.shape[1], tokens.prefix, tokens.x.shape[1] - tokens.suffix
        sources = sum(first <= i < before - tokens.suffix for i in range(0, before, 2))
        assert n == before - min(count, sources)
        before = n
        assert (tokens.size.sum(1) == n0).all()
        for row in range(3):
            assert torch.equal(tokens.home[row].bincount(minlength=n).float(), tokens.size[row])
            assert len(set(tokens.position[row].tolist())) == n
            assert torch.equal(tokens.home[row, tokens.position[row]], torch.arange(n))
        protected = [*range(first), *range(last, n)]
        assert (tokens.size[:, protected] == 1).all()
        assert (tokens.position[:, protected] == torch.tensor([*range(first), *range(n0 - tokens.suffix, n0)])).all()


def test_proportional_attention_is_attention_over_the_restored_tokens() -> None:
    """Why log(size) is added: a key of size s counts like s copies of itself; a mean by size likewise."""
    tokens = merge(stream(torch.randn(2, 20, 12), prefix=1), torch.randn(2, 3, 20, 4), 7)
    query, restored = torch.randn(2, 3, 5, 4), tokens.restored()
    key, full = (x.unflatten(-1, (3, 4)).transpose(1, 2) for x in (tokens.x, restored))
    torch.testing.assert_close(
        attention(query, key, key, log_size(tokens), 0.5), attention(query, full, full, None, 0.5)
    )
    torch.testing.assert_close(
        (tokens.x * tokens.size[..., None]).sum(1) / tokens.size.sum(1)[:, None], restored.mean(1)
    )


def test_short_outputs_restore_to_the_long_ones() -> None:
    for name in ("vit", "clip", "dinov2_registers"):
        model, x, trace = tiny_hf(name), images(), []
        long, short = HF[name](model, x, [9, 7, 5], trace=trace), HF[name](model, x, [9, 7, 5], short=True)
        assert short[0].shape[1] == long[0].shape[1] - 21
        assert torch.equal(take(short[0], trace[-1].home), long[0])
        assert torch.equal(short[1], long[1])


def test_counts_of_the_papers() -> None:
    """Tokens per block of a 12-block ViT at 224, as published for ToMe and EViT."""
    model = tiny_timm(img_size=224, patch_size=16, depth=12, embed_dim=12)
    x = images(1, 224)

    def counts(run: Callable[..., Tensor], *arguments: object) -> list[int]:
        trace: list[Tokens] = []
        run(model, x, *arguments, trace=trace)
        return [tokens.x.shape[1] for tokens in trace]

    assert counts(tome_timm, [16] * 12) == [197 - 16 * i for i in range(1, 12)] + [11]
    assert counts(tome_timm, [13] * 12)[-1] == 41
    decreasing = [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    assert counts(tome_timm, decreasing) == [165, 136, 110, 87, 67, 50, 36, 25, 17, 12, 10, 10]
    for fuse, expected in ((True, [140, 100, 72]), (False, [139, 98, 69])):
        assert counts(evit_timm, 0.7, [3, 6, 9], fuse)[3::3] == expected


def test_options_matter() -> None:
    """The tiny models are not so tame that an error of a method would hide below the tolerance of a comparison."""
    model, x = tiny_timm(), images()
    merged = tome_timm(model, x, [9, 7, 5])
    others = [
        model(x),
        tome_timm(model, x, [9, 7, 5], prop_attn=False),
        tome_timm(model, x, [9, 8, 5]),  # what merges in the last block does not reach the class token
        evit_timm(model, x, 0.5, [1], True),
        evit_timm(model, x, 0.5, [1], False),
    ]
    for i, other in enumerate(others):
        for another in [merged, *others[:i]]:
            assert (other - another).abs().max() > 1e-3


def test_perturb_changes_every_parameter_and_is_repeatable() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    before = [p.clone() for p in plain.parameters()]
    perturb(plain, seed=1)
    assert not plain.training
    assert all((p != b).all() for p, b in zip(plain.parameters(), before, strict=True))
    again = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    again.load_state_dict(dict(zip(plain.state_dict(), before, strict=True)))
    perturb(again, seed=1)
    assert all(torch.equal(a, p) for a, p in zip(again.parameters(), plain.parameters(), strict=True))
