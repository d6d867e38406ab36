"""The official CIFAR-10 pickles as arrays, and the occluded copy of the paper's figure 2."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rectgrad_ref.errors import InvalidImage
from rectgrad_ref.files import atomic_write

from .download import fetch

ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
FOLDER = "cifar-10-batches-py"
FOLDER_VARIABLE = "RECTGRAD_CIFAR10"

Split = Literal["train", "test"]

BATCHES: dict[Split, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{k}" for k in range(1, 6)),
    "test": ("test_batch",),
}
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


class Cifar10(NamedTuple):
    """One split of CIFAR-10, in the official order."""

    images: NDArray[np.uint8]
    """(N, 3, 32, 32), RGB, 0 to 255."""
    labels: NDArray[np.int64]
    """(N,), indices into `class_names`."""
    class_names: tuple[str, ...]


def load_cifar10(
    split: Split, folder: str | os.PathLike[str] | None = None, *, download: bool = False
) -> Cifar10:
    """Read one split of CIFAR-10 from the official Python pickles, each checked by its md5.

    Parameters
    ----------
    split
        "train" (50,000 images) or "test" (10,000 images).
    folder
        `cifar-10-batches-py` or the folder that contains it. By default `$RECTGRAD_CIFAR10`,
        else the user's cache.
    download
        Where the data are not found, fetch the official archive (170 MB) into the user's cache.

    Raises
    ------
    InvalidImage
        The files are absent, or one of them is not the official one.
    DownloadError
        The archive cannot be fetched.

    References
    ----------
    A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    batches_folder = _find(folder, download)
    batches = [_read_batch(batches_folder / name) for name in BATCHES[split]]
    images = np.concatenate([pixels for pixels, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    return Cifar10(images, labels, CLASS_NAMES)


def occlude(images: NDArray[Any]) -> NDArray[Any]:
    """Copy `images` (N, 3, 32, 32) with one fixed random patch in the upper left 10 × 10 pixels.

    The patch is that of the paper's figures 2 and 7: the authors draw it in NHWC order with
    NumPy's legacy generator seeded with 100.
    """
    patch = np.random.RandomState(100).randint(0, 255, [1, 10, 10, 3])
    occluded = images.copy()
    occluded[:, :, :10, :10] = patch.transpose(0, 3, 1, 2)
    return occluded


def _find(folder: str | os.PathLike[str] | None, download: bool) -> Path:
    """The folder that holds the pickles."""
    named = folder or os.environ.get(FOLDER_VARIABLE)
    root = Path(named) if named else _cache()
    for candidate in (root, root / FOLDER):
        if (candidate / "test_batch").is_file():
            return candidate
    if not download:
        raise InvalidImage(
            f"no CIFAR-10 at {root}: pass download=True, or name the folder {FOLDER} "
            f"as an argument or in ${FOLDER_VARIABLE}"
        )
    return _download()


def _cache() -> Path:
    from .published import cache_folder

    return cache_folder()


def _download() -> Path:
    """Fetch and unpack the official archive in the user's cache."""
    archive = fetch([ARCHIVE_URL], _cache() / Path(ARCHIVE_URL).name, sha256=ARCHIVE_SHA256)
    folder = _cache() / FOLDER
    folder.mkdir(exist_ok=True)
    # File by file: the safe form of extractall came with Python 3.11.4. The last, test_batch, is
    # what tells that the folder is complete.
    with tarfile.open(archive) as tar:
        for name in MD5:
            content = tar.extractfile(f"{FOLDER}/{name}")
            assert content is not None
            with atomic_write(folder / name) as temporary:
                temporary.write_bytes(content.read())
    return folder


def _read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, 3, 32, 32) and labels (n,) of one official file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidImage(f"cannot read {path}: {error.strerror}") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[path.name]:
        raise InvalidImage(
            f"{path} is not the official CIFAR-10 file (its md5 is not {MD5[path.name]}): "
            "delete it and download it again"
        )
    batch = unpickle(content)
    images = batch[b"data"].reshape(-1, 3, 32, 32)
    return images, np.array(batch[b"labels"], np.int64)


def unpickle(content: bytes) -> Any:
    """Read a Python 2 pickle of dicts, lists, numbers, strings (as bytes) and NumPy arrays.

    Raises
    ------
    InvalidImage
        The pickle is damaged, or names any other type or function: none of it is then called.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise InvalidImage(f"not a pickle of plain arrays: {error}") from error


def _dtype(name: bytes, align: int, copy: int) -> np.dtype[Any]:
    """`numpy.dtype` as Python 2 called it; NumPy 2.4 deprecates the integer flags."""
    return np.dtype(name.decode("ascii"), align=bool(align), copy=bool(copy))


# A pickle may call whatever it can name, so it may name only these.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that looks names up in `_ALLOWED` and nowhere else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]
