"""Elementwise arithmetic against finite differences and onnxruntime, and its kinks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import NEWEST, Case, generators, gradient, rule_tests, shapes, spread
from hypothesis import strategies as st


@st.composite
def broadcastable(draw: st.DrawFn, count: int) -> list[list[int]]:
    """Shapes that fit together: leading axes left out, others shrunk to 1."""
    whole = draw(shapes(1, 4))
    result = []
    for _ in range(count):
        shape = whole[draw(st.integers(0, len(whole))) :]
        result.append([1 if draw(st.booleans()) else n for n in shape])
    return result


@st.composite
def binary(draw: st.DrawFn, op: str) -> Case:
    a, b = draw(broadcastable(2))
    rng = draw(generators())
    B = spread(rng, *b, low=0.3) * rng.choice(np.float32([-1, 1]), b)
    return Case(op, (spread(rng, *a), B), opset=draw(st.sampled_from([7, 13, NEWEST])))


@st.composite
def powers(draw: st.DrawFn) -> Case:
    """Any exponent of positive numbers, whole constant ones of all."""
    a, b = draw(broadcastable(2))
    rng = draw(generators())
    if draw(st.booleans()):
        return Case("Pow", (spread(rng, *a, low=0.2), spread(rng, *b)))
    exponent = rng.integers(0, 4, b).astype(draw(st.sampled_from(["float32", "int64"])))
    return Case("Pow", (spread(rng, *a), exponent), constant=frozenset({1}))


@st.composite
def wheres(draw: st.DrawFn) -> Case:
    condition, X, Y = draw(broadcastable(3))
    rng = draw(generators())
    return Case("Where", (rng.random(condition) < 0.5, spread(rng, *X), spread(rng, *Y)))


@st.composite
def variadic(draw: st.DrawFn, op: str) -> Case:
    """No two operands are close anywhere, so that maxima have no ties."""
    operand_shapes = draw(broadcastable(draw(st.integers(1, 4))))
    rng = draw(generators())
    sizes = [int(np.prod(shape)) for shape in operand_shapes]
    parts = np.split(spread(rng, sum(sizes)), np.cumsum(sizes)[:-1])
    operands = (part.reshape(shape) for part, shape in zip(parts, operand_shapes, strict=True))
    return Case(op, tuple(operands), opset=draw(st.sampled_from([8, 13, NEWEST])))


@st.composite
def unary(draw: st.DrawFn, op: str) -> Case:
    low = 0.2 if op in ("Log", "Sqrt", "Reciprocal") else None
    return Case(op, (spread(draw(generators()), *draw(shapes(1, 3)), low=low),))


@st.composite
def comparisons(draw: st.DrawFn, op: str) -> Case:
    a, b = draw(broadcastable(2))
    rng = draw(generators())
    return Case(op, tuple(rng.integers(-2, 3, shape).astype(np.float32) for shape in (a, b)))


@st.composite
def logic(draw: st.DrawFn, op: str) -> Case:
    operand_shapes = draw(broadcastable(1 if op == "Not" else 2))
    rng = draw(generators())
    return Case(op, tuple(rng.random(shape) < 0.5 for shape in operand_shapes))


@st.composite
def rounding(draw: st.DrawFn, op: str) -> Case:
    X = draw(generators()).integers(-9, 10, draw(shapes(1, 3))) / np.float32(2)
    return Case(op, (X.astype(np.float32),))


@st.composite
def remainders(draw: st.DrawFn) -> Case:
    """With ``fmod`` the sign is the dividend's, without it the divisor's."""
    a, b = draw(broadcastable(2))
    rng = draw(generators())
    A, B = rng.integers(-9, 9, a) + 0.5, rng.choice([-3, -2, 2, 3], b)
    return Case("Mod", (A.astype(np.float32), B.astype(np.float32)), {"fmod": 1})


UNARY = ("Neg", "Abs", "Exp", "Log", "Sqrt", "Reciprocal", "Sin", "Cos")
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
CASES: dict[str, st.SearchStrategy[Case]] = {
    **{op: binary(op) for op in ("Add", "Sub", "Mul", "Div")},
    **{op: variadic(op) for op in ("Sum", "Mean", "Max", "Min")},
    **{op: unary(op) for op in UNARY},
    **{op: comparisons(op) for op in COMPARISONS},
    **{op: logic(op) for op in ("And", "Or", "Xor", "Not")},
    **{op: rounding(op) for op in ("Floor", "Ceil", "Round", "Sign", "IsNaN")},
    "Pow": powers(),
    "Where": wheres(),
    "Mod": remainders(),
}

test_vjp, test_forward = rule_tests(CASES)


@pytest.mark.parametrize(
    ("op", "operands", "attributes", "expected"),
    [
        ("Abs", ([[-1, 0, 2]],), {}, [-1, 0, 1]),
        ("Pow", ([[0, 0, 0]], [0, 1, 2]), {}, [0, 1, 0]),
    ],
)
def test_at_zero(op: str, operands: Any, attributes: Any, expected: Any) -> None:
    arrays = tuple(np.float32(value) for value in operands)
    case = Case(op, arrays, attributes, constant=frozenset({1}))
    np.testing.assert_array_equal(gradient(case)[0], expected)


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_ties_go_to_the_first_operand(op: str) -> None:
    same = np.ones((1, 2), np.float32)
    np.testing.assert_array_equal(gradient(Case(op, (same, same))), [[1, 1, 0, 0]])
