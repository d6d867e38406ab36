"""Model + method → one ONNX graph of standard operators: image in, scores and map out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from onnx.external_data_helper import set_external_data

from .. import analysis
from ..errors import InvalidModel, UnsupportedOperator
from ..files import atomic_write
from ..graph import Graph, InputSpec, freeze, input_spec, output_name
from ..methods import Method, make_method
from ..model import DAMAGE, Model, ModelSource, read_model
from ..plan import make_plan
from .assembly import ATTRIBUTION, assembled
from .merge import DiffersByBatch, any_batch
from .trace import TARGET, Trace, trace

OPSET = 18  # the first that sums over axes given as an input, in every reduction
_LARGEST = 2 * 10**9  # bytes of weights; with the nodes, protobuf can hold 2**31
_SMALL = 2**10  # bytes, of a tensor that stays in the file
_ALIGNMENT = 2**12  # bytes, of weights that a runtime may map into memory


def export(
    onnx_path: ModelSource,
    out: str | os.PathLike[str],
    *,
    method: str | Method = "rectgrad",
    preset: str = "default",
    size: Sequence[int] | None = None,
    input: str | None = None,
    output: str | None = None,
    **options: Any,
) -> None:
    """Write an explainer: the model, with one more input and one more output.

    Parameters
    ----------
    onnx_path : path, bytes or onnx.ModelProto
    out : path
        The file to write. What would be more than 2 GB, the most that one ONNX file can hold, keeps
        its weights in a second file beside it, ``<out>.data``.
    method, preset, **options
        As in `rectgrad_ref.explain`.
    size : pair of int, optional
        Height and width of the pictures, where the model leaves them open: the percentiles of an
        exported explainer are those of one size.
    input, output : str, optional
        Names of the image input and of the class scores, where the model has several.

    Raises
    ------
    UnsupportedOperator
        A rule cannot be written as ONNX nodes, or the model not brought to opset 18.
    InvalidModel
        The model cannot be explained.
    OutputError
        The file cannot be written.
    ValueError
        The size of the pictures is missing, or given although the model fixes it.

    Notes
    -----
    The file's inputs are the image, as the model has it, and ``target``, int64 (N,): the class of
    each sample, or −1 for the one with the largest score. Its outputs are the model's scores and
    ``attribution``, float32, of the image's shape. It takes any number of samples if the model
    provably treats them one by one and the method's thresholds are those of a sample, else one.
    Its ``metadata_props`` are the model's, and the method with all its conventions.
    """
    proto = explainer_model(
        onnx_path,
        make_method(method, preset, **options),
        size=size,
        input=input,
        output=output,
    )
    # Of the whole, protobuf cannot even tell the size.
    if sum(tensor.ByteSize() for tensor in proto.graph.initializer) <= _LARGEST:
        with atomic_write(out) as path:
            path.write_bytes(proto.SerializeToString())
        return
    weights = Path(f"{out}.data")
    # The inner file is in place first: the outer one never names weights that are not there.
    with atomic_write(out) as path, atomic_write(weights) as beside:
        with beside.open("wb") as file:
            _write_weights(proto, file, weights.name)
        path.write_bytes(proto.SerializeToString())


def _write_weights(proto: onnx.ModelProto, file: BinaryIO, name: str) -> None:
    """Move the weights out of the model, to where the file called `name` is written."""
    for tensor in proto.graph.initializer:
        data = tensor.raw_data  # a copy, each time
        if len(data) >= _SMALL:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            set_external_data(tensor, name, offset=file.tell(), length=len(data))
            file.write(data)
            tensor.ClearField("raw_data")


def explainer_model(
    onnx_path: ModelSource,
    method: Method,
    *,
    size: Sequence[int] | None = None,
    input: str | None = None,
    output: str | None = None,
) -> onnx.ModelProto:
    """What `export` writes."""
    source = read_model(onnx_path)
    model = at_least(source, OPSET)
    image, scores = input_spec(model, input), output_name(model, output)
    shape = _sized(image, size)

    def frozen(batch: int) -> Graph:
        return freeze(model, (batch, *shape), input=image.name, output=scores)

    if not method.passes:
        raise UnsupportedOperator(f"{method.id}: no map that a network has part in, to export")
    graph, parts = _traced(frozen, method)
    if graph.batch == 1 and image.shape[0] not in (None, 1):
        raise InvalidModel(
            f"{model.name}: its batch of {image.shape[0]} samples is not provably one of "
            "independent samples; export it with a symbolic batch, or one of 1"
        )
    taken = {TARGET, ATTRIBUTION} & graph.shapes.keys()
    if taken:
        raise InvalidModel(
            f"{model.name} has a value called {taken.pop()!r}, as an explainer calls one of its "
            "own; rename it"
        )
    return assembled(source, graph, method, parts)


def at_least(model: Model, opset: int) -> Model:
    """The model in an opset that has what the backward half needs."""
    if model.opset >= opset:
        return model
    try:
        proto = onnx.version_converter.convert_version(model.proto, opset)
    except (*DAMAGE, onnx.version_converter.ConvertError) as error:
        raise UnsupportedOperator(
            f"{model.name}: onnx.version_converter cannot bring it from opset {model.opset} to "
            f"{opset}, which an exported explainer needs: {error}"
        ) from error
    return replace(model, proto=proto, opset=opset)


def _sized(image: InputSpec, size: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one sample."""
    open_axes = [i for i, n in enumerate(image.shape) if n is None and i > 0]
    if not open_axes and size is None:
        return tuple(n for n in image.shape[1:] if n is not None)
    if size is None:
        raise ValueError(
            f"the input {image.name!r} of shape {image.shape} fixes no height and width; give "
            "size=(H, W) (--size H W)"
        )
    if len(open_axes) != len(size):
        raise ValueError(f"size={tuple(size)} does not fit the open axes of shape {image.shape}")
    shape = list(image.shape)
    for axis, extent in zip(open_axes, size, strict=True):
        shape[axis] = extent
    return tuple(n for n in shape[1:] if n is not None)


def _traced(frozen: Callable[[int], Graph], method: Method) -> tuple[Graph, Trace]:
    """The backward half for any number of samples, if there is one, else for one."""
    try:
        two = frozen(2)
        if analysis.is_samplewise(two):
            return two, any_batch(_trace(two, method), _trace(frozen(3), method))
    except (InvalidModel, UnsupportedOperator, DiffersByBatch):
        pass  # one sample may do, or tell what is the matter
    one = frozen(1)
    return one, _trace(one, method)


def _trace(graph: Graph, method: Method) -> Trace:
    straight_through = method.quantization == "straight_through"
    plan = make_plan(graph, method.rules(graph), straight_through=straight_through)
    return trace(plan, method)
