"""The paper's experiments: `python -m bench.paper all`, or the names of some."""

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
from .experiments import EXPERIMENTS
from .runner import Experiment, run
from .sources import Classifier, Sources, inception_v4

HERE = Path(__file__).parent
_PHOTOS = (".jpg", ".jpeg", ".png", ".bmp")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    names: Annotated[list[str], typer.Argument(help=f"all, report, or {', '.join(EXPERIMENTS)}.")],
    quick: Annotated[bool, typer.Option(help="At most five minutes each.")] = False,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Such as images=1000; may be repeated.")
    ] = None,
    cifar: Annotated[Path | None, typer.Option(help="Folder with cifar-10-batches-py.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch CIFAR-10 if absent.")] = False,
    masks: Annotated[Path | None, typer.Option(help="Folder of the authors' masks.")] = None,
    classifier: Annotated[Path | None, typer.Option(help="ONNX file, ImageNet-sized.")] = None,
    preprocess: Annotated[str, typer.Option(help="How it wants its pictures.")] = "inception",
    labels: Annotated[Path | None, typer.Option(help="File of its class names.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs for it.")] = None,
    seed: Annotated[int, typer.Option(help="Of noise and random orders.")] = 0,
    backend: Annotated[str, typer.Option(help="Of the attributions.")] = "auto",
    device: Annotated[str, typer.Option(help="PyTorch's, for retraining.")] = "cpu",
    work: Annotated[Path | None, typer.Option(help="Folder of unfinished work.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Run experiments; what an interrupted run has done is kept."""
    console = Console()
    work = work or cache_folder() / "paper"
    # Quick numbers must not take the place of the published ones.
    out = out or (work / "quick" if quick else HERE / "results")
    chosen = list(EXPERIMENTS) if "all" in names else [name for name in names if name != "report"]
    for name in chosen:
        if name not in EXPERIMENTS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(EXPERIMENTS)}")
    sources = Sources(
        cifar=cifar,
        masks=masks,
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
                experiment = _experiment(name, quick, setting or [])
                run(experiment, sources, work=work, out=out, console=console)
        except RectGradError as error:
            console.print(f"[red]{name}:[/] {error}")
            failed = True
    report.write(out, out.parent / "RESULTS.md")
    if failed:
        raise typer.Exit(1)


def _classifier(
    path: Path | None, preprocess: str, labels: Path | None, folder: Path | None
) -> Classifier | None:
    photos = sorted(p for p in folder.iterdir() if p.suffix.lower() in _PHOTOS) if folder else []
    if path is not None:
        return Classifier(path, preprocess, labels, photos)
    found = inception_v4()
    return Classifier(found.path, found.preprocess, labels, photos) if found else None


def _experiment(name: str, quick: bool, settings: list[str]) -> Experiment:
    """The experiment at its own size, or a quick one, with settings such as ``images=1000``."""
    cls = EXPERIMENTS[name]
    values: dict[str, Any] = dict(cls.quick) if quick else {}
    known = {field.name: field.default for field in fields(cls)}
    for text in settings:
        key, _, value = text.partition("=")
        if key not in known:
            raise typer.BadParameter(f"{name} has no setting {key!r}; it has {', '.join(known)}")
        values[key] = _parsed(value, known[key])
    return cls(**values)


def _parsed(text: str, default: Any) -> Any:
    """`text` in the type of a setting's default; tuples by commas."""
    if isinstance(default, tuple):
        return tuple(type(default[0])(part) for part in text.split(","))
    return type(default)(text)


if __name__ == "__main__":
    app(prog_name="python -m bench.paper")
