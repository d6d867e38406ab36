"""Operators that move, copy or select values without computing with them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import helper

from .arithmetic import unbroadcast
from .registry import Array, NotSamplewise, SampleAxis, elementwise, operator, vjp

if TYPE_CHECKING:
    from ..graph import Node


def _input_shape(node: Node) -> tuple[int, ...]:
    return node.input_shapes[0]


def _reshaped(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    """Row-major order is kept: an axis survives where as many elements lie before it as before."""
    before, after, axis = _input_shape(node), node.output_shapes[0], axes[0]
    if axis is None:
        raise NotSamplewise
    prefix = math.prod(before[:axis])
    for candidate in range(len(after)):
        if math.prod(after[:candidate]) == prefix and after[candidate] == before[axis]:
            return candidate
    raise NotSamplewise


@operator("Reshape", batch=_reshaped)
def reshape(node: Node, data: Array, shape: Array) -> Array:
    sizes = [int(n) for n in shape]
    if not node.attributes.get("allowzero"):
        sizes = [data.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return data.reshape(sizes)


@operator("Flatten", batch=_reshaped)
def flatten(node: Node, input: Array) -> Array:
    axis = node["axis"] % input.ndim if node["axis"] < 0 else node["axis"]
    return input.reshape(math.prod(input.shape[:axis]), -1)


@operator("Squeeze", batch=_reshaped)
def squeeze(node: Node, data: Array, axes: Array | None = None) -> Array:
    return data.squeeze(None if axes is None else tuple(int(a) for a in axes))


@operator("Unsqueeze", batch=_reshaped)
def unsqueeze(node: Node, data: Array, axes: Array) -> Array:
    return np.expand_dims(data, tuple(int(a) for a in np.atleast_1d(axes)))


@vjp("Reshape", "Squeeze", "Unsqueeze", wrt="data")
@vjp("Flatten", wrt="input")
def unreshape(node: Node, R: Array) -> Array:
    return R.reshape(_input_shape(node))


@operator("Identity", batch=elementwise)
def identity(node: Node, input: Array) -> Array:
    return input


@vjp("Identity", wrt="input")
def identity_input(node: Node, R: Array) -> Array:
    return R


def _first_input(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    return axes[0]


@operator("Dropout", batch=_first_input)
def dropout(
    node: Node, data: Array, ratio: Array | None = None, training_mode: Array | None = None
) -> tuple[Array, Array]:
    return data, np.ones(data.shape, bool)


@vjp("Dropout", wrt="data")
def dropout_data(node: Node, R: Array) -> Array:
    return R


@operator("Cast", batch=elementwise)
def cast(node: Node, input: Array) -> Array:
    to = np.dtype(helper.tensor_dtype_to_np_dtype(node["to"]))
    # Whatever the file declares, all floating-point values of a pass are in its compute dtype.
    if node.constants[0] is None and input.dtype.kind == to.kind == "f":
        return input
    return input.astype(to)


@vjp("Cast", wrt="input")
def cast_input(node: Node, R: Array) -> Array:
    return R


def _transposed(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    if axes[0] is None:
        raise NotSamplewise
    return _perm(node).index(axes[0])


def _perm(node: Node) -> tuple[int, ...]:
    rank = len(_input_shape(node))
    return tuple(node.attributes.get("perm", range(rank - 1, -1, -1)))


@operator("Transpose", batch=_transposed)
def transpose(node: Node, data: Array) -> Array:
    return data.transpose(_perm(node))


@vjp("Transpose", wrt="data")
def transpose_data(node: Node, R: Array) -> Array:
    return R.transpose(np.argsort(_perm(node)))


def _concatenated(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    """All parts must carry the sample on the same axis, and not be joined along it."""
    rank = len(_input_shape(node))
    if len(set(axes)) != 1 or axes[0] is None or axes[0] == node["axis"] % rank:
        raise NotSamplewise
    return axes[0]


@operator("Concat", batch=_concatenated)
def concat(node: Node, *inputs: Array) -> Array:
    return np.concatenate(inputs, axis=node["axis"])


@vjp("Concat", wrt="inputs")
def concat_inputs(node: Node, R: Array, *, index: int) -> Array:
    axis = node["axis"] % R.ndim
    extents = [shape[axis] for shape in node.input_shapes]
    start = sum(extents[:index])
    return R[(slice(None),) * axis + (slice(start, start + extents[index]),)]


def _along(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    """Any axis but the one that the node works on."""
    rank = len(_input_shape(node))
    if axes[0] is None or axes[0] == node["axis"] % rank:
        raise NotSamplewise
    return axes[0]


@operator("Split", batch=_along)
def split(node: Node, input: Array, split: Array | None = None) -> tuple[Array, ...]:
    return tuple(np.split(input, _split_points(node, split), axis=node["axis"]))


def _split_points(node: Node, split: Array | None) -> list[int]:
    if split is not None:
        return [int(n) for n in np.cumsum(split)[:-1]]
    parts = len(node.outputs)
    size = math.ceil(_input_shape(node)[node["axis"]] / parts)
    return [size * i for i in range(1, parts)]


@vjp("Split", wrt="input", every_output=True)
def split_input(node: Node, R: tuple[Array, ...]) -> Array:
    return np.concatenate(R, axis=node["axis"])


def _slices(
    node: Node, starts: Array, ends: Array, axes: Array | None, steps: Array | None
) -> tuple[slice, ...]:
    shape = _input_shape(node)
    where = range(len(starts)) if axes is None else [int(a) % len(shape) for a in axes]
    result = [slice(None)] * len(shape)
    for i, axis in enumerate(where):
        start, end, step = int(starts[i]), int(ends[i]), 1 if steps is None else int(steps[i])
        if step < 0:
            # ONNX clamps a start to the first cell and an end to −1, "before the first".
            stop = None if end < -shape[axis] else end
            result[axis] = slice(max(start, -shape[axis]), stop, step)
        else:
            result[axis] = slice(start, end, step)
    return tuple(result)


def _parameters(node: Node) -> tuple[Array | None, ...]:
    """The inputs after the first, which have to be constant."""
    if any(v and c is None for v, c in zip(node.inputs[1:], node.constants[1:], strict=True)):
        raise NotSamplewise
    return node.constants[1:]


def _sliced(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    """The sample axis must come out whole and in order."""
    starts, ends, where, steps = (*_parameters(node), None, None)[:4]
    if axes[0] is None or starts is None or ends is None:
        raise NotSamplewise
    samples = range(_input_shape(node)[axes[0]])
    if samples[_slices(node, starts, ends, where, steps)[axes[0]]] != samples:
        raise NotSamplewise
    return axes[0]


@operator("Slice", batch=_sliced)
def slice_(
    node: Node,
    data: Array,
    starts: Array,
    ends: Array,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array:
    return data[_slices(node, starts, ends, axes, steps)]


@vjp("Slice", wrt="data")
def slice_data(
    node: Node,
    R: Array,
    *,
    starts: Array,
    ends: Array,
    axes: Array | None,
    steps: Array | None,
) -> Array:
    gradient = np.zeros_like(R, shape=_input_shape(node))
    gradient[_slices(node, starts, ends, axes, steps)] = R
    return gradient


def _gathered(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    rank = len(_input_shape(node))
    axis = node["axis"] % rank
    if axes[0] is None or axes[1] is not None or axes[0] == axis:
        raise NotSamplewise
    inserted = len(node.input_shapes[1]) - 1
    return axes[0] if axes[0] < axis else axes[0] + inserted


@operator("Gather", batch=_gathered)
def gather(node: Node, data: Array, indices: Array) -> Array:
    return np.take(data, indices, axis=node["axis"])


@vjp("Gather", wrt="data")
def gather_data(node: Node, R: Array, *, indices: Array) -> Array:
    shape = _input_shape(node)
    axis = node["axis"] % len(shape)
    gradient = np.zeros_like(R, shape=shape)
    np.add.at(gradient, (slice(None),) * axis + (indices,), R)
    return gradient


def _pad_widths(node: Node, pads: Array, axes: Array | None) -> list[tuple[int, int]]:
    rank = len(_input_shape(node))
    where = range(rank) if axes is None else [int(a) % rank for a in axes]
    widths = [(0, 0)] * rank
    for i, axis in enumerate(where):
        widths[axis] = (int(pads[i]), int(pads[len(pads) // 2 + i]))
    return widths


def _crop(x: Array, widths: list[tuple[int, int]]) -> Array:
    """Negative widths cut."""
    return x[
        tuple(slice(max(-b, 0), n - max(-e, 0)) for n, (b, e) in zip(x.shape, widths, strict=True))
    ]


def _padded(x: Array, widths: list[tuple[int, int]], mode: Any, **options: Any) -> Array:
    return np.pad(_crop(x, widths), [(max(b, 0), max(e, 0)) for b, e in widths], mode, **options)


def _not_padded(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    pads, _, where = (*_parameters(node), None, None)[:3]
    if axes[0] is None or pads is None or any(_pad_widths(node, pads, where)[axes[0]]):
        raise NotSamplewise
    return axes[0]


@operator("Pad", batch=_not_padded)
def pad(
    node: Node,
    data: Array,
    pads: Array,
    constant_value: Array | None = None,
    axes: Array | None = None,
) -> Array:
    widths, mode = _pad_widths(node, pads, axes), node["mode"]
    if mode != "constant":
        return _padded(data, widths, mode)
    value = 0 if constant_value is None else constant_value.item()
    return _padded(data, widths, mode, constant_values=value)


@vjp("Pad", wrt="data")
def pad_data(node: Node, R: Array, *, pads: Array, axes: Array | None) -> Array:
    """Every input cell collects the gradient of all output cells that are copies of it."""
    shape, widths = _input_shape(node), _pad_widths(node, pads, axes)
    if node["mode"] == "constant":
        return _padded(R, [(-b, -e) for b, e in widths], "constant")
    for axis, width in enumerate(widths):
        if any(width):
            source = _padded(np.arange(shape[axis]), [width], node["mode"])
            folded = np.zeros_like(R, shape=(*R.shape[:axis], shape[axis], *R.shape[axis + 1 :]))
            index: Any = (slice(None),) * axis + (source,)
            np.add.at(folded, index, R)
            R = folded
    return R


@operator("Expand", batch=elementwise)
def expand(node: Node, input: Array, shape: Array) -> Array:
    return np.broadcast_to(input, np.broadcast_shapes(input.shape, tuple(int(n) for n in shape)))


@vjp("Expand", wrt="input")
def expand_input(node: Node, R: Array) -> Array:
    return unbroadcast(R, node.input_shapes[0])


def _not_repeated(node: Node, axes: tuple[SampleAxis, ...]) -> SampleAxis:
    axis = axes[0]
    if axis is None or node.output_shapes[0][axis] != _input_shape(node)[axis]:
        raise NotSamplewise
    return axis


@operator("Tile", batch=_not_repeated)
def tile(node: Node, input: Array, repeats: Array) -> Array:
    return np.tile(input, [int(n) for n in repeats])


@vjp("Tile", wrt="input")
def tile_input(node: Node, R: Array) -> Array:
    shape = _input_shape(node)
    split = [n for whole, part in zip(R.shape, shape, strict=True) for n in (whole // part, part)]
    return R.reshape(split).sum(axis=tuple(range(0, 2 * len(shape), 2)))


@operator("Constant")
def constant(node: Node) -> Array:
    ((name, value),) = node.attributes.items()
    if name == "sparse_value":
        raise ValueError("sparse constants are not supported")
    kinds = {"value_float": np.float32, "value_string": np.object_}
    return np.asarray(value, kinds.get(name.removesuffix("s")))


@operator("ConstantOfShape")
def constant_of_shape(node: Node, input: Array) -> Array:
    value = node.attributes.get("value", np.zeros(1, np.float32))
    return np.full(tuple(int(n) for n in input), value.item(), value.dtype)


@operator("Shape")
def shape(node: Node, data: Array) -> Array:
    return np.asarray(data.shape[node.attributes.get("start", 0) : node.attributes.get("end")])


@operator("Size")
def size(node: Node, data: Array) -> Array:
    return np.asarray(data.size)
