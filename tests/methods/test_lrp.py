"""ε-LRP against the slow derivation."""

from __future__ import annotations

from typing import Any

import nets
import pytest
import slow
from derived import at_input, close, explained, gradients
from nets import Op, Weights


def ratio(eps: float) -> slow.ActivationRule:
    def unit(z: float, a: float, r: float) -> float:
        return r * a / (z + eps if z >= 0 else z - eps)

    def rule(op: Op, z: list[Any], a: list[Any], R: list[Any]) -> list[Any]:
        return [slow.each(unit, *units) for units in zip(z, a, R, strict=True)]

    return rule


@pytest.mark.parametrize("build", [nets.plain, nets.branched])
@pytest.mark.parametrize("eps", [1e-4, 0.5])
@pytest.mark.parametrize("integers", [False, True])
def test_relu_networks(build: Any, eps: float, integers: bool) -> None:
    weights = Weights(1, integers=integers)  # with integers, z is often exactly 0
    net = build(weights)
    images = weights.images(net, 2)
    expected = images * at_input(gradients(net, images, ratio(eps)))
    assert close(explained(net, images, "epsilon_lrp", eps=eps), expected)


@pytest.mark.parametrize("kind", ["LeakyRelu", "Elu", "Tanh", "Sigmoid"])
def test_other_activations(kind: str) -> None:
    weights = Weights(2)
    net = nets.plain(weights, kind, {"alpha": 0.25} if kind == "LeakyRelu" else {})
    images = weights.images(net, 2)
    expected = images * at_input(gradients(net, images, ratio(1e-4)))
    assert close(explained(net, images, "epsilon_lrp"), expected)


def test_sign_of_zero_is_positive() -> None:
    """Sigmoid(0) = 1/2 over 0 + ε, not over 0 − ε."""
    one = nets.np.ones((1, 1), "float32")
    net = nets.Net(
        (1,),
        (
            Op("Sigmoid", "a", ("x",)),
            Op("Gemm", "y", ("a",), (nets.np.hstack([one, one]), nets.np.zeros(2, "float32"))),
        ),
    )
    result = explained(net, nets.np.zeros((1, 1), "float32"), "epsilon_lrp", trace=True)
    assert result.layers()["a"].R_in == pytest.approx(0.5 / 1e-4)


def test_nonlinear_operators_are_named() -> None:
    from rectgrad_ref import Explainer

    plain = Explainer(nets.plain(Weights(0)).onnx(), backend="reference")
    assert plain.plan("epsilon_lrp").notes == ()
    net = nets.Net(
        (4,),
        (
            Op("Relu", "relu", ("x",)),
            Op("Exp", "exponential", ("relu",)),
            Op("Gemm", "y", ("exponential",), (Weights(0)(4, 2), Weights(0)(2))),
        ),
    )
    (note,) = Explainer(net.onnx(), backend="reference").plan("epsilon_lrp").notes
    assert "ε-LRP" in note and "Exp 'exponential'" in note and "Relu" not in note
