"""The paper's methods, the maps that it measures, and the measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rectgrad_ref.explainer import Explainer
from rectgrad_ref.methods import (
    Deconvolution,
    DeepLift,
    EpsilonLRP,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    Method,
    RectGrad,
    Saliency,
    SmoothGrad,
)
from rectgrad_ref.picture import cap

RECTGRAD, PRR = "RectGrad", "RectGrad PRR"
OURS = (RECTGRAD, PRR)
KINDS = {"plain": "without final thresholding", "sparse": "with final thresholding"}
"""Of the baselines' maps."""


def paper_methods(seed: int = 0) -> dict[str, Method]:
    """The methods that the paper compares on CIFAR-10 (section 5.3), at its settings."""
    return {
        RECTGRAD: RectGrad(),
        PRR: RectGrad(prr=True),
        "Saliency": Saliency(),
        "Guided BP": GuidedBackprop(),
        "SmoothGrad": SmoothGrad(seed=seed),
        "Gradient × input": InputXGradient(),
        "IntegGrad": IntegratedGradients(),
        "DeepLIFT": DeepLift(),
    }


def imagenet_methods(seed: int = 0) -> dict[str, Method]:
    """Those that it compares on ImageNet (section 5.2)."""
    return {**paper_methods(seed), "ε-LRP": EpsilonLRP()}


def all_methods(seed: int = 0) -> dict[str, Method]:
    """Every method of the paper."""
    return {**imagenet_methods(seed), "Deconvolution": Deconvolution()}


def figure_1_methods() -> dict[str, Method]:
    return {
        "Saliency": Saliency(),
        "Deconvolution": Deconvolution(),
        "Guided BP": GuidedBackprop(),
        RECTGRAD: RectGrad(),
    }


def heatmaps(
    explainer: Explainer,
    images: Any,
    methods: Mapping[str, Method],
    *,
    keys: np.ndarray | None = None,
    target: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Every method's map of every image, summed over colours: (N, H, W).

    `keys` and `target` are as in `Explainer.explain`.
    """
    ids = None if keys is None else [int(key) for key in keys]
    return {
        name: explainer.explain(images, method=method, keys=ids, target=target).heatmap()
        for name, method in methods.items()
    }


def measured(maps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The maps of figures 7 and 8: RectGrad's as they are, the others' sparse at 95 %."""
    return {
        name: cap(heatmap, *((0, 100) if name in OURS else (95, 100)))
        for name, heatmap in maps.items()
    }


def shown(maps: Mapping[str, np.ndarray], *, sparse: bool) -> dict[str, np.ndarray]:
    """The maps of figures 1, 4, 5, 15, 16: capped at 0.5 and 99.5 %, or others' sparse."""
    return {
        name: cap(heatmap, 95 if sparse and name not in OURS else 0.5, 99.5)
        for name, heatmap in maps.items()
    }


def total_variation(heatmap: np.ndarray) -> np.ndarray:
    """Σ|∂h| + Σ|∂w| of each map (N, H, W): shape (N,)."""
    down = np.abs(np.diff(heatmap, axis=1)).sum(axis=(1, 2))
    across = np.abs(np.diff(heatmap, axis=2)).sum(axis=(1, 2))
    return np.asarray(down + across)


def relative_variation(heatmap: np.ndarray) -> np.ndarray:
    """Total variation divided by Σ|map|, which no scale of the map changes: shape (N,)."""
    total = np.abs(heatmap).sum(axis=(1, 2))
    return np.asarray(total_variation(heatmap) / np.where(total > 0, total, 1))


def background_attribution(heatmap: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Σ|map| where `background` (N, H, W) is True: shape (N,)."""
    return np.asarray((np.abs(heatmap) * background).sum(axis=(1, 2)))


def object_share(heatmap: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Fraction of Σ|map| on the object: shape (N,); the object's area where the map is empty."""
    total = np.abs(heatmap).sum(axis=(1, 2))
    inside = (np.abs(heatmap) * ~background).sum(axis=(1, 2))
    area = (~background).mean(axis=(1, 2))
    return np.asarray(np.where(total > 0, inside / np.where(total > 0, total, 1), area))


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each pair of arrays (N, …): shape (N,); 0 where one of them is empty."""
    first, second = (m.reshape(len(m), -1).astype(np.float64) for m in (a, b))
    product = (first * second).sum(axis=1)
    norms = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return np.asarray(np.where(norms > 0, product / np.where(norms > 0, norms, 1), 0))


def nonzero(heatmap: np.ndarray) -> np.ndarray:
    """Fraction of the pixels of each map that are not zero: shape (N,)."""
    return np.asarray((heatmap != 0).mean(axis=(1, 2)))


def resized_background(background: np.ndarray, side: int) -> np.ndarray:
    """The backgrounds (N, H, W) at `side` × `side` cells, by cubic interpolation."""
    from PIL import Image

    if background.shape[-1] == side:
        return background
    resized = [
        np.asarray(
            Image.fromarray(np.where(b, 0, 255).astype(np.uint8)).resize(
                (side, side), Image.Resampling.BICUBIC
            )
        )
        for b in background
    ]
    return np.stack(resized) < 200


def concentration(heatmap: np.ndarray) -> np.ndarray:
    """Fraction of Σ|map| on the 5 % of the pixels that have most: shape (N,)."""
    sizes = np.sort(np.abs(heatmap.reshape(len(heatmap), -1)), axis=1)
    most = round(0.05 * sizes.shape[1])
    total = sizes.sum(axis=1)
    return np.asarray(sizes[:, -most:].sum(axis=1) / np.where(total > 0, total, 1))
