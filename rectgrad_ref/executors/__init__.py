"""Backends: they run plans and know nothing of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BackendUnavailable
from ..forward import Forward, NumpyForward, OnnxruntimeForward, import_onnxruntime
from ..model import Model
from ..plan import Plan
from .runner import Observer, Runner, SeedOf, StepwiseRunner

BACKENDS = ("auto", "cpu", "reference")


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
    """

    name: str
    forward: Forward
    runner: Callable[[Plan], Runner]
    runs_as: Callable[[Plan], Mapping[str, str]]


def make_backend(
    name: str, model: Model, input: str, *, rebatch: bool, dtype: Any, threads: int | None
) -> Backend:
    """Choose and build a backend.

    Parameters
    ----------
    name : str
        ``"cpu"``: onnxruntime forward, compiled walk back; ``"reference"``: NumPy throughout;
        ``"auto"``: the first that is installed; an installation that is broken is an error.
    rebatch : bool
        Whether to make the declared batch extent symbolic.
    dtype : dtype or None
        float64 (the default) or float32 on ``"reference"``; float32 elsewhere.
    threads : int or None
        Of the forward pass and of the walk back; None: one per processor.

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
        numpy_forward = NumpyForward(wanted)
        return Backend(
            name,
            numpy_forward,
            lambda plan: StepwiseRunner(plan, numpy_forward),
            lambda plan: {step.node.name: "numpy" for step in plan.steps},
        )
    if wanted != np.float32:
        raise ValueError("backend='cpu' computes in float32; float64 needs backend='reference'")
    from .compiled import CompiledBackend
    from .cpu import runs_as

    forward = OnnxruntimeForward(model, input, rebatch=rebatch, threads=threads)
    compiled = CompiledBackend(forward, threads)
    return Backend(name, forward, compiled.runner, runs_as)


def _first_available(dtype: Any) -> str:
    if dtype is not None and np.dtype(dtype) == np.float64:
        return "reference"
    try:
        import_onnxruntime()
    except BackendUnavailable as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise  # installed, but broken: the slow backend would hide the remedy
        return "reference"
    return "cpu"


__all__ = ["BACKENDS", "Backend", "Observer", "Runner", "SeedOf", "make_backend"]
