"""Where removing pixels without retraining disagrees with ROAR and KAR (Hooker et al. 2019)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper import plots
from bench.paper.evidence import SIGNIFICANT, Claim, Conclusion, Table, compare, p_value
from bench.paper.experiments.roar import QUANTITIES, TESTS, Roar, Test, modify, ranks_of
from bench.paper.experiments.subjects import predicted
from bench.paper.runner import Arrays, Results, Unit, batches
from bench.paper.sources import Sources, normalized

_KINDS = ("retrained", "as it is")


@dataclass(frozen=True, kw_only=True)
class WithoutRetraining(Roar):
    """The same images as in ROAR and KAR, classified by the network that was explained.

    What ROAR has trained already is not trained again.
    """

    name = "without_retraining"
    title = "Deletion without retraining"
    figures = "Hooker et al. 2019"
    paper = (
        "A network that was not trained on images with missing pixels fails on them whatever was "
        "removed, even at random, so without retraining other estimators come out best than with."
    )

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        data = self.data(sources)
        colour = data["train"].images.mean(axis=(0, 2, 3))
        test_set = data["test"]

        def classified(test: Test, estimator: str, fraction: float) -> Arrays:
            images = modify(
                test_set.images, ranks_of(done, estimator, "test"), test, fraction, colour
            )
            parts = batches(len(images), 500).values()
            found = [predicted(sources.network(), normalized(images[rows])) for rows in parts]
            return {"right": np.concatenate(found) == test_set.labels}

        units = dict(super().units(sources, done))
        for test, estimator, fraction in itertools.product(
            TESTS, self.estimators(), self.fractions
        ):
            units[f"deleted-{test}, {estimator}, {fraction:g}"] = partial(
                classified, test, estimator, fraction
            )
        return units

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        from scipy.stats import kendalltau

        trained = self.correct(found)
        names = list(self.estimators())
        claims: list[Claim] = []
        numbers: dict[str, Any] = {}
        areas: dict[str, Mapping[str, np.ndarray]] = {}
        for test in TESTS:
            given = {
                key: np.asarray(found[f"deleted-{key}"]["right"])[None]
                for key in (f"{test}, {n}, {f:g}" for n in names for f in self.fractions)
            }
            ends = {k: v[:1] for k, v in trained.items() if k.endswith(", 0")}
            pair = [_inner(self, trained, test), _inner(self, ends | given, test)]
            areas |= {f"{test}, {kind}": part for kind, part in zip(_KINDS, pair, strict=True)}
            order = kendalltau(*([part[n].mean() for n in names] for part in pair))
            tau, p = float(order.statistic), float(order.pvalue)
            if np.isnan(tau):  # all areas are equal
                tau, p = 0.0, 1.0
            opposite = _opposite(*pair)
            claims.append(
                Claim(
                    f"{test}: some estimators are in the opposite order without retraining",
                    bool(opposite),
                    f"{', '.join(opposite) or 'no pair'}, significantly both times; Kendall's τ of "
                    f"the two orders {tau:.2f}, {p_value(p)}",
                )
            )
            numbers[test] = {"tau": tau, "p": p}
        claims.insert(0, _random_hurts(areas))
        numbers["area"] = {
            key: {name: float(v.mean()) for name, v in part.items()} for key, part in areas.items()
        }
        rows = [[n, *(f"{part[n].mean():.4f}" for part in areas.values())] for n in names]
        head = ["estimator", *(f"{'AUC' if 'ROAR' in k else 'AOC'}, {k}" for k in areas)]
        return Conclusion(
            scale=self.scale(trained),
            numbers=numbers,
            tables=[
                Table(
                    head,
                    rows,
                    f"Areas over {self.span}. ROAR: pixels removed, KAR: kept; lower is better. As "
                    "it is: classified by the network whose maps they are.",
                )
            ],
            claims=claims,
            reduced=self.reduced,
            remarks=[
                "The network as it is was trained by the full recipe, the retrained ones as stated "
                "above, so orders can be compared, and levels with care."
            ],
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        figure, axes = plots.figure(len(TESTS), width=3.2, height=2.8)
        for ax, (test, quantity) in zip(axes, QUANTITIES.items(), strict=True):
            retrained, given = (conclusion.numbers["area"][f"{test}, {kind}"] for kind in _KINDS)
            plots.points(
                ax,
                {name: (retrained[name], given[name]) for name in retrained},
                xlabel=f"{quantity}, retrained",
                ylabel="the same, without retraining" if ax is axes[0] else "",
                title=test,
            )
        plots.shared_legend(figure, axes[0])
        return [plots.save(figure, folder, self.name)]


def _inner(experiment: Roar, correct: Arrays, test: Test) -> dict[str, np.ndarray]:
    return {name: area.inner for name, area in experiment.areas(correct, test).items()}


def _random_hurts(areas: Mapping[str, Mapping[str, np.ndarray]]) -> Claim:
    retrained, given = (areas[f"ROAR, {kind}"]["Random"] for kind in _KINDS)
    pair = compare(given[0], {"": retrained.mean(axis=0)})[""]
    return Claim(
        "ROAR: removing pixels at random costs more accuracy without retraining",
        bool(given.mean() < retrained.mean()) and pair.p < SIGNIFICANT,
        f"area {given.mean():.4f} against {retrained.mean():.4f}, {p_value(pair.p)}",
    )


def _opposite(retrained: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray]) -> list[str]:
    """Pairs of estimators whose areas are ordered otherwise, significantly in both."""
    pairs = list(itertools.combinations(retrained, 2))
    signs = []
    for areas in (retrained, given):
        differences = {
            pair: areas[pair[0]].mean(axis=0) - areas[pair[1]].mean(axis=0) for pair in pairs
        }
        tests = compare(
            np.zeros_like(differences[pairs[0]]), {str(p): d for p, d in differences.items()}
        )
        signs.append(
            [np.sign(differences[p].mean()) * (tests[str(p)].p < SIGNIFICANT) for p in pairs]
        )
    return [
        f"{a} and {b}" for (a, b), *both in zip(pairs, *signs, strict=True) if both[0] * both[1] < 0
    ]
