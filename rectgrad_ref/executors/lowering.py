"""A plan lowered to kernels: what both compiled backends decide alike.

Lowering walks the plan once. Every value gets a *sheet* for its gradient; reshapes, concatenations
and additions mostly become other names for a sheet. Each operator has one method here, which says
whether kernels can express a step, and one that a backend writes down what runs with: rows of a
table (`cpu`), or launches (`cuda`). What has no kernel stays a step of the reference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ..analysis import sample_axes
from ..graph import Node
from ..kernels import cpu as k
from ..plan import Plan, Step
from ..rules.declared import (
    ConvTranspose,
    EpsilonRatio,
    Gradient,
    MaxPoolBackward,
    PositiveGradient,
    Rectify,
    Redistribute,
    Rescale,
)
from ..rules.window import Window
from ..threshold import ranks
from .storage import Arena, Storage, WeightStore

_MODES = {"a*r": k.PASS_AR, "|a*r|": k.PASS_ABS_AR, "(a+eps)*r": k.PASS_A_EPS_R}
_BY_RULE = "numpy"


class _Sheet(Protocol):
    @property
    def storage(self) -> Storage: ...


S = TypeVar("S", bound=_Sheet)


@dataclass(eq=False)
class Program(Generic[S]):
    """A lowered plan.

    Attributes
    ----------
    weights : numpy.ndarray
        All weights that it refers to, and maybe others.
    sheets : dict of str to Sheet
        Of every value, valid until its storage is reused.
    leaving : dict of str to Sheet
        Of a trace: name of an activation → the gradient that leaves it, where other nodes read its
        pre-activation too.
    exposes : tuple of str
        Values that steps of the reference read.
    active, baseline : dict of str to int
        Values that kernels read → where they begin; those at the baseline too.
    runs_as : dict of str to str
        Node name → what executes the step.
    """

    plan: Plan
    weights: np.ndarray
    sheets: dict[str, S]
    leaving: dict[str, S]
    exposes: tuple[str, ...]
    active: dict[str, int]
    baseline: dict[str, int]
    runs_as: dict[str, str]

    @cached_property
    def by_rule(self) -> frozenset[str]:
        """Names of the nodes whose steps the reference does."""
        return frozenset(name for name, by in self.runs_as.items() if by == _BY_RULE)


P = TypeVar("P", bound=Program[Any])


@dataclass(frozen=True)
class Condition:
    """What passes an activation; see `kernels.cpu`.

    Attributes
    ----------
    mode : int
    eps : float
        Of the score.
    ceiling : float
        Activations that reach it have slope 0; NaN: there is none.
    strict : bool
        Whether dead units never pass.
    tau : float
        NaN: each sample has its own.
    ranks : tuple of int
        From the largest score on, 0-based: that of the lower score and that of the upper.
    fraction : float
        How far τ lies from the one to the other.
    """

    mode: int
    eps: float = 0.0
    ceiling: float = np.nan
    strict: bool = False
    tau: float = 0.0
    ranks: tuple[int, int] = (0, 0)
    fraction: float = 0.0


class Lowering(ABC, Generic[S, P]):
    """One walk over a plan.

    Parameters
    ----------
    weights : WeightStore
        Takes the weights; shared by all plans of a model.
    trace : bool
        Keep the gradients at both sides of every activation instead of reusing their storage.

    Attributes
    ----------
    executor : str
        What kernels are called in the printed plan.
    alignment : int
        At multiples of how many floats storage begins.
    channels_last : bool
        Whether images lie so, and flattening one moves floats.
    """

    executor: str
    alignment: int
    channels_last: bool

    def __init__(self, plan: Plan, weights: WeightStore, *, trace: bool) -> None:
        self.plan, self.weights, self.trace = plan, weights, trace
        self.graph, self.batch = plan.graph, plan.graph.batch
        self.step_of = {step.node.outputs[0]: step for step in plan.steps}
        self.readers = Counter(v for step in plan.steps for v in step.writes)
        self.arena, self.values = Arena(self.alignment), Arena(self.alignment)
        self.sheets: dict[str, S] = {}
        self.leaving: dict[str, S] = {}
        self.exposes: dict[str, None] = {}
        self.active: dict[str, int] = {}
        self.baseline: dict[str, int] = {}
        self.runs_as: dict[str, str] = {}
        self._finished: set[str] = set()

    @abstractmethod
    def program(self) -> P:
        """Walk, and write down what runs."""

    def walk(self) -> None:
        """Every step, from the logits to the input."""
        self.name(self.graph.logits, self.new(self.graph.logits))
        for step in self.plan.steps:
            if step.node.name not in self.runs_as:
                self._lower(step)

    def _lower(self, step: Step) -> None:
        handler = handler_of(step, self.batch)
        written = step.node.outputs[0] in self.sheets
        if handler is None or not written or not handler(self, step):
            self.exposes |= dict.fromkeys(v for v in step.reads if v not in self.graph.constants)
            self.runs_as[step.node.name] = _BY_RULE
            self.stop(step)
        if step.node.name in self.leaving:
            self.add_to(step.node.inputs[0], self.leaving[step.node.name])
        self.finished(step)

    def finished(self, step: Step) -> None:
        """The gradient at the node's outputs is no longer needed; a handler may know it early."""
        self.runs_as.setdefault(step.node.name, self.executor)
        for value in step.node.outputs:
            if value in self.sheets and value not in self._finished:
                self._finished.add(value)
                self.release(self.sheets[value])

    # Values: which sheet holds a gradient, and where activations and weights lie.

    def extents(self, value: str) -> tuple[int, int, int]:
        """Channels, height, width of a sample; (units, 1, 1) where the value is no image."""
        shape = self.graph.shapes[value]
        assert shape is not None
        if len(shape) == 4 and shape[0] == self.batch:
            return shape[1], shape[2], shape[3]
        return prod(shape) // self.batch, 1, 1

    @abstractmethod
    def new(self, value: str) -> S:
        """A sheet for a gradient of the value's shape."""

    @abstractmethod
    def part(self, sheet: S, first: int, value: str) -> S:
        """Of a concatenation's sheet, the value's channels, from `first` on."""

    @abstractmethod
    def add_to(self, value: str, sheet: S) -> None:
        """Add a finished gradient to the value's."""

    def incoming(self, step: Step) -> S:
        """The gradient that arrives at the node's first output."""
        return self.sheets[step.node.outputs[0]]

    def name(self, value: str, sheet: S) -> None:
        """Let the value's gradient be `sheet`."""
        self.sheets[value] = sheet
        sheet.storage.users += 1

    def takes_over(self, value: str) -> bool:
        """Whether a finished sheet can become the value's, because nothing else adds to it."""
        return self.readers[value] == 1 and value not in self.sheets and not self.trace

    def pass_on(self, value: str, sheet: S) -> None:
        """The gradient at `value` is `sheet`."""
        if self.takes_over(value):
            self.name(value, sheet)
        else:
            self.add_to(value, sheet)

    def release(self, sheet: S) -> None:
        """One value less uses the sheet's storage."""
        storage = sheet.storage
        storage.users -= 1
        if storage.users <= 0 and not self.trace:
            self.arena.give_back(storage.offset, storage.size)

    def is_apart(self, step: Step) -> bool:
        """Whether a trace needs a sheet for what leaves an activation.

        It shows it apart from what other readers of the pre-activation add to it.
        """
        return self.trace and self.readers[step.node.inputs[0]] > 1

    def activations(self, value: str) -> int:
        """Where the value's activations begin; asks the forward pass for them."""
        return self._reserved(self.active, value)

    def at_baseline(self, value: str) -> int:
        """The same at the baseline."""
        return self._reserved(self.baseline, value)

    def room_of(self, value: str) -> int:
        """Floats that the activations of all samples take."""
        return prod(self.extents(value)) * self.batch

    def _reserved(self, places: dict[str, int], value: str) -> int:
        if value not in places:
            places[value] = self.values.take(self.room_of(value))
        return places[value]

    def rows(self, node: Node, image: tuple[int, int, int]) -> int:
        """Where the weights of a Conv begin, or of a matrix as one window over an image (C, H, W).

        So a gradient that belongs to a flattened image is never brought to another axis order.
        """
        if node.op == "Conv":
            return self.weights.add(node.inputs[1], "conv", lambda: _conv_rows(node))
        use = f"matrix {image} {node.attributes.get('transB')} {node.attributes.get('alpha')}"
        return self.weights.add(node.inputs[1], use, lambda: _matrix_rows(node, image))

    # Operators. Each handler says whether kernels could express the step; the rest is a backend's.

    def activation(self, step: Step) -> bool:
        condition = self.condition_of(step)
        if condition is None:
            return self.ratio(step)
        self.activate(step, condition, self.linear_before(step))
        return True

    def condition_of(self, step: Step) -> Condition | None:
        """What passes the step, if it is an activation of which kernels can say it."""
        known = handler_of(step, self.batch) is Lowering.activation
        return passing(step, self.batch) if known else None

    def linear_before(self, step: Step) -> Step | None:
        """The transpose that alone takes what passes an activation, if kernels know it."""
        z = step.node.inputs[0]
        before = self.step_of.get(z) if self.readers[z] == 1 else None
        return before if before and scatters(before, self.batch) else None

    @abstractmethod
    def activate(self, step: Step, condition: Condition, linear: Step | None) -> None:
        """Let pass what meets the condition.

        Parameters
        ----------
        linear : Step, optional
            The transpose that alone takes what passes, and may be `finished` at once.
        """

    def ratio(self, step: Step) -> bool:
        """A rule that multiplies by a ratio of what leaves a Relu to what enters it."""
        rule = step.rule
        if step.node.op != "Relu" or not isinstance(rule, (EpsilonRatio, Rescale)):
            return False
        if isinstance(rule, Rescale):
            self.multiply(step, step.node.inputs[0], k.BY_DIFFERENCE, rule.eps)
        else:
            # a / (z + ε·sign z) is a / (a + ε), as a is z, or 0. To hand z over, onnxruntime would
            # have to compute Conv and Relu one after the other.
            self.multiply(step, step.node.outputs[0], k.BY_EPSILON, rule.eps)
        return True

    @abstractmethod
    def multiply(self, step: Step, value: str, mode: int, eps: float) -> None:
        """Multiply by a ratio of the value's activations at a Relu; see `kernels.cpu`."""

    def convolution(self, step: Step) -> bool:
        if not scatters(step, self.batch):
            return False
        self.transpose(step)
        return True

    @abstractmethod
    def transpose(self, step: Step) -> None:
        """Multiply by transposed weights."""

    def rename(self, step: Step) -> bool:
        value, result = step.node.inputs[0], step.node.outputs[0]
        if not renames(step):
            return False
        if self.channels_last and self.extents(value) != self.extents(result):
            return False
        self.pass_on(value, self.incoming(step))
        return True

    def add(self, step: Step) -> bool:
        node = step.node
        if any(node.input_shapes[p] != node.output_shapes[0] for p in step.positions):
            return False
        if node.op == "Sub" and step.positions != (0,):
            return False
        sheet = self.incoming(step)
        first, *others = step.writes
        # Only one operand can take over the sheet: what is done to it must not reach the others.
        for value in others:
            self.add_to(value, sheet)
        self.pass_on(first, sheet)
        return True

    def concat(self, step: Step) -> bool:
        node = step.node
        if node["axis"] % len(node.output_shapes[0]) != 1:
            return False
        sheet, first = self.incoming(step), 0
        for position, value in enumerate(node.inputs):
            if position in step.positions:
                self.pass_on(value, self.part(sheet, first, value))
            first += self.extents(value)[0]
        return True

    def batch_normalization(self, step: Step) -> bool:
        node = step.node
        shape, channels = node.input_shapes[0], self.extents(node.inputs[0])[0]
        if step.positions != (0,) or any(c is None for c in node.constants[1:5]):
            return False
        if len(shape) < 2 or node.input_shapes[1] != (shape[1],):
            return False
        # What is no image has a channel for each unit.
        name, use, repeats = node.outputs[0], f"scale {channels}", channels // shape[1]
        self.scale(
            step, self.weights.add(name, use, lambda: np.repeat(_channel_factor(node), repeats))
        )
        return True

    @abstractmethod
    def scale(self, step: Step, factor: int) -> None:
        """Multiply each channel by a weight, from the one at `factor` on."""

    def max_pool(self, step: Step) -> bool:
        rule = step.rule
        if len(step.node["kernel_shape"]) != 2:
            return False
        if isinstance(rule, Redistribute):
            return self.redistribute(step, rule.eps)
        if not isinstance(rule, Gradient) and rule != MaxPoolBackward("first"):
            return False
        self.to_maximum(step)
        return True

    @abstractmethod
    def to_maximum(self, step: Step) -> None:
        """To the first maximum of each window."""

    def redistribute(self, step: Step, eps: float) -> bool:
        """To the cells of each window in proportion, which a backend may have no kernel for."""
        return False

    def average_pool(self, step: Step) -> bool:
        node = step.node
        if len(node.input_shapes[0]) != 4:
            return False
        counts = node.attributes.get("count_include_pad")
        self.to_all(step, Window.of(node).declared_input if counts else (0, 0))
        return True

    @abstractmethod
    def to_all(self, step: Step, padded: tuple[int, ...]) -> None:
        """To all cells of each window alike.

        Parameters
        ----------
        padded : tuple of int
            Extents within which cells count; (0, 0): those of the input.
        """

    @abstractmethod
    def stop(self, step: Step) -> None:
        """Let the rule itself do the step."""


Handler = Callable[[Lowering[Any, Any], Step], bool]
HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("Relu", "Clip"), Lowering.activation),
    **dict.fromkeys(("Conv", "Gemm", "MatMul"), Lowering.convolution),
    **dict.fromkeys(("Add", "Sub"), Lowering.add),
    "Concat": Lowering.concat,
    "BatchNormalization": Lowering.batch_normalization,
    "MaxPool": Lowering.max_pool,
    **dict.fromkeys(("AveragePool", "GlobalAveragePool"), Lowering.average_pool),
    **dict.fromkeys(("Identity", "Dropout", "Cast"), Lowering.rename),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), Lowering.rename),
}


def handler_of(step: Step, batch: int) -> Handler | None:
    """What may express the step: it can be cut into samples if they lie along every axis 0.

    A model for one image may fold other things into that axis.
    """
    node = step.node
    shapes = (node.output_shapes[0], *(node.input_shapes[p] for p in step.positions))
    return HANDLERS.get(node.op) if all(shape[:1] == (batch,) for shape in shapes) else None


def renames(step: Step) -> bool:
    """Whether the step only gives its gradient another shape."""
    names = HANDLERS.get(step.node.op) is Lowering.rename
    return names and isinstance(step.rule, Gradient) and step.positions == (0,)


def scatters(step: Step, batch: int) -> bool:
    """Whether the step is the transpose of constant weights that the kernels know."""
    node = step.node
    if handler_of(step, batch) is not Lowering.convolution:
        return False
    if step.positions != (0,) or not isinstance(step.rule, (Gradient, ConvTranspose)):
        return False
    if len(node.constants) < 2 or node.constants[1] is None:
        return False
    if node.op == "Conv":
        return len(node["kernel_shape"]) == 2
    matrices = len(node.input_shapes[0]) == 2 and len(node.input_shapes[1]) == 2
    return matrices and (node.op == "MatMul" or (node.op == "Gemm" and not node["transA"]))


def masks_border(step: Step) -> bool:
    """Whether the padding trick is on."""
    return isinstance(step.rule, ConvTranspose) and step.rule.mask_border


def geometry(node: Node, image: tuple[int, int, int]) -> tuple[int, ...]:
    """Kernel, strides, dilations, and the pads that come first, each of two axes.

    What has no window of its own has one over the whole image (C, H, W).
    """
    if "kernel_shape" not in node.attributes:
        return (*image[1:], 1, 1, 1, 1, 0, 0)
    window = Window.of(node)
    return (*window.kernel_shape, *window.strides, *window.dilations, *window.pads[:2])


def _conv_rows(node: Node) -> np.ndarray:
    """A convolution's weights as rows (C_out, kh, kw, C_in per group)."""
    weights = node.constants[1]
    assert weights is not None
    return weights.transpose(0, 2, 3, 1)


def _matrix_rows(node: Node, image: tuple[int, int, int]) -> np.ndarray:
    """The matrix that maps a flattened image (C, H, W), as rows (outputs, H, W, C)."""
    weights = node.constants[1]
    assert weights is not None
    if node.op == "MatMul" or not node["transB"]:
        weights = weights.T
    if node.op == "Gemm":
        weights = weights * np.float32(node["alpha"])
    return weights.reshape(len(weights), *image).transpose(0, 2, 3, 1)


def _channel_factor(node: Node) -> np.ndarray:
    """What a batch normalisation multiplies each channel by."""
    scale, variance = node.constants[1], node.constants[4]
    assert scale is not None and variance is not None
    return scale / np.sqrt(variance + np.float32(node["epsilon"]))


def passing(step: Step, batch: int) -> Condition | None:
    """What the rule lets pass at a Relu or ReLU-N, or None if kernels cannot say it."""
    node, rule = step.node, step.rule
    is_relu = node.op == "Relu"
    ceiling = np.nan if is_relu else _ceiling(node)
    if step.positions != (0,) or ceiling is None:
        return None
    if isinstance(rule, Gradient):
        return Condition(k.PASS_ACTIVE, ceiling=ceiling)
    if isinstance(rule, PositiveGradient):
        both = rule.guided or not is_relu
        return Condition(k.PASS_BOTH if both else k.PASS_POSITIVE, ceiling=ceiling)
    if isinstance(rule, Rectify):
        return _rectified(rule, node, batch, ceiling)
    return None


def _ceiling(node: Node) -> float | None:
    """The upper bound of a Clip between 0 and a constant, NaN where it has none; else None."""
    low, high = (*node.constants, None, None)[1:3]
    if low is None or low.size != 1 or low.item() != 0:
        return None
    if len(node.inputs) > 2 and node.inputs[2] and high is None:
        return None
    return np.nan if high is None else float(high.item())


def _rectified(rule: Rectify, node: Node, batch: int, ceiling: float) -> Condition | None:
    clips = node.op == "Clip" and rule.derivative
    strict = clips or (node.op == "Relu" and rule.strict_relu)
    if rule.score not in _MODES or rule.scope != "sample" or rule.strictness != ">":
        return None
    if rule.score == "(a+eps)*r" and strict:
        return None
    mode, eps, ceiling = _MODES[rule.score], rule.eps, ceiling if clips else np.nan
    if rule.tau is not None:
        return Condition(mode, eps, ceiling, strict, rule.tau)
    units = prod(node.output_shapes[0]) // batch
    low, high, fraction = ranks(units, rule.q, rule.percentile)
    from_top = units - 1 - low, units - 1 - high
    return Condition(mode, eps, ceiling, strict, np.nan, from_top, fraction)


def is_lowerable(plan: Plan) -> bool:
    """Whether every gradient can be cut into samples along axis 0."""
    graph = plan.graph
    if graph.batch == 1:
        return True
    axes = sample_axes(graph)
    return all(
        axes.get(v) == 0 for step in plan.steps for v in (*step.node.outputs, *step.writes) if v
    )
