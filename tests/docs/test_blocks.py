"""Every block of code in README.md, docs and bench runs, or the page says where else it does.

Those that need PyTorch: test_torch_blocks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import ROOT, run

from rectgrad_ref import Explainer
from rectgrad_ref.rules import OPERATORS
from rectgrad_ref.verify import load

NEEDS = {"docs/dataset.md": ("zarr", "pyarrow", "ray"),
         "docs/models/keras.md": ("keras", "tensorflow", "tf2onnx"),
         "docs/models/scikit-learn.md": ("sklearn", "skl2onnx")}  # fmt: skip
ELSEWHERE = {"docs/models/pytorch.md", "docs/models/timm.md"}
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "bench").rglob("*.md"),
    ]
)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_blocks(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    # docs/architecture.md registers its example anew.
    monkeypatch.setitem(OPERATORS, "Sinh", OPERATORS["Sinh"])
    run(page, tmp_path, monkeypatch, my_rectgrad=my_rectgrad)


def my_rectgrad(inputs: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """What docs/verify.md verifies."""
    bundle = load("bundle.npz")
    trace = Explainer("model.onnx").explain(inputs, target=target, trace=True)
    assert bundle.target.tolist() == target.tolist()
    return trace.values, {name: layer.R_out for name, layer in trace.layers().items()}
