"""The tests of CUDA code, on machines without a GPU: in Numba's simulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = [TESTS / "kernels" / "test_cuda.py", TESTS / "executors" / "test_launched.py"]


def test_cuda_code_runs_in_the_simulator() -> None:
    """In a process of its own: the variable decides when Numba is first imported."""
    pytest.importorskip("numba_cuda", reason="the simulator comes with numba-cuda")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, *map(str, FILES)],
        cwd=TESTS.parent,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
