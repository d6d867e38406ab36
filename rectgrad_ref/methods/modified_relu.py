"""Deconvolution and guided backpropagation: another rule at every activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from .. import analysis
from ..graph import Graph
from ..plan import RuleTable
from ..rules.declared import ConvTranspose, MaxPoolBackward, PositiveGradient
from .base import Method, PaddingTrick, named, operators, times_input, trick_convolutions


@dataclass(frozen=True, kw_only=True)
class Deconvolution(Method):
    """R_in = max(R_out, 0) at every activation (Zeiler & Fergus 2014).

    Attributes
    ----------
    times_input, final_threshold : bool
        x · R; then zero where not positive.
    padding_trick : bool or "same"
        As in RectGrad; off in the definition of the method.
    maxpool_ties : str
        ``"first"`` maximum in row-major order, or ``"split"`` equally.
    """

    id: ClassVar[str] = "deconvolution"
    label: ClassVar[str] = "Deconvolution"
    guided: ClassVar[bool] = False

    times_input: bool = False
    final_threshold: bool = False
    padding_trick: PaddingTrick = False
    maxpool_ties: Literal["first", "split"] = "first"

    def rules(self, graph: Graph) -> RuleTable:
        masked, _ = trick_convolutions(graph, self.padding_trick)
        return (
            (named(analysis.activations(graph)), PositiveGradient(self.guided)),
            (named(masked), ConvTranspose(mask_border=True)),
            (operators("MaxPool"), MaxPoolBackward(self.maxpool_ties)),
        )

    def notes(self, graph: Graph) -> list[str]:
        return trick_convolutions(graph, self.padding_trick)[1]

    def finish(self, x: np.ndarray, R: np.ndarray, keys: np.ndarray) -> np.ndarray:
        if self.times_input:
            return times_input(x, R, self.final_threshold)
        return np.where(R > 0, R, 0) if self.final_threshold else R


@dataclass(frozen=True, kw_only=True)
class GuidedBackprop(Deconvolution):
    """R_in = [z > 0] · max(R_out, 0) at every activation (Springenberg et al. 2015)."""

    id: ClassVar[str] = "guided_backprop"
    label: ClassVar[str] = "Guided backpropagation"
    guided: ClassVar[bool] = True
