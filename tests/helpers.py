"""Tiny models, and the two checks that every operator's rules must pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from rectgrad_ref.forward import NumpyForward
from rectgrad_ref.graph import Graph, freeze
from rectgrad_ref.model import read_model
from rectgrad_ref.plan import make_plan
from rectgrad_ref.reference import constants_as, walk
from rectgrad_ref.rules.registry import OPERATORS, find_vjp

NEWEST = onnx.defs.onnx_opset_version()

# A small classifier, for what happens to whole files; its constants are W, V and b.
CONVOLUTIONAL = """(float[N, 3, 6, 6] x) => (float[N, 4] y) {
    c = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, W)
    r = Relu(c)
    p = MaxPool<kernel_shape = [2, 2]>(r)
    k = Constant<value_ints = [0, -1]>()
    f = Reshape(p, k)
    z = Gemm<transB = 1>(f, V, b)
    y = Softmax(z)
}"""

# Deterministic, and of this size because there are some seventy operators.
quick = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def model(
    text: str,
    *,
    opset: int = NEWEST,
    constants: Mapping[str, Any] | None = None,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model from the body of `onnx.parser`'s text: ``(float[N, 3] x) => (float[N, 2] y) {…}``.

    `constants` become initializers; `domains` are further operator sets that it imports.
    """
    imports = ", ".join([f'"" : {opset}', *(f'"{domain}" : 1' for domain in domains)])
    proto = parser.parse_model(f"<ir_version: 8, opset_import: [{imports}]> g {text}")
    for name, value in (constants or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return proto


def float32(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def spread(rng: np.random.Generator, *shape: int, low: float | None = None) -> np.ndarray:
    """Numbers around 0, or from `low` up, of which no two are close and none is close to 0."""
    n = int(np.prod(shape))
    step = min(0.1, 4 / max(n, 1))
    start = -n // 2 if low is None else 0
    values = (np.arange(start, start + n) + 0.5) * step + (0 if low is None else low)
    return rng.permutation(values).reshape(shape).astype(np.float32)


def shapes(low: int = 1, high: int = 4) -> st.SearchStrategy[list[int]]:
    """Of rank `low` to `high`."""
    return st.lists(st.integers(1, 4), min_size=low, max_size=high)


def generators() -> st.SearchStrategy[np.random.Generator]:
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def windows(draw: st.DrawFn, rank: int, *, pool: bool = False) -> dict[str, Any]:
    """Kernel, strides, dilations and, by one attribute or the other, padding.

    Of a `pool`, only such that onnxruntime accepts.
    """

    def each(low: int, high: int, n: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=n, max_size=n))

    window: dict[str, Any] = {
        "kernel_shape": each(1, 3),
        "strides": each(1, 3),
        "dilations": each(1, 2),
    }
    if draw(st.booleans()):
        most = [k - 1 if pool else 2 for k in window["kernel_shape"]]
        window["pads"] = [draw(st.integers(0, n)) for n in most * 2]
    else:
        window["auto_pad"] = draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]))
        window["dilations"] = [1] * rank  # onnxruntime has no others here
        if pool:
            window["strides"] = list(map(min, window["strides"], window["kernel_shape"]))
    return window


def reach(window: Mapping[str, Any]) -> list[int]:
    """How many cells the dilated kernel spans along each axis."""
    kernel, dilations = window["kernel_shape"], window["dilations"]
    return [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]


@dataclass(frozen=True)
class Case:
    """One node and what it is given.

    Attributes
    ----------
    op : str
    operands : tuple of numpy.ndarray or None
        By position. Those with a rule come from the image, the others are initializers; of an
        operator without rules, all come from the image.
    attributes : dict
    outputs : int
    opset : int
    constant : frozenset of int
        Positions that are initializers all the same.
    """

    op: str
    operands: tuple[np.ndarray | None, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = NEWEST
    constant: frozenset[int] = frozenset()

    @property
    def varied(self) -> tuple[int, ...]:
        """Positions of the operands that come from the image."""
        rules = OPERATORS[self.op].vjps
        return tuple(
            i
            for i, value in enumerate(self.operands)
            if value is not None
            and i not in self.constant
            and (not rules or find_vjp(self.op, i) is not None)
        )

    @property
    def image(self) -> np.ndarray:
        """The varied operands, flattened and joined: shape (1, n), float32."""
        flat = [np.ravel(self.operands[i]).astype(np.float32) for i in self.varied]
        return np.concatenate(flat)[None]

    def model(self) -> onnx.ModelProto:
        """image → operands → the node → all its outputs, flattened and joined."""
        nodes, initializers, names = [], [], [""] * len(self.operands)
        start = 0

        def constant(name: str, value: Any) -> str:
            initializers.append(numpy_helper.from_array(np.asarray(value), name))
            return name

        for i, value in enumerate(self.operands):
            if value is None:
                continue
            names[i] = f"operand{i}"
            if i not in self.varied:
                constant(names[i], value)
                continue
            where = constant(f"where{i}", np.arange(start, start + value.size))
            shape = constant(f"shape{i}", np.array(value.shape, np.int64))
            start += value.size
            nodes.append(helper.make_node("Gather", ["image", where], [f"part{i}"], axis=1))
            nodes.append(helper.make_node("Reshape", [f"part{i}", shape], [f"float{i}"]))
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            nodes.append(helper.make_node("Cast", [f"float{i}"], [names[i]], to=kind))
        outputs = [f"output{i}" for i in range(self.outputs)]
        while names and not names[-1]:
            names.pop()
        nodes.append(helper.make_node(self.op, names, outputs, name="node", **self.attributes))
        for output in outputs:
            to_float = helper.make_node("Cast", [output], [f"{output}_float"], to=TensorProto.FLOAT)
            nodes.append(to_float)
            nodes.append(
                helper.make_node("Flatten", [f"{output}_float"], [f"{output}_row"], axis=0)
            )
        rows = [f"{output}_row" for output in outputs]
        nodes.append(helper.make_node("Concat", rows, ["scores"], axis=1))
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, start])
        scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, None])
        graph = helper.make_graph(nodes, "case", [image], [scores], initializers)
        opset = helper.make_opsetid("", self.opset)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8)

    def graph(self) -> Graph:
        return freeze(read_model(self.model()), self.image.shape)


def backward(graph: Graph, x: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """The gradient of ⟨seed, logits⟩ at `x`, by ordinary backpropagation in float64."""
    plan = make_plan(graph, ())
    values = NumpyForward(np.float64)(graph, x, plan.exposes)
    return walk(plan, {**constants_as(graph.constants, seed.dtype), **values}, seed)


def gradient(case: Case) -> np.ndarray:
    """The gradient of the sum of the outputs, in the shape of the only varied operand."""
    graph = case.graph()
    found = backward(graph, case.image.astype(np.float64), np.ones(graph.shapes[graph.logits]))
    shapes = [np.shape(case.operands[i]) for i in case.varied]
    return found.reshape(shapes[0]) if len(shapes) == 1 else found


def check_vjp(case: Case, rng: np.random.Generator) -> None:
    """⟨uᵀJ, v⟩ = ⟨u, J v⟩ with J v from central differences in float64, for random u and v."""
    graph, x, h = case.graph(), case.image.astype(np.float64), 1e-6

    def scores(point: np.ndarray) -> np.ndarray:
        return NumpyForward(np.float64)(graph, point, [graph.logits])[graph.logits]

    u, v = rng.normal(size=scores(x).shape), rng.normal(size=x.shape)
    assume(u.size)  # nothing has no gradient, and is refused
    numeric = u * (scores(x + h * v) - scores(x - h * v)) / (2 * h)
    analytic = backward(graph, x, u) * v
    scale = max(np.abs(numeric).sum(), np.abs(analytic).sum(), 1e-3)
    assert abs(analytic.sum() - numeric.sum()) <= 1e-7 * scale


def run_elsewhere(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """The first output of the model in onnxruntime, without its graph optimisations.

    What onnxruntime has no kernel for runs in onnx's reference evaluator.
    """
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    feed = {proto.graph.input[0].name: x}
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        return np.asarray(ReferenceEvaluator(proto).run(None, feed)[0])
    return np.asarray(session.run(None, feed)[0])


def check_forward(case: Case) -> None:
    """NumPy's forward in float64 and float32 against onnxruntime."""
    expected = run_elsewhere(case.model(), case.image)
    graph = case.graph()
    for dtype in (np.float64, np.float32):
        found = NumpyForward(dtype)(graph, case.image, [graph.logits])[graph.logits]
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def rule_tests(cases: Mapping[str, st.SearchStrategy[Case]]) -> tuple[Any, Any]:
    """The tests of a family of operators: their gradients, and their values."""
    differentiable = [op for op in cases if OPERATORS[op].vjps]

    @pytest.mark.parametrize("op", differentiable)
    @quick
    @given(data=st.data(), rng=generators())
    def test_vjp(op: str, data: st.DataObject, rng: np.random.Generator) -> None:
        check_vjp(data.draw(cases[op]), rng)

    @pytest.mark.parametrize("op", cases)
    @quick
    @given(data=st.data())
    def test_forward(op: str, data: st.DataObject) -> None:
        check_forward(data.draw(cases[op]))

    return test_vjp, test_forward
