"""Attribution methods, each a table of rules. A new one is a file here and a line in `METHODS`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .base import Method
from .deeplift import DeepLift
from .gradient import InputXGradient, Random, Saliency
from .lrp import EpsilonLRP
from .modified_relu import Deconvolution, GuidedBackprop
from .path import IntegratedGradients, SmoothGrad
from .rectgrad import RectGrad

METHODS: dict[str, type[Method]] = {
    cls.id: cls
    for cls in (
        RectGrad,
        Saliency,
        InputXGradient,
        Deconvolution,
        GuidedBackprop,
        SmoothGrad,
        IntegratedGradients,
        EpsilonLRP,
        DeepLift,
        Random,
    )
}
PRESETS = ("default", "paper", "authors")


def make_method(method: str | Method, preset: str = "default", **options: Any) -> Method:
    """A method from its id, a preset and options.

    Parameters
    ----------
    method : str or Method
        An id of `METHODS`, or a method, which then takes neither preset nor options.
    preset : str
        ``"default"``, ``"paper"`` (what the text says: the same) or ``"authors"`` (what their
        published code does), docs/conventions.md.
    **options
        Fields of the method.

    Raises
    ------
    ValueError
        An unknown method or preset, or a value out of range.
    TypeError
        An option that the method does not have; the message lists those it has.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if isinstance(method, Method):
        if options or preset != "default":
            raise TypeError("a method given as an object takes no preset and no options")
        return method
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    cls = METHODS[method]
    known = [field.name for field in fields(cls)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"{method} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return cls(**(cls.presets.get(preset, {}) | options))


__all__ = [
    "METHODS",
    "PRESETS",
    "Deconvolution",
    "DeepLift",
    "EpsilonLRP",
    "GuidedBackprop",
    "InputXGradient",
    "IntegratedGradients",
    "Method",
    "Random",
    "RectGrad",
    "Saliency",
    "SmoothGrad",
    "make_method",
]
