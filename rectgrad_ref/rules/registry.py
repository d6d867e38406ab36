"""One table: operator → its NumPy meaning, its vector–Jacobian products, its sample axis.

An operator is added in one place, with two decorators::

    @operator("Gemm", batch=leading)
    def gemm(node, A, B, C=None): ...

    @vjp("Gemm", wrt="A")
    def gemm_A(node, R, *, B): ...

Forward functions take the node and its inputs in ONNX's order; an omitted optional input is None.
A vector–Jacobian product takes the node, the gradient `R` at its output, and, by keyword, the
values that it has to read: ONNX's own names for the operator's inputs and outputs. The plan asks
the forward pass for exactly these. Shapes need no reading; the node knows them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import defs

if TYPE_CHECKING:
    from ..graph import Node

Array = np.ndarray
SampleAxis = int | None  # None: the value does not depend on the sample
# Where the samples lie in the outputs: in all alike, or in each.
BatchRule = Callable[["Node", tuple[SampleAxis, ...]], SampleAxis | tuple[SampleAxis, ...]]


class NotSamplewise(Exception):
    """Samples may influence each other in this node, or where the sample axis goes is unknown."""


@dataclass(frozen=True)
class Vjp:
    """The vector–Jacobian product of one operator with respect to one of its inputs.

    Attributes
    ----------
    reads : tuple of str
        ONNX's formal names of the inputs and outputs whose values it needs.
    every_output : bool
        Whether `function` takes a tuple of gradients, one per output, or that of the first output.
    wants_index : bool
        Whether `function` takes ``index``, the position of the input among variadic ones.
    """

    function: Callable[..., Array]
    reads: tuple[str, ...]
    every_output: bool
    wants_index: bool


@dataclass
class Operator:
    """What is known about one operator type."""

    forward: Callable[..., Any]
    batch: BatchRule | None
    vjps: dict[str, Vjp] = field(default_factory=dict)


OPERATORS: dict[str, Operator] = {}


def operator(*names: str, batch: BatchRule | None = None) -> Callable[..., Any]:
    """Register the NumPy forward of one or several operators, and how it treats the sample axis."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            OPERATORS[name] = Operator(function, batch)
        return function

    return register


def vjp(*names: str, wrt: str, every_output: bool = False) -> Callable[..., Any]:
    """Register a vector–Jacobian product with respect to the input that ONNX calls `wrt`."""

    def register(function: Callable[..., Array]) -> Callable[..., Array]:
        parameters = inspect.signature(function).parameters.values()
        keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        reads = tuple(k for k in keywords if k != "index")
        for name in names:
            OPERATORS[name].vjps[wrt] = Vjp(function, reads, every_output, "index" in keywords)
        return function

    return register


def primitive(function: Callable[..., Array]) -> Callable[..., Array]:
    """Let arrays of another kind do the whole function in their own way.

    NumPy hands each of its functions to the arrays that it is called with, if they are not its own;
    this does it for one of ours.
    """

    @wraps(function)
    def dispatched(*args: Any, **named: Any) -> Array:
        for array in args:
            if hasattr(array, "primitive"):
                result: Array = array.primitive(dispatched, function, args, named)
                return result
        return function(*args, **named)

    return dispatched


@cache
def _formal(op: str) -> tuple[tuple[str, ...], tuple[str, ...], bool, bool]:
    """ONNX's names of the inputs and outputs, and whether the last of each is variadic."""
    definition = defs.get_schema(op, defs.onnx_opset_version())
    variadic = defs.OpSchema.FormalParameterOption.Variadic
    ends = [bool(p) and p[-1].option == variadic for p in (definition.inputs, definition.outputs)]
    names = [tuple(p.name for p in formals) for formals in (definition.inputs, definition.outputs)]
    return names[0], names[1], ends[0], ends[1]


def input_name(op: str, position: int) -> str:
    """ONNX's formal name of the input at `position`."""
    inputs, _, variadic, _ = _formal(op)
    return inputs[-1] if variadic and position >= len(inputs) else inputs[position]


def values_named(node: Node, formal: str) -> tuple[str, ...]:
    """The graph values that stand at the node's formal input or output `formal`."""
    inputs, outputs, inputs_variadic, outputs_variadic = _formal(node.op)
    for names, values, variadic in (
        (inputs, node.inputs, inputs_variadic),
        (outputs, node.outputs, outputs_variadic),
    ):
        if formal in names:
            position = names.index(formal)
            is_last = position == len(names) - 1
            return values[position:] if variadic and is_last else values[position : position + 1]
    raise KeyError(f"{node.op} has no input or output {formal!r}")


def is_variadic(op: str, formal: str) -> bool:
    """Whether `formal` stands for any number of values."""
    inputs, outputs, inputs_variadic, outputs_variadic = _formal(op)
    return (inputs_variadic and formal == inputs[-1]) or (
        outputs_variadic and formal == outputs[-1]
    )


def find_vjp(op: str, position: int) -> Vjp | None:
    """The rule for the gradient at that input, or None."""
    known = OPERATORS.get(op)
    return known.vjps.get(input_name(op, position)) if known else None


def leading(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    """Axis 0 of the first input is axis 0 of the output; other inputs are the same for all."""
    if axes[0] != 0 or any(axis is not None for axis in axes[1:]):
        raise NotSamplewise
    return 0


def elementwise(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    """NumPy broadcasting: the sample axes must meet, and nothing else may stand on that axis."""
    rank = len(node.output_shapes[0])
    found = {
        rank - len(shape) + axis
        for shape, axis in zip(node.input_shapes, axes, strict=True)
        if axis is not None
    }
    if len(found) != 1:
        raise NotSamplewise
    (result,) = found
    for shape, axis in zip(node.input_shapes, axes, strict=True):
        if axis is not None:
            continue
        own = result - (rank - len(shape))
        if own >= 0 and shape[own] != 1:
            raise NotSamplewise  # a constant that differs from sample to sample
    return result
