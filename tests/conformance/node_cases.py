"""ONNX's own node cases through the whole pipeline: the count behind docs/operators.md.

A case becomes a classifier: one row of numbers, the image, is cut into the operands that can be
differentiated; the other operands are constants; the outputs, flattened and joined, are the scores.
So a case checks the graph and the plan besides the rule of its operator.

Run as a program, this writes docs/operators.md.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper

from rectgrad_ref.errors import InvalidModel, UnsupportedOperator
from rectgrad_ref.executors.lowering import HANDLERS as LOWERED
from rectgrad_ref.forward import NumpyForward, OnnxruntimeForward
from rectgrad_ref.graph import _RANDOM as RANDOM
from rectgrad_ref.graph import Graph, freeze
from rectgrad_ref.model import OLDEST_OPSET, read_model
from rectgrad_ref.plan import make_plan
from rectgrad_ref.reference import constants_as, walk
from rectgrad_ref.rules.registry import OPERATORS, find_vjp

TABLE = Path(__file__).resolve().parents[2] / "docs" / "operators.md"
NEWEST = defs.onnx_opset_version()
_TAGGED = defs.OpSchema.DifferentiationCategory.Differentiable
# Operators that ONNX renamed; the graph knows them by the new name.
RENAMED = {"Upsample": "Resize", "Scatter": "ScatterElements"}
_NO_KERNEL = (
    "NOT_IMPLEMENTED",
    "is under development",
    "is not a registered function/op",
    "layout_ == 0",
)
_GRAPHS = {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}
_FLOATS = {TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE}
_NUMBERS = _FLOATS | {
    TensorProto.BOOL, TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
    TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class NodeCase:
    """One node case of `onnx.backend.test`."""

    test: Any

    @property
    def node(self) -> onnx.NodeProto:
        return self.test.model.graph.node[0]

    @property
    def op(self) -> str:
        return self.node.op_type

    @property
    def opset(self) -> int:
        return self.test.model.opset_import[0].version

    @cached_property
    def operands(self) -> dict[str, np.ndarray]:
        """Name → value of every input."""
        names = [value.name for value in self.test.model.graph.input]
        return dict(zip(names, map(_array, self.test.data_sets[0][0]), strict=True))

    @cached_property
    def expected(self) -> list[np.ndarray]:
        return [_array(value) for value in self.test.data_sets[0][1]]

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """The floating-point operands with a rule or, by ONNX's tags, a derivative.

        Of an operator without either, all: the nodes for which it stands decide.
        """
        tagged = differentiable(self.op, self.opset)
        op, found = RENAMED.get(self.op, self.op), []
        if op not in OPERATORS and not tagged:
            tagged = tuple(range(self._formals))
        for i, name in enumerate(self.node.input):
            if not name or self.operands[name].dtype.kind != "f" or not self.operands[name].size:
                continue
            formal = min(i, self._formals - 1)
            if formal in tagged or (op in OPERATORS and find_vjp(op, i)):
                found.append(name)
        return tuple(dict.fromkeys(found))

    @property
    def _formals(self) -> int:
        return len(defs.get_schema(self.op, self.opset).inputs)

    @property
    def excluded(self) -> str | None:
        """Why the case is not run, by a rule and not by its name."""
        model = self.test.model
        if self.node.domain:
            return "an operator of another domain than ONNX's default one"
        if any(v.type.WhichOneof("value") != "tensor_type" for v in _values(model)):
            return "sequences and optional values"
        kinds = {v.type.tensor_type.elem_type for v in _values(model)}
        if TensorProto.STRING in kinds:
            return "strings"
        if not kinds <= _NUMBERS:
            return "number types that NumPy does not have (bfloat16, float8, float4, int4, int2)"
        if self.opset < OLDEST_OPSET:
            return f"opsets before {OLDEST_OPSET}"
        if self.op in RANDOM:
            return "random operators"
        if self._trains:
            return "training mode: inference is explained"
        return None

    @property
    def optional(self) -> str | None:
        """Why the operator may be refused: no gradient passes it, and no network needs it."""
        if self.only_integers:
            return "no floating-point output"
        if not differentiable(self.op, self.opset):
            return "no input that ONNX tags as differentiable"
        return None

    @property
    def only_integers(self) -> bool:
        """Whether no output is floating-point, so that no gradient arrives."""
        kinds = {v.type.tensor_type.elem_type for v in self.test.model.graph.output}
        return not kinds & _FLOATS

    @property
    def _trains(self) -> bool:
        flags = [a.i for a in self.node.attribute if a.name == "training_mode"]
        if self.op == "Dropout" and len(self.node.input) > 2:
            flags.append(int(self.operands[self.node.input[2]]))
        return any(flags)

    @cached_property
    def image(self) -> np.ndarray:
        """The varied operands in one row; without any, one number that nothing reads."""
        flat = [np.ravel(self.operands[name]).astype(np.float64) for name in self.varied]
        return np.concatenate([*flat, np.zeros(1)])[None]

    @property
    def dtypes(self) -> tuple[Any, ...]:
        """In which precisions the stored outputs can be met."""
        # To which of two levels a number is rounded is decided in single precision.
        if any(a.dtype in (np.int8, np.uint8) for a in self.expected):
            return (np.float32,)
        doubles = [a for a in self.expected if a.dtype == np.float64]
        largest = max((np.abs(a).max(initial=0) for a in doubles), default=0)
        return (np.float64,) if largest > np.finfo(np.float32).max else (np.float64, np.float32)

    def graph(self) -> Graph:
        return freeze(read_model(self.classifier()), self.image.shape)

    def classifier(self) -> onnx.ModelProto:
        """The case from one row of numbers to another."""
        model = self.test.model
        nodes, initializers, start = [], list(model.graph.initializer), 0
        zeros = {"allowzero": 1} if self.opset >= 14 else {}

        def constant(name: str, value: Any) -> str:
            initializers.append(numpy_helper.from_array(np.asarray(value), name))
            return name

        for name, value in self.operands.items():
            if name not in self.varied:
                constant(name, value)
                continue
            where = constant(f"case/{name}/where", np.arange(start, start + value.size))
            shape = constant(f"case/{name}/shape", np.array(value.shape, np.int64))
            start += value.size
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            nodes += [
                helper.make_node("Gather", ["case/image", where], [f"case/{name}/part"], axis=1),
                helper.make_node(
                    "Reshape", [f"case/{name}/part", shape], [f"case/{name}/float"], **zeros
                ),
                helper.make_node("Cast", [f"case/{name}/float"], [name], to=kind),
            ]
        nodes += model.graph.node
        rows = ["case/image"]
        for value in model.graph.output:
            cast, row = f"case/{value.name}/cast", f"case/{value.name}/row"
            nodes.append(helper.make_node("Cast", [value.name], [cast], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Flatten", [cast], [row], axis=0))
            rows.append(row)
        nodes.append(helper.make_node("Concat", rows, ["case/scores"], axis=1))
        image = helper.make_tensor_value_info("case/image", TensorProto.FLOAT, [1, start + 1])
        scores = helper.make_tensor_value_info("case/scores", TensorProto.FLOAT, [1, None])
        graph = helper.make_graph(nodes, "case", [image], [scores], initializers)
        imports = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)

    def check_forward(self) -> None:
        """The outputs in float64 and in float32 are the stored ones."""
        with np.errstate(all="ignore"):
            graph = self.graph()
        wanted = [np.ravel(a).astype(np.float64) for a in self.expected]
        half = any(a.dtype == np.float16 for a in (*self.operands.values(), *self.expected))
        rtol, atol = (1e-2, 1e-2) if half else (self.test.rtol, max(self.test.atol, 1e-6))
        for dtype in self.dtypes:
            with np.errstate(all="ignore"):
                found = _scores(graph, self.image.astype(dtype))[0, self.image.size :]
            np.testing.assert_allclose(
                found, np.concatenate(wanted), rtol, atol, err_msg=self.test.name
            )

    def earlier(self) -> Iterator[NodeCase]:
        """The case in every earlier version of its operator that can be written in the same way.

        Its outputs may be others then.
        """
        if any(a.type in _GRAPHS for a in self.node.attribute):
            return  # the checker would have to be told what their nodes see
        versions = sorted(_versions(self.op))
        for version, following in pairwise(versions):
            opset = following - 1
            if version >= defs.get_schema(self.op, self.opset).since_version or opset < 7:
                continue
            context = onnx.checker.C.CheckerContext()
            context.ir_version, context.opset_imports = 10, {"": opset}
            try:
                onnx.checker.check_node(self.node, context)
            except onnx.checker.ValidationError:
                continue
            if not self._types_fit(defs.get_schema(self.op, opset)):
                continue
            model = onnx.ModelProto()
            model.CopyFrom(self.test.model)
            model.opset_import[0].version = opset
            yield NodeCase(replace(self.test, name=f"{self.test.name}, opset {opset}", model=model))

    def _types_fit(self, definition: defs.OpSchema) -> bool:
        kinds = {v.name: v.type.tensor_type.elem_type for v in self.test.model.graph.input}
        formals = [*definition.inputs, *[definition.inputs[-1]] * len(self.node.input)]
        return all(
            f"tensor({TensorProto.DataType.Name(kinds[value]).lower()})" in formal.types
            for value, formal in zip(self.node.input, formals, strict=False)
            if value
        )

    def check_onnxruntime(self, *, stored: bool = True) -> bool:
        """The forward pass of the backend ``cpu``.

        False where onnxruntime has no such kernel or departs from the outputs stored with the case
        (MaxUnpool with an output shape, Resize with align_corners and scales). If these are not to
        be `stored` ones, because the opset is another: where it refuses the model.
        """
        graph = self.graph()
        x, names = self.image.astype(np.float32), [graph.logits]
        forward = OnnxruntimeForward(graph.model, graph.input, rebatch=False, threads=1)
        try:
            theirs = forward(graph, x, [*_inner(graph), *names])
        except InvalidModel as error:
            if not stored or any(reason in str(error) for reason in _NO_KERNEL):
                return False
            raise
        outputs = theirs[graph.logits][0, x.size :]
        wanted = np.concatenate([np.ravel(a).astype(np.float64) for a in self.expected])
        if stored and not np.allclose(outputs, wanted, 1e-2, 1e-2, equal_nan=True):
            return False
        ours = NumpyForward(np.float32)(graph, x, list(theirs))
        for name, value in theirs.items():
            np.testing.assert_allclose(
                ours[name].astype(np.float64),
                value.astype(np.float64),
                1e-3,
                1e-4,
                err_msg=f"{self.test.name}: {name}",
            )
        return True

    def check_backward(self) -> None:
        """⟨uᵀJ, v⟩ = ⟨u, J v⟩ with J v from central differences in float64, at a generic point."""
        rng, h = np.random.default_rng(0), 1e-6
        with np.errstate(all="ignore"):
            graph = self.graph()
            plan = make_plan(graph, ())
            x = max(_points(self.image, rng), key=lambda p: np.isfinite(_scores(graph, p)).sum())
            values = NumpyForward(np.float64)(graph, x, plan.exposes)
            constants = constants_as(graph.constants, x.dtype)
            u = rng.normal(size=graph.shapes[graph.logits])
            # Without the row itself, whose gradient is u and would hide a small one.
            u[:, : x.size] = 0
            u[~np.isfinite(_scores(graph, x))] = 0  # what a mask has set to −∞
            v = rng.normal(size=x.shape)
            change = _scores(graph, x + h * v) - _scores(graph, x - h * v)
            numeric = np.where(u == 0, 0, u * change / (2 * h))
            analytic = walk(plan, {**constants, **values}, u) * v
        scale = max(np.abs(numeric).sum(), np.abs(analytic).sum(), 1e-3)
        error = abs(analytic.sum() - numeric.sum())
        assert error <= 1e-6 * scale, f"{self.test.name}: off by {error / scale:.1e}"


def _inner(graph: Graph) -> list[str]:
    """One value in each node that was written out, so that onnxruntime has to compute its body."""
    produced = graph.producer.keys() & {
        v for body in graph.bodies.values() for n in body for v in n.output
    }
    return sorted(v for v in produced if "/" in v and v in graph.dtypes)[:1]


def _points(x: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Points near `x` without ties, on either side of the border of a domain of definition."""
    x = np.where(np.abs(x) < 1e6, x, 0.5)  # beyond, the differences' step would be lost
    noise = rng.uniform(0.01, 0.05, x.shape)
    yield from (x + noise, x * (1 - noise), x - noise, np.clip(x, -0.9, 0.9) + noise)
    yield np.abs(x) + noise


def _scores(graph: Graph, x: np.ndarray) -> np.ndarray:
    return NumpyForward(x.dtype)(graph, x, [graph.logits])[graph.logits]


def _values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [*model.graph.input, *model.graph.output]


def _array(value: Any) -> np.ndarray:
    is_proto = isinstance(value, onnx.TensorProto)
    return numpy_helper.to_array(value) if is_proto else np.asarray(value)


@cache
def _versions(op: str) -> frozenset[int]:
    history = defs.get_all_schemas_with_history()
    return frozenset(s.since_version for s in history if s.name == op and not s.domain)


@cache
def differentiable(op: str, opset: int) -> tuple[int, ...]:
    """Positions of the inputs that ONNX tags as differentiable."""
    inputs = defs.get_schema(op, opset).inputs
    return tuple(i for i, p in enumerate(inputs) if p.differentiation_category == _TAGGED)


@cache
def cases() -> dict[str, tuple[NodeCase, ...]]:
    """Operator → its cases of one node; the others repeat a case with its function's body."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        collected = collect_testcases(None)
    found: dict[str, list[NodeCase]] = {}
    for test in collected:
        if len(test.model.graph.node) == 1:
            case = NodeCase(test)
            found.setdefault(case.op, []).append(case)
    return {op: tuple(found[op]) for op in sorted(found)}


@dataclass
class Count:
    """What became of an operator's cases.

    Attributes
    ----------
    forward, backward : int
        How many were run and found right.
    excluded : Counter of str
        How many were not run, by reason.
    optional : Counter of str
        How many were refused where that is allowed, by reason.
    refused : list of str
        Those that should not have been.
    """

    forward: int = 0
    backward: int = 0
    excluded: Counter[str] = field(default_factory=Counter)
    optional: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)


@cache
def count(op: str) -> Count:
    """Run the operator's cases.

    Raises
    ------
    AssertionError
        A result is wrong.
    """
    total = Count()
    for case in cases()[op]:
        if case.excluded:
            total.excluded[case.excluded] += 1
            continue
        try:
            case.check_forward()
            total.forward += 1
            if case.image.size > 1 and not case.only_integers:
                case.check_backward()
                total.backward += 1
        except (InvalidModel, UnsupportedOperator) as error:
            if case.optional is None:
                total.refused.append(f"{case.test.name}: {error}")
            else:
                total.optional[case.optional] += 1
    return total


_HEAD = """# Operators

This table is written by `python tests/conformance/node_cases.py`; a test fails when it is stale.

The node cases of onnx {onnx} run through the whole pipeline in NumPy: the outputs in float64 and
in float32 against those that come with the case, and the gradients with respect to all
floating-point inputs that have one against central differences in float64, by random projections
at a point without ties. {forward[0]} operators are checked forward ({forward[1]} cases),
{backward[0]} backward ({backward[1]} cases).

Further tests compare what onnxruntime makes of these cases, which the backend `cpu` reads, with
NumPy's values, in earlier opsets too; and whole networks that PyTorch exports, from VGG to Swin
(`tests/zoo/networks/`), with PyTorch's own gradients.

- **opsets**: the versions in force from opset 7 on. All are brought to the newest form.
- **by**: `rule`, a forward function and its vector–Jacobian products in `rectgrad_ref/rules/`;
  `body`, the function by which ONNX defines the operator, written out; `unrolled`, control flow.
- **way back in `cpu`**: `kernel` where the compiled walk back has the operator, else the same rule
  as in `reference`. An operator's body is walked node by node.
"""
_EXCLUDED = """## Cases that are not checked

By these reasons, and not by their names."""
_LEFT_OUT = """## Operators without a rule

A model in which one of them lies on the way from the image to the class scores is refused, with
the operator's name:"""


def _how(op: str) -> str | None:
    """By what the operator is computed, if it is."""
    if RENAMED.get(op, op) in OPERATORS:
        return "rule"
    if op in ("If", "Loop", "Scan"):
        return "unrolled"
    return "body" if op in cases() and count(op).forward else None


def _row(op: str, total: Count) -> str:
    versions = _versions(op)
    first = max((v for v in versions if v <= OLDEST_OPSET), default=0)
    opsets = ", ".join(str(v) for v in sorted(versions) if v >= first)
    fast = {"rule": "kernel" if op in LOWERED else "rule"}.get(_how(op) or "", "by node")
    passes = str(total.backward) if total.backward or _differentiates(op) else "–"
    return f"| {op} | {opsets} | {_how(op)} | {total.forward} | {passes} | {fast} |"


def _differentiates(op: str) -> bool:
    known = OPERATORS.get(RENAMED.get(op, op))
    return bool(known.vjps if known else differentiable(op, NEWEST))


def table() -> str:
    """docs/operators.md."""
    operators = {s.name for s in defs.get_all_schemas() if not s.domain and not s.deprecated}
    operators |= RENAMED.keys()  # deprecated, and still in many files
    counts = {op: count(op) if op in cases() else Count() for op in sorted(operators)}
    known = [op for op in counts if _how(op)]
    sums = {}
    for kind in ("forward", "backward"):
        numbers = [getattr(total, kind) for total in counts.values()]
        sums[kind] = (sum(map(bool, numbers)), sum(numbers))
    unchecked: dict[str, Counter[str]] = {}
    for op, total in counts.items():
        for reason, n in (total.excluded + total.optional).items():
            unchecked.setdefault(reason, Counter())[op] += n
    lines = [
        _HEAD.format(onnx=onnx.__version__, **sums),
        "| operator | opsets | by | forward | backward | way back in `cpu` |",
        "|---|---|---|--:|--:|---|",
        *(_row(op, counts[op]) for op in known),
        "",
        _EXCLUDED,
        "",
        "| reason | cases | of |",
        "|---|--:|---|",
        *(f"| {why} | {of.total()} | {', '.join(of)} |" for why, of in sorted(unchecked.items())),
        "",
        _LEFT_OUT,
        ", ".join(op for op in counts if op not in known) + ".",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
