"""`python -m bench.dataset MODEL SOURCE`: prints tables in Markdown."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.speed.machine import describe, load
from rectgrad_ref import Attribution, Explainer, explain_dataset
from rectgrad_ref.dataset.job import _opened
from rectgrad_ref.dataset.sources import find_source
from rectgrad_ref.images import prepare

Cost = tuple[float, float]
"""Seconds that passed, and seconds of this process's threads."""
BATCHES = (2, 8, 32, 128)
# Rounding of sums alone stays far below this part of a map's largest value.
VISIBLE = 1e-3


def main(
    model: Path,
    source: Path,
    images: Annotated[int, typer.Option(help="Of the source, for the rounding.")] = 256,
    rounds: Annotated[int, typer.Option(help="The fastest counts; 0: rounding only.")] = 3,
    threads: int = 2,
    chunk_size: int = 50,
    preprocess: str | None = None,
    ray: Annotated[bool, typer.Option(help="Also as many workers of one thread.")] = True,
) -> None:
    """Throughput of a job beside its parts, and how often the batch size moves a threshold."""
    machine = describe()
    inputs = _inputs(Explainer(model), source, preprocess)
    print(f"### {model.stem}, {len(inputs)} pictures of {source.name}\n")
    print(
        f"{machine['cpu']}, {machine['cores']} cores; load average {machine['load_before'][0]} "
        f"before; {machine['date']}, commit {machine['commit']}.\n"
    )
    if rounds:
        print("| | pictures/s | ms a picture | of all processors |\n|---|--:|--:|--:|")
    for name, measure in _contenders(model, source, preprocess, inputs, threads, chunk_size, ray):
        if not rounds:
            break
        seconds, busy = min(measure() for _ in range(rounds))
        here = "–" if "Ray" in name else f"{1000 * busy:.3g}"
        print(f"| {name} | {1 / seconds:.4g} | {1000 * seconds:.3g} | {here} |", flush=True)
    _print_rounding(model, inputs[:images], threads)
    print(f"\nLoad average afterwards {load()[0]}.")


def _inputs(explainer: Explainer, source: Path, preprocess: str | None) -> np.ndarray:
    return np.concatenate([array for array in _prepared(explainer, source, preprocess)])


def _prepared(explainer: Explainer, source: Path, preprocess: str | None) -> Iterator[np.ndarray]:
    found = find_source(source)
    for index, item in enumerate(islice(found.items(0), len(found))):
        yield prepare(
            _opened(item, found.name(index)),
            explainer.input.shape,
            explainer.input.dtype,
            preprocess=preprocess,
            metadata=explainer.model.metadata,
            model_path=explainer.model.path,
        ).array


def _contenders(
    model: Path,
    source: Path,
    preprocess: str | None,
    inputs: np.ndarray,
    threads: int,
    chunk: int,
    ray: bool,
) -> Iterator[tuple[str, Callable[[], Cost]]]:
    """Names, and functions that return what a picture costs."""
    settings: dict[str, Any] = {"preprocess": preprocess, "chunk_size": chunk}
    explainer = Explainer(model, threads=threads)
    starts = range(0, len(inputs), chunk)

    def reading() -> Cost:
        begin = _now()
        for _ in _prepared(explainer, source, preprocess):
            pass
        return _cost(begin, _now(), len(inputs))

    def explaining(explainer: Explainer) -> Cost:
        explainer.explain(inputs[:chunk])
        begin = _now()
        for start in starts:
            explainer.explain(inputs[start : start + chunk])
        return _cost(begin, _now(), len(inputs))

    def job(**more: Any) -> Cost:
        """Without what comes before the first chunk: loading, compiling, starting workers."""
        times: list[tuple[int, Cost]] = []
        with tempfile.TemporaryDirectory() as folder:
            explain_dataset(
                model,
                source,
                Path(folder) / "out",
                progress=lambda done, _: times.append((done, _now())),
                **settings,
                **more,
            )
        (first, begin), (last, end) = times[1], times[-1]
        return _cost(begin, end, last - first)

    yield "reading and preprocessing alone, one thread", reading
    yield f"explaining alone, {threads} threads", lambda: explaining(explainer)
    yield f"job, {threads} threads", lambda: job(threads=threads)
    single = Explainer(model, threads=1)
    yield "explaining alone, 1 thread", lambda: explaining(single)
    yield "job, 1 thread", lambda: job(threads=1)
    if ray:
        for workers in (1, threads):
            name = f"job on Ray, workers of 1 thread: {workers}"
            yield name, lambda workers=workers: job(ray="local", workers=workers)  # type: ignore[misc]


def _now() -> Cost:
    return time.perf_counter(), time.process_time()


def _cost(begin: Cost, end: Cost, pictures: int) -> Cost:
    return (end[0] - begin[0]) / pictures, (end[1] - begin[1]) / pictures


def _print_rounding(model: Path, inputs: np.ndarray, threads: int) -> None:
    computations: dict[str, dict[str, Any]] = {
        "cpu": {"backend": "cpu", "threads": threads},
        "reference, float32": {"backend": "reference", "dtype": "float32"},
    }
    print(f"\nBatches against one sample at a time, {len(inputs)} pictures:\n")
    print("| backend | batch | units that flip | pictures with one | maps that differ | visibly |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, settings in computations.items():
        alone = Explainer(model, batch_size=1, **settings).explain(inputs, trace=True)
        for batch in BATCHES:
            together = Explainer(model, batch_size=batch, **settings).explain(inputs, trace=True)
            print(f"| {name} | {batch} | {_compared(alone, together)} |", flush=True)


def _compared(alone: Attribution, together: Attribution) -> str:
    """The last four columns."""
    units, flipped = 0, np.zeros(len(alone), int)
    for name, layer in alone.layers().items():
        other = together.layers()[name].mask
        if layer.mask is not None and other is not None:
            units += layer.mask.size
            flipped += (layer.mask != other).reshape(len(alone), -1).sum(axis=1)
    difference, largest = (
        np.abs(values).reshape(len(alone), -1).max(axis=1)
        for values in (together.values - alone.values, alone.values)
    )
    return (
        f"{flipped.sum()} of {units:.3g} | {np.mean(flipped > 0):.1%} | "
        f"{np.mean(difference > 0):.1%} | {np.mean(difference > VISIBLE * largest):.1%}"
    )


if __name__ == "__main__":
    typer.run(main)
