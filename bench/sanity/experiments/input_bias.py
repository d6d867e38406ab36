"""The × input bias (Brocki & Chung 2020): dark objects are overlooked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bench.paper import plots
from bench.paper.evidence import Claim, Conclusion, compare, least_sure, medians_table
from bench.paper.experiments.masked import OnMasked
from bench.paper.maps import all_methods, heatmaps
from bench.paper.runner import Arrays, stacked
from bench.paper.sources import Masked, Sources, normalized
from rectgrad_ref.explainer import Explainer
from rectgrad_ref.methods import Method, RectGrad

from ..likeness import rank_correlation
from ..networks import of_unit_range

_WITHOUT = "RectGrad, not × input"
TIMES_INPUT = ("RectGrad", "RectGrad PRR", "Gradient × input", "IntegGrad", "DeepLIFT", "ε-LRP")
SYMMETRIC, UNIT = "[−1, 1]", "[0, 1]"
_SIDES = {"dark": "darker", "grey": "greyer"}
_BIASED = {"dark": UNIT, "grey": SYMMETRIC}
"""Where half of the object is that × input brings near to zero, by the input's range."""


@dataclass(frozen=True, kw_only=True)
class InputBias(OnMasked):
    """Attribution to dark and to grey pixels of the object, for two encodings of the input."""

    name = "input_bias"
    title = "Bias of × input"
    figures = "Brocki & Chung 2020"
    paper = (
        "A map that is multiplied by the input cannot show what is zero there, so RectGrad and "
        "others overlook dark objects; without × input they do not."
    )
    quick: ClassVar[Mapping[str, Any]] = {"masked": 5}

    masked: int = 25

    def measure(self, sources: Sources, images: Masked) -> Arrays:
        symmetric = normalized(images.images)
        model = of_unit_range(sources.network_file())
        networks = {
            SYMMETRIC: (sources.network(), symmetric),
            UNIT: (Explainer(model, backend=sources.backend), (symmetric + 1) / 2),
        }
        maps = {
            encoding: heatmaps(explainer, x, methods(sources.seed), keys=images.keys)
            for encoding, (explainer, x) in networks.items()
        }
        sides = {
            "dark": -symmetric.mean(axis=1),
            "grey": -np.abs(symmetric).mean(axis=1),
        }
        result = {}
        for name in methods():
            first, second = (maps[encoding][name] for encoding in networks)
            result[f"alike, {name}"] = rank_correlation(np.abs(first), np.abs(second))
            for encoding in networks:
                for side, quantity in sides.items():
                    result[f"{side} {encoding}, {name}"] = _half_share(
                        maps[encoding][name], quantity, ~images.background
                    )
        return result

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        values = stacked(found)
        claims = []
        for side, encoding in _BIASED.items():
            column, words = f"{side} {encoding}", f"{_SIDES[side]} half of an object"
            claims += [_overlooked(values, column, words, name) for name in TIMES_INPUT]
            ours, other = (values[f"{column}, {name}"] for name in (_WITHOUT, "RectGrad"))
            pair = compare(ours, {"": other})
            claims.append(
                Claim(
                    f"input in {encoding}: without × input RectGrad gives the {words} more",
                    pair[""].higher,
                    f"median {np.median(ours):.1%} against {np.median(other):.1%}, "
                    f"{least_sure(pair)}",
                )
            )
        columns = [f"{side} {encoding}" for side in _SIDES for encoding in (SYMMETRIC, UNIT)]
        head = [
            f"{_SIDES[side]}, input in {encoding}"
            for side in _SIDES
            for encoding in (SYMMETRIC, UNIT)
        ]
        samples = {
            name: [values[f"{column}, {name}"] for column in (*columns, "alike")]
            for name in methods()
        }
        note = (
            "Fraction of the object's Σ|map| that is on the darker, and on the greyer, half of its "
            "pixels: medians over images; without bias about 0.5. Both ranges show the same "
            "function the same pictures, for the second network begins with 2u − 1. Last: rank "
            "correlation of the maps of both."
        )
        return Conclusion(
            scale=(
                f"{len(values['alike, RectGrad'])} CIFAR-10 images with masks that are classified "
                "rightly, one network (seed 0)."
            ),
            numbers={name: float(np.median(v)) for name, v in values.items()},
            tables=[medians_table([*head, "maps alike"], samples, note)],
            claims=claims,
            remarks=[
                "With inputs in [−1, 1], as in the paper, grey is zero and black is not: there it "
                "is grey that × input overlooks. The baseline of IntegGrad and DeepLIFT is zero in "
                "either range: grey in one, black in the other. RectGrad's final threshold adds to "
                "its bias: where no input is negative it leaves only pixels that should be "
                "brighter. Without × input the map is shown without it."
            ],
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        values = stacked(found)
        figure, axes = plots.figure(2, width=3.8, height=3)
        for ax, (side, encoding) in zip(axes, _BIASED.items(), strict=True):
            shown = {name: 100 * values[f"{side} {encoding}, {name}"] for name in methods()}
            label = f"on the object's {_SIDES[side]} half, %"
            plots.boxes(ax, shown, ours=(_WITHOUT,), label=label, title=f"input in {encoding}")
            plots.reference(ax, "no bias", x=50)
        return [plots.save(figure, folder, self.name)]


def methods(seed: int = 0) -> dict[str, Method]:
    """All, and RectGrad without × input, as the critics propose, of either sign."""
    return {
        **all_methods(seed),
        _WITHOUT: RectGrad(times_input=False, final_threshold=False),
    }


def _half_share(heatmap: np.ndarray, quantity: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Fraction of Σ|map| within `where` that is on the half with most of a quantity: (N,).

    All arrays are (N, H, W). A half where the map is empty.
    """
    shares = []
    for size, q, inside in zip(np.abs(heatmap), quantity, where, strict=True):
        order = np.argsort(-q[inside], kind="stable")
        total = size[inside].sum()
        half = size[inside][order[: len(order) // 2]].sum()
        shares.append(half / total if total > 0 else 0.5)
    return np.array(shares)


def _overlooked(values: Arrays, column: str, words: str, method: str) -> Claim:
    shares = values[f"{column}, {method}"]
    pair = compare(shares, {"": 0.5})
    return Claim(
        f"input in {column.partition(' ')[2]}: {method} gives the {words} less than its share",
        pair[""].lower,
        f"median {np.median(shares):.1%}, less than half on {pair[''].wins:.0%} of the images, "
        f"{least_sure(pair)}",
    )
