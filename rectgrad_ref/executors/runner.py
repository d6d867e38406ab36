"""What runs one chunk of samples through a plan: forward, seed, walk back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ..forward import Forward
from ..plan import Plan
from ..reference import NOTHING, Observer, constants_as, walk
from ..rules.declared import Values

# Scores (n, classes) → the gradient that enters at the logits, same shape.
SeedOf = Callable[[np.ndarray], np.ndarray]


class Runner(Protocol):
    """A plan that is ready to run."""

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


class StepwiseRunner:
    """Any forward pass, and the reference's walk."""

    def __init__(self, plan: Plan, forward: Forward) -> None:
        self.plan, self.forward = plan, forward
        graph = plan.graph
        read = {v for step in plan.steps for v in step.reads} & graph.constants.keys()
        self.constants = constants_as({v: graph.constants[v] for v in read}, forward.dtype)

    def __call__(
        self,
        x: np.ndarray,
        seed_of: SeedOf,
        *,
        baseline: np.ndarray | None = None,
        observe: Observer | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        plan, graph = self.plan, self.plan.graph
        names = (graph.logits, *plan.exposes)
        if observe is not None:  # the trace shows every activation, also where no rule reads it
            names += tuple(s.node.outputs[0] for s in plan.steps if s.node.name in plan.layers)
        values = self.forward(graph, x, names)
        there: Values = NOTHING
        if plan.contrasts:
            assert baseline is not None
            there = {**self.constants, **self.forward(graph, baseline, plan.exposes)}
        logits = values[graph.logits]
        scores = logits.reshape(len(x), -1)
        R = walk(
            plan,
            {**self.constants, **values},
            seed_of(scores).reshape(logits.shape),
            baseline=there,
            observe=observe,
        )
        return scores, R
