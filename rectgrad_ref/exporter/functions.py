"""How NumPy's functions are spelt in ONNX (opset 18)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .tensor import FUNCTIONS, NotTraceable, Shape, Tape, Tensor, spelling

# By name, because scipy's `erf` is a ufunc too and need not be imported to be recognised.
_ELEMENTWISE = {
    "add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "negative": "Neg",
    "power": "Pow", "maximum": "Max", "minimum": "Min", "absolute": "Abs", "sign": "Sign",
    "reciprocal": "Reciprocal", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "erf": "Erf",
    "sin": "Sin", "cos": "Cos", "tan": "Tan", "arcsin": "Asin", "arccos": "Acos",
    "arctan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "tanh": "Tanh", "arcsinh": "Asinh",
    "arccosh": "Acosh", "arctanh": "Atanh", "floor": "Floor", "ceil": "Ceil", "rint": "Round",
    "matmul": "MatMul",
}  # fmt: skip
_COMPARISONS = {
    "greater": "Greater", "greater_equal": "GreaterOrEqual", "less": "Less",
    "less_equal": "LessOrEqual", "equal": "Equal", "isnan": "IsNaN",
}  # fmt: skip
_LOGICAL = {
    "logical_and": "And", "bitwise_and": "And", "logical_or": "Or", "bitwise_or": "Or",
    "logical_xor": "Xor", "bitwise_xor": "Xor", "logical_not": "Not", "invert": "Not",
}  # fmt: skip


def _fmax(x: Any, least: Any) -> Any:
    """The larger of x and a number; the number where x is none."""
    if isinstance(least, (Tensor, np.ndarray)):
        raise NotTraceable("numpy.fmax of two arrays")
    return np.where(x > least, x, least)


_COMPOSITE: dict[str, Callable[..., Any]] = {
    "fmax": _fmax,
    "log1p": lambda x: np.log(1 + x),
    "expm1": lambda x: np.exp(x) - 1,
    "square": lambda x: x * x,
    "not_equal": lambda x, y: ~(x == y),
    "isfinite": lambda x: np.abs(x) < np.inf,
    "trunc": lambda x: np.sign(x) * np.floor(np.abs(x)),
}


def _tape(operands: Sequence[Any]) -> Tape:
    return next(x.tape for x in operands if isinstance(x, Tensor))


def _dtype(operands: Sequence[Any]) -> np.dtype[Any]:
    kinds = [x.dtype if isinstance(x, (Tensor, np.ndarray, np.generic)) else x for x in operands]
    return np.result_type(*kinds)


def _typed(x: Any, dtype: np.dtype[Any]) -> Tensor | np.ndarray:
    return x.astype(dtype) if isinstance(x, Tensor) else np.asarray(x, dtype)


@spelling(np.ufunc)
def elementwise(ufunc: np.ufunc, *operands: Any) -> Any:
    """One node, with the operands brought to the dtype that NumPy would compute in."""
    name = ufunc.__name__
    if name in _COMPOSITE:
        return _COMPOSITE[name](*operands)
    shape = (_product if name == "matmul" else np.broadcast_shapes)(*map(np.shape, operands))
    if name == "add":
        for zero, other in (operands, operands[::-1]):
            if isinstance(zero, Tensor) and zero.fill == 0 and np.shape(other) == shape:
                return _typed(other, _dtype(operands))
    if name in _COMPARISONS:
        operands = tuple(_narrowed(operands))
    op = _ELEMENTWISE.get(name) or _COMPARISONS.get(name)
    dtype = _dtype(operands)
    if name in _LOGICAL and dtype.kind == "b":
        op = _LOGICAL[name]
    if op is None:
        raise NotTraceable(f"numpy.{name}")
    result = bool if name in _COMPARISONS else dtype
    inputs = [_typed(x, dtype) for x in operands]
    return _tape(operands).emit(op, inputs, (shape, result))[0]


def _narrowed(operands: Sequence[Any]) -> Sequence[Any]:
    """Numbers that were widened, as they were before: they compare alike."""
    narrow: list[Any] = []
    for x in operands:
        if isinstance(x, Tensor) and x.narrow is not None:
            narrow.append(x.narrow)
        elif isinstance(x, (int, float)) and np.float32(x) == x:
            narrow.append(x)
        else:
            return operands
    return narrow


def _product(a: Shape, b: Shape) -> Shape:
    """The shape of a matrix product."""
    left, right = a if len(a) > 1 else (1, *a), b if len(b) > 1 else (*b, 1)
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    return (*np.broadcast_shapes(left[:-2], right[:-2]), *rows, *columns)


# --- parts --------------------------------------------------------------------------------------


def _slices(index: Any, shape: Shape) -> tuple[list[range], list[int], list[int]]:
    """What an index of slices, integers, None and … means.

    Returns
    -------
    ranges : list of range
        The cells along each axis.
    dropped : list of int
        Axes that an integer selects from.
    added : list of int
        Axes of the result, after that, which None adds.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(item is not None and item is not Ellipsis for item in items)
    everything = [slice(None)] * (len(shape) - used)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = everything
    else:
        items += everything
    ranges: list[range] = []
    dropped: list[int] = []
    added: list[int] = []
    for item in items:
        extent = shape[len(ranges)] if item is not None else 0
        if item is None:
            added.append(len(ranges) - len(dropped) + len(added))
        elif isinstance(item, slice):
            ranges.append(range(extent)[item])
        elif isinstance(item, (int, np.integer)):
            dropped.append(len(ranges))
            ranges.append(range(extent)[int(item) : int(item) % extent + 1])
        else:
            raise NotTraceable("an index that is an array")
    return ranges, dropped, added


@spelling(operator.getitem)
def take(x: Tensor, index: Any) -> Tensor:
    """``x[index]``."""
    result = _taken(x, index)
    if x.narrow is not None:
        result.narrow = _taken(x.narrow, index)
    return result


def _taken(x: Tensor, index: Any) -> Tensor:
    ranges, dropped, added = _slices(index, x.shape)
    x = _cut(x, ranges)
    shape = [n for axis, n in enumerate(x.shape) if axis not in dropped]
    for axis in added:
        shape.insert(axis, 1)
    return x.reshape(shape)


def _cut(x: Tensor, ranges: Sequence[range]) -> Tensor:
    shape = [len(cells) for cells in ranges]
    axes = [a for a, cells in enumerate(ranges) if cells != range(x.shape[a])]
    if not axes:
        return x
    if x.fill is not None:
        return Tensor(x.tape, None, tuple(shape), x.dtype, x.fill)
    if any(ranges[a].step < 0 or not len(ranges[a]) for a in axes):
        raise NotTraceable("a slice backwards, or of nothing")
    starts, ends, steps = zip(
        *((ranges[a].start, ranges[a][-1] + 1, ranges[a].step) for a in axes), strict=True
    )
    parameters = [np.array(values, np.int64) for values in (starts, ends, axes, steps)]
    return x.emit("Slice", *parameters, shape=shape)


@spelling(operator.setitem)
def put(x: Tensor, index: Any, value: Any) -> Tensor:
    """`x` after ``x[index] = value``."""
    ranges, dropped, added = _slices(index, x.shape)
    shape = tuple(len(cells) for cells in ranges)
    if dropped or added or np.shape(value) != shape:
        raise NotTraceable("an assignment that broadcasts")
    if not isinstance(value, Tensor):
        value = x.tape.emit("Identity", [np.asarray(value, x.dtype)], (shape, x.dtype))[0]
    inside = np.ones((1,) * x.ndim, bool)
    for axis, cells in enumerate(ranges):
        if cells != range(x.shape[axis]):
            here = np.isin(np.arange(x.shape[axis]), cells)
            inside = inside & here.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    spread = _spread(value.astype(x.dtype), ranges, x.shape, 0 if x.fill is None else x.fill)
    return spread if x.fill is not None or inside.all() else _where(inside, spread, x)


def _spread(x: Tensor, ranges: Sequence[range], shape: Shape, fill: float) -> Tensor:
    """The inverse of `_cut`: the cells back in their places among `fill`."""
    for axis, cells in enumerate(ranges):
        if cells.step > 1 and len(cells) > 1:
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            x = x.reshape(*before, len(cells), 1, *after)
            x = pad(x, {axis + 1: (0, cells.step - 1)}, fill)
            x = x.reshape(*before, len(cells) * cells.step, *after)
            x = _cut(x, [range(n) for n in (*before, cells[-1] - cells.start + 1, *after)])
    widths = {
        axis: (cells.start, shape[axis] - cells[-1] - 1)
        for axis, cells in enumerate(ranges)
        if len(cells) < shape[axis]
    }
    return pad(x, widths, fill)


def pad(x: Tensor, widths: dict[int, tuple[int, int]], fill: float = 0) -> Tensor:
    """`x` with so many cells of `fill` before and after, by axis."""
    if not any(map(any, widths.values())):
        return x
    both = [widths.get(axis, (0, 0)) for axis in range(x.ndim)]
    shape = [n + begin + end for n, (begin, end) in zip(x.shape, both, strict=True)]
    pads = np.array(both, np.int64).T.ravel()
    result = x.emit("Pad", pads, np.array(fill, x.dtype), shape=shape, mode="constant")
    if not fill:
        result.padded = x, widths
    return result


# --- functions ----------------------------------------------------------------------------------


@spelling(np.where)
def _where(condition: Any, x: Any, y: Any) -> Tensor:
    shape = np.broadcast_shapes(*map(np.shape, (condition, x, y)))
    # Two plain numbers, which NumPy would take for float64, follow what they are chosen for.
    dtype = np.dtype(np.float32) if all(isinstance(v, (int, float)) for v in (x, y)) else None
    dtype = dtype or _dtype([x, y])
    inputs = [_typed(condition, np.dtype(bool)), _typed(x, dtype), _typed(y, dtype)]
    result = _tape((condition, x, y)).emit("Where", inputs, (shape, dtype))[0]
    narrow = [v if getattr(v, "narrow", None) is None else v.narrow for v in (x, y)]
    if dtype == np.float64 and _dtype(narrow) == np.float32:
        result.narrow = _where(condition, *narrow)
    return result


def _axes(x: Tensor, axis: Any) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(x.ndim))
    return tuple(sorted(int(a) % x.ndim for a in np.atleast_1d(np.asarray(axis, int))))


def _reduction(op: str) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axis: Any = None, keepdims: bool = False, **_: Any) -> Tensor:
        axes = _axes(x, axis)
        if not axes:
            return x
        kept = [1 if a in axes else n for a, n in enumerate(x.shape)]
        shape = kept if keepdims else [n for a, n in enumerate(x.shape) if a not in axes]
        return x.emit(op, np.array(axes, np.int64), shape=shape, keepdims=int(keepdims))

    return reduce


FUNCTIONS[np.sum] = _reduction("ReduceSum")
FUNCTIONS[np.mean] = _reduction("ReduceMean")
FUNCTIONS[np.prod] = _reduction("ReduceProd")
FUNCTIONS[np.max] = _reduction("ReduceMax")
FUNCTIONS[np.min] = _reduction("ReduceMin")


def _place(op: str) -> Callable[..., Tensor]:
    def arg(x: Tensor, axis: int) -> Tensor:
        shape = [n for a, n in enumerate(x.shape) if a != axis % x.ndim]
        return x.emit(op, shape=shape, dtype=np.int64, axis=axis % x.ndim, keepdims=0)

    return arg


FUNCTIONS[np.argmax] = _place("ArgMax")
FUNCTIONS[np.argmin] = _place("ArgMin")


@spelling(np.concatenate)
def _concatenate(parts: Sequence[Any], axis: int = 0) -> Tensor:
    axis %= len(np.shape(parts[0]))
    shape = list(np.shape(parts[0]))
    shape[axis] = sum(np.shape(part)[axis] for part in parts)
    dtype = _dtype(parts)
    inputs = [_typed(part, dtype) for part in parts]
    return _tape(parts).emit("Concat", inputs, (shape, dtype), axis=axis)[0]


@spelling(np.stack)
def _stack(parts: Sequence[Any], axis: int = 0) -> Tensor:
    return _concatenate([_expand_dims(part, axis) for part in parts], axis)


@spelling(np.broadcast_to)
def _broadcast_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    if x.shape == tuple(shape):
        return x
    before = (1,) * (len(shape) - x.ndim) + x.shape
    # What is not repeated needs no naming, and may then differ from batch to batch.
    wanted = [1 if n == old else n for n, old in zip(shape, before, strict=True)]
    return x.emit("Expand", np.array(wanted, np.int64), shape=shape)


@spelling(np.broadcast_arrays)
def _broadcast_arrays(*arrays: Any) -> list[Any]:
    shape = np.broadcast_shapes(*map(np.shape, arrays))
    return [np.broadcast_to(array, shape) for array in arrays]


@spelling(np.expand_dims)
def _expand_dims(x: Any, axis: int | tuple[int, ...]) -> Any:
    return x.reshape(np.expand_dims(np.broadcast_to(0, np.shape(x)), axis).shape)


@spelling(np.full_like)
def _full_like(
    x: Tensor, fill: float, dtype: Any = None, shape: Sequence[int] | None = None
) -> Tensor:
    extents = x.shape if shape is None else tuple(shape)
    like = x if shape is None else None
    return Tensor(x.tape, None, extents, np.dtype(dtype or x.dtype), fill, like)


@spelling(np.zeros_like)
def _zeros_like(x: Tensor, **kinds: Any) -> Tensor:
    return _full_like(x, 0, **kinds)


@spelling(np.ones_like)
def _ones_like(x: Tensor, **kinds: Any) -> Tensor:
    return _full_like(x, 1, **kinds)


@spelling(np.copyto)
def _copyto(x: Tensor, value: Any, where: Any = True) -> None:
    x.become(_where(where, value, x))


@spelling(np.swapaxes)
def _swapaxes(x: Tensor, first: int, second: int) -> Tensor:
    order = list(range(x.ndim))
    order[first], order[second] = order[second], order[first]
    return x.transpose(order)


@spelling(np.moveaxis)
def _moveaxis(x: Tensor, source: int, destination: int) -> Tensor:
    order = [axis for axis in range(x.ndim) if axis != source % x.ndim]
    order.insert(destination % x.ndim, source % x.ndim)
    return x.transpose(order)


@spelling(np.pad)
def _pad(
    x: Tensor, widths: Sequence[tuple[int, int]], mode: str, constant_values: float = 0
) -> Tensor:
    if mode != "constant":
        raise NotTraceable(f"numpy.pad with mode {mode}")
    return pad(x, dict(enumerate(widths)), constant_values)


@spelling(np.clip)
def _clip(x: Tensor, low: Any, high: Any) -> Any:
    return np.minimum(np.maximum(x, low), high)


@spelling(np.take_along_axis)
def _take_along_axis(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    if axis % x.ndim != x.ndim - 1:
        raise NotTraceable("numpy.take_along_axis of another axis than the last")
    # Not GatherElements, which fails in onnx's evaluator on long rows.
    return x.emit("GatherND", indices[..., None], shape=indices.shape, batch_dims=x.ndim - 1)


@spelling(np.put_along_axis)
def _put_along_axis(x: Tensor, indices: Tensor, values: Any, axis: int) -> None:
    shape = np.broadcast_shapes(indices.shape, np.shape(values))
    values = _broadcast_to(values, shape) if isinstance(values, Tensor) else values
    x.become(x.emit("ScatterElements", indices, _typed(values, x.dtype), axis=axis % x.ndim))


@spelling(np.add.at)
def _add_at(x: Tensor, index: Any, values: Tensor) -> None:
    """Into zeros, at constant indices of one axis."""
    *before, indices = index if isinstance(index, tuple) else (index,)
    if x.fill != 0 or any(i != slice(None) for i in before) or isinstance(indices, Tensor):
        raise NotTraceable("numpy.add.at with indices that are computed")
    axis, places = len(before), np.asarray(indices)
    flat = values.reshape(*values.shape[:axis], places.size, *x.shape[axis + 1 :])
    extents: Any = flat.emit("Shape", shape=[x.ndim], dtype=np.int64)
    here = np.arange(x.ndim) == axis
    zeros = (extents * ~here + here * x.shape[axis]).emit(
        "ConstantOfShape", shape=x.shape, dtype=x.dtype
    )
    row = places.reshape([-1 if here[a] else 1 for a in range(x.ndim)]) % x.shape[axis]
    (where,) = x.tape.emit("Expand", [row, extents], (flat.shape, np.int64))
    x.become(zeros.emit("ScatterElements", where, flat, axis=axis, reduction="add"))


@spelling(np.einsum)
def _einsum(equation: str, *operands: Any, **_: Any) -> Tensor:
    terms, result = equation.split("->")
    extents = {
        letter: n
        for term, x in zip(terms.split(","), operands, strict=True)
        for letter, n in zip(term, np.shape(x), strict=True)
    }
    dtype = _dtype(operands)
    inputs = [_typed(x, dtype) for x in operands]
    shape = tuple(extents[letter] for letter in result)
    return _tape(operands).emit("Einsum", inputs, (shape, dtype), equation=equation)[0]


@spelling(np.shape)
def _shape(x: Tensor) -> Shape:
    return x.shape
