"""Operators as older opsets have them, against onnxruntime and finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import backward, float32, model, run_elsewhere

from rectgrad_ref.forward import NumpyForward
from rectgrad_ref.graph import freeze
from rectgrad_ref.model import read_model

INDICES = np.array([[[[1, 0, 3], [2, 2, 0]]] * 4])
# Opset, and what makes h of an x of shape (1, 4, 4, 6), with its constants.
OLD: list[tuple[int, str, dict[str, Any]]] = [
    (7, 'h = Upsample<mode = "nearest", scales = [1.0, 1.0, 2.0, 3.0]>(x)', {}),
    (7, 'h = Upsample<mode = "linear", scales = [1.0, 1.0, 2.0, 2.0]>(x)', {}),
    (9, 'h = Upsample<mode = "nearest">(x, s)', {"s": np.float32([1, 1, 2, 2])}),
    (10, 'h = Resize<mode = "nearest">(x, s)', {"s": np.float32([1, 1, 0.5, 2])}),
    (
        11,
        'h = Resize<mode = "cubic", coordinate_transformation_mode = "align_corners">(x, r, r, n)',
        {"r": np.zeros(0, np.float32), "n": np.array([1, 4, 7, 3])},
    ),
    (9, "h = Scatter<axis = 2>(x, i, u)", {"i": INDICES[..., :1], "u": float32(1, 4, 2, 1)}),
    (11, "h = GatherElements<axis = 3>(x, i)", {"i": INDICES}),
    (7, "h, i = TopK<axis = 1, k = 2>(x)", {}),
    (10, "h, i = TopK<axis = 3>(x, k)", {"k": np.array([3])}),
    (7, "h = ReduceL1<axes = [1, 2]>(x)", {}),
    (11, "h = ReduceL2<axes = [-1], keepdims = 0>(x)", {}),
    (13, "h = ReduceLogSumExp<axes = [1]>(x)", {}),
    (11, "h = ReduceSumSquare(x)", {}),
    (17, "h = ReduceProd<axes = [3]>(x)", {}),
    (7, "h = DepthToSpace<blocksize = 2>(x)", {}),
    (11, 'h = DepthToSpace<blocksize = 2, mode = "CRD">(x)', {}),
    (7, "h = SpaceToDepth<blocksize = 2>(x)", {}),
    (9, "h = MeanVarianceNormalization(x)", {}),
    (13, "h = MeanVarianceNormalization<axes = [2, 3]>(x)", {}),
    (7, "h = LpNormalization<axis = 1, p = 2>(x)", {}),
    (7, "h = LpPool<kernel_shape = [2, 2], strides = [2, 2], p = 2>(x)", {}),
    (7, "p = LogSoftmax<axis = 2>(x)  h = Neg(p)", {}),
    (
        18,
        "h = GroupNormalization<num_groups = 2>(x, a, b)",
        {"a": float32(2), "b": float32(2, seed=1)},
    ),
    (16, 'h = GridSample<mode = "bicubic">(x, g)', {"g": float32(1, 3, 2, 2) / 2}),
    (12, 'h = Einsum<equation = "bchw,cd->bdhw">(x, m)', {"m": float32(4, 3)}),
    (11, "h = CumSum<reverse = 1>(x, a)", {"a": np.array(2)}),
    (11, "h = GatherND(x, i)", {"i": np.array([[0, 2, 1, 3], [0, 0, 0, 0]])}),
    (
        10,
        "h = RoiAlign<output_height = 2, output_width = 2, sampling_ratio = 2>(x, r, b)",
        {"r": np.float32([[0, 1, 2, 3], [1, 0, 3, 2]]), "b": np.array([0, 0])},
    ),
    (17, "e = Exp(x)  h = ReduceLogSum<axes = [1]>(e)", {}),
]


@pytest.mark.parametrize(("opset", "body", "constants"), OLD)
def test_old_form(opset: int, body: str, constants: dict[str, Any]) -> None:
    text = f"(float[1, 4, 4, 6] x) => (float[1, K] y) {{ {body}  y = Flatten<axis = 0>(h) }}"
    proto = model(text, opset=opset, constants=constants)
    graph = freeze(read_model(proto), (1, 4, 4, 6))
    x, rng, h = float32(1, 4, 4, 6, seed=7), np.random.default_rng(0), 1e-6

    def scores(point: np.ndarray) -> np.ndarray:
        return NumpyForward(np.float64)(graph, point, [graph.logits])[graph.logits]

    point = x.astype(np.float64)
    np.testing.assert_allclose(
        scores(point).reshape(1, -1), run_elsewhere(proto, x), rtol=1e-4, atol=1e-5
    )
    u, v = rng.normal(size=scores(point).shape), rng.normal(size=x.shape)
    numeric = (u * (scores(point + h * v) - scores(point - h * v))).sum() / (2 * h)
    np.testing.assert_allclose((backward(graph, point, u) * v).sum(), numeric, rtol=1e-6)
