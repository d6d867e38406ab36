"""What a run found: plain data that JSON can hold, and the ratios that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

# Maps below this are not called the same: RectGrad is discontinuous, so two correct programs differ
# by some percent, but not by more.
SAME = 0.95

FORWARD = "onnxruntime"
EXPOSED = "onnxruntime, ReLU outputs kept"
OURS = "rectgrad_ref"
DENSE = "rectgrad_ref, all dense"


class Agreement(TypedDict):
    """A peer's map against ours."""

    cosine: float
    deviation: float  # max|Δ| / max|ours|


class Entry(TypedDict):
    """One contender's times."""

    method: str
    by: str
    q: float | None
    seconds: list[float]  # a pass, one for each round
    agreement: Agreement | None


class Comparison(TypedDict):
    """What ran in turn on the same input."""

    part: str
    model: str
    input: list[int]
    entries: list[Entry]


class Process(TypedDict):
    """What processes of their own reported, each figure once per process."""

    part: str
    model: str
    batch: int
    what: str
    figures: dict[str, list[float]]


class Results(TypedDict):
    """One run."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str]
    comparisons: list[Comparison]
    processes: list[Process]


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio(entry: Entry, over: Entry) -> Spread:
    """How many times as long, round by round."""
    return Spread.of(np.divide(entry["seconds"], over["seconds"]))


def find(comparison: Comparison, method: str, by: str) -> Entry | None:
    """The entry of that contender, if it took part."""
    entries = comparison["entries"]
    return next((e for e in entries if (e["method"], e["by"]) == (method, by)), None)


def forward(comparison: Comparison) -> Entry:
    """The denominator."""
    found = find(comparison, "forward", FORWARD)
    assert found is not None
    return found


def best_peer(comparison: Comparison, method: str) -> Entry | None:
    """The fastest other program that computes the same map."""
    peers = [
        e
        for e in comparison["entries"]
        if e["method"] == method
        and e["by"] != OURS
        and (e["agreement"] is None or e["agreement"]["cosine"] >= SAME)
    ]
    return min(peers, key=lambda e: float(np.median(e["seconds"])), default=None)


def agreement(found: Any, expected: Any) -> Agreement:
    """How alike two maps are."""
    a, b = (np.asarray(v, np.float64).ravel() for v in (found, expected))
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return {
        "cosine": float(a @ b / norms) if norms else float(not (a.any() or b.any())),
        "deviation": float(np.abs(a - b).max() / (np.abs(b).max() or 1)),
    }
