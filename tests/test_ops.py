"""Every operation equals its meaning written out, on its own and lowered."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import references
from tokenopt import ops
from tokenopt.ops.attention import attention, attention_probe
from tokenopt.ops.tokens import (
    gather_tokens,
    match_bipartite,
    mean_tokens,
    merge_tokens,
    nearest_tokens,
    select_topk,
    token_map,
)


def dense(query: Tensor, key: Tensor, bias: Tensor | float, scale: float) -> Tensor:
    return ((query @ key.transpose(-2, -1)) * scale + bias).softmax(-1)


def test_attention_adds_key_bias_to_every_query() -> None:
    query, key, value = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    bias, key_bias = torch.randn(2, 1, 5, 7), torch.randn(2, 7)
    expected = dense(query, key, bias + key_bias[:, None, None], 0.3) @ value
    torch.testing.assert_close(attention(query, key, value, bias, key_bias, scale=0.3), expected)


def test_attention_with_a_boolean_mask_and_key_bias() -> None:
    query, key, value = (torch.randn(2, 3, 6, 8) for _ in range(3))
    visible = torch.rand(2, 1, 6, 6) > 0.3
    visible[..., 0] = True
    key_bias = torch.randn(2, 6)
    hidden = torch.zeros(2, 1, 6, 6).masked_fill(~visible, float("-inf"))
    expected = dense(query, key, hidden + key_bias[:, None, None], 8**-0.5) @ value
    torch.testing.assert_close(attention(query, key, value, visible, key_bias), expected)


@pytest.mark.parametrize("lead", [(4,), (2, 3), (2, 3, 4)])
def test_attention_of_any_rank(lead: tuple[int, ...]) -> None:
    query, key, value = (torch.randn(*lead, 5, 8) for _ in range(3))
    bias = torch.randn(lead[-1], 5, 5) if len(lead) > 1 else torch.randn(4, 5, 5)
    expected = dense(query, key, bias, 8**-0.5) @ value
    torch.testing.assert_close(attention(query, key, value, bias), expected)


@pytest.mark.parametrize("boolean", [False, True])
def test_probe_is_rows_of_the_attention_matrix(boolean: bool) -> None:
    query, key = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    bias: Tensor = torch.randn(2, 1, 6, 6)
    key_bias = torch.randn(2, 6)
    additive = bias
    if boolean:
        bias = bias > -0.5
        bias[..., 0] = True
        additive = torch.zeros(2, 1, 6, 6).masked_fill(~bias, float("-inf"))
    matrix = dense(query, key, additive + key_bias[:, None, None], 8**-0.5)
    probe = attention_probe(query, key, bias, key_bias, 1, 2)
    torch.testing.assert_close(probe, matrix[:, :, 1:3].mean((1, 2)))
    torch.testing.assert_close(probe.sum(-1), torch.ones(2))


plans = st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(2, 17), st.integers(0, 3), st.integers(0, 100))


@settings(max_examples=60, deadline=None)
@given(plans, st.floats(0, 1))
def test_matching_equals_the_paper(plan: tuple[int, ...], share: float) -> None:
    batch, prefix, free, suffix, seed = plan
    total = prefix + free + suffix
    r = int(share * (free // 2))
    metric = torch.randn(batch, total, 6, generator=torch.Generator().manual_seed(seed))
    index, src, dst = match_bipartite(metric, r, prefix, prefix + free)
    sources, destinations, order = references.bipartite_match(metric, r, prefix, suffix)
    assert index.shape == (batch, total - r)
    if r:
        assert torch.equal(src, sources)
        assert torch.equal(references.take(index, dst), destinations)
        assert torch.equal(index, order)
    else:
        assert torch.equal(index.sort(-1).values, torch.arange(total).expand(batch, -1))


@settings(max_examples=40, deadline=None)
@given(plans, st.floats(0, 1))
def test_merging_conserves_mass_and_averages_by_size(plan: tuple[int, ...], share: float) -> None:
    batch, prefix, free, suffix, seed = plan
    total = prefix + free + suffix
    generator = torch.Generator().manual_seed(seed)
    x, metric = (torch.randn(batch, total, 6, generator=generator) for _ in range(2))
    size = torch.randint(1, 5, (batch, total), generator=generator).float()
    index, src, dst = match_bipartite(metric, int(share * (free // 2)), prefix, prefix + free)
    y, merged = merge_tokens(x, size, index, src, dst, True)
    torch.testing.assert_close(merged.sum(-1), size.sum(-1))
    torch.testing.assert_close((y * merged[..., None]).sum(1), (x * size[..., None]).sum(1), rtol=1e-4, atol=1e-4)
    where = token_map(index, src, dst, total)
    for b in range(batch):
        for place in range(index.shape[1]):
            members = where[b] == place
            mean = (x[b, members] * size[b, members, None]).sum(0) / size[b, members].sum()
            torch.testing.assert_close(y[b, place], mean, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(plans)
def test_restoring_a_merge_is_constant_on_groups_and_keeps_their_mean(plan: tuple[int, ...]) -> None:
    batch, prefix, free, suffix, seed = plan
    total = prefix + free + suffix
    x = torch.randn(batch, total, 4, generator=torch.Generator().manual_seed(seed))
    index, src, dst = match_bipartite(x, free // 2, prefix, prefix + free)
    y, _ = merge_tokens(x, None, index, src, dst, True)
    where = token_map(index, src, dst, total)
    restored = gather_tokens(y, where, 1, 0, 0, y.shape[1])
    torch.testing.assert_close(restored.sum(1), x.sum(1), rtol=1e-4, atol=1e-4)
    again, _ = merge_tokens(restored, None, index, src, dst, True)
    torch.testing.assert_close(again, y, rtol=1e-4, atol=1e-4)


def test_matching_does_not_depend_on_the_scale_of_the_metric() -> None:
    metric = torch.randn(2, 9, 4)
    for a, b in zip(match_bipartite(metric, 3, 1, 9), match_bipartite(metric * 7, 3, 1, 9), strict=True):
        assert torch.equal(a, b)


def test_topk_keeps_order_and_protects() -> None:
    score = torch.tensor([[9.0, 1.0, 5.0, 3.0, 4.0, 9.0]])
    index, src = select_topk(score, 2, 1, 5, False)
    assert index.tolist() == [[0, 2, 4, 5]]
    assert src.tolist() == [[3, 1]]
    index, src = select_topk(score, 2, 1, 5, True)
    assert index.tolist() == [[0, 2, 4, 3, 5]]
    assert src.tolist() == [[1]]


@pytest.mark.parametrize(("shape", "dim", "batch_dim"), [((2, 7, 4), 1, 0), ((7, 2, 4), 0, 1), ((2, 3, 7, 4), 2, 0),
                                                         ((1, 1, 7, 7), 3, 0), ((4, 2, 7), 2, 1)])  # fmt: skip
def test_gather_reads_any_layout_per_sample(shape: tuple[int, ...], dim: int, batch_dim: int) -> None:
    x = torch.randn(shape)
    index = torch.tensor([[0, 4, 2], [3, 3, 1]])
    out = gather_tokens(x, index, dim, batch_dim, 2, 5)
    wide = x.expand(*(2 if i == batch_dim else -1 for i in range(x.dim())))
    for b in range(2):
        sample = wide.select(batch_dim, b)
        along = dim - (dim > batch_dim)
        expected = torch.cat(
            [sample.narrow(along, 0, 2), sample.narrow(along, 2, 5).index_select(along, index[b])], along
        )
        assert torch.equal(out.select(batch_dim, b), expected)


def test_nearest_is_among_the_kept_and_not_protected() -> None:
    x = torch.randn(2, 6, 3)
    x[:, 4] = x[:, 0] * 2  # token 4 is most like the protected token 0, then like 2
    x[:, 2] = x[:, 0] + 0.1 * torch.randn(2, 3)
    index = torch.tensor([[0, 2, 5]] * 2)
    assert nearest_tokens(x, index, torch.tensor([[4]] * 2), 1, 2).tolist() == [[1], [1]]


@pytest.mark.parametrize("keepdim", [False, True])
def test_mean_counts_originals(keepdim: bool) -> None:
    x, size = torch.randn(2, 3, 4), torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.0, 1.0]])
    expected = torch.stack([(x[b] * size[b, :, None]).sum(0) / 6 for b in range(2)])
    torch.testing.assert_close(mean_tokens(x, size, 1, 0, keepdim), expected[:, None] if keepdim else expected)
    torch.testing.assert_close(
        mean_tokens(x.transpose(0, 1), size, 0, 1, keepdim), expected[None] if keepdim else expected
    )


def test_every_operation_has_an_axis_rule_and_no_scatter_with_reduction() -> None:
    """TensorRT has neither scatter with a reduction nor data-dependent shapes; ONNX's mean is silently wrong."""
    import inspect

    from tokenopt.analysis.axis_rules import rule_for

    for target, reference in ops.references().items():
        assert rule_for(target) is not None, target
        source = inspect.getsource(reference)
        for forbidden in ("scatter_reduce", "scatter_add", "index_add", "nonzero", "masked_select"):
            assert forbidden not in source, (target, forbidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sizes_stay_exact_in_half_precision(dtype: torch.dtype) -> None:
    x = torch.ones(1, 4, 2, dtype=dtype)
    size = torch.tensor([[301.0, 1.0, 1.0, 1.0]])
    index, src, dst = torch.tensor([[0, 1]]), torch.tensor([[2, 3]]), torch.tensor([[0, 0]])
    y, total = merge_tokens(x, size, index, src, dst, True)
    assert y.dtype is dtype
    assert total.tolist() == [[303.0, 1.0]]
