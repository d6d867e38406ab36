"""Where compiled kernels are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NOWHERE = """
from numba import config
from numba.core import caching

nothing = classmethod(lambda cls, function, file: None)
caching.InTreeCacheLocator.from_function = nothing
caching.UserWideCacheLocator.from_function = nothing

import rectgrad_ref.kernels.team
print(config.CACHE_DIR)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=True)


def test_without_a_folder_to_write_to_they_live_as_long_as_the_process() -> None:
    result = run(NOWHERE)
    folder = Path(result.stdout.strip())
    assert folder.name.startswith("rectgrad_ref-") and not folder.exists()
    assert "set NUMBA_CACHE_DIR" in result.stderr


def test_else_numba_decides() -> None:
    result = run("import rectgrad_ref.kernels, numba; print(repr(numba.config.CACHE_DIR))")
    assert result.stdout == "''\n" and result.stderr == ""
