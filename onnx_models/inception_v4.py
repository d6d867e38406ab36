"""Inception V4 as an ONNX graph, from weights under timm's names; PyTorch is not needed.

The architecture is that of Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of
Residual Connections on Learning" (2016, arXiv:1602.07261), figures 3 to 9; the names of the weights
are those of timm's `inception_v4`. The tables below are the only description of the network: the
shapes of the weights, the graph and the calibration of random weights all follow from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..errors import InvalidModel
from .cifar10_cnn import IMAGE_METADATA

StateDict = Mapping[str, NDArray[np.generic]]

IMAGE_SIZE = 299
NUM_CLASSES = 1000
BATCH_NORM_EPS = 1e-3


@dataclass(frozen=True)
class Layer:
    """One box of the paper's figures. A convolution's Relu and batch normalisation belong to it."""

    op_type: str
    kernel_shape: tuple[int, int]
    stride: int = 1
    pads: tuple[int, int] = (0, 0)
    filters: int = 0  # 0 for a pool, which keeps its input's channels


def same(filters: int, height: int, width: int) -> Layer:
    """A convolution that keeps the spatial size."""
    return Layer("Conv", (height, width), pads=(height // 2, width // 2), filters=filters)


def valid(filters: int, height: int, width: int, stride: int = 1) -> Layer:
    """A convolution without padding, marked V in the paper's figures."""
    return Layer("Conv", (height, width), stride=stride, filters=filters)


MAX_POOL = Layer("MaxPool", (3, 3), stride=2)
AVERAGE_POOL = Layer("AveragePool", (3, 3), pads=(1, 1))


@dataclass(frozen=True)
class Branch:
    """A chain of layers that starts at the block's input, or at the end of another branch."""

    name: str
    layers: tuple[Layer, ...]
    after: str | None


def branch(name: str, *layers: Layer, after: str | None = None) -> Branch:
    """The branch of that name in timm, which begins `after` another or at the block's input."""
    return Branch(name, layers, after)


Block = tuple[Branch, ...]
"""Branches of which those that no other branch continues are concatenated, in this order."""

# Figure 3, the stem. A block of one branch is not concatenated.
STEM_1: Block = (branch("", valid(32, 3, 3, stride=2)),)
STEM_2: Block = (branch("", valid(32, 3, 3)),)
STEM_3: Block = (branch("", same(64, 3, 3)),)
MIXED_3A: Block = (
    branch("maxpool", MAX_POOL),
    branch("conv", valid(96, 3, 3, stride=2)),
)
MIXED_4A: Block = (
    branch("branch0", same(64, 1, 1), valid(96, 3, 3)),
    branch("branch1", same(64, 1, 1), same(64, 1, 7), same(64, 7, 1), valid(96, 3, 3)),
)
MIXED_5A: Block = (
    branch("conv", valid(192, 3, 3, stride=2)),
    branch("maxpool", MAX_POOL),
)
# Figure 4.
INCEPTION_A: Block = (
    branch("branch0", same(96, 1, 1)),
    branch("branch1", same(64, 1, 1), same(96, 3, 3)),
    branch("branch2", same(64, 1, 1), same(96, 3, 3), same(96, 3, 3)),
    branch("branch3", AVERAGE_POOL, same(96, 1, 1)),
)
# Figure 7 with k, l, m, n = 192, 224, 256, 384.
REDUCTION_A: Block = (
    branch("branch0", valid(384, 3, 3, stride=2)),
    branch("branch1", same(192, 1, 1), same(224, 3, 3), valid(256, 3, 3, stride=2)),
    branch("branch2", MAX_POOL),
)
# Figure 5.
INCEPTION_B: Block = (
    branch("branch0", same(384, 1, 1)),
    branch("branch1", same(192, 1, 1), same(224, 1, 7), same(256, 7, 1)),
    branch(
        "branch2",
        same(192, 1, 1),
        same(192, 7, 1),
        same(224, 1, 7),
        same(224, 7, 1),
        same(256, 1, 7),
    ),
    branch("branch3", AVERAGE_POOL, same(128, 1, 1)),
)
# Figure 8.
REDUCTION_B: Block = (
    branch("branch0", same(192, 1, 1), valid(192, 3, 3, stride=2)),
    branch(
        "branch1", same(256, 1, 1), same(256, 1, 7), same(320, 7, 1), valid(320, 3, 3, stride=2)
    ),
    branch("branch2", MAX_POOL),
)
# Figure 6: two branches fork.
INCEPTION_C: Block = (
    branch("branch0", same(256, 1, 1)),
    branch("branch1_0", same(384, 1, 1)),
    branch("branch1_1a", same(256, 1, 3), after="branch1_0"),
    branch("branch1_1b", same(256, 3, 1), after="branch1_0"),
    branch("branch2_0", same(384, 1, 1)),
    branch("branch2_1", same(448, 3, 1), after="branch2_0"),
    branch("branch2_2", same(512, 1, 3), after="branch2_1"),
    branch("branch2_3a", same(256, 1, 3), after="branch2_2"),
    branch("branch2_3b", same(256, 3, 1), after="branch2_2"),
    branch("branch3", AVERAGE_POOL, same(256, 1, 1)),
)
# Figure 9, the whole network up to its global average pool.
FEATURES: tuple[Block, ...] = (
    *(STEM_1, STEM_2, STEM_3, MIXED_3A, MIXED_4A, MIXED_5A),
    *[INCEPTION_A] * 4,
    REDUCTION_A,
    *[INCEPTION_B] * 7,
    REDUCTION_B,
    *[INCEPTION_C] * 3,
)


@dataclass(frozen=True)
class Step:
    """A layer, or a concatenation, at its place in the network."""

    name: str
    """The module's name in timm, such as features.6.branch1.0; a block's for its concatenation."""
    layer: Layer | None
    """None for a concatenation."""
    inputs: tuple[str, ...]
    """The outputs of the steps that it reads, or `image`."""
    in_channels: int
    out_channels: int

    @property
    def is_conv(self) -> bool:
        return self.layer is not None and self.layer.op_type == "Conv"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(filters, input channels, height, width) of a convolution's weight."""
        kernel_shape = self.layer.kernel_shape if self.layer else ()
        return (self.out_channels, self.in_channels, *kernel_shape)

    @property
    def output(self) -> str:
        """The name of the value that it computes in the ONNX graph."""
        return f"{self.name}.relu" if self.is_conv else self.name


def steps() -> Iterator[Step]:
    """The network's layers and concatenations in topological order."""
    previous, channels = "image", 3
    for index, block in enumerate(FEATURES):
        prefix = f"features.{index}"
        ends: dict[str, Step] = {}
        for part in block:
            if part.after is None:
                value, width = previous, channels
            else:
                value, width = ends[part.after].output, ends[part.after].out_channels
            for position, layer in enumerate(part.layers):
                place = [prefix, part.name, str(position) if len(part.layers) > 1 else ""]
                name = ".".join(filter(None, place))
                step = Step(name, layer, (value,), width, layer.filters or width)
                yield step
                value, width = step.output, step.out_channels
            ends[part.name] = step
        continued = {part.after for part in block}
        outputs = [end for name, end in ends.items() if name not in continued]
        channels = sum(end.out_channels for end in outputs)
        if len(outputs) > 1:
            yield Step(prefix, None, tuple(end.output for end in outputs), channels, channels)
            previous = prefix
        else:
            previous = outputs[0].output


def parameter_shapes(num_classes: int = NUM_CLASSES) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, as in the state dict of timm's `inception_v4`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for step in steps():
        if step.is_conv:
            shapes[f"{step.name}.conv.weight"] = step.weight_shape
            for statistic in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{step.name}.bn.{statistic}"] = (step.out_channels,)
    shapes["last_linear.weight"] = (num_classes, step.out_channels)
    shapes["last_linear.bias"] = (num_classes,)
    return shapes


def build_model(
    state_dict: StateDict, *, image_size: int = IMAGE_SIZE, doc_string: str = ""
) -> onnx.ModelProto:
    """The ONNX model of Inception V4 with the given weights.

    Batch normalisation is folded into the convolutions, so that every convolution is followed by
    its Relu. Values carry timm's module names: `features.6.branch1.0.conv` is a pre-activation,
    `features.6.branch1.0.relu` its activation, `features.6` the block's output.

    Parameters
    ----------
    state_dict
        Arrays under the names and with the shapes of `parameter_shapes`; the counters
        `num_batches_tracked` are ignored. The number of classes is that of `last_linear`: 1000 in
        timm, 1001 in TF-slim.
    image_size
        Height and width of the input in pixels, at least 75; the network was trained at 299.
    doc_string
        Says in the file where the weights come from.

    Returns
    -------
    onnx.ModelProto
        From `image`, (N, 3, image_size, image_size) RGB float32 scaled by x/127.5 − 1, to `logits`,
        (N, classes). The scaling is recorded as ONNX image metadata.

    Raises
    ------
    InvalidModel
        A weight is missing, unknown, or of another shape.
    """
    check_state_dict(state_dict)
    image = helper.make_tensor_value_info(
        "image", TensorProto.FLOAT, ["N", 3, image_size, image_size]
    )
    image.type.denotation = "IMAGE"
    num_classes = len(state_dict["last_linear.bias"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", num_classes])
    arrays = _folded(state_dict)
    graph = helper.make_graph(
        list(_nodes()),
        "inception_v4",
        [image],
        [logits],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    # The versions of the other networks' files: old runtimes read them too.
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="rectgrad_ref",
        doc_string=doc_string,
    )
    helper.set_model_props(model, IMAGE_METADATA)
    return model


def _nodes() -> Iterator[onnx.NodeProto]:
    for step in steps():
        if step.layer is None:
            yield helper.make_node("Concat", step.inputs, [step.name], step.name, axis=1)
            continue
        # An AveragePool does not count its padding unless told to, as the network wants it.
        attributes: dict[str, Any] = {
            "kernel_shape": step.layer.kernel_shape,
            "strides": [step.layer.stride] * 2,
            "pads": step.layer.pads * 2,
        }
        name, inputs = step.name, list(step.inputs)
        if step.is_conv:
            name = f"{step.name}.conv"
            inputs += [f"{name}.weight", f"{name}.bias"]
        yield helper.make_node(step.layer.op_type, inputs, [name], name, **attributes)
        if step.is_conv:
            yield helper.make_node("Relu", [name], [step.output], step.output)
    yield helper.make_node("GlobalAveragePool", [step.output], ["global_pool"], "global_pool")
    yield helper.make_node("Flatten", ["global_pool"], ["flatten"], "flatten")
    inputs = ["flatten", "last_linear.weight", "last_linear.bias"]
    yield helper.make_node("Gemm", inputs, ["logits"], "last_linear", transB=1)


def _folded(state_dict: StateDict) -> dict[str, NDArray[np.float32]]:
    """Weights and biases with each batch normalisation merged into its convolution."""
    folded = {}
    for name in (step.name for step in steps() if step.is_conv):
        weight = np.asarray(state_dict[f"{name}.conv.weight"], dtype=np.float64)
        gamma, beta, mean, variance = (
            np.asarray(state_dict[f"{name}.bn.{statistic}"], dtype=np.float64)
            for statistic in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + BATCH_NORM_EPS)
        folded[f"{name}.conv.weight"] = weight * scale[:, None, None, None]
        folded[f"{name}.conv.bias"] = beta - mean * scale
    for name in ("last_linear.weight", "last_linear.bias"):
        folded[name] = np.asarray(state_dict[name])
    return {name: array.astype(np.float32) for name, array in folded.items()}


def check_state_dict(state_dict: StateDict) -> None:
    """Refuse weights that are not those of this network.

    Raises
    ------
    InvalidModel
        A weight is missing, unknown, or of another shape.
    """
    given = {name: array.shape for name, array in state_dict.items()}
    given = {name: shape for name, shape in given.items() if "num_batches_tracked" not in name}
    num_classes, *_ = given.get("last_linear.bias") or (NUM_CLASSES,)
    expected = parameter_shapes(num_classes)
    for problem, names in (
        ("missing", expected.keys() - given.keys()),
        ("unknown", given.keys() - expected.keys()),
        ("of another shape", {n for n in expected if given.get(n, expected[n]) != expected[n]}),
    ):
        if names:
            name = min(names)
            shapes = f"{given.get(name)} given, {expected.get(name)} expected"
            raise InvalidModel(
                f"not the weights of timm's inception_v4: {len(names)} {problem}, "
                f"the first of them {name} ({shapes})"
            )


def calibration_images() -> NDArray[np.float32]:
    """The four fixed images on which random weights are calibrated: discs that hide each other.

    Such "dead leaves" have the edges, the flat areas and the spectrum of natural images (Lee,
    Mumford and Huang 2001), so photographs excite a network calibrated on them to the same order
    of magnitude.

    Returns
    -------
    numpy.ndarray
        (4, 3, 299, 299) in [−1, 1].
    """
    rng = np.random.default_rng(0)
    row, column = np.ogrid[:IMAGE_SIZE, :IMAGE_SIZE]
    images = np.zeros((4, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for image in images:
        for _ in range(500):
            y, x = rng.uniform(0, IMAGE_SIZE, 2)
            radius = IMAGE_SIZE / 2 * 0.02 ** rng.uniform()
            disc = (row - y) ** 2 + (column - x) ** 2 < radius**2
            image[:, disc] = rng.uniform(-1, 1, (3, 1))
    return images


def random_state_dict(seed: int) -> dict[str, NDArray[np.float32]]:
    """Seeded random weights for tests and benchmarks where the published ones are out of reach.

    They are calibrated on `calibration_images`, without which the activations of so deep a network
    would vanish or explode: there the pre-activations of every convolution have unit variance,
    about half of its units are active, and the logits have zero mean and unit variance. It takes
    some seconds.

    Returns
    -------
    dict of numpy.ndarray
        Arrays under the names and with the shapes of `parameter_shapes`.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, NDArray[np.float32]] = {}
    values = {"image": calibration_images()}
    for step in steps():
        arrays = [values[name] for name in step.inputs]
        if step.layer is None:
            values[step.output] = np.concatenate(arrays, axis=1)
        elif step.is_conv:
            weight = _normal(rng, step.weight_shape)
            z = _convolve(arrays[0], weight, step.layer)
            mean, variance = _calibration(z)
            values[step.output] = np.maximum((z - mean[:, None, None]) / np.sqrt(variance), 0)
            weights |= {
                f"{step.name}.conv.weight": weight,
                f"{step.name}.bn.weight": np.ones_like(mean),
                f"{step.name}.bn.bias": np.zeros_like(mean),
                f"{step.name}.bn.running_mean": mean,
                f"{step.name}.bn.running_var": np.full_like(mean, variance - BATCH_NORM_EPS),
            }
        else:
            values[step.output] = _pool(arrays[0], step.layer)
    features = values[step.output].mean(axis=(2, 3))
    weight = _normal(rng, (NUM_CLASSES, step.out_channels))
    bias = -weight @ features.mean(axis=0)
    spread = (features @ weight.T + bias).std()
    return weights | {"last_linear.weight": weight / spread, "last_linear.bias": bias / spread}


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """He's initialisation, which keeps the variance of the signal under Relu."""
    std = np.float32(math.sqrt(2 / math.prod(shape[1:])))
    return rng.standard_normal(shape, dtype=np.float32) * std


def _calibration(z: NDArray[np.float32]) -> tuple[NDArray[np.float32], np.float32]:
    """What to subtract from each channel of a convolution's output, and the variance after that.

    Half of each channel's mean is kept. Without any, small differences between images would grow
    a hundredfold on the way up; with all of it, a fifth of the last channels would never switch.
    """
    mean = z.mean(axis=(0, 2, 3))
    mean = (mean + mean.mean()) / 2
    return mean, (z - mean[:, None, None]).var()


def _windows(x: NDArray[np.float32], layer: Layer) -> NDArray[np.float32]:
    """(N, C, H, W) → (N, C, H', W', kh, kw): what the kernel sees at every output position."""
    padded = np.pad(x, [(0, 0), (0, 0), *((pad, pad) for pad in layer.pads)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, layer.kernel_shape, axis=(2, 3))
    return windows[:, :, :: layer.stride, :: layer.stride]


def _convolve(
    x: NDArray[np.float32], weight: NDArray[np.float32], layer: Layer
) -> NDArray[np.float32]:
    """(N, C, H, W) → (N, filters, H', W'), image by image to bound the memory of the windows."""
    return np.stack(
        [
            np.tensordot(weight, _windows(image[None], layer)[0], axes=((1, 2, 3), (0, 3, 4)))
            for image in x
        ]
    )


def _pool(x: NDArray[np.float32], layer: Layer) -> NDArray[np.float32]:
    if layer.op_type == "MaxPool":
        return _windows(x, layer).max(axis=(4, 5))
    count = _windows(np.ones_like(x[:1, :1]), layer).sum(axis=(4, 5))
    return _windows(x, layer).sum(axis=(4, 5)) / count
