"""The threads that one call may use."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Crew:
    """All threads of the process's pool, or the caller alone while another call has them.

    So calls from several threads never wait for each other, and never oversubscribe. A context
    manager.

    Attributes
    ----------
    size : int
        How many jobs run at once; they may wait for each other.
    """

    _lock = threading.Lock()
    _pool: ThreadPoolExecutor | None = None
    _workers = 0

    def __init__(self, size: int) -> None:
        self._owns = size > 1 and Crew._lock.acquire(blocking=False)
        self.size = size if self._owns else 1

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        if self._owns:
            Crew._lock.release()

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function` of every item, at once; at most `size` items.

        The caller only waits: an interrupt reaches it alone, and no item that others wait for.
        """
        if self.size == 1:
            return [function(item) for item in items]
        return list(self._threads().map(function, items))

    def _threads(self) -> ThreadPoolExecutor:
        if Crew._pool is None or Crew._workers < self.size:
            Crew._pool = ThreadPoolExecutor(self.size, thread_name_prefix="rectgrad")
            Crew._workers = self.size
        return Crew._pool


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def at_fork(function: Callable[[], None]) -> None:
    """Have a forked child begin with `function`, where there are forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def _forget() -> None:
    """A fork takes neither the threads nor the lock's holder along."""
    Crew._lock, Crew._pool, Crew._workers = threading.Lock(), None, 0


at_fork(_forget)
