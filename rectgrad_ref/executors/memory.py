"""What the compiled walk writes to, kept from call to call, because fresh pages are slow."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from ..kernels import cpu as k
from ..kernels.team import new_barrier
from .blocked import room_of
from .lowered import ProgramMemory
from .storage import aligned

if TYPE_CHECKING:
    from .cpu import Program


class _Growing:
    """Arrays by name, as large as was ever asked for."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def take(self, name: str, size: int, dtype: type) -> np.ndarray:
        """`size` numbers of any value."""
        array = self._arrays.get(name)
        if array is None or array.size < size:
            array = self._arrays[name] = aligned(size, dtype)
        return array[:size]


class Scratch:
    """What one team collects nonzeros in."""

    def __init__(self) -> None:
        self._arrays = _Growing()
        self.shared = np.zeros(k.SHARED)
        self.barrier = new_barrier()

    def fit(self, program: Program, members: int) -> None:
        """Make room for the program's largest layer."""
        take, units, pixels = self._arrays.take, program.units, program.pixels
        self.lists = (
            take("pixels", pixels, np.int64),
            take("begins", pixels, np.int64),
            take("ends", pixels, np.int64),
            take("units", units, np.int32),
            take("values", units, np.float32),
            take("scores", units, np.float32),
            take("found", k.found_by(members), np.int64),
        )
        self.work = take("work", units, np.float32)

    def room(self, member: int, size: int) -> np.ndarray:
        """For what one member computes by itself."""
        return self._arrays.take(f"room {member}", size, np.float32)


class Memory(ProgramMemory):
    """Arenas and marks, activations, and scratch of every team."""

    def __init__(self) -> None:
        self._arrays = _Growing()
        self._scratches: dict[int, Scratch] = defaultdict(Scratch)

    def grow(self, program: Program) -> None:
        """Make room for the activations that the program reads."""
        self.active = self._arrays.take("active", program.active_size, np.float32)

    def place(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        """Where the forward pass shall write an activation."""
        return self.active[offset : offset + room_of(shape)]

    def arenas(self, program: Program, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Arenas and marks of so many samples."""
        arenas = self._arrays.take("arenas", count * program.arena_size, np.float32)
        touched = self._arrays.take("touched", count * program.touched_size, np.uint8)
        return (
            arenas.reshape(count, program.arena_size),
            touched.reshape(count, program.touched_size),
        )

    def scratch(self, team: int, members: int, program: Program) -> Scratch:
        """The scratch of one of the teams that are at work, and of so many members."""
        scratch = self._scratches[team]
        scratch.fit(program, members)
        return scratch
