"""The declared rules on single nodes: what they read, what they compute, what they leave alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import nets
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from rectgrad_ref.forward import NumpyForward
from rectgrad_ref.graph import Graph, freeze
from rectgrad_ref.model import read_model
from rectgrad_ref.rules.declared import (
    Call,
    ConvTranspose,
    EpsilonRatio,
    Gradient,
    MaxPoolBackward,
    PositiveGradient,
    Rectify,
    Redistribute,
    Rescale,
    RescaleMaxPool,
    Rule,
    mask_border,
)

Array = np.ndarray


def single(
    op: str,
    shape: tuple[int, ...],
    constants: Mapping[str, Any] | None = None,
    **attributes: Any,
) -> Graph:
    """A graph whose first node is `op`, applied to the input."""
    constants = constants or {}
    nodes = [
        helper.make_node(op, ["x", *constants], ["y"], name="node", **attributes),
        helper.make_node("Neg", ["y"], ["negative"]),  # so that a Sigmoid is no head
        helper.make_node("Flatten", ["negative"], ["logits"]),
    ]
    initializers = [
        numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in constants.items()
    ]
    model = nets.model(nodes, shape, "logits", initializers, opset=22)
    return freeze(read_model(model), shape)


class Only(dict[str, Array]):
    """Values of which only those that a rule declares may be read; all are read-only."""

    def __init__(self, values: Mapping[str, Array], names: tuple[str, ...]) -> None:
        super().__init__({name: values[name].copy() for name in names})
        for array in self.values():
            array.flags.writeable = False


def run(
    rule: Rule,
    graph: Graph,
    x: Array,
    R: Array,
    *,
    baseline: Array | None = None,
    position: int = 0,
) -> Array:
    """Apply `rule` at the graph's first node, with just the values that it says it reads."""
    node = graph.nodes[0]
    forward = NumpyForward(x.dtype)
    reads = rule.reads(node, position)
    constants = {k: v.astype(x.dtype) for k, v in graph.constants.items()}

    def values(at: Array) -> Only:
        return Only({**constants, **forward(graph, at, ("x", "y"))}, reads)

    R = R.copy()
    R.flags.writeable = False
    there = {} if baseline is None else values(baseline)
    found = rule(Call(node, position, (R,), values(x), there, len(x)))
    assert found.dtype == x.dtype, "a rule must stay in the compute dtype"
    assert found.shape == node.input_shapes[position]
    return found


ACTIVATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Relu": ({}, {}),
    "LeakyRelu": ({}, {"alpha": 0.1}),
    "PRelu": ({"slope": [0.3]}, {}),
    "ThresholdedRelu": ({}, {"alpha": 0.5}),
    "Elu": ({}, {"alpha": 0.7}),
    "Selu": ({}, {}),
    "Celu": ({}, {"alpha": 0.7}),
    "Gelu": ({}, {"approximate": "tanh"}),
    "Mish": ({}, {}),
    "Softplus": ({}, {}),
    "Softsign": ({}, {}),
    "Tanh": ({}, {}),
    "HardSwish": ({}, {}),
    "Sigmoid": ({}, {}),
    "Clip": ({"lo": 0, "hi": 6}, {}),
}
RULES: dict[str, Rule] = {
    "gradient": Gradient(),
    "rectify": Rectify(q=50),
    "rectify tau": Rectify(tau=-1.0),
    "rectify plain": Rectify(q=50, derivative=False),
    "rectify channel": Rectify(q=50, scope="channel"),
    "deconvolution": PositiveGradient(),
    "guided": PositiveGradient(guided=True),
    "epsilon": EpsilonRatio(),
    "rescale": Rescale(),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("op", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rules_read_what_they_declare_and_keep_the_dtype(rule: str, op: str, dtype: type) -> None:
    constants, attributes = ACTIVATIONS[op]
    shape = (2, 3, 4, 4)
    graph = single(op, shape, constants, **attributes)
    rng = np.random.default_rng(0)
    x, R, x0 = (rng.standard_normal(shape).astype(dtype) * 2 for _ in range(3))
    found = run(RULES[rule], graph, x, R, baseline=x0)
    assert np.isfinite(found).all() and found.any()


# --- Rectify --------------------------------------------------------------------------------------


def test_a_mask_is_a_selection_not_a_product() -> None:
    graph = single("Relu", (1, 1, 2, 2))
    x = np.ones((1, 1, 2, 2))
    R = np.array([[[[np.inf, 2], [-np.inf, np.nan]]]])
    assert run(Rectify(tau=1), graph, x, R).tolist() == [[[[np.inf, 2], [0, 0]]]]


@pytest.mark.parametrize("guided", [False, True])
def test_positive_gradient_is_a_selection_too(guided: bool) -> None:
    graph = single("Relu", (1, 1, 1, 2))
    z, R = np.array([[[[-1.0, 1]]]]), np.array([[[[np.inf, np.inf]]]])
    found = run(PositiveGradient(guided), graph, z, R)
    assert found.tolist() == [[[[0 if guided else np.inf, np.inf]]]]


def test_threshold_shapes() -> None:
    rng = np.random.default_rng(0)
    a, R = np.abs(rng.standard_normal((2, 3, 4, 4))), rng.standard_normal((2, 3, 4, 4))
    for scope, shape in (("sample", (2,)), ("channel", (2, 3)), ("batch", (1,))):
        mask, tau = Rectify(scope=scope).select(a, R, 2)
        assert (tau.shape, tau.dtype, mask.shape) == (shape, np.float64, a.shape)
        _, fixed = Rectify(scope=scope, tau=0.5).select(a, R, 2)
        assert fixed.shape == shape and (fixed == 0.5).all()


@pytest.mark.parametrize(("tau", "strict_relu", "expected"), [
    (-1, False, [7, 8, 0]),
    (-1, True, [0, 8, 0]),
    (0, False, [0, 8, 0]),
    (-20, False, [7, 8, -9]),
])  # fmt: skip
def test_below_zero_dead_units_pass(tau: float, strict_relu: bool, expected: list[float]) -> None:
    """z = (−1, 2, 2), so that a·R = (0, 16, −18)."""
    graph = single("Relu", (1, 3))
    rule = Rectify(tau=tau, strict_relu=strict_relu)
    z, R = np.array([[-1.0, 2, 2]]), np.array([[7.0, 8, -9]])
    assert run(rule, graph, z, R).tolist() == [expected]


def test_products_that_underflow_pass_at_zero() -> None:
    graph = single("Relu", (1, 4))
    z = np.full((1, 4), 1e-30, np.float32)
    R = np.array([[1e-30, -1e-30, 0, 1]], np.float32)
    assert run(Rectify(tau=0), graph, z, R).tolist() == [[R[0, 0], 0, 0, 1]]
    # τ is 0 here because three of the four rounded scores are.
    assert run(Rectify(q=50), graph, z, R).tolist() == [[R[0, 0], 0, 0, 1]]


# --- max pools ------------------------------------------------------------------------------------


def test_ties_of_a_max_pool() -> None:
    graph = single("MaxPool", (1, 1, 2, 4), kernel_shape=[2, 2], strides=[2, 2])
    x = np.array([[[[1.0, 3, 2, 2], [3, 3, 2, 2]]]])
    R = np.array([[[[6.0, 8]]]])
    first = run(MaxPoolBackward("first"), graph, x, R)
    assert first.tolist() == [[[[0, 6, 8, 0], [0, 0, 0, 0]]]]
    shared = run(MaxPoolBackward("split"), graph, x, R)
    assert shared.tolist() == [[[[0, 2, 2, 2], [2, 2, 2, 2]]]]


def test_padding_is_never_the_maximum() -> None:
    graph = single("MaxPool", (1, 1, 2, 2), kernel_shape=[2, 2], pads=[1, 1, 1, 1])
    x = np.full((1, 1, 2, 2), -5.0)
    for ties in ("first", "split"):
        found = run(MaxPoolBackward(ties), graph, x, np.ones((1, 1, 3, 3)))
        assert found.sum() == 9


pools = st.fixed_dictionaries(
    {
        "kernel_shape": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "strides": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "pads": st.tuples(*[st.integers(0, 1)] * 4),
        "dilations": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "ceil_mode": st.integers(0, 1),
    }
)


def pooled(seed: int, geometry: dict[str, Any], low: float) -> tuple[Graph, Array, Array]:
    """A pool, a positive input, and a gradient; geometries that ONNX forbids are skipped."""
    kernel, pads = geometry["kernel_shape"], geometry["pads"]
    assume(all(p < k for p, k in zip(pads, kernel * 2, strict=True)))
    shape = (2, 2, 6, 7)
    try:
        graph = single("MaxPool", shape, **geometry)
    except ValueError:
        assume(False)
    rng = np.random.default_rng(seed)
    x = rng.uniform(low, 1, shape)
    return graph, x, rng.standard_normal(graph.nodes[0].output_shapes[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), pools)
def test_redistribution_conserves(seed: int, geometry: dict[str, Any]) -> None:
    """Each window hands on just what it got, in proportion: Σ R_in = Σ R_out."""
    graph, x, R = pooled(seed, geometry, low=0.5)
    found = run(Redistribute(), graph, x, R)
    assert found.sum(axis=(2, 3)) == pytest.approx(R.sum(axis=(2, 3)), abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), pools)
def test_rescaling_a_max_pool_is_complete(seed: int, geometry: dict[str, Any]) -> None:
    """Σ multiplier · Δx = Σ R · Δy, channel by channel."""
    graph, x, R = pooled(seed, geometry, low=-1)
    x0 = np.random.default_rng(seed + 1).uniform(-1, 1, x.shape)
    x0[:, :, ::2] = x[:, :, ::2]  # nothing changes in every other row
    found = run(RescaleMaxPool(), graph, x, R, baseline=x0)
    forward = NumpyForward(np.float64)
    dy = forward(graph, x, ("y",))["y"] - forward(graph, x0, ("y",))["y"]
    expected = (R * dy).sum(axis=(2, 3))
    assert (found * (x - x0)).sum(axis=(2, 3)) == pytest.approx(expected, abs=1e-9)


def test_rescaled_max_pool_by_hand() -> None:
    """x = (1, 5), x₀ = (4, 2): from 4 to 5 over the maximum 5.

    The new maximum gets R·(5 − 4) over its Δx = 3; the old one R·(5 − 5) = 0.
    """
    graph = single("MaxPool", (1, 1, 1, 2), kernel_shape=[1, 2])
    x, x0 = np.array([[[[1.0, 5]]]]), np.array([[[[4.0, 2]]]])
    found = run(RescaleMaxPool(), graph, x, np.array([[[[6.0]]]]), baseline=x0)
    assert found.tolist() == [[[[0, 2]]]]
    # From 5 down to 4, which the old maximum owns: R·(4 − 5) over its Δx = 2 − 5.
    found = run(RescaleMaxPool(), graph, x0, np.array([[[[6.0]]]]), baseline=x)
    assert found.tolist() == [[[[0, 2]]]]


# --- ratios ---------------------------------------------------------------------------------------


def test_epsilon_ratio_by_hand() -> None:
    graph = single("LeakyRelu", (1, 3), alpha=0.5)
    z = np.array([[2.0, 0, -2]])
    found = run(EpsilonRatio(0.5), graph, z, np.array([[10.0, 10, 10]]))
    assert found.tolist() == [[10 * 2 / 2.5, 0, 10 * -1 / -2.5]]


def test_epsilon_ratio_takes_zero_for_positive() -> None:
    graph = single("Sigmoid", (1, 1))
    assert run(EpsilonRatio(0.25), graph, np.zeros((1, 1)), np.array([[3.0]])).tolist() == [[6]]


def test_rescale_takes_the_slope_half_way() -> None:
    graph = single("Tanh", (1, 1))
    z, z0 = np.array([[1.0]]), np.array([[-0.5]])
    found = run(Rescale(eps=2), graph, z, np.array([[3.0]]), baseline=z0)
    assert found[0, 0] == pytest.approx(3 / math.cosh(0.25) ** 2, rel=1e-15)


def test_rescale_by_hand() -> None:
    graph = single("Relu", (1, 4))
    z, z0 = np.array([[3.0, 1, -1, 2]]), np.array([[-1.0, -1, -2, 2 - 1e-6]])
    found = run(Rescale(), graph, z, np.array([[8.0, 8, 8, 8]]), baseline=z0)
    assert found.tolist() == [[6, 4, 0, 8]]


# --- the padding trick ----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_border(rank: int) -> None:
    R = np.arange(1.0, 1 + 2 * 3 * 4**rank).reshape(2, 3, *[4] * rank)
    found = mask_border(R)
    for cell in np.ndindex(R.shape):
        outside = any(i in (0, 3) for i in cell[2:])
        assert found[cell] == (0 if outside else R[cell])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_masked_convolution(rank: int) -> None:
    shape = (2, 2, *[5] * rank)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 2, *[3] * rank))
    graph = single("Conv", shape, {"w": weights}, pads=[1] * (2 * rank))
    x, R = rng.standard_normal(shape), rng.standard_normal((2, 3, *[5] * rank))
    plain, masked = ConvTranspose(), ConvTranspose(mask_border=True)
    assert np.array_equal(run(plain, graph, x, R), run(Gradient(), graph, x, R))
    assert np.array_equal(run(masked, graph, x, R), run(Gradient(), graph, x, mask_border(R)))
    assert not np.array_equal(run(masked, graph, x, R), run(plain, graph, x, R))


def test_masked_convolution_towards_its_weights() -> None:
    """Weights that depend on the input get the masked gradient as well."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 2, 3, 3))
    graph = single("Conv", (2, 2, 5, 5), {"w": weights}, pads=[1] * 4)
    x, R = rng.standard_normal((2, 2, 5, 5)), rng.standard_normal((2, 3, 5, 5))
    found = run(ConvTranspose(mask_border=True), graph, x, R, position=1)
    assert np.array_equal(found, run(Gradient(), graph, x, mask_border(R), position=1))


def test_rules_print_the_parameters_that_are_not_the_default() -> None:
    assert str(Rectify()) == "Rectify()"
    assert str(Rectify(tau=math.inf, scope="batch")) == "Rectify(tau=inf, scope='batch')"
    assert repr(Rectify()).startswith("Rectify(score='a*r', q=98.0, tau=None")
    assert str(Gradient()) == repr(Gradient()) == "Gradient()"
