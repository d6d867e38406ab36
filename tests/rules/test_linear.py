"""Convolutions and matrix products against finite differences and onnxruntime."""

from __future__ import annotations

from helpers import Case, generators, reach, rule_tests, spread, windows
from hypothesis import strategies as st


@st.composite
def convs(draw: st.DrawFn) -> Case:
    rank = draw(st.integers(1, 3))
    window = draw(windows(rank))
    group, per_group, maps = (draw(st.integers(1, 2)) for _ in range(3))
    spatial = [n + draw(st.integers(0, 3)) for n in reach(window)]
    rng = draw(generators())
    X = spread(rng, 2, group * per_group, *spatial)
    W = spread(rng, group * maps, per_group, *window["kernel_shape"])
    B = spread(rng, group * maps) if draw(st.booleans()) else None
    return Case("Conv", (X, W, B), {"group": group, **window})


@st.composite
def conv_transposes(draw: st.DrawFn) -> Case:
    rank = draw(st.integers(1, 3))
    window = draw(windows(rank))
    group, per_group, maps = (draw(st.integers(1, 2)) for _ in range(3))
    spatial = [draw(st.integers(5, 6)) for _ in range(rank)]
    # With SAME and output_padding, onnx and onnxruntime disagree on the output's shape.
    if "pads" in window and draw(st.booleans()):
        window["output_padding"] = [draw(st.integers(0, s - 1)) for s in window["strides"]]
    elif window.get("auto_pad") != "VALID" and draw(st.booleans()):
        window.pop("pads", None)
        full = [
            (n - 1) * s + r
            for n, s, r in zip(spatial, window["strides"], reach(window), strict=True)
        ]
        cut = [draw(st.integers(0, f - n)) for f, n in zip(full, spatial, strict=True)]
        window["output_shape"] = [f - c for f, c in zip(full, cut, strict=True)]
    rng = draw(generators())
    X = spread(rng, 2, group * per_group, *spatial)
    W = spread(rng, group * per_group, maps, *window["kernel_shape"])
    B = spread(rng, group * maps) if draw(st.booleans()) else None
    return Case("ConvTranspose", (X, W, B), {"group": group, **window})


@st.composite
def gemms(draw: st.DrawFn) -> Case:
    m, k, n = (draw(st.integers(1, 4)) for _ in range(3))
    trans_a, trans_b = draw(st.booleans()), draw(st.booleans())
    C_shape = draw(st.sampled_from([None, (), (1,), (n,), (1, n), (m, 1), (m, n), (1, 1)]))
    rng = draw(generators())
    A = spread(rng, *((k, m) if trans_a else (m, k)))
    B = spread(rng, *((n, k) if trans_b else (k, n)))
    C = None if C_shape is None else spread(rng, *C_shape)
    scale = st.sampled_from([1.0, 0.5, -2.0])
    attributes = {"transA": int(trans_a), "transB": int(trans_b)}
    attributes |= {"alpha": draw(scale), "beta": draw(scale)}
    return Case("Gemm", (A, B, C), attributes)


@st.composite
def matmuls(draw: st.DrawFn) -> Case:
    m, k, n = (draw(st.integers(1, 3)) for _ in range(3))
    stacks = [(), (2,), (1,), (3, 2), (1, 2), (3, 1)]
    left = draw(st.sampled_from([(k,), *((*stack, m, k) for stack in stacks)]))
    right = draw(st.sampled_from([(k,), *((*stack, k, n) for stack in stacks)]))
    rng = draw(generators())
    return Case("MatMul", (spread(rng, *left), spread(rng, *right)))


CASES = {
    "Conv": convs(),
    "ConvTranspose": conv_transposes(),
    "Gemm": gemms(),
    "MatMul": matmuls(),
}

test_vjp, test_forward = rule_tests(CASES)
