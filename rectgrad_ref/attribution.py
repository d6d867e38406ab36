"""The result: a map per image, and everything needed to reproduce it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import OutputError
from .files import atomic_write
from .images import Layout, pictures
from .methods import Method
from .preprocess import Preprocess, PreprocessFunction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Layer:
    """One activation in a layer-wise trace, samples along axis 0.

    Attributes
    ----------
    a : numpy.ndarray
        Output of the activation, (N, C, …) or (N, C).
    R_out, R_in : numpy.ndarray
        The gradient that arrives at `a`, and the one that leaves through the pre-activation.
    tau : numpy.ndarray of float64, or None
        Thresholds: (N,), (N, C) or (1,) by scope. None for methods without.
    mask : numpy.ndarray of bool, or None
        Units that pass.
    """

    a: np.ndarray
    R_out: np.ndarray
    R_in: np.ndarray
    tau: np.ndarray | None = None
    mask: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Attribution:
    """Attribution maps of one method for N images.

    Attributes
    ----------
    values : numpy.ndarray
        Exactly the shape and axis order of the model's input, in the compute dtype.
    inputs : numpy.ndarray
        What the model saw, same shape.
    logits : numpy.ndarray, shape (N, classes)
    target : numpy.ndarray of int, shape (N,)
    method : Method
        With all its conventions.
    layout : str
        ``"NCHW"`` or ``"NHWC"``; other axis orders need ``layout=`` in `heatmap`.
    environment : dict
        Model name and SHA-256, backend, versions.
    head : str or None
        Operator with which the model ends after its logits, such as ``"Softmax"``.
    class_names : sequence of str or None
    preprocess : Preprocess, function or None
        What made the inputs of pictures, if it is known.
    notes : tuple of str
        What was said about this method on this model.
    completeness_gap : numpy.ndarray or None, shape (N,)
        Σ values − (S(x) − S(x₀)), for methods with a baseline x₀.
    """

    values: np.ndarray = field(repr=False)
    inputs: np.ndarray = field(repr=False)
    logits: np.ndarray = field(repr=False)
    target: np.ndarray
    method: Method
    layout: Layout | None
    environment: dict[str, Any]
    head: str | None = None
    class_names: Sequence[str] | None = field(default=None, repr=False)
    preprocess: Preprocess | PreprocessFunction | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    completeness_gap: np.ndarray | None = None
    trace: Mapping[str, Layer] | None = field(default=None, repr=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def pictures(self) -> np.ndarray | None:
        """Pixel by pixel what the model saw; see `images.pictures`."""
        return pictures(self.inputs, self.layout, self.preprocess)

    @property
    def probabilities(self) -> np.ndarray:
        """Of each class, shape (N, classes), float64.

        The softmax of the logits, or their sigmoid where the model ends in one.
        """
        from scipy.special import expit, softmax

        logits = self.logits.astype(np.float64)
        return np.asarray(expit(logits) if self.head == "Sigmoid" else softmax(logits, axis=1))

    def heatmap(self, layout: str | None = None) -> np.ndarray:
        """The sum over colour channels (paper F.1).

        Parameters
        ----------
        layout : str, optional
            Axis order of the input such as ``"NCHW"``, where it could not be inferred.

        Returns
        -------
        numpy.ndarray, shape (N, H, W)

        Raises
        ------
        ValueError
            The channel axis is not known.
        """
        order = layout or self.layout
        if order is None or len(order) != self.values.ndim or "C" not in order:
            raise ValueError(
                f"which axis of {self.values.shape} is the channel axis? Pass layout='NCHW' or "
                "similar"
            )
        return np.asarray(self.values.sum(axis=order.index("C")))

    def layers(self) -> Mapping[str, Layer]:
        """The layer-wise trace: value name of each activation → `Layer`, from input to logits.

        Raises
        ------
        ValueError
            The explanation was made without ``trace=True``.
        """
        if self.trace is None:
            raise ValueError("there is no layer-wise trace; explain with trace=True")
        return self.trace

    def class_name(self, index: int) -> str:
        """The name of a class, or its number."""
        return self.class_names[index] if self.class_names else str(index)

    def plot(self, **options: Any) -> Figure:
        """The pictures with their maps beside them; see `picture.side_by_side`."""
        from . import picture

        return picture.side_by_side([self], **options)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a picture (.png, .pdf, .svg) or the arrays (.npz).

        The ``.npz`` has ``values``, ``inputs``, ``logits``, ``target``, the trace if there is one
        (``layers/<value name>/a`` …), and ``provenance``, a JSON text with the method's
        conventions and the environment.

        Raises
        ------
        OutputError
            Another suffix, or a folder that cannot be written to. Nothing is left half-written.
        """
        destination = Path(path)
        suffix = destination.suffix.lower()
        if suffix == ".npz":
            # To a path that ends in .NPZ, NumPy would append another .npz.
            with atomic_write(destination) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **self._arrays())
        elif suffix in (".png", ".pdf", ".svg"):
            from . import picture

            picture.save(self.plot(), destination)
        else:
            raise OutputError(
                f"cannot write {destination}: choose one of .npz, .png, .pdf and .svg"
            )
        return destination

    def provenance(self) -> dict[str, Any]:
        """Method, conventions and environment as plain data."""
        return {
            "method": self.method.id,
            "options": plain(self.method.options()),
            "target": self.target.tolist(),
            "layout": self.layout,
            "notes": list(self.notes),
            **self.environment,
        }

    def _arrays(self) -> dict[str, Any]:
        arrays: dict[str, Any] = {
            "values": self.values,
            "inputs": self.inputs,
            "logits": self.logits,
            "target": self.target,
            "provenance": np.array(json.dumps(self.provenance(), allow_nan=False)),
        }
        for name, layer in (self.trace or {}).items():
            for key, value in vars(layer).items():
                if value is not None:
                    arrays[f"layers/{name}/{key}"] = value
        return arrays


def plain(value: Any) -> Any:
    """`value` in JSON's types; infinity and NaN, which JSON has not, by their names."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
