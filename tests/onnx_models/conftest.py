"""Real data that several tests of this folder read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cifar10_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that contains the official `cifar-10-batches-py`."""
    folder = tmp_path_factory.mktemp("cifar10")
    unpack = shared_data / "cifar10" / "unpack.py"
    subprocess.run([sys.executable, unpack, folder], check=True, capture_output=True)
    return folder
