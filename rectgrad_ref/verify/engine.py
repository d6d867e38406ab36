"""The reference's walk under any conventions, on what the other side gave.

RectGrad is discontinuous: once two correct implementations differ by one unit, everything upstream
differs. So wherever the other side gave a gradient, it is compared and then takes the place of the
walk's own, and what follows is compared on shared inputs (docs/conventions.md). Linear steps are
done in float64; scores are rounded to the dtype of the bundle before they meet τ, as they are
everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import Any, Literal

import numpy as np

from .. import analysis
from .. import threshold as threshold_module
from ..errors import InvalidModel
from ..executors import Backend, make_backend
from ..explainer import seed_at
from ..graph import Graph, Node, freeze, input_spec
from ..methods import Method
from ..methods.base import named
from ..model import Model
from ..plan import Matches, Plan, RuleTable, Step, make_plan
from ..reference import NOTHING, constants_as
from ..rules.declared import Call, EpsilonRatio, Gradient, Rectify, Rule

Kind = Literal["R_out", "R_in", "gradient"]
SeedKind = Literal["method", "every class", "mean"]
_SHORT_REDUCTION = 1024
_ROUNDING = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float64): 2.0**-53}


@dataclass(frozen=True, eq=False)
class Given:
    """Gradients of the other side, which replace those of the walk.

    Attributes
    ----------
    at : mapping of str to numpy.ndarray
        Value name → the whole gradient at that value.
    R_in : mapping of str to numpy.ndarray
        Output of an activation → the gradient that leaves through it.
    a : mapping of str to numpy.ndarray
        Output of an activation → its value there.
    """

    at: Mapping[str, np.ndarray] = field(default_factory=dict)
    R_in: Mapping[str, np.ndarray] = field(default_factory=dict)
    a: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.at or self.R_in)


@dataclass(frozen=True, eq=False)
class Point:
    """A place where the other side's gradient met the walk's.

    Attributes
    ----------
    value : str
        ONNX value name; at R_in, that of the activation's output.
    kind : str
    found : numpy.ndarray
        What was given.
    tolerance : float
        Relative to the largest absolute expected value of each sample.
    expect, find_band : callable
        See `expected` and `band`.
    key : hashable
        Equal at two walks of one engine where everything else is, too.
    """

    value: str
    kind: Kind
    found: np.ndarray
    tolerance: float
    expect: Callable[[], np.ndarray]
    find_band: Callable[[], np.ndarray | None] = lambda: None
    key: Hashable = None

    @cached_property
    def expected(self) -> np.ndarray:
        """What follows from what was shared before, in float64; computed when it is looked at."""
        return self.expect()

    @cached_property
    def band(self) -> np.ndarray | None:
        """At R_in: the units within the stated band around τ."""
        return self.find_band()


@dataclass(frozen=True)
class Conventions:
    """A method, and what an implementation may do besides its options.

    Attributes
    ----------
    method : Method
    missing : frozenset of str
        Value names of activations that are passed by ordinary backpropagation.
    scores_z : bool
        Scores are z·R instead of a·R.
    channelwise : bool
        The percentile is taken over each channel, but at dense layers over the whole layer.
    seed : str
        ``"method"``; 1 at the logit of ``"every class"``; ``"mean"``, the method's over the number
        of samples.
    swapped : bool
        The network sees the colour channels in reverse order.
    """

    method: Method
    missing: frozenset[str] = frozenset()
    scores_z: bool = False
    channelwise: bool = False
    seed: SeedKind = "method"
    swapped: bool = False


@dataclass(frozen=True)
class RectifyByInput(Rule):
    """RectGrad with scores z·R: what hooks that see an activation's input compute."""

    rule: Rectify

    def reads(self, node: Node, position: int) -> tuple[str, ...]:
        return (node.inputs[0],)

    def __call__(self, call: Call) -> np.ndarray:
        R = call.R[0]
        mask, _ = self.rule.select(call.z, R, call.samples)
        if call.node.op != "Relu" and self.rule.derivative:
            R = R * call.slope(call.z)
        return np.where(mask, R, 0)


@dataclass(frozen=True, eq=False)
class Walk:
    """The result of one walk.

    Attributes
    ----------
    points : tuple of Point
        In the order of the walk, from the logits.
    near : mapping of str to numpy.ndarray of bool
        Layer → units whose score lies within float32 rounding of τ, where they were asked for.
    tolerance : float
        Of R, since the last shared gradient.
    arrive : callable
        See `R`.
    key : hashable
        Equal at two walks of one engine where R is.
    """

    points: tuple[Point, ...]
    near: Mapping[str, np.ndarray]
    tolerance: float
    arrive: Callable[[], np.ndarray]
    key: Hashable = None

    @cached_property
    def R(self) -> np.ndarray:
        """At the input, float64; computed when it is looked at."""
        return self.arrive()


class Engine:
    """One model and its images, walked under many conventions.

    Parameters
    ----------
    model : Model
    x : numpy.ndarray
        Model inputs, whose dtype is the one in which scores are rounded.
    target : numpy.ndarray of int, shape (N,)
    input, output : str
        Value names.
    backend : Backend, optional
        Where activations come from; by default the fastest that has the dtype of `x`.
    """

    def __init__(
        self,
        model: Model,
        x: np.ndarray,
        target: np.ndarray,
        *,
        input: str,
        output: str,
        backend: Backend | None = None,
    ) -> None:
        self.model, self.x, self.target, self.dtype = model, x, target, x.dtype
        whole = _samplewise(model, x.shape, input, output)
        self.samplewise = whole is not None
        size = len(x) if self.samplewise else 1
        self.graph: Graph = whole or freeze(model, (size, *x.shape[1:]), input=input, output=output)
        self.groups = [slice(i, i + size) for i in range(0, len(x), size)]
        self.backend = backend or self._fastest()
        self._values: dict[tuple[bool, int], dict[str, np.ndarray]] = {}
        self._given: dict[Given, list[Given]] = {}
        self._numbers: dict[tuple[Hashable, ...], int] = {}
        self._constants: dict[str, np.ndarray] = {}
        self.shared: dict[int, _Gradient] = {}

    def _fastest(self) -> Backend:
        name = "auto" if self.dtype == np.float32 else "reference"
        fixed = input_spec(self.model, self.graph.input).shape[0] is not None
        rebatch = fixed and self.samplewise
        return make_backend(
            name, self.model, self.graph.input, rebatch=rebatch, dtype=self.dtype, threads=None
        )

    @property
    def layers(self) -> list[Node]:
        """The activations, from the input to the logits."""
        names = analysis.activations(self.graph)
        return [node for node in analysis.path(self.graph) if node.name in names]

    @cached_property
    def channel_axis(self) -> int | None:
        """Where the colour channels of the input lie: the axis of extent 3, if there is one."""
        if self.x.ndim != 4:
            return None
        return next((axis for axis in (1, 3) if self.x.shape[axis] == 3), None)

    def input_of(self, conventions: Conventions) -> np.ndarray:
        """What the network sees."""
        return self._input(conventions.swapped)

    def _input(self, swapped: bool) -> np.ndarray:
        if not swapped or self.channel_axis is None:
            return self.x
        return np.ascontiguousarray(np.flip(self.x, self.channel_axis))

    def number(self, *key: Hashable) -> int:
        """The number of what a gradient follows from: its own, and one hash instead of many."""
        return self._numbers.setdefault(key, len(self._numbers))

    def walk(
        self,
        conventions: Conventions,
        given: Given | None = None,
        *,
        flip: Mapping[str, np.ndarray] | None = None,
        wants_near: bool = False,
    ) -> Walk:
        """Walk back from the logits.

        Parameters
        ----------
        conventions : Conventions
        given : Given, optional
            What is compared and then shared.
        flip : mapping of str to numpy.ndarray of bool, optional
            Layer → units whose verdict is turned round.
        wants_near : bool
            Whether to find the units within rounding of τ.

        Raises
        ------
        ValueError
            The conventions do not fit the model, such as one unit a channel.
        """
        plan = self._plan(conventions)
        parts = [
            _Pass(self, plan, conventions, i, part, _sliced(flip, rows), wants_near)()
            for i, (rows, part) in enumerate(zip(self.groups, self._parts(given), strict=True))
        ]
        return _joined(parts)

    def gradient(self, conventions: Conventions) -> np.ndarray:
        """R at the input by the backend, in its dtype: many times faster than `walk`.

        Raises
        ------
        ValueError
            As in `walk`.
        """
        x, runner = self.input_of(conventions), self.backend.runner(self._plan(conventions))
        parts = [runner(x[rows], partial(self.seed, conventions, rows))[1] for rows in self.groups]
        return np.concatenate(parts).astype(np.float64)

    def seed(self, conventions: Conventions, rows: slice, scores: np.ndarray) -> np.ndarray:
        """What enters at the logits of some samples, (n, classes)."""
        if conventions.seed == "every class":
            return np.ones_like(scores)
        seed = seed_at(scores, self.target[rows], conventions.method.output_seed)
        return seed / len(self.x) if conventions.seed == "mean" else seed

    def constants(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Weights in float64, converted once for all walks."""
        new = {v: self.graph.constants[v] for v in names if v not in self._constants}
        self._constants |= constants_as(new, np.dtype(np.float64))
        return {v: self._constants[v] for v in names}

    def _plan(self, conventions: Conventions) -> Plan:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rules = conventions.method.rules(self.graph)
            return make_plan(self.graph, table_of(rules, self.graph, conventions))

    def _parts(self, given: Given | None) -> list[Given]:
        if given is None or len(self.groups) == 1:
            return [given or Given()] * len(self.groups)
        if given not in self._given:
            self._given[given] = [_rows(given, rows) for rows in self.groups]
        return self._given[given]

    def map_of(self, conventions: Conventions, R: np.ndarray) -> np.ndarray:
        """The final map from R at the input, in float64."""
        x = self.input_of(conventions).astype(np.float64)
        return conventions.method.finish(x, R, np.arange(len(x)))

    def _forward_values(
        self, swapped: bool, group: int, names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Values by name in float64, as exact copies of the bundle's dtype."""
        known = self._values.setdefault((swapped, group), {})
        missing = [v for v in dict.fromkeys((self.graph.logits, *names)) if v not in known]
        if missing:
            x = self._input(swapped)[self.groups[group]]
            found = self.backend.forward(self.graph, x, missing)
            known.update(
                (k, v.astype(np.float64) if np.issubdtype(v.dtype, np.floating) else v)
                for k, v in found.items()
            )
        return known


def _samplewise(model: Model, shape: tuple[int, ...], input: str, output: str) -> Graph | None:
    """The graph for all samples together, where each provably gets what it would get alone."""
    try:
        graph = freeze(model, shape, input=input, output=output)
    except InvalidModel:
        return None
    return graph if shape[0] == 1 or analysis.is_samplewise(graph) else None


class _Gradient:
    """A gradient that is computed when it is looked at, and the number of what it follows from."""

    def __init__(self, number: int, compute: Callable[[], np.ndarray]) -> None:
        self.number, self._compute = number, compute

    @cached_property
    def value(self) -> np.ndarray:
        return self._compute()


class _Pass:
    """One walk of one group of samples."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        conventions: Conventions,
        group: int,
        given: Given,
        flip: Mapping[str, np.ndarray],
        wants_near: bool,
    ) -> None:
        self.engine, self.plan, self.given, self.flip = engine, plan, given, flip
        graph = plan.graph
        outputs = [step.node.outputs[0] for step in plan.steps if step.node.name in plan.layers]
        values = engine._forward_values(conventions.swapped, group, (*plan.exposes, *outputs))
        read = {v for step in plan.steps for v in step.reads} & graph.constants.keys()
        self.values = {**engine.constants(read), **values}
        self.unit = _ROUNDING[engine.dtype]
        self.sees, self.wants_near = (conventions.swapped, group), wants_near
        self.layers = {s.node.outputs[0] for s in plan.steps if s.node.name in plan.layers}
        self.R: dict[str, _Gradient] = {}
        self.tolerance: dict[str, float] = {}
        self.points: list[Point] = []
        self.near: dict[str, np.ndarray] = {}
        self._plant(conventions, group)

    def __call__(self) -> Walk:
        for step in self.plan.steps:
            outgoing = tuple(self._take(v, i, step) for i, v in enumerate(step.node.outputs))
            is_layer = step.node.outputs[0] in self.layers
            for position, name in zip(step.positions, step.writes, strict=True):
                found = self._step(step, position, outgoing, is_layer)
                self._add(name, found, step, is_layer)
        name = self.plan.graph.input
        self._meet(name)
        R = self.R[name]
        self.R.clear()  # What is still to be computed holds what it needs.
        return Walk(tuple(self.points), self.near, self.tolerance[name], lambda: R.value, R.number)

    def _gradient(self, compute: Callable[[], np.ndarray], *key: Hashable) -> _Gradient:
        return _Gradient(self.engine.number(self.sees, *key), compute)

    def _plant(self, conventions: Conventions, group: int) -> None:
        engine, logits = self.engine, self.plan.graph.logits
        rows, kind = engine.groups[group], conventions.method.output_seed
        target, shape = engine.target[rows], self.values[logits].shape
        scores = self.values[logits].reshape(len(target), -1)
        self.R[logits] = self._gradient(
            lambda: engine.seed(conventions, rows, scores).reshape(shape), conventions.seed, kind
        )
        self.tolerance[logits] = seed_tolerance(scores, target, kind, self.unit)

    def _take(self, name: str, output: int, step: Step) -> _Gradient:
        if name not in self.R:
            shape = step.node.output_shapes[output]
            self.R[name] = self._gradient(lambda: np.zeros(shape), "zeros", name)
            self.tolerance[name] = 0.0
        self._meet(name)
        return self.R[name]

    def _meet(self, name: str) -> None:
        """Compare the whole gradient at a value with the other side's, and share that."""
        found = self.given.at.get(name)
        if found is None:
            return
        kind: Kind = "R_out" if name in self.layers else "gradient"
        R, tolerance = self.R[name], self.tolerance[name]
        key = (kind, R.number)
        self.points.append(Point(name, kind, found, tolerance, lambda: R.value, key=key))
        self.R[name] = self._share(found, kind, name)
        self.tolerance[name] = 0.0

    def _share(self, found: np.ndarray, *key: Hashable) -> _Gradient:
        made = self._gradient(lambda: found.astype(np.float64), self.given, *key)
        return self.engine.shared.setdefault(made.number, made)

    def _step(
        self, step: Step, position: int, outgoing: tuple[_Gradient, ...], is_layer: bool
    ) -> _Gradient:
        name, numbers = step.node.outputs[0], (R.number for R in outgoing)

        def call() -> Call:
            R = tuple(gradient.value for gradient in outgoing)
            return Call(step.node, position, R, self.values, NOTHING, self.plan.graph.batch)

        if not is_layer:
            return self._gradient(lambda: step.rule(call()), name, position, step.rule, *numbers)
        found = self._gradient(
            lambda: self._ruled(call(), step), self.given, name, step.rule, *numbers
        )
        if isinstance(step.rule, Rectify) and self.wants_near:
            self.near[name] = self._band(step.rule, call(), exact=False)
        if name in self.flip and isinstance(step.rule, Rectify):
            found = self._flipped(found, call(), step.rule)
        return self._leave(name, found, call, step) if name in self.given.R_in else found

    def _leave(self, name: str, R: _Gradient, call: Callable[[], Call], step: Step) -> _Gradient:
        """Compare what leaves an activation with the other side's, and share that."""
        shared, rule = self.given.R_in[name], step.rule
        exact = name in self.given.a and name in self.given.at

        def band() -> np.ndarray | None:
            if not isinstance(rule, Rectify) or np.array_equal(R.value, shared):
                return None
            return self._band(rule, call(), exact)

        selects = step.node.op == "Relu" and not isinstance(rule, EpsilonRatio)
        tolerance = self.tolerance[name] + (0.0 if selects else 8 * self.unit)
        key = ("R_in", R.number)
        self.points.append(Point(name, "R_in", shared, tolerance, lambda: R.value, band, key))
        return self._share(shared, "R_in", name)

    def _ruled(self, call: Call, step: Step) -> np.ndarray:
        """The rule in the dtype in which scores are rounded."""
        name, dtype = step.node.outputs[0], self.engine.dtype
        # Scores only: a max pool must find its output among the values that it was computed from.
        values = {**self.values, name: self.given.a.get(name, self.values[name])}
        rounded = {v: values[v].astype(dtype) for v in step.rule.reads(step.node, 0)}
        R = call.R[0].astype(dtype)
        one = Call(step.node, call.position, (R,), rounded, NOTHING, call.samples)
        return step.rule(one).astype(np.float64)

    def _flipped(self, R: _Gradient, call: Call, rule: Rectify) -> _Gradient:
        turned, passed = self.flip[call.node.outputs[0]], call.R[0]
        if call.node.op != "Relu" and rule.derivative:
            passed = passed * call.slope(call.z)
        found = np.where(turned, np.where(R.value == 0, passed, 0), R.value)
        return self._gradient(lambda: found, object())

    def _band(self, rule: Rectify, call: Call, exact: bool) -> np.ndarray:
        a = self.given.a.get(call.node.outputs[0], call.a).astype(self.engine.dtype)
        R = call.R[0].astype(self.engine.dtype)
        return tie_band(rule, a, R, call.samples, is_relu=call.node.op == "Relu", exact=exact)

    def _add(self, name: str, gradient: _Gradient, step: Step, is_layer: bool) -> None:
        before = max((self.tolerance.get(v, 0.0) for v in step.node.outputs), default=0.0)
        if is_layer and step.node.outputs[0] in self.given.R_in:
            before = 0.0
        after = before + (0.0 if is_layer else linear_tolerance(step, self.unit))
        self.tolerance[name] = max(self.tolerance.get(name, 0.0), after)
        if name not in self.R:
            self.R[name] = gradient
            return
        one = self.R[name]
        self.R[name] = self._gradient(
            lambda: one.value + gradient.value, "+", one.number, gradient.number
        )


def linear_tolerance(step: Step, unit: float) -> float:
    """How far a linear step may be off, relative to its largest value (docs/conventions.md)."""
    node = step.node
    terms = 1
    if node.op == "Conv":
        terms = node.output_shapes[0][1] // node["group"] * prod(node["kernel_shape"])
    elif node.op == "ConvTranspose":
        terms = node.output_shapes[0][1] * prod(node["kernel_shape"])
    elif node.op in ("Gemm", "MatMul"):
        terms = node.output_shapes[0][-1]
    if terms <= _SHORT_REDUCTION:
        return 1e-6 * unit / _ROUNDING[np.dtype(np.float32)]
    return float(2 * np.sqrt(terms) * unit)


def tie_band(
    rule: Rectify, a: np.ndarray, R: np.ndarray, samples: int, *, is_relu: bool, exact: bool
) -> np.ndarray:
    """Units whose score lies so near τ that rounding may put them on either side.

    The band is 4 units in the last place of τ where a and R_out are both shared (`exact`); else
    R_out and a may each be off by 16 units in the last place (1e-6 in float32) of the layer's
    largest. Units that pass nothing on either side are not counted, nor is the unit whose score
    is τ itself where no other is near.

    Parameters
    ----------
    a, R : numpy.ndarray
        In the dtype in which scores are rounded.
    """
    unit = _ROUNDING[R.dtype]
    _, tau = rule.select(a, R, samples)
    groups = tau.size
    threshold = tau.reshape(groups, 1)
    score = threshold_module.scores(rule.score, a, R, rule.eps).reshape(groups, -1)
    finite = np.isfinite(threshold)
    width = 8 * unit * np.abs(np.where(finite, threshold, 0))
    if not exact:
        one, other = (np.abs(v.reshape(groups, -1).astype(np.float64)) for v in (a, R))
        tops = (v.max(axis=1, keepdims=True, initial=0) for v in (one, other))
        most_a, most_R = tops
        width = width + 16 * unit * (one * most_R + other * most_a)
    near = finite & (np.abs(score.astype(np.float64) - threshold) <= width)
    alive = R != 0
    if is_relu and rule.score in ("a*r", "|a*r|"):
        alive = alive & (a != 0)  # the score of a dead unit is zero however R is rounded
    near &= alive.reshape(groups, -1)
    # τ follows the unit that it is the score of, so that unit alone cannot change sides.
    alone = (near.sum(axis=1, keepdims=True) == 1) & (score == threshold) & (rule.tau is None)
    return np.asarray((near & ~alone).reshape(a.shape))


def seed_tolerance(scores: np.ndarray, target: np.ndarray, kind: str, unit: float) -> float:
    """How far a seed may be off, relative to its largest value.

    Logits are sums, here taken to be off by 16 units in the last place of the largest; and where p
    is nearly 1, p·(1 − p) is left with few digits. Beyond 1 % nothing is put down to rounding.
    """
    if kind == "one":
        return 0.0
    chosen = scores[np.arange(len(scores)), target]
    largest = np.abs(scores).max(axis=1, initial=1)
    if kind == "logit":
        relative = largest / np.maximum(np.abs(chosen), np.finfo(float).tiny)
    else:
        others = np.exp(scores - chosen[:, None]).sum(axis=1) - 1
        relative = largest + (1 + others) / np.maximum(others, np.finfo(float).tiny)
    return float(np.minimum(16 * unit * relative, 0.01).max(initial=0))


def table_of(rules: RuleTable, graph: Graph, conventions: Conventions) -> RuleTable:
    """`rules` with what the conventions change in them."""
    maps = {node.name for node in graph.nodes if len(node.output_shapes[0]) > 2}
    absent = {node.name for node in graph.nodes if node.outputs[0] in conventions.missing}
    table: list[tuple[Matches, Rule]] = [(named(absent), Gradient())]
    for matches, rule in rules:
        if isinstance(rule, Rectify) and conventions.scores_z:
            table.append((matches, RectifyByInput(rule)))
            continue
        if isinstance(rule, Rectify) and conventions.channelwise:
            table.append((_both(matches, named(maps)), replace(rule, scope="channel")))
        table.append((matches, rule))
    return table


def _both(one: Matches, other: Matches) -> Matches:
    return lambda node: one(node) and other(node)


def _rows(given: Given, rows: slice) -> Given:
    return Given(*({k: v[rows] for k, v in part.items()} for part in vars(given).values()))


def _sliced(flip: Mapping[str, np.ndarray] | None, rows: slice) -> Mapping[str, np.ndarray]:
    return {k: v[rows] for k, v in (flip or {}).items()}


def _joined(parts: Sequence[Walk]) -> Walk:
    if len(parts) == 1:
        return parts[0]

    def together(pick: Callable[[Walk], Any]) -> np.ndarray:
        return np.concatenate([pick(part) for part in parts])

    first = parts[0]
    points = tuple(
        Point(
            point.value,
            point.kind,
            together(lambda w, i=i: w.points[i].found),  # type: ignore[misc]
            point.tolerance,
            partial(together, lambda w, i=i: w.points[i].expected),  # type: ignore[misc]
            partial(_bands, parts, i),
            tuple(part.points[i].key for part in parts),
        )
        for i, point in enumerate(first.points)
    )
    near = {name: together(lambda w, n=name: w.near[n]) for name in first.near}  # type: ignore[misc]
    key = tuple(part.key for part in parts)

    def arrive() -> np.ndarray:
        return together(lambda walk: walk.R)

    return Walk(points, near, first.tolerance, arrive, key)


def _bands(parts: Sequence[Walk], i: int) -> np.ndarray | None:
    """Of all samples; a part without differences has looked for none."""
    bands = [part.points[i].band for part in parts]
    if all(band is None for band in bands):
        return None
    founds = [part.points[i].found for part in parts]
    return np.concatenate(
        [np.zeros(f.shape, bool) if b is None else b for b, f in zip(bands, founds, strict=True)]
    )
