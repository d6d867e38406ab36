"""Reductions against finite differences and onnxruntime, and their ties."""

from __future__ import annotations

import numpy as np
from helpers import NEWEST, Case, generators, gradient, rule_tests, shapes, spread
from hypothesis import strategies as st


@st.composite
def reductions(draw: st.DrawFn, op: str) -> Case:
    """``axes`` became an input in opset 13 (ReduceSum) or 18."""
    rng, shape = draw(generators()), draw(shapes(1, 4))
    rank = len(shape)
    chosen = draw(st.lists(st.integers(0, rank - 1), unique=True, max_size=rank))
    axes = [axis - draw(st.sampled_from([0, rank])) for axis in chosen]
    attributes = {"keepdims": draw(st.integers(0, 1))}
    X = spread(rng, *shape)
    if draw(st.booleans()):
        return Case(op, (X,), {**attributes, **({"axes": axes} if axes else {})}, opset=11)
    attributes["noop_with_empty_axes"] = draw(st.integers(0, 1))
    given = np.array(axes, np.int64) if axes or draw(st.booleans()) else None
    opset = draw(st.sampled_from([18, NEWEST]))
    return Case(op, (X, given), attributes, opset=opset, constant=frozenset({1}))


OPS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd")
CASES = {op: reductions(op) for op in OPS}

test_vjp, test_forward = rule_tests(CASES)


def test_ties_go_to_the_first_in_row_major_order() -> None:
    X = np.array([[[2, 5], [5, 1]], [[1, 1], [0, 0]]], np.float32)
    axes = np.array([2, 1])
    found = gradient(Case("ReduceMax", (X, axes), {"keepdims": 0}))
    np.testing.assert_array_equal(found, [[[0, 1], [0, 0]], [[1, 0], [0, 0]]])
    found = gradient(Case("ReduceMin", (X, axes), {"keepdims": 0}))
    np.testing.assert_array_equal(found, [[[0, 0], [0, 1]], [[0, 0], [1, 0]]])
