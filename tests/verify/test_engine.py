"""The walk under any conventions against what the package explains."""

from __future__ import annotations

import warnings
from typing import Any

import nets
import numpy as np
import peer
import pytest
from onnx import helper, numpy_helper

from rectgrad_ref import Explainer
from rectgrad_ref.explainer import seed_at
from rectgrad_ref.methods import METHODS, RectGrad, make_method
from rectgrad_ref.verify import Bundle, engine_of, make
from rectgrad_ref.verify.conformance import plain, residual
from rectgrad_ref.verify.engine import Conventions, Engine, Given, seed_tolerance

ONE_WALK = [
    name
    for name in METHODS
    if make_method(name).walks_once and make_method(name).reference_input(np.zeros((1, 1))) is None
]


def engine(bundle: Bundle) -> Engine:
    found = engine_of(bundle)
    assert found is not None
    return found


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("build", [plain, residual])
@pytest.mark.parametrize("method", ONE_WALK)
def test_without_deviations_it_is_the_explanation(method: str, build: Any) -> None:
    options: dict[str, Any] = {"q": 80.0} if method == "rectgrad" else {}
    made = make(build(), peer.images(), method=method, backend="reference", **options)
    made_engine = engine(made)
    walk = made_engine.walk(Conventions(made.method))
    assert relative(made_engine.map_of(Conventions(made.method), walk.R), made.values) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "batch"}, {"percentile": "linear"}, {"strictness": ">="}, {"q": 10.0},
        {"propagation_rule": "PR4"}, {"propagation_rule": "mod"}, {"padding_trick": False},
        {"maxpool_ties": "split"}, {"prr": True}, {"output_seed": "softmax"}, {"tau": -np.inf},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("path", ["walk", "gradient"])
def test_conventions_are_options(options: dict[str, Any], path: str) -> None:
    made = peer.reference()
    method = RectGrad(**{"q": peer.Q, **options})
    expected = Explainer(plain(), backend="reference", dtype="float32").explain(
        peer.images(), method=method, target=made.target
    )
    conventions, made_engine = Conventions(method), engine(made)
    if path == "gradient":
        pytest.importorskip("onnxruntime")
        R = made_engine.gradient(conventions)
    else:
        R = made_engine.walk(conventions).R
    assert relative(made_engine.map_of(conventions, R), expected.values) < 1e-6


@pytest.mark.parametrize(
    "deviating",
    [{"missing": frozenset({"conv2.relu"})}, {"scores_z": True}, {"channelwise": True},
     {"swapped": True}, {"seed": "every class"}, {"seed": "mean"}],
    ids=str,
)  # fmt: skip
def test_both_ways_of_walking_agree(bundle: Bundle, deviating: dict[str, Any]) -> None:
    conventions = Conventions(bundle.method, **deviating)
    made_engine = engine(bundle)
    fast = made_engine.gradient(conventions)
    assert relative(fast, made_engine.walk(conventions).R) < 1e-6
    assert relative(fast, made_engine.walk(Conventions(bundle.method)).R) > 1e-3


def test_shared_gradients_take_the_place_of_the_walk_s(bundle: Bundle) -> None:
    rng = np.random.default_rng(0)
    R = rng.standard_normal(bundle.layers["conv1.relu"].a.shape).astype(np.float32)
    conventions = Conventions(bundle.method, missing=frozenset({"conv1.relu"}))
    walk = engine(bundle).walk(conventions, Given({"conv1.relu": R}))
    a = bundle.layers["conv1.relu"].a
    weights = peer.weights(bundle)["conv1.weight"].astype(np.float64)
    through = peer.without_border(np.where(a > 0, R, 0).astype(np.float64))
    assert relative(walk.R, peer.back(through, weights)) < 1e-12


def test_units_that_are_turned(bundle: Bundle) -> None:
    """A unit that did not pass passes, and the other way round."""
    mask = bundle.layers["conv1.relu"].mask
    assert mask is not None
    dead = bundle.layers["conv1.relu"].a == 0
    turn = (mask | dead) == mask  # every unit but dead ones
    conventions, made_engine = Conventions(bundle.method), engine(bundle)
    turned = made_engine.walk(conventions, flip={"conv1.relu": turn}).R
    plain_walk = made_engine.walk(Conventions(bundle.method, missing=frozenset({"conv1.relu"}))).R
    assert relative(turned + made_engine.walk(conventions).R, plain_walk) < 1e-7


def test_a_model_that_takes_one_sample_at_a_time() -> None:
    w = nets.Weights(0)
    arrays = {"w": w(4, 3, 3, 3), "b": w(4), "d": w(144, 3), "s": np.array([1, 144])}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["z"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["z"], ["a"]),
        helper.make_node("Reshape", ["a", "s"], ["flat"]),
        helper.make_node("MatMul", ["flat", "d"], ["logits"]),
    ]
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()]
    proto = nets.model(nodes, [1, 3, 6, 6], "logits", initializers)
    x = np.random.default_rng(0).standard_normal((3, 3, 6, 6)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = make(proto, x, q=80.0, backend="reference", dtype="float32")
    found = engine(made)
    walk = found.walk(Conventions(made.method), Given({"a": made.layers["a"].R_out}))
    assert [point.found.shape for point in walk.points] == [(3, 4, 6, 6)]
    assert relative(found.map_of(Conventions(made.method), walk.R), made.values) < 1e-6


@pytest.mark.parametrize("method", ["smoothgrad", "integrated_gradients", "deeplift", "random"])
def test_methods_that_are_no_single_walk(method: str) -> None:
    assert engine_of(make(plain(), peer.images(), method=method, backend="reference")) is None


# --- seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one", "logit", "softmax"])
def test_seeds(kind: str) -> None:
    scores = np.random.default_rng(0).standard_normal((5, 4))
    target = np.array([0, 1, 2, 3, 0])
    expected = {"one": peer.one, "logit": peer.logit, "softmax": peer.softmax}[kind]
    assert relative(seed_at(scores, target, kind), expected(scores, target)) < 1e-15


@pytest.mark.parametrize("kind", ["one", "logit", "softmax"])
@pytest.mark.parametrize("gap", [0.0, 3.0, 9.0])
def test_what_float32_makes_of_a_seed_is_within_its_tolerance(kind: str, gap: float) -> None:
    rng, unit = np.random.default_rng(0), 2.0**-24
    for _ in range(200):
        scores = 10 * rng.standard_normal((1, 4)).astype(np.float32)
        target = scores.argmax(axis=1)
        scores[0, target] += np.float32(gap)
        off = scores * (1 + rng.integers(-4, 5, scores.shape) * np.float32(2**-24))
        exact = seed_at(scores.astype(np.float64), target, kind)
        found = seed_at(off.astype(np.float32), target, kind)
        allowed = seed_tolerance(scores.astype(np.float64), target, kind, unit)
        assert allowed <= 0.01
        if allowed < 0.01:
            assert np.abs(found - exact).max() <= allowed * np.abs(exact).max()
