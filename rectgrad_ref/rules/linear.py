"""Convolutions and matrix products.

A convolution is a sum over kernel offsets k of small matrix products,

    y[o] = Σₖ Wₖ · x[o·stride + k·dilation − pad],

so its transpose scatters Wₖᵀ · R[o] back to the same places. Both are written as a loop over k with
one BLAS call per offset: no unfolded copy of the input is ever made.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import unbroadcast
from .registry import Array, NotSamplewise, SampleAxis, leading, operator, primitive, vjp
from .window import Window

if TYPE_CHECKING:
    from ..graph import Node


def _grouped(weights: Array, group: int) -> Array:
    """(G·M, C, *kernel) → (*kernel, G, M, C), so that one offset is a stack of matrices."""
    rank = weights.ndim - 2
    split = weights.reshape(group, weights.shape[0] // group, *weights.shape[1:])
    return split.transpose(*range(3, 3 + rank), 0, 1, 2)


def _columns(x: Array, group: int) -> Array:
    """(N, G·C, *spatial) → (N, G, C, L)."""
    return x.reshape(x.shape[0], group, x.shape[1] // group, -1)


def _gather(node: Node, x: Array, weights: Array, window: Window) -> Array:
    """Σₖ Wₖ · x at offset k; weights (*kernel, G, M, C)."""
    group, padded = node["group"], window.pad(x, 0)
    y = np.zeros_like(x, shape=(x.shape[0], *weights.shape[-3:-1], math.prod(window.output)))
    for k, place in window.offsets():
        y += weights[k] @ _columns(padded[place], group)
    return y.reshape(x.shape[0], -1, *window.output)


def _scatter(node: Node, R: Array, weights: Array, window: Window) -> Array:
    """Σₖ Wₖᵀ · R added at offset k; weights (*kernel, G, M, C)."""
    group = node["group"]
    channels = group * weights.shape[-1]
    padded = np.zeros_like(R, shape=(R.shape[0], channels, *window.padded_input))
    columns = _columns(R, group)
    for k, place in window.offsets():
        part = np.swapaxes(weights[k], -1, -2) @ columns
        padded[place] += part.reshape(R.shape[0], channels, *window.output)
    return window.crop(padded)


def _spatial_product(x: Array, R: Array, node: Node, window: Window) -> Array:
    """The gradient with respect to weights (G·M, C, *kernel)."""
    group = node["group"]
    padded = window.pad(x, 0)
    columns = _columns(R, group)
    result = np.empty((*window.kernel_shape, group, columns.shape[2], x.shape[1] // group), R.dtype)
    for k, place in window.offsets():
        patch = _columns(padded[place], group)
        result[k] = (columns @ np.swapaxes(patch, -1, -2)).sum(axis=0)
    rank = len(window.kernel_shape)
    split = result.transpose(rank, rank + 1, rank + 2, *range(rank))
    return split.reshape(-1, *split.shape[2:])


def _per_channel(bias: Array, rank: int) -> Array:
    return bias.reshape(-1, *(1,) * (rank - 2))


@operator("Conv", batch=leading)
def conv(node: Node, X: Array, W: Array, B: Array | None = None) -> Array:
    y = _gather(node, X, _grouped(W, node["group"]), Window.of(node))
    return y if B is None else y + _per_channel(B, X.ndim)


@vjp("Conv", wrt="X")
@primitive
def conv_X(node: Node, R: Array, *, W: Array) -> Array:
    return _scatter(node, R, _grouped(W, node["group"]), Window.of(node))


@vjp("Conv", wrt="W")
def conv_W(node: Node, R: Array, *, X: Array) -> Array:
    return _spatial_product(X, R, node, Window.of(node))


@operator("ConvTranspose", batch=leading)
def conv_transpose(node: Node, X: Array, W: Array, B: Array | None = None) -> Array:
    y = _scatter(node, X, _grouped(W, node["group"]), Window.of_transpose(node))
    return y if B is None else y + _per_channel(B, X.ndim)


@vjp("Conv", "ConvTranspose", wrt="B")
def conv_B(node: Node, R: Array) -> Array:
    return R.sum(axis=(0, *range(2, R.ndim)))


@vjp("ConvTranspose", wrt="X")
@primitive
def conv_transpose_X(node: Node, R: Array, *, W: Array) -> Array:
    return _gather(node, R, _grouped(W, node["group"]), Window.of_transpose(node))


@vjp("ConvTranspose", wrt="W")
def conv_transpose_W(node: Node, R: Array, *, X: Array) -> Array:
    return _spatial_product(R, X, node, Window.of_transpose(node))


def _gemm_batch(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    if axes[0] != (1 if node["transA"] else 0) or any(a is not None for a in axes[1:]):
        raise NotSamplewise
    C_shape = (*node.input_shapes, ())[2]
    if len(C_shape) == 2 and C_shape[0] != 1:
        raise NotSamplewise  # a constant that differs from sample to sample
    return 0


@operator("Gemm", batch=_gemm_batch)
def gemm(node: Node, A: Array, B: Array, C: Array | None = None) -> Array:
    y = (A.T if node["transA"] else A) @ (B.T if node["transB"] else B)
    if node["alpha"] != 1:
        y = node["alpha"] * y
    if C is None:
        return y
    return y + (C if node["beta"] == 1 else node["beta"] * C)


@vjp("Gemm", wrt="A")
def gemm_A(node: Node, R: Array, *, B: Array) -> Array:
    gradient = R @ (B if node["transB"] else B.T)
    if node["alpha"] != 1:
        gradient = node["alpha"] * gradient
    return gradient.T if node["transA"] else gradient


@vjp("Gemm", wrt="B")
def gemm_B(node: Node, R: Array, *, A: Array) -> Array:
    gradient = node["alpha"] * ((A if node["transA"] else A.T) @ R)
    return gradient.T if node["transB"] else gradient


@vjp("Gemm", wrt="C")
def gemm_C(node: Node, R: Array) -> Array:
    return unbroadcast(node["beta"] * R, node.input_shapes[2])


def _matmul_batch(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    """The sample axis may be any but the one that is summed over."""
    rank = len(node.output_shapes[0])
    found = set()
    for position, (shape, axis) in enumerate(zip(node.input_shapes, axes, strict=True)):
        if axis is None:
            continue
        from_end = axis - len(shape)
        summed = -1 if position == 0 else (-2 if len(shape) > 1 else -1)
        if from_end == summed:
            raise NotSamplewise
        if len(shape) == 1 or len(node.input_shapes[1 - position]) == 1:
            raise NotSamplewise  # a vector operand drops an axis; nothing real needs it
        found.add(rank + from_end)
    if len(found) != 1 or (all(a is not None for a in axes) and min(found) >= rank - 2):
        raise NotSamplewise
    (result,) = found
    for shape, axis in zip(node.input_shapes, axes, strict=True):
        own = result - (rank - len(shape))
        if axis is None and result < rank - 2 and own >= 0 and shape[own] != 1:
            raise NotSamplewise
    return result


@operator("MatMul", batch=_matmul_batch)
def matmul(node: Node, A: Array, B: Array) -> Array:
    return A @ B


@vjp("MatMul", wrt="A")
def matmul_A(node: Node, R: Array, *, B: Array) -> Array:
    shape = node.input_shapes[0]
    matrix = B[:, None] if B.ndim == 1 else B
    product = _matrix_gradient(node, R) @ np.swapaxes(matrix, -1, -2)
    return unbroadcast(product, (1, *shape) if len(shape) == 1 else shape).reshape(shape)


@vjp("MatMul", wrt="B")
def matmul_B(node: Node, R: Array, *, A: Array) -> Array:
    shape = node.input_shapes[1]
    matrix = A[None, :] if A.ndim == 1 else A
    product = np.swapaxes(matrix, -1, -2) @ _matrix_gradient(node, R)
    return unbroadcast(product, (*shape, 1) if len(shape) == 1 else shape).reshape(shape)


def _matrix_gradient(node: Node, R: Array) -> Array:
    """Give back the axes that NumPy's matmul drops for vector operands."""
    if len(node.input_shapes[1]) == 1:
        R = R[..., None]
    return R[..., None, :] if len(node.input_shapes[0]) == 1 else R
