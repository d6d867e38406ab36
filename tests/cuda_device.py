"""On what the tests of CUDA code run: Numba's simulator, or a GPU.

The simulator is chosen by a variable that must be set before Numba is imported, so
`kernels/test_simulator.py` starts a process of its own for it, in every test run. Without the
variable the same tests are marked `gpu`.
"""

from __future__ import annotations

import os
import sys
from threading import Lock
from typing import Any

import numpy as np
import pytest

cuda = pytest.importorskip("numba.cuda")

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
MARKS = (
    []
    if SIMULATED
    else [pytest.mark.gpu, pytest.mark.skipif(not cuda.is_available(), reason="no CUDA device")]
)

if SIMULATED:
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    # Its threads are Python's, and wait for each other.
    sys.setswitchinterval(1e-5)
    _lock = Lock()

    def _one_array(self: Any, shape: int, dtype: type) -> np.ndarray:
        """The array of this line; threads that ask together must not each get one of their own."""
        caller = sys._getframe(1)
        with _lock:
            key = caller.f_code.co_filename, caller.f_lineno
            return self._allocations.setdefault(key, np.empty(shape, dtype))

    FakeCUDAShared.array = _one_array
