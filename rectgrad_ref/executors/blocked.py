"""The user's model on the CPU, whose values are handed over as onnxruntime computes them.

onnxruntime computes convolutions in blocks of channels, (N, C/16, H, W, 16), and brings what a
graph hands over to the order of ONNX by nodes of its own. Where all ReLU outputs are handed over,
this takes a tenth of the forward pass and more. So the model is optimised first, written down, and
loaded again without these nodes. What onnxruntime computes otherwise is written channels last.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from ..errors import RectGradWarning
from ..forward import LoadedModel, OnnxruntimeForward, import_onnxruntime
from ..graph import Graph
from ..kernels.simd import LANES
from ..model import all_tensors
from .storage import aligned

_DOMAIN = "com.microsoft.nchwc"
_WEIGHTS = "weights"


class BlockedForward(OnnxruntimeForward):
    """Writes images (N, C, H, W) in blocks of sixteen channels, or channels last."""

    def _bind(
        self,
        binding: Any,
        session: LoadedModel,
        graph: Graph,
        name: str,
        shape: tuple[int, ...],
        place: Any,
    ) -> None:
        result = _last(name)
        if name in session.blocked:
            result, shape = session.blocked[name], _in_blocks(shape)
        elif len(shape) == 4:
            shape = (shape[0], *shape[2:], shape[1])
        binding.bind_output(result, "cpu", 0, np.float32, shape, place.ctypes.data)

    def _written(self, graph: Graph, name: str) -> tuple[list[onnx.NodeProto], str]:
        nodes, source = super()._written(graph, name)
        if len(graph.shapes[name] or ()) == 4:
            nodes.append(helper.make_node("Transpose", [source], [_last(name)], perm=[0, 2, 3, 1]))
        else:
            nodes.append(helper.make_node("Identity", [source], [_last(name)]))
        return nodes, _last(name)

    def _loaded(self, data: bytes, graph: Graph, placed: tuple[str, ...]) -> LoadedModel:
        images = [name for name in placed if len(graph.shapes[name] or ()) == 4]
        try:
            in_blocks = self._in_blocks(data, images) if images else None
        except Exception as error:  # onnxruntime's exceptions have no common base class
            loaded = super()._loaded(data, graph, placed)  # is it the model?
            warnings.warn(
                f"explaining {graph.model.name} takes longer than it could, because what "
                "onnxruntime makes of it cannot be written to a temporary folder and read again: "
                f"{error}. TMPDIR names another folder",
                RectGradWarning,
                stacklevel=2,
            )
            return loaded
        return in_blocks or super()._loaded(data, graph, placed)

    def _in_blocks(self, data: bytes, images: Sequence[str]) -> LoadedModel | None:
        """A session that leaves `images` in blocks; None where they are not of sixteen channels."""
        if _block() != LANES:
            return None
        with TemporaryDirectory(prefix="rectgrad-") as folder:
            model, weights = self._optimised(data, Path(folder))
        blocked, options = _hand_over_blocks(model, images), self._options()
        options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        _lend(options, model, weights)
        return LoadedModel(self._inference(model.SerializeToString(), options), blocked, weights)

    def _optimised(self, data: bytes, folder: Path) -> tuple[onnx.ModelProto, np.ndarray]:
        """The model as onnxruntime would run it, and its weights as bytes."""
        path, weights = folder / "model.onnx", folder / _WEIGHTS
        options = _writing(self._options(), path)
        key = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{key}_file_name", weights.name)
        options.add_session_config_entry(f"{key}_min_size_in_bytes", "1024")
        self._inference(data, options)
        size = weights.stat().st_size if weights.exists() else 0
        held = aligned(size, np.uint8)
        if size:
            with weights.open("rb") as file:
                file.readinto(held)  # type: ignore[arg-type]
        return onnx.load(path, load_external_data=False), held


def _hand_over_blocks(model: onnx.ModelProto, images: Sequence[str]) -> dict[str, str]:
    """Drop the nodes that reorder `images`; returns what is handed over for each instead."""
    graph = model.graph
    reordering = {
        node.output[0]: node
        for node in graph.node
        if node.domain == _DOMAIN and node.op_type == "ReorderOutput"
    }
    sources: dict[str, str] = {}  # each once, as an output has to be
    for name in images:
        node = reordering.get(_last(name))
        if node is not None:
            sources.setdefault(node.input[0], name)
    dropped = {_last(name) for name in sources.values()}
    # By the model itself: it may transpose the same value, which is then done once for both.
    read = {value for node in graph.node for value in node.input}
    nodes = [node for node in graph.node if node.output[0] not in dropped - read]
    outputs = [value for value in graph.output if value.name not in dropped]
    del graph.node[:], graph.output[:]
    graph.node.extend(nodes)
    graph.output.extend(outputs)
    for source in sources:
        graph.output.append(helper.make_tensor_value_info(source, TensorProto.FLOAT, None))
    return {name: source for source, name in sources.items()}


def _lend(options: Any, model: onnx.ModelProto, weights: np.ndarray) -> None:
    """Let a session read what the model says is in a file from memory.

    As arrays can be lent only those of the graph itself that have whole bytes for each number:
    others are put into the model.
    """
    names = {tensor.name for tensor in model.graph.initializer}
    lent: dict[str, Any] = {}
    for tensor in filter(uses_external_data, all_tensors(model)):
        where = ExternalDataInfo(tensor)
        assert where.offset is not None and where.length is not None
        part = weights[where.offset : where.offset + where.length]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        whole = prod(tensor.dims) * dtype.itemsize == where.length
        if tensor.name in names and tensor.name not in lent and whole:
            array = part.view(dtype).reshape(tuple(tensor.dims))
            lent[tensor.name] = import_onnxruntime().OrtValue.ortvalue_from_numpy(array)
        else:
            tensor.raw_data = part.tobytes()
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    options.add_external_initializers(list(lent), list(lent.values()))


def _writing(options: Any, path: Path) -> Any:
    """Let a session write the optimised model down."""
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4  # it warns that this model fits one kind of processor
    return options


@cache
def _block() -> int:
    """How many channels lie together where onnxruntime computes convolutions on this processor.

    It fills the last block up: of one filter it makes a block.
    """
    kernel = helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 1, 1], [1.0])
    image, result = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 4, 4]) for name in "xy"
    )
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    graph = helper.make_graph([conv], "probe", [image], [result], [kernel])
    probe = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    runtime = import_onnxruntime()
    with TemporaryDirectory(prefix="rectgrad-") as folder:
        path = Path(folder) / "probe.onnx"
        runtime.InferenceSession(
            probe.SerializeToString(),
            _writing(runtime.SessionOptions(), path),
            providers=["CPUExecutionProvider"],
        )
        optimised = onnx.load(path).graph
    if all(node.domain != _DOMAIN for node in optimised.node):
        return 1
    return max(tensor.dims[0] for tensor in optimised.initializer if len(tensor.dims) == 4)


def _last(name: str) -> str:
    return f"{name}/channels_last"


def room_of(shape: Sequence[int]) -> int:
    """Floats that a value (N, …) takes, however it is written."""
    return prod(_in_blocks(shape) if len(shape) == 4 else shape)


def _in_blocks(shape: Sequence[int]) -> tuple[int, ...]:
    """(N, C, H, W) with whole blocks of channels."""
    return (shape[0], -(-shape[1] // LANES) * LANES, *shape[2:])
