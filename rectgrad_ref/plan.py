"""Graph + method → plan: which values the forward pass keeps, and every backward step in order.

The plan is plain data. It is the one place that knows what will happen: executors run it without
knowing methods, `Explainer.plan()` prints it, and what cannot be done is refused while it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import analysis
from .errors import InvalidModel, UnsupportedOperator
from .graph import Graph, Node
from .rules.declared import Gradient, Rule
from .rules.registry import OPERATORS, find_vjp

Matches = Callable[[Node], bool]
RuleTable = Sequence[tuple[Matches, Rule]]


@dataclass(frozen=True, eq=False)
class Step:
    """One node of the walk back.

    Attributes
    ----------
    node : Node
    rule : Rule
    positions : tuple of int
        The node's inputs that receive a gradient.
    """

    node: Node
    rule: Rule
    positions: tuple[int, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """Values that the rule reads, constants included."""
        found = (v for p in self.positions for v in self.rule.reads(self.node, p))
        return tuple(dict.fromkeys(found))

    @property
    def writes(self) -> tuple[str, ...]:
        """Values whose gradient the step adds to."""
        return tuple(self.node.inputs[p] for p in self.positions)


@dataclass(frozen=True, eq=False)
class Plan:
    """What will happen: see the module.

    Attributes
    ----------
    graph : Graph
    steps : tuple of Step
        From the logits to the input.
    exposes : tuple of str
        Values that the forward pass has to hand over, besides the logits.
    contrasts : bool
        Whether they are needed at a baseline too.
    layers : frozenset of str
        Names of the activations on the path.
    """

    graph: Graph
    steps: tuple[Step, ...]
    exposes: tuple[str, ...]
    contrasts: bool
    layers: frozenset[str]


def make_plan(graph: Graph, rules: RuleTable, *, straight_through: bool = True) -> Plan:
    """Lay `rules` over ordinary backpropagation; for every node the first that matches wins.

    Parameters
    ----------
    straight_through : bool
        Whether QuantizeLinear may pass the gradient as if nothing had been rounded.

    Raises
    ------
    UnsupportedOperator
        A node on the path from the input to the logits has no rule, or quantises and must not.
    InvalidModel
        There is no path: the logits are constant, or depend on the input by indices or masks only.
    """
    nodes = analysis.path(graph)
    if not nodes and graph.logits != graph.input:
        raise InvalidModel(
            f"{graph.model.name}: no gradient flows from {graph.logits!r} to {graph.input!r}"
        )
    positions = analysis.differentiated(graph, nodes)
    steps: list[Step] = []
    # In the order of the graph, so that of several the first reason for a refusal is named.
    for node in nodes:
        rule = next((rule for matches, rule in rules if matches(node)), Gradient())
        if isinstance(rule, Gradient):
            _require_vjp(graph, node, positions[node.name], nodes)
        if node.op == "QuantizeLinear" and not straight_through:
            raise UnsupportedOperator(
                f"{node} ({graph.model.name}): rounding has no gradient; "
                "quantization='straight_through' passes it as if nothing had been rounded"
            )
        _require_shapes(graph, node)
        steps.insert(0, Step(node, rule, positions[node.name]))
    reads = dict.fromkeys(v for step in steps for v in step.reads)
    return Plan(
        graph=graph,
        steps=tuple(steps),
        exposes=tuple(v for v in reads if v not in graph.constants),
        contrasts=any(step.rule.contrasts for step in steps),
        layers=analysis.activations(graph),
    )


def _require_shapes(graph: Graph, node: Node) -> None:
    unknown = [v for v in (*node.inputs, *node.outputs) if v and graph.shapes.get(v) is None]
    if unknown:
        raise UnsupportedOperator(
            f"{node} ({graph.model.name}): the shape of {unknown[0]!r} depends on the data"
        )


def _require_vjp(
    graph: Graph, node: Node, positions: tuple[int, ...], nodes: Sequence[Node]
) -> None:
    if node.op in OPERATORS and all(find_vjp(node.op, p) for p in positions):
        return
    supported = ", ".join(sorted(op for op, known in OPERATORS.items() if known.vjps))
    raise UnsupportedOperator(
        f"{node} ({graph.model.name}, opset {graph.model.opset}): no backward rule; on the path "
        f"{_path_at(graph, node, nodes)}. Supported: {supported}."
    )


def _path_at(graph: Graph, node: Node, nodes: Sequence[Node]) -> str:
    """The path from the input to the logits, of which only what is next to `node` is told."""
    names = [n.name for n in nodes]
    first, end = max(names.index(node.name) - 1, 0), names.index(node.name) + 2
    before, after = ["…"] * (first > 0), ["…"] * (end < len(names))
    path = [graph.input, *before, *names[first:end], *after]
    if path[-1] != graph.logits:  # many nodes are called what their output is
        path.append(graph.logits)
    return " → ".join(path)
