"""Reductions over axes; without the input ``axes``, over all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .registry import Array, NotSamplewise, SampleAxis, operator, vjp

if TYPE_CHECKING:
    from ..graph import Node


def _axes(node: Node, rank: int, axes: Array | None) -> tuple[int, ...]:
    if axes is None or axes.size == 0:
        return () if node.attributes.get("noop_with_empty_axes") else tuple(range(rank))
    return tuple(sorted(int(a) % rank for a in axes))


def _keeps(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    """The sample axis must not be reduced; without ``keepdims`` it moves to the front."""
    shape, sample = node.input_shapes[0], axes[0]
    known = len(node.inputs) < 2 or not node.inputs[1] or node.constants[1] is not None
    if sample is None or not known:
        raise NotSamplewise
    reduced = _axes(node, len(shape), node.constants[1] if len(node.inputs) > 1 else None)
    if sample in reduced:
        raise NotSamplewise
    return sample if node["keepdims"] else sample - sum(axis < sample for axis in reduced)


@operator("ReduceMean", batch=_keeps)
def reduce_mean(node: Node, data: Array, axes: Array | None = None) -> Array:
    return np.asarray(data.mean(axis=_axes(node, data.ndim, axes), keepdims=bool(node["keepdims"])))


@operator("ReduceSum", batch=_keeps)
def reduce_sum(node: Node, data: Array, axes: Array | None = None) -> Array:
    return np.asarray(data.sum(axis=_axes(node, data.ndim, axes), keepdims=bool(node["keepdims"])))


@operator("ReduceMax", batch=_keeps)
def reduce_max(node: Node, data: Array, axes: Array | None = None) -> Array:
    return np.asarray(data.max(axis=_axes(node, data.ndim, axes), keepdims=bool(node["keepdims"])))


@operator("ReduceMin", batch=_keeps)
def reduce_min(node: Node, data: Array, axes: Array | None = None) -> Array:
    return np.asarray(data.min(axis=_axes(node, data.ndim, axes), keepdims=bool(node["keepdims"])))


@operator("ReduceProd", batch=_keeps)
def reduce_prod(node: Node, data: Array, axes: Array | None = None) -> Array:
    return np.asarray(data.prod(axis=_axes(node, data.ndim, axes), keepdims=bool(node["keepdims"])))


def _expanded(node: Node, R: Array, reduced: tuple[int, ...]) -> Array:
    """`R` with the reduced axes back, as extents of 1."""
    shape = node.input_shapes[0]
    return R.reshape([1 if i in reduced else n for i, n in enumerate(shape)])


@vjp("ReduceMean", "ReduceSum", wrt="data")
def reduce_data(node: Node, R: Array, *, axes: Array | None) -> Array:
    shape = node.input_shapes[0]
    reduced = _axes(node, len(shape), axes)
    gradient = np.broadcast_to(_expanded(node, R, reduced), shape)
    if node.op == "ReduceSum":
        return gradient
    return gradient / int(np.prod([shape[i] for i in reduced]))


@vjp("ReduceMax", "ReduceMin", wrt="data")
def extremum_data(node: Node, R: Array, *, data: Array, axes: Array | None) -> Array:
    """To the first unit, in row-major order, that attains the extremum."""
    over = _axes(node, data.ndim, axes)
    kept = tuple(i for i in range(data.ndim) if i not in over)
    moved = data.transpose(*kept, *over)
    flat = moved.reshape(*moved.shape[: len(kept)], -1)
    winner = (flat.argmax if node.op == "ReduceMax" else flat.argmin)(axis=-1)
    gradient = np.zeros_like(flat)
    np.put_along_axis(gradient, winner[..., None], R.reshape(*winner.shape, 1), axis=-1)
    return gradient.reshape(moved.shape).transpose(np.argsort((*kept, *over)))
