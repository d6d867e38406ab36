"""The `cuda` backend: onnxruntime forward, then the launches of a lowered plan, on one stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from math import prod
from threading import Lock
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..graph import Node
from ..kernels import cuda as k
from ..plan import Plan, Step
from ..reference import NOTHING, constants_as
from ..rules.declared import Call, Values
from .cpu import WeightStore, is_lowerable
from .cuda import (
    CLEARED,
    DTYPES,
    HostStep,
    Item,
    Launch,
    Product,
    Program,
    Scalar,
    Shared,
    Sheet,
    lower,
)
from .dense import axis_phases, exchanged, left_over
from .device import Device, DeviceArray, DeviceForward, Place, Session
from .runner import Observer, Runner, SeedOf, StepwiseRunner

# Whether a walk is recorded as a CUDA graph when it is first repeated (to be measured).
RECORD = False


class Products:
    """The dense transposes of one model's convolutions, each built when it is first needed."""

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


class Memory:
    """The arrays that launches name, as large as was ever asked for.

    Attributes
    ----------
    generation : int
        Changes when an array is another one.
    """

    def __init__(self, device: Device) -> None:
        self.device, self.generation = device, 0
        self.arrays: dict[str, DeviceArray] = {}
        self._weights: np.ndarray | None = None

    def fit(self, program: Program, weights: np.ndarray) -> None:
        """Make room for the program, and bring its weights.

        Raises
        ------
        OutOfMemory
        """
        if self._weights is not weights:
            self._replace("weights", max(weights.size, 1))
            if weights.size:
                self.device.upload(weights, self.arrays["weights"])
            self._weights = weights
        for name, size in program.sizes.items():
            if name not in self.arrays or self.arrays[name].size < size:
                self._replace(name, size)

    def _replace(self, name: str, size: int) -> None:
        self.generation += 1
        self.arrays.pop(name, None)  # before there is another
        self.arrays[name] = self.device.empty(size, DTYPES[name])
        if name in CLEARED:
            self.device.upload(np.zeros(size, DTYPES[name]), self.arrays[name])


class CudaBackend:
    """Makes runners that share one model's weights and memory."""

    def __init__(self, forward: DeviceForward) -> None:
        self.forward, self.device = forward, forward.device
        self.weights, self.memory = WeightStore(), Memory(forward.device)
        self.products = Products(forward.device)
        self.lock = Lock()

    def runner(self, plan: Plan) -> Runner:
        """Ready to run the plan; plans over other sample axes than 0 go step by step."""
        if not is_lowerable(plan):
            return StepwiseRunner(plan, self.forward)
        return CudaRunner(plan, self)


class CudaRunner:
    """One lowered plan."""

    def __init__(self, plan: Plan, backend: CudaBackend) -> None:
        self.plan, self.backend = plan, backend
        self._ready: dict[tuple[bool, bool], tuple[int, list[_Part]]] = {}

    @cached_property
    def lowered(self) -> Program:
        """What runs."""
        return lower(self.plan, self.backend.weights, trace=False)

    @cached_property
    def traced(self) -> Program:
        """What keeps the gradients at every activation."""
        return lower(self.plan, self.backend.weights, trace=True)

    @cached_property
    def constants(self) -> Values:
        """What steps of the reference read."""
        graph = self.plan.graph
        read = {v for step in self.plan.steps for v in step.reads} & graph.constants.keys()
        return constants_as({v: graph.constants[v] for v in read}, np.dtype(np.float32))

    def __call__(
        self,
        x: np.ndarray,
        seed_of: SeedOf,
        *,
        baseline: np.ndarray | None = None,
        observe: Observer | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        backend, graph, trace = self.backend, self.plan.graph, observe is not None
        with backend.lock:  # one memory, one stream
            program = self.traced if trace else self.lowered
            backend.memory.fit(program, backend.weights.array)
            layers = [s for s in self.plan.steps if s.node.name in self.plan.layers] * trace
            names = (graph.logits, *program.exposes, *(s.node.outputs[0] for s in layers))
            values = backend.forward(graph, x, names, self._places(program.active))
            shared, there = False, NOTHING
            if self.plan.contrasts:
                assert baseline is not None
                shared, there = self._contrast(program, baseline)
            scores = values[graph.logits].reshape(len(x), -1)
            walk = _Walk(program, backend.memory, {**self.constants, **values}, there)
            walk.plant(seed_of(scores))
            for part in self._parts(program, trace, shared):
                part(walk)
            for step in layers:
                assert observe is not None
                value = step.node.outputs[0]
                R_out, R_in = walk.gradient(value), walk.leaving(step)
                observe(step, values[value], R_out, R_in)
            return scores, walk.gradient(graph.input)

    def _places(self, offsets: dict[str, int], samples: int | None = None) -> dict[str, Place]:
        """Where the forward pass shall leave each activation."""
        places: dict[str, Place] = {}
        for value, offset in offsets.items():
            shape = self.plan.graph.shapes[value]
            assert shape is not None
            shape = shape if samples is None else (samples, *shape[1:])
            array = self.backend.memory.arrays["active"][offset : offset + prod(shape)]
            places[value] = (array, shape)
        return places

    def _contrast(self, program: Program, baseline: np.ndarray) -> tuple[bool, Values]:
        """The values at the baseline: computed once where all samples have the same."""
        graph, forward = self.plan.graph, self.backend.forward
        shared = len(baseline) > 1 and forward.any_batch and bool((baseline == baseline[:1]).all())
        baseline = baseline[:1] if shared else baseline
        places = self._places(program.baseline, len(baseline))
        found = forward(graph, baseline, program.exposes, places)
        read = {v: np.broadcast_to(found[v], graph.shapes[v] or ()) for v in program.exposes}
        return shared, {**self.constants, **read}

    def _parts(self, program: Program, trace: bool, shared: bool) -> list[_Part]:
        """What a call runs, ready to be run again as long as the memory is the same."""
        memory, key = self.backend.memory, (trace, shared)
        generation, parts = self._ready.get(key, (-1, []))
        if generation != memory.generation:
            parts = [self._part(items, shared) for items in _runs(program.items)]
            self._ready[key] = memory.generation, parts
        return parts

    def _part(self, items: list[Item], shared: bool) -> _Part:
        device, arrays = self.backend.device, self.backend.memory.arrays
        if isinstance(items[0], Launch):
            return _Launches(device, arrays, items, shared)
        (item,) = items
        if isinstance(item, Product):
            return lambda walk: self.backend.products(item, arrays["arena"])
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
        def given(argument: Scalar | str | Shared) -> Any:
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


class _Walk:
    """One walk back: its gradients in device memory."""

    def __init__(self, program: Program, memory: Memory, values: Values, baseline: Values) -> None:
        self.program, self.memory = program, memory
        self.values, self.baseline = values, baseline
        self.samples = program.plan.graph.batch

    def plant(self, seed: np.ndarray) -> None:
        """Put the gradient at the logits where it begins."""
        self._write(self.program.sheets[self.program.plan.graph.logits], seed)

    def gradient(self, value: str) -> np.ndarray:
        """R of a value whose sheet is still its own, in the value's shape."""
        return self._array(self.program.sheets[value], value)

    def leaving(self, step: Step) -> np.ndarray:
        """R_in of a traced activation."""
        return self._array(self.program.leaving[step.node.name], step.node.inputs[0])

    def _array(self, sheet: Sheet, value: str) -> np.ndarray:
        shape = self.program.plan.graph.shapes[value]
        assert shape is not None
        rows = self._rows(sheet)[1][:, sheet.first : sheet.first + sheet.units]
        return np.ascontiguousarray(rows).reshape(shape)

    def reference(self, item: HostStep) -> None:
        """A step that has no kernel, by its rule."""
        step, sheets = item.step, self.program.sheets
        node, shapes = step.node, self.program.plan.graph.shapes
        R = tuple(
            self.gradient(v) if v in sheets else np.zeros(shapes[v] or (), np.float32)
            for v in node.outputs
            if v
        )
        for position, (sheet, adds) in zip(step.positions, item.targets, strict=True):
            call = Call(node, position, R, self.values, self.baseline, self.samples)
            self._write(sheet, step.rule(call), adds)

    def _rows(self, sheet: Sheet) -> tuple[DeviceArray, np.ndarray]:
        """All of a sheet's storage, on the device and on the host."""
        floats = _whole(self.memory.arrays["arena"], sheet, self.samples)
        rows = self.memory.device.download(floats)
        return floats, rows.reshape(self.samples, sheet.storage.stride)

    def _write(self, sheet: Sheet, values: np.ndarray, adds: int = 0) -> None:
        values = np.asarray(values, np.float32).reshape(self.samples, sheet.units)
        floats = _whole(self.memory.arrays["arena"], sheet, self.samples)
        if adds or not sheet.is_whole:
            floats, rows = self._rows(sheet)
            part = rows[:, sheet.first : sheet.first + sheet.units]
            part[...] = part + values if adds else values
            values = rows
        self.memory.device.upload(values.ravel(), floats)
