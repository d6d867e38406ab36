"""Random pixels, and every preset's formula by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGENET_MEAN, IMAGENET_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

FORMULAS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "imagenet": lambda x: (x / 255 - IMAGENET_MEAN) / IMAGENET_STD,
    "inception": lambda x: x / 127.5 - 1,
    "mobilenet_tf": lambda x: (x - 128) / 128,
    "caffe": lambda x: x[..., ::-1] - [104, 117, 123],
    "cifar10": lambda x: x / 127.5 - 1,
    "cifar10_standard": lambda x: (x / 255 - [0.4914, 0.4822, 0.4465]) / [0.2023, 0.1994, 0.2010],
    "cifar10_imagenet": lambda x: (x / 255 - IMAGENET_MEAN) / IMAGENET_STD,
    "mnist": lambda x: (x / 255 - 0.1307) / 0.3081,
    "unit": lambda x: x / 255,
    "signed": lambda x: (x / 255 - 0.5) / 0.5,
    "raw": lambda x: x,
}


def noise(*shape: int, dtype: Any = np.uint8, seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
