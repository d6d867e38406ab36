"""Reductions over axes; without the input ``axes``, over all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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


def _log_sum_exp(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    top = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    result = np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top
    return result if keepdims else result.squeeze(axis)


def _lowest(dtype: np.dtype) -> Any:
    """The maximum of nothing."""
    return False if dtype.kind == "b" else -np.inf if dtype.kind == "f" else np.iinfo(dtype).min


def _highest(dtype: np.dtype) -> Any:
    """The minimum of nothing."""
    return True if dtype.kind == "b" else np.inf if dtype.kind == "f" else np.iinfo(dtype).max


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "ReduceSum": np.sum,
    "ReduceMean": np.mean,
    "ReduceProd": np.prod,
    "ReduceMax": lambda x, axis, keepdims: np.max(
        x, axis=axis, keepdims=keepdims, initial=_lowest(x.dtype)
    ),
    "ReduceMin": lambda x, axis, keepdims: np.min(
        x, axis=axis, keepdims=keepdims, initial=_highest(x.dtype)
    ),
    "ReduceL1": lambda x, **over: np.sum(np.abs(x), **over),
    "ReduceL2": lambda x, **over: np.sqrt(np.sum(x * x, **over)),
    "ReduceSumSquare": lambda x, **over: np.sum(x * x, **over),
    "ReduceLogSum": lambda x, **over: np.log(np.sum(x, **over)),
    "ReduceLogSumExp": _log_sum_exp,
}


@operator(*_REDUCTIONS, batch=_keeps)
def reduce(node: Node, data: Array, axes: Array | None = None) -> Array:
    over = _axes(node, data.ndim, axes)
    reduced = _REDUCTIONS[node.op](data, axis=over, keepdims=bool(node["keepdims"]))
    return np.asarray(reduced).astype(data.dtype, copy=False)


# ∂y/∂x as a function of x and of y, which is broadcast along the reduced axes.
_SLOPES: dict[str, Callable[[Array, Array], Array]] = {
    "ReduceL1": lambda x, y: np.sign(x),
    "ReduceL2": lambda x, y: x / np.where(y == 0, 1, y),
    "ReduceSumSquare": lambda x, y: 2 * x,
    "ReduceLogSum": lambda x, y: np.broadcast_to(np.exp(-y), x.shape),
    "ReduceLogSumExp": lambda x, y: np.exp(x - y),
}


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


@vjp(*_SLOPES, wrt="data")
def reduce_nonlinear_data(
    node: Node, R: Array, *, data: Array, reduced: Array, axes: Array | None
) -> Array:
    over = _axes(node, data.ndim, axes)
    return _expanded(node, R, over) * _SLOPES[node.op](data, _expanded(node, reduced, over))


@vjp("ReduceProd", wrt="data")
def reduce_prod_data(node: Node, R: Array, *, data: Array, axes: Array | None) -> Array:
    """R times the product of all others, zeros among them or not."""
    over = _axes(node, data.ndim, axes)
    flat, restore = _last(data, over)
    ones = np.ones((*flat.shape[:-1], 1), flat.dtype)
    before = np.cumprod(np.concatenate([ones, flat], axis=-1), axis=-1)[..., :-1]
    after = np.cumprod(np.concatenate([ones, flat[..., ::-1]], axis=-1), axis=-1)[..., -2::-1]
    return _expanded(node, R, over) * restore(before * after)


def _last(x: Array, over: tuple[int, ...]) -> tuple[Array, Callable[[Array], Array]]:
    """The axes `over` as the one last axis, and the way back."""
    kept = tuple(i for i in range(x.ndim) if i not in over)
    moved = x.transpose(*kept, *over)
    flat = moved.reshape(*moved.shape[: len(kept)], math.prod(moved.shape[len(kept) :]))

    def restore(result: Array) -> Array:
        return result.reshape(moved.shape).transpose(np.argsort((*kept, *over)))

    return flat, restore


@vjp("ReduceMax", "ReduceMin", wrt="data")
def extremum_data(node: Node, R: Array, *, data: Array, axes: Array | None) -> Array:
    """To the first unit, in row-major order, that attains the extremum."""
    flat, restore = _last(data, _axes(node, data.ndim, axes))
    winner = (flat.argmax if node.op == "ReduceMax" else flat.argmin)(axis=-1)
    gradient = np.zeros_like(flat)
    np.put_along_axis(gradient, winner[..., None], R.reshape(*winner.shape, 1), axis=-1)
    return restore(gradient)


def _loses(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    sample, over = axes[0], node["axis"] % len(node.input_shapes[0])
    if sample is None or sample == over:
        raise NotSamplewise
    return sample if node["keepdims"] else sample - (over < sample)


@operator("ArgMax", "ArgMin", batch=_loses)
def arg_extremum(node: Node, data: Array) -> Array:
    find = np.argmax if node.op == "ArgMax" else np.argmin
    axis = node["axis"]
    if not node.attributes.get("select_last_index"):
        return find(data, axis=axis, keepdims=bool(node["keepdims"]))
    last = find(np.flip(data, axis), axis=axis, keepdims=bool(node["keepdims"]))
    return data.shape[axis] - 1 - last
