"""The models that can be had by name: committed with the package, published elsewhere, or built."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InvalidModel
from ..files import atomic_write
from .cifar10_cnn import network_path
from .download import Progress, fetch


@dataclass(frozen=True)
class Download:
    """A file on the internet.

    Attributes
    ----------
    file_name
        Its name in the cache.
    urls
        Places that hold it, tried in order.
    sha256
        Its checksum, as its publisher states it.
    bytes
        Its size; None where the publisher only rounds it.
    verified
        Whether someone of this project has fetched the file and seen the model classify photographs
        correctly. A checksum only says that it is the publisher's file.
    """

    file_name: str
    urls: tuple[str, ...]
    sha256: str
    bytes: int | None
    verified: bool


@dataclass(frozen=True)
class ModelEntry:
    """What there is to know about a model before having it.

    Attributes
    ----------
    name
        What `get` and `build` call it.
    kind
        "committed" (comes with the package), "published" (an ONNX file to download), "weights" (a
        file of weights to download, for `build`) or "buildable".
    description
        One sentence.
    licence
        SPDX identifier of the weights' licence.
    preprocessing
        The preset of `rectgrad_ref.images` that makes its input.
    classes
        What its classes are, and in which order.
    download
        None unless it is published elsewhere.
    """

    name: str
    kind: Literal["committed", "published", "weights", "buildable"]
    description: str
    licence: str
    preprocessing: str
    classes: str
    download: Download | None = None


_CIFAR10 = "the 10 classes of CIFAR-10, named in the file"
_IMAGENET = "the 1000 classes of ImageNet (ILSVRC 2012), in the order of their WordNet ids"

MODELS: tuple[ModelEntry, ...] = (
    ModelEntry(
        name="cifar10_cnn",
        kind="committed",
        description="The paper's CIFAR-10 network, trained with the paper's recipe.",
        licence="MIT",
        preprocessing="cifar10",
        classes=_CIFAR10,
    ),
    ModelEntry(
        name="cifar10_cnn_occluded",
        kind="committed",
        description="The same network, trained on images with the paper's occluding patch.",
        licence="MIT",
        preprocessing="cifar10",
        classes=_CIFAR10,
    ),
    ModelEntry(
        name="inception_v4",
        kind="buildable",
        description="Inception V4 with given weights, or with calibrated random ones.",
        licence="that of the weights",
        preprocessing="inception",
        classes=_IMAGENET,
    ),
    ModelEntry(
        name="inception_v4.tf_in1k",
        kind="weights",
        description="Weights for inception_v4: timm's copy of the authors' TensorFlow checkpoint.",
        licence="Apache-2.0",
        preprocessing="inception",
        classes=_IMAGENET,
        download=Download(
            file_name="inception_v4.tf_in1k.safetensors",
            # The revision that added the file, so that a later one cannot break the checksum, which
            # is the one on the file's page on the Hub. That page rounds the size to 171 MB.
            urls=(
                "https://huggingface.co/timm/inception_v4.tf_in1k/resolve/"
                "24edbb8f3ca9aab790ab91929a4101165581b168/model.safetensors",
            ),
            sha256="a756a086851c8d5a8de135ec15c76b90ea56cb5aef450e3299107e659e725bb1",
            bytes=None,
            verified=False,
        ),
    ),
    ModelEntry(
        name="inception_v4_Opset16",
        kind="published",
        description="The ONNX Model Zoo's export of timm's Inception V4, for one image at a time.",
        licence="Apache-2.0",
        preprocessing="inception",
        classes=_IMAGENET,
        download=Download(
            file_name="inception_v4_Opset16.onnx",
            # The zoo's present home and its former one.
            urls=(
                "https://huggingface.co/onnxmodelzoo/inception_v4_Opset16/resolve/main/"
                "inception_v4_Opset16.onnx",
                "https://media.githubusercontent.com/media/onnx/models/main/Computer_Vision/"
                "inception_v4_Opset16_timm/inception_v4_Opset16.onnx",
            ),
            sha256="ccbc50dae90438c6f10095804c62844726f3512fe5a8ed5659262569a73e6e63",
            bytes=170_683_767,
            verified=False,
        ),
    ),
)


def find(name: str) -> ModelEntry:
    """The entry of `MODELS` with that name.

    Raises
    ------
    InvalidModel
        There is none; the message lists those there are.
    """
    for model in MODELS:
        if model.name == name:
            return model
    known = ", ".join(model.name for model in MODELS)
    raise InvalidModel(f"no model is called {name!r}; there are {known}")


def cache_folder() -> Path:
    """Where downloads are kept: `rectgrad_ref` in the user's cache folder."""
    import pooch

    return Path(pooch.os_cache("rectgrad_ref"))


def get(name: str, *, folder: Path | None = None, progress: Progress | None = None) -> Path:
    """The path of a model's file, downloaded first if need be.

    Parameters
    ----------
    name
        A committed or published model of `MODELS`, or weights for `build`.
    folder
        Where downloads are kept; `cache_folder()` by default.
    progress
        Called during a download with the bytes that have arrived and the size of the file.

    Returns
    -------
    pathlib.Path
        An ONNX file, or a safetensors file for a model of kind "weights".

    Raises
    ------
    InvalidModel
        No such model, or one that has to be built.
    DownloadError
        The download failed or has the wrong checksum; calling again continues it.
    OutputError
        The folder cannot be written to.
    """
    model = find(name)
    if model.kind == "committed":
        return network_path(occluded=name == "cifar10_cnn_occluded")
    if model.download is None:
        raise InvalidModel(f"{name} is not a file to download: build it")
    destination = (folder or cache_folder()) / model.download.file_name
    return fetch(model.download.urls, destination, sha256=model.download.sha256, progress=progress)


def build(
    name: str,
    destination: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Path:
    """Write a buildable model as an ONNX file.

    Parameters
    ----------
    name
        A model of `MODELS` of kind "buildable".
    destination
        Path of the ONNX file (171 MB for Inception V4), replaced if it exists.
    weights
        Path of a safetensors file with timm's names, such as `get("inception_v4.tf_in1k")`
        returns. By default calibrated random weights, which takes some seconds.
    seed
        Of the random weights; not used with `weights`.

    Returns
    -------
    pathlib.Path
        `destination`.

    Raises
    ------
    InvalidModel
        No such buildable model, or the weights are not its weights.
    OutputError
        The destination cannot be written.
    """
    from . import inception_v4
    from .weights import read_safetensors

    if find(name).kind != "buildable":
        raise InvalidModel(f"{name} is not built: get it")
    if weights is None:
        state_dict = inception_v4.random_state_dict(seed)
        doc_string = f"Calibrated random weights, seed {seed}."
    else:
        state_dict = read_safetensors(weights)
        doc_string = f"Weights from {Path(weights).name}."
    model = inception_v4.build_model(state_dict, doc_string=doc_string)
    with atomic_write(destination) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return Path(destination)
