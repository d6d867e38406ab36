"""Conformance bundles: what another implementation is compared with, in one `.npz` file.

Keys of the file, all plain arrays:

``provenance``
    JSON: format and version, model name and SHA-256, method with all its conventions, the layers.
``inputs``, ``values``
    The images as the model sees them and the final map, in the model input's shape.
``target``
    Class index of each sample.
``layers/<value name>/a``, ``/R_out``, ``/tau``, ``/mask``
    At each activation: its output, the gradient that arrives there, the thresholds, and the units
    that pass, packed by `numpy.packbits` in row-major order. R_in at a Relu is
    ``where(mask, R_out, 0)``.
``model``
    The ONNX file's bytes, of a model up to 1 MiB.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import analysis
from ..attribution import Attribution, Layer
from ..errors import InvalidModel, OutputError, RectGradError
from ..explainer import Explainer, Targets
from ..files import atomic_write
from ..methods import METHODS, Method, make_method
from ..model import Model, ModelSource, read_model

FORMAT = "rectgrad-conformance-bundle"
VERSION = 1
_EMBEDDED = 2**20
_DTYPES = ("float32", "float64")
# What a damaged zip archive, a damaged array in it, or a pickle raises.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError)


class InvalidBundle(RectGradError, ValueError):
    """A conformance bundle, or what is compared with it, cannot be used."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """A reference result to compare with.

    Attributes
    ----------
    inputs, values : numpy.ndarray
        Images and final map, in the shape and axis order of the model's input.
    target : numpy.ndarray of int64, shape (N,)
    layers : mapping of str to Layer
        The chosen activations by ONNX value name, from the input to the logits. ``R_in`` is not in
        the file: at a Relu it follows from the mask, elsewhere it is NaN once loaded.
    provenance : dict
        See the module.
    model : bytes or None
        The ONNX file, of a small model.
    name : str
        What messages call it.
    """

    inputs: np.ndarray
    target: np.ndarray
    values: np.ndarray
    layers: Mapping[str, Layer]
    provenance: Mapping[str, Any]
    model: bytes | None = field(default=None, repr=False)
    name: str = "<bundle>"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of every floating-point array but τ."""
        return self.values.dtype

    @property
    def method(self) -> Method:
        """The method with all its conventions."""
        return _method(self.provenance)

    @property
    def sha256(self) -> str:
        """Of the model."""
        return str(self.provenance["sha256"])

    def open_model(self, source: ModelSource | None = None) -> Model | None:
        """The bundle's model.

        Parameters
        ----------
        source : path, bytes or onnx.ModelProto, optional
            By default what the bundle contains, or the project's own network of that hash.

        Returns
        -------
        Model or None
            None where none was given and none is known.

        Raises
        ------
        InvalidBundle
            The model is not the one that the bundle was made from.
        """
        if source is None:
            source = self.model if self.model is not None else _committed(self.sha256)
        if source is None:
            return None
        model = read_model(source)
        found = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else model.sha256
        if found != self.sha256:
            raise InvalidBundle(
                f"{self.name} was made from another model ({self.provenance['model']}, SHA-256 "
                f"{self.sha256[:12]}…) than {model.name} ({found[:12]}…)"
            )
        return model

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the bundle.

        Raises
        ------
        OutputError
            Another suffix than .npz, or the folder cannot be written to.
        """
        destination = destination_of(path)
        arrays: dict[str, Any] = {
            "provenance": np.array(json.dumps(self.provenance)),
            "inputs": self.inputs,
            "target": self.target,
            "values": self.values,
        }
        for name, layer in self.layers.items():
            arrays[f"layers/{name}/a"] = layer.a
            arrays[f"layers/{name}/R_out"] = layer.R_out
            if layer.mask is not None and layer.tau is not None:
                arrays[f"layers/{name}/tau"] = layer.tau
                arrays[f"layers/{name}/mask"] = np.packbits(layer.mask)
        if self.model is not None:
            arrays["model"] = np.frombuffer(self.model, np.uint8)
        # NumPy appends .npz to names with another suffix, .NPZ among them, but not to open files.
        with atomic_write(destination) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        return destination


def destination_of(path: str | os.PathLike[str]) -> Path:
    """Where a bundle may be written.

    Raises
    ------
    OutputError
        Another suffix than .npz, or there is no such folder.
    """
    destination = Path(path)
    if destination.suffix.lower() != ".npz" or not destination.parent.is_dir():
        raise OutputError(f"cannot write {destination}: give an .npz file in a folder that exists")
    return destination


def make(
    model: ModelSource,
    images: Any,
    *,
    method: str | Method = "rectgrad",
    target: Targets = None,
    preset: str = "default",
    layers: Sequence[str] | None = None,
    backend: str = "auto",
    dtype: Any = None,
    preprocess: Any = None,
    input: str | None = None,
    output: str | None = None,
    **options: Any,
) -> Bundle:
    """Explain images and keep what another implementation can be compared with.

    Parameters
    ----------
    layers : sequence of str, optional
        Value names of the activations to keep; by default all. A subset keeps bundles of large
        networks small.

    Raises
    ------
    InvalidBundle
        No such layer.

    Notes
    -----
    Other parameters, and errors, are those of `Explainer` and `Explainer.explain`.
    """
    explainer = Explainer(
        model, backend=backend, dtype=dtype, preprocess=preprocess, input=input, output=output
    )
    chosen = make_method(method, preset, **options)
    result = explainer.explain(images, method=chosen, target=target, trace=chosen.walks_once)
    graph = explainer.graph
    return Bundle(
        inputs=result.inputs,
        target=result.target,
        values=result.values,
        layers=_chosen(result, layers),
        provenance={
            "format": FORMAT,
            "version": VERSION,
            "input": graph.input,
            "output": graph.output,
            "logits": graph.logits,
            "shape": list(result.values.shape),
            **result.provenance(),
            # Bundles travel; where the file lay on this machine does not.
            "model": explainer.model.path.name if explainer.model.path else explainer.model.name,
            "layers": _descriptions(result, layers, graph),
        },
        model=_file(explainer.model),
    )


def load(path: str | os.PathLike[str]) -> Bundle:
    """Read a bundle; every array is checked, and pickles are never loaded.

    Raises
    ------
    InvalidBundle
        Not a bundle, truncated, of a newer version, with missing layers, wrong shapes or NaN.
    """
    arrays = read_arrays(path)
    return _Reader(Path(path).name, arrays).bundle()


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` file.

    Raises
    ------
    InvalidBundle
        It cannot be read, is truncated, or holds Python objects.
    """
    file = Path(path)
    try:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise InvalidBundle(f"{file} is a single array; an .npz file is needed")
        with archive:
            arrays = {key: archive[key] for key in archive.files}
    except FileNotFoundError:
        raise InvalidBundle(f"cannot read {file}: there is no such file") from None
    except InvalidBundle:
        raise
    except _DAMAGE as error:
        if "pickle" in str(error).lower():
            raise InvalidBundle(
                f"{file} holds Python objects, or is no .npz file; pickles are never loaded. "
                "Save plain arrays with numpy.savez"
            ) from None
        raise InvalidBundle(f"{file} is not an .npz file, or is truncated: {error}") from error
    odd = next((k for k, v in arrays.items() if not isinstance(v, np.ndarray)), None)
    if odd is not None:
        raise InvalidBundle(f"{file}: {odd!r} is no array")
    return arrays


@dataclass(frozen=True)
class _Reader:
    """Checks what was read, array by array."""

    name: str
    arrays: Mapping[str, np.ndarray]

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return self._provenance()

    @property
    def strict_relu(self) -> bool:
        return bool(self.provenance["options"].get("strict_relu"))

    def bundle(self) -> Bundle:
        provenance = self.provenance
        shape = tuple(provenance["shape"])
        values = self._floats("values", shape)
        target = self._array("target", (shape[0],))
        if target.dtype.kind not in "iu":
            raise InvalidBundle(f"{self.name}: target is not integer but {target.dtype}")
        return Bundle(
            inputs=self._floats("inputs", shape),
            target=target.astype(np.int64),
            values=values,
            layers={entry["name"]: self._layer(entry) for entry in provenance["layers"]},
            provenance=provenance,
            model=self._model(provenance["sha256"]),
            name=self.name,
        )

    def _provenance(self) -> dict[str, Any]:
        text = self.arrays.get("provenance")
        try:
            found = json.loads(str(text)) if text is not None else None
        except json.JSONDecodeError as error:
            raise InvalidBundle(f"{self.name}: its provenance is not JSON: {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InvalidBundle(
                f"{self.name} is no conformance bundle; make one with 'rectgrad verify make'"
            )
        if found.get("version") != VERSION:
            raise InvalidBundle(
                f"{self.name} has version {found.get('version')} of the format, and this program "
                f"reads version {VERSION}; install a newer rectgrad-ref, or make the bundle again"
            )
        self._check_provenance(found)
        return found

    def _check_provenance(self, found: dict[str, Any]) -> None:
        expected = {
            "model": str, "sha256": str, "method": str, "options": dict, "dtype": str,
            "backend": str, "forward": str, "layers": list, "input": str, "output": str,
        }  # fmt: skip
        for key, kind in expected.items():
            if not isinstance(found.get(key), kind):
                raise InvalidBundle(f"{self.name}: its provenance has no {key!r}")
        if found["method"] not in METHODS or found["dtype"] not in _DTYPES:
            raise InvalidBundle(
                f"{self.name}: unknown method {found['method']!r} or dtype {found['dtype']!r}"
            )
        try:
            _method(found)
        except (TypeError, ValueError) as error:
            raise InvalidBundle(f"{self.name}: its conventions are not known: {error}") from error
        if found.get("layout") not in (None, "NCHW", "NHWC"):
            raise InvalidBundle(f"{self.name}: unknown layout {found['layout']!r}")
        if not _is_shape(found.get("shape")):
            raise InvalidBundle(f"{self.name}: its provenance has no 'shape'")
        for entry in found["layers"]:
            if not _is_layer(entry):
                raise InvalidBundle(f"{self.name}: {entry} in its provenance is no layer")

    def _array(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        if key not in self.arrays:
            raise InvalidBundle(f"{self.name}: {key!r} is missing; the bundle is incomplete")
        if self.arrays[key].shape != shape:
            raise InvalidBundle(
                f"{self.name}: {key!r} must have shape {shape}, got {self.arrays[key].shape}"
            )
        return self.arrays[key]

    def _floats(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        array = self._array(key, shape)
        dtype = np.dtype(self.provenance["dtype"])
        if array.dtype != dtype:
            raise InvalidBundle(f"{self.name}: {key!r} must be {dtype}, got {array.dtype}")
        if not np.isfinite(array).all():
            raise InvalidBundle(f"{self.name}: {key!r} holds NaN or infinite values")
        return array

    def _layer(self, entry: dict[str, Any]) -> Layer:
        key, shape = f"layers/{entry['name']}", tuple(entry["shape"])
        a, R_out = self._floats(f"{key}/a", shape), self._floats(f"{key}/R_out", shape)
        if entry["tau"] is None:
            return Layer(a, R_out, np.full_like(R_out, np.nan))
        units = int(np.prod(shape))
        packed = self._array(f"{key}/mask", (-(-units // 8),))
        if packed.dtype != np.uint8:
            raise InvalidBundle(f"{self.name}: {key}/mask must be packed bits, got {packed.dtype}")
        mask = np.unpackbits(packed, count=units).reshape(shape).astype(bool)
        tau = self._array(f"{key}/tau", tuple(entry["tau"]))
        if tau.dtype != np.float64 or np.isnan(tau).any():
            raise InvalidBundle(f"{self.name}: {key}/tau must be float64 without NaN")
        if entry["operator"] != "Relu":
            return Layer(a, R_out, np.full_like(R_out, np.nan), tau, mask)
        passes = mask & (a > 0) if self.strict_relu else mask
        return Layer(a, R_out, np.where(passes, R_out, 0), tau, mask)

    def _model(self, sha256: str) -> bytes | None:
        if "model" not in self.arrays:
            return None
        data = self.arrays["model"].tobytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InvalidBundle(f"{self.name}: the model inside is not the one of its provenance")
        return data


def _method(provenance: Mapping[str, Any]) -> Method:
    options: dict[str, Any] = {
        name: float(value) if value in ("inf", "-inf") else value
        for name, value in provenance["options"].items()
    }
    return make_method(str(provenance["method"]), "default", **options)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(n) is int and n >= 0 for n in value)


def _is_layer(entry: Any) -> bool:
    if not isinstance(entry, dict) or "tau" not in entry:
        return False
    texts = all(isinstance(entry.get(key), str) for key in ("name", "operator", "reads"))
    tau = entry["tau"]
    return texts and _is_shape(entry.get("shape")) and (tau is None or _is_shape(tau))


def _chosen(result: Attribution, names: Sequence[str] | None) -> dict[str, Layer]:
    trace = dict(result.trace or {})
    unknown = [name for name in names or () if name not in trace]
    if unknown:
        there = f"there are {', '.join(trace)}" if trace else f"{result.method.id} keeps none"
        raise InvalidBundle(f"no layer is called {unknown[0]!r}; {there}")
    return {name: layer for name, layer in trace.items() if names is None or name in names}


def _descriptions(
    result: Attribution, names: Sequence[str] | None, graph: Any
) -> list[dict[str, Any]]:
    nodes = {node.outputs[0]: node for node in analysis.path(graph)}
    return [
        {
            "name": name,
            "operator": nodes[name].op,
            "reads": nodes[name].inputs[0],
            "shape": list(layer.a.shape),
            "tau": None if layer.tau is None else list(layer.tau.shape),
        }
        for name, layer in _chosen(result, names).items()
    ]


def _file(model: Model) -> bytes | None:
    """The bytes that `Model.sha256` is of, where they are few and a whole model by themselves."""
    data = model.path.read_bytes() if model.path else model.proto.SerializeToString()
    if len(data) > _EMBEDDED:
        return None
    try:
        read_model(data)
    except InvalidModel:  # its weights lie in another file
        return None
    return data


def _committed(sha256: str) -> Path | None:
    from ..onnx_models.published import MODELS, get

    for entry in MODELS:
        if entry.kind == "committed":
            path = get(entry.name)
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return path
    return None
