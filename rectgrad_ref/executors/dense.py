"""Transposes of convolutions with many nonzeros: small onnxruntime graphs, channels last.

Where a kernel covers one pixel, the transpose is a product with the matrix of weights. Else, with
stride 1, it is a convolution with the kernel turned round and its channels exchanged, which
onnxruntime runs in the same blocked layout as the forward pass. With stride s, what reaches pixels
t ≡ ρ (mod s) is such a convolution with every s-th element of the kernel: one *phase* per remainder
and axis [1]_. ConvTranspose does what is left, more slowly.

References
----------
.. [1] W. Shi et al., "Is the deconvolution layer the same as a convolutional layer?",
   arXiv:1609.07009, 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import prod
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..forward import import_onnxruntime
from ..graph import Node
from .crew import at_fork

# Fewer input channels than this are not worth a session of their own.
_CHANNELS = 32
# With fewer, putting the phases together costs more than ConvTranspose.
_PHASED = 96


class DenseTransposes:
    """The transposes of one model's convolutions, each built when it is first needed.

    The sessions have no threads of their own, of which a hundred sessions would have too many:
    every thread of a team computes some of the result's channels.
    """

    _building = Lock()

    def __init__(self) -> None:
        self._built: dict[tuple[str, int, int], DenseTranspose] = {}

    def __call__(self, node: Node, part: int, parts: int) -> DenseTranspose:
        """The transpose of a Conv, one of `parts` shares of its input's channels."""
        key = (node.outputs[0], part, parts)
        if key not in self._built:
            with DenseTransposes._building:
                if key not in self._built:
                    self._built[key] = DenseTranspose(node, part, parts)
        return self._built[key]


def _unlock() -> None:
    """A fork may take the lock along without its holder."""
    DenseTransposes._building = Lock()


at_fork(_unlock)


class DenseTranspose:
    """One share of the channels of a transpose."""

    def __init__(self, node: Node, part: int, parts: int) -> None:
        self.channels = slice(*channels_of(node, part, parts))
        depth = self.channels.stop - self.channels.start
        phases = _phases(node, depth)
        self._strides = node["strides"]
        # Of a stride of 1 there is one phase, which is the result.
        self._phases = phases if phases is not None and max(self._strides) > 1 else None
        self._whole = (*node.input_shapes[0][2:], depth)
        self._shapes = [self._whole]
        if self._phases is not None:
            self._shapes = [(y.pixels, x.pixels, depth) for y, x in self._phases]
        self._session = _session(_graph(node, part, parts))
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, R: np.ndarray, room: Callable[[int], np.ndarray]) -> np.ndarray:
        """The gradient at the Conv's input.

        Parameters
        ----------
        R : numpy.ndarray of float32, shape (n, H_out, W_out, C_out)
        room : callable
            Gives so many floats for the result, which lasts until they are used again.

        Returns
        -------
        numpy.ndarray of float32, shape (n, H_in, W_in, C), of the `channels`
        """
        R, binding = np.ascontiguousarray(R), self._session.io_binding()
        binding.bind_input("R", "cpu", 0, np.float32, R.shape, R.ctypes.data)
        shapes = [(len(R), *shape) for shape in (*self._shapes, self._whole)]
        results = _laid_out(room, shapes if self._phases is not None else shapes[:1])
        for name, result in zip(self._names, results, strict=False):
            binding.bind_output(name, "cpu", 0, np.float32, result.shape, result.ctypes.data)
        self._session.run_with_iobinding(binding)
        if self._phases is None:
            return results[0]
        whole, (rows, columns) = results.pop(), self._strides
        whole[...] = 0
        for (y, x), result in zip(self._phases, results, strict=True):
            whole[:, y.first :: rows, x.first :: columns] = result
        return whole


def _laid_out(room: Callable[[int], np.ndarray], shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Arrays that follow each other."""
    sizes = [prod(shape) for shape in shapes]
    parts = np.split(room(sum(sizes)), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def parts_of(node: Node, members: int) -> int:
    """Into how many parts the result's channels are cut; groups stay whole."""
    if node["group"] > 1:
        return 1
    return max(1, min(members, node.input_shapes[0][1] // _CHANNELS))


def channels_of(node: Node, part: int, parts: int) -> tuple[int, int]:
    """The first and behind the last channel of a part."""
    channels = node.input_shapes[0][1]
    return channels * part // parts, channels * (part + 1) // parts


class _Phase(NamedTuple):
    """Pixels t ≡ first (mod stride) of one axis, and the convolution that leads to them."""

    first: int
    pixels: int
    taps: list[int]  # of the kernel, in the order of this convolution
    pads: tuple[int, int]


def _phases(node: Node, channels: int) -> list[tuple[_Phase, _Phase]] | None:
    """Phases of both axes that any output reaches; None where ConvTranspose is better or needed."""
    strided = any(s > 1 for s in node["strides"])
    if strided and (channels < _PHASED or any(d > 1 for d in node["dilations"])):
        return None
    rows, columns = (axis_phases(node, axis) for axis in range(2))
    if any(min(phase.pads) < 0 for phase in (*rows, *columns)):
        return None
    return list(product(rows, columns))


def axis_phases(node: Node, axis: int) -> list[_Phase]:
    """With t + pad = s·m + ρ and kernel elements i = ρ + s·k, output o = m − k contributes."""
    size, stride = node["kernel_shape"][axis], node["strides"][axis]
    dilation, pad = node["dilations"][axis], node["pads"][axis]
    extent, outputs = node.input_shapes[0][2 + axis], node.output_shapes[0][2 + axis]
    phases = []
    for remainder in range(stride):
        taps = list(range(remainder, size, stride))[::-1]
        m_first = -((remainder - pad) // stride)
        count = (extent - 1 + pad - remainder) // stride - m_first + 1
        reach = (len(taps) - 1) * dilation
        before = reach - m_first
        pads = (before, count + reach - outputs - before)
        if taps and count > 0:
            phases.append(_Phase(stride * m_first + remainder - pad, count, taps, pads))
    return phases


def _graph(node: Node, part: int, parts: int) -> bytes:
    weights = node.constants[1]
    assert weights is not None
    if parts > 1:
        weights = weights[:, slice(*channels_of(node, part, parts))]
    weights = weights.astype(np.float32, copy=False)
    if _is_matrix(node):
        matmul = helper.make_node("MatMul", ["R", "W"], ["last"])
        return _model([matmul], {"W": weights[:, :, 0, 0]}, ["last"])
    nodes = [helper.make_node("Transpose", ["R"], ["first"], perm=[0, 3, 1, 2])]
    attributes = {"group": node["group"], "dilations": list(node["dilations"])}
    phases = _phases(node, weights.shape[1] * node["group"])
    if phases is None:
        attributes["strides"] = list(node["strides"])
        attributes["pads"] = list(node["pads"])
        attributes["output_padding"] = left_over(node)
        nodes += _channels_last("ConvTranspose", "", attributes)
        return _model(nodes, {"W": weights}, ["last"])
    kernels = {}
    for i, (y, x) in enumerate(phases):
        attributes["pads"] = [y.pads[0], x.pads[0], y.pads[1], x.pads[1]]
        nodes += _channels_last("Conv", str(i), attributes)
        kernels[f"W{i}"] = exchanged(weights[:, :, y.taps][..., x.taps], node["group"])
    return _model(nodes, kernels, [f"last{i}" for i in range(len(phases))])


def _is_matrix(node: Node) -> bool:
    plain = all(n == 1 for n in (*node["kernel_shape"], *node["strides"]))
    return plain and not any(node["pads"]) and node["group"] == 1


def _channels_last(op: str, name: str, attributes: dict[str, Any]) -> list[onnx.NodeProto]:
    inputs, result = ["first", f"W{name}"], f"result{name}"
    return [
        helper.make_node(op, inputs, [result], **attributes),
        helper.make_node("Transpose", [result], [f"last{name}"], perm=[0, 2, 3, 1]),
    ]


def _model(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], outputs: list[str]
) -> bytes:
    def declared(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    graph = helper.make_graph(
        nodes,
        "transpose",
        [declared("R")],
        [declared(name) for name in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(w), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()


def exchanged(weights: np.ndarray, group: int) -> np.ndarray:
    """(G·M, C, kh, kw) → (G·C, M, kh, kw)."""
    m, c, kh, kw = weights.shape
    split = weights.reshape(group, m // group, c, kh, kw)
    return split.transpose(0, 2, 1, 3, 4).reshape(group * c, m // group, kh, kw)


def left_over(node: Node) -> list[int]:
    """Input cells after the last that the convolution reached."""
    result = []
    for i in range(2):
        reached = (node.output_shapes[0][2 + i] - 1) * node["strides"][i]
        reached += (node["kernel_shape"][i] - 1) * node["dilations"][i] + 1
        declared = node.input_shapes[0][2 + i] + node["pads"][i] + node["pads"][2 + i]
        result.append(declared - reached)
    return result


def _session(model: bytes) -> Any:
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
