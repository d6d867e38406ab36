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
def above(x, at, bound):  # type: ignore[no-untyped-def]
    return simd.above(x, at, bound)


@njit
def below(x, at, bound):  # type: ignore[no-untyped-def]
    return simd.below(x, at, bound)


@njit
def nonzero(x, at):  # type: ignore[no-untyped-def]
    return simd.nonzero(x, at)


@njit
def score_above(a, i, r, j, eps, sign, bound):  # type: ignore[no-untyped-def]
    return simd.score_above(a, i, r, j, eps, sign, bound)


@njit
def keep(x, at, mask):  # type: ignore[no-untyped-def]
    simd.keep(x, at, mask)


@njit
def first_and_count(mask):  # type: ignore[no-untyped-def]
    return simd.lowest(mask), simd.lanes_in(mask)


def word(lanes: Any) -> int:
    return sum(1 << i for i, lane in enumerate(lanes) if lane)


@pytest.fixture
def x() -> np.ndarray:
    return np.resize(SPECIAL, LANES + 5)


@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("bound", [np.float32(v) for v in (-1.5, 0.0, 1.0, np.inf)])
def test_comparisons(x: np.ndarray, at: int, bound: np.float32) -> None:
    lanes = x[at : at + LANES]
    assert above(x, at, bound) == word(lanes > bound)
    assert below(x, at, bound) == word(lanes < bound)
    assert nonzero(x, at) == word(lanes != 0)


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("eps", [np.float32(0), np.float32(0.5)])
def test_scores(magnitude: bool, eps: np.float32) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal(40).astype(np.float32)
    r = np.concatenate([rng.standard_normal(30).astype(np.float32), SPECIAL])
    score = (a[3 : 3 + LANES] + eps) * r[22 : 22 + LANES]
    sign = np.uint32(0x7FFFFFFF if magnitude else 0xFFFFFFFF)
    # Scores themselves as bounds: each is rounded as NumPy rounds it.
    for bound in (np.float32(0), *score):
        expected = word((np.abs(score) if magnitude else score) > bound)
        assert score_above(a, 3, r, 22, eps, sign, bound) == expected


def test_what_a_mask_lacks_is_cleared(x: np.ndarray) -> None:
    mask = 0b1010_0101_1111_0000
    expected = x.copy()
    for i in range(LANES):
        if not mask >> i & 1:
            expected[2 + i] = 0
    keep(x, 2, np.uint64(mask))
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("mask", [1, 2, 0x8000, 0xFFFF, 0b0101_0000])
def test_lanes(mask: int) -> None:
    lowest, count = first_and_count(np.uint64(mask))
    assert mask >> lowest & 1
    assert not mask & ((1 << lowest) - 1)
    assert count == bin(mask).count("1")


ADDERS = {128: simd.add_128, 64: simd.add_64, 32: simd.add_32}
ADDERS |= {16: simd.add_16, 4: simd.add_4, 1: simd.add_1}


@pytest.mark.parametrize("size", ADDERS)
@pytest.mark.parametrize("terms", [1, 2, 7])
def test_rows_of_weights_are_added(size: int, terms: int) -> None:
    """Small integers, of which float32 makes no rounding errors."""
    adder = ADDERS[size]

    @njit
    def add(*arguments):  # type: ignore[no-untyped-def]
        adder(*arguments)

    rng = np.random.default_rng(size + terms)
    out, weights = (rng.integers(-4, 5, n).astype(np.float32) for n in (size + 9, 10 * size + 20))
    channels = rng.integers(0, 10, terms + 4).astype(np.int32)
    values = rng.integers(-4, 5, terms + 4).astype(np.float32)
    expected = out.copy()
    for c, v in zip(channels[2 : 2 + terms], values[2 : 2 + terms], strict=True):
        expected[5 : 5 + size] += v * weights[3 + c * size : 3 + (c + 1) * size]
    add(out, 5, weights, 3, size, channels, values, 2, 2 + terms)
    np.testing.assert_array_equal(out, expected)
