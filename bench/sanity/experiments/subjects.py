"""The two networks that are checked, and what experiments on both have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.paper.evidence import Claim, Table, compare, least_sure
from bench.paper.maps import OURS
from bench.paper.runner import Experiment, batches
from bench.paper.sources import Sources, checksum, normalized
from rectgrad_ref.explainer import Explainer

MODIFIED = ("Guided BP", "Deconvolution", *OURS)
"""Methods that change the backward pass at activations; gradients are their foil."""
GRADIENT = "Saliency"


@dataclass(frozen=True)
class Subject:
    """A network with inputs in its own units; `batch` of them are a unit of work."""

    key: str
    path: Path
    explainer: Explainer
    x: np.ndarray
    batch: int

    def batches(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Name, inputs and positions of each unit's images."""
        for name, rows in batches(len(self.x), self.batch).items():
            yield f"{self.key}-{name}", self.x[rows], np.arange(rows.start, rows.stop)


@dataclass(frozen=True, kw_only=True)
class OnSubjects(Experiment):
    """An experiment on the CIFAR-10 network and on an ImageNet-sized one, where there is one.

    Attributes
    ----------
    images
        The first of the CIFAR-10 test set.
    photos
        The first of the photographs.
    """

    images: int = 1000
    photos: int = 100

    def inputs(self, sources: Sources) -> dict[str, str]:
        return {
            **sources.network_checksums(),
            "test": checksum(sources.test.images[: self.images]),
            **(sources.classifier.checksums(self.photos) if sources.classifier else {}),
        }

    def subjects(self, sources: Sources) -> list[Subject]:
        images = normalized(sources.test.images[: self.images])
        found = [Subject("cifar", sources.network_file(), sources.network(), images, 100)]
        if sources.classifier is not None:
            loaded = sources.classifier.load(sources.backend)
            photos = list(sources.classifier.pictures(self.photos).values())
            x = np.concatenate([loaded.explain(photo, method="random").inputs for photo in photos])
            found.append(Subject("photo", sources.classifier.path, loaded, x, 4))
        return found


def titles(sources: Sources) -> dict[str, str]:
    """Names of the subjects, by their keys."""
    photo = {"photo": sources.classifier.path.stem} if sources.classifier else {}
    return {"cifar": "CIFAR-10", **photo}


def predicted(explainer: Explainer, x: np.ndarray) -> np.ndarray:
    """The class of largest logit: (N,)."""
    return np.asarray(explainer.explain(x, method="random").logits.argmax(axis=1))


def more_alike(values: Mapping[str, np.ndarray], text: str, repeats: str = "") -> list[Claim]:
    """For each modified method, that its numbers are higher than the gradient's.

    `text` has a place for the method; `values` are (N,), or (`repeats`, N), by method.
    """
    claims = []
    for method in MODIFIED:
        pair = compare(values[method], {"": values[GRADIENT]})
        medians = [f"{np.median(values[name]):.2f}" for name in (method, GRADIENT)]
        claims.append(
            Claim(
                text.format(method=method),
                pair[""].higher,
                f"median {medians[0]} against {medians[1]}, higher on {1 - pair[''].wins:.0%} of "
                f"the images; {least_sure(pair, repeats)}",
            )
        )
    return claims


def medians_table(
    columns: Sequence[str], values: Mapping[str, Sequence[np.ndarray]], note: str
) -> Table:
    """Medians over all images and draws: one row a method, one column an array."""
    rows = [
        [method, *(f"{np.median(sample):.2f}" for sample in samples)]
        for method, samples in values.items()
    ]
    return Table(["method", *columns], rows, note)
