"""The `cpu` backend: onnxruntime forward, then `kernels.cpu` on a team of threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from math import prod
from threading import Lock

import numpy as np

from ..forward import OnnxruntimeForward
from ..kernels import cpu as k
from ..kernels.team import wait
from ..plan import Plan, Step
from ..reference import NOTHING, constants_as
from ..rules.declared import Call, ConvTranspose, Values, mask_border
from .cpu import (
    Program,
    WeightStore,
    add_array,
    add_image,
    array_of,
    image_of,
    is_lowerable,
    lower,
    mark,
    scatters,
)
from .crew import Crew, at_fork, processors
from .dense import DenseTransposes, channels_of, parts_of
from .memory import Memory, Scratch
from .runner import Observer, Runner, SeedOf, StepwiseRunner

# Memories that wait for the next call; more are made where more calls run at once.
_KEPT = 2


class CompiledBackend:
    """Makes runners that share one model's weights and threads."""

    _lowering = Lock()

    def __init__(self, forward: OnnxruntimeForward, threads: int | None) -> None:
        self.forward = forward
        self.threads = threads or processors()
        self.dense = DenseTransposes()
        self._weights = WeightStore()
        self._memories: deque[Memory] = deque(maxlen=_KEPT)

    def lower(self, plan: Plan, trace: bool) -> tuple[Program, np.ndarray]:
        """The plan as a table, and the weights that it refers to."""
        with CompiledBackend._lowering:
            program = lower(plan, self._weights, trace=trace)
            return program, self._weights.array

    @contextmanager
    def memory(self) -> Iterator[Memory]:
        """Memory that no other call uses meanwhile."""
        try:
            memory = self._memories.pop()
        except IndexError:
            memory = Memory()
        yield memory
        self._memories.append(memory)

    def runner(self, plan: Plan) -> Runner:
        """Ready to run the plan; plans over other sample axes than 0 go step by step."""
        if not is_lowerable(plan):
            return StepwiseRunner(plan, self.forward)
        return CompiledRunner(plan, self)


def _unlock() -> None:
    """A fork may take the lock along without its holder."""
    CompiledBackend._lowering = Lock()


at_fork(_unlock)


class CompiledRunner:
    """One lowered plan."""

    def __init__(self, plan: Plan, backend: CompiledBackend) -> None:
        self.plan, self.backend = plan, backend

    @cached_property
    def lowered(self) -> tuple[Program, np.ndarray]:
        """The table, and its weights."""
        return self.backend.lower(self.plan, trace=False)

    @cached_property
    def traced(self) -> tuple[Program, np.ndarray]:
        """The table that keeps the gradients at every activation, and its weights."""
        return self.backend.lower(self.plan, trace=True)

    @cached_property
    def constants(self) -> Values:
        """What steps of the reference read."""
        graph = self.plan.graph
        read = {v for step in self.plan.steps for v in step.reads} & graph.constants.keys()
        return constants_as({v: graph.constants[v] for v in read}, np.dtype(np.float32))

    def __call__(
        self,
        x: np.ndarray,
        seed_of: SeedOf,
        *,
        baseline: np.ndarray | None = None,
        observe: Observer | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        program, weights = self.lowered if observe is None else self.traced
        graph = self.plan.graph
        names = (graph.logits, *program.exposes)
        if observe is not None:
            names += tuple(s.node.outputs[0] for s in self._layers())
        with self.backend.memory() as memory:
            memory.fit(program, len(x))
            places = _places(program.plan, program.active, memory.active)
            values = self.backend.forward(graph, x, names, places)
            table, there = program.table, NOTHING
            if self.plan.contrasts:
                assert baseline is not None
                table, there = self._contrast(program, baseline, memory)
            scores = values[graph.logits].reshape(len(x), -1)
            here = {**self.constants, **values}
            run = _Walk(program, table, weights, self.backend, memory, here, there)
            run.plant(seed_of(scores))
            run.finish()
            for step in self._layers() if observe is not None else ():
                assert observe is not None
                a = values[step.node.outputs[0]]
                observe(step, a, run.gradient(step.node.outputs[0]), run.leaving(step))
            return scores, run.gradient(graph.input)

    def _contrast(
        self, program: Program, baseline: np.ndarray, memory: Memory
    ) -> tuple[np.ndarray, Values]:
        """The table, and the values at the baseline: computed once where all have the same."""
        graph, table = self.plan.graph, program.table
        places = _places(program.plan, program.baseline, memory.active)
        if self.backend.forward.any_batch and (baseline == baseline[:1]).all():
            baseline, table = baseline[:1], table.copy()
            table[:, k.B_LENGTH] = 0
            places = {value: place[:1] for value, place in places.items()}
        found = self.backend.forward(graph, baseline, program.exposes, places)
        read = {v: np.broadcast_to(found[v], graph.shapes[v] or ()) for v in program.exposes}
        return table, {**self.constants, **read}

    def _layers(self) -> list[Step]:
        return [step for step in self.plan.steps if step.node.name in self.plan.layers]


def _places(plan: Plan, offsets: Mapping[str, int], active: np.ndarray) -> dict[str, np.ndarray]:
    """Where the forward pass shall write each activation, channels last."""
    places = {}
    for value, offset in offsets.items():
        shape = plan.graph.shapes[value]
        assert shape is not None
        last = (shape[0], shape[2], shape[3], shape[1]) if len(shape) == 4 else shape
        size = prod(shape)
        places[value] = active[offset : offset + size].reshape(last)
    return places


class _Walk:
    """One walk back for a chunk of samples."""

    def __init__(
        self,
        program: Program,
        table: np.ndarray,
        weights: np.ndarray,
        backend: CompiledBackend,
        memory: Memory,
        values: Values,
        baseline: Values,
    ) -> None:
        self.program, self.table, self.weights = program, table, weights
        self.backend, self.memory = backend, memory
        self.values, self.baseline = values, baseline
        self.samples = len(memory.arenas)
        self.rows = np.zeros(self.samples, np.int64)

    def plant(self, seed: np.ndarray) -> None:
        """Put the gradient at the logits into its sheet."""
        sheet = self.program.sheets[self.program.plan.graph.logits]
        offset, marks = sheet.storage.offset, sheet.storage.touched
        # The scores lie along one axis, so that they have one order, channels last or not.
        self.memory.arenas[:, offset : offset + seed.shape[1]] = seed
        self.memory.touched[:, marks : marks + sheet.pixels] = 1

    def finish(self) -> None:
        """Run the table, and the steps that it has nothing for."""
        while self.samples:
            self._advance()
            # Every sample stops at every such step.
            row = int(self.rows[0])
            if row == len(self.program.table):
                return
            self._reference(self.program.steps[row])
            self.rows += 1

    def gradient(self, value: str) -> np.ndarray:
        """R of a value whose sheet is still its own, in the value's shape."""
        shape = self.program.plan.graph.shapes[value]
        assert shape is not None
        sheet = self.program.sheets[value]
        return np.asarray(array_of(sheet, *self.memory.sheets, shape))

    def leaving(self, step: Step) -> np.ndarray:
        """R_in of a traced activation."""
        z, sheet = step.node.inputs[0], self.program.leaving.get(step.node.name)
        if sheet is None:
            return self.gradient(z)
        return array_of(sheet, *self.memory.sheets, step.node.input_shapes[0])

    def _reference(self, step: Step) -> None:
        """A step that has no kernel, by its rule."""
        node, sheets = step.node, self.program.sheets
        shapes, arenas, touched = self.program.plan.graph.shapes, *self.memory.sheets
        R = tuple(array_of(sheets[v], arenas, touched, shapes[v] or ()) for v in node.outputs if v)
        for position, value in zip(step.positions, step.writes, strict=True):
            call = Call(node, position, R, self.values, self.baseline, self.samples)
            sheet = self.program.leaving.get(node.name) if position == 0 else None
            add_array(sheet or sheets[value], arenas, touched, step.rule(call))

    def _advance(self) -> None:
        """Every sample to the next step of the reference: each thread some, or one team all."""
        everyone = np.arange(self.samples)
        with Crew(self.backend.threads) as crew:
            size = crew.size
            if self.samples >= size:
                scratches = [self.memory.scratch(i, self.program) for i in range(size)]
                shares = np.array_split(everyone, size)
                teams = [_Team(self, *own) for own in zip(scratches, shares, strict=True)]
                crew.map(lambda team: team.run(0, 1), teams)
            else:
                team = _Team(self, self.memory.scratch(0, self.program), everyone)
                crew.map(lambda member: team.run(member, size), range(size))


class _Team:
    """Threads that do the same samples together, or one thread alone."""

    def __init__(self, walk: _Walk, scratch: Scratch, samples: np.ndarray) -> None:
        self.walk, self.scratch, self.samples = walk, scratch, samples
        self.errors: list[BaseException] = []

    def run(self, member: int, members: int) -> None:
        """As far as the table goes; scatters of too many are done by dense products."""
        rows, steps = self.walk.rows, self.walk.program.steps
        waiting = self.samples
        while True:
            self._advance(waiting, member, members)
            # Samples stop at different rows, because each has nonzeros of its own. Those that are
            # behind go first, so that as many as possible meet.
            row = int(rows[self.samples].min())
            step = steps.get(row)
            if step is None or not scatters(step, self.walk.samples):
                return
            waiting = self.samples[rows[self.samples] == row]
            wait(self.scratch.barrier, members)  # until all have looked at the rows
            try:
                self._dense(step, waiting, member, members)
            except BaseException as error:  # nobody may be left waiting
                self.errors.append(error)
            wait(self.scratch.barrier, members)
            if self.errors:
                raise self.errors[0]
            if member == 0:
                target = self.walk.program.sheets[step.node.inputs[0]]
                mark(target, self.walk.memory.touched, waiting)
                rows[waiting] += 1
            wait(self.scratch.barrier, members)

    def _dense(self, step: Step, samples: np.ndarray, member: int, members: int) -> None:
        """One member's share of the channels that a dense product adds to."""
        node, sheets, memory = step.node, self.walk.program.sheets, self.walk.memory
        parts = parts_of(node, members)
        if member >= parts:
            return
        source, target = sheets[node.outputs[0]], sheets[node.inputs[0]]
        R = image_of(source, *memory.sheets, samples)
        if isinstance(step.rule, ConvTranspose) and step.rule.mask_border:
            R = np.moveaxis(mask_border(np.moveaxis(R, -1, 1)), 1, -1)
        result = self.walk.backend.dense(node, R, member, parts)
        channels = slice(*channels_of(node, member, parts))
        add_image(target, *memory.sheets, result, samples, channels)

    def _advance(self, samples: np.ndarray, member: int, members: int) -> None:
        walk, scratch = self.walk, self.scratch
        k.advance(
            walk.table,
            walk.program.floats,
            walk.rows,
            samples,
            *walk.memory.sheets,
            walk.memory.active,
            walk.weights,
            scratch.csr,
            scratch.work,
            scratch.shared,
            member,
            members,
            scratch.barrier,
        )
        wait(scratch.barrier, members)
