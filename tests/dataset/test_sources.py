"""Sources: numbered pictures, wherever they are."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from rectgrad_ref.dataset.sources import Source, find_source
from rectgrad_ref.errors import InvalidImage

pa = pytest.importorskip("pyarrow")
zarr = pytest.importorskip("zarr")
from pyarrow import parquet  # noqa: E402

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)


def png(picture: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


class OfficialPickler(pickle._Pickler):
    """Writes arrays as the official files have them: by Python 2's names, strings as bytes."""

    def reducer_override(self, value: Any) -> Any:
        return (np.dtype, (b"u1", 0, 1)) if isinstance(value, np.dtype) else NotImplemented


def cifar_pickle(pictures: np.ndarray) -> bytes:
    content = io.BytesIO()
    data = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1))
    OfficialPickler(content, protocol=3).dump({b"data": data})
    return content.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def in_folder(tmp_path: Path) -> Path:
    for i, picture in enumerate(PIXELS):
        below = tmp_path / ("b" if i < 7 else "c")
        below.mkdir(exist_ok=True)
        Image.fromarray(picture).save(below / f"{i:02}.png")
    for name in ("notes.txt", ".hidden.png", "b/._00.png"):
        (tmp_path / name).write_bytes(b"no picture")
    return tmp_path


def by_pattern(tmp_path: Path) -> Path:
    return in_folder(tmp_path) / "*" / "*.png"


def in_parquet(tmp_path: Path, groups: int = 5) -> Path:
    table = pa.table({"id": range(12), "image": [png(p) for p in PIXELS]})
    parquet.write_table(table, tmp_path / "all.parquet", row_group_size=groups)
    return tmp_path / "all.parquet"


def in_shards(tmp_path: Path) -> Path:
    """As Hugging Face writes them."""
    for k, rows in enumerate((range(5), range(5, 12))):
        images = [{"bytes": png(PIXELS[i]), "path": f"{i}.png"} for i in rows]
        thumbnails = [b"small" for _ in rows]
        table = pa.table({"image": images, "thumbnail": thumbnails})
        parquet.write_table(table, tmp_path / f"train-{k}.parquet", row_group_size=3)
    (tmp_path / "README.md").touch()
    return tmp_path


def in_npy(tmp_path: Path) -> Path:
    np.save(tmp_path / "pixels.npy", PIXELS)
    return tmp_path / "pixels.npy"


def in_zarr(tmp_path: Path) -> Path:
    array = zarr.create_array(
        tmp_path / "pixels.zarr", shape=PIXELS.shape, dtype="uint8", chunks=(5, 32, 32, 3)
    )
    array[:] = PIXELS
    return tmp_path / "pixels.zarr"


def in_cifar(tmp_path: Path) -> Path:
    for name, rows in (("data_batch_1", slice(5)), ("test_batch", slice(5, None))):
        (tmp_path / name).write_bytes(cifar_pickle(PIXELS[rows]))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({}))
    return tmp_path


PLACES: list[tuple[Callable[[Path], Path], Sequence[str]]] = [
    (in_folder, ("b/00.png", "b/06.png", "c/07.png")),
    (by_pattern, ("b/00.png", "b/06.png", "c/07.png")),
    (in_parquet, ("all.parquet#0", "all.parquet#6", "all.parquet#7")),
    (in_shards, ("train-0.parquet#0", "train-1.parquet#1", "train-1.parquet#2")),
    (in_npy, ("pixels.npy#0", "pixels.npy#6", "pixels.npy#7")),
    (in_zarr, ("pixels.zarr#0", "pixels.zarr#6", "pixels.zarr#7")),
    (in_cifar, ("data_batch_1#0", "test_batch#1", "test_batch#2")),
]


def pictures(source: Source, start: int) -> list[np.ndarray]:
    opened = []
    for item in source.items(start):
        if isinstance(item, bytes):
            item = io.BytesIO(item)  # type: ignore[assignment]
        opened.append(item if isinstance(item, np.ndarray) else np.asarray(Image.open(item)))
    return opened


@pytest.mark.parametrize(("place", "names"), PLACES)
def test_every_place_gives_the_same_pictures_in_order(
    place: Callable[[Path], Path], names: Sequence[str], tmp_path: Path
) -> None:
    source = find_source(place(tmp_path))
    assert len(source) == 12
    assert [source.name(i) for i in (0, 6, 7)] == list(names)
    for start in range(12):
        np.testing.assert_array_equal(pictures(source, start), PIXELS[start:])


@given(groups=st.integers(1, 12), start=st.integers(0, 11))
def test_parquet_is_read_from_any_row_of_any_group(
    tmp_path_factory: pytest.TempPathFactory, groups: int, start: int
) -> None:
    source = find_source(in_parquet(tmp_path_factory.mktemp("groups"), groups))
    assert list(source.items(start)) == [png(p) for p in PIXELS[start:]]


def test_a_single_file_is_a_source(tmp_path: Path) -> None:
    in_folder(tmp_path)
    in_cifar(tmp_path)
    assert len(find_source(tmp_path / "b" / "03.png")) == 1
    assert len(find_source(tmp_path / "test_batch")) == 7


def test_a_missing_picture_in_a_table_is_none(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"image": [png(PIXELS[0]), None]}), tmp_path / "a.parquet")
    assert list(find_source(tmp_path / "a.parquet").items(1)) == [None]


def test_a_large_row_group_is_not_read_at_once(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes
    table = pa.table({"image": [noise(100_000) for _ in range(300)]})
    small_pages = {"write_batch_size": 10, "use_dictionary": False}
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300, **small_pages)
    del table
    before = pa.total_allocated_bytes()
    most = 0
    for _ in find_source(tmp_path / "a.parquet").items(0):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 10_000_000  # of 30,000,000


def test_a_damaged_chunk_is_said_by_its_file(tmp_path: Path) -> None:
    source = in_zarr(tmp_path)
    (source / "c" / "2" / "0" / "0" / "0").write_bytes(b"damaged")
    items = find_source(source).items(0)
    for _ in range(10):
        next(items)
    with pytest.raises(InvalidImage, match=r"cannot read .*pixels\.zarr: "):
        next(items)


@pytest.mark.parametrize(("place", "_names"), PLACES)
def test_fingerprint_tells_a_change(
    place: Callable[[Path], Path], _names: Sequence[str], tmp_path: Path
) -> None:
    named = place(tmp_path)
    before = find_source(named).fingerprint()
    assert find_source(named).fingerprint() == before
    source = find_source(named)
    file = source.root / source.files[-1]
    inside = file / "zarr.json" if file.is_dir() else file
    os.utime(inside, ns=(0, 1_000_000_001))
    assert find_source(named).fingerprint() != before


def test_fingerprint_does_not_depend_on_where_the_files_are(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    in_folder(tmp_path / "here")
    before = find_source(tmp_path / "here").fingerprint()
    (tmp_path / "here").rename(tmp_path / "there")
    assert find_source(tmp_path / "there").fingerprint() == before


def test_a_pickle_that_calls_something_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(InvalidImage, match="not a CIFAR pickle"):
        find_source(tmp_path)
    assert not (tmp_path / "made").exists()


def write_objects(path: Path) -> None:
    np.save(path, np.array([{}], object))


def write_group(path: Path) -> None:
    zarr.open_group(path, mode="w")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("nowhere", lambda path: None, "no such file or folder"),
        ("*.png", lambda path: None, "no pictures there"),
        ("empty", Path.mkdir, "no pictures there"),
        ("a.npy", lambda path: np.save(path, 1.0), "one number"),
        ("a.npy", lambda path: np.save(path, np.zeros((0, 8, 8))), "no pictures there"),
        ("a.npy", write_objects, "cannot read .*a.npy"),
        ("a.npy", lambda path: path.write_bytes(b""), "cannot read .*a.npy"),
        ("a.zarr", write_group, "not a Zarr array"),
        ("a.parquet", lambda path: path.write_bytes(b"PAR1"), "cannot read .*a.parquet"),
        (
            "a.parquet",
            lambda path: parquet.write_table(pa.table({"a": [1]}), path),
            "which column holds pictures.* binary are none",
        ),
        (
            "a.parquet",
            lambda path: parquet.write_table(pa.table({"a": [b""], "b": [b""]}), path),
            "binary are a, b",
        ),
        ("test_batch", lambda path: path.write_bytes(b"\x80broken"), "not a CIFAR pickle"),
    ],
)
def test_what_is_no_source_is_refused(
    name: str, write: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(InvalidImage, match=message):
        find_source(tmp_path / name)
