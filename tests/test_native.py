"""The compiled kernels equal their meaning written out, and their absence is said and never raised."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenopt.errors import UsageError
from tokenopt.native import build, neighborhood_attention, reason, supported
from tokenopt.native.neighborhood import SOURCE

needs_compiler = pytest.mark.skipif(reason() is not None, reason=f"no compiled kernel: {reason()}")


def allowed(query: int, key: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """NATTEN's mask of one axis, as csrc/include/natten/cuda/reference/mask.hpp has it."""
    if query % dilation != key % dilation:
        return False
    group, j, m = query % dilation, query // dilation, key // dilation
    members = length // dilation + (group < length % dilation)
    left, right = window // 2, window // 2 - 1 + window % 2
    if causal:
        leader = min((j // stride) * stride + stride - 1, members - 1)
        return max(leader - (window - 1), 0) <= m <= j
    leader = min((j // stride) * stride + stride // 2, members - 1)
    first = max(leader - left, 0)
    if leader + right >= members:
        first += members - right - leader - 1
    return first <= m < first + window


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    rows: Tensor,
    *,
    start: int,
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
) -> Tensor:
    """The same attention with a mask over all keys, in float64, for these rows of the grid -> [B, H, rows, E]."""
    visible = torch.ones(len(rows), 1, dtype=torch.bool)
    places = torch.unravel_index(rows, tuple(grid))
    for place, n, *settings_ in zip(places, grid, window, stride, dilation, causal, strict=True):
        axis = torch.tensor([[allowed(q, k, n, *settings_) for k in range(n)] for q in range(n)])
        visible = (visible[:, :, None] & axis[place][:, None, :]).flatten(1)
    mask = torch.ones(len(rows), query.shape[2], dtype=torch.bool)
    mask[:, start : start + math.prod(grid)] = visible
    logits = query.double()[:, :, start + rows] @ key.double().transpose(2, 3) * scale
    if key_bias is not None:
        logits = logits + key_bias.double()[:, None, None]
    return logits.masked_fill(~mask, float("-inf")).softmax(-1) @ value.double()


def check(
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int] | int = 1,
    dilation: Sequence[int] | int = 1,
    causal: Sequence[bool] | bool = False,
    *,
    before: int = 0,
    after: int = 0,
    bias: bool = False,
    batch: int = 1,
    heads: int = 1,
    dim: int = 8,
    value_dim: int | None = None,
    most: int = 300,
) -> None:
    """Compares on views of [B, N, H, D]; of more than `most` queries, on the first, the last and some between."""
    each = {name: list(v) if isinstance(v, Sequence) else [v] * len(grid) for name, v in
            {"window": window, "stride": stride, "dilation": dilation, "causal": causal}.items()}  # fmt: skip
    count = math.prod(grid)
    tokens = before + count + after
    query, key = (torch.randn(batch, tokens, heads, dim).transpose(1, 2) for _ in range(2))
    value = torch.randn(batch, tokens, heads, value_dim or dim).transpose(1, 2)
    key_bias = torch.randn(batch, tokens) if bias else None
    options = dict(start=before, grid=list(grid), scale=dim**-0.5, **each)
    rows = torch.arange(count)
    if count > most:
        rows = torch.cat([rows[: most // 3], rows[-most // 3 :], torch.randint(count, (most // 3,))])
    actual = neighborhood_attention(query, key, value, key_bias, **options)
    expected = dense(query, key, value, key_bias, rows, **options)
    assert actual.shape == (batch, heads, count, value_dim or dim)
    torch.testing.assert_close(actual[:, :, rows].double(), expected, atol=1e-5, rtol=1e-5)


# (grid, window, stride, dilation) of NATTEN's tests/test_fna.py
PUBLISHED = [
    ((256,), (255,), (82,), (1,)),
    ((128,), (63,), (31,), (1,)),
    ((128,), (3,), (2,), (5,)),
    ((128,), (8,), (7,), (5,)),
    ((128,), (3,), (2,), (10,)),
    ((125,), (15,), (1,), (1,)),
    ((256,), (3,), (2,), (10,)),
    ((5, 25), (5, 16), (1, 16), (1, 1)),
    ((84, 19), (7, 3), (1, 1), (5, 1)),
    ((19, 29), (8, 8), (1, 1), (2, 3)),
    ((67, 80), (12, 7), (8, 4), (5, 11)),
    ((33, 33), (24, 16), (1, 1), (1, 1)),
    ((44, 80), (9, 10), (1, 1), (1, 1)),
    ((28, 40), (17, 31), (1, 1), (1, 1)),
    ((36, 40), (36, 40), (12, 13), (1, 1)),
    ((32, 10, 10), (7, 3, 3), (5, 1, 1), (1, 2, 3)),
    ((8, 8, 16), (3, 3, 3), (2, 1, 2), (2, 2, 4)),
    ((18, 37, 12), (14, 16, 12), (12, 8, 1), (1, 2, 1)),
    ((13, 11, 9), (3, 4, 3), (2, 3, 3), (3, 2, 2)),
]


@needs_compiler
@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_published_shapes_with_every_causal_combination(case: tuple[tuple[int, ...], ...]) -> None:
    for causal in itertools.product((False, True), repeat=len(case[0])):
        check(*case, causal, before=1, bias=True, dim=16)


@needs_compiler
@pytest.mark.parametrize(
    "length, window, stride, dilation, causal, rows",
    [
        (8, 3, 1, 1, False, ["012", "012", "123", "234", "345", "456", "567", "567"]),
        (8, 4, 1, 1, False, ["0123", "0123", "0123", "1234", "2345", "3456", "4567", "4567"]),
        (8, 4, 2, 1, False, ["0123", "0123", "1234", "1234", "3456", "3456", "4567", "4567"]),
        (8, 4, 4, 1, False, ["0123"] * 4 + ["4567"] * 4),
        (7, 3, 3, 1, False, ["012"] * 3 + ["345"] * 3 + ["456"]),
        (9, 3, 1, 2, False, ["024", "135", "024", "135", "246", "357", "468", "357", "468"]),
        (8, 4, 1, 1, True, ["0", "01", "012", "0123", "1234", "2345", "3456", "4567"]),
        (8, 4, 2, 1, True, ["0", "01", "012", "0123", "234", "2345", "456", "4567"]),
    ],
)
def test_windows_as_natten_has_them(
    length: int, window: int, stride: int, dilation: int, causal: bool, rows: list[str]
) -> None:
    """With equal logits and the identity for values, a row of the result is the window of its query."""
    zeros = torch.zeros(1, 1, length, 4)
    options = dict(window=[window], stride=[stride], dilation=[dilation], causal=[causal], scale=1.0)
    out = neighborhood_attention(zeros, zeros, torch.eye(length)[None, None], start=0, grid=[length], **options)
    assert ["".join(str(int(k)) for k in row.nonzero()) for row in out[0, 0]] == rows


@needs_compiler
@pytest.mark.parametrize("dim", [1, 8, 24, 32, 64, 80, 128])
@pytest.mark.parametrize("threads", [1, 2])
def test_head_dims_and_threads(dim: int, threads: int) -> None:
    torch.set_num_threads(threads)
    check((11, 13), (7, 7), before=1, after=2, bias=True, batch=2, heads=3, dim=dim)
    check((9, 40), (3, 6), dim=dim, value_dim=dim + 5)


@needs_compiler
@pytest.mark.parametrize("length", [7, 8, 15, 16, 17, 31, 33, 64, 100])
def test_rows_that_are_no_multiple_of_a_vector(length: int) -> None:
    for window in (1, 2, 4, 7):
        check((3, length), (min(window, 3), window), dim=12)
        check((length,), (window,), after=17, dim=12)


@needs_compiler
@pytest.mark.parametrize("before, after", [(0, 0), (1, 0), (0, 5), (16, 17), (40, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_tokens_outside_of_the_grid_are_keys_of_every_query(before: int, after: int, bias: bool) -> None:
    check((6, 20), (3, 5), before=before, after=after, bias=bias, batch=2, heads=2)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tiles_of_a_large_grid(threads: int) -> None:
    """The outer axes are cut where the keys of a task are too many, or the tasks too few for the threads."""
    torch.set_num_threads(threads)
    check((300, 12), (3, 3), dim=64)
    check((3, 120, 12), (3, 3, 3), dim=64)
    check((120, 3, 12), (3, 3, 3), dim=64, before=1)
    check((40, 41), (9, 5), (4, 5), (2, 3), (True, False), dim=64, after=1)


@needs_compiler
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    axes = data.draw(st.integers(1, 3))
    lengths, windows, strides, dilations, causal = [], [], [], [], []
    for _ in range(axes):
        length = data.draw(st.integers(1, {1: 90, 2: 24, 3: 9}[axes]))
        dilation = data.draw(st.integers(1, min(length, 4)))
        window = data.draw(st.integers(1, length // dilation))
        lengths.append(length)
        dilations.append(dilation)
        windows.append(window)
        strides.append(data.draw(st.integers(1, window)))
        causal.append(data.draw(st.booleans()))
    check(
        lengths,
        windows,
        strides,
        dilations,
        causal,
        before=data.draw(st.integers(0, 3)),
        after=data.draw(st.integers(0, 20)),
        bias=data.draw(st.booleans()),
        batch=data.draw(st.integers(1, 2)),
        heads=data.draw(st.integers(1, 2)),
        dim=data.draw(st.integers(1, 40)),
        value_dim=data.draw(st.integers(1, 40)),
        most=60,
    )


OPTIONS = dict(start=1, grid=[4, 6], window=[3, 3], stride=[1, 1], dilation=[1, 1], causal=[False, False], scale=0.5)


def tensors(batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, 3, 25, 8) for _ in range(3)]


@needs_compiler
def test_any_strides() -> None:
    """A fused projection, a broadcast batch, and last strides other than 1."""
    fused = torch.randn(2, 25, 3, 3, 8).permute(2, 0, 3, 1, 4)
    shared = torch.randn(1, 3, 25, 8).expand(2, -1, -1, -1)
    across = torch.randn(2, 3, 8, 25).transpose(2, 3)
    bias = torch.randn(25, 2).T
    for query, key, value in ([*fused], [fused[0], shared, across], [across, across, shared]):
        expected = neighborhood_attention(*(t.contiguous() for t in (query, key, value, bias)), **OPTIONS)
        assert torch.equal(neighborhood_attention(query, key, value, bias, **OPTIONS), expected)


@needs_compiler
def test_large_logits_do_not_overflow() -> None:
    query, key, value = tensors()
    rows = torch.arange(24)
    actual = neighborhood_attention(query * 300, key, value, **OPTIONS)
    torch.testing.assert_close(
        actual.double(), dense(query * 300, key, value, None, rows, **OPTIONS), atol=1e-4, rtol=1e-4
    )


@needs_compiler
def test_keys_hidden_by_their_bias_and_values_that_are_not_numbers() -> None:
    query, key, value = tensors()
    bias = torch.zeros(2, 25)
    bias[:, 7] = float("-inf")
    expected = dense(query, key, value, bias, torch.arange(24), **OPTIONS)
    torch.testing.assert_close(
        neighborhood_attention(query, key, value, bias, **OPTIONS).double(), expected, atol=1e-5, rtol=1e-5
    )
    key[0, 0, 0, 0] = float("nan")  # seen by every query of this sample and head
    out = neighborhood_attention(query, key, value, bias, **OPTIONS)
    assert out[0, 0].isnan().all() and not out[1].isnan().any() and not out[0, 1:].isnan().any()


@needs_compiler
def test_operation_is_registered_as_torch_wants_it() -> None:
    torch.library.opcheck(torch.ops.tokenopt_native.neighborhood_attention.default, (*tensors(), None), OPTIONS)
    with FakeTensorMode():
        out = neighborhood_attention(*tensors(), **OPTIONS)
        assert out.shape == (2, 3, 24, 8) and out.is_contiguous()


@needs_compiler
def test_export_with_any_batch_size() -> None:
    class Model(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return neighborhood_attention(query, key, value, **OPTIONS)

    batch = torch.export.Dim("batch")
    program = torch.export.export(Model(), tuple(tensors()), dynamic_shapes=[{0: batch}] * 3)
    inputs = tensors(5)
    assert torch.equal(program.module()(*inputs), neighborhood_attention(*inputs, **OPTIONS))


@needs_compiler
def test_gradients_are_refused() -> None:
    query, key, value = tensors()
    assert supported(query, key, value)
    query.requires_grad_()
    assert not supported(query, key, value)
    with pytest.raises(UsageError, match="no gradient"):
        neighborhood_attention(query, key, value, **OPTIONS).sum().backward()
    with torch.no_grad():
        assert supported(query, key, value)


@needs_compiler
def test_supported_is_float32_on_the_cpu() -> None:
    query, key, value = tensors()
    assert not supported(query.double(), key.double(), value.double())
    assert not supported(query.to("meta"), key.to("meta"), value.to("meta"))
    assert not supported(query, key, value, torch.zeros(2, 25, dtype=torch.float64))


@pytest.mark.parametrize(
    "change, why",
    [
        ({"grid": [5, 6]}, "tokens 1 to 31, of 25"),
        ({"window": [3, 7]}, "longer than its axis"),
        ({"dilation": [2, 1]}, "longer than its axis"),
        ({"stride": [4, 1]}, "stride of 4"),
        ({"window": [3]}, "window has 1 values for 2 axes"),
        ({"key_bias": torch.zeros(2, 24)}, "key_bias is"),
        ({"value": torch.zeros(2, 3, 24, 8)}, "value is"),
        ({"key": torch.zeros(2, 3, 25, 8).double()}, "float64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], why: str) -> None:
    query, key, value = tensors()
    with pytest.raises(UsageError, match=why):
        neighborhood_attention(**{"query": query, "key": key, "value": value, **OPTIONS, **change})


@pytest.fixture
def fresh() -> Iterator[None]:
    """Builds of this test are not those of the others."""
    build.forget()
    yield
    build.forget()


def test_without_a_compiler_there_is_a_reason(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    assert build.load(SOURCE) is None
    assert "/nonexistent" in (reason() or "")
    assert not supported(*tensors())
    with pytest.raises(UsageError, match="/nonexistent"):
        neighborhood_attention(*tensors(), **OPTIONS)
    build.forget()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert build.load(SOURCE) is None
    assert "no C++ compiler" in (reason() or "")


def test_a_compiler_that_fails_is_a_reason(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "false")
    assert build.load(SOURCE) is None
    assert "does not work" in (reason() or "")


@needs_compiler
def test_a_source_that_does_not_compile_is_a_reason(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "wrong.cpp"
    source.write_text("int main( {")
    assert build.load(source) is None
    assert "wrong.cpp:1" in (build.reason(source) or "")
    assert not list((tmp_path / "tokenopt").iterdir())  # nothing is left behind


SMALL = 'extern "C" int answer() { return 42; }\n'


@needs_compiler
def test_library_is_built_once(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    library = build.load(source)
    assert library is not None and library.answer() == 42
    (path,) = (tmp_path / "tokenopt").iterdir()
    before = path.stat().st_mtime_ns
    build.forget()
    assert build.load(source) is not None
    assert path.stat().st_mtime_ns == before
    source.write_text(SMALL + "// changed\n")
    build.forget()
    assert build.load(source) is not None
    assert len(list((tmp_path / "tokenopt").iterdir())) == 2


@needs_compiler
def test_cache_that_cannot_be_written_is_not_needed(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    library = build.load(source)
    assert library is not None and library.answer() == 42
    assert build.reason(source) is None


@needs_compiler
def test_builds_at_the_same_time_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    code = f"""
import runpy
from pathlib import Path
build = runpy.run_path({build.__file__!r})  # without torch, so that they do start at the same time
print(build["load"](Path({str(source)!r})).answer())
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    for process in running:
        out, errors = process.communicate(timeout=120)
        assert out == "42\n", errors
    (path,) = (tmp_path / "tokenopt").iterdir()
    assert path.suffix == ".so"


def test_import_of_tokenopt_leaves_kernels_alone() -> None:
    code = "import sys, tokenopt; print([m for m in sys.modules if m.startswith('tokenopt.native')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
