"""ROAR and KAR (Table 1 and figure 18): retraining without, or with only, the important pixels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from rectgrad_ref.explainer import Explainer
from rectgrad_ref.methods import Method, Random
from rectgrad_ref.methods.noise import normal
from rectgrad_ref.onnx_models.cifar10 import Cifar10

from .. import plots
from ..evidence import SIGNIFICANT, Claim, Conclusion, Table, compare, p_value
from ..maps import PRR, RECTGRAD, paper_methods
from ..runner import Arrays, Experiment, Results, Unit, batches, stacked
from ..sources import Sources, checksum, normalized

Test = Literal["ROAR", "KAR"]
TESTS: tuple[Test, ...] = ("ROAR", "KAR")
QUANTITIES: dict[Test, str] = {
    "ROAR": "area under the ROAR curve",
    "KAR": "area over the KAR curve",
}
BASELINE = "unmodified"
CHANCE = 0.1
_TIE_NOISE = 1e-4
_BATCH = 500

TABLE_1 = {
    "Random": (0.5562, 0.4438),
    RECTGRAD: (0.5385, 0.3382),
    "Saliency": (0.5568, 0.4455),
    "Guided BP": (0.5504, 0.4270),
    "SmoothGrad": (0.5536, 0.4444),
    "Gradient × input": (0.5408, 0.4176),
    "IntegGrad": (0.5428, 0.4185),
    "DeepLIFT": (0.5519, 0.3928),
}


@dataclass(frozen=True, kw_only=True)
class Roar(Experiment):
    """Test accuracy after retraining on images of which a fraction of the pixels is left.

    Attributes
    ----------
    train_images, test_images
        The first of each set; both are modified alike.
    fractions
        Of the pixels that are removed (ROAR) or kept (KAR).
    epochs, precision
        Of each training; everything else is the paper's recipe.
    networks
        Trained for each estimator and fraction, with seeds 0, 1, …
    """

    tests: ClassVar[tuple[Test, ...]] = TESTS

    name: ClassVar[str] = "roar"
    family: ClassVar[str] = "roar"
    title: ClassVar[str] = "ROAR and KAR"
    figures: ClassVar[str] = "Table 1 and figure 18"
    paper: ClassVar[str] = (
        "RectGrad has the lowest area under the ROAR curve (.5385; the others .5408 to .5568) and "
        "by far the lowest area over the KAR curve (.3382; .3928 to .4455)."
    )
    quick: ClassVar[Mapping[str, Any]] = {
        "train_images": 400,
        "test_images": 200,
        "fractions": (0.1, 0.9),
        "epochs": 2,
        "networks": 1,
    }

    extent: ClassVar[frozenset[str]] = frozenset({"fractions", "networks"})

    train_images: int = 50_000
    test_images: int = 10_000
    fractions: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    epochs: int = 20
    networks: int = 3
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision is float32 or bfloat16, not {self.precision!r}")

    def inputs(self, sources: Sources) -> dict[str, str]:
        return {
            "network": sources.network().model.sha256,
            "train": checksum(sources.train.images[: self.train_images]),
            "test": checksum(sources.test.images[: self.test_images]),
        }

    def estimators(self, seed: int = 0) -> dict[str, Estimator]:
        """Those of Table 1: the paper's methods but PRR, and noise."""
        methods = {"Random": Random(seed=seed), **paper_methods(seed)}
        return {name: Estimator(method) for name, method in methods.items() if name != PRR}

    def data(self, sources: Sources) -> dict[str, Cifar10]:
        """The images and their labels, by split."""
        return {
            "train": _first(sources.train, self.train_images),
            "test": _first(sources.test, self.test_images),
        }

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        explainer = sources.network()
        data = self.data(sources)
        units: dict[str, Unit] = {}
        for name, estimator in self.estimators(sources.seed).items():
            for split, part in data.items():
                for key, rows in batches(len(part.labels), _BATCH).items():
                    units[f"ranks-{name}-{split}-{key}"] = partial(
                        pixel_ranks, explainer, estimator, part.images, rows, sources.seed
                    )
        for stack in self._stacks(together=sources.device != "cpu"):
            units[f"accuracy-{_label(stack)}"] = partial(self._retrain, sources, done, data, stack)
        return units

    def _stacks(self, *, together: bool) -> Iterator[list[Member]]:
        """All networks, in groups of one estimator and test that are trained at once.

        A GPU is only busy with many at once. A CPU is faster with one after the other: seed by
        seed and fraction by fraction, so that what is done early is a smaller result, and whole.
        """
        seeds = range(self.networks)
        baselines = [Member(BASELINE, "ROAR", 0.0, seed) for seed in seeds]
        tests = [
            [Member(estimator, test, f, seed) for f in self.fractions for seed in seeds]
            for estimator, test in itertools.product(self.estimators(), self.tests)
        ]
        if together:
            yield from (baselines, *tests)
        else:
            members = itertools.chain(baselines, *tests)
            yield from ([m] for m in sorted(members, key=lambda m: (m.seed, m.fraction)))

    def _retrain(
        self,
        sources: Sources,
        done: Results,
        data: Mapping[str, Cifar10],
        stack: Sequence[Member],
    ) -> Arrays:
        """Which test images each network classifies rightly: name → (N,)."""
        from rectgrad_ref.onnx_models.train import Recipe, classified_rightly, train

        colour = data["train"].images.mean(axis=(0, 2, 3))
        train_images, test_images = (
            _versions(part.images, stack, done, split, colour) for split, part in data.items()
        )
        checkpoint = done.folder / f"{_label(stack)}.checkpoint"
        trained = train(
            train_images,
            data["train"].labels,
            [member.seed for member in stack],
            recipe=Recipe(epochs=self.epochs, precision=self.precision),
            device=sources.device,
            checkpoint=checkpoint,
        )
        correct = classified_rightly(
            trained.weights, test_images, data["test"].labels, device=sources.device
        )
        checkpoint.unlink(missing_ok=True)
        return {member.label: right for member, right in zip(stack, correct, strict=True)}

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        correct = self.correct(found)
        areas = {test: self.areas(correct, test) for test in TESTS}
        claims = []
        for test, quantity in QUANTITIES.items():
            inner = {e: area.inner for e, area in areas[test].items()}
            ours = inner.pop(RECTGRAD)
            claims.append(Claim(f"RectGrad has the lowest {quantity}", *smaller(ours, inner)))
        rows = [
            [e]
            + [
                cell
                for test, published in zip(TESTS, TABLE_1[e], strict=True)
                for cell in (*cells(areas[test][e]), f"{published:.4f}")
            ]
            for e in self.estimators()
        ]
        head = ["estimator", f"ROAR AUC {self.span}", "[0, 1]", "paper"]
        head += [f"KAR AOC {self.span}", "[0, 1]", "paper"]
        return Conclusion(
            scale=self.scale(correct),
            numbers={
                "accuracy": {k: v.mean(axis=1).tolist() for k, v in correct.items()},
                "area": {
                    test: {
                        e: {"inner": float(a.inner.mean()), "whole": float(a.whole.mean())}
                        for e, a in areas[test].items()
                    }
                    for test in TESTS
                },
            },
            tables=[
                Table(
                    head,
                    rows,
                    "Trapezoid rule divided by the interval; ± is the standard deviation over "
                    "networks, where there are several. [0, 1] adds the end points: the "
                    "unmodified images, retrained alike, and chance (10 %). Lower is better. The "
                    "paper's KAR of Random is 1 − its ROAR; ours is trained like the others.",
                )
            ],
            claims=claims,
            reduced=self.reduced,
            remarks=[
                "Significance is paired over test images, of each image's area averaged over "
                "networks, so it speaks of these networks, not of others trained alike.",
                "Removed pixels take the training set's mean colour, rounded to whole grey levels.",
                *leaks(correct, self.tests),
            ],
        )

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        correct = self.correct(found)
        figure, axes = plots.figure(len(self.tests), width=3.6, height=3)
        plain = correct[f"ROAR, {BASELINE}, 0"].mean()
        for ax, test in zip(axes, self.tests, strict=True):
            lines = {
                e: np.array([100 * correct[f"{test}, {e}, {f:g}"].mean() for f in self.fractions])
                for e in sorted(self.estimators(), key=lambda e: e != RECTGRAD)
            }
            plots.curves(
                ax,
                [100 * fraction for fraction in self.fractions],
                lines,
                xlabel=f"pixels {'removed' if test == 'ROAR' else 'kept'}, %",
                ylabel="test accuracy, %" if test == "ROAR" else "",
                title=test,
                marker="o",
                legend=False,
            )
            ax.axhline(100 * plain, color="0.6", linewidth=0.8, linestyle="--", label=BASELINE)
        plots.shared_legend(figure, axes[0])
        return [plots.save(figure, folder, self.name)]

    @property
    def reduced(self) -> bool:
        """Whether the settings are not the paper's."""
        return asdict(self) != asdict(type(self)())

    @property
    def span(self) -> str:
        """The interval of fractions."""
        return f"[{self.fractions[0]:g}, {self.fractions[-1]:g}]"

    def scale(self, correct: Arrays) -> str:
        """How much of the paper's protocol it is."""
        return (
            f"{self.train_images:,} of 50,000 training and {self.test_images:,} of 10,000 test "
            f"images, {self.epochs} of 20 epochs in {self.precision}, {self.networks} of 3 "
            f"networks for each of {len(self.fractions)} of 5 fractions; unmodified accuracy "
            f"{correct[f'ROAR, {BASELINE}, 0'].mean():.1%}."
        )

    def correct(self, found: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        """Which test images the networks classify rightly: version → (networks, N)."""
        single: dict[str, np.ndarray] = {}
        for key in found:
            if key.startswith("accuracy-"):
                single |= found[key]
        versions = dict.fromkeys(label.rpartition(", ")[0] for label in single)
        return {
            version: np.stack([single[f"{version}, {seed}"] for seed in range(self.networks)])
            for version in versions
        }

    def areas(self, correct: Arrays, test: Test) -> dict[str, Area]:
        """Of each estimator's curve."""
        result = {}
        for estimator in self.estimators():
            curves = np.stack([correct[f"{test}, {estimator}, {f:g}"] for f in self.fractions])
            ends = [correct[f"ROAR, {BASELINE}, 0"], np.full(curves.shape[1:], CHANCE)]
            if test == "KAR":
                ends.reverse()
            result[estimator] = area(np.array(self.fractions), curves, ends, over=test == "KAR")
        return result


@dataclass(frozen=True)
class Estimator:
    """A method, and the standard deviation in pixels of a Gaussian that blurs its maps."""

    method: Method
    blur: float = 0.0


@dataclass(frozen=True)
class Member:
    """One network to train."""

    estimator: str
    test: Test
    fraction: float
    seed: int

    @property
    def label(self) -> str:
        return f"{self.test}, {self.estimator}, {self.fraction:g}, {self.seed}"


@dataclass(frozen=True)
class Area:
    """Areas (networks, N), of every test image: between the fractions, and from 0 to 1."""

    inner: np.ndarray
    whole: np.ndarray


def pixel_ranks(
    explainer: Explainer, estimator: Estimator, images: np.ndarray, rows: slice, seed: int
) -> Arrays:
    """The rank of each pixel in its image's map, 0 the least important: (n, H, W) uint16.

    Ties are broken by Gaussian noise of standard deviation 1e-4, as in the authors' code.
    """
    from scipy.ndimage import gaussian_filter

    keys = range(rows.start, rows.stop)
    attribution = explainer.explain(normalized(images[rows]), method=estimator.method, keys=keys)
    heatmap = attribution.heatmap().astype(np.float64)
    if estimator.blur:
        heatmap = gaussian_filter(heatmap, (0, estimator.blur, estimator.blur))
    # Pass numbers count from zero, so this noise is no other method's.
    noise = [normal(seed, key, 2**31, heatmap.shape[1:]) for key in keys]
    order = (heatmap + _TIE_NOISE * np.stack(noise)).reshape(len(keys), -1).argsort(axis=1)
    ranks = np.empty(order.shape, np.uint16)
    np.put_along_axis(ranks, order, np.arange(order.shape[1], dtype=np.uint16)[None], axis=1)
    return {"ranks": ranks.reshape(heatmap.shape)}


def modify(
    images: np.ndarray, ranks: np.ndarray, test: Test, fraction: float, colour: np.ndarray
) -> np.ndarray:
    """The images (N, C, H, W) with pixels replaced by `colour` (C,).

    ROAR replaces where the map exceeds its (100 − 100 p)-th percentile, KAR where it is below it.
    Ranks decide this exactly: NumPy's linear percentile lies at the position (n − 1)·(1 − p).
    """
    position = (ranks[0].size - 1) * (1 - fraction)
    replaced = ranks > position if test == "ROAR" else ranks < position
    plain = np.rint(colour).astype(images.dtype)[:, None, None]
    return np.asarray(np.where(replaced[:, None], plain, images))


def ranks_of(done: Results, estimator: str, split: str) -> np.ndarray:
    """All ranks of an estimator, in the order of the images."""
    return stacked(done, f"ranks-{estimator}-{split}-")["ranks"]


def _versions(
    images: np.ndarray, stack: Sequence[Member], done: Results, split: str, colour: np.ndarray
) -> np.ndarray:
    """Each member's images (M, N, C, H, W); all members have the same estimator."""
    if stack[0].estimator == BASELINE:
        return np.stack([images] * len(stack))
    ranks = ranks_of(done, stack[0].estimator, split)
    return np.stack([modify(images, ranks, m.test, m.fraction, colour) for m in stack])


def area(
    fractions: np.ndarray, curves: np.ndarray, ends: Sequence[np.ndarray], *, over: bool
) -> Area:
    """Areas under curves (fractions, …), or over them, by the trapezoid rule.

    `ends` are the values at 0 and at 1.
    """
    curves = curves.astype(np.float64)  # right or wrong: of two booleans the sum is no number
    inner = np.trapezoid(curves, fractions, axis=0) / (fractions[-1] - fractions[0])
    padded = np.concatenate([ends[:1], curves, ends[1:]])
    whole = np.trapezoid(padded, np.concatenate([[0], fractions, [1]]), axis=0)
    return Area(1 - inner, 1 - whole) if over else Area(inner, whole)


def smaller(ours: np.ndarray, others: Mapping[str, np.ndarray]) -> tuple[bool, str]:
    """Whether one estimator's area (networks, N) is the smallest, and the evidence.

    Most images come out alike, so the mean decides, not on how many images ours is smaller.
    """
    pairs = compare(ours, others)
    lowest = all((ours.mean(axis=1) < other.mean(axis=1)).all() for other in others.values())
    evidence = ", ".join(
        f"{other.mean():.4f} ({name}, {p_value(pairs[name].p)})" for name, other in others.items()
    )
    sure = all(pair.p < SIGNIFICANT for pair in pairs.values())
    return lowest and sure, f"{ours.mean():.4f} against {evidence}"


def leaks(correct: Arrays, tests: Sequence[Test]) -> list[str]:
    """A remark on versions that are classified better than the unmodified images [1]_.

    References
    ----------
    .. [1] Y. Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods",
       ICML 2022.
    """
    plain = correct[f"ROAR, {BASELINE}, 0"].mean()
    better = {
        version: right.mean()
        for version, right in correct.items()
        if version.startswith(tuple(tests)) and right.mean() > plain
    }
    if not better:
        return []
    best = max(better, key=lambda version: better[version])
    return [
        f"Classified better than the unmodified images: {len(better)} of {len(correct)} versions, "
        f"best of all {best} ({better[best]:.1%}). Which pixels are missing can tell the class as "
        "well, so that accuracy is not of what is left alone (Rong et al. 2022)."
    ]


def _first(data: Cifar10, count: int) -> Cifar10:
    return Cifar10(data.images[:count], data.labels[:count], data.class_names)


def _label(stack: Sequence[Member]) -> str:
    """Of a unit of work: its members, which differ in fraction and seed."""
    fractions = " ".join(dict.fromkeys(f"{member.fraction:g}" for member in stack))
    seeds = " ".join(dict.fromkeys(f"{member.seed}" for member in stack))
    return f"{stack[0].test}, {stack[0].estimator}, {fractions}, {seeds}"


def cells(a: Area) -> list[str]:
    """Means over images, with the spread over networks."""
    return [
        f"{per.mean():.4f}" + (f" ± {per.std(ddof=1):.4f}" if len(per) > 1 else "")
        for per in (a.inner.mean(axis=1), a.whole.mean(axis=1))
    ]
