"""The certificate: what holds on sound models, and that a broken package does not get one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import nets
import numpy as np
import onnx
import peer
import pytest

from rectgrad_ref.errors import BackendUnavailable, InvalidImage
from rectgrad_ref.rules import declared
from rectgrad_ref.verify import Certificate, certify
from rectgrad_ref.verify import certify as certify_function
from rectgrad_ref.verify.certify import Check
from rectgrad_ref.verify.conformance import concatenating, depthwise, plain, residual, smooth

pytest.importorskip("onnxruntime")


def failing(certificate: Certificate) -> set[str]:
    return {check.name for check in certificate.checks if check.verdict == "fails"}


def named(certificate: Certificate, name: str) -> list[Check]:
    return [check for check in certificate.checks if name in check.name]


@pytest.fixture(scope="module")
def sound() -> Certificate:
    return certify(plain(), peer.images(2))


@pytest.mark.parametrize("build", [residual, concatenating, depthwise])
def test_sound_networks(build: Callable[[], onnx.ModelProto]) -> None:
    found = certify(build())
    assert found.holds
    assert failing(found) == set()
    assert found.images == "seeded noise"
    everywhere = [check for check in found.checks if check.where != "cuda"]
    assert {check.verdict for check in everywhere} == {"holds", "reported"}


def test_counts(sound: Certificate) -> None:
    """a, R_out and R_in at 3 layers of 320 + 96 + 30 units, and the map, of two images."""
    for check in named(sound, "× input = RectGrad"):
        assert (check.count, check.wrong) == (2 * (3 * (320 + 96 + 30) + 192), 0)
    for check in named(sound, "masks and τ"):
        assert (check.count, check.wrong) == (2 * (320 + 96 + 30), 0)


def test_every_identity_on_every_backend(sound: Certificate) -> None:
    for name in ("deconvolution ×", "guided backpropagation ×", "gradient × input ="):
        where = [check.where for check in named(sound, name)]
        assert where == ["NumPy float64", "NumPy float32", "cpu", "cpu, no padding trick"]
    (epsilon,) = named(sound, "ε-LRP")
    assert epsilon.largest is not None and epsilon.allowed is not None
    assert epsilon.largest < epsilon.allowed


def test_completeness(sound: Certificate) -> None:
    rescaled, gradient, path = (c for c in sound.checks if c.group.startswith("Completeness"))
    assert rescaled.verdict == "holds" and rescaled.largest is not None
    assert rescaled.largest < 1e-12
    assert (gradient.verdict, gradient.allowed) == ("reported", None)
    assert path.verdict == "holds" and path.largest is not None and path.allowed is not None
    assert path.largest < path.allowed / 4  # eight times as many steps


def test_sensitivity(sound: Certificate) -> None:
    assert [layer.value for layer in sound.layers] == list(peer.RELUS)
    assert [layer.units for layer in sound.layers] == [640, 192, 60]
    assert sound.layers[-1].passing == 2
    assert [layer.near for layer in sound.layers] == [0, 0, 0]
    assert sound.moves == 0


def test_units_at_the_threshold_move_the_map() -> None:
    """Two channels with equal weights: equal scores, in pairs, on either side of τ."""
    weights = nets.Weights(0)
    w = weights(2, 3, 3, 3)
    net = nets.Net(
        (3, 8, 8),
        (
            nets.conv("conv", "x", np.concatenate([w, w]), weights(4) * 0),
            nets.Op("Relu", "relu", ("conv",)),
            nets.Op("GlobalAveragePool", "mean", ("relu",)),
            nets.Op("Flatten", "flat", ("mean",)),
            nets.Op("Gemm", "dense", ("flat",), (np.tile(weights(2, 4), (2, 1)), weights(4))),
        ),
    )
    found = certify(net.onnx())
    assert found.holds
    assert found.layers[0].near >= 2
    assert found.moves > 0.01


def test_other_activations_than_relu() -> None:
    found = certify(smooth())
    assert found.holds
    identities = [check for check in found.checks if check.group.startswith("Identities")]
    assert len(identities) == 4
    assert {check.verdict for check in identities} == {"not applicable"}
    assert {check.note for check in identities} == {
        "an identity for ReLU; here activations are Elu"
    }


def test_completeness_is_not_demanded_where_it_cannot_hold() -> None:
    """x·Sigmoid(x) with the sigmoid as a gate of something else."""
    weights = nets.Weights(0)
    net = nets.Net(
        (3, 6, 6),
        (
            nets.conv("conv", "x", weights(4, 3, 3, 3), weights(4)),
            nets.Op("Relu", "relu", ("conv",)),
            nets.conv("gate", "x", weights(4, 3, 3, 3), weights(4)),
            nets.Op("Sigmoid", "sigmoid", ("gate",)),
            nets.Op("Mul", "product", ("relu", "sigmoid")),
            nets.Op("Flatten", "flat", ("product",)),
            nets.Op("Gemm", "dense", ("flat",), (weights(64, 4), weights(4))),
        ),
    )
    found = certify(net.onnx())
    (rescaled,) = named(found, "max pools rescaled")
    assert rescaled.verdict == "reported"
    assert "Mul 'product'" in rescaled.note
    assert rescaled.largest is not None and rescaled.largest > 1e-3
    assert found.holds


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    from rectgrad_ref import explainer

    whole = explainer.make_backend

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "cpu":
            raise BackendUnavailable("onnxruntime is not installed")
        return whole(name, *arguments, **options)

    monkeypatch.setattr(explainer, "make_backend", without)
    found = certify(plain())
    assert found.holds
    (missing,) = [check for check in found.checks if check.where == "cpu"]
    assert (missing.verdict, missing.note) == ("not applicable", "onnxruntime is not installed")
    assert named(found, "integrated gradients")[0].where == "NumPy float32"


@pytest.mark.slow
def test_the_package_s_own_network() -> None:
    found = certify()
    assert found.holds
    assert found.images == "1 image"
    assert [layer.value for layer in found.layers] == [f"relu{i}" for i in range(1, 6)]


def test_it_tells_how_far_it_is() -> None:
    told: list[str] = []
    certify_function(plain(), peer.images(1), tell=told.append)
    assert told == [
        "identities", "agreement of the backends", "gradients by finite differences",
        "completeness", "sensitivity",
    ]  # fmt: skip


def test_pictures_need_preprocessing() -> None:
    from rectgrad_ref.demo import cat

    with pytest.raises(InvalidImage):
        certify(plain(), cat())


# --- broken packages ------------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch, rule: type, change: Callable[[Any], Any]) -> None:
    """Change what a rule computes in NumPy; the compiled kernels stay as they are."""
    whole = rule.__call__
    monkeypatch.setattr(rule, "__call__", lambda self, call: change(whole(self, call)))


def test_a_wrong_mask_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = declared.Rectify.__call__

    def not_strict(self: Any, call: Any) -> Any:
        return whole(replace(self, strictness=">="), call)

    monkeypatch.setattr(declared.Rectify, "__call__", not_strict)
    found = failing(certify(plain(), peer.images(2)))
    assert "RectGrad: masks and τ" in found
    assert "guided backpropagation × input = RectGrad at τ = 0" in found


def test_a_wrong_linear_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, declared.Gradient, lambda R: R * (1 + 1e-4))
    found = failing(certify(plain(), peer.images(2)))
    assert "saliency: linear steps" in found
    assert "saliency by central differences in random directions" in found
    assert "DeepLIFT, max pools rescaled" in found
    # Where backpropagation has the same part in both sides, both are wrong alike.
    assert [name for name in found if "= RectGrad" in name] == [
        "gradient × input = RectGrad at τ = −∞"
    ]


def test_a_wrong_max_pool_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, declared.MaxPoolBackward, lambda R: np.roll(R, 1, axis=-1))
    assert {"RectGrad: linear steps"} <= failing(certify(plain(), peer.images(2)))
