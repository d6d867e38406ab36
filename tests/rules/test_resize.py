"""Resize in all its modes, against finite differences and onnxruntime."""

from __future__ import annotations

import numpy as np
from helpers import Case, generators, rule_tests, spread
from hypothesis import strategies as st


@st.composite
def resizes(draw: st.DrawFn) -> Case:
    X = spread(draw(generators()), 1, 2, draw(st.integers(2, 5)), draw(st.integers(2, 5)))
    mode = draw(st.sampled_from(["nearest", "linear", "cubic"]))
    places = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
    attributes = {"mode": mode, "coordinate_transformation_mode": draw(st.sampled_from(places))}
    if mode == "nearest":
        rounding = ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]
        attributes["nearest_mode"] = draw(st.sampled_from(rounding))
    if mode == "cubic":
        attributes["exclude_outside"] = draw(st.integers(0, 1))
        attributes["cubic_coeff_a"] = draw(st.sampled_from([-0.5, -0.75]))
    scales = None
    sizes = np.array([1, 2, *(draw(st.integers(1, 8)) for _ in range(2))])
    if draw(st.booleans()):
        # Of two, so that an output does not fall between two cells by rounding.
        factors = [draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in range(2)]
        scales, sizes = np.float32([1, 1, *factors]), None
    return Case("Resize", (X, None, scales, sizes), attributes, opset=18)


@st.composite
def upsamples(draw: st.DrawFn) -> Case:
    """Of opset 10, which has no coordinates to choose."""
    X = spread(draw(generators()), 1, 2, draw(st.integers(2, 4)), draw(st.integers(2, 4)))
    scales = np.float32([1, 1, *(draw(st.sampled_from([1, 2, 3])) for _ in range(2))])
    attributes = {"mode": draw(st.sampled_from(["nearest", "linear"]))}
    return Case("Resize", (X, scales), attributes, opset=10, constant=frozenset({1}))


CASES = {"Resize": resizes() | upsamples()}

test_vjp, test_forward = rule_tests(CASES)
