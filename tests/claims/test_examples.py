"""Small examples whose attributions are published, or follow by hand from the paper."""

from __future__ import annotations

from typing import Any

import nets
import numpy as np
import pytest
from onnx import helper, numpy_helper

from rectgrad_ref import Explainer, RectGrad
from rectgrad_ref.rules.declared import Rectify

X = np.array([[3, 1]], np.float32)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])


def nested_relu(backend: str) -> Explainer:
    """S = ReLU(ReLU(x₁ − 1) − ReLU(x₂)), which Sundararajan et al. (2017) and Ancona et al. use.

    A second class score, 0·S, makes it a classifier.
    """
    if backend == "cpu":
        pytest.importorskip("onnxruntime")
    constants = {
        "first": np.array([[1], [0]], np.float32),
        "second": np.array([[0], [1]], np.float32),
        "one": np.ones(1, np.float32),
        "scores": np.array([[1, 0]], np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["x1"]),
        helper.make_node("Sub", ["x1", "one"], ["z1"]),
        helper.make_node("Relu", ["z1"], ["a1"]),
        helper.make_node("MatMul", ["x", "second"], ["z2"]),
        helper.make_node("Relu", ["z2"], ["a2"]),
        helper.make_node("Sub", ["a1", "a2"], ["z3"]),
        helper.make_node("Relu", ["z3"], ["a3"]),
        helper.make_node("MatMul", ["a3", "scores"], ["logits"]),
    ]
    initializers = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    return Explainer(nets.model(nodes, ["N", 2], "logits", initializers), backend=backend)


@BACKENDS
@pytest.mark.parametrize(
    ("method", "expected"),
    [("saliency", [1, -1]), ("input_x_gradient", [3, -1]), ("deeplift", [2, -1])],
)
def test_nested_relu(backend: str, method: str, expected: list[float]) -> None:
    result = nested_relu(backend).explain(X, method=method, target=0)
    assert result.values.tolist() == [expected]


@BACKENDS
@pytest.mark.parametrize("steps", [2, 10, 50, 200])
def test_nested_relu_integrated_gradients(backend: str, steps: int) -> None:
    """S is 0 up to α = 1/2, then 2α − 1: both slopes over half the path."""
    options = {"method": "integrated_gradients", "target": 0, "steps": steps}
    result = nested_relu(backend).explain(X, **options)
    assert result.values == pytest.approx(np.array([[1.5, -0.5]]), rel=1e-5)
    assert result.completeness_gap == pytest.approx(0, abs=1e-5)


@BACKENDS
def test_nested_relu_epsilon_lrp(backend: str) -> None:
    result = nested_relu(backend).explain(X, method="epsilon_lrp", target=0)
    assert result.values == pytest.approx(np.array([[3, -1]]), abs=5e-4)
    assert result.values.tolist() != [[3, -1]]


@BACKENDS
def test_nested_relu_rectgrad(backend: str) -> None:
    """By hand at τ = 0: a₃ = 1, R = 1 passes; R = 1 at a₁ = 2 passes; R = −1 at a₂ = 1 does not."""
    result = nested_relu(backend).explain(X, method="rectgrad", target=0, tau=0, trace=True)
    assert result.values.tolist() == [[3, 0]]
    masks = {name: layer.mask.tolist() for name, layer in result.layers().items()}
    assert masks == {"a1": [[True]], "a2": [[False]], "a3": [[True]]}


PR: Any = {"PR1": "a2", "PR2": "a3", "PR3": "a1", "PR4": "a4"}


@pytest.mark.parametrize("rule", PR)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_propagation_rules_of_appendix_b(rule: Any, dtype: type) -> None:
    """a = (3, 2, 1, 0), ∇f = (1, 10, −100, 1000), one unit of four passes."""
    score = {"PR1": "a*r", "PR2": "|a*r|", "PR3": "a", "PR4": "r"}[rule]
    a, R = np.array([[3, 2, 1, 0]], dtype), np.array([[1, 10, -100, 1000]], dtype)
    mask, _ = Rectify(score=score, q=74).select(a, R, 1)
    assert [f"a{i + 1}" for i in np.flatnonzero(mask)] == [PR[rule]]


@BACKENDS
@pytest.mark.parametrize("rule", PR)
def test_propagation_rules_of_appendix_b_in_a_network(backend: str, rule: Any) -> None:
    """The same through a model: the unit that is kept is the only input to be attributed."""
    if backend == "cpu":
        pytest.importorskip("onnxruntime")
    gradient = np.array([[1, 0], [10, 0], [-100, 0], [1000, 0]], np.float32)
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("MatMul", ["a", "gradient"], ["logits"]),
    ]
    model = nets.model(nodes, ["N", 4], "logits", [numpy_helper.from_array(gradient, "gradient")])
    method = RectGrad(propagation_rule=rule, q=74, times_input=False, final_threshold=False)
    x = np.array([[3, 2, 1, 0]], np.float32)
    values = Explainer(model, backend=backend).explain(x, method=method, target=0).values
    expected = np.zeros(4)
    kept = int(PR[rule][1]) - 1
    expected[kept] = gradient[kept, 0]
    assert values.tolist() == [expected.tolist()]
