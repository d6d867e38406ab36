"""Vectors of sixteen, against NumPy on the same floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from rectgrad_ref.kernels import simd

LANES = simd.LANES
SPECIAL = np.array([0.0, -0.0, 1.5, -1.5, np.inf, -np.inf, np.nan, 1e-45], np.float32)


@njit
def comparisons(x, at, bound):  # type: ignore[no-untyped-def]
    lanes = simd.load(x, at)
    other = simd.splat(bound)
    return (
        simd.above(lanes, bound),
        simd.below(lanes, bound),
        simd.misses(lanes, bound),
        simd.differs(lanes, bound),
        simd.equals(lanes, other),
    )


@njit
def score(out, a, i, r, j, eps, sign):  # type: ignore[no-untyped-def]
    simd.store(out, 0, simd.score(simd.load(a, i), simd.load(r, j), eps, sign))


@njit
def keep(x, at, mask):  # type: ignore[no-untyped-def]
    simd.store(x, at, simd.keep(simd.load(x, at), mask))


@njit
def arithmetic(out, x, i, j, count):  # type: ignore[no-untyped-def]
    a, b = simd.load(x, i), simd.load(x, j)
    simd.store(out[0], 0, simd.add(a, b))
    simd.store(out[1], 0, simd.larger(a, b))
    simd.store(out[2], 0, simd.divide(a, count))


@njit
def append(numbers, values, end, x, at, first, mask):  # type: ignore[no-untyped-def]
    simd.append(numbers, end, simd.numbers_from(first), mask)
    simd.append(values, end, simd.load(x, at), mask)
    return end + simd.lanes_in(mask)


def word(lanes: Any) -> int:
    return sum(1 << i for i, lane in enumerate(lanes) if lane)


@pytest.fixture
def x() -> np.ndarray:
    return np.resize(SPECIAL, LANES + 5)


@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("bound", [np.float32(v) for v in (-1.5, 0.0, 1.0, np.inf, np.nan)])
def test_comparisons(x: np.ndarray, at: int, bound: np.float32) -> None:
    lanes = x[at : at + LANES]
    above, below, misses, differs, equals = comparisons(x, at, bound)
    assert above == word(lanes > bound)
    assert below == word(lanes < bound)
    assert misses == word(~(lanes >= bound))
    assert differs == word(lanes != bound)
    assert equals == word(lanes == bound)


def test_arithmetic(x: np.ndarray) -> None:
    out = np.empty((3, LANES), np.float32)
    arithmetic(out, x, 0, 3, np.float32(3))
    a, b = x[:LANES], x[3 : 3 + LANES]
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(out[0], a + b)
    np.testing.assert_array_equal(out[1], np.where(a > b, a, b))
    np.testing.assert_array_equal(out[2], a / np.float32(3))


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("eps", [np.float32(0), np.float32(0.5)])
def test_scores(magnitude: bool, eps: np.float32) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal(40).astype(np.float32)
    r = np.concatenate([rng.standard_normal(30).astype(np.float32), SPECIAL])
    with np.errstate(invalid="ignore"):
        expected = (a[3 : 3 + LANES] + eps) * r[22 : 22 + LANES]
    out = np.empty(LANES, np.float32)
    score(out, a, 3, r, 22, eps, np.uint32(0x7FFFFFFF if magnitude else 0xFFFFFFFF))
    np.testing.assert_array_equal(out, np.abs(expected) if magnitude else expected)


def test_what_a_mask_lacks_is_cleared(x: np.ndarray) -> None:
    mask = 0b1010_0101_1111_0000
    expected = x.copy()
    for i in range(LANES):
        if not mask >> i & 1:
            expected[2 + i] = 0
    keep(x, 2, np.uint64(mask))
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("mask", [0, 1, 2, 0x8000, 0xFFFF, 0b0101_0000])
def test_the_lanes_of_a_mask_are_appended(mask: int) -> None:
    x = np.arange(40, dtype=np.float32)
    numbers, values = np.full(30, -1, np.int32), np.full(30, -1, np.float32)
    end = append(numbers, values, 4, x, 7, 100, np.uint64(mask))
    lanes = [i for i in range(LANES) if mask >> i & 1]
    assert end == 4 + len(lanes)
    np.testing.assert_array_equal(numbers[4:end], [100 + i for i in lanes])
    np.testing.assert_array_equal(values[4:end], [7 + i for i in lanes])
    for array in (numbers, values):
        assert (array[:4] == -1).all() and (array[4 + LANES :] == -1).all()


WIDE = simd.WIDE * LANES
ADDERS = {
    (3, WIDE): simd.add_3_wide,
    (3, LANES): simd.add_3,
    (1, WIDE): simd.add_wide,
    (1, LANES): simd.add_1,
    **{(3, size): simd.add_3_last for size in (1, 9, 15)},
    **{(1, size): simd.add_last for size in (1, 9, 15)},
}


@pytest.mark.parametrize("window", ADDERS)
@pytest.mark.parametrize("terms", [1, 2, 7])
def test_rows_of_weights_are_added(window: tuple[int, int], terms: int) -> None:
    """Small integers, of which float32 makes no rounding errors."""
    adder, (rows, size) = ADDERS[window], window

    @njit
    def add(*arguments):  # type: ignore[no-untyped-def]
        adder(*arguments)

    rng = np.random.default_rng(size + terms)
    step, w_step, filters = size + 3, size + 2, 10
    out = rng.integers(-4, 5, 5 + rows * step + LANES).astype(np.float32)
    weights = rng.integers(-4, 5, (filters, rows, w_step)).astype(np.float32)
    channels = rng.integers(0, filters, terms + 4).astype(np.int32)
    values = rng.integers(-4, 5, terms + 4).astype(np.float32)
    expected = out.copy()
    cells = np.lib.stride_tricks.sliding_window_view(expected[5:], step, writeable=True)[::step]
    for c, v in zip(channels[2 : 2 + terms], values[2 : 2 + terms], strict=True):
        cells[:rows, :size] += v * weights[c, :, 1 : 1 + size]
    per_filter = rows * w_step
    flat = weights.ravel()
    add(out, 5, step, flat, 1, w_step, per_filter, size, channels, values, 2, 2 + terms)
    np.testing.assert_array_equal(out, expected)


@njit
def prefetch(x, at):  # type: ignore[no-untyped-def]
    simd.prefetch(x, at)


@pytest.mark.parametrize("at", [0, 10**6, -(10**6)])
def test_what_lies_outside_may_be_asked_for(at: int) -> None:
    prefetch(np.zeros(4, np.float32), at)


def test_integers_are_loaded_too() -> None:
    numbers, found = np.arange(40, dtype=np.int32), np.full(LANES, -1, np.int32)

    @njit
    def copy(x, to):  # type: ignore[no-untyped-def]
        simd.append(to, 0, simd.load(x, 7), np.uint64(0xFFFF))

    copy(numbers, found)
    np.testing.assert_array_equal(found, numbers[7 : 7 + LANES])
