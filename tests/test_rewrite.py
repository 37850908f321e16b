"""Rules, passes as text, and plug-ins found by entry points."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx

import tokenopt
from tests import references
from tokenopt.analysis.sites import AttentionSite
from tokenopt.errors import UsageError
from tokenopt.graph import GraphEditor
from tokenopt.pipeline import Pipeline, parse_passes
from tokenopt.program import Program, capture
from tokenopt.rewrite import Rule, ok, refuse
from tokenopt.stream import Plan, Stream

PLUGIN = Path(__file__).parent / "plugin"


@pytest.fixture(scope="module")
def program() -> Program:
    program = capture(references.tiny_timm(), references.images(2))
    return Pipeline("fold-constants,raise-attention").run(program).program


@dataclass(frozen=True)
class KeepLoud(Rule):
    """Keeps the tokens of largest norm, from a depth on."""

    name = "keep-loud"
    keep: int = 32
    after: float = 0.5

    def check(self, cut: tokenopt.StreamCut):
        return ok(keep=self.keep) if cut.depth >= self.after else refuse("too early", hint="later")

    def rewrite(self, stream: Stream, keep: int) -> Plan:
        norm = stream.insert(torch.ops.aten.linalg_vector_norm.default, stream.rows, 2, [-1])
        return stream.topk(norm, keep)


def test_a_rule_on_cuts_equals_doing_it_by_hand(program: Program) -> None:
    result = Pipeline([KeepLoud(after=0.9)]).run(program)
    result.program.verify()
    assert [(e.site, e.before, e.after) for e in result.edits] == [("blocks.2.attn", 65, 33)]
    assert {r.why for r in result.refusals} == {"too early"}
    assert {r.where for r in result.refusals} == {"blocks.0.attn", "blocks.1.attn"}
    model = references.tiny_timm()
    x = references.images(3, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(result.program.flat(x)[0], model(x), rtol=1e-5, atol=1e-5)  # the head reads cls
    early = Pipeline([KeepLoud(after=0.0)]).run(program)
    assert [e.after for e in early.edits] == [33, 33, 33]


def test_a_rule_on_sites_sees_every_attention(program: Program) -> None:
    seen = []

    @dataclass(frozen=True)
    class Sharpen(Rule):
        name = "sharpen"

        def check(self, site: AttentionSite):
            seen.append(site.id)
            return ok() if site.id.startswith("blocks.1") else refuse("not this one")

        def rewrite(self, editor: GraphEditor, site: AttentionSite) -> None:
            site.node.kwargs = {**site.node.kwargs, "scale": 10.0}

    result = Pipeline([Sharpen()]).run(program)
    assert seen == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert [e.site for e in result.edits] == ["blocks.1.attn"]
    x = references.images(2)
    assert not torch.allclose(result.program.flat(x)[0], program.flat(x)[0])


def test_a_rule_on_nodes(program: Program) -> None:
    @dataclass(frozen=True)
    class NoGelu(Rule):
        name = "no-gelu"

        def check(self, node: fx.Node):
            return ok() if node.target is torch.ops.aten.gelu.default else refuse("no gelu")

        def rewrite(self, editor: GraphEditor, node: fx.Node) -> None:
            editor.replace(node, editor.insert(node, torch.ops.aten.relu.default, node.args[0]))

    result = Pipeline([NoGelu()]).run(program)
    assert len(result.edits) == 3
    assert not any(n.target is torch.ops.aten.gelu.default for n in result.program.graph.nodes)
    result.program.verify()


def test_a_rule_must_say_what_it_is_tried_on(program: Program) -> None:
    @dataclass(frozen=True)
    class Vague(Rule):
        name = "vague"

        def check(self, thing):
            return ok()

    with pytest.raises(UsageError, match="must say what it is tried on"):
        Pipeline([Vague()]).run(program)


def test_the_given_program_is_never_changed(program: Program) -> None:
    before = str(program)
    Pipeline("reduce-tokens{recipe=tome,schedule=r=8}").run(program)
    assert str(program) == before


@pytest.mark.parametrize(
    "text",
    [
        "fold-constants",
        "reduce-tokens{recipe=evit,schedule=keep=0.5@1}",
        "fold-constants,raise-attention,reduce-tokens{short-outputs=True},remove-dead",
    ],
)
def test_text_and_passes_are_the_same(text: str) -> None:
    assert ",".join(p.spec for p in parse_passes(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold", "there is no pass 'fold'"),
        ("fold-constants{speed=3}", "has no option 'speed'"),
        ("fold-constants{max-elements}", "has no value"),
        ("fold constants", "not a list of passes"),
    ],
)
def test_wrong_text_says_what_fits(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_passes(text)


def test_an_installed_plugin_is_found(tmp_path: Path) -> None:
    """The example plug-in, installed by pip into a folder of its own: all that it registers works by name."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target",
               str(tmp_path), str(PLUGIN)]  # fmt: skip
    subprocess.run(install, check=True, capture_output=True)
    code = """
import torch, tokenopt
from tests import references
from tokenopt.analysis.axis_rules import rule_for
from tokenopt.registry import names
assert "keep-first" in names("tokenopt.passes")
assert "half-tome" in tokenopt.recipes.names()
program = tokenopt.capture(references.tiny_timm(), references.images(2))
result = tokenopt.Pipeline("fold-constants,raise-attention,keep-first{after=0.6}").run(program)
print([(e.site, e.after) for e in result.edits if e.before])
found = tokenopt.calibrate(program, "tome", {"x": references.images(4)}, budget="flops=90%", calibrator="first-layers")
assert found.r[0] > found.r[1] > found.r[2], found
torch.library.define("example::scale", "(Tensor x, Tensor y) -> Tensor")
assert rule_for(torch.ops.example.scale.default) is not None
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[('blocks.1.attn', 33), ('blocks.2.attn', 33)]"
