"""The compiled walk back against the reference, step by step on the same float32 numbers.

Small networks run with NumPy's forward pass (`Shared`), so that only the walk back is in question;
published ones with onnxruntime's.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import model

from rectgrad_ref import Explainer
from rectgrad_ref.errors import InvalidImage
from rectgrad_ref.executors import compiled
from rectgrad_ref.executors import cpu as lowering
from rectgrad_ref.executors.compiled import CompiledBackend, CompiledRunner
from rectgrad_ref.executors.crew import Crew
from rectgrad_ref.executors.runner import StepwiseRunner
from rectgrad_ref.forward import NumpyForward, OnnxruntimeForward
from rectgrad_ref.graph import Graph, freeze, input_spec
from rectgrad_ref.images import prepare
from rectgrad_ref.methods import Method, make_method
from rectgrad_ref.model import read_model
from rectgrad_ref.plan import Plan, Step, make_plan
from rectgrad_ref.reference import constants_as
from rectgrad_ref.rules import OPERATORS
from rectgrad_ref.rules.declared import Call

pytest.importorskip("onnxruntime")

Array = np.ndarray
THREADS = (1, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def threads_for_small_networks() -> Iterator[None]:
    """These networks are so small that their walks would wake nobody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_WAKING", 0)
        yield


# --- networks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """A network as text, the shape of an image, and the shapes of its weights.

    Weights are normal numbers, divided by √fan-in where they have more than one axis; those called
    ``v…`` are positive. What is given as an array is taken as it is.
    """

    image: tuple[int, ...]
    body: str
    weights: Mapping[str, Any]
    scores: str = "K"
    batch: int | str = "N"

    def onnx(self) -> onnx.ModelProto:
        shape = ", ".join(map(str, (self.batch, *self.image)))
        rng = np.random.default_rng(len(self.body))
        constants = {
            name: value if isinstance(value, np.ndarray) else _weight(rng, name, value)
            for name, value in self.weights.items()
        }
        text = f"(float[{shape}] x) => (float[{self.batch}, {self.scores}] y) {{{self.body}}}"
        return model(text, constants=constants)

    def images(self, n: int, seed: int = 0) -> Array:
        return np.random.default_rng(seed).standard_normal((n, *self.image)).astype(np.float32)


def _weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    values = rng.standard_normal(shape) / np.sqrt(prod(shape[1:]))
    return (np.abs(values) + 0.1 if name.startswith("v") else values).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


NETS = {
    "residual, batch norm": Net(
        (3, 8, 8),
        """
        c1 = Conv<pads=[1,1,1,1]>(x, w1)
        n1 = BatchNormalization<epsilon=0.001>(c1, s1, b1, m1, v1)
        r1 = Relu(n1)
        c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2)
        n2 = BatchNormalization(c2, s2, b2, m2, v2)
        a1 = Add(n2, r1)
        r2 = Relu(a1)
        c3 = Conv<strides=[2,2], pads=[1,1,1,1]>(r2, w3)
        c4 = Conv<strides=[2,2]>(r2, w4)
        a2 = Add(c4, c3)
        r3 = Relu(a2)
        p = GlobalAveragePool(r3)
        f = Flatten(p)
        y = Gemm<transB=1, alpha=0.5>(f, w5, b5)
        """,
        {
            "w1": (6, 3, 3, 3), "s1": (6,), "b1": (6,), "m1": (6,), "v1": (6,),
            "w2": (6, 6, 3, 3), "b2": (6,), "s2": (6,), "m2": (6,), "v2": (6,),
            "w3": (10, 6, 3, 3), "w4": (10, 6, 1, 1), "w5": (5, 10), "b5": (5,),
        },
    ),
    "concatenations": Net(
        (3, 9, 9),
        """
        c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
        r1 = Relu(c1)
        c2 = Conv(r1, w2, b2)
        r2 = Relu(c2)
        c3 = Conv<pads=[0,1,2,1]>(r1, w3, b3)
        r3 = Relu(c3)
        k1 = Concat<axis=1>(r2, r3)
        c4 = Conv<pads=[1,1,1,1]>(k1, w4, b4)
        r4 = Relu(c4)
        k2 = Concat<axis=-3>(k1, r4, r2)
        p2 = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(k2)
        p3 = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(k1)
        k3 = Concat<axis=1>(p2, p3)
        c5 = Conv(k3, w5, b5)
        r5 = Relu(c5)
        p = GlobalAveragePool(r5)
        y = Flatten(p)
        """,
        {
            "w1": (5, 3, 3, 3), "b1": (5,), "w2": (4, 5, 1, 1), "b2": (4,), "w3": (6, 5, 3, 3),
            "b3": (6,), "w4": (3, 10, 3, 3), "b4": (3,), "w5": (7, 27, 1, 1), "b5": (7,),
        },
    ),
    "a concatenation of concatenations": Net(
        (3, 8, 8),
        """
        c1 = Conv(x, w1, b1)
        r1 = Relu(c1)
        c2 = Conv(x, w2, b1)
        r2 = Relu(c2)
        c3 = Conv<pads=[1,1,1,1]>(x, w3, b1)
        r3 = Relu(c3)
        k1 = Concat<axis=1>(r1, r2)
        k2 = Concat<axis=1>(r3, k1)
        c4 = Conv<pads=[1,1,1,1]>(k2, w4, b4)
        r4 = Relu(c4)
        k3 = Concat<axis=1>(r4, constant)
        p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(k3)
        f = Flatten(p)
        y = Gemm(f, w5, b5)
        """,
        {
            "w1": (4, 3, 1, 1), "w2": (4, 3, 1, 1), "w3": (4, 3, 3, 3), "b1": (4,),
            "w4": (6, 12, 3, 3), "b4": (6,), "w5": (128, 5), "b5": (5,),
            "constant": np.full((2, 2, 8, 8), 0.1, np.float32),
        },
        batch=2,
    ),
    "groups, ReLU6": Net(
        (4, 10, 10),
        """
        c1 = Conv<pads=[0,0,1,1], strides=[2,2]>(x, w1, b1)
        r1 = Clip(c1, low, high)
        c2 = Conv<pads=[1,1,1,1], group=8>(r1, w2, b1)
        r2 = Clip(c2, low, high)
        c3 = Conv<pads=[2,1,2,1], dilations=[2,1], group=2>(r2, w3, b3)
        r3 = Clip(c3, low)
        c4 = Conv(r3, w4, b4)
        a4 = Add(r2, c4)
        p = AveragePool<kernel_shape=[5,5]>(a4)
        s = Squeeze(p, axes)
        y = Gemm(s, w5)
        """,
        {
            "w1": (8, 4, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "w3": (12, 4, 3, 3), "b3": (12,),
            "w4": (8, 12, 1, 1), "b4": (8,), "w5": (8, 5), "axes": ints(2, 3),
            "low": np.array(0, np.float32), "high": np.array(0.5, np.float32),
        },
    ),
    "flattened, MatMul": Net(
        (3, 8, 8),
        """
        c1 = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w1, b1)
        r1 = Relu(c1)
        p1 = MaxPool<kernel_shape=[2,2], strides=[2,2], pads=[0,1,1,0]>(r1)
        d1 = Dropout(p1)
        f = Reshape(d1, shape)
        m1 = MatMul(f, w2)
        a1 = Add(m1, b2)
        r2 = Relu(a1)
        i2 = Identity(r2)
        m2 = MatMul(i2, w3)
        a2 = Sub(m2, b3)
        r3 = Relu(a2)
        m3 = MatMul(r3, w4)
        y = Add(m3, b4)
        """,
        {
            "w1": (8, 3, 3, 3), "b1": (8,), "shape": ints(0, -1), "w2": (32, 30), "b2": (30,),
            "w3": (30, 20), "b3": (20,), "w4": (20, 4), "b4": (4,),
        },
    ),
    "NHWC": Net(
        (8, 8, 3),
        """
        t1 = Transpose<perm=[0,3,1,2]>(x)
        c1 = Conv<pads=[1,1,1,1]>(t1, w1, b1)
        t2 = Transpose<perm=[0,2,3,1]>(c1)
        r1 = Relu(t2)
        t3 = Transpose<perm=[0,3,1,2]>(r1)
        p1 = MaxPool<kernel_shape=[3,3], strides=[1,2], dilations=[2,1]>(t3)
        t4 = Transpose<perm=[0,2,3,1]>(p1)
        f = Reshape(t4, shape)
        g = Gemm(f, w2, b2)
        r2 = Relu(g)
        y = Gemm<transB=1>(r2, w3, b3)
        """,
        {
            "w1": (7, 3, 3, 3), "b1": (7,), "shape": ints(-1, 84), "w2": (84, 40), "b2": (40,),
            "w3": (6, 40), "b3": (6,),
        },
    ),
    "pools of the input": Net(
        (3, 9, 9),
        """
        p1 = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)
        p2 = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=1>(x)
        p3 = AveragePool<kernel_shape=[2,2], strides=[2,2], pads=[0,1,1,0]>(x)
        k = Concat<axis=1>(p1, p2, p3)
        c1 = Conv<pads=[1,1,1,1]>(k, w1, b1)
        r1 = Relu(c1)
        p4 = GlobalMaxPool(r1)
        f = Flatten(p4)
        y = Gemm(f, w2, b2)
        """,
        {"w1": (16, 9, 3, 3), "b1": (16,), "w2": (16, 5), "b2": (5,)},
    ),
    "an input of several readers": Net(
        (3, 8, 8),
        """
        c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
        c2 = Conv<pads=[1,1,1,1]>(x, w2, b1)
        r2 = Relu(c2)
        r1 = Relu(c1)
        n = Neg(c1)
        r3 = Relu(n)
        k = Concat<axis=1>(r1, r3, r2)
        c3 = Conv(k, w3, b3)
        r4 = Relu(c3)
        k2 = Concat<axis=1>(r4, r4)
        m = ReduceMean<keepdims=0>(k2, axes)
        y = Gemm(m, w4)
        """,
        {
            "w1": (5, 3, 3, 3), "b1": (5,), "w2": (5, 3, 3, 3), "w3": (6, 15, 3, 3), "b3": (6,),
            "axes": ints(2, 3), "w4": (12, 4),
        },
    ),
    "other activations": Net(
        (3, 8, 8),
        """
        c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
        r1 = LeakyRelu<alpha=0.2>(c1)
        c2 = Conv<pads=[1,1,1,1], strides=[2,2]>(r1, w2, b2)
        r2 = Elu(c2)
        c3 = Conv(r1, w3, b2)
        r3 = PRelu(c3, slope)
        p3 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r3)
        a = Add(r2, p3)
        s = Sigmoid(a)
        t = Tanh(s)
        f = Flatten(t)
        g = Gemm(f, w4, b4)
        z = Softplus(g)
        q = Relu(g)
        u = Add(z, q)
        y = Gemm(u, w5)
        """,
        {
            "w1": (4, 3, 3, 3), "b1": (4,), "w2": (6, 4, 3, 3), "b2": (6,), "w3": (6, 4, 1, 1),
            "slope": (6, 1, 1), "w4": (96, 20), "b4": (20,), "w5": (20, 5),
        },
    ),
    "one and three axes": Net(
        (4, 12),
        """
        c1 = Conv<pads=[1,1]>(x, w1, b1)
        r1 = Relu(c1)
        p1 = MaxPool<kernel_shape=[2], strides=[2]>(r1)
        u = Reshape(p1, volume)
        c2 = Conv<pads=[1,1,1,1,1,1]>(u, w2, b2)
        n2 = BatchNormalization(c2, s2, b2, m2, v2)
        r2 = Relu(n2)
        p2 = AveragePool<kernel_shape=[1,2,2]>(r2)
        p3 = GlobalAveragePool(p2)
        f = Flatten(p3)
        y = Gemm(f, w3, b3)
        """,
        {
            "w1": (8, 4, 3), "b1": (8,), "volume": ints(0, 4, 3, 2, 2), "w2": (6, 4, 3, 3, 3),
            "b2": (6,), "s2": (6,), "m2": (6,), "v2": (6,), "w3": (6, 5), "b3": (5,),
        },
    ),
    "images folded into the batch": Net(
        (6, 6, 6),
        """
        u = Reshape(x, apart)
        c1 = Conv<pads=[1,1,1,1]>(u, w1, b1)
        n1 = BatchNormalization(c1, s1, b1, m1, v1)
        r1 = Relu(n1)
        p1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)
        p2 = AveragePool<kernel_shape=[2,2], strides=[1,1]>(p1)
        f = Reshape(p2, rows)
        g = Gemm(f, w2, b2)
        r2 = Relu(g)
        m = MatMul(r2, w3)
        y = Reshape(m, together)
        """,
        {
            "apart": ints(2, 3, 6, 6), "w1": (5, 3, 3, 3), "b1": (5,), "s1": (5,), "m1": (5,),
            "v1": (5,), "rows": ints(4, 10), "w2": (10, 8), "b2": (8,), "w3": (8, 2),
            "together": ints(1, 8),
        },
        batch=1,
    ),
    "tied weights": Net(
        (12,),
        """
        g1 = Gemm(x, w, b)
        r1 = Relu(g1)
        g2 = Gemm<transB=1>(r1, w, b)
        r2 = Relu(g2)
        g3 = Gemm<alpha=2.0>(r2, w, b)
        r3 = Relu(g3)
        y = MatMul(r3, w)
        """,
        {"w": (12, 12), "b": (12,)},
    ),
    "scores along another axis": Net(
        (2, 4, 4),
        """
        c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
        r1 = Relu(c1)
        c2 = Conv(r1, w2, b2)
        y = Transpose<perm=[0,2,3,1]>(c2)
        """,
        {"w1": (6, 2, 3, 3), "b1": (6,), "w2": (3, 6, 4, 4), "b2": (3,)},
        scores="1, 1, K",
    ),
}  # fmt: skip

METHODS: dict[str, Method] = {
    "q = 0": make_method("rectgrad", q=0.0),
    "q = 30, linear": make_method("rectgrad", q=30.0, percentile="linear"),
    "q = 80": make_method("rectgrad", q=80.0),
    "q = 95, same": make_method("rectgrad", q=95.0, padding_trick="same"),
    "q = 100": make_method("rectgrad", q=100.0),
    "tau = 0.01": make_method("rectgrad", tau=0.01, padding_trick=False),
    "tau < 0": make_method("rectgrad", tau=-0.01, strict_relu=True),
    "PR2, PRR": make_method("rectgrad", q=80.0, propagation_rule="PR2", prr=True),
    "PR3": make_method("rectgrad", q=80.0, propagation_rule="PR3", maxpool_ties="split"),
    "PR1+eps": make_method("rectgrad", q=80.0, propagation_rule="PR1+eps", eps=0.1),
    "authors": make_method("rectgrad", "authors", q=80.0),
    "at least": make_method("rectgrad", q=80.0, strictness=">="),
    "saliency": make_method("saliency"),
    "deconvolution": make_method("deconvolution"),
    "guided": make_method("guided_backprop", padding_trick=True),
    "epsilon_lrp": make_method("epsilon_lrp"),
    "deeplift": make_method("deeplift"),
}
SOME = ("q = 80", "saliency", "deeplift")

nets = pytest.mark.parametrize("net", NETS.values(), ids=NETS)
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
some_methods = pytest.mark.parametrize("method", [METHODS[name] for name in SOME], ids=SOME)


# --- running them ---------------------------------------------------------------------------------


class Shared(NumpyForward):
    """NumPy's forward pass in float32, which also writes where onnxruntime's would."""

    any_batch = False

    def __init__(self) -> None:
        super().__init__(np.float32)

    def __call__(
        self,
        graph: Graph,
        x: Array,
        names: Sequence[str],
        into: Mapping[str, Array] = MappingProxyType({}),
    ) -> dict[str, Array]:
        values = super().__call__(graph, x, (*names, *into))
        for name, place in into.items():
            place[...] = _last(values[name])
        return {name: values[name] for name in names}


def _last(image: Array) -> Array:
    """(N, C, H, W) → (N, H, W, C); what is no image stays."""
    return np.moveaxis(image, 1, -1) if image.ndim == 4 else image


def plan_of(net: Net, method: Method, n: int = 2) -> Plan:
    n = net.batch if isinstance(net.batch, int) else n
    graph = freeze(read_model(_proto(net)), (n, *net.image))
    return make_plan(graph, method.rules(graph))


_protos: dict[int, onnx.ModelProto] = {}


def _proto(net: Net) -> onnx.ModelProto:
    return _protos.setdefault(id(net), net.onnx())


def runner_of(plan: Plan, *, threads: int = 1, forward: Any = None) -> CompiledRunner:
    runner = CompiledBackend(forward or Shared(), threads).runner(plan)
    assert isinstance(runner, CompiledRunner)
    return runner


def seed_of(scores: Array) -> Array:
    """Of every class something, so that small networks are not cut off."""
    rows = np.random.default_rng(1).standard_normal(scores.shape[1]).astype(np.float32)
    return np.tile(rows, (len(scores), 1))


def walk_back(
    plan: Plan, x: Array, method: Method, *, trace: bool = False, **options: Any
) -> Array:
    """R at the input."""
    return call(runner_of(plan, **options), x, method, trace=trace)


def call(runner: CompiledRunner, x: Array, method: Method, *, trace: bool = False) -> Array:
    baseline = method.reference_input(x)
    observe = (lambda *step: None) if trace else None
    return runner(x, seed_of, baseline=baseline, observe=observe)[1]


# --- step by step ---------------------------------------------------------------------------------


@dataclass
class Observed:
    """What the observer was told of one activation."""

    step: Step
    a: Array
    R_out: Array
    R_in: Array


class Walk(compiled._Walk):
    """A walk that remembers its seed."""

    def plant(self, seed: Array) -> None:
        self.seed = seed
        super().plant(seed)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Walk]:
    """The walks of this test, whose sheets can be looked at afterwards where they were traced."""
    kept: list[Walk] = []

    class Kept(Walk):
        def finish(self, crew: Crew) -> None:
            super().finish(crew)
            kept.append(self)

    monkeypatch.setattr(compiled, "_Walk", Kept)
    return kept


class Recorded:
    """A forward pass that remembers what it handed over, in the values' own axis order.

    The first time it is asked for `values`, then for those at the `baseline`.
    """

    def __init__(self, forward: Any) -> None:
        self.forward, self.dtype, self.any_batch = forward, forward.dtype, forward.any_batch
        self.values: dict[str, Array] = {}
        self.baseline: dict[str, Array] = {}

    def __call__(
        self,
        graph: Graph,
        x: Array,
        names: Sequence[str],
        into: Mapping[str, Array] = MappingProxyType({}),
    ) -> dict[str, Array]:
        values: dict[str, Array] = self.forward(graph, x, names, into)
        places = {name: _first(place).copy() for name, place in into.items()}
        (self.baseline if self.values else self.values).update(values | places)
        return values


def _first(image: Array) -> Array:
    """(N, H, W, C) → (N, C, H, W); what is no image stays."""
    return np.moveaxis(image, -1, 1) if image.ndim == 4 else image


def check(walk: Walk, forward: Recorded, observed: Sequence[Observed]) -> None:
    """Every value's gradient against what the reference makes of the gradients above it.

    Each step gets the compiled gradient at its outputs. What the reference computes itself, and
    what it selects at activations, must be equal; what the kernels sum, within rounding of float64.

    Parameters
    ----------
    forward : Recorded
        The forward pass that the walk had.
    """
    plan = walk.program.plan
    R = {value: walk.gradient(value) for value in walk.program.sheets}
    np.testing.assert_array_equal(R[plan.graph.logits].reshape(walk.seed.shape), walk.seed)
    expected: dict[str, Array] = {}
    terms: dict[str, int] = {}
    by_output = {o.step.node.outputs[0]: o for o in observed}
    for step in plan.steps:
        exact = step.node.name in plan.layers | walk.program.by_rule
        for position, value in zip(step.positions, step.writes, strict=True):
            dtype = np.float32 if exact else np.float64
            gradient = _applied(walk, forward, step, position, R, dtype)
            if step.node.name in plan.layers:
                seen = by_output[step.node.outputs[0]]
                np.testing.assert_array_equal(seen.R_out, R[step.node.outputs[0]])
                np.testing.assert_array_equal(seen.R_in, gradient, str(step.node))
            expected[value] = expected.get(value, 0) + gradient.astype(np.float64)
            terms[value] = terms.get(value, 0) + (0 if exact else _terms(step))
        R.update({v: expected[v].astype(np.float32) for v in step.writes if v not in R})
    for value, gradient in expected.items():
        if not terms[value] and sum(value in step.writes for step in plan.steps) == 1:
            np.testing.assert_array_equal(R[value], gradient.astype(np.float32), value)
        else:
            _check_close(R[value], gradient, terms[value], value)


def _applied(
    walk: Walk,
    forward: Recorded,
    step: Step,
    position: int,
    R: Mapping[str, Array],
    dtype: Any,
) -> Array:
    graph = walk.program.plan.graph
    constants = constants_as(graph.constants, np.dtype(np.float32))
    known = {**constants, **forward.values}
    if step.node.op == "Clip":  # the kernel sees a only, which is z wherever the slope is not 0
        known.setdefault(step.node.inputs[0], known.get(step.node.outputs[0], np.empty(0)))
    here, there = (
        {v: array.astype(dtype) if array.dtype.kind == "f" else array for v, array in found.items()}
        for found in (
            {v: _value(graph, known, v) for v in step.reads},
            {v: _value(graph, {**constants, **forward.baseline}, v) for v in step.reads}
            if step.rule.contrasts
            else {},
        )
    )
    outgoing = tuple(R[v].astype(dtype) for v in step.node.outputs if v)
    return step.rule(Call(step.node, position, outgoing, here, there, graph.batch))


def _value(graph: Graph, known: Mapping[str, Array], name: str) -> Array:
    """A value that the walk has read, or that follows from such by selection alone."""
    if name in known:
        return known[name]
    node = graph.producer[name]
    assert node.op in ("Concat", "MaxPool", "Relu"), node
    arguments = [_value(graph, known, v) for v in node.inputs]
    return OPERATORS[node.op].forward(node, *arguments)


def _terms(step: Step) -> int:
    """How many products the longest sum of a step has."""
    node = step.node
    if node.op == "Conv":
        return node.output_shapes[0][1] // node["group"] * prod(node["kernel_shape"])
    if node.op in ("Gemm", "MatMul"):
        return node.output_shapes[0][-1]
    return prod(node["kernel_shape"]) if "kernel_shape" in node.attributes else 1


def _check_close(found: Array, expected: Array, terms: int, name: str) -> None:
    """SPEC section 5."""
    relative = 1e-6 if terms <= 1024 else 2 * np.sqrt(terms) * 2.0**-24
    error = np.abs(found - expected).max(initial=0)
    assert error <= relative * np.abs(expected).max(initial=0), (name, terms)


@methods
@nets
@pytest.mark.parametrize("dense", [False, True])
def test_every_step(
    net: Net, method: Method, dense: bool, walks: list[Walk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "DENSITY", 0 if dense else 1)
    plan = plan_of(net, method)
    x = net.images(plan.graph.batch)
    observed: list[Observed] = []
    forward = Recorded(Shared())
    R = runner_of(plan, threads=2, forward=forward)(
        x,
        seed_of,
        baseline=method.reference_input(x),
        observe=lambda *seen: observed.append(Observed(*seen)),
    )[1]
    assert {o.step.node.name for o in observed} == plan.layers
    (walk,) = walks
    np.testing.assert_array_equal(R, walk.gradient(plan.graph.input))
    check(walk, forward, observed)


# --- what the result must not depend on -----------------------------------------------------------

densities = pytest.mark.parametrize("density", [0, lowering.DENSITY, 1])


@nets
@some_methods
@densities
def test_threads_do_not_change_a_bit(
    net: Net, method: Method, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "DENSITY", density)
    for n in (1, 3):
        plan = plan_of(net, method, n)
        x = net.images(plan.graph.batch)
        one, *others = (walk_back(plan, x, method, threads=threads) for threads in THREADS)
        for other in others:
            np.testing.assert_array_equal(one, other)


@nets
@some_methods
@densities
def test_a_trace_does_not_change_a_bit(
    net: Net, method: Method, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "DENSITY", density)
    plan = plan_of(net, method)
    x = net.images(plan.graph.batch)
    np.testing.assert_array_equal(
        walk_back(plan, x, method), walk_back(plan, x, method, trace=True)
    )


class Picked(Shared):
    """Of the values of a whole batch, those of one sample."""

    def __init__(self, graph: Graph, sample: int, *inputs: Array | None) -> None:
        super().__init__()
        self.whole, self.sample, self.inputs = graph, sample, inputs

    def __call__(
        self,
        graph: Graph,
        x: Array,
        names: Sequence[str],
        into: Mapping[str, Array] = MappingProxyType({}),
    ) -> dict[str, Array]:
        (whole,) = (
            i for i in self.inputs if i is not None and np.array_equal(i[self.sample], x[0])
        )
        values = NumpyForward.__call__(self, self.whole, whole, (*names, *into))
        picked = {name: value[self.sample : self.sample + 1] for name, value in values.items()}
        for name, place in into.items():
            place[...] = _last(picked[name])
        return {name: picked[name] for name in names}


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.batch == "N"])
@some_methods
@densities
def test_a_batch_does_not_change_a_bit(
    name: str, method: Method, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "DENSITY", density)
    net = NETS[name]
    plan, alone = plan_of(net, method, 3), plan_of(net, method, 1)
    x = net.images(3)
    together = walk_back(plan, x, method, threads=2)
    baseline = method.reference_input(x)
    for i in range(3):
        forward = Picked(plan.graph, i, x, baseline)
        single = walk_back(alone, x[i : i + 1], method, threads=2, forward=forward)
        np.testing.assert_array_equal(single, together[i : i + 1])


@nets
@densities
def test_memory_is_used_again(net: Net, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many calls of one backend, whose results stay what they were."""
    monkeypatch.setattr(lowering, "DENSITY", density)
    backend = CompiledBackend(Shared(), 2)
    calls = []
    for n, name in itertools.product((1, 3), ("q = 80", "deeplift")):
        method = METHODS[name]
        plan = plan_of(net, method, n)
        runner = backend.runner(plan)
        assert isinstance(runner, CompiledRunner)
        calls += [(runner, method, plan, net.images(plan.graph.batch, seed)) for seed in (0, 1)]
    order = [*range(len(calls)), *np.random.default_rng(0).permutation(len(calls))]
    found = [(i, call(calls[i][0], calls[i][3], calls[i][1], trace=i % 3 == 0)) for i in order]
    for i, R in found:
        _, method, plan, x = calls[i]
        np.testing.assert_array_equal(R, walk_back(plan, x, method))


@pytest.mark.parametrize("name", NETS)
def test_dense_and_sparse_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of methods that select nothing by a threshold, so that rounding stays rounding."""
    plan = plan_of(NETS[name], METHODS["saliency"])
    x = NETS[name].images(plan.graph.batch)
    found = []
    for density in (0, 1):
        monkeypatch.setattr(lowering, "DENSITY", density)
        found.append(walk_back(plan, x, METHODS["saliency"]))
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5 * np.abs(found[0]).max())


# --- identities -----------------------------------------------------------------------------------

# SPEC section 5: each pair of methods is one, bit by bit.
IDENTITIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deconvolution": (
        {"method": "deconvolution", "times_input": True, "final_threshold": True},
        {"method": "rectgrad", "propagation_rule": "PR1+eps", "tau": 0.0},
    ),
    "guided backpropagation": (
        {"method": "guided_backprop", "times_input": True, "final_threshold": True},
        {"method": "rectgrad", "tau": 0.0},
    ),
    "gradient": (
        {"method": "input_x_gradient"},
        {"method": "rectgrad", "tau": -np.inf, "strict_relu": True, "final_threshold": False},
    ),
}
RELU_NETS = [name for name in NETS if name != "other activations"]


@pytest.mark.parametrize("name", RELU_NETS)
@pytest.mark.parametrize("claim", IDENTITIES)
@pytest.mark.parametrize("trick", [False, True, "same"], ids=str)
@densities
def test_identities(
    name: str, claim: str, trick: Any, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "DENSITY", density)
    sides = []
    for options in IDENTITIES[claim]:
        method = make_method(**options, padding_trick=trick)
        plan = plan_of(NETS[name], method)
        x = NETS[name].images(plan.graph.batch)
        R = walk_back(plan, x, method)
        sides.append(method.finish(x, R, np.arange(len(x))))
    np.testing.assert_array_equal(*sides)


# --- through the front door -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    """A network with residuals in onnxruntime, explained before."""
    net = NETS["residual, batch norm"]
    explainer = Explainer(net.onnx(), backend="cpu", threads=2)
    explainer.explain(net.images(3), q=80.0)
    return explainer


IMAGES = NETS["residual, batch norm"].images(3, seed=7)


@pytest.mark.parametrize("options", [{"q": 80.0}, {"method": "saliency"}, {"method": "deeplift"}])
def test_concurrent_calls(explainer: Explainer, options: dict[str, Any]) -> None:
    """Four threads with five calls each, the first of which meet while the plan is lowered."""
    fresh = Explainer(NETS["residual, batch norm"].onnx(), backend="cpu", threads=2)
    batches = [IMAGES[:1], IMAGES[1:2], IMAGES[:2], IMAGES]
    expected = [explainer.explain(x, **options).values for x in batches]
    with ThreadPoolExecutor(len(batches)) as pool:
        jobs = [[pool.submit(fresh.explain, x, **options) for x in batches] for _ in range(5)]
        for row in jobs:
            for job, values in zip(row, expected, strict=True):
                np.testing.assert_array_equal(job.result(timeout=60).values, values)


def test_a_small_network_wakes_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Counted(Crew):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            sizes.append(self.size)

    monkeypatch.setattr(compiled, "Crew", Counted)
    fresh = Explainer(NETS["residual, batch norm"].onnx(), backend="cpu", threads=2)
    several = fresh.explain(IMAGES).values
    monkeypatch.setattr(compiled, "_WAKING", fresh.explain(IMAGES).inputs.size * 1000)
    np.testing.assert_array_equal(fresh.explain(IMAGES).values, several)
    assert sizes == [2, 2, 1]
    with Crew(1), Crew(2) as other:  # one that wakes nobody leaves the threads to others
        assert other.size == 2


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_fork_explains_as_well(explainer: Explainer) -> None:
    """It takes no threads along; what its parent's threads were doing must not matter."""
    calls = [{"q": 80.0}, {"method": "saliency"}, {"q": 81.0}]
    expected = [explainer.explain(IMAGES, **options).values for options in calls[:2]]
    fresh = Explainer(NETS["residual, batch norm"].onnx(), backend="cpu", threads=2)
    expected.append(fresh.explain(IMAGES, **calls[2]).values)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        for options in calls:
            sender.send(explainer.explain(IMAGES, **options).values)

    # At that moment one call has all threads, and another lowers a plan.
    with Crew(2) as crew, CompiledBackend._lowering:
        assert crew.size == 2
        process = context.Process(target=child)
        process.start()
    try:
        for values in expected:
            assert receiver.poll(60), "the child hangs"
            np.testing.assert_array_equal(receiver.recv(), values)
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


def test_a_baseline_that_all_share_is_run_once(
    explainer: Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, batches = OnnxruntimeForward.__call__, []

    def counted(self: Any, graph: Graph, x: Array, *arguments: Any) -> dict[str, Array]:
        batches.append(len(x))
        return run(self, graph, x, *arguments)

    monkeypatch.setattr(OnnxruntimeForward, "__call__", counted)
    walk_of = CompiledRunner.__call__

    def walked(self: Any, *arguments: Any, **options: Any) -> Any:
        batches.clear()
        result = walk_of(self, *arguments, **options)
        seen.append(tuple(batches))
        return result

    monkeypatch.setattr(CompiledRunner, "__call__", walked)
    seen: list[tuple[int, ...]] = []
    shared = np.full_like(IMAGES, 0.25)
    other = np.concatenate([shared[:-1], shared[-1:] + 1])
    maps, scored = [], []
    for baseline in (0.25, shared, other):
        maps.append(explainer.explain(IMAGES, method="deeplift", baseline=baseline).values)
        scored.append(batches[-1])  # for the completeness gap
    n, (one, many, last) = len(IMAGES), maps
    assert seen == [(n, 1), (n, 1), (n, n)]
    assert scored == [1, 1, n]
    np.testing.assert_array_equal(one, many)
    np.testing.assert_allclose(last[:-1], one[:-1], atol=1e-6 * np.abs(one).max())
    assert np.abs(last[-1] - one[-1]).max() > 1e-3 * np.abs(one).max()


def test_no_samples(explainer: Explainer) -> None:
    with pytest.raises(InvalidImage, match="empty"):
        explainer.explain(IMAGES[:0])


def test_samples_on_another_axis_go_step_by_step() -> None:
    net = Net(
        (4,),
        """
        t = Transpose(x)
        g = Gemm<transA=1>(t, w1, b1)
        r = Relu(g)
        y = Gemm(r, w2)
        """,
        {"w1": (4, 6), "b1": (6,), "w2": (6, 3)},
    )
    method = METHODS["saliency"]
    plan, x = plan_of(net, method, 3), net.images(3)
    runner = CompiledBackend(Shared(), 1).runner(plan)
    assert isinstance(runner, StepwiseRunner)
    np.testing.assert_array_equal(
        runner(x, seed_of)[1], StepwiseRunner(plan, NumpyForward(np.float32))(x, seed_of)[1]
    )


# --- published networks ---------------------------------------------------------------------------

PUBLISHED = {
    "imagenet_squeezenet1.1_logits": "caffe",
    "imagenet_mobilenet_v2_1.0_224": "mobilenet_tf",
    "cifar10_resnet20_bn_unfused": "cifar10_imagenet",
    "cifar10_marabou_small_tf2onnx": "unit",
    "cifar10_vit_ibp_3_3_8": "cifar10_standard",
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("method", [METHODS["q = 95, same"], METHODS["saliency"]], ids=str)
def test_published_networks(
    name: str, method: Method, shared_data: Path, walks: list[Walk]
) -> None:
    """One photo, with onnxruntime's forward pass, at every step."""
    loaded = read_model(shared_data / "models" / f"{name}.onnx")
    spec = input_spec(loaded)
    photo = prepare(
        shared_data / "photos" / "n01820546_lorikeet.JPEG",
        spec.shape,
        spec.dtype,
        preprocess=PUBLISHED[name],
    )
    x = photo.array.astype(np.float32)
    graph = freeze(loaded, x.shape)
    plan = make_plan(graph, method.rules(graph))
    forward = Recorded(OnnxruntimeForward(loaded, spec.name, rebatch=False, threads=2))
    observed: list[Observed] = []
    runner = CompiledBackend(forward, 2).runner(plan)
    runner(x, highest, observe=lambda *seen: observed.append(Observed(*seen)))
    check(walks[0], forward, observed)


def highest(scores: Array) -> Array:
    return (scores == scores.max(axis=1, keepdims=True)).astype(np.float32)
