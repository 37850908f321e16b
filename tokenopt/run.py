"""The work behind the verbs of the command line: from model files to proven files in a folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tokenopt import __version__, calibration, registry, runtimes
from tokenopt.attention.pattern import parse
from tokenopt.attention.recipe import AttentionRecipe
from tokenopt.calibration import Target
from tokenopt.data import Dataset, find_preprocessing, open_data
from tokenopt.diagnostics import diagnose
from tokenopt.errors import LoweringError, TokenoptError, UsageError
from tokenopt.gallery import Sample, gallery
from tokenopt.inspection import inspect
from tokenopt.loading import load_program
from tokenopt.optimization import Result, learns, optimize, require_one
from tokenopt.passes.drop_layers import DropLayers
from tokenopt.passes.reduce_tokens import ReduceTokens
from tokenopt.passes.sparsify_attention import SparsifyAttention
from tokenopt.pipeline import Pass, parse_passes
from tokenopt.program import InputSpec, Program, atomic_path
from tokenopt.report import Report, dumps
from tokenopt.runtimes.base import Engine
from tokenopt.runtimes.bench import bench
from tokenopt.runtimes.compare import verify
from tokenopt.runtimes.eager import EagerEngine
from tokenopt.schedule import Budget
from tokenopt.staging import staged
from tokenopt.tokens.recipe import TokenRecipe

Progress = Callable[[str, int, int], None]

RECIPE_NAME = "tome"
PROGRAM, RECIPE, REPORT, PAGE = "model.pt2", "recipe.resolved.yaml", "report.json", "report.html"
SCORER = "scorer.safetensors"
CHECKED = 32  # samples of the user's data that an optimisation or export is checked on; verify takes all
HELD_OUT = 0.2  # the share of the data that is not learned from
LOOKED_AT = 8  # samples whose attention is looked at
_SECONDS, _ROUNDS = 5.0, (5, 40)  # that one measurement may take, and the rounds it has at least and at most


@dataclass(frozen=True)
class Output:
    """What ``--to`` can ask for: its role in a report, its suffix, who builds and checks it, and with what options."""

    role: str
    suffix: str
    runtime: str
    options: tuple[str, ...]


TARGETS = {
    "onnx": Output("onnx", ".onnx", "onnx", ("opset",)),
    "ort": Output("onnx", ".onnx", "onnxruntime", ("opset",)),
    "tensorrt": Output("tensorrt", ".engine", "tensorrt", ("opset", "compute_capability")),
    "tensorrt-rtx": Output("tensorrt-rtx", ".rtx.engine", "tensorrt-rtx", ("opset", "compute_capability")),
}


@dataclass(frozen=True)
class Source:
    """How a model file is to be read."""

    arch: str | None = None
    input_shapes: tuple[str, ...] = ()
    dynamic_batch: bool = True
    trust: bool = False
    allow_missing: bool = False

    def load(self, path: Path) -> Program:
        return load_program(
            path,
            arch=self.arch,
            input_shapes=self.input_shapes,
            dynamic_batch=self.dynamic_batch,
            trust=self.trust,
            allow_missing=self.allow_missing,
        )

    def images(self, program: Program | None) -> Any:
        """What may say how the model's images are made: the directory of its configuration, or its module, or None."""
        if self.arch is not None and self.arch.startswith("hf:"):
            return self.arch
        return None if program is None else program.source


@dataclass(frozen=True)
class Build:
    """What to build from a program.

    Raises:
        UsageError: for an unknown target, or two of one file.
    """

    targets: tuple[str, ...] = ("ort",)
    opset: int | None = None
    compute_capability: str | None = None

    def __post_init__(self) -> None:
        for name in self.targets:
            if name not in TARGETS:
                raise UsageError(f"there is no target {name!r}", hint=f"--to takes some of {','.join(TARGETS)}")
        if {"onnx", "ort"} <= set(self.targets):
            hint = "ort is as ONNX Runtime is fast with on this machine, onnx is for any runtime"
            raise UsageError("onnx and ort are both model.onnx", hint=hint)

    @property
    def distinct(self) -> list[Output]:
        """The targets asked for, each file once."""
        return list(dict.fromkeys(TARGETS[name] for name in self.targets))

    def check_available(self) -> None:
        """Raises: LoweringError if a runtime is not installed."""
        for target in self.distinct:
            if reason := runtimes.get(target.runtime).available():
                raise LoweringError(f"{target.runtime} cannot build here", why=reason)

    def engine(self, target: Output, program: Program, path: Path, data: Sequence[Sequence[Tensor]] = ()) -> Engine:
        """Builds one file, and checks it against the program."""
        options = {name: getattr(self, name) for name in target.options if getattr(self, name) is not None}
        return runtimes.get(target.runtime).build(program, path, data=data, **options)


@dataclass(frozen=True)
class Data:
    """The user's data, and how it is to be read; see `open_data`.

    Args:
        path: a folder, a file, or "random".
        evaluation: the same, for all that is reported, where ``path`` is what is fitted on.
        mean, std, resize, crop, fit: of images, instead of what the model says; see `Preprocessing`.
    """

    path: str | None = None
    evaluation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    fit: str | None = None
    samples: int | None = None
    seed: int = 0
    skip_bad: bool = False

    def open(self, inputs: Sequence[InputSpec], model: Any) -> Dataset | None:
        """The samples of ``path``, or None. The model is what images are made for, see `Preprocessing`."""
        return None if self.path is None else self._open(self.path, inputs, model, self.samples)

    def divide(self, inputs: Sequence[InputSpec], model: Any, learns: bool) -> tuple[Dataset | None, Dataset | None]:
        """What is learned from, and what is checked on: never the same samples.

        That is ``evaluation`` if it is given, else a share of ``path``; all of it where nothing is learned.
        """
        if self.evaluation is not None and self.path is None:
            raise UsageError("there is nothing to fit on", hint="--data is fitted on, --eval-data is checked on")
        opened = self.open(inputs, model)
        if self.evaluation is not None and opened is not None:
            first, second = Path(str(self.path)), Path(self.evaluation)
            if first.exists() and second.exists() and first.samefile(second):
                hint = "leave out --eval-data, and a share of the data is held out"
                raise UsageError("what is fitted on would be checked on", where=self.evaluation, hint=hint)
            return (opened if learns else None), self._open(self.evaluation, inputs, model, None)
        if learns and opened is not None:
            return opened.split(HELD_OUT, self.seed)
        return None, opened

    def _open(self, path: str, inputs: Sequence[InputSpec], model: Any, samples: int | None) -> Dataset:
        given = {name: getattr(self, name) for name in ("mean", "std", "resize", "crop", "fit")}
        preprocessing = find_preprocessing(path, model, inputs, **given)
        return open_data(
            path, inputs, preprocessing=preprocessing, samples=samples, seed=self.seed, skip_bad=self.skip_bad
        )


@dataclass(frozen=True)
class Fitting:
    """How a budget is met; see `calibration.fit`.

    Args:
        runtime: where latency counts; None for no measurement.
        metric: of deviation.
        keep_best: take the best where nothing meets a budget of latency.
        resume: use what was measured before, and keep what is measured.
        workers: that go through the data, see `calibration.named_workers`.
        strategy: name of what chooses schedules; None is a search.

    Raises:
        UsageError: for workers that there are none of, and for an unknown strategy.
    """

    runtime: str | None = None
    metric: str | None = None
    keep_best: bool = False
    resume: bool = True
    workers: str | None = None
    strategy: str | None = None

    def __post_init__(self) -> None:
        calibration.named_workers(self.workers)
        if self.strategy is not None:
            registry.load("tokenopt.strategies", self.strategy)

    def target(self, threads: int) -> Target | None:
        return None if self.runtime is None else Target(self.runtime, threads=threads)

    def options(self, held_out: Dataset | None, seed: int) -> dict[str, Any]:
        """Of `calibration.fit`."""
        cache = calibration.cache_folder() if self.resume else None
        options = {"metric": self.metric, "keep_best": self.keep_best, "workers": self.workers}
        return options | {"held_out": held_out, "seed": seed, "cache": cache, "calibrator": self.strategy}


@dataclass
class Outcome:
    """What a run did, and whether there was anything to do."""

    report: Report
    changed: bool


def inspect_model(path: Path, source: Source, pattern: str | None, progress: Progress) -> dict[str, Any]:
    """What the analysis knows about a model file, and what a pattern would gain."""
    if pattern is not None:
        SparsifyAttention(recipe=pattern).resolved()
    progress("load", 0, 0)
    program = source.load(path)
    progress("analyse", 0, 0)
    return inspect(program, pattern)


def optimize_model(
    path: Path,
    out: Path,
    *,
    source: Source,
    build: Build,
    recipe: str | None,
    schedule: str | None,
    budget: str | None,
    settings: Mapping[str, Any],
    passes: str | None,
    min_speedup: float | None,
    short_outputs: bool,
    data: Data,
    batch_sizes: Sequence[int],
    threads: int | None,
    fitting: Fitting,
    progress: Progress,
    command: str = "",
) -> Outcome:
    """Optimises a model file, proves and times the result, and leaves its files in ``out``.

    ``command`` is what was typed, for the report. Given data are also looked at: where the dense model attends, and
    which patches of the images are left.

    A run that changes nothing leaves its report alone, and not even that beside the files of an earlier run.
    """
    build.check_available()
    if budget is not None:
        Budget.parse(budget)
    if passes is None and recipe is not None and (passes := _resolved_passes(recipe)) is not None:
        recipe = None
    fits = budget is not None and data.path is not None and passes is None
    if fitting.strategy is not None and not fits:
        raise UsageError(f"there is nothing that the strategy {fitting.strategy} could choose",
                         hint="--budget flops=60% and --data PATH, without --passes")  # fmt: skip
    if passes is None and not fits:
        require_one(recipe)
    learned_from = _check_method(recipe, schedule, settings, passes, min_speedup, short_outputs)
    if fitting.workers is not None and not fits:
        raise UsageError("workers have nothing to do", why="they fit a budget to data", hint="--budget and --data")
    learned_from = learned_from or fits
    _protect(path, out, [PROGRAM, *(f"model{target.suffix}" for target in build.distinct)])
    clock = _Clock(progress)
    threads = threads or torch.get_num_threads()
    with staged(out) as staging:
        with clock("load"):
            program = source.load(path)
            fitted, checked = data.divide(program.inputs, source.images(program), learned_from)
            given = _first(checked)
        scorer = staging.path / SCORER
        result = optimize(
            program,
            recipe=recipe or RECIPE_NAME,
            schedule=schedule,
            budget=budget,
            settings=settings,
            passes=passes,
            min_speedup=min_speedup,
            short_outputs=short_outputs,
            given=given[0] if given else None,
            data=fitted,
            weights=scorer,
            target=fitting.target(threads),
            fitting=fitting.options(checked, data.seed),
            progress=progress,
        )
        report = result.report
        learned = _learned_weights(report.recipe)
        if learned is not None:  # the folder holds all that its recipe needs
            if learned != scorer:
                shutil.copyfile(learned, scorer)
            report.recipe, report.patterns = _moved([report.recipe, report.patterns], str(learned), str(out / SCORER))
        report.model["name"], report.command = path.name, command
        if checked is not None:
            rows = {"fitted": fitted, "checked": checked}
            report.data = {"seed": data.seed, **{k: None if v is None else v.describe() for k, v in rows.items()}}
        if not result.changed:
            if not (out / PROGRAM).exists():
                report.files = {"report": REPORT, "html": PAGE}
                _write(report, [], staging.path)
                staging.commit()
            return Outcome(report, changed=False)

        given = _completed(given, checked, result)
        report.files = {"program": PROGRAM, "recipe": RECIPE, "report": REPORT, "html": PAGE}
        report.files |= {"scorer": SCORER} if scorer.exists() else {}
        with clock("save"):
            engine = runtimes.get("eager").build(result.program, staging.path / PROGRAM, data=given)
        report.parity += _new_rows(engine, report.parity)
        pairs = [(EagerEngine.of(result.dense, threads=threads), EagerEngine.of(result.program, threads=threads))]
        for target in build.distinct:
            file, dense = staging.path / f"model{target.suffix}", staging.scratch / f"dense{target.suffix}"
            with clock(f"build {target.runtime}"):
                engine = build.engine(target, result.program, file, given)
            report.parity += _new_rows(engine, report.parity)
            report.files |= _roles(target, engine)
            if engine.runnable:
                with clock(f"build {target.runtime}, dense"):
                    build.engine(target, result.dense, dense)
                pairs.append((runtimes.open(dense, threads=threads), runtimes.open(file, threads=threads)))
        with clock("measure"):
            report.latency = [row for pair in pairs for row in _latency(*pair, batch_sizes, threads)]
        samples: list[Sample] = []
        if given:
            with clock("look at the data"):
                inputs = result.dense.inputs
                rows = None if any(isinstance(spec.shape[0], int) for spec in inputs if spec.shape) else LOOKED_AT
                report.diagnostics = diagnose(result.dense, [[t[:rows] for t in given[0][: len(inputs)]]])
                samples = gallery(result, given[0])
        report.timings |= clock.seconds
        repeated = None if passes is None else _settled(passes, result)
        (staging.path / RECIPE).write_text(resolved_recipe(report, repeated), encoding="utf-8")
        _write(report, samples, staging.path)
        staging.commit(obsolete=_earlier_files(out))
    return Outcome(report, changed=True)


def calibrate_model(
    path: Path,
    out: Path,
    *,
    source: Source,
    recipe: str | None,
    budget: str,
    settings: Mapping[str, Any],
    data: Data,
    threads: int | None,
    fitting: Fitting,
    progress: Progress,
) -> dict[str, Any]:
    """Fits a schedule to data and writes it as JSON, which ``--schedule`` takes.

    Of a recipe that gives attention a pattern it is the recipe that is fitted: ``--recipe`` takes the file.

    Returns:
        What was written: ``recipe`` (its name, or what it is), ``schedule, model`` (digest), ``calibration`` (as in a
        report), ``data, tokenopt``.
    """
    if data.path is None:
        raise UsageError("there is nothing to fit on", hint="--data PATH, inputs like those the model is for")
    Budget.parse(budget)
    chosen = [one.with_settings(settings) for one in calibration.candidates(recipe or RECIPE_NAME)]
    progress("load", 0, 0)
    program = source.load(path)
    fitted, checked = data.divide(program.inputs, source.images(program), learns=True)
    found = calibration.fit(
        program,
        chosen,
        fitted,
        budget=budget,
        target=fitting.target(threads or torch.get_num_threads()),
        progress=progress,
        **fitting.options(checked, data.seed),
    )
    rows = {"fitted": fitted, "checked": checked}
    content = {
        "recipe": found.recipe.name if isinstance(found.recipe, TokenRecipe) else found.recipe.to_dict(),
        "schedule": found.schedule.to_dict(),
        "model": {"name": path.name, "digest": program.digest},
        "data": {"seed": data.seed, **{k: None if v is None else v.describe() for k, v in rows.items()}},
        "calibration": found.to_dict(),
        "tokenopt": __version__,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as partial:
        partial.write_text(dumps(content) + "\n", encoding="utf-8")
    return content


def _write(report: Report, samples: Sequence[Sample], folder: Path) -> None:
    """The report as data and as a page."""
    from tokenopt.html import render

    report.save(folder / REPORT)
    (folder / PAGE).write_text(render(report, samples), encoding="utf-8")


def export_model(
    path: Path, out: Path, *, source: Source, build: Build, data: Data, progress: Progress
) -> dict[str, Any]:
    """Builds and checks what was asked for from one model; the files take the model's name.

    Returns:
        ``files`` {role: path}, ``parity`` [row of a report], ``timings`` {stage: seconds}.
    """
    build.check_available()
    files = {target: f"{path.stem}{target.suffix}" for target in build.distinct}
    _protect(path, out, files.values())
    clock = _Clock(progress)
    parity: list[dict[str, Any]] = []
    written: dict[str, str] = {}
    with staged(out) as staging:
        with clock("load"):
            program = source.load(path)
            given = _first(data.open(program.inputs, source.images(program)))
        for target, file in files.items():
            with clock(f"build {target.runtime}"):
                engine = build.engine(target, program, staging.path / file, given)
            parity += _new_rows(engine, parity)
            written |= {role: str(out / name) for role, name in _roles(target, engine).items()}
        staging.commit()
    return {"files": written, "parity": parity, "timings": clock.seconds}


def verify_models(
    a: Path, b: Path, *, source: Source, data: Data, tolerance: float | None, progress: Progress
) -> list[dict[str, Any]]:
    """Compares two models on random inputs, and on all of the data; the first is the reference.

    Returns:
        Rows as in a report's ``parity``, failed ones too.
    """
    reference, other = (open_model(path, source, None, progress) for path in (a, b))
    narrow, wide = sorted((reference, other), key=lambda engine: len(engine.inputs))
    opened = data.open(narrow.inputs, source.images(getattr(reference, "program", None)))
    if opened is not None:
        opened = opened.for_inputs(wide.inputs) or opened
    progress("compare", 0, 0)
    given = () if opened is None else (batch.inputs for batch in opened.batches(CHECKED))
    return [check.to_dict() for check in verify(reference, other, given, tolerance)]


def bench_models(
    paths: Sequence[Path], *, source: Source, batch_sizes: Sequence[int], threads: int | None, progress: Progress
) -> list[dict[str, Any]]:
    """Times models side by side on the same random inputs.

    Returns:
        The rows of `bench`: ``name, runtime, batch, threads, median_ms, iqr_ms, ratio, rounds``.
    """
    threads = threads or torch.get_num_threads()
    engines = [open_model(path, source, threads, progress) for path in paths]
    rows = []
    for done, batch in enumerate(batch_sizes):
        progress("measure", done, len(batch_sizes))
        rows += _measure(engines, batch, threads)
    return rows


def open_model(path: Path, source: Source, threads: int | None, progress: Progress) -> Engine:
    """A model file of any kind, ready to run."""
    progress(f"open {path.name}", 0, 0)
    if path.suffix in (".pt2", ".onnx", ".engine"):  # these know their inputs; the options are for the others
        return runtimes.open(path, threads=threads)
    return EagerEngine.of(source.load(path), path, threads)


def resolved_recipe(report: Report, passes: str | None) -> str:
    """What a run did as YAML that makes ``--recipe`` repeat it: recipe and schedule, or the passes that were given."""
    if passes is not None:
        content: dict[str, Any] = {"passes": passes}
    else:
        recipe = {"name": report.recipe["name"], **report.recipe["settings"]}
        recipe |= {} if "pattern" in recipe else {"schedule": report.schedule}
        if report.recipe["short_outputs"]:
            recipe["restore"] = "none"
        content = {"recipe": recipe, "schedule": report.schedule}
    content |= {"model": report.model["digest"], "tokenopt": __version__}
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)


def _settled(passes: str, result: Result) -> str:
    """Passes as text, with what was found for them on data or within a budget; what they learned has no text."""
    return ",".join(
        text for given, step in zip(parse_passes(passes), result.steps, strict=True) for text in _texts(given, step)
    )


def _texts(given: Pass, step: Pass) -> list[str]:
    """The passes that do what a step did, without a recipe made for it."""
    if learns(given) and not isinstance(given, DropLayers):
        return [replace(given, schedule=step.schedule).spec if isinstance(given, ReduceTokens) else given.spec]
    if not isinstance(getattr(step, "recipe", None), AttentionRecipe):
        return [step.spec]
    recipe = step.resolved()
    grid = None if recipe.grid is None else list(recipe.grid)
    parts = [SparsifyAttention(pattern, sites=where, grid=grid, min_speedup=recipe.min_speedup)
             for where, pattern in recipe.pattern.items()]  # fmt: skip
    return [part.spec for part in reversed(parts)]  # the last that names a site counts, and so does the first pass


def _learned_weights(recipe: Mapping[str, Any]) -> Path | None:
    """The file with the weights of a report's learned score, or of its learned patterns."""
    settings = recipe["settings"]
    for pattern in map(parse, settings.get("pattern", {}).values()):
        if getattr(pattern, "weights", None):
            return Path(pattern.weights)
    score = settings.get("score")
    weights = score.get("learned", {}).get("weights") if isinstance(score, dict) else None
    return Path(weights) if weights else None


def _moved(data: Any, old: str, new: str) -> Any:
    """Plain data with a path in it replaced."""
    if isinstance(data, dict):
        return {key: _moved(value, old, new) for key, value in data.items()}
    if isinstance(data, list):
        return [_moved(value, old, new) for value in data]
    return data.replace(old, new) if isinstance(data, str) else data


def _resolved_passes(recipe: str) -> str | None:
    """The passes in a file that `resolved_recipe` wrote for a run with passes."""
    if not recipe.endswith((".yaml", ".yml")) or not Path(recipe).is_file():
        return None
    with suppress(yaml.YAMLError, UnicodeDecodeError):  # reported when it is read as a recipe
        content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        return content.get("passes") if isinstance(content, dict) else None
    return None


class _Dumper(yaml.SafeDumper):
    """Writes a value that occurs twice twice, for people to read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Clock:
    """Seconds per stage, and the progress of each."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.progress(stage, 0, 0)
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def _check_method(
    recipe: str | None, schedule: str | None, settings: Mapping[str, Any], passes: str | None,
    min_speedup: float | None, short_outputs: bool,
) -> bool:  # fmt: skip
    """Whether the method learns from data.

    Raises:
        UsageError: for what `optimize` would refuse or ignore, before a large model is loaded for nothing.
    """
    if passes is None:
        found = calibration.candidates(recipe or RECIPE_NAME)
        if len(found) > 1:
            for one in found:
                one.with_settings(settings)
            return False
        if isinstance(found[0], AttentionRecipe):
            return learns(SparsifyAttention(recipe=found[0].with_settings(settings)))
        return learns(ReduceTokens(found[0], schedule, settings))
    steps = parse_passes(passes)
    if recipe or schedule or settings or short_outputs or min_speedup is not None:
        raise UsageError(
            "a list of passes says all there is to do",
            why="recipe, schedule, settings, least speed-up and short outputs are options of a pass then",
            hint='--passes "raise-attention,reduce-tokens{recipe=tome,schedule=r=8,short-outputs=true}"',
        )
    return any(learns(step) for step in steps)


def _protect(path: Path, out: Path, files: Iterable[str]) -> None:
    """Raises: UsageError if the model itself would be overwritten."""
    for name in files:
        if (out / name).exists() and path.exists() and (out / name).samefile(path):
            raise UsageError("the model would be overwritten", where=str(path), hint="choose another folder with -o")


def _earlier_files(out: Path) -> list[str]:
    """The files that an earlier run left in a folder, as its report lists them: they are replaced together."""
    try:
        files = Report.load(out / REPORT).files.values()
    except (OSError, TokenoptError):
        return []
    built = (f"model{target.suffix}" for target in TARGETS.values())
    ours = {PROGRAM, RECIPE, REPORT, PAGE, SCORER, "model.onnx.data", *built}
    return sorted(ours.intersection(files))


def _first(data: Dataset | None) -> list[list[Tensor]]:
    """The first samples of the data as one batch, or none."""
    return [] if data is None else [next(data.batches(CHECKED)).inputs]


def _completed(given: list[list[Tensor]], data: Dataset | None, result: Result) -> list[list[Tensor]]:
    """The user's inputs for the rewritten program: what it takes besides is in the data too, or as in its example."""
    added = len(result.program.inputs) > len(result.dense.inputs)
    if data is not None and added and (completed := data.for_inputs(result.program.inputs)) is not None:
        return _first(completed)
    return [result.program.complete(batch) for batch in given]


def _new_rows(engine: Engine, known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The checks of an engine as rows; that of an ONNX file on the way to another engine may be known already."""
    return [row for row in (check.to_dict() for check in engine.parity) if row not in known]


def _roles(target: Output, engine: Engine) -> dict[str, str]:
    """The files of an engine by what they are."""
    first, *others = engine.files
    return {target.role: first.name} | {f"{target.role} {file.suffix[1:]}": file.name for file in others}


def _latency(dense: Engine, optimised: Engine, batch_sizes: Sequence[int], threads: int) -> Iterator[dict[str, Any]]:
    """Dense against optimised in one runtime, as rows of a report."""
    for batch in dense.batch_sizes(*batch_sizes):
        before, after = (row["median_ms"] for row in _measure([dense, optimised], batch, threads))
        yield {
            "runtime": dense.runtime,
            "batch": batch,
            "threads": threads,
            "before_ms": before,
            "after_ms": after,
            "speedup": before / after,
        }


def _measure(engines: Sequence[Engine], batch: int, threads: int) -> list[dict[str, Any]]:
    """The rows of `bench` for one batch size, in as many rounds as a few seconds allow."""
    start = time.perf_counter()
    bench(engines, batches=[batch], threads=threads, rounds=1, warmup=1)
    seconds = (time.perf_counter() - start) / 3  # a warm-up, a trial and a round
    rounds = min(max(int(_SECONDS / seconds), _ROUNDS[0]), _ROUNDS[1])
    return bench(engines, batches=[batch], threads=threads, rounds=rounds, warmup=1)
