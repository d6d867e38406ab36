"""Normalisations and softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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
    return output * (R - (R * output).sum(axis=node["axes"], keepdims=True))


@operator("LogSoftmax", batch=_along_axes)
def log_softmax(node: Node, input: Array) -> Array:
    shifted = input - input.max(axis=node["axes"], keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=node["axes"], keepdims=True))


@vjp("LogSoftmax", wrt="input")
def log_softmax_input(node: Node, R: Array, *, output: Array) -> Array:
    return R - np.exp(output) * R.sum(axis=node["axes"], keepdims=True)


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
def layer_normalization(node: Node, X: Array, Scale: Array, B: Array | None = None) -> Array:
    axes = tuple(range(node["axis"] % X.ndim, X.ndim))
    y = _standardise(X, axes, node["epsilon"])[0] * Scale
    return y if B is None else y + B


@vjp("LayerNormalization", wrt="X")
def layer_normalization_X(node: Node, R: Array, *, X: Array, Scale: Array) -> Array:
    axes = tuple(range(node["axis"] % X.ndim, X.ndim))
    return _standardise_vjp(R * Scale, X, axes, node["epsilon"])


@operator("InstanceNormalization", batch=leading)
def instance_normalization(node: Node, input: Array, scale: Array, B: Array) -> Array:
    axes = tuple(range(2, input.ndim))
    normal, _ = _standardise(input, axes, node["epsilon"])
    return normal * _per_channel(scale, input.ndim) + _per_channel(B, input.ndim)


@vjp("InstanceNormalization", wrt="input")
def instance_normalization_input(node: Node, R: Array, *, input: Array, scale: Array) -> Array:
    axes = tuple(range(2, input.ndim))
    return _standardise_vjp(R * _per_channel(scale, input.ndim), input, axes, node["epsilon"])
