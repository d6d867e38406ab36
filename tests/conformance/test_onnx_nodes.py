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


def test_table_is_up_to_date() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(), (
        "run: python tests/conformance/node_cases.py"
    )
