"""Layer-wise propagation (figures 6 and 14): where noise comes in on the way to the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rectgrad_ref import picture
from rectgrad_ref.methods import Method, RectGrad, Saliency

from .. import plots
from ..evidence import Claim, Conclusion, Table, compare, p_value
from ..maps import RECTGRAD, object_share, resized_background
from ..runner import Arrays, stacked
from ..sources import Masked, Sources, normalized
from .masked import OnMasked

LAYERS = ("relu4", "relu3", "relu2", "relu1")
"""From the logits to the input."""
_METHODS: dict[str, Method] = {"Saliency": Saliency(), RECTGRAD: RectGrad(final_threshold=False)}
_KINDS = ("R", "a·R")


@dataclass(frozen=True, kw_only=True)
class LayerWise(OnMasked):
    """The fraction of the attribution that is on the background, layer by layer.

    Attributes
    ----------
    photos
        The first of the photographs, for pictures.
    """

    name = "layer_wise"
    title = "Layer-wise propagation"
    figures = "figures 6 and 14"
    paper = (
        "Noise accumulates in saliency maps on the way to the input, so that irrelevant regions "
        "get attribution; RectGrad stops it at every layer."
    )
    quick: ClassVar[Mapping[str, Any]] = {"photos": 2}

    photos: int = 6

    def measure(self, sources: Sources, images: Masked) -> Arrays:
        x, explainer = normalized(images.images), sources.network()
        result = {"area": images.background.mean(axis=(1, 2))}
        for name, method in _METHODS.items():
            attribution = explainer.explain(x, method=method, trace=True)
            R = attribution.values
            if isinstance(method, RectGrad):
                R = explainer.explain(x, method=replace(method, times_input=False)).values
            maps = {"input": (R, x * R)} | {
                layer: (trace.R_out, trace.a * trace.R_out)
                for layer, trace in attribution.layers().items()
                if layer in LAYERS
            }
            for layer, pair in maps.items():
                background = resized_background(images.background, pair[0].shape[-1])
                for kind, values in zip(_KINDS, pair, strict=True):
                    share = 1 - object_share(values.mean(axis=1), background)
                    result[f"{name}, {kind}, {layer}"] = share
        return result

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        shares = dict(stacked(found))
        area = shares.pop("area")
        claims, rows = [], []
        for method in _METHODS:
            for kind in _KINDS:
                values = [shares[f"{method}, {kind}, {layer}"] for layer in (*LAYERS, "input")]
                rows.append([method, kind, *(f"{np.median(v):.1%}" for v in values)])
        for kind in _KINDS:
            claims += _claims(shares, kind)
        numbers = {name: float(np.median(v)) for name, v in shares.items()}
        note = (
            "Fraction of Σ|mean over channels| that is on the background, median over images; the "
            f"background takes {area.mean():.0%} of the pixels. R: the gradient that arrives at "
            "the layer; a·R: times its activation (x at the input); no final threshold."
        )
        return Conclusion(
            scale=(
                f"{len(area)} CIFAR-10 images with masks, one network (seed 0); the paper shows "
                "photographs and Inception V4 and judges by eye."
            ),
            numbers=numbers,
            tables=[Table(["method", "map", *LAYERS, "input"], rows, note)],
            claims=claims,
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        shares = stacked(found)
        figure, axes = plots.figure(2, width=3, height=2.5)
        for ax, kind in zip(axes, _KINDS, strict=True):
            samples = {
                method: np.stack(
                    [100 * shares[f"{method}, {kind}, {layer}"] for layer in (*LAYERS, "input")]
                )
                for method in reversed(_METHODS)
            }
            plots.curves(
                ax,
                range(len(LAYERS) + 1),
                {name: np.median(sample, axis=1) for name, sample in samples.items()},
                spread={
                    name: tuple(np.percentile(sample, (25, 75), axis=1))
                    for name, sample in samples.items()
                },
                xlabel="",
                ylabel="on the background, %" if kind == "R" else "",
                title=f"mean of {kind} over channels",
                marker="o",
            )
            plots.reference(ax, "the background's area", y=100 * shares["area"].mean())
            ax.set_xticks(range(len(LAYERS) + 1), [*LAYERS, "input"])
            ax.set_ylim(0, 100)
        return [plots.save(figure, folder, self.name)]

    def pictures(self, sources: Sources, folder: Path) -> None:
        if sources.classifier is None:
            return
        explainer = sources.classifier.load(sources.backend)
        for name, photo in sources.classifier.pictures(self.photos).items():
            traces = [explainer.explain(photo, method=m, trace=True) for m in _METHODS.values()]
            picture.save(picture.layer_strip(traces), folder / f"{name}.png")


def _claims(shares: Mapping[str, np.ndarray], kind: str) -> list[Claim]:
    def medians(*samples: np.ndarray) -> list[str]:
        return [f"{np.median(sample):.1%}" for sample in samples]

    def share(method: str, layer: str) -> np.ndarray:
        return shares[f"{method}, {kind}, {layer}"]

    ours, other = share(RECTGRAD, "input"), share("Saliency", "input")
    claims = []
    for method, last in (("Saliency", other), (RECTGRAD, ours)):
        first = share(method, LAYERS[0])
        pair = compare(last, {"": first})[""]
        grows = method == "Saliency"
        claims.append(
            Claim(
                f"{kind}: the background's share of {method} "
                f"{'grows' if grows else 'does not grow'} from {LAYERS[0]} to the input",
                pair.higher == grows,
                f"median {' → '.join(medians(first, last))}, it grows on {1 - pair.wins:.0%} of "
                f"the images, {p_value(pair.p)}",
            )
        )
    pair = compare(ours, {"": other})[""]
    text = f"{kind}: at the input less of RectGrad than of the saliency map is on the background"
    evidence = f"median {' against '.join(medians(ours, other))}, less on {pair.wins:.0%} of the "
    return [*claims, Claim(text, pair.lower, f"{evidence}images, {p_value(pair.p)}")]
