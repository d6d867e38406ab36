"""Verify another implementation of RectGrad against the reference, and say what differs."""

from __future__ import annotations

from .bundle import Bundle, InvalidBundle, load, make
from .certify import Certificate, certify
from .compare import Comparison, compare, engine_of
from .diagnose import Diagnosis, diagnose

__all__ = [
    "Bundle",
    "Certificate",
    "Comparison",
    "Diagnosis",
    "InvalidBundle",
    "certify",
    "compare",
    "diagnose",
    "engine_of",
    "load",
    "make",
]
