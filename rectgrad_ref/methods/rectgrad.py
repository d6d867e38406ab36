"""RectGrad (Kim et al. 2019): only units of importance above a percentile pass the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np

from .. import analysis
from ..graph import Graph, Node
from ..plan import RuleTable
from ..rules.declared import ConvTranspose, MaxPoolBackward, Rectify, Redistribute
from ..threshold import Percentile, Scope, Score, Strictness, nothing_passes
from .base import Method, PaddingTrick, named, operators, times_input, trick_convolutions

PropagationRule = Literal["PR1", "PR2", "PR3", "PR4", "mod", "PR1+eps"]
_SCORES: dict[str, Score] = {
    "PR1": "a*r",
    "PR2": "|a*r|",
    "PR3": "a",
    "PR4": "r",
    "PR1+eps": "(a+eps)*r",
}


@dataclass(frozen=True, kw_only=True)
class RectGrad(Method):
    """RectGrad, paper section 4.1; defaults are those of the paper.

    Attributes
    ----------
    q : float
        Percentile of the scores at and below which a unit is dropped, 0 ≤ q ≤ 100.
    tau : float or None
        A fixed threshold instead of a percentile.
    percentile : str
        Convention of the percentile; see `rectgrad_ref.threshold.ranks`.
    scope : str
        ``"sample"``: over all units of a layer; ``"channel"``: of each channel; ``"batch"``: of all
        samples in the call.
    strictness : str
        ``">"``, or ``">="`` to verify implementations that have it so.
    propagation_rule : str
        ``"PR1"`` … ``"PR4"`` (paper appendix B); ``"mod"``: PR2 except at the last activations
        before the logits; ``"PR1+eps"``: scores (a + eps)·R (paper, claim 1).
    mod_last : str
        What ``"mod"`` does at the last activations. The published code, by mistake, has PR2.
    eps : float
        Of ``"PR1+eps"``.
    strict_relu : bool
        Multiply by [z > 0] at a Relu even where τ < 0.
    derivative : bool
        Multiply by f'(z) at activations other than Relu. The published code leaves it out.
    padding_trick : bool or "same"
        Paper C.1: zero the gradient along the border of convolutions with padding, or of those that
        TensorFlow calls SAME.
    prr : bool
        Paper C.2: proportional redistribution through max pools.
    maxpool_ties : str
        ``"first"`` maximum in row-major order, or ``"split"`` equally.
    times_input, final_threshold : bool
        x · R, then zero where not positive.
    """

    id: ClassVar[str] = "rectgrad"
    label: ClassVar[str] = "RectGrad"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "authors": {
            "padding_trick": "same",
            "final_threshold": False,
            "derivative": False,
            "mod_last": "PR2",
        }
    }

    q: float = 98.0
    tau: float | None = None
    percentile: Percentile = "tf_nearest"
    scope: Scope = "sample"
    strictness: Strictness = ">"
    propagation_rule: PropagationRule = "PR1"
    mod_last: Literal["PR1", "PR2"] = "PR1"
    eps: float = 1e-6
    strict_relu: bool = False
    derivative: bool = True
    padding_trick: PaddingTrick = True
    prr: bool = False
    maxpool_ties: Literal["first", "split"] = "first"
    times_input: bool = True
    final_threshold: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.q <= 100:
            raise ValueError(f"rectgrad: q must lie between 0 and 100, got {self.q!r}")
        self._require_at_least(0, "eps")

    @property
    def title(self) -> str:
        variant = "" if self.propagation_rule == "PR1" else f" {self.propagation_rule}"
        return f"{self.label}{variant}{' PRR' if self.prr else ''}"

    @property
    def whole_batch(self) -> bool:
        return self.scope == "batch"

    def rules(self, graph: Graph) -> RuleTable:
        layers, last = analysis.activations(graph), analysis.last_activations(graph)
        masked, _ = trick_convolutions(graph, self.padding_trick)
        pools = frozenset(node.name for node in self._redistributed(graph))
        if self.scope == "channel":
            self._require_maps(graph)
        return (
            (lambda node: node.name in layers and node.name in last, self._rectify(last=True)),
            (named(layers), self._rectify(last=False)),
            (named(masked), ConvTranspose(mask_border=True)),
            (named(pools), Redistribute()),
            (operators("MaxPool"), MaxPoolBackward(self.maxpool_ties)),
        )

    def notes(self, graph: Graph) -> list[str]:
        layers = [n for n in analysis.path(graph) if n.name in analysis.activations(graph)]
        notes = trick_convolutions(graph, self.padding_trick)[1]
        if not layers:
            notes.append("no activation to threshold: RectGrad equals gradient × input here")
        if self.tau is None:
            notes += [note for node in layers if (note := self._dies_at(graph, node))]
        if self.prr:
            pools = {n.name for n in analysis.path(graph) if n.op == "MaxPool"}
            plain = pools - {node.name for node in self._redistributed(graph)}
            if plain:
                notes.append(
                    f"PRR: ordinary backpropagation at {', '.join(sorted(plain))}, whose input is "
                    "not provably non-negative"
                )
        return notes

    def finish(self, x: np.ndarray, R: np.ndarray, keys: np.ndarray) -> np.ndarray:
        if self.times_input:
            return times_input(x, R, self.final_threshold)
        return np.where(R > 0, R, 0) if self.final_threshold else R

    def _rectify(self, last: bool) -> Rectify:
        rule: str = self.propagation_rule
        if rule == "mod":
            rule = self.mod_last if last else "PR2"
        return Rectify(
            score=_SCORES[rule],
            q=self.q,
            tau=self.tau,
            percentile=self.percentile,
            scope=self.scope,
            strictness=self.strictness,
            strict_relu=self.strict_relu,
            derivative=self.derivative,
            eps=self.eps if rule == "PR1+eps" else 0.0,
        )

    def _redistributed(self, graph: Graph) -> list[Node]:
        if not self.prr:
            return []
        safe = analysis.non_negative(graph)
        return [n for n in analysis.path(graph) if n.op == "MaxPool" and n.inputs[0] in safe]

    def _units(self, graph: Graph, node: Node) -> int:
        shape = node.output_shapes[0]
        channels = graph.batch * prod(shape[1:2])
        groups = {"sample": graph.batch, "channel": channels, "batch": 1}
        return prod(shape) // groups[self.scope]

    def _dies_at(self, graph: Graph, node: Node) -> str | None:
        units = self._units(graph, node)
        if not nothing_passes(units, self.q, self.percentile, self.strictness):
            return None
        return (
            f"nothing can pass {node}: with {units} units its threshold at q = {self.q:g} is its "
            "maximum"
        )

    def _require_maps(self, graph: Graph) -> None:
        for node in analysis.path(graph):
            if node.name in analysis.activations(graph):
                shape = node.output_shapes[0]
                if len(shape) < 3 or prod(shape[2:]) == 1:
                    raise ValueError(
                        f"scope='channel' at {node}: its shape {shape} has one unit a channel"
                    )
