"""`rectgrad verify`: make a bundle, compare another implementation with it, verify the reference.

Exit codes: 0, agrees or done; 1, differs or fails; 2, wrong usage or unusable input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(
    help="Verify another implementation of RectGrad, and this one.", no_args_is_help=True
)

Page = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also write the report as a page.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Preprocess = Annotated[
    str | None, typer.Option(metavar="NAME|FILE", help="How pictures become input.")
]
ModelOption = Annotated[
    Path | None, typer.Option("--model", help="ONNX file, where the bundle does not contain it.")
]


@contextmanager
def _reporting() -> Iterator[None]:
    """Errors as the rest of the command line shows them."""
    from ..cli import _reporting as shared  # which mounts this module

    with shared():
        yield


@app.command("make")
def make_bundle(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Bundle to write, an .npz file.")],
    method: Annotated[str, typer.Option("-m", "--method", help="See 'rectgrad methods'.")] = (
        "rectgrad"
    ),
    target: Annotated[
        list[str] | None, typer.Option("-t", "--target", help="Class, one or one an image.")
    ] = None,
    preset: Annotated[str, typer.Option(help="default, paper or authors.")] = "default",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An option of the method. Repeatable."),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="NAME", help="Keep this layer only. Repeatable."),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, cuda, cpu or reference.")] = "auto",
    dtype: Annotated[
        Literal["float32", "float64"] | None, typer.Option(help="On the reference backend.")
    ] = None,
    preprocess: Preprocess = None,
) -> None:
    """Explain images and write what another implementation is compared with."""
    from ..cli import _methods, _targets
    from .bundle import destination_of, make
    from .report import counted

    with _reporting():
        destination_of(out)
        (chosen,) = _methods([method], preset, settings or [])
        targets: Any = [t for t in _targets(target or [], len(images)) if t is not None] or None
        bundle = make(
            model,
            list(images),
            method=chosen,
            target=targets,
            layers=layer,
            backend=backend,
            dtype=dtype,
            preprocess=preprocess,
        )
        bundle.save(out)
    contains = "with its model" if bundle.model is not None else "without its model"
    print(
        f"wrote {out}: {counted(len(bundle.inputs), 'image')}, "
        f"{counted(len(bundle.layers), 'layer')}, {bundle.dtype}, {contains}, "
        f"{out.stat().st_size / 1000:.0f} kB"
    )


@app.command("compare")
def compare_bundle(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Made by 'verify make'.")],
    theirs: Annotated[
        Path,
        typer.Argument(
            metavar="THEIRS", help="An .npz file: the final map, gradients by value name, or both."
        ),
    ],
    model: ModelOption = None,
    page: Page = None,
    as_json: AsJson = False,
) -> None:
    """Compare another implementation's numbers with a bundle, and say what differs."""
    from . import report
    from .bundle import load
    from .compare import compare
    from .diagnose import diagnose

    with _reporting():
        _check_page(page)
        comparison = compare(load(bundle), theirs, model)
        diagnosis = diagnose(comparison)
        if page is not None:
            _write(page, report.page(comparison, diagnosis))
    if as_json:
        print(json.dumps(report.as_data(comparison, diagnosis), indent=2, ensure_ascii=False))
    else:
        _print(report.text(comparison, diagnosis))
    if not comparison.agrees or diagnosis.verdict == "explained":
        raise typer.Exit(1)


@app.command("self")
def verify_self(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", help="ONNX file; by default the package's network."),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="Picture; by default seeded noise. Repeatable."),
    ] = None,
    preprocess: Preprocess = None,
    input_name: Annotated[str | None, typer.Option("--input", help="The image input.")] = None,
    output_name: Annotated[str | None, typer.Option("--output", help="The class scores.")] = None,
    page: Page = None,
    as_json: AsJson = False,
) -> None:
    """Verify this package on your model and machine, and print a certificate."""
    from rich.console import Console

    from . import report
    from .certify import certify

    console = Console(stderr=True)
    with _reporting():
        _check_page(page)
        with console.status("loading") as status:
            certificate = certify(
                model,
                image,
                preprocess=preprocess,
                input=input_name,
                output=output_name,
                tell=status.update,
            )
        if page is not None:
            _write(page, report.certificate_page(certificate))
    if as_json:
        print(json.dumps(report.certificate_data(certificate), indent=2, ensure_ascii=False))
    else:
        _print(report.certificate_text(certificate))
    if not certificate.holds:
        raise typer.Exit(1)


@app.command("bundles")
def list_bundles() -> None:
    """List the conformance bundles that come with the package."""
    from .bundle import load
    from .conformance import bundle_paths

    for path in bundle_paths():
        print(f"{path}\n    {load(path).provenance['about']}")


def _check_page(path: Path | None) -> None:
    """Before minutes are spent on what cannot be written."""
    from ..cli import _check_parent

    if path is not None:
        _check_parent(path)


def _write(path: Path, content: str) -> None:
    from ..files import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def _print(parts: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for part in parts:
        console.print(part)
