"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run: a test that passes once passes again.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photos, models and data sets that development machines have."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no development data at {SHARED_DATA}")
    return SHARED_DATA
