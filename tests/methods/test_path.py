"""SmoothGrad and integrated gradients."""

from __future__ import annotations

from typing import Any

import nets
import numpy as np
import pytest
import slow
from derived import TARGET, at_input, close, explained, gradients
from nets import Net, Weights
from onnx import helper, numpy_helper

from rectgrad_ref import Explainer, IntegratedGradients, SmoothGrad


def small(seed: int) -> tuple[Net, np.ndarray]:
    weights = Weights(seed)
    net = nets.plain(weights, size=4)
    return net, weights.images(net, 3)


# --- integrated gradients -------------------------------------------------------------------------

QUADRATURES: dict[str, list[tuple[float, float]]] = {
    "right": [(k / 8, 1 / 8) for k in range(1, 9)],
    "trapezoid": [(k / 8, (0.5 if k in (0, 8) else 1) / 8) for k in range(9)],
}


@pytest.mark.parametrize("rule", QUADRATURES)
@pytest.mark.parametrize("with_baseline", [False, True])
def test_integrated_gradients(rule: str, with_baseline: bool) -> None:
    net, images = small(1)
    start = Weights(9).images(net, 1)[0].astype(float) if with_baseline else np.zeros(net.shape)
    total = np.zeros(images.shape)
    for alpha, weight in QUADRATURES[rule]:
        points = start + alpha * (images - start)
        total += weight * at_input(gradients(net, points))
    options = {"baseline": start} if with_baseline else {}
    result = explained(net, images, "integrated_gradients", steps=8, rule=rule, **options)
    assert close(result, (images - start) * total)


def power(degree: int) -> Any:
    """S = (x₀^degree, 0): the gradient along a ray is a polynomial of that degree − 1 in α."""
    nodes = [
        helper.make_node("Pow", ["x", "n"], ["p"]),
        helper.make_node("MatMul", ["p", "w"], ["logits"]),
    ]
    constants = {"n": np.float32(degree), "w": np.array([[1, 0], [1, 0]], np.float32)}
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    return nets.model(nodes, ["N", 2], "logits", initializers)


@pytest.mark.parametrize(
    ("rule", "steps", "degree"),
    [("trapezoid", 1, 2), ("trapezoid", 7, 2), ("gauss_legendre", 1, 2), ("gauss_legendre", 3, 6)],
)
def test_quadrature_is_exact_on_polynomials(rule: str, steps: int, degree: int) -> None:
    """The trapezoid on linear gradients; n Gauss–Legendre points on those of degree 2n − 1."""
    x = np.array([[1.5, -0.75], [2, 1]], np.float32)
    explainer = Explainer(power(degree), backend="reference")
    result = explainer.explain(x, method="integrated_gradients", target=0, rule=rule, steps=steps)
    assert np.allclose(result.values, x.astype(float) ** degree, rtol=1e-13)
    assert np.abs(result.completeness_gap).max() < 1e-12


def test_one_degree_more_is_not_exact() -> None:
    x = np.array([[1.5, -0.75]], np.float32)
    explainer = Explainer(power(3), backend="reference")
    for rule in ("trapezoid", "gauss_legendre"):
        result = explainer.explain(x, method="integrated_gradients", target=0, rule=rule, steps=1)
        assert np.abs(result.completeness_gap).max() > 0.1


def test_right_rule_takes_the_quotient() -> None:
    method = IntegratedGradients()
    x = np.ones((1, 1))
    points = [method.point(x, k, np.zeros(1)).item() for k in range(method.passes)]
    assert points == [k / 50 for k in range(1, 51)]


@pytest.mark.parametrize("kind", ["Relu", "Tanh"])
def test_gap_shrinks_with_steps(kind: str) -> None:
    weights = Weights(3)
    net = nets.plain(weights, kind, size=4)
    images = weights.images(net, 3)
    gaps = [
        np.abs(
            explained(net, images, "integrated_gradients", steps=steps, rule=rule).completeness_gap
        ).max()
        for rule in ("right", "trapezoid")
        for steps in (50, 400)
    ]
    assert gaps[1] < gaps[0] / 2 and gaps[3] < gaps[2] / 2
    assert gaps[1] < 1e-2


def test_gap_is_the_sum_less_the_difference() -> None:
    net, images = small(4)
    result = explained(net, images, "integrated_gradients", steps=3)
    for values, x, gap in zip(result.values, images, result.completeness_gap, strict=True):
        ends = [slow.forward(net, v)[net.output][TARGET] for v in (x, 0 * x)]
        assert gap == pytest.approx(values.sum() - (ends[0] - ends[1]), abs=1e-12)


# --- SmoothGrad -----------------------------------------------------------------------------------


class Recorded(SmoothGrad):
    """SmoothGrad that keeps the points at which gradients are taken."""

    points: list[np.ndarray]

    def point(self, x: np.ndarray, k: int, keys: np.ndarray) -> np.ndarray:
        made = super().point(x, k, keys)
        self.__dict__.setdefault("points", []).append(made)
        return made


@pytest.mark.parametrize("extent", ["sample", "batch"])
def test_smoothgrad_is_the_mean_of_saliency_maps(extent: Any) -> None:
    net, images = small(5)
    images[1] *= 3
    method = Recorded(n=4, sigma=0.2, range=extent)
    result = Explainer(net.onnx(), backend="reference").explain(
        images, method=method, target=TARGET
    )
    points = method.__dict__["points"]
    assert len(points) == 4
    mean = sum(at_input(gradients(net, p)) for p in points) / 4
    assert close(result, mean)
    plain = explained(net, images, "smoothgrad", n=4, sigma=0.2, range=extent)
    assert np.array_equal(plain, result)


def test_noise_has_the_stated_size() -> None:
    """σ = 0.1 · (max − min), of the sample or of the batch."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2, 3, 40, 40))
    x[1] *= 5
    for extent, spans in (
        ("sample", [np.ptp(x[0]), np.ptp(x[1])]),
        ("batch", [np.ptp(x), np.ptp(x)]),
    ):
        method = SmoothGrad(range=extent)
        keys = np.arange(2)
        noise = np.stack([method.point(x, k, keys) - x for k in range(20)])
        for i, span in enumerate(spans):
            part = noise[:, i] / (0.1 * span)
            assert abs(part.mean()) < 4 / np.sqrt(part.size)
            assert abs(part.std() - 1) < 4 / np.sqrt(2 * part.size)


def test_noise_does_not_depend_on_batching() -> None:
    """Chunks of 1, 2 and 7, samples alone or in another order: the same noise."""
    weights = Weights(6)
    net = nets.plain(weights, size=4)
    images = weights.images(net, 5)
    whole = Explainer(net.onnx(), backend="reference").explain(
        images, method="smoothgrad", n=6, target=TARGET
    )
    for size in (1, 2, 7):
        explainer = Explainer(net.onnx(), backend="reference", batch_size=size)
        method = Recorded(n=6)
        result = explainer.explain(images, method=method, target=TARGET)
        assert close(result, whole, 1e-12)
        points = np.stack(method.__dict__["points"])
        x, keys = images.astype(float), np.arange(5)
        expected = np.stack([SmoothGrad().point(x, k, keys) for k in range(6)])
        assert np.array_equal(points, expected)
    order = [3, 0, 4]
    some = explainer.explain(images[order], method="smoothgrad", n=6, target=TARGET, keys=order)
    assert close(some, whole.values[order], 1e-12)


def test_noise_differs_by_sample_copy_and_seed() -> None:
    x = np.random.default_rng(1).uniform(size=(1, 3, 4, 4)).repeat(2, axis=0)
    method = SmoothGrad()
    first, second = method.point(x, 0, np.arange(2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, method.point(x, 1, np.arange(2))[0])
    assert not np.array_equal(first, SmoothGrad(seed=1).point(x, 0, np.arange(2))[0])
    assert np.array_equal(first, SmoothGrad().point(x, 0, np.arange(2))[0])


def test_noise_is_the_same_in_both_dtypes() -> None:
    x = np.random.default_rng(1).uniform(size=(2, 3, 8, 8)).astype(np.float32)
    double = SmoothGrad().point(x.astype(np.float64), 0, np.arange(2))
    single = SmoothGrad().point(x, 0, np.arange(2))
    assert single.dtype == np.float32
    assert np.abs(single - double).max() <= 2**-22


def test_target_is_that_of_the_clean_image() -> None:
    net, images = small(8)
    images *= 0.05
    result = Explainer(net.onnx(), backend="reference").explain(
        images, method="smoothgrad", n=3, sigma=50.0
    )
    clean = [slow.forward(net, x)[net.output] for x in images]
    assert result.target.tolist() == [int(np.argmax(v)) for v in clean]
    assert np.allclose(result.logits, clean)


def test_authors_take_the_range_of_the_batch() -> None:
    net, images = small(9)
    images[0] *= 4
    authors = explained(net, images, "smoothgrad", n=2, preset="authors")
    assert authors.method == SmoothGrad(n=2, range="batch")
    assert np.array_equal(authors, explained(net, images, "smoothgrad", n=2, range="batch"))


def test_one_noisy_copy_is_not_the_image() -> None:
    net, images = small(10)
    method = SmoothGrad(n=1, sigma=0.5)
    noisy = method.point(images.astype(float), 0, np.arange(3))
    result = explained(net, images, "smoothgrad", n=1, sigma=0.5)
    assert close(result, at_input(gradients(net, noisy)))


@pytest.mark.parametrize("method", ["smoothgrad", "integrated_gradients", "random"])
def test_there_is_no_trace_of_many_points(method: str) -> None:
    net, images = small(0)
    with pytest.raises(ValueError, match=f"{method} is not one walk back"):
        explained(net, images, method, trace=True)


@pytest.mark.parametrize(("cls", "name"), [(SmoothGrad, "n"), (IntegratedGradients, "steps")])
def test_at_least_one_pass(cls: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        cls(**{name: 0})
