"""Gradients pass quantisation as if nothing had been rounded, or are refused."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import backward, float32, model
from onnx import ModelProto

from rectgrad_ref import Explainer
from rectgrad_ref.errors import UnsupportedOperator
from rectgrad_ref.graph import freeze
from rectgrad_ref.model import read_model

# Weights are quantised per column; a Reshape stands between the integers.
BODY = """(float[N, 4] x) => (float[N, 3] y) {
    q = QuantizeLinear(x, scale, zero)
    r = Reshape(q, shape)
    d = DequantizeLinear(r, scale, zero)
    a = Relu(d)
    W = DequantizeLinear<axis = 1>(Q, scales)
    y = MatMul(a, W)
}"""
CONSTANTS = {
    "scale": np.float32(0.1),
    "zero": np.int8(5),
    "shape": np.array([0, 4]),
    "Q": np.arange(-6, 6, dtype=np.int8).reshape(4, 3),
    "scales": np.float32([0.1, 0.2, 0.3]),
}
PROTO = model(BODY, opset=13, constants=CONSTANTS)


def test_the_gradient_passes_within_the_range() -> None:
    """The largest level is (127 − 5) · 0.1, the smallest (−128 − 5) · 0.1."""
    graph = freeze(read_model(PROTO), (2, 4))
    x = np.array([[0.52, 12.1, 12.5, -0.3], [1.0, -13.2, 2.0, 99.0]])
    W = CONSTANTS["Q"] * CONSTANTS["scales"].astype(np.float64)
    passes = [[1, 1, 0, 0], [1, 0, 1, 0]]  # within the range, and above 0 at the Relu
    expected = np.ones((2, 3)) @ W.T * passes
    np.testing.assert_allclose(backward(graph, x, np.ones((2, 3))), expected, rtol=1e-6)


OLD = model(
    """(float[N, 4] x) => (float[N, 3] y) {
        q = QuantizeLinear(x, scale, zero)
        d = DequantizeLinear(q, scale, zero)
        y = MatMul(d, W)
    }""",
    opset=10,  # before there was an axis
    constants={"scale": np.float32(0.1), "zero": np.uint8(128), "W": float32(4, 3)},
)


@pytest.mark.filterwarnings("ignore:nothing can pass")
@pytest.mark.parametrize("proto", [PROTO, OLD])
def test_backends_agree(proto: ModelProto) -> None:
    pytest.importorskip("onnxruntime")
    x = float32(3, 4)
    ours, theirs = (
        Explainer(proto, backend=backend).explain(x, method="input_x_gradient").values
        for backend in ("reference", "cpu")
    )
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)


def test_refused_by_option() -> None:
    explainer = Explainer(PROTO, backend="reference")
    with pytest.raises(UnsupportedOperator, match=r"QuantizeLinear 'q'.*rounding has no gradient"):
        explainer.explain(float32(2, 4), method="saliency", quantization="refuse")
