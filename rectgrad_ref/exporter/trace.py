"""A plan → the nodes that carry it out: the reference's walk, on tensors instead of arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

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


@dataclass
class Trace:
    """The backward half of an explainer.

    Attributes
    ----------
    records : list of Record
    attribution : str
        The value that is the map.
    finished : dict of str to str
        Value of the graph → that of its gradient.
    """

    records: list[Record]
    attribution: str
    finished: dict[str, str]


class _Values(Mapping[str, Tensor | np.ndarray]):
    """Forward values as the rules see them: float32, by name.

    Parameters
    ----------
    baseline : bool
        Those at the baseline, where one sample stands for all.
    """

    def __init__(self, tape: Tape, graph: Graph, *, baseline: bool = False) -> None:
        self.tape, self.graph, self.baseline = tape, graph, baseline
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
        place = name
        if self.baseline and constant is None:
            place = at_baseline(name)
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


def at_baseline(name: str) -> str:
    """The value where the image is the baseline."""
    return f"baseline/{name}"


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
        try:
            return self.rule(call)
        except (NotTraceable, TypeError, AttributeError, LookupError, ValueError) as error:
            raise UnsupportedOperator(
                f"{node} ({self.graph.model.name}): the rule {self.rule} cannot be written as ONNX "
                f"nodes ({error}); `rectgrad explain` carries it out"
            ) from error


def trace(plan: Plan, method: Method, target: str) -> Trace:
    """What carries out `plan`, and finishes as `method` does.

    Parameters
    ----------
    target : str
        The value with the class of each sample, int64 (N,); below 0, the largest score.

    Raises
    ------
    UnsupportedOperator
        A rule cannot be written as ONNX nodes.
    """
    graph, tape, finished = plan.graph, Tape(), dict[str, str]()
    values = _Values(tape, graph)
    steps = tuple(
        replace(step, rule=_Written(step.rule, graph, tape, finished)) for step in plan.steps
    )
    tape.scope = "seed"
    logits: Any = values[graph.logits]
    seed = _seed(logits.reshape(graph.batch, graph.classes), target, method.output_seed)
    R: Any = walk(
        replace(plan, steps=steps),
        values,  # type: ignore[arg-type]
        seed.reshape(logits.shape),
        baseline=_Values(tape, graph, baseline=True),  # type: ignore[arg-type]
    )
    finished[graph.input] = R.name
    tape.scope = "finish"
    attribution: Any = method.finish(values[graph.input], R, np.arange(graph.batch))  # type: ignore[arg-type]
    return Trace(tape.records, attribution.name, finished)


def _seed(scores: Tensor, target: str, kind: str) -> Any:
    """What enters at the logits: see `rectgrad_ref.explainer.seed_at`."""
    wanted = Tensor(scores.tape, target, scores.shape[:1], np.dtype(np.int64))
    chosen: Any = np.where(wanted < 0, np.argmax(scores, axis=1), wanted)
    here = chosen[:, None] == np.arange(scores.shape[1])
    if kind == "one":
        return here.astype(FLOAT32)
    if kind == "logit":
        return np.where(here, scores, 0)
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    probability = e / e.sum(axis=1, keepdims=True)
    own = np.where(here, probability, 0).sum(axis=1, keepdims=True)
    return np.where(here, own, 0) - own * probability
