"""Resize, and Upsample, which is its older name.

Interpolation is linear in the image and separable, so along each axis it is a product with a matrix
of weights, output × input; its transpose takes the gradient back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .registry import Array, NotSamplewise, SampleAxis, operator, vjp

if TYPE_CHECKING:
    from ..graph import Node


def _unresized(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    parameters = zip(node.inputs[1:], node.constants[1:], strict=True)
    if axes[0] is None or any(v and c is None for v, c in parameters):
        raise NotSamplewise
    if axes[0] in {axis for axis, _, _ in _matrices(node, *node.constants[1:])}:
        raise NotSamplewise
    return axes[0]


@operator("Resize", batch=_unresized)
def resize(
    node: Node,
    X: Array,
    roi: Array | None = None,
    scales: Array | None = None,
    sizes: Array | None = None,
) -> Array:
    y, outside = X, np.zeros((1,) * X.ndim, bool)
    for axis, weights, beyond in _matrices(node, roi, scales, sizes):
        y = _along(y, weights.astype(X.dtype), axis)
        outside = outside | np.expand_dims(beyond, [i for i in range(X.ndim) if i != axis])
    if node.attributes.get("coordinate_transformation_mode") != "tf_crop_and_resize":
        return y
    return np.where(outside, node["extrapolation_value"], y)


@vjp("Resize", wrt="X")
def resize_X(
    node: Node, R: Array, *, roi: Array | None, scales: Array | None, sizes: Array | None
) -> Array:
    matrices = _matrices(node, roi, scales, sizes)
    if node["coordinate_transformation_mode"] == "tf_crop_and_resize":
        for axis, _, beyond in matrices:
            R = np.where(np.expand_dims(beyond, [i for i in range(R.ndim) if i != axis]), 0, R)
    for axis, weights, _ in reversed(matrices):
        R = _along(R, weights.T.astype(R.dtype), axis)
    return R


def _along(x: Array, matrix: Array, axis: int) -> Array:
    return np.moveaxis(np.moveaxis(x, axis, -1) @ matrix.T, -1, axis)


def _matrices(
    node: Node,
    roi: Array | None = None,
    scales: Array | None = None,
    sizes: Array | None = None,
) -> list[tuple[int, Array, Array]]:
    """For every resized axis: the axis, its weights, and which outputs lie beyond the input."""
    before, after = node.input_shapes[0], node.output_shapes[0]
    axes = [a % len(before) for a in node.attributes.get("axes", range(len(before)))]
    if scales is not None and scales.size:
        factors = [float(s) for s in scales]
    else:
        factors = [after[axis] / before[axis] for axis in axes]
        policy = node.attributes.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch" and sizes is not None:
            wanted = [int(n) / before[axis] for n, axis in zip(sizes, axes, strict=True)]
            common = min(wanted) if policy == "not_larger" else max(wanted)
            factors = [common] * len(axes)
    crops = np.zeros((2, len(axes))) if roi is None or not roi.size else roi.reshape(2, -1)
    result = []
    for i, (axis, factor) in enumerate(zip(axes, factors, strict=True)):
        x = _coordinates(node, before[axis], after[axis], factor, crops[:, i])
        if before[axis] == after[axis] and np.array_equal(x, np.arange(len(x))):
            continue
        weights = _weights(node, x, before[axis], factor)
        result.append((axis, weights, (x < 0) | (x > before[axis] - 1)))
    return result


def _coordinates(node: Node, before: int, after: int, scale: float, crop: Array) -> Array:
    """Where in the input each output lies (ONNX, ``coordinate_transformation_mode``)."""
    x = np.arange(after, dtype=np.float64)
    resized = scale * before  # which is the output's extent, but for rounding
    match node["coordinate_transformation_mode"]:
        case "asymmetric":
            return x / scale
        case "tf_half_pixel_for_nn":
            return (x + 0.5) / scale
        case "align_corners":
            return x * (before - 1) / (resized - 1) if resized != 1 else 0 * x
        case "tf_crop_and_resize":
            begin, end = crop * (before - 1)
            return begin + x * (end - begin) / (after - 1) if after > 1 else x + (begin + end) / 2
        case "pytorch_half_pixel" if after == 1:
            return 0 * x
        case "half_pixel_symmetric":
            return before / 2 * (1 - after / resized) + (x + 0.5) / scale - 0.5
    return (x + 0.5) / scale - 0.5


def _weights(node: Node, x: Array, before: int, scale: float) -> Array:
    """The matrix, output × input; what lies outside repeats the border, or does not count."""
    mode = node["mode"]
    if mode == "nearest":
        return np.eye(before)[np.clip(_nearest(node, x), 0, before - 1)]
    # To shrink without aliasing, the kernel is stretched.
    shrink = min(scale, 1.0) if node.attributes.get("antialias") else 1.0
    reach = int(np.ceil((2 if mode == "cubic" else 1) / shrink))
    cells = np.floor(x).astype(int)[:, None] + np.arange(-reach, reach + 2)
    distance = np.abs(cells - x[:, None]) * shrink
    if mode == "cubic":
        values = _cubic(distance, node["cubic_coeff_a"])
    else:
        values = np.maximum(1 - distance, 0)
    if node.attributes.get("exclude_outside"):
        values = np.where((cells >= 0) & (cells < before), values, 0)
    weights = np.zeros((len(x), before))
    rows = np.arange(len(x))[:, None]
    np.add.at(weights, (rows, np.clip(cells, 0, before - 1)), values)
    return weights / weights.sum(axis=1, keepdims=True)


def _nearest(node: Node, x: Array) -> Array:
    match node["nearest_mode"]:
        case "floor":
            return np.floor(x).astype(int)
        case "ceil":
            return np.ceil(x).astype(int)
        case "round_prefer_ceil":
            return np.floor(x + 0.5).astype(int)
    return np.ceil(x - 0.5).astype(int)


def _cubic(distance: Array, a: float) -> Array:
    """Keys' kernel (1981)."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))
