"""The pages that need PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import run

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")


def test_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("docs/models/pytorch.md", tmp_path, monkeypatch)


def test_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    run("docs/models/timm.md", tmp_path, monkeypatch)
