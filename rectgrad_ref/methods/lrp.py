"""ε-LRP in the gradient × input form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import analysis
from ..graph import Graph
from ..plan import RuleTable
from ..rules.declared import EpsilonRatio
from .base import Method, named


@dataclass(frozen=True, kw_only=True)
class EpsilonLRP(Method):
    """x times a gradient in which f'(z) is a/(z + ε·sign z) (Bach et al. 2015; Ancona et al. 2018).

    Attributes
    ----------
    eps : float
        ε, above 0.
    """

    id: ClassVar[str] = "epsilon_lrp"
    label: ClassVar[str] = "ε-LRP"

    eps: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.eps < np.inf:
            raise ValueError(f"epsilon_lrp: eps must be above 0, got {self.eps!r}")

    def rules(self, graph: Graph) -> RuleTable:
        return ((named(analysis.activations(graph)), EpsilonRatio(self.eps)),)

    def notes(self, graph: Graph) -> list[str]:
        return analysis.note_plain_gradient(self.label, graph)

    def finish(self, x: np.ndarray, R: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return x * R
