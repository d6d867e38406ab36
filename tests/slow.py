"""A slow second derivation of every method, sample by sample, from matrices and Python loops.

Written from the definitions alone; it shares no code with the package. A linear layer is its
Jacobian matrix, found by applying the layer to basis vectors; what a method does at an activation
or a max pool is written out unit by unit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from nets import Net, Op
from scipy.signal import correlate2d
from scipy.special import erf

Array = np.ndarray
Values = dict[str, Array]
# (op, z, a, R_out) of every sample → R_in of every sample
ActivationRule = Callable[[Op, list[Array], list[Array], list[Array]], list[Array]]
PoolRule = Callable[[Op, Array, Array, Array], Array]

FUNCTIONS: dict[str, Callable[[float, dict[str, Any], tuple[Array, ...]], float]] = {
    "Relu": lambda z, o, w: z if z > 0 else 0.0,
    "LeakyRelu": lambda z, o, w: z if z >= 0 else o.get("alpha", 0.01) * z,
    "Elu": lambda z, o, w: z if z >= 0 else o.get("alpha", 1.0) * (math.exp(z) - 1),
    "Sigmoid": lambda z, o, w: 1 / (1 + math.exp(-z)),
    "Tanh": lambda z, o, w: math.tanh(z),
    "Softplus": lambda z, o, w: math.log(1 + math.exp(z)),
    "Softsign": lambda z, o, w: z / (1 + abs(z)),
    "HardSwish": lambda z, o, w: z * min(max(z / 6 + 0.5, 0), 1),
    "Gelu": lambda z, o, w: 0.5 * z * (1 + float(erf(z / math.sqrt(2)))),
    "Clip": lambda z, o, w: min(max(z, float(w[0])), float(w[1])),
    "PRelu": lambda z, o, w: z if z >= 0 else float(w[0].item()) * z,
}


def apply(op: Op, *inputs: Array) -> Array:
    """The node's output for one sample."""
    if op.kind in FUNCTIONS:
        f = FUNCTIONS[op.kind]
        units = [f(float(z), op.attributes, op.weights) for z in inputs[0].ravel()]
        return np.array(units).reshape(inputs[0].shape)
    if op.kind == "Conv":
        return _conv(op, inputs[0])
    if op.kind == "Gemm":
        w, b = (np.asarray(v, np.float64) for v in op.weights)
        return inputs[0] @ w + b
    if op.kind == "Flatten":
        return inputs[0].ravel()
    if op.kind == "Add":
        return inputs[0] + inputs[1]
    if op.kind == "Concat":
        return np.concatenate(inputs)
    if op.kind == "GlobalAveragePool":
        return inputs[0].mean(axis=(1, 2), keepdims=True)
    if op.kind in ("MaxPool", "AveragePool"):
        reduce = max if op.kind == "MaxPool" else lambda cells: sum(cells) / len(cells)
        y = np.zeros((inputs[0].shape[0], *_pooled(op, inputs[0].shape)))
        for channel, place, cells in windows(op, inputs[0].shape):
            y[channel, *place] = reduce([inputs[0][channel, *cell] for cell in cells])
        return y
    raise KeyError(op.kind)


def _conv(op: Op, x: Array) -> Array:
    w, b = (np.asarray(v, np.float64) for v in op.weights)
    top, left, bottom, right = op.attributes["pads"]
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right)))
    sh, sw = op.attributes["strides"]
    maps = [
        sum(correlate2d(padded[c], w[m, c], "valid")[::sh, ::sw] for c in range(len(x))) + b[m]
        for m in range(len(w))
    ]
    return np.stack(maps)


def _pooled(op: Op, shape: Sequence[int]) -> list[int]:
    rounded = math.ceil if op.attributes["ceil_mode"] else math.floor
    pads = op.attributes["pads"]
    return [
        rounded((n + pads[i] + pads[i + 2] - k) / s) + 1
        for i, (n, k, s) in enumerate(
            zip(shape[1:], op.attributes["kernel_shape"], op.attributes["strides"], strict=True)
        )
    ]


def windows(
    op: Op, shape: Sequence[int]
) -> Iterator[tuple[int, tuple[int, ...], list[tuple[int, ...]]]]:
    """(channel, output cell, the input cells of its window in row-major order)."""
    kernel, strides, pads = (op.attributes[k] for k in ("kernel_shape", "strides", "pads"))
    for channel in range(shape[0]):
        for place in itertools.product(*map(range, _pooled(op, shape))):
            cells = []
            for offset in itertools.product(*map(range, kernel)):
                cell = tuple(
                    p * s + o - b
                    for p, s, o, b in zip(place, strides, offset, pads[:2], strict=True)
                )
                if all(0 <= c < n for c, n in zip(cell, shape[1:], strict=True)):
                    cells.append(cell)
            yield channel, place, cells


def forward(net: Net, x: Array) -> Values:
    """Every value of one sample, in float64."""
    values = {"x": x.astype(np.float64)}
    for op in net.ops:
        values[op.name] = apply(op, *(values[v] for v in op.inputs))
    return values


def slope(op: Op, z: float) -> float:
    """f'(z) by central differences."""
    f, h = FUNCTIONS[op.kind], 1e-5
    return (f(z + h, op.attributes, op.weights) - f(z - h, op.attributes, op.weights)) / (2 * h)


def jacobian(op: Op, position: int, inputs: Sequence[Array]) -> Array:
    """∂output/∂input of a linear node as a matrix, a column for each basis vector."""
    zeros = [np.zeros_like(v) for v in inputs]
    origin = apply(op, *zeros).ravel()
    columns = []
    for i in range(inputs[position].size):
        basis = [v.copy() for v in zeros]
        basis[position].flat[i] = 1
        columns.append(apply(op, *basis).ravel() - origin)
    return np.stack(columns, axis=1)


def to_first(op: Op, x: Array, y: Array, R: Array) -> Array:
    """Max pooling to the first maximum in row-major window order."""
    result = np.zeros_like(x)
    for channel, place, cells in windows(op, x.shape):
        winner = next(c for c in cells if x[channel, *c] == y[channel, *place])
        result[channel, *winner] += R[channel, *place]
    return result


def split(op: Op, x: Array, y: Array, R: Array) -> Array:
    """Max pooling equally to all maxima of a window."""
    result = np.zeros_like(x)
    for channel, place, cells in windows(op, x.shape):
        winners = [c for c in cells if x[channel, *c] == y[channel, *place]]
        for cell in winners:
            result[channel, *cell] += R[channel, *place] / len(winners)
    return result


def redistribute(op: Op, x: Array, y: Array, R: Array) -> Array:
    """Proportional redistribution: x · avgpoolᵀ(R / (avgpool(x) + 1e-10))."""
    result = np.zeros_like(x)
    for channel, place, cells in windows(op, x.shape):
        average = sum(x[channel, *c] for c in cells) / len(cells)
        for cell in cells:
            share = R[channel, *place] / (average + 1e-10) / len(cells)
            result[channel, *cell] += x[channel, *cell] * share
    return result


def border(R: Array) -> Array:
    """The padding trick: nothing in the first and last row and column."""
    result = R.copy()
    for channel, i, j in itertools.product(*map(range, R.shape)):
        if i in (0, R.shape[1] - 1) or j in (0, R.shape[2] - 1):
            result[channel, i, j] = 0
    return result


def backward(
    net: Net,
    values: Sequence[Values],
    seeds: Sequence[Array],
    activation: ActivationRule,
    pool: PoolRule = to_first,
    masked: Collection[str] = (),
) -> list[Values]:
    """The gradient at every value of every sample, under the given rules.

    Parameters
    ----------
    masked
        Convolutions at whose output the padding trick is applied.
    """
    samples = range(len(values))
    R: list[Values] = [{net.output: seed} for seed in seeds]
    for op in reversed(net.ops):
        inputs = [[v[name] for name in op.inputs] for v in values]
        outgoing = [R[n][op.name] for n in samples]
        if op.kind in FUNCTIONS:
            results = activation(op, [i[0] for i in inputs], [v[op.name] for v in values], outgoing)
            found = [[r] for r in results]
        elif op.kind == "MaxPool":
            found = [[pool(op, inputs[n][0], values[n][op.name], outgoing[n])] for n in samples]
        else:
            if op.name in masked:
                outgoing = [border(r) for r in outgoing]
            matrices = [jacobian(op, i, inputs[0]) for i in range(len(op.inputs))]
            found = [
                [
                    (matrix.T @ outgoing[n].ravel()).reshape(inputs[n][i].shape)
                    for i, matrix in enumerate(matrices)
                ]
                for n in samples
            ]
        for n in samples:
            for name, gradient in zip(op.inputs, found[n], strict=True):
                R[n][name] = R[n].get(name, 0) + gradient
    return R


def gradient_rule(op: Op, z: list[Array], a: list[Array], R: list[Array]) -> list[Array]:
    """R_in = f'(z) · R_out."""
    return [each(lambda z, r: slopes(op, z) * r, *pair) for pair in zip(z, R, strict=True)]


def slopes(op: Op, z: float) -> float:
    """f'(z), at a Relu without finite differences."""
    return float(z > 0) if op.kind == "Relu" else slope(op, z)


def each(f: Callable[..., float], *arrays: Array) -> Array:
    """`f` unit by unit."""
    units = [f(*map(float, unit)) for unit in zip(*(v.ravel() for v in arrays), strict=True)]
    return np.array(units, np.float64).reshape(arrays[0].shape)


def threshold(scores: Sequence[float], q: float, convention: str = "tf_nearest") -> float:
    """The q-th percentile, by sorting and Python's own arithmetic."""
    n = len(scores)
    if convention == "tf_nearest":
        # Python's round is half-to-even and exact.
        return sorted(scores, reverse=True)[round((n - 1) * (1 - q / 100))]
    ascending = sorted(scores)
    if convention == "numpy_nearest":
        return ascending[round((n - 1) * (q / 100))]
    h = (n - 1) * q / 100
    lo, hi = ascending[math.floor(h)], ascending[math.ceil(h)]
    if convention in ("lower", "higher"):
        return lo if convention == "lower" else hi
    return lo + (hi - lo) * (h - math.floor(h) if convention == "linear" else 0.5)


def rectify(
    q: float = 98.0,
    tau: float | None = None,
    convention: str = "tf_nearest",
    scope: str = "sample",
    strict: bool = True,
    score: Callable[[float, float], float] = lambda a, r: a * r,
    strict_relu: bool = False,
    derivative: bool = True,
) -> ActivationRule:
    """R_in = R_out · [score > τ] (paper 4.1)."""

    def rule(op: Op, z: list[Array], a: list[Array], R: list[Array]) -> list[Array]:
        scores = [each(score, *pair) for pair in zip(a, R, strict=True)]
        if tau is not None:
            taus = [np.full(s.shape, tau) for s in scores]
        elif scope == "batch":
            together = [u for s in scores for u in s.ravel().tolist()]
            taus = [np.full(s.shape, threshold(together, q, convention)) for s in scores]
        elif scope == "channel":
            taus = [
                np.stack(
                    [np.full(c.shape, threshold(c.ravel().tolist(), q, convention)) for c in s]
                )
                for s in scores
            ]
        else:
            taus = [np.full(s.shape, threshold(s.ravel().tolist(), q, convention)) for s in scores]

        def unit(s: float, t: float, z: float, a: float, r: float) -> float:
            if not (s > t if strict else s >= t):
                return 0.0
            if op.kind == "Relu":
                return 0.0 if strict_relu and z <= 0 else r
            return r * slopes(op, z) if derivative else r

        return [each(unit, *units) for units in zip(scores, taus, z, a, R, strict=True)]

    return rule
