"""Every opset becomes one dialect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import NEWEST, float32, model, run_elsewhere
from hypothesis import given
from hypothesis import strategies as st

from rectgrad_ref.analysis import is_samplewise
from rectgrad_ref.forward import NumpyForward
from rectgrad_ref.graph import Node, freeze
from rectgrad_ref.model import read_model
from rectgrad_ref.opsets import same_pads
from rectgrad_ref.plan import make_plan

OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 18, NEWEST)


def only_node(body: str, shape: tuple[int, ...], opset: int, **constants: Any) -> Node:
    dims = ", ".join(map(str, shape[1:]))
    text = f"(float[N, {dims}] x) => (float[N, K] y) {{ {body}  f = Flatten(h)  y = Neg(f) }}"
    proto = model(text, opset=opset, constants={k: np.asarray(v) for k, v in constants.items()})
    node, _, _ = freeze(read_model(proto), shape).nodes
    return node


# Old form, its opset, shape of the input, new form, its constants.
MOVED: list[tuple[str, int, tuple[int, ...], str, dict[str, Any]]] = [
    ("Squeeze<axes = [1]>(x)", 11, (2, 1, 3), "Squeeze(x, c)", {"c": [1]}),
    ("Unsqueeze<axes = [1]>(x)", 11, (2, 3), "Unsqueeze(x, c)", {"c": [1]}),
    (
        "ReduceSum<axes = [1], keepdims = 0>(x)",
        11,
        (2, 3, 4),
        "ReduceSum<keepdims = 0>(x, c)",
        {"c": [1]},
    ),
    ("ReduceMean<axes = [1, 2]>(x)", 13, (2, 3, 4), "ReduceMean(x, c)", {"c": [1, 2]}),
    ("ReduceMax<axes = [-1]>(x)", 13, (2, 3, 4), "ReduceMax(x, c)", {"c": [-1]}),
    (
        "Clip<min = 0.0, max = 6.0>(x)",
        9,
        (2, 3),
        "Clip(x, a, b)",
        {"a": np.float32(0), "b": np.float32(6)},
    ),
    (
        "Pad<pads = [0, 1, 0, 2], value = 0.5>(x)",
        10,
        (2, 3),
        "Pad(x, p, v)",
        {"p": [0, 1, 0, 2], "v": np.float32(0.5)},
    ),
    (
        "Slice<starts = [1], ends = [3], axes = [1]>(x)",
        9,
        (2, 4),
        "Slice(x, s, e, a)",
        {"s": [1], "e": [3], "a": [1]},
    ),
    (
        "Dropout<ratio = 0.25>(x)",
        7,
        (2, 3),
        "Dropout(x, r)",
        {"r": np.float32(0.25)},
    ),
]


@pytest.mark.parametrize(("old", "opset", "shape", "new", "constants"), MOVED)
def test_attributes_that_became_inputs(
    old: str, opset: int, shape: tuple[int, ...], new: str, constants: dict[str, Any]
) -> None:
    before, after = (
        only_node(f"h = {old}", shape, opset),
        only_node(f"h = {new}", shape, NEWEST, **constants),
    )
    assert before.output_shapes[0] == after.output_shapes[0]
    assert before.input_shapes == after.input_shapes
    for ours, theirs in zip(before.constants, after.constants, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        if ours is not None and theirs is not None:
            assert ours.dtype == theirs.dtype
    assert after.attributes.items() >= before.attributes.items()


def test_defaults_are_filled_in() -> None:
    assert only_node("h = LeakyRelu(x)", (2, 3), 7)["alpha"] == pytest.approx(0.01)
    node = only_node("h = MaxPool<kernel_shape = [2]>(x)", (2, 3, 4), 8)
    assert (node["strides"], node["dilations"], node["pads"]) == ((1,), (1,), (0, 0))
    node = only_node("h = Conv(x, W)", (2, 3, 4), 7, W=float32(2, 3, 2))
    assert (node["kernel_shape"], node["group"]) == ((2,), 1)


@pytest.mark.parametrize(
    ("axis", "opset", "expected"),
    [(1, 11, (1, 2)), (-2, 11, (1, 2)), (2, 11, (2,)), (None, 11, (1, 2)), (None, 13, (2,))],
)
def test_softmax_axes(axis: int | None, opset: int, expected: tuple[int, ...]) -> None:
    attribute = "" if axis is None else f"<axis = {axis}>"
    assert only_node(f"h = Softmax{attribute}(x)", (2, 3, 4), opset)["axes"] == expected


def test_batch_normalization_is_explained_as_at_inference() -> None:
    ones = np.ones(3, np.float32)
    body = "h, m1, v1 = BatchNormalization<training_mode = 1>(x, s, b, m, v)"
    node = only_node(body, (2, 3, 4), 15, s=ones, b=ones, m=ones, v=ones)
    assert node["training_mode"] == 0


# Since which opset a node is written how; before, it was written the other way.
REWORDED = {
    "clip": (11, "Clip(n, low, high)", "Clip<min = 0.0, max = 6.0>(n)"),
    "pad": (
        11,
        "Pad(r, pads, half)",
        "Pad<pads = [0, 0, 1, 0, 0, 0, 0, 1], value = 0.5>(r)",
    ),
    "split": (13, "Split<axis = 1>(a, parts)", "Split<axis = 1, split = [1, 3]>(a)"),
    "slice": (
        10,
        "Slice(t, one, three, one)",
        "Slice<starts = [1], ends = [3], axes = [1]>(t)",
    ),
    "unsqueeze": (13, "Unsqueeze(k, two)", "Unsqueeze<axes = [2]>(k)"),
    "squeeze": (13, "Squeeze(u, two)", "Squeeze<axes = [2]>(u)"),
    "dropout": (12, "Dropout(w, half)", "Dropout<ratio = 0.5>(w)"),
    "mean": (
        18,
        "ReduceMean<keepdims = 0>(d, last)",
        "ReduceMean<axes = [2, 3], keepdims = 0>(d)",
    ),
}
NETWORK = """(float[N, 3, 8, 8] x) => (float[N, 4] y) {{
    c = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, K, b)
    n = BatchNormalization(c, b, b, b, v)
    r = {clip}
    q = {pad}
    p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(q)
    a = AveragePool<kernel_shape = [2, 2], count_include_pad = 1, pads = [0, 0, 1, 1]>(p)
    s, t = {split}
    e = {slice}
    k = Concat<axis = 1>(s, e)
    u = {unsqueeze}
    w = {squeeze}
    d = {dropout}
    m = {mean}
    g = Gemm<transB = 1, beta = 0.5>(m, G, v)
    y = Softmax(g)
}}"""


@pytest.mark.parametrize("opset", OPSETS)
def test_a_network_in_every_opset(opset: int) -> None:
    constants: dict[str, Any] = {
        "K": float32(4, 3, 3, 3), "b": float32(4, seed=1), "v": np.float32([1, 2, 3, 0.5]),
        "G": float32(4, 3, seed=2), "low": np.float32(0), "high": np.float32(6),
        "half": np.float32(0.5), "pads": np.array([0, 0, 1, 0, 0, 0, 0, 1]),
        "parts": np.array([1, 3]), "one": np.array([1]), "two": np.array([2]),
        "three": np.array([3]), "last": np.array([2, 3]),
    }  # fmt: skip
    words = {name: new if opset >= since else old for name, (since, new, old) in REWORDED.items()}
    proto = model(NETWORK.format(**words), opset=opset, constants=constants)
    x = float32(2, 3, 8, 8)
    graph = freeze(read_model(proto), x.shape)
    found = NumpyForward(np.float64)(graph, x, [graph.output])[graph.output]
    np.testing.assert_allclose(found, run_elsewhere(proto, x), rtol=1e-5, atol=1e-6)
    assert make_plan(graph, ()).steps
    assert is_samplewise(graph)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "expected"),
    [
        (8, 3, 1, 1, (1, 1)),
        (8, 3, 2, 1, (0, 1)),
        (7, 3, 2, 1, (1, 1)),
        (8, 2, 1, 1, (0, 1)),
        (8, 1, 2, 1, (0, 0)),
        (8, 3, 1, 2, (2, 2)),
        (5, 2, 3, 1, (0, 0)),
    ],
)
def test_same_pads(
    size: int, kernel: int, stride: int, dilation: int, expected: tuple[int, int]
) -> None:
    values = {"kernel_shape": (kernel,), "strides": (stride,), "dilations": (dilation,)}
    assert same_pads((size,), values) == expected
    assert same_pads((size,), values, lower=True) == expected[::-1]


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_same_pads_give_the_rounded_up_quotient(
    size: int, kernel: int, stride: int, dilation: int
) -> None:
    values = {"kernel_shape": (kernel,), "strides": (stride,), "dilations": (dilation,)}
    begin, end = same_pads((size,), values)
    assert 0 <= begin <= end <= begin + 1
    extent = (kernel - 1) * dilation + 1
    assert (size + begin + end - extent) // stride + 1 == -(-size // stride)
