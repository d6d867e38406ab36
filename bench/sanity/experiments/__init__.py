"""One module per check."""

from __future__ import annotations

from pathlib import Path

from bench.paper.report import Suite

from .blurry_maps import BlurryMaps
from .class_sensitivity import ClassSensitivity
from .convergence import Convergence
from .input_bias import InputBias
from .randomization import Randomization
from .without_retraining import WithoutRetraining

SUITE = Suite(
    folder=Path(__file__).parents[1],
    title="What the literature holds against it",
    introduction=(
        "Checks that RectGrad's own paper does not make, for every method, to be read next to what "
        "it does claim:\n[bench/paper](../paper/RESULTS.md). A claim here is the critics'; where "
        "it is reproduced, the method fails the check."
    ),
    origin="in the literature",
    claimant="Literature",
    members=(
        Randomization,
        ClassSensitivity,
        Convergence,
        InputBias,
        BlurryMaps,
        WithoutRetraining,
    ),
)
