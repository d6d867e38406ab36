"""Interleaved timing: every contender once a round, so that a disturbance meets all alike."""

from __future__ import annotations

import gc
import math
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# A timed block of calls takes at least this many seconds.
_BLOCK = 0.2
# onnxruntime's threads spin on for some 40 ms after its last call, beside whoever comes next.
_SETTLING = 0.1
_FEWEST_ROUNDS = 5


@dataclass(frozen=True, eq=False)
class Contender:
    """Something to be timed.

    Attributes
    ----------
    method : str
        An id of `rectgrad_ref.methods()`, or ``"forward"``.
    by : str
        Who computes it, and how.
    call : callable
        Computes it once and returns the map.
    passes : int
        Gradients in one call; times are stated for one.
    expected : callable, optional
        Computes what `call` should return; none where both are the same program, or draw noise.
    q : float, optional
        RectGrad's percentile, where it varies.
    """

    method: str
    by: str
    call: Callable[[], Any]
    passes: int = 1
    expected: Callable[[], Any] | None = None
    q: float | None = None


def measure(
    contenders: Sequence[Contender], *, rounds: int, seconds: float = math.inf
) -> list[list[float]]:
    """Time all contenders in turn, round by round, each round beginning with another one.

    A block of calls is timed; before it, at least one call and a tenth of a second of them go
    untimed, so that neither the caches nor the still spinning threads of the contender before
    count.

    Parameters
    ----------
    rounds : int
        How many at most.
    seconds : float
        After this time no new round begins, unless there were fewer than five.

    Returns
    -------
    list of list of float
        Of each contender, the seconds a pass took in each round.
    """
    blocks = [_calls_per_block(c.call) for c in contenders]
    times: list[list[float]] = [[] for _ in contenders]
    start = time.perf_counter()
    for r in range(rounds):
        if r >= _FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        gc.collect()
        for i in range(len(contenders)):
            i = (i + r) % len(contenders)
            call, (untimed, timed) = contenders[i].call, blocks[i]
            timeit.timeit(call, number=untimed)
            times[i].append(timeit.timeit(call, number=timed) / timed / contenders[i].passes)
    return times


def _calls_per_block(call: Callable[[], Any]) -> tuple[int, int]:
    """How many calls go untimed, and how many are timed; warms up."""
    call()  # plans, compiles and allocates
    once = timeit.timeit(call, number=1)
    return math.ceil(_SETTLING / once), math.ceil(_BLOCK / once)
