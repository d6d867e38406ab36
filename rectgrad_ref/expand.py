"""Nodes that stand for others, written out: functions by their body, If, Loop and Scan by theirs.

An operator without a rule of its own whose meaning ONNX defines by a function is replaced by that
function's nodes. Of an If the branch that is taken remains, or a choice between both; a Loop and a
Scan are unrolled. So a gradient passes them node by node, and an activation in one of them is an
activation like every other.

New values are called after the node that they come from: ``output/value`` of a function or branch,
``output/3/value`` in the pass number 3 of a loop.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TypeProto, helper

from . import opsets
from .errors import UnsupportedOperator
from .rules import OPERATORS

Types = Mapping[str, TypeProto]
Constants = Mapping[str, np.ndarray]

_MOST_PASSES = 4096


def written_out(
    node: NodeProto, opset: int, types: Types, constants: Constants
) -> Iterator[NodeProto] | None:
    """The nodes that stand for `node`, or None if it stands for itself.

    Every yielded node has to be brought into `types` and `constants` before the next is asked for:
    whether a loop goes on may follow from its last pass.

    Raises
    ------
    UnsupportedOperator
        While it is iterated: what the node does depends on the data.
    """
    if node.domain:
        return None
    if node.op_type == "If":
        return _branches(node, types, constants)
    if node.op_type == "Loop":
        return _passes(node, opset, constants)
    if node.op_type == "Scan" and opset >= 9:
        return _scan(node, opset, types)
    if node.op_type in OPERATORS:
        return None
    body = _function(node, opset, types)
    return None if body is None else _inlined(node, body, opset)


def key(node: NodeProto) -> str:
    """The node's first output, which no other node has."""
    return next(filter(None, node.output), "")


def _function(node: NodeProto, opset: int, types: Types) -> FunctionProto | None:
    """The operator's definition by others, in the form that it has in this opset."""
    definition: Any = opsets.schema(node.op_type, opset)  # whose stub lacks what follows
    if definition is None:
        return None
    if definition.has_function:
        versions = [v for v in definition.function_opset_versions if v <= opset]
        if not versions:
            return None
        data = definition.get_function_with_opset_version(max(versions))
    elif definition.has_context_dependent_function:
        versions = [v for v in definition.context_dependent_function_opset_versions if v <= opset]
        if not versions or any(v and types[v].WhichOneof("value") is None for v in node.input):
            return None
        kinds = [types.get(v, TypeProto()).SerializeToString() for v in node.input]
        data = definition.get_context_dependent_function_with_opset_version(
            max(versions), node.SerializeToString(), kinds
        )
    else:
        return None
    body = FunctionProto()
    body.ParseFromString(data)
    return body if body.node else None


def _inlined(node: NodeProto, body: FunctionProto, opset: int) -> Iterator[NodeProto]:
    definition = opsets.schema(node.op_type, opset)
    assert definition is not None
    given = {
        name: attribute.default_value
        for name, attribute in definition.attributes.items()
        if attribute.default_value.type != AttributeProto.UNDEFINED
    }
    given.update({attribute.name: attribute for attribute in node.attribute})
    names = dict.fromkeys(body.input, "")
    names.update(zip(body.input, node.input, strict=False))
    wanted = zip(body.output, node.output, strict=False)
    names.update({inner: outer for inner, outer in wanted if outer})
    yield from _renamed(body.node, names, f"{key(node)}/", given)


def _branches(node: NodeProto, types: Types, constants: Constants) -> Iterator[NodeProto]:
    """The branch that is taken; if only the data decide, both, and a choice between the results."""
    graphs = {a.name: a.g for a in node.attribute}
    condition = constants.get(node.input[0])
    if condition is not None:
        taken = graphs["then_branch" if condition.item() else "else_branch"]
        results = yield from _body(taken, [], f"{key(node)}/")
        yield from _identities(results, node.output)
        return
    then = yield from _body(graphs["then_branch"], [], f"{key(node)}/then/")
    otherwise = yield from _body(graphs["else_branch"], [], f"{key(node)}/else/")
    for output, yes, no in zip(node.output, then, otherwise, strict=True):
        if _extents(types[yes]) is None or _extents(types[yes]) != _extents(types[no]):
            raise UnsupportedOperator(
                f"If {node.name or key(node)!r}: its branches give {output!r} different shapes"
            )
        yield helper.make_node("Where", [node.input[0], yes, no], [output])


def _passes(node: NodeProto, opset: int, constants: Constants) -> Iterator[NodeProto]:
    """A Loop whose number of passes follows from constants and shapes."""
    body = node.attribute[0].g
    most, condition, *carried = [*node.input, "", ""][: max(len(node.input), 2)]
    limit = constants[most].item() if most in constants else None
    if most and limit is None:
        raise UnsupportedOperator(
            f"Loop {node.name or key(node)!r}: its number of passes {most!r} depends on the data"
        )
    stacks: list[list[str]] = [[] for _ in range(len(body.output) - 1 - len(carried))]
    for i in count():
        if limit is not None and i >= limit:
            break
        if condition and condition not in constants:
            raise UnsupportedOperator(
                f"Loop {node.name or key(node)!r}: whether it goes on, {condition!r}, depends on "
                "the data"
            )
        if condition and not constants[condition].item():
            break
        _limit(node, i)
        prefix = f"{key(node)}/{i}/"
        number, go_on = f"{prefix}pass", condition or f"{prefix}true"
        yield _constant(number, np.array(i))
        if not condition:
            yield _constant(go_on, np.array(True))
        condition, *results = yield from _body(body, [number, go_on, *carried], prefix)
        carried, collected = results[: len(carried)], results[len(carried) :]
        for stack, value in zip(stacks, collected, strict=True):
            stack.append(value)
    yield from _identities(carried, node.output)
    outputs = list(node.output[len(carried) :])
    yield from _stacked(node, opset, stacks, outputs, [0] * len(outputs))


def _scan(node: NodeProto, opset: int, types: Types) -> Iterator[NodeProto]:
    """A Scan; its number of passes is an extent of its inputs."""
    values = opsets.attributes(node, opset)
    body: GraphProto = values["body"]
    scanned = values["num_scan_inputs"]
    split = len(node.input) - scanned
    carried, sequences = list(node.input[:split]), node.input[split:]
    axes = values.get("scan_input_axes", (0,) * scanned)
    backwards = values.get("scan_input_directions", (0,) * scanned)
    extents = _extents(types[sequences[0]])
    if extents is None:
        raise UnsupportedOperator(
            f"Scan {node.name or key(node)!r}: the shape of {sequences[0]!r} depends on the data"
        )
    passes = extents[axes[0] % len(extents)]
    collecting = len(body.output) - split
    stacks: list[list[str]] = [[] for _ in range(collecting)]
    for i in range(passes):
        _limit(node, i)
        prefix = f"{key(node)}/{i}/"
        parts: list[str] = []
        for sequence, axis, reverse in zip(sequences, axes, backwards, strict=True):
            index, part = f"{prefix}{len(parts)}/index", f"{prefix}{len(parts)}/part"
            yield _constant(index, np.array(passes - 1 - i if reverse else i))
            yield helper.make_node("Gather", [sequence, index], [part], axis=axis)
            parts.append(part)
        results = yield from _body(body, [*carried, *parts], prefix)
        carried = results[:split]
        for stack, value in zip(stacks, results[split:], strict=True):
            stack.append(value)
    yield from _identities(carried, node.output)
    backwards = values.get("scan_output_directions", (0,) * collecting)
    stacks = [s[::-1] if reverse else s for s, reverse in zip(stacks, backwards, strict=True)]
    axes = values.get("scan_output_axes", (0,) * collecting)
    yield from _stacked(node, opset, stacks, list(node.output[split:]), axes)


def _limit(node: NodeProto, passes: int) -> None:
    if passes >= _MOST_PASSES:
        raise UnsupportedOperator(
            f"{node.op_type} {node.name or key(node)!r}: it has more than {_MOST_PASSES} passes"
        )


def _stacked(
    node: NodeProto, opset: int, stacks: list[list[str]], outputs: list[str], axes: Iterable[int]
) -> Iterator[NodeProto]:
    """What each pass gave, joined along a new axis."""
    for stack, output, axis in zip(stacks, outputs, axes, strict=True):
        if not output:
            continue
        if not stack:
            raise UnsupportedOperator(
                f"{node.op_type} {node.name or key(node)!r}: it has no pass, so that {output!r} "
                "has no shape"
            )
        slices = []
        for i, value in enumerate(stack):
            slices.append(f"{output}/{i}/slice")
            if opset < 13:
                yield helper.make_node("Unsqueeze", [value], slices[-1:], axes=[axis])
            else:
                where = f"{output}/{i}/axis"
                yield _constant(where, np.array([axis]))
                yield helper.make_node("Unsqueeze", [value, where], slices[-1:])
        yield helper.make_node("Concat", slices, [output], axis=axis)


def _body(
    graph: GraphProto, inputs: list[str], prefix: str
) -> Generator[NodeProto, None, list[str]]:
    """The nodes of a sub-graph with these inputs; returns what its outputs are called."""
    names = dict(zip((value.name for value in graph.input), inputs, strict=True))
    for tensor in graph.initializer:
        names[tensor.name] = f"{prefix}{tensor.name}"
        yield helper.make_node("Constant", [], [names[tensor.name]], value=tensor)
    yield from _renamed(graph.node, names, prefix)
    return [names.get(value.name, value.name) for value in graph.output]


def _identities(values: Iterable[str], outputs: Iterable[str]) -> Iterator[NodeProto]:
    for value, output in zip(values, outputs, strict=False):
        if output:
            yield helper.make_node("Identity", [value], [output])


def _constant(name: str, value: np.ndarray) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))


def _renamed(
    nodes: Iterable[NodeProto],
    names: dict[str, str],
    prefix: str,
    given: Mapping[str, AttributeProto] | None = None,
) -> Iterator[NodeProto]:
    """Copies of the nodes; `names` says what their values are called outside, and is added to."""
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{prefix}{node.name}" if node.name else ""
        for value in filter(None, node.output):
            names.setdefault(value, f"{prefix}{value}")
        _rename(copy, names, given)
        yield copy


def _rename(
    node: NodeProto, names: Mapping[str, str], given: Mapping[str, AttributeProto] | None
) -> None:
    """In place, in sub-graphs too; attributes that refer to those of the function are filled in."""
    node.input[:] = [names.get(v, v) for v in node.input]
    node.output[:] = [names.get(v, v) for v in node.output]
    for attribute in list(node.attribute):
        if given is not None and attribute.ref_attr_name:
            name, source = attribute.name, given.get(attribute.ref_attr_name)
            node.attribute.remove(attribute)
            if source is not None:
                filled = node.attribute.add()
                filled.CopyFrom(source)
                filled.name = name
            continue
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                _rename(inner, names, given)
            for output in graph.output:
                output.name = names.get(output.name, output.name)


def _extents(kind: TypeProto) -> tuple[int, ...] | None:
    """The shape, where it is known."""
    if not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    if not all(d.HasField("dim_value") for d in dims):
        return None
    return tuple(d.dim_value for d in dims)
