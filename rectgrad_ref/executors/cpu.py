"""A plan lowered to the table of `kernels.cpu`.

What the table cannot express stops it, and it goes on with the reference's result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from ..forward import Places
from ..graph import Node
from ..kernels import cpu as k
from ..kernels.simd import LANES
from ..plan import Plan, Step
from ..rules.window import Window
from . import lowering, storage
from .blocked import room_of
from .lowering import Condition, Lowering, geometry, masks_border, renames
from .storage import WeightStore

# Above this part of nonzeros a matrix product is faster than adding rows of weights one by one.
DENSITY = 0.2
NEVER = 2**62

Columns = dict[int, int]
# Where an operation reads activations, and those at a baseline.
_READING = (
    (k.A_OFFSET, k.A_LENGTH, k.A_STRIDE, k.A_STEP),
    (k.B_OFFSET, k.B_LENGTH, k.B_STRIDE, k.B_STEP),
)


@dataclass(eq=False)
class Storage(storage.Storage):
    """Floats and marks in a sample's arena."""

    touched: int


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


@dataclass(eq=False)
class Program(lowering.Program[Sheet]):
    """A lowered plan.

    Attributes
    ----------
    table, floats : numpy.ndarray
        For `kernels.cpu.advance`, of activations that lie channels last; see `table_for`.
    steps : dict of int to Step
        Table row → the step that may stop there: one for the reference, or a scatter.
    units, pixels : int
        Of the largest sheet.
    """

    table: np.ndarray
    floats: np.ndarray
    steps: dict[int, Step]
    arena_size: int
    touched_size: int
    active_size: int
    units: int
    pixels: int

    def __post_init__(self) -> None:
        self._tables: dict[tuple[Any, ...], np.ndarray] = {}

    def table_for(self, places: tuple[Places, Places], *, shares: bool) -> np.ndarray:
        """The table that reads what a forward pass left in memory.

        Parameters
        ----------
        places : tuple of Places
            Of activations, and of those at the baseline.
        shares : bool
            Whether all samples have one baseline.
        """
        sessions = [p.session for p in places]
        key = (*sessions, shares)
        if key not in self._tables:
            table = self.table.copy()
            for begins, session in zip((self.active, self.baseline), sessions, strict=True):
                for name in session.blocked if session is not None else ():
                    for columns in _READING:
                        rows = table[:, columns[0]] == begins[name]
                        table[np.ix_(rows, columns[1:])] = self._in_blocks(name)
            if shares:
                at_baseline = np.isin(table[:, k.B_OFFSET], list(self.baseline.values()))
                table[at_baseline, k.B_LENGTH] = 0
            self._tables[key] = table
        return self._tables[key]

    def _in_blocks(self, value: str) -> tuple[int, int, int]:
        """Floats of a sample, of a pixel in one block, and from a channel to the next block's."""
        shape = self.plan.graph.shapes[value]
        assert shape is not None
        return room_of((1, *shape[1:])), LANES, shape[2] * shape[3]


class TableLowering(Lowering[Sheet, Program]):
    """Writes the rows of the table."""

    executor, alignment, channels_last = "numba", storage.LINE, True

    def __init__(self, plan: Plan, weights: WeightStore, *, trace: bool) -> None:
        super().__init__(plan, weights, trace=trace)
        self.table: list[tuple[Columns, dict[int, float]]] = []
        self.steps: dict[int, Step] = {}
        self.touched_size = 0

    def program(self) -> Program:
        self.walk()
        table = np.zeros((len(self.table), k.COLUMNS), np.int64)
        floats = np.zeros((len(self.table), k.FLOATS))
        for i, (columns, numbers) in enumerate(self.table):
            table[i, list(columns)] = list(columns.values())
            floats[i, list(numbers)] = list(numbers.values())
        sheets = self.sheets.values()
        return Program(
            self.plan, self.weights.array, self.sheets, self.leaving, tuple(self.exposes),
            self.active, self.baseline, self.runs_as,
            table=table,
            floats=floats,
            steps=self.steps,
            arena_size=self.arena.size,
            touched_size=self.touched_size,
            active_size=self.values.size,
            units=max(s.pixels * s.channels for s in sheets),
            pixels=max(s.pixels for s in sheets),
        )  # fmt: skip

    def emit(
        self, operation: int, *columns: Columns, numbers: dict[int, float] | None = None
    ) -> None:
        merged: Columns = {k.OP: operation}
        for part in columns:
            merged |= part
        self.table.append((merged, numbers or {}))

    def stop(self, step: Step) -> None:
        for value in step.writes:
            self.sheet(value)
        if step.node.name in self.plan.layers:
            self.leaves(step)
        self.steps[len(self.table)] = step
        self.emit(k.STOP)

    # Values.

    def room_of(self, value: str) -> int:
        return room_of(self.graph.shapes[value] or ())

    def new(self, value: str) -> Sheet:
        channels, height, width = self.extents(value)
        size = channels * height * width
        storage = Storage(self.arena.take(size), size, self.touched_size)
        self.touched_size += height * width
        return Sheet(storage, 0, channels, height, width, channels)

    def part(self, sheet: Sheet, first: int, value: str) -> Sheet:
        return replace(sheet, first=sheet.first + first, channels=self.extents(value)[0])

    def add_to(self, value: str, sheet: Sheet) -> None:
        self.emit(k.ADD, sheet.source, self.sheet(value).target)

    def sheet(self, value: str) -> Sheet:
        """The value's sheet; a new one begins empty."""
        if value not in self.sheets:
            self.name(value, self._empty(value))
        return self.sheets[value]

    def _empty(self, value: str) -> Sheet:
        sheet = self.new(value)
        self.emit(k.FORGET, sheet.target)
        return sheet

    def leaves(self, step: Step) -> Sheet:
        """Where the gradient goes that leaves an activation."""
        z = step.node.inputs[0]
        if not self.is_apart(step):
            return self.sheet(z)
        self.leaving[step.node.name] = self._empty(z)
        return self.leaving[step.node.name]

    def reads(self, value: str, columns: tuple[int, ...] = _READING[0]) -> Columns:
        """Where the value's activations lie, channels last."""
        channels, height, width = self.extents(value)
        place = self.activations(value), channels * height * width, channels, 1
        return dict(zip(columns, place, strict=True))

    # Operators.

    def activate(self, step: Step, condition: Condition, linear: Step | None) -> None:
        sheet, value = self.incoming(step), step.node.outputs[0]
        # A trace shows what arrives, so that nothing may be cleared where it lies.
        limit = {k.DENSE: NEVER} if self.trace else _limit(sheet, linear)
        self._emit_activation(value, condition, limit)
        self.emit(k.LIST, sheet.source)
        if linear is None or self.trace:
            self.emit(k.STORE, sheet.source, self.leaves(step).target)
        else:
            # Should it be too much for the scatter, the layer's own sheet holds it.
            self.name(step.node.inputs[0], sheet)
        if linear is not None:
            self.scatter(linear)
            self.finished(linear)

    def _emit_activation(self, value: str, condition: Condition, limit: Columns) -> None:
        low, high = condition.ranks
        columns = {
            k.MODE: condition.mode,
            k.STRICT: int(condition.strict),
            k.RANK_LOW: low,
            k.RANK_HIGH: high,
        }
        numbers = {
            k.EPS: condition.eps,
            k.CEILING: condition.ceiling,
            k.TAU: condition.tau,
            k.FRACTION: condition.fraction,
        }
        source, reads = self.sheets[value].source, self.reads(value)
        self.emit(k.ACTIVATE, source, reads, columns, limit, numbers=numbers)

    def multiply(self, step: Step, value: str, mode: int, eps: float) -> None:
        sheet = self.incoming(step)
        if self.trace:
            # What arrives is shown too.
            shown = self.leaves(step)
            self.emit(k.ADD, sheet.source, shown.target)
            sheet = shown
        columns = self.reads(value) | {k.MODE: mode}
        if mode == k.BY_DIFFERENCE:
            there = self.at_baseline(value), *(columns[c] for c in _READING[0][1:])
            columns |= dict(zip(_READING[1], there, strict=True))
        self.emit(k.RATIO, sheet.source, columns, numbers={k.EPS: eps})
        if not self.trace:
            self.pass_on(step.node.inputs[0], sheet)

    def transpose(self, step: Step) -> None:
        sheet = self.incoming(step)
        self.emit(k.COMPACT, sheet.source, _limit(sheet, step))
        self.emit(k.LIST, sheet.source)
        self.scatter(step)

    def scatter(self, step: Step) -> None:
        """Add rows of weights for the nonzeros that the row before has collected."""
        node, source = step.node, self.incoming(step)
        value, group = node.inputs[0], 1
        if node.op == "Conv":
            group = node["group"]
        else:
            value = self._flattened(value)
        target, extents = self.sheet(value), self.extents(value)
        columns = _window(node, extents) | {k.GROUP: group, k.W_OFFSET: self.rows(node, extents)}
        columns |= _limit(source, step)
        self.steps[len(self.table)] = step
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
        self.finished(step)
        return image

    def scale(self, step: Step, factor: int) -> None:
        source, target = self.incoming(step), self.sheet(step.node.inputs[0])
        self.emit(k.SCALE, source.source, target.target, {k.W_OFFSET: factor})

    def to_maximum(self, step: Step) -> None:
        if not self._activates_maxima(step):
            self._to_maximum(step)

    def _activates_maxima(self, pool: Step) -> bool:
        """Ask the activation whose output is pooled about the maxima alone; see `kernels.cpu`.

        Returns whether kernels can, with all that comes before the activation.
        """
        node = pool.node
        value = node.inputs[0]
        step = self.step_of.get(value)
        if step is None or not self.takes_over(value) or not _are_apart(node):
            return False
        condition, linear = self.condition_of(step), self.linear_before(step)
        if condition is None or linear is None or self.extents(value)[0] % LANES:
            return False
        z = step.node.inputs[0]
        self.name(z, self._empty(z))
        source, target = self.incoming(pool), self.sheets[z]
        window = _window(node, self.extents(value)) | {k.C_LAST: target.channels}
        zeros = target.pixels * target.channels - source.pixels * source.channels
        limit = _limit(target, linear) | {k.BORDER: 0, k.ZEROS: zeros}
        if masks_border(linear):
            limit[k.DENSE] = NEVER  # the scatter decides, which sees what lies on the border
        self._emit_activation(node.outputs[0], condition, limit)
        reads = self.reads(value) | self.reads(node.outputs[0], _READING[1])
        self.emit(k.UNPOOL, source.source, target.target, window, reads)
        self.finished(pool)
        self.finished(step)
        self.scatter(linear)
        self.finished(linear)
        return True

    def _to_maximum(self, step: Step) -> None:
        node, channel = step.node, 0
        source, target = self.incoming(step), self.sheet(node.inputs[0])
        window = _window(node, self.extents(node.inputs[0]))
        for value in self._parts(node.inputs[0]):
            width = self.extents(value)[0]
            between = {k.C_FIRST: channel, k.C_LAST: channel + width}
            self.emit(k.MAX_POOL, source.source, target.target, window, self.reads(value), between)
            channel += width

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

    def to_all(self, step: Step, padded: tuple[int, ...]) -> None:
        node = step.node
        source, target = self.incoming(step), self.sheet(node.inputs[0])
        columns = _window(node, self.extents(node.inputs[0])) | {
            k.COUNT_PAD: int(any(padded)),
            k.PADDED_H: padded[0],
            k.PADDED_W: padded[1],
        }
        self.emit(k.AVERAGE_POOL, source.source, target.target, columns)


def _are_apart(pool: Node) -> bool:
    """Whether the windows of a pool do not overlap, and each begins at a cell of its own.

    Pads at the end do not matter.
    """
    window = Window.of(pool)
    axes = zip(
        window.input, window.output, window.kernel_shape, window.strides, window.dilations,
        window.pads, strict=False,
    )  # fmt: skip
    return all(
        pad == 0
        and (cells - 1) * stride < extent
        and (cells == 1 or (kernel - 1) * dilation < stride)
        for extent, cells, kernel, stride, dilation, pad in axes
    )


def _limit(sheet: Sheet, step: Step | None) -> Columns:
    """How many nonzeros are too many for a list, and whether the padding trick forgets some first.

    Whoever decides counts in this way, so that one path is taken for one gradient. A matrix has no
    other way than a list.
    """
    if step is not None and step.node.op != "Conv":
        return {k.DENSE: NEVER}
    border = step is not None and masks_border(step)
    return {k.DENSE: int(DENSITY * sheet.pixels * sheet.channels), k.BORDER: int(border)}


def _window(node: Node, image: tuple[int, int, int]) -> Columns:
    names = (k.KH, k.KW, k.SH, k.SW, k.DH, k.DW, k.TOP, k.LEFT)
    return dict(zip(names, geometry(node, image), strict=True))


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
    rows: slice,
) -> None:
    """Add a gradient (n, rows, W, C) to rows of a sheet that is nobody's part; see `mark`."""
    pixels, marks = _views(sheet, arenas, touched)
    where = _indices(samples), slice(rows.start * sheet.width, rows.stop * sheet.width)
    known = marks[where]
    image = image.reshape(*known.shape, sheet.channels)
    if known.all():
        pixels[where] += image
        return
    if known.any():
        image = np.where(known[:, :, None] != 0, pixels[where], np.float32(0)) + image
    pixels[where] = image


def unwritten(
    sheet: Sheet, arenas: np.ndarray, touched: np.ndarray, samples: np.ndarray, rows: slice
) -> np.ndarray | None:
    """One sample's rows (1, rows, W, C) of such a sheet, if nobody has written any of them yet."""
    pixels, marks = _views(sheet, arenas, touched)
    where = _indices(samples), slice(rows.start * sheet.width, rows.stop * sheet.width)
    if len(samples) > 1 or marks[where].any():
        return None
    return pixels[where].reshape(1, -1, sheet.width, sheet.channels)


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
    result = np.empty((len(arenas), sheet.channels * sheet.pixels), np.float32)
    read(sheet, arenas, touched, result)
    return result.reshape(shape)


def read(sheet: Sheet, arenas: np.ndarray, touched: np.ndarray, into: np.ndarray) -> None:
    """The same into an array (N, …), without gaps."""
    begin, marks = sheet.storage.offset + sheet.first, sheet.storage.touched
    result = into.reshape(len(arenas), sheet.channels, sheet.pixels)
    k.read(arenas, touched, begin, sheet.stride, marks, result)


def add_array(sheet: Sheet, arenas: np.ndarray, touched: np.ndarray, value: np.ndarray) -> None:
    """Add a gradient in the value's own axis order to a sheet that is nobody's part."""
    everyone = np.arange(len(arenas))
    image = value.reshape(len(arenas), sheet.channels, sheet.height, sheet.width)
    last = image.transpose(0, 2, 3, 1)
    add_image(sheet, arenas, touched, last, everyone, slice(0, sheet.height))
    mark(sheet, touched, everyone)


def _views(sheet: Sheet, arenas: np.ndarray, touched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole rows of the storage (N, pixels, stride), and their marks (N, pixels)."""
    begin, marks = sheet.storage.offset, sheet.storage.touched
    rows = arenas[:, begin : begin + sheet.pixels * sheet.stride]
    return (
        rows.reshape(len(arenas), sheet.pixels, sheet.stride),
        touched[:, marks : marks + sheet.pixels],
    )
