"""The forward pass: x → the logits and exactly the values that a plan reads.

Two programs do it: NumPy, in float64 or float32, node by node through the operator table; and
onnxruntime, which runs the user's own model with those values as additional outputs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx
from google.protobuf.message import EncodeError
from onnx import helper

from .errors import BackendUnavailable, InvalidModel, UnsupportedOperator
from .expand import key
from .graph import Graph, Node, input_spec
from .model import Model
from .reference import constant_as
from .rules import OPERATORS


class Forward(Protocol):
    """Anything that computes named values of a model."""

    dtype: np.dtype[Any]
    description: str

    def __call__(self, graph: Graph, x: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The values called `names`, for inputs of the graph's own batch size."""
        ...


class NumpyForward:
    """The operator table, node by node.

    Parameters
    ----------
    dtype : numpy.dtype
        float64 or float32, of every floating-point value.
    """

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.description = f"NumPy {self.dtype.name}"

    def __call__(self, graph: Graph, x: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        needed = _ancestors(graph, names)
        readers = Counter(v for node in needed for v in node.inputs)
        readers.update(names)
        values: dict[str, np.ndarray] = {graph.input: self._typed(x)}
        for node in needed:
            arguments = [self._read(graph, values, v) if v else None for v in node.inputs]
            result = _forward_of(graph, node)(node, *arguments)
            outputs = result if isinstance(result, tuple) else (result,)
            values.update(zip(node.outputs, map(self._typed, outputs), strict=False))
            for value in node.inputs:
                readers[value] -= 1
                if not readers[value]:
                    values.pop(value, None)
        return {name: self._read(graph, values, name) for name in names}

    def _read(self, graph: Graph, values: dict[str, np.ndarray], name: str) -> np.ndarray:
        return values[name] if name in values else constant_as(graph.constants[name], self.dtype)

    def _typed(self, value: np.ndarray) -> np.ndarray:
        is_float = np.issubdtype(value.dtype, np.floating)
        return value.astype(self.dtype, copy=False) if is_float else value


def _ancestors(graph: Graph, names: Sequence[str]) -> list[Node]:
    """The nodes that `names` depend on, in graph order."""
    wanted = set(names)
    nodes = []
    for node in reversed(graph.nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            nodes.append(node)
    return nodes[::-1]


def _forward_of(graph: Graph, node: Node) -> Any:
    if node.op not in OPERATORS:
        raise UnsupportedOperator(
            f"{node} ({graph.model.name}): the reference backend has no forward rule for it"
        )
    return OPERATORS[node.op].forward


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that onnxruntime has loaded.

    Attributes
    ----------
    runs : onnxruntime.InferenceSession
    blocked : mapping of str to str
        Values that are written in onnxruntime's own layout → what it calls them.
    weights : numpy.ndarray, optional
        Memory that it reads.
    """

    runs: Any
    blocked: Mapping[str, str] = field(default_factory=dict)
    weights: np.ndarray | None = None


class Places(dict[str, Any]):
    """Where values shall be written, by name.

    To tell onnxruntime of many takes a millisecond, so it is done once for as long as they are the
    same object. They serve one call at a time.

    Attributes
    ----------
    session : LoadedModel, optional
        What wrote there last.
    """

    session: LoadedModel | None = None
    _binding: Any = None

    def bound(self, session: LoadedModel, bind: Callable[[Any, str, Any], None]) -> Any:
        """onnxruntime's binding of a session's outputs to these places."""
        if self.session is not session:
            binding = session.runs.io_binding()
            for name, place in self.items():
                bind(binding, name, place)
            self.session, self._binding = session, binding
        return self._binding


class OnnxruntimeForward:
    """The user's model in onnxruntime, in float32, one session for each set of exposed values.

    Parameters
    ----------
    model : Model
    input : str
        Name of the image input.
    rebatch : bool
        Whether to make the declared batch extent symbolic.
    providers : sequence of str or (str, dict)
        onnxruntime's execution providers, in order of preference, with their options.
    threads : int or None
        Intra-op threads; None leaves the choice to onnxruntime.

    Attributes
    ----------
    any_batch : bool
        Whether it takes other numbers of samples than the graph's.

    Raises
    ------
    BackendUnavailable
        onnxruntime or a provider is not installed.
    """

    def __init__(
        self,
        model: Model,
        input: str,
        *,
        rebatch: bool,
        providers: Sequence[str | tuple[str, dict[str, str]]] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        self.dtype = np.dtype(np.float32)
        self._runtime = import_onnxruntime()
        self._model, self._input, self._rebatch = model, input, rebatch
        spec = input_spec(model, input)
        self._input_dtype = spec.dtype
        self.any_batch = rebatch or spec.shape[:1] == (None,)
        self._providers, self._threads = list(providers), threads
        self._sessions: dict[tuple[Any, ...], LoadedModel] = {}
        available = self._runtime.get_available_providers()
        names = [p if isinstance(p, str) else p[0] for p in providers]
        for provider in names:
            if provider not in available:
                raise BackendUnavailable(
                    f"onnxruntime has no {provider} here, only {', '.join(available)}. "
                    "For NVIDIA GPUs: pip uninstall onnxruntime; pip install 'rectgrad-ref[gpu]'"
                )
        self.description = f"onnxruntime {self._runtime.__version__} ({', '.join(names)})"

    def __call__(
        self,
        graph: Graph,
        x: np.ndarray,
        names: Sequence[str],
        into: Places | None = None,
    ) -> dict[str, np.ndarray]:
        """The values called `names`; those of `into` are written there.

        Parameters
        ----------
        into : Places, optional
            float32 arrays to be filled, in what order is a subclass's affair.
        """
        asked = tuple(name for name in dict.fromkeys(names) if name != graph.input)
        places = Places() if into is None else into
        session = self._session(graph, asked, tuple(places))
        feed = np.ascontiguousarray(x.astype(self._input_dtype, copy=False))

        def bind(binding: Any, name: str, place: Any) -> None:
            shape = (len(x), *(graph.shapes[name] or ())[1:])
            self._bind(binding, session, graph, name, shape, place)

        try:
            binding = places.bound(session, bind)
            binding.bind_cpu_input(graph.input, feed)
            for name in asked:
                binding.bind_output(name)
            session.runs.run_with_iobinding(binding)
            outputs = binding.get_outputs_as_ortvaluevector()
            arrays = [outputs[len(places) + i].numpy() for i in range(len(asked))]
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise InvalidModel(f"{graph.model.name}: onnxruntime failed: {error}") from error
        values = dict(zip(asked, map(self._typed, arrays), strict=True))
        values[graph.input] = x
        return {name: values[name] for name in names}

    def _typed(self, value: np.ndarray) -> np.ndarray:
        is_float = np.issubdtype(value.dtype, np.floating)
        return value.astype(self.dtype, copy=False) if is_float else value

    def _bind(
        self,
        binding: Any,
        session: LoadedModel,
        graph: Graph,
        name: str,
        shape: tuple[int, ...],
        place: Any,
    ) -> None:
        """Have a value of this shape written to its place."""
        raise NotImplementedError

    def _written(self, graph: Graph, name: str) -> tuple[list[onnx.NodeProto], str]:
        """Nodes that make of the value what places want, and the name of their result."""
        if graph.dtypes[name] == np.float32:
            return [], name
        cast = helper.make_node("Cast", [name], [f"{name}/float32"], to=onnx.TensorProto.FLOAT)
        return [cast], cast.output[0]

    def _session(
        self, graph: Graph, names: tuple[str, ...], placed: tuple[str, ...]
    ) -> LoadedModel:
        # The threads of a session do not survive a fork; the child makes its own.
        which = (os.getpid(), names, placed, graph.batch if graph.bodies else None)
        if which not in self._sessions:
            try:
                data = self._exposed(graph, names, placed)
            except EncodeError as error:
                raise InvalidModel(
                    f"{self._model.name} has more than 2 GB, which onnxruntime cannot be handed at "
                    "once; backend='reference' runs without it, and so do exported explainers"
                ) from error
            try:
                self._sessions[which] = self._loaded(data, graph, placed)
            except Exception as error:
                raise InvalidModel(
                    f"onnxruntime {self._runtime.__version__} refuses {self._model.name}: {error}. "
                    "backend='reference' runs without it."
                ) from error
        return self._sessions[which]

    def _loaded(self, data: bytes, graph: Graph, placed: tuple[str, ...]) -> LoadedModel:
        """A session of the model that writes the values `placed` to places."""
        return LoadedModel(self._inference(data, self._options()))

    def _inference(self, data: bytes, options: Any) -> Any:
        return self._runtime.InferenceSession(data, options, providers=self._providers)

    def _options(self) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        # Threads that spin on after a run would take the processors from the walk back.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Planned memory would be held beside what the first run took, which serves as well.
        options.enable_mem_pattern = False
        # Each exposed value is brought into its order right after it was computed, while it
        # is in the cache; by default, that comes last, and there are two copies of everything.
        options.execution_order = self._runtime.ExecutionOrder.PRIORITY_BASED
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        return options

    def _exposed(self, graph: Graph, names: tuple[str, ...], placed: tuple[str, ...]) -> bytes:
        """The model with these values as its only outputs, those of `placed` as places want."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self._model.proto)
        # Declared shapes may state the batch size of the export, and decide nothing.
        del proto.graph.value_info[:]
        del proto.graph.output[:]
        if graph.bodies:
            nodes = list(with_bodies(proto.graph.node, graph.bodies, names + placed))
            del proto.graph.node[:]
            proto.graph.node.extend(nodes)
        for name in names:
            kind = helper.np_dtype_to_tensor_dtype(graph.dtypes[name])
            proto.graph.output.append(helper.make_tensor_value_info(name, kind, None))
        for name in placed:
            added, result = self._written(graph, name)
            proto.graph.node.extend(added)
            value = helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, None)
            proto.graph.output.append(value)
        if self._rebatch:
            for value in proto.graph.input:
                if value.name == self._input:
                    value.type.tensor_type.shape.dim[0].dim_param = "N"
        return proto.SerializeToString()


def with_bodies(
    nodes: Iterable[onnx.NodeProto],
    bodies: Mapping[str, tuple[onnx.NodeProto, ...]],
    names: tuple[str, ...],
) -> Iterator[onnx.NodeProto]:
    """The nodes, those replaced by their bodies in which one of the values `names` is computed."""
    for node in nodes:
        first = key(node)
        if first in bodies and any(name.startswith(f"{first}/") for name in names):
            yield from bodies[first]
        else:
            yield node


def import_onnxruntime() -> Any:
    """onnxruntime, or an error that says what to install.

    Raises
    ------
    BackendUnavailable
        It is missing, or its CPU and GPU packages are both installed and overwrite each other.
    """
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> bool:
        try:
            version(package)
        except PackageNotFoundError:
            return False
        return True

    if installed("onnxruntime") and installed("onnxruntime-gpu"):
        raise BackendUnavailable(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. "
            "Remedy: pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you need"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            f"onnxruntime cannot be imported ({error}). Install it with "
            "pip install 'rectgrad-ref[cpu]', or use backend='reference'"
        ) from error
    return onnxruntime
