"""The `cpu` backend: onnxruntime forward, then `kernels.cpu` on a team of threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from ..forward import OnnxruntimeForward
from ..kernels import cpu as k
from ..kernels.team import wait
from ..plan import Plan, Step
from ..rules.declared import mask_border
from .cpu import (
    Program,
    Sheet,
    TableLowering,
    add_array,
    add_image,
    array_of,
    image_of,
    mark,
    read,
    unwritten,
)
from .crew import Crew, processors
from .dense import DenseTransposes
from .lowered import Chunk, LoweredBackend, LoweredRunner, Walk, by_image_size
from .lowering import masks_border
from .memory import Memory
from .runner import Observer

# Memories that wait for the next call; more are made where more calls run at once.
_KEPT = 2
# Floats of all samples' arenas below which a walk back takes no longer than waking a thread.
_WAKING = 2**19
# Floats of one thread's arenas, so that they stay in its cache; but so many samples at least, if
# there are.
_ARENAS, _SAMPLES = 2**19, 4
# Floats of a dense product's result from which on each sample has one of its own, which is written
# where it belongs: to copy it takes longer than another call.
_ALONE = 2**18

_Chunk = Chunk[Program, Memory]


class CompiledBackend(LoweredBackend[Program, Memory]):
    """Makes runners that share one model's weights and threads."""

    def __init__(self, forward: OnnxruntimeForward, threads: int | None) -> None:
        super().__init__(forward, TableLowering)
        self.threads = threads or processors()
        self.dense = by_image_size(DenseTransposes)
        self._memories: deque[Memory] = deque(maxlen=_KEPT)

    def _runner(self, plan: Plan) -> CompiledRunner:
        return CompiledRunner(plan, self)

    @contextmanager
    def lent(self, program: Program) -> Iterator[Memory]:
        try:
            memory = self._memories.pop()
        except IndexError:
            memory = Memory()
        memory.fit(program)
        yield memory
        self._memories.append(memory)


class CompiledRunner(LoweredRunner[Program, Memory]):
    """One lowered plan."""

    backend: CompiledBackend

    def walk_back(self, chunk: _Chunk, seed: np.ndarray, observe: Observer | None) -> np.ndarray:
        # Waking a thread takes as long as a walk back through a small network.
        small = len(seed) * chunk.program.arena_size < _WAKING
        with Crew(1 if small else self.backend.threads) as crew:
            if observe is None and not chunk.program.by_rule and len(seed) >= crew.size:
                return self._in_turns(chunk, seed, crew)
            arenas = chunk.memory.arenas(chunk.program, len(seed))
            walk = _Walk(chunk, self.backend.dense(self.plan.graph), 0, *arenas)
            walk.plant(seed)
            walk.finish(crew)
        return walk.result(observe)

    def _in_turns(self, chunk: _Chunk, seed: np.ndarray, crew: Crew) -> np.ndarray:
        """R at the input: each thread lets groups of samples follow each other in its arenas.

        So these stay in its cache; those of a whole chunk would be cold when their turn comes.
        """
        graph, program = self.plan.graph, chunk.program
        dense = self.backend.dense(graph)
        result = np.empty(graph.shapes[graph.input] or (), np.float32)
        fitting = max(_SAMPLES, _ARENAS // program.arena_size)
        groups = list(_turns(len(seed), fitting, crew.size))
        most = groups[0].stop
        arenas, touched = chunk.memory.arenas(program, crew.size * most)
        teams = [_Team(chunk, i, 1) for i in range(crew.size)]
        waiting = iter(groups)

        def work(thread: int) -> None:
            for group in waiting:  # whoever is free takes the next
                own = slice(thread * most, thread * most + group.stop - group.start)
                walk = _Walk(chunk, dense, group.start, arenas[own], touched[own])
                walk.plant(seed[group])
                teams[thread].run(walk, np.arange(len(walk.rows)), 0)
                walk.read(graph.input, result[group])

        crew.map(work, range(crew.size))
        return result


def _turns(samples: int, fitting: int, threads: int) -> Iterator[slice]:
    """Groups of at most `fitting` samples, in rounds that get smaller, so that all end together.

    A round takes half of what is left to each thread, but so many samples as fill a group.
    """
    first = 0
    while first < samples:
        fair = -(-(samples - first) // threads)
        size = min(fitting, max(-(-fair // 2), min(fair, _SAMPLES)))
        last = min(first + threads * size, samples)
        for begin in range(first, last, size):
            yield slice(begin, min(begin + size, last))
        first = last


class _Walk(Walk[Program, Memory]):
    """One walk back for neighbouring samples of a chunk, each in an arena of its own."""

    def __init__(
        self,
        chunk: _Chunk,
        dense: DenseTransposes,
        first: int,
        arenas: np.ndarray,
        touched: np.ndarray,
    ) -> None:
        super().__init__(chunk)
        self.dense, self.first = dense, first
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

    def array(self, sheet: Sheet, shape: tuple[int, ...]) -> np.ndarray:
        return array_of(sheet, *self.sheets, shape)

    def read(self, value: str, into: np.ndarray) -> None:
        """R of a value, in the value's shape."""
        read(self.program.sheets[value], *self.sheets, into)

    def _reference(self, step: Step) -> None:
        """A step that has no kernel, by its rule."""
        for position, value, R in zip(step.positions, step.writes, self.by_rule(step), strict=True):
            apart = self.program.leaving.get(step.node.name) if position == 0 else None
            add_array(apart or self.program.sheets[value], *self.sheets, R)

    def _advance(self, crew: Crew) -> None:
        """Every sample to the next step of the reference: each thread some, or one team all."""
        everyone, size = np.arange(len(self.rows)), crew.size
        if len(everyone) >= size:
            shares = np.array_split(everyone, size)
            teams = [_Team(self.chunk, i, 1) for i in range(size)]
            crew.map(lambda i: teams[i].run(self, shares[i], 0), range(size))
        else:
            team = _Team(self.chunk, 0, size)
            crew.map(lambda member: team.run(self, everyone, member), range(size))


class _Team:
    """Threads that do the same samples together, or one thread alone."""

    def __init__(self, chunk: _Chunk, number: int, members: int) -> None:
        self.chunk, self.members, program = chunk, members, chunk.program
        self.table = program.table_for(chunk.places, shares=chunk.shares)
        self.scratch = chunk.memory.scratch(number, members, program)
        self.floats = program.floats.copy()
        self.errors: list[BaseException] = []

    def run(self, walk: _Walk, samples: np.ndarray, member: int) -> None:
        """As far as the table goes; scatters of too many are done by dense products."""
        rows, table = walk.rows, self.table
        steps, sheets = self.chunk.program.steps, self.chunk.program.sheets
        waiting = samples
        while True:
            self._advance(walk, waiting, member)
            # Samples stop at different rows, because each has nonzeros of its own. Those that are
            # behind go first, so that as many as possible meet.
            row = int(rows[samples].min())
            if row == len(table) or table[row, k.OP] == k.STOP:
                # Where the next call begins to look for its thresholds, which changes no result.
                self.chunk.program.floats[:, k.GUESS] = self.floats[:, k.GUESS]
                return
            waiting = samples[rows[samples] == row]
            try:
                self._dense(walk, steps[row], waiting, member)
            except BaseException as error:  # nobody may be left waiting
                self.errors.append(error)
            wait(self.scratch.barrier, self.members)  # by now, all have looked at the rows
            if self.errors:
                raise self.errors[0]
            if member == 0:
                mark(sheets[steps[row].node.inputs[0]], walk.sheets[1], waiting)
                rows[waiting] += 1

    def _dense(self, walk: _Walk, step: Step, samples: np.ndarray, member: int) -> None:
        """One member's share of the rows that a dense product adds to."""
        node, sheets = step.node, self.chunk.program.sheets
        transpose, sheet = walk.dense(node, member, self.members), sheets[node.inputs[0]]
        if transpose is None:
            return
        alone = sheet.pixels * sheet.channels >= _ALONE
        for part in np.split(samples, len(samples)) if alone else [samples]:
            R = image_of(sheets[node.outputs[0]], *walk.sheets, part)
            if masks_border(step):
                R = np.moveaxis(mask_border(np.moveaxis(R, -1, 1)), 1, -1)
            place = unwritten(sheet, *walk.sheets, part, transpose.rows)
            result = transpose(R, partial(self.scratch.room, member), place)
            if place is None:
                add_image(sheet, *walk.sheets, result, part, transpose.rows)

    def _advance(self, walk: _Walk, samples: np.ndarray, member: int) -> None:
        chunk, scratch = self.chunk, self.scratch
        k.advance(
            self.table,
            self.floats,
            walk.first,
            walk.rows,
            samples,
            *walk.sheets,
            chunk.memory.active,
            chunk.program.weights,
            scratch.lists,
            scratch.work,
            scratch.shared,
            member,
            self.members,
            scratch.barrier,
        )
