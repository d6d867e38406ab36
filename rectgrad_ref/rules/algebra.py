"""Einstein sums, determinants, cumulative sums and products, Fourier transforms."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import unbroadcast
from .registry import Array, NotSamplewise, SampleAxis, operator, vjp

if TYPE_CHECKING:
    from ..graph import Node


def _labels(node: Node) -> tuple[list[str], str]:
    """A letter for every axis of the operands and of the result; ``...`` becomes free letters."""
    equation = node["equation"].replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted(set(left) - {",", "."})
        right = ("..." if "..." in left else "") + "".join(
            letter for letter in letters if left.count(letter) == 1
        )
    free = "".join(letter for letter in string.ascii_letters if letter not in equation)
    pairs = list(zip(terms, node.input_shapes, strict=True))
    hidden = [len(shape) - len(t.replace("...", "")) for t, shape in pairs]
    names = free[: max(hidden, default=0)]
    operands = [
        t.replace("...", names[len(names) - n :]) for t, n in zip(terms, hidden, strict=True)
    ]
    return operands, right.replace("...", names)


def _einsum_batch(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    """The samples must have one letter, which stays, and which no other operand has."""
    operands, result = _labels(node)
    letters = {t[axis] for t, axis in zip(operands, axes, strict=True) if axis is not None}
    if len(letters) != 1 or not letters <= set(result):
        raise NotSamplewise
    (letter,) = letters
    if any(letter in t for t, axis in zip(operands, axes, strict=True) if axis is None):
        raise NotSamplewise
    if any(t.count(letter) > 1 for t in operands):
        raise NotSamplewise
    return result.index(letter)


@operator("Einsum", batch=_einsum_batch)
def einsum(node: Node, *Inputs: Array) -> Array:
    operands, result = _labels(node)
    return np.asarray(np.einsum(f"{','.join(operands)}->{result}", *Inputs, optimize=True))


@vjp("Einsum", wrt="Inputs")
def einsum_inputs(node: Node, R: Array, *, index: int, Inputs: tuple[Array, ...]) -> Array:
    """The same sum with the gradient in the operand's place; on the diagonal of repeated axes."""
    operands, result = _labels(node)
    shape, wanted = node.input_shapes[index], operands[index]
    others = [(t, x) for i, (t, x) in enumerate(zip(operands, Inputs, strict=True)) if i != index]
    extents = dict(zip(wanted, shape, strict=True))
    distinct = "".join(extents)
    # An axis that is summed over in this operand alone gets the same gradient everywhere.
    known = result + "".join(t for t, _ in others)
    others += [(c, np.ones(extents[c], R.dtype)) for c in distinct if c not in known]
    terms, arrays = [result, *(t for t, _ in others)], [R, *(x for _, x in others)]
    gradient = np.einsum(f"{','.join(terms)}->{distinct}", *arrays, optimize=True)
    gradient = unbroadcast(gradient, tuple(extents.values()))
    if len(distinct) == len(wanted):
        return gradient
    full = np.zeros(shape, R.dtype)
    np.einsum(f"{wanted}->{distinct}", full)[...] = gradient
    return full


@operator("Det")
def det(node: Node, X: Array) -> Array:
    return np.asarray(np.linalg.det(X))


@vjp("Det", wrt="X")
def det_X(node: Node, R: Array, *, X: Array, Y: Array) -> Array:
    return (R * Y)[..., None, None] * np.swapaxes(np.linalg.inv(X), -1, -2)


def _other_axis(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    axis = node.constants[1]
    if axes[0] is None or axis is None or axes[0] == int(axis.item()) % len(node.input_shapes[0]):
        raise NotSamplewise
    return axes[0]


def _running(node: Node, x: Array, axis: Array, transposed: bool = False) -> Array:
    """The sums up to each cell, from the front or from the back, without or with the cell."""
    where = int(axis.item())
    backwards = bool(node["reverse"]) != transposed
    y = np.cumsum(np.flip(x, where) if backwards else x, axis=where)
    y = np.flip(y, where) if backwards else y
    return y - x if node["exclusive"] else y


@operator("CumSum", batch=_other_axis)
def cum_sum(node: Node, x: Array, axis: Array) -> Array:
    return _running(node, x, axis)


@vjp("CumSum", wrt="x")
def cum_sum_x(node: Node, R: Array, *, axis: Array) -> Array:
    return _running(node, R, axis, transposed=True)


def _in_order(node: Node, x: Array, axis: Array) -> Array:
    """The axis of a product in front, in the order in which factors are multiplied."""
    moved = np.moveaxis(x, int(axis.item()), 0)
    return moved[::-1] if node["reverse"] else moved


def _in_place(node: Node, x: Array, axis: Array) -> Array:
    return np.moveaxis(x[::-1] if node["reverse"] else x, 0, int(axis.item()))


def _before(factors: Array) -> Array:
    """The product of all factors before each."""
    first = np.ones_like(factors[:1])
    return np.concatenate([first, np.cumprod(factors[:-1], axis=0, dtype=factors.dtype)])


@operator("CumProd", batch=_other_axis)
def cum_prod(node: Node, x: Array, axis: Array) -> Array:
    factors = _in_order(node, x, axis)
    products = _before(factors) if node["exclusive"] else _before(factors) * factors
    return _in_place(node, products, axis)


@vjp("CumProd", wrt="x")
def cum_prod_x(node: Node, R: Array, *, x: Array, axis: Array) -> Array:
    """From the last product to the first and without a division, so that factors may be 0."""
    factors, total = _in_order(node, x, axis), _in_order(node, R, axis).copy()
    if node["exclusive"]:
        total = np.concatenate([total[1:], np.zeros_like(total[:1])])
    for i in reversed(range(len(total) - 1)):
        total[i] += factors[i + 1] * total[i + 1]
    return _in_place(node, total * _before(factors), axis)


def _transform_axis(node: Node, axis: Array | None) -> int:
    where = node.attributes.get("axis", -2) if axis is None else int(axis.item())
    return where % len(node.input_shapes[0])


def _fourier_batch(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    if any(v and c is None for v, c in zip(node.inputs[1:], node.constants[1:], strict=True)):
        raise NotSamplewise
    if axes[0] is None or axes[0] == _transform_axis(node, (*node.constants, None, None)[2]):
        raise NotSamplewise
    return axes[0]


def _fourier(length: int, before: tuple[int, int], after: tuple[int, int], inverse: bool) -> Array:
    """The transform as a real matrix (outputs, their parts, inputs, their parts).

    Numbers have one part, if they are real, or two. Inputs beyond `length` do not count.
    """
    rows, columns = np.arange(after[0])[:, None], np.arange(min(before[0], length))[None, :]
    angle = (1 if inverse else -1) * 2 * np.pi * (rows * columns % length) / length
    weight = np.full(columns.shape, 1 / length if inverse else 1.0)
    if inverse and after[1] == 1:  # real, so that the spectrum's other half mirrors this one
        weight[:, 1 : (length + 1) // 2] *= 2
    cos, sin = np.cos(angle) * weight, np.sin(angle) * weight
    matrix = np.zeros((*after, *before))
    parts = np.array([[cos, -sin], [sin, cos]])[: after[1], : before[1]]
    matrix[:, :, : columns.size] = parts.transpose(2, 0, 3, 1)
    return matrix


def _dft(node: Node, dft_length: Array | None, where: int, dtype: np.dtype) -> Array:
    shape, result = node.input_shapes[0], node.output_shapes[0]
    inverse = bool(node["inverse"])
    if dft_length is not None:
        length = int(dft_length.item())
    elif inverse and result[-1] == 1:
        length = result[where]
    else:
        length = shape[where]
    before, after = (shape[where], shape[-1]), (result[where], result[-1])
    return _fourier(length, before, after, inverse).astype(dtype)


@operator("DFT", batch=_fourier_batch)
def dft(
    node: Node, input: Array, dft_length: Array | None = None, axis: Array | None = None
) -> Array:
    where = _transform_axis(node, axis)
    matrix = _dft(node, dft_length, where, input.dtype)
    y = np.tensordot(np.moveaxis(input, where, -2), matrix, axes=((-2, -1), (2, 3)))
    return np.moveaxis(y, -2, where)


@vjp("DFT", wrt="input")
def dft_input(node: Node, R: Array, *, dft_length: Array | None, axis: Array | None) -> Array:
    where = _transform_axis(node, axis)
    matrix = _dft(node, dft_length, where, R.dtype)
    back = np.tensordot(np.moveaxis(R, where, -2), matrix, axes=((-2, -1), (0, 1)))
    return np.moveaxis(back, -2, where)
