"""Pooling against finite differences and onnxruntime, and its ties."""

from __future__ import annotations

import numpy as np
from helpers import Case, generators, gradient, reach, rule_tests, spread, windows
from hypothesis import strategies as st


@st.composite
def pools(draw: st.DrawFn, op: str) -> Case:
    rank = draw(st.integers(1, 3))
    window = draw(windows(rank, pool=True))
    spatial = [n + draw(st.integers(0, 4)) for n in reach(window)]
    window["ceil_mode"] = draw(st.integers(0, 1)) if "pads" in window else 0
    if op == "AveragePool":
        window["count_include_pad"] = draw(st.integers(0, 1))
    return Case(op, (spread(draw(generators()), 2, 2, *spatial),), window)


@st.composite
def global_pools(draw: st.DrawFn, op: str) -> Case:
    spatial = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return Case(op, (spread(draw(generators()), 2, 3, *spatial),))


CASES = {
    "MaxPool": pools("MaxPool"),
    "AveragePool": pools("AveragePool"),
    "GlobalAveragePool": global_pools("GlobalAveragePool"),
    "GlobalMaxPool": global_pools("GlobalMaxPool"),
}

test_vjp, test_forward = rule_tests(CASES)


def test_a_maximum_is_the_first_in_row_major_order() -> None:
    X = np.ones((1, 1, 3, 3), np.float32)
    window = {"kernel_shape": [2, 2], "strides": [1, 1]}
    expected = [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    np.testing.assert_array_equal(gradient(Case("MaxPool", (X,), window))[0, 0], expected)
    np.testing.assert_array_equal(
        gradient(Case("GlobalMaxPool", (X,)))[0, 0].ravel(), [1] + [0] * 8
    )


def test_a_tied_maximum_is_never_padding() -> None:
    X = np.zeros((1, 1, 2, 2), np.float32)
    window = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    np.testing.assert_array_equal(gradient(Case("MaxPool", (X,), window))[0, 0], np.ones((2, 2)))
