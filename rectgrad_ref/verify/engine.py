"""The reference's walk under any conventions, on what the other side gave.

RectGrad is discontinuous: once two correct implementations differ by one unit, everything upstream
differs. So wherever the other side gave a gradient, it is compared and then takes the place of the
walk's own, and what follows is compared on shared inputs (SPEC section 5). Linear steps are done in
float64; scores are rounded to the dtype of the bundle before they meet τ, as they are everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np

from .. import analysis
from .. import threshold as threshold_module
from ..errors import InvalidModel
from ..executors import make_backend
from ..explainer import Explainer, seed_at
from ..forward import Forward
from ..graph import Graph, Node, freeze, input_spec
from ..methods import Method, RectGrad
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
    expected, found : numpy.ndarray
        What follows from what was shared before, in float64; and what was given.
    tolerance : float
        Relative to the largest absolute expected value of each sample.
    band : numpy.ndarray of bool, or None
        At R_in: units within the stated band around τ.
    """

    value: str
    kind: Kind
    expected: np.ndarray
    found: np.ndarray
    tolerance: float
    band: np.ndarray | None = None


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


@dataclass(frozen=True, kw_only=True)
class Deviating(RectGrad):
    """RectGrad with what `Conventions` says of its layers."""

    conventions: Conventions

    def rules(self, graph: Graph) -> RuleTable:
        return table_of(super().rules(graph), graph, self.conventions)


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
    R : numpy.ndarray
        At the input, float64.
    points : tuple of Point
        In the order of the walk, from the logits.
    near : mapping of str to numpy.ndarray of bool
        Layer → units whose score lies within float32 rounding of τ.
    tolerance : float
        Of R, since the last shared gradient.
    """

    R: np.ndarray
    points: tuple[Point, ...]
    near: Mapping[str, np.ndarray]
    tolerance: float


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
    forward : Forward, optional
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
        forward: Forward | None = None,
    ) -> None:
        self.model, self.x, self.target, self.dtype = model, x, target, x.dtype
        whole = _samplewise(model, x.shape, input, output)
        self.samplewise = whole is not None
        size = len(x) if self.samplewise else 1
        self.graph: Graph = whole or freeze(model, (size, *x.shape[1:]), input=input, output=output)
        self.groups = [slice(i, i + size) for i in range(0, len(x), size)]
        self._forward = forward or self._fastest()
        self._values: dict[tuple[bool, int], dict[str, np.ndarray]] = {}
        self._given: dict[Given, list[Given]] = {}
        self.memory = _Memory()

    def _fastest(self) -> Forward:
        name = "auto" if self.dtype == np.float32 else "reference"
        fixed = input_spec(self.model, self.graph.input).shape[0] is not None
        rebatch = fixed and self.samplewise
        return make_backend(
            name, self.model, self.graph.input, rebatch=rebatch, dtype=self.dtype, threads=None
        ).forward

    @property
    def layers(self) -> list[Node]:
        """The activations, from the input to the logits."""
        names = analysis.activations(self.graph)
        return [node for node in analysis.path(self.graph) if node.name in names]

    @cached_property
    def logits(self) -> np.ndarray:
        """(N, classes), float64."""
        parts = [self._forward_values(False, i, ()) for i in range(len(self.groups))]
        classes = self.graph.classes
        return np.concatenate([v[self.graph.logits].reshape(-1, classes) for v in parts])

    @cached_property
    def channel_axis(self) -> int | None:
        """Where the colour channels of the input lie: the axis of extent 3, if there is one."""
        if self.x.ndim != 4:
            return None
        return next((axis for axis in (1, 3) if self.x.shape[axis] == 3), None)

    def input_of(self, conventions: Conventions) -> np.ndarray:
        """What the network sees."""
        if not conventions.swapped or self.channel_axis is None:
            return self.x
        return np.flip(self.x, self.channel_axis)

    def walk(
        self,
        conventions: Conventions,
        given: Given | None = None,
        *,
        flip: Mapping[str, np.ndarray] | None = None,
        wants_near: bool = True,
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rules = conventions.method.rules(self.graph)
            plan = make_plan(self.graph, table_of(rules, self.graph, conventions))
        parts = [
            _Pass(self, plan, conventions, i, part, _sliced(flip, rows), wants_near)()
            for i, (rows, part) in enumerate(zip(self.groups, self._parts(given), strict=True))
        ]
        return _joined(parts)

    def gradient(self, conventions: Conventions) -> np.ndarray | None:
        """R at the input by the compiled backend, which is many times faster than `walk`.

        Returns
        -------
        numpy.ndarray, float64, or None
            None where it cannot run these conventions.
        """
        method = conventions.method
        if self.dtype != np.float32 or conventions.seed != "method":
            return None
        if not isinstance(method, RectGrad):
            return None
        plain = Deviating(
            **vars(replace(method, times_input=False, final_threshold=False)),
            conventions=conventions,
        )
        x = np.ascontiguousarray(self.input_of(conventions))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = self._explainer.explain(x, method=plain, target=self.target)
        return result.values.astype(np.float64)

    @cached_property
    def _explainer(self) -> Explainer:
        return Explainer(
            self.model.proto, dtype=self.dtype, input=self.graph.input, output=self.graph.output
        )

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
            x = self.x[self.groups[group]]
            if swapped and self.channel_axis is not None:
                x = np.ascontiguousarray(np.flip(x, self.channel_axis))
            found = self._forward(self.graph, x, missing)
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
        constants = constants_as({v: graph.constants[v] for v in read}, np.dtype(np.float64))
        self.values = {**constants, **values}
        self.unit = _ROUNDING[engine.dtype]
        self.swapped, self.wants_near = conventions.swapped, wants_near
        self.R: dict[str, np.ndarray] = {}
        self.tolerance: dict[str, float] = {}
        self.points: list[Point] = []
        self.near: dict[str, np.ndarray] = {}
        self._plant(conventions, group)

    def __call__(self) -> Walk:
        for step in self.plan.steps:
            outgoing = tuple(self._take(v, i, step) for i, v in enumerate(step.node.outputs))
            is_layer = step.node.name in self.plan.layers
            for position, name in zip(step.positions, step.writes, strict=True):
                call = Call(
                    step.node, position, outgoing, self.values, NOTHING, self.plan.graph.batch
                )
                gradient = self._layer(call, step) if is_layer else self._linear(call, step)
                self._add(name, gradient, step, is_layer)
        name = self.plan.graph.input
        self._meet(name)
        return Walk(self.R[name], tuple(self.points), self.near, self.tolerance[name])

    def _plant(self, conventions: Conventions, group: int) -> None:
        graph, rows = self.plan.graph, self.engine.groups[group]
        logits = self.values[graph.logits]
        scores = logits.reshape(len(self.engine.target[rows]), -1)
        target, kind = self.engine.target[rows], conventions.method.output_seed
        seed = seed_at(scores, target, kind)
        if conventions.seed == "every class":
            seed = np.ones_like(scores)
        if conventions.seed == "mean":
            seed = seed / len(self.engine.x)
        self.R[graph.logits] = seed.reshape(logits.shape)
        self.tolerance[graph.logits] = seed_tolerance(scores, target, kind, self.unit)

    def _take(self, name: str, output: int, step: Step) -> np.ndarray:
        if name not in self.R:
            self.R[name] = np.zeros(step.node.output_shapes[output])
            self.tolerance[name] = 0.0
        self._meet(name)
        return self.R[name]

    def _meet(self, name: str) -> None:
        """Compare the whole gradient at a value with the other side's, and share that."""
        found = self.given.at.get(name)
        if found is None:
            return
        is_layer = any(
            s.node.outputs[0] == name for s in self.plan.steps if s.node.name in self.plan.layers
        )
        kind: Kind = "R_out" if is_layer else "gradient"
        self.points.append(Point(name, kind, self.R[name], found, self.tolerance[name]))
        self.R[name] = self.engine.memory.get(("", id(found)), (found,), lambda: _double(found))
        self.tolerance[name] = 0.0

    def _linear(self, call: Call, step: Step) -> np.ndarray:
        """The step, done once for the same gradient: conventions share most of their walks."""
        key = (self.swapped, step.node.name, call.position, step.rule, *map(id, call.R))
        return self.engine.memory.get(key, call.R, lambda: step.rule(call))

    def _layer(self, call: Call, step: Step) -> np.ndarray:
        name, rule = step.node.outputs[0], step.rule
        key = (self.swapped, name, rule, id(call.R[0]))
        gradient = self.engine.memory.get(key, call.R, lambda: self._ruled(call, step))
        if isinstance(rule, Rectify) and self.wants_near:
            self.near[name] = self._band(rule, call, exact=False)
            gradient = self._flipped(gradient, call, rule)
        shared = self.given.R_in.get(name)
        if shared is None:
            return gradient
        band = None
        if isinstance(rule, Rectify) and not np.array_equal(gradient, shared):
            band = self._band(rule, call, exact=name in self.given.a and name in self.given.at)
        selects = step.node.op == "Relu" and not isinstance(rule, EpsilonRatio)
        tolerance = self.tolerance[name] + (0.0 if selects else 8 * self.unit)
        self.points.append(Point(name, "R_in", gradient, shared, tolerance, band))
        return self.engine.memory.get(("", id(shared)), (shared,), lambda: _double(shared))

    def _ruled(self, call: Call, step: Step) -> np.ndarray:
        """The rule in the dtype in which scores are rounded."""
        name, dtype = step.node.outputs[0], self.engine.dtype
        # Scores only: a max pool must find its output among the values that it was computed from.
        values = {**self.values, name: self.given.a.get(name, self.values[name])}
        rounded = {v: values[v].astype(dtype) for v in step.rule.reads(step.node, 0)}
        R = call.R[0].astype(dtype)
        one = Call(step.node, call.position, (R,), rounded, NOTHING, call.samples)
        return step.rule(one).astype(np.float64)

    def _flipped(self, gradient: np.ndarray, call: Call, rule: Rectify) -> np.ndarray:
        turned = self.flip.get(call.node.outputs[0])
        if turned is None:
            return gradient
        passed = call.R[0]
        if call.node.op != "Relu" and rule.derivative:
            passed = passed * call.slope(call.z)
        return np.where(turned, np.where(gradient == 0, passed, 0), gradient)

    def _band(self, rule: Rectify, call: Call, exact: bool) -> np.ndarray:
        a = self.given.a.get(call.node.outputs[0], call.a).astype(self.engine.dtype)
        R = call.R[0].astype(self.engine.dtype)
        return tie_band(rule, a, R, call.samples, is_relu=call.node.op == "Relu", exact=exact)

    def _add(self, name: str, gradient: np.ndarray, step: Step, is_layer: bool) -> None:
        before = max((self.tolerance.get(v, 0.0) for v in step.node.outputs), default=0.0)
        if is_layer and step.node.outputs[0] in self.given.R_in:
            before = 0.0
        after = before + (0.0 if is_layer else linear_tolerance(step, self.unit))
        self.tolerance[name] = max(self.tolerance.get(name, 0.0), after)
        if name not in self.R:
            self.R[name] = gradient
            return
        one = self.R[name]
        self.R[name] = self.engine.memory.get(
            ("+", id(one), id(gradient)), (one, gradient), lambda: one + gradient
        )


@dataclass(eq=False)
class _Memory:
    """Results by what they were computed from, which is kept so that identities stay unique."""

    room: int = 2**31
    found: dict[tuple[Any, ...], tuple[np.ndarray, tuple[np.ndarray, ...]]] = field(
        default_factory=dict
    )

    def get(
        self,
        key: tuple[Any, ...],
        sources: tuple[np.ndarray, ...],
        compute: Callable[[], np.ndarray],
    ) -> np.ndarray:
        if key not in self.found:
            result = compute()
            size = result.nbytes + sum(source.nbytes for source in sources)
            if size > self.room:
                return result
            self.room -= size
            self.found[key] = (result, sources)
        return self.found[key][0]


def _double(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def linear_tolerance(step: Step, unit: float) -> float:
    """How far a linear step may be off, relative to its largest value (SPEC section 5)."""
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
        replace(
            point,
            expected=together(lambda w, i=i: w.points[i].expected),  # type: ignore[misc]
            found=together(lambda w, i=i: w.points[i].found),  # type: ignore[misc]
            band=None if point.band is None else together(lambda w, i=i: w.points[i].band),  # type: ignore[misc]
        )
        for i, point in enumerate(first.points)
    )
    near = {name: together(lambda w, n=name: w.near[n]) for name in first.near}  # type: ignore[misc]
    return Walk(together(lambda w: w.R), points, near, first.tolerance)
