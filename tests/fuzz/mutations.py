"""Damage to ONNX files: to their bytes, and to what the bytes say.

Every function takes a `random.Random`, which decides everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

INTEGERS = (0, 1, -1, 2, 3, 5, -2, 7, 64, 255, 1000, -(2**31), 2**31, 2**40, 2**62, -(2**63))
EXTENTS = (0, 1, -1, 2, 3, 7, 1000, 2**20, 2**31, 2**40, 2**62, -(2**40))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-38, 1e38, float("inf"), float("-inf"), float("nan"))
LOCATIONS = (
    "", ".", "..", "/", "inside.bin", "../outside.bin", "/etc/passwd", "/dev/zero", "link.bin",
    "up/outside.bin", "inside.bin/..", "./x/../../outside.bin", "pipe", "a\0b", "x" * 5000,
    "model.onnx",
)  # fmt: skip
OPERATORS = sorted({s.name for s in onnx.defs.get_all_schemas() if not s.domain})

# --- bytes ----------------------------------------------------------------------------------------


def damage_bytes(data: bytes, other: bytes, random: Random) -> bytes:
    """One to six changes: bits, bytes and stretches, also from another file."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        if changed:
            random.choice(_BYTE_CHANGES)(changed, other, random)
    return bytes(changed)


def _stretch(data: Sequence[int], random: Random, most: int = 64) -> slice:
    """Where weights are not: they lie in long runs, which a sequence of small steps leaves."""
    start = random.randrange(len(data))
    if random.random() < 0.7:
        start = random.randrange(min(len(data), 2000))
    if random.random() < 0.3:
        start = len(data) - 1 - random.randrange(min(len(data), 1000))
    return slice(start, start + random.randint(1, most))


def _flip(data: bytearray, other: bytes, random: Random) -> None:
    data[_stretch(data, random).start] ^= 1 << random.randrange(8)


def _set(data: bytearray, other: bytes, random: Random) -> None:
    data[_stretch(data, random).start] = random.choice(
        (0, 1, 0x7F, 0x80, 0xFF, random.randrange(256))
    )


def _delete(data: bytearray, other: bytes, random: Random) -> None:
    del data[_stretch(data, random)]


def _repeat(data: bytearray, other: bytes, random: Random) -> None:
    where = _stretch(data, random)
    data[where] = bytes(data[where]) * random.randint(2, 5)


def _number(data: bytearray, other: bytes, random: Random) -> None:
    """A protobuf number of up to ten bytes."""
    length = random.randint(1, 9)
    place = _stretch(data, random).start
    data[place : place + 1] = bytes(random.randrange(128, 256) for _ in range(length)) + b"\x01"


def _splice(data: bytearray, other: bytes, random: Random) -> None:
    if other:
        data[_stretch(data, random)] = other[_stretch(other, random, most=400)]


def _truncate(data: bytearray, other: bytes, random: Random) -> None:
    del data[_stretch(data, random).start :]


def _append(data: bytearray, other: bytes, random: Random) -> None:
    data += other[:4000]


_BYTE_CHANGES: tuple[Callable[[bytearray, bytes, Random], None], ...] = (
    _flip, _flip, _set, _set, _delete, _repeat, _number, _splice, _truncate, _append,
)  # fmt: skip

# --- structure ------------------------------------------------------------------------------------


def damage_model(model: ModelProto, other: ModelProto, random: Random) -> ModelProto:
    """One to four changes to a copy: what is said where, of which type, and how large."""
    changed = ModelProto()
    changed.CopyFrom(model)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        random.choice(_CHANGES)(changed, other, random)
    return changed


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                if inner.node:
                    yield from _graphs(inner)


def _graph(model: ModelProto, random: Random) -> GraphProto:
    return random.choice(list(_graphs(model.graph)))


def _node(model: ModelProto, random: Random) -> NodeProto:
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    return random.choice(nodes) if nodes else model.graph.node.add()


def _names(model: ModelProto) -> list[str]:
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    return ["", "nowhere", *(v for node in nodes for v in (*node.input, *node.output))]


def _attribute(model: ModelProto, random: Random) -> AttributeProto:
    present = [a for g in _graphs(model.graph) for node in g.node for a in node.attribute]
    return random.choice(present) if present else _node(model, random).attribute.add(name="axis")


def _tensor(model: ModelProto, random: Random) -> TensorProto:
    graphs = list(_graphs(model.graph))
    present = [tensor for graph in graphs for tensor in graph.initializer]
    present += [a.t for g in graphs for n in g.node for a in n.attribute if a.HasField("t")]
    return random.choice(present) if present else model.graph.initializer.add(name="x")


def _rewire(model: ModelProto, other: ModelProto, random: Random) -> None:
    node = _node(model, random)
    values = random.choice((node.input, node.output))
    name = random.choice(_names(model))
    if values and random.random() < 0.8:
        values[random.randrange(len(values))] = name
    else:
        values.append(name)


def _unwire(model: ModelProto, other: ModelProto, random: Random) -> None:
    node = _node(model, random)
    values = random.choice((node.input, node.output))
    if values:
        del values[random.randrange(len(values))]


def _remove(model: ModelProto, other: ModelProto, random: Random) -> None:
    graph = _graph(model, random)
    parts = random.choice((graph.node, graph.initializer, graph.input, graph.output))
    if parts:
        del parts[random.randrange(len(parts))]


def _double(model: ModelProto, other: ModelProto, random: Random) -> None:
    graph = _graph(model, random)
    parts = random.choice((graph.node, graph.initializer, graph.input, graph.output))
    if parts:
        parts.add().CopyFrom(random.choice(list(parts)))


def _rename_operator(model: ModelProto, other: ModelProto, random: Random) -> None:
    _node(model, random).op_type = random.choice(OPERATORS)


def _move_domain(model: ModelProto, other: ModelProto, random: Random) -> None:
    _node(model, random).domain = random.choice(("ai.onnx", "ai.onnx.ml", "own", "\ud7ff"))


def _change_opset(model: ModelProto, other: ModelProto, random: Random) -> None:
    if model.opset_import:
        model.opset_import[0].version = random.choice((*INTEGERS, *range(7, 29)))


def _retype_attribute(model: ModelProto, other: ModelProto, random: Random) -> None:
    _attribute(model, random).type = random.choice(list(AttributeProto.AttributeType.values()))


def _rename_attribute(model: ModelProto, other: ModelProto, random: Random) -> None:
    names = list(onnx.defs.get_schema(random.choice(OPERATORS)).attributes) or ["axis"]
    _attribute(model, random).name = random.choice(names)


def _change_attribute(model: ModelProto, other: ModelProto, random: Random) -> None:
    attribute = _attribute(model, random)
    if attribute.type == AttributeProto.INT:
        attribute.i = random.choice(INTEGERS)
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = random.choice(FLOATS)
    elif attribute.type == AttributeProto.STRING:
        attribute.s = random.choice((b"", b"SAME_UPPER", b"linear", b"\xff\xfe", b"x" * 1000))
    elif attribute.type == AttributeProto.INTS:
        _change_list(attribute.ints, INTEGERS, random)
    elif attribute.type == AttributeProto.FLOATS:
        _change_list(attribute.floats, FLOATS, random)
    else:
        attribute.Clear()


def _change_list(values: list, choices: Sequence[float], random: Random) -> None:  # type: ignore[type-arg]
    if values and random.random() < 0.6:
        values[random.randrange(len(values))] = random.choice(choices)
    elif values and random.random() < 0.5:
        del values[random.randrange(len(values))]
    else:
        values.extend(random.choice(choices) for _ in range(random.randint(1, 3)))


def _add_attribute(model: ModelProto, other: ModelProto, random: Random) -> None:
    """One that the operator has, of a type that it need not have."""
    node = _node(model, random)
    try:
        names = list(onnx.defs.get_schema(node.op_type).attributes)
    except onnx.defs.SchemaError:
        names = []
    value = random.choice(
        (random.choice(INTEGERS), random.choice(FLOATS), "NOTSET", [1, -1], [2.0])
    )
    node.attribute.append(helper.make_attribute(random.choice([*names, "axis"]), value))


def _change_extents(model: ModelProto, other: ModelProto, random: Random) -> None:
    graph = _graph(model, random)
    values = [*graph.input, *graph.output]
    if values and random.random() < 0.5:
        kind = random.choice(values).type.tensor_type
        dims = kind.shape.dim
        if dims and random.random() < 0.8:
            random.choice(list(dims)).dim_value = random.choice(EXTENTS)
        else:
            dims.add(dim_value=random.choice(EXTENTS))
    else:
        _change_list(_tensor(model, random).dims, EXTENTS, random)


def _retype_value(model: ModelProto, other: ModelProto, random: Random) -> None:
    graph = _graph(model, random)
    values = [*graph.input, *graph.output]
    if values:
        kind = random.choice(values).type
        if random.random() < 0.8:
            kind.tensor_type.elem_type = random.randrange(-1, 30)
        else:
            kind.sequence_type.elem_type.tensor_type.elem_type = 1


def _retype_tensor(model: ModelProto, other: ModelProto, random: Random) -> None:
    _tensor(model, random).data_type = random.randrange(-1, 30)


def _change_numbers(model: ModelProto, other: ModelProto, random: Random) -> None:
    """What decides shapes: sizes, axes, indices."""
    graph = _graph(model, random)
    small = [t for t in graph.initializer if t.data_type in (TensorProto.INT64, TensorProto.INT32)]
    if small:
        tensor = random.choice(small)
        values = [random.choice(INTEGERS[:-2]) for _ in range(random.randint(1, 4))]
        numbers = [n % 2**31 for n in values] if tensor.data_type == TensorProto.INT32 else values
        changed = helper.make_tensor(tensor.name, tensor.data_type, [len(numbers)], numbers)
        tensor.CopyFrom(changed)


def _externalise(model: ModelProto, other: ModelProto, random: Random) -> None:
    tensor = _tensor(model, random)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    entries = {
        "location": random.choice(LOCATIONS),
        "offset": random.choice(("0", "4", "-1", "x", str(2**62))),
        "length": random.choice(("16", "-1", "", str(2**62))),
    }
    for key in random.sample(sorted(entries), random.randint(0, 3)):
        tensor.external_data.add(key=key, value=entries[key])


def _sparsify(model: ModelProto, other: ModelProto, random: Random) -> None:
    sparse = model.graph.sparse_initializer.add(dims=random.choices(EXTENTS, k=2))
    sparse.values.CopyFrom(_tensor(model, random))
    sparse.indices.CopyFrom(_tensor(model, random))


def _cycle(model: ModelProto, other: ModelProto, random: Random) -> None:
    nodes = _graph(model, random).node
    if nodes:
        first = nodes[random.randrange(len(nodes))]
        later = nodes[random.randrange(len(nodes))]
        if later.output:
            first.input.append(later.output[0])


def _shuffle(model: ModelProto, other: ModelProto, random: Random) -> None:
    nodes = list(model.graph.node)
    random.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _borrow(model: ModelProto, other: ModelProto, random: Random) -> None:
    """A node of another model, with its attributes."""
    if other.graph.node:
        node = model.graph.node.add()
        node.CopyFrom(random.choice(list(other.graph.node)))
        for values in (node.input, node.output):
            for i in range(len(values)):
                values[i] = random.choice(_names(model))


def _nest(model: ModelProto, other: ModelProto, random: Random) -> None:
    """Branches in branches."""
    name = random.choice(_names(model)) or "x"
    node = helper.make_node("Identity", [name], ["nested"])
    leaf = branch = GraphProto(
        name="leaf", node=[node], output=[onnx.ValueInfoProto(name="nested")]
    )
    for depth in range(random.choice((1, 2, 10, 28))):
        output = f"nested{depth}"
        node = helper.make_node("If", [name], [output], then_branch=branch, else_branch=leaf)
        branch = GraphProto(name=output, node=[node], output=[onnx.ValueInfoProto(name=output)])
    model.graph.node.append(node)
    _node(model, random).input.append(node.output[0])


def _multiply(model: ModelProto, other: ModelProto, random: Random) -> None:
    """Functions each of which calls the next one twice."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    depth = random.choice((2, 5, 30))
    for i in range(depth + 1):
        called, domain = (f"f{i + 1}", "own") if i < depth else ("Relu", "")
        body = [
            helper.make_node(called, [start], [end], domain=domain)
            for start, end in (("x", "h"), ("h", "y"))
        ]
        model.functions.append(helper.make_function("own", f"f{i}", ["x"], ["y"], body, imports))
    node = _node(model, random)
    node.domain, node.op_type = "own", "f0"
    model.opset_import.append(imports[1])


def _recur(model: ModelProto, other: ModelProto, random: Random) -> None:
    """Functions that call themselves or each other."""
    names = ["a", "b"] if random.random() < 0.5 else ["a", "a"]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    for called, name in zip(names, dict.fromkeys(names[::-1]), strict=False):
        body = [helper.make_node(called, ["x"], ["y"], domain="own")]
        function = helper.make_function("own", name, ["x"], ["y"], body, imports)
        model.functions.append(function)
    node = _node(model, random)
    node.domain, node.op_type = "own", names[0]
    model.opset_import.append(imports[1])


def _loop(model: ModelProto, other: ModelProto, random: Random) -> None:
    """A loop of many passes, in each of which a value may double."""
    value = random.choice(_names(model)) or "x"
    op = random.choice(("Concat", "Add", "Identity"))
    inputs = ["in"] if op == "Identity" else ["in", "in"]
    options = {"axis": 0} if op == "Concat" else {}
    body = GraphProto(
        name="body",
        input=[onnx.ValueInfoProto(name=name) for name in ("i", "go", "in")],
        output=[onnx.ValueInfoProto(name=name) for name in ("more", "out")],
        node=[
            helper.make_node("Identity", ["go"], ["more"]),
            helper.make_node(op, inputs, ["out"], **options),
        ],
    )
    passes = helper.make_tensor("passes", TensorProto.INT64, [], [random.choice((0, 3, 50, 10**6))])
    model.graph.initializer.append(passes)
    model.graph.node.append(helper.make_node("Loop", ["passes", "", value], ["looped"], body=body))
    _node(model, random).input.append("looped")


def _blow_up(model: ModelProto, other: ModelProto, random: Random) -> None:
    """A constant of any size, from a few bytes."""
    extents = random.choices((1, 3, 1000, 2**20, 2**31, 2**40), k=random.randint(1, 4))
    shape = helper.make_tensor("extents", TensorProto.INT64, [len(extents)], extents)
    model.graph.initializer.append(shape)
    scalar = helper.make_tensor("scalar", TensorProto.INT64, [], [extents[0]])
    one = helper.make_tensor("one", TensorProto.INT64, [], [1])
    model.graph.initializer.extend([scalar, one])
    value = random.choice(_names(model)) or "x"
    node = random.choice(
        (
            helper.make_node("ConstantOfShape", ["extents"], ["blown"]),
            helper.make_node("Expand", [random.choice(("one", value)), "extents"], ["blown"]),
            helper.make_node("Tile", [random.choice(("extents", value)), "extents"], ["blown"]),
            helper.make_node("Range", ["one", "scalar", "one"], ["blown"]),
            helper.make_node("Pad", [value, "extents"], ["blown"]),
            helper.make_node("Resize", [value, "", "", "extents"], ["blown"]),
            helper.make_node("OneHot", ["one", "scalar", "extents"], ["blown"]),
            helper.make_node("Reshape", [value, "extents"], ["blown"]),
            helper.make_node("BlackmanWindow", ["scalar"], ["blown"]),
        )
    )
    model.graph.node.append(node)
    target = _node(model, random)
    if target.input:
        target.input[random.randrange(len(target.input))] = "blown"


def _entangle(model: ModelProto, other: ModelProto, random: Random) -> None:
    """A long chain or many diamonds, through which there are exponentially many ways."""
    value = random.choice(_names(model)) or "x"
    op = random.choice(("Relu", "Sigmoid", "Reshape", "Identity", "Transpose", "Add", "Mul"))
    for i in range(random.choice((30, 60, 1500))):
        names = [f"way{i}/{j}" for j in range(3)]
        if op in ("Add", "Mul"):
            model.graph.node.append(helper.make_node("Identity", [value], names[:1]))
            model.graph.node.append(helper.make_node("Neg", [value], names[1:2]))
            model.graph.node.append(helper.make_node(op, names[:2], names[2:]))
        else:
            model.graph.node.append(helper.make_node(op, [value], names[2:]))
        value = names[2]
    target = _node(model, random)
    if target.input:
        target.input[random.randrange(len(target.input))] = value


_CHANGES: tuple[Callable[[ModelProto, ModelProto, Random], None], ...] = (
    _rewire, _unwire, _remove, _double, _rename_operator, _move_domain, _change_opset,
    _retype_attribute, _rename_attribute, _change_attribute, _change_attribute, _add_attribute,
    _change_extents, _change_extents, _retype_value, _retype_tensor, _change_numbers,
    _change_numbers, _externalise, _sparsify, _cycle, _shuffle, _borrow, _nest, _multiply, _recur,
    _loop, _blow_up, _entangle,
)  # fmt: skip
