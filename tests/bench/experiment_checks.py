"""What the tests of both suites of experiments share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench.paper import report
from bench.paper.experiments import roar
from bench.paper.report import Suite
from bench.paper.runner import Experiment, run
from bench.paper.sources import Sources


def blobs(n: int, seed: int = 0) -> np.ndarray:
    """Smooth pictures (n, 3, 32, 32)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 3, 8, 8), np.uint8)
    return coarse.repeat(4, axis=2).repeat(4, axis=3)


def few_estimators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retrain with three of the eight."""
    every = roar.Roar.estimators

    def few(self: roar.Roar, seed: int = 0) -> dict[str, roar.Estimator]:
        return {
            n: e for n, e in every(self, seed).items() if n in ("Random", "RectGrad", "Saliency")
        }

    monkeypatch.setattr(roar.Roar, "estimators", few)


def run_and_report(
    suite: Suite, experiment: Experiment, sources: Sources, folder: Path
) -> dict[str, Any]:
    """The record of an experiment, which is checked and found in the report."""
    out = folder / "results"
    path = run(experiment, sources, work=folder / "work", out=out, console=Console(quiet=True))
    text = path.read_text("utf-8")
    record: dict[str, Any] = json.loads(text)
    assert record["experiment"] == experiment.name
    assert record["environment"]["versions"]["numpy"] == np.__version__
    assert record["environment"]["commits_of_units"] and record["inputs"]
    assert all((out / plot).stat().st_size > 1000 for plot in record["plots"])
    assert record["tables"] and record["numbers"] and "NaN" not in text
    report.write(suite, out, folder / "RESULTS.md")
    written = (folder / "RESULTS.md").read_text("utf-8")
    assert f"## {record['title']} ({record['figures']})" in written
    for claim in record["claims"]:
        assert f"- {'✓' if claim['holds'] else '✗'} {claim['text']}" in written
    return record


def assert_report_is_current(suite: Suite, folder: Path) -> None:
    """The published report is what the published numbers make."""
    for name in filter(None, (suite.name, suite.critics)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "results").symlink_to(suite.folder.parent / name / "results")
    destination = folder / suite.name / "RESULTS.md"
    report.write(suite, destination.parent / "results", destination)
    published = suite.folder / "RESULTS.md"
    assert destination.read_text("utf-8") == published.read_text("utf-8")
