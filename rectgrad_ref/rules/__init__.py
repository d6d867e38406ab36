"""What every operator computes and how gradients pass it: one file per operator family."""

from . import (
    activation,
    algebra,
    arithmetic,
    deform,
    index,
    linear,
    norm,
    pool,
    quantize,
    recurrent,
    reduce,
    resize,
    sample,
    shape,
)
from .registry import OPERATORS

__all__ = [
    "OPERATORS", "activation", "algebra", "arithmetic", "deform", "index", "linear", "norm", "pool",
    "quantize", "recurrent", "reduce", "resize", "sample", "shape",
]  # fmt: skip
