"""Quantisation, through which gradients pass as if nothing had been rounded.

Rounding has no slope but 0. The straight-through estimator (Bengio et al. 2013) takes the pair of
QuantizeLinear and DequantizeLinear for the identity within the range of the integers, and for
constant beyond it. A method's option ``quantization`` refuses such models instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .registry import Array, NotSamplewise, SampleAxis, operator, vjp

if TYPE_CHECKING:
    from ..graph import Node


def _constant_scales(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    shape = node.input_shapes[0]
    per_axis = any(len(s) and s != (1,) for s in node.input_shapes[1:])
    if axes[0] is None or any(axis is not None for axis in axes[1:]):
        raise NotSamplewise
    if per_axis and axes[0] == node["axis"] % len(shape):
        raise NotSamplewise
    return axes[0]


def _spread(node: Node, values: Array) -> Array:
    """Scales or zero points in a shape that broadcasts: one for all, per axis, or per block."""
    shape = node.input_shapes[0]
    if values.size == 1:
        return values.reshape(())
    axis = node["axis"] % len(shape)
    if values.ndim == 1 and len(values) == shape[axis]:
        return values.reshape(-1, *(1,) * (len(shape) - axis - 1))
    blocks = np.repeat(values, node["block_size"], axis=axis)
    return blocks[tuple(slice(n) for n in shape)]


def _levels(
    node: Node, x: Array, y_scale: Array, y_zero_point: Array | None
) -> tuple[Array, np.iinfo]:
    """The rounded values before they are brought into the range of the integers."""
    kind = np.dtype(np.uint8) if y_zero_point is None else y_zero_point.dtype
    if y_zero_point is None and node.attributes.get("output_dtype"):
        from onnx import helper

        kind = np.dtype(helper.tensor_dtype_to_np_dtype(node["output_dtype"]))
    zero = 0 if y_zero_point is None else _spread(node, y_zero_point).astype(x.dtype)
    return np.rint(x / _spread(node, y_scale)) + zero, np.iinfo(kind)


@operator("QuantizeLinear", batch=_constant_scales)
def quantize_linear(
    node: Node, x: Array, y_scale: Array, y_zero_point: Array | None = None
) -> Array:
    levels, limits = _levels(node, x, y_scale, y_zero_point)
    return np.clip(levels, limits.min, limits.max).astype(limits.dtype)


@vjp("QuantizeLinear", wrt="x")
def quantize_linear_x(
    node: Node, R: Array, *, x: Array, y_scale: Array, y_zero_point: Array | None
) -> Array:
    levels, limits = _levels(node, x, y_scale, y_zero_point)
    inside = (levels >= limits.min) & (levels <= limits.max)
    return np.where(inside, R / _spread(node, y_scale), 0)


@operator("DequantizeLinear", batch=_constant_scales)
def dequantize_linear(
    node: Node, x: Array, x_scale: Array, x_zero_point: Array | None = None
) -> Array:
    zero = 0 if x_zero_point is None else _spread(node, x_zero_point).astype(x_scale.dtype)
    return (x.astype(x_scale.dtype) - zero) * _spread(node, x_scale)


@vjp("DequantizeLinear", wrt="x")
def dequantize_linear_x(node: Node, R: Array, *, x_scale: Array) -> Array:
    return R * _spread(node, x_scale)
