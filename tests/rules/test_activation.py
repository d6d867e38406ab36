"""Activations against finite differences and onnxruntime, and their kinks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import NEWEST, Case, generators, gradient, rule_tests, shapes, spread
from hypothesis import strategies as st

from rectgrad_ref.rules.activation import ACTIVATIONS, derivative

PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "LeakyRelu": [{}, {"alpha": 0.2}, {"alpha": 0.0}, {"alpha": -0.3}],
    "ThresholdedRelu": [{}, {"alpha": 0.5}, {"alpha": -0.5}],
    "Elu": [{}, {"alpha": 0.4}],
    "Selu": [{}, {"alpha": 0.6, "gamma": 1.4}],
    "Celu": [{}, {"alpha": 0.7}],
    "HardSigmoid": [{}, {"alpha": 1 / 6, "beta": 0.5}],
    "Swish": [{}, {"alpha": 1.7}],
    "Gelu": [{}, {"approximate": "tanh"}],
}
SIMPLE = ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "HardSwish", "Mish", "Erf")


@st.composite
def activations(draw: st.DrawFn, op: str) -> Case:
    X = spread(draw(generators()), *draw(shapes(1, 3))) * draw(st.sampled_from([1, 3]))
    # 1.3 moves the values off the kinks at whole numbers.
    return Case(op, (np.float32(1.003) * X,), draw(st.sampled_from(PARAMETERS.get(op, [{}]))))


@st.composite
def prelus(draw: st.DrawFn) -> Case:
    rng, shape = draw(generators()), draw(shapes(1, 4))
    slope = [n if draw(st.booleans()) else 1 for n in shape][draw(st.integers(0, len(shape))) :]
    return Case("PRelu", (spread(rng, *shape), spread(rng, *slope)))


@st.composite
def clips(draw: st.DrawFn) -> Case:
    X = spread(draw(generators()), *draw(shapes(1, 3))) * np.float32(2.001)
    bounds = (-1.0, 1.0), (0.0, 6.0), (None, 0.5), (-0.5, None), (None, None)
    low, high = draw(st.sampled_from(bounds))
    if draw(st.booleans()):
        given = {"min": low, "max": high}
        return Case("Clip", (X,), {k: v for k, v in given.items() if v is not None}, opset=9)
    operands = (None if value is None else np.float32(value) for value in (low, high))
    return Case("Clip", (X, *operands), opset=draw(st.sampled_from([11, NEWEST])))


CASES = {
    **{op: activations(op) for op in (*SIMPLE, *PARAMETERS)},
    "PRelu": prelus(),
    "Clip": clips(),
}

test_vjp, test_forward = rule_tests(CASES)


def test_every_activation_is_checked() -> None:
    assert CASES.keys() >= ACTIVATIONS


@pytest.mark.parametrize(
    ("op", "attributes", "x", "expected"),
    [
        ("Relu", {}, 0, 0),
        ("Relu", {}, -0.0, 0),
        ("LeakyRelu", {"alpha": 0.1}, 0, 1),
        ("ThresholdedRelu", {"alpha": 1.0}, 1, 0),
        ("Elu", {"alpha": 2.0}, 0, 1),
        ("HardSigmoid", {"alpha": 0.5, "beta": 0.5}, 1, 0),
        ("HardSwish", {}, -3, 0),
        ("HardSwish", {}, 3, 1),
    ],
)
def test_at_the_kink(op: str, attributes: dict[str, Any], x: float, expected: float) -> None:
    case = Case(op, (np.full((1, 1), x, np.float32),), attributes)
    assert gradient(case) == expected


@pytest.mark.parametrize(("x", "expected"), [(0, 0), (6, 0), (3, 1), (-1, 0), (7, 0)])
def test_clip_at_its_bounds(x: float, expected: float) -> None:
    case = Case("Clip", (np.full((1, 1), x, np.float32), np.float32(0), np.float32(6)))
    assert gradient(case) == expected


@pytest.mark.parametrize("op", sorted(ACTIVATIONS - {"Clip", "PRelu"}))
@pytest.mark.parametrize("x", [-1e4, -200.0, 200.0, 1e4])
def test_far_from_zero_nothing_overflows(op: str, x: float) -> None:
    case = Case(op, (np.full((1, 1), x, np.float32),))
    (node,) = (node for node in case.graph().nodes if node.op == op)
    with np.errstate(over="raise", invalid="raise"):
        for dtype in (np.float32, np.float64):
            assert np.isfinite(derivative(node, np.full((1, 1), x, dtype))).all()
