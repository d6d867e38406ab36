"""Training of the paper's CIFAR-10 network."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from typer.testing import CliRunner  # noqa: E402

from rectgrad_ref.errors import BackendUnavailable, OutputError  # noqa: E402
from rectgrad_ref.onnx_models import train as trainer  # noqa: E402
from rectgrad_ref.onnx_models.cifar10 import CLASS_NAMES, Cifar10, occlude  # noqa: E402
from rectgrad_ref.onnx_models.cifar10_cnn import SHAPES  # noqa: E402
from rectgrad_ref.onnx_models.train import Recipe, initial_weights, train  # noqa: E402

# Adam's first steps have the length of the learning rate even where the gradient is all rounding
# error. With so large an ε they are in proportion to the gradient.
SMOOTH = Recipe(learning_rate=0.1, epsilon=1.0, epochs=1)


def batch(n: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3, 32, 32), np.uint8), rng.integers(0, 10, n)


def test_initial_weights_are_glorot_uniform() -> None:
    weights = initial_weights(0)
    assert {name: array.shape for name, array in weights.items()} == SHAPES
    # √(6 / (inputs + outputs)), a convolution's counted over its 3 × 3 kernel.
    for name, limit in {
        "conv1.weight": np.sqrt(6 / (9 * 3 + 9 * 32)),
        "conv4.weight": np.sqrt(6 / (9 * 64 + 9 * 64)),
        "dense1.weight": np.sqrt(6 / (4096 + 256)),
    }.items():
        assert 0.99 * limit < np.abs(weights[name]).max() <= np.float32(limit)
        assert weights[name].std() == pytest.approx(limit / np.sqrt(3), rel=0.05)
    assert not any(weights[name].any() for name in SHAPES if name.endswith("bias"))
    assert not np.array_equal(initial_weights(1)["conv1.weight"], weights["conv1.weight"])


def module_of(weights: dict[str, NDArray[np.float32]]) -> Any:
    """The plain PyTorch module with these weights."""
    nn = torch.nn
    module = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4096, 256), nn.ReLU(), nn.Linear(256, 10)),
    )
    for parameter, (name, array) in zip(module.parameters(), weights.items(), strict=True):
        parameter.data = torch.from_numpy(array.T.copy() if "dense" in name else array.copy())
    return module


def test_training_is_the_plain_recipe() -> None:
    images, labels = batch(200)
    trained = train(images, labels, [5], recipe=SMOOTH)

    assert asdict(Recipe()) == {
        "learning_rate": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "batch_size": 100,
        "epochs": 20,
        "precision": "float32",
    }
    module = module_of(initial_weights(5))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1, betas=(0.9, 0.999), eps=1.0)
    losses = []
    for start in (0, 100):
        x = torch.from_numpy(images[start : start + 100]).float() / 127.5 - 1
        y = torch.from_numpy(labels[start : start + 100])
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert trained.losses == [[pytest.approx(np.mean(losses), rel=1e-6)]]
    for parameter, (name, stack) in zip(module.parameters(), trained.weights.items(), strict=True):
        expected = parameter.detach().numpy()
        assert_same_training(stack[0], expected.T if "dense" in name else expected, name, 5)


def assert_same_training(
    actual: NDArray[np.float32], expected: NDArray[np.float32], name: str, seed: int
) -> None:
    """The two differ by less than 1 % of what training changed.

    Rounding alone stays below 1e-5, but it also flips a few ReLUs and pooling winners among the
    millions: PyTorch in float32 is up to 0.6 % from PyTorch in float64 here.
    """
    change = np.abs(expected - initial_weights(seed)[name]).max()
    assert change > 1e-4
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-2 * change)


def test_member_of_an_ensemble_equals_the_network_trained_alone() -> None:
    images, labels = batch(200)
    together = train(images, labels, [3, 7], recipe=SMOOTH)
    for member, seed in enumerate([3, 7]):
        alone = train(images, labels, [seed], recipe=SMOOTH)
        assert together.losses[0][member] == pytest.approx(alone.losses[0][0], rel=1e-6)
        for name in SHAPES:
            assert_same_training(together.weights[name][member], alone.weights[name][0], name, seed)


def test_bfloat16_moves_float32_weights_in_nearly_the_same_direction() -> None:
    """It rounds to 0.4 %, and flips ReLUs and pooling winners the more, the deeper the gradient."""
    images, labels = batch(200)
    plain = train(images, labels, [5], recipe=SMOOTH)
    reduced = train(images, labels, [5], recipe=replace(SMOOTH, precision="bfloat16"))
    assert reduced.losses[0][0] == pytest.approx(plain.losses[0][0], rel=1e-3)
    for name, initial in initial_weights(5).items():
        assert reduced.weights[name].dtype == np.float32
        ours, theirs = (t.weights[name][0] - initial for t in (reduced, plain))
        assert not np.array_equal(ours, theirs)
        cosine = np.vdot(ours, theirs) / (np.linalg.norm(ours) * np.linalg.norm(theirs))
        assert cosine > 0.97


def test_each_member_may_have_its_own_images() -> None:
    images, labels = batch(200)
    others = occlude(images)
    together = train(np.stack([images, others]), labels, [3, 3], recipe=SMOOTH)
    for member, own in enumerate([images, others]):
        alone = train(own, labels, [3], recipe=SMOOTH)
        for name in SHAPES:
            assert_same_training(together.weights[name][member], alone.weights[name][0], name, 3)
    assert together.losses[0][0] != together.losses[0][1]


def test_the_images_classified_rightly_are_those_of_the_plain_network() -> None:
    images, labels = batch(600)
    networks = [initial_weights(seed) for seed in (0, 1)]
    weights = {name: np.stack([network[name] for network in networks]) for name in SHAPES}
    x = torch.from_numpy(images).float() / 127.5 - 1
    predicted = [module_of(network)(x).argmax(1).numpy() for network in networks]
    correct = trainer.classified_rightly(weights, images, labels)
    assert np.array_equal(correct, np.stack(predicted) == labels)
    own = np.stack([images, images[::-1]])
    correct = trainer.classified_rightly(weights, own, labels)
    assert np.array_equal(correct[1], predicted[1][::-1] == labels)


def test_resumed_training_is_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = batch(200)
    recipe = Recipe(epochs=3)
    expected = train(images, labels, [0], recipe=recipe)

    checkpoint = tmp_path / "training.checkpoint"
    epoch = trainer._epoch
    calls = []

    def killed_in_the_second_epoch(*arguments: Any) -> list[float]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return epoch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_epoch", killed_in_the_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            train(images, labels, [0], recipe=recipe, checkpoint=checkpoint)
        resumed = train(images, labels, [0], recipe=recipe, checkpoint=checkpoint)
    assert len(calls) == 4, "the first epoch was repeated"
    assert resumed.losses == expected.losses
    for name in SHAPES:
        np.testing.assert_array_equal(resumed.weights[name], expected.weights[name])


def test_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    images, labels = batch(20)
    checkpoint = tmp_path / "training.checkpoint"
    train(images, labels, [0], recipe=Recipe(epochs=1), checkpoint=checkpoint)
    with pytest.raises(OutputError, match="belongs to another training"):
        train(images, labels, [1], recipe=Recipe(epochs=1), checkpoint=checkpoint)
    with pytest.raises(OutputError, match="belongs to another training"):
        train(occlude(images), labels, [0], recipe=Recipe(epochs=1), checkpoint=checkpoint)


def test_command_line_trains_exports_and_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Cifar10(*batch(20), CLASS_NAMES)
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(trainer, "load_cifar10", lambda split, folder, download: data)
    results, package = tmp_path / "results", tmp_path / "package"
    package.mkdir()
    runner = CliRunner()

    def run(*arguments: object) -> int:
        return runner.invoke(trainer.app, [str(a) for a in arguments]).exit_code

    normal = ["--seed", 1, "--seed", 0, "--dataset", "normal"]
    assert run("fit", "-o", results, *normal) == 0
    assert run("publish", results, "-o", package) != 0, "there is no occluded network yet"
    assert run("fit", "-o", results, "--seed", 0, "--dataset", "occluded") == 0
    assert run("publish", results, "-o", package) == 0

    assert not list(results.glob("*.checkpoint"))
    seed0 = json.loads((results / "cifar10_cnn_normal_seed0.json").read_text())
    assert seed0["recipe"]["epochs"] == len(seed0["losses"]) == 20
    # Twenty images are learnt by heart, and the test set is the same here.
    assert seed0["test_accuracy"] > 0.9
    network = (results / "cifar10_cnn_normal_seed0.onnx").read_bytes()
    assert (package / "cifar10_cnn.onnx").read_bytes() == network
    record = json.loads((package / "cifar10_cnn.json").read_text())
    assert [r["seed"] for r in record["cifar10_cnn.onnx"]["seeds"]] == [0, 1]
    assert record["cifar10_cnn.onnx"]["seeds"][0] == seed0
    assert record["cifar10_cnn_occluded.onnx"]["test_accuracy_sd"] is None


def test_absence_of_pytorch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, trainer.__name__)
    with pytest.raises(BackendUnavailable, match=r"rectgrad-ref\[train\]"):
        importlib.import_module(trainer.__name__)
