"""Every CUDA kernel alone, against the NumPy rule that it stands for.

These tests run in Numba's simulator, with few threads a block, and with ``-m gpu`` on a GPU: see
`cuda_device`. Where sums are compared exactly, all numbers are small integers, of which float32
makes no rounding errors. What kernels write to begins as NaN, so that what they leave out cannot
stay unnoticed.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from cuda_device import MARKS, SIMULATED
from helpers import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from rectgrad_ref.executors import cuda as lowering
from rectgrad_ref.graph import Node
from rectgrad_ref.kernels import cuda as k
from rectgrad_ref.kernels.cpu import (
    BY_DIFFERENCE,
    BY_EPSILON,
    PASS_A_EPS_R,
    PASS_ABS_AR,
    PASS_ACTIVE,
    PASS_AR,
    PASS_BOTH,
    PASS_POSITIVE,
)
from rectgrad_ref.rules.declared import mask_border
from rectgrad_ref.rules.linear import conv_X
from rectgrad_ref.rules.pool import (
    average_pool_X,
    max_pool,
    max_pool_redistribute,
    max_pool_X,
)
from rectgrad_ref.rules.window import Window
from rectgrad_ref.threshold import (
    PERCENTILES,
    Score,
    at_rank,
    exceeds,
    percentile,
    ranks,
    scores,
    signs,
)

Array = np.ndarray
pytestmark = MARKS
SCORES: dict[int, Score] = {PASS_AR: "a*r", PASS_ABS_AR: "|a*r|", PASS_A_EPS_R: "(a+eps)*r"}
EPS = 0.25
THREADS = 3 if SIMULATED else 128
SAMPLES = 2 if SIMULATED else 5
EMPTY = np.zeros(1, np.float32)
GAP = 3  # floats between what belongs to different samples


def launch(kernel: Any, blocks: tuple[int, ...], threads: tuple[int, ...], *arguments: Any) -> None:
    """Arrays go to the device and come back; real numbers are float32 but for τ and fractions."""
    kernel[blocks, threads](*arguments)


def f32(value: float) -> np.float32:
    return np.float32(value)


class Arena:
    """An arena of gradients, one row a sample, with gaps of NaN."""

    def __init__(self) -> None:
        self.floats = np.full(GAP, np.nan, np.float32)

    def put(self, R: Array) -> tuple[int, int]:
        """Where the gradient (N, …) begins, and how far apart its samples are."""
        rows = R.reshape(len(R), -1)
        base, stride = self.floats.size, rows.shape[1] + GAP
        whole = np.full((len(R), stride), np.nan, np.float32)
        whole[:, : rows.shape[1]] = rows
        self.floats = np.append(self.floats, whole)
        return base, stride

    def room(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The same for what is to be computed."""
        return self.put(np.full(shape, np.nan, np.float32))

    def take(self, place: tuple[int, int], shape: tuple[int, ...]) -> Array:
        base, stride = place
        rows = self.floats[base : base + shape[0] * stride].reshape(shape[0], stride)
        units = int(np.prod(shape[1:]))
        assert np.isnan(rows[:, units:]).all(), "written between the samples"
        return rows[:, :units].reshape(shape).copy()


def integers(seed: int, *shape: int, high: int = 4, density: float = 0.6) -> Array:
    rng = np.random.default_rng(seed)
    values = rng.integers(-high, high + 1, shape) * (rng.random(shape) < density)
    return values.astype(np.float32)


# --- selection ------------------------------------------------------------------------------------


# Runs of a sample, and two ranks in it.
Places = tuple[int, int, int]
NO_SAMPLE: Places = (0, -1, 0)


def selected(*arguments: Any) -> Array:
    """τ of each sample; see `sieved`."""
    return sieved(*arguments)[0]


def sieved(
    a: Array, R: Array, mode: int, low: int, high: int, fraction: float, parts: int,
    sample: Places = NO_SAMPLE,
) -> tuple[Array, Array]:  # fmt: skip
    """τ of each sample, by one block or by several, and the bits of its units."""
    n, units = R.shape
    arena = Arena()
    place = arena.put(R)
    active = np.append(np.full(GAP, np.nan, np.float32), a)
    tau, values = np.full(n, np.nan), np.full(n * units, np.nan, np.float32)
    totals, sieve = np.zeros(n * k.TOTALS, np.int32), no_sieve(n, units)
    launch(
        k.select, (n, parts), (THREADS,), arena.floats, *place, active, GAP, units, mode, f32(EPS),
        units - 1 - low, units - 1 - high, fraction, tau, *sample, values, totals, sieve,
    )  # fmt: skip
    assert not totals.any()
    return tau, sieve


def bits(sieve: Array, units: int) -> Array:
    """Which units may pass."""
    n = sieve.size // -(-units // k.WORD)
    each = sieve.astype("<u4").view(np.uint8).reshape(n, -1)
    return np.unpackbits(each, axis=1, count=units, bitorder="little").astype(bool)


def no_sieve(n: int, units: int) -> Array:
    """Bits of units any of which may pass."""
    return np.full(n * -(-units // k.WORD), 2**32 - 1, np.uint32)


def scattered(seed: int, kind: str, units: int) -> tuple[Array, Array]:
    """Activations and gradients of several samples."""
    rng = np.random.default_rng(seed)
    a = np.maximum(rng.standard_normal((SAMPLES, units)), 0).astype(np.float32)
    R = rng.standard_normal((SAMPLES, units)).astype(np.float32)
    if kind == "ties":
        a, R = np.round(a * 2), np.round(R * 2)
    elif kind == "zero":
        R[:] = 0
    elif kind == "negative":
        R = -np.abs(R)
        a += 0.5
    elif kind == "sparse":
        R *= rng.random(R.shape) < 0.1
    elif kind == "extreme":
        R *= 10.0 ** rng.integers(-44, 38, R.shape)
        R[:, : units // 8] = np.inf
    elif kind == "not a number":
        R[0, rng.random(units) < 0.1] = np.nan
    return a.astype(np.float32), R.astype(np.float32)


KINDS = ("usual", "ties", "zero", "negative", "sparse", "extreme", "not a number")


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_are_those_of_the_reference(
    kind: str, parts: int, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = 67 if SIMULATED else 50_003
    monkeypatch.setattr(lowering, "SAMPLE", units // 4 - units // 4 % k.RUN)
    conventions = zip(PERCENTILES, (98.0, 50.0, 0.0, 100.0, 90.0, 75.0), strict=True)
    cases = list(itertools.product(SCORES, conventions))
    # The simulator takes its time: two scores and conventions of each kind.
    first = KINDS.index(kind) + 2 * parts + sampled
    for mode, (convention, q) in cases[first % 6 :: 8] if SIMULATED else cases:
        a, R = scattered(units + mode, kind, units)
        with np.errstate(all="ignore"):
            low, high, fraction = ranks(units, q, convention)
            own = (units - 1 - low, units - 1 - high)
            sample = lowering._sample(units, own) if sampled else NO_SAMPLE
            assert (sample[0] > 0) == sampled
            found, sieve = sieved(a, R, mode, low, high, fraction, parts, sample)
            score = scores(SCORES[mode], a, R, EPS)
            expected = percentile(score, q, convention)
        np.testing.assert_array_equal(found, expected, f"{SCORES[mode]} {convention}")
        passing = exceeds(score, signs(SCORES[mode], a, R, EPS), expected)
        assert bits(sieve, units)[passing].all()


@pytest.mark.parametrize("parts", [1, 3])
def test_few_units_are_left_to_be_looked_at(parts: int) -> None:
    units = 100 if SIMULATED else 50_000
    R = np.random.default_rng(0).permuted(np.arange(1, units + 1) * np.ones((SAMPLES, 1)), axis=1)
    a, R, rank = np.ones_like(R, np.float32), R.astype(np.float32), units - 3
    tau, sieve = sieved(a, R, PASS_AR, rank, rank, 0.0, parts, (units // 16, -1, 4))
    np.testing.assert_array_equal(tau, np.full(SAMPLES, rank + 1.0))
    left = bits(sieve, units)
    assert left[tau[:, None] < R].all()
    assert left.mean() < 0.5
    R[:, ::2] = 0
    sieve = sieved(a, R.astype(np.float32), PASS_AR, rank, rank, 0.0, parts)[1]
    np.testing.assert_array_equal(bits(sieve, units), R != 0)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", ["usual", "ties", "negative"])
def test_a_sample_that_misleads(kind: str, parts: int) -> None:
    """A score above what is listed, among it, and below it, from where it has to be looked for."""
    a, R = scattered(1, kind, 41)
    order = np.sort(a * R, axis=1)
    for rank, place in itertools.product(range(0, 41, 10), (0, 6, 13)):
        tau, sieve = sieved(a, R, PASS_AR, rank, rank, 0.0, parts, (5, place, place))
        np.testing.assert_array_equal(tau, order[:, rank])
        passing = exceeds(a * R, signs("a*r", a, R), tau)
        assert bits(sieve, 41)[passing].all()


SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, np.inf, -np.inf, np.nan], np.float32
)


@settings(max_examples=60 if SIMULATED else 500, deadline=None)
@given(st.data())
def test_any_sample_gives_the_same(data: st.DataObject) -> None:
    """Special numbers and ties, of any units, parts, ranks and conclusions from the sample."""
    units = data.draw(st.integers(1, 40))
    number = st.one_of(
        st.sampled_from(SPECIAL.tolist()), st.integers(-3, 3), st.floats(width=32)
    )  # fmt: skip
    R = np.array([data.draw(st.lists(number, min_size=units, max_size=units))], np.float32)
    low = data.draw(st.integers(0, units - 1))
    high = data.draw(st.sampled_from([low, min(low + 1, units - 1)]))
    runs = data.draw(st.integers(0, units // k.RUN))
    places = data.draw(st.tuples(*2 * [st.integers(-1, runs * k.RUN)]))
    parts = data.draw(st.integers(1, 3))
    with np.errstate(all="ignore"):
        found = selected(np.ones_like(R), R, PASS_AR, low, high, 0.25, parts, (runs, *places))
        below, above = (at_rank(R, rank) for rank in (low, high))
        expected = below if low == high else below + (above - below) * 0.25
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("units", [1, 2, 3])
def test_few_units(units: int) -> None:
    a, R = scattered(0, "usual", units)
    for rank in range(units):
        expected = np.sort(a * R, axis=1)[:, rank]
        parts = 1 + rank % 2
        np.testing.assert_array_equal(selected(a, R, PASS_AR, rank, rank, 0.0, parts), expected)


def test_neighbouring_floats_are_told_apart() -> None:
    """Scores that differ in the last bit only, in any of the digits, and in their sign."""
    bits = np.array(
        [0, 1, 2, 0x400, 0x401, 0x200000, 0x3F800000, 0x3F800001, 0x7F7FFFFF], np.uint32
    )
    values = bits.view(np.float32)
    R = np.concatenate([values, -values])[None].repeat(SAMPLES, 0)
    a = np.ones_like(R)
    for rank in range(1, R.shape[1], 4 if SIMULATED else 1):
        expected = np.sort(R, axis=1)[:, rank]
        np.testing.assert_array_equal(selected(a, R, PASS_AR, rank, rank, 0.0, 1), expected)


# --- activations ----------------------------------------------------------------------------------


def reference_mask(
    mode: int, a: Array, R: Array, tau: Array, ceiling: float, strict: bool
) -> Array:
    """What passes, of arrays (N, …)."""
    if mode in SCORES:
        n = len(a)
        arguments = (SCORES[mode], a, R, EPS)
        score, sign = scores(*arguments).reshape(n, -1), signs(*arguments).reshape(n, -1)
        mask = exceeds(score, sign, tau).reshape(a.shape)
        mask &= (a > 0) | (not strict)
    else:
        mask = {PASS_ACTIVE: a > 0, PASS_POSITIVE: R > 0, PASS_BOTH: (a > 0) & (R > 0)}[mode]
    return mask & ~(a >= ceiling)


SHAPES = [(3, 2, 5), (5, 4, 3), (1, 1, 1), (13, 1, 1), (2, 4, 3)]


@pytest.mark.parametrize(
    ("mode", "tau"),
    [*itertools.product(SCORES, [np.nan, -np.inf, -1.0, 0.0, 1.5]), (PASS_ACTIVE, 0.0),
     (PASS_POSITIVE, 0.0), (PASS_BOTH, 0.0)],
)  # fmt: skip
def test_what_passes_an_activation(mode: int, tau: float) -> None:
    for number, shape in enumerate(SHAPES[mode % 4 : mode % 4 + 2] if SIMULATED else SHAPES):
        a = np.maximum(integers(number, SAMPLES, *shape), 0)
        R = integers(number + 9, SAMPLES, *shape)
        R.flat[0] = np.nan if number == 1 else R.flat[0]
        ceiling, strict = (3.0, True) if number % 2 and mode != PASS_A_EPS_R else (np.nan, False)
        own = np.arange(SAMPLES) - 0.5
        threshold = own if np.isnan(tau) else np.full(SAMPLES, tau)
        mask = reference_mask(mode, a, R, threshold, ceiling, strict)
        sieve = no_sieve(SAMPLES, R[0].size)
        sieve ^= np.random.default_rng(number).integers(2**32, size=sieve.size, dtype=np.uint32)
        if np.isnan(tau):
            mask &= bits(sieve, R[0].size).reshape(R.shape)
        condition = (mode, f32(EPS), f32(ceiling), int(strict), tau, own)
        check_activation(a, R, mask, (*condition, sieve))
        border = number % 2
        inner = mask_border(mask) if border else mask
        found = listed(a, R, border, (*condition, sieve), groups=1 + number)
        np.testing.assert_array_equal(found, np.where(inner, R, 0))


def check_activation(a: Array, R: Array, mask: Array, condition: tuple[Any, ...]) -> None:
    arena = Arena()
    source, target = arena.put(R), arena.put(np.ones_like(R))
    active, units = a.ravel(), R[0].size
    for to, adds, before in ((target, 1, 1), (source, 0, 0)):
        launch(
            k.activate, (len(R), 2), (THREADS,), arena.floats, *source, active, 0, units,
            *condition, *to, adds,
        )  # fmt: skip
        np.testing.assert_array_equal(arena.take(to, R.shape), np.where(mask, R, 0) + before)


def listed(a: Array, R: Array, border: int, condition: tuple[Any, ...], groups: int) -> Array:
    """What `compact` lists, put back into an image; checks the order of the channels."""
    lists = compacted(a, R, border, condition, groups)
    counts, which, values = lists
    n, channels, height, width = R.shape
    result = np.zeros((n, height * width, channels), np.float32)
    for place, count in enumerate(counts):
        begin = place * channels
        own = which[begin : begin + count]
        assert (np.diff(own) > 0).all(), "not in the order of the channels"
        result.reshape(-1, channels)[place, own] = values[begin : begin + count]
    return result.transpose(0, 2, 1).reshape(R.shape)


def compacted(
    a: Array, R: Array, border: int, condition: tuple[Any, ...], groups: int
) -> tuple[Array, Array, Array]:
    n, channels, height, width = R.shape
    arena = Arena()
    source = arena.put(R)
    counts = np.full(n * height * width, -1, np.int32)
    which, values = np.full(R.size, -1, np.int32), np.full(R.size, np.nan, np.float32)
    launch(
        k.compact, (n, -(-height * width // 2)), (2, groups), arena.floats, *source, a.ravel(), 0,
        channels, height, width, border, *condition, counts, which, values,
    )  # fmt: skip
    return counts, which, values


ALL = (k.EVERYTHING, f32(0), f32(np.nan), 0, 0.0, np.zeros(SAMPLES), np.zeros(1, np.uint32))


def test_a_list_of_everything() -> None:
    R = integers(3, SAMPLES, 5, 3, 3)
    np.testing.assert_array_equal(listed(np.full_like(R, np.nan), R, 0, ALL, groups=2), R)


def test_small_products_pass_by_their_sign() -> None:
    """a · r underflows to 0, which τ = 0 does not exceed."""
    a = np.full((SAMPLES, 4, 1, 1), 1e-30, np.float32)
    R = np.full_like(a, 1e-30)
    R[:, ::2] = 0
    condition = (PASS_AR, f32(0), f32(np.nan), 0, 0.0, np.zeros(SAMPLES), np.zeros(1, np.uint32))
    np.testing.assert_array_equal(listed(a, R, 0, condition, groups=1), np.where(R > 0, R, 0))


@pytest.mark.parametrize("shared", [False, True])
def test_ratios(shared: bool) -> None:
    rng = np.random.default_rng(0)
    z, z0, R = (rng.standard_normal((SAMPLES, 11)).astype(np.float32) for _ in range(3))
    z[:, :3] = z0[:, :3]
    z[:, 3] = 0
    z0 = z0[:1] if shared else z0
    a, a0 = np.maximum(z, 0), np.maximum(z0, 0)
    eps = f32(0.01)
    large = np.abs(z - z0) > eps
    by_difference = np.where(large, (a - a0) / np.where(large, z - z0, 1), (z + z0) / 2 > 0)
    expected = {
        BY_EPSILON: R * a / (a + eps),
        BY_DIFFERENCE: R * by_difference.astype(np.float32),
    }
    for mode, result in expected.items():
        arena = Arena()
        active = np.concatenate([(a if mode == BY_EPSILON else z).ravel(), z0.ravel()])
        source, target = arena.put(R), arena.room(R.shape)
        launch(
            k.ratio, (SAMPLES, 2), (THREADS,), arena.floats, *source, active, 0, z.size,
            0 if shared else 11, 11, mode, eps, *target, 0,
        )  # fmt: skip
        np.testing.assert_array_equal(arena.take(target, R.shape), result)


# --- transposes of linear steps -------------------------------------------------------------------


def node(op: str, X: Array, *others: Array, **attributes: Any) -> Node:
    (found,) = (n for n in Case(op, (X, *others), attributes).graph().nodes if n.op == op)
    return found


CONVOLUTIONS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3 × 3": (1, (3, 5, 4), (4, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
    "1 × 1": (1, (5, 3, 2), (3, 5, 1, 1), {}),
    "strides": (1, (3, 6, 5), (2, 3, 3, 2), {"strides": [2, 3], "pads": [0, 1, 1, 2]}),
    "dilations": (1, (2, 6, 7), (3, 2, 2, 3), {"dilations": [3, 2], "pads": [2, 0, 1, 1]}),
    "strides beyond the kernel": (1, (2, 7, 7), (3, 2, 1, 2), {"strides": [3, 3]}),
    "groups": (2, (4, 4, 3), (6, 2, 2, 2), {"pads": [1, 0, 0, 1]}),
    "depthwise": (5, (5, 4, 4), (5, 1, 3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_transpose_is_that_of_a_convolution(name: str) -> None:
    group, image, kernel, attributes = CONVOLUTIONS[name]
    X, W = np.zeros((SAMPLES, *image), np.float32), integers(1, *kernel)
    conv = node("Conv", X[:1], W, group=group, **attributes)
    for density, adds in ((0.2, 0), (1.0, 1)):
        R = integers(2, SAMPLES, *conv.output_shapes[0][1:], density=density)
        R[0] *= density == 1  # a sample without nonzeros
        expected = np.concatenate([conv_X(conv, R[i : i + 1], W=W) for i in range(SAMPLES)])
        found = transposed(conv, R, W, X.shape, adds)
        np.testing.assert_array_equal(found, expected + adds)


def transposed(conv: Node, R: Array, W: Array, shape: tuple[int, ...], adds: int) -> Array:
    lists = compacted(np.zeros_like(R), R, 0, ALL, groups=1)
    window = Window.of(conv)
    arena = Arena()
    target = arena.put(np.ones(shape, np.float32)) if adds else arena.room(shape)
    weights = np.append(np.full(GAP, np.nan, np.float32), W.transpose(0, 2, 3, 1))
    _, channels, height, width = shape
    lanes, tile = (2, 3) if SIMULATED else (32, 32)
    blocks = (SAMPLES, -(-height * width // tile), -(-channels // lanes))
    launch(
        k.transpose, blocks, (lanes, 2), arena.floats, *target, adds, *shape[1:], *lists,
        *R.shape[1:], weights, GAP, W[0].size, *geometry(window), conv["group"], tile,
    )  # fmt: skip
    return arena.take(target, shape)


def geometry(window: Window) -> tuple[int, ...]:
    return (*window.kernel_shape, *window.strides, *window.dilations, *window.pads[:2])


@pytest.mark.parametrize("adds", [0, 1])
def test_add(adds: int) -> None:
    R, before = integers(0, SAMPLES, 3, 4, 3), integers(1, SAMPLES, 3, 4, 3)
    weights = np.array([np.nan, 2, -1, 3], np.float32)
    for factor, border in ((-1, 0), (1, 0), (-1, 1)):
        arena = Arena()
        source, target = arena.put(R), arena.put(before) if adds else arena.room(R.shape)
        launch(
            k.add, (SAMPLES, 3), (THREADS,), arena.floats, *source, *target, adds, R[0].size, 12,
            weights, factor, 4, 3, border,
        )  # fmt: skip
        expected = R if factor < 0 else R * weights[1:, None, None]
        expected = mask_border(expected) if border else expected
        found = arena.take(target, R.shape)
        np.testing.assert_array_equal(found, expected + before if adds else expected)


# --- pools ----------------------------------------------------------------------------------------

POOLS: dict[str, dict[str, Any]] = {
    "2 × 2": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "overlapping": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    "ceil": {"kernel_shape": [3, 2], "strides": [2, 3], "ceil_mode": 1},
    "uneven pads": {"kernel_shape": [2, 3], "strides": [1, 1], "pads": [0, 2, 1, 0]},
    "dilated": {"kernel_shape": [2, 2], "strides": [1, 2], "dilations": [2, 3]},
}


def pooled(op: str, name: str, height: int = 5, width: int = 4, **more: Any) -> tuple[Node, Array]:
    X = np.maximum(integers(len(name), SAMPLES, 2, height, width), 0)
    return node(op, X[:1], **POOLS[name], **more), X


@pytest.mark.parametrize("name", POOLS)
def test_max_pool_goes_to_the_first_maximum(name: str) -> None:
    pool, X = pooled("MaxPool", name)
    Y = np.concatenate([np.asarray(max_pool(pool, X[i : i + 1])) for i in range(SAMPLES)])
    R = integers(5, *Y.shape)
    expected = np.concatenate(
        [max_pool_X(pool, R[i : i + 1], X=X[i : i + 1], Y=Y[i : i + 1]) for i in range(SAMPLES)]
    )
    arena = Arena()
    source, target = arena.put(R), arena.room(X.shape)
    active = np.concatenate([X.ravel(), Y.ravel()])
    launch(
        k.max_pool, (SAMPLES, 2), (THREADS,), arena.floats, *source, active, 0, X.size, *target, 0,
        X[0].size, *X.shape[2:], *Y.shape[2:], *geometry(Window.of(pool)),
    )  # fmt: skip
    np.testing.assert_array_equal(arena.take(target, X.shape), expected)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("name", POOLS)
def test_average_pool_spreads_over_the_window(name: str, padding: int) -> None:
    pool, X = pooled("AveragePool", name, count_include_pad=padding)
    window = Window.of(pool)
    R = integers(6, SAMPLES, 2, *window.output)
    expected = average_pool_X(pool, R)
    arena = Arena()
    source, target = arena.put(R), arena.room(X.shape)
    padded = window.declared_input if padding else (0, 0)
    launch(
        k.spread, (SAMPLES, 2), (THREADS,), arena.floats, *source, EMPTY, -1, *padded, *target, 0,
        X[0].size, *X.shape[2:], *window.output, *geometry(window),
    )  # fmt: skip
    np.testing.assert_array_equal(arena.take(target, X.shape), expected)


@pytest.mark.parametrize("name", POOLS)
def test_proportional_redistribution(name: str) -> None:
    pool, X = pooled("MaxPool", name)
    window, eps = Window.of(pool), 1e-10
    R = integers(7, SAMPLES, 2, *window.output)
    expected = max_pool_redistribute(pool, R, X, eps)
    arena = Arena()
    source, between, target = arena.put(R), arena.room(R.shape), arena.room(X.shape)
    active, shape = X.ravel(), (*X.shape[2:], *window.output, *geometry(window))
    launch(
        k.share, (SAMPLES, 2), (THREADS,), arena.floats, *source, active, 0, f32(eps), *between,
        R[0].size, *shape,
    )  # fmt: skip
    launch(
        k.spread, (SAMPLES, 2), (THREADS,), arena.floats, *between, active, 0, -1, -1, *target, 0,
        X[0].size, *shape,
    )  # fmt: skip
    np.testing.assert_array_equal(arena.take(target, X.shape), expected)
