"""Deconvolution and guided backpropagation against the slow derivation."""

from __future__ import annotations

from typing import Any

import nets
import numpy as np
import pytest
import slow
from derived import at_input, close, explained, gradients
from nets import Op, Weights

PADDED = {"conv1", "conv2", "wide"}


def positive(guided: bool) -> slow.ActivationRule:
    def unit(op: Op, z: float, r: float) -> float:
        if guided and z <= 0:
            return 0.0
        slope = 1.0 if op.kind == "Relu" else slow.slope(op, z)
        return max(r, 0.0) * slope

    def rule(op: Op, z: list[Any], a: list[Any], R: list[Any]) -> list[Any]:
        pairs = zip(z, R, strict=True)
        return [slow.each(lambda z, r: unit(op, z, r), *pair) for pair in pairs]

    return rule


METHODS = pytest.mark.parametrize(
    ("method", "guided"), [("deconvolution", False), ("guided_backprop", True)]
)


@METHODS
@pytest.mark.parametrize("build", [nets.plain, nets.branched])
@pytest.mark.parametrize("trick", [False, True])
@pytest.mark.parametrize("integers", [False, True])
def test_relu_networks(method: str, guided: bool, build: Any, trick: bool, integers: bool) -> None:
    weights = Weights(1, integers=integers)
    net = build(weights)
    images = weights.images(net, 2)
    result = explained(net, images, method, padding_trick=trick, trace=True)
    R = gradients(net, images, positive(guided), masked=PADDED if trick else ())
    assert close(result, at_input(R), 0 if integers else 1e-9)
    for name, layer in result.layers().items():
        assert close(layer.R_out, np.stack([r[name] for r in R]), 0 if integers else 1e-9)
        assert layer.tau is None and layer.mask is None


@METHODS
@pytest.mark.parametrize("kind", ["LeakyRelu", "Elu", "Sigmoid", "Tanh", "HardSwish"])
def test_other_activations_keep_their_derivative(method: str, guided: bool, kind: str) -> None:
    weights = Weights(2)
    net = nets.plain(weights, kind, {"alpha": 0.25} if kind == "LeakyRelu" else {})
    images = weights.images(net, 2)
    R = at_input(gradients(net, images, positive(guided)))
    assert close(explained(net, images, method), R, 1e-6)


@METHODS
@pytest.mark.parametrize("times_input", [False, True])
@pytest.mark.parametrize("final_threshold", [False, True])
@pytest.mark.parametrize("ties", ["first", "split"])
def test_options(
    method: str, guided: bool, times_input: bool, final_threshold: bool, ties: str
) -> None:
    weights = Weights(3, integers=True)
    net = nets.branched(weights)
    images = weights.images(net, 2)
    result = explained(
        net,
        images,
        method,
        times_input=times_input,
        final_threshold=final_threshold,
        maxpool_ties=ties,
    )
    pool = slow.to_first if ties == "first" else slow.split
    expected = at_input(gradients(net, images, positive(guided), pool))
    expected = expected * images if times_input else expected
    expected = expected * (expected > 0) if final_threshold else expected
    assert close(result, expected)
