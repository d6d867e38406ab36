"""Which operators an exported explainer can hold, and that their gradients are the reference's."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from node_cases import NodeCase, cases

from rectgrad_ref import Saliency
from rectgrad_ref.errors import InvalidModel, UnsupportedOperator
from rectgrad_ref.exporter import explainer_model
from rectgrad_ref.forward import NumpyForward
from rectgrad_ref.plan import make_plan
from rectgrad_ref.reference import constants_as, walk

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
EACH = 2  # cases of an operator


@cache
def differentiable() -> dict[str, list[NodeCase]]:
    """Operator → a few of its cases through which a gradient passes."""
    found: dict[str, list[NodeCase]] = {}
    for op, group in cases().items():
        for case in group:
            if case.excluded or case.only_integers or not 1 < case.image.size < 5000:
                continue
            if sum(a.size for a in case.expected) and len(found.get(op, ())) < EACH:
                found.setdefault(op, []).append(case)
    return found


def refused() -> set[str]:
    """Operators that the guide calls impossible to export."""
    (part,) = re.findall(r"<!-- refused -->(.*?)<!-- end -->", GUIDE.read_text("utf-8"), re.S)
    return set(re.findall(r"`(\w+)`", part))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("op", differentiable())
def test_gradients(op: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    impossible = []
    for case in differentiable()[op]:
        try:
            make_plan(case.graph(), ())
        except (InvalidModel, UnsupportedOperator):
            continue  # `explain` refuses it as well
        try:
            proto = explainer_model(case.classifier(), Saliency())
        except UnsupportedOperator:
            impossible.append(case.test.name)
            continue
        try:
            session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
            continue  # not even the forward pass runs there
        _check(case, session)
    assert bool(impossible) == (op in refused()), "the list in docs/export.md is out of date"


def _check(case: NodeCase, session: object) -> None:
    graph = case.graph()
    rng = np.random.default_rng(0)
    x = (case.image + rng.uniform(0.01, 0.05, case.image.shape)).astype(np.float32)
    plan = make_plan(graph, ())
    values = NumpyForward(np.float64)(graph, x.astype(np.float64), plan.exposes)
    constants = constants_as(graph.constants, np.dtype(np.float64))
    for target in {x.size, graph.classes - 1}:
        seed = np.zeros((1, graph.classes))
        seed[0, target] = 1
        expected = walk(plan, {**constants, **values}, seed.reshape(graph.shapes[graph.logits]))
        feed = {graph.input: x, "target": np.array([target])}
        found = session.run(["attribution"], feed)[0]  # type: ignore[attr-defined]
        scale = max(np.nanmax(np.abs(expected)), 1e-3)
        np.testing.assert_allclose(found, expected, 2e-3, 1e-4 * scale, err_msg=case.test.name)
