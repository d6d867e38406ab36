"""Which convolutions the padding trick masks."""

from __future__ import annotations

from typing import Any

import nets
import numpy as np
import pytest
from onnx import helper, numpy_helper

from rectgrad_ref.graph import Graph, freeze
from rectgrad_ref.methods.base import trick_convolutions
from rectgrad_ref.model import read_model


def graph(
    size: int,
    kernel: int,
    *,
    op: str = "Conv",
    spatial: int = 2,
    pad_node: list[int] | None = None,
    pad_value: float = 0.0,
    shared: bool = False,
    **attributes: Any,
) -> Graph:
    """A single (transposed) convolution, with a Pad node before it on request."""
    weights = np.ones((2, 2, *[kernel] * spatial), np.float32)
    constants = {"w": weights, "value": np.float32(pad_value)}
    nodes = []
    source = "x"
    if pad_node is not None:
        constants["pads"] = np.array(pad_node, np.int64)
        nodes.append(helper.make_node("Pad", ["x", "pads", "value"], ["padded"]))
        source = "padded"
    nodes.append(helper.make_node(op, [source, "w"], ["y"], name="conv", **attributes))
    pooled = "y"
    if shared:
        nodes.append(helper.make_node("GlobalAveragePool", ["padded"], ["other"]))
        nodes.append(helper.make_node("Add", ["y", "other"], ["both"]))
        pooled = "both"
    nodes.append(helper.make_node("GlobalAveragePool", [pooled], ["mean"]))
    nodes.append(helper.make_node("Flatten", ["mean"], ["logits"]))
    shape = [1, 2, *[size] * spatial]
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    model = nets.model(nodes, shape, "logits", initializers)
    return freeze(read_model(model), tuple(shape))


def masked(found: Graph, trick: Any) -> bool:
    names, _ = trick_convolutions(found, trick)
    assert names <= {"conv"}
    return "conv" in names


CASES: list[tuple[dict[str, Any], bool, bool]] = [
    # (the convolution, padded, what TensorFlow calls SAME)
    ({"size": 8, "kernel": 3, "pads": [1, 1, 1, 1]}, True, True),
    ({"size": 8, "kernel": 3}, False, False),
    ({"size": 8, "kernel": 1}, False, True),
    ({"size": 8, "kernel": 1, "strides": [2, 2]}, False, True),
    ({"size": 8, "kernel": 2, "strides": [2, 2]}, False, False),
    ({"size": 8, "kernel": 3, "strides": [2, 2], "pads": [0, 0, 1, 1]}, True, True),
    ({"size": 8, "kernel": 3, "strides": [2, 2], "pads": [1, 1, 1, 1]}, True, False),
    ({"size": 9, "kernel": 3, "strides": [2, 2], "pads": [1, 1, 1, 1]}, True, True),
    ({"size": 8, "kernel": 3, "strides": [2, 2], "auto_pad": "SAME_UPPER"}, True, True),
    ({"size": 8, "kernel": 3, "strides": [2, 2], "auto_pad": "SAME_LOWER"}, True, False),
    ({"size": 8, "kernel": 3, "auto_pad": "VALID"}, False, False),
    ({"size": 8, "kernel": 4, "pads": [1, 1, 2, 2]}, True, True),
    ({"size": 8, "kernel": 4, "pads": [2, 2, 1, 1]}, True, False),
    ({"size": 8, "kernel": 3, "pads": [2, 2, 2, 2]}, True, False),
    ({"size": 8, "kernel": 3, "dilations": [2, 2], "pads": [2, 2, 2, 2]}, True, True),
    ({"size": 8, "kernel": 3, "pads": [0, 1, 0, 1]}, True, False),
    ({"size": 8, "kernel": 3, "spatial": 1, "pads": [1, 1]}, True, True),
    ({"size": 6, "kernel": 3, "spatial": 3, "pads": [1] * 6}, True, True),
    ({"size": 8, "kernel": 3, "pad_node": [0, 0, 1, 1, 0, 0, 1, 1]}, True, True),
    (
        {"size": 8, "kernel": 3, "strides": [2, 2], "pad_node": [0, 0, 0, 0, 0, 0, 1, 1]},
        True,
        True,
    ),
    (
        {"size": 8, "kernel": 3, "strides": [2, 2], "pad_node": [0, 0, 1, 1, 0, 0, 1, 1]},
        True,
        False,
    ),
    ({"size": 8, "kernel": 3, "pad_node": [0] * 8}, False, False),
    (
        {"size": 8, "kernel": 3, "pad_node": [0, 0, 1, 1, 0, 0, 1, 1], "pad_value": 1.0},
        False,
        False,
    ),
    (
        {"size": 8, "kernel": 3, "pad_node": [0, 0, 1, 1, 0, 0, 1, 1], "shared": True},
        False,
        False,
    ),
    ({"size": 8, "kernel": 3, "op": "ConvTranspose", "pads": [1, 1, 1, 1]}, False, False),
]


@pytest.mark.parametrize(("case", "padded", "same"), CASES)
def test_which_convolutions(case: dict[str, Any], padded: bool, same: bool) -> None:
    found = graph(**case)
    assert masked(found, True) is padded
    assert masked(found, "same") is same
    assert masked(found, False) is False


@pytest.mark.parametrize(("size", "left_alone"), [(1, True), (2, True), (3, False)])
def test_fewer_than_three_cells(size: int, left_alone: bool) -> None:
    found = graph(size, 3, pads=[1, 1, 1, 1])
    names, notes = trick_convolutions(found, True)
    assert bool(names) is not left_alone
    assert [("conv left alone" in note) for note in notes] == [True] * left_alone
    assert trick_convolutions(found, False) == (frozenset(), [])
