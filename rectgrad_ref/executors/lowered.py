"""What runs a lowered plan: the forward pass, the seed and the walk back of both backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np

from ..forward import OnnxruntimeForward, Places
from ..graph import Graph
from ..plan import Plan, Step
from ..reference import NOTHING
from ..rules.declared import Call, Values
from .crew import at_fork
from .lowering import Lowering, P, is_lowerable
from .runner import Observer, Runner, SeedOf, StepwiseRunner, asked, constants_of, layers_of
from .storage import NoWeights, WeightStore

# Sizes of images for which a backend keeps its dense products, that is, all weights once more.
_SIZES = 4

T = TypeVar("T")


def by_image_size(make: Callable[[], T]) -> Callable[[Graph], T]:
    """What `make` makes, once for each size of a graph's input; of the last few sizes."""

    @lru_cache(_SIZES)
    def made(size: tuple[int, ...]) -> T:
        return make()

    def of(graph: Graph) -> T:
        return made((graph.shapes[graph.input] or ())[1:])

    return of


@dataclass(frozen=True, eq=False)
class Contrast:
    """The values at a baseline, as a program left them in a memory."""

    baseline: np.ndarray
    values: Values
    places: Places


class ProgramMemory(ABC):
    """What a program works in.

    Attributes
    ----------
    contrast : Contrast, optional
        What the last call computed at its baseline, or at those of its samples, for the next one's
        are mostly the same.
    places : dict
        Where the forward pass leaves activations, by where they begin and the number of samples.
    """

    contrast: Contrast | None = None
    places: dict[tuple[int, ...], Places]
    _program: Any = None

    def fit(self, program: Any) -> None:
        """Make room for a program; what another one computed is lost."""
        if program is self._program:
            return
        self._program, self.contrast, self.places = None, None, {}  # should growing fail
        self.grow(program)
        self._program = program

    @abstractmethod
    def grow(self, program: Any) -> None:
        """Make room."""

    @abstractmethod
    def place(self, offset: int, shape: tuple[int, ...]) -> Any:
        """Where the forward pass shall leave an activation."""


M = TypeVar("M", bound=ProgramMemory)


class LoweredBackend(ABC, Generic[P, M]):
    """Makes runners that share one model's weights."""

    _lowering = Lock()

    def __init__(self, forward: OnnxruntimeForward, lowering: type[Lowering[Any, P]]) -> None:
        self.forward = forward
        self._lower, self._weights = lowering, WeightStore()

    def lower(self, plan: Plan, *, trace: bool) -> P:
        """The plan as a program."""
        with LoweredBackend._lowering:
            return self._lower(plan, self._weights, trace=trace).program()

    def outline(self, plan: Plan) -> P:
        """The program without its weights, which says what it reads and what runs where."""
        return self._lower(plan, NoWeights(), trace=False).program()

    def runs_as(self, plan: Plan) -> Mapping[str, str]:
        """Node name → what executes the step."""
        if not is_lowerable(plan):
            return dict.fromkeys((step.node.name for step in plan.steps), "numpy")
        return self.outline(plan).runs_as

    def runner(self, plan: Plan) -> Runner:
        """Ready to run the plan; plans over other sample axes than 0 go step by step."""
        return self._runner(plan) if is_lowerable(plan) else StepwiseRunner(plan, self.forward)

    @abstractmethod
    def _runner(self, plan: Plan) -> LoweredRunner[P, M]:
        """A runner of the lowered plan."""

    @abstractmethod
    def lent(self, program: P) -> AbstractContextManager[M]:
        """Memory for the program, that no other call uses meanwhile."""


def _unlock() -> None:
    """A fork may take the lock along without its holder."""
    LoweredBackend._lowering = Lock()


at_fork(_unlock)


@dataclass(frozen=True, eq=False)
class Chunk(Generic[P, M]):
    """What the walk back of one chunk of samples reads.

    Attributes
    ----------
    values, baseline : Mapping
        What steps of the reference read, here and at the baseline.
    shares : bool
        Whether all samples have one baseline.
    places : tuple of Places
        Where the forward pass left what kernels read, here and at the baseline.
    """

    program: P
    memory: M
    values: Values
    baseline: Values
    shares: bool
    places: tuple[Places, Places]


class LoweredRunner(ABC, Generic[P, M]):
    """One lowered plan."""

    def __init__(self, plan: Plan, backend: LoweredBackend[P, M]) -> None:
        self.plan, self.backend = plan, backend

    @cached_property
    def lowered(self) -> P:
        """What runs."""
        return self.backend.lower(self.plan, trace=False)

    @cached_property
    def traced(self) -> P:
        """What keeps the gradients at every activation."""
        return self.backend.lower(self.plan, trace=True)

    @property
    def keeps(self) -> Collection[str]:
        outline = self.backend.outline(self.plan)
        return {*outline.exposes, *outline.active}

    @cached_property
    def constants(self) -> Values:
        """What steps of the reference read."""
        return constants_of(self.plan, np.dtype(np.float32))

    def __call__(
        self,
        x: np.ndarray,
        seed_of: SeedOf,
        *,
        baseline: np.ndarray | None = None,
        observe: Observer | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        plan, logits = self.plan, self.plan.graph.logits
        program = self.lowered if observe is None else self.traced
        names = asked(plan, program.exposes, observe)
        with self.backend.lent(program) as memory:
            places = self._places(memory, program.active, len(x))
            values = self.backend.forward(plan.graph, x, names, places)
            shares, there, contrast = False, NOTHING, Places()
            if plan.contrasts:
                assert baseline is not None
                shares, there, contrast = self._contrast(program, memory, baseline)
            scores = values[logits].reshape(len(x), -1)
            read = {**self.constants, **values}
            chunk = Chunk(program, memory, read, there, shares, (places, contrast))
            return scores, self.walk_back(chunk, seed_of(scores), observe)

    @abstractmethod
    def walk_back(
        self, chunk: Chunk[P, M], seed: np.ndarray, observe: Observer | None
    ) -> np.ndarray:
        """R at the input, from that at the logits."""

    def _places(self, memory: M, offsets: Mapping[str, int], samples: int) -> Places:
        """Where the forward pass shall leave each activation."""
        shapes, key = self.plan.graph.shapes, (*offsets.values(), samples)
        if key not in memory.places:
            memory.places[key] = Places(
                (v, memory.place(at, (samples, *(shapes[v] or ())[1:])))
                for v, at in offsets.items()
            )
        return memory.places[key]

    def _contrast(self, program: P, memory: M, baseline: np.ndarray) -> tuple[bool, Values, Places]:
        """The values at the baseline: those of one sample where all have the same."""
        graph, forward = self.plan.graph, self.backend.forward
        shares = forward.any_batch and bool((baseline == baseline[:1]).all())
        baseline = baseline[:1] if shares else baseline
        known = memory.contrast
        if known is None or not np.array_equal(known.baseline, baseline):
            memory.contrast = None  # should the forward pass fail
            places = self._places(memory, program.baseline, len(baseline))
            baseline = baseline.copy()  # the forward pass may hand it on
            values = forward(graph, baseline, program.exposes, places)
            known = memory.contrast = Contrast(baseline, values, places)
        shapes = graph.shapes
        read = {v: np.broadcast_to(known.values[v], shapes[v] or ()) for v in program.exposes}
        return shares, {**self.constants, **read}, known.places


class Walk(ABC, Generic[P, M]):
    """One walk back, and what it leaves in memory."""

    def __init__(self, chunk: Chunk[P, M]) -> None:
        self.chunk, self.program = chunk, chunk.program

    @abstractmethod
    def array(self, sheet: Any, shape: tuple[int, ...]) -> np.ndarray:
        """A copy of a sheet in a value's shape."""

    def gradient(self, value: str) -> np.ndarray:
        """R of a value whose sheet is still its own, in the value's shape."""
        return self._of(self.program.sheets[value], value)

    def leaving(self, step: Step) -> np.ndarray:
        """R_in of a traced activation."""
        z = step.node.inputs[0]
        return self._of(self.program.leaving.get(step.node.name) or self.program.sheets[z], z)

    def _of(self, sheet: Any, value: str) -> np.ndarray:
        shape = self.program.plan.graph.shapes[value]
        assert shape is not None
        return self.array(sheet, (-1, *shape[1:]))

    def by_rule(self, step: Step) -> Iterator[np.ndarray]:
        """What the step's own rule adds to each value that it writes."""
        graph, chunk = self.program.plan.graph, self.chunk
        R = tuple(
            self.gradient(v)
            if v in self.program.sheets
            else np.zeros(graph.shapes[v] or (), np.float32)
            for v in step.node.outputs
            if v
        )
        for position in step.positions:
            call = Call(step.node, position, R, chunk.values, chunk.baseline, graph.batch)
            yield step.rule(call)

    def result(self, observe: Observer | None) -> np.ndarray:
        """R at the input; an observer is told of every activation."""
        plan = self.program.plan
        for step in layers_of(plan) if observe is not None else ():
            assert observe is not None
            value = step.node.outputs[0]
            observe(step, self.chunk.values[value], self.gradient(value), self.leaving(step))
        return self.gradient(plan.graph.input)
