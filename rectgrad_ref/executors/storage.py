"""Where a lowered plan keeps gradients, activations and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

LINE = 16  # floats of a cache line; a vector that lies across two is slow


def aligned(size: int, dtype: type) -> np.ndarray:
    """An array that begins with a cache line."""
    itemsize, line = np.dtype(dtype).itemsize, LINE * np.dtype(np.float32).itemsize
    raw = np.empty(size * itemsize + line, np.uint8)
    begin = -raw.ctypes.data % line
    return raw[begin : begin + size * itemsize].view(dtype)


@dataclass(eq=False)
class Storage:
    """Floats of an arena, and how many values still use them."""

    offset: int
    size: int
    users: int = field(default=0, kw_only=True)


class Arena:
    """Floats that are given out, taken back, and given out again.

    Attributes
    ----------
    size : int
        How many there have to be.
    """

    def __init__(self, alignment: int) -> None:
        self.size, self._alignment = 0, alignment
        self._free: list[tuple[int, int]] = []

    def take(self, floats: int) -> int:
        """Where so many begin: the first fit among what was given back."""
        size = self._aligned(floats)
        where = next((i for i, (_, length) in enumerate(self._free) if length >= size), None)
        if where is None:
            self.size += size
            return self.size - size
        offset, length = self._free.pop(where)
        if length > size:
            self._free.insert(where, (offset + size, length - size))
        return offset

    def give_back(self, offset: int, floats: int) -> None:
        """What was taken is free again."""
        merged: list[tuple[int, int]] = []
        for begin, length in sorted([*self._free, (offset, self._aligned(floats))]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((begin, length))
        self._free = merged

    def _aligned(self, floats: int) -> int:
        return -(-floats // self._alignment) * self._alignment


class WeightStore:
    """Weights as rows (C_out, kh, kw, C_in per group), and factors per channel, in one array."""

    def __init__(self) -> None:
        self._offsets: dict[tuple[str, str], int] = {}
        self._parts: list[np.ndarray] = []

    def add(self, name: str, use: str, make: Callable[[], np.ndarray]) -> int:
        """Where they begin; `make` is called the first time only."""
        if (name, use) not in self._offsets:
            # In this order, so that a fork at any moment leaves a whole store to the child.
            begin = sum(part.size for part in self._parts)
            self._parts.append(_in_lines(make()))
            self._offsets[name, use] = begin
        return self._offsets[name, use]

    @property
    def array(self) -> np.ndarray:
        """All of them; a later one begins with the same."""
        if len(self._parts) != 1:
            whole = aligned(sum(part.size for part in self._parts), np.float32)
            if self._parts:
                np.concatenate(self._parts, out=whole)
            self._parts = [whole]
        return self._parts[0]


def _in_lines(weights: np.ndarray) -> np.ndarray:
    """Flat, with zeros up to a whole cache line."""
    flat = np.ascontiguousarray(weights, np.float32).ravel()
    return np.pad(flat, (0, -flat.size % LINE))


class NoWeights(WeightStore):
    """For a program that is only looked at."""

    def add(self, name: str, use: str, make: Callable[[], np.ndarray]) -> int:
        return 0
