"""Attribution for any ONNX classifier: RectGrad and its baselines, layer by layer."""

from importlib.util import find_spec

# In a clone, `kernels` and `onnx_models` lie beside this folder; only installing maps them into it.
if find_spec("rectgrad_ref.kernels") is None:
    raise ImportError(
        "rectgrad_ref is not installed: run  pip install -e '.[cpu]'  in the repository's root"
    )

from .attribution import Attribution, Layer
from .dataset import explain_dataset
from .explainer import Explainer, explain, methods
from .exporter import export
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
    "explain_dataset",
    "export",
    "methods",
]
