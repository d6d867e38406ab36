"""Damaged models end in a valid model or in an error with a reason, in bounded time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from helpers import CONVOLUTIONAL, NEWEST, float32, model
from hypothesis import given, settings
from mutations import damage_bytes, damage_model

from rectgrad_ref import Explainer
from rectgrad_ref.errors import InvalidModel, UnsupportedOperator

TESTS = Path(__file__).resolve().parents[1]
CLASSIFIER = model(
    CONVOLUTIONAL,
    constants={"W": float32(2, 3, 3, 3), "V": float32(4, 2), "b": float32(4)},
)
LOOPING = model(
    """(float[N, 3] x) => (float[N, 3] y) {
        passes = Constant<value = int64 {3}>()
        go = Constant<value = bool {1}>()
        l = Loop(passes, go, x) <body = body (int64 i, bool on, float[N, 3] v)
            => (bool more, float[N, 3] w) { more = Identity(on)  w = Tanh(v) }>
        s = Sigmoid(l)
        g = Mul(l, s)
        y = MatMul(g, W)
    }""",
    constants={"W": float32(3, 3)},
)


def loaded(data: bytes) -> None:
    try:
        Explainer(data, backend="reference").plan()
    except (InvalidModel, UnsupportedOperator) as error:
        assert str(error).strip()


@settings(max_examples=400)
@given(random=st.randoms(use_true_random=False))
def test_damage_that_hypothesis_chooses(random: Random) -> None:
    sound, other = random.sample((CLASSIFIER, LOOPING), 2)
    if random.random() < 0.5:
        loaded(damage_model(sound, other, random).SerializeToString())
    else:
        loaded(damage_bytes(sound.SerializeToString(), other.SerializeToString(), random))


def run(first: int, count: int, *options: str) -> Counter[str]:
    """How many of these inputs ended how; see `loader.py`."""
    folders = map(str, (TESTS / "fuzz", TESTS / "conformance"))
    result = subprocess.run(
        [sys.executable, str(TESTS / "fuzz" / "loader.py"), str(first), str(count), *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stderr[-4000:]
    return Counter(json.loads(result.stdout)["ends"])


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_two_thousand_damaged_models() -> None:
    ends = run(0, 2000)
    assert ends.total() == 2000
    assert min(ends.values()) > 30


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("first", range(0, 100_000, 10_000))
def test_a_hundred_thousand_damaged_models(first: int) -> None:
    assert run(first, 10_000, "--all").total() == 10_000


# --- shapes of damage that were found, and mended ------------------------------------------------


def explained(body: str) -> None:
    Explainer(model(f"(float[N, 4] x) => (float[N, 4] y) {{ {body} }}"), backend="reference").plan()


@pytest.mark.parametrize("first", ["Sigmoid", "Tanh"])
def test_many_ways_from_a_gate_are_not_walked_one_by_one(first: str) -> None:
    body, value = f"k = Constant<value_float = 0.0>()  m = Greater(x, k)  v = {first}(x)", "v"
    for i in range(100):
        body += f"  a{i} = Identity({value})  b{i} = Dropout({value})  c{i} = Where(m, a{i}, b{i})"
        value = f"c{i}"
    explained(f"{body}  y = Neg({value})")


def test_a_long_chain_behind_a_gate() -> None:
    body, value = "v = Sigmoid(x)", "v"
    for i in range(2000):
        body += f"  a{i} = Identity({value})"
        value = f"a{i}"
    explained(f"{body}  y = Neg({value})")


@pytest.mark.parametrize(
    "body",
    [
        "c = ConstantOfShape(big)",
        "c = Range(zero, million, one)  d = Reshape(c, column)  e = Add(c, d)  c2 = ReduceSum(e)",
        "c = Tile(big, big)",
        "c = OneHot(zero, million, big)",
    ],
)
def test_constants_that_would_fill_the_memory(body: str) -> None:
    constants = """
        big = Constant<value_ints = [1048576, 1048576]>()  zero = Constant<value_int = 0>()
        million = Constant<value_int = 1000000>()  one = Constant<value_int = 1>()
        column = Constant<value_ints = [-1, 1]>()
    """
    last = "c2" if "c2" in body else "c"
    with pytest.raises(InvalidModel, match=r"far larger than its weights|does not fit"):
        explained(f"{constants} {body}  f = Cast<to = 1>({last})  g = ReduceMax<keepdims = 0>(f)"
                  "  y = Add(x, g)")  # fmt: skip


def test_a_convolution_of_constants_that_would_take_minutes() -> None:
    proto = model(
        """(float[N, 4] x) => (float[N, 4] y) {
            c = Conv(I, W)  g = ReduceMax<keepdims = 0>(c)  y = Add(x, g)
        }""",
        constants={
            "I": np.zeros((1, 1, 1400, 1400), np.float32),
            "W": np.zeros((1, 1, 700, 700), np.float32),
        },
    )
    with pytest.raises(InvalidModel, match="Conv 'c' is applied to constants"):
        Explainer(proto, backend="reference").plan()


@pytest.mark.parametrize("calls", [{"a": "a"}, {"a": "b", "b": "a"}])
def test_functions_that_call_themselves(calls: dict[str, str]) -> None:
    functions = " ".join(
        f'<domain: "own", opset_import: ["": {NEWEST}, "own": 1]> {name} (v) => (w) '
        f"{{ w = own.{called}(v) }}"
        for name, called in calls.items()
    )
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {NEWEST}, "own": 1]>'
        f"g (float[N, 3] x) => (float[N, 3] y) {{ y = own.a(x) }} {functions}"
    )
    with pytest.raises(InvalidModel, match=r"functions cannot be written out: .*cycle"):
        Explainer(proto, backend="reference")


def test_functions_that_would_be_a_million_nodes() -> None:
    imports = f'opset_import: ["": {NEWEST}, "own": 1]'
    functions = " ".join(
        f'<domain: "own", {imports}> f{i} (v) => (w) {{ u = own.f{i + 1}(v)  w = own.f{i + 1}(u) }}'
        for i in range(20)
    )
    last = f'<domain: "own", {imports}> f20 (v) => (w) {{ w = Relu(v) }}'
    graph = "g (float[N, 3] x) => (float[N, 3] y) { y = own.f0(x) }"
    proto = onnx.parser.parse_model(f"<ir_version: 8, {imports}> {graph} {functions} {last}")
    with pytest.raises(InvalidModel, match="that would be 1048576 nodes"):
        Explainer(proto, backend="reference")
