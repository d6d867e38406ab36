"""Adversarial images (figures 5b and 16): do the maps change with the class?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rectgrad_ref import picture
from rectgrad_ref.explainer import Explainer

from .. import plots
from ..evidence import SIGNIFICANT, Claim, Conclusion, Table, compare, lower_than, p_value
from ..maps import KINDS, OURS, RECTGRAD, heatmaps, imagenet_methods, shown, similarity
from ..runner import Arrays, Results, Unit, stacked
from ..sources import Sources
from .subjects import OnSubjects, Subject, by_network, predicted


@dataclass(frozen=True, kw_only=True)
class Adversarial(OnSubjects):
    """Likeness of the maps before and after the fast gradient sign method.

    Attributes
    ----------
    epsilon
        Step of every pixel where the input spans [−1, 1]; scaled to other ranges.
    """

    name = "adversarial"
    title = "Adversarial attack"
    figures = "figures 5b and 16"
    paper = (
        "When an invisible perturbation changes the class, RectGrad's maps change with it; where "
        "they do not, those of the other methods do not either. So RectGrad is equally or more "
        "class sensitive. (By eye.)"
    )
    quick: ClassVar[Mapping[str, Any]] = {"images": 50, "photos": 3}
    revision = 2
    batch: ClassVar[Mapping[str, int]] = {"cifar": 50, "photo": 1}

    epsilon: float = 0.01

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        methods = imagenet_methods(sources.seed)

        def compared(subject: Subject, x: np.ndarray, keys: np.ndarray) -> Arrays:
            explainer = subject.explainer
            attacked = fast_gradient_sign(explainer, x, self.epsilon, value_range(explainer))
            maps, moved = (heatmaps(explainer, im, methods, keys=keys) for im in (x, attacked))
            result = {"flipped": predicted(explainer, x) != predicted(explainer, attacked)}
            for kind in KINDS:
                first, second = (shown(m, sparse=kind == "sparse") for m in (maps, moved))
                for name in methods:
                    result[f"{kind}, {name}"] = similarity(first[name], second[name])
            return result

        return {
            key: partial(compared, subject, x, keys)
            for subject in self.subjects(sources)
            for key, x, keys in subject.batches()
        }

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        parts = by_network(sources, found)
        claims, tables = [], []
        for where, values in parts.items():
            flipped = values["flipped"]
            if flipped.any():
                claims += [_most_sensitive(values, kind, where) for kind in KINDS]
                claims += [_reacts(values, where)] if not flipped.all() else []
            tables.append(_table(values, where))
        return Conclusion(
            scale="; ".join(
                f"{where}: {int(values['flipped'].sum()):,} of {len(values['flipped']):,} images "
                "change their class"
                for where, values in parts.items()
            )
            + "; the paper shows a few photographs, Inception V4.",
            numbers={
                where: {
                    f"{name}, {'flipped' if state else 'not flipped'}": float(np.median(v[rows]))
                    for name, v in values.items()
                    if name != "flipped"
                    for state in (True, False)
                    if (rows := values["flipped"] == state).any()
                }
                for where, values in parts.items()
            },
            tables=tables,
            claims=claims,
            remarks=[
                "A cosine counts every change, noise too: where a method's maps change as much "
                "though the class stays, they are unstable rather than class sensitive. So the "
                "last claim of each network compares the images whose class changes with those "
                "whose class stays."
            ],
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        figure, axes = plots.figure(2, width=3.6, height=2.8, share_x=True)
        values = stacked(found, "cifar-")
        for ax, (kind, words) in zip(axes, KINDS.items(), strict=True):
            changed = {
                name: values[f"{kind}, {name}"][values["flipped"]] for name in imagenet_methods()
            }
            label = "cosine of the maps before and after"
            plots.boxes(ax, changed, ours=OURS, label=label, title=f"CIFAR-10, {words}")
        return [plots.save(figure, folder, self.name)]

    def pictures(self, sources: Sources, folder: Path) -> None:
        if sources.classifier is None:
            return
        explainer = sources.classifier.load(sources.backend)
        photos = sources.classifier.pictures(self.photos)
        # The authors' file names say which photographs belong to the figure.
        chosen = [name for name in photos if "adv_attack" in name] or list(photos)[:4]
        for name in chosen:
            x = explainer.explain(photos[name], method="random").inputs
            attacked = fast_gradient_sign(explainer, x, self.epsilon, value_range(explainer))
            both = np.concatenate([x, attacked])
            methods = imagenet_methods(sources.seed).values()
            found = [explainer.explain(both, method=method) for method in methods]
            kind = "flipped" if found[0].target[0] != found[0].target[1] else "same_class"
            picture.save(picture.side_by_side(found), folder / f"{kind}_{name}.png")


def fast_gradient_sign(
    explainer: Explainer, x: np.ndarray, epsilon: float, bounds: tuple[Any, Any], classes: int = 20
) -> np.ndarray:
    """x + ε·sign ∇loss of the predicted class, within the valid range (Goodfellow et al. 2015).

    Parameters
    ----------
    epsilon : float
        Where the valid range is [−1, 1]; in proportion elsewhere.
    bounds : pair of arrays that broadcast with `x`
        The smallest and largest valid values.
    classes : int
        The most probable ones, which alone enter the gradient of the cross-entropy.
    """
    from scipy.special import softmax

    logits = explainer.explain(x, method="random").logits.astype(np.float64)
    order = np.argsort(-logits, axis=1)[:, :classes]
    weights = np.take_along_axis(softmax(logits, axis=1), order, axis=1)
    # Not p − 1, which a sure prediction rounds to zero.
    weights[:, 0] = -weights[:, 1:].sum(axis=1)
    gradient = np.zeros(x.shape)
    for target, weight in zip(order.T, weights.T, strict=True):
        values = explainer.explain(x, method="saliency", target=target).values
        gradient += weight.reshape(-1, *[1] * (x.ndim - 1)) * values
    low, high = bounds
    step = epsilon * (np.asarray(high) - np.asarray(low)) / 2
    return np.clip(x + step * np.sign(gradient), low, high).astype(x.dtype)


def value_range(explainer: Explainer) -> tuple[np.ndarray, np.ndarray]:
    """What black and white pictures are for the network, each of the shape of one input."""
    from PIL import Image

    ends = []
    for colour in ("black", "white"):
        plain = Image.new("RGB", (512, 512), colour)
        ends.append(explainer.explain(plain, method="random").inputs)
    return np.minimum(*ends), np.maximum(*ends)


def _most_sensitive(values: Arrays, kind: str, where: str) -> Claim:
    changed = {name: values[f"{kind}, {name}"][values["flipped"]] for name in imagenet_methods()}
    pairs = compare(changed[RECTGRAD], {n: v for n, v in changed.items() if n not in OURS})
    return Claim(
        f"{where}, {KINDS[kind]}: where the class changes, no baseline's maps change more than "
        "RectGrad's",
        not any(pair.higher for pair in pairs.values()),
        f"by the cosine of the maps before and after, {lower_than(RECTGRAD, pairs)}",
    )


def _reacts(values: Arrays, where: str) -> Claim:
    """Other images, so the test is not paired."""
    from scipy.stats import mannwhitneyu

    cosines, flipped = values[f"plain, {RECTGRAD}"], values["flipped"]
    p = float(mannwhitneyu(cosines[flipped], cosines[~flipped], alternative="less").pvalue)
    return Claim(
        f"{where}: RectGrad's maps change more where the class changes than where it stays",
        p < SIGNIFICANT,
        f"median cosine {np.median(cosines[flipped]):.2f} on {flipped.sum()} images against "
        f"{np.median(cosines[~flipped]):.2f} on {(~flipped).sum()}, Mann–Whitney test, "
        f"{p_value(p)}",
    )


def _table(values: Arrays, where: str) -> Table:
    flipped = values["flipped"]
    rows = []
    for name in imagenet_methods():
        cells = [
            f"{np.median(values[f'{kind}, {name}'][where_]):.2f}" if where_.any() else "–"
            for kind in KINDS
            for where_ in (flipped, ~flipped)
        ]
        rows.append([name, *cells])
    head = ["method", "class changes", "class stays", "sparse, class changes", "sparse, stays"]
    return Table(head, rows, f"{where}: cosine of the maps before and after, medians.")
