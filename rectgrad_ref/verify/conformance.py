"""The conformance bundles that come with the package: tiny networks that isolate one convention
each, and some that look like real ones.

``python -m rectgrad_ref.verify.conformance FOLDER`` writes them again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .bundle import Bundle, make

FOLDER = Path(__file__).with_name("bundles")


def bundle_paths() -> list[Path]:
    """The bundles in the package."""
    return sorted(FOLDER.glob("*.npz"))


@dataclass
class _Network:
    """An ONNX file in the making: every node is called as its output, weights are seeded."""

    shape: tuple[int, ...]
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def add(self, operator: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def weight(self, name: str, *shape: int) -> str:
        fan_in = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
        values = (self.rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(
        self,
        name: str,
        source: str,
        channels: tuple[int, int],
        *,
        kernel: int = 3,
        pad: int = 1,
        stride: int = 1,
        group: int = 1,
        relu: bool = True,
    ) -> str:
        inner, outer = channels
        w = self.weight(f"{name}.weight", outer, inner // group, kernel, kernel)
        b = self.weight(f"{name}.bias", outer, 1)
        self.weights[-1] = numpy_helper.from_array(
            0.1 * numpy_helper.to_array(self.weights[-1]).ravel(), b
        )
        window = {"kernel_shape": [kernel] * 2, "pads": [pad] * 4, "strides": [stride] * 2}
        self.add("Conv", name, source, w, b, group=group, **window)
        return self.add("Relu", f"{name}.relu", name) if relu else name

    def pool(self, operator: str, name: str, source: str) -> str:
        return self.add(operator, name, source, kernel_shape=[2, 2], strides=[2, 2])

    def dense(self, name: str, source: str, units: tuple[int, int], *, relu: bool = False) -> str:
        w = self.weight(f"{name}.weight", *units)
        self.add("Gemm", name, source, w)
        return self.add("Relu", f"{name}.relu", name) if relu else name

    def finish(self, output: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "conformance",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *self.shape])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.weights,
        )
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def plain() -> onnx.ModelProto:
    """Convolution, max pool, convolution, dense, dense."""
    net = _Network((3, 8, 8))
    x = net.pool("MaxPool", "pool", net.conv("conv1", "x", (3, 5)))
    x = net.add("Flatten", "flat", net.conv("conv2", x, (5, 6)))
    x = net.dense("dense1", x, (6 * 16, 30), relu=True)
    return net.finish(net.dense("dense2", x, (30, 5)))


def residual() -> onnx.ModelProto:
    """Two residual blocks, the second with stride and a projection."""
    net = _Network((3, 8, 8), seed=1)
    x = net.conv("stem", "x", (3, 6))
    y = net.conv("block1.b", net.conv("block1.a", x, (6, 6)), (6, 6), relu=False)
    x = net.add("Relu", "block1.relu", net.add("Add", "block1.sum", x, y))
    y = net.conv("block2.a", x, (6, 8), stride=2)
    y = net.conv("block2.b", y, (8, 8), relu=False)
    skip = net.conv("block2.skip", x, (6, 8), kernel=1, pad=0, stride=2, relu=False)
    x = net.add("Relu", "block2.relu", net.add("Add", "block2.sum", skip, y))
    x = net.add("Flatten", "flat", net.add("GlobalAveragePool", "mean", x))
    return net.finish(net.dense("dense", x, (8, 5)))


def concatenating() -> onnx.ModelProto:
    """An Inception-like block: three branches, concatenated."""
    net = _Network((3, 8, 8), seed=2)
    x = net.conv("stem", "x", (3, 8))
    one = net.conv("branch1", x, (8, 4), kernel=1, pad=0)
    two = net.conv("branch2.b", net.conv("branch2.a", x, (8, 4), kernel=1, pad=0), (4, 6))
    three = net.add("AveragePool", "pool3", x, kernel_shape=[3, 3], pads=[1] * 4)
    three = net.conv("branch3", three, (8, 4), kernel=1, pad=0)
    x = net.pool("MaxPool", "pool", net.add("Concat", "concat", one, two, three, axis=1))
    x = net.add("Flatten", "flat", net.conv("conv", x, (14, 8)))
    return net.finish(net.dense("dense", x, (8 * 16, 5)))


def depthwise() -> onnx.ModelProto:
    """Depthwise and pointwise convolutions."""
    net = _Network((3, 8, 8), seed=3)
    x = net.conv("stem", "x", (3, 8))
    x = net.conv("point1", net.conv("depth1", x, (8, 8), group=8), (8, 12), kernel=1, pad=0)
    x = net.conv("depth2", x, (12, 12), group=12, stride=2)
    x = net.conv("point2", x, (12, 16), kernel=1, pad=0)
    x = net.add("Flatten", "flat", net.add("GlobalAveragePool", "mean", x))
    return net.finish(net.dense("dense", x, (16, 5)))


def padded() -> onnx.ModelProto:
    """One padded convolution behind another: the padding trick and nothing else."""
    net = _Network((3, 8, 8), seed=4)
    x = net.conv("conv2", net.conv("conv1", "x", (3, 6)), (6, 8))
    x = net.add("Flatten", "flat", net.add("GlobalAveragePool", "mean", x))
    return net.finish(net.dense("dense", x, (8, 4)))


def dense() -> onnx.ModelProto:
    """One hidden layer of 76 units, where the nearest ranks of NumPy and TensorFlow differ."""
    net = _Network((40,), seed=5)
    return net.finish(net.dense("dense2", net.dense("dense1", "x", (40, 76), relu=True), (76, 4)))


def pooled() -> onnx.ModelProto:
    """A max pool over integer activations with many ties."""
    net = _Network((1, 8, 8), seed=6)
    x = net.conv("conv", "x", (1, 4), pad=0, kernel=1)
    for i, tensor in enumerate(net.weights):
        values = np.clip(np.rint(2 * numpy_helper.to_array(tensor)), -2, 2)
        values[0] = 1
        net.weights[i] = numpy_helper.from_array(values.astype(np.float32), tensor.name)
    x = net.add("Flatten", "flat", net.pool("MaxPool", "pool", x))
    return net.finish(net.dense("dense", x, (64, 4)))


def smooth() -> onnx.ModelProto:
    """ELU, whose derivative the authors' code leaves out."""
    net = _Network((3, 8, 8), seed=7)
    x = net.add("Elu", "elu1", net.conv("conv1", "x", (3, 6), relu=False))
    x = net.add("Elu", "elu2", net.conv("conv2", x, (6, 8), relu=False))
    x = net.add("Flatten", "flat", net.add("GlobalAveragePool", "mean", x))
    return net.finish(net.dense("dense", x, (8, 4)))


@dataclass(frozen=True)
class _Case:
    about: str
    network: Callable[[], onnx.ModelProto]
    samples: int = 2
    integers: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 100


CASES: dict[str, _Case] = {
    "plain": _Case("RectGrad's defaults on two convolutions and two dense layers", plain),
    "residual": _Case("the defaults on a residual network", residual, options={"q": 90.0}),
    "concatenating": _Case(
        "the defaults on a concatenating network", concatenating, options={"q": 90.0}
    ),
    "depthwise": _Case("the defaults on depthwise convolutions", depthwise, options={"q": 90.0}),
    "scope": _Case(
        "one percentile for each sample, not for the batch", plain, 3, options={"q": 90.0}, seed=103
    ),
    "rank": _Case("the nearest rank where conventions of rounding differ (76 units)", dense, 4),
    "padding": _Case("the padding trick", padded, options={"q": 80.0}),
    "ties": _Case(
        "max pooling to the first of equal maxima", pooled, integers=True, options={"q": 50.0}
    ),
    "redistribution": _Case(
        "proportional redistribution (PRR)", pooled, integers=True, options={"q": 50.0, "prr": True}
    ),
    "negative_tau": _Case(
        "dead units pass where the threshold is negative", padded, options={"q": 10.0}
    ),
    "derivative": _Case("the derivative of ELU is multiplied in", smooth, options={"q": 80.0}),
    "derivative_replaced": _Case(
        "the rule replaces the derivative of ELU",
        smooth,
        options={"q": 80.0, "derivative": False},
    ),
    "guided": _Case("τ = 0: guided backpropagation × input", plain, options={"tau": 0.0}),
    "mod": _Case("RectGradMod", plain, options={"propagation_rule": "mod", "q": 90.0}),
}


def cifar10_cnn() -> Bundle:
    """The paper's CIFAR-10 network, which the package has, on a photograph; its last layers."""
    from ..demo import cat
    from ..onnx_models.cifar10_cnn import network_path

    bundle = make(
        network_path(), cat(), backend="reference", dtype="float32", layers=("relu4", "relu5")
    )
    about = "the defaults on the CIFAR-10 network, two layers and the final map"
    provenance = {**bundle.provenance, "about": about}
    return replace(bundle, provenance=provenance, name="cifar10_cnn.npz")


def build(name: str) -> Bundle:
    """One of `CASES`, in float32 by NumPy."""
    case = CASES[name]
    proto = case.network()
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][1:]
    rng = np.random.default_rng(case.seed)
    x = rng.standard_normal((case.samples, *shape))
    if case.integers:
        x = np.floor(4 * rng.random(x.shape))
    bundle = make(proto, x.astype(np.float32), backend="reference", dtype="float32", **case.options)
    provenance = {**bundle.provenance, "about": case.about, "model": name}
    return replace(bundle, provenance=provenance, name=f"{name}.npz")


def main(folder: Path) -> None:
    """Write all bundles."""
    for bundle in (*map(build, CASES), cifar10_cnn()):
        path = bundle.save(folder / bundle.name)
        print(f"{path} {path.stat().st_size}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
