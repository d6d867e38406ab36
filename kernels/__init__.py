"""Compiled kernels: arrays in, arrays out, no knowledge of graphs."""

import atexit
import shutil
import tempfile
import warnings

from numba import config, njit

# Numba keeps what it compiles beside the sources or in the user's cache, and refuses to start where
# it may write to neither, as in many containers.
try:
    njit(cache=True)(lambda: None)
except RuntimeError:
    config.CACHE_DIR = tempfile.mkdtemp(prefix="rectgrad_ref-")
    atexit.register(shutil.rmtree, config.CACHE_DIR, ignore_errors=True)
    warnings.warn(
        "no folder to keep compiled kernels in can be written to, so they are compiled anew each "
        "time; set NUMBA_CACHE_DIR to one that can",
        stacklevel=2,
    )
