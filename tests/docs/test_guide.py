"""What the pages say that code can check: options, presets, pictures."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from typing import Any

import pytest
from pages import ROOT

from rectgrad_ref import Explainer
from rectgrad_ref.methods import METHODS, Method
from rectgrad_ref.onnx_models import published

DOCS = ROOT / "docs"


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    import gallery

    return gallery


def section(page: str, heading: str) -> str:
    _, _, rest = (DOCS / page).read_text("utf-8").partition(f"\n## {heading}\n")
    return rest.partition("\n## ")[0]


def test_links_of_the_readme() -> None:
    """Those of the other pages are checked while the site is built."""
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text("utf-8"))
    local = [link for link in links if "://" not in link]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("method", METHODS)
def test_the_guide_names_every_option(method: str) -> None:
    named = set(re.findall(r"`(\w+)`", section("methods.md", method)))
    common = {field.name for field in fields(Method)}
    options = {field.name for field in fields(METHODS[method])} - common
    assert options <= named, options - named


def test_the_table_of_presets() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(.+)` \| `(.+)` \|$",
                      section("conventions.md", "Presets"), re.MULTILINE)  # fmt: skip
    table = {(method, option): theirs for method, option, _, theirs in rows}
    code = {
        (name, option): repr(value).replace("'", '"')
        for name, cls in METHODS.items()
        for option, value in cls.presets.get("authors", {}).items()
    }
    assert table == code
    for method, option, default, _ in rows:
        assert repr(getattr(METHODS[method](), option)).replace("'", '"') == default


def test_every_figure_is_made_by_the_script_and_shown(gallery: Any) -> None:
    shown = {
        name
        for page in DOCS.rglob("*.md")
        for name in re.findall(r"\]\(pictures/(\w+)\.png\)", page.read_text("utf-8"))
    }
    assert shown == set(gallery.FIGURES) == {p.stem for p in (DOCS / "pictures").glob("*.png")}


def test_what_the_gallery_says_of_its_drawings(gallery: Any) -> None:
    for network, bird in (("cifar10_cnn", "airplane"), ("cifar10_cnn_occluded", "bird")):
        pictures = [gallery.drawing(subject) for subject in gallery.SUBJECTS]
        found = Explainer(published.get(network), backend="reference").explain(pictures)
        names = [found.class_name(target) for target in found.target]
        assert names == [bird if s == "bird" else s for s in gallery.SUBJECTS]


@pytest.mark.slow
def test_the_figures_are_those_of_the_script(gallery: Any, tmp_path: Any) -> None:
    """To the eye: fonts and roundings differ between versions."""
    import numpy as np
    from PIL import Image

    gallery.write(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        made, kept = (
            np.asarray(Image.open(p).convert("RGB").resize((64, 64)), float)
            for p in (path, DOCS / "pictures" / path.name)
        )
        assert np.abs(made - kept).max() <= 8, path.name
