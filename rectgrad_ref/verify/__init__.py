"""Verify another implementation of RectGrad against the reference, and say what differs."""

from .bundle import Bundle, InvalidBundle, load, make

__all__ = ["Bundle", "InvalidBundle", "load", "make"]
