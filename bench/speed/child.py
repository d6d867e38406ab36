"""A process of its own that loads a model, works and reports: for cold starts and peak memory.

`python -m bench.speed.child forward|explain MODEL IMAGES.npy BACKEND THREADS BORN`, BORN being the
time at which its parent started it.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Report:
    """Figures by name: seconds, and mebibytes."""

    def __init__(self, born: float) -> None:
        self.born = born
        self.figures: dict[str, float] = {}

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.figures[name] = time.perf_counter() - start
        return result


def peak_memory() -> float:
    """Of this process so far, in MiB.

    Linux's own count; that of `getrusage` also includes the memory of the parent before it became
    this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        peak = status.read_text().partition("VmHWM:")[2].split()[0]
        return int(peak) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def explain(report: Report, model: str, images: str, backend: str, threads: int) -> None:
    """RectGrad, twice."""
    rectgrad = report.timed("import", lambda: __import__("rectgrad_ref"))
    explainer = report.timed(
        "load", lambda: rectgrad.Explainer(model, backend=backend, threads=threads)
    )
    report.timed("plan", explainer.plan)

    import numpy as np

    x = np.load(images)
    report.figures["MiB before"] = peak_memory()
    report.timed("first", lambda: explainer.explain(x))
    report.figures["until first"] = time.time() - report.born
    report.timed("second", lambda: explainer.explain(x))


def forward(report: Report, model: str, images: str, backend: str, threads: int) -> None:
    """The forward pass that hands over all ReLU outputs, twice."""
    import numpy as np

    from rectgrad_ref.graph import freeze
    from rectgrad_ref.model import read_model

    from .contenders import exposed_forward

    loaded = read_model(model)
    x = np.load(images)
    contender = exposed_forward(loaded, freeze(loaded, x.shape), x, threads, backend)
    report.figures["MiB before"] = peak_memory()
    report.timed("first", contender.call)
    report.timed("second", contender.call)


if __name__ == "__main__":
    action, model, images, backend, threads, born = sys.argv[1:]
    report = Report(float(born))
    {"explain": explain, "forward": forward}[action](report, model, images, backend, int(threads))
    report.figures["MiB peak"] = peak_memory()
    print(json.dumps(report.figures))
