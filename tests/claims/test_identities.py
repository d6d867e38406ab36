"""The paper's claims (section 4.2, appendix E) as identities, at every layer, bit by bit."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net, Op, Weights

from rectgrad_ref import Attribution, Explainer
from rectgrad_ref.errors import RectGradWarning
from rectgrad_ref.onnx_models import cifar10_cnn, inception_v4

IDENTITIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "claim 1": (
        {"method": "deconvolution", "times_input": True, "final_threshold": True},
        {"propagation_rule": "PR1+eps", "eps": 1e-6, "tau": 0.0},
    ),
    "claim 2": (
        {"method": "guided_backprop", "times_input": True, "final_threshold": True},
        {"tau": 0.0},
    ),
    "claim 3": (
        {"method": "input_x_gradient"},
        {"tau": -np.inf, "strict_relu": True, "final_threshold": False},
    ),
}
BACKENDS: dict[str, dict[str, Any]] = {
    "float64": {"backend": "reference"},
    "float32": {"backend": "reference", "dtype": "float32"},
    "cpu": {"backend": "cpu"},
}
identities = pytest.mark.parametrize("claim", IDENTITIES)
backends = pytest.mark.parametrize("backend", BACKENDS)
tricks = pytest.mark.parametrize("trick", [False, True, "same"], ids=str)
# NumPy takes seconds for a large network; every trick is tried on small ones too.
large = pytest.mark.parametrize(
    ("backend", "trick"),
    [
        ("float32", True),
        ("cpu", True),
        pytest.param("float64", True, marks=pytest.mark.slow),
        pytest.param("float32", "same", marks=pytest.mark.slow),
        pytest.param("cpu", "same", marks=pytest.mark.slow),
        pytest.param("cpu", False, marks=pytest.mark.slow),
    ],
)


def loaded(model: Any, backend: str) -> Explainer:
    if backend == "cpu":
        pytest.importorskip("onnxruntime")
    return Explainer(model, **BACKENDS[backend])


def both_sides(
    explainer: Explainer, x: np.ndarray, claim: str, **options: Any
) -> tuple[Attribution, Attribution]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RectGradWarning)  # maps too small for the padding trick
        baseline, rectgrad = (
            explainer.explain(x, trace=True, **side, **options) for side in IDENTITIES[claim]
        )
    return baseline, rectgrad


def check(baseline: Attribution, rectgrad: Attribution) -> None:
    assert baseline.layers().keys() == rectgrad.layers().keys()
    for name, layer in baseline.layers().items():
        other = rectgrad.layers()[name]
        assert np.array_equal(layer.a, other.a), name
        assert np.array_equal(layer.R_out, other.R_out), name
        assert np.array_equal(layer.R_in, other.R_in), name
    assert np.array_equal(baseline.values, rectgrad.values)
    assert np.isfinite(baseline.values).all()


def hold(explainer: Explainer, x: np.ndarray, claim: str, **options: Any) -> None:
    baseline, rectgrad = both_sides(explainer, x, claim, **options)
    check(baseline, rectgrad)
    assert baseline.values.any(), "both sides are zero, which shows nothing"


# --- small networks -------------------------------------------------------------------------------


@backends
@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([nets.plain, nets.branched]),
    st.sampled_from(list(IDENTITIES)),
    st.sampled_from([False, True, "same"]),
    st.sampled_from(["first", "split"]),
    st.booleans(),
)
def test_small_networks(
    backend: str, seed: int, build: Any, claim: str, trick: Any, ties: str, integers: bool
) -> None:
    weights = Weights(seed, integers=integers)
    net = build(weights)
    x = weights.images(net, 2)
    sides = both_sides(
        loaded(net.onnx(), backend), x, claim, padding_trick=trick, maxpool_ties=ties
    )
    check(*sides)


@identities
@backends
def test_products_that_underflow(backend: str, claim: str) -> None:
    """a and R of 1e-25: their float32 product is 0, but their signs are not."""
    weights = Weights(0)
    w, tiny = weights, np.float32(1e-25)
    net = Net(
        (2, 6, 6),
        (
            nets.conv("conv", "x", w(4, 2, 3, 3), w(4) * 0, pads=(1, 1, 1, 1)),
            Op("Relu", "relu1", ("conv",)),
            nets.pool("MaxPool", "pool", "relu1"),
            Op("Flatten", "flat", ("pool",)),
            Op("Gemm", "hidden", ("flat",), (w(36, 20), w(20) * 0)),
            Op("Relu", "relu2", ("hidden",)),
            Op("Gemm", "logits", ("relu2",), (w(20, 3) * tiny, w(3))),
        ),
    )
    explainer = loaded(net.onnx(), backend)
    x = weights.images(net, 2) * tiny
    # x·R underflows too, so that R itself is compared.
    options = {"padding_trick": True}
    if claim == "claim 3":
        baseline, rectgrad = both_sides(explainer, x, claim, **options)
    else:
        sides = [{**side, "times_input": False} for side in IDENTITIES[claim]]
        baseline, rectgrad = (explainer.explain(x, trace=True, **side, **options) for side in sides)
        assert baseline.values.any()
    check(baseline, rectgrad)
    if backend != "float64" and claim == "claim 2":
        for layer in rectgrad.layers().values():
            assert not (layer.a * layer.R_out).any()
            assert layer.R_in.any()


# --- the paper's networks, and SqueezeNet ---------------------------------------------------------


@pytest.fixture(scope="module")
def cifar10_model() -> onnx.ModelProto:
    """The paper's architecture with seeded Glorot weights and small biases."""
    rng = np.random.default_rng(0)

    def array(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return rng.normal(0, 0.05, shape).astype(np.float32)
        receptive = int(np.prod(shape[2:]))
        limit = np.sqrt(6 / (receptive * (shape[0] + shape[1])))
        return rng.uniform(-limit, limit, shape).astype(np.float32)

    return cifar10_cnn.build({name: array(shape) for name, shape in cifar10_cnn.SHAPES.items()})


@identities
@backends
@tricks
def test_cifar10_cnn(cifar10_model: onnx.ModelProto, backend: str, claim: str, trick: Any) -> None:
    x = np.random.default_rng(1).uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32)
    hold(loaded(cifar10_model, backend), x, claim, padding_trick=trick)


@identities
@large
def test_trained_cifar10_cnn(backend: str, claim: str, trick: Any) -> None:
    path = cifar10_cnn.network_path()
    if not path.exists():
        pytest.skip(f"{path.name} has not been trained")
    x = np.random.default_rng(1).uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32)
    hold(loaded(path, backend), x, claim, padding_trick=trick)


@identities
@large
def test_squeezenet(shared_data: Path, backend: str, claim: str, trick: Any) -> None:
    explainer = loaded(shared_data / "models" / "imagenet_squeezenet1.1_logits.onnx", backend)
    photo = shared_data / "photos" / "n01820546_lorikeet.JPEG"
    hold(explainer, photo, claim, padding_trick=trick, preprocess="caffe")


@pytest.fixture(scope="module")
def inception() -> Callable[[str, int], Explainer]:
    """Backend and image size → a loaded Inception V4, for all tests that want the same."""
    weights = inception_weights()

    @functools.cache
    def load(backend: str, size: int) -> Explainer:
        return loaded(inception_v4.build_model(weights, image_size=size), backend)

    return load


def inception_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) > 1:
            spread = np.sqrt(2 / np.prod(shape[1:]))
            return (rng.standard_normal(shape, dtype=np.float32) * spread).astype(np.float32)
        positive = name.endswith(("bn.weight", "running_var"))
        return rng.uniform(*((0.5, 1.5) if positive else (-0.2, 0.2)), shape).astype(np.float32)

    return {name: array(name, s) for name, s in inception_v4.parameter_shapes().items()}


@identities
@large
def test_inception_v4_small(
    inception: Callable[[str, int], Explainer], backend: str, claim: str, trick: Any
) -> None:
    x = np.random.default_rng(1).uniform(-1, 1, (1, 3, 75, 75)).astype(np.float32)
    hold(inception(backend, 75), x, claim, padding_trick=trick)


@pytest.mark.slow
@identities
@pytest.mark.parametrize(
    ("backend", "trick"), [("float32", True), ("cpu", True), ("cpu", "same"), ("cpu", False)]
)
def test_inception_v4(
    inception: Callable[[str, int], Explainer], backend: str, claim: str, trick: Any
) -> None:
    x = np.random.default_rng(1).uniform(-1, 1, (1, 3, 299, 299)).astype(np.float32)
    hold(inception(backend, 299), x, claim, padding_trick=trick)


# --- ε-LRP ----------------------------------------------------------------------------------------


def distance(explainer: Explainer, x: np.ndarray, eps: float) -> float:
    """The largest difference between ε-LRP and gradient × input, relative to the latter's."""
    product = explainer.explain(x, method="input_x_gradient").values
    relevance = explainer.explain(x, method="epsilon_lrp", eps=eps).values
    return float(np.abs(relevance - product).max() / np.abs(product).max())


@pytest.mark.parametrize("build", [nets.plain, nets.branched])
def test_epsilon_lrp_tends_to_gradient_times_input(build: Any) -> None:
    weights = Weights(2)
    net = build(weights)
    explainer = loaded(net.onnx(), "float64")
    x = weights.images(net, 3)
    distances = [distance(explainer, x, eps) for eps in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)]
    assert all(b < a / 50 for a, b in itertools.pairwise(distances))
    assert distances[-1] < 1e-8


def test_epsilon_lrp_on_the_cifar10_cnn(cifar10_model: onnx.ModelProto) -> None:
    x = np.random.default_rng(1).uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32)
    explainer = loaded(cifar10_model, "float64")
    assert distance(explainer, x, 1e-10) < 1e-5 < 1e-2 < distance(explainer, x, 1e-2)
