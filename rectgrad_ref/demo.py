"""The demonstration: the committed CIFAR-10 network explains scikit-image's cat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from .attribution import Attribution
from .explainer import Explainer
from .methods import METHODS
from .onnx_models.cifar10_cnn import network_path

_FACE = (105, 60, 345, 300)  # left, upper, right, lower


def cat() -> Image.Image:
    """The face of Chelsea, photographed by Stéfan van der Walt (CC0); part of scikit-image.

    CIFAR-10 has no such close-ups: the network is sure of this crop and takes many others for a
    dog, a deer or a frog.
    """
    from skimage import data

    return Image.fromarray(np.asarray(data.chelsea())).crop(_FACE)


def explain_cat(advance: Callable[[int], None]) -> list[Attribution]:
    """The cat explained by every method, as the class that the network predicts.

    Parameters
    ----------
    advance : callable
        Called with 1 after each method.
    """
    explainer = Explainer(network_path())
    results = []
    for method in METHODS:
        results.append(explainer.explain(cat(), method=method))
        advance(1)
    return results
