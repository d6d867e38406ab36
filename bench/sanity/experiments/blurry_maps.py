"""ROAR's preference for blurry maps (Song et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bench.paper.evidence import Claim, Conclusion, Table
from bench.paper.experiments.roar import QUANTITIES, Estimator, Roar, Test, cells, smaller
from bench.paper.runner import Arrays
from bench.paper.sources import Sources

_SHARP = ("Random", "RectGrad", "Saliency")
_BLUR = 2.0
_SUFFIX = ", blurred"


@dataclass(frozen=True, kw_only=True)
class BlurryMaps(Roar):
    """ROAR of some estimators, and of their maps after a Gaussian filter.

    What ROAR has trained already is not trained again.
    """

    tests: ClassVar[tuple[Test, ...]] = ("ROAR",)
    name = "blurry_maps"
    title = "Blurry maps"
    figures = "Song et al. 2023"
    paper = (
        "A blurred map knows no more of the network than the sharp one, and yet ROAR rates it "
        "better: patches without pixels hurt retraining more than as many single pixels."
    )

    def estimators(self, seed: int = 0) -> dict[str, Estimator]:
        """Some of Table 1, sharp and blurred."""
        every = Roar.estimators(self, seed)
        sharp = {name: every[name] for name in _SHARP}
        blurred = {name + _SUFFIX: Estimator(e.method, _BLUR) for name, e in sharp.items()}
        return sharp | blurred

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        correct = self.correct(found)
        areas = self.areas(correct, "ROAR")
        claims = []
        for name in _SHARP:
            blurred = areas[name + _SUFFIX].inner
            text = f"{name}: the blurred map has the lower {QUANTITIES['ROAR']}"
            claims.append(Claim(text, *smaller(blurred, {"sharp": areas[name].inner})))
        rows = [[name, *cells(area)] for name, area in areas.items()]
        note = (
            f"Blurred by a Gaussian of {_BLUR:g} pixels. Lower is better in ROAR's eyes; [0, 1] "
            "adds the end points."
        )
        return Conclusion(
            scale=self.scale(correct),
            numbers={
                "accuracy": {k: v.mean(axis=1).tolist() for k, v in correct.items()},
                "area": {name: float(area.inner.mean()) for name, area in areas.items()},
            },
            tables=[Table(["estimator", f"ROAR AUC {self.span}", "[0, 1]"], rows, note)],
            claims=claims,
            reduced=self.reduced,
        )
