"""What every operator computes and how gradients pass it: one file per operator family."""

from . import activation, arithmetic, linear, norm, pool, reduce, shape
from .registry import OPERATORS

__all__ = ["OPERATORS", "activation", "arithmetic", "linear", "norm", "pool", "reduce", "shape"]
