"""The `cuda` backend: onnxruntime forward, then the launches of a lowered plan, on one stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from threading import Lock
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..graph import Node
from ..kernels import cuda as k
from ..plan import Plan
from .cuda import (
    CLEARED,
    DTYPES,
    Argument,
    HostStep,
    Item,
    Launch,
    LaunchLowering,
    Product,
    Program,
    Shared,
    Sheet,
)
from .dense import axis_phases, exchanged, left_over
from .device import Device, DeviceArray, DeviceForward, Place, Session
from .lowered import Chunk, LoweredBackend, LoweredRunner, ProgramMemory, Walk, by_image_size
from .runner import Observer

# Whether a walk is recorded as a CUDA graph when it is first repeated (to be measured).
RECORD = False


class Products:
    """The dense transposes of one model's convolutions at one size of the image, made on demand."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._sessions: dict[str, Session] = {}

    def __call__(self, product: Product, arena: DeviceArray) -> None:
        node = product.node
        if node.outputs[0] not in self._sessions:
            self._sessions[node.outputs[0]] = Session(self._device, transposed(node))
        source, target = (
            (_whole(arena, sheet, shape[0]), shape)
            for sheet, shape in (
                (product.source, node.output_shapes[0]),
                (product.target, node.input_shapes[0]),
            )
        )
        self._sessions[node.outputs[0]]({"R": source}, {"result": target})


def _whole(arena: DeviceArray, sheet: Sheet, samples: int) -> DeviceArray:
    begin = sheet.storage.offset
    return arena[begin : begin + samples * sheet.storage.stride]


def transposed(node: Node) -> bytes:
    """A Conv's transpose as an ONNX model, from ``R`` to ``result``.

    With stride 1 it is a convolution with the kernel turned round and its channels exchanged, of
    which the vendor's library has deterministic versions.
    """
    weights = node.constants[1]
    assert weights is not None
    weights = weights.astype(np.float32, copy=False)
    attributes: dict[str, Any] = {"group": node["group"], "dilations": list(node["dilations"])}
    phases = [axis_phases(node, axis)[0] for axis in range(2)]
    if all(s == 1 for s in node["strides"]) and all(min(p.pads) >= 0 for p in phases):
        y, x = phases
        attributes["pads"] = [y.pads[0], x.pads[0], y.pads[1], x.pads[1]]
        turned = exchanged(weights[:, :, y.taps][..., x.taps], node["group"])
        return _model([helper.make_node("Conv", ["R", "W"], ["result"], **attributes)], W=turned)
    attributes["strides"] = list(node["strides"])
    attributes["output_padding"] = left_over(node)
    whole = helper.make_node("ConvTranspose", ["R", "W"], ["whole"], **attributes)
    # The pads may differ at both ends, which not every version of the operator can do.
    pads, extents = node["pads"], node.input_shapes[0][2:]
    crop = helper.make_node("Slice", ["whole", "begins", "ends", "axes"], ["result"])
    begins = np.array(pads[:2], np.int64)
    ends = begins + np.array(extents, np.int64)
    axes = np.array([2, 3], np.int64)
    return _model([whole, crop], W=weights, begins=begins, ends=ends, axes=axes)


def _model(nodes: list[onnx.NodeProto], **constants: np.ndarray) -> bytes:
    declared = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("R", "result")
    ]
    initializers = [
        numpy_helper.from_array(np.ascontiguousarray(value), name)
        for name, value in constants.items()
    ]
    graph = helper.make_graph(nodes, "transpose", declared[:1], declared[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()


class Memory(ProgramMemory):
    """The arrays that launches name, as large as was ever asked for.

    Attributes
    ----------
    generation : int
        Changes when an array is another one.
    """

    def __init__(self, device: Device) -> None:
        self.device, self.generation = device, 0
        self.arrays: dict[str, DeviceArray] = {}

    def grow(self, program: Program) -> None:
        """Make room for the program, and bring its weights.

        Raises
        ------
        OutOfMemory
        """
        for name, size in program.sizes.items():
            if name in self.arrays and self.arrays[name].size >= size:
                continue
            self.generation += 1
            self.arrays.pop(name, None)  # before there is another
            self.arrays[name] = self.device.empty(size, DTYPES[name])
            if name in CLEARED:
                self.device.upload(np.zeros(size, DTYPES[name]), self.arrays[name])
            elif name == "weights" and program.weights.size:  # more begin with those of before
                self.device.upload(program.weights, self.arrays[name])

    def place(self, offset: int, shape: tuple[int, ...]) -> Place:
        """Where the forward pass shall leave an activation."""
        return self.arrays["active"][offset : offset + prod(shape)], shape


class CudaBackend(LoweredBackend[Program, Memory]):
    """Makes runners that share one model's weights and memory."""

    def __init__(self, forward: DeviceForward) -> None:
        super().__init__(forward, LaunchLowering)
        self.device, self.memory = forward.device, Memory(forward.device)
        self.products = by_image_size(lambda: Products(forward.device))
        self._lock = Lock()

    def _runner(self, plan: Plan) -> CudaRunner:
        return CudaRunner(plan, self)

    @contextmanager
    def lent(self, program: Program) -> Iterator[Memory]:
        with self._lock:  # one memory, one stream
            self.memory.fit(program)
            yield self.memory


_Chunk = Chunk[Program, Memory]


class CudaRunner(LoweredRunner[Program, Memory]):
    """One lowered plan."""

    backend: CudaBackend

    def __init__(self, plan: Plan, backend: CudaBackend) -> None:
        super().__init__(plan, backend)
        self._ready: dict[tuple[bool, bool], tuple[int, list[_Part]]] = {}

    def walk_back(self, chunk: _Chunk, seed: np.ndarray, observe: Observer | None) -> np.ndarray:
        walk = _Walk(chunk)
        walk.plant(seed)
        for part in self._parts(chunk, observe is not None):
            part(walk)
        return walk.result(observe)

    def _parts(self, chunk: _Chunk, trace: bool) -> list[_Part]:
        """What a call runs, ready to be run again as long as the memory is the same."""
        memory, key = chunk.memory, (trace, chunk.shares)
        generation, parts = self._ready.get(key, (-1, []))
        if generation != memory.generation:
            parts = [self._part(items, chunk.shares) for items in _runs(chunk.program.items)]
            self._ready[key] = memory.generation, parts
        return parts

    def _part(self, items: list[Item], shared: bool) -> _Part:
        device, arrays = self.backend.device, self.backend.memory.arrays
        if isinstance(items[0], Launch):
            return _Launches(device, arrays, items, shared)
        (item,) = items
        if isinstance(item, Product):
            graph = self.plan.graph
            return lambda walk: self.backend.products(graph)(item, arrays["arena"])
        assert isinstance(item, HostStep)
        return lambda walk: walk.reference(item)


def _runs(items: Iterable[Item]) -> list[list[Item]]:
    """Launches that follow each other together, everything else alone."""
    result: list[list[Item]] = []
    for item in items:
        if isinstance(item, Launch) and result and isinstance(result[-1][-1], Launch):
            result[-1].append(item)
        else:
            result.append([item])
    return result


class _Launches:
    """Launches that follow each other, with all that they are given."""

    def __init__(
        self, device: Device, arrays: dict[str, DeviceArray], items: list[Item], shared: bool
    ) -> None:
        def given(argument: Argument) -> Any:
            if isinstance(argument, Shared):
                return 0 if shared else argument.units
            return arrays[argument] if isinstance(argument, str) else argument

        self._device, self._calls = device, 0
        self._recorded: Callable[[], None] | None = None
        self._launches = [
            (getattr(k, item.kernel), item.blocks, item.threads, tuple(map(given, item.arguments)))
            for item in items
            if isinstance(item, Launch)
        ]

    def __call__(self, walk: _Walk) -> None:
        if RECORD and self._calls == 1:  # the first call has compiled every kernel
            self._recorded = self._device.recorded(self._launch)
        self._calls += 1
        (self._recorded or self._launch)()

    def _launch(self) -> None:
        for kernel, blocks, threads, arguments in self._launches:
            kernel[blocks, threads, self._device.stream](*arguments)


_Part = Callable[["_Walk"], None]


class _Walk(Walk[Program, Memory]):
    """One walk back: its gradients in device memory."""

    def plant(self, seed: np.ndarray) -> None:
        """Put the gradient at the logits where it begins."""
        self._write(self.program.sheets[self.program.plan.graph.logits], seed, 0)

    def reference(self, item: HostStep) -> None:
        """A step that has no kernel, by its rule."""
        for (sheet, adds), R in zip(item.targets, self.by_rule(item.step), strict=True):
            self._write(sheet, R, adds)

    def array(self, sheet: Sheet, shape: tuple[int, ...]) -> np.ndarray:
        rows = self._rows(sheet)[1][:, sheet.first : sheet.first + sheet.units]
        return np.ascontiguousarray(rows).reshape(shape)

    def _rows(self, sheet: Sheet) -> tuple[DeviceArray, np.ndarray]:
        """All of a sheet's storage, on the device and on the host."""
        memory, samples = self.chunk.memory, self.program.plan.graph.batch
        floats = _whole(memory.arrays["arena"], sheet, samples)
        return floats, memory.device.download(floats).reshape(samples, sheet.storage.stride)

    def _write(self, sheet: Sheet, values: np.ndarray, adds: int) -> None:
        memory, samples = self.chunk.memory, self.program.plan.graph.batch
        values = np.asarray(values, np.float32).reshape(samples, sheet.units)
        floats = _whole(memory.arrays["arena"], sheet, samples)
        if adds or not sheet.is_whole:
            floats, rows = self._rows(sheet)
            part = rows[:, sheet.first : sheet.first + sheet.units]
            part[...] = part + values if adds else values
            values = rows
        memory.device.upload(values.ravel(), floats)
