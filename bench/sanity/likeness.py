"""How alike two maps are."""

from __future__ import annotations

import numpy as np

from bench.paper.maps import similarity
from rectgrad_ref.picture import cap

RANK, SSIM, COSINE = "rank correlation", "SSIM", "cosine"
MEASURES = (RANK, SSIM, COSINE)


def likeness(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Of each pair of maps (N, H, W): measure → (N,).

    Spearman's correlation of the absolute values, so that a mere change of sign is no change;
    structural similarity of the pictures of section 7, each divided by its maximum; and the cosine.
    """
    return {
        RANK: rank_correlation(np.abs(a), np.abs(b)),
        SSIM: structural_similarity(a, b),
        COSINE: similarity(a, b),
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's, of each pair of arrays (N, …): shape (N,); 0 where one of them is constant."""
    from scipy.stats import rankdata

    first, second = (rankdata(m.reshape(len(m), -1), axis=1) for m in (a, b))
    mean = (first.shape[1] + 1) / 2
    return similarity(first - mean, second - mean)


def structural_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each pair of maps as pictures (N, H, W), in windows of 7 × 7 (Wang et al. 2004)."""
    from skimage.metrics import structural_similarity as ssim

    pairs = zip(_picture(a), _picture(b), strict=True)
    return np.array([ssim(first, second, data_range=1.0) for first, second in pairs])


def _picture(heatmap: np.ndarray) -> np.ndarray:
    """Capped at 0.5 and 99.5 %; grey levels within [0, 1], zero in the middle.

    SSIM compares means too, so that a sign would cancel where both mean and structure have it.
    """
    capped = np.asarray(cap(heatmap, 0.5, 99.5), np.float64)
    largest = np.abs(capped).max(axis=(1, 2), keepdims=True)
    return (capped / np.where(largest > 0, largest, 1) + 1) / 2
