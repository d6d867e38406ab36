"""Backends: they run plans and know nothing of methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BackendUnavailable, RectGradWarning
from ..forward import Forward, NumpyForward, import_onnxruntime
from ..model import Model
from ..plan import Plan
from .runner import Observer, Runner, SeedOf, StepwiseRunner

BACKENDS = ("auto", "cuda", "cpu", "reference")
# Activations, gradients and temporaries of one chunk, if each had memory of its own.
_CHUNK_BYTES = 3 * 2**29


@dataclass(frozen=True, eq=False)
class Backend:
    """What runs plans of one model.

    Attributes
    ----------
    name : str
    forward : Forward
    runner : callable
        Makes a plan ready to run.
    runs_as : callable
        Plan → what executes each step, by node name, for the printed plan.
    chunk_bytes : int
        How much memory activations, gradients and temporaries of one chunk of samples may take.
    """

    name: str
    forward: Forward
    runner: Callable[[Plan], Runner]
    runs_as: Callable[[Plan], Mapping[str, str]]
    chunk_bytes: int = _CHUNK_BYTES


def make_backend(
    name: str,
    model: Model,
    input: str,
    *,
    rebatch: bool,
    dtype: Any,
    threads: int | None,
    tf32: bool = False,
) -> Backend:
    """Choose and build a backend.

    Parameters
    ----------
    name : str
        ``"cuda"``: all of it on an NVIDIA GPU; ``"cpu"``: onnxruntime forward, compiled walk back;
        ``"reference"``: NumPy throughout; ``"auto"``: the first that is installed, and has what it
        runs on; an installation that is broken is an error.
    rebatch : bool
        Whether to make the declared batch extent symbolic.
    dtype : dtype or None
        float64 (the default) or float32 on ``"reference"``; float32 elsewhere.
    threads : int or None
        Of the forward pass and of the walk back; None: one per processor.
    tf32 : bool
        Whether a GPU may compute products in TF32.

    Raises
    ------
    BackendUnavailable
        The backend's packages, or the driver or GPU that it needs, are missing.
    ValueError
        An unknown backend, or a dtype that it does not have.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "auto":
        name = _first_available(dtype)
    if tf32 and name != "cuda":
        raise ValueError(f"tf32=True needs backend='cuda', got {name!r}")
    wanted = np.dtype(dtype or (np.float64 if name == "reference" else np.float32))
    if wanted not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"dtype must be float32 or float64, got {wanted}")
    if name == "reference":
        numpy_forward = NumpyForward(wanted)
        return Backend(
            name,
            numpy_forward,
            lambda plan: StepwiseRunner(plan, numpy_forward),
            lambda plan: {step.node.name: "numpy" for step in plan.steps},
        )
    if wanted != np.float32:
        raise ValueError(f"backend={name!r} computes in float32; float64 needs backend='reference'")
    if name == "cuda":
        return _cuda_backend(model, input, rebatch=rebatch, tf32=tf32)
    from .blocked import BlockedForward
    from .compiled import CompiledBackend

    forward = BlockedForward(model, input, rebatch=rebatch, threads=threads)
    compiled = CompiledBackend(forward, threads)
    return Backend(name, forward, compiled.runner, compiled.runs_as)


def _cuda_backend(model: Model, input: str, *, rebatch: bool, tf32: bool) -> Backend:
    from .device import Device, DeviceForward

    device = Device(tf32=tf32)
    from .launched import CudaBackend  # after what explains why it cannot be imported

    forward = DeviceForward(model, input, device, rebatch=rebatch)
    launched = CudaBackend(forward)
    return Backend("cuda", forward, launched.runner, launched.runs_as, device.free // 2)


def _first_available(dtype: Any) -> str:
    if dtype is not None and np.dtype(dtype) == np.float64:
        return "reference"
    try:
        runtime = import_onnxruntime()
    except BackendUnavailable as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise  # installed, but broken: the slow backend would hide the remedy
        return "reference"
    from .device import Device

    if Device.provider not in runtime.get_available_providers():
        return "cpu"
    try:
        Device()
    except BackendUnavailable as error:
        warnings.warn(f"onnxruntime could use a GPU, but {error}", RectGradWarning, stacklevel=4)
        return "cpu"
    return "cuda"


__all__ = ["BACKENDS", "Backend", "Observer", "Runner", "SeedOf", "make_backend"]
