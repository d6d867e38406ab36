"""Weights from a safetensors file, the format in which timm publishes them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidModel

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Every array of a safetensors file, by name.

    The file begins with the length of its header, 8 bytes little-endian; the header is a JSON
    object from name to dtype, shape and place in the data that follow.

    Raises
    ------
    InvalidModel
        The file cannot be read, is truncated or damaged, or has a dtype other than F64, F32, F16
        and I64.
    """
    try:
        content = memoryview(Path(path).read_bytes())
    except OSError as error:
        raise InvalidModel(f"cannot read {path}: {error.strerror}") from error
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(bytes(content[8:start]))
        header.pop("__metadata__", None)
        return {name: _array(content[start:], **entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # The repr of a UnicodeDecodeError would hold the whole file.
        reason = f"{type(error).__name__}: {error}"
        raise InvalidModel(f"{path}: not a complete safetensors file ({reason})") from error


def _array(
    data: memoryview, *, dtype: str, shape: list[int], data_offsets: list[int]
) -> NDArray[Any]:
    begin, end = data_offsets
    return np.frombuffer(data[begin:end], _DTYPES[dtype]).reshape(shape)
