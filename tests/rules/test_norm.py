"""Normalisations and softmax against finite differences and onnxruntime."""

from __future__ import annotations

from helpers import NEWEST, Case, generators, rule_tests, shapes, spread
from hypothesis import strategies as st


@st.composite
def batch_normalizations(draw: st.DrawFn) -> Case:
    rng, shape = draw(generators()), draw(shapes(2, 5))
    attributes = {"epsilon": draw(st.sampled_from([1e-5, 1e-2]))}
    opset = draw(st.sampled_from([7, 9, 14, NEWEST]))
    per = shape[1:2]
    if opset == 7 and draw(st.booleans()):
        attributes["spatial"], per = 0, shape[1:]
    scale, B, mean = (spread(rng, *per) for _ in range(3))
    operands = (spread(rng, *shape), scale, B, mean, spread(rng, *per, low=0.2))
    return Case("BatchNormalization", operands, attributes, opset=opset)


@st.composite
def lrns(draw: st.DrawFn) -> Case:
    spatial = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))  # onnxruntime: 4-D only
    channels, size = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 5]))
    attributes = {
        "size": size,
        "alpha": 0.3,
        "beta": 0.75,
        "bias": draw(st.sampled_from([1.0, 2.0])),
    }
    return Case("LRN", (spread(draw(generators()), 2, channels, *spatial),), attributes)


@st.composite
def softmaxes(draw: st.DrawFn, op: str) -> Case:
    """Before opset 13 everything from `axis` on is one dimension."""
    shape = draw(shapes(1, 4))
    attributes = {"axis": draw(st.integers(-len(shape), len(shape) - 1))}
    opset = draw(st.sampled_from([11, 13, NEWEST]))
    return Case(op, (spread(draw(generators()), *shape),), attributes, opset=opset)


@st.composite
def layer_normalizations(draw: st.DrawFn) -> Case:
    shape, rng = draw(shapes(2, 4)), draw(generators())
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    normal = shape[axis:]
    B = spread(rng, *normal) if draw(st.booleans()) else None
    operands = (spread(rng, *shape), spread(rng, *normal), B)
    return Case("LayerNormalization", operands, {"axis": axis, "epsilon": 1e-2})


@st.composite
def instance_normalizations(draw: st.DrawFn) -> Case:
    shape, rng = draw(shapes(3, 5)), draw(generators())
    operands = (spread(rng, *shape), spread(rng, shape[1]), spread(rng, shape[1]))
    return Case("InstanceNormalization", operands, {"epsilon": 1e-2})


CASES = {
    "BatchNormalization": batch_normalizations(),
    "LRN": lrns(),
    "Softmax": softmaxes("Softmax"),
    "LogSoftmax": softmaxes("LogSoftmax"),
    "LayerNormalization": layer_normalizations(),
    "InstanceNormalization": instance_normalizations(),
}

test_vjp, test_forward = rule_tests(CASES)
