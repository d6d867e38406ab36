"""Attributions stored by iNNvestigate, layer type by layer type.

Each group holds the weights of one Keras layer, which is applied to channels-last images and
flattened; the neurons of that output are the class scores. What reproduces the files is the neuron
with the largest output, seeded with 1 (not with its value), for both methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import model
from onnx import ModelProto, helper, numpy_helper

from rectgrad_ref import Explainer

h5py = pytest.importorskip("h5py")

LAYERS = ["AveragePooling2D", "Conv2D", "Conv2D_relu", "Dense", "Dense_relu", "MaxPooling2D"]
METHODS = {"Gradient": "saliency", "InputTimesGradient": "input_x_gradient"}


def network(layer: str, weights: list[np.ndarray]) -> ModelProto:
    """The Keras layer between (N, 10, 10, 3) and the flattened scores."""
    kind = layer.removesuffix("_relu")
    constants = {"b": weights[1]} if weights else {}
    if kind == "Dense":
        constants["w"] = weights[0]
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Add", ["product", "b"], ["y"]),
        ]
    else:
        nodes = [helper.make_node("Transpose", ["x"], ["nchw"], perm=[0, 3, 1, 2])]
        if kind == "Conv2D":
            constants["w"] = weights[0].transpose(3, 2, 0, 1)
            nodes.append(helper.make_node("Conv", ["nchw", "w", "b"], ["z"], kernel_shape=[3, 3]))
        else:
            op = {"MaxPooling2D": "MaxPool", "AveragePooling2D": "AveragePool"}[kind]
            pool: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [2, 2]}
            nodes.append(helper.make_node(op, ["nchw"], ["z"], **pool))
        nodes.append(helper.make_node("Transpose", ["z"], ["y"], perm=[0, 2, 3, 1]))
    last = "y"
    if layer.endswith("_relu"):
        nodes.append(helper.make_node("Relu", ["y"], ["a"]))
        last = "a"
    nodes.append(helper.make_node("Flatten", [last], ["scores"]))
    initializers = [
        numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in constants.items()
    ]
    return model(nodes, ["N", 10, 10, 3], "scores", initializers)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("theirs", METHODS)
def test_stored_attributions(shared_data: Path, theirs: str, layer: str, backend: str) -> None:
    if backend == "cpu":
        pytest.importorskip("onnxruntime")
    with h5py.File(shared_data / "references" / f"innvestigate_layer_{theirs}.hdf5") as file:
        assert set(file) == {*LAYERS, "input"}
        images = file["input"][:].astype(np.float32)
        group = file[layer]
        weights = [group["weights"][str(i)][:] for i in range(len(group["weights"]))]
        output, attribution = group["output"][:], group["attribution"][:]
    explainer = Explainer(network(layer, weights), backend=backend)
    result = explainer.explain(images, method=METHODS[theirs])
    assert np.abs(result.logits - output).max() <= 1e-6
    assert result.target.tolist() == output.argmax(axis=1).tolist()
    assert result.values.shape == (8, 10, 10, 3)
    assert np.abs(result.values - attribution).max() <= 1e-7
    seeded = explainer.explain(images, method=METHODS[theirs], output_seed="logit")
    assert np.abs(seeded.values - attribution).max() > 1e-3
