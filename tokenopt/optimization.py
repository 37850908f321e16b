"""optimize: the whole pipeline on one program, with the checks that every run makes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenopt import calibration, ops, recipes
from tokenopt.analysis.axes import propagate
from tokenopt.analysis.cuts import find_cuts
from tokenopt.analysis.sites import AttentionSite, find_sites
from tokenopt.attention.pattern import Pattern
from tokenopt.attention.recipe import AttentionRecipe
from tokenopt.budget import heads_within, patterns_within, within
from tokenopt.calibration import Target
from tokenopt.cost import program_flops
from tokenopt.data import find_preprocessing, open_data
from tokenopt.diagnostics import head_thresholds
from tokenopt.errors import Refusal, UsageError
from tokenopt.fitting import fit, fit_patterns, needs_data
from tokenopt.inspection import axis_dict, refusal_of
from tokenopt.parity import Parity
from tokenopt.passes.canonicalize import canonical_passes, canonicalize
from tokenopt.passes.drop_layers import DropLayers, heads_text
from tokenopt.passes.flatten_grids import FlattenGrids
from tokenopt.passes.fold_constants import FoldConstants
from tokenopt.passes.raise_attention import RaiseAttention
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.remove_dead import RemoveDead
from tokenopt.passes.sparsify_attention import Choice, SparsifyAttention, numbered_sites
from tokenopt.pipeline import Pass, Pipeline, PipelineResult, parse_passes
from tokenopt.program import Program, capture, flatten_tensors
from tokenopt.proofs.twin import prove_twin
from tokenopt.report import Report
from tokenopt.schedule import Budget, Schedule
from tokenopt.tokens.recipe import TokenRecipe
from tokenopt.tokens.score import Learned

Progress = Callable[[str, int, int], None]

FITTED = 32  # samples in a batch that a recipe learns from


@dataclass
class Result:
    """What `optimize` returns: the rewritten program, the dense one it came from, the report, and the passes run."""

    program: Program
    dense: Program
    report: Report
    steps: Sequence[Pass] = ()

    @property
    def changed(self) -> bool:
        """Whether any reduction was applied."""
        return bool(self.report.edits)


def optimize(
    model: torch.nn.Module | Program,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
    *,
    recipe: str | Path | Mapping[str, Any] | TokenRecipe | AttentionRecipe | Pattern = "tome",
    schedule: Any = None,
    budget: str | Budget | None = None,
    settings: Mapping[str, Any] | None = None,
    passes: str | Iterable[Pass] | None = None,
    min_speedup: float | None = None,
    short_outputs: bool = False,
    dynamic_batch: bool = True,
    given: Sequence[Tensor] | None = None,
    data: Any = None,
    weights: str | Path | None = None,
    target: Target | None = None,
    fitting: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Reduces the tokens of a model, or gives its attention a pattern, and proves the rewrite.

    Checked on fresh random and on example or given inputs, at two batch sizes: the captured graph equals the model; the
    dense canonical graph equals the captured one; the recipe with nothing to remove, its reductions inserted all the
    same, equals the dense graph; a pattern computed in tiles equals dense attention under the pattern's mask.

    Args:
        model: a module (with ``example_inputs``) or a captured program.
        example_inputs: as for `capture`.
        recipe: a name, a YAML file, a mapping or a recipe; or an attention pattern, or its text.
        schedule: how many tokens to remove where: ``{"r": 13}``, ``{"keep": 0.7, "layers": [3, 6]}``, a text or a file;
            the recipe's own by default.
        budget: with data, `calibration.fit` finds the schedule that keeps most within it; without, "flops=60%" or
            "tokens=60%" of the dense program's: the schedule is scaled until it is met, or what patterns see. Of passes
            that drop inactive heads it says how many.
        settings: fields of the recipe to change.
        passes: other passes than the usual ones, as objects or as text.
        min_speedup: of an attention, by the cost model, for a pattern to be applied there; 0 applies it everywhere. By
            default the recipe's, or 1.1.
        short_outputs: outputs that carry tokens keep the reduced ones.
        dynamic_batch: as for `capture`.
        given: inputs to check on beside random ones, as flat tensors.
        data: what recipes with a part that is learned from data learn it from: anything `open_data` takes, such as
            batches of inputs as flat tensors, an array file or a folder of images; and what a budget is fitted to.
        weights: where the weights of a learned score are written (.safetensors); they are in the program in any case.
        target: where latency counts: what does not pay there is taken back.
        fitting: options of `calibration.fit`, such as held_out and metric.
        progress: called with (stage, done, total).

    Raises:
        TokenoptError: CaptureError if the model cannot be traced, ParityError if a check fails, BudgetError if the
            budget cannot be met, UsageError for arguments that make no sense.
    """
    seconds: dict[str, float] = {}
    stages = ("capture", "rewrite", "check")

    def stage(name: str) -> Callable[[], None]:
        if progress is not None:
            progress(name, stages.index(name), len(stages))
        start = time.perf_counter()
        return lambda: seconds.__setitem__(name, time.perf_counter() - start)

    done = stage("capture")
    if isinstance(model, Program):
        program = model
    elif example_inputs is None:
        raise UsageError("a module needs example inputs to be captured", hint="optimize(model, example_inputs)")
    else:
        program = capture(model, example_inputs, dynamic_batch=dynamic_batch)
    done()

    calibrated = None
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(weights or Path(scratch) / "scorer.safetensors")
        if budget is not None and data is not None and passes is None:
            found = _calibrated_recipes(recipe, settings, schedule, min_speedup)
            calibrated = calibration.fit(
                program, found, data, budget=budget, target=target, weights=written, progress=progress or _silent,
                **(fitting or {}),
            )  # fmt: skip
            recipe, settings, budget = calibrated.recipe, None, None
            schedule = calibrated.schedule if isinstance(recipe, TokenRecipe) else None
        done = stage("rewrite")
        steps = _steps(passes, recipe, schedule, settings, short_outputs, min_speedup)
        canonical = canonicalize(program)
        limit = None if budget is None else Budget.parse(budget)
        limited = limit and _limited(steps, limit)
        steps = [_settled(s, limit if s is limited else None, program, canonical.program, data, written) for s in steps]
        gated: list[dict[str, Any]] = []
        if target is not None and (calibrated is None or isinstance(recipe, AttentionRecipe)):
            steps, gated = _gated(steps, canonical.program, target)
        reducing = [s for s in steps if isinstance(s, ReduceTokens)]
        result = Pipeline(steps).run(program)
        done()

        done = stage("check")
        checks = _checks(program, result, steps, given)
        checks += _twins(result, steps, given)
        report = _report(program, canonical, result, reducing, steps, checks, short_outputs)
        done()
    if progress is not None:
        progress("check", len(stages), len(stages))
    if calibrated is not None:
        report.calibration = calibrated.to_dict()
        seconds["calibrate"] = calibrated.seconds
    report.calibration |= {"gate": gated} if gated else {}
    report.timings = {**seconds, **result.timings}
    return Result(result.program, program, report, steps)


def _silent(stage: str, done: int, total: int) -> None:
    """No progress."""


def _calibrated_recipes(
    recipe: Any, settings: Mapping[str, Any] | None, schedule: Any, min_speedup: float | None
) -> list[TokenRecipe | AttentionRecipe]:
    """The recipes that a budget is fitted with. A schedule that is given is one of the shapes to compare with."""
    found = [one.with_settings(settings or {}) for one in calibration.candidates(recipe)]
    if schedule is not None and all(isinstance(one, AttentionRecipe) for one in found):
        raise UsageError("a pattern of attention keeps all tokens", why="it has no schedule to start from")
    changes = {
        TokenRecipe: {} if schedule is None else {"schedule": Schedule.parse(schedule).to_dict()},
        AttentionRecipe: {} if min_speedup is None else {"min_speedup": min_speedup},
    }
    return [replace(one, **changes[type(one)]) for one in found]


def _gated(steps: list[Pass], program: Program, target: Target) -> tuple[list[Pass], list[dict[str, Any]]]:
    """The steps without the rewrites that do not pay on the target."""
    rows: list[dict[str, Any]] = []
    kept_steps = []
    for step in steps:
        sites, only = _sites_of(step, program)
        if sites:
            build = lambda numbers, only=only: Pipeline([only(numbers), RemoveDead()]).run(program).program  # noqa: E731
            kept, found = calibration.gate(sites, build, target)
            step, rows = only(kept), rows + found
        kept_steps.append(step)
    return kept_steps, rows


def _sites_of(step: Pass, program: Program) -> tuple[dict[int, str], Callable[[frozenset[int]], Pass]]:
    """The sites that a step rewrites, by number, and the step for some of them alone."""
    if isinstance(step, SparsifyAttention):
        recipe = step.resolved()
        numbered = [s.id for s in numbered_sites(program)]
        chosen = {choice.site.id for choice in step.plan(program) if choice.refusal is None}
        sites = {n: site for n, site in enumerate(numbered) if site in chosen}

        def patterns(numbers: frozenset[int]) -> Pass:
            pattern = {str(n): recipe.pattern_at(n, len(numbered)) for n in sorted(numbers)}
            return replace(step, pattern=None, recipe=replace(recipe, pattern=pattern), sites="all")

        return sites, patterns
    if isinstance(step, ReduceTokens) and (step.resolved()[0].place.name in calibration.LAYERWISE):
        recipe = step.resolved()[0]
        places = calibration.places(program, recipe)
        edits = {e.site: e.before - e.after for e in Pipeline([step]).run(program).edits if e.before is not None}
        removed = {n: edits[site] for n, (site, _) in places.items() if edits.get(site)}

        def reductions(numbers: frozenset[int]) -> Pass:
            counts = [removed[n] if n in numbers else 0 for n in range(max(removed) + 1)]
            return replace(step, schedule=Schedule(r=counts))

        return {n: places[n][0] for n in removed}, reductions
    return {}, lambda numbers: step


def _steps(
    passes: str | Iterable[Pass] | None, recipe: Any, schedule: Any, settings: Mapping[str, Any] | None, short: bool,
    min_speedup: float | None,
) -> list[Pass]:  # fmt: skip
    if passes is not None:
        return parse_passes(passes) if isinstance(passes, str) else list(passes)
    require_one(recipe)
    if isinstance(found := recipes.get(recipe), AttentionRecipe):
        if schedule is not None or short:
            raise UsageError(f"recipe {found} keeps all tokens", why="it has no schedule and no short outputs")
        sparsify = SparsifyAttention(recipe=found.with_settings(settings or {}), min_speedup=min_speedup)
        return [*canonical_passes(), sparsify, RemoveDead()]
    reduce = ReduceTokens(_recipe(recipe), schedule, dict(settings or {}), short)
    reduce.resolved()  # a wrong recipe or schedule is an error before any work is done
    return [*canonical_passes(), reduce, RemoveDead()]


def require_one(recipe: Any) -> None:
    """Raises: UsageError for several recipes, which only a budget and data choose from."""
    if isinstance(recipe, str) and len(found := calibration.candidates(recipe)) > 1:
        names = ", ".join(str(one) for one in found)
        raise UsageError(
            f"there are several recipes: {names}", why="which is best is seen on data, within a budget",
            hint="a budget and data (--budget flops=60% --data PATH), or one of them",
        )  # fmt: skip


def learns(step: Pass) -> bool:
    """Whether a step has a part that is learned from data."""
    if isinstance(step, SparsifyAttention):
        return needs_data(step.resolved())
    if isinstance(step, DropLayers):
        return bool(step.inactive)
    return isinstance(step, ReduceTokens) and needs_data(step.resolved()[0])


def _settled(
    step: Pass, limit: Budget | None, program: Program, canonical: Program, data: Any, weights: str | Path
) -> Pass:
    """A step that has learned from the data what it learns, scaled to a budget."""
    if isinstance(step, DropLayers) and step.inactive:
        thresholds = head_thresholds(program, _batches(step, program, data), step.segment)
        if limit is not None:
            return heads_within(limit, step, canonical, thresholds)
        found = [head for head, least in thresholds.items() if least <= step.inactive]
        return replace(step, heads=heads_text(step.heads, found), inactive=0.0)
    if learns(step):
        step = _fitted(step, program, _batches(step, program, data), weights)
    if limit is None:
        return step
    return (within if isinstance(step, ReduceTokens) else patterns_within)(limit, step, canonical)


def _batches(step: Pass, program: Program, data: Any) -> Iterator[Sequence[Tensor]]:
    """What a step learns from."""
    if data is None:
        what, why = _learned_part(step)
        hint = "give inputs like those the model is for (--data PATH)"
        raise UsageError(f"{what} learns from data, and there is none", why=why, hint=hint)
    opened = open_data(data, program.inputs, preprocessing=find_preprocessing(data, program.source, program.inputs))
    return (batch.inputs for batch in opened.batches(FITTED))


def _fitted(step: Pass, program: Program, batches: Iterable[Sequence[Tensor]], weights: str | Path) -> Pass:
    if isinstance(step, SparsifyAttention):
        recipe = fit_patterns(step.resolved(), program, batches, Path(weights))
        return replace(step, pattern=None, recipe=recipe, sites="all")
    recipe, schedule = step.resolved()
    return replace(step, recipe=fit(recipe, schedule, program, batches, Path(weights)), settings={})


def _learned_part(step: Pass) -> tuple[str, str]:
    """Who learns from data, and what."""
    if isinstance(step, DropLayers):
        return f"pass {step.name}", f"which heads give '{step.segment}' less than {step.inactive:g}"
    if isinstance(step, SparsifyAttention):
        recipe = step.resolved()
        part = next(p for p in recipe.pattern.values() if p.unfitted)
        return f"recipe {recipe.name}", f"{part}: {part.summary()}"
    recipe = step.resolved()[0]
    part = recipe.score if isinstance(recipe.score, Learned) else recipe.select
    return f"recipe {recipe.name}", f"{part.kind} '{part.name}': {part.summary()}"


def _limited(steps: list[Pass], budget: Budget) -> Pass:
    """The step that a budget is for: the reduction; without one, that of patterns, or of heads that are voted on."""
    kinds = (
        [s for s in steps if isinstance(s, ReduceTokens)],
        [s for s in steps if isinstance(s, SparsifyAttention)],
        [s for s in steps if isinstance(s, DropLayers) and s.inactive],
    )
    found = next(filter(None, kinds), [])
    if len(found) != 1:
        what = "one pass that reduces tokens, gives patterns or drops inactive heads"
        raise UsageError(f"the budget {budget} is for {what}, and there are {len(found)}")
    return found[0]


def _recipe(recipe: Any) -> str | TokenRecipe:
    return recipe if isinstance(recipe, str) else recipes.get(recipe)


def _checks(
    program: Program, result: PipelineResult, steps: list[Pass], given: Sequence[Tensor] | None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    parity = Parity(program, given)
    if program.source is not None:
        source = program.source

        def eager(*tensors: Tensor) -> list[Tensor]:
            args, kwargs = program.bind(tensors)
            with torch.no_grad():
                return flatten_tensors(source(*args, **kwargs))

        rows += parity.check("capture", eager)
    identity = [s.identity() if isinstance(s, (ReduceTokens, SparsifyAttention)) else s for s in steps]
    if identity != steps and all(_has_identity(s) for s in steps):
        rows += parity.check("identity", _caller(Pipeline(identity).run(program).program, program))
    sparsifying = [s for s in steps if isinstance(s, SparsifyAttention) and _has_mask(s)]
    applied = {e.pass_spec for e in result.edits} & {s.spec for s in sparsifying}
    if applied and len(sparsifying) == len([s for s in identity if s not in steps]):
        dense = [replace(s, form="dense") if s in sparsifying else s for s in steps]
        masked = Pipeline(dense).run(program).program
        complete = None if given is None else masked.complete(given)
        rows += Parity(masked, complete).check("pattern", _caller(result.program, program))
    return rows


def _twins(result: PipelineResult, steps: list[Pass], given: Sequence[Tensor] | None) -> Iterator[dict[str, Any]]:
    """Rows of the twin of each pass that reduced tokens; of the last one, what is left of it in the end is compared."""
    others = [s for s in steps if not isinstance(s, (ReduceTokens, RemoveDead))]
    known = all(isinstance(s, (FoldConstants, RaiseAttention, FlattenGrids)) for s in others)
    for record in result.records:
        last = record is result.records[-1] and known
        yield from prove_twin(record, result.program if last else record.after, given)


def _has_mask(step: SparsifyAttention) -> bool:
    """Whether a pattern of a step has a masked dense form to compare with: a different softmax has none."""
    return any(pattern.masked for pattern in step.resolved().pattern.values())


def _has_identity(step: Pass) -> bool:
    """Whether a setting of a step computes what the dense program does: not so for a different softmax."""
    if not isinstance(step, SparsifyAttention):
        return True
    return all(pattern.subset for pattern in step.resolved().pattern.values())


def _caller(rewritten: Program, program: Program) -> Callable[..., list[Tensor]]:
    """A rewritten program as a function of the inputs of the program it came from."""

    def call(*tensors: Tensor) -> list[Tensor]:
        args, kwargs = rewritten.bind(rewritten.complete(tensors))
        return rewritten.flat(*args, **kwargs)[: len(program.output_nodes)]

    return call


def _report(
    program: Program, canonical: PipelineResult, result: PipelineResult, reducing: list[ReduceTokens],
    steps: list[Pass], checks: list[dict[str, Any]], short: bool,
) -> Report:  # fmt: skip
    axes = propagate(canonical.program)
    sites, token_axes = find_sites(axes)
    _, refusals = find_cuts(axes, sites)
    refusals = _unique([*result.refusals, *refusals])
    canonical_names = {"fold-constants", "raise-attention", "flatten-grids", "remove-dead"}
    edits = [e for e in result.edits if e.pass_spec.split("{")[0] not in canonical_names]
    before, after = _token_counts(sites, result.program)
    leaving = {e.site: e.after for e in edits}
    if not reducing:  # patterns ask for no cut
        refusals = _unique(result.refusals)
    return Report(
        model={
            "name": type(program.source).__name__ if program.source is not None else "program",
            "digest": program.digest,
            "inputs": [asdict(i) for i in program.inputs],
            "outputs": [asdict(o) for o in program.outputs],
            "added_inputs": [asdict(i) for i in result.program.inputs[len(program.inputs) :]],
            "added_outputs": [asdict(o) for o in result.program.outputs[len(program.outputs) :]],
        },
        recipe=_recipe_dict(reducing, steps, short),
        schedule=reducing[0].resolved()[1].to_dict() if reducing else {},
        axes=[axis_dict(axes, a) for a in token_axes],
        sites=[
            {
                "id": site.id,
                "kind": site.kind,
                "axis": site.axis.name if site.axis else None,
                "tokens_before": site.queries,
                "tokens_after": leaving.get(site.id) or count,
                "heads": site.heads,
                "head_dim": site.head_dim,
                "refusal": None if site.id in leaving else _refusal_dict(site, refusals),
            }
            for site, count in zip(sites, after, strict=True)
        ],
        refusals=[r.to_dict() for r in refusals],
        edits=[asdict(e) for e in edits],
        patterns=[c.to_dict() for c in _choices(program, canonical, steps)],
        flops={"before": program_flops(canonical.program), "after": program_flops(result.program)},
        tokens={"before": before, "after": after},
        parity=checks,
    )


def _choices(program: Program, canonical: PipelineResult, steps: list[Pass]) -> Iterator[Choice]:
    """What the patterns of each step do at the program that it is given."""
    plain = (FoldConstants, RaiseAttention, FlattenGrids)
    for i, step in enumerate(steps):
        if isinstance(step, SparsifyAttention):
            before = steps[:i]
            known = all(isinstance(s, plain) for s in before)
            yield from step.plan((canonical if known else Pipeline(before).run(program)).program)


def _recipe_dict(reducing: list[ReduceTokens], steps: list[Pass], short: bool) -> dict[str, Any]:
    passes = ",".join(s.spec for s in steps)
    sparsifying = [s for s in steps if isinstance(s, SparsifyAttention)]
    if not reducing and len(sparsifying) == 1:
        recipe = sparsifying[0].resolved().to_dict()
        return {"name": recipe.pop("name"), "settings": recipe, "passes": passes, "short_outputs": short}
    if not reducing:
        return {"name": None, "settings": {}, "passes": passes, "short_outputs": short}
    recipe = reducing[0].resolved()[0].to_dict()
    return {"name": recipe.pop("name"), "settings": recipe, "passes": passes, "short_outputs": short}


def _refusal_dict(site: AttentionSite, refusals: list[Refusal]) -> dict[str, str] | None:
    refusal = refusal_of(site, refusals)
    return refusal.to_dict() if refusal is not None else None


def _unique(refusals: Iterable[Refusal]) -> list[Refusal]:
    return list(dict.fromkeys(refusals))


def _token_counts(sites: list[AttentionSite], program: Program) -> tuple[list[int], list[int]]:
    """Tokens that enter each attention, before and after; sites that were not raised are as before."""
    now = [n for n in program.graph.nodes if n.target in ops.attentions()]
    known = [s for s in sites if s.known]
    counts = {s.id: int(n.args[0].meta["val"].shape[-2]) for s, n in zip(known, now, strict=False)}
    before = [s.queries for s in sites]
    return before, [counts.get(s.id, s.queries) for s in sites]
