"""DeepLIFT with the Rescale rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from .. import analysis
from ..graph import Graph
from ..plan import RuleTable
from ..rules.declared import Rescale, RescaleMaxPool
from .base import Method, named, operators
from .path import baseline_like


@dataclass(frozen=True, kw_only=True)
class DeepLift(Method):
    """(x − x₀) times multipliers Δa/Δz (Shrikumar et al. 2017; form of Ancona et al. 2018).

    Attributes
    ----------
    eps : float
        Where abs Δz is not above it, f' half-way between takes the place of the ratio.
    baseline : float or numpy.ndarray
        x₀: one value, or an array that broadcasts to the input.
    maxpool : str
        ``"gradient"``, or ``"rescale"`` as Captum has it, which makes contributions add up.
    """

    id: ClassVar[str] = "deeplift"
    label: ClassVar[str] = "DeepLIFT"

    eps: float = 1e-5
    baseline: float | np.ndarray = field(default=0.0, compare=False)
    maxpool: Literal["gradient", "rescale"] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(0, "eps")

    def rules(self, graph: Graph) -> RuleTable:
        activations = (named(analysis.activations(graph)), Rescale(self.eps))
        if self.maxpool == "gradient":
            return (activations,)
        return (activations, (operators("MaxPool"), RescaleMaxPool()))

    def notes(self, graph: Graph) -> list[str]:
        return analysis.note_plain_gradient(self.label, graph)

    def reference_input(self, x: np.ndarray) -> np.ndarray:
        return baseline_like(x, self.baseline)

    def finish(self, x: np.ndarray, R: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return (x - self.reference_input(x)) * R
