"""The benchmarks are no part of the package; they are imported from the repository's root."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rectgrad_ref import picture
from rectgrad_ref.onnx_models.cifar10 import CLASS_NAMES, Cifar10, occlude
from rectgrad_ref.onnx_models.cifar10_cnn import network_path

sys.path.insert(0, str(Path(__file__).parents[2]))

if TYPE_CHECKING:
    from bench.paper.sources import Sources


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse pictures, and few passes of the methods with many: most of the time otherwise."""
    from bench.paper import maps

    monkeypatch.setattr(picture, "_DPI", 40)
    monkeypatch.setattr(maps, "SmoothGrad", partial(maps.SmoothGrad, n=2))
    monkeypatch.setattr(maps, "IntegratedGradients", partial(maps.IntegratedGradients, steps=2))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Stand-ins for the data, rightly classified by definition."""
    pytest.importorskip("onnxruntime")
    from experiment_checks import blobs

    from bench.paper.sources import Classifier, Masked, Sources, normalized

    # Another name than "cpu", so that networks are trained in stacks as on a GPU.
    classifier = Classifier(network_path(), "cifar10")
    networks = tmp_path_factory.mktemp("networks")
    for dataset in ("normal", "occluded"):
        committed = network_path(occluded=dataset == "occluded")
        (networks / f"cifar10_cnn_{dataset}_seed1.onnx").symlink_to(committed)
    made = Sources(classifier=classifier, networks=networks, backend="cpu", device="cpu:0")
    explainer = made.network()
    for name, images in (("train", blobs(12)), ("test", blobs(6, seed=1))):
        labels = explainer.explain(normalized(images), method="random").logits.argmax(axis=1)
        made.__dict__[name] = Cifar10(images, labels, CLASS_NAMES)
    background = np.ones((12, 32, 32), bool)
    background[:, 8:24, 8:24] = False
    made.__dict__["occluded_test"] = occlude(made.test.images)
    made.__dict__["masked"] = Masked(
        np.arange(12), made.train.images, made.train.labels, background
    )
    return made


@pytest.fixture(scope="session")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The real data."""
    pytest.importorskip("onnxruntime")
    from bench.paper.sources import Classifier, Sources

    folder = tmp_path_factory.mktemp("cifar10")
    unpack = shared_data / "cifar10" / "unpack.py"
    subprocess.run([sys.executable, unpack, folder], check=True, capture_output=True)
    models = shared_data / "models"
    return Sources(
        cifar=folder,
        masks=shared_data / "cifar10_masks",
        classifier=Classifier(
            models / "imagenet_squeezenet1.1_logits.onnx",
            "caffe",
            models / "imagenet_synsets.txt",
            sorted((shared_data / "photos").iterdir()),
        ),
        backend="cpu",
    )
