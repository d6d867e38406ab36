"""A model at one batch size → a frozen graph: nodes in order, every shape known, constants folded.

Everything below the graph sees one dialect of ONNX (`opsets.py`), in which each node knows the
shapes of what it reads and writes. Value names are those of the file, so that onnxruntime can be
asked for any of them and a trace can be compared with another program's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from . import opsets
from .errors import InvalidModel, UnsupportedOperator
from .expand import key, written_out
from .model import DAMAGE, MOST_WRITTEN, Model
from .opsets import Shape
from .patterns import fuse
from .rules import OPERATORS
from .rules.registry import find_vjp

# Constants up to this size may decide shapes (Reshape, Slice, Pad …) and are shown to inference.
_DECIDES_SHAPES = 64
# Cells of constants that are computed here, besides so many for each cell of the file's weights: a
# few bytes can ask for any number of them.
_MOST_FOLDED, _FOLDED_PER_WEIGHT = 2**27, 16
# Products of a convolution of constants: seconds.
_MOST_PRODUCTS = 2**33
_PASS_THROUGH = {
    "Flatten",
    "Reshape",
    "Identity",
    "Cast",
    "Squeeze",
    "Dropout",
    "ai.onnx.ml.ZipMap",
}
_HEADS = {"Softmax", "LogSoftmax", "Sigmoid"}
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli"}


@dataclass(frozen=True, eq=False)
class Node:
    """One operator of the graph.

    Attributes
    ----------
    op : str
        ONNX operator type.
    name : str
        Unique; the file's own node name where that is.
    inputs, outputs : tuple of str
        Value names; an omitted optional input is ``""``.
    attributes : mapping
        In the newest opset's form, all defaults filled in.
    input_shapes, output_shapes : tuple of tuple of int
        ``()`` for an omitted input. The plan refuses nodes whose shapes depend on data.
    constants : tuple of numpy.ndarray or None
        The inputs that are constant, by position; None for the others.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    input_shapes: tuple[Shape, ...]
    output_shapes: tuple[Shape, ...]
    constants: tuple[np.ndarray | None, ...] = ()

    def __getitem__(self, attribute: str) -> Any:
        return self.attributes[attribute]

    def __str__(self) -> str:
        return f"{self.op} {self.name!r}"


@dataclass(frozen=True, eq=False)
class Graph:
    """A frozen classifier at one batch size.

    Attributes
    ----------
    model : Model
    batch : int
    nodes : tuple of Node
        In topological order.
    constants : mapping of str to numpy.ndarray
        Initializers and whatever follows from constants and shapes alone.
    shapes : mapping of str to tuple of int or None
        Of every value.
    dtypes : mapping of str to numpy.dtype
        As the file declares them.
    input, output, logits : str
        Value names: the image, the model's output and the class scores that are attributed, that
        is, the output or what enters its closing Softmax, LogSoftmax or Sigmoid.
    head : str or None
        Operator type of that closing node.
    bodies : mapping of str to tuple of onnx.NodeProto
        First output of a node of the file that was written out (`expand.py`) → what replaces it.
    facts : dict
        What `analysis` has proven so far.
    """

    model: Model
    batch: int
    nodes: tuple[Node, ...]
    constants: Mapping[str, np.ndarray]
    shapes: Mapping[str, Shape | None]
    dtypes: Mapping[str, np.dtype[Any]]
    input: str
    output: str
    logits: str
    head: str | None
    bodies: Mapping[str, tuple[onnx.NodeProto, ...]]
    facts: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """Value name → the node that computes it."""
        return {value: node for node in self.nodes for value in node.outputs if value}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Node, ...]]:
        """Value name → the nodes that read it."""
        found: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                found[value].append(node)
        return {value: tuple(nodes) for value, nodes in found.items()}

    @cached_property
    def classes(self) -> int:
        """Number of class scores per sample.

        Raises
        ------
        InvalidModel
            It is unknown; a plan says because of which operator.
        """
        shape = self.shapes[self.logits]
        if shape is None:
            raise InvalidModel(
                f"{self.model.name}: the shape of the class scores {self.logits!r} depends on the "
                "data, or on an operator that onnx does not know"
            )
        return int(np.prod(shape)) // self.batch

    @cached_property
    def quantized(self) -> frozenset[str]:
        """Integers that stand for floating-point values, by QuantizeLinear."""
        found: set[str] = set()
        for node in self.nodes:
            if node.op == "QuantizeLinear" or found.intersection(node.inputs[:1]):
                kind = self.dtypes.get(node.outputs[0])
                if kind is not None and kind.kind in "iu" and kind.itemsize < 4:
                    found.add(node.outputs[0])
        return frozenset(found)

    def is_float(self, value: str) -> bool:
        """Whether a gradient can flow through the value; of an unknown type it may."""
        if value in self.quantized:
            return True
        return value not in self.dtypes or np.issubdtype(self.dtypes[value], np.floating)


@dataclass(frozen=True)
class InputSpec:
    """The image input as the file declares it.

    Attributes
    ----------
    name : str
    shape : tuple of int or None
        None for a symbolic extent; axis 0 is the batch.
    dtype : numpy.dtype
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


def input_spec(model: Model, name: str | None = None) -> InputSpec:
    """The model's image input.

    Raises
    ------
    InvalidModel
        No such input, several inputs and none chosen, or one that is not a floating-point tensor
        with a batch axis.
    """
    initializers = {tensor.name for tensor in model.proto.graph.initializer}
    candidates = {v.name: v for v in model.proto.graph.input if v.name not in initializers}
    if name is None and len(candidates) != 1:
        raise InvalidModel(
            f"{model.name} has {len(candidates)} inputs ({', '.join(candidates) or 'none'}); "
            "choose the image by input=NAME (--input-name)"
        )
    if name is not None and name not in candidates:
        raise InvalidModel(f"{model.name} has no input {name!r}; it has {', '.join(candidates)}")
    chosen = candidates[name] if name is not None else next(iter(candidates.values()))
    tensor = chosen.type.tensor_type
    if not tensor.HasField("shape") or len(tensor.shape.dim) < 2:
        raise InvalidModel(f"{model.name}: input {chosen.name!r} has no batch and feature axes")
    dtype = _numpy_dtype(tensor.elem_type)
    if dtype is None or not np.issubdtype(dtype, np.floating):
        raise InvalidModel(
            f"{model.name}: input {chosen.name!r} is not floating-point ({dtype}); "
            "a gradient with respect to it does not exist"
        )
    # Some exporters write 0 or -1 where they mean a symbolic extent.
    shape = tuple(d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim)
    return InputSpec(chosen.name, shape, dtype)


def output_name(model: Model, name: str | None = None) -> str:
    """The model's class scores, as the file calls them.

    Raises
    ------
    InvalidModel
        No such output, or several and none chosen.
    """
    names = [v.name for v in model.proto.graph.output]
    if name is None and len(names) != 1:
        raise InvalidModel(
            f"{model.name} has {len(names)} outputs ({', '.join(names) or 'none'}); "
            "choose the class scores by output=NAME (--output-name)"
        )
    if name is not None and name not in names:
        raise InvalidModel(f"{model.name} has no output {name!r}; it has {', '.join(names)}")
    return name if name is not None else names[0]


def freeze(
    model: Model, input_shape: Shape, *, input: str | None = None, output: str | None = None
) -> Graph:
    """Fix the graph for inputs of `input_shape`; axis 0 is the batch.

    Raises
    ------
    InvalidModel
        A cyclic or broken graph, shapes that do not fit, or an output that is no class score.
    """
    image = input_spec(model, input)
    scores = output_name(model, output)
    builder = _Builder(model, image, input_shape)
    for proto in sorted_nodes(model, scores, image.name):
        builder.add(proto)
    graph = builder.graph(scores)
    _check_scores(graph)
    return graph


class _Builder:
    """Carries shapes, types and constants along the nodes, in topological order."""

    def __init__(self, model: Model, image: InputSpec, input_shape: Shape) -> None:
        self.model = model
        self.image = image
        self.batch = input_shape[0]
        self.nodes: list[Node] = []
        self.names: set[str] = set()
        self.bodies: dict[str, tuple[onnx.NodeProto, ...]] = {}
        self.written = 0
        self.constants = dict(model.initializers)
        weights = sum(value.size for value in self.constants.values())
        self.room = _MOST_FOLDED + _FOLDED_PER_WEIGHT * weights
        self.types = {name: _tensor_type(a.dtype, a.shape) for name, a in self.constants.items()}
        self.types[image.name] = _tensor_type(image.dtype, input_shape)

    def add(self, proto: onnx.NodeProto) -> None:
        """A node of the file."""
        try:
            nodes = self._add(proto)
        except (InvalidModel, UnsupportedOperator):
            raise
        except DAMAGE as error:
            raise InvalidModel(
                f"{self.model.name}: {proto.op_type} {proto.name or key(proto)!r} is damaged: "
                f"{error}"
            ) from error
        if nodes != [proto]:
            self.bodies[key(proto)] = tuple(nodes)

    def _add(self, proto: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Add the node or what it stands for; returns what was added."""
        body = written_out(proto, self.model.opset, self.types, self.constants)
        if body is None:
            self._add_one(proto)
            return [proto]
        return [node for inner in self._checked(proto, body) for node in self._add(inner)]

    def _checked(
        self, proto: onnx.NodeProto, body: Iterator[onnx.NodeProto]
    ) -> Iterator[onnx.NodeProto]:
        """`body`, with errors that name the model."""
        try:
            for node in body:
                self.written += 1
                if self.written > MOST_WRITTEN:
                    raise UnsupportedOperator(
                        f"{proto.op_type} {proto.name or key(proto)!r}: written out, the model has "
                        f"more than {MOST_WRITTEN} nodes"
                    )
                yield node
        except UnsupportedOperator as error:
            raise UnsupportedOperator(f"{self.model.name}: {error}") from error

    def _add_one(self, proto: onnx.NodeProto) -> None:
        if not key(proto):
            return  # nothing comes of it
        self._infer(proto)
        node = self._modernise(proto)
        self._ignore_windows(node)
        node = self._with_output_shapes(node)
        array = self._fold(node)
        if array is None:
            self._measure(node)
            self.nodes.append(self._with_output_shapes(node))
            self._check_reshape(self.nodes[-1])
            return
        for name, value in zip(node.outputs, array, strict=False):
            if name:
                self._constant(name, np.asarray(value))

    def graph(self, output: str) -> Graph:
        producer = {value: node for node in self.nodes for value in node.outputs}
        if output not in producer:
            raise InvalidModel(
                f"{self.model.name}: the output {output!r} does not depend on the input "
                f"{self.image.name!r}"
            )
        logits, head = _find_logits(output, producer)
        return Graph(
            model=self.model,
            batch=self.batch,
            nodes=fuse(self.nodes, {logits, output}),
            constants=MappingProxyType(self.constants),
            shapes={name: self._shape(name) for name in self.types},
            dtypes={name: d for name in self.types if (d := self._dtype(name)) is not None},
            input=self.image.name,
            output=output,
            logits=logits,
            head=head,
            bodies=MappingProxyType(self.bodies),
        )

    def _modernise(self, proto: onnx.NodeProto) -> Node:
        opset = self.model.opset
        op = f"{proto.domain}.{proto.op_type}" if proto.domain else proto.op_type
        # What its sub-graphs read from outside is an input of a node as well.
        inputs = [*proto.input, *(v for v in _captured(proto) if v in self.types)]
        name = self._unique(proto.name or key(proto))
        try:
            values = opsets.attributes(proto, opset)
        except DAMAGE as error:
            raise InvalidModel(
                f"{self.model.name}: an attribute of {op} {name!r} is damaged: {error}"
            ) from error
        first = self._dtype(inputs[0]) if inputs else None
        moved = opsets.attributes_to_inputs(
            op, opset, inputs, values, first or np.dtype(np.float32)
        )
        for position, constant in moved.items():
            inputs += [""] * (position + 1 - len(inputs))
            inputs[position] = f"{key(proto)}/{position}"
            self._constant(inputs[position], constant)
        op = opsets.modern(op, opset, inputs, values)
        shapes = [self._shape(value) or () for value in inputs]
        opsets.settle(op, opset, values, shapes)
        constants = tuple(self.constants.get(value) for value in inputs)
        return Node(
            op, name, tuple(inputs), tuple(proto.output), values, tuple(shapes), (), constants
        )

    def _unique(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

    def _constant(self, name: str, value: np.ndarray) -> None:
        self.constants[name] = value
        self.types[name] = _tensor_type(value.dtype, value.shape)

    def _fold(self, node: Node) -> tuple[np.ndarray, ...] | None:
        """The outputs, where they follow from constants and shapes alone."""
        if node.op in ("Shape", "Size") and self._shape(node.inputs[0]) is not None:
            arguments: list[np.ndarray | None] = [np.broadcast_to(0, node.input_shapes[0])]
        elif node.op in _RANDOM or any(v and v not in self.constants for v in node.inputs):
            return None
        else:
            arguments = [self.constants[v] if v else None for v in node.inputs]
        if node.op not in OPERATORS:
            return None
        self._require_room(node, node.output_shapes)
        window = math.prod(node.attributes.get("kernel_shape", ()))
        if window * max(map(math.prod, node.output_shapes), default=0) > _MOST_PRODUCTS:
            raise InvalidModel(
                f"{self.model.name}: {node} is applied to constants, and too large for that"
            )
        try:
            result = OPERATORS[node.op].forward(node, *arguments)
        except DAMAGE as error:
            raise InvalidModel(f"{self.model.name}: {node} cannot be computed: {error}") from error
        arrays = result if isinstance(result, tuple) else (result,)
        cells = sum(array.size for array in arrays)
        self.room += _FOLDED_PER_WEIGHT * cells if node.op == "Constant" else -cells
        return arrays

    def _require_room(self, node: Node, shapes: Collection[Shape]) -> None:
        if any(math.prod(shape) > self.room for shape in shapes):
            raise InvalidModel(
                f"{self.model.name}: {node} takes or makes an array of shape "
                f"{max(shapes, key=math.prod)}; its constants would be far larger than its weights"
            )

    def _with_output_shapes(self, node: Node) -> Node:
        return replace(node, output_shapes=tuple(self._shape(v) or () for v in node.outputs))

    def _ignore_windows(self, node: Node) -> None:
        """Of ``ceil_mode``, the windows that begin behind the image.

        Pooling operators ignore them (ONNX), but onnx's inference counts them in older opsets.
        """
        shapes = [self._shape(value) for value in (*node.inputs[:1], *node.outputs[:1])]
        if not node.attributes.get("ceil_mode") or None in shapes:
            return
        before, after = (shape for shape in shapes if shape is not None)
        # Window o begins at o · stride, the image at its pad.
        most = (
            -(-(n + pad) // stride)
            for n, pad, stride in zip(before[2:], node["pads"], node["strides"], strict=False)
        )
        shape = (*after[:2], *map(min, after[2:], most))
        for value in filter(None, node.outputs):
            self.types[value] = _tensor_type(self._dtype(value) or np.dtype(np.float32), shape)

    def _measure(self, node: Node) -> None:
        """Shapes that onnx leaves open although constants decide them, from a trial on zeros."""
        inferred = all(self._shape(v) is not None for v in node.outputs if v)
        unknown = any(self._shape(v) is None for v in node.inputs if v)
        if inferred or unknown or node.op not in OPERATORS:
            return
        self._require_room(node, node.input_shapes)
        arguments: list[np.ndarray | None] = []
        for i, value in enumerate(node.inputs):
            if not value or value in self.constants:
                arguments.append(self.constants.get(value))
            elif find_vjp(node.op, i) is None:
                return
            else:
                arguments.append(np.zeros(node.input_shapes[i], self._dtype(value)))
        results = OPERATORS[node.op].forward(node, *arguments)
        for value, array in zip(
            node.outputs, results if isinstance(results, tuple) else (results,), strict=False
        ):
            self.types[value] = _tensor_type(array.dtype, array.shape)

    def _infer(self, proto: onnx.NodeProto) -> None:
        definition = opsets.schema(proto.op_type, self.model.opset, proto.domain)
        missing = [v for v in proto.input if v and v not in self.types]
        if missing:
            others = {v.name for v in self.model.proto.graph.input}
            raise InvalidModel(
                f"{self.model.name}: {proto.op_type} {proto.name or key(proto)!r} reads "
                f"{missing[0]!r}, "
                + (
                    "a second input; models of one input can be explained"
                    if missing[0] in others
                    else "which no node, input or initializer provides"
                )
            )
        if definition and not definition.min_input <= len(proto.input) <= definition.max_input:
            raise InvalidModel(
                f"{self.model.name}: {proto.op_type} {proto.name or key(proto)!r} does not fit: it "
                f"has {len(proto.input)} inputs, not {definition.min_input} to "
                f"{definition.max_input}"
            )
        types = {v: self.types[v] for v in proto.input if v}
        if definition is None or any(t.WhichOneof("value") is None for t in types.values()):
            # After an operator that onnx does not know; refused by the plan, if on the path.
            self.types.update((v, onnx.TypeProto()) for v in proto.output)
            return
        data = {
            v: numpy_helper.from_array(np.asarray(self.constants[v], order="C"), v)
            for v in proto.input
            if v in self.constants and self.constants[v].size <= _DECIDES_SHAPES
        }
        try:
            found = shape_inference.infer_node_outputs(definition, proto, types, data)
        except DAMAGE as error:
            raise InvalidModel(
                f"{self.model.name}: {proto.op_type} {proto.name or key(proto)!r} does not fit "
                f"inputs of shape {', '.join(str(self._shape(v)) for v in proto.input)}: {error}"
            ) from error
        self.types.update((v, found.get(v, onnx.TypeProto())) for v in proto.output)

    def _check_reshape(self, node: Node) -> None:
        """What onnx's inference leaves unchecked."""
        if node.op != "Reshape" or None in map(self._shape, (node.inputs[0], node.outputs[0])):
            return
        before, after = node.input_shapes[0], node.output_shapes[0]
        if math.prod(before) != math.prod(after):
            raise InvalidModel(
                f"{self.model.name}: {node} cannot bring shape {before} into shape {after}"
            )

    def _shape(self, value: str) -> Shape | None:
        proto = self.types.get(value)
        if proto is None or not proto.tensor_type.HasField("shape"):
            return None
        dims = proto.tensor_type.shape.dim
        if not all(d.HasField("dim_value") for d in dims):
            return None
        return tuple(d.dim_value for d in dims)

    def _dtype(self, value: str) -> np.dtype[Any] | None:
        proto = self.types.get(value)
        return _numpy_dtype(proto.tensor_type.elem_type) if proto is not None else None


def _tensor_type(dtype: np.dtype[Any], shape: Shape) -> onnx.TypeProto:
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _numpy_dtype(elem_type: int) -> np.dtype[Any] | None:
    if elem_type not in helper.get_all_tensor_dtypes():
        return None
    return np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))


def sorted_nodes(model: Model, output: str, image: str) -> Iterator[onnx.NodeProto]:
    """The nodes that the output depends on, each after those that it reads (depth first)."""
    known = {tensor.name for tensor in model.proto.graph.initializer} | {image}
    producer: dict[str, onnx.NodeProto] = {}
    for node in model.proto.graph.node:
        for value in filter(None, node.output):
            if value in producer or value in known:
                raise InvalidModel(f"{model.name}: the value {value!r} is computed twice")
            producer[value] = node
    state: dict[str, bool] = {}  # first output → finished
    stack = [(producer[output], False)] if output in producer else []
    while stack:
        node, ready = stack.pop()
        first = key(node)
        if ready:
            state[first] = True
            yield node
        elif first not in state:
            state[first] = False
            stack.append((node, True))
            for value in reversed([*node.input, *_captured(node)]):
                if value in producer and value not in known:
                    previous = producer[value]
                    if state.get(key(previous)) is False:
                        raise InvalidModel(f"{model.name}: the graph has a cycle at {value!r}")
                    stack.append((previous, False))


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    """Names that the node's sub-graphs may read from outside."""
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)


def _find_logits(output: str, producer: Mapping[str, Node]) -> tuple[str, str | None]:
    """What enters the closing Softmax, LogSoftmax or Sigmoid; without one, the output itself."""
    value = output
    while (node := producer.get(value)) is not None:
        if node.op in _HEADS:
            return node.inputs[0], node.op
        if node.op not in _PASS_THROUGH:
            break
        value = node.inputs[0]
    return output, None


def _check_scores(graph: Graph) -> None:
    shape, name = graph.shapes[graph.logits], graph.model.name
    if not graph.is_float(graph.logits):
        raise InvalidModel(
            f"{name}: the output {graph.output!r} is no class score: its type is "
            f"{graph.dtypes.get(graph.logits)}"
        )
    if shape is None:
        return  # the plan names the operator that is the reason
    if not shape or shape[0] != graph.batch or sum(extent > 1 for extent in shape[1:]) > 1:
        raise InvalidModel(
            f"{name}: the output {graph.output!r} is no class score per sample: {graph.logits!r} "
            f"has shape {shape} for {graph.batch} samples. Choose another by output=NAME "
            "(--output-name)."
        )
