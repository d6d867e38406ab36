"""The reference verified on the user's own model and machine."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from .. import analysis
from ..attribution import Attribution, Layer
from ..errors import BackendUnavailable, RectGradWarning
from ..executors import BACKENDS
from ..executors.runner import StepwiseRunner
from ..explainer import Explainer
from ..forward import Forward
from ..graph import Graph
from ..methods import DeepLift, Method, RectGrad, make_method
from ..model import ModelSource
from ..preprocess import PreprocessLike
from .compare import Row, row_of, sensitivity
from .engine import Conventions, Engine, Given

Verdict = Literal["holds", "fails", "not applicable", "reported"]
Tell = Callable[[str], None]

# Left side, right side: options of `make_method` (docs/conventions.md).
_IDENTITIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deconvolution × input = RectGrad at τ = 0 with scores (a + ε)·R": (
        {"method": "deconvolution", "times_input": True, "final_threshold": True},
        {"method": "rectgrad", "propagation_rule": "PR1+eps", "tau": 0.0},
    ),
    "guided backpropagation × input = RectGrad at τ = 0": (
        {"method": "guided_backprop", "times_input": True, "final_threshold": True},
        {"method": "rectgrad", "tau": 0.0},
    ),
    "gradient × input = RectGrad at τ = −∞": (
        {"method": "input_x_gradient"},
        {"method": "rectgrad", "tau": -np.inf, "strict_relu": True, "final_threshold": False},
    ),
}
_AGREEING: dict[str, dict[str, Any]] = {
    "RectGrad": {"method": "rectgrad", "times_input": False, "final_threshold": False},
    "RectGrad PRR": {
        "method": "rectgrad", "prr": True, "times_input": False, "final_threshold": False
    },
    "saliency": {"method": "saliency"},
    "guided backpropagation": {"method": "guided_backprop"},
}  # fmt: skip
_EPSILON_LRP_NAME = "ε-LRP → gradient × input for ε = 1e-4, 1e-7, 1e-10"
_EXACT, _SINGLE = "NumPy float64", "NumPy float32"
_EPSILONS = (1e-4, 1e-7, 1e-10)
_STEPS = (50, 400)
_DIRECTIONS = 3
_DIFFERENCES = (1e-6, 1e-8, 1e-9, 1e-10)  # of the images' range
# A forward pass in float32 sums in another order, layer upon layer.
_FORWARD = 1e-4
_FINITE_DIFFERENCES = 1e-5
_EPSILON_LRP = 1e-5
_COMPLETENESS = 1e-6
_FLOAT32_GAP = 1e-5


@dataclass(frozen=True)
class Check:
    """One thing that has to hold.

    Attributes
    ----------
    group, name, where : str
        The last: backend, dtype, padding trick.
    verdict : str
        ``"holds"``, ``"fails"``, ``"not applicable"``, or ``"reported"`` where nothing is demanded.
    count, wrong : int
        Numbers that were compared, and of them those that are not as they should be.
    largest, allowed : float or None
        The largest relative difference; None where numbers must be equal.
    note : str
        Why something does not apply, or what else was found.
    """

    group: str
    name: str
    where: str
    verdict: Verdict
    count: int = 0
    wrong: int = 0
    largest: float | None = None
    allowed: float | None = None
    note: str = ""


@dataclass(frozen=True)
class LayerSensitivity:
    """How near RectGrad's verdicts at one activation are to their thresholds.

    Attributes
    ----------
    value : str
        ONNX value name.
    units, passing : int
        Of all images.
    near : int
        Units whose score lies within float32 rounding of τ: see `engine.tie_band`.
    """

    value: str
    units: int
    passing: int
    near: int


@dataclass(frozen=True)
class Certificate:
    """What was verified, and how it went.

    Attributes
    ----------
    environment : dict
        Model, its SHA-256, versions.
    images : str
        What was explained.
    checks : tuple of Check
    layers : tuple of LayerSensitivity
        Of RectGrad with its defaults.
    moves : float
        How far, relative to its norm, RectGrad's map moves when each of the units near τ changes
        sides with probability ½.
    """

    environment: Mapping[str, Any]
    images: str
    checks: tuple[Check, ...]
    layers: tuple[LayerSensitivity, ...]
    moves: float

    @property
    def holds(self) -> bool:
        """Whether nothing fails."""
        return all(check.verdict != "fails" for check in self.checks)


def certify(
    model: ModelSource | None = None,
    images: Any = None,
    *,
    preprocess: PreprocessLike | None = None,
    input: str | None = None,
    output: str | None = None,
    tell: Tell = lambda name: None,
) -> Certificate:
    """Verify this package on a model.

    Parameters
    ----------
    model : path, bytes or onnx.ModelProto, optional
        By default the CIFAR-10 network that comes with the package.
    images : optional
        As `Explainer.explain` takes them; by default seeded noise in [−1, 1], or, of the
        package's own network, a photograph.
    preprocess, input, output : optional
        As in `Explainer`.
    tell : callable, optional
        Called with the name of each group of checks before it starts.

    Raises
    ------
    InvalidModel, InvalidImage, UnsupportedOperator
        The model or the images cannot be explained at all.
    """
    if model is None:
        from ..demo import cat
        from ..onnx_models.cifar10_cnn import network_path

        model, images = network_path(), cat() if images is None else images
    options = {"preprocess": preprocess, "input": input, "output": output}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RectGradWarning)
        return _Examination(model, images, options).certificate(tell)


class _Remembering:
    """A forward pass that is made once for the images that are explained again and again."""

    def __init__(self, forward: Forward, x: np.ndarray) -> None:
        self.forward, self.x = forward, x
        self.dtype, self.description = forward.dtype, forward.description
        self.values: dict[str, np.ndarray] = {}

    def __call__(self, graph: Graph, x: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        if not np.array_equal(x, self.x):
            return self.forward(graph, x, names)
        missing = [name for name in names if name not in self.values]
        if missing:
            self.values |= self.forward(graph, x, missing)
        return {name: self.values[name] for name in names}


class _Examination:
    """All checks of one model on the same images."""

    def __init__(self, model: ModelSource, images: Any, options: dict[str, Any]) -> None:
        self.exact = Explainer(model, backend="reference", **options)
        self.backends = {
            _EXACT: self.exact,
            _SINGLE: Explainer(model, backend="reference", dtype="float32", **options),
        }
        self.engines: dict[str, Engine] = {}
        self.missing: dict[str, str] = {}
        for name in BACKENDS:
            if name in ("auto", "reference"):
                continue
            try:
                self.backends[name] = Explainer(model, backend=name, **options)
            except BackendUnavailable as error:
                self.missing[name] = str(error)
        given = self._noise() if images is None else images
        first = self.exact.explain(given, method="saliency")
        self.x = first.inputs.astype(np.float32)
        self.target, self.graph = first.target, self.exact.graph
        for name in (_EXACT, _SINGLE):  # NumPy's forward pass takes seconds in a large network
            backend = self.backends[name].backend
            forward = _Remembering(backend.forward, self.x)
            runner = partial(StepwiseRunner, forward=forward)
            self.backends[name].backend = replace(backend, forward=forward, runner=runner)
        plural = "" if len(self.x) == 1 else "s"
        self.images = "seeded noise" if images is None else f"{len(self.x)} image{plural}"

    def certificate(self, tell: Tell) -> Certificate:
        groups = {
            "identities": self._identities,
            "agreement of the backends": self._agreement,
            "gradients by finite differences": self._finite_differences,
            "completeness": self._completeness,
        }
        checks: list[Check] = []
        for name, group in groups.items():
            tell(name)
            checks += group()
        tell("sensitivity")
        layers, moves = self._sensitivity()
        return Certificate(self.exact.environment, self.images, tuple(checks), layers, moves)

    @property
    def fastest(self) -> str:
        return "cpu" if "cpu" in self.backends else _SINGLE

    def _noise(self) -> np.ndarray:
        shape = self.exact.graph.shapes[self.exact.graph.input]
        assert shape is not None
        rng = np.random.default_rng(0)
        return rng.uniform(-1, 1, (1, *shape[1:])).astype(np.float32)

    def _explain(
        self, explainer: Explainer, x: np.ndarray | None = None, trace: bool = False, **options: Any
    ) -> Attribution:
        image = self.x if x is None else x
        return explainer.explain(image, target=self.target, trace=trace, **options)

    # --- identities (docs/conventions.md) ---------------------------------------------------------

    def _identities(self) -> Iterator[Check]:
        group = "Identities (paper 4.2, appendix E)"
        names = analysis.activations(self.graph)
        found = {node.op for node in analysis.path(self.graph) if node.name in names}
        others = sorted(found - {"Relu"})
        if others or not found:
            reason = f"activations are {', '.join(others)}" if others else "there are none"
            for name in (*_IDENTITIES, _EPSILON_LRP_NAME):
                note = f"an identity for ReLU; here {reason}"
                yield Check(group, name, "", "not applicable", note=note)
            return
        runs = [(name, True) for name in self.backends] + [(self.fastest, False)]
        for (name, sides), (backend, trick) in itertools.product(_IDENTITIES.items(), runs):
            explainer = self.backends[backend]
            one, other = (
                self._explain(explainer, trace=True, padding_trick=trick, **side) for side in sides
            )
            count, wrong = _unequal(one, other)
            where = f"{backend}{'' if trick else ', no padding trick'}"
            yield Check(group, name, where, _verdict(wrong == 0), count, wrong)
        yield self._epsilon_lrp(group)

    def _epsilon_lrp(self, group: str) -> Check:
        product = self._explain(self.exact, method="input_x_gradient").values
        distances = [
            _largest(self._explain(self.exact, method="epsilon_lrp", eps=eps).values, product)
            for eps in _EPSILONS
        ]
        shrinks = all(b < a or b == 0 for a, b in itertools.pairwise(distances))
        return Check(
            group,
            _EPSILON_LRP_NAME,
            _EXACT,
            _verdict(shrinks and distances[-1] <= _EPSILON_LRP),
            product.size,
            largest=distances[-1],
            allowed=_EPSILON_LRP,
            note=" → ".join(f"{distance:.0e}" for distance in distances),
        )

    # --- agreement of the backends ----------------------------------------------------------------

    def _agreement(self) -> Iterator[Check]:
        group = "Agreement with float64, layer by layer on the same a and R_out"
        for name, reason in self.missing.items():
            yield Check(group, "all", name, "not applicable", note=reason)
        for backend, explainer in self.backends.items():
            if explainer is self.exact:
                continue
            yield self._forward(group, backend)
            for label, options in _AGREEING.items():
                yield from self._backward(group, label, backend, options)

    def _forward(self, group: str, backend: str) -> Check:
        """Activations are not shared here: each forward pass goes its own way."""
        ours, theirs = (
            self._explain(explainer, method="saliency", trace=True)
            for explainer in (self.exact, self.backends[backend])
        )
        pairs = [(ours.logits, theirs.logits)]
        pairs += [(layer.a, theirs.layers()[name].a) for name, layer in ours.layers().items()]
        largest = max(_largest(found, expected) for expected, found in pairs)
        return Check(
            group,
            "forward pass, not shared",
            backend,
            _verdict(largest <= _FORWARD),
            sum(expected.size for expected, _ in pairs),
            largest=largest,
            allowed=_FORWARD,
        )

    def _backward(
        self, group: str, label: str, backend: str, options: dict[str, Any]
    ) -> Iterator[Check]:
        method = make_method(**options)
        result = self._explain(self.backends[backend], trace=True, method=method)
        rows = self._rows(method, result, backend)
        at_layers = [row for row in rows if row.part == "R_in"]
        wrong = sum(row.units for row in at_layers)
        what = "masks and τ" if isinstance(method, RectGrad) else "activations"
        yield Check(
            group,
            f"{label}: {what}",
            backend,
            _verdict(all(row.verdict in ("exact", "rounding") for row in at_layers)),
            sum(int(np.prod(row.shape)) for row in at_layers),
            wrong,
        )
        linear = [row for row in rows if row.part != "R_in"]
        worst = max(linear, key=lambda row: row.error / max(row.tolerance, 1e-300))
        yield Check(
            group,
            f"{label}: linear steps",
            backend,
            _verdict(all(row.verdict != "different" for row in linear)),
            sum(int(np.prod(row.shape)) for row in linear),
            sum(row.units for row in linear),
            worst.error,
            worst.tolerance,
            f"worst at {worst.value}",
        )

    def _rows(self, method: Method, result: Attribution, backend: str) -> list[Row]:
        engine = self._engine(backend)
        layers: Mapping[str, Layer] = result.layers()
        given = Given(
            {name: layer.R_out for name, layer in layers.items()}
            | {self.graph.input: result.values},
            {name: layer.R_in for name, layer in layers.items()},
            {name: layer.a for name, layer in layers.items()},
        )
        walk = engine.walk(Conventions(method), given)
        return [row_of(point, engine.dtype) for point in walk.points]

    def _engine(self, backend: str) -> Engine:
        """The float64 walk on the activations of a backend."""
        if backend not in self.engines:
            self.engines[backend] = Engine(
                self.exact.model,
                self.x,
                self.target,
                input=self.graph.input,
                output=self.graph.output,
                backend=self.backends[backend].backend,
            )
        return self.engines[backend]

    # --- gradients --------------------------------------------------------------------------------

    def _finite_differences(self) -> Iterator[Check]:
        """Beside the images, where no two units of a max pool are equal by chance.

        Of several steps the best counts: a large one crosses kinks, a small one is lost to
        rounding.
        """
        rng = np.random.default_rng(1)
        span = float(np.ptp(self.x)) or 1.0
        x = self.x + 0.01 * span * rng.standard_normal(self.x.shape)
        gradient = self._explain(self.exact, x, method="saliency").values
        size, worst = np.sqrt(_sums(gradient**2)), 0.0
        for _ in range(_DIRECTIONS):
            v = rng.standard_normal(x.shape)
            errors = [self._slope(x, v, h * span) - _sums(gradient * v) for h in _DIFFERENCES]
            smallest = np.abs(errors).min(axis=0) / np.where(size > 0, size, 1)
            worst = max(worst, float(smallest.max(initial=0)))
        yield Check(
            "Gradients",
            "saliency by central differences in random directions",
            _EXACT,
            _verdict(worst <= _FINITE_DIFFERENCES),
            _DIRECTIONS * len(x),
            largest=worst,
            allowed=_FINITE_DIFFERENCES,
        )

    def _slope(self, x: np.ndarray, v: np.ndarray, h: float) -> np.ndarray:
        return np.asarray((self._scores(x + h * v) - self._scores(x - h * v)) / (2 * h))

    def _scores(self, x: np.ndarray) -> np.ndarray:
        names = [self.graph.logits]
        forward = self.exact.backend.forward
        parts = [forward(self.graph, one[None], names)[names[0]].ravel() for one in x]
        return np.array([part[t] for part, t in zip(parts, self.target, strict=True)])

    # --- completeness -----------------------------------------------------------------------------

    def _completeness(self) -> Iterator[Check]:
        group = "Completeness: Σ map = S(x) − S(x₀)"
        # Below eps the derivative takes the place of the ratio, which is not complete.
        method = DeepLift(maxpool="rescale", eps=1e-12)
        notes = method.notes(self.graph)
        gap, size = self._gap(self.exact, method)
        verdict: Verdict = "reported" if notes else _verdict(gap <= _COMPLETENESS)
        allowed = None if notes else _COMPLETENESS
        note = "; ".join(notes)
        name = "DeepLIFT, max pools rescaled"
        yield Check(group, name, _EXACT, verdict, size, 0, gap, allowed, note)
        gap, size = self._gap(self.exact, DeepLift())
        name = "DeepLIFT, max pools by their gradient"
        yield Check(group, name, _EXACT, "reported", size, 0, gap)
        explainer = self.backends[self.fastest]
        methods = (make_method("integrated_gradients", steps=n) for n in _STEPS)
        gaps = [self._gap(explainer, method)[0] for method in methods]
        yield Check(
            group,
            f"integrated gradients, {_STEPS[0]} → {_STEPS[1]} steps",
            self.fastest,
            _verdict(gaps[1] < gaps[0] or gaps[1] <= _FLOAT32_GAP),
            size,
            0,
            gaps[1],
            gaps[0],
            f"allowed: that of {_STEPS[0]} steps",
        )

    def _gap(self, explainer: Explainer, method: Method) -> tuple[float, int]:
        """The largest gap relative to Σ|map|, and the size of the map."""
        result = self._explain(explainer, method=method)
        assert result.completeness_gap is not None
        total = _sums(np.abs(result.values.astype(np.float64)))
        relative = np.abs(result.completeness_gap) / np.where(total > 0, total, 1)
        return float(relative.max(initial=0)), result.values.size

    # --- sensitivity ------------------------------------------------------------------------------

    def _sensitivity(self) -> tuple[tuple[LayerSensitivity, ...], float]:
        method = RectGrad()
        explainer = self.backends[self.fastest]
        layers = self._explain(explainer, trace=True, method=method).layers()
        engine, conventions = self._engine(self.fastest), Conventions(method)
        walk = engine.walk(conventions, wants_near=True)
        found = [
            LayerSensitivity(name, layer.a.size, _passing(layer), int(walk.near[name].sum()))
            for name, layer in layers.items()
        ]
        return tuple(found), sensitivity(engine, conventions, walk)


def _verdict(good: bool) -> Verdict:
    return "holds" if good else "fails"


def _unequal(one: Attribution, other: Attribution) -> tuple[int, int]:
    """Numbers compared at all layers and in the map, and how many are not equal (−0 = +0)."""
    pairs = [(one.values, other.values)]
    for name, layer in one.layers().items():
        there = other.layers()[name]
        pairs += [(layer.a, there.a), (layer.R_out, there.R_out), (layer.R_in, there.R_in)]
    return sum(a.size for a, _ in pairs), sum(int((a != b).sum()) for a, b in pairs)


def _largest(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest expected value."""
    top = float(np.abs(expected).max(initial=0))
    return float(np.abs(found - expected).max(initial=0)) / (top or 1.0)


def _sums(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.reshape(len(values), -1).sum(axis=1))


def _passing(layer: Layer) -> int:
    assert layer.mask is not None
    return int(layer.mask.sum())
