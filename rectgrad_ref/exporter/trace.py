"""A plan → the nodes that carry it out: the reference's walk, on tensors instead of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import helper

from .. import analysis
from ..errors import UnsupportedOperator
from ..graph import Graph
from ..methods import Method
from ..plan import Plan
from ..reference import walk
from ..rules.declared import Call, Rule
from . import functions, primitives  # noqa: F401  (the spellings register themselves)
from .tensor import NotTraceable, Record, Tape, Tensor

FLOAT32 = np.dtype(np.float32)
# Smaller constants are arrays to the rules, which may look into them; larger ones keep their names.
_SMALL = 1024

TARGET = "target"
_BASELINE, _PASS = "baseline/", "pass/"
ITERATION, CONDITION = "pass/iteration", "pass/condition"
TOTAL, NEXT = "pass/total", "pass/next"  # the sum before and after a pass


def at_baseline(name: str) -> str:
    """The value where the image is the baseline."""
    return _BASELINE + name


def in_pass(name: str) -> str:
    """The value at the point of a pass, of methods that take several."""
    return _PASS + name


def in_graph(name: str) -> str:
    """The value of which this is the one at a baseline or in a pass."""
    return name.removeprefix(_BASELINE).removeprefix(_PASS)


@dataclass
class Trace:
    """The backward half of an explainer.

    Attributes
    ----------
    records : sequence of Record
    attribution : str
        The value that is the map.
    finished : dict of str to str
        Value of the graph → that of its gradient, in the last pass.
    """

    records: Sequence[Record]
    attribution: str
    finished: dict[str, str]


class _Values(Mapping[str, Tensor | np.ndarray]):
    """Forward values as the rules see them: float32, by name.

    Parameters
    ----------
    place : callable
        Name of a value of the graph → what it is called here.
    """

    def __init__(
        self, tape: Tape, graph: Graph, place: Callable[[str], str] = lambda name: name
    ) -> None:
        self.tape, self.graph, self.place = tape, graph, place
        self.known: dict[str, Tensor | np.ndarray] = {}

    def __getitem__(self, name: str) -> Tensor | np.ndarray:
        if name not in self.known:
            self.known[name] = self._find(name)
        return self.known[name]

    def _find(self, name: str) -> Tensor | np.ndarray:
        graph = self.graph
        constant, shape = graph.constants.get(name), graph.shapes[name]
        is_float = np.issubdtype(graph.dtypes[name], np.floating)
        if constant is not None and (constant.size < _SMALL or not is_float):
            return constant.astype(FLOAT32, copy=False) if is_float else constant
        assert shape is not None
        place = self.place(name) if constant is None else name
        if self.place is at_baseline and constant is None:  # one sample stands for all
            axis = analysis.sample_axes(graph).get(name) or 0
            shape = (*shape[:axis], 1, *shape[axis + 1 :])
        value = Tensor(self.tape, place, shape, graph.dtypes[name])
        if not is_float:
            return value
        scope, self.tape.scope = self.tape.scope, place
        value, self.tape.scope = value.astype(FLOAT32), scope
        value.non_negative = name in analysis.non_negative(graph)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.graph.shapes)

    def __len__(self) -> int:
        return len(self.graph.shapes)


@dataclass(frozen=True)
class _Written(Rule):
    """A rule whose call is written down under the name of its node."""

    rule: Rule
    graph: Graph = field(compare=False)
    tape: Tape = field(compare=False)
    finished: dict[str, str] = field(compare=False)

    def __call__(self, call: Call) -> np.ndarray:
        node = call.node
        for value, R in zip(node.outputs, call.R, strict=True):
            if isinstance(R, Tensor):
                self.finished[value] = R.name
        self.tape.scope = f"{node.name}/backward/{call.position}"
        with _writing(f"{node} ({self.graph.model.name}): the rule {self.rule}"):
            return self.rule(call)


@contextmanager
def _writing(what: str) -> Iterator[None]:
    """Say what it was that could not be written down, and what can be done."""
    try:
        yield
    except (NotTraceable, TypeError, AttributeError, LookupError, ValueError) as error:
        raise UnsupportedOperator(
            f"{what} cannot be written as ONNX nodes ({error}); `rectgrad explain` carries it out"
        ) from error


def trace(plan: Plan, method: Method) -> Trace:
    """What carries out `plan`, as often as `method` asks, and finishes as it does.

    Raises
    ------
    UnsupportedOperator
        A rule, or what the method does before or after the walk, cannot be written as ONNX nodes.
    """
    graph, tape, finished = plan.graph, Tape("seed"), dict[str, str]()
    values = _Values(tape, graph)
    scores: Any = values[graph.logits]
    wanted = Tensor(tape, TARGET, (graph.batch,), np.dtype(np.int64))
    best = scores.reshape(graph.batch, graph.classes).argmax(axis=1)
    target: Any = np.where(wanted < 0, best, wanted)
    once = _walked if method.walks_once else _summed
    R = once(plan, method, values, target, finished)
    tape.scope = "finish"
    x: Any = values[graph.input]
    with _writing(f"{graph.model.name}: {type(method).__name__}.finish"):
        attribution: Any = method.finish(x, R, np.arange(graph.batch))
    return Trace(tape.records, attribution.name, finished)


def _walked(
    plan: Plan, method: Method, values: _Values, target: Tensor, finished: dict[str, str]
) -> Any:
    """R at the input, from the values of one forward pass."""
    graph, tape = plan.graph, values.tape
    logits: Any = values[graph.logits]
    seed = _seed(logits.reshape(graph.batch, graph.classes), target, method.output_seed)
    steps = tuple(
        replace(step, rule=_Written(step.rule, graph, tape, finished)) for step in plan.steps
    )
    R: Any = walk(
        replace(plan, steps=steps),
        values,  # type: ignore[arg-type]
        seed.reshape(logits.shape),
        baseline=_Values(tape, graph, at_baseline),  # type: ignore[arg-type]
    )
    finished[graph.input] = R.name
    return R


def _summed(
    plan: Plan, method: Method, values: _Values, target: Tensor, finished: dict[str, str]
) -> Any:
    """Σₖ weight(k) · R at point(k): a loop over the passes."""
    graph, tape = plan.graph, Tape("pass")
    image: Any = values[graph.input]
    points = [Tape("point") for _ in range(method.passes)]
    keys = np.arange(graph.batch)
    for k, point in enumerate(points):
        with _writing(f"{graph.model.name}: {type(method).__name__}.point"):
            x: Any = method.point(image.on(point), k, keys)
    tape.records += per_pass([point.records for point in points])
    kind = helper.np_dtype_to_tensor_dtype(graph.dtypes[graph.input])
    tape.records.append(Record("Cast", (x.name,), (in_pass(graph.input),), {"to": kind}))
    R = _walked(plan, method, _Values(tape, graph, in_pass), target.on(tape), finished)
    weights = np.array([method.weight(k) for k in range(method.passes)], FLOAT32)
    iteration = Tensor(tape, ITERATION, (), np.dtype(np.int64))
    (weight,) = tape.emit("Gather", [weights, iteration], ((), FLOAT32), axis=0)
    total = Tensor(tape, TOTAL, image.shape, FLOAT32) + R * weight
    tape.records.append(Record("Identity", (total.name,), (NEXT,), {}))
    start: Any = np.zeros_like(image)
    body = tuple(tape.records)
    # The condition may be left out, but onnx's evaluator takes that for false.
    inputs = (np.array(method.passes), np.array(True), start.name)
    values.tape.records.append(Record("Loop", inputs, ("passes/R",), {}, (body,)))
    return Tensor(values.tape, "passes/R", image.shape, FLOAT32)


def per_pass(passes: Sequence[Sequence[Record]]) -> list[Record]:
    """One for all passes: a constant that differs between them is looked up in a table."""
    records: list[Record] = []
    for same in zip(*passes, strict=True):
        inputs: list[str | np.ndarray] = []
        for i, each in enumerate(zip(*(record.inputs for record in same), strict=True)):
            if all(isinstance(v, np.ndarray) for v in each) and any(
                not np.array_equal(v, each[0]) for v in each
            ):
                name = f"{same[0].outputs[0]}/{i}"
                table = np.stack(each)
                records.append(Record("Gather", (table, ITERATION), (name,), {"axis": 0}))
                inputs.append(name)
            else:
                inputs.append(each[0])
        records.append(replace(same[0], inputs=tuple(inputs)))
    return records


def _seed(scores: Tensor, target: Tensor, kind: str) -> Any:
    """What enters at the logits: see `rectgrad_ref.explainer.seed_at`."""
    here = target[:, None] == np.arange(scores.shape[1])
    if kind == "one":
        return here.astype(FLOAT32)
    if kind == "logit":
        return np.where(here, scores, 0)
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    probability = e / e.sum(axis=1, keepdims=True)
    own = np.where(here, probability, 0).sum(axis=1, keepdims=True)
    return np.where(here, own, 0) - own * probability
