"""Freezing: order, folding, batch sizes, layouts, heads, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import NEWEST, float32, model, run_elsewhere
from onnx import helper, numpy_helper

from rectgrad_ref.analysis import is_samplewise
from rectgrad_ref.errors import InvalidModel
from rectgrad_ref.forward import NumpyForward
from rectgrad_ref.graph import Graph, freeze, input_spec, output_name
from rectgrad_ref.model import read_model

W = float32(3, 4)


def frozen(text: str, *shape: int, opset: int = NEWEST, **constants: Any) -> Graph:
    return freeze(read_model(model(text, opset=opset, constants=constants)), shape)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def logits(graph: Graph, x: np.ndarray) -> np.ndarray:
    return NumpyForward(np.float64)(graph, x, [graph.logits])[graph.logits]


def refused(text: str, *shape: int, match: str, **constants: Any) -> None:
    with pytest.raises(InvalidModel, match=match):
        frozen(text, *shape, **constants)


def test_nodes_come_in_any_order() -> None:
    proto = model(
        "(float[N, 3] x) => (float[N, 4] y) { a = MatMul(x, W)  b = Relu(a)  y = Add(b, a) }",
        constants={"W": W},
    )
    nodes, x = list(proto.graph.node), float32(2, 3)
    for order in itertools.permutations(nodes):
        del proto.graph.node[:]
        proto.graph.node.extend(order)
        graph = freeze(read_model(proto), (2, 3))
        assert ops(graph) == ["MatMul", "Relu", "Add"]
        expected = np.maximum(x @ W, 0) + x @ W
        np.testing.assert_allclose(logits(graph, x), expected, rtol=1e-6)


def test_deep_graphs_do_not_recurse() -> None:
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(3000)]
    values = [helper.make_tensor_value_info(v, 1, ["N", 3]) for v in ("v0", "v3000")]
    proto = helper.make_model(helper.make_graph(nodes[::-1], "g", values[:1], values[1:]))
    assert len(freeze(read_model(proto), (1, 3)).nodes) == 3000


def test_only_what_the_output_needs_is_kept() -> None:
    text = """(float[N, 3] x) => (float[N, 4] y, float[N, 4] z) {
        a = MatMul(x, W)
        y = Relu(a)
        k = my.Unknown(a)
        z = Sigmoid(k)
    }"""
    proto = model(text, constants={"W": W}, domains=["my"])
    assert ops(freeze(read_model(proto), (2, 3), output="y")) == ["MatMul", "Relu"]


@pytest.mark.parametrize(
    "body",
    ["y = Add(x, y)", "a = Add(x, b)  b = Relu(a)  y = Relu(b)", "y = Relu(a)  a = Neg(y)"],
)
def test_cycles(body: str) -> None:
    refused(f"(float[N, 3] x) => (float[N, 3] y) {{ {body} }}", 2, 3, match="has a cycle at")


def test_a_diamond_is_no_cycle() -> None:
    body = "a = Relu(x)  b = Neg(a)  c = Add(a, b)  d = Add(b, c)  y = Add(d, a)"
    assert len(frozen(f"(float[N, 3] x) => (float[N, 3] y) {{ {body} }}", 2, 3).nodes) == 5


def test_broken_graphs() -> None:
    signature = "(float[N, 3] x) => (float[N, 3] y)"
    refused(f"{signature} {{ y = Relu(x)  y = Neg(x) }}", 2, 3, match="'y' is computed twice")
    refused(f"{signature} {{ y = Relu(x) }}", 2, 3, match="'y' is computed twice", y=W)
    refused(f"{signature} {{ x = Relu(x)  y = Neg(x) }}", 2, 3, match="'x' is computed twice")
    refused(f"{signature} {{ y = Add(x, q) }}", 2, 3, match="Add 'y' reads 'q', which no node")
    refused(f"{signature} {{ z = Relu(x) }}", 2, 3, match="'y' does not depend on the input 'x'")
    refused(f"{signature} {{ y = Identity(c) }}", 2, 3, match="does not depend", c=W)
    refused(f"{signature} {{ y = MatMul(x, c) }}", 2, 5, match="MatMul 'y' does not fit", c=W)
    refused(
        f"{signature} {{ y = Relu(x, x) }}",
        2,
        3,
        match="Relu 'y' does not fit: it has 2 inputs, not 1 to 1",
    )
    refused(f"{signature} {{ u = my.Custom(x)  y = Relu(u, x) }}", 2, 3, match="2 inputs, not 1")
    refused(f"{signature} {{ y = Relu<alpha = 1.0>(x) }}", 2, 3, match="Relu 'y' does not fit")
    refused(f"{signature} {{ y = Reshape(x, s) }}", 2, 3, match="cannot bring", s=np.array([2, 5]))


def test_node_names_are_unique() -> None:
    text = "(float[N, 3] x) => (float[N, 3] y) { [b] a = Relu(x)  b = Neg(a)  [b] y = Abs(b) }"
    names = [node.name for node in frozen(text, 2, 3).nodes]
    assert names[0] == "b"
    assert len(set(names)) == 3


def test_inputs_and_outputs_are_chosen_by_name() -> None:
    proto = model(
        """(float[N, 3] x, float[N, 2] other) => (float[N, 3] y, float[N, 3] z) {
            y = Relu(x)
            z = Neg(x)
        }"""
    )
    read = read_model(proto)
    with pytest.raises(InvalidModel, match=r"has 2 inputs \(x, other\); choose the image by"):
        input_spec(read)
    with pytest.raises(InvalidModel, match=r"has 2 outputs \(y, z\); choose the class scores"):
        output_name(read)
    with pytest.raises(InvalidModel, match="no input 'q'; it has x, other"):
        input_spec(read, "q")
    with pytest.raises(InvalidModel, match="no output 'q'; it has y, z"):
        output_name(read, "q")
    assert input_spec(read, "x").shape == (None, 3)
    assert ops(freeze(read, (2, 3), input="x", output="z")) == ["Neg"]


def test_a_second_input_that_is_needed_is_named() -> None:
    proto = model("(float[N, 3] x, float[N, 3] other) => (float[N, 3] y) { y = Add(x, other) }")
    with pytest.raises(InvalidModel, match="reads 'other', a second input"):
        freeze(read_model(proto), (2, 3), input="x")


def test_initializers_may_be_listed_as_inputs() -> None:
    proto = model("(float[N, 3] x, float[3, 4] W) => (float[N, 4] y) { y = MatMul(x, W) }")
    proto.graph.initializer.append(numpy_helper.from_array(W, "W"))
    read = read_model(proto)
    assert input_spec(read).name == "x"
    assert ops(freeze(read, (2, 3))) == ["MatMul"]


@pytest.mark.parametrize(
    ("signature", "match"),
    [
        ("int64[N, 3] x", "not floating-point"),
        ("float[N] x", "no batch and feature axes"),
        ("float x", "no batch and feature axes"),
    ],
)
def test_inputs_that_are_no_image(signature: str, match: str) -> None:
    proto = model(f"({signature}) => (float[N, 3] y) {{ y = Cast<to = 1>(x) }}")
    with pytest.raises(InvalidModel, match=match):
        input_spec(read_model(proto))


@pytest.mark.parametrize("extent", [0, -1])
def test_extents_that_mean_any(extent: int) -> None:
    proto = model("(float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = extent
    assert input_spec(read_model(proto)).shape == (None, 3)


@pytest.mark.parametrize(
    ("output", "match"),
    [
        ("y = Relu(x)", r"no class score per sample: 'y' has shape \(2, 3, 4\)"),
        ("y = Transpose(x)", "no class score per sample"),
        ("y = ReduceSum<keepdims = 0>(x)", "no class score per sample"),
        ("y = ArgMax<axis = 1>(x)", "no class score: its type is int64"),
    ],
)
def test_outputs_that_are_no_class_score(output: str, match: str) -> None:
    refused(f"(float[N, 3, 4] x) => (float[N, 3] y) {{ {output} }}", 2, 3, 4, match=match)


@pytest.mark.parametrize("shape", ["[0, -1]", "[0, 12]", "[-1, 12]", "[-1, 12, 1, 1]"])
def test_shapes_of_class_scores(shape: str) -> None:
    text = f"""(float[N, 3, 4] x) => (float[N, 12] y) {{
        s = Constant<value_ints = {shape}>()
        y = Reshape(x, s)
    }}"""
    assert frozen(text, 2, 3, 4).classes == 12


FLATTENS = {
    "Shape, Gather, Concat": """
        s = Shape(x)
        n = Gather<axis = 0>(s, zero)
        u = Unsqueeze(n, first)
        k = Concat<axis = 0>(u, rest)
        f = Reshape(x, k)""",
    "Shape, Slice, Concat": """
        s = Shape(x)
        n = Slice(s, first, one)
        k = Concat<axis = 0>(n, rest)
        f = Reshape(x, k)""",
    "Shape with start and end": """
        n = Shape<start = 0, end = 1>(x)
        k = Concat<axis = 0>(n, rest)
        f = Reshape(x, k)""",
    "all but the batch, multiplied": """
        s = Shape(x)
        n = Slice(s, first, one)
        m = Slice(s, one, four)
        p = ReduceProd(m, first)
        k = Concat<axis = 0>(n, p)
        f = Reshape(x, k)""",
    "ConstantOfShape, Expand, Where": """
        s = Shape(x)
        ones = ConstantOfShape<value = int64[1] {1}>(two)
        e = Expand(rest, two)
        minus = Mul(ones, rest)
        same = Equal(e, minus)
        n = Gather<axis = 0>(s, first)
        pair = Where(mask, n, rest)
        f = Reshape(x, pair)""",
    "Size, Div, Cast": """
        s = Size(x)
        h = Shape(x)
        n = Gather<axis = 0>(h, zero)
        d = Div(s, n)
        c = Cast<to = 1>(d)
        r = Cast<to = 7>(c)
        u = Unsqueeze(r, first)
        k = Concat<axis = 0>(rest, u)
        f = Reshape(x, k)""",
    "Range": """
        i = Range(zero, three, step)
        s = Shape(x)
        m = Gather<axis = 0>(s, i)
        n = Gather<axis = 0>(m, first)
        k = Concat<axis = 0>(n, rest)
        f = Reshape(x, k)""",
}


@pytest.mark.parametrize("chain", FLATTENS)
@pytest.mark.parametrize("batch", [1, 3])
def test_chains_on_a_symbolic_batch_are_folded(chain: str, batch: int) -> None:
    text = f"""(float[N, 2, 3, 1] x) => (float[N, 6] y) {{ {FLATTENS[chain]}
        y = Relu(f)
    }}"""
    integers: dict[str, Any] = {
        "zero": 0, "first": [0], "one": [1], "two": [2], "three": 3, "four": [4], "step": 1,
        "rest": [-1],
    }  # fmt: skip
    constants = {name: np.array(value, np.int64) for name, value in integers.items()}
    graph = frozen(text, batch, 2, 3, 1, **constants, mask=np.array([True, False]))
    assert ops(graph) == ["Reshape", "Relu"]
    assert graph.shapes[graph.logits] == (batch, 6)
    assert is_samplewise(graph)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("value_int = 3", 3),
        ("value_ints = [1, 2]", [1, 2]),
        ("value_float = 0.1", np.float32(0.1)),
        ("value_floats = [0.1, 2.0]", np.float32([0.1, 2])),
        ("value = float[1, 2] {0.1, 2.0}", np.float32([[0.1, 2]])),
        ('value_string = "a"', "a"),
        ('value_strings = ["a", "b"]', ["a", "b"]),
    ],
)
def test_constants_of_every_kind(kind: str, expected: Any) -> None:
    text = f"""(float[N, 3] x) => (float[N, 3] y) {{
        c = Constant<{kind}>()
        s = Size(c)
        f = Cast<to = 1>(s)
        y = Add(x, f)
    }}"""
    found = frozen(text, 2, 3).constants["c"]
    if isinstance(expected, np.ndarray | np.float32):
        assert found.dtype == np.float32
    decoded = [v.decode() if isinstance(v, bytes) else v for v in np.ravel(found)]
    np.testing.assert_array_equal(np.reshape(decoded, found.shape), expected)


def test_random_nodes_are_not_folded() -> None:
    text = """(float[N, 3] x) => (float[N, 3] y) {
        r = RandomNormal<shape = [1, 3]>()
        y = Add(x, r)
    }"""
    assert ops(frozen(text, 2, 3)) == ["RandomNormal", "Add"]


def test_a_sparse_initializer() -> None:
    proto = model("(float[N, 3] x) => (float[N, 3] y) { y = MatMul(x, S) }")
    values = numpy_helper.from_array(np.float32([2, 3]), "S")
    for places in (np.array([1, 6]), np.array([[0, 1], [2, 0]])):
        del proto.graph.sparse_initializer[:]
        indices = numpy_helper.from_array(places.astype(np.int64), "S_indices")
        sparse = helper.make_sparse_tensor(values, indices, [3, 3])
        proto.graph.sparse_initializer.append(sparse)
        graph = freeze(read_model(proto), (2, 3))
        np.testing.assert_array_equal(graph.constants["S"], [[0, 2, 0], [0, 0, 0], [3, 0, 0]])


@pytest.mark.parametrize(
    ("flatten", "expected"),
    [
        ("f = Flatten(c)", True),
        ("k = Constant<value_ints = [0, -1]>() f = Reshape(c, k)", True),
        ("k = Constant<value_ints = [-1, 8]>() f = Reshape(c, k)", True),
        ("k = Constant<value_ints = [1, -1]>() f = Reshape(c, k)", False),
    ],
)
def test_a_fixed_batch_of_one(flatten: str, expected: bool) -> None:
    """It can be given more samples unless a one is written into the graph."""
    text = f"""(float[1, 3, 4, 4] x) => (float[1, 5] y) {{
        c = Conv<strides = [2, 2]>(x, K)
        {flatten}
        y = MatMul(f, V)
    }}"""
    constants = {"K": float32(2, 3, 2, 2), "V": float32(8, 5)}
    alone = frozen(text, 1, 3, 4, 4, **constants)
    x = float32(2, 3, 4, 4)
    singles = np.concatenate([logits(alone, x[i : i + 1]) for i in range(2)])
    if not expected:
        refused(text, 2, 3, 4, 4, match="does not fit inputs of shape", **constants)
        return
    together = frozen(text, 2, 3, 4, 4, **constants)
    assert is_samplewise(together)
    np.testing.assert_allclose(logits(together, x), singles)


def test_an_nhwc_input_behind_a_transpose() -> None:
    text = """(float[N, 5, 6, 3] x) => (float[N, 2] y) {
        t = Transpose<perm = [0, 3, 1, 2]>(x)
        c = Conv(t, K)
        b = Transpose<perm = [0, 2, 3, 1]>(c)
        p = ReduceMean<axes = [1, 2], keepdims = 0>(b)
        y = Relu(p)
    }"""
    proto = model(text, opset=13, constants={"K": float32(2, 3, 3, 3)})
    graph, x = freeze(read_model(proto), (2, 5, 6, 3)), float32(2, 5, 6, 3)
    assert is_samplewise(graph)
    np.testing.assert_allclose(logits(graph, x), run_elsewhere(proto, x), rtol=1e-4, atol=1e-6)


AFTER = {
    "": "y = Identity(h)",
    "Flatten": "y = Flatten(h)",
    "Identity, Cast": "i = Identity(h)  y = Cast<to = 1>(i)",
    "Unsqueeze before, Squeeze after": "y = Squeeze(h, last)",
    "Reshape": "y = Reshape(h, rows)",
    "Dropout": "y = Dropout(h)",
}


@pytest.mark.parametrize("head", ["Softmax", "LogSoftmax", "Sigmoid"])
@pytest.mark.parametrize("after", AFTER)
def test_heads(head: str, after: str) -> None:
    before = "r = Reshape(z, cube)" if "Squeeze" in after else "r = Identity(z)"
    text = f"""(float[N, 3] x) => (float[N, 4] y) {{
        z = MatMul(x, W)
        {before}
        h = {head}(r)
        {AFTER[after]}
    }}"""
    constants = {"W": W, "last": [2], "rows": [0, 4], "cube": [0, 4, 1]}
    graph = frozen(text, 2, 3, **{k: np.asarray(v) for k, v in constants.items()})
    assert (graph.head, graph.output) == (head, "y")
    x = float32(2, 3)
    np.testing.assert_allclose(logits(graph, x).reshape(2, 4), x @ W, rtol=1e-6)


def test_zipmap_after_a_head() -> None:
    text = """(float[N, 3] x) => (float[N, 4] y) {
        z = MatMul(x, W)
        p = Softmax(z)
        y = ai.onnx.ml.ZipMap<classlabels_int64s = [0, 1, 2, 3]>(p)
    }"""
    proto = model(text, constants={"W": W}, domains=["ai.onnx.ml"])
    graph = freeze(read_model(proto), (2, 3))
    assert (graph.logits, graph.head) == ("z", "Softmax")


def test_no_head() -> None:
    text = "(float[N, 3] x) => (float[N, 4] y) { z = Softmax(x)  y = MatMul(z, W) }"
    graph = frozen(text, 2, 3, W=W)
    assert (graph.logits, graph.head) == ("y", None)


def test_inputs_of_another_float_type() -> None:
    proto = model("(double[N, 3] x) => (double[N, 3] y) { y = Relu(x) }")
    assert input_spec(read_model(proto)).dtype == np.float64
    graph = freeze(read_model(proto), (2, 3))
    assert graph.dtypes["y"] == np.float64
    assert graph.is_float("y")


def test_a_cast_does_not_round_a_float64_pass() -> None:
    text = "(float[N, 3] x) => (float[N, 3] y) { h = Cast<to = 10>(x)  y = Cast<to = 1>(h) }"
    x = np.array([[1 / 3, 1e6, 1e-9]])
    np.testing.assert_array_equal(logits(frozen(text, 1, 3), x), x)


def test_casts_of_constants_round() -> None:
    text = """(float[N, 3] x) => (float[N, 3] y) {
        i = Cast<to = 7>(c)
        f = Cast<to = 1>(i)
        y = Add(x, f)
    }"""
    graph = frozen(text, 1, 3, c=np.float32(2.7))
    np.testing.assert_array_equal(graph.constants["f"], np.float32(2))


def test_graphs_are_read_only() -> None:
    graph = frozen("(float[N, 3] x) => (float[N, 4] y) { y = MatMul(x, W) }", 2, 3, W=W)
    with pytest.raises(TypeError):
        graph.constants["W"] = W  # type: ignore[index]
    with pytest.raises(AttributeError):
        graph.batch = 3  # type: ignore[misc]


def test_omitted_inputs_and_outputs() -> None:
    proto = model("(float[N, 3] x) => (float[N, 3] y) { y = Clip(x, , top) }", constants={"top": W})
    del proto.graph.initializer[:]
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "top"))
    proto.graph.node.append(onnx.NodeProto(op_type="Constant", output=[""]))
    (node,) = freeze(read_model(proto), (2, 3)).nodes
    assert node.inputs == ("x", "", "top")
    assert node.input_shapes == ((2, 3), (), ())
    assert str(node) == "Clip 'y'"


def test_the_number_of_classes_may_be_unknown() -> None:
    proto = model("(float[N, 3] x) => (float[N, K] y) { y = my.Custom(x) }", domains=["my"])
    with pytest.raises(InvalidModel, match="shape of the class scores 'y' depends"):
        _ = freeze(read_model(proto), (2, 3)).classes
