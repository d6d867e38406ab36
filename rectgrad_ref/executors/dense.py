"""Transposes of convolutions with many nonzeros: small onnxruntime graphs, channels last.

With stride 1 the transpose of a convolution is a convolution with the kernel turned round and its
channels exchanged, padded by (k − 1)·d − p, which onnxruntime runs in the same blocked layout as
the forward pass; a matrix product for each kernel offset takes two to ten times as long. Other
strides are ConvTranspose.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from ..forward import import_onnxruntime
from ..graph import Node
from .crew import at_fork

# Fewer input channels than this are not worth a session of their own.
_CHANNELS = 32


class DenseTransposes:
    """The transposes of one model's convolutions, each built when it is first needed.

    The sessions have no threads of their own, of which a hundred sessions would have too many:
    every thread of a team computes some of the result's channels.
    """

    _building = Lock()

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, int, int], Any] = {}

    def __call__(self, node: Node, R: np.ndarray, part: int, parts: int) -> np.ndarray:
        """The gradient at a Conv's input, one of `parts` shares of its channels.

        Parameters
        ----------
        R : numpy.ndarray of float32, shape (n, H_out, W_out, C_out)

        Returns
        -------
        numpy.ndarray of float32, shape (n, H_in, W_in, C), channels as `channels` says
        """
        session = self._session(node, part, parts)
        return np.asarray(session.run(None, {"R": np.ascontiguousarray(R)})[0])

    def _session(self, node: Node, part: int, parts: int) -> Any:
        key = (node.outputs[0], part, parts)
        with DenseTransposes._building:
            if key not in self._sessions:
                self._sessions[key] = _session(_graph(node, part, parts))
        return self._sessions[key]


def _unlock() -> None:
    """A fork may take the lock along without its holder."""
    DenseTransposes._building = Lock()


at_fork(_unlock)


def parts_of(node: Node, members: int) -> int:
    """Into how many parts the result's channels are cut; groups stay whole."""
    if node["group"] > 1:
        return 1
    return max(1, min(members, node.input_shapes[0][1] // _CHANNELS))


def channels_of(node: Node, part: int, parts: int) -> tuple[int, int]:
    """The first and behind the last channel of a part."""
    channels = node.input_shapes[0][1]
    return channels * part // parts, channels * (part + 1) // parts


def _graph(node: Node, part: int, parts: int) -> bytes:
    weights = node.constants[1]
    assert weights is not None
    if parts > 1:
        weights = weights[:, slice(*channels_of(node, part, parts))]
    weights = weights.astype(np.float32, copy=False)
    attributes = {"group": node["group"], "dilations": list(node["dilations"])}
    rank = len(node["kernel_shape"])
    pads = [
        (size - 1) * dilation - pad
        for size, dilation, pad in zip(
            node["kernel_shape"] * 2, node["dilations"] * 2, node["pads"], strict=True
        )
    ]
    if all(s == 1 for s in node["strides"]) and min(pads) >= 0:
        # What was the padding after an axis is now before it, and the kernel is symmetric about it.
        op, weights = "Conv", _turned(weights, node["group"])
        attributes["pads"] = pads
    else:
        op = "ConvTranspose"
        attributes["strides"] = list(node["strides"])
        attributes["pads"] = list(node["pads"])
        attributes["output_padding"] = _left_over(node, rank)
    nodes = [
        helper.make_node("Transpose", ["R"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node(op, ["first", "W"], ["result"], **attributes),
        helper.make_node("Transpose", ["result"], ["last"], perm=[0, 2, 3, 1]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("R", "last")]
    graph = helper.make_graph(
        nodes, "transpose", values[:1], values[1:], [numpy_helper.from_array(weights, "W")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()


def _turned(weights: np.ndarray, group: int) -> np.ndarray:
    """(G·M, C, kh, kw) → (G·C, M, kh, kw), both kernel axes reversed."""
    m, c, kh, kw = weights.shape
    split = weights.reshape(group, m // group, c, kh, kw)[..., ::-1, ::-1]
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3, 4)).reshape(
        group * c, m // group, kh, kw
    )


def _left_over(node: Node, rank: int) -> list[int]:
    """Input cells after the last that the convolution reached."""
    result = []
    for i in range(rank):
        reached = (node.output_shapes[0][2 + i] - 1) * node["strides"][i]
        reached += (node["kernel_shape"][i] - 1) * node["dilations"][i] + 1
        declared = node.input_shapes[0][2 + i] + node["pads"][i] + node["pads"][rank + i]
        result.append(declared - reached)
    return result


def _session(model: bytes) -> Any:
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
