"""Where images, masks and networks come from; the project itself has only its networks."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rectgrad_ref.errors import InvalidImage, InvalidModel
from rectgrad_ref.explainer import Explainer
from rectgrad_ref.onnx_models import published
from rectgrad_ref.onnx_models.cifar10 import CLASS_NAMES, Cifar10, load_cifar10, occlude
from rectgrad_ref.onnx_models.cifar10_cnn import network_path

_MASK_FILE = re.compile(r"(?P<label>[a-z]+)_(?P<number>\d+)_mask\.jpg")
# Colour is stored at half resolution in a JPEG, which costs some grey levels.
_SAME_PICTURE = 8.0


class Masked(NamedTuple):
    """Training images with the paper's masks."""

    keys: np.ndarray
    """(N,), positions in the CIFAR-10 training set."""
    images: np.ndarray
    """(N, 3, 32, 32) uint8."""
    labels: np.ndarray
    """(N,)."""
    background: np.ndarray
    """(N, 32, 32) bool: the mask is below 200."""

    def pick(self, rows: np.ndarray | slice) -> Masked:
        return Masked(self.keys[rows], self.images[rows], self.labels[rows], self.background[rows])


@dataclass(frozen=True)
class Classifier:
    """An ImageNet-sized network and photographs for it.

    Attributes
    ----------
    path : Path
    preprocess : str
        As `rectgrad_ref.Explainer` takes it.
    labels : Path or None
        File of class names.
    photos : sequence of Path
        Empty for scikit-image's own photographs (CC0).
    """

    path: Path
    preprocess: str
    labels: Path | None = None
    photos: Sequence[Path] = ()

    def load(self, backend: str) -> Explainer:
        return Explainer(self.path, backend=backend, preprocess=self.preprocess, labels=self.labels)

    def pictures(self, count: int) -> dict[str, Image.Image | Path]:
        """The first photographs by name."""
        if self.photos:
            return {path.stem: path for path in self.photos[:count]}
        from skimage import data

        return {
            name: Image.fromarray(np.asarray(getattr(data, name)()))
            for name in ("chelsea", "coffee", "rocket")[:count]
        }

    def checksums(self, count: int) -> dict[str, str]:
        """SHA-256 of the network and of the first photographs."""
        contents = [
            picture.read_bytes() if isinstance(picture, Path) else picture.tobytes()
            for picture in self.pictures(count).values()
        ]
        return {
            "classifier": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "photos": hashlib.sha256(b"".join(contents)).hexdigest(),
        }


@dataclass(frozen=True)
class Sources:
    """Everything that experiments read.

    Attributes
    ----------
    cifar : Path or None
        Folder of the official pickles; by default `$RECTGRAD_CIFAR10` or the user's cache.
    masks : Path or None
        Folder of the authors' images `<class>_<number>.jpg` and masks `<class>_<number>_mask.jpg`.
    classifier : Classifier or None
        By default Inception V4, where it is in the user's cache.
    download : bool
        Fetch CIFAR-10 if it is not there.
    seed : int
        Of all noise and random orders.
    networks : Path or None
        Folder of networks of other seeds, as `python -m rectgrad_ref.onnx_models.train fit` writes
        them.
    backend, device : str
        Of attributions, and PyTorch's of retraining.
    """

    cifar: Path | None = None
    masks: Path | None = None
    classifier: Classifier | None = field(default_factory=lambda: inception_v4())
    networks: Path | None = None
    download: bool = False
    seed: int = 0
    backend: str = "auto"
    device: str = "cpu"

    @cached_property
    def train(self) -> Cifar10:
        return load_cifar10("train", self.cifar, download=self.download)

    @cached_property
    def test(self) -> Cifar10:
        return load_cifar10("test", self.cifar, download=self.download)

    @cached_property
    def occluded_test(self) -> np.ndarray:
        return occlude(self.test.images)

    def network_file(self, seed: int = 0, *, occluded: bool = False) -> Path:
        """The CIFAR-10 network of a seed; the committed one is that of seed 0.

        Raises
        ------
        InvalidModel
            There is no network of that seed.
        """
        if seed == 0:
            return network_path(occluded=occluded)
        dataset = "occluded" if occluded else "normal"
        command = f"python -m rectgrad_ref.onnx_models.train fit --dataset {dataset} --seed {seed}"
        if self.networks is None:
            raise InvalidModel(
                f"no network of seed {seed}: train it ({command} -o FOLDER) and name the folder "
                "with --networks"
            )
        path = self.networks / f"cifar10_cnn_{dataset}_seed{seed}.onnx"
        if not path.exists():
            raise InvalidModel(f"{path} does not exist: {command} -o {self.networks}")
        return path

    def network(self, seed: int = 0, *, occluded: bool = False) -> Explainer:
        """The CIFAR-10 network of a seed, ready to explain."""
        path = self.network_file(seed, occluded=occluded)
        if path not in self._explainers:
            self._explainers[path] = Explainer(path, backend=self.backend, preprocess="cifar10")
        return self._explainers[path]

    @cached_property
    def _explainers(self) -> dict[Path, Explainer]:
        return {}

    def network_checksums(self, count: int = 1, *, occluded: bool = False) -> dict[str, str]:
        """SHA-256 of the networks of the first seeds."""
        return {
            f"network {seed}": self.network(seed, occluded=occluded).model.sha256
            for seed in range(count)
        }

    @cached_property
    def masked(self) -> Masked:
        """All different images with a mask, by class and number.

        The authors' files are JPEGs in BGR order, so the training image nearest to each is used.
        A mask without its image is left out, and so is an image that comes a second time.

        Raises
        ------
        InvalidImage
            There is no such folder, or a file is no picture of the training set.
        """
        if self.masks is None:
            raise InvalidImage(
                "no segmentation masks: get the authors' repository (1202kbs/Rectified-Gradient) "
                "and name the folder of the CIFAR-10 masks with --masks"
            )
        found: dict[int, np.ndarray] = {}
        masks = sorted(self.masks.glob("*_mask.jpg"), key=_class_and_number)
        for label, group in itertools.groupby(masks, key=lambda path: _class_and_number(path)[0]):
            pairs = [(path, picture) for path in group if (picture := _picture_of(path)).exists()]
            nearest = self._nearest([picture for _, picture in pairs], label)
            for key, (path, _) in zip(nearest, pairs, strict=True):
                found.setdefault(key, np.asarray(Image.open(path).convert("L")) < 200)
        if not found:
            raise InvalidImage(f"{self.masks} has no files named like cat_1.jpg and cat_1_mask.jpg")
        keys = np.array(list(found))
        images, labels = self.train.images[keys], self.train.labels[keys]
        return Masked(keys, images, labels, np.stack(list(found.values())))

    def correctly_classified(self, each: int, networks: int = 1) -> Masked:
        """The first masked images of each class that all of the networks classify rightly."""
        masked, x = self.masked, normalized(self.masked.images)
        right = np.full(len(x), True)
        for seed in range(networks):
            logits = self.network(seed).explain(x, method="random").logits
            right &= logits.argmax(axis=1) == masked.labels
        rows = [np.flatnonzero(right & (masked.labels == c))[:each] for c in range(10)]
        return masked.pick(np.concatenate(rows))

    def needed_classifier(self) -> Classifier:
        if self.classifier is None:
            raise InvalidModel(
                "this experiment needs an ImageNet-sized classifier: name an ONNX file with "
                "--classifier and --preprocess, or get the paper's (rectgrad models get)"
            )
        return self.classifier

    def _nearest(self, paths: Sequence[Path], label: int) -> list[int]:
        """Positions of the JPEGs' originals among the training images of their class."""
        if not paths:
            return []
        candidates = np.flatnonzero(self.train.labels == label)
        originals = self.train.images[candidates].reshape(len(candidates), -1).astype(np.float32)
        channels_last = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
        rgb = channels_last[..., ::-1].transpose(0, 3, 1, 2)
        pictures = rgb.reshape(len(paths), -1).astype(np.float32)
        # The squared distance, but for what is the same for all candidates.
        best = ((originals**2).sum(axis=1) - 2 * pictures @ originals.T).argmin(axis=1)
        difference = np.abs(originals[best] - pictures).mean(axis=1)
        if difference.max() > _SAME_PICTURE:
            path = paths[int(difference.argmax())]
            raise InvalidImage(f"{path} is not a {CLASS_NAMES[label]} of CIFAR-10's training set")
        return [int(key) for key in candidates[best]]


def inception_v4() -> Classifier | None:
    """The paper's ImageNet network, where it was downloaded."""
    path = published.cache_folder() / "inception_v4_Opset16.onnx"
    return Classifier(path, "inception") if path.exists() else None


def normalized(images: np.ndarray) -> np.ndarray:
    """x/127.5 − 1 in float32."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def checksum(*arrays: np.ndarray) -> str:
    """SHA-256 of the arrays' bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _picture_of(mask: Path) -> Path:
    return mask.with_name(mask.name.replace("_mask", ""))


def _class_and_number(path: Path) -> tuple[int, int]:
    match = _MASK_FILE.fullmatch(path.name)
    if match is None or match["label"] not in CLASS_NAMES:
        raise InvalidImage(f"{path} is not named like cat_1_mask.jpg")
    return CLASS_NAMES.index(match["label"]), int(match["number"])
