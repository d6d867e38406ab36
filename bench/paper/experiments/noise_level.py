"""Noise level (figure 8): attribution on the background, and total variation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .. import plots
from ..evidence import (
    Claim,
    Conclusion,
    Table,
    compare,
    distribution_table,
    lower_than,
    networks_used,
    number,
    quartiles,
)
from ..maps import (
    OURS,
    PRR,
    RECTGRAD,
    background_attribution,
    heatmaps,
    measured,
    paper_methods,
    relative_variation,
    total_variation,
)
from ..runner import Arrays, Experiment, Results, Unit, batches, of_networks
from ..sources import Sources, checksum, normalized
from .masked import masked_inputs

PAPER_BACKGROUND = {RECTGRAD: 450.0, PRR: 300.0}  # over all 100 images
PAPER_VARIATION = {
    RECTGRAD: 48.0,
    PRR: 30.0,
    "Saliency": 630.0,
    "Guided BP": 270.0,
    "SmoothGrad": 205.0,
    "Gradient × input": 300.0,
    "IntegGrad": 220.0,
    "DeepLIFT": 145.0,
}
_RELATIVE = "relative, "
_PARTS = {
    "background": "Attribution outside the mask",
    "test": "Total variation, test images",
    "train": "Total variation, training images",
}


@dataclass(frozen=True, kw_only=True)
class NoiseLevel(Experiment):
    """How noisy the maps of each method are.

    Attributes
    ----------
    masked
        Images with a mask, of each class.
    images
        The first of the test set, and of the training set.
    networks
        Of the first seeds.
    batch
        Images a unit of work.
    """

    name = "noise_level"
    title = "Noise level"
    figures = "figure 8"
    paper = (
        "RectGrad with PRR puts the least attribution on the background, then RectGrad; the total "
        "variation of their maps is the lowest too."
    )
    quick: ClassVar[Mapping[str, Any]] = {"images": 100}
    revision = 2

    masked: int = 10
    images: int = 10_000
    networks: int = 1
    batch: int = 100

    def inputs(self, sources: Sources) -> dict[str, str]:
        return {
            **masked_inputs(sources, self.masked, self.networks),
            "test": checksum(sources.test.images[: self.images]),
            "train": checksum(sources.train.images[: self.images]),
        }

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        methods = paper_methods(sources.seed)
        chosen = sources.correctly_classified(self.masked, self.networks)

        def on_background(seed: int, rows: slice) -> Arrays:
            part = chosen.pick(rows)
            x = normalized(part.images)
            maps = heatmaps(sources.network(seed), x, methods, keys=part.keys)
            return {
                name: background_attribution(heatmap, part.background)
                for name, heatmap in measured(maps).items()
            }

        def variation(seed: int, images: np.ndarray, rows: slice) -> Arrays:
            keys = np.arange(rows.start, rows.stop)
            maps = heatmaps(sources.network(seed), normalized(images[rows]), methods, keys=keys)
            used = measured(maps)
            return {
                **{name: total_variation(heatmap) for name, heatmap in used.items()},
                **{_RELATIVE + name: relative_variation(h) for name, h in used.items()},
            }

        units: dict[str, Unit] = {}
        for seed in range(self.networks):
            for key, rows in batches(len(chosen.keys), self.batch).items():
                units[f"{seed}-background-{key}"] = partial(on_background, seed, rows)
            for split, data in (("test", sources.test), ("train", sources.train)):
                for key, rows in batches(min(self.images, len(data.labels)), self.batch).items():
                    units[f"{seed}-{split}-{key}"] = partial(variation, seed, data.images, rows)
        return units

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        parts = self._by_part(found)
        relative = _relative(of_networks(found, self.networks, "test-"))
        claims, tables, numbers = [], [], {"relative": _quartiles(relative)}
        for part, title in _PARTS.items():
            values = parts[part]
            numbers[part] = _quartiles(values)
            tables.append(_table(values, part, title))
            claims += [_lowest(values, PRR, (), title), _lowest(values, RECTGRAD, (PRR,), title)]
        tables.append(
            distribution_table(
                relative,
                note="Total variation divided by Σ|map|, test images: the same whatever the scale "
                "of a map. Not a measure of the paper.",
            )
        )
        lowest = min(relative, key=lambda name: float(np.median(relative[name])))
        return Conclusion(
            scale=(
                f"{parts['background'][PRR].shape[1]} images with masks (the paper: 100); total "
                f"variation of the first {parts['test'][PRR].shape[1]:,} of the 10,000 test images "
                f"and as many training images; {networks_used(self.networks)}."
            ),
            numbers=numbers,
            tables=tables,
            claims=claims,
            remarks=[
                "The paper's measures are absolute: a method whose maps are small as a whole has "
                f"little noise by them. Relative to Σ|map|, {lowest} has the lowest median total "
                f"variation, {number(float(np.median(relative[lowest])))}, and RectGrad's is "
                f"{number(float(np.median(relative[RECTGRAD])))}.",
                "The caption of figure 8 speaks of test images, the authors' code of training "
                "images.",
            ],
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        parts = self._by_part(found)
        figure, axes = plots.figure(3, width=3.4, height=2.8)
        labels = {"background": "Σ|map| outside the mask", "test": "total variation of the map"}
        for ax, (part, title) in zip(axes, _PARTS.items(), strict=True):
            paper = None if part == "background" else PAPER_VARIATION
            label = labels.get(part, labels["test"])
            plots.boxes(
                ax, parts[part], ours=OURS, label=label, title=title, paper=paper, legend=False
            )
            ax.set_xscale("log")
            # Some whiskers end at zero.
            ax.set_xlim(left=min(np.percentile(v, 25) for v in parts[part].values()) / 4)
        plots.shared_legend(figure, axes[-1])
        return [plots.save(figure, folder, self.name)]

    def _by_part(self, found: Mapping[str, Arrays]) -> dict[str, dict[str, np.ndarray]]:
        return {
            part: {
                name: values
                for name, values in of_networks(found, self.networks, f"{part}-").items()
                if not name.startswith(_RELATIVE)
            }
            for part in _PARTS
        }


def _relative(values: Arrays) -> dict[str, np.ndarray]:
    return {n.removeprefix(_RELATIVE): v for n, v in values.items() if n.startswith(_RELATIVE)}


def _quartiles(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {name: quartiles(v) for name, v in values.items()}


def _table(values: Mapping[str, np.ndarray], part: str, title: str) -> Table:
    """The paper shows medians of total variation, but totals of what is on the background."""
    if part != "background":
        paper = {name: number(median) for name, median in PAPER_VARIATION.items()}
        return distribution_table(values, paper, f"{title}.")
    plain = distribution_table(values)
    shown = {name: number(total) for name, total in PAPER_BACKGROUND.items()}
    rows = [
        [*row, _with_spread(values[row[0]].sum(axis=-1)), shown.get(row[0], "–")]
        for row in plain.rows
    ]
    head = [*plain.head, "total", "paper's total, about"]
    return Table(head, rows, f"{title}, Σ|map| per image, and over all images.")


def _with_spread(values: np.ndarray) -> str:
    """Mean and standard deviation over networks."""
    spread = f" ± {number(float(values.std(ddof=1)))}" if len(values) > 1 else ""
    return f"{number(float(values.mean()))}{spread}"


def _lowest(values: Mapping[str, np.ndarray], ours: str, but: tuple[str, ...], title: str) -> Claim:
    pairs = compare(values[ours], {n: v for n, v in values.items() if n != ours and n not in but})
    text = f"{ours} is lowest{' after ' + but[0] if but else ''}"
    return Claim(
        f"{title}: {text}",
        all(pair.lower for pair in pairs.values()),
        lower_than(ours, pairs),
    )
