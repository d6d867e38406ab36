"""A small network and a few pictures for data-set jobs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import Net, Op
from onnx import helper
from PIL import Image

from rectgrad_ref.onnx_models import cifar10_cnn


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conv, Relu, MaxPool, Gemm on 8 × 8 pixels; 32 units are thresholded, three classes scored."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    ops = (
        Op("Conv", "conv", ("x",), (weights(4, 3, 3, 3), weights(4))),
        Op("Relu", "relu", ("conv",)),
        Op("MaxPool", "pool", ("relu",), (), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Op("Flatten", "flat", ("pool",)),
        Op("Gemm", "scores", ("flat",), (weights(36, 3), weights(3))),
    )
    proto = Net((3, 8, 8), ops).onnx()
    names = {"class_names": json.dumps(["ant", "bee", "cat"])}
    helper.set_model_props(proto, {**cifar10_cnn.IMAGE_METADATA, **names})
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """Twenty-five pictures, (25, 8, 8, 3) uint8."""
    return np.random.default_rng(1).integers(0, 256, (25, 8, 8, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path, pixels: np.ndarray) -> Path:
    """The pictures as files; numbers 3 and 10 to 14 are broken."""
    made = tmp_path / "pictures"
    made.mkdir()
    for i, picture in enumerate(pixels):
        file = made / f"{i:03}.png"
        Image.fromarray(picture).save(file)
        if i == 3 or 10 <= i < 15:
            file.write_bytes(file.read_bytes()[: 20 * (i % 5)])
    return made
