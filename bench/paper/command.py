"""The command line of a suite of experiments."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rectgrad_ref.errors import RectGradError, RectGradWarning
from rectgrad_ref.onnx_models.published import cache_folder

from . import report
from .report import Suite
from .runner import Experiment, run
from .sources import Classifier, Sources, inception_v4

_PHOTOS = (".jpg", ".jpeg", ".png", ".bmp")


def command_line(suite: Suite) -> typer.Typer:
    """`python -m bench.<suite> all`, or the names of some experiments."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    listed = ", ".join(suite.experiments)

    @app.command(help=f"{suite.title}. The experiments: {listed}.")
    def main(
        names: Annotated[list[str], typer.Argument(help="all, report, or names.")],
        quick: Annotated[bool, typer.Option(help="At most five minutes each.")] = False,
        setting: Annotated[
            list[str] | None, typer.Option("--set", help="Such as images=1000; may be repeated.")
        ] = None,
        cifar: Annotated[Path | None, typer.Option(help="Folder with cifar-10-batches-py.")] = None,
        download: Annotated[
            bool, typer.Option("--download", help="Fetch CIFAR-10 if absent.")
        ] = False,
        masks: Annotated[Path | None, typer.Option(help="Folder of the authors' masks.")] = None,
        classifier: Annotated[Path | None, typer.Option(help="ONNX file, ImageNet-sized.")] = None,
        preprocess: Annotated[str, typer.Option(help="How it wants its pictures.")] = "inception",
        labels: Annotated[Path | None, typer.Option(help="File of its class names.")] = None,
        networks: Annotated[Path | None, typer.Option(help="Folder of other seeds'.")] = None,
        photos: Annotated[Path | None, typer.Option(help="Folder of photographs for it.")] = None,
        seed: Annotated[int, typer.Option(help="Of noise and random orders.")] = 0,
        backend: Annotated[str, typer.Option(help="Of the attributions.")] = "auto",
        device: Annotated[str, typer.Option(help="PyTorch's, for retraining.")] = "cpu",
        work: Annotated[Path | None, typer.Option(help="Folder of unfinished work.")] = None,
        out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    ) -> None:
        """Run experiments; what an interrupted run has done is kept."""
        console = Console()
        work = work or cache_folder() / "experiments"
        # Quick numbers must not take the place of the published ones.
        out = out or (work / "quick" / suite.name if quick else suite.folder) / "results"
        chosen = list(suite.experiments) if "all" in names else names
        chosen = [name for name in chosen if name != "report"]
        for name in chosen:
            if name not in suite.experiments:
                raise typer.BadParameter(f"{name!r} is none of {listed}")
        sources = Sources(
            cifar=cifar,
            masks=masks,
            networks=networks,
            classifier=_classifier(classifier, preprocess, labels, photos),
            download=download,
            seed=seed,
            backend=backend,
            device=device,
        )
        failed = False
        for name in chosen:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RectGradWarning)
                    experiment = _experiment(suite.experiments[name], quick, setting or [])
                    run(experiment, sources, work=work, out=out, console=console)
            except RectGradError as error:
                console.print(f"[red]{name}:[/] {error}")
                failed = True
        report.write(suite, out, out.parent / "RESULTS.md")
        if failed:
            raise typer.Exit(1)

    return app


def _classifier(
    path: Path | None, preprocess: str, labels: Path | None, folder: Path | None
) -> Classifier | None:
    photos = sorted(p for p in folder.iterdir() if p.suffix.lower() in _PHOTOS) if folder else []
    if path is not None:
        return Classifier(path, preprocess, labels, photos)
    found = inception_v4()
    return Classifier(found.path, found.preprocess, labels, photos) if found else None


def _experiment(cls: type[Experiment], quick: bool, settings: list[str]) -> Experiment:
    """The experiment at its own size, or a quick one, with settings such as ``images=1000``."""
    values: dict[str, Any] = dict(cls.quick) if quick else {}
    known = {field.name: field.default for field in fields(cls)}
    for text in settings:
        key, _, value = text.partition("=")
        if key not in known:
            raise typer.BadParameter(
                f"{cls.name} has no setting {key!r}; it has {', '.join(known)}"
            )
        values[key] = _parsed(key, value, known[key])
    try:
        return cls(**values)
    except ValueError as error:
        raise typer.BadParameter(f"{cls.name}: {error}") from None


def _parsed(key: str, text: str, default: Any) -> Any:
    """`text` in the type of a setting's default; tuples by commas."""
    several = isinstance(default, tuple)
    of = type(default[0] if several else default)
    try:
        values = tuple(of(part) for part in (text.split(",") if several else [text]))
    except ValueError:
        raise typer.BadParameter(
            f"{key}={text}: a value of type {of.__name__} is expected"
        ) from None
    return values if several else values[0]
