"""What can go wrong, one class per remedy. Each message names the file or node and what to do."""

from __future__ import annotations


class RectGradError(Exception):
    """Base class of every error that this package raises on purpose."""


class InvalidModel(RectGradError, ValueError):
    """The model file cannot be read as an ONNX classifier."""


class UnsupportedOperator(RectGradError, NotImplementedError):
    """A node on the path from the input to the target has no forward or backward rule."""


class InvalidImage(RectGradError, ValueError):
    """An image or input array does not fit the model, or cannot be read."""


class InvalidTarget(RectGradError, ValueError):
    """The requested class does not exist in the model."""


class BackendUnavailable(RectGradError, RuntimeError):
    """The requested backend or execution provider is not installed."""


class OutOfMemory(RectGradError, MemoryError):
    """A device's memory does not hold what one chunk of samples takes."""


class DownloadError(RectGradError, OSError):
    """A file cannot be fetched, or is not the one that was expected."""


class OutputError(RectGradError, OSError):
    """A result cannot be written where it was asked for."""


class RectGradWarning(UserWarning):
    """A method does less than its name promises on this model; the message says where and why."""
