"""Another implementation of RectGrad, in NumPy, with room for mistakes; and what to verify it with.

It shares no code with the package. Its network is conv 3×3, ReLU, max pool, conv 3×3, ReLU, dense,
ReLU, dense: the conformance bundles' `plain`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from rectgrad_ref.verify import Bundle, make
from rectgrad_ref.verify.conformance import plain

Array = np.ndarray
Rule = Callable[[Array, Array], Array]  # a, R_out → R_in
Q = 90.0
RELUS = ("conv1.relu", "conv2.relu", "dense1.relu")


def images(samples: int = 3, seed: int = 1) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((samples, 3, 8, 8)).astype(np.float32)


def reference(samples: int = 3, **options: Any) -> Bundle:
    """What the implementations below are compared with."""
    given = {"q": Q, "backend": "reference", "dtype": "float32", **options}
    return make(plain(), images(samples), **given)


# --- what passes a ReLU ---------------------------------------------------------------------------


def nearest(scores: Array, q: float = Q) -> Array:
    """The percentile of each row, counted from the top."""
    index = round((scores.shape[1] - 1) * (1 - q / 100))
    return -np.sort(-scores, axis=1)[:, index : index + 1]


def rectgrad(a: Array, R: Array) -> Array:
    scores = (a * R).reshape(len(a), -1)
    return np.where((scores > nearest(scores)).reshape(a.shape), R, 0)


def at_q(q: float) -> Rule:
    def rule(a: Array, R: Array) -> Array:
        scores = (a * R).reshape(len(a), -1)
        return np.where((scores > nearest(scores, q)).reshape(a.shape), R, 0)

    return rule


def over_the_batch(a: Array, R: Array) -> Array:
    scores = a * R
    return np.where(scores > nearest(scores.reshape(1, -1)), R, 0)


def over_each_channel(a: Array, R: Array) -> Array:
    if a.ndim == 2:
        return rectgrad(a, R)
    scores = (a * R).reshape(a.shape[0] * a.shape[1], -1)
    return np.where((scores > nearest(scores)).reshape(a.shape), R, 0)


def interpolating(a: Array, R: Array) -> Array:
    scores = (a * R).reshape(len(a), -1).astype(np.float64)
    tau = np.percentile(scores, Q, axis=1, keepdims=True)
    return np.where((scores > tau).reshape(a.shape), R, 0)


def not_strict(a: Array, R: Array) -> Array:
    scores = (a * R).reshape(len(a), -1)
    return np.where((scores >= nearest(scores)).reshape(a.shape), R, 0)


def absolute(a: Array, R: Array) -> Array:
    scores = np.abs(a * R).reshape(len(a), -1)
    return np.where((scores > nearest(scores)).reshape(a.shape), R, 0)


def by_activation(a: Array, R: Array) -> Array:
    scores = a.reshape(len(a), -1)
    return np.where((scores > nearest(scores)).reshape(a.shape), R, 0)


def by_gradient(a: Array, R: Array) -> Array:
    scores = R.reshape(len(a), -1)
    return np.where((scores > nearest(scores)).reshape(a.shape), R, 0)


def backpropagation(a: Array, R: Array) -> Array:
    return np.where(a > 0, R, 0)


def guided(a: Array, R: Array) -> Array:
    return np.where((a > 0) & (R > 0), R, 0)


def deconvolution(a: Array, R: Array) -> Array:
    return np.where(R > 0, R, 0)


def dead_units_blocked(a: Array, R: Array) -> Array:
    """At a low q, where τ < 0."""
    return np.where(a > 0, at_q(10)(a, R), 0)


# --- seeds: scores, target → R at the scores ------------------------------------------------------


def one(scores: Array, target: Array) -> Array:
    return np.eye(scores.shape[1], dtype=scores.dtype)[target]


def logit(scores: Array, target: Array) -> Array:
    return one(scores, target) * scores


def softmax(scores: Array, target: Array) -> Array:
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    chosen = p[np.arange(len(p)), target][:, None]
    return chosen * (one(scores, target) - p)


def mean_over_the_batch(scores: Array, target: Array) -> Array:
    return one(scores, target) / np.float32(len(scores))


def every_class(scores: Array, target: Array) -> Array:
    return np.ones_like(scores)


# --- the end: x, R at the input → map -------------------------------------------------------------


def positive_product(x: Array, R: Array) -> Array:
    return np.maximum(x * R, 0)


def product(x: Array, R: Array) -> Array:
    return x * R


def gradient(x: Array, R: Array) -> Array:
    return R


def positive_gradient(x: Array, R: Array) -> Array:
    return np.maximum(R, 0)


def absolute_product(x: Array, R: Array) -> Array:
    return np.abs(x * R)


def top_percentile(x: Array, R: Array) -> Array:
    """Everything else is plain backpropagation."""
    values = (x * R).reshape(len(x), -1)
    return np.maximum(np.where(values > nearest(values), values, 0), 0).reshape(x.shape)


# --- the implementation ---------------------------------------------------------------------------


def explain(
    bundle: Bundle,
    rule: Rule | Mapping[str, Rule] = rectgrad,
    *,
    trick: bool = True,
    splits_ties: bool = False,
    seed: Callable[[Array, Array], Array] = one,
    end: Callable[[Array, Array], Array] = positive_product,
    reverses_channels: bool = False,
) -> dict[str, Array]:
    """The map and, at each ReLU, a, R_out and R_in, in float32.

    Parameters
    ----------
    rule : callable, or mapping of ReLU to callable
        What passes; ReLUs that are not in the mapping are left to backpropagation.
    trick : bool
        Whether the gradient along the border of a convolution's output is dropped.
    splits_ties : bool
        Whether a max pool shares the gradient among equal maxima.
    """
    x = bundle.inputs[:, ::-1] if reverses_channels else bundle.inputs
    w = weights(bundle)
    rules = dict.fromkeys(RELUS, rule) if callable(rule) else rule
    a = {}
    a["conv1.relu"] = np.maximum(conv(x, w["conv1.weight"], w["conv1.bias"]), 0)
    windows, pooled = pool(a["conv1.relu"])
    a["conv2.relu"] = np.maximum(conv(pooled, w["conv2.weight"], w["conv2.bias"]), 0)
    flat = a["conv2.relu"].reshape(len(x), -1)
    a["dense1.relu"] = np.maximum(flat @ w["dense1.weight"], 0)
    scores = a["dense1.relu"] @ w["dense2.weight"]
    found = {}

    def passed(relu: str, R: Array) -> Array:
        R_in = rules.get(relu, backpropagation)(a[relu], R)
        found.update({f"{relu}/a": a[relu], f"{relu}/R_out": R, f"{relu}/R_in": R_in})
        return R_in

    R = seed(scores, bundle.target) @ w["dense2.weight"].T
    R = passed("dense1.relu", R) @ w["dense1.weight"].T
    R = passed("conv2.relu", R.reshape(a["conv2.relu"].shape))
    R = back(without_border(R) if trick else R, w["conv2.weight"])
    R = passed("conv1.relu", unpooled(windows, pooled, R, splits_ties))
    R = back(without_border(R) if trick else R, w["conv1.weight"])
    return {"values": end(x, R), **found}


def weights(bundle: Bundle) -> dict[str, Array]:
    assert bundle.model is not None
    graph = onnx.load_from_string(bundle.model).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def conv(x: Array, w: Array, b: Array) -> Array:
    """3×3, stride 1, one cell of padding."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,mcij->nmhw", windows, w) + b[:, None, None]


def back(R: Array, w: Array) -> Array:
    """The transpose of `conv`."""
    turned = w[:, :, ::-1, ::-1].swapaxes(0, 1)
    return conv(R, turned, np.zeros(len(turned), R.dtype))


def without_border(R: Array) -> Array:
    result = np.zeros_like(R)
    result[:, :, 1:-1, 1:-1] = R[:, :, 1:-1, 1:-1]
    return result


def pool(a: Array) -> tuple[Array, Array]:
    """The windows, (N, C, H/2, W/2, 2, 2), and their maxima."""
    n, c, h, w = a.shape
    windows = a.reshape(n, c, h // 2, 2, w // 2, 2).swapaxes(3, 4)
    return windows, windows.max(axis=(4, 5))


def unpooled(windows: Array, pooled: Array, R: Array, splits: bool) -> Array:
    """R at the input of the max pool."""
    winners = (windows == pooled[..., None, None]).reshape(*pooled.shape, 4)
    if not splits:
        winners &= np.cumsum(winners, axis=-1) == 1
    share = winners / winners.sum(axis=-1, keepdims=True)
    spread = (share * R[..., None]).astype(np.float32).reshape(windows.shape)
    n, c, h, w = pooled.shape
    return spread.swapaxes(3, 4).reshape(n, c, 2 * h, 2 * w)
