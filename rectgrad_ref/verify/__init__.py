"""Verify another implementation of RectGrad against the reference, and say what differs."""

from __future__ import annotations

from .bundle import Bundle, InvalidBundle, load, make
from .compare import Comparison, compare, engine_of
from .diagnose import Diagnosis, diagnose

__all__ = [
    "Bundle",
    "Comparison",
    "Diagnosis",
    "InvalidBundle",
    "compare",
    "diagnose",
    "engine_of",
    "load",
    "make",
]
