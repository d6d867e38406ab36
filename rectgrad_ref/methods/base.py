"""What a method is: a frozen dataclass of conventions that declares a table of rules."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np

from .. import analysis
from ..graph import Graph
from ..plan import Matches, RuleTable

Seed = Literal["one", "logit", "softmax"]
PaddingTrick = bool | Literal["same"]
_WORDS = {
    bool: "True or False", int: "an integer", float: "a number", NoneType: "None",
    np.ndarray: "an array",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Method:
    """An attribution method with all its conventions.

    Attributes
    ----------
    output_seed : str
        What enters at the target's logit: ``"one"``; ``"logit"``, its own value; ``"softmax"``, the
        gradient of its softmax probability.
    quantization : str
        ``"straight_through"``: QuantizeLinear and DequantizeLinear pass the gradient as if nothing
        had been rounded; ``"refuse"``: a quantised model is an error.
    """

    id: ClassVar[str]
    label: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    walks_once: ClassVar[bool] = True
    """Whether R is one walk back from the image, and not a sum over `passes` other points."""

    output_seed: Seed = "one"
    quantization: Literal["straight_through", "refuse"] = "straight_through"

    def __post_init__(self) -> None:
        """Refuse a value that a field's type does not allow."""
        for name, kinds in _kinds(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if not any(_is_of(value, kind, choices) for kind, choices in kinds):
                allowed = " or ".join(_described(*kind) for kind in kinds)
                raise ValueError(f"{self.id}: {name} must be {allowed}, got {value!r}")

    def _require_at_least(self, minimum: int, *names: str) -> None:
        """Refuse an option below `minimum`, or infinite."""
        for name in names:
            value = getattr(self, name)
            if not minimum <= value < np.inf:
                raise ValueError(f"{self.id}: {name} must be at least {minimum}, got {value!r}")

    @property
    def title(self) -> str:
        """What a figure calls it: the label, with what makes it another method."""
        return self.label

    @property
    def passes(self) -> int:
        """How many walks back one explanation takes."""
        return 1

    @property
    def whole_batch(self) -> bool:
        """Whether samples influence each other, so that a batch must not be split."""
        return False

    def rules(self, graph: Graph) -> RuleTable:
        """The table laid over ordinary backpropagation; the first match wins."""
        return ()

    def notes(self, graph: Graph) -> list[str]:
        """What the user should know about this method on this graph."""
        return []

    def point(self, x: np.ndarray, k: int, keys: np.ndarray) -> np.ndarray:
        """Where the gradient of pass `k` is taken.

        Parameters
        ----------
        x : numpy.ndarray, shape (N, …)
        keys : numpy.ndarray of int, shape (N,)
            Identity of each sample, for noise that does not depend on batching.
        """
        return x

    def weight(self, k: int) -> float:
        """The weight of pass `k` in the sum."""
        return 1.0

    def reference_input(self, x: np.ndarray) -> np.ndarray | None:
        """The baseline of every sample, for methods that have one."""
        return None

    def finish(self, x: np.ndarray, R: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """From the gradient at the input to the attribution, in the input's shape."""
        return R

    def options(self) -> dict[str, Any]:
        """Every convention by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@cache
def _kinds(cls: type[Method]) -> dict[str, list[tuple[Any, tuple[str, ...]]]]:
    """What each of a method's fields may be, which takes longer to find than to check.

    Types, each with its choices, of which a Literal alone has any.
    """
    hints = get_type_hints(cls)
    return {
        field.name: [
            (kind, get_args(kind) if get_origin(kind) is Literal else ())
            for kind in alternatives(hints[field.name])
        ]
        for field in fields(cls)
    }


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of an option's type, if it is a union; else the type alone."""
    return (kind,) if get_origin(kind) is Literal else get_args(kind) or (kind,)


def _described(kind: Any, choices: tuple[str, ...]) -> str:
    if not choices:
        return _WORDS[kind]
    return f"{'one of ' * (len(choices) > 1)}{', '.join(map(repr, choices))}"


def _is_of(value: Any, kind: Any, choices: tuple[str, ...]) -> bool:
    """Whether `value` is one of the choices, or of the type; NaN is no number, True no integer."""
    if choices:
        return isinstance(value, str) and value in choices
    if isinstance(value, (bool, np.bool_)):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float, np.integer, np.floating)) and not np.isnan(value)
    return isinstance(value, (int, np.integer) if kind is int else kind)


def times_input(x: np.ndarray, R: np.ndarray, final_threshold: bool) -> np.ndarray:
    """x · R, then zero where not positive if `final_threshold` (paper 4.1)."""
    product = x * R
    return np.fmax(product, 0, out=product) if final_threshold else product


def named(names: Collection[str]) -> Matches:
    """Match nodes by name."""
    return lambda node: node.name in names


def operators(*ops: str) -> Matches:
    """Match nodes by operator type."""
    return lambda node: node.op in ops


def trick_convolutions(graph: Graph, trick: PaddingTrick) -> tuple[frozenset[str], list[str]]:
    """Which convolutions the padding trick masks (docs/conventions.md), and those too small for it.

    Parameters
    ----------
    trick : bool or "same"
        True: convolutions with a non-zero pad. ``"same"``: those that TensorFlow calls SAME.

    Returns
    -------
    masked : frozenset of str
        Node names.
    notes : list of str
        Names the convolutions that are left alone because their output has fewer than 3 cells.
    """
    if not trick:
        return frozenset(), []
    padded = analysis.is_tensorflow_same if trick == "same" else analysis.pads_input
    found = [
        node
        for node in analysis.path(graph)
        # Of unknown shape, it has no pads yet; the plan refuses it.
        if node.op == "Conv" and node.output_shapes[0][2:] and padded(graph, node)
    ]
    small = [node.name for node in found if min(node.output_shapes[0][2:]) < 3]
    notes = []
    if small:
        notes.append(
            f"padding trick: {', '.join(small)} left alone, fewer than 3 cells on a spatial axis"
        )
    return frozenset(node.name for node in found if node.name not in small), notes
