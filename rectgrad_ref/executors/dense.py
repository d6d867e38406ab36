"""Transposes of convolutions with many nonzeros: small onnxruntime graphs, channels last.

Where a kernel covers one pixel, the transpose is a product with the matrix of weights. Else, with
stride 1, it is a convolution with the kernel turned round and its channels exchanged, which
onnxruntime runs in the same blocked layout as the forward pass. With stride s, what reaches pixels
t ≡ ρ (mod s) is such a convolution with every s-th element of the kernel: one *phase* per remainder
and axis [1]_. ConvTranspose does what is left, more slowly.

Each thread of a team computes some rows of the result, a *slab*, from those that reach it: so no
row is brought to another layout twice, and the result can be written where it belongs.

References
----------
.. [1] W. Shi et al., "Is the deconvolution layer the same as a convolutional layer?",
   arXiv:1609.07009, 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

# Of fewer channels, ConvTranspose is faster than phases that are put together.
_PHASED = 16


class DenseTransposes:
    """The transposes of one model's convolutions at one size of the image, each made on demand.

    The sessions have no threads of their own, of which a hundred sessions would have too many.
    """

    _building = Lock()

    def __init__(self) -> None:
        self._transposes: dict[tuple[str, int, int], DenseTranspose | None] = {}
        self._sessions: dict[tuple[Any, ...], Any] = {}

    def __call__(self, node: Node, member: int, members: int) -> DenseTranspose | None:
        """One member's share of a Conv's transpose; None: there is nothing left for it."""
        key = (node.outputs[0], member, members)
        if key not in self._transposes:
            self._transposes[key] = self._made(node, member, parts_of(node, members))
        return self._transposes[key]

    def _made(self, node: Node, part: int, parts: int) -> DenseTranspose | None:
        if part >= parts:
            return None
        slab = _slab(node, part, parts)
        return DenseTranspose(node, slab, self._session(node, slab))

    def _session(self, node: Node, slab: _Slab) -> Any:
        """What computes a slab; slabs with the same padding share it."""
        key = (node.outputs[0], *(band.pads for band in slab.bands))
        if key not in self._sessions:
            with DenseTransposes._building:
                if key not in self._sessions:
                    self._sessions[key] = _session(_graph(node, slab))
        return self._sessions[key]


def _unlock() -> None:
    """A fork may take the lock along without its holder."""
    DenseTransposes._building = Lock()


at_fork(_unlock)


class DenseTranspose:
    """Some rows of a transpose.

    Attributes
    ----------
    rows : slice
        Which.
    """

    def __init__(self, node: Node, slab: _Slab, session: Any) -> None:
        self.rows, self._reads, self._bands = slab.rows, slab.reads, slab.bands
        _, channels, _, width = node.input_shapes[0]
        self._whole = (slab.rows.stop - slab.rows.start, width, channels)
        self._columns = axis_phases(node, 1) if slab.bands else []
        self._strides = node["strides"]
        self._shapes: list[tuple[int, ...]] = [
            (band.computed, x.pixels, channels) for band in slab.bands for x in self._columns
        ]
        # Of a stride of 1 there is one phase, which is the result.
        self._in_phases = max(self._strides) > 1 and bool(slab.bands)
        written = sum(band.count for band in slab.bands) * sum(x.pixels for x in self._columns)
        self._has_gaps = written < self._whole[0] * width
        self._session = session
        self._names = [output.name for output in session.get_outputs()]

    def __call__(
        self,
        R: np.ndarray,
        room: Callable[[int], np.ndarray],
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """The gradient at the Conv's input.

        Parameters
        ----------
        R : numpy.ndarray of float32, shape (n, H_out, W_out, C_out)
        room : callable
            Gives so many floats, which last until they are used again.
        out : numpy.ndarray of float32, shape (n, rows, W_in, C), optional
            Where the result goes, without gaps; by default there.

        Returns
        -------
        numpy.ndarray of float32, shape (n, rows, W_in, C)
        """
        R, binding = np.ascontiguousarray(R[:, self._reads]), self._session.io_binding()
        binding.bind_input("R", "cpu", 0, np.float32, R.shape, R.ctypes.data)
        shapes = self._shapes if self._in_phases else []
        if out is None:
            shapes = [*shapes, self._whole]
        results = _laid_out(room, len(R), shapes) if shapes else []
        whole = results.pop() if out is None else out
        for name, result in zip(self._names, results or [whole], strict=True):
            binding.bind_output(name, "cpu", 0, np.float32, result.shape, result.ctypes.data)
        self._session.run_with_iobinding(binding)
        if self._in_phases:
            self._put_together(results, whole)
        return whole

    def _put_together(self, results: list[np.ndarray], whole: np.ndarray) -> None:
        if self._has_gaps:
            whole[...] = 0
        rows, columns = self._strides
        phases = product(self._bands, self._columns)
        for (band, x), result in zip(phases, results, strict=True):
            wanted = result[:, band.skipped : band.skipped + band.count]
            whole[:, band.first :: rows, x.first :: columns] = wanted


def _laid_out(
    room: Callable[[int], np.ndarray], n: int, shapes: list[tuple[int, ...]]
) -> list[np.ndarray]:
    """Arrays for `n` of each shape that follow each other."""
    sizes = [n * prod(shape) for shape in shapes]
    parts = np.split(room(sum(sizes)), np.cumsum(sizes)[:-1])
    return [part.reshape(n, *shape) for part, shape in zip(parts, shapes, strict=True)]


def parts_of(node: Node, members: int) -> int:
    """Into how many slabs the result is cut, so that each has rows of all phases."""
    if not _is_phased(node):
        return 1
    return max(1, min(members, node.input_shapes[0][2] // node["strides"][0]))


@dataclass(frozen=True)
class _Band:
    """What one phase computes of a slab."""

    first: int  # row of the slab at which it begins
    count: int  # rows
    skipped: int  # rows before these, which are computed because R has rows for other phases
    computed: int  # rows in all
    pads: tuple[int, int]
    taps: list[int]  # of the kernel, in the order of this convolution


class _Slab(NamedTuple):
    """Rows of the result, the rows of R that reach them, and how; no bands: by ConvTranspose."""

    rows: slice
    reads: slice
    bands: list[_Band]


def _slab(node: Node, part: int, parts: int) -> _Slab:
    stride, extent, outputs = node["strides"][0], node.input_shapes[0][2], node.output_shapes[0][2]
    if not _is_phased(node):
        return _Slab(slice(0, extent), slice(0, outputs), [])
    begin, end = (extent // stride * i // parts * stride for i in (part, part + 1))
    end = extent if part + 1 == parts else end
    wanted = []
    for phase in axis_phases(node, 0):
        # Rows first + stride·m, of which m is computed from R's rows m − pad … m − pad + reach.
        m_first, m_last = (-((phase.first - edge) // stride) for edge in (begin, end))
        reach = (len(phase.taps) - 1) * node["dilations"][0]
        low = m_first - phase.pads[0]
        wanted.append((phase, m_first, m_last - m_first, low, low + m_last - m_first + reach))
    r_first = max(0, min(outputs - 1, *(low for *_, low, _ in wanted)))
    r_last = min(outputs, max(r_first + 1, *(high for *_, high in wanted)))
    bands = []
    for phase, m_first, count, low, high in wanted:
        pads = max(0, r_first - low), max(0, high - r_last)
        computed = r_last - r_first + sum(pads) - (high - low - count)
        first = phase.first + stride * m_first - begin
        bands.append(_Band(first, count, max(0, low - r_first), computed, pads, phase.taps))
    return _Slab(slice(begin, end), slice(r_first, r_last), bands)


class _Phase(NamedTuple):
    """Pixels t ≡ first (mod stride) of one axis, and the convolution that leads to them."""

    first: int
    pixels: int
    taps: list[int]  # of the kernel, in the order of this convolution
    pads: tuple[int, int]


def _is_phased(node: Node) -> bool:
    """Whether phases are possible, and faster than ConvTranspose."""
    strided = any(s > 1 for s in node["strides"])
    if strided and (node.input_shapes[0][1] < _PHASED or any(d > 1 for d in node["dilations"])):
        return False
    axes = [axis_phases(node, axis) for axis in range(2)]
    return all(axes) and all(min(phase.pads) >= 0 for phases in axes for phase in phases)


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


def _graph(node: Node, slab: _Slab) -> bytes:
    weights = node.constants[1]
    assert weights is not None
    weights = weights.astype(np.float32, copy=False)
    if _is_matrix(node):
        matmul = helper.make_node("MatMul", ["R", "W"], ["last"])
        return _model([matmul], {"W": weights[:, :, 0, 0]}, ["last"])
    nodes = [helper.make_node("Transpose", ["R"], ["first"], perm=[0, 3, 1, 2])]
    attributes = {"group": node["group"], "dilations": list(node["dilations"])}
    if not slab.bands:
        attributes["strides"] = list(node["strides"])
        attributes["pads"] = list(node["pads"])
        attributes["output_padding"] = left_over(node)
        nodes += _channels_last("ConvTranspose", "", attributes)
        return _model(nodes, {"W": weights}, ["last"])
    kernels = {}
    phases = product(slab.bands, axis_phases(node, 1))
    for i, (band, x) in enumerate(phases):
        attributes["pads"] = [band.pads[0], x.pads[0], band.pads[1], x.pads[1]]
        nodes += _channels_last("Conv", str(i), attributes)
        kernels[f"W{i}"] = exchanged(weights[:, :, band.taps][..., x.taps], node["group"])
    return _model(nodes, kernels, [f"last{i}" for i in range(len(kernels))])


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
