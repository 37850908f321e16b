"""The command line: options in, tables or JSON out. What the verbs do is in `tokenopt.run`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tokenopt import __version__, registry
from tokenopt.errors import TokenoptError, UsageError

DONE, ERROR, UNCHANGED, MISMATCH, INTERRUPTED = 0, 1, 3, 4, 130

app = typer.Typer(
    name="tokenopt",
    help="Removes tokens from transformer models, proves the result, and exports it.",
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 nothing matched or changed, 4 check failed, 5 budget not met, "
    "130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text folds long words, where panels would cut them
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A .pt2, a pickled module, or a state dict.")]
Arch = Annotated[
    str | None,
    typer.Option(help="For a state dict: timm:NAME, torchvision:NAME, hf:CONFIG_DIR or package.module:callable."),
]
InputShape = Annotated[
    list[str] | None,
    typer.Option("--input-shape", help="[NAME:]1x3x224x224[:DTYPE]; once per input.", metavar="SHAPE"),
]
StaticBatch = Annotated[bool, typer.Option("--static-batch", help="Keep the batch size of the example.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run the code in a pickled file.")]
AllowMissing = Annotated[bool, typer.Option("--allow-missing", help="Accept missing and unexpected weights.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
To = Annotated[
    str, typer.Option(metavar="RUNTIMES", help="Some of ort (ONNX Runtime here), onnx (any), tensorrt, tensorrt-rtx.")
]
Opset = Annotated[int | None, typer.Option(help="Of ONNX.")]
Capability = Annotated[
    str | None, typer.Option("--compute-capability", help="Of the GPU that TensorRT builds for, such as 8.9.")
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Inputs: .npz, .npy or .safetensors, arrays named as the inputs; a folder of images, or of one folder per "
        "class; or random.",
    ),
]
EvalData = Annotated[
    str | None, typer.Option(metavar="PATH", help="Inputs to check on, where --data is fitted on; else a share of it.")
]
Mean = Annotated[
    str | None, typer.Option(metavar="LIST", help="Of images: 0.485,0.456,0.406, or one value; the model's by default.")
]
Std = Annotated[str | None, typer.Option(metavar="LIST", help="Of images, as --mean.")]
Resize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Of images: 256, the shorter side; or 256x192, height and width.")
]
Crop = Annotated[str | None, typer.Option(metavar="SIZE", help="Of the centre of images: 224, or 224x192.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Use so many of --data, chosen at random.")]
Seed = Annotated[int, typer.Option(min=0, help="Of that choice, of what is held out, and of random data.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out files that cannot be read, and list them.")]
Recipe = Annotated[
    str | None,
    typer.Option(
        help='A name (see recipes), a YAML file, or a pattern: "Neighborhood(7)"; with a budget and data also several '
        "names, or auto.",
        show_default="tome",
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe.")
]
ForRuntime = Annotated[
    str | None,
    typer.Option("--for", metavar="RUNTIME", help="Where latency counts, and where every rewrite has to pay: "
                 "onnxruntime, eager, tensorrt, tensorrt-rtx or cuda; modelled where it is not here."),
]  # fmt: skip
MaxDrop = Annotated[
    str | None,
    typer.Option(metavar="SHARE", help="Instead of a budget: the least cost that loses at most so much, such as 0.5%, "
                 "of accuracy if labels are known, else as --metric."),
]  # fmt: skip
Metric = Annotated[
    str | None,
    typer.Option(help="Of deviation: kl, cosine, last-token, relative or package.module:function; by the outputs."),
]
Strategy = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What chooses schedules within a budget: "
                 f"{', '.join(registry.names('tokenopt.strategies'))}.", show_default="search"),
]  # fmt: skip
KeepBest = Annotated[bool, typer.Option("--keep-best", help="Write the best found, if nothing meets the latency.")]
Resume = Annotated[bool, typer.Option("--resume/--afresh", help="Use and keep what is measured, or do not.")]
Workers = Annotated[
    str | None,
    typer.Option(metavar="ray[:HOST:PORT]", help="Fit on Ray: all CPUs of this machine, or a cluster that it is in."),
]
Batch = Annotated[str, typer.Option(help="Batch sizes, such as 1,8.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to run with.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"tokenopt {__version__}")
        raise typer.Exit()


@app.command()
def inspect(
    model: ModelPath,
    arch: Arch = None,
    input_shape: InputShape = None,
    static_batch: StaticBatch = False,
    trust: Trust = False,
    allow_missing: AllowMissing = False,
    pattern: Annotated[
        str | None, typer.Option(help='Show what an attention pattern would gain: "Neighborhood(7)", or a recipe.')
    ] = None,
    json: Json = False,
) -> None:
    """Show token axes, attention and cuts.

    Nothing is changed. For every attention it says what is legal, or why not.
    """
    from tokenopt import run, terminal

    with terminal.Stages() as progress:
        source = _source(arch, input_shape, static_batch, trust, allow_missing)
        found = run.inspect_model(model, source, pattern, progress)
    _show(found, terminal.inspection, json)
    if not found["sites"]:
        raise typer.Exit(UNCHANGED)


@app.command()
def optimize(
    context: typer.Context,
    model: ModelPath,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for what the run leaves.")],
    arch: Arch = None,
    input_shape: InputShape = None,
    static_batch: StaticBatch = False,
    trust: Trust = False,
    allow_missing: AllowMissing = False,
    recipe: Recipe = None,
    settings: Settings = None,
    schedule: Annotated[
        str | None, typer.Option(help="r=13, r=16:-1, r=16,14,12, keep=0.7@3,6,9, or a JSON or YAML file.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="flops=60% or tokens=60% of the dense model's, latency=0.6x or 4ms; fitted to --data, without "
            "which the schedule is scaled."
        ),
    ] = None,
    max_drop: MaxDrop = None,
    passes: Annotated[
        str | None, typer.Option(help='Other passes: "raise-attention,reduce-tokens{recipe=tome}".')
    ] = None,
    min_speedup: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of an attention, for a pattern to be applied to it: 1.1; 0 applies it to all."),
    ] = None,
    short_outputs: Annotated[bool, typer.Option("--short-outputs", help="Outputs keep the reduced tokens.")] = False,
    to: To = "ort",
    opset: Opset = None,
    compute_capability: Capability = None,
    data: Data = None,
    eval_data: EvalData = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    crop: Crop = None,
    samples: Samples = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    strategy: Strategy = None,
    metric: Metric = None,
    runtime: ForRuntime = None,
    keep_best: KeepBest = False,
    resume: Resume = True,
    workers: Workers = None,
    batch: Batch = "1",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Reduce tokens or sparsify attention; prove, export and time.

    The folder gets model.pt2, what --to asks for, recipe.resolved.yaml, and report.json and report.html, when every
    check has passed.
    """
    from tokenopt import run, terminal

    with terminal.Stages() as progress:
        outcome = run.optimize_model(
            model,
            out,
            source=_source(arch, input_shape, static_batch, trust, allow_missing),
            build=run.Build(_names(to), opset, compute_capability),
            recipe=recipe,
            schedule=schedule,
            budget=_budget(budget, max_drop),
            settings=_assignments(settings),
            passes=passes,
            min_speedup=min_speedup,
            short_outputs=short_outputs,
            data=_data(data, eval_data, mean, std, resize, crop, samples, seed, skip_bad),
            batch_sizes=_sizes(batch),
            threads=threads,
            fitting=run.Fitting(runtime, metric, keep_best, resume, workers, strategy),
            command=context.obj,
            progress=progress,
        )
    _show(outcome.report.to_dict(), lambda _: outcome.report.table(str(out)), json)
    if not outcome.changed:
        print("nothing was changed", file=sys.stderr)
        raise typer.Exit(UNCHANGED)


@app.command()
def calibrate(
    model: ModelPath,
    out: Annotated[Path, typer.Option("-o", "--out", help="The JSON file to write.")],
    data: Data = None,
    recipe: Recipe = None,
    settings: Settings = None,
    budget: Annotated[
        str | None, typer.Option(help="flops=60%, tokens=60% or latency=0.6x of the dense model's, or latency=4ms.")
    ] = None,
    max_drop: MaxDrop = None,
    arch: Arch = None,
    input_shape: InputShape = None,
    static_batch: StaticBatch = False,
    trust: Trust = False,
    allow_missing: AllowMissing = False,
    eval_data: EvalData = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    crop: Crop = None,
    samples: Samples = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    strategy: Strategy = None,
    metric: Metric = None,
    runtime: ForRuntime = None,
    keep_best: KeepBest = False,
    resume: Resume = True,
    workers: Workers = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Fit a schedule to data under a budget.

    It keeps most of what the model does within the budget. optimize --schedule takes the file. Ctrl-C writes the best
    so far; the same command goes on from there.
    """
    from tokenopt import run, terminal

    wanted = _budget(budget, max_drop)
    if wanted is None:
        raise UsageError("there is no budget", hint="--budget flops=60%, or --max-drop 0.5%")
    with terminal.Stages() as progress:
        found = run.calibrate_model(
            model,
            out,
            source=_source(arch, input_shape, static_batch, trust, allow_missing),
            recipe=recipe,
            budget=wanted,
            settings=_assignments(settings),
            data=_data(data, eval_data, mean, std, resize, crop, samples, seed, skip_bad),
            threads=threads,
            fitting=run.Fitting(runtime, metric, keep_best, resume, workers, strategy),
            progress=progress,
        )
    _show(found, terminal.calibrated, json)
    if found["calibration"]["interrupted"]:
        print("interrupted; the best so far was written", file=sys.stderr)


@app.command()
def export(
    model: ModelPath,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the files.")],
    to: To = "ort",
    arch: Arch = None,
    input_shape: InputShape = None,
    static_batch: StaticBatch = False,
    trust: Trust = False,
    allow_missing: AllowMissing = False,
    opset: Opset = None,
    compute_capability: Capability = None,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    crop: Crop = None,
    samples: Samples = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Build a model for runtimes, and check it."""
    from tokenopt import run, terminal

    with terminal.Stages() as progress:
        found = run.export_model(
            model,
            out,
            source=_source(arch, input_shape, static_batch, trust, allow_missing),
            build=run.Build(_names(to), opset, compute_capability),
            data=_data(data, None, mean, std, resize, crop, samples, seed, skip_bad),
            progress=progress,
        )
    _show(found, terminal.exported, json)


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Models, .onnx files or engines.")],
    arch: Arch = None,
    input_shape: InputShape = None,
    static_batch: StaticBatch = False,
    trust: Trust = False,
    allow_missing: AllowMissing = False,
    batch: Batch = "1",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Time models side by side.

    Runs are interleaved; shown are median, spread, and ratio to the first.
    """
    from tokenopt import run, terminal

    with terminal.Stages() as progress:
        rows = run.bench_models(
            models,
            source=_source(arch, input_shape, static_batch, trust, allow_missing),
            batch_sizes=_sizes(batch),
            threads=threads,
            progress=progress,
        )
    _show(rows, terminal.bench_table, json)


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(metavar="A", help="The reference: a model, an .onnx file or an engine.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is compared with it.")],
    arch: Arch = None,
    input_shape: InputShape = None,
    static_batch: StaticBatch = False,
    trust: Trust = False,
    allow_missing: AllowMissing = False,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    crop: Crop = None,
    samples: Samples = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    tolerance: Annotated[float | None, typer.Option(min=0.0, help="Of the difference, relative.")] = None,
    json: Json = False,
) -> None:
    """Compare what two models compute.

    On fresh random inputs and on given ones, at two batch sizes.
    """
    from tokenopt import run, terminal
    from tokenopt.report import parity_table

    with terminal.Stages() as progress:
        rows = run.verify_models(
            a,
            b,
            source=_source(arch, input_shape, static_batch, trust, allow_missing),
            data=_data(data, None, mean, std, resize, crop, samples, seed, skip_bad),
            tolerance=tolerance,
            progress=progress,
        )
    _show(rows, parity_table, json)
    if not all(row["passed"] for row in rows):
        print("the two models differ", file=sys.stderr)
        raise typer.Exit(MISMATCH)


@app.command()
def explain(
    subject: Annotated[str, typer.Argument(metavar="REPORT|NAME", help="A report.json, a name, or a recipe's YAML.")],
    site: Annotated[str | None, typer.Option(metavar="ID", help="A site of the report, or a part of its id.")] = None,
) -> None:
    """Explain a name, or a site of a report.

    A name is that of a pass, recipe, part of a recipe, runtime, strategy, operation or error. Of a site it says what
    was done, or why nothing was.
    """
    from tokenopt import terminal
    from tokenopt.explain import explain_name, explain_site
    from tokenopt.report import Report

    if not Path(subject).is_file() or subject.endswith((".yaml", ".yml")):
        if site is not None:
            raise UsageError("there is no such report", where=subject)
        print(explain_name(subject))
        return
    report = Report.load(subject)
    if site is None:
        terminal.console().print(report.table(str(Path(subject).parent)))
    else:
        print(explain_site(report, site))


@app.command()
def recipes(
    matrix: Annotated[bool, typer.Option("--matrix", help="Build each for every runtime here.")] = False,
    json: Json = False,
) -> None:
    """List the registered recipes.

    With --matrix each is built for every runtime that is installed, on a small vision transformer, and compared: the
    largest relative error, or why it was refused.
    """
    from tokenopt import terminal
    from tokenopt.explain import recipe_rows

    if not matrix:
        _show(recipe_rows(), terminal.recipe_table, json)
        return
    from tokenopt.matrix import recipe_matrix

    with terminal.Stages() as progress:
        rows = recipe_matrix(progress=progress)
    _show(rows, terminal.matrix_table, json)


@app.command()
def passes(json: Json = False) -> None:
    """List the registered passes."""
    _list("tokenopt.passes", "pass", json)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line; every outcome is an exit code, and every error a message."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files and layers may be outside the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    code = DONE
    try:
        words = sys.argv[1:] if arguments is None else arguments
        with _exit_on_signals(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(words, prog_name="tokenopt", obj=shlex.join(["tokenopt", *words]))
    except SystemExit as end:  # typer's way to return
        code = end.code if isinstance(end.code, int) else DONE
        if code == INTERRUPTED:
            print("interrupted; nothing was written", file=sys.stderr)
    except TokenoptError as error:
        code = _report_error(error, str(error), error.exit_code)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        code = _report_error(error, f"{error.strerror or error}{where}")
    except MemoryError as error:
        code = _report_error(error, "out of memory")
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        code = _report_error(error, f"unexpected {type(error).__name__}: {text} (TOKENOPT_DEBUG=1 shows where)")
    sys.exit(_flushed(code))


def _report_error(error: Exception, message: str, code: int = ERROR) -> int:
    if os.environ.get("TOKENOPT_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into exits, on whose way out unfinished files are removed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _flushed(code: int) -> int:
    """The exit code, or that of an error if stdout cannot take what was printed: a full disk, or a closed pipe."""
    try:
        sys.stdout.flush()
        return code
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere
        if not isinstance(error, BrokenPipeError):
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return code or ERROR


def _source(
    arch: str | None, input_shape: list[str] | None, static_batch: bool, trust: bool, allow_missing: bool
) -> Any:
    from tokenopt.run import Source

    return Source(arch, tuple(input_shape or ()), not static_batch, trust, allow_missing)


def _data(
    data: str | None, eval_data: str | None, mean: str | None, std: str | None, resize: str | None, crop: str | None,
    samples: int | None, seed: int, skip_bad: bool,
) -> Any:  # fmt: skip
    from tokenopt.run import Data

    size, fit = _size("--resize", resize), None if resize is None else "stretch" if "x" in resize else "cover"
    floats, cropped = [_floats("--mean", mean), _floats("--std", std)], _size("--crop", crop)
    return Data(data, eval_data, *floats, size, cropped, fit, samples, seed, skip_bad)


def _budget(budget: str | None, max_drop: str | None) -> str | None:
    if budget is not None and max_drop is not None:
        raise UsageError("a budget and a largest loss at once", hint="--budget or --max-drop")
    return budget if max_drop is None else f"drop={max_drop}"


def _show(value: Any, render: Any, json: bool) -> None:
    from tokenopt import terminal
    from tokenopt.report import dumps

    if json:
        print(dumps(value))
    else:
        terminal.console().print(render(value))


def _list(group: str, kind: str, json: bool) -> None:
    from tokenopt import terminal
    from tokenopt.explain import summaries

    _show(summaries(group), lambda rows: terminal.name_table(kind, rows), json)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _sizes(text: str) -> list[int]:
    if not all(part.strip().isdigit() and int(part) > 0 for part in text.split(",")):
        raise UsageError(f"not a list of batch sizes: {text!r}", hint="such as --batch 1,8")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def _floats(option: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"not a list of numbers: {text!r}", hint=f"such as {option} 0.5,0.5,0.5") from error


def _size(option: str, text: str | None) -> tuple[int, int] | None:
    """Height and width; one number is both."""
    if text is None:
        return None
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"not a size: {text!r}", hint=f"such as {option} 224 or {option} 224x192, height by width")
    return int(parts[0]), int(parts[-1])


def _assignments(texts: list[str] | None) -> dict[str, Any]:
    import yaml

    from tokenopt.pipeline import read_value

    found = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        try:
            found[key.strip().replace("-", "_")] = read_value(value)
        except yaml.YAMLError as error:
            raise UsageError(f"not a setting: {text!r}", why=str(error).split("\n")[0]) from error
        if not equals or not key.strip():
            raise UsageError(f"not a setting: {text!r}", hint="write --set key=value")
    return found
