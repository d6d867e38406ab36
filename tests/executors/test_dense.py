"""Dense transposes against the sum over the kernel's offsets, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import model

from rectgrad_ref.executors import dense
from rectgrad_ref.executors.dense import DenseTransposes, parts_of
from rectgrad_ref.graph import Node, freeze
from rectgrad_ref.model import read_model


def convolution(
    channels: int, extent: tuple[int, int], weights: np.ndarray, **attributes: Any
) -> Node:
    """The node of a model that consists of it and a sum over pixels."""
    settings = ", ".join(f"{key} = {_text(value)}" for key, value in attributes.items())
    (height, width), outputs = extent, len(weights)
    proto = model(
        f"""(float[N, {channels}, {height}, {width}] x) => (float[N, {outputs}] logits) {{
            y = Conv <{settings}> (x, W)
            pooled = GlobalAveragePool (y)
            logits = Flatten (pooled)
        }}""",
        constants={"W": weights},
    )
    graph = freeze(read_model(proto), (2, channels, *extent))
    return next(node for node in graph.nodes if node.op == "Conv")


def _text(value: int | tuple[int, ...]) -> str:
    return str(value) if isinstance(value, int) else f"[{', '.join(map(str, value))}]"


def transposed(node: Node, R: np.ndarray) -> np.ndarray:
    """(n, H_out, W_out, C_out) → (n, H, W, C)."""
    weights = node.constants[1]
    assert weights is not None
    n, group = len(R), node["group"]
    (top, left, bottom, right), (_, channels, height, width) = node["pads"], node.input_shapes[0]
    padded = np.zeros((n, height + top + bottom, width + left + right, channels))
    outs, ins = weights.shape[0] // group, channels // group
    for i, j in np.ndindex(*weights.shape[2:]):
        y, x = i * node["dilations"][0], j * node["dilations"][1]
        rows = slice(y, y + R.shape[1] * node["strides"][0], node["strides"][0])
        columns = slice(x, x + R.shape[2] * node["strides"][1], node["strides"][1])
        for g in range(group):
            out, in_ = slice(g * outs, (g + 1) * outs), slice(g * ins, (g + 1) * ins)
            product = R[..., out] @ weights[out, :, i, j].astype(np.float64)
            padded[:, rows, columns, in_][:, : R.shape[1], : R.shape[2]] += product
    return padded[:, top : top + height, left : left + width]


def dirty(size: int) -> np.ndarray:
    """Room that was used before."""
    return np.full(size, np.nan, np.float32)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 7), (2, 5)], ids=str)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("dilations", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("phased", [0, 10**9], ids=["phases", "ConvTranspose"])
def test_any_convolution(
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, ...],
    dilations: tuple[int, int],
    group: int,
    phased: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense, "_PHASED", phased)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 6 // group, *kernel)).astype(np.float32)
    node = convolution(
        6, (13, 14), weights, strides=strides, pads=pads, dilations=dilations, group=group
    )
    _, c, h, w = node.output_shapes[0]
    R = rng.standard_normal((2, h, w, c)).astype(np.float32)
    expected = transposed(node, R)
    found = DenseTransposes()(node, 0, 1)(R, dirty)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_parts_are_channels(kernel: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 200, kernel, kernel)).astype(np.float32)
    node = convolution(200, (9, 9), weights, strides=(stride, stride))
    _, c, h, w = node.output_shapes[0]
    R = rng.standard_normal((2, h, w, c)).astype(np.float32)
    parts, transposes = parts_of(node, 2), DenseTransposes()
    assert parts == 2
    found = [transposes(node, part, parts)(R, dirty) for part in range(parts)]
    assert [part.shape[-1] for part in found] == [100, 100]
    expected = transposed(node, R)
    joined = np.concatenate(found, axis=-1)
    np.testing.assert_allclose(joined, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
