"""CIFAR-10 feature maps (figure 13): filters keep the background as they keep the object."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rectgrad_ref import picture

from .. import plots
from ..evidence import Claim, Conclusion, Table, compare, p_value
from ..maps import resized_background, total_variation
from ..runner import Arrays, stacked
from ..sources import Masked, Sources, normalized
from .masked import OnMasked

LAYERS = ("relu1", "relu2", "relu3", "relu4")
_SIDES = ("object", "background")
_PAIRS = tuple(itertools.product(LAYERS, _SIDES))
_ALIKE = (0.8, 1.25)


@dataclass(frozen=True, kw_only=True)
class FeatureMaps(OnMasked):
    """How often units are active on the object and on the background.

    Attributes
    ----------
    noisy
        Pictures, of the images whose saliency maps have the largest total variation.
    """

    name = "feature_maps"
    title = "Feature maps"
    figures = "figure 13"
    paper = (
        "Filters do not differ much in how they keep or drop features of the object and of the "
        "background, though the object matters far more (by eye; counting was left to the future)."
    )

    noisy: int = 4

    def measure(self, sources: Sources, images: Masked) -> Arrays:
        x = normalized(images.images)
        trace = sources.network().explain(x, method="saliency", trace=True).layers()
        result = {}
        for layer in LAYERS:
            active = (trace[layer].a > 0).mean(axis=1)
            background = resized_background(images.background, active.shape[-1])
            for side, where in zip(_SIDES, (~background, background), strict=True):
                units = (active * where).sum(axis=(1, 2))
                result[f"{side}, {layer}"] = units / where.sum(axis=(1, 2))
        return result

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        active = stacked(found)
        claims, rows, numbers = [], [], {}
        for layer in LAYERS:
            inside, outside = (active[f"{side}, {layer}"] for side in _SIDES)
            pair = compare(outside, {"": inside})[""]
            ratio = float(np.median(outside / inside))
            numbers[layer] = {
                "object": float(inside.mean()),
                "background": float(outside.mean()),
                "median ratio": ratio,
                "p": pair.p,
            }
            rows.append(
                [
                    layer,
                    f"{inside.mean():.1%}",
                    f"{outside.mean():.1%}",
                    f"{ratio:.2f}",
                    p_value(pair.p),
                ]
            )
            above = compare(outside, {"": _ALIKE[0] * inside})[""]
            below = compare(outside, {"": _ALIKE[1] * inside})[""]
            claims.append(
                Claim(
                    f"{layer}: units are about as often active on the background as on the object",
                    above.higher and below.lower,
                    f"median ratio {ratio:.2f}; more than {_ALIKE[0]}: {p_value(above.p)}, less "
                    f"than {_ALIKE[1]}: {p_value(below.p)}",
                )
            )
        head = ["layer", "active on the object", "on the background", "median ratio", "difference"]
        return Conclusion(
            scale=f"{len(inside)} CIFAR-10 images with masks; one network (seed 0).",
            numbers=numbers,
            tables=[Table(head, rows, "Fraction of units whose activation is not zero.")],
            claims=claims,
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        active = stacked(found)
        figure, (ax,) = plots.figure(width=4.5)
        values = {f"{layer}, {side}": 100 * active[f"{side}, {layer}"] for layer, side in _PAIRS}
        inside = [f"{layer}, object" for layer in LAYERS]
        plots.boxes(ax, values, ours=inside, label="active units, %")
        ax.set_xlim(left=0)
        return [plots.save(figure, folder, self.name)]

    def pictures(self, sources: Sources, folder: Path) -> None:
        explainer = sources.network()
        chosen = sources.correctly_classified(self.masked)
        found = explainer.explain(normalized(chosen.images), method="saliency", trace=True)
        noisiest = np.argsort(-total_variation(found.heatmap()))[: self.noisy]
        for i in noisiest:
            maps = {name: found.layers()[name].a[i] for name in LAYERS}
            image = chosen.images[i].transpose(1, 2, 0)
            sheet = _sheet(image, picture.render(picture.cap(found.heatmap()[i : i + 1])[0]), maps)
            picture.save(sheet, folder / f"train_{chosen.keys[i]}.png")


def _sheet(image: np.ndarray, saliency: np.ndarray, maps: Mapping[str, np.ndarray]) -> Any:
    """An image, its saliency map, and all feature maps of each layer on one grey scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 2, 2))
    places = [grid[0, 1], grid[0, 2], grid[1, 1], grid[1, 2]]
    for place, pixels, title in (
        (grid[0, 0], image, "image"),
        (grid[1, 0], saliency, "saliency map"),
        *(
            (place, _mosaic(a), f"{name}: {a.shape[0]} maps")
            for place, (name, a) in zip(places, maps.items(), strict=True)
        ),
    ):
        ax = figure.add_subplot(place)
        ax.imshow(pixels, cmap="gray", interpolation="nearest")
        ax.set_title(title, size=8)
        ax.set_axis_off()
    return figure


def _mosaic(maps: np.ndarray) -> np.ndarray:
    """Maps (C, h, w) in rows of eight, parted by white lines."""
    bordered = np.pad(maps, ((0, 0), (0, 1), (0, 1)), constant_values=maps.max())
    c, h, w = bordered.shape
    return bordered.reshape(c // 8, 8, h, w).swapaxes(1, 2).reshape(-1, 8 * w)
