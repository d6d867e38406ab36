"""Traces that differ in a number only, made one: of two batch sizes, or of several passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .tensor import Record
from .trace import Trace

_BROADCAST = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Where", "And", "Or", "Greater", "Less"}


class DiffersByBatch(Exception):
    """The nodes for two batch sizes differ in more than the extent of the sample axis."""


def any_batch(two: Trace, three: Trace) -> Trace:
    """What differs between batches of two and three samples is the batch.

    Raises
    ------
    DiffersByBatch
        It cannot be left open.
    """
    return replace(two, records=_each(two.records, three.records))


def _each(two: Sequence[Record], three: Sequence[Record]) -> tuple[Record, ...]:
    if len(two) != len(three):
        raise DiffersByBatch
    return tuple(_merged(a, b) for a, b in zip(two, three, strict=True))


def _merged(a: Record, b: Record) -> Record:
    if (a.op, a.outputs, a.attributes) != (b.op, b.outputs, b.attributes):
        raise DiffersByBatch
    inputs = tuple(_one(a.op, x, y) for x, y in zip(a.inputs, b.inputs, strict=True))
    bodies = tuple(_each(x, y) for x, y in zip(a.bodies, b.bodies, strict=True))
    return replace(a, inputs=inputs, bodies=bodies)


def _one(op: str, x: str | np.ndarray, y: str | np.ndarray) -> str | np.ndarray:
    if isinstance(x, str) or isinstance(y, str):
        if not (isinstance(x, str) and x == y):
            raise DiffersByBatch
        return x
    if np.array_equal(x, y):
        return x
    if op == "Reshape" and x.shape == y.shape and np.sum(x != y) == 1:
        return np.where(x == y, x, -1)
    repeats = x.ndim == y.ndim and bool(np.all(x == x[:1])) and np.array_equal(x[:1], y[:1])
    if op in _BROADCAST and repeats:
        return x[:1]
    raise DiffersByBatch
