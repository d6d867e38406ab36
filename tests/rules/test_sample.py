"""Reading between cells and in pieces, against finite differences and onnxruntime."""

from __future__ import annotations

import numpy as np
from helpers import Case, generators, rule_tests, spread
from hypothesis import strategies as st


@st.composite
def grids(draw: st.DrawFn) -> Case:
    """Onto the image and beyond; in two dimensions, where onnxruntime has all modes."""
    rng = draw(generators())
    X = spread(rng, 2, 2, draw(st.integers(2, 5)), draw(st.integers(2, 5)))
    attributes = {
        "mode": draw(st.sampled_from(["linear", "cubic"])),
        "padding_mode": draw(st.sampled_from(["zeros", "border", "reflection"])),
        "align_corners": draw(st.integers(0, 1)),
    }
    grid = rng.uniform(-1.4, 1.4, (2, 3, 2, 2)).astype(np.float32)
    return Case("GridSample", (X, grid), attributes)


@st.composite
def regions(draw: st.DrawFn, op: str) -> Case:
    rng = draw(generators())
    X = spread(rng, 2, 2, 6, 5)
    begin = rng.uniform(0, 4, (3, 2))
    boxes = np.concatenate([begin, begin + rng.uniform(0.5, 6, (3, 2))], axis=1)
    scale, size = draw(st.sampled_from([0.5, 1.0])), [draw(st.integers(1, 3)) for _ in range(2)]
    which = rng.integers(0, 2, 3)
    if op == "MaxRoiPool":
        rois = np.concatenate([which[:, None], boxes], axis=1).astype(np.float32)
        attributes = {"pooled_shape": size, "spatial_scale": scale}
        return Case(op, (X, rois), attributes, opset=11, constant=frozenset({1}))
    attributes = {
        "output_height": size[0],
        "output_width": size[1],
        "spatial_scale": scale,
        "sampling_ratio": draw(st.integers(0, 2)),
        "mode": draw(st.sampled_from(["avg", "max"])),
    }
    opset = draw(st.sampled_from([10, 16]))
    operands = (X, boxes.astype(np.float32), which)
    return Case(op, operands, attributes, opset=opset)


CASES = {
    "GridSample": grids(),
    "RoiAlign": regions("RoiAlign"),
    "MaxRoiPool": regions("MaxRoiPool"),
}

test_vjp, test_forward = rule_tests(CASES)
