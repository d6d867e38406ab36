"""A team's barrier: nobody passes before everybody has come, and all see what was written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numba import njit

from rectgrad_ref.kernels.team import new_barrier, total, wait

ROUNDS = 300


@njit(nogil=True)
def pass_on(counters, seen, rounds, member, members, barrier):  # type: ignore[no-untyped-def]
    """Every round, each member counts, then looks at what its neighbour has counted."""
    for i in range(rounds):
        counters[member] += 1
        wait(barrier, members)
        seen[member, i] = counters[(member + 1) % members]
        wait(barrier, members)


@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_all_members_are_in_the_same_round(members: int) -> None:
    counters, seen = np.zeros(members, np.int64), np.zeros((members, ROUNDS), np.int64)
    barrier = new_barrier()
    with ThreadPoolExecutor(members) as pool:
        jobs = [
            pool.submit(pass_on, counters, seen, ROUNDS, i, members, barrier)
            for i in range(members)
        ]
        for job in jobs:
            job.result(timeout=60)
    np.testing.assert_array_equal(seen, np.tile(np.arange(1, ROUNDS + 1), (members, 1)))


def test_teams_do_not_meet_each_other() -> None:
    """Two teams of two at barriers of their own, the one with twice as many rounds."""
    with ThreadPoolExecutor(4) as pool:
        jobs = []
        for rounds in (ROUNDS, 2 * ROUNDS):
            barrier, counters = new_barrier(), np.zeros(2, np.int64)
            seen = np.zeros((2, rounds), np.int64)
            jobs += [pool.submit(pass_on, counters, seen, rounds, i, 2, barrier) for i in range(2)]
        for job in jobs:
            job.result(timeout=60)
    np.testing.assert_array_equal(seen[0], np.arange(1, 2 * ROUNDS + 1))


@njit(nogil=True)
def add_up(sums, rounds, member, members, barrier):  # type: ignore[no-untyped-def]
    for i in range(rounds):
        sums[member, i] = total(i * (member + 1), barrier, member, members)


@pytest.mark.parametrize("members", [1, 2, 3])
def test_every_member_knows_the_total(members: int) -> None:
    sums, barrier = np.zeros((members, ROUNDS), np.int64), new_barrier()
    with ThreadPoolExecutor(members) as pool:
        jobs = [pool.submit(add_up, sums, ROUNDS, i, members, barrier) for i in range(members)]
        for job in jobs:
            job.result(timeout=60)
    expected = np.arange(ROUNDS) * sum(range(1, members + 1))
    np.testing.assert_array_equal(sums, np.tile(expected, (members, 1)))
