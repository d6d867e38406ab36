"""The result: arrays, heat maps, the trace, files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import slow
from nets import Net, Op, Weights
from onnx import helper, numpy_helper

from rectgrad_ref import Attribution, Explainer
from rectgrad_ref.errors import OutputError

pytestmark = pytest.mark.filterwarnings("ignore::rectgrad_ref.errors.RectGradWarning")


def image_net(layout: str = "NCHW") -> Explainer:
    """A small classifier of 12×10 colour pictures."""
    w = Weights(0)
    nodes, source = [], "x"
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", ["x"], ["nchw"], perm=[0, 3, 1, 2]))
        source = "nchw"
    nodes += [
        helper.make_node("Conv", [source, "w"], ["/features/0"], pads=[1] * 4),
        helper.make_node("Relu", ["/features/0"], ["/features/1"]),
        helper.make_node("GlobalAveragePool", ["/features/1"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("MatMul", ["flat", "v"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["relu"]),
        helper.make_node("MatMul", ["relu", "u"], ["logits"]),
    ]
    arrays = {"w": w(8, 3, 3, 3), "v": w(8, 40), "u": w(40, 5)}
    shape = ["N", 3, 12, 10] if layout == "NCHW" else ["N", 12, 10, 3]
    initializers = [numpy_helper.from_array(v, k) for k, v in arrays.items()]
    model = nets.model(nodes, shape, "logits", initializers)
    return Explainer(model, backend="reference")


IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 3, 12, 10)).astype(np.float32)


@pytest.fixture(scope="module")
def result() -> Attribution:
    return image_net().explain(IMAGES, q=60, trace=True)


def test_is_an_array(result: Attribution) -> None:
    assert np.array_equal(np.asarray(result), result.values)
    assert np.asarray(result) is result.values
    assert np.array(result) is not result.values
    assert np.asarray(result, dtype=np.float32).dtype == np.float32
    assert np.mean(result) == result.values.mean()
    assert len(result) == 2


def test_printed_without_its_arrays(result: Attribution) -> None:
    assert "q=60" in repr(result) and "sha256" in repr(result)
    assert len(repr(result)) < 1200


def test_heatmap_sums_over_channels(result: Attribution) -> None:
    assert result.layout == "NCHW"
    assert result.heatmap().shape == (2, 12, 10)
    red, green, blue = result.values.transpose(1, 0, 2, 3)
    assert np.allclose(result.heatmap(), red + green + blue)


def test_heatmap_of_channels_last(result: Attribution) -> None:
    last = image_net("NHWC").explain(IMAGES.transpose(0, 2, 3, 1), q=60)
    assert last.layout == "NHWC" and last.values.shape == (2, 12, 10, 3)
    assert result.values.any()
    assert np.allclose(last.values, result.values.transpose(0, 2, 3, 1), rtol=1e-12)
    assert np.allclose(last.heatmap(), result.heatmap(), rtol=1e-12)


def test_heatmap_takes_a_layout() -> None:
    w = Weights(0)
    net = Net((2, 6, 6), (Op("Flatten", "f", ("x",)), Op("Gemm", "y", ("f",), (w(72, 3), w(3)))))
    attribution = Explainer(net.onnx(), backend="reference").explain(
        w.images(net, 2), method="saliency"
    )
    assert attribution.layout is None  # two channels: it could be anything
    with pytest.raises(ValueError, match=r"which axis of .* is the channel axis"):
        attribution.heatmap()
    with pytest.raises(ValueError, match="channel axis"):
        attribution.heatmap("NHW")
    assert np.array_equal(attribution.heatmap("NCHW"), attribution.values.sum(axis=1))
    assert np.array_equal(attribution.heatmap("NHWC"), attribution.values.sum(axis=3))


# --- the trace ------------------------------------------------------------------------------------


def test_layers_need_a_trace() -> None:
    attribution = image_net().explain(IMAGES, q=60)
    with pytest.raises(ValueError, match="trace=True"):
        attribution.layers()


def test_layers_from_input_to_logits(result: Attribution) -> None:
    assert list(result.layers()) == ["/features/1", "relu"]
    for layer, shape in zip(result.layers().values(), [(2, 8, 12, 10), (2, 40)], strict=True):
        assert layer.a.shape == layer.R_out.shape == layer.R_in.shape == layer.mask.shape == shape
        assert layer.tau.shape == (2,)
        assert layer.mask.dtype == bool and layer.tau.dtype == np.float64


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["Relu", "Sigmoid", "Clip", "HardSwish"])
def test_mask_reproduces_R_in(backend: str, kind: str) -> None:
    """mask and τ are those of the layer's own a and R_out; R_in is R_out under the mask."""
    if backend == "cpu":
        pytest.importorskip("onnxruntime")
    weights = Weights(16)
    if kind == "Clip":
        net = nets.plain(weights)
        bounds = (np.float32(0), np.float32(1))
        ops = [
            Op("Clip", op.name, op.inputs, bounds) if op.kind == "Relu" else op for op in net.ops
        ]
        net = Net(net.shape, tuple(ops))
    else:
        net = nets.plain(weights, kind)
    images = weights.images(net, 3)
    explainer = Explainer(net.onnx(), backend=backend)
    layers = explainer.explain(images, q=60, trace=True).layers()
    assert list(layers) == ["act1", "act2", "act3"]
    values = {op.name: op for op in net.ops}
    for name, layer in layers.items():
        scores = layer.a * layer.R_out
        for n in range(len(images)):
            tau = slow.threshold(scores[n].ravel().tolist(), 60)
            assert layer.tau[n] == tau
            if tau == 0:
                mask = np.sign(layer.a[n]) * np.sign(layer.R_out[n]) > 0
            else:
                mask = scores[n] > tau
            assert np.array_equal(layer.mask[n], mask)
        if kind == "Relu":
            assert np.array_equal(layer.R_in, np.where(layer.mask, layer.R_out, 0))
        else:
            assert not layer.R_in[~layer.mask].any()
            op = values[name]
            z = np.stack([slow.forward(net, x)[op.inputs[0]] for x in images])
            slopes = np.array([slow.slope(op, float(v)) for v in z.ravel()]).reshape(z.shape)
            expected = np.where(layer.mask, slopes * layer.R_out, 0)
            assert np.abs(layer.R_in - expected).max() <= 1e-5 * np.abs(layer.R_out).max()


def silu(w: Weights) -> Any:
    return [
        helper.make_node("Sigmoid", ["z"], ["gate"]),
        helper.make_node("Mul", ["z", "gate"], ["a"]),
    ]


def gelu(w: Weights) -> Any:
    return [
        helper.make_node("Div", ["z", "root2"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["erf"]),
        helper.make_node("Add", ["erf", "one"], ["shifted"]),
        helper.make_node("Mul", ["z", "shifted"], ["twice"]),
        helper.make_node("Mul", ["twice", "half"], ["a"]),
    ]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("spelling", [silu, gelu])
def test_spelled_activations_are_one_layer(backend: str, spelling: Any) -> None:
    if backend == "cpu":
        pytest.importorskip("onnxruntime")
    w = Weights(0)
    constants = {
        "w": w(6, 40),
        "v": w(40, 3),
        "root2": np.float32(np.sqrt(2)),
        "one": np.float32(1),
        "half": np.float32(0.5),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        *spelling(w),
        helper.make_node("MatMul", ["a", "v"], ["logits"]),
    ]
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    model = nets.model(nodes, ["N", 6], "logits", initializers)
    x = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    result = Explainer(model, backend=backend).explain(x, trace=True, q=80)
    assert list(result.layers()) == ["a"]
    assert result.layers()["a"].mask.sum(axis=1).tolist() == [8, 8]
    z = x.astype(float) @ constants["w"]
    kind = "Gelu" if spelling is gelu else "Sigmoid"
    f = slow.FUNCTIONS[kind]
    values = np.array([f(float(v), {}, ()) for v in z.ravel()]).reshape(z.shape)
    expected = values if spelling is gelu else z * values
    assert np.allclose(result.layers()["a"].a, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    ["saliency", "input_x_gradient", "deconvolution", "guided_backprop", "epsilon_lrp", "deeplift"],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["Relu", "Sigmoid"])
def test_every_one_pass_method_has_a_trace(method: str, backend: str, kind: str) -> None:
    if backend == "cpu":
        pytest.importorskip("onnxruntime")
    net = nets.plain(Weights(16), kind)
    images = Weights(17).images(net, 2)
    explainer = Explainer(net.onnx(), backend=backend)
    attribution = explainer.explain(images, method=method, trace=True)
    assert np.array_equal(attribution, explainer.explain(images, method=method))
    assert list(attribution.layers()) == ["act1", "act2", "act3"]
    for name, layer in attribution.layers().items():
        expected = np.stack([slow.forward(net, x)[name] for x in images])
        assert np.allclose(layer.a, expected, rtol=1e-4, atol=1e-5)
        assert layer.tau is None and layer.mask is None


# --- files ----------------------------------------------------------------------------------------


def test_npz(result: Attribution, tmp_path: Path) -> None:
    path = result.save(tmp_path / "map.npz")
    assert path == tmp_path / "map.npz" and list(tmp_path.iterdir()) == [path]
    with np.load(path, allow_pickle=False) as file:
        assert np.array_equal(file["values"], result.values)
        assert np.array_equal(file["inputs"], IMAGES)
        assert np.array_equal(file["logits"], result.logits)
        assert np.array_equal(file["target"], result.target)
        for name, layer in result.layers().items():
            for key in ("a", "R_out", "R_in", "tau", "mask"):
                assert np.array_equal(file[f"layers/{name}/{key}"], getattr(layer, key))
        assert len(file.files) == 5 + 2 * 5
        provenance = json.loads(str(file["provenance"]))
    assert provenance["method"] == "rectgrad"
    assert provenance["options"] == result.method.options()
    assert provenance["options"]["q"] == 60
    assert provenance["target"] == result.target.tolist()
    assert provenance["sha256"] == image_net().model.sha256
    assert provenance["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rectgrad", {"tau": -np.inf}),
        ("rectgrad", {"q": np.float32(90)}),
        ("deeplift", {"baseline": np.zeros((3, 12, 10), np.float32)}),
        ("integrated_gradients", {"steps": np.int64(2), "baseline": np.float32(0.5)}),
        ("smoothgrad", {"n": 2, "range": "batch"}),
    ],
)
def test_provenance_is_strict_json(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    attribution = image_net().explain(IMAGES, method=method, **options)
    path = attribution.save(tmp_path / "map.npz")
    with np.load(path) as file:
        provenance = json.loads(str(file["provenance"]), parse_constant=refuse)
    assert provenance["options"].keys() == attribution.method.options().keys()


def test_npz_without_trace(tmp_path: Path) -> None:
    path = image_net().explain(IMAGES, method="saliency").save(str(tmp_path / "map.npz"))
    with np.load(path, allow_pickle=False) as file:
        assert set(file.files) == {"values", "inputs", "logits", "target", "provenance"}


@pytest.mark.parametrize(
    ("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_figure(result: Attribution, tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = result.save(tmp_path / f"map.{suffix}")
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["npz", "png"])
def test_unwritable_leaves_nothing(result: Attribution, tmp_path: Path, suffix: str) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        result.save(tmp_path / "missing" / f"map.{suffix}")
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OutputError, match="cannot write"):
        result.save(blocked / f"map.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        result.save(tmp_path / f"folder.{suffix}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", f"folder.{suffix}"]
    assert not list((tmp_path / f"folder.{suffix}").iterdir())


def test_an_existing_file_survives_a_failure(
    result: Attribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "map.npz"
    path.write_bytes(b"precious")

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(OutputError, match="No space left"):
        result.save(path)
    assert path.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["map", "map.jpg", "map.npy"])
def test_unknown_suffix(result: Attribution, tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"choose one of \.npz, \.png, \.pdf and \.svg"):
        result.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_probabilities(result: Attribution) -> None:
    e = np.exp(result.logits)
    assert np.allclose(result.probabilities, e / e.sum(axis=1, keepdims=True), rtol=1e-12)
    huge = dataclasses.replace(result, logits=np.float32([[900.0, 0.0], [-900.0, 0.0]]))
    assert huge.probabilities.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("head", ["Softmax", "Sigmoid"])
def test_probabilities_are_the_output_of_the_head(head: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(image_net().model.proto)
    model.graph.node.append(helper.make_node(head, ["logits"], ["scores"]))
    model.graph.output[0].name = "scores"
    explainer = Explainer(model, backend="reference")
    result = explainer.explain(IMAGES, method="saliency")
    graph = explainer.graph
    alone = [explainer.backend.forward(graph, x[None], ["scores"])["scores"] for x in IMAGES]
    assert result.head == head
    assert np.allclose(result.probabilities, np.concatenate(alone), rtol=1e-12)


def test_class_names(result: Attribution) -> None:
    assert result.class_name(3) == "3"
    named = Explainer(nets.plain(Weights(0)).onnx(), backend="reference", labels=list("abcd"))
    assert named.explain(np.zeros((1, 2, 6, 6), np.float32)).class_name(3) == "d"
