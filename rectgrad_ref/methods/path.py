"""Methods that sum gradients over several points: SmoothGrad and integrated gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from .base import Method
from .noise import normal


@dataclass(frozen=True, kw_only=True)
class SmoothGrad(Method):
    """The mean of saliency maps of noisy copies (Smilkov et al. 2017).

    Attributes
    ----------
    n : int
        Copies.
    sigma : float
        Standard deviation of the noise, as a fraction of max x − min x.
    range : str
        Whether the extremes are those of the ``"sample"`` or of the whole ``"batch"``.
    seed : int
        Of the noise; sample i, copy k always gets the same.
    """

    id: ClassVar[str] = "smoothgrad"
    label: ClassVar[str] = "SmoothGrad"
    walks_once: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {"authors": {"range": "batch"}}

    n: int = 50
    sigma: float = 0.1
    range: Literal["sample", "batch"] = "sample"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "n")
        self._require_at_least(0, "sigma", "seed")

    @property
    def passes(self) -> int:
        return self.n

    @property
    def whole_batch(self) -> bool:
        return self.range == "batch"

    def point(self, x: np.ndarray, k: int, keys: np.ndarray) -> np.ndarray:
        noise = np.stack([normal(self.seed, int(key), k, x.shape[1:]) for key in keys])
        axes = None if self.range == "batch" else tuple(range(1, x.ndim))
        span = x.max(axis=axes, keepdims=True) - x.min(axis=axes, keepdims=True)
        return x + (self.sigma * span * noise).astype(x.dtype)

    def weight(self, k: int) -> float:
        return 1.0 / self.n


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients(Method):
    """(x − x₀) · ∫ ∂S_c(x₀ + α(x − x₀))/∂x dα (Sundararajan et al. 2017).

    Attributes
    ----------
    steps : int
        Points of the quadrature.
    rule : str
        ``"right"`` Riemann sum at α = k/steps, k = 1 … steps; ``"trapezoid"``, at k = 0 … steps;
        ``"gauss_legendre"``.
    baseline : float or numpy.ndarray
        x₀: one value, or an array that broadcasts to the input.
    """

    id: ClassVar[str] = "integrated_gradients"
    label: ClassVar[str] = "Integrated gradients"
    walks_once: ClassVar[bool] = False

    steps: int = 50
    rule: Literal["right", "trapezoid", "gauss_legendre"] = "right"
    baseline: float | np.ndarray = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "steps")

    @property
    def passes(self) -> int:
        return len(self._quadrature[0])

    @cached_property
    def _quadrature(self) -> tuple[np.ndarray, np.ndarray]:
        """Nodes α and weights."""
        if self.rule == "gauss_legendre":
            nodes, weights = np.polynomial.legendre.leggauss(self.steps)
            return (nodes + 1) / 2, weights / 2
        if self.rule == "trapezoid":
            weights = np.full(self.steps + 1, 1 / self.steps)
            weights[[0, -1]] /= 2
            return np.arange(self.steps + 1) / self.steps, weights
        return np.arange(1, self.steps + 1) / self.steps, np.full(self.steps, 1 / self.steps)

    def point(self, x: np.ndarray, k: int, keys: np.ndarray) -> np.ndarray:
        start = self.reference_input(x)
        return start + x.dtype.type(self._quadrature[0][k]) * (x - start)

    def weight(self, k: int) -> float:
        return float(self._quadrature[1][k])

    def reference_input(self, x: np.ndarray) -> np.ndarray:
        return baseline_like(x, self.baseline)

    def finish(self, x: np.ndarray, R: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return (x - self.reference_input(x)) * R


def baseline_like(x: np.ndarray, baseline: float | np.ndarray) -> np.ndarray:
    """`baseline` in the shape and dtype of `x`.

    Raises
    ------
    ValueError
        It does not broadcast to the input's shape, or has NaN or infinity in it.
    """
    array = np.asarray(baseline, x.dtype)
    if not np.isfinite(array).all():
        raise ValueError(f"the baseline has NaN or infinity (as {x.dtype})")
    try:
        return np.ascontiguousarray(np.broadcast_to(array, x.shape))
    except ValueError:
        raise ValueError(
            f"baseline of shape {array.shape} does not broadcast to the input {x.shape}"
        ) from None
