"""Which conventions explain another implementation's numbers.

The reference is run again under other conventions, one at a time, then two, then as many as keep
helping, and the smallest set that explains everything is named. What a method does after the walk
(× input, final threshold, absolute values …) costs nothing to try, so every walk is tried with all
of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
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
from .engine import Conventions, Engine, Given, Point
from .theirs import Theirs

Verdict = Literal["agrees", "explained", "partly explained", "unexplained", "not searched"]

# Two maps are taken for equal below this relative distance; threshold ties move a map by more than
# that or not at all.
_EQUAL = 1e-4
# Pairs are tried among the best single deviations; all of them where one walk is cheap.
_CHEAP_UNITS = 20_000
_BEST = 8
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

    @property
    def rank(self) -> tuple[int, float]:
        """The smaller, the better."""
        return (self.total - self.agreeing, self.distance)


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


def diagnose(comparison: Comparison, engine: Engine | None) -> Diagnosis:
    """Name the smallest set of deviating conventions that explains the other side's numbers.

    Parameters
    ----------
    comparison : Comparison
    engine : Engine or None
        See `compare.engine_of`.
    """
    bundle = comparison.bundle
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


@dataclass(frozen=True, eq=False)
class _Seen:
    """What is kept of a walk: verdicts, and how to get R at the input."""

    rows: tuple[Row, ...]
    arrive: Callable[[], np.ndarray]
    key: Hashable


@dataclass(eq=False)
class _Search:
    engine: Engine
    bundle: Bundle
    theirs: Theirs
    seen: dict[Conventions, _Seen | None] = field(default_factory=dict)
    rows: dict[Hashable, Row] = field(default_factory=dict)
    distances: dict[Hashable, float] = field(default_factory=dict)
    fits: dict[tuple[str, ...], Fit | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        method = self.bundle.method
        assert isinstance(method, RectGrad)
        self.method = method
        self.given: Given = given_of(self.engine, self.theirs)
        self.before = self.fit(())
        assert self.before is not None
        self.deviations = list(known(method, self.engine))
        self.deviations += self._missing_where_plain_fits()
        has_map = self.theirs.values is not None
        self.finishes: list[tuple[Deviation, ...]] = [()]
        if has_map:
            ends = [d for d in self.deviations if not d.walk]
            self.finishes += [(d,) for d in ends]
            self.finishes += [pair for pair in combinations(ends, 2) if _compatible(pair)]
        self.steps = [d for d in self.deviations if d.walk]

    def result(self, comparison: Comparison) -> Diagnosis:
        explaining, best = self._search()
        first = comparison.first_difference
        untested = tuple(self._untested())
        common = {
            "before": self.before,
            "first_difference": first,
            "untested": untested,
            "runs": len(self.seen),
        }
        if explaining:
            chosen, *others = explaining
            return Diagnosis(
                "explained",
                chosen,
                tuple(others[:6]),
                after=self.fit(chosen),
                **common,  # type: ignore[arg-type]
            )
        after = self.fit(best)
        assert self.before is not None and after is not None
        if not best or after.rank >= self.before.rank:
            return Diagnosis("unexplained", **common)  # type: ignore[arg-type]
        ties = 0.0 if self.given else self._ties(best)
        within = after.map_distance is not None and after.map_distance <= 2 * ties
        clearly = after.distance < self.before.distance / 3
        if not (clearly or after.agreeing > self.before.agreeing):
            return Diagnosis("unexplained", **common)  # type: ignore[arg-type]
        verdict: Verdict = "explained" if within and clearly else "partly explained"
        return Diagnosis(verdict, best, (), after=after, ties=ties, **common)  # type: ignore[arg-type]

    def _search(self) -> tuple[list[tuple[Deviation, ...]], tuple[Deviation, ...]]:
        """Sets that explain everything, all of the smallest size; and the best set at all."""
        best: tuple[Deviation, ...] = ()
        stages = (
            lambda: self._of_size(1),
            lambda: self._of_size(2),
            lambda: self._pairs(self._promising),
            lambda: self._triples(),
            lambda: self._pairs(self.steps if self._is_cheap else []),
        )
        # Through a large network, pairs take long: what helps is added to the best first.
        for number, stage in enumerate(stages):
            if number == 1 and not self._is_cheap:
                best = self._grown(best)
                fit = self.fit(best)
                if fit is not None and fit.explains:
                    return [best], best
            explaining = []
            for option in stage():
                fit = self.fit(option)
                if fit is None:
                    continue
                if fit.explains:
                    explaining.append(option)
                best = self._better(best, option)
            if explaining:
                return explaining, best
        best = self._grown(best)
        fit = self.fit(best)
        return ([best] if fit and fit.explains else []), best

    def _of_size(self, size: int) -> Iterator[tuple[Deviation, ...]]:
        """Sets with at most one deviation of the walk."""
        for end in self.finishes:
            if len(end) == size:
                yield end
            elif len(end) == size - 1:
                yield from ((s, *end) for s in self.steps if _compatible((s, *end)))

    @property
    def _is_cheap(self) -> bool:
        units = sum(int(np.prod(node.output_shapes[0])) for node in self.engine.layers)
        return units * len(self.engine.groups) <= _CHEAP_UNITS

    @cached_property
    def _promising(self) -> list[Deviation]:
        return sorted(self.steps, key=self._rank_with_ends)[:_BEST]

    def _pairs(self, steps: Sequence[Deviation]) -> Iterator[tuple[Deviation, ...]]:
        """Two deviations of the walk."""
        yield from (pair for pair in combinations(steps, 2) if _compatible(pair))

    def _triples(self) -> Iterator[tuple[Deviation, ...]]:
        """Three, with at least one after the walk."""
        yield from self._of_size(3)
        ends = [end for end in self.finishes if len(end) == 1]
        for pair in self._pairs(self._promising):
            yield from ((*pair, *end) for end in ends if _compatible((*pair, *end)))

    def _rank_with_ends(self, step: Deviation) -> tuple[int, float]:
        options = [(step, *end) for end in self.finishes if _compatible((step, *end))]
        fits = [fit for option in options if (fit := self.fit(option)) is not None]
        return min((fit.rank for fit in fits), default=(10**9, np.inf))

    def _grown(self, best: tuple[Deviation, ...]) -> tuple[Deviation, ...]:
        """Add what helps, one at a time; leave out what is not needed any more."""
        while len(best) < _MOST_DEVIATIONS:
            grown = best
            for deviation in self.deviations:
                if _compatible((*best, deviation)):
                    grown = self._better(grown, (*best, deviation))
            if grown == best:
                return best
            best = self._pruned(grown)
        return best

    def _pruned(self, best: tuple[Deviation, ...]) -> tuple[Deviation, ...]:
        for deviation in best[:-1]:
            smaller = tuple(d for d in best if d is not deviation)
            fit, without = self.fit(best), self.fit(smaller)
            if fit is not None and without is not None and without.rank <= fit.rank:
                best = smaller
        return best

    def _better(
        self, one: tuple[Deviation, ...], other: tuple[Deviation, ...]
    ) -> tuple[Deviation, ...]:
        """`other` where it fits better, and by enough if it has more deviations."""
        ours, theirs = self.fit(one), self.fit(other)
        if theirs is None or ours is None:
            return one if theirs is None else other
        if theirs.agreeing != ours.agreeing:
            return other if theirs.agreeing > ours.agreeing else one
        needed = _HELPS if len(other) > len(one) else 1.0
        return other if theirs.distance < needed * ours.distance else one

    def fit(self, option: Sequence[Deviation]) -> Fit | None:
        """How well the set explains the other side; None where it does not fit the model."""
        key = tuple(sorted(d.id for d in option))
        if key not in self.fits:
            self.fits[key] = self._fit(option)
        return self.fits[key]

    def _fit(self, option: Sequence[Deviation]) -> Fit | None:
        seen = self._see(self._conventions(option))
        if seen is None:
            return None
        agree = [row.verdict != "different" for row in seen.rows]
        distances = [min(row.error, 1.0) for row in seen.rows]
        distance = None
        if self.theirs.values is not None:
            distance = self._map_distance(seen, self._finish(option), option)
            agree.append(distance <= _EQUAL)
            distances.append(min(distance, 1.0))
        return Fit(sum(agree), len(agree), float(np.mean(distances)), distance)

    def _see(self, conventions: Conventions) -> _Seen | None:
        """What comes of a walk; None where it does not fit the model, as one unit a channel."""
        if conventions not in self.seen:
            try:
                self.seen[conventions] = self._walk(conventions)
            except ValueError:
                self.seen[conventions] = None
        return self.seen[conventions]

    def _walk(self, conventions: Conventions) -> _Seen:
        if not self.given:  # no points to compare: the backend is faster
            R = self.engine.gradient(conventions)
            return _Seen((), lambda: R, conventions)
        walk = self.engine.walk(conventions, self.given)
        return _Seen(tuple(map(self._row, walk.points)), walk.arrive, walk.key)

    def _row(self, point: Point) -> Row:
        """The verdict, found once for all walks that come to a value in the same way."""
        if point.key not in self.rows:
            self.rows[point.key] = row_of(point, self.engine.dtype)
        return self.rows[point.key]

    def _map_distance(self, seen: _Seen, finish: Finish, option: Sequence[Deviation]) -> float:
        conventions = self._conventions(option)
        key = (seen.key, conventions.swapped, finish)
        if key not in self.distances:
            x = self.engine.input_of(conventions).astype(np.float64)
            values = finish(x, seen.arrive(), self.method, self.engine.channel_axis)
            self.distances[key] = self._distance(values, finish)
        return self.distances[key]

    def _distance(self, values: np.ndarray, finish: Finish) -> float:
        assert self.theirs.values is not None
        found = self.theirs.values.astype(np.float64)
        expected = summed_like(values, found)
        if finish.post == "min-max":
            return relative_distance(found, _min_max(expected))
        scale = per_sample(fitted_scale(found, expected), expected)
        return relative_distance(found, expected * scale)

    def _conventions(self, option: Sequence[Deviation]) -> Conventions:
        changes = dict(pair for deviation in option for pair in deviation.walk)
        own = {k: changes.pop(k) for k in list(changes) if k in Conventions.__dataclass_fields__}
        return Conventions(replace(self.method, **changes), **own)

    def _finish(self, option: Sequence[Deviation]) -> Finish:
        changes = dict(pair for deviation in option for pair in deviation.finish)
        return replace(Finish(self.method.times_input, self.method.final_threshold), **changes)

    def _ties(self, option: Sequence[Deviation]) -> float:
        conventions = self._conventions(option)
        walk = self.engine.walk(conventions, wants_near=True)
        return sensitivity(self.engine, conventions, walk)

    def _missing_where_plain_fits(self) -> list[Deviation]:
        """Several layers without hooks, where what leaves each layer is known."""
        ours = self._see(Conventions(self.method))
        names = frozenset(node.outputs[0] for node in self.engine.layers)
        plain = self._see(Conventions(self.method, missing=names))
        if ours is None or plain is None:
            return []
        missing = frozenset(
            row.value
            for row, other in zip(ours.rows, plain.rows, strict=True)
            if row.part == "R_in" and row.verdict == "different" != other.verdict
        )
        if not 1 < len(missing) < len(names):
            return []
        return [_missing(missing, f"at {', '.join(sorted(missing))}")]

    def _untested(self) -> Iterator[str]:
        if len(self.bundle.inputs) == 1:
            yield (
                "The bundle holds one sample, so a percentile over the batch cannot be told from "
                "one over the sample."
            )
        elif not self.engine.samplewise:
            yield "The model takes one sample at a time: a percentile over the batch was not tried."


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
