"""Elementwise activations: their values and their derivatives.

`ACTIVATIONS` are the operators that attribution methods treat as layers (docs/conventions.md,
"Which values"); everything that a method does at one of them is a rule in `declared.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .registry import Array, elementwise, operator, vjp

if TYPE_CHECKING:
    from ..graph import Node

# One input, one output, x → f(x); Clip only where it is used as ReLU-N.
ACTIVATIONS = frozenset({
    "Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu", "Selu", "Celu", "Gelu", "Mish",
    "Softplus", "Softsign", "Tanh", "Swish", "HardSwish", "Sigmoid", "Clip",
})  # fmt: skip


def sigmoid(x: Array) -> Array:
    """1 / (1 + e⁻ˣ) without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def _softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _erf(x: Array) -> Array:
    from scipy.special import erf

    result: Array = erf(x)
    return result


@operator("Relu", batch=elementwise)
def relu(node: Node, X: Array) -> Array:
    return np.maximum(X, 0)


@vjp("Relu", wrt="X")
def relu_X(node: Node, R: Array, *, Y: Array) -> Array:
    return np.where(Y > 0, R, 0)


@operator("LeakyRelu", batch=elementwise)
def leaky_relu(node: Node, X: Array) -> Array:
    return np.where(X < 0, X * node["alpha"], X)


@operator("PRelu", batch=elementwise)
def prelu(node: Node, X: Array, slope: Array) -> Array:
    return np.where(X < 0, X * slope, X)


@vjp("PRelu", wrt="slope")
def prelu_slope(node: Node, R: Array, *, X: Array) -> Array:
    from .arithmetic import unbroadcast

    return unbroadcast(np.where(X < 0, R * X, 0), node.input_shapes[1])


@operator("ThresholdedRelu", batch=elementwise)
def thresholded_relu(node: Node, X: Array) -> Array:
    return np.where(node["alpha"] < X, X, 0)


@operator("Elu", batch=elementwise)
def elu(node: Node, X: Array) -> Array:
    return np.where(X < 0, node["alpha"] * np.expm1(np.minimum(X, 0)), X)


@operator("Selu", batch=elementwise)
def selu(node: Node, X: Array) -> Array:
    return node["gamma"] * np.where(X > 0, X, node["alpha"] * np.expm1(np.minimum(X, 0)))


@operator("Celu", batch=elementwise)
def celu(node: Node, X: Array) -> Array:
    alpha = node["alpha"]
    return np.maximum(X, 0) + np.minimum(alpha * np.expm1(np.minimum(X, 0) / alpha), 0)


@operator("Sigmoid", batch=elementwise)
def _sigmoid(node: Node, X: Array) -> Array:
    return sigmoid(X)


@operator("HardSigmoid", batch=elementwise)
def hard_sigmoid(node: Node, X: Array) -> Array:
    return np.clip(node["alpha"] * X + node["beta"], 0, 1)


@operator("Tanh", batch=elementwise)
def tanh(node: Node, X: Array) -> Array:
    return np.tanh(X)


@operator("Softplus", batch=elementwise)
def softplus(node: Node, X: Array) -> Array:
    return _softplus(X)


@operator("Softsign", batch=elementwise)
def softsign(node: Node, X: Array) -> Array:
    return X / (1 + np.abs(X))


@operator("Swish", batch=elementwise)
def swish(node: Node, X: Array) -> Array:
    return X * sigmoid(node["alpha"] * X)


@operator("HardSwish", batch=elementwise)
def hard_swish(node: Node, X: Array) -> Array:
    return X * np.clip(X / 6 + 0.5, 0, 1)


@operator("Mish", batch=elementwise)
def mish(node: Node, X: Array) -> Array:
    return X * np.tanh(_softplus(X))


@operator("Gelu", batch=elementwise)
def gelu(node: Node, X: Array) -> Array:
    if node["approximate"] == "tanh":
        return 0.5 * X * (1 + np.tanh(_gelu_inner(X)))
    return 0.5 * X * (1 + _erf(X / math.sqrt(2)))


def _gelu_inner(x: Array) -> Array:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


@operator("Shrink", batch=elementwise)
def shrink(node: Node, input: Array) -> Array:
    return np.where(np.abs(input) > node["lambd"], input - np.sign(input) * node["bias"], 0)


@operator("Erf", batch=elementwise)
def erf(node: Node, X: Array) -> Array:
    return _erf(X)


@operator("Clip", batch=elementwise)
def clip(node: Node, X: Array, min: Array | None = None, max: Array | None = None) -> Array:
    low = -np.inf if min is None else min
    high = np.inf if max is None else max
    if np.issubdtype(X.dtype, np.integer):
        return np.clip(X, min, max)
    return np.minimum(np.maximum(X, low), high)


def derivative(node: Node, X: Array, *constants: Array | None) -> Array:
    """f'(x) of the activation at `node`, elementwise; 0 at the kinks of Relu and Clip.

    Parameters
    ----------
    X : numpy.ndarray
        Pre-activation.
    constants
        The node's further inputs: the slope of PRelu, the bounds of Clip.
    """
    return _DERIVATIVES[node.op](node, X, *constants)


def _d_gelu(node: Node, x: Array) -> Array:
    if node["approximate"] == "tanh":
        t = np.tanh(_gelu_inner(x))
        slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope
    density = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + _erf(x / math.sqrt(2))) + x * density


def _d_swish(node: Node, x: Array) -> Array:
    s = sigmoid(node["alpha"] * x)
    return s + node["alpha"] * x * s * (1 - s)


def _d_mish(node: Node, x: Array) -> Array:
    t = np.tanh(_softplus(x))
    return t + x * (1 - t**2) * sigmoid(x)


def _d_clip(node: Node, x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    inside = np.ones_like(x, dtype=bool)
    if low is not None:
        inside &= x > low
    if high is not None:
        inside &= x < high
    return inside.astype(x.dtype)


def _d_sigmoid(node: Node, x: Array) -> Array:
    s = sigmoid(x)
    return s * (1 - s)


def _d_elu(node: Node, x: Array) -> Array:
    return np.where(x < 0, node["alpha"] * np.exp(np.minimum(x, 0)), 1)


def _d_selu(node: Node, x: Array) -> Array:
    return node["gamma"] * np.where(x > 0, 1, node["alpha"] * np.exp(np.minimum(x, 0)))


_DERIVATIVES: dict[str, Callable[..., Array]] = {
    "Relu": lambda node, x: (x > 0).astype(x.dtype),
    "LeakyRelu": lambda node, x: np.where(x < 0, node["alpha"], 1).astype(x.dtype),
    "PRelu": lambda node, x, slope: np.where(x < 0, slope, 1).astype(x.dtype),
    "ThresholdedRelu": lambda node, x: (x > node["alpha"]).astype(x.dtype),
    "Elu": _d_elu,
    "Selu": _d_selu,
    "Celu": lambda node, x: np.where(x < 0, np.exp(np.minimum(x, 0) / node["alpha"]), 1),
    "Sigmoid": _d_sigmoid,
    "HardSigmoid": lambda node, x: (
        node["alpha"] * (np.abs(node["alpha"] * x + node["beta"] - 0.5) < 0.5)
    ).astype(x.dtype),
    "Tanh": lambda node, x: 1 - np.tanh(x) ** 2,
    "Softplus": lambda node, x: sigmoid(x),
    "Softsign": lambda node, x: 1 / (1 + np.abs(x)) ** 2,
    "Swish": _d_swish,
    "HardSwish": lambda node, x: np.where(np.abs(x) < 3, x / 3 + 0.5, x >= 3).astype(x.dtype),
    "Mish": _d_mish,
    "Gelu": _d_gelu,
    "Shrink": lambda node, x: (np.abs(x) > node["lambd"]).astype(x.dtype),
    "Erf": lambda node, x: 2 / math.sqrt(math.pi) * np.exp(-(x**2)),
    "Clip": _d_clip,
}


# ONNX calls the same thing `X` here and `input` there.
_CALLED_INPUT = {"Tanh", "Softsign", "Shrink", "Erf"}


@vjp(*(_DERIVATIVES.keys() - {"Relu", "PRelu", "Clip"} - _CALLED_INPUT), wrt="X")
def activation_X(node: Node, R: Array, *, X: Array) -> Array:
    return R * derivative(node, X)


@vjp(*_CALLED_INPUT, wrt="input")
def activation_input(node: Node, R: Array, *, input: Array) -> Array:
    return R * derivative(node, input)


@vjp("PRelu", wrt="X")
def prelu_X(node: Node, R: Array, *, X: Array, slope: Array) -> Array:
    return R * derivative(node, X, slope)


@vjp("Clip", wrt="input")
def clip_input(
    node: Node, R: Array, *, input: Array, min: Array | None, max: Array | None
) -> Array:
    return np.where(derivative(node, input, min, max) > 0, R, 0)
