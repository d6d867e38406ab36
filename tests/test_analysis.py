"""What the graph proves, against what a graph then does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import NEWEST, float32, generators, model, quick
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import shape_inference

from rectgrad_ref import analysis
from rectgrad_ref.errors import InvalidModel
from rectgrad_ref.forward import NumpyForward
from rectgrad_ref.graph import Graph, Node, freeze
from rectgrad_ref.model import read_model

Rng = np.random.Generator
BATCH = 2  # also an extent of features and constants, so that axes are easily mistaken


def frozen(text: str, *shape: int, opset: int = NEWEST, **constants: Any) -> Graph:
    arrays = {name: np.asarray(value) for name, value in constants.items()}
    return freeze(read_model(model(text, opset=opset, constants=arrays)), shape)


def axis_of(rng: Rng, shape: list[int]) -> int:
    return int(rng.integers(-len(shape), len(shape)))


def ints(values: Any) -> str:
    return f"Constant<value_ints = [{', '.join(str(int(v)) for v in values)}]>()"


def floats(rng: Rng, *shape: int, equal: bool = False) -> str:
    values = np.ones(shape) if equal else rng.normal(size=shape)
    listed = ", ".join(f"{value:.3f}" for value in values.ravel())
    return f"Constant<value = float[{', '.join(map(str, shape))}] {{{listed}}}>()"


def transposed(rng: Rng, v: str, shape: list[int]) -> str:
    return f"OUT = Transpose<perm = {rng.permutation(len(shape)).tolist()}>({v})"


def reshaped(rng: Rng, v: str, shape: list[int]) -> str:
    extents = [*rng.permutation(shape), 1][: len(shape) + rng.integers(2)]
    extents[rng.integers(len(extents))] = -1
    copied = [0 if i < len(shape) and n == shape[i] and rng.integers(2) else n
              for i, n in enumerate(extents)]  # fmt: skip
    return f"K = {ints(copied)}  OUT = Reshape({v}, K)"


def folded(rng: Rng, v: str, shape: list[int]) -> str:
    size = int(np.prod(shape))
    divisor = rng.choice([n for n in range(1, size + 1) if size % n == 0])
    return f"K = {ints(rng.permutation([divisor, -1]))}  OUT = Reshape({v}, K)"


def reduced(rng: Rng, v: str, shape: list[int]) -> str:
    axes = rng.choice(len(shape), rng.integers(1, len(shape) + 1), replace=False)
    op = rng.choice(["ReduceSum", "ReduceMean", "ReduceMax"])
    return f"K = {ints(axes)}  OUT = {op}<keepdims = {rng.integers(2)}>({v}, K)"


def softmax(rng: Rng, v: str, shape: list[int]) -> str:
    return f"OUT = Softmax<axis = {axis_of(rng, shape)}>({v})"


def joined(rng: Rng, v: str, shape: list[int]) -> str:
    axis = axis_of(rng, shape)
    token = list(shape)
    token[axis] = 1
    constant = f"K = {floats(rng, *token, equal=bool(rng.integers(2)))}"
    both = rng.permutation([v, "K"]).tolist() if rng.integers(2) else [v, v]
    return f"{constant}  OUT = Concat<axis = {axis}>({', '.join(both)})"


def sliced(rng: Rng, v: str, shape: list[int]) -> str:
    step = rng.choice([-1, 1, 2])
    start, end = (0, 2**62) if step > 0 else (-1, -(2**62))
    axis = axis_of(rng, shape)
    given = zip("ABCD", ([start], [end], [axis], [step]), strict=True)
    return "  ".join(f"{k} = {ints(n)}" for k, n in given) + f"  OUT = Slice({v}, A, B, C, D)"


def cut_at_the_batch(rng: Rng, v: str, shape: list[int]) -> str:
    named = f"A = {ints([0])}  S = Shape(x)  B = Gather(S, A)  C = {ints([axis_of(rng, shape)])}"
    return f"{named}  OUT = Slice({v}, A, B, C)"


def shifted(rng: Rng, v: str, shape: list[int]) -> str:
    pads, axis = np.zeros((2, len(shape)), int), axis_of(rng, shape)
    pads[:, axis] = rng.permutation([1, -1])
    return f"K = {ints(pads.ravel())}  OUT = Pad({v}, K)"


def gathered(rng: Rng, v: str, shape: list[int]) -> str:
    axis = axis_of(rng, shape)
    return f"K = {ints(rng.permutation(shape[axis]))}  OUT = Gather<axis = {axis}>({v}, K)"


def multiplied(rng: Rng, v: str, shape: list[int]) -> str:
    stack = [BATCH] if rng.integers(3) == 0 else []
    if rng.integers(2):
        return f"K = {floats(rng, *stack, shape[-1], 2)}  OUT = MatMul({v}, K)"
    return f"K = {floats(rng, *stack, 2, shape[-2])}  OUT = MatMul(K, {v})"


def squared(rng: Rng, v: str, shape: list[int]) -> str:
    """x · xᵀ, in either order."""
    perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    both = rng.permutation([v, "T"]).tolist()
    return f"T = Transpose<perm = {perm}>({v})  OUT = MatMul({', '.join(both)})"


def gemm(rng: Rng, v: str, shape: list[int]) -> str:
    trans = int(rng.integers(2))
    rows, inner = (shape[1], shape[0]) if trans else shape
    C = [(3,), (rows, 3), (1, 3), (rows, 1)][rng.integers(4)]
    constants = f"B = {floats(rng, inner, 3)}  C = {floats(rng, *C)}"
    return f"{constants}  OUT = Gemm<transA = {trans}>({v}, B, C)"


def with_constant(rng: Rng, v: str, shape: list[int]) -> str:
    extents = [n if rng.integers(2) else 1 for n in shape][rng.integers(len(shape)) :]
    constant = floats(rng, *extents, equal=bool(rng.integers(2)))
    return f"K = {constant}  OUT = {rng.choice(['Add', 'Mul', 'Max'])}({v}, K)"


def by_the_batch_size(rng: Rng, v: str, shape: list[int]) -> str:
    where = rng.integers(len(shape))
    size = f"S = Shape<start = {where}, end = {where + 1}>({v})  F = Cast<to = 1>(S)"
    return f"{size}  OUT = Div({v}, F)"


def plus_the_sample_number(rng: Rng, v: str, shape: list[int]) -> str:
    size = f"A = {ints([0])}  S = Shape<end = 1>(x)  E = Squeeze(S)  Z = Constant<value_int = 0>()"
    column = f"K = {ints([-1] + [1] * rng.integers(3))}"
    numbers = "I = Constant<value_int = 1>()  R = Range(Z, E, I)  F = Cast<to = 1>(R)"
    return f"{size}  {column}  {numbers}  Q = Reshape(F, K)  OUT = Add({v}, Q)"


def expanded(rng: Rng, v: str, shape: list[int]) -> str:
    extents = [1] * rng.integers(2) + [int(rng.choice([1, 2])) if n == 1 else n for n in shape]
    return f"K = {ints(extents)}  OUT = Expand({v}, K)"


def tiled(rng: Rng, v: str, shape: list[int]) -> str:
    return f"K = {ints(rng.choice([1, 1, 2], len(shape)))}  OUT = Tile({v}, K)"


def split(rng: Rng, v: str, shape: list[int]) -> str:
    return f"OUT, U = Split<axis = {axis_of(rng, shape)}, num_outputs = 2>({v})"


def layer_norm(rng: Rng, v: str, shape: list[int]) -> str:
    axis = axis_of(rng, shape)
    return f"K = {floats(rng, *shape[axis:])}  OUT = LayerNormalization<axis = {axis}>({v}, K)"


def per_channel(rng: Rng, v: str, shape: list[int]) -> str:
    k, ones = floats(rng, shape[1]), floats(rng, shape[1], equal=True)
    if rng.integers(2):
        return f"K = {k}  OUT = InstanceNormalization({v}, K, K)"
    return f"K = {k}  V = {ones}  OUT = BatchNormalization({v}, K, K, K, V)"


def convolution(rng: Rng, v: str, shape: list[int]) -> str:
    return f"K = {floats(rng, 2, shape[1], *[1] * (len(shape) - 2))}  OUT = Conv({v}, K)"


def normalised(rng: Rng, v: str, shape: list[int]) -> str:
    return f"OUT = LRN<size = {min(3, shape[1])}>({v})"


def shaped_like_x(rng: Rng, v: str, shape: list[int]) -> str:
    return f"S = Shape(x)  OUT = Reshape({v}, S)"


def chosen(rng: Rng, v: str, shape: list[int]) -> str:
    return f"Z = {floats(rng, 1)}  M = Greater({v}, Z)  OUT = Where(M, {v}, Z)"


def plain(text: str) -> Callable[[Rng, str, list[int]], str]:
    return lambda rng, v, shape: text.format(v=v, axis=rng.integers(len(shape) + 1))


MOVES = [
    transposed, reshaped, folded, reduced, softmax, joined, sliced, cut_at_the_batch, shifted,
    gathered, multiplied, squared, gemm, with_constant, by_the_batch_size, plus_the_sample_number,
    expanded, tiled, split, layer_norm, per_channel, convolution, shaped_like_x, chosen,
    plain("OUT = Flatten<axis = {axis}>({v})"), plain("OUT = Squeeze({v})"),
    plain("OUT = Add({v}, x)"), plain("OUT = GlobalAveragePool({v})"), plain("OUT = Relu({v})"),
    normalised, plain("T = Transpose(x)  OUT = Mul({v}, T)"),
]  # fmt: skip


def shape_of(proto: onnx.ModelProto, value: str) -> list[int] | None:
    inferred = shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    (found,) = (v for v in inferred.graph.value_info if v.name == value)
    dims = found.type.tensor_type.shape.dim
    extents = [d.dim_value for d in dims]
    return extents if all(extents) and len(extents) > 0 and np.prod(extents) < 300 else None


@st.composite
def grown(draw: st.DrawFn) -> tuple[onnx.ModelProto, list[int]]:
    """A model that may or may not mix its samples, and the shape of a batch."""
    rng = draw(generators())
    shape = [BATCH, *(int(n) for n in rng.integers(1, 4, rng.integers(1, 4)))]
    features = ", ".join(map(str, shape[1:]))
    last, body = ("x", shape), ""
    best = last

    def text(extent: int | str, more: str) -> str:
        return f"(float[{extent}, {features}] x) => (float[N, K] y) {{ {body} {more} }}"

    for number in range(rng.integers(1, 7)):
        move = MOVES[rng.integers(len(MOVES))]
        try:
            more = move(rng, *last)
            for local in ("OUT", *"ABCDEFIKMQRSTUVZ"):
                more = more.replace(f"{local} ", f"{local}{number} ")
                more = more.replace(f"{local},", f"{local}{number},")
                more = more.replace(f"{local})", f"{local}{number})")
            found = shape_of(model(text(BATCH, f"{more} y = Flatten(OUT{number})")), f"OUT{number}")
        except (shape_inference.InferenceError, onnx.parser.ParseError, ValueError, IndexError):
            continue
        if found is not None:
            body, last = f"{body} {more}", (f"OUT{number}", found)
            best = last if found[0] == BATCH else best
    return model(text("N", f"y = Flatten({best[0]})")), shape


def scores(graph: Graph, x: np.ndarray) -> np.ndarray:
    return NumpyForward(np.float64)(graph, x, [graph.logits])[graph.logits]


@settings(quick, max_examples=400)
@given(grown(), generators())
def test_a_batch_proven_samplewise_gives_each_sample_what_it_gets_alone(
    drawn: tuple[onnx.ModelProto, list[int]], rng: Rng
) -> None:
    proto, shape = drawn
    read = read_model(proto)
    try:
        together = freeze(read, tuple(shape))
    except InvalidModel:
        return
    if analysis.is_samplewise(together):
        alone, x = freeze(read, (1, *shape[1:])), rng.normal(size=shape)
        singles = [scores(alone, x[i : i + 1]) for i in range(BATCH)]
        np.testing.assert_allclose(scores(together, x), np.concatenate(singles), atol=1e-9)


MIXING = {
    "x·xᵀ": "t = Transpose(x)  h = MatMul(x, t)",
    "a sum over the batch": "r = ReduceSum(x, zero)  h = Add(x, r)",
    "a mean over everything": "r = ReduceMean(x)  h = Sub(x, r)",
    "softmax over the batch": "h = Softmax<axis = 0>(x)",
    "the batch reversed": "h = Slice(x, minus, least, zero, minus)",
    "the batch shifted": "h = Pad(x, shift)",
    "the batch permuted": "h = Gather(x, swapped)",
    "joined along the batch": "c = Concat<axis = 0>(x, x)  h = Slice(c, zero, two, zero)",
    "transposed and read as it was": "t = Transpose(x)  h = Reshape(t, same)",
    "rows of two whatever the batch": "r = Reshape(x, rows)  s = Softmax(r)  h = Reshape(s, same)",
    "divided by the batch size": "s = Shape<end = 1>(x)  f = Cast<to = 1>(s)  h = Div(x, f)",
    "a bias for each of two samples": "h = Add(x, own)",
    "a Gemm's bias for each of two samples": "h = Gemm(x, square, own)",
    "a feature axis taken for the batch": "t = Transpose(x)  h = Add(t, x)",
}


@pytest.mark.parametrize("case", MIXING)
def test_samples_that_meet_are_seen(case: str) -> None:
    constants: dict[str, Any] = {
        "zero": [0], "two": [2], "minus": [-1], "least": [-(2**62)], "shift": [1, 0, -1, 0],
        "swapped": [1, 0], "same": [-1, 2], "rows": [2, -1],
        "own": float32(2, 2), "square": float32(2, 2),
    }  # fmt: skip
    text = f"(float[N, 2] x) => (float[N, 2] y) {{ {MIXING[case]}  y = Relu(h) }}"
    assert not analysis.is_samplewise(frozen(text, 2, 2, **constants))


def test_a_vision_transformer_is_samplewise() -> None:
    """A class token that is expanded to the batch, positions, attention, the token's output."""
    text = """(float[N, 6, 4] x) => (float[N, 3] y) {
        s = Shape<end = 1>(x)
        k = Concat<axis = 0>(s, ones)
        t = Expand(token, k)
        z = Concat<axis = 1>(t, x)
        p = Add(z, positions)
        l = LayerNormalization(p, scale)
        q = MatMul(l, Q)
        c = Transpose<perm = [0, 2, 1]>(l)
        a = MatMul(q, c)
        w = Softmax(a)
        v = MatMul(w, l)
        r = Add(v, p)
        g = Gather<axis = 1>(r, zero)
        y = MatMul(g, V)
    }"""
    constants = {
        "ones": np.array([1, 4]), "token": float32(1, 1, 4), "positions": float32(1, 7, 4),
        "scale": float32(4), "Q": float32(4, 4), "V": float32(4, 3), "zero": np.array(0),
    }  # fmt: skip
    assert analysis.is_samplewise(frozen(text, 2, 6, 4, **constants))


def test_activations_must_have_the_samples_first() -> None:
    text = "(float[N, 3] x) => (float[N, 3] y) { t = Transpose(x)  r = Relu(t)  y = Transpose(r) }"
    graph = frozen(text, 2, 3)
    assert analysis.sample_axes(graph)["r"] == 1
    assert not analysis.is_samplewise(graph)


def test_values_of_unknown_shape_prove_nothing() -> None:
    text = """(float[N, 3] x) => (float[N, 3] y) {
        i = NonZero(x)
        r = ReduceSum(x)
        n = Cast<to = 7>(r)
        m = Reshape(n, one)
        c = Slice(x, one, m)
        s = Shape(c)
        f = Cast<to = 1>(s)
        t = ReduceSum(f)
        y = Mul(x, t)
    }"""
    graph = frozen(text, 2, 3, one=[1])
    assert "c" not in analysis.sample_axes(graph)
    assert not analysis.is_samplewise(graph)


def named(graph: Graph, output: str) -> Node:
    return graph.producer[output]


def test_the_path_goes_through_floats_from_the_input_to_the_logits() -> None:
    text = """(float[N, 3] x) => (float[N, 3] y, float[N, 3] aside) {
        a = Relu(x)
        i = ArgMax<axis = 1, keepdims = 1>(a)
        f = Cast<to = 1>(i)
        s = Sigmoid(a)
        g = Greater(a, s)
        w = Where(g, a, s)
        y = Mul(w, f)
        aside = Exp(a)
    }"""
    proto = model(text)
    graph = freeze(read_model(proto), (2, 3), output="y")
    path = analysis.path(graph)
    assert [node.op for node in path] == ["Relu", "Sigmoid", "Where", "Mul"]
    positions = analysis.differentiated(graph, path)
    assert positions[named(graph, "w").name] == (1, 2)
    assert positions[named(graph, "y").name] == (0,)


def test_last_activations() -> None:
    text = """(float[N, 3] x) => (float[N, 3] y) {
        a = Relu(x)
        b = Relu(a)
        c = Sigmoid(a)
        d = Add(b, c)
        e = Add(d, x)
        y = Softmax(e)
    }"""
    graph = frozen(text, 2, 3)
    assert analysis.activations(graph) == {named(graph, v).name for v in "abc"}
    assert analysis.last_activations(graph) == {named(graph, v).name for v in "bc"}


def test_an_activation_beside_and_before_another_is_a_last_one() -> None:
    text = "(float[N, 3] x) => (float[N, 3] y) { a = Relu(x)  b = Relu(a)  y = Add(a, b) }"
    graph = frozen(text, 2, 3)
    assert analysis.last_activations(graph) == {named(graph, v).name for v in "ab"}


@quick
@given(generators())
def test_non_negative_values_are(rng: Rng) -> None:
    text = """(float[N, 3, 4, 4] x) => (float[N, 3] y) {
        relu = Relu(x)
        clip = Clip(x, low)
        sigmoid = Sigmoid(x)
        joined = Concat<axis = 1>(relu, clip)
        mixed = Concat<axis = 1>(relu, x)
        pool = MaxPool<kernel_shape = [2, 2], pads = [1, 1, 1, 1]>(joined)
        mean = AveragePool<kernel_shape = [2, 2]>(mixed)
        padded = Pad(relu, pads)
        below = Pad(relu, pads, minus)
        sum = Add(relu, sigmoid)
        shifted = Add(relu, minus)
        scaled = Mul(relu, half)
        difference = Sub(relu, sigmoid)
        log = LogSoftmax(relu)
        flat = Flatten(pool)
        f2 = Flatten(mean)
        f3 = Flatten(padded)
        f4 = Flatten(below)
        f5 = Flatten(sum)
        f6 = Flatten(shifted)
        f7 = Flatten(scaled)
        f8 = Flatten(difference)
        f9 = Flatten(log)
        y = Concat<axis = 1>(flat, f2, f3, f4, f5, f6, f7, f8, f9)
    }"""
    constants = {"low": np.float32(0.5), "minus": np.float32(-1), "half": np.float32(0.5)}
    graph = frozen(text, 1, 3, 4, 4, pads=[0, 0, 1, 1, 0, 0, 1, 1], **constants)
    known = analysis.non_negative(graph)
    expected = {"relu", "clip", "sigmoid", "joined", "pool", "padded", "sum", "scaled", "flat"}
    assert expected <= known
    assert not known & {"x", "mixed", "mean", "below", "shifted", "difference", "log"}
    names = [value for node in graph.nodes for value in node.outputs]
    values = NumpyForward(np.float64)(graph, 3 * rng.normal(size=(1, 3, 4, 4)), names)
    assert all((values[name] >= 0).all() for name in known & values.keys())


CONVOLUTIONS = [
    ('Conv<auto_pad = "SAME_UPPER">(x, K)', True, True),
    ('Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, K)', True, True),
    ("Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, K)", True, False),  # TensorFlow pads 0, 1
    ("Conv<pads = [1, 1, 1, 1]>(x, K)", True, True),
    ("Conv<pads = [2, 2, 2, 2]>(x, K)", True, False),
    ("Conv(x, K)", False, False),
    ("Conv(x, One)", False, True),
    ("Conv<strides = [2, 2]>(x, One)", False, True),
    ("Conv<strides = [2, 2]>(x, Two)", False, False),
    ("Conv(p, K)", True, True),
    ("Conv(q, K)", True, True),
    ("Conv(n, K)", False, False),
    ("Conv(e, K)", False, False),
]


@pytest.mark.parametrize(("convolution", "padded", "same"), CONVOLUTIONS)
def test_which_convolutions_are_padded(convolution: str, padded: bool, same: bool) -> None:
    text = f"""(float[N, 3, 8, 8] x) => (float[N, K] y) {{
        p = Pad(x, around)
        q = Pad(x, ones, zero, spatial)
        n = Pad(x, around, half)
        e = Pad<mode = "edge">(x, around)
        c = {convolution}
        y = Flatten(c)
    }}"""
    kernels = {"K": float32(2, 3, 3, 3), "One": float32(2, 3, 1, 1), "Two": float32(2, 3, 2, 2)}
    pads = {"around": [0, 0, 1, 1, 0, 0, 1, 1], "ones": [1, 1, 1, 1], "spatial": [-2, 3]}
    values = {"zero": np.float32(0), "half": np.float32(0.5)}
    graph = frozen(text, 2, 3, 8, 8, **kernels, **pads, **values)
    node = named(graph, "c")
    assert analysis.pads_input(graph, node) == padded
    assert analysis.is_tensorflow_same(graph, node) == same


def test_a_pad_that_others_read_is_not_the_convolutions() -> None:
    text = """(float[N, 3, 8, 8] x) => (float[N, K] y) {
        p = Pad(x, around)
        c = Conv(p, K)
        f = Flatten(c)
        g = Flatten(p)
        y = Concat<axis = 1>(f, g)
    }"""
    graph = frozen(text, 2, 3, 8, 8, around=[0, 0, 1, 1, 0, 0, 1, 1], K=float32(2, 3, 3, 3))
    assert not analysis.pads_input(graph, named(graph, "c"))


def test_what_a_method_for_activations_leaves_to_the_gradient() -> None:
    text = """(float[N, 3] x) => (float[N, 3] y) {
        a = MatMul(x, W)
        r = Relu(a)
        [root] s = Sqrt(r)
        [scale] m = Mul(s, half)
        [square] q = Mul(m, m)
        y = Add(q, r)
    }"""
    graph = frozen(text, 2, 3, W=float32(3, 3), half=np.float32(0.5))
    (note,) = analysis.note_plain_gradient("DeepLIFT", graph)
    assert note == "DeepLIFT: the gradient is used at Sqrt 'root', Mul 'square'"


def test_no_gradient_flows_through_an_empty_value() -> None:
    """As a roll by nothing is exported: a slice without any rows, joined to the rest."""
    graph = frozen(
        """(float[N, 4] x) => (float[N, 4] y) {
            none = Slice(x, zero, zero, one)  all = Concat<axis = 1>(x, none)  y = Relu(all)
        }""",
        2, 4, zero=[0], one=[1],
    )  # fmt: skip
    nodes = analysis.path(graph)
    assert [node.op for node in nodes] == ["Concat", "Relu"]
    assert analysis.differentiated(graph, nodes)[nodes[0].name] == (0,)
