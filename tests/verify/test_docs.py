"""docs/verify.md: its programs and commands, run one after the other."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from typer.testing import CliRunner

from rectgrad_ref import Explainer
from rectgrad_ref.cli import app
from rectgrad_ref.verify.conformance import plain

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "verify.md"
BLOCKS = re.findall(r"^ *```(sh|python)\n(.*?)^ *```", GUIDE.read_text("utf-8"), re.M | re.S)


def my_rectgrad(x: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Without the padding trick."""
    options: Any = {"padding_trick": False, "trace": True, "target": target}
    found = Explainer("model.onnx").explain(x, **options)
    return found.values, {name: layer.R_out for name, layer in found.layers().items()}


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(plain(), "model.onnx")
    for i, name in enumerate(("cat.png", "dog.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)
        Image.fromarray(pixels).save(name)
    said = []
    for language, text in BLOCKS:
        lines = [line.strip() for line in text.splitlines()]
        if language == "python":
            indent = re.match(" *", text)
            assert indent is not None
            program = "\n".join(line[indent.end() :] for line in text.splitlines())
            exec(compile(program, str(GUIDE), "exec"), {"my_rectgrad": my_rectgrad})
            continue
        for line in lines:
            result = CliRunner().invoke(app, shlex.split(line)[1:])
            assert result.exit_code == ("compare" in line), result.output
            said.append(result.stdout)
    assert len(BLOCKS) == 5
    assert "The padding trick is missing." in said[1]
    assert all(Path(name).is_file() for name in ("bundle.npz", "report.html", "certificate.html"))
