"""THE percentile: how large a score must be for its unit to let the gradient pass.

Everything that differs between implementations of RectGrad in choosing τ is decided here: the
percentile convention, the scope over which it is taken, and how scores are compared with it.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from .rules.registry import primitive

Percentile = Literal["tf_nearest", "numpy_nearest", "lower", "higher", "linear", "midpoint"]
Scope = Literal["sample", "channel", "batch"]
Strictness = Literal[">", ">="]
Score = Literal["a*r", "|a*r|", "a", "r", "(a+eps)*r"]

PERCENTILES, SCOPES, STRICTNESSES = get_args(Percentile), get_args(Scope), get_args(Strictness)
_LONG_ROW = 4096


def ranks(n: int, q: float, convention: Percentile) -> tuple[int, int, float]:
    """Where the q-th percentile of `n` scores lies.

    Returns
    -------
    low, high : int
        0-based indices into the **ascending** scores.
    fraction : float
        τ = s[low] + (s[high] − s[low])·fraction.

    Notes
    -----
    ``tf_nearest`` counts from the top, as ``tf.contrib.distributions.percentile`` did:
    ``round_half_to_even((n − 1)·(1 − q/100))`` in double precision in that order, which is not
    the mirror image of counting from the bottom at ties (n = 76, 176 … at q = 98).
    ``numpy_nearest`` is ``numpy.percentile(…, method="nearest")``, whose position is
    ``(n − 1)·(q/100)``; the others have ``((n − 1)·q)/100``, which is exact more often.
    """
    if convention == "tf_nearest":
        index = n - 1 - int(np.round((n - 1) * (1.0 - q / 100.0)))
        return index, index, 0.0
    if convention == "numpy_nearest":
        index = int(np.round((n - 1) * (q / 100.0)))
        return index, index, 0.0
    position = (n - 1) * q / 100.0
    low, high = int(np.floor(position)), int(np.ceil(position))
    if convention == "linear":
        return low, high, position - low
    if convention == "midpoint":
        return low, high, 0.5 if high > low else 0.0
    index = low if convention == "lower" else high
    return index, index, 0.0


def grouped(values: np.ndarray, samples: int, scope: Scope) -> np.ndarray:
    """View `values` as (groups, units): one τ belongs to each group.

    Parameters
    ----------
    values : numpy.ndarray
        A layer, samples first: (N, C, …) or (N, C).
    """
    if scope == "batch":
        return values.reshape(1, -1)
    if scope == "channel":
        return values.reshape(samples * values.shape[1], -1)
    return values.reshape(samples, -1)


def percentile(scores: np.ndarray, q: float, convention: Percentile = "tf_nearest") -> np.ndarray:
    """The q-th percentile of each row.

    Parameters
    ----------
    scores : numpy.ndarray, shape (groups, units)
    q : float
        Between 0 and 100.

    Returns
    -------
    numpy.ndarray, shape (groups,), float64
        Interpolated conventions interpolate in float64 from the scores as they are.
    """
    if scores.shape[1] == 0:
        return np.zeros(scores.shape[0])
    low, high, fraction = ranks(scores.shape[1], q, convention)
    bottom = at_rank(scores, low)
    return bottom if fraction == 0 else bottom + (at_rank(scores, high) - bottom) * fraction


@primitive
def at_rank(scores: np.ndarray, rank: int) -> np.ndarray:
    """The score at an ascending rank of each row, float64.

    Zeros of long rows are counted, not sorted: where most scores are equal, `numpy.partition` takes
    twenty times as long.
    """
    if scores.shape[1] < _LONG_ROW:
        return np.partition(scores, rank, axis=1)[:, rank].astype(np.float64)
    return np.array([_at_without_zeros(row, rank) for row in scores], np.float64)


def _at_without_zeros(scores: np.ndarray, rank: int) -> float:
    negative, positive = scores[scores < 0], scores[~(scores <= 0)]  # NaN comes last
    if rank < len(negative):
        return float(np.partition(negative, rank)[rank])
    above = rank - (len(scores) - len(positive))
    return float(np.partition(positive, above)[above]) if above >= 0 else 0.0


def scores(kind: Score, a: np.ndarray, R: np.ndarray, eps: float = 0.0) -> np.ndarray:
    """The importance of each unit, rounded to the compute dtype (paper 4.1 and appendix B)."""
    if kind == "a*r":
        return a * R
    if kind == "|a*r|":
        return np.abs(a * R)
    if kind == "(a+eps)*r":
        return (a + a.dtype.type(eps)) * R
    return a if kind == "a" else R


@primitive
def signs(kind: Score, a: np.ndarray, R: np.ndarray, eps: float = 0.0) -> np.ndarray:
    """The signs of the exact scores: a product of two small float32 numbers can underflow to 0."""
    if kind == "|a*r|":
        return np.abs(np.sign(a) * np.sign(R))
    if kind == "(a+eps)*r":
        return np.sign(a + a.dtype.type(eps)) * np.sign(R)
    if kind == "a*r":
        return np.sign(a) * np.sign(R)
    return np.sign(a if kind == "a" else R)


def exceeds(
    score: np.ndarray, sign: np.ndarray, tau: np.ndarray, strictness: Strictness = ">"
) -> np.ndarray:
    """Which units pass: score > τ, on the exact sign where τ = 0.

    Parameters
    ----------
    score, sign : numpy.ndarray, shape (groups, units)
    tau : numpy.ndarray, shape (groups,), float64
        Compared in float64, so that neither side is rounded.

    Returns
    -------
    numpy.ndarray of bool, shape (groups, units)
    """
    compare = np.greater if strictness == ">" else np.greater_equal
    threshold = tau[:, None]
    return compare(np.where(threshold == 0, sign, score.astype(np.float64)), threshold)


def nothing_passes(n: int, q: float, convention: Percentile, strictness: Strictness) -> bool:
    """Whether τ is the maximum of `n` scores, so that a strict comparison lets no unit pass."""
    low, _, _ = ranks(n, q, convention)
    return strictness == ">" and low == n - 1
