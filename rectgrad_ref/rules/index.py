"""Operators that pick cells by index, and those that write to them.

All are written with flat positions: where in the data, flattened, a cell of the indices points.
Picking reads there, its product with a gradient adds there, and scattering is the other way round.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .registry import Array, NotSamplewise, SampleAxis, leading, operator, vjp

if TYPE_CHECKING:
    from ..graph import Node


def _added(R: Array, positions: Array, shape: tuple[int, ...]) -> Array:
    """An array of `shape` in which every cell of `R` is added at its position."""
    total = np.bincount(positions.ravel(), R.ravel(), minlength=math.prod(shape))
    return total.reshape(shape).astype(R.dtype, copy=False)


def _cells(shape: tuple[int, ...]) -> Array:
    return np.arange(math.prod(shape)).reshape(shape)


def _element_positions(shape: tuple[int, ...], indices: Array, axis: int) -> Array:
    """Of GatherElements and ScatterElements: the cell itself, but for its place along `axis`."""
    places: list[Array] = list(np.indices(indices.shape, sparse=True))
    places[axis] = indices % shape[axis]
    return np.asarray(_cells(shape)[tuple(places)])


def _nd_positions(shape: tuple[int, ...], indices: Array, batch_dims: int = 0) -> Array:
    """Of GatherND and ScatterND: the last axis of the indices holds leading coordinates."""
    batch = np.indices(indices.shape[:-1], sparse=True)[:batch_dims]
    return np.asarray(_cells(shape)[(*batch, *np.moveaxis(indices, -1, 0))])


def _same_axis(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    """Data and indices (and updates) carry the samples on one axis, which is not indexed."""
    shape = node.input_shapes[0]
    given = {axis for axis in axes if axis is not None}
    if len(given) != 1 or axes[0] is None or axes[0] == node["axis"] % len(shape):
        raise NotSamplewise
    (sample,) = given
    whole = (s[sample] == shape[sample] for s in node.input_shapes[1:])
    if not all(whole) or any(a is None and node.constants[i] is None for i, a in enumerate(axes)):
        raise NotSamplewise
    return sample


@operator("GatherElements", batch=_same_axis)
def gather_elements(node: Node, data: Array, indices: Array) -> Array:
    return data.ravel()[_element_positions(data.shape, indices, node["axis"])]


@vjp("GatherElements", wrt="data")
def gather_elements_data(node: Node, R: Array, *, indices: Array) -> Array:
    shape = node.input_shapes[0]
    return _added(R, _element_positions(shape, indices, node["axis"]), shape)


@operator("GatherND")
def gather_nd(node: Node, data: Array, indices: Array) -> Array:
    positions = _nd_positions(data.shape, indices, node["batch_dims"])
    return data.ravel()[positions]


@vjp("GatherND", wrt="data")
def gather_nd_data(node: Node, R: Array, *, indices: Array) -> Array:
    shape = node.input_shapes[0]
    return _added(R, _nd_positions(shape, indices, node["batch_dims"]), shape)


@operator("Compress")
def compress(node: Node, input: Array, condition: Array) -> Array:
    return input.ravel()[_kept(node, condition)]


@vjp("Compress", wrt="input")
def compress_input(node: Node, R: Array, *, condition: Array) -> Array:
    return _added(R, _kept(node, condition), node.input_shapes[0])


def _kept(node: Node, condition: Array) -> Array:
    cells = _cells(node.input_shapes[0])
    axis = node.attributes.get("axis")
    return np.compress(condition, cells.ravel() if axis is None else cells, axis=axis)


@operator("ReverseSequence")
def reverse_sequence(node: Node, input: Array, sequence_lens: Array) -> Array:
    return input.ravel()[_reversed(node, sequence_lens)]


@vjp("ReverseSequence", wrt="input")
def reverse_sequence_input(node: Node, R: Array, *, sequence_lens: Array) -> Array:
    return _added(R, _reversed(node, sequence_lens), node.input_shapes[0])


def _reversed(node: Node, sequence_lens: Array) -> Array:
    cells = np.moveaxis(_cells(node.input_shapes[0]), node["time_axis"], 0)
    steps, length = np.arange(len(cells))[:, None], sequence_lens[None, :]
    source = np.where(steps < length, length - 1 - steps, steps)
    picked = cells[source, np.arange(len(sequence_lens))[None, :]]
    return np.moveaxis(picked, 0, node["time_axis"])


# How updates meet what is there, and each other.
_COMBINE: dict[str, np.ufunc] = {
    "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum
}  # fmt: skip


def _scattered(data: Array, positions: Array, updates: Array, reduction: str) -> Array:
    flat = data.ravel().copy()
    if reduction == "none":
        flat[positions.ravel()] = updates.ravel()
    else:
        _COMBINE[reduction].at(flat, positions.ravel(), updates.ravel())
    return flat.reshape(data.shape)


def _scattered_data(
    node: Node, R: Array, positions: Array, data: Array, updates: Array, output: Array
) -> Array:
    """What the data keep of the gradient: where nothing was written, or their share."""
    reduction = node.attributes.get("reduction", "none")
    if reduction == "none":
        kept = R.ravel().copy()
        kept[positions.ravel()] = 0
        return kept.reshape(R.shape)
    if reduction == "add":
        return R
    if reduction == "mul":
        return R * _scattered(np.ones_like(data), positions, updates, "mul")
    return np.where(data == output, R, 0)


def _scattered_updates(
    node: Node, R: Array, positions: Array, data: Array, updates: Array, output: Array
) -> Array:
    """The last update of a cell counts; of a maximum the first, if the data did not attain it."""
    reduction = node.attributes.get("reduction", "none")
    flat, share = positions.ravel(), R.ravel()[positions]
    if reduction == "add":
        return share
    if reduction == "mul":
        return share * _others(data, flat, updates)
    order = np.arange(flat.size)
    if reduction == "none":
        winner = np.zeros(R.size, int)
        winner[flat] = order
    else:
        candidates = updates.ravel() == output.ravel()[flat]
        winner = np.full(R.size, -1)
        winner[flat[candidates][::-1]] = order[candidates][::-1]
        winner[(data == output).ravel()] = -1
    return np.where((winner[flat] == order).reshape(share.shape), share, 0)


def _others(data: Array, flat: Array, updates: Array) -> Array:
    """The product of the datum and of all other updates of the same cell, zeros or not."""
    zero = updates.ravel() == 0
    product, zeros = data.ravel().copy(), np.zeros(data.size, int)
    np.multiply.at(product, flat, np.where(zero, 1, updates.ravel()))
    np.add.at(zeros, flat, zero)
    alone = np.where(zero, product[flat], product[flat] / np.where(zero, 1, updates.ravel()))
    return np.where(zeros[flat] == zero, alone, 0).reshape(updates.shape)


@operator("ScatterElements", batch=_same_axis)
def scatter_elements(node: Node, data: Array, indices: Array, updates: Array) -> Array:
    positions = _element_positions(data.shape, indices, node["axis"])
    return _scattered(data, positions, updates, node.attributes.get("reduction", "none"))


@vjp("ScatterElements", wrt="data")
def scatter_elements_data(
    node: Node, R: Array, *, data: Array, indices: Array, updates: Array, output: Array
) -> Array:
    positions = _element_positions(data.shape, indices, node["axis"])
    return _scattered_data(node, R, positions, data, updates, output)


@vjp("ScatterElements", wrt="updates")
def scatter_elements_updates(
    node: Node, R: Array, *, data: Array, indices: Array, updates: Array, output: Array
) -> Array:
    positions = _element_positions(data.shape, indices, node["axis"])
    return _scattered_updates(node, R, positions, data, updates, output)


def _spread_updates(data: Array, indices: Array, updates: Array) -> tuple[Array, Array]:
    """Positions and updates of ScatterND, in one shape."""
    positions = _nd_positions(data.shape, indices)
    return positions, updates.reshape(positions.shape)


@operator("ScatterND")
def scatter_nd(node: Node, data: Array, indices: Array, updates: Array) -> Array:
    reduction = node.attributes.get("reduction", "none")
    return _scattered(data, *_spread_updates(data, indices, updates), reduction)


@vjp("ScatterND", wrt="data")
def scatter_nd_data(
    node: Node, R: Array, *, data: Array, indices: Array, updates: Array, output: Array
) -> Array:
    positions, flat = _spread_updates(data, indices, updates)
    return _scattered_data(node, R, positions, data, flat, output)


@vjp("ScatterND", wrt="updates")
def scatter_nd_updates(
    node: Node, R: Array, *, data: Array, indices: Array, updates: Array, output: Array
) -> Array:
    positions, flat = _spread_updates(data, indices, updates)
    return _scattered_updates(node, R, positions, data, flat, output).reshape(updates.shape)


def _cache_positions(node: Node, write_indices: Array | None) -> Array:
    """Where TensorScatter writes each cell of the update, from `write_indices` on."""
    cache, update = node.input_shapes[:2]
    axis = node["axis"] % len(cache)
    begins = np.zeros(cache[0], int) if write_indices is None else write_indices
    places: list[Array] = list(np.indices(update, sparse=True))
    places[axis] = places[axis] + begins.reshape(-1, *(1,) * (len(cache) - 1))
    if node["mode"] == "circular":
        places[axis] = places[axis] % cache[axis]
    return np.asarray(_cells(cache)[tuple(places)])


@operator("TensorScatter")
def tensor_scatter(
    node: Node, past_cache: Array, update: Array, write_indices: Array | None = None
) -> Array:
    return _scattered(past_cache, _cache_positions(node, write_indices), update, "none")


@vjp("TensorScatter", wrt="past_cache")
def tensor_scatter_cache(node: Node, R: Array, *, write_indices: Array | None) -> Array:
    kept = R.ravel().copy()
    kept[_cache_positions(node, write_indices).ravel()] = 0
    return kept.reshape(R.shape)


@vjp("TensorScatter", wrt="update")
def tensor_scatter_update(node: Node, R: Array, *, write_indices: Array | None) -> Array:
    return R.ravel()[_cache_positions(node, write_indices)]


def _beside(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    if axes[0] is None or axes[0] == node["axis"] % len(node.input_shapes[0]):
        raise NotSamplewise
    return axes[0]


@operator("TopK", batch=_beside)
def top_k(node: Node, X: Array, K: Array) -> tuple[Array, Array]:
    """The K extreme units in order; of equal ones, the first."""
    axis = node["axis"] % X.ndim
    if node.attributes.get("largest", 1):
        order = (
            X.shape[axis]
            - 1
            - np.flip(np.argsort(np.flip(X, axis), axis=axis, kind="stable"), axis)
        )
    else:
        order = np.argsort(X, axis=axis, kind="stable")
    indices = np.take(order, range(int(K.item())), axis=axis)
    return np.take_along_axis(X, indices, axis), indices


@vjp("TopK", wrt="X")
def top_k_X(node: Node, R: Array, *, Indices: Array) -> Array:
    gradient = np.zeros(node.input_shapes[0], R.dtype)
    np.put_along_axis(gradient, Indices, R, axis=node["axis"])
    return gradient


def _above_the_matrix(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    if axes[0] is None or axes[0] >= len(node.input_shapes[0]) - 2:
        raise NotSamplewise
    return axes[0]


@operator("Trilu", batch=_above_the_matrix)
def trilu(node: Node, input: Array, k: Array | None = None) -> Array:
    triangle = np.triu if node["upper"] else np.tril
    return triangle(input, 0 if k is None else int(k.item()))


@vjp("Trilu", wrt="input")
def trilu_input(node: Node, R: Array, *, k: Array | None) -> Array:
    return trilu(node, R, k)


def _blocks(node: Node, x: Array, inverse: bool = False) -> Array:
    """DepthToSpace, or the other way round."""
    b, dcr = node["blocksize"], node.attributes.get("mode", "DCR") == "DCR"
    n, c, h, w = x.shape
    if inverse:
        split = x.reshape(n, c, h // b, b, w // b, b)
        moved = split.transpose((0, 3, 5, 1, 2, 4) if dcr else (0, 1, 3, 5, 2, 4))
        return moved.reshape(n, c * b * b, h // b, w // b)
    c //= b * b
    split = x.reshape((n, b, b, c, h, w) if dcr else (n, c, b, b, h, w))
    moved = split.transpose((0, 3, 4, 1, 5, 2) if dcr else (0, 1, 4, 2, 5, 3))
    return moved.reshape(n, c, h * b, w * b)


@operator("DepthToSpace", batch=leading)
def depth_to_space(node: Node, input: Array) -> Array:
    return _blocks(node, input)


@vjp("DepthToSpace", wrt="input")
def depth_to_space_input(node: Node, R: Array) -> Array:
    return _blocks(node, R, inverse=True)


@operator("SpaceToDepth", batch=leading)
def space_to_depth(node: Node, input: Array) -> Array:
    return _blocks(node, input, inverse=True)


@vjp("SpaceToDepth", wrt="input")
def space_to_depth_input(node: Node, R: Array) -> Array:
    return _blocks(node, R)


@operator("OneHot")
def one_hot(node: Node, indices: Array, depth: Array, values: Array) -> Array:
    """Its gradient would be that of `values`, which are constants."""
    classes = np.arange(int(depth.item()))
    rank = indices.ndim + 1
    axis = node["axis"] % rank
    hot = np.expand_dims(indices % len(classes), axis) == classes.reshape(
        [-1 if i == axis else 1 for i in range(rank)]
    )
    inside = (indices >= -len(classes)) & (indices < len(classes))
    return np.where(hot & np.expand_dims(inside, axis), values[1], values[0])


@operator("EyeLike")
def eye_like(node: Node, input: Array) -> Array:
    from onnx import helper

    kind = node.attributes.get("dtype")
    dtype = input.dtype if kind is None else helper.tensor_dtype_to_np_dtype(kind)
    rows, columns = input.shape
    return np.eye(rows, columns, k=node["k"]).astype(dtype)


@operator("NonZero")
def non_zero(node: Node, X: Array) -> Array:
    return np.array(np.nonzero(X))
