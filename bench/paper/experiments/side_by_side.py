"""Side by side (figure 1): four methods on photographs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rectgrad_ref import picture

from ..evidence import Conclusion, Table
from ..maps import concentration, figure_1_methods, heatmaps, nonzero
from ..runner import Arrays, Experiment, Results, Unit, batches, stacked
from ..sources import Sources


@dataclass(frozen=True, kw_only=True)
class SideBySide(Experiment):
    """Pictures, and how concentrated the maps are.

    Attributes
    ----------
    photos
        The first of the photographs.
    """

    name: ClassVar[str] = "side_by_side"
    title: ClassVar[str] = "Side by side"
    figures: ClassVar[str] = "figure 1"
    paper: ClassVar[str] = (
        "A saliency map looks like noise, Deconvolution and Guided BP are sharp, RectGrad is sharp "
        "and keeps to the object. (By eye; no claim in numbers.)"
    )
    quick: ClassVar[Mapping[str, Any]] = {"photos": 4}

    photos: int = 100

    def inputs(self, sources: Sources) -> dict[str, str]:
        return sources.needed_classifier().checksums(self.photos)

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        classifier = sources.needed_classifier()
        explainer = classifier.load(sources.backend)
        photos = list(classifier.pictures(self.photos).values())

        def measures(rows: slice) -> Arrays:
            result = {}
            for name, heatmap in heatmaps(explainer, photos[rows], figure_1_methods()).items():
                result[f"nonzero, {name}"] = nonzero(heatmap)
                result[f"concentration, {name}"] = concentration(heatmap)
            return result

        return {key: partial(measures, rows) for key, rows in batches(len(photos), 4).items()}

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        values = stacked(found)
        medians = {name: float(np.median(v)) for name, v in values.items()}
        rows = [
            [name, f"{medians[f'nonzero, {name}']:.1%}", f"{medians[f'concentration, {name}']:.1%}"]
            for name in figure_1_methods()
        ]
        head = ["method", "pixels that are not zero", "of Σ|map| on 5 % of the pixels"]
        network = sources.needed_classifier().path.stem
        return Conclusion(
            scale=f"{len(next(iter(values.values())))} photographs, {network}.",
            numbers=medians,
            tables=[Table(head, rows, "Medians over photographs.")],
            claims=[],
        )

    def pictures(self, sources: Sources, folder: Path) -> None:
        classifier = sources.needed_classifier()
        explainer = classifier.load(sources.backend)
        photos = list(classifier.pictures(min(self.photos, 12)).values())
        found = [explainer.explain(photos, method=m) for m in figure_1_methods().values()]
        picture.save(picture.side_by_side(found), folder / "figure_1.png")
