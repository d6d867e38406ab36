"""Runs the code blocks of a page, in order, in a folder with the files that they name."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import SkipTest

import numpy as np
import onnx
import pytest
from nets import Net, Op
from PIL import Image
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from typer.testing import CliRunner

from rectgrad_ref.cli import app

ROOT = Path(__file__).resolve().parents[2]


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **names: Any) -> dict[str, Any]:
    """Run every block of `page` in `folder`, with these `names` defined.

    Returns
    -------
    dict
        The names that its blocks leave.
    """
    write_files(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    parsers = (PythonCodeBlockParser(), CodeBlockParser("sh", shell), SkipParser())
    document = Sybil(parsers).parse(ROOT / page)
    document.namespace.update(names)
    for example in document.examples():
        with suppress(SkipTest):  # `<!-- skip: next "why" -->` on the page
            example.evaluate()
    found: dict[str, Any] = document.namespace
    return found


def shell(example: Example) -> None:
    """Commands, one a line; those of our own in this process, which has loaded what they need."""
    for line in example.parsed.splitlines():
        command, *arguments = shlex.split(line, comments=True) or [""]
        if command == "rectgrad" and "$(" not in line:
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}"
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True)


def write_files(folder: Path) -> None:
    """A small classifier, and pictures."""
    weights = np.random.default_rng(0).normal(size=(10, 3, 3, 3)).astype(np.float32)
    ops = (
        Op("Conv", "conv", ("x",), (weights,)),
        Op("Relu", "relu", ("conv",)),
        Op("GlobalAveragePool", "pool", ("relu",)),
        Op("Flatten", "scores", ("pool",)),
    )
    onnx.save(Net((3, 16, 16), ops).onnx(), folder / "model.onnx")
    for name in ("cat.jpg", "dog.jpg", "cat.png", "dog.png"):
        Image.effect_noise((90, 80), 50).convert("RGB").save(folder / name)
