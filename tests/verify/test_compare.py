"""Verdicts: what is exact, what is rounding, what ties explain, and what differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import peer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rectgrad_ref.rules.declared import Rectify
from rectgrad_ref.verify import Bundle, Comparison, compare
from rectgrad_ref.verify.bundle import load
from rectgrad_ref.verify.compare import fitted_scale, relative_distance
from rectgrad_ref.verify.conformance import FOLDER, smooth
from rectgrad_ref.verify.engine import tie_band

Arrays = dict[str, np.ndarray]


def own(bundle: Bundle) -> Arrays:
    """The reference's numbers as another side's."""
    found = {"values": bundle.values.copy()}
    for name, layer in bundle.layers.items():
        for part in ("a", "R_out", "R_in"):
            found[f"{name}/{part}"] = getattr(layer, part).copy()
    return found


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {f"{row.value}/{row.part}": row.verdict for row in comparison.rows}


def without_model(bundle: Bundle) -> Bundle:
    """A bundle of a model that nobody knows."""
    return replace(bundle, model=None, provenance={**bundle.provenance, "sha256": "0" * 64})


# --- agreement ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_the_reference_agrees_with_itself(bundle: Bundle, shared: bool) -> None:
    found = compare(bundle if shared else without_model(bundle), own(bundle))
    assert (found.engine is not None) is shared
    assert found.agrees
    assert found.first_difference is None
    # R_out is a linear step from float32 numbers, done in float64; a mask is all or nothing.
    for name, verdict in verdicts(found).items():
        assert verdict == "exact" or (verdict == "rounding" and not name.endswith("/R_in")), name
    assert found.map is not None and found.map.verdict in ("exact", "rounding")


def test_the_order_is_that_of_the_walk(bundle: Bundle) -> None:
    found = compare(bundle, own(bundle))
    expected = [f"{name}/{part}" for name in peer.RELUS[::-1] for part in ("R_out", "R_in")]
    assert list(verdicts(found)) == expected


def test_an_independent_implementation_agrees(bundle: Bundle) -> None:
    found = compare(bundle, peer.explain(bundle))
    assert found.agrees
    assert set(verdicts(found).values()) <= {"exact", "rounding"}
    assert [row.units for row in found.rows] == [0] * 6


def test_float64() -> None:
    made = peer.reference(dtype="float64")
    found = compare(made, own(made))
    assert found.agrees
    assert max(row.error for row in found.rows) < 1e-14
    nearly = own(made)
    nearly["conv2.relu/R_out"] *= 1 + 1e-9
    assert verdicts(compare(made, nearly))["conv2.relu/R_out"] == "different"


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 50.0, 90.0, 98.0]), st.booleans())
def test_rounding_is_no_difference(seed: int, q: float, integers: bool) -> None:
    """Gradients of any size, off by a unit in the last place."""
    made = peer.reference(2, q=q)
    rng, given = np.random.default_rng(seed), peer.explain(made, peer.at_q(q))
    for key in [k for k in given if k.endswith("R_out")]:
        shift = rng.integers(-1, 2, given[key].shape).astype(np.float32)
        given[key] = given[key] * (1 + shift * np.float32(2**-23))
    # What leaves a ReLU follows from what arrives there, which was changed.
    given = {k: v for k, v in given.items() if not k.endswith("R_in")}
    if integers:
        given["values"] = 4 * given["values"]
    assert compare(made, given).agrees


# --- differences at their place -------------------------------------------------------------------


def test_a_difference_is_said_where_it_arises_and_nowhere_else(bundle: Bundle) -> None:
    """What follows from a wrong value is compared on that value."""
    rules = {**dict.fromkeys(peer.RELUS, peer.rectgrad), "conv2.relu": peer.backpropagation}
    found = compare(bundle, peer.explain(bundle, rules))
    different = [name for name, verdict in verdicts(found).items() if verdict == "different"]
    assert different == ["conv2.relu/R_in"]
    assert found.first_difference == "R_in of conv2.relu"
    assert found.map is not None and found.map.verdict == "rounding"


def test_units_are_counted(bundle: Bundle) -> None:
    given = own(bundle)
    changed = given["conv2.relu/R_in"]
    passing = np.flatnonzero(changed)[:3]
    changed.flat[passing] = 0
    row = next(r for r in compare(bundle, given).rows if r.verdict == "different")
    assert (row.value, row.part, row.units, row.ties) == ("conv2.relu", "R_in", 3, 0)


def test_a_multiple_is_said(bundle: Bundle) -> None:
    given = own(bundle)
    given["conv2.relu/R_out"] *= 3
    (row,) = [r for r in compare(bundle, given).rows if r.value == "conv2.relu"][:1]
    assert row.verdict == "different"
    assert row.scale == pytest.approx(3)


def test_gradients_at_other_values(bundle: Bundle) -> None:
    found = compare(bundle, {"pool": np.zeros((3, 5, 4, 4)), "flat": np.zeros((3, 96))})
    assert verdicts(found) == {"flat/gradient": "different", "pool/gradient": "exact"}
    assert found.first_difference == "flat"


def test_gradients_at_the_input(bundle: Bundle) -> None:
    R = peer.explain(bundle, end=peer.gradient)["values"]
    assert verdicts(compare(bundle, {"x": R, "loss": np.zeros(2)})) == {"x/gradient": "rounding"}
    assert not compare(bundle, {"x": -R, "loss": np.zeros(2)}).agrees


# --- ties -----------------------------------------------------------------------------------------


def near_tie(bundle: Bundle) -> tuple[Arrays, tuple[int, ...]]:
    """The reference's numbers with one score moved next to τ, and that unit's index."""
    given, layer = own(bundle), "conv2.relu"
    a, R = given[f"{layer}/a"], given[f"{layer}/R_out"]
    scores = (a * R)[0]
    order = np.argsort(scores, axis=None)[::-1]
    passes = np.flatnonzero(bundle.layers[layer].mask[0])  # type: ignore[index]
    tau, last = order[len(passes)], order[len(passes) - 1]
    # The last that passes gets the score of the first that does not, and a hair more.
    value = np.nextafter(scores.flat[tau] / a[0].flat[last], np.float32(np.inf), dtype=np.float32)
    R[0].flat[last] = value
    unit = (0, *np.unravel_index(last, scores.shape))
    return given, tuple(map(int, unit))


def test_a_unit_at_the_threshold_may_fall_on_either_side(bundle: Bundle) -> None:
    given, unit = near_tie(bundle)
    del given["conv2.relu/a"]
    for side in (0.0, given["conv2.relu/R_out"][unit]):
        given["conv2.relu/R_in"][unit] = side
        found = verdicts(compare(bundle, given))["conv2.relu/R_in"]
        assert found in ("exact", "threshold ties")


def test_a_unit_far_from_the_threshold_may_not(bundle: Bundle) -> None:
    given = own(bundle)
    best = np.unravel_index(
        (given["conv2.relu/a"] * given["conv2.relu/R_out"]).argmax(), given["conv2.relu/a"].shape
    )
    given["conv2.relu/R_in"][best] = 0
    assert verdicts(compare(bundle, given))["conv2.relu/R_in"] == "different"


def test_ties_explain_what_arrives_below() -> None:
    """Without R_in, the gradient below a unit that fell on the other side."""
    bundle = peer.reference(padding_trick=False)
    given, unit = near_tie(bundle)
    a, R = given["conv2.relu/a"], given["conv2.relu/R_out"]
    passed = peer.rectgrad(a, R)
    passed[unit] = 0 if passed[unit] else R[unit]
    below = peer.back(passed, peer.weights(bundle)["conv2.weight"])
    windows, pooled = peer.pool(given["conv1.relu/a"])
    arriving = peer.unpooled(windows, pooled, below, splits=False)
    known = {k: v for k, v in given.items() if k.startswith("conv2.relu") and "R_in" not in k}
    (_, row) = compare(bundle, {**known, "conv1.relu/R_out": arriving}).rows
    assert (row.value, row.verdict, row.ties) == ("conv1.relu", "threshold ties", 1)
    arriving[0, 0, 3, 3] += 1
    (_, row) = compare(bundle, {**known, "conv1.relu/R_out": arriving}).rows
    assert row.verdict == "different"


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([50.0, 90.0]))
def test_no_rounding_leaves_the_band(seed: int, q: float) -> None:
    """Units that change sides when R and a are off by rounding lie in the stated band."""
    rng = np.random.default_rng(seed)
    a = np.maximum(rng.standard_normal((2, 400)), 0).round(2).astype(np.float32)
    R = rng.standard_normal((2, 400)).round(2).astype(np.float32)  # scores with many near-ties
    rule = Rectify(q=q)
    before, _ = rule.select(a, R, 2)
    band = tie_band(rule, a, R, 2, is_relu=True, exact=False)
    for array in (a, R):
        array *= (1 + rng.integers(-4, 5, array.shape) * 2.0**-24).astype(np.float32)
    after, _ = rule.select(a, R, 2)
    assert not ((before != after) & ~band).any()


# --- the final map --------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 1e-6, 255.0])
def test_scale_is_factored_out(bundle: Bundle, factor: float) -> None:
    row = compare(bundle, bundle.values * np.float32(factor)).map
    assert row is not None and row.verdict == "rounding"
    assert row.scale == pytest.approx([factor] * 3)
    assert row.distance < 1e-6 < row.plain_distance
    assert "theirs is the reference times" in row.notes[0]


def test_each_sample_may_have_its_own_scale(bundle: Bundle) -> None:
    factors = np.array([1, 2, 7], np.float32).reshape(3, 1, 1, 1)
    row = compare(bundle, bundle.values * factors).map
    assert row is not None and row.verdict == "rounding"
    assert row.scale == pytest.approx(factors.ravel())


def test_one_over_n_is_the_mean_over_the_batch(bundle: Bundle) -> None:
    row = compare(bundle, bundle.values / 3).map
    assert row is not None and "mean over the batch" in row.notes[-1]


def test_sign_is_factored_out_and_said(bundle: Bundle) -> None:
    row = compare(bundle, -bundle.values).map
    assert row is not None and row.verdict == "rounding"
    assert row.notes[0] == "the sign is reversed"
    assert row.scale == pytest.approx([-1] * 3)


def test_another_map_has_no_sign_of_ours(bundle: Bundle) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        row = compare(bundle, rng.normal(size=bundle.values.shape).astype(np.float32)).map
        assert row is not None and row.verdict == "different" and not row.notes


@pytest.mark.parametrize("cells", [1, 2, 3])
def test_the_border_is_said(bundle: Bundle, cells: int) -> None:
    values = bundle.values.copy()
    rim = np.ones((8, 8), bool)
    rim[cells:-cells, cells:-cells] = False
    values[:, :, rim] += 1
    row = compare(bundle, values).map
    assert row is not None and (row.verdict, row.border) == ("different", cells)


def test_a_difference_inside_is_no_border(bundle: Bundle) -> None:
    values = bundle.values.copy()
    values[:, :, 4, 4] += 1
    row = compare(bundle, values).map
    assert row is not None and (row.verdict, row.border) == ("different", None)


def test_a_map_of_zeros(bundle: Bundle) -> None:
    row = compare(bundle, np.zeros_like(bundle.values)).map
    assert row is not None and row.verdict == "different"
    assert row.distance == pytest.approx(1)


def test_two_maps_of_zeros() -> None:
    made = peer.reference(q=100.0)
    assert not made.values.any()
    assert compare(made, np.zeros_like(made.values)).agrees
    assert not compare(made, np.ones_like(made.values)).agrees


# --- without the model ----------------------------------------------------------------------------


def test_without_the_model_masks_are_compared_on_shared_inputs(bundle: Bundle) -> None:
    rules = {**dict.fromkeys(peer.RELUS, peer.rectgrad), "conv2.relu": peer.backpropagation}
    found = compare(without_model(bundle), peer.explain(bundle, rules))
    assert found.engine is None
    found_verdicts = verdicts(found)
    assert found_verdicts["conv2.relu/R_in"] == "different"
    assert found_verdicts["conv1.relu/R_out"] == "not checked"
    assert found_verdicts["conv1.relu/R_in"] in ("exact", "rounding")


def test_without_the_model_nothing_is_said_of_other_activations() -> None:
    from rectgrad_ref.verify import make

    made = make(smooth(), peer.images(), q=80.0, backend="reference", dtype="float32")
    given = {f"{n}/R_out": layer.R_out for n, layer in made.layers.items()}
    given |= {f"{n}/R_in": layer.R_in for n, layer in made.layers.items()}
    found = verdicts(compare(without_model(made), given))
    assert {v for k, v in found.items() if k.endswith("R_in")} == {"not checked"}


# --- what the comparison is made of ---------------------------------------------------------------


def test_relative_distance_is_of_the_worst_sample() -> None:
    one = np.array([[3.0, 4.0], [1.0, 0.0]])
    assert relative_distance(one, one) == 0
    assert relative_distance(one, one + np.array([[0, 0], [0, 0.5]])) == 0.5
    assert relative_distance(one, 0 * one) == 1


def test_fitted_scale() -> None:
    expected = np.array([[1.0, 2.0], [0.0, 0.0], [1.0, -1.0]])
    found = np.array([[2.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
    assert fitted_scale(found, expected).tolist() == [2, 1, 1]


@pytest.mark.parametrize("name", ["mod", "derivative", "redistribution", "ties", "guided"])
def test_conventions_of_the_bundle_are_followed(name: str) -> None:
    found: Any = load(FOLDER / f"{name}.npz")
    given = {f"{n}/R_out": layer.R_out for n, layer in found.layers.items()}
    assert compare(found, {"values": found.values, **given}).agrees
