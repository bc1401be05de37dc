"""The command line. Exit codes: 0 ok, 1 our fault, 2 usage, model or data, 3 budget, 4 target."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from .amounts import read_bytes, read_numbers, read_seconds
from .errors import BudgetError, DataError, FourfoldError
from .progress import shown

if TYPE_CHECKING:
    from .artifact import Artifact

app = typer.Typer(
    help="Compile a trained model once; run it on several targets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Targets = Annotated[
    list[str],
    typer.Option("--target", "-t", help='Target, e.g. cpu or cpu{isa="avx2"}; repeat it.'),
]
Data = Annotated[
    str | None,
    typer.Option(help=".npz, folder of .npy/.npz or test_data_set_*, or module:function."),
]


@app.command("compile")
def compile_model(  # noqa: PLR0913, PLR0917 - a command's options are its parameters
    model: Annotated[
        str, typer.Argument(help="A .onnx file, or package.module:function for PyTorch.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The artifact's folder.")],
    target: Targets = ["cpu"],  # noqa: B006 - typer copies it
    data: Data = None,
    check: Annotated[
        str | None, typer.Option(help="Held-out feeds (with `labels` for a metric).")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="w8a8, w4a8, w2a8; w8, w4 for weights only; auto: bits by importance. "
            "Default: auto under a budget, else w8a8."
        ),
    ] = None,
    ranges: Annotated[
        str, typer.Option(help="Activation ranges: auto, static or dynamic.")
    ] = "auto",
    effort: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=3,
            help="What is done so that outputs stay: 0 nothing from data; 1 corrects biases and "
            "scales; 2 equalizes channels and rounds by GPTQ; 3 learns by gradient (extra torch). "
            "Default: 1 with data.",
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Obey this plan.json instead of deciding; edit it first.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Passes to run instead: text, or a .toml file.")
    ] = None,
    set_: Annotated[
        str | None,
        typer.Option(
            "--set",
            help="Other options of the recipe's passes: 'assign-bits{block=32},tune{steps=600}'.",
        ),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="top1, or module:function.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Largest drop of the metric; else exit 3.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Largest size of all files, e.g. 6MB; else exit 3.")
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="Longest call with a batch of one, e.g. 5ms; else exit 3.")
    ] = None,
    avg_bits: Annotated[
        float | None, typer.Option(help="Most stored bits of a weight on average, e.g. 4.5.")
    ] = None,
    widths: Annotated[str, typer.Option(help="Widths that auto may mix.")] = "8,4,2",
    split: Annotated[
        str | None,
        typer.Option(
            help="Split narrow weights by value: auto (SplitQuant), kmeans (16 values a channel), "
            "branches, codebook, int8-grid or nearest; clusters, span and levels may follow: "
            "int8-grid,16,channel,levels=1."
        ),
    ] = None,
    signal: Annotated[
        list[str],
        typer.Option(
            help="What says how important a weight is: measured, fisher (extra torch), "
            "activation-weighted, quantization-error, kurtosis, zd, lim; repeat it. The first "
            "that predicts losses leads."
        ),
    ] = ["measured"],  # noqa: B006 - typer copies it
    method: Annotated[
        str, typer.Option(help="milp: exact; greedy: least important first.")
    ] = "milp",
    sweep: Annotated[
        int, typer.Option(min=0, help="Compile this many widths and show the front instead.")
    ] = 0,
    jobs: Annotated[
        int, typer.Option(min=0, help="Processes that measure importance; 0: one a core.")
    ] = 0,
    memory: Annotated[
        str, typer.Option(help="Bound on activations held at once, e.g. 500MB.")
    ] = "1GB",
    threads: Annotated[int, typer.Option(min=1, help="Threads while latency is measured.")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stage: Annotated[
        bool, typer.Option("--stage", help="Copy a model of a linked store first.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an older artifact.")] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare with the source.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile MODEL, check every variant against it, and report."""
    options = {
        "targets": tuple(target),
        "precision": precision,
        "ranges": ranges,
        "effort": effort,
        "plan": plan,
        "recipe": recipe,
        "set": set_,
        "metric": metric,
        "max_drop": max_drop,
        "max_size": None if max_size is None else read_bytes(max_size),
        "max_latency": None if max_latency is None else read_seconds(max_latency),
        "average_bits": avg_bits,
        "widths": read_numbers(widths),
        "split": split,
        "signals": tuple(signal),
        "method": method,
        "seed": seed,
        "memory": read_bytes(memory),
        "threads": threads,
        "jobs": jobs,
        "stage": stage,
        "force": force,
        "check": not no_check,
    }
    if sweep:
        _sweep(model, out, data, check, sweep, options, as_json, quiet)
        return
    from .driver import compile

    with shown(quiet or as_json) as progress, _shown_over_budget(out, as_json, quiet):
        artifact = compile(model, out, data, check, progress, **options)
    _show_report(artifact, as_json, quiet)


@app.command()
def run(
    artifact: Annotated[Path, typer.Argument(help="A folder that compile wrote.")],
    data: Annotated[str, typer.Option(help="Feeds, as for compile.")],
    target: Annotated[str, typer.Option("--target", "-t")] = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the outputs to this .npz.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a compiled variant over feeds in its real runtime."""
    import numpy as np

    from .artifact import Artifact
    from .feeds import Feeds, input_specs
    from .lookup import make_target
    from .model import load

    one = make_target(target)
    entry = Artifact(artifact).entry(one.name)
    if out is not None and out.exists():
        raise DataError(f"{out} exists; choose another file")
    feeds = Feeds.read(data, input_specs(load(entry)))
    runner = one.open(entry)
    parts = [runner(batch) for batch in feeds]
    try:
        outputs = {n: np.concatenate([np.atleast_1d(p[n]) for p in parts]) for n in parts[0]}
        if out is not None:
            with out.open("xb") as file:
                np.savez(file, allow_pickle=False, **outputs)
    except ValueError as error:
        raise DataError(f"the outputs of the batches do not fit together: {error}") from None
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from None
    facts = {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in outputs.items()}
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        for name, array in outputs.items():
            numbers = array.astype(float) if array.dtype.kind in "biuf" else np.zeros(0)
            spread = (
                f", mean {numbers.mean():.6g}, std {numbers.std():.6g}" if numbers.size else ""
            )
            typer.echo(f"{name}: {array.dtype} {list(array.shape)}{spread}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A model file or an artifact folder.")],
    as_json: Json = False,
) -> None:
    """Say what a model or an artifact holds."""
    from . import tables
    from .artifact import Artifact

    if path.is_dir():
        _show_report(Artifact(path), as_json, quiet=False)
    elif as_json:
        typer.echo(json.dumps(tables.model_facts(path)))
    else:
        tables.print_model(Console(), tables.model_facts(path))


@app.command()
def explain(
    artifact: Annotated[Path, typer.Argument(help="A folder that compile wrote.")],
    target: Annotated[str, typer.Option("--target", "-t")] = "cpu",
    name: Annotated[
        str | None, typer.Option(help="Only values and remarks whose name holds this.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which format every value got, what stayed float, and why."""
    from . import tables
    from .artifact import Artifact

    opened = Artifact(artifact)
    opened.entry(target)
    report = next(r for r in opened.report.targets if r.target.partition("{")[0] == target)
    facts = tables.explanation(opened.plan(target), report, name or "")
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        tables.print_explanation(Console(), facts)


@app.command()
def profile(
    model: Annotated[
        str | None, typer.Argument(help="Measure this model's own shapes; else a common grid.")
    ] = None,
    target: Annotated[str, typer.Option("--target", "-t")] = "cpu",
    data: Data = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what weighted layers cost on this machine, for --max-latency."""
    from . import tables
    from .profiling import profile as measure

    with shown(quiet or as_json) as progress:
        found = measure(target, model, data, progress)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    elif not quiet:
        tables.print_profile(Console(), found.to_json())


@app.command()
def passes(as_json: Json = False) -> None:
    """List the passes and their options."""
    _list("passes", as_json)


@app.command()
def targets(as_json: Json = False) -> None:
    """List the targets and their options."""
    _list("targets", as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("build/digits"),
    precision: Annotated[str, typer.Option()] = "w8a8",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile the digits model that comes with fourfold, and check it."""
    from importlib.resources import as_file, files

    from .driver import compile

    home = (__package__ or "fourfold.compiler").rpartition(".")[0]
    with (
        as_file(files(f"{home}.examples") / "digits") as folder,
        shown(quiet or as_json) as progress,
    ):
        artifact = compile(
            folder / "digits.onnx",
            out,
            folder / "calib.npz",
            folder / "check.npz",
            progress,
            precision=precision,
            force=True,
        )
    _show_report(artifact, as_json, quiet)


def main() -> None:
    """Run the command line; a `FourfoldError` ends it with one line and its exit code."""
    try:
        app()
    except FourfoldError as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        typer.echo("error: " + " ".join(f"{error}{notes}".split()), err=True)
        sys.exit(error.exit_code)


def _sweep(
    model: str,
    out: Path,
    data: str | None,
    check: str | None,
    points: int,
    options: dict[str, Any],
    as_json: bool,
    quiet: bool,
) -> None:
    """Compile several widths and show which are worth having."""
    from . import tables
    from .sweep import sweep

    with shown(quiet or as_json) as progress:
        front = sweep(model, out, data, check, points, progress, **options)
    if as_json:
        typer.echo(json.dumps(front.to_json()))
    elif not quiet:
        tables.print_front(Console(), front, out)


@contextmanager
def _shown_over_budget(out: Path, as_json: bool, quiet: bool) -> Iterator[None]:
    """Print the report too when a budget is missed: it says by how much, and what was gained."""
    from .artifact import Artifact

    try:
        yield
    except BudgetError as error:
        if error.built:
            _show_report(Artifact(out), as_json, quiet)
        raise


def _show_report(artifact: Artifact, as_json: bool, quiet: bool) -> None:
    """Print the report of an artifact."""
    from . import tables

    if as_json:
        typer.echo(json.dumps(artifact.report.to_json()))
    elif not quiet:
        tables.print_report(Console(), artifact)


def _list(kind: Literal["passes", "targets"], as_json: bool) -> None:
    """Print every pass or target with its options."""
    from . import tables

    facts = tables.catalogue(kind)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        tables.print_catalogue(Console(), facts)


if __name__ == "__main__":
    main()
