"""The forward pass: both programs give the same values, and exactly those that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import slow
from google.protobuf.message import EncodeError
from nets import Weights
from onnx import TensorProto, helper, numpy_helper

from rectgrad_ref import Explainer
from rectgrad_ref.errors import BackendUnavailable, InvalidModel, UnsupportedOperator
from rectgrad_ref.forward import NumpyForward, OnnxruntimeForward
from rectgrad_ref.graph import Graph, freeze
from rectgrad_ref.model import read_model

NET = nets.plain(Weights(3))
IMAGES = Weights(4).images(NET, 2)
NAMES = [op.name for op in NET.ops]


def frozen(model: onnx.ModelProto, *shape: int) -> Graph:
    return freeze(read_model(model), shape)


def onnxruntime_forward(model: onnx.ModelProto, **options: Any) -> OnnxruntimeForward:
    pytest.importorskip("onnxruntime")
    return OnnxruntimeForward(read_model(model), "x", **{"rebatch": False} | options)


def test_numpy_gives_every_value() -> None:
    graph = frozen(NET.onnx(), *IMAGES.shape)
    found = NumpyForward(np.float64)(graph, IMAGES, ["x", *NAMES])
    for i, image in enumerate(IMAGES):
        expected = slow.forward(NET, image)
        for name in NAMES:
            assert found[name].dtype == np.float64
            np.testing.assert_allclose(found[name][i], expected[name], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found["x"], IMAGES)


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1], [NAMES[2]], ["x", NAMES[0], NAMES[0]]])
def test_onnxruntime_gives_what_is_asked_for(names: Sequence[str]) -> None:
    graph = frozen(NET.onnx(), *IMAGES.shape)
    found = onnxruntime_forward(NET.onnx())(graph, IMAGES, names)
    expected = NumpyForward(np.float32)(graph, IMAGES, names)
    assert list(found) == list(expected) == list(dict.fromkeys(names))
    for name in names:
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_fixed_batch_is_made_symbolic() -> None:
    graph = frozen(NET.onnx(batch=1), *IMAGES.shape)
    with pytest.raises(InvalidModel, match="onnxruntime failed"):
        onnxruntime_forward(NET.onnx(batch=1))(graph, IMAGES, [NET.output])
    found = onnxruntime_forward(NET.onnx(batch=1), rebatch=True)(graph, IMAGES, [NET.output])
    assert len(found[NET.output]) == len(IMAGES)


def of_type(kind: int, dtype: Any) -> onnx.ModelProto:
    """A convolution in another floating-point type."""
    weights = np.random.default_rng(0).standard_normal((2, 3, 3, 3)).astype(dtype)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["z"], name="conv"),
        helper.make_node("GlobalAveragePool", ["z"], ["p"]),
        helper.make_node("Flatten", ["p"], ["logits"]),
    ]
    signature = [helper.make_tensor_value_info("x", kind, ["N", 3, 8, 8])]
    result = [helper.make_tensor_value_info("logits", kind, ["N", 2])]
    graph = helper.make_graph(
        nodes, "net", signature, result, [numpy_helper.from_array(weights, "w")]
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def test_half_precision_is_given_in_single() -> None:
    model = of_type(TensorProto.FLOAT16, np.float16)
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    found = onnxruntime_forward(model)(frozen(model, 1, 3, 8, 8), x, ["z", "logits"])
    expected = NumpyForward(np.float64)(frozen(model, 1, 3, 8, 8), x, ["z", "logits"])
    for name, value in found.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[name], atol=0.03)


def test_what_onnxruntime_refuses_runs_on_the_reference() -> None:
    pytest.importorskip("onnxruntime")
    model = of_type(TensorProto.DOUBLE, np.float64)  # it has no convolution in double precision
    x = np.ones((1, 3, 8, 8))
    with pytest.raises(InvalidModel, match=r"refuses <ModelProto>.*backend='reference' runs"):
        Explainer(model, backend="cpu").explain(x, method="saliency")
    assert Explainer(model, backend="reference").explain(x, method="saliency").values.any()


def test_a_model_that_is_too_large_for_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """As protobuf has it, of one with more than 2 GB."""

    def refuse(*_: Any) -> bytes:
        raise EncodeError("Failed to serialize proto")

    monkeypatch.setattr(OnnxruntimeForward, "_exposed", refuse)
    pytest.importorskip("onnxruntime")
    net = nets.model([helper.make_node("Relu", ["x"], ["y"])], ["N", 3], "y")
    with pytest.raises(InvalidModel, match=r"more than 2 GB.*backend='reference'"):
        Explainer(net, backend="cpu").explain(np.ones((1, 3), np.float32))


def test_an_operator_without_a_forward_rule() -> None:
    nodes = [
        helper.make_node("Odd", ["x"], ["z"], name="odd", domain="my"),
        helper.make_node("Identity", ["z"], ["logits"]),
    ]
    model = nets.model(nodes, ["N", 3], "logits")
    model.opset_import.append(helper.make_opsetid("my", 1))
    with pytest.raises(UnsupportedOperator, match=r"my\.Odd 'odd'.*no forward rule"):
        NumpyForward(np.float64)(frozen(model, 1, 3), np.ones((1, 3)), ["logits"])


def test_an_absent_provider() -> None:
    with pytest.raises(BackendUnavailable, match=r"no FooProvider here.*rectgrad-ref\[gpu\]"):
        onnxruntime_forward(NET.onnx(), providers=["FooProvider"])


def test_it_says_what_runs() -> None:
    assert NumpyForward(np.float32).description == "NumPy float32"
    forward = onnxruntime_forward(NET.onnx())
    assert forward.description.startswith("onnxruntime ")
    assert forward.description.endswith(" (CPUExecutionProvider)")
