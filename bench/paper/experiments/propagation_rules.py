"""Propagation rules (figure 17 and appendix B): RectGrad against Mod, and PR1 to PR4 in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rectgrad_ref import picture
from rectgrad_ref.explainer import Explainer
from rectgrad_ref.methods import RectGrad

from .. import plots
from ..deletion import deletion_curve
from ..evidence import Claim, Conclusion, Table, compare, lower_than, number, p_value
from ..maps import (
    background_attribution,
    heatmaps,
    object_share,
    relative_variation,
    total_variation,
)
from ..runner import Arrays, Experiment, Results, Unit, batches, stacked
from ..sources import Masked, Sources, checksum, normalized
from .masked import masked_inputs

RULES = {
    "PR1 (RectGrad)": RectGrad(),
    "PR2": RectGrad(propagation_rule="PR2"),
    "PR3": RectGrad(propagation_rule="PR3"),
    "PR4": RectGrad(propagation_rule="PR4"),
    "Mod": RectGrad(propagation_rule="mod"),
}
_PR1 = "PR1 (RectGrad)"
_MEASURES = {
    "background": "Σ|map| on the background",
    "variation": "total variation",
    "share": "fraction of Σ|map| on the background",
    "relative": "total variation / Σ|map|",
    "deletion": "deletion test",
}
_SCALE_FREE = ("share", "relative", "deletion")


@dataclass(frozen=True, kw_only=True)
class PropagationRules(Experiment):
    """Noise and faithfulness of the candidates for the propagation rule.

    Attributes
    ----------
    masked
        Images with a mask, of each class.
    images
        The first of the test set, for the deletion test and total variation.
    steps
        Fractions of the pixels that are deleted, evenly spaced from 0 to 1.
    photos
        The first of the photographs, for pictures.
    """

    name = "propagation_rules"
    title = "Propagation rules"
    figures = "figure 17, appendix B"
    paper = (
        "The rule with |a·R| below the last layer (Mod) often misses the object's discriminating "
        "features or highlights the background; PR3 and PR4 fail in a single layer already. So PR1."
    )
    quick: ClassVar[Mapping[str, Any]] = {"images": 200, "photos": 4}
    revision = 2

    masked: int = 10
    images: int = 10_000
    steps: int = 21
    photos: int = 12

    def inputs(self, sources: Sources) -> dict[str, str]:
        return {
            **masked_inputs(sources, self.masked),
            "test": checksum(sources.test.images[: self.images]),
        }

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        explainer = sources.network()
        chosen = sources.correctly_classified(self.masked)
        images = sources.test.images[: self.images]
        mean = normalized(sources.train.images[:10_000]).mean(axis=(0, 2, 3))
        units: dict[str, Unit] = {
            f"masked-{key}": partial(_on_background, explainer, chosen.pick(rows))
            for key, rows in batches(len(chosen.keys), 50).items()
        }
        for key, rows in batches(len(images), 100).items():
            units[f"test-{key}"] = partial(
                _on_test_images, explainer, normalized(images[rows]), mean, self.steps
            )
        return units

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        parts = stacked(found, "masked-") | stacked(found, "test-")
        values = {
            measure: {rule: parts[f"{measure}, {rule}"] for rule in RULES} for measure in _MEASURES
        }
        rows = [
            [rule, *(number(float(np.median(values[m][rule]))) for m in _MEASURES)]
            for rule in RULES
        ]
        claims = []
        for measure in _SCALE_FREE:
            title = _MEASURES[measure]
            ours = values[measure][_PR1]
            pairs = compare(ours, {r: v for r, v in values[measure].items() if r != _PR1})
            claims.append(
                Claim(
                    f"PR1 is better than Mod by the {title}",
                    pairs["Mod"].lower,
                    f"lower on {pairs['Mod'].wins:.0%} of the images, {p_value(pairs['Mod'].p)}",
                )
            )
            others = {rule: pair for rule, pair in pairs.items() if rule != "Mod"}
            claims.append(
                Claim(
                    f"PR1 is better than PR2, PR3 and PR4 by the {title}",
                    all(pair.lower for pair in others.values()),
                    lower_than("PR1", others),
                )
            )
        return Conclusion(
            scale=(
                f"{len(values['background'][_PR1])} images with masks, "
                f"{len(values['variation'][_PR1]):,} of the 10,000 test images; one network (seed "
                "0); the paper judges photographs by eye."
            ),
            numbers={
                measure: {rule: float(np.median(v)) for rule, v in rules.items()}
                for measure, rules in values.items()
            },
            tables=[
                Table(
                    ["rule", *_MEASURES.values()],
                    rows,
                    "Medians over images; lower is better in each column. Deletion: the predicted "
                    "class's softmax probability, averaged over the fractions of pixels that are "
                    "replaced by the mean colour, those of largest attribution first. It does not "
                    "retrain, so it also rewards what merely makes unnatural images. The first two "
                    "measures compare the scales of the maps too (a rule that passes less has "
                    "less on the background), so claims are tested on the other three.",
                )
            ],
            claims=claims,
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        parts = stacked(found, "masked-") | stacked(found, "test-")
        figure, axes = plots.figure(3, width=2.8, height=2)
        for ax, measure in zip(axes, _SCALE_FREE, strict=True):
            values = {rule: parts[f"{measure}, {rule}"] for rule in RULES}
            plots.boxes(ax, values, ours=(_PR1,), label=_MEASURES[measure])
        return [plots.save(figure, folder, self.name)]

    def pictures(self, sources: Sources, folder: Path) -> None:
        if sources.classifier is None:
            return
        explainer = sources.classifier.load(sources.backend)
        photos = list(sources.classifier.pictures(self.photos).values())
        pair = (RULES[_PR1], RULES["Mod"])
        found = [explainer.explain(photos, method=rule) for rule in pair]
        picture.save(picture.side_by_side(found), folder / "figure_17.png")


def _on_background(explainer: Explainer, images: Masked) -> Arrays:
    maps = heatmaps(explainer, normalized(images.images), RULES)
    result = {}
    for rule, heatmap in maps.items():
        result[f"background, {rule}"] = background_attribution(heatmap, images.background)
        result[f"share, {rule}"] = 1 - object_share(heatmap, images.background)
    return result


def _on_test_images(explainer: Explainer, x: np.ndarray, mean: np.ndarray, steps: int) -> Arrays:
    result = {}
    for rule, heatmap in heatmaps(explainer, x, RULES).items():
        result[f"variation, {rule}"] = total_variation(heatmap)
        result[f"relative, {rule}"] = relative_variation(heatmap)
        curve = deletion_curve(explainer, x, heatmap, mean, steps)
        result[f"deletion, {rule}"] = curve.mean(axis=1)
    return result
