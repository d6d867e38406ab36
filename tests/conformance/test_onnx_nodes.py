"""Every operator against ONNX's own node cases, and the table that says so."""

from __future__ import annotations

import pytest
from node_cases import TABLE, cases, count, table
from onnx import defs

OPERATORS = sorted({s.name for s in defs.get_all_schemas() if not s.domain})


@pytest.mark.parametrize("op", OPERATORS)
def test_cases(op: str) -> None:
    """Values and gradients are right, and nothing differentiable is refused."""
    if op not in cases():
        pytest.skip("onnx has no node case for it")
    assert not count(op).refused


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_onnxruntime_agrees() -> None:
    """The values that the backend ``cpu`` reads, and those inside of operators, are ours."""
    pytest.importorskip("onnxruntime")
    agreeing = 0
    for case in (case for group in cases().values() for case in group):
        if case.excluded is None and case.varied and count(case.op).forward and not case.optional:
            agreeing += case.check_onnxruntime()
    assert agreeing > 500


def test_table_is_up_to_date() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(), (
        "run: python tests/conformance/node_cases.py"
    )
