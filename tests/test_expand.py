"""Functions and control flow, written out: as if the file had the nodes themselves."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import backward, float32, model, run_elsewhere

from rectgrad_ref import Explainer
from rectgrad_ref.analysis import activations, is_samplewise
from rectgrad_ref.errors import UnsupportedOperator
from rectgrad_ref.forward import NumpyForward
from rectgrad_ref.graph import Graph, freeze
from rectgrad_ref.model import read_model
from rectgrad_ref.plan import make_plan

HEAD = "(float[N, 4] x) => (float[N, 3] y)"
CONSTANTS = {
    "W": float32(4, 4, seed=1),
    "V": float32(4, 3, seed=2),
    "u": float32(4, seed=3),
    "zero": np.float32(0),
    "one": np.array([1]),
    "three": np.array(3),
    "tall": np.array([-1, 1]),
}

# A loop over h ← Relu(h · W), a branch that is known, and one that the data decide.
LOOP = """{
    last = Loop(three, , x) <body = step (int64 i, bool go, float[N, 4] h)
        => (bool go_on, float[N, 4] next) {
        go_on = Identity(go)
        z = MatMul(h, W)
        next = Relu(z)
    }>
    y = MatMul(last, V)
}"""
UNROLLED = """{
    z0 = MatMul(x, W)   a0 = Relu(z0)
    z1 = MatMul(a0, W)  a1 = Relu(z1)
    z2 = MatMul(a1, W)  a2 = Relu(z2)
    y = MatMul(a2, V)
}"""
SCAN = """{
    before = MatMul(x, u)
    total, steps = Scan<num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1],
        scan_input_directions = [1], scan_output_directions = [1],
        body = step (float[N] sum, float[N] part) => (float[N] next, float[N] out) {
            a = Relu(part)
            next = Add(sum, a)
            out = Mul(next, part)
        }>(before, x)
    column = Reshape(total, tall)
    both = Add(steps, column)
    y = MatMul(both, V)
}"""
BRANCH = """{
    size = Shape(x)
    extent = Gather(size, one)
    wide = Greater(extent, three)
    flag = Squeeze(wide)
    z = MatMul(x, W)
    a = If(flag) <
        then_branch = yes () => (float[N, 4] p) { p = Relu(z) },
        else_branch = no () => (float[N, 4] q) { q = Neg(z) }
    >
    y = MatMul(a, V)
}"""
CHOICE = """{
    z = MatMul(x, W)
    total = ReduceSum<keepdims = 0>(z)
    flag = Greater(total, zero)
    a = If(flag) <
        then_branch = yes () => (float[N, 4] p) { p = Relu(z) },
        else_branch = no () => (float[N, 4] q) { q = Sin(z) }
    >
    y = MatMul(a, V)
}"""


def frozen(body: str, batch: int = 2, opset: int = 18) -> Graph:
    used = {name: value for name, value in CONSTANTS.items() if re.search(rf"\b{name}\b", body)}
    return freeze(read_model(model(HEAD + body, opset=opset, constants=used)), (batch, 4))


def scores(graph: Graph, x: np.ndarray) -> np.ndarray:
    return NumpyForward(np.float64)(graph, x, [graph.logits])[graph.logits]


def test_a_loop_is_its_passes() -> None:
    looped, unrolled = frozen(LOOP), frozen(UNROLLED)
    x, seed = float32(2, 4).astype(np.float64), float32(2, 3, seed=3).astype(np.float64)
    np.testing.assert_array_equal(scores(looped, x), scores(unrolled, x))
    np.testing.assert_array_equal(backward(looped, x, seed), backward(unrolled, x, seed))
    assert activations(looped) == {"last/0/next", "last/1/next", "last/2/next"}
    assert is_samplewise(looped)


@pytest.mark.parametrize("body", [LOOP, SCAN, BRANCH, CHOICE])
@pytest.mark.parametrize("opset", [11, 18])
def test_values_and_gradients(body: str, opset: int) -> None:
    graph = frozen(body, opset=opset)
    x, rng = float32(2, 4, seed=4), np.random.default_rng(0)
    np.testing.assert_allclose(
        scores(graph, x.astype(np.float64)), run_elsewhere(graph.model.proto, x), 1e-5, 1e-5
    )
    u, v, h = rng.normal(size=(2, 3)), rng.normal(size=(2, 4)), 1e-6
    numeric = u * (scores(graph, x + h * v) - scores(graph, x - h * v)) / (2 * h)
    analytic = backward(graph, x.astype(np.float64), u) * v
    np.testing.assert_allclose(analytic.sum(), numeric.sum(), rtol=1e-7)


@pytest.mark.parametrize("body", [LOOP, SCAN, BRANCH, CHOICE])
@pytest.mark.filterwarnings("ignore:nothing can pass")
def test_onnxruntime_computes_what_lies_inside(body: str) -> None:
    pytest.importorskip("onnxruntime")
    proto = frozen(body).model.proto
    x = float32(3, 4, seed=5)
    ours, theirs = (
        Explainer(proto, backend=backend).explain(x, method="rectgrad", q=50.0)
        for backend in ("reference", "cpu")
    )
    np.testing.assert_allclose(theirs.values, ours.values, rtol=1e-5, atol=1e-6)


def test_an_operator_is_its_function() -> None:
    """GroupNormalization has no rule of its own."""
    body = """{
        z = MatMul(x, W)
        a = Relu(z)
        rows = Reshape(a, shape)
        g = GroupNormalization<num_groups = 2>(rows, scale, bias)
        f = Flatten(g)
        y = MatMul(f, V)
    }"""
    constants = {
        "W": CONSTANTS["W"],
        "V": CONSTANTS["V"],
        "shape": np.array([0, 4, 1, 1]),
        "scale": float32(4),
        "bias": float32(4),
    }
    graph = freeze(read_model(model(HEAD + body, opset=21, constants=constants)), (2, 4))
    assert "GroupNormalization" not in {node.op for node in graph.nodes}
    assert is_samplewise(graph)
    x = float32(2, 4)
    np.testing.assert_allclose(
        scores(graph, x), run_elsewhere(graph.model.proto, x), rtol=1e-5, atol=1e-5
    )


def test_a_loop_that_the_data_stop() -> None:
    body = """{
        last = Loop(, go, x) <body = step (int64 i, bool before, float[N, 4] h)
            => (bool go_on, float[N, 4] next) {
            next = MatMul(h, W)
            total = ReduceSum<keepdims = 0>(next)
            go_on = Less(total, zero)
        }>
        y = MatMul(last, V)
    }"""
    proto = model(HEAD + body, opset=18, constants=CONSTANTS | {"go": np.array(True)})
    with pytest.raises(UnsupportedOperator, match=r"Loop 'last': whether it goes on.* the data"):
        freeze(read_model(proto), (2, 4))


def test_a_loop_without_end() -> None:
    body = """{
        last = Loop(, go, x) <body = step (int64 i, bool before, float[N, 4] h)
            => (bool go_on, float[N, 4] next) {
            next = MatMul(h, W)
            go_on = Identity(before)
        }>
        y = MatMul(last, V)
    }"""
    proto = model(HEAD + body, opset=18, constants=CONSTANTS | {"go": np.array(True)})
    with pytest.raises(UnsupportedOperator, match="more than 4096 passes"):
        freeze(read_model(proto), (2, 4))


def test_nested_loops_multiply() -> None:
    inner = """h3 = Loop(many, , h) <body = inner (int64 j, bool go2, float[N, 4] k)
        => (bool on2, float[N, 4] k2) { on2 = Identity(go2)  k2 = Relu(k) }>"""
    body = f"""{{
        last = Loop(many, , x) <body = step (int64 i, bool go, float[N, 4] h)
            => (bool go_on, float[N, 4] next) {{
            go_on = Identity(go)
            {inner}
            next = Relu(h3)
        }}>
        y = MatMul(last, V)
    }}"""
    proto = model(HEAD + body, opset=18, constants=CONSTANTS | {"many": np.array(1000)})
    with pytest.raises(UnsupportedOperator, match="written out, the model has more than"):
        freeze(read_model(proto), (2, 4))


def test_branches_of_different_shapes() -> None:
    body = """{
        total = ReduceSum<keepdims = 0>(x)
        flag = Greater(total, zero)
        a = If(flag) <
            then_branch = yes () => (float[N, 4] p) { p = Relu(x) },
            else_branch = no () => (float[N, K] q) { q = ReduceSum(x) }
        >
        y = MatMul(a, V)
    }"""
    proto = model(HEAD + body, opset=18, constants=CONSTANTS)
    with pytest.raises(UnsupportedOperator, match="If 'a': its branches give 'a' different shapes"):
        freeze(read_model(proto), (2, 4))


def test_an_old_scan_is_refused() -> None:
    """Of opset 8, whose batch axis no other version has."""
    body = """{
        n = Identity(x)
        a = Scan<num_scan_inputs = 1, body = step (float s) => (float t) { t = Relu(s) }>(, n)
        y = MatMul(a, V)
    }"""
    proto = model(HEAD + body, opset=8, constants=CONSTANTS)
    with pytest.raises(UnsupportedOperator, match="Scan 'a'"):
        make_plan(freeze(read_model(proto), (2, 4)), ())
