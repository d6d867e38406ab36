"""The nine development models, made by eight exporters, on real pictures, with every method."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from rectgrad_ref import Attribution, Explainer
from rectgrad_ref.errors import RectGradWarning
from rectgrad_ref.methods import METHODS
from rectgrad_ref.onnx_models import cifar10

pytest.importorskip("onnxruntime")


@dataclass(frozen=True)
class Zoo:
    """How a model is fed, and how many layers RectGrad finds in it."""

    preprocess: Any
    layers: int
    images: str = "photos"


def digits(scale: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Preprocessing of (H, W, 3) pictures of digits for a (1, 28, 28) or (28, 28, 1) input."""
    return lambda picture: scale(picture[..., 0].astype(np.float32))


ZOO = {
    "imagenet_squeezenet1.1_logits": Zoo("caffe", 26),
    "imagenet_mobilenet_v2_1.0_224": Zoo("mobilenet_tf", 35),
    "imagenet_mobilenet_v1_0.25_128": Zoo("mobilenet_tf", 27),
    "cifar10_marabou_small_tf2onnx": Zoo("unit", 4, "cifar10"),
    "cifar10_resnet20_bn_unfused": Zoo("cifar10_imagenet", 19, "cifar10"),
    "cifar10_vit_ibp_3_3_8": Zoo("cifar10_standard", 3, "cifar10"),
    "mnist_cntk_opset8": Zoo(digits(lambda x: x[None]), 2, "digits"),
    "mnist_keras2onnx_sm": Zoo(digits(lambda x: x[..., None] / 255), 2, "digits"),
    "mnist_torch2.6_opset11": Zoo(digits(lambda x: (x[None] / 255 - 0.5) / 0.5), 3, "digits"),
}
IMAGENET = [name for name in ZOO if name.startswith("imagenet")]
models = pytest.mark.parametrize("name", ZOO)


def drawn(digit: int) -> Image.Image:
    """A handwritten-looking 0, 1 or 2."""
    image = Image.new("L", (280, 280))
    draw = ImageDraw.Draw(image)
    if digit == 0:
        draw.ellipse((80, 50, 200, 230), outline=255, width=25)
    else:
        strokes = {
            1: [(14, 5), (14, 23)],
            2: [(9, 9), (11, 6), (17, 6), (19, 9), (18, 13), (9, 22), (20, 22)],
        }
        points = [(10 * x, 10 * y) for x, y in strokes[digit]]
        draw.line(points, fill=255, width=30, joint="curve")
    return image.resize((28, 28), Image.Resampling.BOX)


@pytest.fixture(scope="module")
def cifar10_test_set(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 32, 32, 3) and labels."""
    folder = tmp_path_factory.mktemp("cifar10")
    unpack = shared_data / "cifar10" / "unpack.py"
    subprocess.run([sys.executable, unpack, folder], check=True, capture_output=True)
    images, labels, _ = cifar10.load_cifar10("test", folder)
    return images.transpose(0, 2, 3, 1), labels


@pytest.fixture(scope="module")
def pictures(
    shared_data: Path, cifar10_test_set: tuple[np.ndarray, np.ndarray]
) -> dict[str, list[Any]]:
    photos = shared_data / "photos"
    return {
        "photos": [photos / "n01820546_lorikeet.JPEG", photos / "coral_cat.bmp"],
        "cifar10": list(cifar10_test_set[0][:3]),
        "digits": [drawn(digit) for digit in range(3)],
    }


@pytest.fixture(scope="module")
def load(shared_data: Path) -> Callable[[str, str], Explainer]:
    """Name and backend → the loaded model, once for all tests."""

    @functools.cache
    def loaded(name: str, backend: str = "cpu") -> Explainer:
        folder = shared_data / "models"
        labels = folder / "imagenet_synsets.txt"
        known = name in IMAGENET and "mobilenet" not in name  # 1001 classes there
        return Explainer(
            folder / f"{name}.onnx",
            backend=backend,
            preprocess=ZOO[name].preprocess,
            labels=labels if known else None,
        )

    return loaded


def explained(explainer: Explainer, images: list[Any], method: str, **options: Any) -> Attribution:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RectGradWarning)
        return explainer.explain(images, method=method, **options)


QUICK = {"smoothgrad": {"n": 2}, "integrated_gradients": {"steps": 2}}


def sound(result: Attribution, explainer: Explainer, n: int) -> None:
    assert result.values.shape == (n, *explainer.input.shape[1:])
    assert result.values.dtype == np.float32
    assert np.isfinite(result.values).all()
    assert all(np.any(image) for image in result.values)
    assert result.heatmap().shape[0] == n
    assert result.pictures is not None


@models
@pytest.mark.parametrize("method", METHODS)
def test_every_method(
    load: Callable[..., Explainer], pictures: dict[str, list[Any]], name: str, method: str
) -> None:
    images = pictures[ZOO[name].images][: 1 if name in IMAGENET else 3]
    options = dict(QUICK.get(method, {}))
    if method == "rectgrad":
        options["q"] = 50.0  # below 98, so that layers of few units let something pass
    result = explained(load(name), images, method, **options)
    sound(result, load(name), len(images))


@pytest.mark.slow
@models
@pytest.mark.parametrize("method", ["smoothgrad", "integrated_gradients"])
def test_methods_of_many_passes(
    load: Callable[..., Explainer], pictures: dict[str, list[Any]], name: str, method: str
) -> None:
    images = pictures[ZOO[name].images]
    result = explained(load(name), images, method)
    sound(result, load(name), len(images))
    if method == "integrated_gradients":
        finer = explained(load(name), images, "integrated_gradients", steps=400)
        # From black to a picture of 0 … 255, what bends does so in the first hundredth of the path,
        # where more steps do not always fall more luckily.
        small = 1e-3 * np.abs(result.logits).max()
        assert np.abs(finer.completeness_gap).max() < max(
            np.abs(result.completeness_gap).max(), small
        )


@models
def test_layers_and_masks(
    load: Callable[..., Explainer], pictures: dict[str, list[Any]], name: str
) -> None:
    """τ and mask of every layer again, by sorting the layer's own scores."""
    images = pictures[ZOO[name].images][: 1 if name in IMAGENET else 3]
    result = explained(load(name), images, "rectgrad", q=90.0, trace=True)
    assert len(result.layers()) == ZOO[name].layers
    for value, layer in result.layers().items():
        scores = (layer.a * layer.R_out).reshape(len(images), -1)
        assert scores.dtype == np.float32
        n = scores.shape[1]
        tau = np.sort(scores, axis=1)[:, n - 1 - round((n - 1) * (1 - 90 / 100))]
        signs = (np.sign(layer.a) * np.sign(layer.R_out)).reshape(scores.shape)
        mask = np.where(tau[:, None] == 0, signs > 0, scores > tau[:, None])
        assert np.array_equal(layer.tau, tau), value
        assert np.array_equal(layer.mask.reshape(scores.shape), mask), value
        assert not layer.R_in[~layer.mask].any(), value


@models
def test_logits_and_saliency_agree_with_float64(
    load: Callable[..., Explainer], pictures: dict[str, list[Any]], name: str
) -> None:
    images = pictures[ZOO[name].images][:1]
    single = explained(load(name), images, "saliency")
    double = explained(load(name, "reference"), images, "saliency")
    assert single.target.tolist() == double.target.tolist()
    scale = np.abs(double.logits).max()
    assert np.abs(single.logits - double.logits).max() <= 1e-4 * scale
    # A unit within rounding of a kink may fall on either side.
    correlation = np.corrcoef(single.values.ravel(), double.values.ravel())[0, 1]
    assert correlation > 0.999


@models
def test_a_batch_is_its_samples(
    load: Callable[..., Explainer], pictures: dict[str, list[Any]], name: str
) -> None:
    images = pictures[ZOO[name].images]
    together = explained(load(name), images, "rectgrad", q=80.0)
    for i, image in enumerate(images):
        alone = explained(load(name), [image], "rectgrad", q=80.0)
        assert alone.target[0] == together.target[i]
        difference = np.abs(alone.logits[0] - together.logits[i]).max()
        assert difference <= 1e-5 * np.abs(alone.logits).max()


# --- predictions ----------------------------------------------------------------------------------

PHOTOS = {
    "n01820546_lorikeet.JPEG": 90,
    "n01860187_black_swan.JPEG": 100,
    "n02088094_Afghan_hound.JPEG": 160,
    "n02112137_chow.JPEG": 260,
    "n02165105_tiger_beetle.JPEG": 300,
    "n02417914_ibex.JPEG": 350,
    "coral_cat.bmp": 285,
    "pelican.jpeg": 144,
    "coral_parrot.jpg": 88,
}


@pytest.mark.parametrize(
    ("name", "first"), [("imagenet_squeezenet1.1_logits", 0), ("imagenet_mobilenet_v2_1.0_224", 1)]
)
def test_photos_are_recognised(
    load: Callable[..., Explainer], shared_data: Path, name: str, first: int
) -> None:
    """What the development data's manifest states; class 0 of the MobileNets is the background."""
    paths = [shared_data / "photos" / photo for photo in PHOTOS]
    result = explained(load(name), paths, "random")
    assert (result.target - first).tolist() == list(PHOTOS.values())


@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith("mnist")])
def test_digits_are_recognised(
    load: Callable[..., Explainer], pictures: dict[str, list[Any]], name: str
) -> None:
    assert explained(load(name), pictures["digits"], "random").target.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "accuracy"),
    [
        ("cifar10_marabou_small_tf2onnx", 0.58),
        ("cifar10_resnet20_bn_unfused", 0.91),
        ("cifar10_vit_ibp_3_3_8", 0.62),
    ],
)
def test_cifar10_accuracy(
    load: Callable[..., Explainer],
    cifar10_test_set: tuple[np.ndarray, np.ndarray],
    name: str,
    accuracy: float,
) -> None:
    images, labels = (part[:500] for part in cifar10_test_set)
    result = explained(load(name), list(images), "random")
    assert (result.target == labels).mean() == pytest.approx(accuracy, abs=0.04)
