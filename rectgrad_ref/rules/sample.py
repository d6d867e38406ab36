"""Operators that read an image between its cells or in pieces: grids, regions, Col2Im.

A value between cells is a weighted sum of the cells around it. So sampling is a sparse matrix:
positions of cells and their weights, found once, read for the values and added to for gradients.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from .registry import Array, NotSamplewise, SampleAxis, leading, operator, vjp
from .window import Window

if TYPE_CHECKING:
    from ..graph import Node


def _all_leading(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    """Every input has the samples on axis 0."""
    if axes[0] != 0 or any(axis not in (0, None) for axis in axes):
        raise NotSamplewise
    if any(a is None and s[0] != 1 for a, s in zip(axes, node.input_shapes, strict=True)):
        raise NotSamplewise
    return 0


def _denormalised(node: Node, grid: Array, extents: Array) -> Array:
    """From −1 … 1 to cells; the last axis, which ONNX has as x, y, z, in the order of the axes."""
    g = grid[..., ::-1]
    if node["align_corners"]:
        return (g + 1) / 2 * (extents - 1)
    return ((g + 1) * extents - 1) / 2


def _slope(node: Node, extents: Array) -> Array:
    return (extents - 1) / 2 if node["align_corners"] else extents / 2


def _reflected(node: Node, x: Array, extents: Array) -> tuple[Array, Array]:
    """Mirrored at the borders until inside, and ±1 for the direction."""
    low, high = (
        (0 * extents, extents - 1) if node["align_corners"] else (-0.5 + 0 * extents, extents - 0.5)
    )
    span = np.where(high > low, high - low, 1)
    turns, rest = np.divmod(x - low, span)
    back = turns % 2 == 1
    return low + np.where(back, span - rest, rest), np.where(back, -1.0, 1.0)


def _bordered(node: Node, x: Array, extents: Array) -> tuple[Array, Array]:
    """The coordinates that are read after padding, and their derivative."""
    if node["padding_mode"] == "reflection":
        x, sign = _reflected(node, x, extents)
        inside = np.clip(x, 0, extents - 1)
        return inside, np.where(inside == x, sign, 0)
    if node["padding_mode"] == "border":
        inside = np.clip(x, 0, extents - 1)
        return inside, (inside == x).astype(x.dtype)
    return x, np.ones_like(x)


def _kernel(mode: str, x: Array) -> list[tuple[Array, Array, Array]]:
    """The cells that count along one axis, with their weights and the derivatives of these."""
    base = np.floor(x)
    t = x - base
    if mode == "nearest":
        return [(np.rint(x).astype(int), np.ones_like(x), np.zeros_like(x))]
    if mode in ("linear", "bilinear"):
        one = np.ones_like(t)
        cells = [(0, 1 - t, -one), (1, t, one)]
    else:
        cells = [(k, *_keys(t - k)) for k in range(-1, 3)]
    return [((base + k).astype(int), weight, slope) for k, weight, slope in cells]


def _keys(d: Array, a: float = -0.75) -> tuple[Array, Array]:
    """The cubic kernel (Keys 1981) and its derivative, at a signed distance."""
    s, d = np.sign(d), np.abs(d)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    near_slope = (3 * (a + 2) * d - 2 * (a + 3)) * d
    far_slope = (3 * a * d - 10 * a) * d + 8 * a
    inner = d <= 1
    return np.where(inner, near, far), s * np.where(inner, near_slope, far_slope)


def _grid_cells(node: Node, grid: Array) -> list[tuple[Array, Array, Array]]:
    """Every cell that a point reads: its position, weight, and the weight's gradient.

    Positions are (N, points), weights too, gradients (N, points, axes) in the order of the axes.
    """
    extents = np.array(node.input_shapes[0][2:])
    flat = grid.reshape(grid.shape[0], -1, grid.shape[-1])
    x, moved = _denormalised(node, flat, extents), _slope(node, extents)
    mode, padding = node["mode"], node["padding_mode"]
    direction = np.ones_like(x)
    if mode not in ("cubic", "bicubic"):  # which pads the cells and not the coordinates
        x, direction = _bordered(node, x, extents)
    kernels = [_kernel(mode, x[..., i]) for i in range(len(extents))]
    found = []
    for cell in itertools.product(*kernels):
        places = np.stack([index for index, _, _ in cell], axis=-1)
        if padding == "zeros":
            inside = np.asarray(((places >= 0) & (places < extents)).all(axis=-1))
        else:
            places = _bordered(node, places.astype(float), extents)[0].astype(int)
            inside = np.ones(places.shape[:-1], bool)
        places = np.clip(places, 0, extents - 1)
        weights = np.stack([weight for _, weight, _ in cell], axis=-1)
        slopes = np.stack([
            math.prod((weights[..., j] for j in range(len(cell)) if j != i), start=slope)
            for i, (_, _, slope) in enumerate(cell)
        ], axis=-1)  # fmt: skip
        position = np.ravel_multi_index(tuple(np.moveaxis(places, -1, 0)), tuple(extents))
        weight = np.where(inside, weights.prod(axis=-1), 0)
        gradient = np.where(inside[..., None], slopes * direction * moved, 0)
        found.append((position, weight, gradient))
    return found


def _read(X: Array, position: Array) -> Array:
    """(N, C, cells) at (N, points) → (N, C, points)."""
    return np.take_along_axis(X.reshape(*X.shape[:2], -1), position[:, None], axis=2)


@operator("GridSample", batch=_all_leading)
def grid_sample(node: Node, X: Array, grid: Array) -> Array:
    total = sum(weight[:, None] * _read(X, place) for place, weight, _ in _grid_cells(node, grid))
    return np.asarray(total).reshape(*X.shape[:2], *grid.shape[1:-1]).astype(X.dtype, copy=False)


@vjp("GridSample", wrt="X")
def grid_sample_X(node: Node, R: Array, *, grid: Array) -> Array:
    shape = node.input_shapes[0]
    gradient = np.zeros((*shape[:2], math.prod(shape[2:])), R.dtype)
    flat = R.reshape(*shape[:2], -1)
    samples, channels = np.ogrid[: shape[0], : shape[1]]
    for place, weight, _ in _grid_cells(node, grid):
        where = (samples[..., None], channels[..., None], place[:, None])
        np.add.at(gradient, where, weight[:, None] * flat)
    return gradient.reshape(shape)


@vjp("GridSample", wrt="grid")
def grid_sample_grid(node: Node, R: Array, *, X: Array, grid: Array) -> Array:
    flat = R.reshape(*X.shape[:2], -1)
    total = sum(
        (flat * _read(X, place)).sum(axis=1)[..., None] * gradient
        for place, _, gradient in _grid_cells(node, grid)
    )
    return np.asarray(total)[..., ::-1].reshape(grid.shape)


def _affine_places(node: Node, size: Array, dtype: np.dtype) -> Array:
    """Homogeneous coordinates (cells, x y z 1) of a grid from −1 to 1."""
    lines = []
    for n in (int(n) for n in size[2:]):
        line = np.linspace(-1, 1, n) if node["align_corners"] else (2 * np.arange(n) + 1) / n - 1
        lines.append(line if n > 1 else np.zeros(1))
    places = np.meshgrid(*lines, indexing="ij")[::-1]
    return (
        np.stack([*places, np.ones_like(places[0])], axis=-1)
        .reshape(-1, len(lines) + 1)
        .astype(dtype)
    )


@operator("AffineGrid", batch=leading)
def affine_grid(node: Node, theta: Array, size: Array) -> Array:
    grid = _affine_places(node, size, theta.dtype) @ np.swapaxes(theta, 1, 2)
    return grid.reshape(len(theta), *(int(n) for n in size[2:]), -1)


@vjp("AffineGrid", wrt="theta")
def affine_grid_theta(node: Node, R: Array, *, size: Array) -> Array:
    flat = R.reshape(len(R), -1, R.shape[-1])
    return np.swapaxes(flat, 1, 2) @ _affine_places(node, size, R.dtype)


def _region_points(node: Node, rois: Array) -> tuple[Array, Array]:
    """Where RoiAlign reads: coordinates (rois, bins, samples, 2), and how many samples count."""
    height, width = node["output_height"], node["output_width"]
    shift = 0.5 if node["coordinate_transformation_mode"] == "half_pixel" else 0.0
    begin = rois[:, 1::-1] * node["spatial_scale"] - shift  # y, x
    size = rois[:, :1:-1] * node["spatial_scale"] - shift - begin
    if not shift:
        size = np.maximum(size, 1)
    bins = np.array([height, width])
    ratio = node["sampling_ratio"]
    counts = np.full(size.shape, ratio) if ratio > 0 else np.ceil(size / bins).astype(int)
    most = counts.max(axis=0, initial=1)
    coordinates = []
    for i in range(2):
        k, b = np.arange(most[i]), np.arange(bins[i])
        step = (size[:, i] / bins[i])[:, None, None]
        offset = (k + 0.5)[None, None] / np.maximum(counts[:, i], 1)[:, None, None]
        coordinates.append(begin[:, i, None, None] + (b[None, :, None] + offset) * step)
    y, x = np.broadcast_arrays(
        coordinates[0][:, :, None, :, None], coordinates[1][:, None, :, None, :]
    )
    used = (np.arange(most[0])[:, None] < counts[:, 0, None, None]) & (
        np.arange(most[1]) < counts[:, 1, None, None]
    )
    points = np.stack([y, x], axis=-1).reshape(len(rois), height * width, -1, 2)
    return points, used.reshape(len(rois), 1, -1)


def _region_cells(node: Node, rois: Array) -> tuple[list[tuple[Array, Array]], Array]:
    """The cells around each sample with their weights; and which samples count."""
    extents = np.array(node.input_shapes[0][2:])
    points, used = _region_points(node, rois)
    beyond = ((points < -1) | (points > extents)).any(axis=-1)
    points = np.clip(points, 0, extents - 1)
    kernels = [_kernel("linear", points[..., i]) for i in range(2)]
    found = []
    for (y, wy, _), (x, wx, _) in itertools.product(*kernels):
        place = np.minimum(y, extents[0] - 1) * extents[1] + np.minimum(x, extents[1] - 1)
        found.append((place, np.where(beyond, 0, wy * wx)))
    return found, used


def _region_values(X: Array, cells: list[tuple[Array, Array]], batch_indices: Array) -> Array:
    """(cells of the kernel, rois, C, bins, samples): weighted, not yet added up."""
    planes = X.reshape(*X.shape[:2], -1)[batch_indices]
    rois = np.arange(len(planes))[:, None, None, None]
    channels = np.arange(X.shape[1])[:, None, None]
    return np.stack([w[:, None] * planes[rois, channels, p[:, None]] for p, w in cells])


@operator("RoiAlign")
def roi_align(node: Node, X: Array, rois: Array, batch_indices: Array) -> Array:
    """He et al. 2017. A maximum is that of the four weighted cells of every sample, as in ONNX."""
    cells, used = _region_cells(node, rois)
    values = _region_values(X, cells, batch_indices)
    if node["mode"] == "max":
        y = np.where(used[:, None], values, -np.inf).max(axis=(0, -1))
    else:
        y = np.where(used[:, None], values.sum(axis=0), 0).sum(axis=-1) / _count(used)
    return y.reshape(len(rois), X.shape[1], node["output_height"], node["output_width"])


def _count(used: Array) -> Array:
    return np.maximum(used.sum(axis=-1), 1)[..., None]


@vjp("RoiAlign", wrt="X")
def roi_align_X(node: Node, R: Array, *, X: Array, rois: Array, batch_indices: Array) -> Array:
    cells, used = _region_cells(node, rois)
    flat = R.reshape(*R.shape[:2], -1, 1)
    if node["mode"] == "max":
        values = np.where(used[:, None], _region_values(X, cells, batch_indices), -np.inf)
        order = np.moveaxis(values, 0, -1).reshape(*values.shape[1:4], -1)
        first = np.zeros_like(order, bool)
        np.put_along_axis(first, order.argmax(axis=-1)[..., None], True, axis=-1)
        shares = np.moveaxis(first.reshape(*values.shape[1:], len(cells)), -1, 0) * flat
    else:
        shares = np.broadcast_to(
            np.where(used[:, None], flat / _count(used)[:, None], 0),
            (len(cells), *R.shape[:2], *cells[0][0].shape[1:]),
        )
    gradient = np.zeros((*X.shape[:2], math.prod(X.shape[2:])), R.dtype)
    channels = np.arange(X.shape[1])[:, None, None]
    for (place, weight), share in zip(cells, shares, strict=True):
        where = (batch_indices[:, None, None, None], channels, place[:, None])
        np.add.at(gradient, where, share * weight[:, None])
    return gradient.reshape(X.shape)


def _pooled_cells(node: Node, X: Array, rois: Array) -> Array:
    """Where in X, flattened, the maximum of every bin of MaxRoiPool lies; −1 for an empty bin."""
    (height, width), (h, w) = X.shape[2:], node["pooled_shape"]
    best = np.full((len(rois), X.shape[1], h, w), -1)
    planes = np.arange(X.size).reshape(X.shape)
    for r, roi in enumerate(rois):
        left, top, right, bottom = np.floor(roi[1:] * node["spatial_scale"] + 0.5).astype(int)
        step = max(bottom - top + 1, 1) / h, max(right - left + 1, 1) / w
        for i, j in itertools.product(range(h), range(w)):
            rows = _bin(i, step[0], top, height)
            columns = _bin(j, step[1], left, width)
            region = X[int(roi[0]), :, rows, columns].reshape(X.shape[1], -1)
            if region.shape[1]:
                cells = planes[int(roi[0]), :, rows, columns].reshape(X.shape[1], -1)
                best[r, :, i, j] = cells[np.arange(X.shape[1]), region.argmax(axis=1)]
    return best


def _bin(i: int, step: float, begin: int, extent: int) -> slice:
    start, stop = math.floor(i * step) + begin, math.ceil((i + 1) * step) + begin
    return slice(min(max(start, 0), extent), min(max(stop, 0), extent))


@operator("MaxRoiPool")
def max_roi_pool(node: Node, X: Array, rois: Array) -> Array:
    """Girshick 2015; an empty bin is 0."""
    cells = _pooled_cells(node, X, rois)
    return np.where(cells < 0, 0, X.ravel()[cells])


@vjp("MaxRoiPool", wrt="X")
def max_roi_pool_X(node: Node, R: Array, *, X: Array, rois: Array) -> Array:
    cells = _pooled_cells(node, X, rois)
    gradient = np.zeros(X.size, R.dtype)
    np.add.at(gradient, cells[cells >= 0], R[cells >= 0])
    return gradient.reshape(X.shape)


def _blocks(node: Node) -> Window:
    """The window whose patches are the columns of Col2Im."""
    image, block = (tuple(int(n) for n in c) for c in node.constants[1:3] if c is not None)
    rank = len(image)
    strides = node.attributes.get("strides", (1,) * rank)
    dilations = node.attributes.get("dilations", (1,) * rank)
    pads = node.attributes.get("pads", (0,) * 2 * rank)
    output = tuple(
        (n + pads[i] + pads[rank + i] - (k - 1) * dilations[i] - 1) // strides[i] + 1
        for i, (n, k) in enumerate(zip(image, block, strict=True))
    )
    return Window(image, output, block, strides, dilations, pads)


@operator("Col2Im", batch=leading)
def col2im(node: Node, input: Array, image_shape: Array, block_shape: Array) -> Array:
    window = _blocks(node)
    count = math.prod(window.kernel_shape)
    columns = input.reshape(len(input), -1, count, *window.output)
    padded = np.zeros((*columns.shape[:2], *window.padded_input), input.dtype)
    for i, (_, place) in enumerate(window.offsets()):
        padded[place] += columns[:, :, i]
    return window.crop(padded)


@vjp("Col2Im", wrt="input")
def col2im_input(node: Node, R: Array) -> Array:
    window = _blocks(node)
    padded = window.pad(R, 0)
    columns = np.stack([padded[place] for _, place in window.offsets()], axis=2)
    return columns.reshape(node.input_shapes[0])
