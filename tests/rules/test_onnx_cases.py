"""The forward of every operator against the node cases that come with onnx."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from helpers import Case
from onnx import helper
from test_registry import FOLDED

from rectgrad_ref.forward import NumpyForward
from rectgrad_ref.model import OLDEST_OPSET
from rectgrad_ref.rules import OPERATORS

NUMBERS = "fiub"


def cases() -> list[tuple[str, Case, np.ndarray]]:
    """Name, case and expected outputs, joined; inference on numbers only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        collected = collect_testcases(None)
    found = []
    for test in collected:
        (node, *more), opset = test.model.graph.node, test.model.opset_import[0].version
        known = node.op_type in OPERATORS.keys() - FOLDED and not node.domain and not more
        if not known or opset < OLDEST_OPSET or "training" in test.name:
            continue
        names = [value.name for value in test.model.graph.input]
        inputs, outputs = test.data_sets[0]
        given = dict(zip(names, map(np.asarray, inputs), strict=True))
        operands = tuple(given[value] if value else None for value in node.input)
        # Further outputs, such as indices and masks, are not computed.
        count = len(node.output) if node.op_type == "Split" else 1
        arrays = [np.asarray(value) for value in outputs[:count]]
        if any(a is not None and a.dtype.kind not in NUMBERS for a in (*operands, *arrays)):
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        floats = {i for i, a in enumerate(operands) if a is not None and a.dtype.kind == "f"}
        constant = frozenset(range(len(operands))) - floats if floats else frozenset()
        case = Case(node.op_type, operands, attributes, count, opset, constant)
        if case.varied and case.image.size:
            expected = np.concatenate([a.ravel().astype(np.float64) for a in arrays])
            found.append((test.name, case, expected[None]))
    return found


@pytest.mark.slow
def test_forward() -> None:
    checked = set()
    for name, case, expected in cases():
        graph = case.graph()
        found = NumpyForward(np.float64)(graph, case.image, [graph.logits])[graph.logits]
        half = any(a is not None and a.dtype == np.float16 for a in case.operands)
        tolerance = 1e-2 if half else 1e-3  # one expected output is written with four digits
        np.testing.assert_allclose(found, expected, tolerance, tolerance, err_msg=name)
        checked.add(case.op)
    assert len(checked) > 70
