"""Bundles that many tests read."""

from __future__ import annotations

import peer
import pytest

from rectgrad_ref.verify import Bundle


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """Three images, the defaults at q = 80; read only."""
    return peer.reference()
