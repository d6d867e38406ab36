"""The front door: images, targets, options, batching, plans."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import slow
from nets import Net, Op, Weights
from onnx import helper, numpy_helper

from rectgrad_ref import Explainer, RectGrad, Saliency, explain
from rectgrad_ref.errors import (
    BackendUnavailable,
    InvalidImage,
    InvalidModel,
    InvalidTarget,
    RectGradError,
    RectGradWarning,
    UnsupportedOperator,
)
from rectgrad_ref.methods import METHODS

# With these numbers the predicted classes differ and no map at q = 50 or 60 is zero.
NET = nets.plain(Weights(16))
IMAGES = Weights(17).images(NET, 5)

pytestmark = pytest.mark.filterwarnings("ignore::rectgrad_ref.errors.RectGradWarning")


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    return Explainer(NET.onnx(), backend="reference", labels=["ant", "bee", "cat", "dog"])


# --- models and images ----------------------------------------------------------------------------


def test_path_bytes_and_proto_are_the_same(tmp_path: Path) -> None:
    model = NET.onnx()
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    sources: list[Any] = [model, model.SerializeToString(), path, str(path)]
    maps = [explain(s, IMAGES, backend="reference", q=50).values for s in sources]
    assert all(np.array_equal(m, maps[0]) for m in maps)


def test_function_class_and_call_are_the_same(explainer: Explainer) -> None:
    a = explainer.explain(IMAGES, q=50).values
    assert np.array_equal(a, explainer(IMAGES, q=50))
    assert np.array_equal(a, explainer(IMAGES, method=RectGrad(q=50)))
    assert np.array_equal(a, explain(NET.onnx(), IMAGES, backend="reference", q=50))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("backend", "dtype", "expected"),
    [
        ("reference", None, np.float64),
        ("reference", "float32", np.float32),
        ("cpu", None, np.float32),
    ],
)
def test_shape_and_dtype(method: str, backend: str, dtype: Any, expected: type) -> None:
    if backend == "cpu":
        pytest.importorskip("onnxruntime")
    explainer = Explainer(NET.onnx(), backend=backend, dtype=dtype)
    for images in (IMAGES[:3], IMAGES[:1]):
        result = explainer.explain(images, method=method)
        assert result.values.shape == images.shape
        assert result.values.dtype == np.asarray(result).dtype == expected
        assert result.values.flags.c_contiguous
        assert np.isfinite(result.values).all()
        assert result.logits.shape == (len(images), 4)
        assert np.array_equal(result.inputs, images)


def test_an_array_without_batch_axis(explainer: Explainer) -> None:
    assert np.array_equal(explainer(IMAGES[0], q=50), explainer(IMAGES[:1], q=50))


def test_a_list_of_arrays(explainer: Explainer) -> None:
    assert np.array_equal(explainer([IMAGES[0], IMAGES[1]], q=50), explainer(IMAGES[:2], q=50))


def test_the_callers_array_is_left_alone(explainer: Explainer) -> None:
    images = IMAGES.copy()
    images.flags.writeable = False
    for method in METHODS:
        explainer.explain(images, method=method)
    assert np.array_equal(images, IMAGES)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((1, 2, 6, 6), np.nan, np.float32), "NaN or infinity"),
        (np.full((1, 2, 6, 6), np.inf, np.float32), "NaN or infinity"),
        (np.zeros((1, 2, 6, 7), np.float32), r"\(1, 2, 6, 7\)"),
        (np.zeros((1, 6, 6, 2), np.float32), "transpose"),
        (np.zeros((0, 2, 6, 6), np.float32), "empty"),
        ([], "no images"),
        (np.zeros((1, 2, 6, 6), np.int32), "float32"),
        ("missing.png", "missing.png"),
        (3, "int"),
    ],
)
def test_bad_images(explainer: Explainer, image: Any, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        explainer.explain(image)


# --- targets --------------------------------------------------------------------------------------


def test_default_target_is_the_largest_logit_of_each_sample(explainer: Explainer) -> None:
    result = explainer.explain(IMAGES, method="saliency")
    logits = np.stack([slow.forward(NET, x)[NET.output] for x in IMAGES])
    assert result.target.tolist() == logits.argmax(axis=1).tolist()
    assert len(set(result.target.tolist())) > 1
    assert np.allclose(result.logits, logits, rtol=1e-12)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (2, [2, 2, 2, 2, 2]),
        (np.int32(2), [2, 2, 2, 2, 2]),
        ("cat", [2, 2, 2, 2, 2]),
        ([0, 1, 2, 3, 0], [0, 1, 2, 3, 0]),
        (np.array([0, 1, 2, 3, 0], np.uint8), [0, 1, 2, 3, 0]),
        (("ant", "dog", 2, "bee", np.int64(0)), [0, 3, 2, 1, 0]),
    ],
    ids=repr,
)
def test_targets(explainer: Explainer, target: Any, expected: list[int]) -> None:
    result = explainer.explain(IMAGES, method="saliency", target=target)
    assert result.target.tolist() == expected
    for i, c in enumerate(expected):
        alone = explainer.explain(IMAGES[i], method="saliency", target=c)
        assert np.allclose(alone.values[0], result.values[i], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (-1, "class -1 does not exist; the model has classes 0 to 3"),
        (4, "class 4 does not exist; the model has classes 0 to 3"),
        ("eel", "unknown class 'eel'"),
        ([0, 1], "2 targets for 5 samples"),
        ([0, 1, 2, 3, 4], "class 4 does not exist"),
        (True, "index or name, got True"),
        (np.True_, "index or name"),
        ([True, False, True, True, True], "index or name, got True"),
        (1.0, "index or name, got 1.0"),
        (np.float64(1), "index or name"),
        (np.array(1), "index or name"),
        (np.zeros(5), "index or name"),
        (np.zeros((5, 1), int), "index or name"),
        ([None] * 5, "index or name, got None"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("method", ["saliency", "smoothgrad"])
def test_bad_targets(explainer: Explainer, target: Any, message: str, method: str) -> None:
    with pytest.raises(InvalidTarget, match=message):
        explainer.explain(IMAGES, method=method, target=target)


def test_names_need_labels() -> None:
    with pytest.raises(InvalidTarget, match="the model has no class names"):
        explain(NET.onnx(), IMAGES, backend="reference", target="cat")


# --- options --------------------------------------------------------------------------------------


def test_unknown_option(explainer: Explainer) -> None:
    with pytest.raises(TypeError, match="saliency has no option 'q'; it has output_seed"):
        explainer.explain(IMAGES, method="saliency", q=90)
    with pytest.raises(TypeError, match=r"rectgrad has no option 'percent'; it has .*percentile"):
        explain(NET.onnx(), IMAGES, backend="reference", percent="lower")


def test_presets(explainer: Explainer) -> None:
    result = explainer.explain(IMAGES, preset="authors", q=50)
    assert not result.method.options()["final_threshold"]
    assert (result.values < 0).any()
    assert (explainer.explain(IMAGES, preset="paper", q=50).values >= 0).all()
    with pytest.raises(ValueError, match="preset must be one of default, paper, authors"):
        explainer.explain(IMAGES, preset="tensorflow")


@pytest.mark.parametrize("keys", [[0, 1], [0], [[0, 1, 2, 3, 4]], [0, 1, 2, 3, -1], [0.5] * 5])
def test_bad_keys(explainer: Explainer, keys: Any) -> None:
    with pytest.raises(ValueError, match="keys must be one non-negative integer a sample"):
        explainer.explain(IMAGES, method="random", keys=keys)


@pytest.mark.parametrize(
    ("backend", "dtype", "error", "message"),
    [
        ("gpu", None, ValueError, "backend must be one of"),
        ("cpu", "float64", ValueError, "float64 needs backend='reference'"),
        ("reference", "float16", ValueError, "dtype must be float32 or float64"),
    ],
)
def test_bad_backends(backend: str, dtype: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Explainer(NET.onnx(), backend=backend, dtype=dtype)


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'rectgrad-ref\[cpu\]'"):
        Explainer(NET.onnx(), backend="cpu")
    assert Explainer(NET.onnx()).backend.name == "reference"


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_both_packages_of_onnxruntime(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "1.0")
    with pytest.raises(BackendUnavailable, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        Explainer(NET.onnx(), backend=backend)
    assert Explainer(NET.onnx(), backend="reference").backend.name == "reference"


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_broken_onnxruntime(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libfoo.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(BackendUnavailable, match=r"libfoo.so is missing.*backend='reference'"):
        Explainer(NET.onnx(), backend=backend)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_batching_changes_nothing(method: str) -> None:
    """All at once, in chunks, or one by one with their keys: the same float64 maps."""
    options = {"q": 60.0} if method == "rectgrad" else {}
    whole = Explainer(NET.onnx(), backend="reference").explain(IMAGES, method=method, **options)
    scale = np.abs(whole.values).max()
    for size in (1, 2, 7):
        chunked = Explainer(NET.onnx(), backend="reference", batch_size=size)
        result = chunked.explain(IMAGES, method=method, **options)
        assert np.abs(result.values - whole.values).max() <= 1e-12 * scale
        assert result.target.tolist() == whole.target.tolist()
    for i, x in enumerate(IMAGES):
        alone = chunked.explain(x, method=method, keys=[i], **options)
        assert np.abs(alone.values[0] - whole.values[i]).max() <= 1e-12 * scale


def test_trace_is_joined_from_chunks() -> None:
    whole = Explainer(NET.onnx(), backend="reference").explain(IMAGES, q=60, trace=True)
    chunked = Explainer(NET.onnx(), backend="reference", batch_size=2)
    result = chunked.explain(IMAGES, q=60, trace=True)
    for name, layer in whole.layers().items():
        other = result.layers()[name]
        assert np.array_equal(layer.mask, other.mask)
        assert layer.tau == pytest.approx(other.tau, rel=1e-12)
        assert np.allclose(layer.R_in, other.R_in, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 5])
def test_a_fixed_batch_takes_any_number(backend: str, batch: int, n: int) -> None:
    if backend == "cpu":
        pytest.importorskip("onnxruntime")
    symbolic = Explainer(NET.onnx(), backend=backend).explain(IMAGES[:n], q=60)
    fixed = Explainer(NET.onnx(batch=batch), backend=backend).explain(IMAGES[:n], q=60)
    assert np.allclose(fixed.values, symbolic.values, rtol=1e-5, atol=1e-7)


def test_a_fixed_batch_of_dependent_samples_is_refused() -> None:
    with pytest.raises(
        InvalidModel, match="fixed at 3 samples, which are not provably independent"
    ):
        Explainer(mixing(3), backend="reference")
    Explainer(mixing(1), backend="reference")


@pytest.mark.parametrize("count", ["batch_size", "threads"])
def test_counts_below_one(count: str) -> None:
    with pytest.raises(ValueError, match=f"{count} must be at least 1, got 0"):
        Explainer(NET.onnx(), **{count: 0})


def mixing(batch: int | str = "N") -> onnx.ModelProto:
    """Subtracts the mean over the batch before a Relu: samples influence each other."""
    w = Weights(3)(4, 3)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("Add", ["centred", "one"], ["z"]),
        helper.make_node("Relu", ["z"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["logits"]),
    ]
    constants = {"w": w, "one": np.ones(4, np.float32)}
    initializers = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    return nets.model(nodes, [batch, 4], "logits", initializers)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_samples_that_cannot_be_proven_apart_run_alone(backend: str) -> None:
    if backend == "cpu":
        pytest.importorskip("onnxruntime")
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    explainer = Explainer(mixing(), backend=backend)
    together = explainer.explain(x, method="saliency", target=0)
    alone = [explainer.explain(row, method="saliency", target=0).values[0] for row in x]
    assert np.array_equal(together.values, np.stack(alone))
    with pytest.raises(ValueError, match="whole batch"):
        explainer.explain(x, scope="batch")


def test_non_image_inputs(explainer: Explainer) -> None:
    """Vectors and sequences have no layout, but everything else works."""
    w = Weights(0)
    net = Net(
        (7,),
        (
            Op("Gemm", "z", ("x",), (w(7, 40), w(40))),
            Op("Relu", "a", ("z",)),
            Op("Gemm", "y", ("a",), (w(40, 3), w(3))),
        ),
    )
    result = Explainer(net.onnx(), backend="reference").explain(w.images(net, 2))
    assert result.values.shape == (2, 7) and result.layout is None


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["Softmax", "LogSoftmax", "Sigmoid"])
def test_the_logit_before_the_head_is_attributed(explainer: Explainer, head: str) -> None:
    net = dataclasses.replace(NET, ops=(*NET.ops, Op(head, "scores", ("dense2",))))
    result = Explainer(net.onnx(), backend="reference").explain(IMAGES, q=50)
    expected = explainer.explain(IMAGES, q=50)
    assert np.array_equal(result, expected)
    assert np.array_equal(result.logits, expected.logits)


# --- warnings -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default::rectgrad_ref.errors.RectGradWarning")
def test_warnings_are_notes(explainer: Explainer) -> None:
    with pytest.warns(
        RectGradWarning, match="nothing can pass Relu 'act3': with 6 units"
    ) as caught:
        result = explainer.explain(IMAGES)
    assert [str(w.message) for w in caught] == list(result.notes)
    assert {w.filename for w in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explainer.explain(IMAGES, q=50).notes == ()


# --- plans ----------------------------------------------------------------------------------------


def test_plan_lists_every_step(explainer: Explainer) -> None:
    listing = explainer.plan("rectgrad", padding_trick=True)
    rows = listing.rows()
    assert [row["node"] for row in rows] == [op.name for op in reversed(NET.ops)]
    rules = {row["node"]: row["rule"] for row in rows}
    assert rules["act1"].startswith("Rectify(score='a*r', q=98.0")
    assert rules["conv1"] == "ConvTranspose(mask_border=True)"
    assert rules["pool1"] == "MaxPoolBackward(ties='first')"
    assert rules["dense1"] == "Gradient()"
    json.dumps(rows)
    lines = str(listing).splitlines()
    assert lines[0].split() == ["op", "node", "rule", "backend"]
    assert len(lines) == 1 + len(rows) + len(listing.notes)
    assert "Rectify()" in str(listing) and "ConvTranspose(mask_border=True)" in str(listing)
    assert "Rectify(q=90.0)" in str(explainer.plan("rectgrad", q=90.0))


def symbolic() -> onnx.ModelProto:
    """A fully convolutional network with symbolic height and width."""
    w = Weights(0)
    arrays = {"w": w(30, 3, 3, 3), "v": w(30, 4)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["z"], pads=[1] * 4),
        helper.make_node("Relu", ["z"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "v"], ["logits"]),
    ]
    initializers = [numpy_helper.from_array(v, k) for k, v in arrays.items()]
    return nets.model(nodes, ["N", 3, "H", "W"], "logits", initializers)


def test_symbolic_extents() -> None:
    explainer = Explainer(symbolic(), backend="reference")
    assert explainer.plan().plan.graph.shapes["x"] == (1, 3, 224, 224)
    rng = np.random.default_rng(0)
    for shape in ((2, 3, 9, 12), (1, 3, 5, 5)):
        x = rng.standard_normal(shape).astype(np.float32)
        assert explainer.explain(x).values.shape == shape
        assert explainer.graph.shapes["x"] == (1, *shape[1:])


def test_unsupported_operators_are_refused_before_anything_runs() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Odd", ["a"], ["b"], name="odd", domain="my"),
        helper.make_node("Flatten", ["b"], ["logits"]),
    ]
    model = nets.model(nodes, ["N", 3], "logits")
    model.opset_import.append(helper.make_opsetid("my", 1))
    with pytest.raises(UnsupportedOperator, match=r"my\.Odd 'odd' .*no backward rule; on the path"):
        explain(model, np.ones((1, 3), np.float32), backend="reference")


def test_errors_have_one_base() -> None:
    for error in (InvalidImage, InvalidModel, InvalidTarget, UnsupportedOperator):
        assert issubclass(error, RectGradError)


def test_environment(explainer: Explainer, tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "net.onnx"
    onnx.save(NET.onnx(), path)
    environment = Explainer(path, backend="reference").environment
    assert environment["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (environment["backend"], environment["dtype"]) == ("reference", "float64")
    assert {"rectgrad_ref", "numpy", "onnx", "python"} <= environment["versions"].keys()
    json.dumps(environment)


def test_method_objects_carry_all_conventions(explainer: Explainer) -> None:
    result = explainer.explain(IMAGES, method=Saliency(output_seed="softmax"))
    expected = {"output_seed": "softmax", "quantization": "straight_through"}
    assert result.method.options() == expected
