"""The safetensors reader, against files written by hand and by the safetensors library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rectgrad_ref.errors import InvalidModel
from rectgrad_ref.onnx_models.weights import read_safetensors


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_every_array(tmp_path: Path) -> None:
    half: NDArray[Any] = np.array([[1, 2], [3, 4]], np.float16)
    count: NDArray[Any] = np.array(7, np.int64)
    header = {
        "__metadata__": {"format": "pt"},
        "half": entry("F16", [2, 2], 8, 16),
        "count": entry("I64", [], 0, 8),
    }
    path = write(tmp_path / "w.safetensors", header, count.tobytes() + half.tobytes())
    arrays = read_safetensors(path)
    assert list(arrays) == ["half", "count"]
    for expected, array in zip((half, count), arrays.values(), strict=True):
        assert array.dtype == expected.dtype
        assert array.shape == expected.shape
        assert np.array_equal(array, expected)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        "conv.weight": rng.standard_normal((4, 3, 1, 7), dtype=np.float32),
        "bn.running_var": rng.standard_normal(4),
        "num_batches_tracked": np.array(3),
        "empty": np.zeros((0, 2), np.float32),
    }
    library.save_file(arrays, tmp_path / "w.safetensors", metadata={"format": "pt"})
    read = read_safetensors(tmp_path / "w.safetensors")
    assert read.keys() == arrays.keys()
    assert all(np.array_equal(read[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"w": entry("F32", [2], 0, 8)}, b"1234567"),
        ({"w": entry("F32", [3], 0, 8)}, b"12345678"),
        ({"w": entry("BF16", [4], 0, 8)}, b"12345678"),
        ({"w": {"dtype": "F32"}}, b""),
        ({"w": []}, b""),
        ([], b""),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, header: Any, data: bytes) -> None:
    path = write(tmp_path / "w.safetensors", header, data)
    with pytest.raises(InvalidModel, match=r"w\.safetensors: not a complete safetensors file"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        b"\x05\0\0\0\0\0\0\0{\xff}",
        b"PK\x03\x04",
        b"\x89PNG\r\n" + b"\0\xff" * 5000,
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidModel, match="not a complete safetensors file") as error:
        read_safetensors(path)
    assert len(str(error.value)) < len(str(path)) + 200


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(InvalidModel, match=f"cannot read {re.escape(str(path))}: No such file"):
        read_safetensors(path)
