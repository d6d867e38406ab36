"""Model + method → one ONNX graph of standard operators: image in, scores and map out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .. import analysis
from ..attribution import plain
from ..errors import InvalidModel, OutputError, UnsupportedOperator
from ..files import atomic_write
from ..forward import with_bodies
from ..graph import Graph, InputSpec, freeze, input_spec, output_name, sorted_nodes
from ..methods import Method, make_method
from ..model import DAMAGE, Model, ModelSource, read_model
from ..plan import make_plan
from .tensor import Record
from .trace import Trace, at_baseline, trace

OPSET = 18  # the first that sums over axes given as an input, in every reduction
_LARGEST = 2**31 - 1  # bytes, of a file that protobuf can hold
_TARGET, _ATTRIBUTION = "target", "attribution"


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
        The file to write.
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
    if proto.ByteSize() > _LARGEST:
        raise OutputError(f"cannot write {out}: an ONNX file without external data ends at 2 GB")
    with atomic_write(out) as path:
        Path(path).write_bytes(proto.SerializeToString())


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

    if method.passes != 1:
        raise UnsupportedOperator(
            f"{method.id} is no single pass back through the network; `rectgrad explain` runs it"
        )
    graph, parts = _traced(frozen, method)
    if graph.batch == 1 and image.shape[0] not in (None, 1):
        raise InvalidModel(
            f"{model.name}: its batch of {image.shape[0]} samples is not provably one of "
            "independent samples; export it with a symbolic batch, or one of 1"
        )
    return _assembled(source, graph, method, parts)


def at_least(model: Model, opset: int) -> Model:
    """The model in an opset that has what the backward half needs."""
    if model.opset >= opset:
        return model
    try:
        proto = onnx.version_converter.convert_version(model.proto, opset)
    except DAMAGE as error:
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


# --- batches ------------------------------------------------------------------------------------


class _DiffersByBatch(Exception):
    """The nodes for two batch sizes differ in more than the extent of the sample axis."""


def _traced(frozen: Callable[[int], Graph], method: Method) -> tuple[Graph, Trace]:
    """The backward half for any number of samples, if there is one, else for one."""
    try:
        two = frozen(2)
        if analysis.is_samplewise(two):
            return two, _for_any_batch(_trace(two, method), _trace(frozen(3), method))
    except (InvalidModel, UnsupportedOperator, _DiffersByBatch):
        pass  # one sample may do, or tell what is the matter
    one = frozen(1)
    return one, _trace(one, method)


def _trace(graph: Graph, method: Method) -> Trace:
    straight_through = method.quantization == "straight_through"
    plan = make_plan(graph, method.rules(graph), straight_through=straight_through)
    return trace(plan, method, _TARGET)


def _for_any_batch(two: Trace, three: Trace) -> Trace:
    """What differs between batches of two and three samples is the batch."""
    if len(two.records) != len(three.records):
        raise _DiffersByBatch
    records = [_merged(a, b) for a, b in zip(two.records, three.records, strict=True)]
    return replace(two, records=records)


def _merged(a: Record, b: Record) -> Record:
    if (a.op, a.outputs, a.attributes) != (b.op, b.outputs, b.attributes):
        raise _DiffersByBatch
    inputs = (_one(a.op, x, y) for x, y in zip(a.inputs, b.inputs, strict=True))
    return replace(a, inputs=tuple(inputs))


_BROADCAST = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Where", "And", "Or", "Greater", "Less"}


def _one(op: str, x: str | np.ndarray, y: str | np.ndarray) -> str | np.ndarray:
    if isinstance(x, str) or isinstance(y, str):
        if not (isinstance(x, str) and x == y):
            raise _DiffersByBatch
        return x
    if np.array_equal(x, y):
        return x
    if op == "Reshape" and x.shape == y.shape and np.sum(x != y) == 1:
        return np.where(x == y, x, -1)
    repeats = x.ndim == y.ndim and bool(np.all(x == x[:1])) and np.array_equal(x[:1], y[:1])
    if op in _BROADCAST and repeats:
        return x[:1]
    raise _DiffersByBatch


# --- the file -----------------------------------------------------------------------------------


def _assembled(source: Model, graph: Graph, method: Method, parts: Trace) -> onnx.ModelProto:
    """The model's own nodes, and after them the backward half."""
    model, name = graph.model, graph.input
    forward = [*sorted_nodes(model, graph.output, name)]
    initializers = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    records = _needed(parts.records, parts.attribution)
    reads = {v for record in records for v in record.inputs if isinstance(v, str)}
    forward = [*with_bodies(forward, graph.bodies, tuple(reads))]
    start = method.reference_input(np.zeros((1, *_sample(graph)), np.float32))
    if start is not None:
        tensor = numpy_helper.from_array(start.astype(graph.dtypes[name]), at_baseline(name))
        initializers[tensor.name] = tensor
        forward += _repeated(forward, {name}, at_baseline, reads)
    there = {*initializers, name, _TARGET, *(v for node in forward for v in node.output)}
    constants = _Constants({id(array): v for v, array in model.initializers.items()})
    for value in sorted(reads & graph.constants.keys() - there):
        constants.add(graph.constants[value], value)
    nodes = [_node(record, constants) for record in records]
    nodes.append(helper.make_node("Identity", [parts.attribution], [_ATTRIBUTION]))
    used = {v for node in (*forward, *nodes) for v in node.input}
    proto = helper.make_model(
        helper.make_graph(
            [*forward, *nodes],
            model.proto.graph.name or "explainer",
            _inputs(graph),
            _outputs(graph),
            [t for v, t in initializers.items() if v in used] + constants.tensors,
        ),
        producer_name="rectgrad_ref",
        ir_version=max(model.proto.ir_version, 8),
        opset_imports=model.proto.opset_import,
        functions=list(model.proto.functions),
    )
    helper.set_model_props(proto, {**source.metadata, **_conventions(source, graph, method)})
    return proto


def _repeated(
    nodes: Sequence[onnx.NodeProto],
    varied: set[str],
    renamed: Callable[[str], str],
    wanted: Collection[str],
) -> list[onnx.NodeProto]:
    """Copies of the nodes between the values `varied` and those that are `wanted` renamed."""
    for node in nodes:
        if varied.intersection(node.input):
            varied.update(filter(None, node.output))
    missing, copies = set(wanted), list[onnx.NodeProto]()
    for node in reversed(nodes):
        if varied.intersection(node.output) and missing.intersection(map(renamed, node.output)):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = renamed(node.name)
            copy.input[:] = [renamed(v) if v in varied else v for v in node.input]
            copy.output[:] = [renamed(v) if v else v for v in node.output]
            missing.update(copy.input)
            copies.append(copy)
    return copies[::-1]


def _needed(records: Iterable[Record], value: str) -> list[Record]:
    """Without what nothing reads."""
    wanted, needed = {value}, []
    for record in reversed([*records]):
        if wanted.intersection(record.outputs):
            wanted.update(v for v in record.inputs if isinstance(v, str))
            needed.append(record)
    return needed[::-1]


class _Constants:
    """Initializers to add: each array once, and none that the model has."""

    def __init__(self, names: dict[int, str]) -> None:
        self._by_id = names
        self._by_content: dict[tuple[Any, ...], str] = {}
        self.tensors: list[TensorProto] = []

    def add(self, array: np.ndarray, name: str | None = None) -> str:
        if id(array) in self._by_id and name is None:
            return self._by_id[id(array)]
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._by_content or name is not None:
            chosen = name or f"{_ATTRIBUTION}/constant_{len(self.tensors)}"
            self.tensors.append(
                numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), chosen)
            )
            self._by_content[key] = chosen
        return self._by_content[key]


def _node(record: Record, constants: _Constants) -> onnx.NodeProto:
    inputs = [v if isinstance(v, str) else constants.add(v) for v in record.inputs]
    name = record.outputs[0].removesuffix("_0")
    return helper.make_node(record.op, inputs, record.outputs, name=name, **record.attributes)


def _inputs(graph: Graph) -> list[onnx.ValueInfoProto]:
    (image,) = (v for v in graph.model.proto.graph.input if v.name == graph.input)
    batch = _batch(graph)
    kind = image.type.tensor_type.elem_type
    return [
        helper.make_tensor_value_info(image.name, kind, [batch, *_sample(graph)]),
        helper.make_tensor_value_info(_TARGET, TensorProto.INT64, [batch]),
    ]


def _outputs(graph: Graph) -> list[onnx.ValueInfoProto]:
    (scores,) = (v for v in graph.model.proto.graph.output if v.name == graph.output)
    kind, batch = scores.type.tensor_type.elem_type, _batch(graph)
    classes = (graph.shapes[scores.name] or ())[1:]
    return [
        helper.make_tensor_value_info(scores.name, kind, [batch, *classes]),
        helper.make_tensor_value_info(_ATTRIBUTION, TensorProto.FLOAT, [batch, *_sample(graph)]),
    ]


def _sample(graph: Graph) -> tuple[int, ...]:
    """The shape of one."""
    return (graph.shapes[graph.input] or ())[1:]


def _batch(graph: Graph) -> str | int:
    """The extent of the sample axis: symbolic, where the graph is for two."""
    return 1 if graph.batch == 1 else "N"


def _conventions(source: Model, graph: Graph, method: Method) -> dict[str, str]:
    """What it takes to know what the map is."""
    from .. import __version__

    facts = {
        "method": method.id,
        "options": json.dumps(plain(method.options()), ensure_ascii=False),
        "notes": json.dumps(method.notes(graph), ensure_ascii=False),
        "scores": graph.logits,
        "model": source.name,
        "sha256": source.sha256,
        "rectgrad_ref": __version__,
    }
    return {f"{_ATTRIBUTION}.{key}": value for key, value in facts.items()}
