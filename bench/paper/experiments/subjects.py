"""The two networks that are explained, and what experiments on both have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from rectgrad_ref.explainer import Explainer

from ..runner import Arrays, Experiment, batches, stacked
from ..sources import Sources, checksum, normalized


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

    batch: ClassVar[Mapping[str, int]] = {"cifar": 100, "photo": 4}

    images: int = 10_000
    photos: int = 100

    def inputs(self, sources: Sources) -> dict[str, str]:
        return {
            **sources.network_checksums(),
            "test": checksum(sources.test.images[: self.images]),
            **(sources.classifier.checksums(self.photos) if sources.classifier else {}),
        }

    def subjects(self, sources: Sources) -> Iterator[Subject]:
        images = normalized(sources.test.images[: self.images])
        path, explainer = sources.network_file(), sources.network()
        yield Subject("cifar", path, explainer, images, self.batch["cifar"])
        if sources.classifier is not None:
            path, explainer = sources.classifier.path, sources.classifier.load(sources.backend)
            photos = sources.classifier.pictures(self.photos).values()
            x = [explainer.explain(photo, method="random").inputs for photo in photos]
            yield Subject("photo", path, explainer, np.concatenate(x), self.batch["photo"])


PLOTTED = {"cifar": "CIFAR-10", "photo": "photographs"}
"""Titles of plots, by the keys of subjects."""


def titles(sources: Sources) -> dict[str, str]:
    """Names of the subjects, by their keys."""
    photo = {"photo": sources.classifier.path.stem} if sources.classifier else {}
    return {"cifar": "CIFAR-10", **photo}


def predicted(explainer: Explainer, x: np.ndarray) -> np.ndarray:
    """The class of largest logit: (N,)."""
    return np.asarray(explainer.explain(x, method="random").logits.argmax(axis=1))


def by_network(sources: Sources, found: Mapping[str, Arrays]) -> dict[str, Arrays]:
    """Results of all units of each subject, by its name."""
    return {title: stacked(found, f"{key}-") for key, title in titles(sources).items()}
