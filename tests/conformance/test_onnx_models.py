"""Models that PyTorch exported, against the outputs stored with them and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from model_cases import FOLDERS, read


@pytest.mark.parametrize("name", FOLDERS)
def test_model(name: str) -> None:
    """Outputs in float64 and float32, and gradients against finite differences."""
    case = read(name)
    case.check_forward()
    if case.varied:  # the words of an embedding, and numbers that are added to integers, are not
        case.check_backward()


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # roots of negative numbers
def test_onnxruntime_agrees(name: str) -> None:
    pytest.importorskip("onnxruntime")
    case = read(name)
    if case.dtypes[-1] != np.float32:
        pytest.skip("stored outputs beyond the range of float32")
    assert case.check_onnxruntime()
