"""A plan lowered to the table of `kernels.cpu`.

Lowering walks the plan once. Every value gets a sheet for its gradient; reshapes, concatenations
and additions mostly become other names for a sheet. What the table cannot express stays a step of
the reference: the table stops there, and goes on with its result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

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
    Rescale,
)
from ..rules.window import Window
from ..threshold import ranks
from .memory import aligned

# Above this part of nonzeros a matrix product is faster than adding rows of weights one by one.
DENSITY = 0.2
NEVER = 2**62
LINE = 16  # floats of a cache line; a vector that lies across two is slow

_MODES = {"a*r": k.PASS_AR, "|a*r|": k.PASS_ABS_AR, "(a+eps)*r": k.PASS_A_EPS_R}

Columns = dict[int, int]


@dataclass
class Storage:
    """Floats and marks in a sample's arena, and how many values still use them."""

    offset: int
    size: int
    touched: int
    users: int = 0


@dataclass(frozen=True)
class Sheet:
    """A value's gradient, channels last; see `kernels.cpu`."""

    storage: Storage
    first: int  # channel of the storage at which it begins
    stride: int
    height: int
    width: int
    channels: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def source(self) -> Columns:
        """Its columns of the table where it is read."""
        names = (k.S_OFFSET, k.S_STRIDE, k.S_TOUCHED, k.S_H, k.S_W, k.S_C)
        return dict(zip(names, self._geometry, strict=True)) | {k.S_BASE: self.storage.offset}

    @property
    def target(self) -> Columns:
        """Its columns of the table where it is added to."""
        names = (k.T_OFFSET, k.T_STRIDE, k.T_TOUCHED, k.T_H, k.T_W, k.T_C)
        return dict(zip(names, self._geometry, strict=True))

    @property
    def _geometry(self) -> tuple[int, ...]:
        begin = self.storage.offset + self.first
        marks = self.storage.touched
        return begin, self.stride, marks, self.height, self.width, self.channels


class WeightStore:
    """Weights as rows (C_out, kh, kw, C_in per group), and factors per channel, in one array."""

    def __init__(self) -> None:
        self._offsets: dict[tuple[str, str], int] = {}
        self._parts: list[np.ndarray] = []

    def add(self, name: str, use: str, make: Callable[[], np.ndarray]) -> int:
        """Where they begin; `make` is called the first time only."""
        if (name, use) not in self._offsets:
            # In this order, so that a fork at any moment leaves a whole store to the child.
            begin = sum(part.size for part in self._parts)
            self._parts.append(_in_lines(make()))
            self._offsets[name, use] = begin
        return self._offsets[name, use]

    @property
    def array(self) -> np.ndarray:
        """All of them."""
        if len(self._parts) != 1:
            whole = aligned(sum(part.size for part in self._parts), np.float32)
            if self._parts:
                np.concatenate(self._parts, out=whole)
            self._parts = [whole]
        return self._parts[0]


def _in_lines(weights: np.ndarray) -> np.ndarray:
    """Flat, with zeros up to a whole cache line."""
    flat = np.ascontiguousarray(weights, np.float32).ravel()
    return np.pad(flat, (0, -flat.size % LINE))


@dataclass(eq=False)
class Program:
    """A lowered plan.

    Attributes
    ----------
    table, floats : numpy.ndarray
        For `kernels.cpu.advance`.
    steps : dict of int to Step
        Table row → the step that may stop there: one for the reference, or a scatter.
    sheets : dict of str to Sheet
        Of every value, valid until its storage is reused.
    leaving : dict of str to Sheet
        Of a trace: name of an activation → the gradient that leaves it, where other nodes read its
        pre-activation too.
    exposes : tuple of str
        Values that steps of the reference read.
    active, baseline : dict of str to int
        Values that the table reads, channels last → where they begin; those at the baseline too.
    """

    plan: Plan
    table: np.ndarray
    floats: np.ndarray
    steps: dict[int, Step]
    sheets: dict[str, Sheet]
    leaving: dict[str, Sheet]
    exposes: tuple[str, ...]
    active: dict[str, int]
    baseline: dict[str, int]
    arena_size: int
    touched_size: int
    active_size: int
    units: int
    pixels: int

    @property
    def by_rule(self) -> frozenset[str]:
        """Names of the nodes at which the table stops, because it has nothing for their rule."""
        stops = np.flatnonzero(self.table[:, k.OP] == k.STOP)
        return frozenset(self.steps[row].node.name for row in stops.tolist())


def lower(plan: Plan, weights: WeightStore, *, trace: bool) -> Program:
    """Lower a plan.

    Parameters
    ----------
    weights : WeightStore
        Takes the weights; shared by all plans of a model.
    trace : bool
        Keep the gradients at both sides of every activation instead of reusing their storage.
    """
    return _Lowering(plan, weights, trace).program()


@dataclass(eq=False)
class _Lowering:
    plan: Plan
    weights: WeightStore
    trace: bool
    rows: list[tuple[Columns, dict[int, float]]] = field(default_factory=list)
    steps: dict[int, Step] = field(default_factory=dict)
    sheets: dict[str, Sheet] = field(default_factory=dict)
    leaving: dict[str, Sheet] = field(default_factory=dict)
    exposes: dict[str, None] = field(default_factory=dict)
    active: dict[str, int] = field(default_factory=dict)
    baseline: dict[str, int] = field(default_factory=dict)
    free: list[tuple[int, int]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    arena_size: int = 0
    touched_size: int = 0
    active_size: int = 0

    def __post_init__(self) -> None:
        self.graph = self.plan.graph
        self.step_of = {step.node.outputs[0]: step for step in self.plan.steps}
        self.readers = Counter(v for step in self.plan.steps for v in step.writes)

    def program(self) -> Program:
        self._allocate(self.graph.logits)
        for step in self.plan.steps:
            if step.node.name not in self.done:
                self._lower(step)
        table = np.zeros((len(self.rows), k.COLUMNS), np.int64)
        floats = np.zeros((len(self.rows), k.FLOATS))
        for i, (columns, numbers) in enumerate(self.rows):
            table[i, list(columns)] = list(columns.values())
            floats[i, list(numbers)] = list(numbers.values())
        sheets = self.sheets.values()
        return Program(
            plan=self.plan,
            table=table,
            floats=floats,
            steps=self.steps,
            sheets=self.sheets,
            leaving=self.leaving,
            exposes=tuple(self.exposes),
            active=self.active,
            baseline=self.baseline,
            arena_size=self.arena_size,
            touched_size=self.touched_size,
            active_size=self.active_size,
            units=max(s.pixels * s.channels for s in sheets),
            pixels=max(s.pixels for s in sheets),
        )

    def _lower(self, step: Step) -> None:
        handler = _handler(step, self.graph.batch)
        if handler is None or not handler(self, step):
            self.reference(step)
        if step.node.name in self.leaving:
            target = self.sheet(step.node.inputs[0]).target
            self.emit(k.ADD, self.leaving[step.node.name].source, target)
        self.finished(step)

    def finished(self, step: Step) -> None:
        """The gradient at the node's outputs is no longer needed."""
        self.done.add(step.node.name)
        for value in step.node.outputs:
            if value in self.sheets:
                self._release(self.sheets[value].storage)

    def reference(self, step: Step) -> None:
        """Stop here, and let the rule itself do the step."""
        for value in (*step.node.outputs, *step.writes):
            if value:
                self.sheet(value)
        if step.node.name in self.plan.layers:
            self.leaves(step)
        self.exposes.update(dict.fromkeys(v for v in step.reads if v not in self.graph.constants))
        self.steps[len(self.rows)] = step
        self.emit(k.STOP)

    def emit(
        self, operation: int, *columns: Columns, numbers: dict[int, float] | None = None
    ) -> None:
        merged: Columns = {k.OP: operation}
        for part in columns:
            merged |= part
        self.rows.append((merged, numbers or {}))

    # Values: which storage holds a gradient, and where activations lie.

    def extents(self, value: str) -> tuple[int, int, int]:
        """Height, width, channels; (1, 1, units) where the value is no image."""
        shape = self.graph.shapes[value]
        assert shape is not None
        if len(shape) == 4 and shape[0] == self.graph.batch:
            return shape[2], shape[3], shape[1]
        return 1, 1, prod(shape) // self.graph.batch

    def sheet(self, value: str) -> Sheet:
        """The value's sheet; a new one begins empty."""
        if value not in self.sheets:
            self.emit(k.FORGET, self._allocate(value).target)
        return self.sheets[value]

    def name(self, value: str, sheet: Sheet) -> None:
        """Let the value's gradient be `sheet`."""
        self.sheets[value] = sheet
        sheet.storage.users += 1

    def pass_on(self, value: str, sheet: Sheet) -> None:
        """The gradient at `value` is `sheet`: under another name if nothing else adds to it."""
        if self.readers[value] == 1 and value not in self.sheets and not self.trace:
            self.name(value, sheet)
        else:
            target = self.sheet(value)
            self.emit(k.ADD, sheet.source, target.target)

    def leaves(self, step: Step) -> Sheet:
        """Where the gradient goes that leaves an activation.

        A trace shows it apart from what other readers of the pre-activation add to it.
        """
        z, name = step.node.inputs[0], step.node.name
        if self.readers[z] == 1 or not self.trace:
            return self.sheet(z)
        if name not in self.leaving:
            self.leaving[name] = self._new(self.extents(z))
            self.emit(k.FORGET, self.leaving[name].target)
        return self.leaving[name]

    def activations(self, value: str) -> Columns:
        """Where the value's activations lie; asks the forward pass for them."""
        height, width, channels = self.extents(value)
        units = height * width * channels
        if value not in self.active:
            self.active[value] = self._reserve(value)
        return {k.A_OFFSET: self.active[value], k.A_LENGTH: units, k.A_STRIDE: channels}

    def at_baseline(self, value: str) -> Columns:
        """Where the value's activations at the baseline lie."""
        if value not in self.baseline:
            self.baseline[value] = self._reserve(value)
        return {k.B_OFFSET: self.baseline[value], k.B_LENGTH: prod(self.extents(value))}

    def _reserve(self, value: str) -> int:
        begin = self.active_size
        self.active_size += -(-prod(self.extents(value)) * self.graph.batch // LINE) * LINE
        return begin

    def _allocate(self, value: str) -> Sheet:
        self.name(value, self._new(self.extents(value)))
        return self.sheets[value]

    def _new(self, extents: tuple[int, int, int]) -> Sheet:
        """First fit among what was given back, in whole cache lines."""
        height, width, channels = extents
        size = -(-height * width * channels // LINE) * LINE
        fits = (i for i, (_, length) in enumerate(self.free) if length >= size)
        where = next(fits, None)
        if where is None:
            offset = self.arena_size
            self.arena_size += size
        else:
            offset, length = self.free.pop(where)
            if length > size:
                self.free.insert(where, (offset + size, length - size))
        storage = Storage(offset, size, self.touched_size)
        self.touched_size += height * width
        return Sheet(storage, 0, channels, height, width, channels)

    def _release(self, storage: Storage) -> None:
        storage.users -= 1
        if storage.users or self.trace:
            return
        merged: list[tuple[int, int]] = []
        for offset, size in sorted([*self.free, (storage.offset, storage.size)]):
            if merged and sum(merged[-1]) == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((offset, size))
        self.free = merged

    # Operators. Each handler says whether it could express the step.

    def activation(self, step: Step) -> bool:
        mode = activation_mode(step, self.graph.batch)
        if mode is None:
            return self.ratio(step)
        columns, numbers = mode
        node = step.node
        sheet = self.sheet(node.outputs[0])
        reads = self.activations(node.outputs[0])
        z = node.inputs[0]
        before = self.step_of.get(z) if self.readers[z] == 1 else None
        straight = before if before and scatters(before, self.graph.batch) else None
        # A trace shows what arrives, so that nothing may be cleared where it lies.
        limit = {k.DENSE: NEVER} if self.trace else _limit(sheet, straight)
        self.emit(k.ACTIVATE, sheet.source, reads, columns, limit, numbers=numbers)
        if straight is None or self.trace:
            self.emit(k.STORE, sheet.source, self.leaves(step).target)
        else:
            # Should it be too much for the scatter, the layer's own sheet holds it.
            self.name(z, sheet)
        if straight is not None:
            self.scatter(straight)
            self.finished(straight)
        return True

    def ratio(self, step: Step) -> bool:
        """A rule that multiplies by a ratio of what leaves a Relu to what enters it."""
        node, rule = step.node, step.rule
        if node.op != "Relu" or not isinstance(rule, (EpsilonRatio, Rescale)):
            return False
        sheet = self.sheet(node.outputs[0])
        if self.trace:
            # What arrives is shown too.
            self.emit(k.ADD, sheet.source, self.leaves(step).target)
            sheet = self.leaves(step)
        columns = self.activations(node.inputs[0])
        if isinstance(rule, Rescale):
            columns |= self.at_baseline(node.inputs[0]) | {k.MODE: k.BY_DIFFERENCE}
        else:
            columns |= {k.MODE: k.BY_EPSILON}
        self.emit(k.RATIO, sheet.source, columns, numbers={k.EPS: rule.eps})
        if not self.trace:
            self.pass_on(node.inputs[0], sheet)
        return True

    def convolution(self, step: Step) -> bool:
        if not scatters(step, self.graph.batch):
            return False
        sheet = self.sheet(step.node.outputs[0])
        self.emit(k.COMPACT, sheet.source, _limit(sheet, step))
        self.scatter(step)
        return True

    def scatter(self, step: Step) -> None:
        """Add rows of weights for the nonzeros that the row before has collected."""
        node = step.node
        source = self.sheets[node.outputs[0]]
        if node.op == "Conv":
            target = self.sheet(node.inputs[0])
            columns = _window(Window.of(node)) | {k.GROUP: node["group"]}
            columns[k.W_OFFSET] = self.weights.add(node.inputs[1], "conv", lambda: conv_rows(node))
        else:
            image = self._flattened(node.inputs[0])
            target = self.sheet(image)
            h, w, c = target.height, target.width, target.channels
            columns = {k.KH: h, k.KW: w, k.SH: 1, k.SW: 1, k.DH: 1, k.DW: 1, k.GROUP: 1}
            use = f"matrix {h} {w} {node.attributes.get('transB')} {node.attributes.get('alpha')}"
            columns[k.W_OFFSET] = self.weights.add(
                node.inputs[1], use, lambda: matrix_rows(node, (c, h, w))
            )
        columns |= _limit(source, step)
        self.steps[len(self.rows)] = step
        self.emit(k.SCATTER, source.source, target.target, columns)

    def _flattened(self, value: str) -> str:
        """The image that only `value` is a flattened view of, or `value` itself.

        Its rows of weights can be brought to the image's axis order, so no gradient ever is.
        """
        step = self.step_of.get(value)
        if step is None or self.readers[value] != 1 or not renames(step):
            return value
        image = step.node.inputs[0]
        shape = self.graph.shapes[image] or ()
        if len(shape) != 4 or self.graph.shapes[value] != (shape[0], prod(shape[1:])):
            return value
        self.done.add(step.node.name)
        return image

    def rename(self, step: Step) -> bool:
        if not renames(step):
            return False
        value = step.node.inputs[0]
        sheet = self.sheet(step.node.outputs[0])
        if self.extents(value) != (sheet.height, sheet.width, sheet.channels):
            return False
        self.pass_on(value, sheet)
        return True

    def add(self, step: Step) -> bool:
        node = step.node
        shape = node.output_shapes[0]
        if any(node.input_shapes[p] != shape for p in step.positions):
            return False
        if node.op == "Sub" and step.positions != (0,):
            return False
        sheet = self.sheet(node.outputs[0])
        first, *others = step.writes
        # Only one operand can take over the sheet: what is done to it must not reach the others.
        for value in others:
            self.emit(k.ADD, sheet.source, self.sheet(value).target)
        self.pass_on(first, sheet)
        return True

    def concat(self, step: Step) -> bool:
        node = step.node
        rank = len(node.output_shapes[0])
        if (
            node["axis"] % rank != 1
            or rank not in (2, 4)
            or len(set(node.inputs)) < len(node.inputs)
        ):
            return False
        sheet = self.sheet(node.outputs[0])
        channel = 0
        for position, value in enumerate(node.inputs):
            width = node.input_shapes[position][1]
            if position in step.positions:
                part = Sheet(
                    sheet.storage,
                    sheet.first + channel,
                    sheet.stride,
                    sheet.height,
                    sheet.width,
                    width,
                )
                self.pass_on(value, part)
            channel += width
        return True

    def batch_normalization(self, step: Step) -> bool:
        node = step.node
        if step.positions != (0,) or any(c is None for c in node.constants[1:5]):
            return False
        if node.input_shapes[1] != (self.extents(node.inputs[0])[2],):
            return False
        factor = self.weights.add(node.outputs[0], "scale", lambda: channel_factor(node))
        source, target = self.sheet(node.outputs[0]), self.sheet(node.inputs[0])
        self.emit(k.SCALE, source.source, target.target, {k.W_OFFSET: factor})
        return True

    def max_pool(self, step: Step) -> bool:
        node = step.node
        first = isinstance(step.rule, Gradient) or step.rule == MaxPoolBackward("first")
        if not first or len(node["kernel_shape"]) != 2:
            return False
        parts = self._parts(node.inputs[0])
        source, target = self.sheet(node.outputs[0]), self.sheet(node.inputs[0])
        channel = 0
        for value in parts:
            width = self.extents(value)[2]
            between = {k.C_FIRST: channel, k.C_LAST: channel + width}
            self.emit(
                k.MAX_POOL,
                source.source,
                target.target,
                _window(Window.of(node)),
                self.activations(value),
                between,
            )
            channel += width
        return True

    def _parts(self, value: str) -> list[str]:
        """The values of which `value` is the concatenation along channels."""
        node = self.graph.producer.get(value)
        whole = (
            node is None
            or node.op != "Concat"
            or node["axis"] not in (1, -3)
            or any(v in self.graph.constants for v in node.inputs)
        )
        if node is None or whole:
            return [value]
        return [part for v in node.inputs for part in self._parts(v)]

    def average_pool(self, step: Step) -> bool:
        node = step.node
        if node.op == "AveragePool" and len(node["kernel_shape"]) != 2:
            return False
        if len(node.input_shapes[0]) != 4:
            return False
        source, target = self.sheet(node.outputs[0]), self.sheet(node.inputs[0])
        if node.op == "AveragePool":
            window = Window.of(node)
            padded = window.declared_input
            columns = _window(window) | {
                k.COUNT_PAD: node["count_include_pad"],
                k.PADDED_H: padded[0],
                k.PADDED_W: padded[1],
            }
        else:
            h, w = target.height, target.width
            columns = {k.KH: h, k.KW: w, k.SH: 1, k.SW: 1, k.DH: 1, k.DW: 1}
        self.emit(k.AVERAGE_POOL, source.source, target.target, columns)
        return True


def _limit(sheet: Sheet, step: Step | None) -> Columns:
    """How many nonzeros are too many for a list, and whether the padding trick forgets some first.

    Whoever decides counts in this way, so that one path is taken for one gradient. A matrix has no
    other way than a list.
    """
    if step is not None and step.node.op != "Conv":
        return {k.DENSE: NEVER}
    border = step is not None and isinstance(step.rule, ConvTranspose) and step.rule.mask_border
    return {k.DENSE: int(DENSITY * sheet.pixels * sheet.channels), k.BORDER: int(border)}


Handler = Callable[[_Lowering, Step], bool]
_HANDLERS: dict[str, Handler] = {
    "Relu": _Lowering.activation,
    "Clip": _Lowering.activation,
    "Conv": _Lowering.convolution,
    "Gemm": _Lowering.convolution,
    "MatMul": _Lowering.convolution,
    "Add": _Lowering.add,
    "Sub": _Lowering.add,
    "Concat": _Lowering.concat,
    "BatchNormalization": _Lowering.batch_normalization,
    "MaxPool": _Lowering.max_pool,
    "AveragePool": _Lowering.average_pool,
    "GlobalAveragePool": _Lowering.average_pool,
    "Identity": _Lowering.rename,
    "Dropout": _Lowering.rename,
    "Cast": _Lowering.rename,
    "Flatten": _Lowering.rename,
    "Reshape": _Lowering.rename,
    "Squeeze": _Lowering.rename,
    "Unsqueeze": _Lowering.rename,
}


def _handler(step: Step, batch: int) -> Handler | None:
    """What may express the step: it can be cut into samples if they lie along every axis 0.

    A model for one image may fold other things into that axis.
    """
    node = step.node
    shapes = (node.output_shapes[0], *(node.input_shapes[p] for p in step.positions))
    return _HANDLERS.get(node.op) if all(shape[:1] == (batch,) for shape in shapes) else None


def renames(step: Step) -> bool:
    """Whether the step only gives its gradient another shape."""
    names = _HANDLERS.get(step.node.op) is _Lowering.rename
    return names and isinstance(step.rule, Gradient) and step.positions == (0,)


def scatters(step: Step, batch: int) -> bool:
    """Whether the step is the transpose of constant weights that the table knows."""
    node = step.node
    if _handler(step, batch) is not _Lowering.convolution:
        return False
    if step.positions != (0,) or not isinstance(step.rule, (Gradient, ConvTranspose)):
        return False
    if len(node.constants) < 2 or node.constants[1] is None:
        return False
    if node.op == "Conv":
        return len(node["kernel_shape"]) == 2
    matrices = len(node.input_shapes[0]) == 2 and len(node.input_shapes[1]) == 2
    return matrices and (node.op == "MatMul" or (node.op == "Gemm" and not node["transA"]))


def _window(window: Window) -> Columns:
    names = (k.KH, k.KW, k.SH, k.SW, k.DH, k.DW, k.TOP, k.LEFT)
    values = (*window.kernel_shape, *window.strides, *window.dilations, *window.pads[:2])
    return dict(zip(names, values, strict=True))


def conv_rows(node: Node) -> np.ndarray:
    """A convolution's weights as rows (C_out, kh, kw, C_in per group)."""
    weights = node.constants[1]
    assert weights is not None
    return weights.transpose(0, 2, 3, 1)


def matrix_rows(node: Node, image: tuple[int, int, int]) -> np.ndarray:
    """The matrix that maps a flattened image (C, H, W), as rows (outputs, H, W, C)."""
    weights = node.constants[1]
    assert weights is not None
    if node.op == "MatMul" or not node["transB"]:
        weights = weights.T
    if node.op == "Gemm":
        weights = weights * np.float32(node["alpha"])
    return weights.reshape(len(weights), *image).transpose(0, 2, 3, 1)


def channel_factor(node: Node) -> np.ndarray:
    """What a batch normalisation multiplies each channel by."""
    scale, variance = node.constants[1], node.constants[4]
    assert scale is not None and variance is not None
    return scale / np.sqrt(variance + np.float32(node["epsilon"]))


def activation_mode(step: Step, batch: int) -> tuple[Columns, dict[int, float]] | None:
    """The columns that express the rule at a Relu or ReLU-N, or None."""
    node, rule = step.node, step.rule
    is_relu = node.op == "Relu"
    ceiling = np.inf if is_relu else _ceiling(node)
    if step.positions != (0,) or ceiling is None:
        return None
    if isinstance(rule, Gradient):
        return {k.MODE: k.PASS_ACTIVE}, {k.CEILING: ceiling}
    if isinstance(rule, PositiveGradient):
        both = rule.guided or not is_relu
        return {k.MODE: k.PASS_BOTH if both else k.PASS_POSITIVE}, {k.CEILING: ceiling}
    if isinstance(rule, Rectify):
        return _rectify_mode(rule, node, batch, ceiling)
    return None


def _ceiling(node: Node) -> float | None:
    """The upper bound of a Clip between 0 and a constant, or None."""
    low, high = (*node.constants, None, None)[1:3]
    if low is None or low.size != 1 or low.item() != 0:
        return None
    if len(node.inputs) > 2 and node.inputs[2] and high is None:
        return None
    return np.inf if high is None else float(high.item())


def _rectify_mode(
    rule: Rectify, node: Node, batch: int, ceiling: float
) -> tuple[Columns, dict[int, float]] | None:
    clips = node.op == "Clip" and rule.derivative
    strict = clips or (node.op == "Relu" and rule.strict_relu)
    numbers = {k.CEILING: ceiling if clips else np.inf, k.EPS: rule.eps}
    if rule.score not in _MODES or rule.scope != "sample" or rule.strictness != ">":
        return None
    if rule.score == "(a+eps)*r" and strict:
        return None
    columns = {k.MODE: _MODES[rule.score], k.STRICT: int(strict)}
    if rule.tau is not None:
        return columns, numbers | {k.TAU: rule.tau}
    units = prod(node.output_shapes[0]) // batch
    low, high, fraction = ranks(units, rule.q, rule.percentile)
    columns |= {k.RANK_LOW: units - 1 - low, k.RANK_HIGH: units - 1 - high}
    return columns, numbers | {k.TAU: np.nan, k.FRACTION: fraction}


def is_lowerable(plan: Plan) -> bool:
    """Whether every gradient can be cut into samples along axis 0."""
    graph = plan.graph
    if graph.batch == 1:
        return True
    axes = sample_axes(graph)
    return all(
        axes.get(v) == 0 for step in plan.steps for v in (*step.node.outputs, *step.writes) if v
    )


def runs_as(plan: Plan) -> dict[str, str]:
    """Node name → what executes the step: a compiled kernel, or the rule in NumPy."""
    result = dict.fromkeys((step.node.name for step in plan.steps), "numpy")
    if is_lowerable(plan):
        program = lower(plan, NoWeights(), trace=False)
        result.update(dict.fromkeys(result.keys() - program.by_rule, "numba"))
    return result


class NoWeights(WeightStore):
    """For a table that is only looked at."""

    def add(self, name: str, use: str, make: Callable[[], np.ndarray]) -> int:
        return 0


def image_of(
    sheet: Sheet, arenas: np.ndarray, touched: np.ndarray, samples: np.ndarray
) -> np.ndarray:
    """The sheet of some samples, each row of which is written; a view where they are neighbours.

    Parameters
    ----------
    arenas : float32 array, (N, …); touched : uint8 array, (N, …); samples : int array, (n,)

    Returns
    -------
    numpy.ndarray, shape (n, H, W, C)
    """
    rows, _ = _views(sheet, arenas, touched)
    part = rows[_indices(samples), :, sheet.first : sheet.first + sheet.channels]
    return part.reshape(len(samples), sheet.height, sheet.width, sheet.channels)


def add_image(
    sheet: Sheet,
    arenas: np.ndarray,
    touched: np.ndarray,
    image: np.ndarray,
    samples: np.ndarray,
    channels: slice,
) -> None:
    """Add a gradient (n, H, W, C) to channels of a sheet that is nobody's part; see `mark`."""
    rows, marks = _views(sheet, arenas, touched)
    pick = _indices(samples)
    image, known = image.reshape(len(samples), sheet.pixels, -1), marks[pick]
    if known.all():
        rows[pick, :, channels] += image
        return
    if known.any():
        image = np.where(known[:, :, None] != 0, rows[pick, :, channels], np.float32(0)) + image
    rows[pick, :, channels] = image


def mark(sheet: Sheet, touched: np.ndarray, samples: np.ndarray) -> None:
    """Every row of the sheet holds numbers now."""
    begin = sheet.storage.touched
    touched[_indices(samples), begin : begin + sheet.pixels] = 1


def _indices(samples: np.ndarray) -> slice | np.ndarray:
    """Neighbours as a slice, of which NumPy makes no copy."""
    first, last = int(samples[0]), int(samples[-1])
    return slice(first, last + 1) if last - first + 1 == len(samples) else samples


def array_of(
    sheet: Sheet, arenas: np.ndarray, touched: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """A copy of one sheet of all samples, in the value's own shape and axis order."""
    rows, marks = _views(sheet, arenas, touched)
    part = rows[:, :, sheet.first : sheet.first + sheet.channels]
    result = np.empty((len(rows), sheet.channels, sheet.pixels), np.float32)
    np.copyto(result, part.transpose(0, 2, 1))
    if not marks.all():
        np.copyto(result, np.float32(0), where=marks[:, None, :] == 0)
    return result.reshape(shape)


def add_array(sheet: Sheet, arenas: np.ndarray, touched: np.ndarray, value: np.ndarray) -> None:
    """Add a gradient in the value's own axis order to a sheet that is nobody's part."""
    everyone = np.arange(len(arenas))
    image = value.reshape(len(arenas), sheet.channels, sheet.height, sheet.width)
    last = image.transpose(0, 2, 3, 1)
    add_image(sheet, arenas, touched, last, everyone, slice(None))
    mark(sheet, touched, everyone)


def _views(sheet: Sheet, arenas: np.ndarray, touched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole rows of the storage (N, pixels, stride), and their marks (N, pixels)."""
    begin, marks = sheet.storage.offset, sheet.storage.touched
    rows = arenas[:, begin : begin + sheet.pixels * sheet.stride]
    return (
        rows.reshape(len(arenas), sheet.pixels, sheet.stride),
        touched[:, marks : marks + sheet.pixels],
    )
