"""Coherence (figures 5a and 15): do the maps keep to the object?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rectgrad_ref import picture

from .. import plots
from ..evidence import Claim, Conclusion, Table, compare, higher_than
from ..maps import KINDS, OURS, heatmaps, imagenet_methods, object_share, paper_methods, shown
from ..runner import Arrays, stacked
from ..sources import Masked, Sources, normalized
from .masked import OnMasked


@dataclass(frozen=True, kw_only=True)
class Coherence(OnMasked):
    """The fraction of each method's attribution that is on the object.

    Attributes
    ----------
    photos
        The first of the photographs, for pictures.
    """

    name = "coherence"
    title = "Coherence"
    figures = "figures 5a and 15"
    paper = (
        "RectGrad's attributions fall on the object and on similar parts of it within a class, "
        "with nearly no noise on the background; those of the baselines do not, final thresholding "
        "or not. (By eye.)"
    )
    quick: ClassVar[Mapping[str, Any]] = {"photos": 3}

    masked: int = 25
    photos: int = 100

    def measure(self, sources: Sources, images: Masked) -> Arrays:
        x, methods = normalized(images.images), paper_methods(sources.seed)
        maps = heatmaps(sources.network(), x, methods, keys=images.keys)
        result = {
            f"{kind}, {name}": object_share(heatmap, images.background)
            for kind in KINDS
            for name, heatmap in shown(maps, sparse=kind == "sparse").items()
        }
        return result | {"area": 1 - images.background.mean(axis=(1, 2))}

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        shares = stacked(found)
        methods = list(paper_methods())
        claims = []
        for kind, words in KINDS.items():
            for ours in OURS:
                others = {n: shares[f"{kind}, {n}"] for n in methods if n not in OURS}
                pairs = compare(shares[f"{kind}, {ours}"], others)
                claims.append(
                    Claim(
                        f"{ours} keeps to the object better than every baseline {words}",
                        all(pair.higher for pair in pairs.values()),
                        f"by the share, {higher_than(ours, pairs)}",
                    )
                )
        medians = {name: float(np.median(v)) for name, v in shares.items()}
        rows = [[n, *(f"{medians[f'{kind}, {n}']:.1%}" for kind in KINDS)] for n in methods]
        note = (
            "Fraction of Σ|map| on the object, median over images; the object takes "
            f"{shares['area'].mean():.0%} of the pixels."
        )
        return Conclusion(
            scale=(
                f"{len(shares['area'])} CIFAR-10 images with masks that are classified rightly, "
                "one network (seed 0); the paper shows photographs and Inception V4."
            ),
            numbers=medians,
            tables=[Table(["method", *KINDS.values()], rows, note)],
            claims=claims,
            remarks=[
                "Whether maps emphasise the same parts within a class (figure 15) is for the eye: "
                "see the pictures in the work folder."
            ],
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        shares = stacked(found)
        figure, axes = plots.figure(2, width=3.4, height=2.6, share_x=True)
        for ax, (kind, words) in zip(axes, KINDS.items(), strict=True):
            values = {name: 100 * shares[f"{kind}, {name}"] for name in paper_methods()}
            label = "on the object, % (dashed: its area)"
            plots.boxes(ax, values, ours=OURS, label=label, title=words)
            plots.reference(ax, x=100 * shares["area"].mean())
        return [plots.save(figure, folder, self.name)]

    def pictures(self, sources: Sources, folder: Path) -> None:
        if sources.classifier is None:
            return
        explainer = sources.classifier.load(sources.backend)
        photos = sources.classifier.pictures(self.photos)
        # The authors' file names say which photographs belong to which figure.
        for figure, word in (("5a", "interclass"), ("15", "intraclass")):
            chosen = [photo for name, photo in photos.items() if word in name]
            chosen = chosen or list(photos.values())[:4]
            found = [
                explainer.explain(chosen, method=method)
                for method in imagenet_methods(sources.seed).values()
            ]
            for kind, p in (("plain", None), ("sparse", 95.0)):
                sheet = picture.side_by_side(found, sparsify=p)
                picture.save(sheet, folder / f"figure_{figure}_{kind}.png")
