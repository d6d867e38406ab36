"""What the graph proves about its nodes and values, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import TypeVar

import numpy as np

from .errors import InvalidModel
from .graph import Graph, Node, freeze
from .opsets import same_pads
from .rules import OPERATORS
from .rules.activation import ACTIVATIONS
from .rules.registry import NotSamplewise, SampleAxis

Fact = TypeVar("Fact")

_GATES = {"Sigmoid", "HardSigmoid", "Softmax"}
# What a gate's value may pass before it multiplies another one.
_CARRIERS = {
    "Reshape", "Expand", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Cast", "Transpose",
    "Dropout", "Slice", "Split", "Tile", "Resize", "Add", "Sub", "Mul", "Div", "Where",
}  # fmt: skip
_WITH_CONSTANT = {"Add", "Sub", "Mul", "Div"}
_NON_NEGATIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softplus", "Softmax", "Exp", "Abs"}
_KEEPS_SIGN = {
    "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Concat", "Dropout", "Identity",
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather", "Add",
    "Mul", "Max", "Min", "Expand", "Tile", "Sum", "Mean", "Sqrt", "Relu", "DepthToSpace",
    "SpaceToDepth", "GatherElements", "GatherND", "ReduceMean", "ReduceSum", "ReduceMax",
    "ReduceMin", "TopK",
}  # fmt: skip


def _once(function: Callable[[Graph], Fact]) -> Callable[[Graph], Fact]:
    """Prove a fact about a graph the first time only."""

    @wraps(function)
    def remembered(graph: Graph) -> Fact:
        if function not in graph.facts:
            graph.facts[function] = function(graph)
        fact: Fact = graph.facts[function]
        return fact

    return remembered


@_once
def path(graph: Graph) -> tuple[Node, ...]:
    """The nodes through which a gradient flows from the logits to the input, in graph order."""
    reached = {graph.input}
    for node in graph.nodes:
        if reached.intersection(node.inputs):
            reached.update(v for v in node.outputs if _carries(graph, v))
    needed = {graph.logits}
    nodes = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs) and reached.intersection(node.outputs):
            needed.update(v for v in node.inputs if v in reached)
            nodes.append(node)
    return tuple(reversed(nodes))


def _carries(graph: Graph, value: str) -> bool:
    """Whether a gradient can flow through the value: it has numbers, and they are no integers."""
    return bool(value) and graph.is_float(value) and 0 not in (graph.shapes.get(value) or ())


def differentiated(graph: Graph, nodes: Iterable[Node]) -> dict[str, tuple[int, ...]]:
    """Node name → the positions of its inputs that receive a gradient."""
    flowing = {graph.input}
    for node in nodes:
        flowing.update(v for v in node.outputs if _carries(graph, v))
    return {
        node.name: tuple(i for i, value in enumerate(node.inputs) if value in flowing)
        for node in nodes
    }


@_once
def activations(graph: Graph) -> frozenset[str]:
    """Names of the activations on the path: what RectGrad thresholds (docs/conventions.md).

    Not among them: a Clip that is no ReLU-N, a Sigmoid that gates or weights another value, and a
    Tanh that caps the scores of an attention.
    """
    found = set()
    for node in path(graph):
        if node.op not in ACTIVATIONS:
            continue
        if node.op == "Clip" and not _is_relu_n(node):
            continue
        if node.op in _GATES and _gates(graph, node.outputs[0]):
            continue
        if node.op == "Tanh" and _caps_weights(graph, node.outputs[0]):
            continue
        found.add(node.name)
    return frozenset(found)


def _is_relu_n(node: Node) -> bool:
    low, high = (*node.constants, None, None)[1:3]
    return (
        low is not None and low.size == 1 and low.item() == 0 and (high is None or high.item() > 0)
    )


def _gates(graph: Graph, value: str) -> bool:
    """Whether the value multiplies another one, directly or carried by shape operators."""

    def others(node: Node, value: str) -> bool:
        return any(v and v != value and v not in graph.constants for v in node.inputs)

    def carried(node: Node, value: str) -> bool:
        return not (node.op in _WITH_CONSTANT and others(node, value))

    return any(
        node.op in ("Mul", "MatMul", "Einsum") and others(node, v)
        for node, v in _readers(graph, value, carried)
    )


def _caps_weights(graph: Graph, value: str) -> bool:
    """Whether a Softmax makes the value weights of another one, as in soft-capped attention."""
    # Whatever else enters: a mask may be added.
    return any(
        node.op == "Softmax" and _gates(graph, node.outputs[0])
        for node, _ in _readers(graph, value, lambda node, v: True)
    )


def _readers(
    graph: Graph, value: str, carried: Callable[[Node, str], bool]
) -> Iterator[tuple[Node, str]]:
    """What reads the value, or one to which a shape operator has carried it; with what it reads."""
    seen, ahead = {value}, [value]
    while ahead:
        current = ahead.pop()
        for node in graph.consumers.get(current, ()):
            yield node, current
            if node.op in _CARRIERS and carried(node, current):
                reached = [v for v in node.outputs if v and v not in seen]
                seen.update(reached)
                ahead += reached


@_once
def last_activations(graph: Graph) -> frozenset[str]:
    """Activations from which the logits are reached without passing another one."""
    layers = activations(graph)
    open_values, found = {graph.logits}, set()
    for node in reversed(path(graph)):
        if not open_values.intersection(node.outputs):
            continue
        if node.name in layers:
            found.add(node.name)
        else:
            open_values.update(node.inputs)
    return frozenset(found)


@_once
def non_negative(graph: Graph) -> frozenset[str]:
    """Values that cannot be below zero, whatever the image."""
    known = {
        name for name, value in graph.constants.items() if value.size <= 1 and _min(value) >= 0
    }
    for node in graph.nodes:
        if _stays_non_negative(node, known):
            known.update(node.outputs)
    return frozenset(known)


def _stays_non_negative(node: Node, known: set[str]) -> bool:
    if node.op in _NON_NEGATIVE:
        return True
    if node.op == "Clip":
        return _clips_at(node) >= 0
    if node.op == "ThresholdedRelu":
        return bool(node["alpha"] >= 0)
    if node.op == "Pad":
        return node.inputs[0] in known and _pads_with(node) >= 0
    inputs = [v for v in node.inputs if v][: _data_inputs(node)]
    return node.op in _KEEPS_SIGN and all(v in known for v in inputs)


def _data_inputs(node: Node) -> int:
    """How many leading inputs are data; the rest are shapes, axes or indices."""
    variadic = {"Concat", "Add", "Mul", "Max", "Min", "Sum", "Mean"}
    return len(node.inputs) if node.op in variadic else 1


def _min(value: np.ndarray) -> float:
    return float(value.min()) if value.size and value.dtype.kind in "fiu" else -np.inf


def _clips_at(node: Node) -> float:
    low = (*node.constants, None)[1]
    return -np.inf if low is None else float(low.item())


def _pads_with(node: Node) -> float:
    value = (*node.constants, None, None)[2]
    return 0.0 if value is None else float(value.item())


def pads_input(graph: Graph, node: Node) -> bool:
    """Whether the convolution is padded: its own pads, or a zero Pad node that feeds only it."""
    if any(node["pads"]):
        return True
    feeding = graph.producer.get(node.inputs[0])
    return (
        feeding is not None
        and feeding.op == "Pad"
        and feeding["mode"] == "constant"
        and _pads_with(feeding) == 0
        and feeding.constants[1] is not None
        and any(_pads_of(feeding))
        and len(graph.consumers[node.inputs[0]]) == 1
    )


@_once
def sample_axes(graph: Graph) -> dict[str, SampleAxis]:
    """Value name → the axis along which the samples lie, for every value where that is proven.

    Constants are not listed. The proof goes node by node: `batch` in the operator table.
    """
    axes: dict[str, SampleAxis] = {graph.input: 0}
    for node in graph.nodes:
        known = OPERATORS.get(node.op)
        if known is None or known.batch is None:
            continue
        if any(v and v not in axes and v not in graph.constants for v in node.inputs):
            continue
        if any(v and graph.shapes[v] is None for v in node.outputs):
            continue
        axis = _try(node, tuple(axes.get(v) for v in node.inputs))
        if axis is None:
            # A constant that repeats one sample's values may stand along the sample axis.
            axis = _try(node, tuple(_axis(graph, axes, v) for v in node.inputs))
        if axis is not None:
            each = axis if isinstance(axis, tuple) else (axis,) * len(node.outputs)
            axes.update((v, a) for v, a in zip(node.outputs, each, strict=False) if v)
    return axes


def _try(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis | tuple[SampleAxis, ...]:
    known = OPERATORS[node.op].batch
    assert known is not None
    try:
        return known(node, axes)
    except NotSamplewise:
        return None


def _axis(graph: Graph, axes: dict[str, SampleAxis], value: str) -> SampleAxis:
    if value in axes:
        return axes[value]
    constant = graph.constants.get(value)
    repeats = (
        constant is not None
        and constant.ndim > 0
        and constant.shape[0] == graph.batch
        and bool(np.all(constant == constant[:1]))
    )
    return 0 if repeats else None


def is_samplewise(graph: Graph) -> bool:
    """Whether a batch provably explains every sample as if it were alone.

    Every value on the path must carry the samples on a known axis; activations and logits on
    axis 0. And a sample alone must meet the same graph: a batch size can enter it by a Shape node,
    or be written into it.
    """
    axes = sample_axes(graph)
    layers = activations(graph)
    for node in path(graph):
        if any(axes.get(v) is None for v in node.outputs if graph.is_float(v)):
            return False
        if node.name in layers and axes[node.outputs[0]] != 0:
            return False
    return axes.get(graph.logits) == 0 and _is_same_alone(graph, axes)


def _is_same_alone(graph: Graph, axes: dict[str, SampleAxis]) -> bool:
    shape = graph.shapes[graph.input]
    assert shape is not None
    try:
        alone = freeze(graph.model, (1, *shape[1:]), input=graph.input, output=graph.output)
    except InvalidModel:
        return False
    if len(alone.nodes) != len(graph.nodes):
        return False
    return all(
        _is_same_node(node, other, axes)
        for node, other in zip(graph.nodes, alone.nodes, strict=True)
        if any(value in axes for value in node.outputs)
    )


def _is_same_node(node: Node, alone: Node, axes: dict[str, SampleAxis]) -> bool:
    """Whether two nodes of the same place differ in the extent of the sample axis only."""
    shapes = zip(node.outputs, node.output_shapes, alone.output_shapes, strict=True)
    for value, shape, expected in shapes:
        axis = axes.get(value)
        if shape and axis is not None and (*shape[:axis], 1, *shape[axis + 1 :]) != expected:
            return False
    constants = list(zip(node.constants, alone.constants, strict=True))
    if node.op in ("Reshape", "Expand"):
        del constants[1]  # equal shapes of the output say the same
    same = all(_is_same_constant(ours, theirs) for ours, theirs in constants)
    return same and node.op == alone.op and node.attributes == alone.attributes


def _is_same_constant(ours: np.ndarray | None, theirs: np.ndarray | None) -> bool:
    """Whether the constants are equal, or one repeats the other for every sample."""
    if ours is None or theirs is None:
        return ours is theirs
    if ours.shape != theirs.shape and (ours.shape[1:] != theirs.shape[1:] or len(theirs) != 1):
        return False
    return bool(np.all(ours == theirs))


def is_tensorflow_same(graph: Graph, node: Node) -> bool:
    """Whether TensorFlow would call the convolution SAME (docs/conventions.md).

    Its output is ⌈input/stride⌉ on every axis and its padding, its own or that of a zero Pad node
    before it, is TensorFlow's for that size. A 1×1 convolution is SAME as well as VALID; a kernel
    equal to a stride above 1, which needs no padding where it fits, is not.
    """
    shape, after = node.input_shapes[0], node.output_shapes[0]
    spatial, pads = shape[2:], node["pads"]
    feeding = graph.producer.get(node.inputs[0])
    if feeding is not None and not any(pads) and pads_input(graph, node):
        spatial = feeding.input_shapes[0][2:]
        pads = _pads_of(feeding)
    if any(k == s > 1 for k, s in zip(node["kernel_shape"], node["strides"], strict=True)):
        return False
    sizes = [-(-n // s) for n, s in zip(spatial, node["strides"], strict=True)]
    return list(after[2:]) == sizes and pads == same_pads(spatial, node.attributes)


def _pads_of(node: Node) -> tuple[int, ...]:
    """What a Pad node adds around the spatial axes, in the order of a convolution's ``pads``."""
    _, pads, _, axes = (*node.constants, None, None)[:4]
    assert pads is not None
    widths = np.zeros((2, len(node.input_shapes[0])), int)
    widths[:, slice(None) if axes is None else axes] = pads.reshape(2, -1)
    return tuple(widths[:, 2:].ravel().tolist())


# Maps that are linear in the values that a gradient flows through, or select among them.
_LINEAR = {
    "Conv", "ConvTranspose", "Gemm", "BatchNormalization", "Add", "Sub", "Sum", "Mean", "Neg",
    "AveragePool", "GlobalAveragePool", "MaxPool", "Concat", "Split", "Slice", "Gather", "Pad",
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile", "Identity",
    "Dropout", "Cast", "ReduceMean", "ReduceSum", "GatherElements", "GatherND", "DepthToSpace",
    "SpaceToDepth", "Resize", "CumSum", "Trilu", "Compress", "ReverseSequence", "Col2Im",
    "MaxUnpool", "DFT", "AffineGrid", "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
# Linear in each of their inputs.
_BILINEAR = {"Mul", "MatMul", "Einsum"}


def note_plain_gradient(label: str, graph: Graph) -> list[str]:
    """At which nonlinear nodes a method with rules for activations only uses the gradient."""
    nodes, layers = path(graph), activations(graph)
    positions = differentiated(graph, nodes)
    plain = [
        str(node)
        for node in nodes
        if node.name not in layers
        and node.op not in _LINEAR
        and not (node.op in _BILINEAR and len(positions[node.name]) == 1)
        and not (node.op in ("Div", "GridSample", "RoiAlign") and positions[node.name] == (0,))
    ]
    return [f"{label}: the gradient is used at {', '.join(plain)}"] if plain else []
