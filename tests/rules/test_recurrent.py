"""Recurrent layers with all their inputs, against finite differences and onnxruntime."""

from __future__ import annotations

import numpy as np
from helpers import Case, generators, rule_tests
from hypothesis import strategies as st

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@st.composite
def layers(draw: st.DrawFn, op: str) -> Case:
    rng = draw(generators())
    steps, batch, size, hidden = (draw(st.integers(1, 3)) for _ in range(4))
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    count = 2 if direction == "bidirectional" else 1

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    rows = GATES[op] * hidden
    attributes = {"hidden_size": hidden, "direction": direction}
    if op == "GRU":
        attributes["linear_before_reset"] = draw(st.integers(0, 1))
    lengths = rng.integers(1, steps + 1, batch).astype(np.int32)
    operands: list[np.ndarray | None] = [
        normal(steps, batch, size),
        normal(count, rows, size),
        normal(count, rows, hidden),
        normal(count, 2 * rows) if draw(st.booleans()) else None,
        lengths if draw(st.booleans()) else None,
        normal(count, batch, hidden) if draw(st.booleans()) else None,
    ]
    if op == "LSTM":
        operands.append(normal(count, batch, hidden) if draw(st.booleans()) else None)
        operands.append(normal(count, 3 * hidden) if draw(st.booleans()) else None)
        attributes["input_forget"] = 0
    return Case(op, tuple(operands), attributes, outputs=3 if op == "LSTM" else 2)


CASES = {op: layers(op) for op in GATES}

test_vjp, test_forward = rule_tests(CASES)
