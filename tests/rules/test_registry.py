"""The operator table is complete: nothing in it goes unchecked."""

from __future__ import annotations

import test_activation
import test_arithmetic
import test_linear
import test_norm
import test_pool
import test_reduce
import test_shape
from onnx import defs

from rectgrad_ref.rules import OPERATORS

FAMILIES = (
    test_activation,
    test_arithmetic,
    test_linear,
    test_norm,
    test_pool,
    test_reduce,
    test_shape,
)
# They compute from shapes and constants alone; test_shape and test_graph check them folded.
FOLDED = {"Constant", "ConstantOfShape", "Range", "Shape", "Size"}


def test_every_operator_is_checked() -> None:
    checked = {op for family in FAMILIES for op in family.CASES}
    assert OPERATORS.keys() - FOLDED == checked


def test_rules_use_onnx_names() -> None:
    for op, known in OPERATORS.items():
        schema = defs.get_schema(op, defs.onnx_opset_version())
        inputs, outputs = ({p.name for p in formals} for formals in (schema.inputs, schema.outputs))
        for wrt, rule in known.vjps.items():
            assert wrt in inputs, op
            assert set(rule.reads) <= inputs | outputs, op
