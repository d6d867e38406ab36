"""What another implementation gives, brought into the reference's names, shapes and axis order."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import FORMAT, Bundle, InvalidBundle, read_arrays

MAP_NAMES = ("values", "map", "attribution", "attributions", "heatmap")
"""Keys under which the final map is expected."""

_PARTS = ("R_out", "R_in", "a", "tau", "mask")
_NOT_COMPARED = ("provenance", "inputs", "target", "logits", "model")


@dataclass(frozen=True)
class Place:
    """A value at which gradients can be compared.

    Attributes
    ----------
    name : str
        ONNX value name.
    shape : tuple of int
    layer : str or None
        The activation whose output it is, or whose input where `part` is ``"R_in"``.
    part : str
        ``"R_out"``, ``"R_in"`` or ``"gradient"``.
    """

    name: str
    shape: tuple[int, ...]
    layer: str | None = None
    part: str = "gradient"


@dataclass(frozen=True)
class Match:
    """How one array was understood: shown to the user.

    Attributes
    ----------
    key : str
        Its name on the other side.
    name : str
        ONNX value name.
    part : str
        ``"R_out"``, ``"R_in"``, ``"a"``, ``"gradient"`` or ``"map"``.
    by : str
        ``"name"`` or ``"shape and order"``.
    transposed : bool
        Whether it came channels last.
    """

    key: str
    name: str
    part: str
    by: str = "name"
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Theirs:
    """The other side's numbers by ONNX value name, in the reference's shapes.

    Attributes
    ----------
    values : numpy.ndarray or None
        The final map, in the model input's shape; or summed over its channels, (N, H, W).
    R_out, R_in, a : mapping of str to numpy.ndarray
        By name of the activation's output.
    gradients : mapping of str to numpy.ndarray
        At other values.
    matches : tuple of Match
    ignored : tuple of str
        Keys for which no place was found.
    """

    values: np.ndarray | None
    R_out: Mapping[str, np.ndarray]
    R_in: Mapping[str, np.ndarray]
    a: Mapping[str, np.ndarray]
    gradients: Mapping[str, np.ndarray]
    matches: tuple[Match, ...]
    ignored: tuple[str, ...] = ()


def read_theirs(
    source: str | os.PathLike[str] | Mapping[str, Any] | np.ndarray,
    bundle: Bundle,
    places: Sequence[Place] | None = None,
) -> Theirs:
    """Understand what the other side gives.

    Parameters
    ----------
    source : path, mapping of str to array, or numpy.ndarray
        An `.npz` file, its content, or the final map alone. Keys: the final map as ``values`` (or
        ``map``, ``attribution``, ``heatmap``); gradients by ONNX value name; or
        ``layers/NAME/R_out``, ``/R_in`` and ``/a`` by the name of an activation's output, as
        `Attribution.save` writes them. Other names are matched by shape and order. Images may come
        channels last.
    bundle : Bundle
    places : sequence of Place, optional
        Where gradients can be compared, from the input to the logits; the bundle's layers by
        default.

    Raises
    ------
    InvalidBundle
        Nothing in it can be compared, a shape does not fit, or a value is NaN or infinite; or it
        is a bundle made from another model.
    """
    if isinstance(source, np.ndarray):
        arrays, name = {"values": source}, "<array>"
    elif isinstance(source, Mapping):
        arrays, name = {k: np.asarray(v) for k, v in source.items()}, "<arrays>"
    else:
        arrays, name = read_arrays(source), Path(source).name
    _require_same_model(arrays, bundle, name)
    reader = _Reader(name, bundle, list(places_of(bundle) if places is None else places))
    for key, array in arrays.items():
        if key not in _NOT_COMPARED and key.rpartition("/")[2] not in ("tau", "mask"):
            reader.add(key, array)
    return reader.finish()


def places_of(bundle: Bundle) -> list[Place]:
    """The layers of a bundle, from the input to the logits."""
    found = [Place(str(bundle.provenance["input"]), bundle.inputs.shape)]
    for entry in bundle.provenance["layers"]:
        shape = tuple(entry["shape"])
        found.append(Place(entry["reads"], shape, entry["name"], "R_in"))
        found.append(Place(entry["name"], shape, entry["name"], "R_out"))
    return found


def _require_same_model(arrays: Mapping[str, np.ndarray], bundle: Bundle, name: str) -> None:
    """Refuse another bundle, or another saved attribution, of another model."""
    import json

    if "provenance" not in arrays:
        return
    try:
        provenance = json.loads(str(arrays["provenance"]))
    except json.JSONDecodeError:
        return
    if isinstance(provenance, dict) and provenance.get("sha256", bundle.sha256) != bundle.sha256:
        kind = "bundle" if provenance.get("format") == FORMAT else "result"
        raise InvalidBundle(
            f"{name} is a {kind} of another model (SHA-256 {provenance['sha256'][:12]}…) than "
            f"{bundle.name} ({bundle.sha256[:12]}…)"
        )


@dataclass
class _Reader:
    """Collects arrays, first those whose names are known."""

    name: str
    bundle: Bundle
    places: list[Place]
    values: np.ndarray | None = None
    found: dict[str, dict[str, np.ndarray]] = field(
        default_factory=lambda: {part: {} for part in ("R_out", "R_in", "a", "gradient")}
    )
    matches: list[Match] = field(default_factory=list)
    unknown: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, key: str, array: np.ndarray) -> None:
        if array.dtype.kind not in "fiu":
            raise InvalidBundle(f"{self.name}: {key!r} holds no real numbers but {array.dtype}")
        if not np.isfinite(array).all():
            raise InvalidBundle(f"{self.name}: {key!r} holds NaN or infinite values")
        if key in MAP_NAMES:
            self._add_map(key, array)
            return
        base, part = _split(key)
        place = self._named(base, part)
        if place is None:
            self.unknown[key] = array
            return
        fitting, transposed = _fit(array, place.shape)
        if fitting is None:
            raise InvalidBundle(
                f"{self.name}: {key!r} must have shape {place.shape}, or that channels last, got "
                f"{array.shape}"
            )
        self._put(key, place, part, fitting, "name", transposed)

    def finish(self) -> Theirs:
        if self.unknown:
            self._match_by_shape()
        if self.values is None and not any(self.found.values()):
            there = ", ".join(self.unknown) or "no arrays"
            raise InvalidBundle(
                f"{self.name}: nothing to compare ({there}); give the final map as 'values' or "
                f"gradients by value name: {', '.join(p.name for p in self.places)}"
            )
        return Theirs(
            self.values,
            self.found["R_out"],
            self.found["R_in"],
            self.found["a"],
            self.found["gradient"],
            tuple(self.matches),
            tuple(self.unknown),
        )

    def _add_map(self, key: str, array: np.ndarray) -> None:
        shape = self.bundle.inputs.shape
        fitting, transposed = _fit(array, shape)
        if fitting is None:
            fitting, transposed = _summed(array, shape), False
        if fitting is None:
            raise InvalidBundle(
                f"{self.name}: the map {key!r} must have the model input's shape {shape}, or that "
                f"without its channels, got {array.shape}"
            )
        self.values = fitting
        self.matches.append(Match(key, "the final map", "map", "name", transposed))

    def _named(self, base: str, part: str | None) -> Place | None:
        wanted = base.removeprefix("gradients/")
        if part is not None:
            of = "R_in" if part == "R_in" else "R_out"
            return next((p for p in self.places if p.layer == wanted and p.part == of), None)
        # An activation may read the output of another; a name means the value, so R_out first.
        named = [p for p in self.places if p.name == wanted]
        return next((p for p in named if p.part != "R_in"), next(iter(named), None))

    def _put(
        self,
        key: str,
        place: Place,
        part: str | None,
        array: np.ndarray,
        by: str,
        transposed: bool,
    ) -> None:
        kind = part or place.part
        target = place.name if kind == "gradient" else str(place.layer)
        self.found[kind][target] = array
        self.matches.append(Match(key, target, kind, by, transposed))

    def _match_by_shape(self) -> None:
        """Unknown names, in the file's order, against the layers in either direction."""
        if self.values is None and len(self.unknown) == 1 and self._lone_map():
            return
        groups: dict[str, dict[str | None, str]] = {}
        for key in self.unknown:
            base, part = _split(key)
            groups.setdefault(base, {})[part] = key
        taken = {m.name for m in self.matches}
        layers = [p for p in self.places if p.part == "R_out" and p.layer not in taken]
        arrays = [self.unknown[next(iter(keys.values()))] for keys in groups.values()]
        ways = [_aligned([a.shape for a in arrays], order) for order in (layers, layers[::-1])]
        pairs = max(ways, key=lambda way: (len(way), self._likeness(way, arrays)))
        for i, place in pairs:
            for part, key in list(groups.values())[i].items():
                fitting, transposed = _fit(self.unknown[key], place.shape)
                if fitting is not None:
                    self._put(key, place, part, fitting, "shape and order", transposed)
                    del self.unknown[key]

    def _likeness(self, way: list[tuple[int, Place]], arrays: Sequence[np.ndarray]) -> float:
        """How like the bundle's gradients they are: equal shapes leave the direction open."""
        total = 0.0
        for i, place in way:
            layer, (array, _) = self.bundle.layers.get(place.name), _fit(arrays[i], place.shape)
            if layer is not None and array is not None:
                size = float(np.linalg.norm(layer.R_out) * np.linalg.norm(array))
                total += abs(float((layer.R_out * array).sum())) / size if size else 0.0
        return total

    def _lone_map(self) -> bool:
        """A single array of the input's shape is the final map, whatever it is called."""
        (key, array), *rest = self.unknown.items()
        if rest or _fit(array, self.bundle.inputs.shape)[0] is None:
            return False
        self._add_map(key, array)
        del self.unknown[key]
        return True


def _split(key: str) -> tuple[str, str | None]:
    base, _, last = key.removeprefix("layers/").rpartition("/")
    return (base, last) if base and last in _PARTS else (key, None)


def _fit(array: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray | None, bool]:
    """`array` in `shape`, channels brought forward if need be; and whether they were."""
    if array.shape == shape:
        return array, False
    rank = len(shape)
    if rank > 2 and array.shape == (shape[0], *shape[2:], shape[1]):
        return np.ascontiguousarray(np.moveaxis(array, -1, 1)), True
    if rank > 2 and array.shape == (shape[0], shape[-1], *shape[1:-1]):
        return np.ascontiguousarray(np.moveaxis(array, 1, -1)), True
    if array.shape == shape[1:] and shape[0] == 1:
        return array[None], False
    return None, False


def _summed(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A map without channels, as (N, H, W)."""
    if len(shape) != 4:
        return None
    flat = array if array.ndim == 3 else array.reshape([n for n in array.shape if n != 1] or [1])
    for spatial in (shape[2:], shape[1:3]):
        if flat.shape == (shape[0], *spatial) or (shape[0] == 1 and flat.shape == spatial):
            return np.ascontiguousarray(flat.reshape(shape[0], *spatial))
    return None


def _aligned(shapes: Sequence[tuple[int, ...]], places: Sequence[Place]) -> list[tuple[int, Place]]:
    """The longest common subsequence of shapes, channels in either position."""
    fits = [[_fit(np.broadcast_to(0.0, s), p.shape)[0] is not None for p in places] for s in shapes]
    rows, columns = len(shapes), len(places)
    best = np.zeros((rows + 1, columns + 1), int)
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            longer = best[i + 1, j + 1] + 1 if fits[i][j] else 0
            best[i, j] = max(longer, best[i + 1, j], best[i, j + 1])
    pairs, i, j = [], 0, 0
    while i < rows and j < columns:
        if fits[i][j] and best[i, j] == best[i + 1, j + 1] + 1:
            pairs.append((i, places[j]))
            i, j = i + 1, j + 1
        elif best[i, j] == best[i, j + 1]:
            j += 1
        else:
            i += 1
    return pairs
