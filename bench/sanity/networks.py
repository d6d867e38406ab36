"""Networks made of others: with random layers, random outputs, another range of the input."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper


def layers(path: Path) -> list[str]:
    """Names of the convolutions and dense layers with trained weights, from the output down."""
    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [
        node.output[0]
        for node in reversed(graph.node)
        if node.op_type in ("Conv", "Gemm", "MatMul") and weights & {*node.input[1:]}
    ]


def randomized(path: Path, names: Collection[str], rng: np.random.Generator) -> onnx.ModelProto:
    """The network with Glorot-uniform weights and zero biases in the layers of these names."""
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.output[0] in names:
            for tensor in (stored[name] for name in node.input[1:] if name in stored):
                drawn = _drawn(tuple(tensor.dims), rng)
                tensor.CopyFrom(numpy_helper.from_array(drawn, tensor.name))
    return model


def with_random_outputs(path: Path, count: int, rng: np.random.Generator) -> onnx.ModelProto:
    """The network with `count` random linear functions of its logits as its outputs.

    The gradient of each arrives at the logits as a random unit vector, orthogonal to the others',
    so that backward passes can begin with relevance that has nothing in common.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    (logits,) = model.graph.output
    shape = logits.type.tensor_type.shape.dim
    directions, _ = np.linalg.qr(rng.normal(size=(shape[-1].dim_value, count)))
    model.graph.initializer.append(
        numpy_helper.from_array(directions.astype(np.float32), "random_directions")
    )
    model.graph.node.append(
        helper.make_node("MatMul", [logits.name, "random_directions"], ["random_outputs"])
    )
    batch = shape[0].dim_param or shape[0].dim_value
    outputs = [helper.make_tensor_value_info("random_outputs", 1, [batch, count])]
    del model.metadata_props[:]  # it names the classes
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return model


def of_unit_range(path: Path) -> onnx.ModelProto:
    """The same function of pictures in [0, 1] instead of [−1, 1]."""
    model = onnx.load(path)
    (image,) = model.graph.input
    for node in model.graph.node:
        node.input[:] = ["symmetric" if name == image.name else name for name in node.input]
    scale = {"two": 2.0, "one": 1.0}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.float32), name) for name, value in scale.items()
    )
    first: Sequence[onnx.NodeProto] = (
        helper.make_node("Mul", [image.name, "two"], ["doubled"]),
        helper.make_node("Sub", ["doubled", "one"], ["symmetric"]),
    )
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*first, *rest])
    return model


def _drawn(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if len(shape) == 1:
        return np.zeros(shape, np.float32)
    # Both axes 0 and 1 count channels, whichever is the input; the rest is the kernel.
    limit = np.sqrt(6 / ((shape[0] + shape[1]) * np.prod(shape[2:])))
    return rng.uniform(-limit, limit, shape).astype(np.float32)
