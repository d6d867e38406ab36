"""Wrong implementations, each of which is found out by name."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import peer
import pytest

from rectgrad_ref import Explainer
from rectgrad_ref.verify import Bundle, Diagnosis, compare, diagnose, engine_of, load, make
from rectgrad_ref.verify.conformance import FOLDER, plain, smooth
from rectgrad_ref.verify.engine import Conventions, Engine


@dataclass(frozen=True)
class Mistake:
    """What an implementation does wrong, and what the diagnosis has to call that.

    Attributes
    ----------
    how : dict
        Arguments of `peer.explain`.
    ids : tuple of str
    low : bool
        Whether the bundle's q is so low that τ < 0.
    shows : bool
        Whether the final map alone gives it away.
    """

    how: dict[str, Any]
    ids: tuple[str, ...]
    low: bool = False
    shows: bool = True


PLAIN: dict[str, Any] = {"rule": peer.backpropagation, "trick": False}
CONVOLUTIONS = dict.fromkeys(peer.RELUS[:2], peer.rectgrad)
MISTAKES = {
    "percentile over the batch": Mistake({"rule": peer.over_the_batch}, ("scope=batch",)),
    "percentile per channel": Mistake({"rule": peer.over_each_channel}, ("scope=channel",)),
    "linear interpolation": Mistake(
        {"rule": peer.interpolating}, ("percentile=linear",), shows=False
    ),
    "not strict": Mistake({"rule": peer.not_strict}, ("strictness=>=",)),
    "another q": Mistake({"rule": peer.at_q(80)}, ("q=80",)),
    "q reversed": Mistake({"rule": peer.at_q(10)}, ("q=10",)),
    "absolute scores": Mistake({"rule": peer.absolute}, ("propagation_rule=PR2",)),
    "scores a": Mistake({"rule": peer.by_activation}, ("propagation_rule=PR3",)),
    "scores R": Mistake({"rule": peer.by_gradient}, ("propagation_rule=PR4",)),
    "dead units blocked": Mistake(
        {"rule": peer.dead_units_blocked}, ("strict_relu=True",), low=True
    ),
    "guided backpropagation": Mistake({"rule": peer.guided}, ("guided backpropagation",)),
    "deconvolution": Mistake({"rule": peer.deconvolution}, ("deconvolution",)),
    "hooks never fired": Mistake(PLAIN | {"end": peer.product}, ("gradient × input",)),
    "hooks never fired, positive": Mistake(PLAIN, ("positive gradient × input",)),
    "hooks never fired, no × input": Mistake(PLAIN | {"end": peer.gradient}, ("gradient",)),
    "hooks of ReLUs never fired": Mistake({"rule": peer.backpropagation}, ("no activation rule",)),
    "percentile of the map only": Mistake(
        PLAIN | {"end": peer.top_percentile}, ("percentile of gradient × input only",)
    ),
    "no padding trick": Mistake({"trick": False}, ("padding_trick=False",)),
    "ties split": Mistake({"splits_ties": True}, ("maxpool_ties=split",), shows=False),
    "no × input": Mistake({"end": peer.positive_gradient}, ("times_input=False",)),
    "no final threshold": Mistake({"end": peer.product}, ("final_threshold=False",)),
    "the bare gradient": Mistake(
        {"end": peer.gradient}, ("times_input=False", "final_threshold=False")
    ),
    "absolute map": Mistake({"end": peer.absolute_product}, ("final_threshold=False", "abs")),
    "seeded with the logit": Mistake({"seed": peer.logit}, ("output_seed=logit",), shows=False),
    "seeded with the softmax": Mistake({"seed": peer.softmax}, ("output_seed=softmax",)),
    "seeded with the mean": Mistake(
        {"seed": peer.mean_over_the_batch}, ("seed of the mean",), shows=False
    ),
    "seeded at every class": Mistake({"seed": peer.every_class}, ("seed at every class",)),
    "BGR": Mistake({"reverses_channels": True}, ("input channels reversed",)),
    "dense layers missing": Mistake({"rule": CONVOLUTIONS}, ("no hook at dense layers",)),
    "one layer missing": Mistake(
        {"rule": dict.fromkeys(peer.RELUS[1:], peer.rectgrad)}, ("no hook at conv1.relu",)
    ),
    "two mistakes": Mistake(
        {"rule": peer.over_the_batch, "trick": False}, ("scope=batch", "padding_trick=False")
    ),
    "three mistakes": Mistake(
        {"rule": peer.absolute, "trick": False, "end": peer.product},
        ("propagation_rule=PR2", "padding_trick=False", "final_threshold=False"),
    ),
}


@cache
def examiner(bundle: Bundle) -> Engine | None:
    """One for all tests of a bundle: what it has computed, it keeps."""
    return engine_of(bundle)


@cache
def low() -> Bundle:
    """Where τ < 0."""
    return peer.reference(q=10.0)


def diagnosed(bundle: Bundle, theirs: Any) -> Diagnosis:
    return diagnose(compare(bundle, theirs, examiner(bundle)))


def ids(found: Diagnosis) -> set[str]:
    return {deviation.id for deviation in found.deviations}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("what", ["map and layers", "map"])
def test_mistakes(bundle: Bundle, name: str, what: str) -> None:
    mistake = MISTAKES[name]
    made = low() if mistake.low else bundle
    theirs = peer.explain(made, **mistake.how)
    given = {"values": theirs["values"]} if what == "map" else theirs
    comparison = compare(made, given, examiner(made))
    found = diagnose(comparison)
    if what == "map" and not mistake.shows:
        assert comparison.agrees
        assert found.verdict == "agrees"
        return
    assert not comparison.agrees
    assert found.verdict == "explained"
    assert ids(found) == set(mistake.ids)
    assert found.after is not None and found.after.explains
    assert found.before is not None and not found.before.explains


@pytest.mark.parametrize("part", ["R_out", "R_in"])
@pytest.mark.parametrize("name", ["percentile over the batch", "not strict", "absolute scores"])
def test_gradients_without_a_map(bundle: Bundle, name: str, part: str) -> None:
    theirs = peer.explain(bundle, **MISTAKES[name].how)
    found = diagnosed(bundle, {k: v for k, v in theirs.items() if k.endswith(part)})
    assert ids(found) == set(MISTAKES[name].ids)


def test_a_correct_implementation(bundle: Bundle) -> None:
    found = diagnosed(bundle, peer.explain(bundle))
    assert (found.verdict, found.runs) == ("agrees", 0)
    assert found.sentences == (
        "Same conventions: nothing differs beyond rounding and threshold ties.",
    )


RULES = ["percentile over the batch", "not strict", "absolute scores", "scores R"]
OTHERS = ["no padding trick", "no final threshold", "seeded with the softmax", "BGR"]


PAIRS = list(product(RULES, OTHERS))
QUICK = PAIRS[::5]  # each of either once


@pytest.mark.parametrize(
    "pair",
    [*QUICK, *(pytest.param(p, marks=pytest.mark.slow) for p in PAIRS if p not in QUICK)],
    ids=" + ".join,
)
def test_pairs_of_mistakes(bundle: Bundle, pair: tuple[str, str]) -> None:
    how = MISTAKES[pair[0]].how | MISTAKES[pair[1]].how
    found = diagnosed(bundle, peer.explain(bundle, **how))
    expected = {*MISTAKES[pair[0]].ids, *MISTAKES[pair[1]].ids}
    options = (found.deviations, *found.alternatives)
    assert found.verdict == "explained"
    assert expected in [{deviation.id for deviation in option} for option in options]


@pytest.mark.parametrize(
    ("name", "what"),
    [("two mistakes", "map"), ("two mistakes", "layers"), ("three mistakes", "layers")],
)
def test_large_networks(
    bundle: Bundle, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no pairs are tried, but what helps is added one by one."""
    monkeypatch.setattr(sys.modules["rectgrad_ref.verify.diagnose"], "_CHEAP_UNITS", 0)
    theirs = peer.explain(bundle, **MISTAKES[name].how)
    found = diagnosed(bundle, {"values": theirs["values"]} if what == "map" else theirs)
    assert found.verdict == "explained"
    assert ids(found) == set(MISTAKES[name].ids)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("ties", {"prr": True}),
        ("redistribution", {"prr": False}),
        ("concatenating", {"padding_trick": "same"}),
        ("rank", {"percentile": "numpy_nearest"}),
        ("mod", {"propagation_rule": "PR1"}),
        ("derivative", {"derivative": False}),
        ("derivative_replaced", {"derivative": True}),
    ],
    ids=str,
)
def test_deviations_are_from_the_bundle(case: str, changes: dict[str, Any]) -> None:
    """What is wrong depends on what is asked for; here the package itself does otherwise."""
    made = load(FOLDER / f"{case}.npz")
    assert made.model is not None
    explainer = Explainer(made.model, backend="reference", dtype="float32")
    theirs = explainer.explain(
        made.inputs, method=replace(made.method, **changes), target=made.target
    )
    found = diagnosed(made, theirs.values)
    ((name, value),) = changes.items()
    options = (found.deviations, *found.alternatives)
    assert [f"{name}={value}"] in [[deviation.id for deviation in option] for option in options]


def test_scores_of_pre_activations() -> None:
    """Which matters where z and a differ among the units that pass: not at ReLUs."""
    made = make(smooth(), peer.images(2), q=80.0, backend="reference", dtype="float32")
    engine = engine_of(made)
    assert engine is not None
    wrong = Conventions(made.method, scores_z=True)
    values = engine.map_of(wrong, engine.walk(wrong).R)
    assert ids(diagnosed(made, values)) == {"scores z·R"}


def test_min_max(bundle: Bundle) -> None:
    values = bundle.values
    axes = (1, 2, 3)
    low, high = values.min(axes, keepdims=True), values.max(axes, keepdims=True)
    found = compare(bundle, (values - low) / (high - low))
    assert found.agrees  # the map has no negative values: a scale
    R = peer.explain(bundle, end=peer.product)["values"]
    low, high = R.min(axes, keepdims=True), R.max(axes, keepdims=True)
    scaled = (R - low) / (high - low)
    assert ids(diagnosed(bundle, scaled)) == {"final_threshold=False", "min-max"}


# --- what cannot be said --------------------------------------------------------------------------


def test_noise_is_not_explained(bundle: Bundle) -> None:
    values = np.random.default_rng(0).standard_normal(bundle.values.shape)
    found = diagnosed(bundle, values)
    assert (found.verdict, found.deviations) == ("unexplained", ())
    assert found.sentences == (
        "No known deviation explains the difference. The first difference is at the final map.",
    )


def test_an_unknown_rule_is_not_explained_but_located(bundle: Bundle) -> None:
    def every_other(a: np.ndarray, R: np.ndarray) -> np.ndarray:
        return np.where(np.arange(a.size).reshape(a.shape) % 2 == 0, R, 0)

    rules = dict.fromkeys(peer.RELUS, peer.rectgrad) | {"conv2.relu": every_other}
    found = diagnosed(bundle, peer.explain(bundle, rules))
    assert found.verdict == "unexplained"
    assert found.first_difference == "R_in of conv2.relu"


def test_a_known_mistake_and_an_unknown_one(bundle: Bundle) -> None:
    theirs = peer.explain(bundle, peer.absolute)
    rng = np.random.default_rng(0)
    theirs["values"] = theirs["values"] + rng.standard_normal(theirs["values"].shape)
    found = diagnosed(bundle, theirs)
    assert found.verdict == "partly explained"
    assert ids(found) == {"propagation_rule=PR2"}
    assert found.sentences[0].startswith("Only partly explained, nearest is: Scores are absolute")


def test_what_is_behind_an_unknown_mistake_is_found(bundle: Bundle) -> None:
    """The rule of the last layer is nobody's; below it, the padding trick is missing."""

    def every_other(a: np.ndarray, R: np.ndarray) -> np.ndarray:
        return np.where(np.arange(a.size).reshape(a.shape) % 2 == 0, R, 0)

    rules = dict.fromkeys(peer.RELUS, peer.rectgrad) | {"dense1.relu": every_other}
    found = diagnosed(bundle, peer.explain(bundle, rules, trick=False))
    assert found.verdict == "partly explained"
    assert ids(found) == {"padding_trick=False"}
    assert found.first_difference == "R_in of dense1.relu"


def test_two_mistakes_in_one_layer(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither explains anything alone."""

    def both(a: np.ndarray, R: np.ndarray) -> np.ndarray:
        scores = np.abs(a * R)
        return np.where(scores > peer.nearest(scores.reshape(1, -1)), R, 0)

    monkeypatch.setattr(sys.modules["rectgrad_ref.verify.diagnose"], "_CHEAP_UNITS", 0)
    found = diagnosed(bundle, peer.explain(bundle, both, trick=False, end=peer.product))
    assert found.verdict == "explained"
    assert ids(found) == {
        "propagation_rule=PR2", "scope=batch", "padding_trick=False", "final_threshold=False"
    }  # fmt: skip


def test_it_says_that_not_everything_was_tried(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["rectgrad_ref.verify.diagnose"]
    for name in ("_CHEAP_UNITS", "_MOST_UNITS"):
        monkeypatch.setattr(module, name, 0)
    monkeypatch.setattr(module, "_FEWEST_WALKS", 5)
    values = np.random.default_rng(0).standard_normal(bundle.values.shape)
    found = diagnosed(bundle, values)
    assert found.runs <= 11
    assert found.sentences[-1].startswith("In so large a network not everything was tried")


def test_one_sample_cannot_tell_a_batch() -> None:
    one = peer.reference(1)
    found = diagnosed(one, peer.explain(one, peer.absolute))
    assert ids(found) == {"propagation_rule=PR2"}
    assert "The bundle holds one sample" in found.untested[0]
    assert compare(one, peer.explain(one, peer.over_the_batch)).agrees


def test_without_the_model(bundle: Bundle) -> None:
    comparison = compare(replace(bundle, model=None), -1 - bundle.values)
    found = diagnose(comparison)
    assert (found.verdict, found.sentences) == (
        "not searched",
        ("Other conventions need the model: give it.",),
    )


def test_other_methods_than_rectgrad() -> None:
    made = make(plain(), peer.images(), method="saliency", backend="reference", dtype="float32")
    found = diagnosed(made, 1 - made.values)
    assert found.sentences == ("Other conventions are known of RectGrad, not of saliency.",)
    assert diagnosed(made, made.values).verdict == "agrees"


# --- evidence -------------------------------------------------------------------------------------


def test_evidence_and_alternatives(bundle: Bundle) -> None:
    found = diagnosed(bundle, peer.explain(bundle, peer.interpolating))
    assert found.sentences[0] == "Percentile with linear interpolation, not the nearest rank."
    assert found.sentences[1].startswith("Evidence: Values that agree on shared inputs: 7 of 7")
    assert "Relative distance of the final map" in found.sentences[1]
    # Which interpolation it is does not matter where no unit lies between the two ranks.
    assert ["percentile=midpoint"] in [[d.id for d in option] for option in found.alternatives]
    assert found.sentences[-1].startswith("On these images the same numbers follow from: ")


def test_the_smallest_set_is_named(bundle: Bundle) -> None:
    """Every alternative has as many deviations as the set that is named."""
    for name in ("two mistakes", "no final threshold", "guided backpropagation"):
        found = diagnosed(bundle, peer.explain(bundle, **MISTAKES[name].how))
        assert {len(option) for option in found.alternatives} <= {len(found.deviations)}
