"""Rules that ONNX has an operator for, which takes the place of the loop over kernel offsets.

Each is called as its NumPy function is; `NotImplemented` leaves a case to that function, whose
loop is then written down as it runs.
"""

from __future__ import annotations

import math
from operator import mul
from typing import TYPE_CHECKING, Any

import numpy as np

from ..rules.declared import Rectify, let_pass
from ..rules.linear import conv_transpose_X, conv_X
from ..rules.pool import max_pool_X, spread, sum_windows
from ..rules.window import Window
from ..threshold import Score, at_rank, grouped, ranks, scores, signs
from .functions import pad
from .tensor import Tape, Tensor, spelling

if TYPE_CHECKING:
    from ..graph import Node

_BACKWARDS = np.iinfo(np.int64).min
_LONG_ROW = 2048  # below, nodes cost more than what they save


@spelling(conv_X)
def _conv_X(node: Node, R: Tensor, *, W: Any) -> Tensor:
    """A ConvTranspose with the same weights, or, at stride 1, the faster Conv with them turned."""
    window, shape = Window.of(node), node.input_shapes[0]
    reach = [(k - 1) * d for k, d in zip(window.kernel_shape, window.dilations, strict=True)]
    around = [r - p for r, p in zip((*reach, *reach), window.pads, strict=True)]
    attributes = {"dilations": window.dilations, "kernel_shape": window.kernel_shape}
    rank = len(reach)
    if node["group"] == 1 and set(window.strides) == {1} and min(around) >= 0:
        if R.padded is not None:
            inner, zeros = R.padded
            wider = [n + zeros.get(2 + i % rank, (0, 0))[i // rank] for i, n in enumerate(around)]
            if min(zeros) >= 2 and all(n <= r for n, r in zip(wider, 2 * reach, strict=True)):
                R, around = inner, wider
        turned = _turned(R, W, rank)
        return R.emit("Conv", turned, shape=shape, pads=around, **attributes)
    reached = [
        (n - 1) * s + r + 1 - window.pads[i] - window.pads[rank + i]
        for i, (n, s, r) in enumerate(zip(window.output, window.strides, reach, strict=True))
    ]
    return R.emit(
        "ConvTranspose",
        W,
        shape=shape,
        pads=window.pads,
        strides=window.strides,
        group=node["group"],
        output_padding=[n - m for n, m in zip(window.input, reached, strict=True)],
        **attributes,
    )


def _turned(R: Tensor, W: Any, rank: int) -> Tensor:
    """The weights (M, C, *kernel) as (C, M, *kernel), each kernel from its end to its beginning.

    They are nodes, not constants: the file keeps one copy, and a runtime turns it while it loads.
    """
    axes = list(range(2, 2 + rank))
    shape = np.shape(W)
    swapped = [1, 0, *axes]
    (turned,) = R.tape.emit("Transpose", [W], ([shape[a] for a in swapped], R.dtype), perm=swapped)
    if math.prod(shape[2:]) == 1:
        return turned
    ends = [np.full(rank, n, np.int64) for n in (-1, _BACKWARDS)]
    return turned.emit("Slice", *ends, np.array(axes, np.int64), np.full(rank, -1, np.int64))


@spelling(conv_transpose_X)
def _conv_transpose_X(node: Node, R: Tensor, *, W: Any) -> Tensor:
    names = ("kernel_shape", "strides", "dilations", "pads", "group")
    return R.emit("Conv", W, shape=node.input_shapes[0], **{name: node[name] for name in names})


@spelling(max_pool_X)
def _max_pool_X(node: Node, R: Tensor, *, X: Tensor, Y: Tensor) -> Tensor:
    """MaxPool knows where each maximum lies: its Indices, the first in row-major order.

    MaxUnpool puts back what windows without overlap have chosen.
    """
    names = ("kernel_shape", "strides", "dilations", "pads", "ceil_mode")
    X = np.broadcast_to(X, (R.shape[0], *X.shape[1:]))  # type: ignore[assignment]
    shape, indices = (R.shape, X.dtype), (R.shape, np.int64)
    chosen = X.tape.emit("MaxPool", [X], shape, indices, **{name: node[name] for name in names})[1]
    window = Window.of(node)
    plain = window.strides == window.kernel_shape and set(window.dilations) == {1}
    if plain and window.input == tuple(map(mul, window.output, window.strides)):
        sizes = {"kernel_shape": window.kernel_shape, "strides": window.strides}
        return R.emit("MaxUnpool", chosen, shape=X.shape, **sizes)
    gradient: Any = np.zeros_like(X.reshape(-1))
    return gradient.emit(
        "ScatterElements", chosen.reshape(-1), R.reshape(-1), axis=0, reduction="add"
    ).reshape(X.shape)


@spelling(sum_windows)
def _sum_windows(window: Window, x: Tensor) -> Any:
    padded = pad(x, _around(window))
    return _box(padded, window, window.strides, window.output)


@spelling(spread)
def _spread(window: Window, R: Tensor) -> Any:
    """A sum over the windows of a gradient that stands among zeros, one stride apart."""
    if set(window.dilations) != {1}:
        return NotImplemented
    reach = [k - 1 for k in window.kernel_shape]
    extents = [n + r for n, r in zip(window.padded_input, reach, strict=True)]
    wide: Any = np.zeros_like(R, shape=(*R.shape[:2], *extents))
    places = (
        slice(r, r + s * (n - 1) + 1, s)
        for r, s, n in zip(reach, window.strides, window.output, strict=True)
    )
    wide[(..., *places)] = R
    return window.crop(_box(wide, window, (1,) * len(reach), window.padded_input))


def _box(x: Tensor, window: Window, strides: tuple[int, ...], output: tuple[int, ...]) -> Any:
    if set(window.dilations) != {1}:
        return NotImplemented
    average = x.emit(
        "AveragePool",
        shape=(*x.shape[:2], *output),
        kernel_shape=window.kernel_shape,
        strides=strides,
    )
    return average * math.prod(window.kernel_shape)


def _around(window: Window) -> dict[int, tuple[int, int]]:
    """The padding of each axis, up to `padded_input`."""
    begins = window.pads[: len(window.input)]
    return {
        2 + i: (begin, whole - begin - n)
        for i, (begin, whole, n) in enumerate(
            zip(begins, window.padded_input, window.input, strict=True)
        )
    }


@spelling(at_rank)
def _at_rank(scores: Tensor, rank: int) -> Tensor:
    """The least of the largest, or the greatest of the smallest, whichever are fewer."""
    units = scores.shape[1]
    if units - rank <= rank:
        return _top(scores, units - rank)[0].min(axis=1).astype(np.float64)
    return _top(scores, rank + 1, largest=0)[0].max(axis=1).astype(np.float64)


def _top(scores: Tensor, k: int, largest: int = 1) -> tuple[Tensor, ...]:
    """The k largest of each row, in any order, and where they are."""
    shape = (scores.shape[0], k)
    results = (shape, scores.dtype), (shape, np.int64)
    count = np.array([k], np.int64)
    return scores.tape.emit("TopK", [scores, count], *results, axis=1, largest=largest, sorted=0)


@spelling(let_pass)
def _let_pass(rule: Rectify, gradient: Any, a: Any, R: Any, samples: int) -> Any:
    """What is above a high percentile is among the scores that TopK found: the others are left.

    Where a threshold is 0, all have to be looked at: a product above it can have underflowed.
    """
    score: Any = grouped(scores(rule.score, a, R, rule.eps), samples, rule.scope)
    units = score.shape[1]
    rank, _, fraction = ranks(units, rule.q, rule.percentile)
    k = units - rank
    if rule.tau is not None or rule.strictness != ">" or fraction or units < max(_LONG_ROW, 8 * k):
        return NotImplemented
    gradient = grouped(gradient, samples, rule.scope)
    best: Any
    places: Any
    best, places = _top(score, k)
    tau = best.min(axis=1)

    few = Tape(f"{score.tape.scope}/few")
    chosen: Any = np.take_along_axis(gradient.on(few), places.on(few), axis=1)
    passing = best.on(few) > tau.on(few)[:, None]
    sparse: Any = np.zeros_like(gradient.on(few))
    np.put_along_axis(sparse, places.on(few), np.where(passing, chosen, 0), axis=1)

    every = Tape(f"{score.tape.scope}/every")
    sign = grouped(signs(rule.score, a.on(every), R.on(every), rule.eps), samples, rule.scope)
    least = np.where(tau.on(every) == 0, 0, np.float32(np.inf))
    mask = (score.on(every) > tau.on(every)[:, None]) | (sign > least[:, None])
    dense = np.where(mask, gradient.on(every), 0)

    return (np.abs(tau).min() == 0).either(dense, sparse).reshape(a.shape)


@spelling(signs)
def _signs(kind: Score, a: Tensor, R: Tensor, eps: float = 0.0) -> Any:
    """Of a product with a ≥ 0, which is positive where both factors are."""
    return np.minimum(a, R) if kind == "a*r" and a.non_negative else NotImplemented
