"""Activations that exporters spell as several nodes, recognised as one.

SiLU, GELU (by erf or tanh), HardSwish, HardSigmoid and Mish reach ONNX in many spellings: factors
in any order, a division or a multiplication, a power or a product. PyTorch also writes out Softsign
and Softplus, and a clamp at 0 as a Max. They are not told apart by their spelling but by what they
compute: a small cluster of elementwise nodes that has one variable input and one output is
evaluated on a few points and compared with the known functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .rules import OPERATORS

if TYPE_CHECKING:
    from .graph import Node

_PARTS = frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Neg", "Exp", "Log", "Sqrt", "Reciprocal", "Min", "Max",
    "Identity", "Relu", "Clip", "Sigmoid", "HardSigmoid", "Tanh", "Erf", "Softplus", "Abs",
    "Where", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
})  # fmt: skip
# A cluster ends in a product or a choice, and contains one of these; all else is arithmetic.
_LAST = frozenset({"Mul", "Div", "Max", "Clip", "Where"})
_NONLINEAR = frozenset({
    "Sigmoid", "HardSigmoid", "Tanh", "Erf", "Clip", "Relu", "Min", "Max", "Exp", "Abs", "Where",
})  # fmt: skip
_LARGEST = 12  # nodes; the longest spelling of tanh-GELU in use has nine

_POINTS = np.array([-7.3, -3.0, -2.1, -1.0, -0.4, 0.0, 0.3, 1.0, 1.9, 3.0, 4.2, 8.5, 25.0])
# float32 constants such as √2 or 1.702 leave a relative error near 1e-7, float16 ones near 3e-4;
# erf- and tanh-GELU differ by 2e-4, so the nearest function is taken.
_TOLERANCE, _TOLERANCE_HALF = 2e-6, 1e-3

_KNOWN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Swish", {"alpha": 1.0}),
    ("Swish", {"alpha": 1.702}),  # "quick GELU"
    ("Gelu", {"approximate": "none"}),
    ("Gelu", {"approximate": "tanh"}),
    ("HardSwish", {}),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    ("HardSigmoid", {"alpha": 0.2, "beta": 0.5}),  # Keras
    ("Mish", {}),
    ("Softplus", {}),
    ("Softsign", {}),
    ("Relu", {}),
)
# A maximum with a small number, which keeps a divisor from 0, is no ReLU.
_EXACT = frozenset({"Relu"})


def fuse(nodes: Sequence[Node], kept: set[str]) -> tuple[Node, ...]:
    """Replace every recognised cluster by one node of the operator that it spells.

    Parameters
    ----------
    nodes : sequence of Node
        In topological order.
    kept : set of str
        Values that are read from outside the graph and so must not vanish inside a cluster.
    """
    producer = {value: node for node in nodes for value in node.outputs}
    readers = Counter(value for node in nodes for value in node.inputs)
    replaced: dict[str, Node | None] = {}
    # The largest cluster first: x·σ(x) before the σ in it.
    for last in reversed(nodes):
        if last.op not in _LAST or last.outputs[0] in replaced:
            continue
        for source, cluster in _clusters(last, producer):
            inner = [n.outputs[0] for n in cluster if n is not last]
            counts = Counter(value for node in cluster for value in node.inputs)
            if any(value in kept or readers[value] != counts[value] for value in inner):
                continue
            found = _recognise(source, cluster)
            if found is not None:
                replaced.update(dict.fromkeys(inner))
                replaced[last.outputs[0]] = _fused(last, source, *found)
                break
    result = (replaced.get(node.outputs[0], node) for node in nodes)
    return tuple(node for node in result if node is not None)


def _fused(last: Node, source: str, op: str, attributes: dict[str, Any]) -> Node:
    return replace(
        last,
        op=op,
        inputs=(source,),
        attributes=attributes,
        input_shapes=last.output_shapes,
        constants=(None,),
    )


def _clusters(last: Node, producer: dict[str, Node]) -> Iterator[tuple[str, list[Node]]]:
    """Every (x, nodes from x to the output of `last`) whose nodes read nothing else that varies."""
    cone: list[Node] = []
    frontier = [last]
    while frontier and len(cone) < _LARGEST:
        node = frontier.pop(0)
        if node in cone or not _is_part(node):
            continue
        cone.append(node)
        frontier += [producer[v] for v in node.inputs if v in producer]
    for source in dict.fromkeys(v for n in cone for v in _variables(n)):
        cluster = _between(source, last, producer, cone)
        if cluster is not None and any(n.op in _NONLINEAR for n in cluster):
            yield source, cluster


def _is_part(node: Node) -> bool:
    """Whether the node computes cell by cell, from variables of its own shape and from scalars."""
    if node.op not in _PARTS or len(node.outputs) != 1:
        return False
    inputs = zip(node.inputs, node.constants, node.input_shapes, strict=True)
    return all(
        shape == node.output_shapes[0] if c is None else c.size == 1 for v, c, shape in inputs if v
    )


def _variables(node: Node) -> list[str]:
    return [v for v, c in zip(node.inputs, node.constants, strict=True) if v and c is None]


def _between(
    source: str, last: Node, producer: dict[str, Node], cone: list[Node]
) -> list[Node] | None:
    """The nodes from `source` to `last` in topological order, or None if something else enters."""
    ordered: list[Node] = []

    def visit(node: Node) -> bool:
        if node in ordered:
            return True
        if node not in cone:
            return False
        for value in _variables(node):
            if value != source and (value not in producer or not visit(producer[value])):
                return False
        ordered.append(node)
        return True

    return ordered if visit(last) else None


def _recognise(source: str, cluster: list[Node]) -> tuple[str, dict[str, Any]] | None:
    values: dict[str, Any] = {source: _POINTS}
    with np.errstate(all="ignore"):
        for node in cluster:
            arguments = [
                values.get(v) if c is None else c.astype(float).reshape(())
                for v, c in zip(node.inputs, node.constants, strict=True)
            ]
            values[node.outputs[0]] = OPERATORS[node.op].forward(node, *arguments)
        last = cluster[-1]
        computed = values[last.outputs[0]]
        distances = [
            _distance(op, computed, OPERATORS[op].forward(_fused(last, source, op, given), _POINTS))
            for op, given in _KNOWN
        ]
    nearest = int(np.argmin(distances))
    half = any(c is not None and c.dtype == np.float16 for node in cluster for c in node.constants)
    tolerance = _TOLERANCE_HALF if half else _TOLERANCE
    return _KNOWN[nearest] if distances[nearest] <= tolerance else None


def _distance(op: str, computed: np.ndarray, expected: np.ndarray) -> float:
    largest = float(np.max(np.abs(computed - expected) / (1 + np.abs(expected))))
    return np.inf if np.isnan(largest) or (op in _EXACT and largest > 0) else largest
