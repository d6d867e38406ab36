"""Plain gradients, and random maps to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..graph import Graph
from ..plan import RuleTable
from ..rules.declared import ConvTranspose, MaxPoolBackward
from .base import Method, PaddingTrick, named, operators, times_input, trick_convolutions
from .noise import normal


@dataclass(frozen=True, kw_only=True)
class Saliency(Method):
    """∂S_c/∂x, signed (Simonyan et al. 2014)."""

    id: ClassVar[str] = "saliency"
    label: ClassVar[str] = "Saliency map"


@dataclass(frozen=True, kw_only=True)
class InputXGradient(Method):
    """x · ∂S_c/∂x (Shrikumar et al. 2017).

    Attributes
    ----------
    padding_trick : bool or "same"
        As in RectGrad; off in the definition of the method.
    maxpool_ties : str
        ``"first"`` maximum in row-major order, or ``"split"`` equally.
    final_threshold : bool
        Zero where not positive.
    """

    id: ClassVar[str] = "input_x_gradient"
    label: ClassVar[str] = "Gradient × input"

    padding_trick: PaddingTrick = False
    maxpool_ties: Literal["first", "split"] = "first"
    final_threshold: bool = False

    def rules(self, graph: Graph) -> RuleTable:
        masked, _ = trick_convolutions(graph, self.padding_trick)
        return (
            (named(masked), ConvTranspose(mask_border=True)),
            (operators("MaxPool"), MaxPoolBackward(self.maxpool_ties)),
        )

    def notes(self, graph: Graph) -> list[str]:
        return trick_convolutions(graph, self.padding_trick)[1]

    def finish(self, x: np.ndarray, R: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return times_input(x, R, self.final_threshold)


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Standard normal noise, the control of ROAR and KAR.

    Attributes
    ----------
    seed : int
        Of the generator; sample i always gets the same map.
    """

    id: ClassVar[str] = "random"
    label: ClassVar[str] = "Random"
    walks_once: ClassVar[bool] = False

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(0, "seed")

    @property
    def passes(self) -> int:
        return 0

    def finish(self, x: np.ndarray, R: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return np.stack([normal(self.seed, int(key), 0, x.shape[1:]) for key in keys]).astype(
            x.dtype
        )
