"""Deformable convolution against finite differences and onnxruntime."""

from __future__ import annotations

import numpy as np
from helpers import Case, generators, rule_tests
from hypothesis import strategies as st


@st.composite
def deformable(draw: st.DrawFn) -> Case:
    rng = draw(generators())
    group, offset_group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 3)) for _ in range(2)]
    window = {
        "kernel_shape": kernel,
        "strides": [draw(st.integers(1, 2)) for _ in range(2)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(2)],
        "pads": [draw(st.integers(0, 2)) for _ in range(4)],
    }
    size = [5, 6]
    output = [
        (n + window["pads"][i] + window["pads"][2 + i] - (k - 1) * window["dilations"][i] - 1)
        // window["strides"][i]
        + 1
        for i, (n, k) in enumerate(zip(size, kernel, strict=True))
    ]

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    cells = offset_group * kernel[0] * kernel[1]
    operands = (
        normal(2, 4, *size),
        normal(2 * group, 4 // group, *kernel),
        normal(2, 2 * cells, *output),
        normal(2 * group) if draw(st.booleans()) else None,
        normal(2, cells, *output) if draw(st.booleans()) else None,
    )
    attributes = window | {"group": group, "offset_group": offset_group}
    return Case("DeformConv", operands, attributes, opset=19)


CASES = {"DeformConv": deformable()}

test_vjp, test_forward = rule_tests(CASES)
