"""A data-set job: chunks that are not finished are read, explained and written, in any order.

What a chunk's files hold depends on the job and the chunk's pictures alone: not on which other
chunks there are, who makes them, or when.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ..attribution import plain
from ..errors import BackendUnavailable, InvalidImage, OutputError
from ..executors.crew import processors
from ..explainer import Explainer, Targets, resolve_targets
from ..images import Layout, Prepared, prepare, readable
from ..methods import Method, make_method
from ..model import ModelSource
from ..preprocess import Preprocess, PreprocessLike, resolve_preprocess
from .sources import Item, Npy, Source, Zarr, find_source
from .store import Store

Thing = TypeVar("Thing")
Precision = Literal["float32", "float16"]

# A chunk is what a killed process may lose, and what is in memory three times.
_CHUNK_BYTES, _CHUNK_IMAGES = 2**24, 256
# So many broken pictures at the beginning are taken for a wrong setting.
_TRIED = 1000


@dataclass(frozen=True)
class Job:
    """Everything that decides what the maps are; another process can be given it.

    Attributes
    ----------
    model : path, bytes or onnx.ModelProto
    loading : dict
        The arguments of `Explainer`.
    source : Source
    preprocess : optional
        As for `rectgrad_ref.images.prepare`.
    method : Method
    target : int, numpy.ndarray of int, or None
        A class, one for each picture, or the predicted one.
    shape : tuple of int
        Of one map.
    precision : str
        ``"float32"`` or ``"float16"``.
    chunk_size : int
    """

    model: ModelSource
    loading: dict[str, Any]
    source: Source
    preprocess: PreprocessLike | None
    method: Method
    target: int | np.ndarray | None
    shape: tuple[int, ...]
    precision: Precision
    chunk_size: int

    def explainer(self) -> Explainer:
        """A new one for this job."""
        return Explainer(self.model, **self.loading)

    def chunk(self, number: int) -> range:
        """The numbers of a chunk's pictures."""
        start = number * self.chunk_size
        return range(start, min(start + self.chunk_size, len(self.source)))

    @property
    def chunks(self) -> range:
        """Numbers of the chunks."""
        return range(-(-len(self.source) // self.chunk_size))

    def description(self, explainer: Explainer) -> dict[str, Any]:
        """As plain data: two jobs with the same description write the same files."""
        environment = explainer.environment
        target: Any = "predicted" if self.target is None else self.target
        if isinstance(target, np.ndarray):
            target = f"sha256:{hashlib.sha256(target.tobytes()).hexdigest()}"
        recipe = self.preprocess
        return {
            "model": {
                "sha256": environment["sha256"],
                "input": explainer.input.name,
                "scores": explainer.graph.logits,
            },
            "method": {"id": self.method.id, **plain(self.method.options())},
            "target": target,
            "preprocess": recipe.to_dict()
            if isinstance(recipe, Preprocess)
            else getattr(recipe, "__qualname__", None),
            "maps": {
                "shape": list(self.shape),
                "dtype": self.precision,
                "chunk_size": self.chunk_size,
            },
            "source": self.source.fingerprint(),
            "computation": {
                **{key: environment[key] for key in ("backend", "forward", "dtype")},
                **{key: self.loading[key] for key in ("threads", "batch_size")},
            },
            "versions": environment["versions"]
            | {package: version(package) for package in ("pillow", "pyarrow", "zarr")},
        }

    def run(self, explainer: Explainer, store: Store, numbers: Iterable[int]) -> Iterator[int]:
        """Make chunks, and yield the number of each that is written.

        A thread reads the pictures of the next chunk while this one is explained.
        """
        for chunk, samples in _ahead(self._read(map(self.chunk, numbers), explainer)):
            store.write(chunk, *self._explained(explainer, chunk, samples))
            yield chunk.start // self.chunk_size

    def _read(
        self, chunks: Iterable[range], explainer: Explainer
    ) -> Iterator[tuple[range, list[_Sample]]]:
        position, items = -1, iter(())  # type: tuple[int, Iterator[Item]]
        for chunk in chunks:
            if chunk.start != position:
                items = self.source.items(chunk.start)
            position = chunk.stop
            samples = [
                self._sample(explainer, item, index)
                for index, item in zip(chunk, items, strict=False)
            ]
            if len(samples) < len(chunk):
                raise InvalidImage(f"{self.source.root}: pictures were removed from the source")
            yield chunk, samples

    def _sample(self, explainer: Explainer, item: Item, index: int) -> _Sample:
        try:
            array = self._prepared(explainer, item, self.source.name(index)).array
            if array.shape[1:] != self.shape:
                raise InvalidImage(
                    f"as the model's input it is {array.shape[1:]}, but the first is {self.shape}"
                )
        except InvalidImage as error:
            if not isinstance(item, Path):
                return _Sample(str(error))
            if not item.exists():
                raise  # not a broken picture: the source has changed
            return _Sample(str(error).removeprefix(f"{item}: "))  # which the table has already
        return _Sample("ok", array)

    def _prepared(self, explainer: Explainer, item: Item, name: str) -> Prepared:
        return prepare(
            _opened(item, name),
            explainer.input.shape,
            explainer.input.dtype,
            layout=self.loading["layout"],
            preprocess=self.preprocess,
            metadata=explainer.model.metadata,
            model_path=explainer.model.path,
        )

    def _explained(
        self, explainer: Explainer, chunk: range, samples: Sequence[_Sample]
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Maps and rows of a chunk."""
        maps = np.full((len(chunk), *self.shape), np.nan, self.precision)
        rows = [
            {"index": index, "source": self.source.name(index), "status": sample.status}
            for index, sample in zip(chunk, samples, strict=True)
        ]
        good = [i for i, sample in enumerate(samples) if sample.array is not None]
        if not good:
            return maps, rows
        keys = [chunk[i] for i in good]
        result = explainer.explain(
            np.concatenate([samples[i].array for i in good]),
            method=self.method,
            target=self.target[keys] if isinstance(self.target, np.ndarray) else self.target,
            keys=keys,
        )
        with np.errstate(over="ignore"):
            values = result.values.astype(self.precision, copy=False)
        for k, i in enumerate(good):
            rows[i] |= {"target": result.target[k], "scores": result.logits[k].astype(np.float32)}
            if result.completeness_gap is not None:
                rows[i]["completeness_gap"] = result.completeness_gap[k]
            if np.isfinite(values[k]).all():
                maps[i] = values[k]
                rows[i]["sparsity"] = np.mean(values[k] == 0)
            else:
                rows[i]["status"] = f"the map has values that {self.precision} cannot hold"
        return maps, rows


class _Sample(NamedTuple):
    """A picture as the model's input, a batch of one; or why it is none."""

    status: str
    array: np.ndarray | None = None


def explain_dataset(
    model: ModelSource,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: str | Method = "rectgrad",
    target: Targets = None,
    preset: str = "default",
    precision: Precision = "float32",
    chunk_size: int | None = None,
    batch_size: int | None = None,
    batch_invariant: bool = False,
    preprocess: PreprocessLike | None = None,
    backend: str = "auto",
    dtype: Any = None,
    input: str | None = None,
    output: str | None = None,
    labels: Any = None,
    layout: Layout | None = None,
    threads: int | None = None,
    ray: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Store:
    """Explain every picture of a data set, and write the maps to a folder.

    Killed at any moment and called again, it goes on where it was, and the folder becomes what it
    would have become without interruption. A picture that cannot be read gets a row that says why,
    and no map.

    Parameters
    ----------
    model : path, bytes or onnx.ModelProto
    source : path
        A folder or pattern of pictures, Parquet tables with pictures' bytes, an ``.npy`` or Zarr
        array, or CIFAR pickles: see `rectgrad_ref.dataset.sources.find_source`. The elements of an
        array are what `Explainer.explain` takes: pictures or preprocessed input.
    out : path
        Folder to write: ``maps.zarr`` and ``table``. See `Store`.
    method, preset, **options
        As for `Explainer.explain`. Noise is keyed by a picture's number in the source.
    target : int, str or sequence, optional
        Class index or name, one for all or one for each picture; by default the predicted class.
    precision : str
        Of the stored maps: ``"float32"`` or ``"float16"``.
    chunk_size : int, optional
        Pictures that are read, explained and written together: a chunk of the Zarr array and a file
        of the table. By default about 16 MB of maps, and at most 256 pictures.
    batch_size : int, optional
        Samples per forward pass, of one chunk: see `Explainer`.
    batch_invariant : bool
        One sample per forward pass: a map then depends on no other picture, not even by rounding.
    threads : int, optional
        Of each process. By default what the job in `out` began with; of a new one, one per
        processor, or with `ray` one.
    ray : str, optional
        Run on a Ray cluster: ``"local"`` starts one on this machine, ``"auto"`` finds the one that
        this machine is part of, and ``"HOST:PORT"`` is another's; one to which this process is
        connected already is taken, whatever the address. Model, source and `out` must have the same
        paths on all its machines.
    workers : int, optional
        Processes on that cluster; by default as many as it has processors for.
    progress : callable, optional
        Called with the number of finished pictures and of all: once at the beginning and after
        every chunk.
    preprocess, backend, dtype, input, output, labels, layout
        As for `Explainer`.

    Returns
    -------
    Store
        The folder, finished.

    Raises
    ------
    OutputError
        `out` has something else in it, or maps of another job or of a source that has changed
        since; or it is part of the source, or cannot be written to. Finished chunks stay.
    InvalidImage
        There are no pictures, or none of the first thousand can be used; or one that was there at
        the beginning has gone.
    BackendUnavailable
        Zarr, PyArrow or Ray is not installed, or the cluster cannot be reached.
    ValueError
        A method in which the samples of a batch influence each other, or an option out of range.
    """
    _require_installed("zarr", "pyarrow", *["ray"] * (ray is not None))
    chosen = make_method(method, preset, **options)
    _check(chosen, precision, chunk_size, batch_size, batch_invariant, ray, workers)
    if Path(source).is_dir() and Path(out).resolve().is_relative_to(Path(source).resolve()):
        raise OutputError(f"{out} is inside the source {source}; choose a folder outside")
    store = Store(out)
    with store.locked():
        if threads is None:
            threads = store.threads or (processors() if ray is None else 1)
        loading = {
            "backend": backend,
            "dtype": dtype,
            "input": input,
            "output": output,
            "labels": labels,
            "layout": layout,
            "threads": threads,
            "batch_size": 1 if batch_invariant else batch_size,
        }
        explainer = Explainer(model, **loading)
        pictures = find_source(source)
        probe = Job(model, loading, pictures, preprocess, chosen, None, (), precision, 1)
        first = _first_prepared(probe, explainer)
        shape = first.array.shape[1:]
        job = replace(
            probe,
            # What "auto" is here, it is everywhere.
            loading={**loading, "backend": explainer.backend.name},
            preprocess=first.preprocess,
            target=_resolved(target, len(pictures), explainer),
            shape=shape,
            chunk_size=chunk_size or _default_chunk_size(shape),
        )
        store.begin(job.description(explainer))
        finished = store.finished()
        done = sum(len(job.chunk(number)) for number in finished)
        missing = [number for number in job.chunks if number not in finished]
        if progress is not None:
            progress(done, len(pictures))
        if ray is None:
            written = job.run(explainer, store, missing)
        else:
            from .cluster import run_on_ray

            written = run_on_ray(job, store, missing, ray, workers)
        for number in written:
            done += len(job.chunk(number))
            if progress is not None:
                progress(done, len(pictures))
    return store


def _require_installed(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            extra = "ray" if package == "ray" else "dataset"
            raise BackendUnavailable(
                f"{package} is not installed: pip install 'rectgrad-ref[{extra}]'"
            )


def _check(
    method: Method,
    precision: str,
    chunk_size: int | None,
    batch_size: int | None,
    batch_invariant: bool,
    ray: str | None,
    workers: int | None,
) -> None:
    """Refuse what no job can be."""
    if method.whole_batch:
        raise ValueError(
            f"{method.id}: this convention mixes the samples of a batch, and a data set has no "
            "batch; choose one over the sample"
        )
    if precision not in ("float32", "float16"):
        raise ValueError(f"precision must be float32 or float16, got {precision!r}")
    for name, value in (("chunk_size", chunk_size), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if batch_invariant and batch_size not in (None, 1):
        raise ValueError(f"batch_invariant is a batch_size of 1, got {batch_size}")
    if workers is not None and ray is None:
        raise ValueError("workers are processes of a Ray cluster; say which one with ray")


def _first_prepared(job: Job, explainer: Explainer) -> Prepared:
    """The first picture that can be read, which settles the maps' shape and the preprocessing."""
    if not isinstance(job.source, (Npy, Zarr)):
        # Otherwise a thousand pictures would be decoded in vain.
        resolve_preprocess(
            job.preprocess, metadata=explainer.model.metadata, model_path=explainer.model.path
        )
    reasons = []
    for index, item in enumerate(islice(job.source.items(0), _TRIED)):
        try:
            return job._prepared(explainer, item, job.source.name(index))
        except InvalidImage as error:
            reasons.append(str(error))
    raise InvalidImage(f"none of the first {len(reasons)} pictures can be used: {reasons[0]}")


def _resolved(target: Targets, images: int, explainer: Explainer) -> int | np.ndarray | None:
    """Classes by their numbers."""
    one = isinstance(target, str) or not np.iterable(target)
    classes = explainer.graph.classes
    found = resolve_targets(target, 1 if one else images, classes, explainer.class_names(classes))
    return int(found[0]) if found is not None and one else found


def _default_chunk_size(shape: tuple[int, ...]) -> int:
    return min(max(1, _CHUNK_BYTES // (4 * math.prod(shape))), _CHUNK_IMAGES)


def _opened(item: Item, name: str) -> Path | Image.Image | np.ndarray:
    """What `prepare` takes."""
    if item is None:
        raise InvalidImage(f"{name}: no picture")
    if isinstance(item, bytes):
        with readable(name):
            return Image.open(BytesIO(item))
    return item


def _ahead(things: Iterator[Thing]) -> Iterator[Thing]:
    """`things`, of which a thread makes the next while one is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, things, None)
        while (thing := coming.result()) is not None:
            coming = thread.submit(next, things, None)
            yield thing
