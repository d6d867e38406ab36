"""The command line: explain pictures, look into a model, list methods, fetch models.

Exit codes: 0, done; 1, the computation is not possible here; 2, wrong usage or unusable input. An
error is one line on stderr and leaves nothing half-written.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from io import TextIOWrapper
from pathlib import Path
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import onnx
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from . import __version__, analysis
from .attribution import Attribution, Layer, plain
from .errors import InvalidImage, OutputError, RectGradError, RectGradWarning, UnsupportedOperator
from .explainer import Explainer
from .exporter import export as write_explainer
from .images import Layout
from .methods import METHODS, Method, make_method
from .methods.base import alternatives
from .rules.registry import find_vjp
from .verify.cli import app as verify_app

if TYPE_CHECKING:
    from .onnx_models.published import Download

_FIGURES = (".png", ".pdf", ".svg")

app = typer.Typer(
    help="Explain what an ONNX image classifier looks at: RectGrad and its baselines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Models that can be had by name.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(verify_app, name="verify")

ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.")]
Preset = Annotated[str, typer.Option(help="Conventions: default, paper or authors.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="An option listed by 'rectgrad methods', such as q=95, for every chosen method that "
        "has it. Repeatable.",
    ),
]
BackendName = Annotated[str, typer.Option("--backend", help="auto, cuda, cpu or reference.")]
Dtype = Annotated[
    Literal["float32", "float64"] | None, typer.Option(help="On the reference backend.")
]
Preprocessing = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="NAME|FILE",
        help="How pictures become input: imagenet, inception, caffe, cifar10 … or a JSON file. By "
        "default what the model's metadata or a config file beside it says.",
    ),
]
Labels = Annotated[Path | None, typer.Option(help="Class names: a text file, one a line, or JSON.")]
InputLayout = Annotated[
    Layout | None, typer.Option(help="The input's axes, where its shape does not tell.")
]
InputName = Annotated[str | None, typer.Option(help="The image input, if there are several.")]
OutputName = Annotated[str | None, typer.Option(help="The class scores, if there are several.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]


def main() -> None:
    """What the command `rectgrad` runs."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal has a ∂
    app(prog_name="rectgrad")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Explain what an ONNX image classifier looks at: RectGrad and its baselines."""


@contextmanager
def _reporting() -> Iterator[None]:
    """Put errors and warnings on stderr, one line each; errors end with their exit code."""
    told: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in told:
            _tell("warning", message, "yellow")
        told.add(str(message))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", RectGradWarning)
            warnings.showwarning = show
            yield
    except (RectGradError, ValueError) as error:
        _tell("error", error, "red")
        raise typer.Exit(2 if isinstance(error, (ValueError, OutputError)) else 1) from None


def _tell(kind: str, message: object, colour: str) -> None:
    line = Text.assemble((f"{kind}: ", colour), " ".join(str(message).split()))
    Console(stderr=True).print(line, soft_wrap=True)


# --- explain ------------------------------------------------------------------------------------


@app.command()
@_reporting()
def explain(
    model: ModelFile,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Picture files.")],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            help="A .png, .pdf or .svg: all images and methods side by side. An .npz: the arrays "
            "of one method. A folder: a .png for each image and method.",
        ),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option("-m", "--method", help="rectgrad by default. Repeatable."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "-t",
            "--target",
            help="Class index or name, one for all images or one for each. By default the class "
            "that the model predicts.",
        ),
    ] = None,
    preset: Preset = "default",
    settings: Settings = None,
    backend: BackendName = "auto",
    dtype: Dtype = None,
    preprocess: Preprocessing = None,
    labels: Labels = None,
    input_name: InputName = None,
    output_name: OutputName = None,
    layout: InputLayout = None,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="Every layer of one image: as a strip in pictures, arrays in an .npz."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Explain the class of one or more pictures."""
    methods = _methods(method or ["rectgrad"], preset, settings or [])
    targets = _targets(target or [], len(images))
    _check_destination(out, images, methods, trace)
    explainer = Explainer(
        model,
        backend=backend,
        dtype=dtype,
        input=input_name,
        output=output_name,
        preprocess=preprocess,
        labels=labels,
        layout=layout,
    )
    records: list[dict[str, Any]] = []
    with _progress(len(images) * len(methods)) as advance:
        job = _Job(explainer, methods, trace, advance)
        if _is_folder(out):
            with _whole_folder(out) as folder:
                for i, image in enumerate(images):
                    for result in job.run([image], targets[i : i + 1], keys=[i]):
                        _draw([result], trace, folder / _file_name(image, result.method))
                        records += _records([image], result)
        else:
            results = job.run(images, targets, keys=range(len(images)))
            if out.suffix.lower() == ".npz":
                results[0].save(out)
            else:
                _draw(results, trace, out)
            records = [record for result in results for record in _records(images, result)]
    if as_json:
        _print_json({"out": str(out), **explainer.environment, "results": records})
        return
    _print_table(
        ("image", "class", "probability", "logit"),
        [
            (r["image"], r["class"], f"{100 * r['probability']:.1f} %", f"{r['logit']:.4g}")
            for r in records
            if r["method"] == methods[0].id
        ],
    )
    gaps = [
        (r["image"], r["method"], f"{r['completeness_gap']:.4g}")
        for r in records
        if r["completeness_gap"] is not None
    ]
    if gaps:
        _print_table(("image", "method", "completeness gap"), gaps)
    print(f"wrote {out}")


class _Job:
    """Explanations of several images by several methods, all of the same classes."""

    def __init__(
        self,
        explainer: Explainer,
        methods: Sequence[Method],
        trace: bool,
        advance: Callable[[int], None],
    ) -> None:
        self.explainer, self.methods, self.trace = explainer, methods, trace
        self.advance = advance

    def run(
        self, images: Sequence[Path], targets: Sequence[int | str | None], keys: Sequence[int]
    ) -> list[Attribution]:
        """One attribution a method."""
        results = []
        for method in self.methods:
            results.append(self._explain(method, images, targets, keys))
            targets = results[0].target.tolist()
        return results

    def _explain(
        self,
        method: Method,
        images: Sequence[Path],
        targets: Sequence[int | str | None],
        keys: Sequence[int],
    ) -> Attribution:
        # One image at a time, so that the bar moves, unless the samples influence each other.
        size = len(images) if method.whole_batch else 1
        parts = []
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            given = [t for t in targets[rows] if t is not None]
            parts.append(
                self.explainer.explain(
                    list(images[rows]),
                    method=method,
                    target=given or None,
                    keys=keys[rows],
                    trace=self.trace,
                )
            )
            self.advance(size)
        return _joined(parts)


def _joined(parts: Sequence[Attribution]) -> Attribution:
    """Attributions of some images each, put together."""
    first = parts[0]
    if len(parts) == 1:
        return first
    shapes = dict.fromkeys(part.values.shape[1:] for part in parts)
    if len(shapes) > 1:
        raise InvalidImage(
            f"images in one file must have one size, got {', '.join(map(str, shapes))}; write to "
            "a folder instead"
        )

    def joined(items: Sequence[Any], name: str) -> Any:
        arrays = [getattr(item, name) for item in items]
        return None if arrays[0] is None else np.concatenate(arrays)

    names = ("values", "inputs", "logits", "target", "completeness_gap")
    trace = None
    if first.trace is not None:
        trace = {
            value: Layer(
                *(joined([part.layers()[value] for part in parts], f.name) for f in fields(Layer))
            )
            for value in first.trace
        }
    return replace(first, **{name: joined(parts, name) for name in names}, trace=trace)


def _targets(given: Sequence[str], images: int) -> list[int | str | None]:
    """A target for each image; None for the predicted class."""
    if len(given) not in (0, 1, images):
        raise ValueError(f"--target: got {len(given)} for {images} images; give one, or {images}")
    targets: list[int | str | None] = [int(t) if t.isdecimal() else t for t in given]
    return targets if len(targets) == images else (targets or [None]) * images


def _is_folder(out: Path) -> bool:
    return out.is_dir() or not out.suffix


def _check_destination(
    out: Path, images: Sequence[Path], methods: Sequence[Method], trace: bool
) -> None:
    """Refuse what could not be written before anything is computed."""
    _check_parent(out)
    if _is_folder(out):
        mixing = [method.id for method in methods if method.whole_batch]
        if mixing and len(images) > 1:
            raise ValueError(
                f"{mixing[0]}: this convention mixes the images of one call, so they need one "
                "output file, not a folder"
            )
        stem, count = Counter(image.stem for image in images).most_common(1)[0]
        if count > 1:
            raise OutputError(f"{count} images are called {stem!r}: their files would collide")
    elif out.suffix.lower() == ".npz":
        if len(methods) > 1:
            raise OutputError(f"cannot write {out}: an .npz holds one method, not {len(methods)}")
    elif out.suffix.lower() not in _FIGURES:
        raise OutputError(
            f"cannot write {out}: choose {', '.join(_FIGURES)}, .npz or a folder without suffix"
        )
    elif trace and len(images) > 1:
        raise OutputError(
            f"cannot write {out}: a strip of layers shows one image, not {len(images)}"
        )


def _check_parent(out: Path) -> None:
    if not out.parent.is_dir():
        raise OutputError(f"cannot write {out}: there is no folder {out.parent}")


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; its files move into `folder` if the block ends without an error."""
    is_new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".rectgrad-", dir=folder)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        with temporary as name:
            yield Path(name)
            for file in sorted(Path(name).iterdir()):
                file.replace(folder / file.name)
    except BaseException:
        if is_new:
            folder.rmdir()
        raise


def _file_name(image: Path, method: Method) -> str:
    return f"{image.stem}_{method.id}.png"


def _draw(results: Sequence[Attribution], trace: bool, path: Path) -> None:
    from . import picture

    figure = picture.layer_strip(results) if trace else picture.side_by_side(results)
    picture.save(figure, path)


def _records(images: Sequence[Path], result: Attribution) -> list[dict[str, Any]]:
    """Plain data about each image's explanation."""
    gap = result.completeness_gap
    return [
        {
            "image": str(image),
            "method": result.method.id,
            "options": result.method.options(),
            "target": int(target),
            "class": result.class_name(target),
            "logit": float(logits[target]),
            "probability": float(result.probabilities[i, target]),
            "completeness_gap": None if gap is None else float(gap[i]),
            "notes": list(result.notes),
        }
        for i, (image, target, logits) in enumerate(
            zip(images, result.target, result.logits, strict=True)
        )
    ]


# --- dataset ------------------------------------------------------------------------------------


@app.command()
@_reporting()
def dataset(
    model: ModelFile,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of pictures, Parquet tables or CIFAR pickles; a Parquet, .npy or Zarr "
            "file; or a pattern in quotes, such as 'photos/**/*.jpg'.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="Folder to write. Of the same job, it is gone on with."),
    ],
    method: Annotated[str, typer.Option("-m", "--method", help="See 'rectgrad methods'.")] = (
        "rectgrad"
    ),
    target: Annotated[
        str | None,
        typer.Option(
            "-t", "--target", help="Class index or name; by default each picture's predicted class."
        ),
    ] = None,
    preset: Preset = "default",
    settings: Settings = None,
    precision: Annotated[
        Literal["float32", "float16"], typer.Option(help="Of the stored maps.")
    ] = "float32",
    chunk_size: Annotated[
        int | None, typer.Option(help="Pictures that are read, explained and written together.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures in one forward pass.")] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="One picture in a forward pass.")
    ] = False,
    backend: BackendName = "auto",
    dtype: Dtype = None,
    preprocess: Preprocessing = None,
    labels: Labels = None,
    input_name: InputName = None,
    output_name: OutputName = None,
    layout: InputLayout = None,
    threads: Annotated[int | None, typer.Option(help="Of each process.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A Ray cluster: local, auto or HOST:PORT."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes on the Ray cluster.")] = None,
    as_json: AsJson = False,
) -> None:
    """Explain every picture of a data set; killed and called again, it goes on."""
    from .dataset import explain_dataset

    (chosen,) = _methods([method], preset, settings or [])
    _check_parent(out)
    with _bar(
        TextColumn("explaining"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    ) as bar:
        bar.speed_estimate_period = 3600  # of slow methods, a chunk takes minutes
        task = bar.add_task("", total=None)
        store = explain_dataset(
            model,
            source,
            out,
            method=chosen,
            target=_targets([target] if target else [], 1)[0],
            precision=precision,
            chunk_size=chunk_size,
            batch_size=batch_size,
            batch_invariant=batch_invariant,
            preprocess=preprocess,
            backend=backend,
            dtype=dtype,
            input=input_name,
            output=output_name,
            labels=labels,
            layout=layout,
            threads=threads,
            ray=ray,
            workers=workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    images, skipped = store.maps.shape[0], store.skipped
    if as_json:
        _print_json({"out": str(out), "images": images, "skipped": skipped, "job": store.job})
        return
    if skipped:
        _tell("warning", f"{skipped} pictures have no map: see status in {out / 'table'}", "yellow")
    print(f"wrote {out}: {images - skipped} maps")


class _Rate(ProgressColumn):
    """Pictures per second, lately."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g}/s")


# --- inspect ------------------------------------------------------------------------------------


@app.command()
@_reporting()
def inspect(
    model: ModelFile,
    method: Annotated[
        str, typer.Option("-m", "--method", help="Whose rules to show.")
    ] = "rectgrad",
    preset: Preset = "default",
    settings: Settings = None,
    backend: BackendName = "auto",
    input_name: InputName = None,
    output_name: OutputName = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's inputs, outputs and nodes, and by which rule the gradient passes each."""
    (chosen,) = _methods([method], preset, settings or [])
    explainer = Explainer(model, backend=backend, input=input_name, output=output_name)
    facts = _facts(explainer)
    try:
        listing = explainer.plan(chosen)
    except UnsupportedOperator:
        nodes = _supported(explainer)
        _show(facts | {"nodes": nodes}, [node["rule"] or "NONE" for node in nodes], as_json)
        raise
    facts |= {"notes": list(listing.notes), "nodes": listing.rows()[::-1]}
    _show(facts, [str(step.rule) for step in reversed(listing.plan.steps)], as_json)


def _facts(explainer: Explainer) -> dict[str, Any]:
    """Plain data about a model and how it was understood."""
    proto, graph = explainer.model.proto, explainer.graph
    weights = {tensor.name for tensor in proto.graph.initializer}
    # After an operator that onnx does not know, the number of classes is not known either.
    classes = None if graph.shapes[graph.logits] is None else graph.classes
    names = None if classes is None else explainer.class_names(classes)
    layers = analysis.activations(graph)
    return {
        **explainer.environment,
        "opset": explainer.model.opset,
        "producer": f"{proto.producer_name} {proto.producer_version}".strip(),
        "inputs": [_described(v) for v in proto.graph.input if v.name not in weights],
        "outputs": [_described(v) for v in proto.graph.output],
        "image": graph.input,
        "image_shape": list(graph.shapes[graph.input] or ()),
        "layout": explainer.layout,
        "scores": graph.logits,
        "head": graph.head,
        "classes": classes,
        "class_names": None if names is None else list(names),
        "layers": [node.outputs[0] for node in analysis.path(graph) if node.name in layers],
    }


def _described(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    return {
        "name": value.name,
        "dtype": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(),
        "shape": [d.dim_param or (d.dim_value or None) for d in tensor.shape.dim],
    }


def _supported(explainer: Explainer) -> list[dict[str, Any]]:
    """The nodes of a model that has no plan; ``rule`` is None where the gradient cannot pass."""
    graph = explainer.graph
    nodes = analysis.path(graph)
    positions = analysis.differentiated(graph, nodes)
    return [
        {
            "node": node.name,
            "op": node.op,
            "rule": "Gradient()"
            if all(find_vjp(node.op, p) for p in positions[node.name])
            else None,
        }
        for node in nodes
    ]


def _show(facts: dict[str, Any], rules: Sequence[str], as_json: bool) -> None:
    if as_json:
        _print_json(facts)
        return
    print(f"{facts['model']}: opset {facts['opset']}, made by {facts['producer'] or '?'}")
    for kind in ("inputs", "outputs"):
        for value in facts[kind]:
            shape = ", ".join("?" if n is None else str(n) for n in value["shape"])
            print(f"{kind[:-1]:8}{value['name']}: {value['dtype']} ({shape})")
    print(f"{'image':8}{facts['image']}, planned for as {tuple(facts['image_shape'])}")
    before = f" (before {facts['head']})" if facts["head"] else ""
    print(f"{'scores':8}{facts['scores']}{before}: {facts['classes'] or '?'} classes")
    print(f"{'layers':8}{len(facts['layers'])} activations")
    print(f"{'backend':8}{facts['backend']}: {facts['forward']}\n")
    _print_table(
        ("node", "operator", "rule", "reads", "runs as"),
        [
            (n["node"], n["op"], rule, ", ".join(n.get("reads", ())), n.get("backend", ""))
            for n, rule in zip(facts["nodes"], rules, strict=True)
        ],
    )
    for note in facts.get("notes", ()):
        _tell("warning", note, "yellow")


# --- export -------------------------------------------------------------------------------------


@app.command()
@_reporting()
def export(
    model: ModelFile,
    out: Annotated[Path, typer.Option("-o", "--out", help="ONNX file to write.")],
    method: Annotated[
        str, typer.Option("-m", "--method", help="What the second output is.")
    ] = "rectgrad",
    preset: Preset = "default",
    settings: Settings = None,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="H W", help="Of the pictures, where the model leaves it open."),
    ] = None,
    input_name: InputName = None,
    output_name: OutputName = None,
) -> None:
    """Write the model with a second output, the map, as one ONNX graph of standard operators."""
    (chosen,) = _methods([method], preset, settings or [])
    write_explainer(model, out, method=chosen, size=size, input=input_name, output=output_name)
    print(f"wrote {out}")


# --- methods ------------------------------------------------------------------------------------


@app.command("methods")
@_reporting()
def list_methods(as_json: AsJson = False) -> None:
    """List the methods and their options."""
    entries: list[dict[str, Any]] = [
        {
            "id": method.id,
            "label": method.label,
            "description": (method.__doc__ or "").partition("\n")[0],
            "options": [
                {
                    "name": field.name,
                    "default": field.default,
                    "values": _grammar(get_type_hints(method)[field.name]),
                }
                for field in fields(method)
            ],
        }
        for method in METHODS.values()
    ]
    if as_json:
        _print_json(entries)
        return
    for entry in entries:
        print(f"{entry['id']}: {entry['description']}")
        options = entry["options"]
        _print_table(
            (), [(f"    {o['name']}={_spelt(o['default'])}", o["values"]) for o in options]
        )


def _methods(names: Sequence[str], preset: str, settings: Sequence[str]) -> list[Method]:
    """The chosen methods, each with those settings that it has."""
    methods = [make_method(name, preset) for name in dict.fromkeys(names)]
    given = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: write NAME=VALUE")
        given[name] = text
    known = {name: None for method in methods for name in method.options()}
    for name in given:
        if name not in known:
            chosen = ", ".join(method.id for method in methods)
            raise ValueError(
                f"--set {name}: no such option of {chosen}; there are {', '.join(known)}"
            )
    return [
        replace(method, **{n: _value(method, n, given[n]) for n in given if n in method.options()})
        for method in methods
    ]


def _value(method: Method, name: str, text: str) -> Any:
    """`text` as a value of that field of the method."""
    kind = get_type_hints(type(method))[name]
    for part in alternatives(kind):
        if part is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if part is NoneType and text.lower() == "none":
            return None
        if get_origin(part) is Literal and text in get_args(part):
            return text
        if part in (int, float):
            try:
                return part(text)
            except ValueError:
                continue
    raise ValueError(f"--set {name}={text}: {method.id} takes {_grammar(kind)}")


def _grammar(kind: Any) -> str:
    """How a value of this type is written."""
    words = {bool: "true | false", NoneType: "none", int: "integer", float: "number"}
    return " | ".join(
        " | ".join(get_args(part)) if get_origin(part) is Literal else words[part]
        for part in alternatives(kind)
        if part is not np.ndarray  # an array cannot be written on a command line
    )


def _spelt(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# --- models and demo ----------------------------------------------------------------------------


@models_app.command("list")
@_reporting()
def list_models(as_json: AsJson = False) -> None:
    """List the models."""
    from .onnx_models.published import MODELS

    if as_json:
        _print_json([asdict(entry) for entry in MODELS])
        return
    _print_table(
        ("name", "kind", "preprocess", "licence", "description"),
        [
            (m.name, m.kind, m.preprocessing, m.licence, f"{m.description}{_caveat(m.download)}")
            for m in MODELS
        ],
    )


def _caveat(download: Download | None) -> str:
    return "" if download is None or download.verified else " Not yet fetched and verified by us."


@models_app.command("get")
@_reporting()
def get_model(
    name: Annotated[str, typer.Argument(help="See 'rectgrad models list'.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where downloads go; the user's cache by default.")
    ] = None,
) -> None:
    """Print the path of a model's file, after downloading it if need be."""
    from .onnx_models import published

    with _bar(BarColumn(), DownloadColumn()) as bar:
        task = bar.add_task("", total=None)
        path = published.get(
            name,
            folder=folder,
            progress=lambda received, total: bar.update(task, completed=received, total=total),
        )
    print(path)


@models_app.command("build")
@_reporting()
def build_model(
    name: Annotated[str, typer.Argument(help="A buildable model of 'rectgrad models list'.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="ONNX file to write.")],
    weights: Annotated[
        Path | None, typer.Option(help="Safetensors file; calibrated random weights by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write a model as an ONNX file and print its path."""
    from .onnx_models import published

    print(published.build(name, out, weights=weights, seed=seed))


@app.command()
@_reporting()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Picture to write.")] = Path(
        "rectgrad_demo.png"
    ),
) -> None:
    """Explain a photograph of a cat with every method."""
    _check_parent(out)
    if out.suffix.lower() not in _FIGURES:
        raise OutputError(f"cannot write {out}: choose {', '.join(_FIGURES)}")
    from .demo import explain_cat

    with _progress(len(METHODS)) as advance:
        results = explain_cat(advance)
        _draw(results, False, out)
    first = results[0]
    probability = first.probabilities[0]
    _print_table(
        ("class", "probability", ""),
        [
            (first.class_name(c), f"{100 * probability[c]:.1f} %", "█" * round(40 * probability[c]))
            for c in np.argsort(-probability)
        ],
    )
    print(f"wrote {out}: {len(results)} methods on why it is a {first.class_name(first.target[0])}")


# --- printing -----------------------------------------------------------------------------------


def _bar(*columns: Any) -> Progress:
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, on a terminal; yields what moves it by a number of explanations."""
    with _bar(TextColumn("explaining"), BarColumn(), MofNCompleteColumn()) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


def _print_json(content: Any) -> None:
    print(json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*head, box=None, pad_edge=False, show_header=bool(head))
    for row in rows:
        table.add_row(*map(Text, row))
    # In a pipe every row is a line.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)
