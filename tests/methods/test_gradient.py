"""Saliency, gradient × input and random maps."""

from __future__ import annotations

from typing import Any

import nets
import numpy as np
import pytest
import slow
from derived import TARGET, at_input, close, explained, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Weights

from rectgrad_ref import Explainer

PADDED = {"conv1", "conv2", "wide"}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([nets.plain, nets.branched]))
def test_saliency_of_integer_networks_is_exact(seed: int, build: Any) -> None:
    weights = Weights(seed, integers=True)
    net = build(weights)
    images = weights.images(net, 2)
    assert np.array_equal(explained(net, images, "saliency"), at_input(gradients(net, images)))


@pytest.mark.parametrize("kind", ["Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "Softplus"])
def test_saliency_is_the_slope_of_the_logit(kind: str) -> None:
    """Finite differences of the whole network, pixel by pixel."""
    weights = Weights(1)
    net = nets.plain(weights, kind, {"alpha": 0.25} if kind == "LeakyRelu" else {}, size=4)
    (x,) = weights.images(net, 1)
    result = explained(net, x, "saliency")
    h = 1e-5
    slopes = np.zeros(x.shape)
    for cell in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[cell] = h
        ends = [slow.forward(net, x + s)[net.output][TARGET] for s in (step, -step)]
        slopes[cell] = (ends[0] - ends[1]) / (2 * h)
    assert close(result, slopes[None], 1e-7)


@pytest.mark.parametrize("trick", [False, True])
@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize("final_threshold", [False, True])
def test_input_x_gradient(trick: bool, ties: str, final_threshold: bool) -> None:
    weights = Weights(2, integers=True)
    net = nets.branched(weights)
    images = weights.images(net, 2)
    result = explained(
        net,
        images,
        "input_x_gradient",
        padding_trick=trick,
        maxpool_ties=ties,
        final_threshold=final_threshold,
    )
    pool = slow.to_first if ties == "first" else slow.split
    R = at_input(gradients(net, images, pool=pool, masked=PADDED if trick else ()))
    expected = images * R
    if final_threshold:
        expected = np.where(expected > 0, expected, 0)
    assert close(result, expected)
    if ties == "first":
        assert np.array_equal(result, expected)


def test_random_maps_are_standard_normal_and_belong_to_their_sample() -> None:
    net = nets.plain(Weights(0))
    images = Weights(0).images(net, 40)
    explainer = Explainer(net.onnx(), backend="reference")
    maps = explainer.explain(images, method="random").values
    assert abs(maps.mean()) < 4 / np.sqrt(maps.size)
    assert abs(maps.std() - 1) < 4 / np.sqrt(2 * maps.size)
    assert len(np.unique(maps)) == maps.size
    some = explainer.explain(images[[7, 3]], method="random", keys=[7, 3]).values
    assert np.array_equal(some, maps[[7, 3]])
    assert not np.array_equal(explainer.explain(images, method="random", seed=1).values, maps)
