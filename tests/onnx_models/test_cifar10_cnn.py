"""The ONNX graph of the paper's CIFAR-10 network, and its trained copies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from rectgrad_ref.onnx_models.cifar10 import load_cifar10, occlude
from rectgrad_ref.onnx_models.cifar10_cnn import SHAPES, build, network_path


@pytest.fixture
def weights() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in SHAPES.items()}


def test_every_value_has_a_readable_name_and_the_papers_shape(
    weights: dict[str, NDArray[np.float32]],
) -> None:
    model = onnx.shape_inference.infer_shapes(build(weights), strict_mode=True, data_prop=True)
    onnx.checker.check_model(model, full_check=True)
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    shapes = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in values
    }
    assert shapes == {
        "image": ("N", 3, 32, 32),
        "conv1": ("N", 32, 32, 32),
        "relu1": ("N", 32, 32, 32),
        "conv2": ("N", 32, 32, 32),
        "relu2": ("N", 32, 32, 32),
        "pool1": ("N", 32, 16, 16),
        "conv3": ("N", 64, 16, 16),
        "relu3": ("N", 64, 16, 16),
        "conv4": ("N", 64, 16, 16),
        "relu4": ("N", 64, 16, 16),
        "pool2": ("N", 64, 8, 8),
        "flatten": ("N", 4096),
        "dense1": ("N", 256),
        "relu5": ("N", 256),
        "logits": ("N", 10),
    }


def test_metadata_says_what_the_input_and_the_classes_are(
    weights: dict[str, NDArray[np.float32]],
) -> None:
    metadata = {entry.key: entry.value for entry in build(weights).metadata_props}
    assert json.loads(metadata.pop("class_names"))[:2] == ["airplane", "automobile"]
    assert metadata == {
        "Image.BitmapPixelFormat": "Rgb8",
        "Image.ColorSpaceGamma": "SRGB",
        "Image.NominalPixelRange": "Normalized_1_1",
    }


def test_wrong_weights_are_refused_by_name(weights: dict[str, NDArray[np.float32]]) -> None:
    double: dict[str, Any] = {**weights, "conv3.bias": weights["conv3.bias"].astype(np.float64)}
    with pytest.raises(ValueError, match=r"conv3\.bias must be float32 \(64,\), got float64"):
        build(double)
    transposed = {**weights, "dense2.weight": weights["dense2.weight"].T}
    with pytest.raises(ValueError, match=r"dense2\.weight must be float32 \(256, 10\), got"):
        build(transposed)
    del weights["conv1.weight"]
    with pytest.raises(ValueError, match=r"missing or unknown weights: conv1\.weight"):
        build(weights)


def logits(model: onnx.ModelProto | Path, image: NDArray[np.float32]) -> NDArray[np.float32]:
    onnxruntime = pytest.importorskip("onnxruntime")
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": image})[0]


def test_forward_agrees_with_the_same_network_in_pytorch(
    weights: dict[str, NDArray[np.float32]],
) -> None:
    torch = pytest.importorskip("torch")
    nn = torch.nn
    module = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4096, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )
    for parameter, (name, array) in zip(module.parameters(), weights.items(), strict=True):
        parameter.data = torch.from_numpy(array.T.copy() if "dense" in name else array)
    image = np.random.default_rng(1).uniform(-1, 1, (5, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        expected = module.double()(torch.from_numpy(image).double()).numpy()
    np.testing.assert_allclose(
        logits(build(weights), image), expected, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize("occluded", [False, True])
def test_trained_network_is_the_one_recorded(occluded: bool) -> None:
    path = network_path(occluded=occluded)
    record = json.loads(network_path().with_suffix(".json").read_text())[path.name]
    (seed0,) = (seed for seed in record["seeds"] if seed["seed"] == 0)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == seed0["sha256"]
    assert seed0["dataset"] == ("occluded" if occluded else "normal")
    assert record["test_accuracy"] == seed0["test_accuracy"]
    assert record["test_accuracy_mean"] == pytest.approx(
        np.mean([seed["test_accuracy"] for seed in record["seeds"]])
    )


@pytest.mark.parametrize("occluded", [False, True])
def test_trained_network_classifies_as_recorded(occluded: bool, cifar10_folder: Path) -> None:
    path = network_path(occluded=occluded)
    record = json.loads(network_path().with_suffix(".json").read_text())[path.name]
    images, labels, _ = load_cifar10("test", cifar10_folder)
    pixels = occlude(images[:1000]) if occluded else images[:1000]
    image = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    accuracy = np.mean(logits(path, image).argmax(1) == labels[:1000])
    # Three standard errors of a thousand samples.
    assert accuracy == pytest.approx(record["test_accuracy"], abs=0.042)
