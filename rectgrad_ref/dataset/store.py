"""The output of a data-set job: a Zarr array of maps and a Parquet table beside it.

::

    OUT/maps.zarr/zarr.json         shape, and what the job is
    OUT/maps.zarr/c.3.0.0.0         the maps of chunk 3
    OUT/table/00000003.parquet      its rows, written after its maps: the sign that it is finished

A chunk is a range of the source's numbers, one file of each. Files appear whole or not at all, so a
process may die at any moment, and processes that write different chunks need not know of each
other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputError
from ..files import atomic_write

_JOB = "job"  # the attribute of the array that says what the job is


class Store:
    """Maps and their table in a folder.

    Attributes
    ----------
    path : Path
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._maps, self._table = self.path / "maps.zarr", self.path / "table"

    @property
    def maps(self) -> Any:
        """The `zarr.Array` of maps, (N, …): NaN where there is none (yet)."""
        import zarr

        return zarr.open_array(self._maps, mode="r")

    @property
    def table(self) -> Any:
        """The `pyarrow.dataset.Dataset` of rows, a file a chunk.

        ``index``, ``source``, ``target``, ``scores`` (all logits), ``sparsity`` (part of the map's
        elements that are zero), ``completeness_gap`` (of methods with a baseline) and ``status``:
        "ok", or why there is no map.
        """
        from pyarrow import dataset

        return dataset.dataset(sorted(map(str, self._table.glob("[0-9]*.parquet"))))

    @property
    def skipped(self) -> int:
        """How many pictures have no map."""
        from pyarrow import compute

        return int(self.table.count_rows(filter=compute.field("status") != "ok"))

    @property
    def job(self) -> dict[str, Any] | None:
        """What the job is, or None where none has begun.

        Raises
        ------
        OutputError
            The array's metadata cannot be read.
        """
        if not (self._maps / "zarr.json").exists():
            return None
        try:
            return dict(self.maps.attrs[_JOB])
        except (OSError, ValueError, LookupError) as error:
            raise OutputError(f"{self._maps} is not of a data-set job: {error}") from error

    def finished(self) -> set[int]:
        """Numbers of the chunks that are written."""
        chunks = {int(file.name.split(".")[1]) for file in self._maps.glob("c.*.0")}
        return chunks & {int(part.stem) for part in self._table.glob("[0-9]*.parquet")}

    def begin(self, job: Mapping[str, Any]) -> None:
        """Create the folder, or check that it is this job's.

        Raises
        ------
        OutputError
            It has maps of another job, or other files; or cannot be written to.
        """
        import zarr

        there = self.job
        # Before the first chunk, there is nothing to lose.
        if there is not None and self.finished():
            self._require_same(there, job)
            return
        if there is None and self.path.exists() and any(_visible_files(self.path)):
            raise OutputError(f"{self.path} has other files in it; choose a new folder")
        maps = job["maps"]
        with self._writing():
            self._table.mkdir(parents=True, exist_ok=True)
            zarr.create_array(
                self._maps,
                shape=(job["source"]["images"], *maps["shape"]),
                chunks=(maps["chunk_size"], *maps["shape"]),
                dtype=maps["dtype"],
                fill_value=float("nan"),
                # All chunks in one folder.
                chunk_key_encoding={"name": "default", "separator": "."},
                attributes={_JOB: dict(job)},
                overwrite=True,
            )

    @property
    def threads(self) -> int | None:
        """Of each process that worked on the job, or None where none has begun."""
        return None if self.job is None else int(self.job["computation"]["threads"])

    def write(self, chunk: range, maps: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one chunk: its maps, then its rows.

        Parameters
        ----------
        chunk : range
            Numbers of its pictures.
        maps : numpy.ndarray, shape (len(chunk), …)
        rows : sequence of mappings
            Values of the columns by name; one that is missing is null.

        Raises
        ------
        OutputError
            It cannot be written, as on a full disk. What was written before stays.
        """
        import pyarrow as pa
        import zarr
        from pyarrow import parquet

        with self._writing():
            maps_there = zarr.open_array(self._maps, mode="r+")
            array = maps_there.with_config({"write_empty_chunks": True})
            number = chunk.start // array.chunks[0]
            array[chunk.start : chunk.stop] = maps
            _flush(self._maps / array.metadata.encode_chunk_key((number, *[0] * (array.ndim - 1))))
            with atomic_write(self._table / f"{number:08}.parquet") as part:
                parquet.write_table(pa.Table.from_pylist(list(rows), _schema()), part)
                _flush(part)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes on this machine out, and clean up after killed ones.

        Raises
        ------
        OutputError
            Another process writes to this folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
        try:
            _lock(folder, self.path)
            self._sweep()
            yield
            self._sweep()
        finally:
            os.close(folder)
            with suppress(OSError):
                self.path.rmdir()  # if nothing was begun

    def _sweep(self) -> None:
        """Delete the half-written files of killed processes."""
        for file in (*self._maps.glob("*.partial"), *self._table.glob(".*.parquet")):
            file.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.path}: {error.strerror or error}; the chunks that are "
                "finished stay, and the same call goes on after them"
            ) from error

    def _require_same(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        """Refuse another job, and say in what it differs."""
        old, new = _flat(there), _flat(json.loads(json.dumps(here)))
        differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if not differing:
            return
        said = "; ".join(f"{k} is {old.get(k)!r} there, {new.get(k)!r} here" for k in differing)
        if all(key.startswith("source.") for key in differing):
            raise OutputError(
                f"{self.path} was begun with other pictures (their number, or their files' names, "
                f"sizes or times of change): {said}. Restore the source, or choose another folder"
            )
        raise OutputError(
            f"{self.path} was begun with other settings: {said}. Go on with those, or choose "
            "another folder"
        )


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "index": pa.int64(),
            "source": pa.string(),
            "target": pa.int64(),
            "scores": pa.list_(pa.float32()),
            "sparsity": pa.float64(),
            "completeness_gap": pa.float64(),
            "status": pa.string(),
        }
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _visible_files(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


def _flush(file: Path) -> None:
    """Wait until a file is on the disk: after a power cut, too, rows shall follow their maps."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _lock(folder: int, path: Path) -> None:
    """Lock an open folder until it is closed, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"another process is writing to {path}; wait for it") from None
    except OSError:
        return  # not every network file system knows locks
