"""Pooling: maxima, averages, and the ways in which a gradient goes back through them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .registry import Array, leading, operator, primitive, vjp
from .window import Window

if TYPE_CHECKING:
    from ..graph import Node


@operator("MaxPool", batch=leading)
def max_pool(node: Node, X: Array) -> Array | tuple[Array, Array]:
    window = Window.of(node)
    padded = window.pad(X, _lowest(X.dtype))
    y = np.full((*X.shape[:2], *window.output), _lowest(X.dtype), X.dtype)
    for _, place in window.offsets():
        np.maximum(y, padded[place], out=y)
    return (y, _max_indices(node, X, y, window)) if len(node.outputs) > 1 else y


def _lowest(dtype: np.dtype) -> float:
    return -np.inf if dtype.kind == "f" else np.iinfo(dtype).min


def _max_indices(node: Node, X: Array, Y: Array, window: Window) -> Array:
    """Where in X, flattened, the first maximum of each window lies."""
    plane: Array = np.arange(math.prod(window.input))
    if node["storage_order"]:
        plane = plane.reshape(window.input[::-1]).transpose()
    else:
        plane = plane.reshape(window.input)
    planes = np.arange(X.shape[0] * X.shape[1]).reshape(*X.shape[:2], *(1,) * plane.ndim)
    cells = window.pad(planes * plane.size + plane, 0)
    padded = window.pad(X, _lowest(X.dtype))
    result = np.full(Y.shape, -1)
    for _, place in window.offsets():
        result = np.where((result < 0) & (padded[place] == Y), cells[place], result)
    return result


@vjp("MaxPool", wrt="X")
@primitive
def max_pool_X(node: Node, R: Array, *, X: Array, Y: Array) -> Array:
    """To the first maximum in row-major window order."""
    window = Window.of(node)
    padded = window.pad(X, -np.inf)
    gradient = np.zeros_like(padded)
    pending = np.ones(R.shape, bool)
    for _, place in window.offsets():
        hit = pending & (padded[place] == Y)
        gradient[place] += np.where(hit, R, 0)
        pending &= ~hit
    return window.crop(gradient)


def max_pool_split(node: Node, R: Array, X: Array, Y: Array) -> Array:
    """Equally to all units that attain the maximum."""
    window = Window.of(node)
    padded = window.pad(X, -np.inf)
    places = [place for _, place in window.offsets()]
    ties = np.zeros_like(R)
    for place in places:
        ties += padded[place] == Y
    share, gradient = R / ties, np.zeros_like(padded)
    for place in places:
        gradient[place] += np.where(padded[place] == Y, share, 0)
    return window.crop(gradient)


def max_pool_redistribute(node: Node, R: Array, X: Array, eps: float) -> Array:
    """Proportionally to the activations: x · avgpoolᵀ(R / (avgpool(x) + eps)), paper D.3.

    Padding is not counted; both directions use the same divisor.
    """
    window = Window.of(node)
    count = _valid_cells(window, R.dtype)
    average = sum_windows(window, X) / count
    return X * spread(window, R / (average + eps) / count)


@operator("AveragePool", batch=leading)
def average_pool(node: Node, X: Array) -> Array:
    window = Window.of(node)
    return sum_windows(window, X) / _divisor(node, window, X.dtype)


@vjp("AveragePool", wrt="X")
def average_pool_X(node: Node, R: Array) -> Array:
    window = Window.of(node)
    return spread(window, R / _divisor(node, window, R.dtype))


@primitive
def sum_windows(window: Window, x: Array) -> Array:
    padded = window.pad(x, 0)
    y = np.zeros_like(x, shape=(*x.shape[:2], *window.output))
    for _, place in window.offsets():
        y += padded[place]
    return y


@primitive
def spread(window: Window, R: Array) -> Array:
    """The transpose of `sum_windows`."""
    padded = np.zeros_like(R, shape=(*R.shape[:2], *window.padded_input))
    for _, place in window.offsets():
        padded[place] += R
    return window.crop(padded)


def _valid_cells(window: Window, dtype: np.dtype) -> Array:
    """How many cells of the unpadded input each window reads, shape (1, 1, *output)."""
    return sum_windows(window, np.ones((1, 1, *window.input), dtype))


def _divisor(node: Node, window: Window, dtype: np.dtype) -> Array:
    """Cells that an average counts: with ``count_include_pad`` those of the padding too.

    What ``ceil_mode`` reads beyond the padding never counts.
    """
    if not node["count_include_pad"]:
        return _valid_cells(window, dtype)
    counted = np.zeros((1, 1, *window.padded_input), dtype)
    counted[tuple(slice(0, n) for n in (1, 1, *window.declared_input))] = 1
    total = np.zeros((1, 1, *window.output), dtype)
    for _, place in window.offsets():
        total += counted[place]
    return total


def _spatial_axes(x: Array) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


@operator("GlobalAveragePool", batch=leading)
def global_average_pool(node: Node, X: Array) -> Array:
    return X.mean(axis=_spatial_axes(X), keepdims=True)


@vjp("GlobalAveragePool", wrt="X")
def global_average_pool_X(node: Node, R: Array) -> Array:
    shape = node.input_shapes[0]
    cells = int(np.prod(shape[2:]))
    return np.broadcast_to(R / cells, shape)


@operator("GlobalMaxPool", batch=leading)
def global_max_pool(node: Node, X: Array) -> Array:
    return X.max(axis=_spatial_axes(X), keepdims=True)


@vjp("GlobalMaxPool", wrt="X")
def global_max_pool_X(node: Node, R: Array, *, X: Array) -> Array:
    """To the first maximum in row-major order."""
    flat = X.reshape(*X.shape[:2], -1)
    gradient = np.zeros_like(flat)
    np.put_along_axis(gradient, flat.argmax(axis=2)[..., None], R.reshape(*X.shape[:2], 1), axis=2)
    return gradient.reshape(X.shape)


@operator("LpPool", batch=leading)
def lp_pool(node: Node, X: Array) -> Array:
    return sum_windows(Window.of(node), np.abs(X) ** node["p"]) ** (1 / node["p"])


@vjp("LpPool", wrt="X")
def lp_pool_X(node: Node, R: Array, *, X: Array, Y: Array) -> Array:
    return _lp_slope(node, X) * spread(Window.of(node), _lp_share(node, R, Y))


@operator("GlobalLpPool", batch=leading)
def global_lp_pool(node: Node, X: Array) -> Array:
    total = (np.abs(X) ** node["p"]).sum(axis=_spatial_axes(X), keepdims=True)
    return total ** (1 / node["p"])


@vjp("GlobalLpPool", wrt="X")
def global_lp_pool_X(node: Node, R: Array, *, X: Array, Y: Array) -> Array:
    return _lp_slope(node, X) * _lp_share(node, R, Y)


def _lp_share(node: Node, R: Array, Y: Array) -> Array:
    """R · y^(1−p); where the norm is 0, its derivative is taken as 0."""
    return np.where(Y == 0, 0, R * np.where(Y == 0, 1, Y) ** (1 - node["p"]))


def _lp_slope(node: Node, X: Array) -> Array:
    return np.sign(X) * np.abs(X) ** (node["p"] - 1)


@operator("MaxUnpool", batch=leading)
def max_unpool(node: Node, X: Array, I: Array, output_shape: Array | None = None) -> Array:  # noqa: E741
    """The indices belong to the smallest shape that was pooled so; what is beyond it is 0."""
    smallest = np.zeros(_unpooled(node), X.dtype)
    smallest.ravel()[I.ravel()] = X.ravel()
    if output_shape is None:
        return smallest
    y = np.zeros(tuple(int(n) for n in output_shape), X.dtype)
    y[_corner(smallest.shape)] = smallest
    return y


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(n) for n in shape)


def _unpooled(node: Node) -> tuple[int, ...]:
    """The shape of what was pooled, as far as the window tells."""
    batch, channels, *spatial = node.input_shapes[0]
    rank = len(spatial)
    pads, strides = node["pads"], node["strides"]
    return (
        batch,
        channels,
        *(
            (n - 1) * strides[i] + node["kernel_shape"][i] - pads[i] - pads[rank + i]
            for i, n in enumerate(spatial)
        ),
    )


@vjp("MaxUnpool", wrt="X")
def max_unpool_X(node: Node, R: Array, *, I: Array) -> Array:  # noqa: E741
    return R[_corner(_unpooled(node))].ravel()[I]
