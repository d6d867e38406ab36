"""Networks and methods on which lowered plans are checked, step by step, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from helpers import model

from rectgrad_ref import Explainer
from rectgrad_ref.executors.lowered import Walk
from rectgrad_ref.executors.runner import Runner, SeedOf
from rectgrad_ref.forward import LoadedModel, NumpyForward, Places
from rectgrad_ref.graph import Graph, freeze
from rectgrad_ref.methods import Method, make_method
from rectgrad_ref.model import read_model
from rectgrad_ref.plan import Plan, Step, make_plan
from rectgrad_ref.reference import constants_as
from rectgrad_ref.rules import OPERATORS
from rectgrad_ref.rules.declared import Call

Array = np.ndarray


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
    "pools of activations": Net(
        (3, 15, 13),
        """
        c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
        r1 = Relu(c1)
        p1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)
        c2 = Conv<pads=[1,1,1,1]>(p1, w2, b2)
        r2 = Clip(c2, low, high)
        p2 = MaxPool<kernel_shape=[1,2], strides=[2,3], ceil_mode=1>(r2)
        c3 = Conv<pads=[1,1,1,1]>(p2, w3, b1)
        r3 = Relu(c3)
        p3 = MaxPool<kernel_shape=[4,2]>(r3)
        f = Flatten(p3)
        y = Gemm(f, w4, b4)
        """,
        {
            "w1": (16, 3, 3, 3), "b1": (16,), "w2": (32, 16, 3, 3), "b2": (32,),
            "w3": (16, 32, 3, 3), "w4": (16, 5), "b4": (5,),
            "low": np.array(0, np.float32), "high": np.array(0.5, np.float32),
        },
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


def of_any_size() -> onnx.ModelProto:
    """A network for images of any height and width, with a transpose of every kind."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), "w3": (16, 8, 3, 3), "w4": (5, 16, 1, 1)}
    return model(
        """(float[N, 3, H, W] x) => (float[N, 5] y) {
            c1 = Conv<pads=[1,1,1,1]>(x, w1)
            r1 = Relu(c1)
            c2 = Conv<pads=[1,1,1,1], strides=[2,2]>(r1, w2)
            r2 = Relu(c2)
            c3 = Conv<dilations=[2,2], strides=[1,2], group=2>(r2, w3)
            r3 = Relu(c3)
            c4 = Conv(r3, w4)
            p = GlobalAveragePool(c4)
            y = Flatten(p)
        }""",
        constants={name: _weight(rng, name, shape) for name, shape in shapes.items()},
    )


def check_several_sizes(backend: str) -> None:
    """One explainer sees images of several sizes, some of them again."""
    explainer = Explainer(of_any_size(), backend=backend, layout="NCHW")
    reference = Explainer(of_any_size(), backend="reference", layout="NCHW")
    rng = np.random.default_rng(1)
    for size in ((16, 16), (23, 16), (16, 16), (12, 12), (16, 21), (23, 16), (14, 15), (12, 12)):
        x = rng.standard_normal((1, 3, *size)).astype(np.float32)
        found, expected = (e.explain(x, method="saliency").values for e in (explainer, reference))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale, err_msg=str(size))


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


# --- running them ---------------------------------------------------------------------------------


class OnNumpy(NumpyForward):
    """NumPy's forward pass in float32, which also leaves values where a backend wants them.

    It remembers them in their own axis order: the first time `values`, then those at the
    `baseline`.
    """

    any_batch = False

    def __init__(self) -> None:
        super().__init__(np.float32)
        self.values: dict[str, Array] = {}
        self.baseline: dict[str, Array] = {}

    def __call__(
        self,
        graph: Graph,
        x: Array,
        names: Sequence[str],
        into: Places | None = None,
    ) -> dict[str, Array]:
        places = Places() if into is None else into
        values = self.computed(graph, x, (*names, *places))
        at_baseline = bool(self.values)
        (self.baseline if at_baseline else self.values).update(values)
        blocked = {name for name in list(places)[at_baseline::2] if values[name].ndim == 4}
        places.session = LoadedModel(None, {name: name for name in blocked})
        for name, place in places.items():
            self.leave(values[name], place, blocked=name in blocked)
        return {name: values[name] for name in names}

    def computed(self, graph: Graph, x: Array, names: Sequence[str]) -> dict[str, Array]:
        return super().__call__(graph, x, names)

    def leave(self, value: Array, place: Any, *, blocked: bool) -> None:
        """Every second image lies in blocks, others channels last; at a baseline the others."""
        place[...] = np.nan
        if blocked:
            laid_out = in_blocks(value)
        else:
            laid_out = np.moveaxis(value, 1, -1) if value.ndim == 4 else value
        place[: laid_out.size] = laid_out.ravel()


def in_blocks(images: Array) -> Array:
    """(N, C, H, W) → (N, ⌈C/16⌉, H, W, 16), filled up with what is no number."""
    n, c, h, w = images.shape
    filled = np.full((n, -(-c // 16) * 16, h, w), np.nan, np.float32)
    filled[:, :c] = images
    return filled.reshape(n, -1, 16, h, w).transpose(0, 1, 3, 4, 2)


def out_of_blocks(place: Array, shape: Sequence[int]) -> Array:
    """What `in_blocks` made of images of a shape."""
    n, c, h, w = shape
    return place.reshape(n, -1, h, w, 16).transpose(0, 1, 4, 2, 3).reshape(n, -1, h, w)[:, :c]


def plan_of(net: Net, method: Method, n: int = 2) -> Plan:
    n = net.batch if isinstance(net.batch, int) else n
    graph = freeze(read_model(_proto(net)), (n, *net.image))
    return make_plan(graph, method.rules(graph))


_protos: dict[int, onnx.ModelProto] = {}


def _proto(net: Net) -> onnx.ModelProto:
    return _protos.setdefault(id(net), net.onnx())


def seed_of(scores: Array) -> Array:
    """Of every class something, so that small networks are not cut off."""
    rows = np.random.default_rng(1).standard_normal(scores.shape[1]).astype(np.float32)
    return np.tile(rows, (len(scores), 1))


def walked(runner: Runner, x: Array, method: Method, *, trace: bool = False) -> Array:
    """R at the input."""
    baseline = method.reference_input(x)
    observe = (lambda *step: None) if trace else None
    return runner(x, seed_of, baseline=baseline, observe=observe)[1]


def both_sides(
    claim: str, net: Net, trick: bool | str, runner_of: Callable[[Plan], Runner]
) -> list[Array]:
    """The attributions of two methods that are one."""
    sides = []
    for options in IDENTITIES[claim]:
        method = make_method(**options, padding_trick=trick)
        plan = plan_of(net, method)
        x = net.images(plan.graph.batch)
        R = walked(runner_of(plan), x, method)
        sides.append(method.finish(x, R, np.arange(len(x))))
    return sides


# --- step by step ---------------------------------------------------------------------------------


@dataclass
class Observed:
    """What the observer was told of one activation."""

    step: Step
    a: Array
    R_out: Array
    R_in: Array


def check_every_step(
    runner: Runner,
    forward: Any,
    method: Method,
    x: Array,
    walks: list[Walk[Any, Any]],
    seed_of: SeedOf = seed_of,
) -> Array:
    """Every value's gradient against what the reference makes of the gradients above it.

    Each step gets the compiled gradient at its outputs. What the reference computes itself, and
    what it selects at activations, must be equal; what the kernels sum, within rounding of float64.

    Parameters
    ----------
    forward
        The runner's forward pass, which remembers `values` and those at the `baseline`.
    walks : list
        The fixture.

    Returns
    -------
    numpy.ndarray
        R at the input.
    """
    observed: list[Observed] = []
    result = runner(
        x,
        seed_of,
        baseline=method.reference_input(x),
        observe=lambda *seen: observed.append(Observed(*seen)),
    )[1]
    walk = walks[-1]
    plan = walk.program.plan
    R = {value: walk.gradient(value) for value in walk.program.sheets}
    np.testing.assert_array_equal(result, R[plan.graph.input])
    seed = seed_of(forward.values[plan.graph.logits].reshape(len(x), -1))
    np.testing.assert_array_equal(R[plan.graph.logits].reshape(seed.shape), seed)
    expected: dict[str, Array] = {}
    terms: dict[str, int] = {}
    by_output = {o.step.node.outputs[0]: o for o in observed}
    assert {o.step.node.name for o in observed} == plan.layers
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
    return result


def _applied(
    walk: Walk[Any, Any],
    forward: Any,
    step: Step,
    position: int,
    R: Mapping[str, Array],
    dtype: Any,
) -> Array:
    graph = walk.program.plan.graph
    constants = constants_as(graph.constants, np.dtype(np.float32))
    known = {**constants, **forward.values}
    if step.node.op in ("Clip", "Relu"):  # kernels may see a only: z wherever the slope is not 0
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
