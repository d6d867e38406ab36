"""Every operation of the table alone, against the NumPy rule that it stands for.

Arenas begin as NaN, so that a row that nobody has touched cannot be read unnoticed. Where sums are
compared exactly, all numbers are small integers, of which float32 makes no rounding errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers import Case, generators, quick, reach, windows
from hypothesis import given, settings
from hypothesis import strategies as st

from rectgrad_ref.executors.cpu import NEVER, Columns, Sheet, Storage, array_of
from rectgrad_ref.graph import Node
from rectgrad_ref.kernels import cpu as k
from rectgrad_ref.kernels.team import new_barrier
from rectgrad_ref.rules.declared import Call, MaxPoolBackward, Rectify, Rule, mask_border
from rectgrad_ref.rules.linear import conv_X
from rectgrad_ref.rules.pool import average_pool_X
from rectgrad_ref.rules.window import Window
from rectgrad_ref.threshold import PERCENTILES, percentile, ranks, scores

Array = np.ndarray
Row = tuple[int, Columns, dict[int, float]]
EMPTY = np.zeros(0, np.float32)
TEAMS = (1, 2, 3)


class Bench:
    """The arena of one sample, with sheets to put arrays (C, H, W) into."""

    def __init__(self) -> None:
        self.arena, self.touched = np.zeros(0, np.float32), np.zeros(0, np.uint8)

    def sheet(self, shape: Sequence[int], *, before: int = 0, after: int = 0) -> Sheet:
        """Untouched; between `before` and `after` channels of others."""
        c, h, w = shape
        stride = before + c + after
        storage = Storage(self.arena.size, h * w * stride, self.touched.size)
        self.arena = np.append(self.arena, np.full(storage.size, np.nan, np.float32))
        self.touched = np.append(self.touched, np.zeros(h * w, np.uint8))
        return Sheet(storage, before, stride, h, w, c)

    def put(self, image: Array, **around: int) -> Sheet:
        """A sheet that holds `image`; pixels that are zero throughout stay untouched."""
        sheet = self.sheet(image.shape, **around)
        rows = self.rows(sheet)
        flat = image.reshape(len(image), -1).T
        touched = flat.any(axis=1)
        rows[touched] = 0
        rows[touched, sheet.first : sheet.first + sheet.channels] = flat[touched]
        self.marks(sheet)[:] = touched
        return sheet

    def get(self, sheet: Sheet) -> Array:
        shape = (sheet.channels, sheet.height, sheet.width)
        return np.asarray(array_of(sheet, self.arena[None], self.touched[None], shape))

    def rows(self, sheet: Sheet) -> Array:
        """All channels of the sheet's storage, (pixels, stride)."""
        begin = sheet.storage.offset
        return self.arena[begin : begin + sheet.storage.size].reshape(sheet.pixels, sheet.stride)

    def marks(self, sheet: Sheet) -> Array:
        return self.touched[sheet.storage.touched : sheet.storage.touched + sheet.pixels]

    def run(
        self, *rows: Row, active: Array = EMPTY, weights: Array = EMPTY, members: int = 1
    ) -> tuple[int, Array]:
        """Run the rows by a team; where it stopped, and the words that the team shared."""
        stopped = np.zeros(1, np.int64)
        shared = advance(
            rows, stopped, [0], self.arena[None], self.touched[None], active, weights, members
        )
        return int(stopped[0]), shared


def advance(
    table: Sequence[Row],
    rows: Array,
    samples: Sequence[int],
    arenas: Array,
    touched: Array,
    active: Array = EMPTY,
    weights: Array = EMPTY,
    members: int = 1,
) -> Array:
    """Let a team call the kernel; the words that it shared."""
    pixels, units = max(1, touched.shape[1]), max(1, arenas.shape[1])
    lists = (
        *np.full((3, pixels), -(10**6)),
        np.full(units, -(10**6), np.int32),
        *np.full((2, units), np.nan, np.float32),
        np.full(k.found_by(members), -(10**6)),
    )
    work = np.empty(units, np.float32)
    shared = np.full(k.SHARED, np.nan)
    memory = (arenas, touched, active, weights, lists, work, shared)
    team = (members, new_barrier())
    arguments = (*_table(table), 0, rows, np.array(samples), *memory)
    with ThreadPoolExecutor(members) as pool:
        jobs = [pool.submit(k.advance, *arguments, member, *team) for member in range(members)]
        for job in jobs:
            job.result(timeout=300)
    return shared


def _table(rows: Sequence[Row]) -> tuple[Array, Array]:
    table = np.zeros((len(rows), k.COLUMNS), np.int64)
    floats = np.zeros((len(rows), k.FLOATS))
    for i, (operation, columns, numbers) in enumerate(rows):
        table[i, k.OP] = operation
        table[i, list(columns)] = list(columns.values())
        floats[i, list(numbers)] = list(numbers.values())
    return table, floats


def laid_out(image: Array, *, blocked: bool) -> tuple[Array, Columns]:
    """Activations (C, H, W), channels last or in blocks, flat; and where they lie."""
    channels, height, width = image.shape
    if not blocked:
        return last(image), {k.A_STRIDE: channels, k.A_STEP: 1}
    filled = np.full((-(-channels // 16) * 16, height, width), np.nan, np.float32)
    filled[:channels] = image
    blocks = filled.reshape(-1, 16, height, width).transpose(0, 2, 3, 1)
    return blocks.ravel(), {k.A_STRIDE: 16, k.A_STEP: height * width}


def last(image: Array) -> Array:
    """(C, H, W) → channels last, flat."""
    return np.ascontiguousarray(image.transpose(1, 2, 0)).ravel()


def integers(rng: np.random.Generator, *shape: int, density: float = 1.0) -> Array:
    """From −3 to 3 as float32; about `density` of them are not forced to zero."""
    values = rng.integers(-3, 4, shape) * (rng.random(shape) < density)
    return values.astype(np.float32)


def normal(rng: np.random.Generator, *shape: int, density: float = 1.0) -> Array:
    values = rng.standard_normal(shape) * (rng.random(shape) < density)
    return values.astype(np.float32)


def node_of(case: Case) -> Node:
    return next(node for node in case.graph().nodes if node.op == case.op)


def window_columns(node: Node) -> Columns:
    window = Window.of(node)
    names = (k.KH, k.KW, k.SH, k.SW, k.DH, k.DW, k.TOP, k.LEFT)
    values = (*window.kernel_shape, *window.strides, *window.dilations, *window.pads[:2])
    padded = window.declared_input
    return dict(zip(names, values, strict=True)) | {k.PADDED_H: padded[0], k.PADDED_W: padded[1]}


def bound(terms: int, expected: Array) -> float:
    """How far float32 may be from float64 (SPEC section 5)."""
    relative = 1e-6 if terms <= 1024 else 2 * np.sqrt(terms) * 2.0**-24
    return float(relative * np.abs(expected).max())


densities = st.sampled_from([0.0, 0.05, 0.3, 1.0])


# --- convolutions ---------------------------------------------------------------------------------


def scattered(
    node: Node,
    R: Array,
    W: Array,
    *,
    before: Array | None = None,
    border: bool = False,
    around: tuple[int, int] = (0, 0),
    members: int = 1,
    dense: int = NEVER,
) -> Array:
    """What the target's sheet holds, if it held `before`, after COMPACT, LIST and SCATTER."""
    bench = Bench()
    source = bench.put(R, before=around[0], after=around[1])
    shape = node.input_shapes[0][1:]
    target = bench.sheet(shape) if before is None else bench.put(before)
    geometry = window_columns(node) | {k.GROUP: node["group"], k.BORDER: int(border)}
    rows = (
        (k.COMPACT, source.source | {k.DENSE: NEVER}, {}),
        (k.LIST, source.source, {}),
        (k.SCATTER, source.source | target.target | geometry | {k.DENSE: dense}, {}),
    )
    weights = np.ascontiguousarray(W.transpose(0, 2, 3, 1)).ravel()
    assert bench.run(*rows, weights=weights, members=members)[0] == 3
    return bench.get(target)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Node, Array, np.random.Generator]:
    """A Conv node, its weights, and random numbers to go on with."""
    window = draw(windows(2))
    group = draw(st.sampled_from([1, 1, 2, 3, 5]))
    per_group, maps = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    spatial = [n + draw(st.integers(0, 4)) for n in reach(window)]
    rng = draw(generators())
    X = np.zeros((1, group * per_group, *spatial), np.float32)
    W = integers(rng, group * maps, per_group, *window["kernel_shape"])
    case = Case("Conv", (X, W), {"group": group, **window}, constant=frozenset({1}))
    return node_of(case), W, rng


@settings(quick, max_examples=60)
@given(
    convolutions(),
    densities,
    densities,
    st.booleans(),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.sampled_from(TEAMS),
)
def test_scatter_is_the_transpose_of_a_convolution(
    convolution: tuple[Node, Array, np.random.Generator],
    density: float,
    filled: float,
    border: bool,
    around: tuple[int, int],
    members: int,
) -> None:
    node, W, rng = convolution
    R = integers(rng, *node.output_shapes[0][1:], density=density)
    before = integers(rng, *node.input_shapes[0][1:], density=filled)
    found = scattered(node, R, W, before=before, border=border, around=around, members=members)
    arrives = mask_border(R[None]) if border else R[None]
    expected = before + conv_X(node, arrives.astype(np.float64), W=W.astype(np.float64))[0]
    np.testing.assert_array_equal(found, expected)


def large(
    channels: int, maps: int, *, group: int = 1, size: int = 9, **attributes: Any
) -> tuple[Node, Array, Array]:
    rng = np.random.default_rng(channels + maps)
    X = np.zeros((1, channels, size, size), np.float32)
    W = normal(rng, maps, channels // group, 3, 3)
    attributes = {"pads": [1, 1, 1, 1], "group": group, **attributes}
    node = node_of(Case("Conv", (X, W), attributes, constant=frozenset({1})))
    return node, W, normal(rng, *node.output_shapes[0][1:])


LARGE = {
    "rows": large(12, 40),
    "strided": large(16, 40, strides=[2, 2]),
    "dilated": large(16, 40, dilations=[1, 2]),
    "channels": large(200, 24),
    "channels, dilated": large(193, 24, size=7, dilations=[2, 1]),
    "many terms": large(6, 200),
    "grouped": large(12, 24, group=3),
    "depthwise": large(24, 24, group=24),
}


@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("name", LARGE)
def test_scatter_sums_as_exactly_as_required(name: str, density: float) -> None:
    """…and every float in one order, whatever the size of the team."""
    node, W, R = LARGE[name]
    R = np.where(np.random.default_rng(0).random(R.shape) < density, R, np.float32(0))
    one, *others = (scattered(node, R, W, members=members) for members in TEAMS)
    expected = conv_X(node, R[None].astype(np.float64), W=W.astype(np.float64))[0]
    assert np.abs(one - expected).max() <= bound(9 * len(R) // node["group"], expected)
    for other in others:
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("members", TEAMS)
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("border", [False, True])
def test_a_scatter_of_too_many_is_left_undone(border: bool, listed: bool, members: int) -> None:
    """Its source holds what arrived, in whole rows; the target is as it was.

    What the padding trick forgets is not counted in a list, but still there. Without a list, it is
    known to be too many before.
    """
    node, _, R = LARGE["rows"]
    R = R * (np.random.default_rng(0).random(R.shape) < 0.01)
    R[:, 3, 4:] = R[:, 0] = 0
    R[0, 0, 0] = 1
    count = np.count_nonzero(mask_border(R[None])[0] if border else R)
    assert 0 < count < R.size / 50
    bench = Bench()
    source, target = bench.put(R, before=2, after=3), bench.sheet(node.input_shapes[0][1:])
    geometry = window_columns(node) | {k.GROUP: 1, k.BORDER: int(border), k.DENSE: count - 1}
    rows = (
        (k.COMPACT, source.source | {k.DENSE: NEVER if listed else count - 1}, {}),
        (k.LIST, source.source, {}),
        (k.SCATTER, source.source | target.target | geometry, {}),
        (k.STOP, {}, {}),
    )
    assert bench.run(*rows, weights=EMPTY, members=members)[0] == 2
    np.testing.assert_array_equal(bench.get(source), R)
    assert bench.marks(source).all()
    assert not bench.marks(target).any()
    assert np.isfinite(bench.rows(source)).all(), "the channels of others hold no numbers"


# --- pools ----------------------------------------------------------------------------------------


@st.composite
def pools(draw: st.DrawFn, op: str, **attributes: Any) -> tuple[Node, np.random.Generator]:
    window = draw(windows(2, pool=True))
    window["ceil_mode"] = draw(st.integers(0, 1)) if "pads" in window else 0
    spatial = [n + draw(st.integers(0, 4)) for n in reach(window)]
    X = np.zeros((1, draw(st.integers(1, 20)), *spatial), np.float32)
    return node_of(Case(op, (X,), {**window, **attributes})), draw(generators())


@settings(quick, max_examples=60)
@given(
    pools("MaxPool"),
    densities,
    densities,
    st.sampled_from([1, 2, 50]),
    st.lists(st.integers(0, 20), max_size=2),
    st.booleans(),
    st.sampled_from(TEAMS),
)
def test_max_pool_goes_to_the_first_maximum(
    pool: tuple[Node, np.random.Generator],
    density: float,
    filled: float,
    distinct: int,
    cuts: list[int],
    blocked: bool,
    members: int,
) -> None:
    """Of few distinct values, so that maxima tie; the channels in up to three parts."""
    node, rng = pool
    shape = node.input_shapes[0][1:]
    x = rng.integers(-distinct, distinct, shape).astype(np.float32)
    R = integers(rng, *node.output_shapes[0][1:], density=density)
    before = integers(rng, *shape, density=filled)
    bench = Bench()
    source, target = bench.put(R, after=1), bench.put(before)
    edges = sorted({0, shape[0], *(min(cut, shape[0]) for cut in cuts)})
    rows: list[Row] = []
    parts: list[Array] = []
    for first, end in itertools.pairwise(edges):
        columns = source.source | target.target | window_columns(node)
        part, layout = laid_out(x[first:end], blocked=blocked)
        columns |= {k.C_FIRST: first, k.C_LAST: end, **layout}
        columns[k.A_OFFSET] = sum(part.size for part in parts)
        rows.append((k.MAX_POOL, columns, {}))
        parts.append(part)
    bench.run(*rows, active=np.concatenate(parts), members=members)
    values = {"x": x[None], "y": _maxima(node, x)}
    expected = before + _applied(MaxPoolBackward("first"), node, R, values)
    np.testing.assert_array_equal(bench.get(target), expected)


def _maxima(node: Node, x: Array) -> Array:
    window = Window.of(node)
    padded = window.pad(x[None], -np.inf)
    return np.max([padded[place] for _, place in window.offsets()], axis=0)


def _applied(rule: Rule, node: Node, R: Array, values: dict[str, Array]) -> Array:
    """The rule in NumPy, for one sample; the node's input is called x and its output y."""
    names = {node.inputs[0]: values["x"], node.outputs[0]: values["y"]}
    return rule(Call(node, 0, (R[None],), names, {}, 1))[0]


def test_max_pool_of_a_window_that_sees_only_padding() -> None:
    """Dilation 2 over one cell with one cell of padding at both sides: there is no maximum."""
    window = {"kernel_shape": [2, 1], "dilations": [2, 1], "pads": [1, 0, 1, 0]}
    node = node_of(Case("MaxPool", (np.ones((1, 2, 1, 3), np.float32),), window))
    bench = Bench()
    source, target = bench.put(np.ones((2, 1, 3), np.float32)), bench.sheet((2, 1, 3))
    behind = bench.sheet((2, 4, 3))
    columns = source.source | target.target | window_columns(node)
    columns |= {k.C_LAST: 2, k.A_STRIDE: 2, k.A_STEP: 1}
    bench.run((k.MAX_POOL, columns, {}), active=np.ones(6, np.float32))
    assert not bench.get(target).any()
    assert np.isnan(bench.rows(behind)).all()
    assert not bench.marks(behind).any()


@settings(quick, max_examples=60)
@given(
    st.integers(0, 1).flatmap(lambda count: pools("AveragePool", count_include_pad=count)),
    densities,
    densities,
    st.sampled_from(TEAMS),
)
def test_average_pool_spreads_over_the_window(
    pool: tuple[Node, np.random.Generator], density: float, filled: float, members: int
) -> None:
    """Multiples of 2520, which every number of cells of a 3×3 window divides."""
    node, rng = pool
    R = 2520 * integers(rng, *node.output_shapes[0][1:], density=density)
    before = integers(rng, *node.input_shapes[0][1:], density=filled)
    bench = Bench()
    source, target = bench.put(R, before=1), bench.put(before)
    columns = source.source | target.target | window_columns(node)
    columns[k.COUNT_PAD] = node["count_include_pad"]
    bench.run((k.AVERAGE_POOL, columns, {}), members=members)
    expected = before + average_pool_X(node, R[None].astype(np.float64))[0]
    np.testing.assert_array_equal(bench.get(target), expected)


# --- activations ----------------------------------------------------------------------------------

SCORES = {k.PASS_AR: "a*r", k.PASS_ABS_AR: "|a*r|", k.PASS_A_EPS_R: "(a+eps)*r"}
SHAPES = [(1, 1, 1), (7, 1, 1), (25, 1, 1), (76, 1, 1), (3, 5, 7), (40, 6, 6), (24, 20, 20)]
KINDS: dict[str, Any] = {
    "normal": lambda rng, shape: (np.maximum(normal(rng, *shape), 0), normal(rng, *shape)),
    "sparse": lambda rng, shape: (
        np.maximum(normal(rng, *shape), 0),
        normal(rng, *shape, density=0.03),
    ),
    "ties": lambda rng, shape: (np.abs(integers(rng, *shape)), integers(rng, *shape)),
    "all zero": lambda rng, shape: (
        np.zeros(shape, np.float32),
        normal(rng, *shape),
    ),
    "no gradient": lambda rng, shape: (
        np.abs(normal(rng, *shape)),
        np.zeros(shape, np.float32),
    ),
    "all negative": lambda rng, shape: (
        np.abs(normal(rng, *shape)) + 1,
        -1 - np.abs(normal(rng, *shape)),
    ),
    "all positive": lambda rng, shape: (
        np.abs(normal(rng, *shape)) + 1,
        1 + np.abs(normal(rng, *shape)),
    ),
    "clustered": lambda rng, shape: (
        np.ones(shape, np.float32),
        np.where(rng.random(shape) < 0.9, np.float32(0.5), normal(rng, *shape)),
    ),
    "underflowing": lambda rng, shape: (
        np.abs(normal(rng, *shape)) * np.float32(1e-25),
        normal(rng, *shape) * np.float32(1e-25),
    ),
    "partly underflowing": lambda rng, shape: (
        np.abs(normal(rng, *shape)) * np.float32(1e-22),
        normal(rng, *shape) * np.float32(1e-22),
    ),
    "both signs": lambda rng, shape: (normal(rng, *shape), normal(rng, *shape)),
    "infinite": lambda rng, shape: (
        np.where(rng.random(shape) < 0.5, np.float32(np.inf), np.float32(1)),
        np.copysign(np.float32(2), normal(rng, *shape)),
    ),
    "pixels": lambda rng, shape: (
        np.abs(normal(rng, *shape)),
        normal(rng, *shape) * (rng.random((1, *shape[1:])) < 0.3),
    ),
}


def passed(
    mode: int,
    a: Array,
    R: Array,
    columns: Columns,
    numbers: dict[int, float],
    *,
    members: int = 1,
    around: tuple[int, int] = (0, 0),
    dense: int = NEVER,
) -> tuple[Array, float]:
    """What ACTIVATE, LIST and STORE leave in an untouched sheet, and the threshold that was found.

    The same in whichever order the activations lie.
    """
    results = []
    for blocked in (False, True):
        active, layout = laid_out(a.astype(np.float32), blocked=blocked)
        given = layout | {k.MODE: mode, k.A_OFFSET: 3, k.DENSE: dense, **columns}
        results.append(_passed(active, R, given, numbers, members=members, around=around))
    (found, threshold), (found_in_blocks, threshold_in_blocks) = results
    np.testing.assert_array_equal(found, found_in_blocks)
    np.testing.assert_array_equal(threshold, threshold_in_blocks)
    return found, threshold


def _passed(
    active: Array,
    R: Array,
    columns: Columns,
    numbers: dict[int, float],
    *,
    members: int,
    around: tuple[int, int],
) -> tuple[Array, float]:
    bench = Bench()
    source = bench.put(R.astype(np.float32), before=around[0], after=around[1])
    target = bench.sheet(R.shape)
    rows = (
        (k.ACTIVATE, source.source | columns, {k.CEILING: np.nan, **numbers}),
        (k.LIST, source.source, {}),
        (k.STORE, source.source | target.target, {}),
    )
    active = np.concatenate([np.full(3, np.nan, np.float32), active])
    _, shared = bench.run(*rows, active=active, members=members)
    return bench.get(target), float(shared[k.THRESHOLD])


def rank_columns(units: int, q: float, convention: Any) -> tuple[Columns, dict[int, float]]:
    low, high, fraction = ranks(units, q, convention)
    columns = {k.RANK_LOW: units - 1 - low, k.RANK_HIGH: units - 1 - high}
    return columns, {k.TAU: np.nan, k.FRACTION: fraction}


@pytest.mark.parametrize("mode", SCORES)
@pytest.mark.parametrize("kind", KINDS)
@settings(quick, max_examples=25)
@given(
    st.sampled_from(SHAPES),
    st.one_of(
        st.sampled_from([0.0, 1.0, 50.0, 80.0, 95.0, 98.0, 99.0, 100.0]), st.floats(0.0, 100.0)
    ),
    st.sampled_from(PERCENTILES),
    st.sampled_from([0.0, 1e-6, 0.5]),
    st.sampled_from([-1.0, 0.0, 1e-3, 1.0, 1e3]),
    st.sampled_from(TEAMS),
    generators(),
)
def test_thresholds_are_those_of_the_reference(
    mode: int,
    kind: str,
    shape: tuple[int, ...],
    q: float,
    convention: Any,
    eps: float,
    guess: float,
    members: int,
    rng: np.random.Generator,
) -> None:
    """Whatever is guessed, and whether or not anything is."""
    a, R = (array.astype(np.float32) for array in KINDS[kind](rng, shape))
    rule = Rectify(score=SCORES[mode], q=q, percentile=convention, eps=eps)
    with np.errstate(invalid="ignore"):  # τ between infinite scores is no number
        mask, tau = rule.select(a[None], R[None], 1)
    columns, numbers = rank_columns(a.size, q, convention)
    found, threshold = passed(
        mode,
        a,
        R,
        columns,
        numbers | {k.EPS: eps, k.GUESS: guess},
        members=members,
        around=(1, 2),
    )
    np.testing.assert_array_equal(threshold, tau[0])
    np.testing.assert_array_equal(found, np.where(mask[0], R, 0))


@pytest.mark.parametrize("mode", SCORES)
@settings(quick, max_examples=40)
@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from(SHAPES[:-1]),
    st.sampled_from([-np.inf, -1.5, -1.0, -1e-30, 0.0, 1e-30, 0.3, 1.0, 2.0, np.inf]),
    st.sampled_from([0, 20, NEVER]),
    st.sampled_from(TEAMS),
    generators(),
)
def test_fixed_thresholds(
    mode: int,
    kind: str,
    shape: tuple[int, ...],
    tau: float,
    dense: int,
    members: int,
    rng: np.random.Generator,
) -> None:
    a, R = (array.astype(np.float32) for array in KINDS[kind](rng, shape))
    rule = Rectify(score=SCORES[mode], tau=tau, eps=0.25)
    mask, _ = rule.select(a[None], R[None], 1)
    numbers = {k.TAU: tau, k.EPS: 0.25}
    found, _ = passed(mode, a, R, {}, numbers, members=members, around=(1, 2), dense=dense)
    np.testing.assert_array_equal(found, np.where(mask[0], R, 0))


@pytest.mark.parametrize("tau", [-np.inf, -0.5, 0.0, 0.5, np.nan])
@pytest.mark.parametrize("mode", [k.PASS_AR, k.PASS_ABS_AR])
@pytest.mark.parametrize("ceiling", [1.0, np.nan])
@pytest.mark.parametrize("strict", [False, True])
def test_dead_and_saturated_units(strict: bool, ceiling: float, mode: int, tau: float) -> None:
    """[a > 0] where STRICT, and [a < ceiling]; the threshold is taken before."""
    rng = np.random.default_rng(3)
    a, R = np.clip(normal(rng, 8, 6, 6), 0, 1), normal(rng, 8, 6, 6)
    columns, numbers = rank_columns(a.size, 30.0, "tf_nearest")
    rule = Rectify(score=SCORES[mode], q=30.0, tau=None if np.isnan(tau) else tau)
    mask = rule.select(a[None], R[None], 1)[0][0] & ~(a >= ceiling)
    if strict:
        mask &= a > 0
    numbers |= {k.TAU: tau, k.CEILING: ceiling}
    found, _ = passed(mode, a, R, columns | {k.STRICT: int(strict)}, numbers)
    # Units that are dead or saturated stay in only where neither is asked for.
    np.testing.assert_array_equal(found, np.where(mask, R, 0))


@pytest.mark.parametrize("q", [0.0, 50.0, 98.0])
@pytest.mark.parametrize("mode", SCORES)
def test_activations_that_overflowed(mode: int, q: float) -> None:
    """∞ · 0 is no number; such a score counts as 0."""
    rng = np.random.default_rng(5)
    a, R = np.abs(normal(rng, 24, 20, 20)), -np.abs(normal(rng, 24, 20, 20, density=0.5))
    a[rng.random(a.shape) < 0.1] = np.inf
    with np.errstate(invalid="ignore"):
        score = np.nan_to_num(scores(SCORES[mode], a, R), nan=0.0, posinf=np.inf, neginf=-np.inf)
    columns, numbers = rank_columns(a.size, q, "lower")
    found, threshold = passed(mode, a, R, columns, numbers)
    assert threshold == percentile(score.reshape(1, -1), q, "lower")[0]
    assert np.isin(found[found != 0], R).all()


PASSING = {
    k.PASS_ACTIVE: lambda a, R: a > 0,
    k.PASS_POSITIVE: lambda a, R: R > 0,
    k.PASS_BOTH: lambda a, R: (a > 0) & (R > 0),
}


@pytest.mark.parametrize("ceiling", [1.0, np.nan])
@pytest.mark.parametrize("mode", PASSING)
@settings(quick, max_examples=15)
@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from(SHAPES[:-1]),
    st.sampled_from([0, 20, NEVER]),
    st.sampled_from(TEAMS),
    generators(),
)
def test_what_passes_without_a_threshold(
    mode: int,
    ceiling: float,
    kind: str,
    shape: tuple[int, ...],
    dense: int,
    members: int,
    rng: np.random.Generator,
) -> None:
    a, R = (array.astype(np.float32) for array in KINDS[kind](rng, shape))
    numbers = {k.CEILING: ceiling}
    found, _ = passed(mode, a, R, {}, numbers, members=members, around=(1, 2), dense=dense)
    np.testing.assert_array_equal(found, np.where(PASSING[mode](a, R) & ~(a >= ceiling), R, 0))


@pytest.mark.parametrize("dense", [0, NEVER])
@pytest.mark.parametrize("mode", PASSING)
def test_without_a_ceiling_infinite_activations_pass(mode: int, dense: int) -> None:
    rng = np.random.default_rng(5)
    a, R = normal(rng, 24, 6, 6), normal(rng, 24, 6, 6)
    a[rng.random(a.shape) < 0.1] = np.inf
    found, _ = passed(mode, a, R, {}, {}, dense=dense)
    np.testing.assert_array_equal(found, np.where(PASSING[mode](a, R), R, 0))


@st.composite
def separate_pools(draw: st.DrawFn) -> tuple[Node, np.random.Generator]:
    """Windows that do not overlap, perhaps with gaps between them, or cut off at the end."""
    kernel = [draw(st.integers(1, 3)) for _ in range(2)]
    dilations = [draw(st.sampled_from([1, 1, 2])) for _ in range(2)]
    reaches = [(n - 1) * d + 1 for n, d in zip(kernel, dilations, strict=True)]
    window: dict[str, Any] = {
        "kernel_shape": kernel,
        "dilations": dilations,
        "strides": [n + draw(st.integers(0, 1)) for n in reaches],
        "ceil_mode": draw(st.integers(0, 1)),
    }
    spatial = [n + draw(st.integers(0, 7)) for n in reaches]
    X = np.zeros((1, draw(st.sampled_from([16, 48])), *spatial), np.float32)
    return node_of(Case("MaxPool", (X,), window)), draw(generators())


@pytest.mark.parametrize("mode", [*SCORES, *PASSING])
@settings(quick, max_examples=40)
@given(
    separate_pools(),
    st.sampled_from(list(KINDS.keys() - {"infinite"})),
    st.sampled_from([0.0, 30.0, 80.0, 95.0, 99.0]),
    st.sampled_from([0.0, -1.0, 1.0]),
    st.sampled_from([0, 40, NEVER]),
    st.booleans(),
    st.sampled_from(TEAMS),
)
def test_an_activation_before_a_pool_is_asked_about_maxima(
    mode: int,
    pool: tuple[Node, np.random.Generator],
    kind: str,
    q: float,
    guess: float,
    dense: int,
    blocked: bool,
    members: int,
) -> None:
    """As if the pool came first, and the activation saw all units; whether or not it is a list."""
    node, rng = pool
    shape, maxima = node.input_shapes[0][1:], node.output_shapes[0][1:]
    a = KINDS[kind](rng, shape)[0].astype(np.float32)
    R = KINDS[kind](rng, maxima)[1].astype(np.float32)
    y = _maxima(node, a)
    arrives = _applied(MaxPoolBackward("first"), node, R, {"x": a[None], "y": y})
    if mode in PASSING:
        mask, numbers, columns = PASSING[mode](a, arrives), {}, {}
    else:
        rule = Rectify(score=SCORES[mode], q=q, eps=0.5)
        mask, tau = (part[0] for part in rule.select(a[None], arrives[None], 1))
        columns, numbers = rank_columns(a.size, q, rule.percentile)
    bench = Bench()
    source = bench.put(R, before=2, after=1)
    target, stored = bench.sheet(shape), bench.sheet(shape)
    first, layout = laid_out(y[0], blocked=blocked)
    second, behind = laid_out(a, blocked=blocked)
    pooled = window_columns(node) | {k.C_LAST: shape[0], k.A_OFFSET: first.size} | behind
    pooled |= {k.B_STRIDE: layout[k.A_STRIDE], k.B_STEP: layout[k.A_STEP]}
    columns |= {k.MODE: mode, k.DENSE: dense, k.ZEROS: a.size - R.size} | layout
    numbers |= {k.CEILING: np.nan, k.EPS: 0.5, k.GUESS: guess}
    rows = (
        (k.ACTIVATE, source.source | columns, numbers),
        (k.UNPOOL, source.source | target.target | pooled, {}),
        (k.STORE, target.source | stored.target, {}),
    )
    _, shared = bench.run(*rows, active=np.concatenate([first, second]), members=members)
    np.testing.assert_array_equal(bench.get(stored), np.where(mask, arrives, 0))
    marks = bench.marks(target)
    assert marks.all() or not marks.any(), "a dense product would read what was never cleared"
    if mode in SCORES:
        assert shared[k.THRESHOLD] == tau


@settings(quick, max_examples=60)
@given(st.integers(1, 300), st.integers(0, 299), st.sampled_from([1, 3, 10**6]), generators())
def test_nth_largest(n: int, index: int, distinct: int, rng: np.random.Generator) -> None:
    values = rng.integers(0, distinct, n).astype(np.float32)
    index %= n
    expected = np.partition(values, n - 1 - index)[n - 1 - index]
    assert k.nth_largest(values.copy(), index) == expected


@pytest.mark.parametrize("order", [np.sort, lambda v: np.sort(v)[::-1], np.zeros_like])
def test_nth_largest_of_ordered_values(order: Any) -> None:
    values = order(np.random.default_rng(0).standard_normal(20_000).astype(np.float32))
    for index in (0, 400, 10_000, 19_999):
        expected = np.partition(values, values.size - 1 - index)[values.size - 1 - index]
        assert k.nth_largest(np.array(values), index) == expected


# --- sheets ---------------------------------------------------------------------------------------


@quick
@given(densities, densities, st.booleans(), st.sampled_from(TEAMS), generators())
def test_add_and_scale(
    density: float, filled: float, scaled: bool, members: int, rng: np.random.Generator
) -> None:
    x, before = integers(rng, 5, 4, 3, density=density), integers(rng, 5, 4, 3, density=filled)
    factors = integers(rng, 5)
    bench = Bench()
    source, target = bench.put(x, before=2, after=1), bench.put(before)
    columns = source.source | target.target | {k.W_OFFSET: 2}
    weights = np.concatenate([np.full(2, np.nan, np.float32), factors])
    bench.run((k.SCALE if scaled else k.ADD, columns, {}), weights=weights, members=members)
    expected = before + x * (factors[:, None, None] if scaled else 1)
    np.testing.assert_array_equal(bench.get(target), expected)


def test_add_to_some_channels_of_a_sheet() -> None:
    """The other channels of a row that holds something stay as they are."""
    rng = np.random.default_rng(0)
    x, others = integers(rng, 2, 3, 3), integers(rng, 6, 3, 3)
    bench = Bench()
    source, whole = bench.put(x), bench.put(others)
    part = Sheet(whole.storage, 3, whole.stride, whole.height, whole.width, 2)
    bench.run((k.ADD, source.source | part.target, {}))
    others[3:5] += x
    np.testing.assert_array_equal(bench.get(whole), others)


@pytest.mark.parametrize("members", TEAMS)
def test_forget(members: int) -> None:
    bench = Bench()
    kept = bench.put(np.ones((2, 3, 3), np.float32))
    sheet = bench.put(np.ones((2, 3, 3), np.float32))
    behind = bench.put(np.ones((2, 3, 3), np.float32))
    bench.run((k.FORGET, sheet.target, {}), members=members)
    assert not bench.get(sheet).any()
    assert bench.get(kept).all()
    assert bench.get(behind).all()


@pytest.mark.parametrize("dense", [0, NEVER])
def test_store_adds_to_what_is_there(dense: int) -> None:
    rng = np.random.default_rng(1)
    x, before = integers(rng, 4, 3, 3, density=0.3), integers(rng, 4, 3, 3, density=0.3)
    bench = Bench()
    source, target = bench.put(x), bench.put(before)
    rows = (
        (k.COMPACT, source.source | {k.DENSE: dense}, {}),
        (k.LIST, source.source, {}),
        (k.STORE, source.source | target.target, {}),
    )
    bench.run(*rows)
    np.testing.assert_array_equal(bench.get(target), before + x)


@pytest.mark.parametrize("members", TEAMS)
def test_samples_go_on_from_their_own_rows(members: int) -> None:
    """Three samples of one call: the first begins at the first row, the second behind it."""
    bench = Bench()
    sheet, total = bench.put(np.ones((1, 1, 2), np.float32)), bench.sheet((1, 1, 2))
    bench.put(np.zeros((1, 1, 2), np.float32))
    add = (k.ADD, sheet.source | total.target, {})
    arenas, touched = np.tile(bench.arena, (3, 1)), np.tile(bench.touched, (3, 1))
    rows = np.array([0, 1, 3])
    advance((add, add, (k.STOP, {}, {}), add), rows, [0, 2], arenas, touched, members=members)
    np.testing.assert_array_equal(rows, [2, 1, 4])
    found = array_of(total, arenas, touched, (3, 1, 1, 2))
    np.testing.assert_array_equal(found[:, 0, 0], [[2, 2], [0, 0], [1, 1]])
