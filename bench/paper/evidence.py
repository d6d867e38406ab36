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
    wins
        Fraction of the images on which ours is lower, averaged over networks; ties counted half.
    p
        Of Wilcoxon's signed-rank test, two-sided; after `compare` corrected by Holm's method.
    network_wins
        The same fraction for every network alone.
    """

    wins: float
    p: float
    network_wins: Sequence[float]

    @property
    def lower(self) -> bool:
        """Ours is lower, on every network, and not by chance of the images."""
        return self.p < SIGNIFICANT and min(self.wins, *self.network_wins) > 0.5

    @property
    def higher(self) -> bool:
        """Ours is higher, on every network, and not by chance of the images."""
        return self.p < SIGNIFICANT and max(self.wins, *self.network_wins) < 0.5

    @property
    def agree(self) -> int:
        """How many networks have it as their average has it."""
        return sum((wins > 0.5) == (self.wins > 0.5) for wins in self.network_wins)


def compare(ours: np.ndarray, others: Mapping[str, np.ndarray | float]) -> dict[str, Comparison]:
    """Compare one method with each of the others, image by image.

    Parameters
    ----------
    ours : numpy.ndarray, shape (N,) or (networks, N)
        Of several networks each image's mean is tested.
    others : mapping of str to numpy.ndarray, of the same shape, or to a number
    """
    differences = {name: np.atleast_2d(ours - other) for name, other in others.items()}
    raw = {name: _signed_rank(d.mean(axis=0)) for name, d in differences.items()}
    corrected = dict(zip(raw, _holm(list(raw.values())), strict=True))
    return {
        name: Comparison(_wins(d.mean(axis=0)), corrected[name], [_wins(row) for row in d])
        for name, d in differences.items()
    }


def _wins(difference: np.ndarray) -> float:
    return float(np.mean(difference < 0) + np.mean(difference == 0) / 2)


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
    """Quartiles and mean over images, averaged over networks, and the spread of the median.

    `values` has the shape (N,) or (networks, N).
    """
    networks = np.atleast_2d(values)
    low, median, high = np.percentile(networks, (25, 50, 75), axis=1)
    found = {
        "lower": float(low.mean()),
        "median": float(median.mean()),
        "upper": float(high.mean()),
        "mean": float(values.mean()),
    }
    return found | ({"sd of medians": float(median.std(ddof=1))} if len(networks) > 1 else {})


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value and abs(value) < 1000 else f"{value:.0f}"


def networks_used(count: int) -> str:
    """In words."""
    return f"{count} networks (seeds 0 to {count - 1})" if count > 1 else "one network (seed 0)"


def p_value(p: float) -> str:
    return "p < 1e-4" if p < 1e-4 else f"p = {p:.2g}"


def lower_than(ours: str, pairs: Mapping[str, Comparison]) -> str:
    """On how many images ours is lower than each other method, as one sentence."""
    return _than(f"{ours} is lower", {name: pair.wins for name, pair in pairs.items()}, pairs)


def higher_than(ours: str, pairs: Mapping[str, Comparison]) -> str:
    """The same of higher."""
    return _than(f"{ours} is higher", {name: 1 - pair.wins for name, pair in pairs.items()}, pairs)


def _than(ours: str, wins: Mapping[str, float], pairs: Mapping[str, Comparison]) -> str:
    counts = ", ".join(f"{name} on {share:.0%}" for name, share in wins.items())
    return f"{ours} than {counts} of the images; {least_sure(pairs)}"


def least_sure(pairs: Mapping[str, Comparison], repeats: str = "networks") -> str:
    """The largest p-value, and where networks, or what else was repeated, disagree most."""
    largest = max(pairs, key=lambda name: pairs[name].p)
    text = p_value(pairs[largest].p)
    if len(pairs) > 1:
        text = f"least sure: {text} for {largest}"
    count = len(pairs[largest].network_wins)
    if count > 1:
        split = min(pairs, key=lambda name: pairs[name].agree)
        where = f" for {split}" if split and pairs[split].agree < count else ""
        text += f"; the same on {pairs[split].agree} of {count} {repeats}{where}"
    return text


def distribution_table(
    values: Mapping[str, np.ndarray], paper: Mapping[str, str] | None = None, note: str = ""
) -> Table:
    """Quartiles of a number per image, one row a method."""
    head = ["method", "lower quartile", "median", "upper quartile"]
    rows = []
    for name, sample in values.items():
        q = quartiles(sample)
        median = number(q["median"])
        if "sd of medians" in q:
            median += f" ± {number(q['sd of medians'])}"
        row = [name, number(q["lower"]), median, number(q["upper"])]
        rows.append([*row, paper.get(name, "–")] if paper else row)
    if any(sample.ndim > 1 and len(sample) > 1 for sample in values.values()):
        note += " Quartiles are means over networks, ± their standard deviation."
    return Table([*head, "paper's median, about"] if paper else head, rows, note.strip())


def medians_table(
    columns: Sequence[str], values: Mapping[str, Sequence[np.ndarray]], note: str
) -> Table:
    """Medians over all images and repetitions: one row a method, one column an array."""
    rows = [
        [method, *(f"{np.median(sample):.2f}" for sample in samples)]
        for method, samples in values.items()
    ]
    return Table(["method", *columns], rows, note)
