"""The command line: `python -m bench.speed`, and `python -m bench.speed report FILE.json`."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rectgrad_ref.errors import RectGradError, RectGradWarning
from rectgrad_ref.files import atomic_write
from rectgrad_ref.methods import METHODS

from . import experiments, report
from .experiments import Settings
from .results import Results

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).with_name("results")
_QUICK = Settings(
    models=("cifar10_cnn",),
    batches=(1, 8),
    parts=("methods", "q", "batch"),
    rounds=3,
    passes=2,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def _listed(text: str | None, default: tuple[str, ...], known: tuple[str, ...] = ()) -> tuple:
    """The names in a comma-separated list."""
    names = tuple(text.split(",")) if text else default
    for name in names:
        if known and name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
    return names


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    models: Annotated[
        str | None, typer.Option(help="cifar10_cnn, inception_v4 or ONNX files, by commas.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Ids of methods, by commas.")] = None,
    batches: Annotated[
        str | None, typer.Option(help="Batch sizes, by commas; else each model's own.")
    ] = None,
    parts: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(experiments.PARTS)}, by commas.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A minute to see that it runs.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of a comparison.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="After which a comparison begins no new round.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every contender.")] = None,
    backend: Annotated[str, typer.Option(help="Ours: cuda, cpu or reference.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, print tables, and write results.json and figures."""
    if context.invoked_subcommand is not None:
        return
    preset = _QUICK if quick else Settings()
    settings = replace(
        preset,
        models=_listed(models, preset.models),
        methods=_listed(methods, preset.methods, tuple(METHODS)),
        batches=tuple(map(int, _listed(batches, tuple(map(str, preset.batches))))),
        parts=_listed(parts, preset.parts, experiments.PARTS),
        backend=backend,
        threads=threads or preset.threads,
        rounds=rounds or preset.rounds,
        seconds=preset.seconds if seconds is None else seconds,
    )
    console = Console()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RectGradWarning)
            warnings.filterwarnings("ignore", module="captum")  # at every call, that it sets hooks
            out.mkdir(parents=True, exist_ok=True)
            results = experiments.run(settings, console, partial(_save, out))
        _show(results, console)
        for path in (out / "results.json", *report.save_figures(results, out)):
            console.print(f"written: {path}")
    except RectGradError as error:
        console.print(f"[red]error:[/] {error}")
        raise typer.Exit(1) from None


def _save(folder: Path, results: Results) -> None:
    with atomic_write(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")


def _show(results: Results, console: Console) -> None:
    for sheet in report.sheets(results):
        console.print(sheet.rich())
    for note in results["notes"]:
        console.print(f"[yellow]note:[/] {note}")


@app.command("report")
def write_report(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="Results of a run.")],
    readme: Annotated[Path, typer.Option(help="The file whose marked section is replaced.")] = (
        README
    ),
) -> None:
    """Put the results into the README, and draw the figures anew beside them."""
    results: Results = json.loads(file.read_text(encoding="utf-8"))
    report.save_figures(results, file.parent)
    report.update(readme, report.markdown(results))


if __name__ == "__main__":
    app(prog_name="python -m bench.speed")
