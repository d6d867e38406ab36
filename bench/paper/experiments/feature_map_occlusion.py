"""Feature-map occlusion (figure 3): activations on the object matter more than around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx

from rectgrad_ref.errors import BackendUnavailable

from .. import plots
from ..evidence import (
    Claim,
    Comparison,
    Conclusion,
    Table,
    compare,
    least_sure,
    networks_used,
    number,
)
from ..maps import resized_background
from ..runner import Arrays, Experiment, Results, Unit, batches, of_networks
from ..sources import Masked, Sources, normalized
from .masked import masked_inputs

LAYERS = ("relu1", "relu2", "relu3", "relu4")
_SIDES = ("background", "object")
_BATCH = 500  # maps a forward pass

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class FeatureMapOcclusion(Experiment):
    """How the margin of the right class falls as activations of one layer are set to zero.

    Attributes
    ----------
    masked
        Images with a mask, of each class.
    networks
        Of the first seeds; images are such as all of them classify rightly.
    steps
        Fractions of the activations that are occluded, evenly spaced from 0 to 1.
    trials
        Random orders.
    """

    name = "feature_map_occlusion"
    title = "Feature-map occlusion"
    figures = "figure 3"
    paper = (
        "Occluding activations on the object lowers (class logit) − (largest other logit) far more "
        "than occluding as large a fraction of those on the background, at every one of the four "
        "convolutions."
    )
    quick: ClassVar[Mapping[str, Any]] = {"masked": 3, "steps": 6, "trials": 3}

    masked: int = 10
    networks: int = 1
    steps: int = 101
    trials: int = 50

    def inputs(self, sources: Sources) -> dict[str, str]:
        return masked_inputs(sources, self.masked, self.networks)

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        chosen = sources.correctly_classified(self.masked, self.networks)

        def occlude(network: int, layer: str, rows: slice) -> Arrays:
            halves = _split(sources.network_file(network), layer)
            return self._occlude(halves, sources.seed, layer, chosen.pick(rows))

        return {
            f"{network}-{layer}-{key}": partial(occlude, network, layer, rows)
            for network in range(self.networks)
            for layer in LAYERS
            for key, rows in batches(len(chosen.keys), 5).items()
        }

    def _occlude(self, halves: tuple[Run, Run], seed: int, layer: str, images: Masked) -> Arrays:
        """Margins (n, steps), the logits averaged over trials before and after."""
        before, after = halves
        maps = before(normalized(images.images))
        backgrounds = resized_background(images.background, maps.shape[-1])
        results: dict[str, list[np.ndarray]] = {}
        for key, a, label, background in zip(
            images.keys, maps, images.labels, backgrounds, strict=True
        ):
            for side, where in zip(_SIDES, (background, ~background), strict=True):
                rng = np.random.default_rng([seed, int(key), LAYERS.index(layer), len(side)])
                logits = self._logits(a, where, after, rng)
                first = _margin(logits.mean(axis=0), label)
                last = _margin(logits, label).mean(axis=0)
                results.setdefault(f"{side}, logits averaged", []).append(first)
                results.setdefault(f"{side}, margins averaged", []).append(last)
        area = 1 - backgrounds.mean(axis=(1, 2))
        return {name: np.stack(curves) for name, curves in results.items()} | {"area": area}

    def _logits(
        self, a: np.ndarray, where: np.ndarray, after: Run, rng: np.random.Generator
    ) -> np.ndarray:
        """Logits (trials, steps, 10), more and more of `a` (C, H, W) being zero where told."""
        units = np.flatnonzero(np.broadcast_to(where, a.shape))
        counts = np.rint(np.linspace(0, 1, self.steps) * len(units)).astype(int)
        versions = np.tile(a.ravel(), (self.trials * self.steps, 1))
        for trial in range(self.trials):
            order = rng.permutation(units)
            for step, count in enumerate(counts):
                versions[trial * self.steps + step, order[:count]] = 0
        parts = [
            after(versions[i : i + _BATCH].reshape(-1, *a.shape))
            for i in range(0, len(versions), _BATCH)
        ]
        return np.concatenate(parts).reshape(self.trials, self.steps, -1)

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        layers = self._by_layer(found)
        claims, rows = [], []
        numbers: dict[str, Any] = {"fractions": np.linspace(0, 1, self.steps).tolist()}
        for layer, values in layers.items():
            drops = {
                f"{side}, {kind} averaged": _mean_drop(values[f"{side}, {kind} averaged"])
                for side in _SIDES
                for kind in ("logits", "margins")
            }
            pairs = {kind: _drops_compared(drops, kind) for kind in ("logits", "margins")}
            numbers[layer] = {
                "drop": {name: float(drop.mean()) for name, drop in drops.items()},
                "curves": {k: _mean(v).tolist() for k, v in values.items() if k != "area"},
                "object's area": float(values["area"].mean()),
            }
            pair = pairs["logits"]
            claims.append(
                Claim(
                    f"{layer}: occluding the object lowers the margin more",
                    all(p.higher for p in pairs.values()),
                    f"mean drop {number(drops['object, logits averaged'].mean())} against "
                    f"{number(drops['background, logits averaged'].mean())}, larger on "
                    f"{1 - pair.wins:.0%} of the images; {least_sure({'': pair})}",
                )
            )
            rows.append(_row(layer, values, drops))
        count = layers[LAYERS[0]]["area"].shape[1]
        return Conclusion(
            scale=(
                f"{count} images (the paper: 100), {self.steps} fractions (about 100), "
                f"{self.trials} random orders (50); {networks_used(self.networks)}."
            ),
            numbers=numbers,
            tables=[
                Table(
                    ["layer", "object's area", "object", "background", "object", "background"],
                    rows,
                    "Drop of the margin, averaged over all fractions and images: with the logits "
                    "averaged over the random orders first (the authors' code; two columns), and "
                    "with the margins averaged (the paper's text; two columns).",
                )
            ],
            claims=claims,
            remarks=[
                "Single activations (channel, row, column) are occluded, and a fraction is one of "
                "those on that side, so where the object is larger, more of the map is occluded "
                "on its side."
            ],
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        figure, axes = plots.figure(4, width=2.2, height=2.3)
        x = np.linspace(0, 100, self.steps)
        layers = self._by_layer(found)
        for ax, (layer, values) in zip(axes, layers.items(), strict=True):
            samples = {side: values[f"{side}, logits averaged"] for side in ("object", _SIDES[0])}
            plots.curves(
                ax,
                x,
                {side: _mean(sample) for side, sample in samples.items()},
                spread={side: _standard_error(sample) for side, sample in samples.items()},
                xlabel="occluded, %",
                ylabel="class logit − largest other" if ax is axes[0] else "",
                title=layer,
                legend=ax is axes[0],
            )
            ax.set_ylim(*_range(layers))
        return [plots.save(figure, folder, self.name)]

    def _by_layer(self, found: Mapping[str, Arrays]) -> dict[str, Arrays]:
        return {layer: of_networks(found, self.networks, f"{layer}-") for layer in LAYERS}


def _split(network: Path, layer: str) -> tuple[Run, Run]:
    """A network up to a layer, and from there on."""
    try:
        import onnxruntime
    except ImportError as missing:
        raise BackendUnavailable(
            "this experiment needs onnxruntime: pip install 'rectgrad-ref[cpu]'"
        ) from missing
    inferred = onnx.shape_inference.infer_shapes(onnx.load(network))
    extract = onnx.utils.Extractor(inferred).extract_model

    def runner(input: str, output: str) -> Run:
        content = extract([input], [output]).SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return lambda x: np.asarray(session.run([output], {input: x})[0])

    return runner("image", layer), runner(layer, "logits")


def _margin(logits: np.ndarray, label: int) -> np.ndarray:
    """Class logit − largest other logit, over the last axis."""
    others = np.delete(logits, label, axis=-1)
    return np.asarray(logits[..., label] - others.max(axis=-1))


def _mean_drop(curves: np.ndarray) -> np.ndarray:
    """How far each image's curve (…, steps) lies below its start, on average."""
    return np.asarray((curves[..., :1] - curves).mean(axis=-1))


def _mean(curves: np.ndarray) -> np.ndarray:
    """Of networks and images."""
    return np.asarray(curves.mean(axis=(0, 1)))


def _drops_compared(drops: Mapping[str, np.ndarray], kind: str) -> Comparison:
    inside, outside = (drops[f"{side}, {kind} averaged"] for side in ("object", "background"))
    return compare(inside, {"background": outside})["background"]


def _row(layer: str, values: Arrays, drops: Mapping[str, np.ndarray]) -> list[str]:
    means = [
        number(drops[f"{side}, {kind} averaged"].mean())
        for kind in ("logits", "margins")
        for side in ("object", "background")
    ]
    return [layer, f"{values['area'].mean():.0%}", *means]


def _standard_error(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the mean over images, each averaged over networks."""
    images = sample.mean(axis=0)
    mean, error = images.mean(axis=0), images.std(axis=0, ddof=1) / np.sqrt(len(images))
    return mean - error, mean + error


def _range(layers: Mapping[str, Arrays]) -> tuple[float, float]:
    """One scale for all layers."""
    means = [
        _mean(values[f"{side}, logits averaged"]) for values in layers.values() for side in _SIDES
    ]
    return min(m.min() for m in means) - 1, max(m.max() for m in means) + 1
