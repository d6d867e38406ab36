"""Threads that work on one array together, and meet at barriers of their own.

Numba's threading layers cost a launch for every loop, and none of them is at once everywhere
installed, safe for concurrent callers and safe across a fork. Here a team is entered once for a
whole backward pass: each member runs the same compiled code without the GIL, takes its share by its
number, and waits for the others by spinning on one cache line.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Layout of a barrier: how many have arrived, how often it has opened, what has been added up; on
# separate cache lines.
ARRIVED, OPENED, SUMMED, BARRIER_SIZE = 0, 16, 32, 48
_SPINS = 4000  # about 10 µs, after which the processor is offered to others


def new_barrier() -> np.ndarray:
    """A barrier for any number of threads that pass the same `members` to `wait`."""
    return np.zeros(BARRIER_SIZE, np.int64)


def _item(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return cgutils.get_item_pointer(
        context, builder, signature.args[0], array, [args[1]], wraparound=False
    )


@intrinsic
def _fetch_add(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        item = _item(context, builder, signature, args)
        return builder.atomic_rmw("add", item, args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), generate


@intrinsic
def _load(typing_context: Any, array: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_item(context, builder, signature, args), "acquire", 8)

    return types.int64(array, types.intp), generate


@intrinsic
def _store(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _item(context, builder, signature, args), "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), generate


@intrinsic
def _yield_processor(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        function = cgutils.get_or_insert_function(builder.module, kind, "sched_yield")
        return builder.call(function, [])

    return types.int32(), generate


@njit(nogil=True, cache=True)
def wait(barrier, members):
    """Return when all `members` threads have called; what they wrote before is then visible."""
    if members == 1:
        return
    opened = _load(barrier, OPENED)
    if _fetch_add(barrier, ARRIVED, 1) == members - 1:
        _store(barrier, ARRIVED, 0)
        _store(barrier, OPENED, opened + 1)
        return
    spins = 0
    while _load(barrier, OPENED) == opened:
        spins += 1
        if spins > _SPINS:
            _yield_processor()


@njit(nogil=True, cache=True)
def total(n, barrier, member, members):
    """The sum of all members' `n`, whole numbers; they meet."""
    if members == 1:
        return n
    _fetch_add(barrier, SUMMED, n)
    wait(barrier, members)
    result = _load(barrier, SUMMED)
    wait(barrier, members)
    if member == 0:
        _store(barrier, SUMMED, 0)
    wait(barrier, members)
    return result
