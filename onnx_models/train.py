"""Train the paper's CIFAR-10 network with PyTorch and export it to ONNX."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import statistics
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
import typer
from numpy.typing import NDArray

from rectgrad_ref.errors import BackendUnavailable, OutputError, RectGradError
from rectgrad_ref.files import atomic_write

from .cifar10 import load_cifar10, occlude
from .cifar10_cnn import SHAPES, build, network_path

try:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
except ImportError as missing:
    raise BackendUnavailable(
        "training needs PyTorch: pip install 'rectgrad-ref[train]'"
    ) from missing

HERE = Path(__file__).parent
logger = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


class Dataset(StrEnum):
    """What the network is trained and tested on."""

    normal = "normal"
    occluded = "occluded"


@dataclass(frozen=True)
class Recipe:
    """The authors' training: softmax cross-entropy, Adam, batches in file order, float32.

    Glorot-uniform weights, zero biases, no augmentation. PyTorch's Adam adds ε to the
    bias-corrected root mean square, TensorFlow 1 to the uncorrected one. In bfloat16,
    convolutions and matrix products are; weights, losses and Adam's state stay float32.
    """

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    batch_size: int = 100
    epochs: int = 20
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass
class Trained:
    """An ensemble after training."""

    weights: dict[str, NDArray[np.float32]]
    """Name → (M, …), M networks with the shapes of `cifar10_cnn.SHAPES`."""
    losses: list[list[float]]
    """Mean training loss, per epoch and network."""
    seconds: float
    """Wall time spent in epochs, those before an interruption included."""


def initial_weights(seed: int) -> dict[str, NDArray[np.float32]]:
    """Glorot-uniform weights and zero biases, drawn on the host so that devices agree."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in SHAPES.items():
        if name.endswith(".bias"):
            weights[name] = np.zeros(shape, np.float32)
        else:
            # Both axes 0 and 1 count channels, whichever is the input; the rest is the kernel.
            fans = (shape[0] + shape[1]) * np.prod(shape[2:])
            limit = np.sqrt(6 / fans)
            weights[name] = rng.uniform(-limit, limit, shape).astype(np.float32)
    return weights


def train(
    images: NDArray[Any],
    labels: NDArray[np.int64],
    seeds: list[int],
    *,
    recipe: Recipe = Recipe(),
    device: str = "cpu",
    checkpoint: Path | None = None,
) -> Trained:
    """Train one network per seed, all at once.

    Parameters
    ----------
    images
        (N, 3, 32, 32), RGB, 0 to 255; or (M, N, 3, 32, 32), one set for each of the M seeds.
    labels
        (N,).
    seeds
        M seeds of the initial weights, the only random part.
    device
        A PyTorch device.
    checkpoint
        File that keeps the state after each epoch. Where it exists, training goes on from there
        and ends with the same weights as an uninterrupted run.

    Raises
    ------
    OutputError
        The checkpoint belongs to another recipe, other seeds or other images.
    """
    x, y = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
    networks = [initial_weights(seed) for seed in seeds]
    weights = {
        name: torch.from_numpy(np.stack([network[name] for network in networks]))
        .to(device)
        .requires_grad_()
        for name in SHAPES
    }
    optimizer = torch.optim.Adam(
        weights.values(),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        fused=True,
    )
    identity = {
        "recipe": asdict(recipe),
        "seeds": seeds,
        "images": zlib.crc32(np.ascontiguousarray(images).data),
    }
    losses: list[list[float]] = []
    seconds = 0.0
    if checkpoint is not None and checkpoint.exists():
        losses, seconds = _restore(checkpoint, identity, weights, optimizer)
    while len(losses) < recipe.epochs:
        start = time.perf_counter()
        # By default cuDNN rounds to TF32 and may add up in any order.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            losses.append(_epoch(x, y, weights, optimizer, recipe))
        seconds += time.perf_counter() - start
        logger.info("epoch %d/%d: loss %s", len(losses), recipe.epochs, np.round(losses[-1], 4))
        if checkpoint is not None:
            _save(checkpoint, identity, weights, optimizer, losses, seconds)
    arrays = {name: weight.detach().cpu().numpy() for name, weight in weights.items()}
    return Trained(arrays, losses, seconds)


def forward(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """Logits (M, B, 10) of M networks on `images` (B, 3, 32, 32) or (M, B, 3, 32, 32), 0 to 255.

    The networks stand side by side as groups of one convolution, so that M = 1 is the plain
    network.
    """
    m = len(weights["conv1.weight"])
    x = images.expand(m, *images.shape[-4:]).transpose(0, 1).flatten(1, 2)
    x = x.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1
    x = F.relu(_conv(weights, "conv1", x))
    x = F.relu(_conv(weights, "conv2", x))
    x = F.max_pool2d(x, 2)
    x = F.relu(_conv(weights, "conv3", x))
    x = F.relu(_conv(weights, "conv4", x))
    x = F.max_pool2d(x, 2)
    x = x.reshape(len(x), m, -1).transpose(0, 1)
    x = F.relu(_dense(weights, "dense1", x))
    return _dense(weights, "dense2", x)


def classified_rightly(
    weights: Mapping[str, NDArray[np.float32]],
    images: NDArray[Any],
    labels: NDArray[np.int64],
    *,
    device: str = "cpu",
) -> NDArray[np.bool_]:
    """Which images (N,) each of M networks classifies rightly: (M, N).

    `weights` is that of `Trained`; `images`, `labels` and `device` are as in `train`.
    """
    tensors = {name: torch.from_numpy(stack).to(device) for name, stack in weights.items()}
    correct = []
    with torch.no_grad():
        for start in range(0, len(labels), 500):
            x = torch.from_numpy(images[..., start : start + 500, :, :, :]).to(device)
            predicted = forward(tensors, x).argmax(-1).cpu().numpy()
            correct.append(predicted == labels[start : start + 500])
    return np.concatenate(correct, axis=1)


def _conv(weights: dict[str, Tensor], layer: str, x: Tensor) -> Tensor:
    kernel, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
    return F.conv2d(x, kernel.flatten(0, 1), bias.flatten(), padding=1, groups=len(kernel))


def _dense(weights: dict[str, Tensor], layer: str, x: Tensor) -> Tensor:
    return torch.baddbmm(weights[f"{layer}.bias"][:, None], x, weights[f"{layer}.weight"])


def _epoch(
    images: Tensor,
    labels: Tensor,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
) -> list[float]:
    """One pass in file order; the mean loss of each network."""
    total = torch.zeros(len(weights["conv1.weight"]), device=images.device)
    reduced = recipe.precision == "bfloat16"
    for start in range(0, len(labels), recipe.batch_size):
        batch = slice(start, start + recipe.batch_size)
        y = labels[batch]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=reduced):
            logits = forward(weights, images[..., batch, :, :, :]).float()
        loss = F.cross_entropy(
            logits.permute(1, 2, 0), y[:, None].expand(-1, len(logits)), reduction="none"
        )
        optimizer.zero_grad()
        # A sum over networks keeps their gradients apart; Adam works element by element.
        loss.mean(0).sum().backward()
        optimizer.step()
        total += loss.detach().sum(0)
    return (total / len(labels)).tolist()


def _save(
    path: Path,
    identity: dict[str, Any],
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    losses: list[list[float]],
    seconds: float,
) -> None:
    state = {
        "identity": identity,
        "weights": {name: weight.detach() for name, weight in weights.items()},
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "seconds": seconds,
    }
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def _restore(
    path: Path,
    identity: dict[str, Any],
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[list[list[float]], float]:
    """Load weights and optimizer in place; the losses and seconds so far."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["identity"] != identity:
        raise OutputError(f"{path} belongs to another training ({state['identity']}): delete it")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["losses"], state["seconds"]


def accuracy(path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Fraction of `images` (N, 3, 32, 32), 0 to 255, that an exported network classifies rightly.

    It runs in onnxruntime, so that the file is tested and not what it was exported from.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    correct = 0
    for start in range(0, len(labels), 500):
        x = images[start : start + 500].astype(np.float32) / np.float32(127.5) - np.float32(1)
        (logits,) = session.run(["logits"], {"image": x})
        correct += int(np.sum(logits.argmax(1) == labels[start : start + 500]))
    return correct / len(labels)


@app.command()
def fit(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")],
    seed: Annotated[list[int], typer.Option(help="Seed of the weights; may be repeated.")],
    dataset: Annotated[Dataset, typer.Option(help="Plain, or with the fixed random patch.")],
    data: Annotated[Path | None, typer.Option(help="Folder with cifar-10-batches-py.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch CIFAR-10 if absent.")] = False,
    device: Annotated[str, typer.Option(help="PyTorch device.")] = "cpu",
) -> None:
    """Train networks by the paper's recipe; write each one's ONNX file and JSON record."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output.mkdir(parents=True, exist_ok=True)
    images, labels, _ = load_cifar10("train", data, download=download)
    test_images, test_labels, _ = load_cifar10("test", data, download=download)
    if dataset is Dataset.occluded:
        images, test_images = occlude(images), occlude(test_images)
    # Grouped convolutions pay on a GPU; a CPU is faster with one network after the other.
    ensembles = [[s] for s in seed] if device == "cpu" else [seed]
    for seeds in ensembles:
        checkpoint = output / f"{dataset}_{'_'.join(map(str, seeds))}.checkpoint"
        trained = train(images, labels, seeds, device=device, checkpoint=checkpoint)
        training = {
            "dataset": dataset,
            "recipe": asdict(Recipe()),
            "torch": torch.__version__,
            "device": device,
            "threads": torch.get_num_threads(),
            "seconds": round(trained.seconds),
            "trained_together": len(seeds),
        }
        for member, member_seed in enumerate(seeds):
            path = output / f"cifar10_cnn_{dataset}_seed{member_seed}.onnx"
            model = build({name: stack[member] for name, stack in trained.weights.items()})
            with atomic_write(path) as temporary:
                onnx.save(model, temporary)
            result = {
                "seed": member_seed,
                "test_accuracy": accuracy(path, test_images, test_labels),
                "losses": [epoch[member] for epoch in trained.losses],
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            _write_json(path.with_suffix(".json"), result | training)
            logger.info("%s: test accuracy %.4f", path.name, result["test_accuracy"])
        checkpoint.unlink()


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Folder that `fit` wrote, seed 0 included.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="By default the package.")] = HERE,
) -> None:
    """Copy the networks of seed 0 and record the accuracies of all seeds beside them."""
    summary: dict[str, Any] = {}
    for dataset in Dataset:
        paths = folder.glob(f"cifar10_cnn_{dataset}_seed*.json")
        records = sorted((json.loads(p.read_text()) for p in paths), key=lambda r: r["seed"])
        if not records or records[0]["seed"] != 0:
            raise typer.BadParameter(f"{folder} has no {dataset} network of seed 0: run fit")
        name = network_path(occluded=dataset is Dataset.occluded).name
        with atomic_write(output / name) as temporary:
            shutil.copyfile(folder / f"cifar10_cnn_{dataset}_seed0.onnx", temporary)
        accuracies = [record["test_accuracy"] for record in records]
        summary[name] = {
            "seed": 0,
            "test_accuracy": accuracies[0],
            "test_accuracy_mean": statistics.mean(accuracies),
            "test_accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "seeds": records,
        }
    _write_json(output / "cifar10_cnn.json", summary)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    try:
        app()
    except RectGradError as error:
        sys.exit(f"error: {error}")
