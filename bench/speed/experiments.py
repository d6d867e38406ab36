"""What is measured: each part yields comparisons, or reports from processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from rich.console import Console

from rectgrad_ref import Explainer
from rectgrad_ref.graph import input_spec
from rectgrad_ref.model import ModelSource, read_model

from . import machine
from .clock import Contender, measure
from .contenders import all_contenders, explanation, plain_forward
from .results import DENSE, Comparison, Entry, Process, Results, agreement
from .subjects import Subject, photographs, subject

QUANTILES = (0.0, 50.0, 80.0, 90.0, 98.0, 99.5)
_COLD_STARTS = 5


@dataclass(frozen=True)
class Settings:
    """What to measure, and how long.

    Attributes
    ----------
    models : tuple of str
        Names or paths, see `subjects.subject`.
    methods : tuple of str
        For the part "methods".
    batches : tuple of int
        Empty: those of each model.
    parts : tuple of str
        Of `PARTS`.
    backend : str
    threads : int
        Of every contender.
    rounds : int
    seconds : float
        After which a comparison begins no new round, see `clock.measure`.
    passes : int
        Of methods that sum gradients over many points.
    """

    models: tuple[str, ...] = ("cifar10_cnn", "inception_v4")
    methods: tuple[str, ...] = (
        "rectgrad",
        "saliency",
        "guided_backprop",
        "deeplift",
        "epsilon_lrp",
        "smoothgrad",
        "integrated_gradients",
    )
    batches: tuple[int, ...] = ()
    parts: tuple[str, ...] = ("methods", "q", "batch", "size", "cold", "memory", "floor")
    backend: str = "cpu"
    threads: int = field(default_factory=machine.processors)
    rounds: int = 15
    seconds: float = 300.0
    passes: int = 8

    def explainer(self, model: ModelSource) -> Explainer:
        return Explainer(model, backend=self.backend, threads=self.threads)


@dataclass(frozen=True, eq=False)
class Trial:
    """Contenders on one input."""

    x: np.ndarray
    contenders: list[Contender]
    notes: list[str] = field(default_factory=list)


def run(settings: Settings, console: Console, save: Callable[[Results], None]) -> Results:
    """Every part on every model; checks are printed as they are made, parts saved when finished."""
    results: Results = {
        "machine": machine.describe(gpu=settings.backend == "cuda"),
        "settings": asdict(settings),
        "notes": [],
        "comparisons": [],
        "processes": [],
    }
    for name in settings.models:
        measured = subject(name)
        if settings.batches:
            measured = Subject(measured.name, measured.path, settings.batches, measured.sizes)
        for part in settings.parts:
            with console.status(f"{part}: {measured.name}"):
                if part in TRIALS:
                    for trial in TRIALS[part](measured, settings):
                        results["notes"] += trial.notes
                        compared = compare(part, measured.name, trial, settings, console)
                        results["comparisons"].append(compared)
                else:
                    results["processes"] += PROCESSES[part](measured, settings)
            results["notes"] = list(dict.fromkeys(results["notes"]))
            results["machine"]["load_after"] = machine.load()
            save(results)
    return results


def compare(
    part: str, model: str, trial: Trial, settings: Settings, console: Console
) -> Comparison:
    """Check that contenders compute the same map as we do, then time them all in turn."""
    shape = list(trial.x.shape)
    console.print(f"[bold]{part}[/]: {model} {'×'.join(map(str, shape))}")
    entries = []
    for contender in trial.contenders:
        alike = None
        if contender.expected is not None:
            alike = agreement(contender.call(), contender.expected())
            console.print(
                f"  {contender.method} by {contender.by}: cosine {alike['cosine']:.6f} with our "
                f"map, largest deviation {alike['deviation']:.1e} of its maximum"
            )
        entry: Entry = {
            "method": contender.method,
            "by": contender.by,
            "q": contender.q,
            "seconds": [],
            "agreement": alike,
        }
        entries.append(entry)
    times = measure(trial.contenders, rounds=settings.rounds, seconds=settings.seconds)
    for entry, seconds in zip(entries, times, strict=True):
        entry["seconds"] = seconds
    return {"part": part, "model": model, "input": shape, "entries": entries}


# --- comparisons --------------------------------------------------------------------------------


def by_method(measured: Subject, settings: Settings) -> Iterator[Trial]:
    """Every method, by us and by the peers."""
    for batch in measured.batches:
        explainer = settings.explainer(measured.path)
        x = photographs(batch, explainer.input)
        contenders, notes = all_contenders(
            explainer, x, settings.methods, passes=settings.passes, threads=settings.threads
        )
        yield Trial(x, contenders, notes)


def by_q(measured: Subject, settings: Settings) -> Iterator[Trial]:
    """RectGrad at many q, as it is, and with every convolution's transpose made dense."""
    explainer, dense = settings.explainer(measured.path), settings.explainer(measured.path)
    x = photographs(measured.typical_batch, explainer.input)
    contenders = [plain_forward(explainer.model, x, settings.threads, settings.backend)]
    for q in QUANTILES:
        contenders.append(explanation(explainer, x, "rectgrad", q=q))
        forced = explanation(dense, x, "rectgrad", by=DENSE, q=q)
        lowering = f"rectgrad_ref.executors.{settings.backend}"
        with mock.patch(f"{lowering}.DENSITY", 0.0):  # read when the first call lowers the plan
            forced.call()
        contenders.append(forced)
    yield Trial(x, contenders)


def by_batch(measured: Subject, settings: Settings) -> Iterator[Trial]:
    """RectGrad at batches 1, 2, 4 … up to the largest of the model."""
    explainer = settings.explainer(measured.path)
    for batch in (2**i for i in range(max(measured.batches).bit_length())):
        x = photographs(batch, explainer.input)
        yield _scaling(explainer, x, settings)


def by_size(measured: Subject, settings: Settings) -> Iterator[Trial]:
    """RectGrad on larger and larger images, where the network takes them."""
    for size in measured.sizes:
        model = onnx.load(measured.path)
        for extent in model.graph.input[0].type.tensor_type.shape.dim[2:]:
            extent.dim_value = size
        explainer = settings.explainer(model)
        yield _scaling(explainer, photographs(1, explainer.input), settings)


def _scaling(explainer: Explainer, x: np.ndarray, settings: Settings) -> Trial:
    forward = plain_forward(explainer.model, x, settings.threads, settings.backend)
    return Trial(x, [forward, explanation(explainer, x, "rectgrad")])


# --- processes of their own ---------------------------------------------------------------------


def cold_start(measured: Subject, settings: Settings) -> Iterator[Process]:
    """The first explanation of a process: with no compiled kernels, then with cached ones."""
    with tempfile.TemporaryDirectory() as cache:
        for what, starts in (("compiled", 1), ("cached", _COLD_STARTS)):
            environment = {"NUMBA_CACHE_DIR": cache}
            reports = [
                in_a_process("explain", measured, 1, settings, environment) for _ in range(starts)
            ]
            yield _process("cold", measured, 1, what, reports)


def memory(measured: Subject, settings: Settings) -> Iterator[Process]:
    """The peak of the forward pass that hands over all ReLU outputs, and of an explanation."""
    batch = max(measured.batches)
    in_a_process("explain", measured, batch, settings)  # so that compiling does not count
    for action in ("forward", "explain"):
        report = in_a_process(action, measured, batch, settings)
        yield _process("memory", measured, batch, action, [report])


def floor(measured: Subject, settings: Settings) -> Iterator[Process]:
    """On a GPU: each kernel's time over the least that moving its bytes takes."""
    if settings.backend != "cuda":
        return
    from .floor import per_kernel

    for batch in measured.batches:
        explainer = settings.explainer(measured.path)
        x = photographs(batch, explainer.input)
        for kernel, figures in per_kernel(explainer, x).items():
            yield _process("floor", measured, batch, kernel, [figures])


def in_a_process(
    action: str,
    measured: Subject,
    batch: int,
    settings: Settings,
    environment: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """What `child` reports."""
    path = measured.path.resolve()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npy"
        np.save(images, photographs(batch, input_spec(read_model(path))))
        command = [sys.executable, "-m", f"{__package__}.child", action, path, images]
        arguments = (settings.backend, settings.threads, time.time())
        done = subprocess.run(
            [*map(str, command), *map(str, arguments)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _process(
    part: str, measured: Subject, batch: int, what: str, reports: list[dict[str, Any]]
) -> Process:
    figures = {name: [report[name] for report in reports] for name in reports[0]}
    return {
        "part": part,
        "model": measured.name,
        "batch": batch,
        "what": what,
        "figures": figures,
    }


TRIALS: dict[str, Callable[[Subject, Settings], Iterator[Trial]]] = {
    "methods": by_method,
    "q": by_q,
    "batch": by_batch,
    "size": by_size,
}
PROCESSES: dict[str, Callable[[Subject, Settings], Iterator[Process]]] = {
    "cold": cold_start,
    "memory": memory,
    "floor": floor,
}
PARTS = (*TRIALS, *PROCESSES)
