"""What a machine without a usable GPU is told."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import model

from rectgrad_ref import Explainer
from rectgrad_ref.errors import BackendUnavailable, RectGradWarning
from rectgrad_ref.executors import device as devices
from rectgrad_ref.executors import make_backend
from rectgrad_ref.executors.device import Device, require_provider

cuda = pytest.importorskip("numba.cuda")
runtime = pytest.importorskip("onnxruntime")


def model_of() -> Any:
    weights = np.ones((4, 3), np.float32)
    text = "(float[N, 4] x) => (float[N, 3] y) { r = Relu(x) y = Gemm(r, w) }"
    return model(text, constants={"w": weights})


def no_device() -> None:
    raise RuntimeError("Error at driver init:\n\nCUDA driver library cannot be found.")


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What onnxruntime says it has."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(runtime, "get_available_providers", lambda: names)
    monkeypatch.setattr(cuda, "current_context", no_device)
    return names


def test_without_a_driver(providers: list[str]) -> None:
    with pytest.raises(BackendUnavailable, match=r"driver library cannot be found.*NVIDIA GPU"):
        Explainer(model_of(), backend="cuda")


def test_without_cuda_in_onnxruntime(providers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    del providers[0]
    monkeypatch.setattr(cuda, "current_context", lambda: None)
    with pytest.raises(BackendUnavailable, match=r"built without CUDA: pip uninstall onnxruntime"):
        Explainer(model_of(), backend="cuda")


def test_without_numba_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    monkeypatch.delattr(numba, "cuda")
    monkeypatch.setitem(sys.modules, "numba.cuda", None)
    with pytest.raises(BackendUnavailable, match=r"numba-cuda cannot be imported.*\[gpu\]"):
        Device()


def test_a_provider_that_cannot_be_loaded() -> None:
    """A driver that is too old, or a missing library: onnxruntime only prints a line."""
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailable, match=r"driver is too old.*580 or newer"):
        require_provider(session, SimpleNamespace(provider=Device.provider))  # type: ignore[arg-type]


def test_auto_goes_on_without_a_gpu(providers: list[str]) -> None:
    with pytest.warns(RectGradWarning, match=r"could use a GPU, but no CUDA device"):
        assert Explainer(model_of(), threads=1).backend.name == "cpu"
    del providers[0]  # the usual package of onnxruntime: nothing to warn of
    assert Explainer(model_of(), threads=1).backend.name == "cpu"


def test_auto_takes_a_gpu(providers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Present:
        provider = Device.provider

    monkeypatch.setattr(devices, "Device", Present)
    chosen = []
    monkeypatch.setattr(
        sys.modules[make_backend.__module__],
        "_cuda_backend",
        lambda *model, **options: chosen.append(options),
    )
    make_backend("auto", model_of(), "x", rebatch=False, dtype=None, threads=None)
    assert chosen == [{"rebatch": False, "tf32": False}]
    make_backend("auto", model_of(), "x", rebatch=True, dtype=np.float32, threads=1, tf32=True)
    assert chosen[1:] == [{"rebatch": True, "tf32": True}]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tf32_is_for_gpus(backend: str) -> None:
    with pytest.raises(ValueError, match=f"tf32=True needs backend='cuda', got '{backend}'"):
        Explainer(model_of(), backend=backend, tf32=True)


def test_float64_is_not_for_gpus() -> None:
    with pytest.raises(ValueError, match="backend='cuda' computes in float32"):
        Explainer(model_of(), backend="cuda", dtype=np.float64)
