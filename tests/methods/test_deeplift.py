"""DeepLIFT's Rescale rule against the slow derivation, and its completeness."""

from __future__ import annotations

import dataclasses
from typing import Any

import nets
import numpy as np
import pytest
import slow
from derived import TARGET, at_input, close, explained
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net, Op, Weights

from rectgrad_ref import Explainer


def multipliers(
    net: Net, images: np.ndarray, baseline: np.ndarray, pool_rule: str = "gradient"
) -> np.ndarray:
    """∂S/∂x with Δa/Δz in the place of every derivative."""
    there = slow.forward(net, baseline)

    def rule(op: Op, z: list[Any], a: list[Any], R: list[Any]) -> list[Any]:
        z0, a0 = there[op.inputs[0]], there[op.name]

        def unit(z: float, z0: float, a: float, a0: float, r: float) -> float:
            if abs(z - z0) > 1e-5:
                return r * (a - a0) / (z - z0)
            return r * slow.slopes(op, (z + z0) / 2)

        return [slow.each(unit, z1, z0, a1, a0, r) for z1, a1, r in zip(z, a, R, strict=True)]

    def pool(op: Op, x: np.ndarray, y: np.ndarray, R: np.ndarray) -> np.ndarray:
        """What each window's Δy owes to the cell that is its maximum, and to the baseline's."""
        x0, y0 = there[op.inputs[0]], there[op.name]
        share, plain = np.zeros_like(x), np.zeros_like(x)
        for c, place, cells in slow.windows(op, x.shape):
            here = next(k for k in cells if x[c, *k] == y[c, *place])
            before = next(k for k in cells if x0[c, *k] == y0[c, *place])
            higher, r = max(y[c, *place], y0[c, *place]), R[c, *place]
            share[c, *here] += r * (higher - y0[c, *place])
            share[c, *before] += r * (y[c, *place] - higher)
            plain[c, *here] += r
        return slow.each(lambda s, d, p: s / d if abs(d) > 1e-10 else p, share, x - x0, plain)

    values = [slow.forward(net, x) for x in images]
    seed = np.eye(values[0][net.output].size)[TARGET]
    pooling = slow.to_first if pool_rule == "gradient" else pool
    return at_input(slow.backward(net, values, [seed] * len(images), rule, pooling))


@pytest.mark.parametrize("build", [nets.plain, nets.branched])
@pytest.mark.parametrize("maxpool", ["gradient", "rescale"])
@pytest.mark.parametrize("integers", [False, True])
def test_relu_networks(build: Any, maxpool: str, integers: bool) -> None:
    weights = Weights(1, integers=integers)
    net = build(weights)
    images = weights.images(net, 2)
    expected = images * multipliers(net, images, np.zeros(net.shape), maxpool)
    result = explained(net, images, "deeplift", maxpool=maxpool)
    assert close(result, expected)


@pytest.mark.parametrize("kind", ["LeakyRelu", "Elu", "Sigmoid", "Tanh"])
def test_other_activations_and_a_baseline(kind: str) -> None:
    weights = Weights(2)
    net = nets.plain(weights, kind, {"alpha": 0.25} if kind == "LeakyRelu" else {})
    images = weights.images(net, 2)
    baseline = weights.images(net, 1)[0].astype(np.float64)
    expected = (images - baseline) * multipliers(net, images, baseline)
    assert close(explained(net, images, "deeplift", baseline=baseline), expected)


def test_where_nothing_changes_the_derivative_half_way_is_taken() -> None:
    weights = Weights(3)
    net = nets.plain(weights, "Tanh")
    (image,) = weights.images(net, 1)
    images = image[None] + np.float32([0, 1e-7]).reshape(2, 1, 1, 1)
    result = explained(net, images, "deeplift", baseline=image, trace=True)
    slopes = explained(net, images, "saliency", trace=True)
    for name, layer in result.layers().items():
        assert close(layer.R_in, slopes.layers()[name].R_in, 1e-5)
    assert not result.values[0].any()


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["plain", "branched", "Tanh"]),
    st.sampled_from(["zero", "image"]),
)
def test_rescale_is_complete(seed: int, build: str, start: str) -> None:
    """Through affine layers, activations and max pools, contributions add up to ΔS."""
    weights = Weights(seed)
    net = {
        "plain": nets.plain,
        "branched": nets.branched,
        "Tanh": lambda w: nets.plain(w, "Tanh"),
    }[build](weights)
    images = weights.images(net, 3)
    baseline = 0.0 if start == "zero" else weights.images(net, 1)[0]
    result = explained(net, images, "deeplift", maxpool="rescale", baseline=baseline)
    assert np.abs(result.completeness_gap).max() < 1e-9


def test_gap_is_reported() -> None:
    """With the max pool's gradient contributions do not add up; the gap says by how much."""
    weights = Weights(5)
    net = nets.plain(weights)
    images = weights.images(net, 2)
    baseline = weights.images(net, 1)[0]
    result = explained(net, images, "deeplift", baseline=baseline)
    for values, x, gap in zip(result.values, images, result.completeness_gap, strict=True):
        ends = [slow.forward(net, v)[net.output][TARGET] for v in (x, baseline)]
        assert gap == pytest.approx(values.sum() - (ends[0] - ends[1]), abs=1e-12)
    assert np.abs(result.completeness_gap).max() > 1e-3


def test_a_baseline_for_each_sample_survives_chunking() -> None:
    weights = Weights(7)
    net = nets.plain(weights)
    images, baselines = weights.images(net, 5), weights.images(net, 5)
    whole = explained(net, images, "deeplift", baseline=baselines)
    for size in (1, 2):
        explainer = Explainer(net.onnx(), backend="reference", batch_size=size)
        parts = explainer.explain(images, method="deeplift", target=TARGET, baseline=baselines)
        assert close(parts, whole, 1e-12)
    alone = [
        explained(net, x[None], "deeplift", baseline=b)
        for x, b in zip(images, baselines, strict=True)
    ]
    assert close(np.concatenate(alone), whole, 1e-12)


@pytest.mark.parametrize("method", ["deeplift", "integrated_gradients"])
def test_a_baseline_that_is_not_finite(method: str) -> None:
    net = nets.plain(Weights(0))
    with pytest.raises(ValueError, match="baseline has NaN or infinity"):
        explained(net, np.ones((1, *net.shape), np.float32), method, baseline=np.full(1, np.inf))


def test_a_baseline_that_does_not_fit() -> None:
    net = nets.plain(Weights(0))
    with pytest.raises(ValueError, match=r"baseline of shape \(5,\) does not broadcast"):
        explained(net, np.ones((1, *net.shape), np.float32), "deeplift", baseline=np.ones(5))


def test_nonlinear_operators_are_named() -> None:
    net = nets.branched(Weights(0))
    assert Explainer(net.onnx(), backend="reference").plan("deeplift").notes == ()
    squared = Op("Mul", "square", ("pool2", "pool2"))
    after = dataclasses.replace(net.ops[12], inputs=("square",))
    net = dataclasses.replace(net, ops=(*net.ops[:12], squared, after, *net.ops[13:]))
    (note,) = Explainer(net.onnx(), backend="reference").plan("deeplift").notes
    assert "DeepLIFT" in note and "Mul 'square'" in note
