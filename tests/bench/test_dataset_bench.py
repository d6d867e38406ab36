"""What a data-set job costs is measured and printed; how much it is, is not tested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import Weights, plain

from bench.dataset.__main__ import main

pytest.importorskip("onnxruntime")
pytest.importorskip("zarr")

pytestmark = pytest.mark.filterwarnings("ignore::rectgrad_ref.errors.RectGradWarning")


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = Weights(0)
    net = plain(w)
    onnx.save(net.onnx(), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", w.images(net, 5))
    main(tmp_path / "net.onnx", tmp_path / "x.npy", images=3, rounds=1, chunk_size=2, ray=False)
    said = capsys.readouterr().out
    for row in ("reading and preprocessing alone", "explaining alone, 2 threads", "job, 1 thread"):
        assert f"\n| {row}" in said
    assert said.count("| cpu | ") == said.count("| reference, float32 | ") == 4
    assert "| cpu | 128 | 0 of " in said
