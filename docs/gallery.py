"""Write the figures of the method guide and the gallery into docs/pictures.

    python docs/gallery.py

Every map is one of the CIFAR-10 networks that come with the package, on the drawings of
`drawings.py`, in NumPy and float64, so that the same versions give the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from drawings import SUBJECTS, drawing

from rectgrad_ref import Attribution, Explainer, picture
from rectgrad_ref.methods import METHODS
from rectgrad_ref.onnx_models import published
from rectgrad_ref.onnx_models.cifar10 import occlude

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = Path(__file__).parent / "pictures"
ONE = "automobile"


@cache
def network(name: str = "cifar10_cnn") -> Explainer:
    return Explainer(published.get(name), backend="reference")


def explained(subjects: tuple[str, ...] = (ONE,), **options: Any) -> Attribution:
    return network().explain([drawing(subject) for subject in subjects], **options)


def comparison() -> Figure:
    """Four methods on what the network recognises, and on the bird that it does not."""
    methods = ("saliency", "integrated_gradients", "guided_backprop", "rectgrad")
    return picture.side_by_side([explained(SUBJECTS, method=method) for method in methods])


def variants() -> Figure:
    """RectGrad, its variants of appendices B and C, and what each convention does."""
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "no padding trick": {"padding_trick": False},
        "no final threshold": {"final_threshold": False},
        "not × input": {"times_input": False, "final_threshold": False},
        "PRR": {"prr": True},
        "PR2: |a·R|": {"propagation_rule": "PR2"},
        "PR3: a": {"propagation_rule": "PR3"},
        "PR4: R": {"propagation_rule": "PR4"},
    }
    maps = [explained(("horse", "ship"), **chosen) for chosen in options.values()]
    return picture.threshold_sweep(maps, list(options))


def thresholds() -> Figure:
    qs = (0.0, 50.0, 80.0, 90.0, 95.0, 98.0, 99.5)
    maps = [explained(("automobile", "horse"), tau=0)]
    maps += [explained(("automobile", "horse"), q=q) for q in qs]
    return picture.threshold_sweep(maps, ["τ = 0", *(f"q = {q:g}" for q in qs)])


def layers() -> Figure:
    return picture.layer_strip(
        [explained(("ship",), method=method, trace=True) for method in ("saliency", "rectgrad")]
    )


def classes() -> Figure:
    """The bird, as the class that it is taken for and as the one that it is."""
    twice: dict[str, Any] = {"subjects": ("bird", "bird"), "target": ["airplane", "bird"]}
    methods = ("saliency", "guided_backprop", "rectgrad")
    return picture.side_by_side([explained(**twice, method=method) for method in methods])


def patch() -> Figure:
    """The network whose training images all had one meaningless patch in their corner."""
    explainer = network("cifar10_cnn_occluded")
    prepared = explainer.explain([drawing(s) for s in ("horse", "truck")]).pictures
    assert prepared is not None
    occluded = occlude(prepared.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    results = [
        explainer.explain([*map(np.asarray, occluded)], method=method)
        for method in ("saliency", "smoothgrad", "rectgrad")
    ]
    return picture.side_by_side(results)


def _of_method(method: str) -> Callable[[], Figure]:
    return lambda: picture.overlay(explained(method=method))


FIGURES: Mapping[str, Callable[[], Figure]] = MappingProxyType(
    {f"method_{name}": _of_method(name) for name in METHODS}
    | {
        function.__name__: function
        for function in (comparison, variants, thresholds, layers, classes, patch)
    }
)


def write(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        picture.save(figure(), folder / f"{name}.png")


if __name__ == "__main__":
    write(PICTURES)
