"""Which conventions explain another implementation's numbers.

The reference is run again under other conventions, and the smallest set of them that explains
everything is named. Where gradients were given, a set is followed along the walk until a value
differs, so that most sets cost one layer, and each layer is computed once for all sets that do the
same there. What a method does after the walk (× input, final threshold, absolute values …) costs
nothing to try, so every walk is tried with all of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import prod
from typing import Any, Literal

import numpy as np

from ..methods import RectGrad
from ..threshold import percentile
from .bundle import Bundle
from .compare import (
    Comparison,
    Row,
    fitted_scale,
    given_of,
    per_sample,
    relative_distance,
    row_of,
    sensitivity,
    summed_like,
)
from .engine import Conventions, Engine, Given, Point, Walk
from .theirs import Theirs

Verdict = Literal["agrees", "explained", "partly explained", "unexplained", "not searched"]

# Two maps are taken for equal below this relative distance; threshold ties move a map by more than
# that or not at all.
_EQUAL = 1e-4
# One more deviation is tried with the best sets so far; all pairs where a walk is cheap.
_CHEAP_UNITS = 20_000
# Units of all walks that are made to add one more deviation, where each walk is made whole.
_MOST_UNITS = 2_000_000_000
_FEWEST_WALKS = 100
_BEAM = 6
_MOST_DEVIATIONS = 6
_HELPS = 0.8  # one more deviation must bring the distance down to this fraction


@dataclass(frozen=True)
class Deviation:
    """Something that another implementation may do.

    Attributes
    ----------
    id : str
    sentence : str
        What to tell its author.
    walk : tuple of (str, value)
        Fields of `RectGrad`, or of `Conventions`, that differ during the walk.
    finish : tuple of (str, value)
        Fields of `Finish` that differ after it.
    """

    id: str
    sentence: str
    walk: tuple[tuple[str, Any], ...] = ()
    finish: tuple[tuple[str, Any], ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        """What it decides; two deviations that decide the same do not combine."""
        return frozenset(name for name, _ in (*self.walk, *self.finish))


@dataclass(frozen=True)
class Finish:
    """From R at the input to the final map.

    Attributes
    ----------
    times_input, final_threshold : bool
        As in `RectGrad`.
    post : str
        ``""``, ``"abs"``, ``"min-max"``, ``"reversed channels"`` or ``"percentile"``.
    """

    times_input: bool
    final_threshold: bool
    post: str = ""

    def __call__(
        self, x: np.ndarray, R: np.ndarray, method: RectGrad, axis: int | None
    ) -> np.ndarray:
        values = x * R if self.times_input else R
        if self.post == "percentile":
            tau = percentile(values.reshape(len(x), -1), method.q, method.percentile)
            values = np.where(values > per_sample(tau, x), values, 0)
        if self.final_threshold:
            values = np.where(values > 0, values, 0)
        if self.post == "abs":
            values = np.abs(values)
        elif self.post == "reversed channels" and axis is not None:
            values = np.flip(values, axis)
        return values


@dataclass(frozen=True)
class Fit:
    """How well some conventions explain the other side.

    Attributes
    ----------
    agreeing, total : int
        Values of the network, the final map among them.
    distance : float
        Mean relative distance over them.
    map_distance : float or None
        Of the final map, scale factored out.
    """

    agreeing: int
    total: int
    distance: float
    map_distance: float | None

    @property
    def explains(self) -> bool:
        """Whether everything agrees."""
        return self.agreeing == self.total


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` finds.

    Attributes
    ----------
    verdict : str
    deviations : tuple of Deviation
        The smallest set that explains the other side; the best found where none does.
    alternatives : tuple of tuple of Deviation
        Sets of the same size that explain it as well: these images do not tell them apart.
    before, after : Fit or None
        Under the bundle's conventions, and under the deviating ones.
    ties : float
        How far threshold ties may move the map under the deviating conventions.
    first_difference : str or None
    untested : tuple of str
        What could not be tried, and why.
    runs : int
        Walks that were made.
    """

    verdict: Verdict
    deviations: tuple[Deviation, ...] = ()
    alternatives: tuple[tuple[Deviation, ...], ...] = ()
    before: Fit | None = None
    after: Fit | None = None
    ties: float = 0.0
    first_difference: str | None = None
    untested: tuple[str, ...] = ()
    runs: int = 0

    @property
    def sentences(self) -> tuple[str, ...]:
        """The finding in words, the evidence after it."""
        if self.verdict == "agrees":
            return ("Same conventions: nothing differs beyond rounding and threshold ties.",)
        if self.verdict == "not searched":
            return self.untested
        where = f"The first difference is at {self.first_difference}."
        if self.verdict == "unexplained":
            return (f"No known deviation explains the difference. {where}", *self.untested)
        head = "; ".join(d.sentence for d in self.deviations)
        head = f"{head[0].upper()}{head[1:]}."
        if self.verdict == "partly explained":
            head = f"Only partly explained, nearest is: {head}"
        return (head, self._evidence(), where, *self._also(), *self.untested)

    def _evidence(self) -> str:
        assert self.before is not None and self.after is not None
        text = ""
        if self.after.total > 1:
            text = (
                f"Values that agree on shared inputs: {self.after.agreeing} of {self.after.total} "
                f"with this, {self.before.agreeing} without. "
            )
        if self.after.map_distance is not None and self.before.map_distance is not None:
            text += (
                f"Relative distance of the final map: {self.after.map_distance:.2g} with this, "
                f"{self.before.map_distance:.2g} without."
            )
            if self.after.map_distance > _EQUAL and self.ties:
                text += f" Threshold ties alone may move this map by {2 * self.ties:.2g}."
        return f"Evidence: {text}"

    def _also(self) -> list[str]:
        if not self.alternatives:
            return []
        others = (" and ".join(d.id for d in option) for option in self.alternatives)
        return [f"On these images the same numbers follow from: {'; '.join(others)}."]


def diagnose(comparison: Comparison) -> Diagnosis:
    """Name the smallest set of deviating conventions that explains the other side's numbers."""
    bundle, engine = comparison.bundle, comparison.engine
    settled = comparison.map is None or comparison.map.verdict in ("exact", "rounding")
    if comparison.agrees and settled:
        return Diagnosis("agrees")
    if engine is None:
        return Diagnosis("not searched", untested=("Other conventions need the model: give it.",))
    if not isinstance(bundle.method, RectGrad):
        reason = f"Other conventions are known of RectGrad, not of {bundle.method.id}."
        return Diagnosis("not searched", untested=(reason,))
    found = _Search(engine, bundle, comparison.theirs).result(comparison)
    if comparison.agrees and found.verdict != "explained":
        return Diagnosis("agrees", untested=found.untested, runs=found.runs)
    return found


@dataclass(frozen=True)
class _Reach:
    """How far from the logits everything agrees.

    Attributes
    ----------
    points : int
        That agree before the first that differs; the map is the last of them.
    distance : float
        Of the map, where that is the one that differs.
    ends : sequence of tuple of Deviation
        What may be done after the walk to come that far; the first is the best.
    """

    points: int
    distance: float = 0.0
    ends: Sequence[tuple[Deviation, ...]] = ((),)

    @property
    def rank(self) -> tuple[int, float]:
        """The smaller, the farther."""
        return (-self.points, self.distance)


_Steps = tuple[Deviation, ...]


@dataclass(eq=False)
class _Search:
    """A beam search over sets of deviations.

    A set of deviations of the walk is the better, the farther from the logits everything agrees
    with it on shared inputs; of those that come to the map, the one whose map is nearest. Where
    nothing explains a value, that value is left out, and the search goes on behind it.
    """

    engine: Engine
    bundle: Bundle
    theirs: Theirs
    rows: dict[Hashable, Row] = field(default_factory=dict)
    distances: dict[Hashable, float] = field(default_factory=dict)
    reaches: dict[frozenset[Deviation], _Reach | None] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)
    tried: set[Conventions] = field(default_factory=set)
    points: int = 0
    is_complete: bool = True

    def __post_init__(self) -> None:
        method = self.bundle.method
        assert isinstance(method, RectGrad)
        self.method = method
        self.given: Given = given_of(self.engine, self.theirs)
        deviations = list(known(method, self.engine))
        deviations += self._missing_where_plain_fits()
        self.steps = [d for d in deviations if d.walk]
        ends = [d for d in deviations if not d.walk]
        pairs = [pair for pair in combinations(ends, 2) if _compatible(pair)]
        self.ends: list[_Steps] = [(), *((d,) for d in ends), *pairs]

    def result(self, comparison: Comparison) -> Diagnosis:
        explaining, best = self._search()
        before, after = self.fit(()), self.fit(best)
        found = Diagnosis(
            "unexplained",
            before=before,
            first_difference=comparison.first_difference,
            untested=tuple(self._untested(bool(explaining))),
            runs=len(self.tried),
        )
        if explaining:
            others = tuple(explaining[1:7])
            return replace(
                found, verdict="explained", deviations=best, alternatives=others, after=after
            )
        clearly = after.distance < before.distance / 3
        if not best or not (clearly or after.agreeing > before.agreeing):
            return found
        ties = 0.0 if self.given else self._ties(best)
        within = after.map_distance is not None and after.map_distance <= 2 * ties
        verdict: Verdict = "explained" if within and clearly else "partly explained"
        return replace(found, verdict=verdict, deviations=best, after=after, ties=ties)

    def _search(self) -> tuple[list[_Steps], _Steps]:
        """Sets that explain everything, all of the smallest size; and the best set at all."""
        best: _Steps = ()
        beam, is_wide = [best], False
        while len(beam[0]) < _MOST_DEVIATIONS:
            grown = self._ranked(self._extended(beam))
            explaining = self._explaining([*beam, *grown])
            if not (explaining or is_wide) and self._needs_pairs(grown[0], best):
                is_wide, root = True, () if self._is_cheap else best
                grown = self._ranked(self._extended(self._extended([root])))
                explaining = self._explaining(grown)
            if explaining:
                return explaining, explaining[0]
            if self._is_better(grown[0], best):
                best = grown[0]
            elif self._leave_out(best):
                grown = [best]
            elif len(grown[0]) > 1:
                break
            beam = grown[:_BEAM]
        best = self._pruned(best)
        return [], (*best, *self._known_reach(best).ends[0])

    def _extended(self, beam: Sequence[_Steps]) -> list[_Steps]:
        """Every set with one more deviation, of the best sets and the most frequent first."""
        found = {
            frozenset((*steps, more)): (*steps, more)
            for steps in beam
            for more in self.steps
            if _compatible((*steps, more))
        }
        most = max(_FEWEST_WALKS, _MOST_UNITS // self._units)
        if self.given or len(found) <= most:
            return list(found.values())
        self.is_complete = False
        return list(found.values())[:most]

    def _ranked(self, sets: Sequence[_Steps]) -> list[_Steps]:
        """Those that fit the model, the best first."""
        reaches = {steps: reach for steps in sets if (reach := self._reach(steps)) is not None}
        return sorted(reaches, key=lambda steps: reaches[steps].rank)

    def _explaining(self, sets: Sequence[_Steps]) -> list[_Steps]:
        """The smallest of them, with what is done after the walk, that explain everything."""
        if self.left_out:
            return []
        found = [
            (*steps, *end)
            for steps in sets
            if (reach := self._known_reach(steps)).points > self.points
            for end in reach.ends
        ]
        smallest = min(map(len, found), default=0)
        return [option for option in found if len(option) == smallest]

    def _needs_pairs(self, grown: _Steps, best: _Steps) -> bool:
        """Whether all pairs are tried: two mistakes in one layer hide each other."""
        if self._is_cheap and len(grown) == 2:
            return True
        return bool(self.given) and not self._is_better(grown, best)

    @property
    def _units(self) -> int:
        units = sum(prod(node.output_shapes[0]) for node in self.engine.layers)
        return max(1, units * len(self.engine.groups))

    @property
    def _is_cheap(self) -> bool:
        return self._units <= _CHEAP_UNITS

    def _is_better(self, one: _Steps, other: _Steps) -> bool:
        """By so much that it is worth one more deviation."""
        ours, theirs = self._known_reach(one), self._known_reach(other)
        nearer = ours.distance < _HELPS * theirs.distance
        return ours.points > theirs.points or (ours.points == theirs.points and nearer)

    def _leave_out(self, best: _Steps) -> bool:
        """Search on behind the value that nothing explains, if there is more to explain."""
        if (reached := self._known_reach(best).points) >= self.points:
            return False
        self.left_out.add(reached)
        self.reaches.clear()
        return True

    def _pruned(self, best: _Steps) -> _Steps:
        """Without what is not needed any more."""
        for deviation in best[:-1]:
            smaller = tuple(d for d in best if d is not deviation)
            if self._known_reach(smaller).rank <= self._known_reach(best).rank:
                best = smaller
        return best

    def _known_reach(self, steps: _Steps) -> _Reach:
        reach = self._reach(steps)
        assert reach is not None
        return reach

    def _reach(self, steps: _Steps) -> _Reach | None:
        """How far everything agrees; None where the set does not fit the model."""
        key = frozenset(steps)
        if key not in self.reaches:
            try:
                self.reaches[key] = self._measured(steps)
            except ValueError:  # one unit a channel, for instance
                self.reaches[key] = None
        return self.reaches[key]

    def _measured(self, steps: _Steps) -> _Reach:
        walk = self._walk(steps)
        for i, point in enumerate(walk.points):
            if i not in self.left_out and self._row(point).verdict == "different":
                return _Reach(i)
        if self.theirs.values is None:
            return _Reach(self.points + 1)
        options = [end for end in self.ends if _compatible((*steps, *end))]
        distances = {end: self._map_distance(walk, (*steps, *end)) for end in options}
        equal = [end for end, distance in distances.items() if distance <= _EQUAL]
        if equal:
            smallest = len(equal[0])  # they come in the order of their sizes
            return _Reach(self.points + 1, 0.0, [e for e in equal if len(e) == smallest])
        best: _Steps = ()
        for end, distance in distances.items():
            if distance < (_HELPS if len(end) > len(best) else 1) * distances[best]:
                best = end
        return _Reach(self.points, distances[best], [best])

    def fit(self, option: _Steps) -> Fit:
        """How well the set explains the other side at every value."""
        walk = self._walk(option)
        rows = [self._row(point) for point in walk.points]
        agree = [row.verdict != "different" for row in rows]
        distances = [min(row.error, 1.0) for row in rows]
        distance = None
        if self.theirs.values is not None:
            distance = self._map_distance(walk, option)
            agree.append(distance <= _EQUAL)
            distances.append(min(distance, 1.0))
        return Fit(sum(agree), len(agree), float(np.mean(distances)), distance)

    def _walk(self, option: _Steps) -> Walk:
        conventions = self._conventions(option)
        self.tried.add(conventions)
        if self.given:
            walk = self.engine.walk(conventions, self.given)
            self.points = len(walk.points)
            return walk
        R = self.engine.gradient(conventions)  # with no points to compare, the backend is faster
        return Walk((), {}, 0.0, lambda: R, conventions)

    def _row(self, point: Point) -> Row:
        """The verdict, found once for all walks that come to a value in the same way."""
        if point.key not in self.rows:
            self.rows[point.key] = row_of(point, self.engine.dtype)
        return self.rows[point.key]

    def _map_distance(self, walk: Walk, option: _Steps) -> float:
        conventions, finish = self._conventions(option), self._finish(option)
        key = (walk.key, conventions.swapped, finish)
        if key not in self.distances:
            assert self.theirs.values is not None
            found = self.theirs.values.astype(np.float64)
            x = self.engine.input_of(conventions).astype(np.float64)
            values = finish(x, walk.R, self.method, self.engine.channel_axis)
            expected = summed_like(values, found)
            if finish.post == "min-max":
                expected = _min_max(expected)
            else:
                expected = expected * per_sample(fitted_scale(found, expected), expected)
            self.distances[key] = relative_distance(found, expected)
        return self.distances[key]

    def _conventions(self, option: _Steps) -> Conventions:
        changes = dict(pair for deviation in option for pair in deviation.walk)
        own = {k: changes.pop(k) for k in list(changes) if k in Conventions.__dataclass_fields__}
        return Conventions(replace(self.method, **changes), **own)

    def _finish(self, option: _Steps) -> Finish:
        changes = dict(pair for deviation in option for pair in deviation.finish)
        return replace(Finish(self.method.times_input, self.method.final_threshold), **changes)

    def _ties(self, option: _Steps) -> float:
        conventions = self._conventions(option)
        walk = self.engine.walk(conventions, wants_near=True)
        return sensitivity(self.engine, conventions, walk)

    def _missing_where_plain_fits(self) -> list[Deviation]:
        """Several layers without hooks, where what leaves each layer is known."""
        if not self.given:
            return []
        names = frozenset(node.outputs[0] for node in self.engine.layers)
        ways = (Conventions(self.method), Conventions(self.method, missing=names))
        ours, plain = (self.engine.walk(way, self.given).points for way in ways)
        missing = frozenset(
            row.value
            for row, other in zip(map(self._row, ours), map(self._row, plain), strict=True)
            if row.part == "R_in" and row.verdict == "different" != other.verdict
        )
        if not 1 < len(missing) < len(names):
            return []
        return [_missing(missing, f"at {', '.join(sorted(missing))}")]

    def _untested(self, is_explained: bool) -> Iterator[str]:
        if len(self.bundle.inputs) == 1:
            yield (
                "The bundle holds one sample, so a percentile over the batch cannot be told from "
                "one over the sample."
            )
        elif not self.engine.samplewise:
            yield "The model takes one sample at a time: a percentile over the batch was not tried."
        if not (self.is_complete or is_explained):
            yield (
                "In so large a network not everything was tried that may be wrong; with gradients "
                "at some layers it is."
            )


def known(method: RectGrad, engine: Engine) -> Iterator[Deviation]:
    """What implementations of RectGrad are known to do otherwise, the most frequent first."""
    yield from _unhooked(method)
    yield from _thresholds(method, engine)
    yield from _pooling_and_padding(method, engine)
    yield from _seeds(method, engine)
    yield from _layers(engine)
    yield from _ends(method, engine)


def _unhooked(method: RectGrad) -> Iterator[Deviation]:
    plain = (("tau", -np.inf), ("strict_relu", True), ("derivative", True))
    bare = (*plain, ("padding_trick", False), ("prr", False))
    raw = (("times_input", True), ("final_threshold", False))
    yield Deviation(
        "gradient × input",
        "equals plain gradient × input: the hooks never fired",
        bare,
        raw,
    )
    yield Deviation(
        "positive gradient × input",
        "equals the positive part of plain gradient × input: the hooks never fired",
        bare,
        (("times_input", True), ("final_threshold", True)),
    )
    yield Deviation(
        "gradient",
        "equals the plain gradient (saliency): the hooks never fired, and × input is missing",
        bare,
        (("times_input", False), ("final_threshold", False)),
    )
    yield Deviation(
        "no activation rule",
        "the hooks of the activations never fired, only the other rules did",
        plain,
    )
    yield Deviation(
        "percentile of gradient × input only",
        "plain gradient × input, of which only the final map is thresholded at its percentile: the "
        "hooks of the activations never fired",
        bare,
        (*raw[:1], ("final_threshold", method.final_threshold), ("post", "percentile")),
    )
    yield Deviation(
        "guided backpropagation",
        "equals guided backpropagation × input: the threshold is 0, not a percentile",
        (("tau", 0.0),),
    )
    yield Deviation(
        "deconvolution",
        "equals deconvolution × input: only the sign of R counts",
        (("tau", 0.0), ("propagation_rule", "PR1+eps")),
    )


_SCOPES = {
    "batch": "percentile taken over the batch, not over each sample",
    "channel": "percentile taken per channel, not over the whole layer",
    "sample": "percentile taken over each sample's whole layer",
}
_PERCENTILES = {
    "linear": "percentile with linear interpolation, not the nearest rank",
    "lower": "percentile rounded to the lower rank",
    "higher": "percentile rounded to the higher rank",
    "midpoint": "percentile half-way between two ranks",
    "numpy_nearest": "percentile by NumPy's nearest rank, which rounds ties otherwise",
    "tf_nearest": "percentile by TensorFlow's nearest rank, which counts from the top",
}
_RULES = {
    "PR1": "scores are a·R (PR1)",
    "PR2": "scores are absolute, |a·R| (PR2)",
    "PR3": "scores are the activations a alone (PR3)",
    "PR4": "scores are the gradients R alone (PR4)",
    "mod": "RectGradMod: absolute scores but at the last activations",
}


def _thresholds(method: RectGrad, engine: Engine) -> Iterator[Deviation]:
    for scope, sentence in _SCOPES.items():
        mixes = scope == "batch" and (len(engine.x) == 1 or not engine.samplewise)
        if scope == method.scope or mixes:
            continue
        changes: tuple[tuple[str, Any], ...] = (("scope", scope),)
        if scope == "channel":  # which a dense layer cannot have
            changes = (("scope", "sample"), ("channelwise", True))
        yield Deviation(f"scope={scope}", sentence, changes)
    for convention, sentence in _PERCENTILES.items():
        if convention != method.percentile:
            yield Deviation(f"percentile={convention}", sentence, (("percentile", convention),))
    other = ">=" if method.strictness == ">" else ">"
    yield Deviation(
        f"strictness={other}",
        f"units at the threshold {'pass' if other == '>=' else 'are dropped'}: score "
        f"{'≥' if other == '>=' else '>'} τ",
        (("strictness", other),),
    )
    yield Deviation(
        f"strict_relu={not method.strict_relu}",
        "dead units pass where τ < 0: there is no ReLU mask"
        if method.strict_relu
        else "extra ReLU mask: R is also multiplied by [z > 0]",
        (("strict_relu", not method.strict_relu),),
    )
    for rule, sentence in _RULES.items():
        if rule != method.propagation_rule:
            yield Deviation(f"propagation_rule={rule}", sentence, (("propagation_rule", rule),))
    yield Deviation(
        "scores z·R",
        "scores use the pre-activation z, not the activation a",
        (("scores_z", True),),
    )
    if any(node.op != "Relu" for node in engine.layers):
        yield Deviation(
            f"derivative={not method.derivative}",
            "the rule replaces the derivative f' of activations other than ReLU"
            if method.derivative
            else "the derivative f' of activations other than ReLU is multiplied in",
            (("derivative", not method.derivative),),
        )
    for q in dict.fromkeys((100 - method.q, 50.0, 80.0, 90.0, 95.0, 98.0, 99.0)):
        if q != method.q:
            sentence = (
                f"the share that passes is reversed: q = {q:g}"
                if q == 100 - method.q
                else f"q = {q:g}, not {method.q:g}"
            )
            yield Deviation(f"q={q:g}", sentence, (("q", q),))


def _pooling_and_padding(method: RectGrad, engine: Engine) -> Iterator[Deviation]:
    tricks: Mapping[Any, str] = {
        False: "the padding trick is missing",
        True: "padding trick at convolutions with a non-zero pad",
        "same": "padding trick at every convolution that TensorFlow calls SAME",
    }
    for trick, sentence in tricks.items():
        if trick != method.padding_trick or type(trick) is not type(method.padding_trick):
            yield Deviation(f"padding_trick={trick}", sentence, (("padding_trick", trick),))
    if any(node.op == "MaxPool" for node in engine.graph.nodes):
        ties = "split" if method.maxpool_ties == "first" else "first"
        yield Deviation(
            f"maxpool_ties={ties}",
            "max pooling shares the gradient among equal maxima"
            if ties == "split"
            else "max pooling passes the gradient to the first of equal maxima",
            (("maxpool_ties", ties),),
        )
        yield Deviation(
            f"prr={not method.prr}",
            "proportional redistribution (PRR) through max pools is "
            + ("missing" if method.prr else "on"),
            (("prr", not method.prr),),
        )


def _seeds(method: RectGrad, engine: Engine) -> Iterator[Deviation]:
    seeds = {
        "one": "seeded with 1 at the logit",
        "logit": "seeded with the logit's value, not with 1",
        "softmax": "seeded with the softmax probability, not with the logit",
    }
    for seed, sentence in seeds.items():
        if seed != method.output_seed:
            yield Deviation(f"output_seed={seed}", sentence, (("output_seed", seed),))
    yield Deviation(
        "seed of the mean",
        "the mean over the batch was differentiated: everything is 1/N of the reference",
        (("seed", "mean"),),
    )
    yield Deviation(
        "seed at every class",
        "the sum of all logits was differentiated, not the target's",
        (("seed", "every class"),),
    )
    if engine.channel_axis is not None:
        swapped = (("swapped", True),)
        yield Deviation(
            "input channels reversed", "the colour channels go in reversed (RGB/BGR)", swapped
        )
        yield Deviation(
            "channels reversed and back",
            "the colour channels go in reversed (RGB/BGR) and the map is turned back",
            swapped,
            (("post", "reversed channels"),),
        )
        yield Deviation(
            "map channels reversed",
            "the map's colour channels are reversed",
            (),
            (("post", "reversed channels"),),
        )


def _layers(engine: Engine) -> Iterator[Deviation]:
    layers = engine.layers
    dense = [n.outputs[0] for n in layers if len(n.output_shapes[0]) == 2]
    if 0 < len(dense) < len(layers):
        yield _missing(frozenset(dense), "at dense layers")
    for node in layers if len(layers) > 1 else ():
        if dense != [node.outputs[0]]:
            yield _missing(frozenset([node.outputs[0]]), f"at {node.outputs[0]}")
    names = [node.outputs[0] for node in layers]
    if len(names) > 2:
        yield _missing(frozenset(names[1:]), f"at every layer but the first, {names[0]}")
        yield _missing(frozenset(names[:-1]), f"at every layer but the last, {names[-1]}")


def _missing(names: frozenset[str], where: str) -> Deviation:
    return Deviation(f"no hook {where}", f"the rule is missing {where}", (("missing", names),))


def _ends(method: RectGrad, engine: Engine) -> Iterator[Deviation]:
    sentences = {
        "times_input": ("× input is missing", "the map is multiplied by the input"),
        "final_threshold": (
            "the final threshold at 0 is missing",
            "negative values of the map are zeroed",
        ),
    }
    for name, (off, on) in sentences.items():
        value = not getattr(method, name)
        yield Deviation(f"{name}={value}", on if value else off, (), ((name, value),))
    yield Deviation("abs", "absolute values of the map are returned", (), (("post", "abs"),))
    yield Deviation(
        "min-max", "the map is scaled to the interval [0, 1]", (), (("post", "min-max"),)
    )


def _compatible(option: Sequence[Deviation]) -> bool:
    decided = [name for deviation in option for name in deviation.fields]
    return len(decided) == len(set(decided))


def _min_max(values: np.ndarray) -> np.ndarray:
    axes = tuple(range(1, values.ndim))
    low, high = values.min(axis=axes, keepdims=True), values.max(axis=axes, keepdims=True)
    return np.asarray((values - low) / np.where(high > low, high - low, 1))
