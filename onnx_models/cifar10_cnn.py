"""The paper's CIFAR-10 network as an ONNX graph, and where its trained copies are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .cifar10 import CLASS_NAMES

SHAPES: dict[str, tuple[int, ...]] = {
    "conv1.weight": (32, 3, 3, 3),
    "conv1.bias": (32,),
    "conv2.weight": (32, 32, 3, 3),
    "conv2.bias": (32,),
    "conv3.weight": (64, 32, 3, 3),
    "conv3.bias": (64,),
    "conv4.weight": (64, 64, 3, 3),
    "conv4.bias": (64,),
    "dense1.weight": (64 * 8 * 8, 256),
    "dense1.bias": (256,),
    "dense2.weight": (256, 10),
    "dense2.bias": (10,),
}
"""Name → shape: (outputs, inputs, height, width) for a convolution, (inputs, outputs) for a dense
layer. The first dense layer reads the pooled map flattened in C, H, W order; networks trained on
NHWC arrays have the same weights with its rows permuted."""

# The ONNX specification's MetadataProps for image inputs.
IMAGE_METADATA = {
    "Image.BitmapPixelFormat": "Rgb8",
    "Image.ColorSpaceGamma": "SRGB",
    "Image.NominalPixelRange": "Normalized_1_1",
}


def network_path(*, occluded: bool = False) -> Path:
    """The trained network (seed 0) that comes with the package.

    Parameters
    ----------
    occluded
        The network trained on the occluded data set of the paper's figures 2 and 7.
    """
    name = "cifar10_cnn_occluded.onnx" if occluded else "cifar10_cnn.onnx"
    return Path(__file__).with_name(name)


def build(weights: Mapping[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """Build the network of the paper's appendix from its weights.

    Parameters
    ----------
    weights
        The arrays named in `SHAPES`.

    Returns
    -------
    onnx.ModelProto
        Input `image` (N, 3, 32, 32) float32, RGB, x/127.5 - 1; output `logits` (N, 10).

    Raises
    ------
    ValueError
        An array is missing, unknown or of another shape.
    """
    _check(weights)
    nodes = [
        _conv("conv1", "image"),
        _node("Relu", ["conv1"], "relu1"),
        _conv("conv2", "relu1"),
        _node("Relu", ["conv2"], "relu2"),
        _pool("pool1", "relu2"),
        _conv("conv3", "pool1"),
        _node("Relu", ["conv3"], "relu3"),
        _conv("conv4", "relu3"),
        _node("Relu", ["conv4"], "relu4"),
        _pool("pool2", "relu4"),
        _node("Flatten", ["pool2"], "flatten"),
        _node("Gemm", ["flatten", "dense1.weight", "dense1.bias"], "dense1"),
        _node("Relu", ["dense1"], "relu5"),
        _node("Gemm", ["relu5", "dense2.weight", "dense2.bias"], "logits"),
    ]
    image = helper.make_tensor_value_info(
        "image",
        TensorProto.FLOAT,
        ["N", 3, 32, 32],
        shape_denotation=["DATA_BATCH", "DATA_CHANNEL", "DATA_FEATURE", "DATA_FEATURE"],
    )
    image.type.denotation = "IMAGE"
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(CLASS_NAMES)])
    graph = helper.make_graph(
        nodes,
        "cifar10_cnn",
        [image],
        [logits],
        [numpy_helper.from_array(np.ascontiguousarray(weights[name]), name) for name in SHAPES],
    )
    # The oldest pair with everything needed, so that old runtimes read the file.
    model = helper.make_model(
        graph,
        producer_name="rectgrad_ref",
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 17)],
    )
    helper.set_model_props(model, {**IMAGE_METADATA, "class_names": json.dumps(CLASS_NAMES)})
    return model


def _check(weights: Mapping[str, NDArray[np.float32]]) -> None:
    if weights.keys() != SHAPES.keys():
        different = sorted(weights.keys() ^ SHAPES.keys())
        raise ValueError(f"missing or unknown weights: {', '.join(different)}")
    for name, shape in SHAPES.items():
        if weights[name].shape != shape or weights[name].dtype != np.float32:
            got = f"{weights[name].dtype} {weights[name].shape}"
            raise ValueError(f"{name} must be float32 {shape}, got {got}")


def _node(op_type: str, inputs: list[str], name: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, [name], name=name, **attributes)


def _conv(name: str, x: str) -> onnx.NodeProto:
    inputs = [x, f"{name}.weight", f"{name}.bias"]
    return _node("Conv", inputs, name, kernel_shape=[3, 3], pads=[1, 1, 1, 1])


def _pool(name: str, x: str) -> onnx.NodeProto:
    return _node("MaxPool", [x], name, kernel_shape=[2, 2], strides=[2, 2])
