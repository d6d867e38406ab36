"""On what the tests of CUDA code run: Numba's simulator, or a GPU.

The simulator is chosen by a variable that must be set before Numba is imported, so
`kernels/test_simulator.py` starts a process of its own for it, in every test run. Without the
variable the same tests are marked `gpu`.
"""

from __future__ import annotations

import math
import os
import sys
from threading import Barrier, BrokenBarrierError, Lock
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
    from numba.cuda.simulator import kernel, kernelapi

    class Block(kernel.BlockManager):
        """Threads that sleep while they wait, where the simulator's own ask for each other."""

        def run(self, place: tuple[int, ...], *arguments: Any) -> None:
            barrier = Barrier(math.prod(self._block_dim))

            def body() -> None:
                try:
                    self._f(*arguments)
                except BaseException:
                    barrier.abort()
                    raise

            threads = [
                kernel.BlockThread(body, self, place, index, self._debug)
                for index in np.ndindex(*self._block_dim)
            ]
            for thread in threads:
                thread.syncthreads = barrier.wait
                thread.start()
            for thread in threads:
                thread.join()
            failed = [thread.exception for thread in threads if thread.exception]
            for error, trace in sorted(failed, key=lambda e: isinstance(e[0], BrokenBarrierError)):
                raise error.with_traceback(trace)

    _lock = Lock()

    def _one_array(self: Any, shape: int, dtype: type) -> np.ndarray:
        """The array of this line; threads that ask together must not each get one of their own."""
        caller = sys._getframe(1)
        with _lock:
            key = caller.f_code.co_filename, caller.f_lineno
            return self._allocations.setdefault(key, np.empty(shape, dtype))

    kernel.BlockManager = Block
    kernelapi.FakeCUDAShared.array = _one_array
