"""Threshold sweep (figure 4): what the percentile q does to RectGrad's map."""

from __future__ import annotations

import itertools
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
from ..evidence import Claim, Conclusion, Table, compare, p_value
from ..maps import heatmaps, nonzero, similarity
from ..runner import Arrays, Experiment, Results, Unit, batches, stacked
from ..sources import Sources, checksum, normalized

THRESHOLDS = {
    "τ = 0": RectGrad(tau=0.0, final_threshold=False),
    **{f"q = {q}": RectGrad(q=q, final_threshold=False) for q in (0, 10, 20, 80, 90, 95, 99)},
}
_QS = tuple(THRESHOLDS)[1:]
_REFERENCE = "q = 20"
_ALIKE = 0.9


@dataclass(frozen=True, kw_only=True)
class ThresholdSweep(Experiment):
    """How alike the maps at different q are, and how sparse.

    Attributes
    ----------
    images
        The first of the CIFAR-10 test set.
    photos
        The first of the photographs.
    """

    name: ClassVar[str] = "threshold_sweep"
    title: ClassVar[str] = "Threshold sweep"
    figures: ClassVar[str] = "figure 4"
    paper: ClassVar[str] = (
        "At q = 0 the maps are incomprehensible; from q = 20 to 80 they hardly change, since most "
        "scores are zero; above 80 they become sparser. (By eye, three butterflies.)"
    )
    quick: ClassVar[Mapping[str, Any]] = {"images": 100, "photos": 4}

    images: int = 10_000
    photos: int = 100

    def inputs(self, sources: Sources) -> dict[str, str]:
        return {
            "network": sources.network().model.sha256,
            "test": checksum(sources.test.images[: self.images]),
            **sources.needed_classifier().checksums(self.photos),
        }

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        explainer, images = sources.network(), sources.test.images[: self.images]
        units: dict[str, Unit] = {
            f"cifar-{key}": partial(_sweep_arrays, explainer, normalized(images[rows]))
            for key, rows in batches(len(images), 100).items()
        }
        classifier = sources.needed_classifier()
        loaded = classifier.load(sources.backend)
        photos = list(classifier.pictures(self.photos).values())
        for key, rows in batches(len(photos), 4).items():
            units[f"photo-{key}"] = partial(_sweep_arrays, loaded, photos[rows])
        return units

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        parts = {
            "CIFAR-10": stacked(found, "cifar-"),
            sources.needed_classifier().path.stem: stacked(found, "photo-"),
        }
        claims, tables = [], []
        for network, values in parts.items():
            claims += [
                _alike(values, network),
                _differs(values, network),
                _sparser(values, network),
            ]
            rows = [
                [
                    name,
                    f"{np.median(values[f'alike, {name}']):.3f}",
                    f"{np.median(values[f'nonzero, {name}']):.1%}",
                ]
                for name in THRESHOLDS
            ]
            note = f"{network}, {len(values[f'alike, {_REFERENCE}'])} images; medians."
            head = ["threshold", f"cosine with {_REFERENCE}", "pixels that are not zero"]
            tables.append(Table(head, rows, note))
        return Conclusion(
            scale="; ".join(
                f"{len(values[f'alike, {_REFERENCE}']):,} images on {network}"
                for network, values in parts.items()
            )
            + "; the paper: three photographs, Inception V4.",
            numbers={
                network: {name: float(np.median(v)) for name, v in values.items()}
                for network, values in parts.items()
            },
            tables=tables,
            claims=claims,
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        figure, axes = plots.figure(2, width=3, height=2.5)
        parts = {"CIFAR-10": stacked(found, "cifar-"), "photographs": stacked(found, "photo-")}
        measures = {"alike": "cosine with the map at q = 20", "nonzero": "pixels not zero"}
        for ax, (measure, label) in zip(axes, measures.items(), strict=True):
            lines = {
                name: np.array([np.median(values[f"{measure}, {q}"]) for q in _QS])
                for name, values in parts.items()
            }
            plots.curves(ax, range(len(_QS)), lines, xlabel="q", ylabel=label, marker="o")
            ax.set_xticks(range(len(_QS)), [q.removeprefix("q = ") for q in _QS])
            ax.set_ylim(min(0, *(line.min() for line in lines.values())), 1.05)
        return [plots.save(figure, folder, self.name)]

    def pictures(self, sources: Sources, folder: Path) -> None:
        classifier = sources.needed_classifier()
        explainer = classifier.load(sources.backend)
        photos = list(classifier.pictures(min(self.photos, 12)).values())
        found = [explainer.explain(photos, method=m) for m in THRESHOLDS.values()]
        picture.save(picture.threshold_sweep(found, list(THRESHOLDS)), folder / "figure_4.png")


def _sweep_arrays(explainer: Explainer, images: Any) -> Arrays:
    maps = heatmaps(explainer, images, THRESHOLDS)
    result = {}
    for name, heatmap in maps.items():
        result[f"alike, {name}"] = similarity(heatmap, maps[_REFERENCE])
        result[f"nonzero, {name}"] = nonzero(heatmap)
    return result


def _alike(values: Arrays, network: str) -> Claim:
    median = float(np.median(values["alike, q = 80"]))
    return Claim(
        f"{network}: maps from q = 20 to 80 are alike",
        median > _ALIKE,
        f"median cosine of q = 20 and q = 80 {median:.3f} (more than {_ALIKE})",
    )


def _differs(values: Arrays, network: str) -> Claim:
    pair = compare(values["alike, q = 0"], {"": values["alike, q = 80"]})[""]
    return Claim(
        f"{network}: q = 0 is less like q = 20 than q = 80 is",
        pair.lower,
        f"median cosine {np.median(values['alike, q = 0']):.3f}, lower on {pair.wins:.0%} of the "
        f"images, {p_value(pair.p)}",
    )


def _sparser(values: Arrays, network: str) -> Claim:
    steps = [f"q = {q}" for q in (80, 90, 95, 99)]
    pairs = [
        compare(values[f"nonzero, {b}"], {a: values[f"nonzero, {a}"]})[a]
        for a, b in itertools.pairwise(steps)
    ]
    shares = ", ".join(f"{np.median(values[f'nonzero, {name}']):.1%}" for name in steps)
    return Claim(
        f"{network}: maps become sparser from each of q = 80, 90, 95, 99 to the next",
        all(pair.lower for pair in pairs),
        f"pixels that are not zero, medians: {shares}; least sure: "
        f"{p_value(max(pair.p for pair in pairs))}",
    )
