"""The file: the model's own nodes, and after them those of a trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..attribution import plain
from ..forward import with_bodies
from ..graph import Graph, sorted_nodes
from ..methods import Method
from ..model import Model
from .tensor import Record
from .trace import CONDITION, ITERATION, NEXT, TARGET, TOTAL, Trace, at_baseline, in_graph, in_pass

ATTRIBUTION = "attribution"


def assembled(source: Model, graph: Graph, method: Method, parts: Trace) -> onnx.ModelProto:
    """The explainer.

    Parameters
    ----------
    source : Model
        The model as it was given, whose metadata are kept.
    graph : Graph
        The one that was traced.
    """
    model, image = graph.model, graph.input
    initializers = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    records = _needed(parts.records, parts.attribution)
    reads = _reads(records)
    names = tuple(map(in_graph, reads))
    forward = [*with_bodies(sorted_nodes(model, graph.output, image), graph.bodies, names)]
    start = method.reference_input(np.zeros((1, *_sample(graph)), np.float32))
    if start is not None:
        tensor = numpy_helper.from_array(start.astype(graph.dtypes[image]), at_baseline(image))
        initializers[tensor.name] = tensor
    contrasted = _repeated(forward, image, at_baseline, reads)
    there = {*initializers, *(v for node in forward for v in node.output)}
    constants = _Constants({id(array): v for v, array in model.initializers.items()})
    for value in sorted((reads | _values_read(forward)) & graph.constants.keys() - there):
        constants.add(graph.constants[value], value)
    nodes = [*forward, *contrasted, *_nodes(records, constants, forward, image)]
    nodes.append(helper.make_node("Identity", [parts.attribution], [ATTRIBUTION]))
    used = _values_read(nodes)
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            model.proto.graph.name or "explainer",
            _inputs(graph),
            _outputs(graph),
            [t for v, t in initializers.items() if v in used] + constants.tensors,
        ),
        producer_name="rectgrad_ref",
        ir_version=max(model.proto.ir_version, 8),
        opset_imports=model.proto.opset_import,
    )
    helper.set_model_props(proto, {**source.metadata, **_conventions(source, graph, method)})
    return proto


def _needed(records: Iterable[Record], *values: str) -> list[Record]:
    """Without what nothing reads."""
    wanted, needed = {*values}, []
    for record in reversed([*records]):
        if wanted.intersection(record.outputs):
            wanted |= _reads([record])
            needed.append(record)
    return needed[::-1]


def _reads(records: Iterable[Record]) -> set[str]:
    """Values that the records read, or those in their bodies."""
    found: set[str] = set()
    for record in records:
        found.update(v for v in record.inputs if isinstance(v, str))
        found = found.union(*map(_reads, record.bodies))
    return found


def _values_read(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        found.update(node.input)
        for attribute in node.attribute:
            found |= _values_read(attribute.g.node)
    return found


def _repeated(
    nodes: Sequence[onnx.NodeProto],
    image: str,
    renamed: Callable[[str], str],
    wanted: Collection[str],
) -> list[onnx.NodeProto]:
    """Copies of the nodes between the image and those values that are `wanted`, all renamed."""
    varied = {image}
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
            chosen = name or f"{ATTRIBUTION}/constant_{len(self.tensors)}"
            contiguous = np.asarray(array, order="C")
            self.tensors.append(numpy_helper.from_array(contiguous, chosen))
            self._by_content[key] = chosen
        return self._by_content[key]


def _nodes(
    records: Iterable[Record], constants: _Constants, forward: Sequence[onnx.NodeProto], image: str
) -> list[onnx.NodeProto]:
    nodes = []
    for record in records:
        inputs = [v if isinstance(v, str) else constants.add(v) for v in record.inputs]
        attributes = dict(record.attributes)
        if record.op == "Loop":
            (body,) = record.bodies
            attributes["body"] = _body(body, constants, forward, image)
        elif record.op == "If":
            for branch, body in zip(("then_branch", "else_branch"), record.bodies, strict=True):
                attributes[branch] = _branch(body, constants, forward, image)
        name = record.outputs[0].removesuffix("_0")
        nodes.append(helper.make_node(record.op, inputs, record.outputs, name=name, **attributes))
    return nodes


def _branch(
    records: Sequence[Record], constants: _Constants, forward: Sequence[onnx.NodeProto], image: str
) -> onnx.GraphProto:
    """Of an If; its value is that of the last record."""
    (result,) = records[-1].outputs
    nodes = _nodes(_needed(records, result), constants, forward, image)
    output = helper.make_tensor_value_info(result, TensorProto.FLOAT, None)
    return helper.make_graph(nodes, "branch", [], [output])


def _body(
    records: Sequence[Record], constants: _Constants, forward: Sequence[onnx.NodeProto], image: str
) -> onnx.GraphProto:
    """One pass: the point, the network there, the way back, the sum."""
    needed = _needed(records, in_pass(image), NEXT)
    begin = next(i for i, r in enumerate(needed) if in_pass(image) in r.outputs) + 1
    nodes = [
        *_nodes(needed[:begin], constants, forward, image),
        *_repeated(forward, image, in_pass, _reads(needed)),
        *_nodes(needed[begin:], constants, forward, image),
        helper.make_node("Identity", [CONDITION], [f"{CONDITION}/next"]),
    ]
    inputs = [
        helper.make_tensor_value_info(ITERATION, TensorProto.INT64, []),
        helper.make_tensor_value_info(CONDITION, TensorProto.BOOL, []),
        helper.make_tensor_value_info(TOTAL, TensorProto.FLOAT, None),
    ]
    outputs = [
        helper.make_tensor_value_info(f"{CONDITION}/next", TensorProto.BOOL, []),
        helper.make_tensor_value_info(NEXT, TensorProto.FLOAT, None),
    ]
    return helper.make_graph(nodes, "pass", inputs, outputs)


def _inputs(graph: Graph) -> list[onnx.ValueInfoProto]:
    (image,) = (v for v in graph.model.proto.graph.input if v.name == graph.input)
    batch = _batch(graph)
    kind = image.type.tensor_type.elem_type
    return [
        helper.make_tensor_value_info(image.name, kind, [batch, *_sample(graph)]),
        helper.make_tensor_value_info(TARGET, TensorProto.INT64, [batch]),
    ]


def _outputs(graph: Graph) -> list[onnx.ValueInfoProto]:
    (scores,) = (v for v in graph.model.proto.graph.output if v.name == graph.output)
    kind, batch = scores.type.tensor_type.elem_type, _batch(graph)
    classes = (graph.shapes[scores.name] or ())[1:]
    return [
        helper.make_tensor_value_info(scores.name, kind, [batch, *classes]),
        helper.make_tensor_value_info(ATTRIBUTION, TensorProto.FLOAT, [batch, *_sample(graph)]),
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
    return {f"{ATTRIBUTION}.{key}": value for key, value in facts.items()}
