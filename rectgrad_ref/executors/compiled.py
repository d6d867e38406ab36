"""The `cpu` backend: onnxruntime forward, then `kernels.cpu` on a team of threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
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
    Sheet,
    WeightStore,
    add_array,
    add_image,
    array_of,
    image_of,
    is_lowerable,
    lower,
    mark,
)
from .crew import Crew, at_fork, processors
from .dense import DenseTransposes, parts_of
from .memory import Memory
from .runner import Observer, Runner, SeedOf, StepwiseRunner

# Memories that wait for the next call; more are made where more calls run at once.
_KEPT = 2
# Activations below which a walk back takes no longer than waking another thread.
_WAKING = 2**19
# Floats of one thread's arenas, so that they stay in its cache; but so many samples at least.
_ARENAS, _SAMPLES = 2**19, 4


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
            memory.fit(program)
            places = _places(program.plan, program.active, memory.active)
            values = self.backend.forward(graph, x, names, places)
            table, there = program.table, NOTHING
            if self.plan.contrasts:
                assert baseline is not None
                table, there = self._contrast(program, baseline, memory)
            scores = values[graph.logits].reshape(len(x), -1)
            here = {**self.constants, **values}
            chunk = _Chunk(program, table, weights, self.backend, memory, here, there)
            seed = seed_of(scores)
            # Waking a thread takes as long as a walk back through a small network.
            small = program.active_size < _WAKING
            with Crew(1 if small else self.backend.threads) as crew:
                if observe is None and not program.by_rule and len(x) >= crew.size:
                    return scores, chunk.in_turns(seed, crew)
                walk = chunk.together(seed, crew)
            for step in self._layers() if observe is not None else ():
                assert observe is not None
                a = values[step.node.outputs[0]]
                observe(step, a, walk.gradient(step.node.outputs[0]), walk.leaving(step))
            return scores, walk.gradient(graph.input)

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


@dataclass(frozen=True, eq=False)
class _Chunk:
    """What the walks back of one chunk of samples share."""

    program: Program
    table: np.ndarray
    weights: np.ndarray
    backend: CompiledBackend
    memory: Memory
    values: Values
    baseline: Values

    def together(self, seed: np.ndarray, crew: Crew) -> _Walk:
        """Every sample in an arena of its own, in which all that is left can be looked at."""
        walk = _Walk(self, 0, *self.memory.arenas(self.program, len(seed)))
        walk.plant(seed)
        walk.finish(crew)
        return walk

    def in_turns(self, seed: np.ndarray, crew: Crew) -> np.ndarray:
        """R at the input: each thread lets groups of samples follow each other in its arenas.

        So these stay in its cache; those of a whole chunk would be cold when their turn comes.
        """
        graph = self.program.plan.graph
        result = np.empty(graph.shapes[graph.input] or (), np.float32)
        fitting = max(_SAMPLES, _ARENAS // self.program.arena_size)
        group = min(fitting, -(-len(seed) // crew.size))
        arenas, touched = self.memory.arenas(self.program, crew.size * group)
        teams = [_Team(self, i) for i in range(crew.size)]
        starts = iter(range(0, len(seed), group))

        def work(thread: int) -> None:
            for first in starts:  # whoever is free takes the next
                rows = slice(first, min(first + group, len(seed)))
                own = slice(thread * group, thread * group + rows.stop - first)
                walk = _Walk(self, first, arenas[own], touched[own])
                walk.plant(seed[rows])
                teams[thread].run(walk, np.arange(len(walk.rows)), 0, 1)
                result[rows] = walk.gradient(graph.input)

        crew.map(work, range(crew.size))
        return result


class _Walk:
    """One walk back for neighbouring samples of a chunk."""

    def __init__(self, chunk: _Chunk, first: int, arenas: np.ndarray, touched: np.ndarray) -> None:
        self.chunk, self.program, self.first = chunk, chunk.program, first
        self.sheets = arenas, touched
        self.rows = np.zeros(len(arenas), np.int64)

    def plant(self, seed: np.ndarray) -> None:
        """Put the gradient at the logits into its sheet."""
        sheet = self.program.sheets[self.program.plan.graph.logits]
        arenas, touched = self.sheets
        offset, marks = sheet.storage.offset, sheet.storage.touched
        # The scores lie along one axis, so that they have one order, channels last or not.
        arenas[:, offset : offset + seed.shape[1]] = seed
        touched[:, marks : marks + sheet.pixels] = 1

    def finish(self, crew: Crew) -> None:
        """Run the table, and the steps that it has nothing for."""
        while len(self.rows):
            self._advance(crew)
            # Every sample stops at every such step.
            row = int(self.rows[0])
            if row == len(self.program.table):
                return
            self._reference(self.program.steps[row])
            self.rows += 1

    def gradient(self, value: str) -> np.ndarray:
        """R of a value whose sheet is still its own, in the value's shape."""
        return self._array(self.program.sheets[value], value)

    def leaving(self, step: Step) -> np.ndarray:
        """R_in of a traced activation."""
        z, sheet = step.node.inputs[0], self.program.leaving.get(step.node.name)
        return self._array(sheet or self.program.sheets[z], z)

    def _array(self, sheet: Sheet, value: str) -> np.ndarray:
        shape = self.program.plan.graph.shapes[value]
        assert shape is not None
        return array_of(sheet, *self.sheets, (-1, *shape[1:]))

    def _reference(self, step: Step) -> None:
        """A step that has no kernel, by its rule."""
        node, sheets = step.node, self.program.sheets
        R = tuple(self.gradient(v) for v in node.outputs if v)
        for position, value in zip(step.positions, step.writes, strict=True):
            call = Call(node, position, R, self.chunk.values, self.chunk.baseline, len(self.rows))
            sheet = self.program.leaving.get(node.name) if position == 0 else None
            add_array(sheet or sheets[value], *self.sheets, step.rule(call))

    def _advance(self, crew: Crew) -> None:
        """Every sample to the next step of the reference: each thread some, or one team all."""
        everyone, size = np.arange(len(self.rows)), crew.size
        if len(everyone) >= size:
            shares = np.array_split(everyone, size)
            teams = [_Team(self.chunk, i) for i in range(size)]
            crew.map(lambda i: teams[i].run(self, shares[i], 0, 1), range(size))
        else:
            team = _Team(self.chunk, 0)
            crew.map(lambda member: team.run(self, everyone, member, size), range(size))


class _Team:
    """Threads that do the same samples together, or one thread alone."""

    def __init__(self, chunk: _Chunk, number: int) -> None:
        self.chunk = chunk
        self.scratch = chunk.memory.scratch(number, chunk.program)
        self.floats = chunk.program.floats.copy()
        self.errors: list[BaseException] = []

    def run(self, walk: _Walk, samples: np.ndarray, member: int, members: int) -> None:
        """As far as the table goes; scatters of too many are done by dense products."""
        rows, table = walk.rows, self.chunk.table
        steps, sheets = self.chunk.program.steps, self.chunk.program.sheets
        waiting = samples
        while True:
            self._advance(walk, waiting, member, members)
            # Samples stop at different rows, because each has nonzeros of its own. Those that are
            # behind go first, so that as many as possible meet.
            row = int(rows[samples].min())
            if row == len(table) or table[row, k.OP] == k.STOP:
                # Where the next call begins to look for its thresholds, which changes no result.
                self.chunk.program.floats[:, k.GUESS] = self.floats[:, k.GUESS]
                return
            waiting = samples[rows[samples] == row]
            wait(self.scratch.barrier, members)  # until all have looked at the rows
            try:
                self._dense(walk, steps[row], waiting, member, members)
            except BaseException as error:  # nobody may be left waiting
                self.errors.append(error)
            wait(self.scratch.barrier, members)
            if self.errors:
                raise self.errors[0]
            if member == 0:
                mark(sheets[steps[row].node.inputs[0]], walk.sheets[1], waiting)
                rows[waiting] += 1
            wait(self.scratch.barrier, members)

    def _dense(
        self, walk: _Walk, step: Step, samples: np.ndarray, member: int, members: int
    ) -> None:
        """One member's share of the channels that a dense product adds to."""
        node, sheets = step.node, self.chunk.program.sheets
        parts = parts_of(node, members)
        if member >= parts:
            return
        R = image_of(sheets[node.outputs[0]], *walk.sheets, samples)
        if isinstance(step.rule, ConvTranspose) and step.rule.mask_border:
            R = np.moveaxis(mask_border(np.moveaxis(R, -1, 1)), 1, -1)
        transpose = self.chunk.backend.dense(node, member, parts)
        result = transpose(R, partial(self.scratch.room, member))
        add_image(sheets[node.inputs[0]], *walk.sheets, result, samples, transpose.channels)

    def _advance(self, walk: _Walk, samples: np.ndarray, member: int, members: int) -> None:
        chunk, scratch = self.chunk, self.scratch
        k.advance(
            chunk.table,
            self.floats,
            walk.first,
            walk.rows,
            samples,
            *walk.sheets,
            chunk.memory.active,
            chunk.weights,
            scratch.csr,
            scratch.work,
            scratch.shared,
            member,
            members,
            scratch.barrier,
        )
        wait(scratch.barrier, members)
