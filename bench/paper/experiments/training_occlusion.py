"""Training-set occlusion (figures 2 and 7): attribution in a patch that means nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rectgrad_ref import picture
from rectgrad_ref.onnx_models.cifar10_cnn import network_path

from .. import plots
from ..evidence import (
    SIGNIFICANT,
    Claim,
    Conclusion,
    compare,
    distribution_table,
    higher_than,
    lower_than,
    networks_used,
    number,
    quartiles,
)
from ..maps import OURS, PRR, RECTGRAD, heatmaps, measured, paper_methods
from ..runner import Arrays, Experiment, Results, Unit, batches, of_networks
from ..sources import Sources, checksum, normalized

_DRAWS = 1000
_PATCH = (slice(None), slice(0, 8), slice(0, 8))  # beyond it, the receptive field sees the image
PAPER_MEDIANS = {
    RECTGRAD: 0.2,
    PRR: 0.1,
    "Saliency": 2.7,
    "Guided BP": 0.0,
    "SmoothGrad": 5.5,
    "Gradient × input": 1.2,
    "IntegGrad": 1.5,
    "DeepLIFT": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class TrainingOcclusion(Experiment):
    """How much each method attributes to the patch that every training image had.

    Attributes
    ----------
    images
        The first of the test set.
    networks
        Of the first seeds.
    batch
        Images a unit of work.
    """

    name = "training_occlusion"
    title = "Training-set occlusion"
    figures = "figures 2 and 7"
    paper = (
        "Every training image has the same random patch in its upper left corner, so the patch "
        "means nothing. Accuracy hardly changes (74.6 → 73.1 %), saliency maps are nonzero on the "
        "patch all the same; RectGrad with PRR attributes least to it, RectGrad and DeepLIFT are "
        "similarly good, all others are worse."
    )
    quick: ClassVar[Mapping[str, Any]] = {"images": 200}

    images: int = 10_000
    networks: int = 1
    batch: int = 100

    def inputs(self, sources: Sources) -> dict[str, str]:
        return {
            **sources.network_checksums(self.networks, occluded=True),
            "images": checksum(sources.occluded_test[: self.images]),
        }

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        methods = paper_methods(sources.seed)

        def amounts(seed: int, rows: slice) -> Arrays:
            x, keys = normalized(sources.occluded_test[rows]), np.arange(rows.start, rows.stop)
            maps = heatmaps(sources.network(seed, occluded=True), x, methods, keys=keys)
            sums = {n: np.abs(m[_PATCH]).sum(axis=(1, 2)) for n, m in measured(maps).items()}
            any_saliency = (maps["Saliency"][_PATCH] != 0).mean(axis=(1, 2))
            return {**sums, "nonzero saliency": any_saliency}

        count = min(self.images, len(sources.test.labels))
        return {
            f"{seed}-{key}": partial(amounts, seed, rows)
            for seed in range(self.networks)
            for key, rows in batches(count, self.batch).items()
        }

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        amounts = dict(of_networks(found, self.networks))
        nonzero = amounts.pop("nonzero saliency")
        spread = {name: quartiles(values) for name, values in amounts.items()}
        accuracy = self._accuracies()
        plain, occluded = (float(np.mean(accuracy[kind])) for kind in ("normal", "occluded"))
        claims = [
            Claim(
                "The patch hardly changes the accuracy",
                abs(occluded - plain) < 0.02,
                f"{_percent(accuracy['normal'])} without it, {_percent(accuracy['occluded'])} with "
                f"it ({networks_used(self.networks)} of each; less than two points)",
            ),
            Claim(
                "Saliency maps are nonzero on the patch",
                bool(np.median(nonzero) > 0.5),
                f"on {np.median(nonzero):.0%} of its pixels in the median image",
            ),
            _least(amounts, PRR, ()),
            _least(amounts, RECTGRAD, (PRR, "DeepLIFT")),
            _lowest_upper_quartiles(amounts),
            _most(amounts, "SmoothGrad"),
        ]
        paper = {name: number(median) for name, median in PAPER_MEDIANS.items()}
        note = "Σ|map| in the 8 × 8 patch, per test image."
        return Conclusion(
            scale=(
                f"{nonzero.shape[1]:,} of the 10,000 test images; {networks_used(self.networks)}."
            ),
            numbers={"amount": spread, "accuracy": accuracy},
            tables=[distribution_table(amounts, paper, note)],
            claims=claims,
            remarks=[
                "Of a baseline's map only the strongest 5 % of the pixels are left, and often none "
                "of them is in the patch: "
                + ", ".join(
                    f"{np.mean(values == 0):.0%} of the images have none for {name}"
                    for name, values in amounts.items()
                    if name not in OURS
                )
                + ". RectGrad's maps are not cut."
            ],
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        amounts = dict(of_networks(found, self.networks))
        del amounts["nonzero saliency"]
        figure, (ax,) = plots.figure(width=5)
        label = "attribution in the random patch, Σ|map|"
        plots.boxes(ax, amounts, ours=OURS, label=label, paper=PAPER_MEDIANS)
        return [plots.save(figure, folder, self.name)]

    def _accuracies(self) -> dict[str, list[float]]:
        """Of the networks of each seed on the test sets that belong to them."""
        records = json.loads(network_path().with_name("cifar10_cnn.json").read_text("utf-8"))
        return {
            kind: [
                seed["test_accuracy"]
                for seed in records[network_path(occluded=kind == "occluded").name]["seeds"]
            ][: self.networks]
            for kind in ("normal", "occluded")
        }

    def pictures(self, sources: Sources, folder: Path) -> None:
        explainer = sources.network(occluded=True)
        x = normalized(sources.occluded_test[:6])
        found = [explainer.explain(x, method=m) for m in paper_methods(sources.seed).values()]
        picture.save(picture.side_by_side(found), folder / "figure_2.png")


def _least(amounts: Mapping[str, np.ndarray], ours: str, but: tuple[str, ...]) -> Claim:
    others = {n: v for n, v in amounts.items() if n != ours and n not in but}
    pairs = compare(amounts[ours], others)
    but_text = f" (but {' and '.join(but)})" if but else ""
    return Claim(
        f"{ours} attributes less to the patch than every other method{but_text}",
        all(pair.lower for pair in pairs.values()),
        lower_than(ours, pairs),
    )


def _most(amounts: Mapping[str, np.ndarray], method: str) -> Claim:
    pairs = compare(amounts[method], {n: v for n, v in amounts.items() if n != method})
    return Claim(
        f"{method} attributes more to the patch than every other method",
        all(pair.higher for pair in pairs.values()),
        higher_than(method, pairs),
    )


def _lowest_upper_quartiles(amounts: Mapping[str, np.ndarray]) -> Claim:
    """Sure where images drawn anew, with replacement, hardly ever have other methods lowest."""
    count, rng = amounts[RECTGRAD].shape[1], np.random.default_rng(0)
    found = _upper_quartiles(amounts, np.arange(count))
    again = [_upper_quartiles(amounts, rng.choice(np.arange(count), count)) for _ in range(_DRAWS)]
    lowest = {PRR, RECTGRAD, "DeepLIFT"}
    same = float(np.mean([set(list(spread)[:3]) == lowest for spread in again]))
    return Claim(
        "By upper quartile, RectGrad PRR, RectGrad and DeepLIFT are the three lowest",
        set(list(found)[:3]) == lowest and same > 1 - SIGNIFICANT,
        f"{', '.join(f'{name} {number(upper)}' for name, upper in found.items())}; so in "
        f"{same:.1%} of {_DRAWS:,} bootstrap draws of the images",
    )


def _upper_quartiles(amounts: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, float]:
    """Of these images, averaged over networks, from the lowest up."""
    upper = {name: np.percentile(v[:, rows], 75, axis=1).mean() for name, v in amounts.items()}
    return dict(sorted(upper.items(), key=lambda item: item[1]))


def _percent(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.2%} (seed 0: {values[0]:.2%})" if len(values) > 1 else ""
    return f"{np.mean(values):.2%}{spread}"
