"""Why was this site not rewritten? What is this name?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tokenopt import recipes, registry
from tokenopt.errors import UsageError
from tokenopt.explain import explain_name, explain_site, recipe_rows, summaries
from tokenopt.report import Report
from tokenopt.tokens.recipe import PARTS, TokenRecipe

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
    (row,) = (row for row in recipe_rows() if row["name"] == "evit")
    assert row == {"name": "evit", "summary": rows["evit"], "place": "", "paper": "", "parts": {}, "schedule": {}}


# -- recipes and their parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.names(TokenRecipe))
def test_a_recipe_is_explained_from_its_parts(name: str) -> None:
    recipe = recipes.get(name)
    text = explain_name(name)
    assert text.startswith(f"{name} (recipe)\n\n{recipe.summary}\nSource: {recipe.paper}\nSchedule: ")
    parts = [getattr(recipe, kind) for kind in PARTS if getattr(recipe, kind) is not None]
    for part in parts:
        assert part.summary() in text
        for setting, value in part.all_settings(part.kind).items():
            assert f"  {setting} = {getattr(value, 'name', value)}" in text
    before, after = text.split("Before:\n")[1].split("After, reduced ")
    assert before and f"= {recipe.select.name}(" in after and f"= {recipe.fuse.name}(" in after
    assert not any(f"{part.name}(" in before for part in parts if part.kind in ("score", "select", "fuse"))


def test_the_rewrite_is_that_of_the_place() -> None:
    text = explain_name("tome")
    after = [line.strip() for line in text.split("After, ")[1].splitlines()[1:]]
    assert after == [
        "x = x + attention(x, log(size))",
        "kept, removed, into = bipartite(x)",
        "x, size = weighted(x, kept, removed, into)",
        "x = x + mlp(x)",
        "...",
        "x = copy(x, into)  # before what needs every token",
    ]
    assert "q, k, v = mean(q, k, v, kept, removed, into)" in explain_name("fastvggt")
    assert "x = x + h" in explain_name("tomesd") and "return x" in explain_name("vispruner")


def test_parts_are_explained_with_settings_and_users() -> None:
    text = explain_name("topk")
    assert text.startswith("topk (select)") and "It has no settings." in text and "evit, fastervlm" in text
    assert "layer = -1" in explain_name("cls_row{layer=-1}")
    assert "of.layer = 2" in explain_name("accumulated{of=received{layer=2}}")
    assert "Recipes with it: vtc-cls" in explain_name("accumulated")
    both = explain_name("random")
    assert "random (recipe)" in both and "random (score)" in both, "what is called the same is explained together"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("topk{k=3}", "it has none"),
        ("bipartite_grid{cel=3}", "metric, cell, seed"),
        ("bipartite_grid{cell=x}", "not of type int"),
        ("cls_row{layer}", "write key=value"),
        ("topkk", "topk"),
        ("tome{r=3}", "nothing is called"),
        ("absent.yaml", "absent.yaml"),
    ],
)
def test_wrong_parts_and_settings_name_what_fits(name: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        explain_name(name)
    assert part in str(caught.value)


def test_a_recipe_of_ones_own_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nscore: cls_row{layer=-1}\nselect: {topk: }\nfuse: {pack: {}}\nplace: exit\n")
    text = explain_name(str(path))
    said = ("mine (recipe)", "it has no summary", "none, give one", "score.layer = -1", "x = x without its patches")
    assert all(part in text for part in said)


def test_every_recipe_has_a_row() -> None:
    rows = {row["name"]: row for row in recipe_rows()}
    assert set(rows) == set(recipes.names())
    assert rows["fastvggt"]["place"] == "attention"
    assert rows["fastvggt"]["parts"]["place"] == {"attention": {"of": "qkv"}}
    assert rows["nat"]["parts"] == {"pattern": "Neighborhood(7)"}
    assert all(row["summary"] and row["paper"] for row in rows.values())
    assert all(row["schedule"] or "pattern" in row["parts"] for row in rows.values())


def test_the_readme_lists_every_recipe() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for row in recipe_rows():
        found = re.search(r"arXiv:\d+\.\d+(v\d)?", row["paper"])
        paper = found[0] if found else ""
        assert f"| `{row['name']}` | {row['place']} | {row['summary']} | {paper} |" in text
