"""The walk back, step by step in NumPy: the truth that every other executor is checked against."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from .plan import Plan, Step
from .rules.declared import Call, Values

Observer = Callable[[Step, np.ndarray, np.ndarray, np.ndarray], None]
NOTHING: Values = MappingProxyType({})


def walk(
    plan: Plan,
    values: Values,
    seed: np.ndarray,
    *,
    baseline: Values = NOTHING,
    observe: Observer | None = None,
) -> np.ndarray:
    """Carry `seed` from the logits to the input.

    Parameters
    ----------
    plan : Plan
    values : mapping of str to numpy.ndarray
        What the forward pass exposed, and the constants.
    seed : numpy.ndarray
        The gradient at the logits, in their shape.
    baseline : mapping of str to numpy.ndarray
        The same values at the baseline, where the plan contrasts.
    observe : callable, optional
        Called at every activation with the step, its output a, R_out and R_in.

    Returns
    -------
    numpy.ndarray
        R at the input, in its shape.
    """
    R: dict[str, np.ndarray] = {plan.graph.logits: seed}
    for step in plan.steps:
        outgoing = tuple(_take(R, plan, step, i, seed.dtype) for i in range(len(step.node.outputs)))
        for position, name in zip(step.positions, step.writes, strict=True):
            call = Call(step.node, position, outgoing, values, baseline, plan.graph.batch)
            gradient = step.rule(call)
            R[name] = R[name] + gradient if name in R else gradient
            if observe is not None and step.node.name in plan.layers:
                observe(step, values[step.node.outputs[0]], outgoing[0], gradient)
    return R[plan.graph.input]


def _take(
    R: dict[str, np.ndarray], plan: Plan, step: Step, output: int, dtype: np.dtype
) -> np.ndarray:
    """The gradient at an output: complete, because every reader of the value was walked before."""
    name = step.node.outputs[output]
    if name in R:
        return R.pop(name)
    return np.zeros(step.node.output_shapes[output], dtype)


def constants_as(constants: Mapping[str, np.ndarray], dtype: np.dtype) -> dict[str, np.ndarray]:
    """The constants with floating-point ones in the compute dtype."""
    return {name: constant_as(value, dtype) for name, value in constants.items()}


def constant_as(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """One constant, if it is floating-point, in the compute dtype.

    It is converted once and kept as long as the constant itself: the weights of a model are shared
    by its graphs for all batch sizes and by all plans.
    """
    if value.dtype == dtype or not np.issubdtype(value.dtype, np.floating):
        return value
    key = (id(value), np.dtype(dtype).str)
    if key not in _CONVERTED:
        _CONVERTED[key] = value.astype(dtype)
        weakref.finalize(value, _CONVERTED.pop, key, None)
    return _CONVERTED[key]


_CONVERTED: dict[tuple[int, str], np.ndarray] = {}
