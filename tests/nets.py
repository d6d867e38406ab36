"""Small networks for tests: described once, built as ONNX, and evaluated by `slow.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class Op:
    """One node; its output carries its name."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    weights: tuple[np.ndarray, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Net:
    """A network from the input "x" of `shape` (C, H, W) to the last node's output."""

    shape: tuple[int, ...]
    ops: tuple[Op, ...]

    @property
    def output(self) -> str:
        return self.ops[-1].name

    def onnx(self, *, batch: int | str = "N", opset: int = 17) -> onnx.ModelProto:
        nodes, initializers = [], []
        for op in self.ops:
            names = [f"{op.name}.{i}" for i in range(len(op.weights))]
            initializers += [
                numpy_helper.from_array(np.asarray(w, np.float32), name)
                for name, w in zip(names, op.weights, strict=True)
            ]
            nodes.append(
                helper.make_node(
                    op.kind, [*op.inputs, *names], [op.name], name=op.name, **op.attributes
                )
            )
        return model(nodes, [batch, *self.shape], self.output, initializers, opset=opset)


def model(
    nodes: Iterable[onnx.NodeProto],
    shape: Iterable[int | str],
    output: str,
    initializers: Iterable[onnx.TensorProto] = (),
    *,
    opset: int = 17,
) -> onnx.ModelProto:
    """A model with the float input "x" and one float output."""
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        list(initializers),
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])


def conv(
    name: str,
    source: str,
    w: np.ndarray,
    b: np.ndarray,
    *,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Op:
    attributes = {"kernel_shape": list(w.shape[2:]), "strides": list(strides), "pads": list(pads)}
    return Op("Conv", name, (source,), (w, b), attributes)


def pool(
    kind: str,
    name: str,
    source: str,
    *,
    size: int = 2,
    stride: int = 2,
    pad: int = 0,
    ceil_mode: int = 0,
) -> Op:
    attributes = {
        "kernel_shape": [size] * 2,
        "strides": [stride] * 2,
        "pads": [pad] * 4,
        "ceil_mode": ceil_mode,
    }
    return Op(kind, name, (source,), (), attributes)


class Weights:
    """Seeded arrays: integers, with which float32 arithmetic is exact, or normal numbers."""

    def __init__(self, seed: int, *, integers: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        self.integers = integers

    def __call__(self, *shape: int) -> np.ndarray:
        if self.integers:
            return self.rng.integers(-2, 3, shape).astype(np.float32)
        fan_in = int(np.prod(shape[1:])) or 1
        return (self.rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    def images(self, net: Net, n: int) -> np.ndarray:
        if self.integers:
            return self.rng.integers(-3, 4, (n, *net.shape)).astype(np.float32)
        return self.rng.standard_normal((n, *net.shape)).astype(np.float32)


def _lively(w: np.ndarray) -> np.ndarray:
    """Scores of which class 1 gains from every unit, so that rules seldom cut every path to it."""
    scores = w.copy()
    scores[:, 1] = np.abs(scores[:, 1])
    return scores


def plain(
    w: Weights, activation: str = "Relu", attributes: dict[str, Any] | None = None, size: int = 6
) -> Net:
    """Conv, pool, conv, dense, dense, with an activation after each but the last."""

    def act(name: str, source: str) -> Op:
        return Op(activation, name, (source,), (), attributes or {})

    half = size // 2
    return Net(
        (2, size, size),
        (
            conv("conv1", "x", w(3, 2, 3, 3), w(3), pads=(1, 1, 1, 1)),
            act("act1", "conv1"),
            pool("MaxPool", "pool1", "act1"),
            conv("conv2", "pool1", w(4, 3, 3, 3), w(4), pads=(1, 1, 1, 1)),
            act("act2", "conv2"),
            Op("Flatten", "flat", ("act2",)),
            Op("Gemm", "dense1", ("flat",), (w(4 * half * half, 6), w(6))),
            act("act3", "dense1"),
            Op("Gemm", "dense2", ("act3",), (_lively(w(6, 4)), w(4))),
        ),
    )


def branched(w: Weights) -> Net:
    """A residual addition, a concatenation, a strided convolution, three kinds of pooling."""
    return Net(
        (2, 8, 8),
        (
            conv("conv1", "x", w(4, 2, 3, 3), w(4), pads=(1, 1, 1, 1)),
            Op("Relu", "relu1", ("conv1",)),
            conv("conv2", "relu1", w(4, 4, 3, 3), w(4), pads=(1, 1, 1, 1)),
            Op("Add", "sum", ("relu1", "conv2")),
            Op("Relu", "relu2", ("sum",)),
            pool("MaxPool", "pool1", "relu2", size=3, stride=2, ceil_mode=1),
            conv("squeeze", "pool1", w(3, 4, 1, 1), w(3)),
            Op("Relu", "relu3", ("squeeze",)),
            conv("wide", "relu2", w(2, 4, 3, 3), w(2), strides=(2, 2), pads=(0, 0, 1, 1)),
            Op("Relu", "relu4", ("wide",)),
            Op("Concat", "both", ("relu3", "relu4"), (), {"axis": 1}),
            pool("AveragePool", "pool2", "both"),
            conv("last", "pool2", w(5, 5, 1, 1), w(5)),
            Op("Relu", "relu5", ("last",)),
            Op("GlobalAveragePool", "pool3", ("relu5",)),
            Op("Flatten", "flat", ("pool3",)),
            Op("Gemm", "dense", ("flat",), (_lively(w(5, 4)), w(4))),
        ),
    )
