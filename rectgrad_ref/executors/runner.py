"""What runs one chunk of samples through a plan: forward, seed, walk back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import numpy as np

from ..forward import Forward
from ..plan import Plan, Step
from ..reference import NOTHING, Observer, constants_as, walk
from ..rules.declared import Values

# Scores (n, classes) → the gradient that enters at the logits, same shape.
SeedOf = Callable[[np.ndarray], np.ndarray]


class Runner(Protocol):
    """A plan that is ready to run."""

    @property
    def keeps(self) -> Collection[str]:
        """The values of the forward pass that the walk back reads."""
        ...

    def __call__(
        self,
        x: np.ndarray,
        seed_of: SeedOf,
        *,
        baseline: np.ndarray | None = None,
        observe: Observer | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n, classes), and R at the input in the shape of `x`.

        Parameters
        ----------
        x : numpy.ndarray
            As many samples as the plan's graph has.
        baseline : numpy.ndarray, optional
            The baseline of each sample, for plans that contrast.
        """
        ...


def layers_of(plan: Plan) -> list[Step]:
    """The steps of the activations on the path, which a trace shows."""
    return [step for step in plan.steps if step.node.name in plan.layers]


def constants_of(plan: Plan, dtype: np.dtype[Any]) -> Values:
    """What the plan's rules read of the graph's constants."""
    constants = plan.graph.constants
    read = {v for step in plan.steps for v in step.reads} & constants.keys()
    return constants_as({v: constants[v] for v in read}, dtype)


def asked(plan: Plan, exposes: tuple[str, ...], observe: Observer | None) -> tuple[str, ...]:
    """What the forward pass hands over: the logits, what rules read, and all that a trace shows."""
    shown = layers_of(plan) if observe is not None else ()
    return (plan.graph.logits, *exposes, *(step.node.outputs[0] for step in shown))


class StepwiseRunner:
    """Any forward pass, and the reference's walk."""

    def __init__(self, plan: Plan, forward: Forward) -> None:
        self.plan, self.forward = plan, forward

    @property
    def keeps(self) -> Collection[str]:
        return self.plan.exposes

    def __call__(
        self,
        x: np.ndarray,
        seed_of: SeedOf,
        *,
        baseline: np.ndarray | None = None,
        observe: Observer | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        plan, graph = self.plan, self.plan.graph
        constants = constants_of(plan, self.forward.dtype)
        values = self.forward(graph, x, asked(plan, plan.exposes, observe))
        there: Values = NOTHING
        if plan.contrasts:
            assert baseline is not None
            there = {**constants, **self.forward(graph, baseline, plan.exposes)}
        logits = values[graph.logits]
        scores = logits.reshape(len(x), -1)
        R = walk(
            plan,
            {**constants, **values},
            seed_of(scores).reshape(logits.shape),
            baseline=there,
            observe=observe,
        )
        return scores, R
