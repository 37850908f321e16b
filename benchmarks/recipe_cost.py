"""Recipe cost: what share of the run each recipe spends on scoring, selecting, fusing and restoring.

    python -m benchmarks.recipe_cost [--models deit_s vit_l] [--recipes tome evit] [--rounds 7] [--out FILE]

Every recipe with its default schedule is exported beside its *twin*, which keeps as many tokens at the same places but
takes them from the front: a constant slice. What the recipe takes longer than its twin, both timed in interleaved
rounds in ONNX Runtime on one CPU thread at batch 1, is what deciding and fusing cost. The models return all features,
and outputs stay short, so that restoring is part of it only where the recipe restores by itself. A slice moves in front
of what computes each token by itself, and a sum of tokens does not: where the twin has fewer FLOPs, its time counts in
proportion. A learned score is learned from noise, features standing for logits: it costs as much as a good one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch

from benchmarks.machine import machine
from tokenopt import recipes
from tokenopt.cost import program_flops
from tokenopt.fitting import fit, needs_data
from tokenopt.passes.canonicalize import canonicalize
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.pipeline import Pipeline, PipelineResult
from tokenopt.program import Program, capture
from tokenopt.runtimes.bench import benchmark
from tokenopt.runtimes.onnx import write
from tokenopt.runtimes.onnxruntime import open_session
from tokenopt.schedule import Schedule
from tokenopt.tokens.fuse import Drop
from tokenopt.tokens.plan import Plan, Stream
from tokenopt.tokens.recipe import TokenRecipe
from tokenopt.tokens.select import Select, around

MODELS = {"deit_s": ("deit_small_patch16_224", 224), "vit_l": ("vit_large_patch16_384", 384)}
SEQUENTIAL = ("cdpruner", "divprune", "todre", "vispruner")  # one round after another, in the papers as here
LIMIT = 0.08


@dataclass(frozen=True)
class Front(Select, name="front"):
    """the first tokens stay, as many as another select would keep"""

    like: Select
    extra: int = 0

    scored = False
    gives = "places"

    def fit(self, stream: Stream, keep: int) -> int:
        return self.like.fit(stream, keep) + self.extra

    def build(self, stream: Stream, score: None, keep: int) -> Plan:
        places = torch.arange(stream.count)
        gone = stream.per_sample(stream.constant("gone", stream.start + places[None, keep:]))
        dst = stream.per_sample(stream.constant("dst", torch.full((1, stream.count - keep), stream.start)))
        return Plan(around(stream, places[:keep]), gone, dst)


def twin(recipe: TokenRecipe) -> TokenRecipe:
    """The same reductions without a decision."""
    front = Front(recipe.select, recipe.fuse.extra)
    return replace(recipe, score=None, select=front, fuse=Drop(), proportional=False)


def rewritten(dense: Program, recipe: TokenRecipe) -> PipelineResult:
    return Pipeline([ReduceTokens(recipe, short_outputs=True), RemoveDead()]).run(dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--recipes", nargs="+", default=recipes.names(TokenRecipe))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore")
    lines = [
        "# Recipe cost",
        "",
        f"ONNX Runtime CPU, 1 thread, float32, batch 1, {options.rounds} interleaved rounds, medians in ms;",
        f"{machine()};",
        f"{date.today()}. *Share* is what the recipe takes longer than the same reductions without a decision.",
    ]
    print("\n".join(lines), flush=True)
    for key in options.models:
        rows = ["", f"## {' '.join(map(str, MODELS[key]))}", ""]
        heads = "| recipe | schedule | FLOPs left | recipe, ms | without decision | FLOPs left | share | |"
        rows += [heads, "|---" * 8 + "|"]
        print("\n".join(rows), flush=True)
        lines += rows
        for row in _rows(key, options.recipes, options.rounds):
            lines.append(row)
            print(row, flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join([*lines, ""]))


def _rows(key: str, names: list[str], rounds: int) -> object:
    import timm

    name, size = MODELS[key]
    torch.manual_seed(0)
    x = torch.randn(1, 3, size, size)
    program = capture(timm.create_model(name, num_classes=0, global_pool="").eval(), torch.randn(2, 3, size, size))
    dense = canonicalize(program).program
    flops = program_flops(dense)
    with tempfile.TemporaryDirectory() as folder:
        twins: dict[tuple[object, ...], tuple[Path, float]] = {}
        for recipe_name in names:
            print(f"{key} {recipe_name}", file=sys.stderr, flush=True)
            recipe = recipes.get(recipe_name)
            if needs_data(recipe):
                schedule = Schedule.parse(recipe.schedule)
                recipe = fit(recipe, schedule, dense, [[x.expand(2, -1, -1, -1)]], Path(folder) / "scorer.safetensors")
            result = rewritten(dense, recipe)
            counts = tuple((e.site, e.before, e.after) for e in result.edits if e.before != e.after)
            if not counts:
                why = next((r.why for r in result.refusals if recipe.name in r.why), "nothing to reduce")
                yield f"| {recipe.name} | | | | | | | {why} |"
                continue
            path = Path(folder) / "recipe.onnx"
            write(result.program, path)
            same = (counts, str(recipe.place), str(recipe.restore))
            if same not in twins:
                bare = rewritten(dense, twin(recipe)).program
                twins[same] = Path(folder) / f"twin{len(twins)}.onnx", program_flops(bare) / flops
                write(bare, twins[same][0])
            given = [x, *(v[:1] for v in list(result.program.example_inputs[1].values()))]
            engines = [open_session(path, threads=1), open_session(twins[same][0], threads=1)]
            calls = {"recipe": lambda e=engines[0], g=given: e(*g), "twin": lambda e=engines[1]: e(x)}
            whole, bare = benchmark(calls, rounds=rounds, warmup=1)
            left, sliced = program_flops(result.program) / flops, twins[same][1]
            share = 1 - max(left / sliced, 1.0) / bare.ratio
            note = "" if share <= LIMIT else "sequential" if recipe.name in SEQUENTIAL else "above the limit"
            yield (
                f"| {recipe.name} | {ReduceTokens(recipe).resolved()[1]} | {left:.2f} | {whole.median_ms:.1f} "
                f"| {bare.median_ms:.1f} | {sliced:.2f} | {share:.1%} | {note} |"
            )


if __name__ == "__main__":
    main()
