"""The networks and the pictures that speed is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rectgrad_ref.errors import InvalidModel
from rectgrad_ref.graph import InputSpec
from rectgrad_ref.onnx_models import published
from rectgrad_ref.onnx_models.cifar10_cnn import network_path

_SYMBOLIC = 224  # pixels, of an input whose extents the file leaves open


@dataclass(frozen=True)
class Subject:
    """A network, and the sizes at which it is measured.

    Attributes
    ----------
    name : str
    path : Path
        ONNX file.
    batches : tuple of int
    sizes : tuple of int
        Heights and widths in pixels, for networks that take several.
    """

    name: str
    path: Path
    batches: tuple[int, ...] = (1,)
    sizes: tuple[int, ...] = ()

    @property
    def typical_batch(self) -> int:
        """The one at which what does not depend on it is measured."""
        return self.batches[(len(self.batches) - 1) // 2]


def subject(name: str) -> Subject:
    """One of the paper's networks by its name, or any ONNX file by its path.

    Inception V4 has calibrated random weights; it is built once, into the user's cache folder.

    Raises
    ------
    InvalidModel
        There is no such file.
    """
    if name == "cifar10_cnn":
        return Subject(name, network_path(), (1, 64, 512))
    if name == "inception_v4":
        return Subject(name, _inception_v4(), (1, 8), (139, 203, 299, 395))
    if not Path(name).is_file():
        raise InvalidModel(f"{name}: no such file; the names are cifar10_cnn and inception_v4")
    return Subject(Path(name).stem, Path(name))


def _inception_v4() -> Path:
    path = published.cache_folder() / "inception_v4.random.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        published.build("inception_v4", path)
    return path


def photographs(batch: int, spec: InputSpec) -> np.ndarray:
    """Crops of photographs, because the gradient's sparsity depends on what is seen.

    Parameters
    ----------
    batch : int
    spec : InputSpec
        An image input with three channels, first or last.

    Returns
    -------
    numpy.ndarray
        In the input's shape, axis order and dtype, from −1 to 1; always the same.

    Raises
    ------
    InvalidModel
        The input is not a colour image.
    """
    from skimage import data

    shape = spec.shape[1:]
    if len(shape) != 3 or 3 not in (shape[0], shape[-1]):
        raise InvalidModel(f"input {spec.name!r} of shape {spec.shape} is not a colour image")
    first = shape[0] == 3
    height, width = (n or _SYMBOLIC for n in (shape[1:] if first else shape[:2]))
    photos = [Image.fromarray(p()) for p in (data.astronaut, data.chelsea, data.coffee)]
    rng = np.random.default_rng(0)
    images = np.empty((batch, height, width, 3), spec.dtype)
    for i in range(batch):
        photo = photos[i % len(photos)]
        side = min(photo.size) * rng.uniform(0.3, 1)
        left, upper = (rng.uniform(0, extent - side) for extent in photo.size)
        box = (left, upper, left + side, upper + side)
        images[i] = photo.resize((width, height), Image.Resampling.BILINEAR, box)
    images = images / spec.dtype.type(127.5) - 1
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if first else images)
