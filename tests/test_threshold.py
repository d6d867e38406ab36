"""The percentile against sorting with Python's own arithmetic, and the comparison against τ."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import slow
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rectgrad_ref import threshold
from rectgrad_ref.threshold import PERCENTILES, exceeds, grouped, nothing_passes, percentile, ranks

ties = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0])
finite = st.floats(-1e6, 1e6, width=32)
score_lists = st.lists(st.one_of(ties, finite), min_size=1, max_size=200)
percents = st.one_of(
    st.integers(0, 100).map(float), st.floats(0, 100), st.sampled_from([99.5, 97.5, 0.1])
)
conventions = st.sampled_from(PERCENTILES)


@given(score_lists, percents, conventions, st.sampled_from([np.float32, np.float64]))
@example([-2.0, 5e-45], 1.0, "higher", np.float32)
def test_percentile_equals_sorting(
    scores: list[float], q: float, convention: str, dtype: type
) -> None:
    rows = np.array([scores, scores[::-1]], dtype)
    expected = slow.threshold(rows[0].astype(np.float64).tolist(), q, convention)
    found = percentile(rows, q, convention)
    assert found.dtype == np.float64
    assert found.tolist() == [expected, expected]


@given(st.integers(1, 400), percents)
def test_tf_nearest_counts_from_the_top(n: int, q: float) -> None:
    # round half to even of the double (n − 1)·(1 − q/100), by exact rational arithmetic.
    exact = Fraction((n - 1) * (1.0 - q / 100.0))
    below = math.floor(exact)
    remainder = exact - below
    up = remainder > Fraction(1, 2) or (remainder == Fraction(1, 2) and below % 2 == 1)
    from_top = below + up
    assert ranks(n, q, "tf_nearest") == (n - 1 - from_top, n - 1 - from_top, 0.0)


@pytest.mark.parametrize(
    ("n", "tf", "numpy_"), [(25, 24, 24), (26, 24, 24), (76, 73, 74), (176, 171, 172), (1, 0, 0)]
)
def test_ties_at_98(n: int, tf: int, numpy_: int) -> None:
    """0-based ranks from below, worked out by hand.

    n = 76: 1.5000…01 from the top rounds to 2, so 73; 73.5 from the bottom is a tie, so 74.
    n = 176: 3.5000…03 rounds to 4, so 171; 171.5 is a tie, so 172.
    """
    assert ranks(n, 98.0, "tf_nearest")[0] == tf
    assert ranks(n, 98.0, "numpy_nearest")[0] == numpy_


@given(score_lists, percents)
@example(list(range(76)), 14.0)  # 75·14/100 = 10.5, but NumPy's 75·0.14 is just above
@example(list(range(151)), 7.0)
def test_nearest_is_numpys(scores: list[float], q: float) -> None:
    rows = np.array([scores])
    assert percentile(rows, q, "numpy_nearest")[0] == np.percentile(scores, q, method="nearest")


@given(
    score_lists,
    st.integers(0, 100),
    st.sampled_from(["lower", "higher", "midpoint", "linear"]),
)
def test_conventions_are_numpys(scores: list[float], q: int, convention: str) -> None:
    # NumPy multiplies n − 1 by the rounded q/100; where that gives the same position, it must give
    # the same percentile (its linear interpolation may differ by rounding).
    assume((len(scores) - 1) * (q / 100) == (len(scores) - 1) * q / 100)
    expected = np.percentile(scores, q, method=convention)
    rounding = 4 * np.finfo(float).eps * max(map(abs, scores))
    found = percentile(np.array([scores]), q, convention)
    assert found[0] == pytest.approx(expected, rel=0, abs=rounding)


@pytest.mark.parametrize("convention", PERCENTILES)
def test_extremes(convention: threshold.Percentile) -> None:
    scores = np.array([[3.0, -1.0, 0.0, 2.0]])
    assert percentile(scores, 0, convention) == [-1.0]
    assert percentile(scores, 100, convention) == [3.0]


@pytest.mark.parametrize("convention", PERCENTILES)
def test_all_zeros_and_one_unit(convention: threshold.Percentile) -> None:
    assert percentile(np.zeros((2, 50)), 98, convention).tolist() == [0.0, 0.0]
    assert percentile(np.array([[-4.0]]), 98, convention).tolist() == [-4.0]


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("q", [0, 1, 30, 60, 98, 100])
def test_long_rows_whose_scores_are_mostly_zero(zeros: float, q: float) -> None:
    rng = np.random.default_rng(0)
    scores = np.where(rng.random((2, 5000)) < zeros, 0, rng.standard_normal((2, 5000)))
    for convention in PERCENTILES:
        low, high, fraction = ranks(5000, q, convention)
        s = np.sort(scores, axis=1)
        expected = s[:, low] + (s[:, high] - s[:, low]) * fraction
        np.testing.assert_array_equal(percentile(scores, q, convention), expected)


def test_input_is_left_alone() -> None:
    scores = np.array([[3.0, 1.0, 2.0]])
    percentile(scores, 50)
    assert scores.tolist() == [[3.0, 1.0, 2.0]]


def test_interpolation_is_in_float64() -> None:
    # 1 and the next float32: no float32 lies between them.
    low, high = np.float32(1), np.nextafter(np.float32(1), np.float32(2))
    (tau,) = percentile(np.array([[low, high]]), 50, "linear")
    assert low < tau < high
    scores = np.array([[low, high]])
    assert exceeds(scores, np.sign(scores), np.array([tau])).tolist() == [[False, True]]


@given(
    hnp.arrays(np.float64, (3, 17), elements=st.one_of(ties, finite)),
    st.one_of(ties, finite),
    st.sampled_from(threshold.STRICTNESSES),
)
def test_exceeds_is_the_plain_comparison(
    scores: np.ndarray, tau: float, strictness: threshold.Strictness
) -> None:
    found = exceeds(scores, np.sign(scores), np.full(3, tau), strictness)
    expected = [[s > tau if strictness == ">" else s >= tau for s in row] for row in scores]
    assert found.tolist() == expected


KINDS = {
    "a*r": lambda a, r: a * r,
    "|a*r|": lambda a, r: abs(a * r),
    "a": lambda a, r: a,
    "r": lambda a, r: r,
    "(a+eps)*r": lambda a, r: (a + Fraction(2.0**-20)) * r,
}


@given(
    st.sampled_from(list(KINDS)),
    st.lists(
        st.tuples(st.floats(0, 2.0**99, width=32), st.floats(-(2.0**99), 2.0**99, width=32)),
        min_size=1,
        max_size=20,
    ),
)
def test_at_zero_the_sign_is_exact(kind: threshold.Score, pairs: list[tuple[float, float]]) -> None:
    """Compared with rational arithmetic, in which nothing underflows."""
    a, R = (np.array([pair[i] for pair in pairs], np.float32) for i in (0, 1))
    expected = [KINDS[kind](Fraction(x), Fraction(r)) > 0 for x, r in pairs]
    with np.errstate(all="ignore"):
        score = threshold.scores(kind, a, R, 2.0**-20)
        sign = threshold.signs(kind, a, R, 2.0**-20)
    assert exceeds(score[None], sign[None], np.zeros(1)).tolist() == [expected]


def test_underflow_in_float32() -> None:
    a, R = np.full(1, 1e-30, np.float32), np.full(1, 1e-30, np.float32)
    score, sign = threshold.scores("a*r", a, R), threshold.signs("a*r", a, R)
    assert score.tolist() == [0.0]
    assert exceeds(score[None], sign[None], np.zeros(1)).tolist() == [[True]]
    # At any other threshold the rounded scores decide, as in every framework.
    assert exceeds(score[None], sign[None], np.array([1e-300])).tolist() == [[False]]


def test_scores_are_rounded_to_the_compute_dtype() -> None:
    a, R = np.float32([1 / 3]), np.float32([3.3])
    assert threshold.scores("a*r", a, R).dtype == np.float32
    assert threshold.scores("(a+eps)*r", a, R, 1e-6).dtype == np.float32


def test_minus_infinity_lets_everything_pass() -> None:
    scores = np.float32([[-3e38, 0, 1]])
    assert exceeds(scores, np.sign(scores), np.array([-np.inf])).all()
    assert not exceeds(scores, np.sign(scores), np.array([np.inf])).any()


def test_groups_of_each_scope() -> None:
    values = np.arange(2 * 3 * 4).reshape(2, 3, 2, 2)
    assert grouped(values, 2, "sample").tolist() == [list(range(12)), list(range(12, 24))]
    assert grouped(values, 2, "channel")[4].tolist() == [16, 17, 18, 19]
    assert grouped(values, 2, "batch").tolist() == [list(range(24))]


@given(
    st.integers(1, 120),
    percents,
    conventions,
    st.sampled_from(threshold.STRICTNESSES),
    st.integers(0, 2**32 - 1),
)
def test_nothing_passes_is_what_happens(
    n: int, q: float, convention: threshold.Percentile, strictness: threshold.Strictness, seed: int
) -> None:
    scores = np.random.default_rng(seed).permutation(n)[None] + 1.0
    tau = percentile(scores, q, convention)
    passes = exceeds(scores, np.sign(scores), tau, strictness).any()
    assert nothing_passes(n, q, convention, strictness) is not bool(passes)


def test_26_units_keep_one_and_25_none() -> None:
    for n, kept in ((25, 0), (26, 1)):
        scores = np.arange(1.0, n + 1)[None]
        assert exceeds(scores, np.sign(scores), percentile(scores, 98)).sum() == kept
