"""Noise that depends on which sample and which pass it is for, and on nothing else."""

from __future__ import annotations

import numpy as np


def normal(seed: int, key: int, k: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers for pass `k` of the sample `key`.

    From Philox, a counter-based generator, keyed by all three: neither batching, nor chunking, nor
    the backend can change them.

    Returns
    -------
    numpy.ndarray of float64, shape `shape`
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(key, k))
    return np.random.Generator(np.random.Philox(sequence)).standard_normal(shape)
