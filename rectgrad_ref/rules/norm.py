"""Normalisations and softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import unbroadcast
from .registry import Array, NotSamplewise, SampleAxis, leading, operator, vjp

if TYPE_CHECKING:
    from ..graph import Node


def _per_channel(values: Array, rank: int) -> Array:
    """Aligned with axis 1; before opset 9 they may differ from cell to cell too (``spatial`` 0)."""
    return values.reshape(*values.shape, *(1,) * (rank - 1 - values.ndim))


def _scale(node: Node, scale: Array, var: Array, rank: int) -> Array:
    return _per_channel(scale / np.sqrt(var + node["epsilon"]), rank)


@operator("BatchNormalization", batch=leading)
def batch_normalization(
    node: Node, X: Array, scale: Array, B: Array, input_mean: Array, input_var: Array
) -> Array:
    factor = _scale(node, scale, input_var, X.ndim)
    return (X - _per_channel(input_mean, X.ndim)) * factor + _per_channel(B, X.ndim)


@vjp("BatchNormalization", wrt="X")
def batch_normalization_X(node: Node, R: Array, *, scale: Array, input_var: Array) -> Array:
    return R * _scale(node, scale, input_var, R.ndim)


@vjp("BatchNormalization", wrt="scale")
def batch_normalization_scale(
    node: Node, R: Array, *, X: Array, input_mean: Array, input_var: Array
) -> Array:
    centred = X - _per_channel(input_mean, X.ndim)
    return _onto_channels(node, R * centred) / np.sqrt(input_var + node["epsilon"])


@vjp("BatchNormalization", wrt="B")
def batch_normalization_B(node: Node, R: Array) -> Array:
    return _onto_channels(node, R)


@vjp("BatchNormalization", wrt="input_mean")
def batch_normalization_mean(node: Node, R: Array, *, scale: Array, input_var: Array) -> Array:
    return -_onto_channels(node, R) * scale / np.sqrt(input_var + node["epsilon"])


@vjp("BatchNormalization", wrt="input_var")
def batch_normalization_var(
    node: Node, R: Array, *, X: Array, scale: Array, input_mean: Array, input_var: Array
) -> Array:
    centred = X - _per_channel(input_mean, X.ndim)
    slope = -0.5 * scale * (input_var + node["epsilon"]) ** -1.5
    return _onto_channels(node, R * centred) * slope


def _onto_channels(node: Node, x: Array) -> Array:
    """Sum over what `_per_channel` broadcasts."""
    shape = node.input_shapes[1]
    return unbroadcast(x, (*shape, *(1,) * (x.ndim - 1 - len(shape)))).reshape(shape)


@operator("LRN", batch=leading)
def lrn(node: Node, X: Array) -> Array:
    return X * _lrn_base(node, X) ** -node["beta"]


@vjp("LRN", wrt="X")
def lrn_X(node: Node, R: Array, *, X: Array) -> Array:
    base = _lrn_base(node, X)
    inner = _sum_over_channels(R * X * base ** (-node["beta"] - 1), node["size"], transposed=True)
    factor = 2 * node["alpha"] * node["beta"] / node["size"]
    return R * base ** -node["beta"] - factor * X * inner


def _lrn_base(node: Node, x: Array) -> Array:
    return node["bias"] + node["alpha"] / node["size"] * _sum_over_channels(x * x, node["size"])


def _sum_over_channels(x: Array, size: int, transposed: bool = False) -> Array:
    """Sum over the channels c − ⌊(size−1)/2⌋ … c + ⌈(size−1)/2⌉ that exist."""
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    if transposed:
        before, after = after, before
    channels = x.shape[1]
    total = np.zeros_like(x)
    for shift in range(-before, after + 1):
        to = slice(max(0, -shift), min(channels, channels - shift))
        source = slice(max(0, shift), min(channels, channels + shift))
        if to.start < to.stop:
            total[:, to] += x[:, source]
    return total


def _along_axes(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    if axes[0] is None or axes[0] in node["axes"]:
        raise NotSamplewise
    return axes[0]


@operator("Softmax", batch=_along_axes)
def softmax(node: Node, input: Array) -> Array:
    e = np.exp(input - input.max(axis=node["axes"], keepdims=True))
    return e / e.sum(axis=node["axes"], keepdims=True)


@vjp("Softmax", wrt="input")
def softmax_input(node: Node, R: Array, *, output: Array) -> Array:
    # A row that is masked as a whole is no number; functions that put 0 there stop its gradient.
    output = np.where(np.isnan(output), 0, output)
    return output * (R - (R * output).sum(axis=node["axes"], keepdims=True))


@operator("LogSoftmax", batch=_along_axes)
def log_softmax(node: Node, input: Array) -> Array:
    shifted = input - input.max(axis=node["axes"], keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=node["axes"], keepdims=True))


@vjp("LogSoftmax", wrt="input")
def log_softmax_input(node: Node, R: Array, *, output: Array) -> Array:
    return R - np.exp(output) * R.sum(axis=node["axes"], keepdims=True)


def _beside(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    if axes[0] is None or axes[0] == node["axis"] % len(node.input_shapes[0]):
        raise NotSamplewise
    return axes[0]


@operator("Hardmax", batch=_along_axes)
def hardmax(node: Node, input: Array) -> Array:
    """1 at the first maximum, 0 elsewhere."""
    first, last = min(node["axes"]), max(node["axes"]) + 1
    rows = input.reshape(*input.shape[:first], -1, *input.shape[last:])
    result = np.zeros_like(rows)
    np.put_along_axis(result, np.expand_dims(rows.argmax(axis=first), first), 1, axis=first)
    return result.reshape(input.shape)


@vjp("Hardmax", wrt="input")
def hardmax_input(node: Node, R: Array) -> Array:
    """Its derivative is 0 wherever it has one."""
    return np.zeros_like(R)


def _trailing(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    if axes[0] is None or any(a is not None for a in axes[1:]):
        raise NotSamplewise
    rank = len(node.input_shapes[0])
    if axes[0] >= node["axis"] % rank:
        raise NotSamplewise
    return axes[0]


def _standardise(x: Array, axes: tuple[int, ...], epsilon: float) -> tuple[Array, Array]:
    """(x − mean) / √(var + ε) and the factor 1 / √(var + ε)."""
    centred = x - x.mean(axis=axes, keepdims=True)
    factor = 1 / np.sqrt((centred * centred).mean(axis=axes, keepdims=True) + epsilon)
    return centred * factor, factor


def _standardise_vjp(R: Array, x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    normal, factor = _standardise(x, axes, epsilon)
    mean = R.mean(axis=axes, keepdims=True)
    return factor * (R - mean - normal * (R * normal).mean(axis=axes, keepdims=True))


@operator("LayerNormalization", batch=_trailing)
def layer_normalization(
    node: Node, X: Array, Scale: Array, B: Array | None = None
) -> tuple[Array, ...]:
    axes = tuple(range(node["axis"] % X.ndim, X.ndim))
    normal, factor = _standardise(X, axes, node["epsilon"])
    y = normal * Scale if B is None else normal * Scale + B
    return y, X.mean(axis=axes, keepdims=True), factor


@vjp("LayerNormalization", wrt="X", every_output=True)
def layer_normalization_X(node: Node, R: tuple[Array, ...], *, X: Array, Scale: Array) -> Array:
    """Also of the outputs Mean and InvStdDev, where the node has them."""
    axes = tuple(range(node["axis"] % X.ndim, X.ndim))
    gradient = _standardise_vjp(R[0] * Scale, X, axes, node["epsilon"])
    if len(R) == 1:
        return gradient
    to_mean, to_factor = (*R[1:], np.zeros(()))[:2]
    normal, factor = _standardise(X, axes, node["epsilon"])
    return gradient + (to_mean - to_factor * normal * factor**2) * factor.size / X.size


@vjp("LayerNormalization", wrt="Scale")
def layer_normalization_scale(node: Node, R: Array, *, X: Array) -> Array:
    axes = tuple(range(node["axis"] % X.ndim, X.ndim))
    return unbroadcast(R * _standardise(X, axes, node["epsilon"])[0], node.input_shapes[1])


@vjp("LayerNormalization", wrt="B")
def layer_normalization_B(node: Node, R: Array) -> Array:
    return unbroadcast(R, node.input_shapes[2])


@operator("InstanceNormalization", batch=leading)
def instance_normalization(node: Node, input: Array, scale: Array, B: Array) -> Array:
    axes = tuple(range(2, input.ndim))
    normal, _ = _standardise(input, axes, node["epsilon"])
    return normal * _per_channel(scale, input.ndim) + _per_channel(B, input.ndim)


@vjp("InstanceNormalization", wrt="input")
def instance_normalization_input(node: Node, R: Array, *, input: Array, scale: Array) -> Array:
    axes = tuple(range(2, input.ndim))
    return _standardise_vjp(R * _per_channel(scale, input.ndim), input, axes, node["epsilon"])


@vjp("InstanceNormalization", wrt="scale")
def instance_normalization_scale(node: Node, R: Array, *, input: Array) -> Array:
    axes = tuple(range(2, input.ndim))
    return (R * _standardise(input, axes, node["epsilon"])[0]).sum(axis=(0, *axes))


@vjp("InstanceNormalization", wrt="B")
def instance_normalization_B(node: Node, R: Array) -> Array:
    return R.sum(axis=(0, *range(2, R.ndim)))


@operator("LpNormalization", batch=_beside)
def lp_normalization(node: Node, input: Array) -> Array:
    norm = _norm(node, input)
    return np.where(norm == 0, 0, input / np.where(norm == 0, 1, norm))


@vjp("LpNormalization", wrt="input")
def lp_normalization_input(node: Node, R: Array, *, input: Array, output: Array) -> Array:
    norm = _norm(node, input)
    slope = np.sign(input) if node["p"] == 1 else output
    along = (R * output).sum(axis=node["axis"], keepdims=True)
    return np.where(norm == 0, 0, (R - along * slope) / np.where(norm == 0, 1, norm))


def _norm(node: Node, x: Array) -> Array:
    return np.linalg.norm(x, ord=node["p"], axis=node["axis"], keepdims=True)
