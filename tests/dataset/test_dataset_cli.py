"""`rectgrad dataset`: what it prints, its exit codes, its bar."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from test_job import BROKEN, content
from typer.testing import CliRunner, Result

from rectgrad_ref import cli
from rectgrad_ref.dataset import Store

pytest.importorskip("pyarrow")
pytest.importorskip("zarr")


def rectgrad(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["dataset", *map(str, arguments)])


def test_a_job_and_the_same_again(model: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ("--backend", "reference", "-m", "saliency", "-t", "bee", "--chunk-size", 10)
    result = rectgrad(model, folder, "-o", out, *settings)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {out}: {25 - len(BROKEN)} maps\n"
    assert result.stderr == f"warning: 6 pictures have no map: see status in {out / 'table'}\n"
    written = content(out)
    shutil.rmtree(out / "table")
    again = rectgrad(model, folder, "-o", out, *settings, "--json")
    assert content(out) == written
    said = json.loads(again.stdout)
    assert (said["out"], said["images"], said["skipped"]) == (str(out), 25, len(BROKEN))
    assert said["job"] == Store(out).job
    assert said["job"]["target"] == 1


def test_options_reach_the_job(model: Path, folder: Path, tmp_path: Path) -> None:
    settings = ("--backend", "reference", "--dtype", "float32", "--precision", "float16")
    more = ("--batch-invariant", "--threads", 1, "--preprocess", "unit", "--set", "q=50", "-t", 2)
    assert rectgrad(model, folder, "-o", tmp_path / "out", *settings, *more).exit_code == 0
    job = Store(tmp_path / "out").job
    assert job is not None
    assert job["computation"]["batch_size"] == job["computation"]["threads"] == 1
    assert job["computation"]["dtype"] == "float32"
    assert job["maps"]["dtype"] == "float16"
    assert job["preprocess"]["value_range"] == [0, 1]
    assert (job["method"]["q"], job["target"]) == (50, 2)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--set", "q=50"), 2, "error: out was begun with other settings: method.q is 98.0"),
        (("-o", "no/where"), 2, "error: cannot write no/where: there is no folder no"),
        (("--preset", "authors", "-m", "smoothgrad"), 2, "error: smoothgrad: this convention"),
        (("--ray", "127.0.0.1:1"), 1, "error: no Ray cluster at 127.0.0.1:1"),
    ],
)
def test_errors(
    model: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--ray" in arguments:
        pytest.importorskip("ray")
    else:
        rectgrad(model, folder, "-o", "out", "--backend", "reference")
    result = rectgrad(model, folder, "-o", "out", "--backend", "reference", *arguments)
    assert result.exit_code == code
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 1


def test_the_bar_shows_number_rate_and_time_left(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Console(force_terminal=True, record=True, width=200)
    monkeypatch.setattr(cli, "Console", lambda **_: screen)
    settings = ("--backend", "reference", "--chunk-size", 5)
    assert rectgrad(model, folder, "-o", tmp_path / "out", *settings).exit_code == 0
    shown = screen.export_text()
    assert re.search(r"explaining .* 25/25 [\d.e+]+/s 0:00:00", shown), shown
