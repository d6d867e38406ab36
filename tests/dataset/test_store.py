"""The output folder: chunks in any order, whole or not at all, of one job only."""

from __future__ import annotations

import errno
import itertools
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rectgrad_ref.dataset import Store
from rectgrad_ref.errors import OutputError

pytest.importorskip("pyarrow")
zarr = pytest.importorskip("zarr")

JOB: dict[str, Any] = {
    "method": {"id": "rectgrad", "q": 98.0},
    "maps": {"shape": [3, 4, 4], "dtype": "float32", "chunk_size": 2},
    "source": {"images": 5, "files_sha256": "ab"},
    "computation": {"threads": 2},
}
CHUNKS = [range(0, 2), range(2, 4), range(4, 5)]
MAPS = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32)


def write(store: Store, chunk: range) -> None:
    rows = [{"index": i, "source": f"{i}.png", "status": "ok"} for i in chunk]
    store.write(chunk, MAPS[chunk.start : chunk.stop], rows)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_chunks_written_in_any_order_by_anyone_make_the_same_folder(tmp_path: Path) -> None:
    written = []
    for k, order in enumerate(itertools.permutations(CHUNKS)):
        out = tmp_path / str(k)
        Store(out).begin(JOB)
        for chunk in order:
            write(Store(out), chunk)
        store = Store(out)
        assert store.finished() == {0, 1, 2}
        np.testing.assert_array_equal(store.maps[:], MAPS)
        assert store.table.to_table()["index"].to_pylist() == [0, 1, 2, 3, 4]
        written.append(content(out))
    assert all(one == written[0] for one in written)
    assert len(written[0]) == 1 + 2 * 3


def test_what_is_not_written_yet_is_nan(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    store.begin(JOB)
    write(store, CHUNKS[1])
    assert store.finished() == {1}
    assert np.isnan(store.maps[[0, 1, 4]]).all()
    np.testing.assert_array_equal(store.maps[2:4], MAPS[2:4])


def test_maps_without_rows_are_not_finished(tmp_path: Path, monkeypatch: Any) -> None:
    store = Store(tmp_path / "out")
    store.begin(JOB)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rectgrad_ref.dataset.store.atomic_write", killed)
        with pytest.raises(KeyboardInterrupt):
            write(store, CHUNKS[0])
    assert len(list((tmp_path / "out" / "maps.zarr").glob("c.*"))) == 1
    assert store.finished() == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"id": "rectgrad", "q": 95.0}}, r"settings: method\.q is 98\.0 there, 95\.0"),
        ({"method": {"id": "saliency"}}, r"method\.q is 98\.0 there, None here"),
        (
            {"source": {"images": 6, "files_sha256": "cd"}},
            r"pictures .*: source\.images is 5 there",
        ),
    ],
)
def test_another_job_is_refused_by_what_differs(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    store = Store(tmp_path / "out")
    store.begin(JOB)
    write(store, CHUNKS[0])
    before = content(tmp_path)
    with pytest.raises(OutputError, match=message):
        Store(tmp_path / "out").begin(JOB | change)
    Store(tmp_path / "out").begin(JOB)
    assert content(tmp_path) == before


def test_a_job_without_a_chunk_gives_way(tmp_path: Path) -> None:
    Store(tmp_path / "out").begin(JOB)
    changed = JOB | {"method": {"id": "saliency"}}
    Store(tmp_path / "out").begin(changed)
    assert Store(tmp_path / "out").job == changed


@pytest.mark.parametrize("name", ["mine.txt", "table/00000000.parquet", "maps.zarr/c.0.0.0.0"])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(OutputError, match="other files in it"):
        Store(tmp_path).begin(JOB)
    assert content(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("metadata", ["", "{}", None])
def test_a_folder_with_another_array_is_refused(tmp_path: Path, metadata: str | None) -> None:
    if metadata is None:
        zarr.create_array(tmp_path / "maps.zarr", shape=(1,), dtype="int8")
    else:
        (tmp_path / "maps.zarr").mkdir()
        (tmp_path / "maps.zarr" / "zarr.json").write_text(metadata)
    before = content(tmp_path)
    with pytest.raises(OutputError, match="not of a data-set job"):
        Store(tmp_path).begin(JOB)
    assert content(tmp_path) == before


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with (
        Store(tmp_path / "out").locked(),
        pytest.raises(OutputError, match="another process is writing"),
        Store(tmp_path / "out").locked(),
    ):
        pass
    assert not (tmp_path / "out").exists()  # nothing was begun
    with Store(tmp_path / "out").locked():
        pass


def test_half_written_files_of_killed_processes_are_deleted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Store(out).begin(JOB)
    before = content(out)
    (out / "maps.zarr" / "c.0.0.0.1a2b.partial").touch()
    (out / "table" / ".00000000.xyz.parquet").touch()
    with Store(out).locked():
        assert content(out) == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"cannot write .*out: Not a directory"),
        Store(tmp_path / "file" / "out").locked(),
    ):
        pass


@pytest.mark.parametrize("limit", [100, 600])
def test_a_full_disk_leaves_earlier_chunks_intact(tmp_path: Path, limit: int) -> None:
    """Files may not grow beyond a limit: of maps, or of the rows of a chunk."""
    out = tmp_path / "out"
    store = Store(out)
    store.begin(JOB)
    write(store, CHUNKS[0])
    before = content(out)
    assert len(before["maps.zarr/c.0.0.0.0"]) < 600 < len(before["table/00000000.parquet"])
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, allowed[1]))
        with pytest.raises(OutputError, match=r"cannot write to .*the chunks that are finished"):
            write(store, CHUNKS[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert store.finished() == {0}
    assert content(out).items() >= before.items()
    for chunk in CHUNKS[1:]:
        write(store, chunk)
    np.testing.assert_array_equal(store.maps[:], MAPS)


def test_no_space_is_said_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "out")
    store.begin(JOB)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write(store, CHUNKS[0])
