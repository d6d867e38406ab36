"""Where the pictures of a data set are: files, Parquet tables, arrays, CIFAR pickles.

A source is a list of files and knows how many pictures each holds. Pictures are numbered in the
order of the files' names, and read one after another from any number on.
"""

from __future__ import annotations

import glob
import hashlib
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from ..errors import InvalidImage

Item: TypeAlias = Path | bytes | np.ndarray | None
"""A picture file, its content, or an array; None where a table has no picture."""

_CIFAR_FILES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "train", "test")
_PICKLE = b"\x80"  # how a pickle begins
_ROWS_AT_ONCE = 16  # of a Parquet table, in memory


@dataclass(frozen=True)
class Source(ABC):
    """Numbered pictures in files.

    Attributes
    ----------
    root : Path
        Folder of the files.
    files : tuple of str
        Their names relative to `root`, in order.
    """

    root: Path
    files: tuple[str, ...]

    kind: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int:
        """How many pictures there are."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a table calls a picture."""

    @abstractmethod
    def items(self, start: int) -> Iterator[Item]:
        """The pictures from number `start` on.

        Raises
        ------
        InvalidImage
            A file that holds several pictures cannot be read.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Kind, number of pictures, and a hash of the files' names, sizes and times of change."""
        digest = hashlib.sha256()
        for name in self.files:
            try:
                state = (self.root / name).stat()
            except OSError as error:
                raise InvalidImage(f"cannot read {self.root / name}: {error.strerror}") from error
            digest.update(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
        return {"kind": self.kind, "images": len(self), "files_sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Pictures(Source):
    """A file for each picture."""

    kind: ClassVar[str] = "pictures"

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def items(self, start: int) -> Iterator[Path]:
        return (self.root / name for name in islice(self.files, start, None))


@dataclass(frozen=True)
class Rows(Source):
    """Files of several pictures each."""

    @cached_property
    def _ends(self) -> list[int]:
        """The number of the picture after each file's last."""
        return list(accumulate(self._count(self.root / name) for name in self.files))

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        file, row = self._locate(index)
        return f"{self.files[file]}#{row}"

    def items(self, start: int) -> Iterator[Item]:
        file, row = self._locate(start)
        for name in self.files[file:]:
            path = self.root / name
            try:
                yield from self._rows(path, row)
            except (OSError, ValueError, RuntimeError) as error:  # the last of codecs
                raise InvalidImage(f"cannot read {path}: {error}") from error
            row = 0

    def _locate(self, index: int) -> tuple[int, int]:
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    @abstractmethod
    def _count(self, path: Path) -> int:
        """How many pictures a file holds."""

    @abstractmethod
    def _rows(self, path: Path, start: int) -> Iterator[Item]:
        """The pictures of a file from row `start` on."""


class Parquet(Rows):
    """Tables with the bytes of picture files in one column.

    The column holds binary values, or structures with a field ``bytes``, as Hugging Face's data
    sets do. It is called ``image`` where a table has several such columns. Of a row group, only a
    few pages are in memory.
    """

    kind: ClassVar[str] = "parquet"

    def _count(self, path: Path) -> int:
        with self._open(path) as file:
            self._column(file, path)
            return int(file.metadata.num_rows)

    def _rows(self, path: Path, start: int) -> Iterator[bytes | None]:
        with self._open(path) as file:
            column = self._column(file, path)
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start >= rows:
                    start -= rows
                    continue
                batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column])
                for batch in batches:
                    for value in batch.column(0).slice(start):
                        content = value.as_py()
                        yield content["bytes"] if isinstance(content, dict) else content
                    start = max(0, start - len(batch))

    @staticmethod
    def _open(path: Path) -> Any:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile

        try:
            # A buffered stream, so that a large row group is not read at once.
            return ParquetFile(path, buffer_size=2**16, pre_buffer=False)
        except (OSError, ArrowInvalid) as error:
            raise InvalidImage(f"cannot read {path}: {error}") from error

    @staticmethod
    def _column(file: Any, path: Path) -> str:
        """The column with pictures, or its field with their bytes."""
        from pyarrow import types

        def is_binary(kind: Any) -> bool:
            return kind is not None and (types.is_binary(kind) or types.is_large_binary(kind))

        found = {}
        for field in file.schema_arrow:
            inner = {f.name: f.type for f in field.type} if types.is_struct(field.type) else {}
            if is_binary(field.type):
                found[field.name] = field.name
            elif is_binary(inner.get("bytes")):
                found[field.name] = f"{field.name}.bytes"
        if len(found) == 1:
            return next(iter(found.values()))
        if "image" in found:
            return found["image"]
        raise InvalidImage(
            f"{path}: which column holds pictures? Their bytes must be in the only binary column, "
            f"or in one called 'image'; binary are {', '.join(found) or 'none'}"
        )


class Npy(Rows):
    """A ``.npy`` file whose axis 0 numbers the pictures, mapped into memory."""

    kind: ClassVar[str] = "npy"

    def _count(self, path: Path) -> int:
        return len(self._open(path))

    def _rows(self, path: Path, start: int) -> Iterator[np.ndarray]:
        array = self._open(path)
        return (np.array(array[i]) for i in range(start, len(array)))

    @staticmethod
    def _open(path: Path) -> np.ndarray:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InvalidImage(f"cannot read {path}: {error}") from error
        return _with_rows(array, path)


class Zarr(Rows):
    """A Zarr array whose axis 0 numbers the pictures; one row of its chunks is in memory."""

    kind: ClassVar[str] = "zarr"

    def fingerprint(self) -> dict[str, Any]:
        array = self.root / self.files[0]
        inside = Pictures(array, tuple(_files_under(array)))
        return super().fingerprint() | {"files_sha256": inside.fingerprint()["files_sha256"]}

    def _count(self, path: Path) -> int:
        return int(self._open(path).shape[0])

    def _rows(self, path: Path, start: int) -> Iterator[np.ndarray]:
        array = self._open(path)
        rows = array.chunks[0]
        while start < array.shape[0]:
            stop = start - start % rows + rows
            yield from array[start:stop]
            start = stop

    @staticmethod
    def _open(path: Path) -> Any:
        import zarr

        try:
            array = zarr.open_array(path, mode="r")
        except (OSError, ValueError, TypeError) as error:
            raise InvalidImage(f"{path} is not a Zarr array: {error}") from error
        return _with_rows(array, path)


class Cifar(Rows):
    """The pickles of CIFAR-10 and CIFAR-100, one in memory at a time."""

    kind: ClassVar[str] = "cifar"

    def _count(self, path: Path) -> int:
        return len(self._pixels(path))

    def _rows(self, path: Path, start: int) -> Iterator[np.ndarray]:
        return iter(self._pixels(path)[start:])

    @staticmethod
    def _pixels(path: Path) -> np.ndarray:
        """(N, 32, 32, 3), RGB."""
        from ..onnx_models.cifar10 import unpickle

        try:
            content = unpickle(path.read_bytes())
            return np.asarray(content[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        except (OSError, InvalidImage, LookupError, TypeError, AttributeError) as error:
            raise InvalidImage(f"{path} is not a CIFAR pickle: {error}") from error


def find_source(source: str | os.PathLike[str]) -> Source:
    """The pictures that a path names.

    Parameters
    ----------
    source : path
        A folder: a Zarr array, the CIFAR pickles, all Parquet tables in it, or all pictures in it
        and in its sub-folders. A file: a Parquet table, an ``.npy``, a CIFAR pickle or a picture.
        A pattern such as ``"photos/**/*.jpg"``: the pictures or tables that it matches.

    Raises
    ------
    InvalidImage
        There is nothing, or something that cannot be read.
    """
    path = Path(source)
    if (path / "zarr.json").is_file() or (path / ".zarray").is_file():
        found: Source = Zarr(path.parent, (path.name,))
    elif path.is_dir():
        found = _in_folder(path)
    elif path.is_file():
        found = _of_files(path.parent, [path.name])
    elif glob.has_magic(str(path)):
        found = _of_files(*_matching(path))
    else:
        raise InvalidImage(f"{path}: no such file or folder")
    if not found.files or not len(found):
        raise InvalidImage(f"{path}: no pictures there")
    return found


def _in_folder(folder: Path) -> Source:
    pickles = [name for name in _CIFAR_FILES if _is_pickle(folder / name)]
    if pickles:
        return Cifar(folder, tuple(pickles))
    files = list(_files_under(folder))
    tables = [name for name in files if name.endswith(".parquet")]
    return _of_files(folder, tables or _with_picture_suffix(files))


def _of_files(root: Path, names: Sequence[str]) -> Source:
    files = tuple(sorted(names))
    suffixes = {Path(name).suffix.lower() for name in files}
    if suffixes == {".parquet"}:
        return Parquet(root, files)
    if suffixes == {".npy"}:
        return Npy(root, files)
    if suffixes == {""} and all(_is_pickle(root / name) for name in files):
        return Cifar(root, files)
    return Pictures(root, files)


def _is_pickle(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == _PICKLE


def _with_picture_suffix(names: Iterable[str]) -> list[str]:
    """Those that Pillow would try to open, by their suffixes."""
    from PIL import Image

    known = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [name for name in names if Path(name).suffix.lower() in known]


def _files_under(folder: Path) -> Iterator[str]:
    """Relative names of all files that are not hidden, in a fixed order."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(parent).relative_to(folder)
        yield from ((here / name).as_posix() for name in sorted(names) if not name.startswith("."))


def _matching(pattern: Path) -> tuple[Path, list[str]]:
    """The folder before the first wildcard, and the matching files' names relative to it."""
    fixed = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    root = Path(*pattern.parts[:fixed])
    files = root.glob(str(Path(*pattern.parts[fixed:])))
    return root, [
        path.relative_to(root).as_posix()
        for path in files
        if path.is_file() and not path.name.startswith(".")
    ]


def _with_rows(array: Any, path: Path) -> Any:
    if not array.ndim:
        raise InvalidImage(f"{path} holds one number, not pictures along axis 0")
    return array
