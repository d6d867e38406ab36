"""An array that is not computed: whatever NumPy does to it is written down as an ONNX node.

The rules of `rectgrad_ref.rules` are NumPy functions. Called with a `Tensor` instead of an array
they leave, on its tape, the nodes that do in ONNX what they would have done: NumPy hands every
function of a `Tensor` back to it (NEP 13 and 18), and `functions.py` says how each is spelt. So an
operator or a rule is written once, and exported as it is written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from onnx import helper, numpy_helper

Shape = tuple[int, ...]
Dtype = np.dtype[Any]

# What a function is written down as: NumPy's, of which `numpy.ufunc` stands for all that work
# element by element, and those of ours that are primitives.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}


def spelling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register how a function is spelt in ONNX."""

    def register(spelt: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS[function] = spelt
        return spelt

    return register


class NotTraceable(Exception):
    """A function of NumPy, or a use of it, that has no spelling in ONNX here."""


@dataclass(frozen=True, eq=False)
class Record:
    """A node to be: its inputs are values, by name, or constants.

    Attributes
    ----------
    bodies : tuple of sequences of Record
        Of a Loop, or of an If: what is done where the condition holds, and where it does not.
    """

    op: str
    inputs: tuple[str | np.ndarray, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    bodies: tuple[Sequence[Record], ...] = ()


@dataclass
class Tape:
    """What has been done so far, in order.

    Attributes
    ----------
    scope : str
        In the names of the values to come: the node whose rule is at work.
    records : list of Record
    """

    scope: str
    records: list[Record] = field(default_factory=list)

    def emit(
        self,
        op: str,
        inputs: Sequence[Tensor | np.ndarray],
        *results: tuple[Sequence[int], Any],
        **attributes: Any,
    ) -> tuple[Tensor, ...]:
        """Write down a node; `results` are shape and dtype of each of its outputs."""
        names = [f"{self.scope}/{op}_{len(self.records)}_{i}" for i in range(len(results))]
        arguments = tuple(x.name if isinstance(x, Tensor) else x for x in inputs)
        self.records.append(Record(op, arguments, tuple(names), attributes))
        return tuple(
            Tensor(self, name, tuple(shape), np.dtype(dtype))
            for name, (shape, dtype) in zip(names, results, strict=True)
        )


class Tensor(NDArrayOperatorsMixin):
    """A value on a tape.

    Parameters
    ----------
    name : str or None
        None for a constant of one value everywhere, which becomes a node when it is needed.
    fill : float, optional
        That value.
    like : Tensor, optional
        Of the same shape, which then need not be known when the node is written.
    """

    def __init__(
        self,
        tape: Tape,
        name: str | None,
        shape: Shape,
        dtype: Dtype,
        fill: float | None = None,
        like: Tensor | None = None,
    ) -> None:
        self.tape, self._name, self.shape, self.dtype, self.fill = tape, name, shape, dtype, fill
        self.like = like
        self.non_negative = False  # where that is known, and of use
        self.narrow: Tensor | None = None  # of a widened float32, itself
        # Of what was padded with zeros: what it was, and the zeros before and after it, by axis.
        self.padded: tuple[Tensor, dict[int, tuple[int, int]]] | None = None

    @property
    def name(self) -> str:
        """Of the ONNX value."""
        if self._name is None:
            self._name = self._filled().name
        return self._name

    def _filled(self) -> Tensor:
        result = (self.shape, self.dtype)
        if self.like is None:
            full = np.full(self.shape, self.fill, self.dtype)
            return self.tape.emit("Identity", [full], result)[0]
        extents = self.like.emit("Shape", shape=[self.ndim], dtype=np.int64)
        value = numpy_helper.from_array(np.full(1, self.fill, self.dtype))
        return self.tape.emit("ConstantOfShape", [extents], result, value=value)[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def T(self) -> Tensor:
        return self.transpose()

    def __len__(self) -> int:
        return self.shape[0]

    def emit(
        self,
        op: str,
        *others: Tensor | np.ndarray,
        shape: Sequence[int] | None = None,
        dtype: Any = None,
        **attributes: Any,
    ) -> Tensor:
        """A node that reads this value and `others`; of this shape and dtype, if not told."""
        result = (self.shape if shape is None else shape, self.dtype if dtype is None else dtype)
        return self.tape.emit(op, [self, *others], result, **attributes)[0]

    def on(self, tape: Tape) -> Tensor:
        """The same value on the tape of a body, which may read it."""
        same = Tensor(tape, self.name, self.shape, self.dtype)
        same.non_negative = self.non_negative
        return same

    def either(self, true: Tensor, false: Tensor) -> Tensor:
        """An If on this value: what either tape does is done only where it is wanted."""
        assert [true.name, false.name] == [x.tape.records[-1].outputs[0] for x in (true, false)]
        name = f"{self.tape.scope}/If_{len(self.tape.records)}_0"
        bodies = (true.tape.records, false.tape.records)
        self.tape.records.append(Record("If", (self.name,), (name,), {}, bodies))
        return Tensor(self.tape, name, true.shape, true.dtype)

    def become(self, other: Tensor) -> None:
        """What NumPy does in place: from now on this is `other`."""
        self.__dict__.update(other.__dict__)

    def astype(self, dtype: Any, **_: Any) -> Tensor:
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return copy(self)  # what is done in place to one is not done to the other
        result = self.emit("Cast", dtype=dtype, to=helper.np_dtype_to_tensor_dtype(dtype))
        if (self.dtype, dtype) == (np.dtype(np.float32), np.dtype(np.float64)):
            result.narrow = self
        return result

    def reshape(self, *shape: Any) -> Tensor:
        sizes = list(shape[0] if len(shape) == 1 and np.iterable(shape[0]) else shape)
        if -1 in sizes:
            known = int(np.prod([n for n in sizes if n != -1]))
            sizes[sizes.index(-1)] = self.size // max(known, 1)
        if tuple(sizes) == self.shape:
            return self
        return self.emit("Reshape", np.array(sizes, np.int64), shape=sizes)

    def transpose(self, *axes: Any) -> Tensor:
        perm = axes[0] if len(axes) == 1 and np.iterable(axes[0]) else axes
        order = [int(a) % self.ndim for a in perm] or list(range(self.ndim))[::-1]
        if order == list(range(self.ndim)):
            return self
        return self.emit("Transpose", shape=[self.shape[a] for a in order], perm=order)

    def sum(self, axis: Any = None, keepdims: bool = False, **_: Any) -> Tensor:
        return np.sum(self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return np.mean(self, axis=axis, keepdims=keepdims)

    def max(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return np.max(self, axis=axis, keepdims=keepdims)

    def min(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return np.min(self, axis=axis, keepdims=keepdims)

    def argmax(self, axis: int) -> Tensor:
        return np.argmax(self, axis=axis)

    def argmin(self, axis: int) -> Tensor:
        return np.argmin(self, axis=axis)

    def __getitem__(self, index: Any) -> Tensor:
        result: Tensor = FUNCTIONS[operator.getitem](self, index)
        return result

    def __setitem__(self, index: Any, value: Any) -> None:
        self.become(FUNCTIONS[operator.setitem](self, index, value))

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any
    ) -> Any:
        if method != "__call__":
            return self._spelt(getattr(ufunc, method), inputs, options)
        result = FUNCTIONS[np.ufunc](ufunc, *inputs, **options)
        if out is None:
            return result
        out[0].become(result)
        return out[0]

    def __array_function__(
        self, function: Callable[..., Any], types: Any, args: Any, kwargs: Any
    ) -> Any:
        return self._spelt(function, args, kwargs)

    def _spelt(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if function not in FUNCTIONS:
            raise NotTraceable(f"no spelling of {function.__name__}")
        return FUNCTIONS[function](*args, **kwargs)

    def primitive(
        self, function: Callable[..., Any], plain: Callable[..., Any], args: Any, named: Any
    ) -> Any:
        """What a rule marked as a primitive does (`rectgrad_ref.rules.registry.primitive`).

        Where its spelling is `NotImplemented`, what NumPy would do is written down.
        """
        result = FUNCTIONS[function](*args, **named)
        return plain(*args, **named) if result is NotImplemented else result

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise NotTraceable("the value of an array")

    def __bool__(self) -> bool:
        raise NotTraceable("a decision by the value of an array")

    __iter__ = None
