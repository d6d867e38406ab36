"""Side by side (figure 1): four methods on photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rectgrad_ref import picture

from ..evidence import Claim, Conclusion, Table, compare, higher_than, lower_than
from ..maps import (
    RECTGRAD,
    concentration,
    figure_1_methods,
    heatmaps,
    nonzero,
    relative_variation,
    shown,
)
from ..runner import Arrays, Experiment, Results, Unit, batches, stacked
from ..sources import Sources


@dataclass(frozen=True, kw_only=True)
class SideBySide(Experiment):
    """Pictures, and how noisy and how concentrated the maps are.

    Attributes
    ----------
    photos
        The first of the photographs.
    """

    name = "side_by_side"
    title = "Side by side"
    figures = "figure 1"
    paper = (
        "A saliency map looks like noise, Deconvolution and Guided BP are sharp, RectGrad is sharp "
        "and keeps to the object. (By eye.)"
    )
    quick: ClassVar[Mapping[str, Any]] = {"photos": 4}
    revision = 3

    photos: int = 100

    def inputs(self, sources: Sources) -> dict[str, str]:
        return sources.needed_classifier().checksums(self.photos)

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        classifier = sources.needed_classifier()
        explainer = classifier.load(sources.backend)
        photos = list(classifier.pictures(self.photos).values())

        def measures(rows: slice) -> Arrays:
            result = {}
            maps = heatmaps(explainer, photos[rows], figure_1_methods())
            for name, heatmap in shown(maps, sparse=False).items():
                result[f"nonzero, {name}"] = nonzero(heatmap)
                result[f"concentration, {name}"] = concentration(heatmap)
                result[f"variation, {name}"] = relative_variation(heatmap)
            return result

        return {key: partial(measures, rows) for key, rows in batches(len(photos), 4).items()}

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        values, methods = stacked(found), list(figure_1_methods())
        medians = {name: float(np.median(v)) for name, v in values.items()}
        rows = [
            [
                name,
                f"{medians[f'nonzero, {name}']:.1%}",
                f"{medians[f'concentration, {name}']:.1%}",
                f"{medians[f'variation, {name}']:.2f}",
            ]
            for name in methods
        ]
        head = ["method", "pixels that are not zero", "of Σ|map| on 5 % of the pixels"]
        noise = {name: values[f"variation, {name}"] for name in methods}
        concentrations = {name: values[f"concentration, {name}"] for name in methods}
        return Conclusion(
            scale=(
                f"{len(noise[RECTGRAD])} photographs, {sources.needed_classifier().path.stem}; the "
                "paper judges one by eye."
            ),
            numbers=medians,
            tables=[Table([*head, "total variation / Σ|map|"], rows, "Medians over photographs.")],
            claims=[
                _less_noisy(noise, "Deconvolution", ["Saliency"]),
                _less_noisy(noise, "Guided BP", ["Saliency"]),
                _less_noisy(noise, RECTGRAD, methods[:-1]),
                _more_concentrated(concentrations, RECTGRAD, methods[:-1]),
            ],
        )

    def pictures(self, sources: Sources, folder: Path) -> None:
        classifier = sources.needed_classifier()
        explainer = classifier.load(sources.backend)
        photos = list(classifier.pictures(min(self.photos, 12)).values())
        found = [explainer.explain(photos, method=m) for m in figure_1_methods().values()]
        picture.save(picture.side_by_side(found), folder / "figure_1.png")


def _less_noisy(values: Mapping[str, np.ndarray], ours: str, others: Sequence[str]) -> Claim:
    pairs = compare(values[ours], {name: values[name] for name in others})
    return Claim(
        f"{ours} is less like noise than {', '.join(others)}",
        all(pair.lower for pair in pairs.values()),
        f"by the total variation / Σ|map|, {lower_than(ours, pairs)}",
    )


def _more_concentrated(values: Mapping[str, np.ndarray], ours: str, others: Sequence[str]) -> Claim:
    pairs = compare(values[ours], {name: values[name] for name in others})
    return Claim(
        f"{ours} is more concentrated than {', '.join(others)}",
        all(pair.higher for pair in pairs.values()),
        f"by the fraction of Σ|map| on 5 % of the pixels, {higher_than(ours, pairs)}",
    )
