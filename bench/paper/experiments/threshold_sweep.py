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
from ..maps import heatmaps, nonzero, shown, similarity
from ..runner import Arrays, Results, Unit
from ..sources import Sources
from .subjects import OnSubjects, by_network

THRESHOLDS = {
    "τ = 0": RectGrad(tau=0.0, final_threshold=False),
    **{f"q = {q}": RectGrad(q=q, final_threshold=False) for q in (0, 10, 20, 80, 90, 95, 99)},
}
_QS = tuple(THRESHOLDS)[1:]
_REFERENCE = "q = 20"
_ALIKE = 0.9


@dataclass(frozen=True, kw_only=True)
class ThresholdSweep(OnSubjects):
    """How alike the maps at different q are, and how sparse."""

    name = "threshold_sweep"
    title = "Threshold sweep"
    figures = "figure 4"
    paper = (
        "At q = 0 the maps are incomprehensible; from q = 20 to 80 they hardly change, since most "
        "scores are zero; above 80 they become sparser. (By eye, three butterflies.)"
    )
    quick: ClassVar[Mapping[str, Any]] = {"images": 100, "photos": 4}
    revision = 2

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        return {
            key: partial(_sweep, subject.explainer, x)
            for subject in self.subjects(sources)
            for key, x, _ in subject.batches()
        }

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        parts = by_network(sources, found)
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
        measures = {
            "alike": "cosine with the map at q = 20",
            "nonzero": "fraction of pixels not zero",
        }
        for ax, (measure, label) in zip(axes, measures.items(), strict=True):
            lines = {
                network: np.array([medians[f"{measure}, {q}"] for q in _QS])
                for network, medians in conclusion.numbers.items()
            }
            plots.curves(ax, range(len(_QS)), lines, xlabel="q", ylabel=label, marker="o")
            ax.set_xticks(range(len(_QS)), [q.removeprefix("q = ") for q in _QS])
            ax.set_ylim(min(0, *(line.min() for line in lines.values())), 1.05)
        return [plots.save(figure, folder, self.name)]

    def pictures(self, sources: Sources, folder: Path) -> None:
        if sources.classifier is None:
            return
        explainer = sources.classifier.load(sources.backend)
        photos = list(sources.classifier.pictures(min(self.photos, 12)).values())
        found = [explainer.explain(photos, method=m) for m in THRESHOLDS.values()]
        picture.save(picture.threshold_sweep(found, list(THRESHOLDS)), folder / "figure_4.png")


def _sweep(explainer: Explainer, x: np.ndarray) -> Arrays:
    maps = shown(heatmaps(explainer, x, THRESHOLDS), sparse=False)
    result = {}
    for name, heatmap in maps.items():
        result[f"alike, {name}"] = similarity(heatmap, maps[_REFERENCE])
        result[f"nonzero, {name}"] = nonzero(heatmap)
    return result


def _alike(values: Arrays, network: str) -> Claim:
    cosines = values["alike, q = 80"]
    pair = compare(cosines, {"": _ALIKE})[""]
    return Claim(
        f"{network}: maps from q = 20 to 80 are alike",
        pair.higher,
        f"median cosine of q = 20 and q = 80 {np.median(cosines):.3f}, more than {_ALIKE} on "
        f"{1 - pair.wins:.0%} of the images, {p_value(pair.p)}",
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
