"""What an experiment concludes: tables, claims that hold or not, and the statistics behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SIGNIFICANT = 0.01


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, put to the test."""

    text: str
    holds: bool
    evidence: str


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Conclusion:
    """What follows from the results.

    Attributes
    ----------
    scale
        How much was run, and how much the paper ran.
    numbers
        Everything that tables, claims and plots show, as plain data.
    reduced
        Whether the protocol itself was cut down, so that numbers are not the paper's quantities.
    """

    scale: str
    numbers: dict[str, Any]
    tables: list[Table]
    claims: list[Claim]
    remarks: list[str] = field(default_factory=list)
    reduced: bool = False

    @property
    def verdict(self) -> str:
        """Of all claims together."""
        if not self.claims:
            return "pictures only"
        held = sum(claim.holds for claim in self.claims)
        outcome = "partly reproduced" if held else "not reproduced"
        if held == len(self.claims):
            outcome = "reproduced"
        return f"{outcome} by a reduced protocol" if self.reduced else outcome


@dataclass(frozen=True)
class Comparison:
    """Paired differences of two methods on the same images.

    Attributes
    ----------
    median
        Of ours − other.
    wins
        Fraction of the images on which ours is lower, ties counted half.
    p
        Of Wilcoxon's signed-rank test, two-sided; after `compare` corrected by Holm's method.
    """

    median: float
    wins: float
    p: float

    @property
    def lower(self) -> bool:
        """Ours is lower, and not by chance."""
        return self.wins > 0.5 and self.p < SIGNIFICANT

    @property
    def higher(self) -> bool:
        """Ours is higher, and not by chance."""
        return self.wins < 0.5 and self.p < SIGNIFICANT


def compare(ours: np.ndarray, others: Mapping[str, np.ndarray]) -> dict[str, Comparison]:
    """Compare one method with each of the others, image by image.

    Parameters
    ----------
    ours : numpy.ndarray, shape (N,)
    others : mapping of str to numpy.ndarray, shape (N,)
    """
    raw = {name: _signed_rank(ours - other) for name, other in others.items()}
    corrected = dict(zip(raw, _holm(list(raw.values())), strict=True))
    return {
        name: Comparison(
            float(np.median(ours - other)),
            float(np.mean(ours < other) + np.mean(ours == other) / 2),
            corrected[name],
        )
        for name, other in others.items()
    }


def _signed_rank(difference: np.ndarray) -> float:
    from scipy.stats import wilcoxon

    return float(wilcoxon(difference).pvalue) if np.any(difference) else 1.0


def _holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for that many tests (Holm 1979)."""
    corrected, largest = [1.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, (len(p) - rank) * p[i])
        corrected[i] = min(1.0, largest)
    return corrected


def quartiles(values: np.ndarray) -> dict[str, float]:
    """Lower quartile, median, upper quartile and mean."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {
        "lower": float(low),
        "median": float(median),
        "upper": float(high),
        "mean": float(values.mean()),
    }


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value and abs(value) < 1000 else f"{value:.0f}"


def p_value(p: float) -> str:
    return "p < 1e-4" if p < 1e-4 else f"p = {p:.2g}"


def lower_than(ours: str, pairs: Mapping[str, Comparison]) -> str:
    """On how many images ours is lower than each other method, as one sentence."""
    wins = ", ".join(f"{name} on {pair.wins:.0%}" for name, pair in pairs.items())
    largest = max(pairs, key=lambda name: pairs[name].p)
    least_sure = f"{p_value(pairs[largest].p)} for {largest}"
    return f"{ours} is lower than {wins} of the images; least sure: {least_sure}"


def distribution_table(
    values: Mapping[str, np.ndarray], paper: Mapping[str, str] | None = None, note: str = ""
) -> Table:
    """Quartiles of a number per image, one row a method."""
    head = ["method", "lower quartile", "median", "upper quartile"]
    rows = []
    for name, sample in values.items():
        q = quartiles(sample)
        row = [name, number(q["lower"]), number(q["median"]), number(q["upper"])]
        rows.append([*row, paper.get(name, "–")] if paper else row)
    return Table([*head, "paper's median, about"] if paper else head, rows, note)
