"""What counts as an activation in modern networks: SPEC, "which values are thresholded"."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import float32, model
from onnx.reference import ReferenceEvaluator
from scipy.stats import norm

from rectgrad_ref import Explainer
from rectgrad_ref.analysis import activations
from rectgrad_ref.errors import RectGradWarning
from rectgrad_ref.graph import Graph, freeze
from rectgrad_ref.model import read_model
from rectgrad_ref.rules.activation import ACTIVATIONS

TOKENS, WIDTH = 5, 8
CONSTANTS = {
    "W": float32(WIDTH, WIDTH, seed=1) / 3,
    "U": float32(WIDTH, WIDTH, seed=2) / 3,
    "V": float32(WIDTH, 3, seed=3),
    "scale": np.ones(WIDTH, np.float32),
    "one": np.array([1]),
    "cap": np.float32(5),
}
ATTENTION = """
    n = LayerNormalization<axis = -1>(x, scale)
    k = MatMul(n, W)
    v = MatMul(n, U)
    h = Attention<q_num_heads = 2, kv_num_heads = 2, softcap = {softcap}>(n, k, v)
    r = Add(x, h)
"""
POOL = """
    m = ReduceMean<keepdims = 0>({0}, one)
    y = MatMul(m, V)
"""


def network(body: str, opset: int = 24, **constants: Any) -> Any:
    text = f"(float[N, {TOKENS}, {WIDTH}] x) => (float[N, 3] y) {{ {body} }}"
    given = CONSTANTS | constants
    used = {name: value for name, value in given.items() if name in body}
    return model(text, opset=opset, constants=used)


def layers(body: str, **options: Any) -> dict[str, str]:
    graph = frozen(body, **options)
    names = activations(graph)
    return {node.outputs[0]: node.op for node in graph.nodes if node.name in names}


def frozen(body: str, **options: Any) -> Graph:
    return freeze(read_model(network(body, **options)), (2, TOKENS, WIDTH))


# What stands between a value `p` and a value `q` → the layers, by their values.
BLOCKS: list[tuple[str, dict[str, str]]] = [
    ("q = Gelu(p)", {"q": "Gelu"}),
    ("q = Mish(p)", {"q": "Mish"}),
    ("q = Swish(p)", {"q": "Swish"}),
    ("q = HardSwish(p)", {"q": "HardSwish"}),
    ("q = Selu(p)", {"q": "Selu"}),
    ("q = Celu(p)", {"q": "Celu"}),
    ("q = Softsign(p)", {"q": "Softsign"}),
    ("q = ThresholdedRelu(p)", {"q": "ThresholdedRelu"}),
    ("q = Sigmoid(p)", {"q": "Sigmoid"}),
    ("q = Tanh(p)", {"q": "Tanh"}),
    ("q = HardSigmoid(p)", {}),
    ("q = Softmax(p)", {}),
    ("q = Shrink(p)", {}),
    ("q = Hardmax(p)", {}),
    # Gates: squeeze-and-excitation, GLU, and the gate of an LSTM spelled out.
    ("s = ReduceMean(p, one)  g = Sigmoid(s)  q = Mul(p, g)", {}),
    ("s = ReduceMean(p, one)  g = HardSigmoid(s)  q = Mul(p, g)", {}),
    ("b = MatMul(p, U)  g = Sigmoid(b)  q = Mul(p, g)", {}),
    ("b = MatMul(p, U)  g = Sigmoid(b)  t = Tanh(p)  q = Mul(t, g)", {"t": "Tanh"}),
    # Gated units whose gate is an activation.
    ("b = MatMul(p, U)  g = Gelu(b)  q = Mul(p, g)", {"g": "Gelu"}),
    ("b = MatMul(p, U)  g = Sigmoid(b)  s = Mul(b, g)  q = Mul(p, s)", {"s": "Swish"}),
    # Attention, with its scores capped as in Gemma 2.
    ("""t = Transpose<perm = [0, 2, 1]>(p)  s = MatMul(p, t)  d = Div(s, cap)  c = Tanh(d)
        e = Mul(c, cap)  w = Softmax(e)  q = MatMul(w, p)""", {}),
]  # fmt: skip


@pytest.mark.parametrize(("block", "expected"), BLOCKS)
def test_layers(block: str, expected: dict[str, str]) -> None:
    assert layers(f"p = MatMul(x, W)  {block} {POOL.format('q')}") == expected


@pytest.mark.parametrize("softcap", ["0.0", "5.0"])
def test_attention_has_no_layer(softcap: str) -> None:
    body = ATTENTION.replace("{softcap}", softcap)
    assert layers(body + POOL.format("r")) == {}
    mlp = "u = MatMul(r, W)  a = Gelu(u)"
    assert layers(body + mlp + POOL.format("a")) == {"a": "Gelu"}


def test_a_recurrent_cell_has_no_layer() -> None:
    body = f"t = Transpose<perm = [1, 0, 2]>(x)  o, l = GRU<hidden_size = {WIDTH}>(t, Wx, Wh) "
    weights = {name: float32(1, 3 * WIDTH, WIDTH) for name in ("Wx", "Wh")}
    end = "h = Squeeze(l, first)  y = MatMul(h, V)"
    assert layers(body + end, first=np.array([0]), **weights) == {}


def test_without_a_layer_rectgrad_is_gradient_times_input_and_warns() -> None:
    explainer = Explainer(
        network(ATTENTION.replace("{softcap}", "0.0") + POOL.format("r")), backend="reference"
    )
    x = float32(2, TOKENS, WIDTH)
    with pytest.warns(RectGradWarning, match="RectGrad equals gradient × input"):
        ours = explainer.explain(x, method="rectgrad", final_threshold=False).values
    np.testing.assert_array_equal(ours, explainer.explain(x, method="input_x_gradient").values)


def test_a_transformer_block_is_explained_sample_by_sample_alike() -> None:
    body = ATTENTION.replace("{softcap}", "0.0") + "u = MatMul(r, W)  a = Gelu(u)"
    explainer = Explainer(network(body + POOL.format("a")), backend="reference")
    x = float32(3, TOKENS, WIDTH)
    whole = explainer.explain(x, method="rectgrad", q=80.0).values
    alone = [explainer.explain(x[i : i + 1], method="rectgrad", q=80.0).values for i in range(3)]
    np.testing.assert_allclose(whole, np.concatenate(alone), rtol=1e-10, atol=1e-12)
    assert np.count_nonzero(whole)


# Operator → its operands after the first, and attributes, in `onnx.parser`'s spelling.
SPELLED = {"PRelu": "(z, slope)", "Clip": "(z, low, high)", "LeakyRelu": "<alpha = 0.25> (z)"}
EXTRA = {"slope": np.float32(0.25), "low": np.float32(0), "high": np.float32(1)}
Z = np.array([-2.7, -1.1, -0.3, 0.2, 0.6, 0.9, 1.2, 1.4, 3.3])


def values(op: str, z: np.ndarray) -> np.ndarray:
    """f(z) by onnx's reference evaluator, in float64; but its Erf rounds to float32."""
    if op == "Gelu":
        return z * norm.cdf(z)
    node = f"a = {op}{SPELLED.get(op, '(z)')}"
    used = {name: np.float64(value) for name, value in EXTRA.items() if name in node}
    proto = model(f"(double[N] z) => (double[N] a) {{ {node} }}", opset=24, constants=used)
    return np.asarray(ReferenceEvaluator(proto).run(None, {"z": z})[0])


def expected(method: str, op: str, R: np.ndarray) -> np.ndarray:
    """What leaves the activation, by the definitions of SPEC sections 2 and 6."""
    a, h = values(op, Z), 1e-6
    slope = (values(op, Z + h) - values(op, Z - h)) / (2 * h)
    if method == "deconvolution":
        return np.maximum(R, 0) * (1 if op == "Relu" else slope)
    if method == "guided_backprop":
        return np.where(Z > 0, np.maximum(R, 0) * slope, 0)
    if method == "epsilon_lrp":
        return R * a / (Z + np.where(Z >= 0, 1e-4, -1e-4))
    if method == "deeplift":  # at a reference of 0
        return R * (a - values(op, np.zeros(1))) / Z
    tau = np.sort(a * R)[::-1][2]  # of nine scores, q = 75: round(8 · 0.25)
    return np.where(a * R > tau, R * slope, 0)


@pytest.mark.filterwarnings("ignore:DeepLIFT|epsilon-LRP|nothing can pass")
@pytest.mark.parametrize("op", sorted(ACTIVATIONS))
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rectgrad", {"q": 75.0}),
        ("deconvolution", {}),
        ("guided_backprop", {}),
        ("epsilon_lrp", {}),
        ("deeplift", {}),
    ],
)
def test_every_activation(op: str, method: str, options: dict[str, Any]) -> None:
    node = f"a = {op}{SPELLED.get(op, '(z)')}"
    used = {name: value for name, value in EXTRA.items() if name in node}
    R = np.float32([1.5, -0.5, 2.0, 0.7, -1.0, 0.4, 1.1, -2.0, 0.3])
    proto = model(
        f"(float[N, 9] x) => (float[N, 1] y) {{ z = Neg(x)  {node}  y = MatMul(a, V) }}",
        opset=24,
        constants={"V": R[:, None], **used},
    )
    result = Explainer(proto, backend="reference").explain(
        -Z[None], method=method, trace=True, **options
    )
    (layer,) = result.layers().values()
    np.testing.assert_allclose(layer.R_in[0], expected(method, op, R), rtol=1e-6, atol=1e-8)
