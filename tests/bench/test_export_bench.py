"""What exported explainers cost is measured and printed; how much it is, is not tested."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("onnxruntime")


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.export.__main__ import main

    main("cifar10_cnn", batch=2, methods="rectgrad,saliency", rounds=2)
    said = capsys.readouterr().out
    assert "| network | RectGrad | Saliency map |" in said
    assert re.search(r"^\| cifar10_cnn, B = 2 \(.* ms\) \| \d+\.\d\d \(.* \| \d", said, re.M), said
