"""Class names: from a text or JSON file, or from the model's own metadata."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InvalidTarget

_SYNSET = re.compile(r"n\d{8}")
_METADATA_KEYS = ("class_names", "names", "label_names", "id2label", "labels", "classes")


def class_names(
    count: int,
    labels: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...] | None:
    """The name of each of a model's classes.

    Parameters
    ----------
    count
        The number of classes of the model's output.
    labels
        The path of a label file (see `read_labels`), or the names themselves.
    metadata
        The ONNX model's metadata_props, asked where `labels` is None (see `metadata_labels`).

    Returns
    -------
    `count` names, or None where there are none. A model of 1001 classes takes 1000 names with
    "background" before them, the convention of TensorFlow's ImageNet networks.

    Raises
    ------
    InvalidTarget
        The label file cannot be read, or the number of names is not `count`.
    """
    if labels is None:
        source, found = "the model's metadata", metadata_labels(metadata or {})
        if found is None:
            return None
        names = found
    elif isinstance(labels, (str, os.PathLike)):
        source, names = str(labels), read_labels(labels)
    else:
        source, names = "labels", tuple(labels)
    if count == 1001 and len(names) == 1000:
        return ("background", *names)
    if len(names) != count:
        raise InvalidTarget(f"{source}: {len(names)} class names for a model of {count} classes")
    return names


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The class names in a file, in the order of the classes.

    A file that ends in ``.json`` holds a list of names, an object from index to name, or an object
    with one of these under ``id2label`` or ``label_names`` (the ``config.json`` of Hugging Face or
    timm). Any other file holds one name a line. ``n01440764 tench, Tinca tinca``, and in JSON
    ``["n01440764", "tench"]``, name a WordNet synset: the first name after its id is kept.

    Raises
    ------
    InvalidTarget
        The file is missing, not UTF-8 text, has a nameless class or indices that are not 0 … n - 1.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix.lower() != ".json":
            return _names(text.rstrip().splitlines())
        return _names(_label_part(json.loads(text)))
    except OSError as error:
        raise InvalidTarget(f"{path}: cannot read the class names: {error.strerror}") from error
    except ValueError as error:
        raise InvalidTarget(f"{path}: not a file of class names: {error}") from error


def metadata_labels(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """The class names in an ONNX model's metadata_props, None where there are none.

    The keys ``class_names``, ``names``, ``label_names``, ``id2label``, ``labels``, ``classes`` are
    tried in this order; the value is a list of names or a mapping from index to name, in JSON or
    as Python prints it. Metadata is free text, so a value that is neither is passed over.
    """
    for key in _METADATA_KEYS:
        value = _json_or_python(metadata.get(key, ""))
        if isinstance(value, (list, dict)):
            try:
                return _names(value)
            except ValueError:
                continue
    return None


def _json_or_python(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def _label_part(content: Any) -> Any:
    """The list or mapping of names in a JSON file."""
    if isinstance(content, dict):
        for holder in (content, content.get("pretrained_cfg")):
            for key in ("id2label", "label_names"):
                if isinstance(holder, dict) and key in holder:
                    return holder[key]
    return content


def _names(values: Any) -> tuple[str, ...]:
    """Names in the order of their classes; ValueError says what is wrong."""
    if isinstance(values, dict):
        # JSON objects have string keys, Python's dicts in metadata often integers.
        numbered = {int(index): value for index, value in values.items()}
        if sorted(numbered) != list(range(len(values))):
            raise ValueError(f"indices of {len(values)} classes must be 0 … {len(values) - 1}")
        values = [numbered[index] for index in range(len(values))]
    if not isinstance(values, list):
        raise ValueError("neither a list of names nor a mapping from index to name")
    if not values:
        raise ValueError("no names")
    return tuple(_name(value, index) for index, value in enumerate(values))


def _name(value: Any, index: int) -> str:
    if isinstance(value, list) and len(value) == 2 and _SYNSET.fullmatch(str(value[0])):
        value = value[1]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"class {index} has no name: {value!r}")
    first, _, rest = value.strip().partition(" ")
    if _SYNSET.fullmatch(first) and rest:
        return rest.split(",")[0].strip()
    return value.strip()
