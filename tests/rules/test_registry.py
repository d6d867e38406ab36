"""The operator table is complete: nothing in it goes unchecked."""

from __future__ import annotations

from pathlib import Path

import test_activation
import test_arithmetic
import test_deform
import test_index
import test_linear
import test_norm
import test_pool
import test_recurrent
import test_reduce
import test_resize
import test_sample
import test_shape
from onnx import defs

from rectgrad_ref.rules import OPERATORS

FAMILIES = (
    test_activation,
    test_arithmetic,
    test_deform,
    test_index,
    test_linear,
    test_norm,
    test_pool,
    test_recurrent,
    test_reduce,
    test_resize,
    test_sample,
    test_shape,
)
TABLE = Path(__file__).resolve().parents[2] / "docs" / "operators.md"
# They compute from shapes and constants alone; test_shape and test_graph check them folded.
FOLDED = {"Constant", "ConstantOfShape", "Range", "Shape", "Size"}
# With tests of their own: no other implementation at hand, or a gradient that is none.
SPECIAL = {"GlobalLpPool", "QuantizeLinear", "DequantizeLinear"}


def node_cases() -> dict[str, tuple[bool, bool]]:
    """Operator → whether ONNX's node cases check its values, and its gradients."""
    rows = [row.split(" | ") for row in TABLE.read_text(encoding="utf-8").splitlines()]
    return {
        row[0].removeprefix("| "): (row[3] != "0", row[4] not in ("0", "–"))
        for row in rows
        if len(row) == 6 and row[2] == "rule"
    }


def test_every_operator_is_checked() -> None:
    """By generated cases, by ONNX's own, or by both."""
    generated = {op for family in FAMILIES for op in family.CASES}
    for op in OPERATORS.keys() - FOLDED - SPECIAL - generated:
        values, gradients = node_cases()[op]
        assert values, op
        assert gradients or not OPERATORS[op].vjps, op


def test_rules_use_onnx_names() -> None:
    for op, known in OPERATORS.items():
        schema = defs.get_schema(op, defs.onnx_opset_version())
        inputs, outputs = ({p.name for p in formals} for formals in (schema.inputs, schema.outputs))
        for wrt, rule in known.vjps.items():
            assert wrt in inputs, op
            assert set(rule.reads) <= inputs | outputs, op
