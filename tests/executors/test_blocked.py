"""Values that onnxruntime hands over in its own layout are those that it computes otherwise."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import float32, model
from onnx import helper, numpy_helper
from walk_cases import out_of_blocks

from rectgrad_ref.errors import RectGradWarning
from rectgrad_ref.executors import blocked
from rectgrad_ref.executors.blocked import BlockedForward, room_of
from rectgrad_ref.forward import LoadedModel, OnnxruntimeForward, Places
from rectgrad_ref.graph import Graph, freeze
from rectgrad_ref.model import read_model

pytest.importorskip("onnxruntime")

Array = np.ndarray
X = float32(2, 3, 9, 8)
# One convolution with whole blocks of filters, one whose last block is not full, one by groups.
NET = model(
    """
    (float[N,3,9,8] x) => (float[N,20] logits) {
        z1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
        relu1 = Relu(z1)
        depthwise = Conv <kernel_shape = [3, 3], group = 32> (relu1, w2)
        relu2 = Relu(depthwise)
        pool = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (relu2)
        z3 = Conv <strides = [2, 1]> (pool, w3)
        relu3 = Relu(z3)
        same = Identity(relu3)
        mean = GlobalAveragePool(same)
        logits = Flatten(mean)
    }
    """,
    opset=17,
    constants={
        "w1": float32(32, 3, 3, 3),
        "b1": float32(32),
        "w2": float32(32, 1, 3, 3),
        "w3": float32(20, 32, 1, 1),
    },
)
IMAGES = ["relu1", "depthwise", "relu2", "pool", "relu3", "same"]
in_blocks = pytest.mark.skipif(
    blocked._block() != 16, reason="onnxruntime has no blocks of sixteen channels here"
)


def frozen(proto: onnx.ModelProto, *shape: int) -> Graph:
    return freeze(read_model(proto), shape)


def forward_of(proto: onnx.ModelProto, kind: type[OnnxruntimeForward] = BlockedForward) -> Any:
    return kind(read_model(proto), "x", rebatch=False, threads=1)


def places_for(graph: Graph, names: Sequence[str]) -> Places:
    rooms = ((name, room_of(graph.shapes[name] or ())) for name in names)
    return Places((name, np.full(room, np.nan, np.float32)) for name, room in rooms)


def session_of(places: Places) -> LoadedModel:
    assert places.session is not None
    return places.session


def read(graph: Graph, places: Places, name: str) -> Array:
    shape, place = graph.shapes[name] or (), places[name]
    if name in session_of(places).blocked:
        return out_of_blocks(place, shape)
    if len(shape) != 4:
        return place.reshape(shape)
    n, c, h, w = shape
    return np.moveaxis(place[: n * c * h * w].reshape(n, h, w, c), -1, 1)


@pytest.mark.parametrize(
    "names", [IMAGES, ["relu2"], ["logits"], [*IMAGES, "logits", "x"]], ids=str
)
@pytest.mark.parametrize("asked", [["logits"], ["logits", *IMAGES]], ids=len)
def test_the_values_are_those_of_a_plain_run(names: list[str], asked: list[str]) -> None:
    """Also where they are handed over in their own axis order as well."""
    graph, forward = frozen(NET, *X.shape), forward_of(NET)
    places = places_for(graph, names)
    found = forward(graph, X, asked, places)
    expected = forward_of(NET, OnnxruntimeForward)(graph, X, [*IMAGES, "logits", "x"])
    assert list(found) == asked
    for name in asked:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)
    for name in names:
        np.testing.assert_allclose(
            read(graph, places, name), expected[name], rtol=1e-5, atol=1e-5, err_msg=name
        )


@in_blocks
def test_what_convolutions_compute_stays_in_blocks() -> None:
    """A value that has two names is handed over in blocks under one of them."""
    graph, places = frozen(NET, *X.shape), places_for(frozen(NET, *X.shape), IMAGES)
    forward_of(NET)(graph, X, ["logits"], places)
    assert {"relu1", "depthwise", "relu2", "pool"} <= set(session_of(places).blocked)
    assert len({"relu3", "same"} & set(session_of(places).blocked)) == 1
    assert room_of((2, 20, 3, 7)) == 2 * 32 * 3 * 7


@in_blocks
def test_an_order_that_the_model_itself_reads() -> None:
    """It transposes the same value as we would, which onnxruntime then does once for both."""
    net = model(
        """
        (float[N,3,9,8] x) => (float[N,16] logits) {
            z = Conv(x, w)
            relu = Relu(z)
            last = Transpose <perm = [0, 2, 3, 1]> (relu)
            sums = ReduceMax <axes = [1, 2], keepdims = 0> (last)
            logits = Identity(sums)
        }
        """,
        opset=17,
        constants={"w": float32(16, 3, 1, 1)},
    )
    graph = frozen(net, *X.shape)
    places = places_for(graph, ["relu"])
    found = forward_of(net)(graph, X, ["logits"], places)["logits"]
    np.testing.assert_array_equal(read(graph, places, "relu").max(axis=(2, 3)), found)


def test_places_are_bound_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the session and they are the same, whatever is explained."""
    bound = []
    bind = BlockedForward._bind

    def counted(self: Any, binding: Any, session: Any, graph: Any, name: str, *rest: Any) -> None:
        bound.append(name)
        bind(self, binding, session, graph, name, *rest)

    monkeypatch.setattr(BlockedForward, "_bind", counted)
    graph, forward = frozen(NET, *X.shape), forward_of(NET)
    places, others = places_for(graph, ["relu1", "relu3"]), places_for(graph, ["relu1", "relu3"])
    for x in (X, -X):
        logits = forward(graph, x, ["logits"], places)["logits"]
    assert bound == ["relu1", "relu3"]
    relu1 = places["relu1"].copy()
    np.testing.assert_array_equal(forward(graph, -X, ["logits"], others)["logits"], logits)
    np.testing.assert_array_equal(others["relu1"], relu1)
    forward(graph, X, ["logits", "relu2"], places)  # another session
    assert bound == ["relu1", "relu3"] * 3
    np.testing.assert_array_equal(forward(graph, -X, ["logits"], places)["logits"], logits)
    np.testing.assert_array_equal(places["relu1"], relu1)


def test_results_of_a_call_outlive_the_next() -> None:
    graph, forward = frozen(NET, *X.shape), forward_of(NET)
    places = places_for(graph, ["relu1"])
    first = forward(graph, X, ["logits", "relu3"], places)
    kept = {name: value.copy() for name, value in first.items()}
    forward(graph, -X, ["logits", "relu3"], places)
    for name, value in kept.items():
        np.testing.assert_array_equal(first[name], value)


@in_blocks
def test_nothing_is_left_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    graph = frozen(NET, *X.shape)
    places = places_for(graph, IMAGES)
    forward_of(NET)(graph, X, ["logits"], places)
    assert session_of(places).blocked
    assert not list(tmp_path.iterdir())


@in_blocks
def test_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    graph = frozen(NET, *X.shape)
    places = places_for(graph, ["relu1"])
    with pytest.warns(RectGradWarning, match="takes longer than it could.*TMPDIR names another"):
        forward_of(NET)(graph, X, ["logits"], places)
    assert not session_of(places).blocked
    expected = forward_of(NET, OnnxruntimeForward)(graph, X, ["relu1"])["relu1"]
    np.testing.assert_array_equal(read(graph, places, "relu1"), expected)


def with_a_loop() -> onnx.ModelProto:
    """NET, whose features pass twice through a matrix that belongs to a sub-graph."""
    proto = onnx.ModelProto()
    proto.CopyFrom(NET)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["goes_on"], ["still_goes_on"]),
            helper.make_node("MatMul", ["state", "inner"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("goes_on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", onnx.TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still_goes_on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", onnx.TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(float32(20, 20), "inner")],
    )
    proto.graph.node[-1].output[0] = "flat"
    proto.graph.node.append(helper.make_node("Loop", ["n", "yes", "flat"], ["logits"], body=body))
    proto.graph.initializer.extend(
        [numpy_helper.from_array(np.array(2), "n"), numpy_helper.from_array(np.array(True), "yes")]
    )
    return proto


def with_half_bytes() -> onnx.ModelProto:
    """NET, with a matrix of numbers of four bits."""
    proto = onnx.ModelProto()
    proto.CopyFrom(NET)
    proto.ir_version = 10
    proto.opset_import[0].version = 21
    numbers = np.random.default_rng(0).integers(-8, 8, (120, 20))
    proto.graph.node[-1].output[0] = "flat"
    proto.graph.node.extend(
        [
            helper.make_node("DequantizeLinear", ["int4", "scale"], ["matrix"]),
            helper.make_node("Gemm", ["flat", "matrix"], ["logits"], transB=1),
        ]
    )
    proto.graph.initializer.extend(
        [
            helper.make_tensor("int4", onnx.TensorProto.INT4, numbers.shape, numbers.ravel()),
            numpy_helper.from_array(np.array(0.1, np.float32), "scale"),
        ]
    )
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 120
    return proto


@in_blocks
@pytest.mark.parametrize("make", [with_a_loop, with_half_bytes])
def test_weights_that_cannot_be_lent(make: Callable[[], onnx.ModelProto]) -> None:
    """Of more than a kilobyte, so that onnxruntime writes them to the file of weights too."""
    proto = make()
    graph = frozen(proto, *X.shape)
    places = places_for(graph, IMAGES)
    found = forward_of(proto)(graph, X, ["logits"], places)
    assert session_of(places).blocked
    expected = forward_of(proto, OnnxruntimeForward)(graph, X, ["logits"])
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
