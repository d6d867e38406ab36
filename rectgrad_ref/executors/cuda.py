"""A plan lowered to launches of `kernels.cuda`.

It is lowered for one batch size, to sheets in each value's own axis order, so that reshapes and
concatenations are other names for the same floats. Everything is decided here: which floats a
launch reads and writes, whether it adds to what is there or is the first to write, and which way a
convolution's transpose takes. A call only replays the launches; what has no kernel stays a step of
the reference, on the host.

A convolution's transpose goes by a list of nonzeros where, by the percentile and the shapes, at
most `DENSITY` of its output's gradient can be nonzero, and by a dense product in onnxruntime where
more may be. So the way depends on neither data nor method, and nothing waits for the host to count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from ..graph import Node
from ..kernels import cpu as modes
from ..kernels import cuda as k
from ..plan import Plan, Step
from . import lowering, storage
from .lowering import Condition, Lowering, geometry, masks_border
from .storage import WeightStore

# Above this part of possible nonzeros a dense product is faster (estimated; to be measured).
DENSITY = 0.05

# Threads of a block that goes through units, and how many units one thread does.
THREADS, UNITS = 256, 4
# Of selection: units of a block at least and at most, and blocks that fill a GPU.
PARTS, BLOCKS = (4096, 65536), 264
# Units of a sample from which a window of scores is estimated, by how many standard deviations.
SAMPLE, DEVIATIONS = 2048, 6
# Of lists and their transposes: threads of a block, neighbouring channels or pixels, and pixels.
GROUP, LANES, PIXELS = 256, 32, 32

Scalar = int | float | np.float32


@dataclass(eq=False)
class Storage(storage.Storage):
    """Floats of the arena: N rows, so far apart."""

    stride: int


@dataclass(frozen=True)
class Sheet:
    """A value's gradient: `units` floats of each row of a storage, from `first` on.

    At most `bound` of a sample's are not zero.
    """

    storage: Storage
    first: int
    units: int
    bound: int

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


Argument = Scalar | str | Shared


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel's launch: arguments are scalars, or names of arrays."""

    kernel: str
    blocks: tuple[int, ...]
    threads: tuple[int, ...]
    arguments: tuple[Argument, ...]


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
class Program(lowering.Program[Sheet]):
    """A lowered plan.

    Attributes
    ----------
    items : tuple of Item
        In order.
    sizes : dict of str to int
        Of the arrays that the launches name.
    """

    items: tuple[Item, ...]
    sizes: dict[str, int]


DTYPES: dict[str, Any] = {
    "arena": np.float32,
    "active": np.float32,
    "weights": np.float32,
    "values": np.float32,
    "which": np.int32,
    "counts": np.int32,
    "totals": np.int32,
    "sieve": np.uint32,
    "tau": np.float64,
}
CLEARED = ("totals",)  # and so they stay
_LISTS = ("counts", "which", "values")


class LaunchLowering(Lowering[Sheet, Program]):
    """Writes the launches."""

    executor, alignment, channels_last = "cuda", 64, False

    def __init__(self, plan: Plan, weights: WeightStore, *, trace: bool) -> None:
        super().__init__(plan, weights, trace=trace)
        self.items: list[Item] = []
        self.sizes = dict.fromkeys(DTYPES, 1)

    def program(self) -> Program:
        self.walk()
        weights = self.weights.array
        self.need(arena=self.arena.size, active=self.values.size, weights=weights.size)
        return Program(
            self.plan, weights, self.sheets, self.leaving, tuple(self.exposes),
            self.active, self.baseline, self.runs_as,
            items=tuple(self.items),
            sizes=self.sizes,
        )  # fmt: skip

    def stop(self, step: Step) -> None:
        """On the host."""
        targets = []
        for position, value in zip(step.positions, step.writes, strict=True):
            shown = position == 0 and step.node.name in self.plan.layers
            targets.append(self.leaves(step) if shown else self.target(value))
        self.items.append(HostStep(step, tuple(targets)))

    # Values.

    def new(self, value: str) -> Sheet:
        units = prod(self.extents(value))
        size = units * self.batch
        return Sheet(Storage(self.arena.take(size), size, units), 0, units, units)

    def part(self, sheet: Sheet, first: int, value: str) -> Sheet:
        channels, height, width = self.extents(value)
        units, begin = channels * height * width, sheet.first + first * height * width
        return Sheet(sheet.storage, begin, units, min(sheet.bound, units))

    def add_to(self, value: str, sheet: Sheet) -> None:
        self.copy(sheet, *self.target(value, sheet.bound))

    def target(self, value: str, bound: int | None = None) -> tuple[Sheet, int]:
        """Where to write the value's gradient, and whether to add to what is there.

        At most `bound` units of what is written are not zero.
        """
        adds = value in self.sheets
        if not adds:
            self.name(value, replace(self.new(value), bound=0))
        sheet = self.sheets[value]
        bound = sheet.bound + (sheet.units if bound is None else bound)
        self.sheets[value] = replace(sheet, bound=min(bound, sheet.units))
        return self.sheets[value], int(adds)

    def leaves(self, step: Step, bound: int | None = None) -> tuple[Sheet, int]:
        """The same for the gradient that leaves an activation."""
        z = step.node.inputs[0]
        if not self.is_apart(step):
            return self.target(z, bound)
        sheet = self.new(z)
        self.leaving[step.node.name] = sheet if bound is None else replace(sheet, bound=bound)
        return self.leaving[step.node.name], 0

    def passed(self, step: Step, bound: int) -> tuple[Sheet, int]:
        """The same: where it arrived, if it is needed nowhere else."""
        z, sheet = step.node.inputs[0], self.incoming(step)
        if not self.takes_over(z):
            return self.leaves(step, bound)
        self.name(z, replace(sheet, bound=bound))
        return sheet, 0

    def need(self, **sizes: int) -> None:
        """Make sure that arrays are as large."""
        for name, size in sizes.items():
            self.sizes[name] = max(self.sizes[name], size)

    # Launches.

    def by_unit(self, kernel: str, units: int, *arguments: Argument) -> None:
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

    def select(self, source: Sheet, active: int, condition: Condition) -> None:
        """Find τ of every sample."""
        units = source.units
        parts = max(-(-units // PARTS[1]), min(units // PARTS[0], BLOCKS // self.batch), 1)
        self.need(tau=self.batch, values=self.batch * units, totals=self.batch * k.TOTALS)
        self.need(sieve=self.batch * -(-units // k.WORD))
        arguments = (
            "arena", *source.place, "active", active, units, condition.mode,
            np.float32(condition.eps), *condition.ranks, float(condition.fraction), "tau",
            *_sample(units, condition.ranks), "values", "totals", "sieve",
        )  # fmt: skip
        threads = (min(k.THREADS, 2 * THREADS),)
        self.items.append(Launch("select", (self.batch, parts), threads, arguments))

    def listed(self, step: Step, source: Sheet, active: int, condition: Condition) -> None:
        """A convolution's or matrix's transpose by a list of what meets the condition."""
        channels, height, width = self.extents(step.node.outputs[0])
        pixels = height * width
        units = self.batch * source.units
        self.need(counts=self.batch * pixels, which=units, values=units)
        # Of few pixels each block takes some only, so that there are enough blocks.
        across = LANES if self.batch * pixels >= LANES * BLOCKS else max(1, LANES // 4)
        across = min(across, _power_of_two(pixels))
        groups = max(1, min(2 * GROUP // across, channels))
        arguments = (
            "arena", *source.place, "active", active, channels, height, width,
            int(masks_border(step)), *_compared(condition), *_LISTS,
        )  # fmt: skip
        blocks = (self.batch, -(-pixels // across))
        self.items.append(Launch("compact", blocks, (across, groups), arguments))
        self._gather(step.node)

    def _gather(self, node: Node) -> None:
        """The transpose of a convolution, or of a matrix as one of a pixel, from the lists."""
        target, adds = self.target(node.inputs[0])
        extents = self.extents(node.inputs[0])
        window, group = geometry(node, extents), node["group"] if node.op == "Conv" else 1
        row = extents[0] // group * prod(window[:2])
        pixels, lanes = prod(extents[1:]), min(LANES, _power_of_two(extents[0]))
        slices = -(-extents[0] // lanes)
        rows = min(GROUP // lanes, _power_of_two(pixels))
        tile = min(max(rows, PIXELS), k.TILE // (lanes + 1), _power_of_two(pixels))
        while tile > rows and self.batch * -(-pixels // tile) * slices < BLOCKS:
            tile //= 2
        arguments = (
            "arena", *target.place, adds, *extents, *_LISTS, *self.extents(node.outputs[0]),
            "weights", self.rows(node, extents), row, *window, group, tile,
        )  # fmt: skip
        blocks = (self.batch, -(-pixels // tile), slices)
        self.items.append(Launch("transpose", blocks, (lanes, min(rows, tile)), arguments))

    def product(self, step: Step) -> None:
        """A convolution's transpose as a dense product, between sheets without gaps."""
        node = step.node
        source, temporary = self.incoming(step), []
        masks = masks_border(step)
        if masks or not source.is_whole:
            whole = self.new(node.outputs[0])
            border = self.extents(node.outputs[0])[1:] if masks else None
            self.copy(source, whole, 0, border=border)
            source = whole
            temporary.append(whole)
        target, adds = self.target(node.inputs[0])
        result = target
        if adds or not target.is_whole:
            result = self.new(node.inputs[0])
            temporary.append(result)
        self.items.append(Product(node, source, result))
        self.runs_as[node.name] = "onnxruntime"
        if result is not target:
            self.copy(result, target, adds)
        for sheet in temporary:
            self.release(sheet)

    # Operators.

    def activate(self, step: Step, condition: Condition, linear: Step | None) -> None:
        source, active = self.incoming(step), self.activations(step.node.outputs[0])
        bound = source.bound
        if np.isnan(condition.tau):
            self.select(source, active, condition)
            bound = min(bound, condition.ranks[0])
        if linear is not None and not self._is_listed(linear, bound):
            linear = None
        if linear is None or self.trace:
            target, adds = self.passed(step, bound)
            self.by_unit(
                "activate", source.units, "arena", *source.place, "active", active, source.units,
                *_compared(condition), *target.place, adds,
            )  # fmt: skip
        if linear is not None:
            self.listed(linear, source, active, condition)
            self.finished(linear)

    def multiply(self, step: Step, value: str, mode: int, eps: float) -> None:
        source, begin = self.incoming(step), self.activations(value)
        baseline = self.at_baseline(value) if mode == modes.BY_DIFFERENCE else 0
        target, adds = self.passed(step, source.bound)
        self.by_unit(
            "ratio", source.units, "arena", *source.place, "active", begin, baseline,
            Shared(source.units), source.units, mode, np.float32(eps), *target.place, adds,
        )  # fmt: skip

    def _is_listed(self, step: Step, bound: int) -> bool:
        """Whether so few nonzeros at its output are brought back by a list.

        A matrix has no other way.
        """
        units = prod(self.extents(step.node.outputs[0]))
        return step.node.op != "Conv" or bound <= DENSITY * units

    def transpose(self, step: Step) -> None:
        source = self.incoming(step)
        if self._is_listed(step, source.bound):
            self.listed(step, source, 0, Condition(k.EVERYTHING))
        else:
            self.product(step)

    def scale(self, step: Step, factor: int) -> None:
        source, value = self.incoming(step), step.node.inputs[0]
        target, adds = self.target(value, source.bound)
        self.copy(source, target, adds, pixels=prod(self.extents(value)[1:]), factor=factor)

    def to_maximum(self, step: Step) -> None:
        node, source = step.node, self.incoming(step)
        x, y = self.activations(node.inputs[0]), self.activations(node.outputs[0])
        target, adds = self.target(node.inputs[0])
        self.by_unit(
            "max_pool", target.units, "arena", *source.place, "active", x, y, *target.place, adds,
            target.units, *self._pooling(node),
        )  # fmt: skip

    def redistribute(self, step: Step, eps: float) -> bool:
        node, source = step.node, self.incoming(step)
        x, between = self.activations(node.inputs[0]), self.new(node.outputs[0])
        self.by_unit(
            "share", source.units, "arena", *source.place, "active", x, np.float32(eps),
            *between.place, source.units, *self._pooling(node),
        )  # fmt: skip
        self._spread(node, between, x, (-1, -1))
        self.release(between)
        return True

    def to_all(self, step: Step, padded: tuple[int, ...]) -> None:
        self._spread(step.node, self.incoming(step), -1, padded)

    def _spread(self, node: Node, source: Sheet, x: int, padded: tuple[int, ...]) -> None:
        target, adds = self.target(node.inputs[0])
        self.by_unit(
            "spread", target.units, "arena", *source.place, "active", x, *padded, *target.place,
            adds, target.units, *self._pooling(node),
        )  # fmt: skip

    def _pooling(self, node: Node) -> tuple[int, ...]:
        """Height and width of the input and of the output, and the window."""
        image, result = self.extents(node.inputs[0]), self.extents(node.outputs[0])
        return (*image[1:], *result[1:], *geometry(node, image))


def _sample(units: int, ranks: tuple[int, int]) -> tuple[int, int, int]:
    """Runs of a sample of the units, and the ranks in it between which those ranks will be.

    Few units are not worth a sample.
    """
    if units < 4 * SAMPLE:
        return 0, -1, 0
    low, high = (rank / units for rank in ranks)
    margins = (DEVIATIONS * np.sqrt(SAMPLE * p * (1 - p)) + DEVIATIONS for p in (low, high))
    below, above = (int(np.ceil(margin)) for margin in margins)
    first, last = int(SAMPLE * high) - above, int(SAMPLE * low) + below
    return SAMPLE // k.RUN, max(first, -1), min(last, SAMPLE)


def _compared(condition: Condition) -> tuple[Scalar | str, ...]:
    """Arguments of the kernels that ask what meets the condition."""
    return (
        condition.mode, np.float32(condition.eps), np.float32(condition.ceiling),
        int(condition.strict), float(condition.tau), "tau", "sieve",
    )  # fmt: skip


def _power_of_two(n: int) -> int:
    """The next one that is not smaller."""
    return 1 << (n - 1).bit_length()
