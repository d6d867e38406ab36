"""One dialect: every node is brought to the form that the newest ONNX opset gives it.

Attributes that later became inputs become constant inputs, defaults are filled in, and ``auto_pad``
becomes explicit ``pads``. What remains different between versions and cannot be expressed that way
is listed here, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, defs, numpy_helper

Shape = tuple[int, ...]

# Attributes that became inputs under another name.
_RENAMED = {("Pad", "constant_value"): "value", ("TopK", "K"): "k"}
_WINDOWED = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "MaxUnpool", "DeformConv"}
_SOFTMAXES = {"Softmax", "LogSoftmax", "Hardmax"}


@cache
def schema(op: str, opset: int, domain: str = "") -> defs.OpSchema | None:
    """The operator's definition in that opset, or None when onnx does not know it."""
    try:
        return defs.get_schema(op, opset, domain)
    except (defs.SchemaError, TypeError):  # a name that is not UTF-8 arrives as bytes
        return None


def attributes(node: onnx.NodeProto, opset: int) -> dict[str, Any]:
    """The node's attributes as Python values, with the defaults of its own opset.

    Those that it does not have yet mean, by their default, what it did without them; but see
    `modern`.
    """
    values: dict[str, Any] = {}
    for version in (defs.onnx_opset_version(), opset):
        definition = schema(node.op_type, version, node.domain)
        for name, attribute in definition.attributes.items() if definition else ():
            if attribute.default_value.type != AttributeProto.UNDEFINED:
                values[name] = _value(attribute.default_value)
    values.update({a.name: _value(a) for a in node.attribute})
    return values


def _value(attribute: onnx.AttributeProto) -> Any:
    if attribute.type == AttributeProto.TENSOR:
        return numpy_helper.to_array(attribute.t)
    if attribute.type == AttributeProto.GRAPH:
        return attribute.g
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == AttributeProto.STRINGS:
        return tuple(text.decode("utf-8", "replace") for text in value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return tuple(value) if isinstance(value, list) else value


def attributes_to_inputs(
    op: str, opset: int, inputs: list[str], values: dict[str, Any], dtype: np.dtype[Any]
) -> dict[int, np.ndarray]:
    """Move attributes that the newest opset has as inputs out of `values`.

    Returns the constants by input position. Squeeze's ``axes``, Clip's ``min`` and ``max``, Pad's
    ``pads``, Slice's ``starts`` … all follow from comparing the two definitions.

    Parameters
    ----------
    dtype : numpy.dtype
        Of the node's first input; floating-point attributes take it.
    """
    old, new = schema(op, opset), schema(op, defs.onnx_opset_version())
    if old is None or new is None or old.since_version == new.since_version:
        return {}
    constants = {}
    for position, parameter in enumerate(new.inputs):
        name = _RENAMED.get((op, parameter.name), parameter.name)
        if name in old.attributes and name in values and position >= len(inputs):
            value = values.pop(name)
            kind = dtype if isinstance(value, float) else None
            constants[position] = np.asarray(value, dtype=kind)
        elif name in old.attributes:
            values.pop(name, None)
    return constants


def modern(op: str, opset: int, inputs: list[str], values: dict[str, Any]) -> str:
    """The operator's name today; what its inputs and defaults meant before is settled in place."""
    if op == "Scatter":
        return "ScatterElements"
    if op == "Upsample" or (op == "Resize" and opset < 11):
        inputs.insert(1, "")  # roi
        values.update(coordinate_transformation_mode="asymmetric", nearest_mode="floor")
        return "Resize"
    if op == "RoiAlign" and opset < 16:
        values["coordinate_transformation_mode"] = "output_half_pixel"
    return op


def settle(op: str, opset: int, values: dict[str, Any], shapes: list[Shape]) -> None:
    """Resolve in place what depends on input shapes: pads, softmax axes, omitted kernel shapes."""
    if op in _WINDOWED and shapes[0]:
        _settle_window(op, values, shapes)
    elif op in _SOFTMAXES and shapes[0]:
        rank = len(shapes[0])
        axis = values.pop("axis") % max(rank, 1)
        # Before opset 13 the input is a matrix: everything from `axis` on is one dimension.
        values["axes"] = tuple(range(axis, rank)) if opset < 13 else (axis,)
    elif op == "BatchNormalization" and values.get("training_mode"):
        values["training_mode"] = 0  # some exporters leave it set; inference is what is explained


def _settle_window(op: str, values: dict[str, Any], shapes: list[Shape]) -> None:
    spatial = shapes[0][2:]
    if "kernel_shape" not in values:
        values["kernel_shape"] = shapes[1][2:]
    values.setdefault("strides", (1,) * len(spatial))
    values.setdefault("dilations", (1,) * len(spatial))
    values.setdefault("pads", (0,) * (2 * len(spatial)))
    auto_pad = values.pop("auto_pad", "NOTSET")
    if op == "ConvTranspose":
        _settle_conv_transpose(values, spatial, auto_pad)
    elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        values["pads"] = same_pads(spatial, values, lower=auto_pad == "SAME_LOWER")
    elif auto_pad == "VALID":
        values["pads"] = (0,) * (2 * len(spatial))


def same_pads(spatial: Shape, values: Mapping[str, Any], lower: bool = False) -> Shape:
    """TensorFlow's SAME padding, ONNX's ``auto_pad = SAME_UPPER`` (or ``SAME_LOWER``).

    Parameters
    ----------
    spatial : tuple of int
        Input extent along each spatial axis.
    values : mapping
        ``kernel_shape``, ``strides`` and ``dilations``.

    Returns
    -------
    tuple of int
        ``pads`` in ONNX order: all begins, then all ends.
    """
    begins, ends = [], []
    for size, kernel, stride, dilation in zip(
        spatial, values["kernel_shape"], values["strides"], values["dilations"], strict=True
    ):
        extent = (kernel - 1) * dilation + 1
        total = max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
        small, large = total // 2, total - total // 2
        begins.append(large if lower else small)
        ends.append(small if lower else large)
    return (*begins, *ends)


def _settle_conv_transpose(values: dict[str, Any], spatial: Shape, auto_pad: str) -> None:
    """Make ``output_padding`` and ``pads`` explicit; ``output_shape`` wins over ``pads``."""
    rank = len(spatial)
    extra = values.setdefault("output_padding", (0,) * rank)
    full = [
        (size - 1) * stride + (kernel - 1) * dilation + 1 + more
        for size, stride, kernel, dilation, more in zip(
            spatial,
            values["strides"],
            values["kernel_shape"],
            values["dilations"],
            extra,
            strict=True,
        )
    ]
    wanted = values.pop("output_shape", None)
    if wanted is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = tuple(n * s for n, s in zip(spatial, values["strides"], strict=True))
    if wanted is not None:
        totals = [max(f - w, 0) for f, w in zip(full, wanted[-rank:], strict=True)]
        # ONNX gives an odd padding's larger part to the begin, except with SAME_UPPER.
        begins = [t // 2 if auto_pad == "SAME_UPPER" else t - t // 2 for t in totals]
        values["pads"] = (*begins, *[t - b for t, b in zip(totals, begins, strict=True)])
