"""Compare another implementation with a bundle, layer by layer on shared inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from ..analysis import path
from ..methods import RectGrad
from ..model import ModelSource
from ..rules.declared import Rectify
from .bundle import Bundle, InvalidBundle
from .engine import Conventions, Engine, Given, Point, Walk, tie_band
from .theirs import Match, Place, Theirs, read_theirs

Verdict = Literal["exact", "rounding", "threshold ties", "different", "not checked"]

# Beyond these nothing is attributed to ties one by one.
_MOST_TIES = 32
_TRIALS = 2
_BORDERS = (1, 2, 3)


@dataclass(frozen=True)
class Row:
    """One value of the network.

    Attributes
    ----------
    value : str
        ONNX value name; at R_in, of the activation's output.
    part : str
        ``"R_out"``, ``"R_in"`` or ``"gradient"``.
    shape : tuple of int
    verdict : str
        ``"exact"``, ``"rounding"``, ``"threshold ties"``, ``"different"``; or ``"not checked"``
        where that needs the model.
    error : float
        Largest difference, relative to the largest value of its sample.
    tolerance : float
        What rounding may do (docs/conventions.md).
    units : int
        That differ.
    ties : int
        Of those, how many lie within the band around τ; where R_in was not given, how many units
        passing or not explain the difference.
    band : int
        Units within the band.
    scale : float or None
        Where theirs is this multiple of the reference.
    """

    value: str
    part: str
    shape: tuple[int, ...]
    verdict: Verdict
    error: float = 0.0
    tolerance: float = 0.0
    units: int = 0
    ties: int = 0
    band: int = 0
    scale: float | None = None


@dataclass(frozen=True, eq=False)
class MapRow:
    """The final map, with scale, sign and border factored out.

    Attributes
    ----------
    verdict : str
    distance : float
        ‖theirs − scale·reference‖ / ‖theirs‖.
    plain_distance : float
        The same with scale 1.
    scale : numpy.ndarray, shape (N,)
        Of each sample; negative where the sign is reversed.
    border : int or None
        Leaving out so many cells along the border makes the maps agree.
    moves : float
        How far the reference's own map moves when units within rounding of τ change sides.
    notes : tuple of str
        What the scale, sign and border are.
    expected, found : numpy.ndarray
    """

    verdict: Verdict
    distance: float
    plain_distance: float
    scale: np.ndarray
    border: int | None
    moves: float
    notes: tuple[str, ...]
    expected: np.ndarray
    found: np.ndarray


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` finds.

    Attributes
    ----------
    bundle : Bundle
    theirs : Theirs
    rows : tuple of Row
        In the order of the walk, from the logits.
    map : MapRow or None
    engine : Engine or None
        What walked the model; None where the model is not known, and layers could not be compared
        on the other side's own inputs.
    """

    bundle: Bundle
    theirs: Theirs
    rows: tuple[Row, ...]
    map: MapRow | None
    engine: Engine | None

    @property
    def agrees(self) -> bool:
        """Whether nothing differs beyond rounding and threshold ties."""
        verdicts = {row.verdict for row in self.rows} | ({self.map.verdict} if self.map else set())
        return "different" not in verdicts

    @property
    def first_difference(self) -> str | None:
        """Where the walk from the logits first meets a difference."""
        for row in self.rows:
            if row.verdict == "different":
                return f"{row.part} of {row.value}" if row.part != "gradient" else row.value
        return "the final map" if self.map and self.map.verdict == "different" else None

    @property
    def matches(self) -> tuple[Match, ...]:
        """How each array of the other side was understood."""
        return self.theirs.matches


def compare(
    bundle: Bundle,
    theirs: str | os.PathLike[str] | Mapping[str, Any] | np.ndarray,
    model: ModelSource | Engine | None = None,
) -> Comparison:
    """Compare another implementation's numbers with a bundle.

    Parameters
    ----------
    bundle : Bundle
    theirs : path, mapping of str to array, or numpy.ndarray
        The final map, gradients at any layers, or both; see `theirs.read_theirs`.
    model : path, bytes, onnx.ModelProto or Engine, optional
        Needed where the bundle does not contain its model. Without one, linear steps can be
        checked up to the first difference only. An engine (see `engine_of`) may serve many
        comparisons.

    Raises
    ------
    InvalidBundle
        Another model's, shapes that do not fit, NaN, or nothing to compare.
    """
    engine = model if isinstance(model, Engine) else engine_of(bundle, model)
    if engine is None:
        given = read_theirs(theirs, bundle)
        rows, expected = _on_stored_inputs(bundle, given), bundle.values.astype(np.float64)
        mapped = None if given.values is None else map_row(given.values, expected, bundle, 1e-5)
        return Comparison(bundle, given, tuple(rows), mapped, None)
    return _on_shared_inputs(engine, bundle, read_theirs(theirs, bundle, places(engine)))


def _on_shared_inputs(engine: Engine, bundle: Bundle, theirs: Theirs) -> Comparison:
    conventions, given = Conventions(bundle.method), given_of(engine, theirs)
    walk = engine.walk(conventions, given)
    rows = [row_of(point, engine.dtype) for point in walk.points]
    if any(row.verdict == "different" for row in rows):
        rows = _with_ties(engine, conventions, given, rows)
    mapped = None
    if theirs.values is not None:
        expected = engine.map_of(conventions, walk.R)
        tolerance = walk.tolerance + _unit(engine.dtype)
        mapped = map_row(theirs.values, expected, bundle, tolerance)
        # Where gradients are given, the map is compared on the last of them.
        if mapped.verdict == "different" and not given:
            moves = sensitivity(engine, conventions, engine.walk(conventions, wants_near=True))
            mapped = map_row(theirs.values, expected, bundle, tolerance, moves)
    return Comparison(bundle, theirs, tuple(rows), mapped, engine)


def engine_of(bundle: Bundle, model: ModelSource | None = None) -> Engine | None:
    """The walk of the bundle's model on its images; None where the model is not known.

    Methods that contrast with a baseline, or sum over several points, have none.

    Raises
    ------
    InvalidBundle
        Another model's, or a target that is no class of it.
    """
    opened = bundle.open_model(model)
    method = bundle.method
    if opened is None or not method.walks_once or method.reference_input(bundle.inputs) is not None:
        return None
    said = bundle.provenance
    made = Engine(opened, bundle.inputs, bundle.target, input=said["input"], output=said["output"])
    if not ((bundle.target >= 0) & (bundle.target < made.graph.classes)).all():
        raise InvalidBundle(
            f"{bundle.name}: its target must be classes 0 to {made.graph.classes - 1}, got "
            f"{bundle.target.tolist()}"
        )
    return made


def places(engine: Engine) -> list[Place]:
    """Every value on the path where gradients can be compared, from the input to the logits."""
    n, graph = len(engine.x), engine.graph
    layers = {node.outputs[0] for node in engine.layers}
    found = [Place(graph.input, engine.x.shape)]
    for node in path(graph):
        value, shape = node.outputs[0], (n, *node.output_shapes[0][1:])
        if value not in layers:
            found.append(Place(value, shape))
            continue
        before = node.inputs[0]
        # What leaves an activation is the whole gradient at a value that nothing else reads.
        if len(graph.consumers[before]) == 1:
            found = [place for place in found if place.name != before or place.part == "R_out"]
        found.append(Place(before, shape, value, "R_in"))
        found.append(Place(value, shape, value, "R_out"))
    return found


def given_of(engine: Engine, theirs: Theirs) -> Given:
    """What the walk meets and shares."""
    return Given({**theirs.gradients, **theirs.R_out}, theirs.R_in, theirs.a)


def row_of(point: Point, dtype: np.dtype[Any]) -> Row:
    """The verdict on one value."""
    found, expected = point.found.astype(np.float64), point.expected
    wrong = np.abs(found - expected) > point.tolerance * _peak(expected)
    near = np.zeros_like(wrong) if point.band is None else point.band
    scale, verdict = None, _exact_or_rounding(found, expected, dtype)
    if (wrong & ~near).any():
        verdict, scale = "different", _common_scale(found, expected, point.tolerance)
    elif wrong.any():
        verdict = "threshold ties"
    return Row(
        value=point.value,
        part=point.kind,
        shape=found.shape,
        verdict=verdict,
        error=_error(found, expected),
        tolerance=point.tolerance,
        units=int(wrong.sum()),
        ties=int((wrong & near).sum()),
        band=int(near.sum()),
        scale=scale,
    )


def map_row(
    found: np.ndarray,
    expected: np.ndarray,
    bundle: Bundle,
    tolerance: float,
    moves: float = 0.0,
) -> MapRow:
    """The verdict on the final map.

    Parameters
    ----------
    found : numpy.ndarray
        In the model input's shape, or summed over its channels.
    expected : numpy.ndarray, float64
        In the model input's shape.
    tolerance : float
        What rounding may do, relative to the largest value of each sample.
    moves : float
        How far threshold ties may move the map.
    """
    expected = summed_like(expected, found)
    theirs = found.astype(np.float64)
    scale = fitted_scale(theirs, expected)
    scaled = expected * per_sample(scale, expected)
    distance, plain = relative_distance(theirs, scaled), relative_distance(theirs, expected)
    border = None
    if _within(theirs, expected, tolerance):
        verdict = _exact_or_rounding(found, expected, bundle.dtype)
    elif _within(theirs, scaled, tolerance):
        verdict = "rounding"
    elif distance <= 2 * moves:
        verdict = "threshold ties"
    else:
        verdict, border = "different", _border(theirs, expected, tolerance, bundle)
    return MapRow(
        verdict=verdict,
        distance=distance,
        plain_distance=plain,
        scale=scale,
        border=border,
        moves=moves,
        notes=_scale_notes(
            scale[_peak(expected).ravel() > 0], len(scale), verdict, distance, tolerance
        ),
        expected=expected,
        found=theirs,
    )


def summed_like(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """`expected`, summed over the channel axis if `found` has none."""
    if found.shape == expected.shape:
        return expected
    axis = next(i for i in (1, -1) if np.delete(expected.shape, i).tolist() == list(found.shape))
    return np.asarray(expected.sum(axis=axis))


def fitted_scale(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The factor of each sample that brings `expected` nearest to `found`; 1 where it is zero."""
    rows = expected.reshape(len(expected), -1)
    square = (rows * rows).sum(axis=1)
    product = (rows * found.reshape(rows.shape)).sum(axis=1)
    usable = (square > 0) & (product != 0)
    return np.where(usable, product / np.where(usable, square, 1), 1.0)


def per_sample(factors: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One factor a sample, to be multiplied with `values`."""
    return factors.reshape(-1, *(1,) * (values.ndim - 1))


def relative_distance(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found − expected‖ / ‖found‖ of the worst sample; relative to ‖expected‖ where found is 0."""
    rows = len(found)
    difference = np.linalg.norm((found - expected).reshape(rows, -1), axis=1)
    size = np.linalg.norm(found.reshape(rows, -1), axis=1)
    other = np.linalg.norm(expected.reshape(rows, -1), axis=1)
    size = np.where(size > 0, size, other)
    return float(np.where(size > 0, difference / np.where(size > 0, size, 1), 0).max())


def sensitivity(engine: Engine, conventions: Conventions, walk: Walk) -> float:
    """How far the map moves when units within rounding of τ change sides: the most of some trials.

    In each trial every such unit of `walk`, which has them, changes sides with probability ½.
    """
    if not any(near.any() for near in walk.near.values()):
        return 0.0
    before, rng = engine.map_of(conventions, walk.R), np.random.default_rng(0)
    moves = []
    for _ in range(_TRIALS):
        flip = {k: near & (rng.random(near.shape) < 0.5) for k, near in walk.near.items()}
        after = engine.map_of(conventions, engine.walk(conventions, flip=flip).R)
        moves.append(relative_distance(after, before))
    return max(moves)


def _with_ties(
    engine: Engine, conventions: Conventions, given: Given, rows: list[Row]
) -> list[Row]:
    """Look whether units on the other side of τ explain the differences, where R_in is unknown.

    Layers are shared, so one unit of every layer is turned round in one walk; a difference is
    explained if it is the sum of the effects of some units within the band.
    """
    walk = engine.walk(conventions, given, wants_near=True)
    near = {k: v for k, v in walk.near.items() if v.any() and k not in given.R_in}
    most = max((int(v.sum()) for v in near.values()), default=0)
    if not 0 < most <= _MOST_TIES:
        return rows
    effects: list[list[np.ndarray]] = [[] for _ in rows]
    for k in range(most):
        flip = {}
        for name, units in near.items():
            flip[name] = np.zeros_like(units)
            flip[name].ravel()[np.flatnonzero(units)[k : k + 1]] = True
        turned = engine.walk(conventions, given, flip=flip)
        for effect, point, base in zip(effects, turned.points, walk.points, strict=True):
            change = point.expected - base.expected
            if change.any():
                effect.append(change)
    return [
        _explained(row, point, effect) if row.verdict == "different" and effect else row
        for row, point, effect in zip(rows, walk.points, effects, strict=True)
    ]


def _explained(row: Row, point: Point, effects: list[np.ndarray]) -> Row:
    columns = np.stack([effect.ravel() for effect in effects], axis=1)
    difference = (point.found - point.expected).ravel()
    weights = np.rint(np.linalg.lstsq(columns, difference, rcond=None)[0])
    corrected = point.expected + (columns @ weights).reshape(point.expected.shape)
    if not set(weights) <= {0.0, 1.0} or not _within(point.found, corrected, row.tolerance):
        return row
    return replace(row, verdict="threshold ties", ties=int(weights.sum()), band=len(effects))


def _on_stored_inputs(bundle: Bundle, theirs: Theirs) -> list[Row]:
    """Without the model: masks on shared inputs, gradients up to the first difference."""
    rows: list[Row] = []
    stored_hold, unit = True, _unit(bundle.dtype)
    for entry in reversed(bundle.provenance["layers"]):
        name, shape = entry["name"], tuple(entry["shape"])
        layer, R_out = bundle.layers[name], theirs.R_out.get(name)
        if R_out is not None:
            if stored_hold:
                expected = layer.R_out.astype(np.float64)
                point = Point(name, "R_out", R_out, 32 * unit, partial(np.asarray, expected))
                rows.append(row_of(point, bundle.dtype))
                stored_hold = rows[-1].verdict in ("exact", "rounding")
            else:
                rows.append(Row(name, "R_out", shape, "not checked"))
        R_in = theirs.R_in.get(name)
        if R_in is None:
            continue
        rule = _rule(bundle, entry["operator"])
        if rule is None or R_out is None:
            rows.append(Row(name, "R_in", shape, "not checked"))
            continue
        a = theirs.a.get(name, layer.a).astype(bundle.dtype)
        rows.append(_mask_row(name, rule, a, R_out.astype(bundle.dtype), R_in, name in theirs.a))
        stored_hold = stored_hold and rows[-1].verdict in ("exact", "rounding")
    return rows


def _mask_row(
    name: str, rule: Rectify, a: np.ndarray, R: np.ndarray, R_in: np.ndarray, exact: bool
) -> Row:
    mask, _ = rule.select(a, R, len(a))
    if rule.strict_relu:
        mask &= a > 0
    band = tie_band(rule, a, R, len(a), is_relu=True, exact=exact)
    expected = np.where(mask, R, 0).astype(np.float64)
    return row_of(Point(name, "R_in", R_in, 0.0, lambda: expected, lambda: band), R.dtype)


def _rule(bundle: Bundle, operator: str) -> Rectify | None:
    """The rule at a Relu, where it is the same at every one."""
    method = bundle.method
    if not isinstance(method, RectGrad) or operator != "Relu" or method.propagation_rule == "mod":
        return None
    return method._rectify(last=False)


def _exact_or_rounding(found: np.ndarray, expected: np.ndarray, dtype: np.dtype[Any]) -> Verdict:
    return "exact" if np.array_equal(found, expected.astype(dtype)) else "rounding"


def _unit(dtype: np.dtype[Any]) -> float:
    return float(np.finfo(dtype).eps) / 2


def _peak(values: np.ndarray) -> np.ndarray:
    """The largest absolute value of each sample, to broadcast."""
    return np.abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True, initial=0)


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    peak = np.maximum(_peak(expected), _peak(found))
    return float((np.abs(found - expected) / np.where(peak > 0, peak, 1)).max(initial=0))


def _within(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    return bool((np.abs(found - expected) <= tolerance * _peak(expected)).all())


def _common_scale(found: np.ndarray, expected: np.ndarray, tolerance: float) -> float | None:
    """The one factor between them, if there is one."""
    scale = fitted_scale(found.reshape(1, -1), expected.reshape(1, -1))[0]
    limit = max(tolerance, 1e-6)
    return float(scale) if scale != 1 and _within(found, expected * scale, limit) else None


def _border(
    found: np.ndarray, expected: np.ndarray, tolerance: float, bundle: Bundle
) -> int | None:
    """How many cells to leave out along every border for the maps to agree."""
    layout = str(bundle.provenance.get("layout") or "NCHW")
    if bundle.inputs.ndim != 4:
        return None
    axes = [i for i, axis in enumerate(layout) if axis in "HW"]
    if found.ndim == 3:
        axes = [1, 2]
    for cells in _BORDERS:
        if min(found.shape[axis] for axis in axes) <= 2 * cells:
            return None
        inner = tuple(
            slice(cells, -cells) if axis in axes else slice(None) for axis in range(found.ndim)
        )
        part, ours = found[inner], expected[inner]
        ours = ours * per_sample(fitted_scale(part, ours), ours)
        if ours.any() and _within(part, ours, tolerance):
            return cells
    return None


def _scale_notes(
    scale: np.ndarray, samples: int, verdict: Verdict, distance: float, tolerance: float
) -> tuple[str, ...]:
    """What the factors of the samples whose maps are not zero are."""
    notes = []
    # Of two maps that have nothing in common, a factor's sign is chance.
    if (scale < 0).any() and distance < 0.5:
        notes.append("the sign is reversed")
    size = np.abs(scale)
    if verdict != "different" and np.abs(size - 1).max(initial=0) > max(tolerance, 1e-5):
        factors = ", ".join(f"{s:.6g}" for s in scale)
        notes.append(f"theirs is the reference times {factors}")
        if np.allclose(size * samples, 1, rtol=1e-5):
            notes.append("the factor is 1/N: the mean over the batch was differentiated")
    return tuple(notes)
