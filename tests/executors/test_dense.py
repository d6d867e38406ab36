"""Dense transposes against the sum over the kernel's offsets, in float64."""

from __future__ import annotations

from math import prod
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
    transpose = DenseTransposes()(node, 0, 1)
    assert transpose is not None
    found = transpose(R, dirty)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (7, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 1, 1, 1), (3, 0, 2, 1)], ids=str)
@pytest.mark.parametrize("height", [8, 13])
@pytest.mark.parametrize("members", [2, 3, 7])
@pytest.mark.parametrize("in_place", [False, True])
def test_parts_are_rows(
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, ...],
    height: int,
    members: int,
    in_place: bool,
) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 20, *kernel)).astype(np.float32)
    node = convolution(20, (height, 9), weights, strides=strides, pads=pads)
    _, c, h, w = node.output_shapes[0]
    R = rng.standard_normal((2, h, w, c)).astype(np.float32)
    expected = transposed(node, R)
    parts, transposes = parts_of(node, members), DenseTransposes()
    found = np.full_like(expected, np.nan, np.float32)
    for member in range(members):
        transpose = transposes(node, member, members)
        assert (transpose is None) == (member >= parts)
        if transpose is None:
            continue
        rows = expected[:, transpose.rows].shape
        out = dirty(prod(rows)).reshape(rows) if in_place else None
        result = transpose(R, dirty, out)
        assert out is None or result is out
        assert np.isnan(found[:, transpose.rows]).all()
        found[:, transpose.rows] = result
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("pads", [(1, 0, 0, 0), (0, 1, 0, 0)], ids=str)
def test_nothing_reaches_a_line_between_two_strides(pads: tuple[int, ...]) -> None:
    weights = np.ones((4, 20, 1, 1), np.float32)
    extent = (1, 8) if pads[0] else (8, 1)
    node = convolution(20, extent, weights, strides=(2, 2), pads=pads)
    _, c, h, w = node.output_shapes[0]
    transpose = DenseTransposes()(node, 0, 2)
    assert transpose is not None
    assert not transpose(np.ones((2, h, w, c), np.float32), dirty).any()


def test_slabs_without_padding_share_a_session() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 20, 1, 3)).astype(np.float32)
    node = convolution(20, (9, 9), weights, pads=(0, 1, 0, 1))
    transposes = DenseTransposes()
    for part in range(3):
        transposes(node, part, 3)
    assert len(transposes._sessions) == 1
