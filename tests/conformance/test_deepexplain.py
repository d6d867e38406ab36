"""The numeric cases of DeepExplain (Ancona et al. 2018), rebuilt from their numbers.

The function is ReLU(ReLU(x₁ − 1) − ReLU(x₂)) at (3, 1), where it is 1, and at (−10, −5), where
everything is dead. DeepExplain's saliency is the absolute value; its numbers of decimals are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nets import Net, Op

from rectgrad_ref import Explainer

X = np.array([[-10, -5], [3, 1]], np.float32)
# With a second class, so that it is a classifier; its weights are another function's.
FUNCTION = Net(
    (2,),
    (
        Op("Gemm", "z1", ("x",), (np.eye(2), np.array([-1, 0]))),
        Op("Relu", "a1", ("z1",)),
        Op("Gemm", "z2", ("a1",), (np.array([[1, 0], [-1, 1]]), np.zeros(2))),
        Op("Relu", "a2", ("z2",)),
    ),
)
DENSE = ((np.array([[1, -1], [-1, 1]]), np.array([1.5, -1])),
         (np.array([[1.1, 1.4], [-0.5, 1]]), np.array([0, 2])))  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any], list[float], int]] = {
    "saliency": ("saliency", {}, [1, -1], 10),
    "gradient × input": ("input_x_gradient", {}, [3, -1], 10),
    "integrated gradients": ("integrated_gradients", {}, [1.5, -0.5], 1),
    "500 steps": ("integrated_gradients", {"steps": 500}, [1.5, -0.5], 2),
    "ε-LRP": ("epsilon_lrp", {}, [3, -1], 3),
    "ε = 1e-9": ("epsilon_lrp", {"eps": 1e-9}, [3, -1], 7),
    "DeepLIFT": ("deeplift", {}, [2, -1], 10),
}


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    return Explainer(FUNCTION.onnx(), backend="reference")


@pytest.mark.parametrize("name", CASES)
def test_attributions(explainer: Explainer, name: str) -> None:
    method, options, alive, decimals = CASES[name]
    found = explainer.explain(X, method=method, target=0, **options)
    assert found.logits[:, 0].tolist() == [0, 1]
    np.testing.assert_almost_equal(found.values, [[0, 0], alive], decimals)


@pytest.mark.parametrize("method", ["integrated_gradients", "deeplift"])
def test_the_image_as_its_own_baseline(explainer: Explainer, method: str) -> None:
    found = explainer.explain(X[1:], method=method, target=0, baseline=X[1:])
    np.testing.assert_almost_equal(found.values, [[0, 0]], 5)


def test_forward() -> None:
    ops = (
        Op("Gemm", "z", ("x",), DENSE[0]),
        Op("Relu", "a", ("z",)),
        Op("Gemm", "out", ("a",), DENSE[1]),
    )
    found = Explainer(Net((2,), ops).onnx(), backend="reference").explain(
        np.array([[1, 0]], np.float32), method="saliency"
    )
    np.testing.assert_allclose(found.logits, [[2.75, 5.5]], rtol=1e-7)


ACTIVATIONS = {
    "Relu": [0, 0, 1],
    "Elu": [-0.632120558, 0, 1],
    "Sigmoid": [0.268941421, 0.5, 0.731058578],
    "Tanh": [-0.761594155, 0, 0.761594155],
    "Softplus": [0.313261687, 0.693147181, 1.31326168],
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    ops = (Op(activation, "a", ("x",)), Op("Gemm", "scores", ("a",), (np.eye(3), np.zeros(3))))
    explainer = Explainer(Net((3,), ops).onnx(), backend="reference")
    found = explainer.explain(np.array([[-1, 0, 1]], np.float32), method="saliency")
    np.testing.assert_almost_equal(found.logits, [ACTIVATIONS[activation]], 7)
