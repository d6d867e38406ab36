"""Backends: a forward pass and a walk back. They run a plan and know nothing of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BackendUnavailable
from ..forward import Forward, NumpyForward, OnnxruntimeForward, import_onnxruntime
from ..model import Model
from ..plan import Step
from ..reference import walk

BACKENDS = ("auto", "cpu", "reference")


@dataclass(frozen=True, eq=False)
class Backend:
    """What runs a plan.

    Attributes
    ----------
    name : str
    forward : Forward
    walk : callable
        Signature and meaning of `rectgrad_ref.reference.walk`.
    runs_as : callable
        Step → what executes it, for the printed plan.
    """

    name: str
    forward: Forward
    walk: Callable[..., np.ndarray]
    runs_as: Callable[[Step], str]


def make_backend(
    name: str, model: Model, input: str, *, rebatch: bool, dtype: Any, threads: int | None
) -> Backend:
    """Choose and build a backend.

    Parameters
    ----------
    name : str
        ``"cpu"``: onnxruntime forward; ``"reference"``: NumPy throughout; ``"auto"``: the first
        that is installed.
    dtype : dtype or None
        float64 (the default) or float32 on ``"reference"``; float32 elsewhere.

    Raises
    ------
    BackendUnavailable
        The backend's packages are missing.
    ValueError
        An unknown backend, or a dtype that it does not have.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "auto":
        name = _first_available(dtype)
    wanted = np.dtype(dtype or (np.float64 if name == "reference" else np.float32))
    if wanted not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"dtype must be float32 or float64, got {wanted}")
    if name == "reference":
        return Backend(name, NumpyForward(wanted), walk, lambda step: "numpy")
    if wanted != np.float32:
        raise ValueError("backend='cpu' computes in float32; float64 needs backend='reference'")
    forward = OnnxruntimeForward(model, input, rebatch=rebatch, threads=threads)
    return Backend(name, forward, walk, lambda step: "numpy")


def _first_available(dtype: Any) -> str:
    if dtype is not None and np.dtype(dtype) == np.float64:
        return "reference"
    try:
        import_onnxruntime()
    except BackendUnavailable:
        return "reference"
    return "cpu"
