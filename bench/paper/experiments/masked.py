"""What experiments on training images with a mask have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from ..runner import Arrays, Experiment, Results, Unit, batches
from ..sources import Masked, Sources, checksum


@dataclass(frozen=True, kw_only=True)
class OnMasked(Experiment):
    """An experiment that measures something of each image with a mask, and nothing else.

    Attributes
    ----------
    masked
        Images with a mask, of each class, that are classified rightly.
    """

    batch: ClassVar[int] = 25

    masked: int = 10

    def inputs(self, sources: Sources) -> dict[str, str]:
        return masked_inputs(sources, self.masked)

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        chosen = sources.correctly_classified(self.masked)
        return {
            key: partial(self.measure, sources, chosen.pick(rows))
            for key, rows in batches(len(chosen.keys), self.batch).items()
        }

    @abstractmethod
    def measure(self, sources: Sources, images: Masked) -> Arrays:
        """Numbers of each image, by name."""


def masked_inputs(sources: Sources, each: int, networks: int = 1) -> dict[str, str]:
    """SHA-256 of the networks and of the images with a mask that they classify rightly."""
    chosen = sources.correctly_classified(each, networks)
    return {
        **sources.network_checksums(networks),
        "masked images": checksum(chosen.keys, chosen.background),
    }
