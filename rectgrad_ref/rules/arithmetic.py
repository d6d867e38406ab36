"""Elementwise arithmetic with NumPy broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from .registry import Array, elementwise, operator, vjp

if TYPE_CHECKING:
    from ..graph import Node


def unbroadcast(R: Array, shape: tuple[int, ...]) -> Array:
    """Sum `R` over the axes along which an operand of `shape` was broadcast."""
    extra = R.ndim - len(shape)
    axes = (*range(extra), *(extra + i for i, n in enumerate(shape) if n == 1))
    return R.sum(axis=axes, keepdims=True).reshape(shape) if axes else R


def _integer_division(a: Array, b: Array) -> Array:
    """C's division: truncated towards zero."""
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) ^ (b < 0), -quotient, quotient).astype(np.result_type(a, b))


@operator("Add", batch=elementwise)
def add(node: Node, A: Array, B: Array) -> Array:
    return A + B


@vjp("Add", wrt="A")
def add_A(node: Node, R: Array) -> Array:
    return unbroadcast(R, node.input_shapes[0])


@vjp("Add", wrt="B")
def add_B(node: Node, R: Array) -> Array:
    return unbroadcast(R, node.input_shapes[1])


@operator("Sub", batch=elementwise)
def sub(node: Node, A: Array, B: Array) -> Array:
    return A - B


@vjp("Sub", wrt="A")
def sub_A(node: Node, R: Array) -> Array:
    return unbroadcast(R, node.input_shapes[0])


@vjp("Sub", wrt="B")
def sub_B(node: Node, R: Array) -> Array:
    return unbroadcast(-R, node.input_shapes[1])


@operator("Mul", batch=elementwise)
def mul(node: Node, A: Array, B: Array) -> Array:
    return A * B


@vjp("Mul", wrt="A")
def mul_A(node: Node, R: Array, *, B: Array) -> Array:
    return unbroadcast(R * B, node.input_shapes[0])


@vjp("Mul", wrt="B")
def mul_B(node: Node, R: Array, *, A: Array) -> Array:
    return unbroadcast(R * A, node.input_shapes[1])


@operator("Div", batch=elementwise)
def div(node: Node, A: Array, B: Array) -> Array:
    if np.issubdtype(np.result_type(A, B), np.integer):
        return _integer_division(A, B)
    return A / B


@vjp("Div", wrt="A")
def div_A(node: Node, R: Array, *, B: Array) -> Array:
    return unbroadcast(R / B, node.input_shapes[0])


@vjp("Div", wrt="B")
def div_B(node: Node, R: Array, *, A: Array, B: Array) -> Array:
    return unbroadcast(-R * A / (B * B), node.input_shapes[1])


@operator("Pow", batch=elementwise)
def pow_(node: Node, X: Array, Y: Array) -> Array:
    return np.power(X, Y.astype(X.dtype))


@vjp("Pow", wrt="X")
def pow_X(node: Node, R: Array, *, X: Array, Y: Array) -> Array:
    exponent = Y.astype(R.dtype)
    # x⁰ has slope 0 everywhere, also at x = 0, where x⁻¹ is infinite.
    slope = np.where(
        exponent == 0, 0, exponent * np.power(X, np.where(exponent == 0, 1, exponent - 1))
    )
    return unbroadcast(R * slope, node.input_shapes[0])


@vjp("Pow", wrt="Y")
def pow_Y(node: Node, R: Array, *, X: Array, Z: Array) -> Array:
    return unbroadcast(R * Z * np.log(np.where(X > 0, X, 1)), node.input_shapes[1])


@operator("Where", batch=elementwise)
def where(node: Node, condition: Array, X: Array, Y: Array) -> Array:
    return np.where(condition, X, Y)


@vjp("Where", wrt="X")
def where_X(node: Node, R: Array, *, condition: Array) -> Array:
    return unbroadcast(np.where(condition, R, 0), node.input_shapes[1])


@vjp("Where", wrt="Y")
def where_Y(node: Node, R: Array, *, condition: Array) -> Array:
    return unbroadcast(np.where(condition, 0, R), node.input_shapes[2])


@operator("Sum", batch=elementwise)
def sum_(node: Node, *data_0: Array) -> Array:
    return reduce(np.add, data_0)


@vjp("Sum", wrt="data_0")
def sum_data(node: Node, R: Array, *, index: int) -> Array:
    return unbroadcast(R, node.input_shapes[index])


@operator("Mean", batch=elementwise)
def mean(node: Node, *data_0: Array) -> Array:
    return reduce(np.add, data_0) / len(data_0)


@vjp("Mean", wrt="data_0")
def mean_data(node: Node, R: Array, *, index: int) -> Array:
    return unbroadcast(R / len(node.inputs), node.input_shapes[index])


@operator("Max", batch=elementwise)
def max_(node: Node, *data_0: Array) -> Array:
    return reduce(np.maximum, data_0)


@operator("Min", batch=elementwise)
def min_(node: Node, *data_0: Array) -> Array:
    return reduce(np.minimum, data_0)


@vjp("Max", "Min", wrt="data_0")
def extremum_data(node: Node, R: Array, *, index: int, data_0: tuple[Array, ...]) -> Array:
    """To the first operand that attains the extremum."""
    chosen = np.argmax if node.op == "Max" else np.argmin
    winner = chosen(np.stack(np.broadcast_arrays(*data_0)), axis=0)
    return unbroadcast(np.where(winner == index, R, 0), node.input_shapes[index])


# Functions of one variable: value, and derivative as a function of input and output.
_UNARY: dict[str, tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]] = {
    "Neg": (np.negative, lambda x, y: np.full_like(x, -1)),
    "Abs": (np.abs, lambda x, y: np.sign(x)),
    "Exp": (np.exp, lambda x, y: y),
    "Log": (np.log, lambda x, y: 1 / x),
    "Sqrt": (np.sqrt, lambda x, y: 0.5 / y),
    "Reciprocal": (np.reciprocal, lambda x, y: -y * y),
    "Sin": (np.sin, lambda x, y: np.cos(x)),
    "Cos": (np.cos, lambda x, y: -np.sin(x)),
    "Tan": (np.tan, lambda x, y: 1 + y * y),
    "Asin": (np.arcsin, lambda x, y: 1 / np.sqrt(1 - x * x)),
    "Acos": (np.arccos, lambda x, y: -1 / np.sqrt(1 - x * x)),
    "Atan": (np.arctan, lambda x, y: 1 / (1 + x * x)),
    "Sinh": (np.sinh, lambda x, y: np.cosh(x)),
    "Cosh": (np.cosh, lambda x, y: np.sinh(x)),
    "Asinh": (np.arcsinh, lambda x, y: 1 / np.sqrt(1 + x * x)),
    "Acosh": (np.arccosh, lambda x, y: 1 / np.sqrt(x * x - 1)),
    "Atanh": (np.arctanh, lambda x, y: 1 / (1 - x * x)),
}
_UNARY_INPUT = {op: "X" if op in ("Neg", "Abs", "Sqrt", "Reciprocal") else "input" for op in _UNARY}


@operator(*_UNARY, batch=elementwise)
def unary(node: Node, X: Array) -> Array:
    return _UNARY[node.op][0](X)


@vjp(*(op for op, name in _UNARY_INPUT.items() if name == "X"), wrt="X")
def unary_X(node: Node, R: Array, *, X: Array, Y: Array) -> Array:
    return R * _UNARY[node.op][1](X, Y)


@vjp(*(op for op, name in _UNARY_INPUT.items() if name == "input"), wrt="input")
def unary_input(node: Node, R: Array, *, input: Array, output: Array) -> Array:
    return R * _UNARY[node.op][1](input, output)


# Without a derivative, or with one that is zero almost everywhere: they decide masks and shapes.
_PREDICATES: dict[str, Callable[..., Array]] = {
    "Equal": np.equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
    "Not": np.logical_not,
    "IsNaN": np.isnan,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Round": np.rint,
    "Sign": np.sign,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
    "BitwiseNot": np.invert,
}


@operator(*_PREDICATES, batch=elementwise)
def predicate(node: Node, *operands: Array) -> Array:
    return _PREDICATES[node.op](*operands)


@operator("IsInf", batch=elementwise)
def is_inf(node: Node, X: Array) -> Array:
    wanted = (node["detect_negative"] and X < 0) | (node["detect_positive"] and X > 0)
    return np.isinf(X) & wanted


@operator("BitShift", batch=elementwise)
def bit_shift(node: Node, X: Array, Y: Array) -> Array:
    return np.left_shift(X, Y) if node["direction"] == "LEFT" else np.right_shift(X, Y)


@operator("Mod", batch=elementwise)
def mod(node: Node, A: Array, B: Array) -> Array:
    return np.fmod(A, B) if node["fmod"] else np.mod(A, B)


@vjp("Mod", wrt="A")
def mod_A(node: Node, R: Array) -> Array:
    return unbroadcast(R, node.input_shapes[0])


@vjp("Mod", wrt="B")
def mod_B(node: Node, R: Array, *, A: Array, B: Array) -> Array:
    """A mod B is A − B·⌊A/B⌋, of which the quotient is constant."""
    whole = np.trunc if node["fmod"] else np.floor
    return unbroadcast(-R * whole(A / B), node.input_shapes[1])


@operator("Range")
def range_(node: Node, start: Array, limit: Array, delta: Array) -> Array:
    count = math.ceil((limit.item() - start.item()) / delta.item())
    return (start + np.arange(count if count > 0 else 0) * delta).astype(start.dtype)
