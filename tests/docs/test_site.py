"""The site builds without a warning, and asks no other server for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

LOADED = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if page.parent.name != "demo"]
    assert len(pages) > 15
    for page in pages:
        assert not LOADED.search(page.read_text("utf-8")), page


def test_formulas_are_mathml(site: Path) -> None:
    fences = (ROOT / "docs" / "methods.md").read_text("utf-8").count("```math")
    page = (site / "methods" / "index.html").read_text("utf-8")
    assert page.count("<math") == fences > 5
    assert "```" not in page and "\\frac" not in page


def test_pages_from_elsewhere_and_the_demo_are_there(site: Path) -> None:
    results = site / "bench" / "paper" / "RESULTS" / "index.html"
    (picture, *_) = re.findall(r'<img[^>]*src="([^"]+)"', results.read_text("utf-8"))
    assert (results.parent / picture).resolve().is_file()
    assert (site / "examples" / "verify" / "pytorch_rectgrad.py").is_file()
    assert (site / "demo" / "explainers.json").is_file()
