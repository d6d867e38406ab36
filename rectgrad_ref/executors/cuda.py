"""A plan lowered to launches of `kernels.cuda`.

Lowering walks the plan once, for one batch size. Every value gets a *sheet* for its gradient, in
its own axis order, so that reshapes and concatenations are other names for the same floats.
Everything is decided here: which floats a launch reads and writes, whether it adds to what is there
or is the first to write, and which way a convolution's transpose takes. A call only replays the
launches; what has no kernel stays a step of the reference, on the host.

A convolution's transpose goes by a list of nonzeros where, by the percentile and the shapes, at
most `DENSITY` of its output's gradient can be nonzero, and by a dense product in onnxruntime where
more may be. So the way depends on neither data nor method, and nothing waits for the host to count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from ..graph import Node
from ..kernels import cpu as modes
from ..kernels import cuda as k
from ..plan import Plan, Step
from ..rules.declared import (
    ConvTranspose,
    EpsilonRatio,
    Gradient,
    MaxPoolBackward,
    Redistribute,
    Rescale,
)
from ..rules.window import Window
from .cpu import (
    NoWeights,
    WeightStore,
    activation_mode,
    channel_factor,
    conv_rows,
    is_lowerable,
    matrix_rows,
    renames,
    scatters,
)

# Above this part of possible nonzeros a dense product is faster (estimated; to be measured).
DENSITY = 0.05

# Threads of a block that goes through units, and how many units one thread does.
THREADS, UNITS = 256, 4
# Of selection: units that a block counts at least, and blocks that fill a GPU.
PART, BLOCKS = 8192, 264
# Of lists and their transposes: threads of a block, neighbouring channels or pixels, and pixels.
GROUP, LANES, PIXELS = 256, 32, 32
ALIGNMENT = 64  # floats

Scalar = int | float | np.float32


@dataclass(eq=False)
class Storage:
    """Floats of the arena: N rows, and how many values still use them."""

    offset: int
    stride: int
    users: int = 0


@dataclass(frozen=True)
class Sheet:
    """A value's gradient: `units` floats of each row of a storage, from `first` on."""

    storage: Storage
    first: int
    units: int

    @property
    def place(self) -> tuple[int, int]:
        """Where sample 0 begins, and how far apart samples are."""
        return self.storage.offset + self.first, self.storage.stride

    @property
    def is_whole(self) -> bool:
        """Whether samples follow each other without a gap."""
        return self.storage.stride == self.units


@dataclass(frozen=True)
class Shared:
    """An argument that is 0 where all samples have the same baseline."""

    units: int


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel's launch: arguments are scalars, or names of arrays."""

    kernel: str
    blocks: tuple[int, ...]
    threads: tuple[int, ...]
    arguments: tuple[Scalar | str | Shared, ...]


@dataclass(frozen=True, eq=False)
class Product:
    """A convolution's transpose as a dense product, of sheets without gaps."""

    node: Node
    source: Sheet
    target: Sheet


@dataclass(frozen=True, eq=False)
class HostStep:
    """A step of the reference; where each of its results goes, and whether it is added there."""

    step: Step
    targets: tuple[tuple[Sheet, int], ...]


Item = Launch | Product | HostStep


@dataclass(eq=False)
class Program:
    """A lowered plan.

    Attributes
    ----------
    items : tuple of Item
        In order.
    sheets : dict of str to Sheet
        Of every value, valid until its storage is reused.
    leaving : dict of str to Sheet
        Of a trace: name of an activation → the gradient that leaves it.
    exposes : tuple of str
        Values that steps of the reference read.
    active, baseline : dict of str to int
        Values that kernels read → where they begin; those at the baseline too.
    sizes : dict of str to int
        Of the arrays that the launches name.
    """

    plan: Plan
    items: tuple[Item, ...]
    sheets: dict[str, Sheet]
    leaving: dict[str, Sheet]
    exposes: tuple[str, ...]
    active: dict[str, int]
    baseline: dict[str, int]
    sizes: dict[str, int]

    @property
    def by_rule(self) -> frozenset[str]:
        """Names of the nodes whose steps the reference does."""
        return frozenset(i.step.node.name for i in self.items if isinstance(i, HostStep))


DTYPES: dict[str, Any] = {
    "arena": np.float32,
    "active": np.float32,
    "weights": np.float32,
    "values": np.float32,
    "which": np.int32,
    "counts": np.int32,
    "totals": np.int32,
    "tickets": np.int32,
    "states": np.int64,
    "tau": np.float64,
}
CLEARED = ("totals", "tickets")  # and so they stay
_LISTS = ("counts", "which", "values")


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
    items: list[Item] = field(default_factory=list)
    sheets: dict[str, Sheet] = field(default_factory=dict)
    bounds: dict[str, int] = field(default_factory=dict)
    leaving: dict[str, Sheet] = field(default_factory=dict)
    exposes: dict[str, None] = field(default_factory=dict)
    active: dict[str, int] = field(default_factory=dict)
    baseline: dict[str, int] = field(default_factory=dict)
    free: list[tuple[int, int]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.graph, self.batch = self.plan.graph, self.plan.graph.batch
        self.step_of = {step.node.outputs[0]: step for step in self.plan.steps}
        self.readers = Counter(v for step in self.plan.steps for v in step.writes)
        self.sizes = dict.fromkeys(DTYPES, 1)

    def program(self) -> Program:
        self.target(self.graph.logits)
        for step in self.plan.steps:
            if step.node.name not in self.done:
                self._lower(step)
        return Program(
            plan=self.plan,
            items=tuple(self.items),
            sheets=self.sheets,
            leaving=self.leaving,
            exposes=tuple(self.exposes),
            active=self.active,
            baseline=self.baseline,
            sizes=self.sizes,
        )

    def _lower(self, step: Step) -> None:
        handler = _handler(step, self.batch)
        written = step.node.outputs[0] in self.sheets
        if handler is None or not written or not handler(self, step):
            self.reference(step)
        if step.node.name in self.leaving:
            self.pass_on(step.node.inputs[0], self.leaving[step.node.name], self.units_of(step))
        self.finished(step)

    def finished(self, step: Step) -> None:
        """The gradient at the node's outputs is no longer needed."""
        self.done.add(step.node.name)
        for value in step.node.outputs:
            if value in self.sheets:
                self.release(self.sheets[value].storage)

    def reference(self, step: Step) -> None:
        """Let the rule itself do the step, on the host."""
        targets = []
        for position, value in zip(step.positions, step.writes, strict=True):
            shown = self.trace and position == 0 and step.node.name in self.plan.layers
            targets.append((self.leaves(step), 0) if shown else self.target(value))
        self.exposes.update(dict.fromkeys(v for v in step.reads if v not in self.graph.constants))
        self.items.append(HostStep(step, tuple(targets)))

    # Values: which floats hold a gradient, and where activations lie.

    def units(self, value: str) -> int:
        """Floats of one sample."""
        shape = self.graph.shapes[value]
        assert shape is not None
        return prod(shape) // self.batch

    def units_of(self, step: Step) -> int:
        return self.units(step.node.inputs[0])

    def bound(self, value: str) -> int:
        """How many units of a sample's gradient can be nonzero."""
        return min(self.bounds.get(value, self.units(value)), self.units(value))

    def target(self, value: str, bound: int | None = None) -> tuple[Sheet, int]:
        """Where to write the value's gradient, and whether to add to what is there."""
        bound = self.units(value) if bound is None else bound
        adds = value in self.sheets
        if not adds:
            self.name(value, self.new(self.units(value)))
        self.bounds[value] = bound + (self.bounds.get(value, 0) if adds else 0)
        return self.sheets[value], int(adds)

    def name(self, value: str, sheet: Sheet) -> None:
        """Let the value's gradient be `sheet`."""
        self.sheets[value] = sheet
        sheet.storage.users += 1

    def takes_over(self, value: str) -> bool:
        """Whether a finished sheet can become the value's, because nothing else adds to it."""
        return self.readers[value] == 1 and value not in self.sheets and not self.trace

    def pass_on(self, value: str, sheet: Sheet, bound: int) -> None:
        """The gradient at `value` is `sheet`."""
        if self.takes_over(value):
            self.name(value, sheet)
            self.bounds[value] = bound
        else:
            self.copy(sheet, *self.target(value, bound))

    def leaves(self, step: Step) -> Sheet:
        """Of a trace: where the gradient goes that leaves an activation."""
        self.leaving[step.node.name] = self.new(self.units_of(step))
        return self.leaving[step.node.name]

    def activations(self, value: str) -> int:
        """Where the value's activations begin; asks the forward pass for them."""
        return self._reserved(self.active, value)

    def at_baseline(self, value: str) -> int:
        """The same at the baseline."""
        return self._reserved(self.baseline, value)

    def _reserved(self, places: dict[str, int], value: str) -> int:
        if value not in places:
            begin = -(-self.sizes["active"] // ALIGNMENT) * ALIGNMENT
            places[value] = begin
            self.sizes["active"] = begin + self.units(value) * self.batch
        return places[value]

    def new(self, units: int) -> Sheet:
        """First fit among what was given back."""
        size = -(-units * self.batch // ALIGNMENT) * ALIGNMENT
        where = next((i for i, (_, length) in enumerate(self.free) if length >= size), None)
        if where is None:
            offset = -(-self.sizes["arena"] // ALIGNMENT) * ALIGNMENT
            self.sizes["arena"] = offset + size
        else:
            offset, length = self.free.pop(where)
            if length > size:
                self.free.insert(where, (offset + size, length - size))
        return Sheet(Storage(offset, units), 0, units)

    def release(self, storage: Storage) -> None:
        storage.users -= 1
        if storage.users > 0 or self.trace:
            return
        size = -(-storage.stride * self.batch // ALIGNMENT) * ALIGNMENT
        merged: list[tuple[int, int]] = []
        for offset, length in sorted([*self.free, (storage.offset, size)]):
            if merged and sum(merged[-1]) == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((offset, length))
        self.free = merged

    def need(self, **sizes: int) -> None:
        """Make sure that arrays are as large."""
        for name, size in sizes.items():
            self.sizes[name] = max(self.sizes[name], size)

    # Launches.

    def by_unit(self, kernel: str, units: int, *arguments: Scalar | str | Shared) -> None:
        """A kernel that goes through the units of every sample."""
        blocks = (self.batch, max(1, -(-units // (THREADS * UNITS))))
        self.items.append(Launch(kernel, blocks, (THREADS,), arguments))

    def copy(
        self,
        source: Sheet,
        target: Sheet,
        adds: int,
        *,
        pixels: int = 1,
        factor: int = -1,
        border: tuple[int, int] | None = None,
    ) -> None:
        """Copy or add a sheet, times a factor per channel, or without its border."""
        height, width = border or (1, 1)
        self.by_unit(
            "add", source.units, "arena", *source.place, *target.place, adds, source.units,
            height * width if border else pixels, "weights", factor, height, width,
            int(border is not None),
        )  # fmt: skip

    def select(self, source: Sheet, scores: _Scores) -> None:
        """Find τ of every sample."""
        units = source.units
        parts = max(1, min(units // PART, BLOCKS // self.batch))
        low, high = scores.ranks
        arguments = (
            "arena", *source.place, "active", scores.active, units, scores.mode, scores.eps, low,
            high, scores.fraction, "tau",
        )  # fmt: skip
        self.need(tau=self.batch)
        threads = (min(k.THREADS, 2 * THREADS),)
        if parts == 1:
            self.items.append(Launch("select", (self.batch,), threads, arguments))
            return
        self.need(totals=self.batch * k.COUNTS, tickets=self.batch, states=self.batch * k.STATE)
        for step in range(k.DIGITS):
            whole = (*arguments, step, "totals", "states", "tickets")
            self.items.append(Launch("select_digit", (self.batch, parts), threads, whole))

    def listed(self, step: Step, source: Sheet, condition: tuple[Scalar | str, ...]) -> None:
        """A convolution's or matrix's transpose by a list of what passes the condition."""
        channels, height, width = _extents(step.node.output_shapes[0])
        pixels = height * width
        units = self.batch * source.units
        self.need(counts=self.batch * pixels, which=units, values=units)
        # Of few pixels each block takes some only, so that there are enough blocks.
        across = LANES if self.batch * pixels >= LANES * BLOCKS else max(1, LANES // 4)
        across = min(across, _power_of_two(pixels))
        groups = max(1, min(2 * GROUP // across, channels))
        border = int(isinstance(step.rule, ConvTranspose) and step.rule.mask_border)
        arguments = (
            "arena", *source.place, *condition[:2], channels, height, width, border, *condition[2:],
            *_LISTS,
        )  # fmt: skip
        blocks = (self.batch, -(-pixels // across))
        self.items.append(Launch("compact", blocks, (across, groups), arguments))
        self._gather(step.node)

    def _gather(self, node: Node) -> None:
        """The transpose of a convolution, or of a matrix as one of a pixel, from the lists."""
        target, adds = self.target(node.inputs[0])
        if node.op == "Conv":
            extents = _extents(node.input_shapes[0])
            geometry = (*_geometry(Window.of(node)), node["group"])
            begin = self.weights.add(node.inputs[1], "conv", lambda: conv_rows(node))
        else:
            extents, geometry = (target.units, 1, 1), (1, 1, 1, 1, 1, 1, 0, 0, 1)
            use = f"rows {node.attributes.get('transB')} {node.attributes.get('alpha')}"
            begin = self.weights.add(node.inputs[1], use, lambda: matrix_rows(node, extents))
        row = extents[0] // geometry[-1] * prod(geometry[:2])
        pixels, lanes = prod(extents[1:]), min(LANES, _power_of_two(extents[0]))
        slices = -(-extents[0] // lanes)
        rows = min(GROUP // lanes, _power_of_two(pixels))
        tile = min(max(rows, PIXELS), k.TILE // (lanes + 1), _power_of_two(pixels))
        while tile > rows and self.batch * -(-pixels // tile) * slices < BLOCKS:
            tile //= 2
        arguments = (
            "arena", *target.place, adds, *extents, *_LISTS, *_extents(node.output_shapes[0]),
            "weights", begin, row, *geometry, tile,
        )  # fmt: skip
        blocks = (self.batch, -(-pixels // tile), slices)
        self.items.append(Launch("transpose", blocks, (lanes, min(rows, tile)), arguments))

    def product(self, step: Step) -> None:
        """A convolution's transpose as a dense product, between sheets without gaps."""
        node = step.node
        source, temporary = self.sheets[node.outputs[0]], []
        masks = isinstance(step.rule, ConvTranspose) and step.rule.mask_border
        if masks or not source.is_whole:
            whole = self.new(source.units)
            border = _extents(node.output_shapes[0])[1:] if masks else None
            self.copy(source, whole, 0, border=border)
            source = whole
            temporary.append(whole)
        target, adds = self.target(node.inputs[0])
        result = target
        if adds or not target.is_whole:
            result = self.new(target.units)
            temporary.append(result)
        self.items.append(Product(node, source, result))
        if result is not target:
            self.copy(result, target, adds)
        for sheet in temporary:
            self.release(sheet.storage)

    # Operators. Each handler says whether it could express the step.

    def activation(self, step: Step) -> bool:
        scores = _scores(step, self.batch)
        if scores is None:
            return self.ratio(step)
        node = step.node
        source, z = self.sheets[node.outputs[0]], node.inputs[0]
        scores.active = self.activations(node.outputs[0])
        bound = self.bound(node.outputs[0])
        if scores.selects:
            self.select(source, scores)
            bound = min(bound, scores.ranks[0])
        before = self.step_of.get(z) if self.readers[z] == 1 else None
        straight = before if before and self._is_listed(before, bound) else None
        if straight is None or self.trace:
            if self.trace:
                target, adds = self.leaves(step), 0
            elif self.takes_over(z):
                self.name(z, source)
                self.bounds[z], target, adds = bound, source, 0
            else:
                target, adds = self.target(z, bound)
            self.by_unit(
                "activate", source.units, "arena", *source.place, *scores.condition[:2],
                source.units, *scores.condition[2:], *target.place, adds,
            )  # fmt: skip
        if straight is not None:
            self.listed(straight, source, scores.condition)
            self.finished(straight)
        return True

    def ratio(self, step: Step) -> bool:
        """A rule that multiplies by a ratio of what leaves a Relu to what enters it."""
        node, rule = step.node, step.rule
        if node.op != "Relu" or not isinstance(rule, (EpsilonRatio, Rescale)):
            return False
        source, z = self.sheets[node.outputs[0]], node.inputs[0]
        begin, baseline, mode = self.activations(z), 0, modes.BY_EPSILON
        if isinstance(rule, Rescale):
            baseline, mode = self.at_baseline(z), modes.BY_DIFFERENCE
        if self.trace:
            target, adds = self.leaves(step), 0
        elif self.takes_over(z):
            self.name(z, source)
            target, adds = source, 0
        else:
            target, adds = self.target(z)
        self.by_unit(
            "ratio", source.units, "arena", *source.place, "active", begin, baseline,
            Shared(source.units), source.units, mode, np.float32(rule.eps), *target.place, adds,
        )  # fmt: skip
        return True

    def _is_listed(self, step: Step, bound: int) -> bool:
        """Whether so few nonzeros at its output are brought back by a list.

        A matrix has no other way.
        """
        if not scatters(step, self.batch):
            return False
        units = self.units(step.node.outputs[0])
        return step.node.op != "Conv" or bound <= DENSITY * units

    def convolution(self, step: Step) -> bool:
        if not scatters(step, self.batch):
            return False
        value = step.node.outputs[0]
        if self._is_listed(step, self.bound(value)):
            everything = (
                "active", 0, k.EVERYTHING, np.float32(0), np.float32(np.inf), 0, 0.0, "tau"
            )  # fmt: skip
            self.listed(step, self.sheets[value], everything)
        else:
            self.product(step)
        return True

    def rename(self, step: Step) -> bool:
        if not renames(step):
            return False
        value = step.node.outputs[0]
        self.pass_on(step.node.inputs[0], self.sheets[value], self.bound(value))
        return True

    def add(self, step: Step) -> bool:
        node = step.node
        if any(node.input_shapes[p] != node.output_shapes[0] for p in step.positions):
            return False
        if node.op == "Sub" and step.positions != (0,):
            return False
        sheet, bound = self.sheets[node.outputs[0]], self.bound(node.outputs[0])
        first, *others = step.writes
        # Only one operand can take over the sheet: what is done to it must not reach the others.
        for value in others:
            self.copy(sheet, *self.target(value, bound))
        self.pass_on(first, sheet, bound)
        return True

    def concat(self, step: Step) -> bool:
        node = step.node
        rank = len(node.output_shapes[0])
        if node["axis"] % rank != 1:
            return False
        sheet, bound, first = self.sheets[node.outputs[0]], self.bound(node.outputs[0]), 0
        for position, value in enumerate(node.inputs):
            units = self.units(value)
            if position in step.positions:
                part = Sheet(sheet.storage, sheet.first + first, units)
                self.pass_on(value, part, min(bound, units))
            first += units
        return True

    def batch_normalization(self, step: Step) -> bool:
        node = step.node
        shape = node.input_shapes[0]
        if step.positions != (0,) or any(c is None for c in node.constants[1:5]):
            return False
        if len(shape) < 2 or node.input_shapes[1] != (shape[1],):
            return False
        factor = self.weights.add(node.outputs[0], "scale", lambda: channel_factor(node))
        source, bound = self.sheets[node.outputs[0]], self.bound(node.outputs[0])
        target, adds = self.target(node.inputs[0], bound)
        self.copy(source, target, adds, pixels=prod(shape[2:]), factor=factor)
        return True

    def max_pool(self, step: Step) -> bool:
        node, rule = step.node, step.rule
        if len(node["kernel_shape"]) != 2:
            return False
        x = self.activations(node.inputs[0])
        source = self.sheets[node.outputs[0]]
        geometry = (
            *_extents(node.input_shapes[0])[1:], *_extents(node.output_shapes[0])[1:],
            *_geometry(Window.of(node)),
        )  # fmt: skip
        if isinstance(rule, Redistribute):
            between = self.new(source.units)
            self.by_unit(
                "share", source.units, "arena", *source.place, "active", x, np.float32(rule.eps),
                *between.place, source.units, *geometry,
            )  # fmt: skip
            self._spread(step, between, x, (-1, -1), geometry)
            self.release(between.storage)
            return True
        if not isinstance(rule, Gradient) and rule != MaxPoolBackward("first"):
            return False
        y = self.activations(node.outputs[0])
        target, adds = self.target(node.inputs[0])
        self.by_unit(
            "max_pool", target.units, "arena", *source.place, "active", x, y, *target.place, adds,
            target.units, *geometry,
        )  # fmt: skip
        return True

    def average_pool(self, step: Step) -> bool:
        node = step.node
        if len(node.input_shapes[0]) != 4:
            return False
        source, extents = self.sheets[node.outputs[0]], _extents(node.input_shapes[0])[1:]
        padded, outputs = (0, 0), (1, 1)
        window: tuple[int, ...] = (*extents, 1, 1, 1, 1, 0, 0)
        if node.op == "AveragePool":
            whole = Window.of(node)
            window, outputs = _geometry(whole), whole.output[:2]  # type: ignore[assignment]
            if node["count_include_pad"]:
                padded = whole.declared_input[:2]  # type: ignore[assignment]
        self._spread(step, source, -1, padded, (*extents, *outputs, *window))
        return True

    def _spread(
        self, step: Step, source: Sheet, x: int, padded: tuple[int, int], geometry: tuple[int, ...]
    ) -> None:
        target, adds = self.target(step.node.inputs[0])
        self.by_unit(
            "spread", target.units, "arena", *source.place, "active", x, *padded, *target.place,
            adds, target.units, *geometry,
        )  # fmt: skip


@dataclass(eq=False)
class _Scores:
    """How an activation decides what passes; see `kernels.cuda.activate`."""

    mode: int
    eps: np.float32
    ceiling: np.float32
    strict: int
    fixed: float
    ranks: tuple[int, int]
    fraction: float
    active: int = 0

    @property
    def selects(self) -> bool:
        """Whether τ is taken from the scores."""
        return bool(np.isnan(self.fixed))

    @property
    def condition(self) -> tuple[Scalar | str, ...]:
        """Arguments of the kernels that compare, the first two apart."""
        return (
            "active", self.active, self.mode, self.eps, self.ceiling, self.strict, self.fixed, "tau"
        )  # fmt: skip


def _scores(step: Step, batch: int) -> _Scores | None:
    found = activation_mode(step, batch)
    if found is None:
        return None
    columns, numbers = found
    return _Scores(
        mode=columns[modes.MODE],
        eps=np.float32(numbers.get(modes.EPS, 0)),
        ceiling=np.float32(numbers[modes.CEILING]),
        strict=columns.get(modes.STRICT, 0),
        fixed=float(numbers.get(modes.TAU, 0.0)),
        ranks=(columns.get(modes.RANK_LOW, 0), columns.get(modes.RANK_HIGH, 0)),
        fraction=float(numbers.get(modes.FRACTION, 0.0)),
    )


def _extents(shape: Sequence[int] | None) -> tuple[int, int, int]:
    """Channels, height and width; what is no image has one pixel."""
    assert shape is not None
    if len(shape) == 4:
        return shape[1], shape[2], shape[3]
    return prod(shape[1:]), 1, 1


def _power_of_two(n: int) -> int:
    """The next one that is not smaller."""
    return 1 << (n - 1).bit_length()


def _geometry(window: Window) -> tuple[int, ...]:
    return (*window.kernel_shape, *window.strides, *window.dilations, *window.pads[:2])


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
    """What may express the step: samples lie along axis 0 of all that it is about."""
    node = step.node
    shapes = (node.output_shapes[0], *(node.input_shapes[p] for p in step.positions))
    return _HANDLERS.get(node.op) if all(shape[:1] == (batch,) for shape in shapes) else None


def runs_as(plan: Plan) -> dict[str, str]:
    """Node name → what executes the step: a kernel, onnxruntime, or the rule in NumPy."""
    result = dict.fromkeys((step.node.name for step in plan.steps), "numpy")
    if is_lowerable(plan):
        result = dict.fromkeys(result, "cuda")
        for item in lower(plan, NoWeights(), trace=False).items:
            if isinstance(item, HostStep):
                result[item.step.node.name] = "numpy"
            elif isinstance(item, Product):
                result[item.node.name] = "onnxruntime"
    return result
