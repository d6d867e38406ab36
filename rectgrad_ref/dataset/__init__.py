"""Maps of whole data sets: jobs that can be killed and go on, on one machine or a Ray cluster."""

from __future__ import annotations

from .job import explain_dataset
from .store import Store

__all__ = ["Store", "explain_dataset"]
