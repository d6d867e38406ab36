"""Methods that change the backward pass, held against one that does not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bench.paper.evidence import Claim, compare, least_sure
from bench.paper.maps import OURS

MODIFIED = ("Guided BP", "Deconvolution", *OURS)
"""Methods that change the backward pass at activations; gradients are their foil."""
GRADIENT = "Saliency"


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
