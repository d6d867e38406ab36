"""Picking and scattering where ONNX's node cases have no floats, no ties or no duplicates."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Case, check_vjp, generators, gradient, rule_tests, shapes, spread
from hypothesis import strategies as st


@st.composite
def trilus(draw: st.DrawFn) -> Case:
    k = draw(st.none() | st.integers(-3, 3))
    X = spread(draw(generators()), *draw(shapes(2, 4)))
    return Case(
        "Trilu", (X, None if k is None else np.array(k)), {"upper": draw(st.integers(0, 1))}
    )


@st.composite
def gathers(draw: st.DrawFn) -> Case:
    rng, shape = draw(generators()), draw(shapes(1, 4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    size = [draw(st.integers(1, n)) for n in shape]
    size[axis] = draw(st.integers(1, 6))
    indices = rng.integers(-shape[axis], shape[axis], size)
    return Case("GatherElements", (spread(rng, *shape), indices), {"axis": axis})


@st.composite
def scatters(draw: st.DrawFn) -> Case:
    """With several updates of one cell."""
    rng, shape = draw(generators()), draw(shapes(1, 3))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    size = [draw(st.integers(1, n)) for n in shape]
    size[axis] = draw(st.integers(1, 6))
    indices = rng.integers(0, shape[axis], size)
    both = spread(rng, int(np.prod(shape) + np.prod(size)))
    data, updates = np.split(both, [int(np.prod(shape))])
    reduction = draw(st.sampled_from(["add", "mul", "max", "min"]))
    operands = (data.reshape(shape), indices, updates.reshape(size))
    return Case("ScatterElements", operands, {"axis": axis, "reduction": reduction})


@st.composite
def top_ks(draw: st.DrawFn) -> Case:
    shape = draw(shapes(1, 3))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    K = np.array([draw(st.integers(1, shape[axis]))])
    attributes = {"axis": axis, "largest": draw(st.integers(0, 1))}
    return Case("TopK", (spread(draw(generators()), *shape), K), attributes, outputs=2)


CASES = {
    "Trilu": trilus(),
    "GatherElements": gathers(),
    "ScatterElements": scatters(),
    "TopK": top_ks(),
}

test_vjp, test_forward = rule_tests(CASES)


def test_the_last_update_of_a_cell_counts() -> None:
    data, updates = np.zeros(3, np.float32), np.float32([1, 2, 3])
    case = Case("ScatterElements", (data, np.array([1, 1, 2]), updates))
    np.testing.assert_array_equal(gradient(case)[0], [1, 0, 0, 0, 1, 1])


@pytest.mark.parametrize(("updates", "expected"), [([5, 5], [0, 1, 0]), ([1, 1], [1, 0, 0])])
def test_of_a_tie_the_first_wins(updates: list[float], expected: list[float]) -> None:
    """The datum before the updates."""
    operands = (np.ones(1, np.float32), np.zeros(2, int), np.float32(updates))
    case = Case("ScatterElements", operands, {"reduction": "max"})
    np.testing.assert_array_equal(gradient(case)[0], expected)


def test_a_product_with_zeros() -> None:
    operands = (np.float32([2, 2]), np.array([0, 0, 1, 1]), np.float32([0, 3, 0, 0]))
    case = Case("ScatterElements", operands, {"reduction": "mul"})
    np.testing.assert_array_equal(gradient(case)[0], [0, 0, 6, 0, 0, 0])
    check_vjp(case, np.random.default_rng(0))


def test_top_k_of_equal_units_takes_the_first() -> None:
    case = Case("TopK", (np.ones(4, np.float32), np.array([2])), outputs=2)
    np.testing.assert_array_equal(gradient(case), [1, 1, 0, 0])
