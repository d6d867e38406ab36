"""Randomised layers (Adebayo et al. 2018): do maps depend on what the network has learnt?"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bench.paper import plots
from bench.paper.evidence import Claim, Conclusion, Table, medians_table
from bench.paper.experiments.subjects import PLOTTED, OnSubjects, Subject, predicted, titles
from bench.paper.maps import all_methods, heatmaps
from bench.paper.runner import Arrays, Results, Unit, of_networks, stacked
from bench.paper.sources import Sources
from rectgrad_ref.explainer import Explainer
from rectgrad_ref.methods import Method

from ..likeness import RANK, SSIM, likeness
from ..networks import layers, randomized
from .modified import GRADIENT, more_alike

KINDS = {"cascading": "of the named layer and all above it", "independent": "of that layer only"}
MEASURES = (RANK, SSIM)
_CHANCE = "two images"


@dataclass(frozen=True)
class Change:
    """The layers that get random weights, and the lowest of them."""

    kind: str
    stage: str
    names: Sequence[str]

    @property
    def key(self) -> str:
        return f"{self.kind} {self.stage}".replace("/", " ")


@dataclass(frozen=True, kw_only=True)
class Randomization(OnSubjects):
    """Likeness of maps before and after layers have got random weights.

    Attributes
    ----------
    draws
        Of random weights.
    stages
        Depths, evenly spaced over the layers, the first and the last among them.
    """

    name = "randomization"
    title = "Randomised layers"
    figures = "Adebayo et al. 2018, Sixt et al. 2020"
    paper = (
        "Maps of Guided BP hardly change as the upper layers get random weights, from the output "
        "down or one alone, so they cannot explain what these layers do; gradients change at once "
        "(Adebayo et al.). RectGrad and Deconvolution are as blind to the upper layers (Sixt et "
        "al.)."
    )
    quick: ClassVar[Mapping[str, Any]] = {"images": 50, "photos": 2, "draws": 1, "stages": 4}

    images: int = 100
    photos: int = 8
    draws: int = 3
    stages: int = 7

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        units: dict[str, Unit] = {}

        def before(subject: Subject, x: np.ndarray, keys: np.ndarray) -> Arrays:
            methods = _methods(subject.key, sources.seed)
            return heatmaps(subject.explainer, x, methods, keys=keys)

        def chance(subject: Subject) -> Arrays:
            maps = stacked(done, f"before-{subject.key}-")
            return _compared(maps, {name: np.roll(m, 1, axis=0) for name, m in maps.items()})

        def after(
            subject: Subject, key: str, x: np.ndarray, keys: np.ndarray, draw: int, change: Change
        ) -> Arrays:
            rng = np.random.default_rng([sources.seed, draw, zlib.crc32(change.key.encode())])
            model = randomized(subject.path, change.names, rng)
            target = predicted(subject.explainer, x)
            explainer = Explainer(model, backend=sources.backend)
            methods = _methods(subject.key, sources.seed)
            maps = heatmaps(explainer, x, methods, keys=keys, target=target)
            return _compared(done[f"before-{key}"], maps)

        for subject in self.subjects(sources):
            for key, x, keys in subject.batches():
                units[f"before-{key}"] = partial(before, subject, x, keys)
            units[f"chance-{subject.key}-all"] = partial(chance, subject)
            changes = self.changes(subject.path)
            for key, x, keys in subject.batches():
                for draw, change in itertools.product(range(self.draws), changes):
                    units[f"{draw}-{change.key}-{key}"] = partial(
                        after, subject, key, x, keys, draw, change
                    )
        return units

    def changes(self, path: Path) -> list[Change]:
        """All that are made to a network, from the output down."""
        names = layers(path)
        chosen = np.rint(np.linspace(0, len(names) - 1, min(self.stages, len(names)))).astype(int)
        return [
            Change(kind, names[i], names[: i + 1] if kind == "cascading" else [names[i]])
            for kind in KINDS
            for i in chosen
        ]

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        paths = {"cifar": sources.network_file()}
        if sources.classifier is not None:
            paths["photo"] = sources.classifier.path
        claims: list[Claim] = []
        tables: list[Table] = []
        numbers: dict[str, Any] = {}
        scale = []
        for subject, title in titles(sources).items():
            changes = self.changes(paths[subject])
            values = {
                _CHANCE: stacked(found, f"chance-{subject}-"),
                **{
                    change.key: of_networks(found, self.draws, f"{change.key}-{subject}-")
                    for change in changes
                },
            }
            scale.append(f"{len(values[_CHANCE][f'{RANK}, {GRADIENT}'])} images on {title}")
            claims += _claims(values, subject, title, _upper(changes))
            numbers[subject] = {}
            for kind, measure in itertools.product(KINDS, MEASURES):
                stages = {_CHANCE: _CHANCE} | {c.key: c.stage for c in changes if c.kind == kind}
                samples = {
                    method: [values[key][f"{measure}, {method}"] for key in stages]
                    for method in _methods(subject)
                }
                note = f"{title}, weights random {KINDS[kind]}: median {measure}."
                tables.append(medians_table(list(stages.values()), samples, note))
                numbers[subject][f"{kind}, {measure}"] = {
                    "stages": list(stages.values()),
                    "medians": {m: [float(np.median(v)) for v in s] for m, s in samples.items()},
                }
        return Conclusion(
            scale=(
                f"{' and '.join(scale)}; {self.draws} draws of random weights, Glorot-uniform, "
                "biases zero."
            ),
            numbers=numbers,
            tables=tables,
            claims=claims,
            remarks=[
                "The target stays the class that the trained network predicts. Two images: the "
                "likeness of maps of two different images by the trained network, which is chance. "
                "It is high by SSIM where maps are sparse, whatever they show. Rank correlation is "
                "Spearman's, of absolute values."
            ],
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        panels = list(itertools.product(conclusion.numbers, MEASURES))
        figure, axes = plots.figure(len(panels), width=2.7, height=3)
        for ax, (subject, measure) in zip(axes, panels, strict=True):
            shown = conclusion.numbers[subject][f"cascading, {measure}"]
            stages = shown["stages"][1:]
            plots.curves(
                ax,
                range(len(stages) + 1),
                {m: np.array([1, *medians[1:]]) for m, medians in shown["medians"].items()},
                xlabel="random down to",
                ylabel=measure,
                title=PLOTTED[subject],
                legend=False,
            )
            labels = ["none", *(stage.replace("/", " ") for stage in stages)]
            ax.set_xticks(range(len(labels)), labels, rotation=90)
        plots.shared_legend(figure, axes[0])
        return [plots.save(figure, folder, self.name)]


def _upper(changes: Sequence[Change]) -> Change:
    """The cascade that has reached a third of the depth."""
    cascades = [change for change in changes if change.kind == "cascading"]
    return cascades[max(0, len(cascades) // 3 - 1)]


def _claims(
    values: Mapping[str, Arrays], subject: str, title: str, change: Change
) -> Iterator[Claim]:
    for measure in MEASURES:
        samples = {m: values[change.key][f"{measure}, {m}"] for m in _methods(subject)}
        text = (
            f"{title}: random from the output down to {change.stage}, {{method}} stays more like "
            f"itself than Saliency by {measure}"
        )
        yield from more_alike(samples, text, "draws")


def _methods(subject: str, seed: int = 0) -> dict[str, Method]:
    """Of a large network only those that walk back once."""
    methods = all_methods(seed)
    return {n: m for n, m in methods.items() if subject == "cifar" or m.walks_once}


def _compared(before: Arrays, after: Arrays) -> Arrays:
    return {
        f"{measure}, {method}": values
        for method in after
        for measure, values in likeness(before[method], after[method]).items()
        if measure in MEASURES
    }
