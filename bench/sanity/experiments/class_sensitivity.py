"""Class sensitivity: the maps of two classes on the same image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bench.paper import plots
from bench.paper.evidence import Conclusion, medians_table
from bench.paper.experiments.subjects import PLOTTED, OnSubjects, Subject, by_network
from bench.paper.maps import OURS, all_methods, heatmaps
from bench.paper.runner import Arrays, Results, Unit, stacked
from bench.paper.sources import Sources

from ..likeness import MEASURES, RANK, likeness
from .modified import more_alike


@dataclass(frozen=True, kw_only=True)
class ClassSensitivity(OnSubjects):
    """Likeness of the maps of the predicted class and of another, drawn at random."""

    name = "class_sensitivity"
    title = "Class sensitivity"
    figures = "Nie et al. 2018, Sixt et al. 2020"
    paper = (
        "Maps of Guided BP and Deconvolution are nearly the same whatever class they are asked "
        "about (Nie et al.); RectGrad's too (Sixt et al.)."
    )
    quick: ClassVar[Mapping[str, Any]] = {"images": 100, "photos": 4}

    images: int = 1000

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        methods = all_methods(sources.seed)

        def compared(subject: Subject, x: np.ndarray, keys: np.ndarray) -> Arrays:
            logits = subject.explainer.explain(x, method="random").logits
            first, count = logits.argmax(axis=1), logits.shape[1]
            steps = [np.random.default_rng([sources.seed, k]).integers(1, count) for k in keys]
            pair = [
                heatmaps(subject.explainer, x, methods, keys=keys, target=target)
                for target in (first, (first + np.array(steps)) % count)
            ]
            return {
                f"{measure}, {method}": values
                for method in methods
                for measure, values in likeness(pair[0][method], pair[1][method]).items()
            }

        return {
            key: partial(compared, subject, x, keys)
            for subject in self.subjects(sources)
            for key, x, keys in subject.batches()
        }

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        claims, tables, scale, numbers = [], [], [], {}
        for title, values in by_network(sources, found).items():
            ranks = {method: values[f"{RANK}, {method}"] for method in all_methods()}
            text = f"{title}: {{method}}'s maps of two classes are more alike than Saliency's"
            claims += more_alike(ranks, text)
            scale.append(f"{len(ranks[OURS[0]]):,} images on {title}")
            samples = {m: [values[f"{measure}, {m}"] for measure in MEASURES] for m in ranks}
            note = f"{title}: likeness of the maps of two classes, medians; 1: the same map."
            tables.append(medians_table(MEASURES, samples, note))
            numbers[title] = {name: float(np.median(v)) for name, v in values.items()}
        return Conclusion(
            scale=f"{' and '.join(scale)}.",
            numbers=numbers,
            tables=tables,
            claims=claims,
            remarks=[
                "Claims are by the rank correlation of absolute values, to which a change of sign "
                "is no change. The other class is drawn at random, for each image once."
            ],
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        subjects = [s for s in PLOTTED if any(key.startswith(s) for key in found)]
        figure, axes = plots.figure(len(subjects), width=3.6, height=2.8)
        for ax, subject in zip(axes, subjects, strict=True):
            values = stacked(found, f"{subject}-")
            ranks = {method: values[f"{RANK}, {method}"] for method in all_methods()}
            title = PLOTTED[subject]
            plots.boxes(ax, ranks, ours=OURS, label=f"{RANK} of two classes' maps", title=title)
        return [plots.save(figure, folder, self.name)]
