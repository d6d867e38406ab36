"""Every operator against ONNX's own node cases, and the table that says so."""

from __future__ import annotations

from collections import Counter

import pytest
from node_cases import NEWEST, RENAMED, TABLE, cases, count, differentiable, table
from onnx import defs

from rectgrad_ref.rules.registry import OPERATORS as RULES
from rectgrad_ref.rules.registry import find_vjp

OPERATORS = sorted({s.name for s in defs.get_all_schemas() if not s.domain})


@pytest.mark.parametrize("op", OPERATORS)
def test_cases(op: str) -> None:
    """Values and gradients are right, and nothing differentiable is refused."""
    if op not in cases():
        pytest.skip("onnx has no node case for it")
    assert not count(op).refused


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_onnxruntime_agrees() -> None:
    """The values that the backend ``cpu`` reads, and those inside of operators, are ours."""
    pytest.importorskip("onnxruntime")
    agreeing = 0
    for case in (case for group in cases().values() for case in group):
        if case.excluded is None and case.varied and count(case.op).forward and not case.optional:
            agreeing += case.check_onnxruntime()
    assert agreeing > 500


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_earlier_versions() -> None:
    """What a node meant before, against onnxruntime at that opset and finite differences."""
    pytest.importorskip("onnxruntime")
    seen: Counter[tuple[str, int]] = Counter()
    for case in (case for group in cases().values() for case in group):
        if case.excluded or not case.varied or case.optional or not case.check_onnxruntime():
            continue
        for earlier in case.earlier():
            if seen[case.op, earlier.opset] < 3 and earlier.check_onnxruntime(stored=False):
                seen[case.op, earlier.opset] += 1
                if not case.only_integers:
                    earlier.check_backward()
    assert len(seen) > 150


def test_every_differentiable_operator_has_a_gradient() -> None:
    """For each input that ONNX tags: by a rule, or by a body whose gradient was checked."""
    tagged = {op: inputs for op in OPERATORS if (inputs := differentiable(op, NEWEST))}
    assert len(tagged) >= 121
    for op, inputs in tagged.items():
        name = RENAMED.get(op, op)
        if name in RULES:
            assert all(find_vjp(name, position) for position in inputs), op
        else:
            assert count(op).backward, op


def test_table_is_up_to_date() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(), (
        "run: python tests/conformance/node_cases.py"
    )
