"""The plan: which rule where, what is kept, and what is refused before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import NEWEST, backward, float32, model

from rectgrad_ref.errors import InvalidModel, UnsupportedOperator
from rectgrad_ref.explainer import Explainer
from rectgrad_ref.forward import NumpyForward
from rectgrad_ref.graph import Graph, freeze
from rectgrad_ref.model import read_model
from rectgrad_ref.plan import make_plan
from rectgrad_ref.rules.declared import Gradient, PositiveGradient, Rescale

W = float32(3, 4)


def frozen(body: str, *, outputs: str = "float[N, 4] y", output: str = "y", **more: Any) -> Graph:
    constants = {"W": W, **{name: np.asarray(value) for name, value in more.items()}}
    proto = model(
        f"(float[N, 3] x) => ({outputs}) {{ {body} }}", constants=constants, domains=["my"]
    )
    return freeze(read_model(proto), (2, 3), output=output)


def test_steps_go_from_the_logits_to_the_input() -> None:
    graph = frozen("z = MatMul(x, W)  r = Relu(z)  s = Sigmoid(r)  y = Softmax(s)")
    plan = make_plan(graph, ())
    assert graph.logits == "s"
    assert [step.node.op for step in plan.steps] == ["Sigmoid", "Relu", "MatMul"]
    assert [step.writes for step in plan.steps] == [("r",), ("z",), ("x",)]
    assert [step.reads for step in plan.steps] == [("r",), ("r",), ("W",)]
    assert plan.exposes == ("r",)
    assert plan.layers == {"s", "r"}
    assert not plan.contrasts


def test_the_first_matching_rule_wins() -> None:
    graph = frozen("[one] z = MatMul(x, W)  [two] r = Relu(z)  [three] y = Relu(r)")
    rules = (
        (lambda node: node.name == "two", PositiveGradient()),
        (lambda node: node.op == "Relu", Rescale()),
        (lambda node: True, Gradient()),
    )
    plan = make_plan(graph, rules)
    assert [step.rule for step in plan.steps] == [Rescale(), PositiveGradient(), Gradient()]
    assert plan.contrasts
    assert set(plan.exposes) == {"r", "y"}


def test_gradients_of_a_value_read_several_times_add_up() -> None:
    graph = frozen(
        "a = Mul(x, x)  b = Add(a, x)  c = Concat<axis = 1>(b, b, x)  y = MatMul(c, V)",
        V=float32(9, 4),
    )
    x, seed = float32(2, 3).astype(np.float64), float32(2, 4, seed=1).astype(np.float64)
    V = graph.constants["V"].astype(np.float64)
    into = (seed @ V.T).reshape(2, 3, 3)
    expected = (into[:, 0] + into[:, 1]) * (2 * x + 1) + into[:, 2]
    np.testing.assert_allclose(backward(graph, x, seed), expected)


def test_outputs_that_nobody_reads_have_no_gradient() -> None:
    graph = frozen("a, b, c = Split<axis = 1, num_outputs = 3>(x)  y = Relu(b)")
    x = np.ones((2, 3))
    np.testing.assert_array_equal(backward(graph, x, np.ones((2, 1))), [[0, 1, 0]] * 2)


def test_the_input_may_be_the_logits() -> None:
    graph = frozen("y = Softmax(x)")
    assert graph.logits == "x"
    seed = float32(2, 3)
    np.testing.assert_array_equal(backward(graph, float32(2, 3), seed), seed)


UNSUPPORTED = [
    ("my.Custom", "h = my.Custom(x)  z = MatMul(h, W)  y = Relu(z)", "x → h → z → … → y"),
    ("my.Relu", "z = MatMul(x, W)  y = my.Relu(z)", "x → z → y"),
    ("Unknown", "z = MatMul(x, W)  h = Unknown(z)  y = Relu(h)", "x → z → h → y"),
    ("Unknown", "a = Neg(x)  b = Neg(a)  h = Unknown(b)  y = Neg(h)", "x → … → b → h → y"),
    ("Unknown", "a = Neg(x)  h = Unknown(a)  y = Softmax(h)", "x → a → h"),
]


@pytest.mark.parametrize(("op", "body", "path"), UNSUPPORTED)
def test_an_operator_without_a_rule_is_refused_by_name_with_the_path(
    op: str, body: str, path: str
) -> None:
    pattern = rf"^{op} '\w' \(<ModelProto>, opset {NEWEST}\): no backward rule; on the path {path}"
    with pytest.raises(UnsupportedOperator, match=pattern + r"\. Supported: Abs, Acos,"):
        make_plan(frozen(body), ())


def test_of_several_the_first_on_the_path_is_named() -> None:
    body = 'h = my.First(x)  z = Einsum<equation = "ij,jk->ik">(h, W)  y = my.Last(z)'
    with pytest.raises(UnsupportedOperator, match=r"^my\.First"):
        make_plan(frozen(body), ())


def test_an_input_without_a_rule_is_refused() -> None:
    body = "z = MatMul(x, W)  m = ReduceMean<keepdims = 0>(z, one)  y = Clip(z, low, m)"
    with pytest.raises(UnsupportedOperator, match=r"^Clip 'y'"):
        make_plan(frozen(body, one=[0, 1], low=np.float32(0)), ())


@pytest.mark.parametrize(
    "body",
    [
        "z = MatMul(x, W)  u = my.Custom(x)  y = Relu(z)",
        "z = MatMul(x, W)  i = ArgMax<axis = 1>(z)  m = Equal(i, zero)  y = Where(m, z, z)",
        "z = MatMul(x, W)  v, i = TopK(z, one)  m = Equal(i, zero)  y = Where(m, z, z)",
    ],
)
def test_beside_the_path_nothing_is_refused(body: str) -> None:
    assert make_plan(frozen(body, zero=[0], one=[1]), ()).steps


@pytest.mark.parametrize("body", [UNSUPPORTED[0][1], UNSUPPORTED[1][1]])
def test_refused_before_any_computation(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any) -> None:
        raise AssertionError("the forward pass was run")

    monkeypatch.setattr(NumpyForward, "__call__", run)
    explainer = Explainer(frozen(body).model.proto, backend="reference")
    with pytest.raises(UnsupportedOperator, match="no backward rule"):
        explainer.explain(float32(2, 3))
    with pytest.raises(UnsupportedOperator, match="no backward rule"):
        explainer.plan()


def test_shapes_that_depend_on_the_data_are_refused() -> None:
    body = "r = ReduceSum(x)  n = Cast<to = 7>(r)  m = Reshape(n, one)  y = Slice(x, one, m)"
    with pytest.raises(UnsupportedOperator, match=r"Slice 'y'.*of 'y' depends on the data"):
        make_plan(frozen(body, one=[1]), ())


@pytest.mark.parametrize(
    "body",
    [
        "i = ArgMax<axis = 1>(x)  y = Cast<to = 1>(i)",
        "g = Greater(x, half)  y = Cast<to = 1>(g)",
        "s = Shape<end = 1>(x)  c = ConstantOfShape(s)  r = RandomNormalLike(c)"
        " u = Unsqueeze(r, one)  y = Concat<axis = 1>(u, u)",
    ],
)
def test_logits_that_no_gradient_connects_to_the_input(body: str) -> None:
    with pytest.raises(InvalidModel, match="no gradient flows from 'y' to 'x'"):
        make_plan(frozen(body, half=np.float32(0.5), one=[1]), ())
