"""Pooling against finite differences and onnxruntime, and its ties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import (
    NEWEST,
    Case,
    check_forward,
    check_vjp,
    generators,
    gradient,
    reach,
    rule_tests,
    spread,
    windows,
)
from hypothesis import strategies as st

from rectgrad_ref.forward import NumpyForward


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
    "LpPool": pools("LpPool"),
}

test_vjp, test_forward = rule_tests(CASES)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
@pytest.mark.parametrize(
    "window",
    [
        {"kernel_shape": [2, 2], "strides": [3, 3]},
        {"kernel_shape": [1, 2], "strides": [2, 5], "pads": [0, 1, 0, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 4], "pads": [1, 0, 2, 2]},
    ],
    ids=str,
)
@pytest.mark.parametrize("extent", range(4, 10))
@pytest.mark.parametrize("opset", [18, NEWEST])
def test_windows_that_begin_behind_the_image_are_ignored(
    opset: int, extent: int, window: dict[str, Any], op: str
) -> None:
    """By ONNX's definition and onnxruntime; onnx's shape inference of older opsets counts them."""
    X = spread(np.random.default_rng(0), 1, 2, extent, extent + 1)
    check_forward(Case(op, (X,), {**window, "ceil_mode": 1}, opset=opset))


def test_a_global_norm_is_that_of_one_window() -> None:
    """No other implementation has GlobalLpPool."""
    rng = np.random.default_rng(0)
    X = spread(rng, 2, 3, 4, 5)
    whole = Case("LpPool", (X,), {"kernel_shape": [4, 5], "p": 3})
    alone = Case("GlobalLpPool", (X,), {"p": 3})
    results = [
        NumpyForward(np.float64)(graph, case.image, [graph.logits])[graph.logits]
        for case in (whole, alone)
        for graph in [case.graph()]
    ]
    np.testing.assert_allclose(*results)
    check_vjp(alone, rng)


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
