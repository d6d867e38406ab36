"""DeformConv (Dai et al. 2017; Zhu et al. 2019): a convolution that reads between the cells.

Every kernel offset reads at a place of its own, displaced by `offset` and weighted by `mask`. What
it reads is a column matrix, and the convolution a product with it.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .linear import _per_channel
from .registry import Array, NotSamplewise, SampleAxis, operator, vjp

if TYPE_CHECKING:
    from ..graph import Node


class _Cell(NamedTuple):
    """One of the four cells around each place: (N, offset groups, kernel, output cells)."""

    position: Array
    weight: Array
    slopes: tuple[Array, Array]


def _batch(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    """Image, offsets and mask carry the samples; weights and bias do not."""
    wanted = (0, None, 0, None, 0)
    given = zip(node.inputs, axes, wanted, strict=False)
    if any(value and axis != expected for value, axis, expected in given):
        raise NotSamplewise
    return 0


def _kernel_places(node: Node) -> Array:
    """Where the undisplaced kernel reads: (2, kernel, output cells), in cells of the input."""
    lines = []
    for i, (n, k) in enumerate(zip(node.output_shapes[0][2:], node["kernel_shape"], strict=True)):
        begins = np.arange(n) * node["strides"][i] - node["pads"][i]
        lines.append(begins[None, :] + np.arange(k)[:, None] * node["dilations"][i])
    y, x = np.broadcast_arrays(lines[0][:, None, :, None], lines[1][None, :, None, :])
    kernel = math.prod(node["kernel_shape"])
    return np.stack([y, x]).reshape(2, kernel, -1)


def _cells(node: Node, offset: Array) -> list[_Cell]:
    height, width = node.input_shapes[0][2:]
    places = _kernel_places(node)
    moved = offset.reshape(len(offset), node["offset_group"], places.shape[1], 2, -1)
    y, x = places[0] + moved[:, :, :, 0], places[1] + moved[:, :, :, 1]
    top, left = np.floor(y), np.floor(x)
    found = []
    for i, j in itertools.product((0, 1), (0, 1)):
        row, column = (top + i).astype(int), (left + j).astype(int)
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        by_y, by_x = 1 - np.abs(y - row), 1 - np.abs(x - column)
        position = np.clip(row, 0, height - 1) * width + np.clip(column, 0, width - 1)
        slopes = (
            np.where(inside, (2 * i - 1) * by_x, 0),
            np.where(inside, (2 * j - 1) * by_y, 0),
        )
        found.append(_Cell(position, np.where(inside, by_y * by_x, 0), slopes))
    return found


def _split(node: Node, x: Array) -> Array:
    """(N, C, …) → (N, offset groups, channels of each, 1, cells)."""
    n, channels = x.shape[:2]
    groups = node["offset_group"]
    return x.reshape(n, groups, channels // groups, 1, -1)


def _read(node: Node, X: Array, cell: _Cell) -> Array:
    """The values of a cell: (N, offset groups, channels, kernel, output cells)."""
    position = cell.position[:, :, None]
    flat = position.reshape(*position.shape[:3], -1)
    values = np.take_along_axis(_split(node, X)[:, :, :, 0], flat, axis=-1)
    return values.reshape(*values.shape[:3], *cell.position.shape[2:])


def _masks(node: Node, mask: Array | None, kernel: int) -> Array:
    if mask is None:
        return np.ones((1, 1, 1, 1, 1))
    return mask.reshape(len(mask), node["offset_group"], 1, kernel, -1)


def _columns(node: Node, X: Array, offset: Array) -> Array:
    return np.asarray(sum(c.weight[:, :, None] * _read(node, X, c) for c in _cells(node, offset)))


def _by_group(node: Node, columns: Array) -> Array:
    """(N, groups, channels · kernel, output cells), as the weights have it."""
    return columns.reshape(len(columns), node["group"], -1, columns.shape[-1])


def _matrix(node: Node, W: Array) -> Array:
    return W.reshape(node["group"], W.shape[0] // node["group"], -1)


@operator("DeformConv", batch=_batch)
def deform_conv(
    node: Node,
    X: Array,
    W: Array,
    offset: Array,
    B: Array | None = None,
    mask: Array | None = None,
) -> Array:
    kernel = math.prod(node["kernel_shape"])
    columns = _columns(node, X, offset) * _masks(node, mask, kernel)
    y = (_matrix(node, W) @ _by_group(node, columns)).reshape(node.output_shapes[0])
    return (y if B is None else y + _per_channel(B, X.ndim)).astype(X.dtype, copy=False)


def _at_columns(node: Node, R: Array, W: Array) -> Array:
    """The gradient at the masked columns, in the shape of `_read`."""
    flat = R.reshape(len(R), node["group"], -1, math.prod(R.shape[2:]))
    gradient = np.swapaxes(_matrix(node, W), 1, 2) @ flat
    channels, kernel = node.input_shapes[0][1], math.prod(node["kernel_shape"])
    groups = node["offset_group"]
    return gradient.reshape(len(R), groups, channels // groups, kernel, -1)


@vjp("DeformConv", wrt="X")
def deform_conv_X(node: Node, R: Array, *, W: Array, offset: Array, mask: Array | None) -> Array:
    shape = node.input_shapes[0]
    at = _at_columns(node, R, W) * _masks(node, mask, math.prod(node["kernel_shape"]))
    gradient = np.zeros((*at.shape[:3], math.prod(shape[2:])), R.dtype)
    samples, groups, channels = (
        a[..., None, None] for a in np.ogrid[tuple(map(slice, at.shape[:3]))]
    )
    for cell in _cells(node, offset):
        place = (samples, groups, channels, cell.position[:, :, None])
        np.add.at(gradient, place, at * cell.weight[:, :, None])
    return gradient.reshape(shape)


@vjp("DeformConv", wrt="W")
def deform_conv_W(node: Node, R: Array, *, X: Array, offset: Array, mask: Array | None) -> Array:
    kernel = math.prod(node["kernel_shape"])
    columns = _by_group(node, _columns(node, X, offset) * _masks(node, mask, kernel))
    flat = R.reshape(len(R), node["group"], -1, columns.shape[-1])
    return (flat @ np.swapaxes(columns, 2, 3)).sum(axis=0).reshape(node.input_shapes[1])


@vjp("DeformConv", wrt="B")
def deform_conv_B(node: Node, R: Array) -> Array:
    return R.sum(axis=(0, 2, 3))


@vjp("DeformConv", wrt="offset")
def deform_conv_offset(
    node: Node, R: Array, *, X: Array, W: Array, offset: Array, mask: Array | None
) -> Array:
    at = _at_columns(node, R, W) * _masks(node, mask, math.prod(node["kernel_shape"]))
    total = np.zeros((2, *at.shape[:2], *at.shape[3:]), R.dtype)
    for cell in _cells(node, offset):
        arriving = (at * _read(node, X, cell)).sum(axis=2)
        total += np.stack([arriving * slope for slope in cell.slopes])
    return total.transpose(1, 2, 3, 0, 4).reshape(offset.shape)


@vjp("DeformConv", wrt="mask")
def deform_conv_mask(node: Node, R: Array, *, X: Array, W: Array, offset: Array) -> Array:
    gradient = (_at_columns(node, R, W) * _columns(node, X, offset)).sum(axis=2)
    return gradient.reshape(node.input_shapes[4])
