"""Why was this site not rewritten? What is this name?"""

from __future__ import annotations

from typing import Any

import pytest

from tokenopt import registry
from tokenopt.errors import UsageError
from tokenopt.explain import explain_name, explain_site, summaries
from tokenopt.report import Report

REFUSAL = {"where": "blocks.1.attn", "why": "a convolution reads the grid", "try": "reduce later"}


def site(name: str, before: int, after: int, refusal: dict[str, str] | None = None) -> dict[str, Any]:
    return {"id": name, "kind": "self", "axis": "patch", "tokens_before": before, "tokens_after": after,
            "heads": 2, "head_dim": 16, "refusal": refusal}  # fmt: skip


@pytest.fixture
def report() -> Report:
    return Report(
        sites=[site("blocks.0.attn", 17, 13), site("blocks.1.attn", 17, 17, REFUSAL), site("blocks.10.attn", 17, 13)],
        refusals=[REFUSAL, {"where": "head.conv_3", "why": "it has no rule", "try": "write one"}],
        edits=[{"pass_spec": "reduce-tokens{recipe=tome}", "site": "blocks.0.attn", "before": 17, "after": 13}],
    )


def test_a_refused_site_says_where_why_and_what_to_try(report: Report) -> None:
    text = explain_site(report, "blocks.1")
    assert "blocks.10" not in text, "a part of an id ends at a dot"
    assert all(part in text for part in ("17 tokens before, 17 after", *REFUSAL.values()))


def test_a_reduced_site_says_by_what(report: Report) -> None:
    assert "reduce-tokens{recipe=tome}: 17 -> 13 tokens" in explain_site(report, "blocks.0.attn")


def test_a_site_behind_a_reduction(report: Report) -> None:
    assert "earlier sites" in explain_site(report, "blocks.10")


def test_a_site_that_the_schedule_leaves_alone() -> None:
    assert "schedule" in explain_site(Report(sites=[site("attn", 17, 17)]), "attn")


def test_a_refusal_that_is_no_site(report: Report) -> None:
    assert "it has no rule" in explain_site(report, "conv_3")


def test_unknown_and_ambiguous_sites(report: Report) -> None:
    with pytest.raises(UsageError, match="no site 'block'") as caught:
        explain_site(report, "block")
    assert "blocks.0.attn" in str(caught.value)
    with pytest.raises(UsageError, match="is 3 sites"):
        explain_site(report, "blocks")
    with pytest.raises(UsageError, match="no sites"):
        explain_site(Report(), "blocks")


def test_an_unknown_name_lists_what_is_close() -> None:
    with pytest.raises(UsageError, match="raise-attention"):
        explain_name("rise-attention")


def test_a_broken_plug_in_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    load = registry.load

    def broken(group: str, name: str) -> Any:
        if name == "evit":
            raise ImportError("no module named evit_kernels")
        return load(group, name)

    monkeypatch.setattr(registry, "load", broken)
    rows = {row["name"]: row["summary"] for row in summaries("tokenopt.recipes")}
    assert rows["evit"] == "cannot be loaded: ImportError: no module named evit_kernels"
    assert rows["tome"].startswith("merges")
