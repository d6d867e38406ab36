"""Operators that move values against finite differences and onnxruntime; folded ones exactly."""

from __future__ import annotations

import numpy as np
from helpers import NEWEST, Case, generators, rule_tests, shapes, spread
from hypothesis import strategies as st


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def some_axis(shape: list[int]) -> st.SearchStrategy[int]:
    return st.integers(-len(shape), len(shape) - 1)


@st.composite
def reshapes(draw: st.DrawFn) -> Case:
    shape, rng = draw(shapes()), draw(generators())
    X = spread(rng, *shape)
    after = draw(st.permutations(shape))
    wanted = list(after)
    if draw(st.booleans()):
        wanted[draw(st.integers(0, len(wanted) - 1))] = -1
    wanted = [0 if i < len(shape) and n == shape[i] else n for i, n in enumerate(wanted)]
    return Case("Reshape", (X, ints(*wanted)), opset=draw(st.sampled_from([7, 13, NEWEST])))


@st.composite
def flattens(draw: st.DrawFn) -> Case:
    shape = draw(shapes())
    axis = draw(st.integers(-len(shape), len(shape)))
    return Case("Flatten", (spread(draw(generators()), *shape),), {"axis": axis})


@st.composite
def squeezes(draw: st.DrawFn) -> Case:
    shape = draw(st.lists(st.sampled_from([1, 1, 3]), min_size=2, max_size=4))
    X = spread(draw(generators()), *shape)
    axes = [i for i, n in enumerate(shape) if n == 1 and draw(st.booleans())]
    axes = [i - draw(st.sampled_from([0, len(shape)])) for i in axes]
    if not axes:
        return Case("Squeeze", (X,), opset=draw(st.sampled_from([11, NEWEST])))
    if draw(st.booleans()):
        return Case("Squeeze", (X,), {"axes": axes}, opset=11)
    return Case("Squeeze", (X, ints(*axes)))


@st.composite
def unsqueezes(draw: st.DrawFn) -> Case:
    shape = draw(shapes(1, 3))
    X = spread(draw(generators()), *shape)
    count = draw(st.integers(1, 2))
    rank = len(shape) + count
    axes = draw(st.lists(st.integers(0, rank - 1), min_size=count, max_size=count, unique=True))
    axes = [i - draw(st.sampled_from([0, rank])) for i in axes]
    if draw(st.booleans()):
        return Case("Unsqueeze", (X,), {"axes": axes}, opset=11)
    return Case("Unsqueeze", (X, ints(*axes)))


@st.composite
def identities(draw: st.DrawFn, op: str) -> Case:
    attributes = {"to": 1} if op == "Cast" else {}
    X = spread(draw(generators()), *draw(shapes()))
    return Case(op, (X,), attributes, opset=draw(st.sampled_from([9, 13, NEWEST])))


@st.composite
def dropouts(draw: st.DrawFn) -> Case:
    X = spread(draw(generators()), *draw(shapes()))
    if draw(st.booleans()):
        return Case("Dropout", (X,), {"ratio": 0.5}, opset=7)
    return Case("Dropout", (X, np.float32(0.5)))


@st.composite
def transposes(draw: st.DrawFn) -> Case:
    shape = draw(shapes())
    perm = draw(st.permutations(range(len(shape))))
    attributes = {"perm": perm} if draw(st.booleans()) else {}
    return Case("Transpose", (spread(draw(generators()), *shape),), attributes)


@st.composite
def concats(draw: st.DrawFn) -> Case:
    shape, rng = draw(shapes()), draw(generators())
    axis = draw(some_axis(shape))
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        part = list(shape)
        part[axis] = draw(st.integers(1, 3))
        parts.append(spread(rng, *part))
    return Case("Concat", tuple(parts), {"axis": axis})


@st.composite
def splits(draw: st.DrawFn) -> Case:
    """By sizes, given as attribute or input, or into equal parts, the last one smaller."""
    shape, rng = draw(shapes()), draw(generators())
    axis = draw(some_axis(shape))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    form = draw(st.sampled_from(["attribute", "input", "num_outputs", "equal"]))
    if form in ("attribute", "input"):
        shape[axis] = sum(sizes)
        X = spread(rng, *shape)
        if form == "attribute":
            return Case("Split", (X,), {"axis": axis, "split": sizes}, len(sizes), opset=11)
        return Case("Split", (X, ints(*sizes)), {"axis": axis}, len(sizes), opset=13)
    parts, size = len(sizes), sizes[0]
    shape[axis] = parts * size
    if form == "equal":
        return Case("Split", (spread(rng, *shape),), {"axis": axis}, parts, opset=11)
    shape[axis] -= draw(st.integers(0, size - 1))
    attributes = {"axis": axis, "num_outputs": parts}
    return Case("Split", (spread(rng, *shape),), attributes, parts, opset=18)


@st.composite
def slices(draw: st.DrawFn) -> Case:
    """Starts and ends anywhere, also far outside, with steps of either sign."""
    shape, rng = draw(shapes(1, 3)), draw(generators())
    X = spread(rng, *shape)
    axes = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    if draw(st.booleans()):
        # onnx infers no shape of an old Slice that is empty, out of range or not in order.
        axes = sorted(axes)
        starts = [draw(st.integers(-shape[axis], shape[axis] - 1)) for axis in axes]
        ends = [draw(st.sampled_from([shape[axis], 2**63 - 1])) for axis in axes]
        return Case("Slice", (X,), {"starts": starts, "ends": ends, "axes": axes}, opset=9)
    steps = [draw(st.sampled_from([-3, -2, -1, 1, 2, 3])) for _ in axes]
    starts = [draw(st.integers(-6, 6)) for _ in axes]
    furthest = [2**63 - 1 if step > 0 else -(2**63) for step in steps]
    ends = [draw(st.one_of(st.integers(-6, 6), st.just(far))) for far in furthest]
    signed = [axis - draw(st.sampled_from([0, len(shape)])) for axis in axes]
    return Case("Slice", (X, ints(*starts), ints(*ends), ints(*signed), ints(*steps)))


@st.composite
def gathers(draw: st.DrawFn) -> Case:
    shape, rng = draw(shapes()), draw(generators())
    axis = draw(some_axis(shape))
    size = draw(st.lists(st.integers(1, 3), max_size=2))
    indices = rng.integers(-shape[axis], shape[axis], size)
    return Case("Gather", (spread(rng, *shape), np.asarray(indices)), {"axis": axis})


@st.composite
def pads(draw: st.DrawFn) -> Case:
    """Reflection needs more cells than it adds; a negative pad cuts."""
    shape = draw(st.lists(st.integers(4, 5), min_size=1, max_size=3))
    X = spread(draw(generators()), *shape)
    mode = draw(st.sampled_from(["constant", "reflect", "edge", "wrap"]))
    rank = len(shape)
    widths = [draw(st.integers(-1, 2)) for _ in range(2 * rank)]
    if mode != "wrap" and draw(st.booleans()):
        return Case("Pad", (X,), {"pads": widths, "mode": mode, "value": 1.5}, opset=10)
    value = np.float32(-0.5) if mode == "constant" and draw(st.booleans()) else None
    if draw(st.booleans()):
        return Case("Pad", (X, ints(*widths), value), {"mode": mode})
    axes = draw(st.lists(st.integers(0, rank - 1), min_size=1, unique=True))
    widths = widths[: 2 * len(axes)]
    signed = [axis - draw(st.sampled_from([0, rank])) for axis in axes]
    return Case("Pad", (X, ints(*widths), value, ints(*signed)), {"mode": mode})


@st.composite
def expands(draw: st.DrawFn) -> Case:
    whole = draw(shapes())
    shape = [n if draw(st.booleans()) else 1 for n in whole][draw(st.integers(0, 1)) :]
    wanted = [1 if n == 1 or draw(st.booleans()) else n for n in shape]
    wanted = whole if draw(st.booleans()) else wanted
    return Case("Expand", (spread(draw(generators()), *shape), ints(*wanted)))


@st.composite
def tiles(draw: st.DrawFn) -> Case:
    shape = draw(shapes(1, 3))
    repeats = [draw(st.integers(1, 3)) for _ in shape]
    return Case("Tile", (spread(draw(generators()), *shape), ints(*repeats)))


CASES = {
    "Reshape": reshapes(),
    "Flatten": flattens(),
    "Squeeze": squeezes(),
    "Unsqueeze": unsqueezes(),
    "Identity": identities("Identity"),
    "Cast": identities("Cast"),
    "Dropout": dropouts(),
    "Transpose": transposes(),
    "Concat": concats(),
    "Split": splits(),
    "Slice": slices(),
    "Gather": gathers(),
    "Pad": pads(),
    "Expand": expands(),
    "Tile": tiles(),
}

test_vjp, test_forward = rule_tests(CASES)
