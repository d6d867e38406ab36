"""What the tests of all methods share: an explanation, and the same by the slow derivation."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import slow
from nets import Net

from rectgrad_ref import Attribution, Explainer
from rectgrad_ref.errors import RectGradWarning

TARGET = 1


def explained(net: Net, images: np.ndarray, method: str, **options: Any) -> Attribution:
    """The package's map in float64, with its trace where there is one."""
    explainer = Explainer(net.onnx(), backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RectGradWarning)
        return explainer.explain(images, method=method, target=TARGET, **options)


def gradients(
    net: Net,
    images: np.ndarray,
    activation: slow.ActivationRule = slow.gradient_rule,
    pool: slow.PoolRule = slow.to_first,
    masked: Collection[str] = (),
) -> list[slow.Values]:
    """R at every value of every sample, by the slow derivation."""
    values = [slow.forward(net, x) for x in images]
    seed = np.eye(values[0][net.output].size)[TARGET]
    return slow.backward(net, values, [seed] * len(images), activation, pool, masked)


def at_input(R: list[slow.Values]) -> np.ndarray:
    return np.stack([r["x"] for r in R])


def close(found: Any, expected: Any, rel: float = 1e-9) -> bool:
    """Whether no element differs by more than `rel` of the largest."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return bool(np.abs(found - expected).max() <= rel * np.abs(expected).max())
