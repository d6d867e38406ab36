"""The deletion test without retraining: a class's probability as pixels are replaced."""

from __future__ import annotations

import numpy as np

from rectgrad_ref.explainer import Explainer


def deletion_curve(
    explainer: Explainer, x: np.ndarray, heatmap: np.ndarray, colour: np.ndarray, steps: int
) -> np.ndarray:
    """Softmax probability of the class first predicted, ever more pixels being replaced.

    Parameters
    ----------
    x : numpy.ndarray, shape (N, C, H, W)
    heatmap : numpy.ndarray, shape (N, H, W)
        Pixels of larger values are replaced first; among equal ones, in row-major order.
    colour : numpy.ndarray, shape (C,)
    steps : int
        Fractions, evenly spaced from 0 to 1.

    Returns
    -------
    numpy.ndarray, shape (N, steps)
    """
    from scipy.special import softmax

    n, _, height, width = x.shape
    order = np.argsort(-heatmap.reshape(n, -1), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(height * width)[None], axis=1)
    rank = rank.reshape(n, 1, height, width)
    curve = []
    for fraction in np.linspace(0, 1, steps):
        deleted = rank < round(fraction * height * width)
        replaced = np.where(deleted, colour[:, None, None], x).astype(x.dtype)
        logits = explainer.explain(replaced, method="random").logits
        curve.append(softmax(logits.astype(np.float64), axis=1))
    target = curve[0].argmax(axis=1)
    return np.stack([p[np.arange(n), target] for p in curve], axis=1)
