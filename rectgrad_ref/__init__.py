"""Attribution for any ONNX classifier: RectGrad and its baselines, layer by layer."""

from .attribution import Attribution, Layer
from .explainer import Explainer, explain, methods
from .methods import (
    Deconvolution,
    DeepLift,
    EpsilonLRP,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    Random,
    RectGrad,
    Saliency,
    SmoothGrad,
)

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "Deconvolution",
    "DeepLift",
    "EpsilonLRP",
    "Explainer",
    "GuidedBackprop",
    "InputXGradient",
    "IntegratedGradients",
    "Layer",
    "Random",
    "RectGrad",
    "Saliency",
    "SmoothGrad",
    "__version__",
    "explain",
    "methods",
]
