"""An ONNX file, bytes or ModelProto → one self-contained ModelProto, with its name and hash.

Nothing is interpreted here: weights in external files are brought in, functions are inlined, and
what cannot be an ONNX classifier is refused. The graph begins in `graph.py`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper, shape_inference

from .errors import InvalidModel

ModelSource: TypeAlias = "str | os.PathLike[str] | bytes | onnx.ModelProto"

# What onnx, protobuf and NumPy raise where a file is damaged.
DAMAGE = (
    onnx.checker.ValidationError, shape_inference.InferenceError, RuntimeError, ValueError,
    TypeError, LookupError, ArithmeticError, MemoryError,
)  # fmt: skip

OLDEST_OPSET = 7  # the first with NumPy broadcasting, on which every rule relies
# Nodes of functions and loops written out: a few that call each other could be any number.
MOST_WRITTEN = 30_000
_MOST_SHARED = 16  # weights that lie in one place of an external file, on average
_MOST_DENSE = 2**27  # cells of a sparse tensor, which a file of a few bytes can have


@dataclass(frozen=True)
class Model:
    """A model whose weights are all in memory.

    Attributes
    ----------
    proto : onnx.ModelProto
        With external data loaded and model-local functions inlined.
    name : str
        What error messages call it: the path as given, or ``<bytes>``, ``<ModelProto>``.
    path : Path or None
        The file that it came from.
    opset : int
        Version of the default operator domain.
    """

    proto: onnx.ModelProto
    name: str
    path: Path | None
    opset: int

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the model: of the file's bytes, or of the serialised ModelProto."""
        data = self.path.read_bytes() if self.path else self.proto.SerializeToString()
        return hashlib.sha256(data).hexdigest()

    @cached_property
    def initializers(self) -> dict[str, np.ndarray]:
        """The weights by name, sparse ones made dense; shared by every graph of the model.

        Raises
        ------
        InvalidModel
            A tensor's data do not fit its shape or type.
        """
        graph, name = self.proto.graph, ""
        values = {}
        try:
            for tensor in graph.initializer:
                name = tensor.name
                values[name] = numpy_helper.to_array(tensor)
            for sparse in graph.sparse_initializer:
                name = sparse.values.name
                values[name] = _dense(sparse)
        except DAMAGE as error:
            raise InvalidModel(
                f"{self.name}: the initializer {name!r} is damaged: {error}"
            ) from error
        return values

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The model's ``metadata_props``."""
        return {entry.key: entry.value for entry in self.proto.metadata_props}


def read_model(source: ModelSource) -> Model:
    """Read a model.

    Parameters
    ----------
    source : path, bytes or onnx.ModelProto

    Raises
    ------
    InvalidModel
        Not an ONNX file, truncated, without nodes, an opset below 7 or above what the installed
        onnx knows, or external data that is missing or lies outside the model's folder.
    """
    proto, name, path = _parse(source)
    if not proto.graph.node:
        raise InvalidModel(f"{name} is not an ONNX model: it has no nodes")
    opset = _opset(proto, name)
    _load_external_data(proto, name, path.parent if path else None)
    if proto.functions:
        proto = _inlined(proto, name)
    _require_text(proto.graph, name)
    for node in proto.graph.node:
        if node.domain == "ai.onnx":  # the default domain's other name
            node.domain = ""
    return Model(proto, name, path, opset)


def _parse(source: ModelSource) -> tuple[onnx.ModelProto, str, Path | None]:
    if isinstance(source, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(source)
        return copy, "<ModelProto>", None
    if isinstance(source, bytes):
        return _decode(source, "<bytes>"), "<bytes>", None
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"model must be a path, bytes or ModelProto, got {type(source).__name__}")
    path = Path(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidModel(f"cannot read {path}: {error.strerror}") from error
    return _decode(data, str(path)), str(path), path


def _decode(data: bytes, name: str) -> onnx.ModelProto:
    from google.protobuf.message import DecodeError

    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise InvalidModel(
            f"{name} is not an ONNX model, or is truncated ({len(data)} bytes read): {error}"
        ) from error
    return proto


def _inlined(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    from onnx.inliner import inline_local_functions

    try:
        count = _nodes_when_inlined(proto)
        if count > MOST_WRITTEN:
            raise ValueError(f"that would be {count} nodes; up to {MOST_WRITTEN} are supported")
        return inline_local_functions(proto, convert_version=True)
    except DAMAGE as error:
        raise InvalidModel(f"{name}: its functions cannot be written out: {error}") from error


def _nodes_when_inlined(proto: onnx.ModelProto) -> int:
    """How many nodes the graph has with its functions written out, each of which may call others.

    Raises
    ------
    graphlib.CycleError
        They call each other in a circle.
    """
    called = {
        (f.domain, f.name, f.overload): [(n.domain, n.op_type, n.overload) for n in _nodes(f)]
        for f in proto.functions
    }
    counts: dict[tuple[str, str, str], int] = {}
    order = TopologicalSorter({f: called.keys() & calls for f, calls in called.items()})
    for function in order.static_order():
        counts[function] = sum(counts.get(call, 1) for call in called[function])
    return sum(counts.get((n.domain, n.op_type, n.overload), 1) for n in _nodes(proto.graph))


def _nodes(body: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Those of sub-graphs too."""
    for node in body.node:
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                yield from _nodes(graph)


def _require_text(graph: onnx.GraphProto, name: str) -> None:
    """Names that are no UTF-8, which protobuf hands over as bytes, are refused."""
    values = [part.name for part in (*graph.input, *graph.output, *graph.initializer)]
    for node in graph.node:
        values += [node.op_type, node.domain, node.name, *node.input, *node.output]
    damaged = next((value for value in values if not isinstance(value, str)), None)
    if damaged is not None:
        raise InvalidModel(f"{name}: the name {damaged!r} is not UTF-8")


def _opset(proto: onnx.ModelProto, name: str) -> int:
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    if not versions:
        raise InvalidModel(f"{name} imports no version of the default ONNX operator set")
    if not OLDEST_OPSET <= versions[0] <= newest:
        raise InvalidModel(
            f"{name} uses opset {versions[0]}; supported are {OLDEST_OPSET} to {newest} "
            f"(the newest of onnx {onnx.__version__}). Convert it with onnx.version_converter."
        )
    return versions[0]


def _load_external_data(proto: onnx.ModelProto, name: str, folder: Path | None) -> None:
    """Bring weights stored beside the model into it, never following a path out of its folder."""
    from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor

    sizes: dict[Path, int] = {}
    loaded = 0
    for tensor in all_tensors(proto):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        try:
            info = ExternalDataInfo(tensor)
            file = ((folder or Path()) / info.location).resolve()
            size = file.stat().st_size if file.is_file() else None
        except (ValueError, TypeError, OSError) as error:
            raise InvalidModel(
                f"{name}: the external data of {tensor.name!r} is not well described: {error}"
            ) from error
        if folder is None:
            raise InvalidModel(
                f"{name}: the weights {tensor.name!r} lie in the external file {info.location!r}, "
                "which only a model given by its path can have"
            )
        if not file.is_relative_to(folder.resolve()):
            raise InvalidModel(
                f"{name}: the external data of {tensor.name!r} points outside the model's folder "
                f"({info.location!r})"
            )
        if size is None:
            raise InvalidModel(
                f"{name}: the external data file {info.location!r} of {tensor.name!r} is missing"
            )
        end = (info.offset or 0) + (info.length or 0)
        if end > size:
            raise InvalidModel(
                f"{name}: the external data file {info.location!r} is truncated: {tensor.name!r} "
                f"ends at byte {end}, the file at {size}"
            )
        sizes[file] = size
        loaded += info.length or size
        if loaded > _MOST_SHARED * sum(sizes.values()):
            raise InvalidModel(
                f"{name}: its weights take {loaded} bytes and more, because many lie in the same "
                f"place of {info.location!r}"
            )
        try:
            load_external_data_for_tensor(tensor, str(folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise InvalidModel(
                f"{name}: cannot read the external data of {tensor.name!r}: {error}"
            ) from error
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers and attributes, also of functions and sub-graphs."""
    yield from _tensors(proto.graph)
    for function in proto.functions:
        yield from _tensors(function)


def _tensors(body: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    sparse = []
    if isinstance(body, onnx.GraphProto):
        yield from body.initializer
        sparse += body.sparse_initializer
    for node in body.node:
        for attribute in node.attribute:
            yield from [attribute.t, *attribute.tensors]
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
            for graph in [attribute.g, *attribute.graphs]:
                yield from _tensors(graph)
    for tensor in sparse:
        yield from [tensor.values, tensor.indices]


def _dense(sparse: onnx.SparseTensorProto) -> np.ndarray:
    shape = tuple(sparse.dims)
    if math.prod(shape) > _MOST_DENSE:
        raise ValueError(f"its shape is {shape}; up to {_MOST_DENSE} cells are supported")
    values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(shape, values.dtype)
    index = np.unravel_index(places, shape) if places.ndim == 1 else tuple(places.T)
    dense[index] = values
    return dense
