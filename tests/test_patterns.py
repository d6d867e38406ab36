"""Activations are recognised in every spelling, and nothing else is."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import float32, model, run_elsewhere
from onnx import numpy_helper

from rectgrad_ref.analysis import activations
from rectgrad_ref.forward import NumpyForward
from rectgrad_ref.graph import Graph, freeze
from rectgrad_ref.model import read_model

SCALARS = {
    "half": 0.5, "one": 1.0, "two": 2.0, "three": 3.0, "six": 6.0, "sixth": 1 / 6, "zero": 0.0,
    "sqrt2": 2**0.5, "rsqrt2": 0.5**0.5, "c": 0.044715, "s": (2 / np.pi) ** 0.5, "q": 1.702,
    "c2": 0.044715 * (2 / np.pi) ** 0.5, "fifth": 0.2, "tiny": 1e-12, "twenty": 20.0,
}  # fmt: skip

SPELLINGS = [
    # SiLU
    ("Swish", "s1 = Sigmoid(z)  h = Mul(z, s1)"),
    ("Swish", "s1 = Sigmoid(z)  h = Mul(s1, z)"),
    ("Swish", "n = Neg(z)  e = Exp(n)  d = Add(e, one)  h = Div(z, d)"),
    ("Swish", "n = Neg(z)  e = Exp(n)  d = Add(one, e)  r = Reciprocal(d)  h = Mul(z, r)"),
    ("Swish", "n = Neg(z)  e = Exp(n)  d = Add(one, e)  r = Div(one, d)  h = Mul(r, z)"),
    ("Swish", "m = Mul(z, half)  t = Tanh(m)  a = Add(t, one)  b = Mul(a, half)  h = Mul(b, z)"),
    ("Swish", "m = Mul(z, q)  s1 = Sigmoid(m)  h = Mul(z, s1)"),
    # GELU by erf: PyTorch, Keras, Hugging Face, hand-written
    ("Gelu", "d = Div(z, sqrt2)  e = Erf(d)  a = Add(e, one)  m = Mul(z, a)  h = Mul(m, half)"),
    ("Gelu", "d = Mul(z, rsqrt2)  e = Erf(d)  a = Add(one, e)  m = Mul(a, half)  h = Mul(z, m)"),
    ("Gelu", "d = Div(z, sqrt2)  e = Erf(d)  a = Add(e, one)  m = Mul(z, half)  h = Mul(m, a)"),
    ("Gelu", "d = Div(z, sqrt2)  e = Erf(d)  a = Add(e, one)  m = Mul(z, a)  h = Div(m, two)"),
    # GELU by tanh
    (
        "Gelu",
        "p = Pow(z, three)  m = Mul(p, c)  a = Add(z, m)  k = Mul(a, s)  t = Tanh(k)"
        " b = Add(t, one)  i = Mul(z, half)  h = Mul(i, b)",
    ),
    (
        "Gelu",
        "z2 = Mul(z, z)  z3 = Mul(z, z2)  m = Mul(c, z3)  a = Add(z, m)  k = Mul(s, a)  t = Tanh(k)"
        " b = Add(one, t)  i = Mul(half, b)  h = Mul(z, i)",
    ),
    (
        "Gelu",
        "z2 = Mul(z, z)  m = Mul(z2, c2)  a = Add(m, s)  k = Mul(z, a)  t = Tanh(k)"
        " b = Add(t, one)  i = Mul(z, b)  h = Mul(i, half)",
    ),
    # HardSwish
    ("HardSwish", "s1 = HardSigmoid<alpha = 0.16666667, beta = 0.5>(z)  h = Mul(z, s1)"),
    ("HardSwish", "a = Add(z, three)  k = Clip(a, zero, six)  m = Mul(z, k)  h = Div(m, six)"),
    ("HardSwish", "a = Add(z, three)  k = Clip(a, zero, six)  m = Div(k, six)  h = Mul(m, z)"),
    ("HardSwish", "a = Add(three, z)  k = Clip(a, zero, six)  m = Mul(k, sixth)  h = Mul(z, m)"),
    (
        "HardSwish",
        "a = Add(z, three)  r = Relu(a)  k = Min(r, six)  m = Mul(k, z)  h = Div(m, six)",
    ),
    ("HardSwish", "m = Mul(z, sixth)  a = Add(m, half)  k = Clip(a, zero, one)  h = Mul(k, z)"),
    # HardSigmoid
    ("HardSigmoid", "a = Add(z, three)  k = Clip(a, zero, six)  h = Div(k, six)"),
    ("HardSigmoid", "a = Add(z, three)  k = Clip(a, zero, six)  h = Mul(k, sixth)"),
    ("HardSigmoid", "m = Mul(z, fifth)  a = Add(m, half)  h = Clip(a, zero, one)"),
    # Mish
    ("Mish", "p = Softplus(z)  t = Tanh(p)  h = Mul(z, t)"),
    ("Mish", "e = Exp(z)  a = Add(e, one)  l = Log(a)  t = Tanh(l)  h = Mul(t, z)"),
    (
        "Mish",
        "p = Softplus(z)  g = Greater(z, twenty)  w = Where(g, z, p)  t = Tanh(w)  h = Mul(z, t)",
    ),
    # Softplus, Softsign and Relu written out
    ("Softplus", "p = Softplus(z)  g = Greater(z, twenty)  h = Where(g, z, p)"),
    ("Softsign", "a = Abs(z)  d = Add(a, one)  h = Div(z, d)"),
    ("Relu", "h = Max(z, zero)"),
    ("Relu", "h = Max(zero, z)"),
    ("Relu", "g = Greater(z, zero)  h = Where(g, z, zero)"),
    ("Relu", "h = Clip(z, zero)"),
]


def network(body: str, more: str = "") -> onnx.ModelProto:
    """x → dense → z → `body` → h → dense → y."""
    text = f"""(float[N, 5] x) => (float[N, 2] y) {{
        z = MatMul(x, W)
        {body}
        k9 = MatMul(h, V)
        {more or "y = Identity(k9)"}
    }}"""
    constants: dict[str, Any] = {name: np.float32(value) for name, value in SCALARS.items()}
    return model(text, constants={**constants, "W": float32(5, 4), "V": float32(4, 2)})


def frozen(body: str, more: str = "") -> Graph:
    return freeze(read_model(network(body, more)), (3, 5))


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes if node.op not in ("MatMul", "Identity")]


def thresholded(graph: Graph) -> list[str]:
    names = activations(graph)
    return [node.op for node in graph.nodes if node.name in names]


@pytest.mark.parametrize(("op", "body"), SPELLINGS)
def test_spellings(op: str, body: str) -> None:
    graph = frozen(body)
    assert ops(graph) == [op]
    assert thresholded(graph) == ([op] if op != "HardSigmoid" else [])
    (node,) = (node for node in graph.nodes if node.op == op)
    if op == "Gelu":
        assert node["approximate"] == ("tanh" if "Tanh" in body else "none")
    assert (node.inputs, node.outputs, node.input_shapes) == (("z",), ("h",), ((3, 4),))


@pytest.mark.parametrize(("op", "body"), SPELLINGS)
def test_fused_nodes_compute_the_same(op: str, body: str) -> None:
    graph, x = frozen(body), 4 * float32(3, 5)
    found = NumpyForward(np.float64)(graph, x, ["y"])["y"]
    np.testing.assert_allclose(found, run_elsewhere(network(body), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("op", "body"), SPELLINGS)
def test_spellings_with_half_precision_constants(op: str, body: str) -> None:
    text = f"(float16[N, 4] z) => (float16[N, 4] y) {{ {body}  y = Neg(h) }}"
    constants = {name: np.float16(value) for name, value in SCALARS.items()}
    graph = freeze(read_model(model(text, constants=constants)), (3, 4))
    assert ops(graph) == [op, "Neg"]
    if op == "Gelu":
        assert graph.nodes[0]["approximate"] == ("tanh" if "Tanh" in body else "none")


SILU = "s1 = Sigmoid(z)  h = Mul(z, s1)"


@pytest.mark.parametrize(
    "more", ["k8 = MatMul(s1, V)  y = Add(k9, k8)", "r = ReduceSum(s1)  y = Add(k9, r)"]
)
def test_not_where_an_inner_value_is_read_elsewhere(more: str) -> None:
    assert ops(frozen(SILU, more))[:2] == ["Sigmoid", "Mul"]


def test_not_where_an_inner_value_is_the_output() -> None:
    proto = model("(float[N, 4] z) => (float[N, 4] s1, float[N, 4] h) {" + SILU + "}")
    read = read_model(proto)
    assert [n.op for n in freeze(read, (3, 4), output="h").nodes] == ["Swish"]
    assert [n.op for n in freeze(read, (3, 4), output="s1").nodes] == ["Sigmoid"]


def test_an_activation_read_twice_is_one() -> None:
    graph = frozen(SILU, "k8 = MatMul(h, V)  y = Add(k9, k8)")
    assert ops(graph) == ["Swish", "Add"]


@pytest.mark.parametrize(
    "body",
    [
        "m = Mul(z, two)  s1 = Sigmoid(m)  h = Mul(z, s1)",  # no known slope
        "t = Tanh(z)  h = Mul(z, t)",
        "a = Add(z, two)  k = Clip(a, zero, six)  m = Mul(k, z)  h = Div(m, six)",
        "h = Max(z, tiny)",  # keeps a divisor from zero
        "h = Max(z, half)",
        "g = Greater(z, half)  h = Where(g, z, zero)",
        "m = Mul(z, z)  h = Mul(m, half)",
        "s1 = Sigmoid(z)  h = Mul(s1, half)",
    ],
)
def test_what_is_something_else(body: str) -> None:
    known = {"Swish", "Gelu", "HardSwish", "HardSigmoid", "Mish", "Relu", "Softplus"}
    assert not known & set(ops(frozen(body)))


def test_a_constant_that_adds_an_axis() -> None:
    text = """(float[N, 4] z) => (float[N, 4] y) {
        m = Mul(z, ones)
        s1 = Sigmoid(m)
        h = Mul(z, s1)
        y = Squeeze(h, first)
    }"""
    constants = {"ones": np.ones((1, 1, 1), np.float32), "first": np.array([0])}
    graph = freeze(read_model(model(text, constants=constants)), (3, 4))
    assert ops(graph) == ["Mul", "Sigmoid", "Mul", "Squeeze"]


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ("Clip(z, zero, six)", ["Clip"]),
        ("Clip(z, zero, one)", ["Clip"]),
        ("Clip(z, zero)", ["Relu"]),
        ("Clip(z, minus, one)", []),
        ("Clip(z, , six)", []),
        ("Clip(z, tiny)", []),
        ("Clip(z, zero, minus)", []),
    ],
)
def test_clip_is_an_activation_from_zero_up(clip: str, expected: list[str]) -> None:
    proto = network(f"h = {clip}")
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(-1), "minus"))
    assert thresholded(freeze(read_model(proto), (3, 5))) == expected


GATES = {
    "sigmoid": "g = Sigmoid(f)",
    "scaled sigmoid": "g0 = Sigmoid(f)  g = Mul(g0, two)",
    "one minus a sigmoid": "g0 = Sigmoid(f)  g = Sub(one, g0)",
    "one plus a sigmoid": "g0 = Sigmoid(f)  g = Add(g0, one)",
    "reshaped sigmoid": "g0 = Sigmoid(f)  g1 = Flatten(g0)  g = Reshape(g1, cube)",
    "expanded sigmoid": "g0 = Sigmoid(f)  g = Expand(g0, map)",
    "hard sigmoid": "g = HardSigmoid(f)",
    "MobileNetV3's hard sigmoid": "a = Add(f, three)  k = Clip(a, zero, six)  g = Div(k, six)",
    "Keras's hard sigmoid": "m = Mul(f, fifth)  a = Add(m, half)  g = Clip(a, zero, one)",
    "softmax": "g = Softmax<axis = 1>(f)",
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("multiply", ["Mul(r, g)", "Mul(g, r)"])
def test_gates_are_no_activations(gate: str, multiply: str) -> None:
    """Squeeze-and-excitation in every form."""
    text = f"""(float[N, 3, 4, 4] x) => (float[N, 2] y) {{
        v = Conv(x, K)
        r = Relu(v)
        p = GlobalAveragePool(r)
        d = Conv(p, D)
        e = Relu(d)
        f = Conv(e, U)
        {GATES[gate]}
        h = {multiply}
        l = Flatten(h)
        y = MatMul(l, V)
    }}"""
    constants: dict[str, Any] = {name: np.float32(value) for name, value in SCALARS.items()}
    constants |= {"K": float32(4, 3, 1, 1), "D": float32(2, 4, 1, 1), "U": float32(4, 2, 1, 1)}
    constants |= {"V": float32(64, 2), "cube": np.array([0, 4, 1, 1]), "map": [1, 1, 4, 4]}
    proto = model(text, constants={name: np.asarray(v) for name, v in constants.items()})
    assert thresholded(freeze(read_model(proto), (2, 3, 4, 4))) == ["Relu", "Relu"]


def test_a_sigmoid_between_layers_is_an_activation() -> None:
    assert thresholded(frozen("h = Sigmoid(z)")) == ["Sigmoid"]
    assert thresholded(frozen("h0 = Sigmoid(z)  h = Mul(h0, two)")) == ["Sigmoid"]


def exported(functions: Sequence[Callable[[Any], Any]], opset: int, dynamo: bool) -> bytes:
    """PyTorch layers with the functions between them, by one exporter or the other."""
    torch = pytest.importorskip("torch")
    if dynamo:
        pytest.importorskip("onnxscript")

    class Network(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in functions)

        def forward(self, x: Any) -> Any:
            for layer, function in zip(self.layers, functions, strict=True):
                x = function(layer(x))
            return x

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    file, given = io.BytesIO(), (torch.zeros(3, 4),)
    options = {"dynamo": dynamo, "opset_version": opset, "verbose": False}
    torch.onnx.export(Network().eval(), given, file, **options)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("opset", "dynamo"), [(9, False), (17, False), (18, True)])
def test_pytorch_exports(opset: int, dynamo: bool) -> None:
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    functions: list[tuple[str, Callable[[Any], Any]]] = [
        ("Swish", F.silu),
        ("Swish", lambda x: x * torch.sigmoid(1.702 * x)),
        ("Swish", lambda x: x / (1 + torch.exp(-x))),
        ("Gelu", F.gelu),
        ("Gelu", lambda x: F.gelu(x, approximate="tanh")),
        ("Gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5))),
        ("Gelu", lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))),
        ("Gelu", lambda x: 0.5 * x * (1 + torch.tanh(x * 0.79788456 * (1 + 0.044715 * x * x)))),
        ("HardSwish", F.hardswish),
        ("HardSwish", lambda x: x * F.relu6(x + 3) / 6),
        ("HardSwish", lambda x: x * F.hardsigmoid(x)),
        ("Mish", F.mish),
        ("Mish", lambda x: x * torch.tanh(F.softplus(x))),
        ("Softplus", F.softplus),
        ("Softsign", F.softsign),
        ("Relu", F.relu),
        ("Relu", lambda x: x.clamp(min=0)),
        ("Relu", lambda x: torch.where(x > 0, x, torch.zeros(()))),
        ("Clip", F.relu6),
        ("LeakyRelu", F.leaky_relu),
        ("Elu", F.elu),
        ("Selu", F.selu),
    ]
    proto = exported([function for _, function in functions], opset, dynamo)
    graph = freeze(read_model(proto), (3, 4))
    assert thresholded(graph) == [op for op, _ in functions]
