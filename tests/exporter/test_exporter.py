"""Exported explainers against the reference: node by node, and as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from typer.testing import CliRunner

import rectgrad_ref
from rectgrad_ref import Explainer
from rectgrad_ref.cli import app
from rectgrad_ref.errors import InvalidModel, OutputError, UnsupportedOperator
from rectgrad_ref.exporter import OPSET, at_least, explainer_model
from rectgrad_ref.exporter.tensor import NotTraceable, Tape, Tensor
from rectgrad_ref.exporter.trace import trace
from rectgrad_ref.graph import Graph, Node, freeze
from rectgrad_ref.methods import Method, make_method
from rectgrad_ref.methods.gradient import Saliency
from rectgrad_ref.methods.path import SmoothGrad
from rectgrad_ref.model import read_model
from rectgrad_ref.plan import Plan, make_plan
from rectgrad_ref.reference import constants_as
from rectgrad_ref.rules.declared import Call, ConvTranspose, Gradient, Rectify, Redistribute

Run = Callable[[onnx.ModelProto, Mapping[str, np.ndarray]], dict[str, np.ndarray]]

CIFAR10_CNN = Path(rectgrad_ref.__file__).parents[1] / "onnx_models" / "cifar10_cnn.onnx"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rectgrad": ("rectgrad", {"q": 80.0}),
    "low q": ("rectgrad", {"q": 30.0}),
    "authors": ("rectgrad", {"preset": "authors", "q": 80.0}),
    "bare": (
        "rectgrad",
        {"q": 80.0, "padding_trick": False, "final_threshold": False, "times_input": False},
    ),
    "linear": ("rectgrad", {"percentile": "linear", "q": 75.3}),
    "numpy_nearest": ("rectgrad", {"percentile": "numpy_nearest", "q": 60.0}),
    "fixed": ("rectgrad", {"tau": 0.1}),
    "channel": ("rectgrad", {"scope": "channel", "q": 50.0}),
    "strict": ("rectgrad", {"strict_relu": True, "q": 5.0, "strictness": ">="}),
    "PR2": ("rectgrad", {"propagation_rule": "PR2", "q": 80.0}),
    "mod": ("rectgrad", {"propagation_rule": "mod", "q": 80.0}),
    "prr": ("rectgrad", {"prr": True, "q": 80.0}),
    "split": ("rectgrad", {"maxpool_ties": "split", "q": 80.0}),
    "logit": ("rectgrad", {"output_seed": "logit", "q": 80.0}),
    "saliency": ("saliency", {}),
    "softmax": ("saliency", {"output_seed": "softmax"}),
    "input_x_gradient": ("input_x_gradient", {"padding_trick": True, "final_threshold": True}),
    "deconvolution": ("deconvolution", {"times_input": True}),
    "guided_backprop": ("guided_backprop", {}),
    "epsilon_lrp": ("epsilon_lrp", {}),
    "deeplift": ("deeplift", {"baseline": 0.25}),
    "rescale": ("deeplift", {"maxpool": "rescale"}),
    "integrated_gradients": ("integrated_gradients", {"steps": 4}),
    "trapezoid": ("integrated_gradients", {"steps": 4, "rule": "trapezoid", "baseline": 1.0}),
    "smoothgrad": ("smoothgrad", {"n": 4}),
}
SEVERAL_PASSES = {"integrated_gradients", "trapezoid", "smoothgrad"}

DIVIDING = {
    "channel", "split", "prr", "softmax", "epsilon_lrp", "deeplift", "rescale", *SEVERAL_PASSES,
}  # fmt: skip


def method_of(name: str) -> Method:
    method, options = METHODS[name]
    return make_method(method, **options)


def in_onnxruntime(proto: onnx.ModelProto, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip((v.name for v in proto.graph.output), session.run(None, feed), strict=True))


def in_evaluator(proto: onnx.ModelProto, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    results = ReferenceEvaluator(proto).run(None, dict(feed))
    return dict(zip((v.name for v in proto.graph.output), results, strict=True))


RUNS: dict[str, Run] = {"onnxruntime": in_onnxruntime, "evaluator": in_evaluator}


def feed_of(proto: onnx.ModelProto, x: np.ndarray, target: Any = -1) -> dict[str, np.ndarray]:
    return {
        proto.graph.input[0].name: x,
        "target": np.broadcast_to(np.int64(target), len(x)).copy(),
    }


# --- node by node -------------------------------------------------------------------------------


def with_outputs(proto: onnx.ModelProto, names: set[str], graph: Graph) -> onnx.ModelProto:
    """The explainer with further values as outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for name in sorted(names - {v.name for v in copy.graph.output}):
        kind = helper.np_dtype_to_tensor_dtype(graph.dtypes.get(name, np.dtype(np.float32)))
        copy.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return copy


def fan_in(node: Node) -> int:
    """Terms of the sums that a step of the walk back adds up, or more."""
    sizes = [c.size for c in node.constants if c is not None]
    return max([*sizes, int(np.prod(node.output_shapes[0][1:]))])


def check_nodes(model: Any, method: Method, x: np.ndarray, run: Run) -> int:
    """Every gradient from the values and gradients that the explainer itself has; how many.

    What a threshold decides has to be equal, and the rest as near as SPEC section 5 asks.
    """
    proto = explainer_model(model, method)
    graph = freeze(at_least(read_model(model), OPSET), x.shape)
    plan = make_plan(graph, method.rules(graph))
    names = trace(plan, method).finished
    exposed = with_outputs(proto, {*plan.exposes, *names.values()} - {graph.input}, graph)
    found = run(exposed, feed_of(proto, x)) | {graph.input: x}
    for value in names:
        steps = [step for step in plan.steps if value in step.writes]
        if steps:
            _check_sum(plan, value, steps, found, names)
    return len(names)


def _check_sum(
    plan: Plan,
    value: str,
    steps: list[Any],
    found: Mapping[str, np.ndarray],
    names: Mapping[str, str],
) -> None:
    expected: Any = 0
    exact = len(steps) == 1 and isinstance(steps[0].rule, Rectify)
    for step in steps:
        linear = isinstance(step.rule, (Gradient, ConvTranspose, Redistribute))
        dtype = np.dtype(np.float64 if linear else np.float32)
        values = {
            name: found[name].astype(dtype) if found[name].dtype.kind == "f" else found[name]
            for name in step.reads
            if name in found
        }
        R = tuple(found[names[v]].astype(dtype) for v in step.node.outputs)
        for position, name in zip(step.positions, step.writes, strict=True):
            if name == value:
                constants = constants_as(plan.graph.constants, dtype)
                call = Call(step.node, position, R, {**constants, **values}, {}, plan.graph.batch)
                expected = expected + step.rule(call)
    actual = found[names[value]]
    if exact and steps[0].node.op == "Relu":
        np.testing.assert_array_equal(actual, expected, err_msg=value)
        return
    terms = max(fan_in(step.node) for step in steps)
    bound = 1e-6 if terms <= 1024 else 2 * np.sqrt(terms) * 2.0**-24
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max(), value


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    "name", sorted(METHODS.keys() - SEVERAL_PASSES - {"channel", "deeplift", "rescale"})
)
def test_every_node_of_a_branched_network(name: str, run: str) -> None:
    w = nets.Weights(3)
    net = nets.branched(w)
    assert check_nodes(net.onnx(), method_of(name), w.images(net, 2), RUNS[run]) > 15


@pytest.mark.parametrize(
    ("activation", "attributes"),
    [
        ("LeakyRelu", {"alpha": 0.1}),
        ("Elu", {}),
        ("Selu", {}),
        ("Sigmoid", {}),
        ("Tanh", {}),
        ("Softplus", {}),
        ("Gelu", {}),
        ("HardSwish", {}),
        ("Mish", {}),
    ],
)
@pytest.mark.parametrize("method", ["rectgrad", "saliency", "epsilon_lrp"])
def test_every_node_with_other_activations(
    method: str, activation: str, attributes: dict[str, Any]
) -> None:
    w = nets.Weights(5)
    net = nets.plain(w, activation, attributes)
    options = {"q": 60.0} if method == "rectgrad" else {}
    proto = net.onnx(opset=20)
    check_nodes(proto, make_method(method, **options), w.images(net, 2), in_onnxruntime)


@pytest.mark.parametrize(
    "method",
    [
        make_method("rectgrad"),
        make_method("rectgrad", "authors"),
        make_method("rectgrad", prr=True, percentile="linear"),
        make_method("guided_backprop"),
    ],
    ids=["rectgrad", "authors", "prr", "guided_backprop"],
)
def test_every_node_of_the_cifar10_network(method: Method) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    assert check_nodes(CIFAR10_CNN, method, x, in_onnxruntime) == 15


def test_every_node_of_squeezenet(shared_data: Path) -> None:
    model = shared_data / "models" / "imagenet_squeezenet1.1_logits.onnx"
    x = np.random.default_rng(0).uniform(-120, 120, (1, 3, 227, 227)).astype(np.float32)
    assert check_nodes(model, make_method("rectgrad"), x, in_onnxruntime) > 60


# --- as a whole ---------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", METHODS)
def test_maps_of_integers_are_equal(name: str, run: str) -> None:
    """With small integers for weights every sum is exact, whatever its order."""
    w = nets.Weights(1, integers=True)
    net = nets.plain(w)
    if name == "channel":
        net = nets.Net(
            net.shape, (*net.ops[:5], nets.Op("GlobalAveragePool", "gap", ("act2",)), *_head(w))
        )
    x = w.images(net, 3)
    method = method_of(name)
    proto = explainer_model(net.onnx(), method)
    samples = 3 if proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param else 1
    assert samples == 3 or name in ("rescale", "smoothgrad")
    x = x[:samples]
    found = RUNS[run](proto, feed_of(proto, x))
    expected = Explainer(net.onnx(), backend="reference", dtype="float32").explain(x, method=method)
    np.testing.assert_array_equal(found[net.output], expected.logits)
    assert np.any(expected.values)
    if name in DIVIDING:
        scale = np.abs(expected.values).max()
        np.testing.assert_allclose(found["attribution"], expected.values, 1e-5, 1e-6 * scale)
    else:
        np.testing.assert_array_equal(found["attribution"], expected.values)


def _head(w: nets.Weights) -> tuple[nets.Op, ...]:
    return (
        nets.Op("Flatten", "flat", ("gap",)),
        nets.Op("Gemm", "dense", ("flat",), (w(4, 4), w(4))),
    )


@pytest.mark.parametrize("name", ["saliency", "deeplift"])
def test_a_given_target_takes_the_place_of_the_largest_score(name: str) -> None:
    w = nets.Weights(2)
    net = nets.branched(w)
    x, target = w.images(net, 4), [1, 3, 0, -1]
    proto = explainer_model(net.onnx(), method_of(name))
    found = in_onnxruntime(proto, feed_of(proto, x, target))["attribution"]
    explainer = Explainer(net.onnx(), backend="reference", dtype="float32")
    target[3] = int(explainer.explain(x[3:], method="saliency").target[0])
    expected = explainer.explain(x, method=method_of(name), target=target).values
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


MODELS = {
    "cifar10_marabou_small_tf2onnx": (3, 32, 32, 3),
    "cifar10_resnet20_bn_unfused": (3, 3, 32, 32),
    "cifar10_vit_ibp_3_3_8": (1, 3, 32, 32),
    "imagenet_mobilenet_v1_0.25_128": (2, 3, 128, 128),
    "imagenet_squeezenet1.1_logits": (2, 3, 227, 227),
    "mnist_cntk_opset8": (1, 1, 28, 28),
    "mnist_keras2onnx_sm": (2, 28, 28, 1),
    "mnist_torch2.6_opset11": (2, 1, 28, 28),
}


@pytest.mark.parametrize("model", MODELS)
def test_models_of_many_exporters(shared_data: Path, model: str) -> None:
    """Gradients, which no threshold can tear apart."""
    path = shared_data / "models" / f"{model}.onnx"
    x = np.random.default_rng(0).standard_normal(MODELS[model]).astype(np.float32)
    method = make_method("input_x_gradient", padding_trick=True)
    proto = explainer_model(path, method)
    found = in_onnxruntime(proto, feed_of(proto, x))["attribution"]
    expected = Explainer(path, backend="reference").explain(x, method=method).values
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_half_precision_networks_have_maps_in_single() -> None:
    w = nets.Weights(1, integers=True)
    net = nets.plain(w)
    proto, x, half = net.onnx(), w.images(net, 2), onnx.TensorProto.FLOAT16
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = half
    method = method_of("rectgrad")
    explainer = explainer_model(proto, method)
    found = in_onnxruntime(explainer, feed_of(explainer, x.astype(np.float16)))["attribution"]
    expected = Explainer(proto, backend="reference", dtype="float32").explain(x, method=method)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.values)


def test_a_product_that_underflows_is_positive() -> None:
    """At τ = 0 signs decide: 1e-30 · 1e-30 is no zero."""
    tiny = np.float32(1e-30)
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Mul", ["a", "w"], ["y"]),
    ]
    weights = onnx.numpy_helper.from_array(np.array([tiny, -1, 1, 1], np.float32), "w")
    net = nets.model(nodes, ["N", 4], "y", [weights])
    method = make_method("rectgrad", q=50, times_input=False, final_threshold=False)
    x = np.array([[tiny, 0, 0, 0]], np.float32)
    proto = explainer_model(net, method)
    for run in RUNS.values():
        found = run(proto, feed_of(proto, x, 0))["attribution"]
        np.testing.assert_array_equal(found, [[tiny, 0, 0, 0]])


@pytest.mark.parametrize("run", RUNS)
def test_long_layers_whose_threshold_is_zero_or_above(run: str) -> None:
    """Above, only the largest scores are looked at; at 0, where products underflow, all are."""
    rng, units, tiny = np.random.default_rng(0), 4096, np.float32(1e-30)
    weights = rng.integers(-3, 4, (units, 2)).astype(np.float32)
    x = rng.integers(-3, 4, (3, units)).astype(np.float32)
    weights[0] = tiny
    x[1], x[1, 0], x[1, 7] = -1, tiny, 2
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    net = nets.model(
        nodes, ["N", units], "y", [onnx.numpy_helper.from_array(weights, "w")], opset=18
    )
    method = make_method("rectgrad", times_input=False, final_threshold=False)
    proto = explainer_model(net, method)
    assert "If" in {node.op_type for node in proto.graph.node}
    explainer = Explainer(net, backend="reference", dtype="float32")
    for some in (x, x[::2]):
        expected = explainer.explain(some, method=method, target=0, trace=True)
        found = RUNS[run](proto, feed_of(proto, some, 0))["attribution"]
        np.testing.assert_array_equal(found, expected.values)
        (layer,) = expected.layers().values()
        assert (layer.tau == 0).tolist() == [False, True, False][:: 4 - len(some)]
    assert explainer.explain(x, method=method, target=0).values[1, 0] == tiny


# --- the file -----------------------------------------------------------------------------------


@cache
def cifar10_explainer() -> onnx.ModelProto:
    return explainer_model(CIFAR10_CNN, make_method("rectgrad"))


def test_every_weight_is_there_once() -> None:
    proto, model = cifar10_explainer(), onnx.load(CIFAR10_CNN)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ByteSize() < 1.01 * model.ByteSize()
    large = [t for t in proto.graph.initializer if np.prod(t.dims) >= 100]
    assert sorted(t.name for t in large) == sorted(
        t.name for t in model.graph.initializer if np.prod(t.dims) >= 100
    )


def test_only_standard_operators() -> None:
    assert {node.domain for node in cifar10_explainer().graph.node} == {""}
    assert [entry.domain for entry in cifar10_explainer().opset_import] == [""]


def test_signature_and_conventions() -> None:
    proto = cifar10_explainer()
    described = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*proto.graph.input, *proto.graph.output)
    }
    assert described == {
        "image": ["N", 3, 32, 32],
        "target": ["N"],
        "logits": ["N", 10],
        "attribution": ["N", 3, 32, 32],
    }
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata["attribution.method"] == "rectgrad"
    assert '"q": 98.0' in metadata["attribution.options"]
    assert metadata["attribution.sha256"] == read_model(CIFAR10_CNN).sha256
    original = {entry.key: entry.value for entry in onnx.load(CIFAR10_CNN).metadata_props}
    assert original.items() <= metadata.items()


def test_thresholds_of_the_whole_batch_make_it_one_of_one() -> None:
    proto = explainer_model(CIFAR10_CNN, make_method("rectgrad", scope="batch"))
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_open_height_and_width_have_to_be_given(tmp_path: Path) -> None:
    w = nets.Weights(0)
    net = nets.Net(
        (2, 6, 6),
        (
            nets.conv("conv", "x", w(3, 2, 3, 3), w(3), pads=(1, 1, 1, 1)),
            nets.Op("Relu", "act", ("conv",)),
            nets.Op("GlobalAveragePool", "gap", ("act",)),
            nets.Op("Flatten", "flat", ("gap",)),
            nets.Op("Gemm", "dense", ("flat",), (w(3, 4), w(4))),
        ),
    )
    proto = net.onnx()
    for axis, name in ((2, "H"), (3, "W")):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    out = tmp_path / "explainer.onnx"
    with pytest.raises(ValueError, match=r"size=\(H, W\)"):
        rectgrad_ref.export(proto, out)
    rectgrad_ref.export(proto, out, size=(6, 6))
    assert [d.dim_value for d in onnx.load(out).graph.input[0].type.tensor_type.shape.dim[1:]] == [
        2,
        6,
        6,
    ]
    with pytest.raises(ValueError, match="does not fit"):
        rectgrad_ref.export(net.onnx(), out, size=(6, 6))


def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "explainer.onnx"
    arguments = ["export", str(CIFAR10_CNN), "-o", str(out)]
    result = CliRunner().invoke(app, [*arguments, "-m", "rectgrad", "--set", "q=90"])
    assert result.exit_code == 0, result.output
    assert onnx.load(out) == explainer_model(CIFAR10_CNN, make_method("rectgrad", q=90.0))
    refused = CliRunner().invoke(app, [*arguments, "-m", "random"])
    assert refused.exit_code == 1


def test_what_one_file_cannot_hold_has_its_weights_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if 2 GB were 1 MB."""
    onnxruntime = pytest.importorskip("onnxruntime")
    whole, out = tmp_path / "whole.onnx", tmp_path / "explainer.onnx"
    rectgrad_ref.export(CIFAR10_CNN, whole)
    monkeypatch.setattr("rectgrad_ref.exporter._LARGEST", 10**6)
    (tmp_path / "explainer.onnx.data").write_bytes(bytes(10**7))  # of an earlier, larger one
    rectgrad_ref.export(CIFAR10_CNN, out)
    assert {path.name for path in tmp_path.iterdir()} == {
        "whole.onnx", "explainer.onnx", "explainer.onnx.data"
    }  # fmt: skip
    assert out.stat().st_size < 10**5
    onnx.checker.check_model(out)
    feed = feed_of(onnx.load(whole), np.ones((2, 3, 32, 32), np.float32))
    one, two = (onnxruntime.InferenceSession(path).run(None, feed) for path in (whole, out))
    assert all(np.array_equal(*pair) for pair in zip(one, two, strict=True))


def test_weights_that_cannot_be_written_leave_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rectgrad_ref.exporter._LARGEST", 10**6)
    out = tmp_path / "explainer.onnx"
    out.write_bytes(b"earlier work")
    (tmp_path / "explainer.onnx.data").mkdir()  # no file can take its place
    with pytest.raises(OutputError, match=r"explainer\.onnx\.data"):
        rectgrad_ref.export(CIFAR10_CNN, out)
    assert {p.name for p in tmp_path.iterdir()} == {"explainer.onnx", "explainer.onnx.data"}
    assert out.read_bytes() == b"earlier work"


@pytest.mark.parametrize("method", ["saliency", "deeplift", "integrated_gradients"])
def test_operators_that_stand_for_others_and_sparse_weights(method: str) -> None:
    w = nets.Weights(4)
    dense = np.where(w(32, 4) > 0, w(32, 4), 0)
    places = np.flatnonzero(dense)
    sparse = helper.make_sparse_tensor(
        onnx.numpy_helper.from_array(dense.ravel()[places], "B"),
        onnx.numpy_helper.from_array(places, "places"),
        dense.shape,
    )
    nodes = [
        helper.make_node("MeanVarianceNormalization", ["x"], ["m"]),
        helper.make_node("Relu", ["m"], ["a"]),
        helper.make_node("Flatten", ["a"], ["f"]),
        helper.make_node("Gemm", ["f", "B"], ["y"]),
    ]
    net = nets.model(nodes, ["N", 2, 4, 4], "y", opset=18)
    net.graph.sparse_initializer.append(sparse)
    x = w.rng.standard_normal((1, 2, 4, 4)).astype(np.float32)
    proto = explainer_model(net, make_method(method))
    found = in_evaluator(proto, feed_of(proto, x))["attribution"]
    expected = Explainer(net, backend="reference").explain(x, method=method).values
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    net.opset_import[0].version = 17
    with pytest.raises(UnsupportedOperator, match="from opset 17 to 18"):
        explainer_model(net, make_method(method))


def test_a_value_called_target_is_in_the_way() -> None:
    net = nets.model([helper.make_node("Relu", ["x"], ["target"])], ["N", 4], "target")
    with pytest.raises(InvalidModel, match=r"'target'.*rename"):
        explainer_model(net, make_method("saliency"))


def test_what_numpy_does_in_place_is_followed() -> None:
    x = Tensor(Tape("x"), "x", (2,), np.dtype(np.float32))
    assert np.fmax(x, 0, out=x) is x
    np.copyto(x, 1, where=x > 2)  # type: ignore[call-overload]
    assert [record.op for record in x.tape.records] == ["Greater", "Where"] * 2


def test_fmax_is_of_a_number() -> None:
    x = Tensor(Tape("x"), "x", (2,), np.dtype(np.float32))
    with pytest.raises(NotTraceable, match="two arrays"):
        np.fmax(x, x)


def test_what_cannot_be_written_is_refused_by_name_and_nothing_written(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("CumSum", ["c", "axis"], ["s"], name="running_sum"),
        helper.make_node("Flatten", ["s"], ["y"]),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.ones((3, 2, 4, 4), np.float32), "w"),
        onnx.numpy_helper.from_array(np.array(1), "axis"),
    ]
    net = nets.model(nodes, ["N", 2, 4, 4], "y", constants)
    out = tmp_path / "explainer.onnx"
    out.write_bytes(b"earlier work")
    with pytest.raises(UnsupportedOperator, match=r"CumSum 'running_sum'.*rectgrad explain"):
        rectgrad_ref.export(net, out, method="saliency")
    with pytest.raises(UnsupportedOperator, match="random"):
        rectgrad_ref.export(CIFAR10_CNN, out, method="random")
    with pytest.raises(InvalidModel):
        rectgrad_ref.export(b"no model", out)
    assert [path.name for path in tmp_path.iterdir()] == ["explainer.onnx"]
    assert out.read_bytes() == b"earlier work"
    with pytest.raises(OutputError):
        rectgrad_ref.export(CIFAR10_CNN, tmp_path / "nowhere" / "explainer.onnx")


class MedianOfAll(Saliency):
    """Does after the walk what has no spelling."""

    def finish(self, x: np.ndarray, R: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return R - np.median(R)


class MedianAsPoint(SmoothGrad):
    """Does it before."""

    def point(self, x: np.ndarray, k: int, keys: np.ndarray) -> np.ndarray:
        return x - np.median(x)


@pytest.mark.parametrize(
    ("method", "what"),
    [(MedianOfAll(), r"MedianOfAll\.finish"), (MedianAsPoint(n=2), r"MedianAsPoint\.point")],
)
def test_methods_that_cannot_be_written_are_refused(
    method: Method, what: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedOperator, match=rf"{what} cannot be written.*rectgrad explain"):
        rectgrad_ref.export(CIFAR10_CNN, tmp_path / "explainer.onnx", method=method)
    assert not list(tmp_path.iterdir())
