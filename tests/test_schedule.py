"""Schedules: every form, their counts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenopt.errors import UsageError
from tokenopt.schedule import Schedule


def removed(schedule: Schedule, layers: int, tokens: int = 10**6) -> list[int]:
    return [tokens - schedule.kept(i, layers, tokens) for i in range(layers)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("r=13", [13] * 4),
        ({"r": 13}, [13] * 4),
        ("r=16,8", [16, 8, 0, 0]),
        ({"r": [16, 8]}, [16, 8, 0, 0]),
        ("r=0", [0] * 4),
    ],
)
def test_counts(spec: Any, expected: list[int]) -> None:
    assert removed(Schedule.parse(spec), 4) == expected


def test_inflection_is_the_papers() -> None:
    assert removed(Schedule.parse("r=16:-1"), 12) == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    assert removed(Schedule.parse({"r": (16, 1)}), 12) == [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32]
    assert removed(Schedule.parse("r=16:0"), 12) == [16] * 12
    assert removed(Schedule.parse("r=16:-1"), 1) == [16]


def test_keep_at_layers() -> None:
    schedule = Schedule.parse("keep=0.7@3,6,9")
    tokens, seen = 196, []
    for layer in range(12):
        tokens = schedule.kept(layer, 12, tokens)
        seen.append(tokens)
    assert seen == [196, 196, 196, 138, 138, 138, 97, 97, 97, 68, 68, 68]
    assert Schedule.parse({"keep": 0.5}).kept(0, 12, 100) == 50


@pytest.mark.parametrize("spec", ["r=13", "r=16:-1", "r=1,2,3", "keep=0.7@3,6,9", "keep=0.5"])
def test_round_trip(spec: str, tmp_path: Path) -> None:
    schedule = Schedule.parse(spec)
    assert Schedule.parse(str(schedule)) == schedule
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(schedule.to_dict()))
    assert Schedule.parse(path) == schedule
    assert Schedule.parse(str(path)) == schedule


@given(st.integers(1, 500), st.floats(0.01, 1.0), st.integers(0, 30))
def test_keep_never_adds_or_empties(tokens: int, keep: float, layer: int) -> None:
    kept = Schedule.parse({"keep": keep}).kept(layer, 31, tokens)
    assert 1 <= kept <= tokens


@pytest.mark.parametrize("spec", ["r=0", "keep=1.0", {"r": [0, 0]}, {"r": (0, -1.0)}])
def test_identity(spec: Any) -> None:
    schedule = Schedule.parse(spec)
    assert schedule.is_identity
    assert removed(schedule, 5) == [0] * 5
    assert not Schedule.parse("r=1").is_identity
    assert Schedule.parse("keep=0.5").identity().is_identity


@pytest.mark.parametrize(
    "spec",
    ["", "13", "r=", "r=-1", "keep=0", "keep=1.5", "keep=x", "r=4@3", {"r": 1, "keep": 0.5}, {}, {"r": 2.5},
     {"r": True}, {"keep": 0.5, "layers": [-1]}, {"speed": 3}, {"r": (4, 2)}, "missing.json"],
)  # fmt: skip
def test_nonsense_says_what_fits(spec: Any) -> None:
    with pytest.raises(UsageError) as error:
        Schedule.parse(spec)
    assert error.value.hint or error.value.why
