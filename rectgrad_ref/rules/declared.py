"""Rules: what a method does at a node instead of, or on top of, ordinary backpropagation.

A rule is declared, not coded: a frozen dataclass whose fields are its parameters, and whose
`__call__` is its meaning in NumPy. Executors may run a faster version; this one decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np

from .. import threshold
from .activation import derivative
from .linear import conv_X
from .pool import max_pool_redistribute, max_pool_split, max_pool_X
from .registry import Array, find_vjp, is_variadic, primitive, values_named

if TYPE_CHECKING:
    from ..graph import Node

Values = Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class Call:
    """One application of a rule.

    Attributes
    ----------
    node : Node
    position : int
        Of the input whose gradient is wanted.
    R : tuple of numpy.ndarray
        Gradients at the node's outputs.
    values : mapping
        Forward values by name; constants too.
    baseline : mapping
        The same at the method's baseline, for rules that compare with one; else empty.
    samples : int
        How many samples lie along axis 0 of an activation.
    """

    node: Node
    position: int
    R: tuple[Array, ...]
    values: Values
    baseline: Values
    samples: int

    @property
    def z(self) -> Array:
        """The node's first input: of an activation, its pre-activation."""
        return self.values[self.node.inputs[0]]

    @property
    def a(self) -> Array:
        """The node's first output."""
        return self.values[self.node.outputs[0]]

    def slope(self, z: Array) -> Array:
        """f'(z) of the activation."""
        return derivative(self.node, z, *self.node.constants[1:])


class Rule:
    """How the gradient at a node's outputs becomes that at one of its inputs."""

    contrasts: ClassVar[bool] = False
    """Whether the rule also reads the forward values at a baseline."""

    def reads(self, node: Node, position: int) -> tuple[str, ...]:
        """Names of the values that the forward pass has to keep."""
        raise NotImplementedError

    def __call__(self, call: Call) -> Array:
        """The gradient at the input, in the input's shape."""
        raise NotImplementedError

    def __str__(self) -> str:
        """The rule with those of its parameters that are not the default."""
        parameters = [(f.name, f.default, getattr(self, f.name)) for f in fields(cast(Any, self))]
        changed = (f"{name}={value!r}" for name, default, value in parameters if value != default)
        return f"{type(self).__name__}({', '.join(changed)})"


@dataclass(frozen=True)
class Gradient(Rule):
    """Ordinary backpropagation: the operator's vector–Jacobian product."""

    def reads(self, node: Node, position: int) -> tuple[str, ...]:
        rule = find_vjp(node.op, position)
        assert rule is not None, node.op
        return tuple(v for name in rule.reads for v in values_named(node, name) if v)

    def __call__(self, call: Call) -> Array:
        node = call.node
        rule = find_vjp(node.op, call.position)
        assert rule is not None, node.op
        found: dict[str, object] = {}
        for name in rule.reads:
            arrays = tuple(call.values[v] if v else None for v in values_named(node, name))
            found[name] = arrays if is_variadic(node.op, name) else (*arrays, None)[0]
        if rule.wants_index:
            found["index"] = call.position
        return rule.function(node, call.R if rule.every_output else call.R[0], **found)


@dataclass(frozen=True)
class Rectify(Rule):
    """RectGrad at an activation: R_in = f'(z) · R_out · [score > τ] (paper 4.1).

    Attributes
    ----------
    score : str
        ``"a*r"`` (PR1), ``"|a*r|"`` (PR2), ``"a"`` (PR3), ``"r"`` (PR4), or ``"(a+eps)*r"``, which
        makes RectGrad a Deconvolution at τ = 0 (paper, claim 1).
    q : float
        Percentile from which τ is taken, unless `tau` is given.
    tau : float or None
        A fixed threshold.
    percentile, scope, strictness : str
        See `rectgrad_ref.threshold`.
    strict_relu : bool
        Multiply by [z > 0] at a Relu, also where τ < 0 would let dead units pass.
    derivative : bool
        Whether f'(z) of activations other than Relu is multiplied in.
    eps : float
        Of the score ``"(a+eps)*r"``.
    """

    score: threshold.Score = "a*r"
    q: float = 98.0
    tau: float | None = None
    percentile: threshold.Percentile = "tf_nearest"
    scope: threshold.Scope = "sample"
    strictness: threshold.Strictness = ">"
    strict_relu: bool = False
    derivative: bool = True
    eps: float = 0.0

    def reads(self, node: Node, position: int) -> tuple[str, ...]:
        needs_z = self.derivative and node.op != "Relu"
        return (node.outputs[0], node.inputs[0]) if needs_z else (node.outputs[0],)

    def select(self, a: Array, R: Array, samples: int) -> tuple[Array, Array]:
        """Which units pass, and the thresholds.

        Returns
        -------
        mask : numpy.ndarray of bool, shape of `a`
        tau : numpy.ndarray of float64
            One per sample, or per sample and channel (N, C), or one for the batch.
        """
        arguments = (self.score, a, R, self.eps)
        score = threshold.grouped(threshold.scores(*arguments), samples, self.scope)
        sign = threshold.grouped(threshold.signs(*arguments), samples, self.scope)
        if self.tau is None:
            tau = threshold.percentile(score, self.q, self.percentile)
        else:
            tau = np.full(score.shape[0], self.tau)
        mask = threshold.exceeds(score, sign, tau, self.strictness).reshape(a.shape)
        return mask, tau.reshape(samples, -1) if self.scope == "channel" else tau

    def __call__(self, call: Call) -> Array:
        (R,) = call.R
        is_relu = call.node.op == "Relu"
        gradient = R if is_relu or not self.derivative else R * call.slope(call.z)
        passed = let_pass(self, gradient, call.a, R, call.samples)
        return np.where(call.a > 0, passed, 0) if is_relu and self.strict_relu else passed


@primitive
def let_pass(rule: Rectify, gradient: Array, a: Array, R: Array, samples: int) -> Array:
    """The gradient at the units that the rule selects, and 0 elsewhere."""
    mask, _ = rule.select(a, R, samples)
    return np.where(mask, gradient, 0)


@dataclass(frozen=True)
class PositiveGradient(Rule):
    """Deconvolution (Zeiler & Fergus 2014) and guided backpropagation (Springenberg et al. 2015).

    R_in = max(R_out, 0) at a Relu, times [z > 0] where `guided`; f'(z) times that elsewhere.
    """

    guided: bool = False

    def reads(self, node: Node, position: int) -> tuple[str, ...]:
        if node.op == "Relu":
            return (node.outputs[0],) if self.guided else ()
        return (node.inputs[0],)

    def __call__(self, call: Call) -> Array:
        R = np.maximum(call.R[0], 0)
        if call.node.op == "Relu":
            return np.where(call.a > 0, R, 0) if self.guided else R
        R = R * call.slope(call.z)
        return np.where(call.z > 0, R, 0) if self.guided else R


@dataclass(frozen=True)
class EpsilonRatio(Rule):
    """ε-LRP at an activation, in the gradient × input form: R_in = R_out · a / (z + ε·sign z).

    With sign 0 = +1 (Ancona et al. 2018; Bach et al. 2015, eq. 58).
    """

    eps: float = 1e-4

    def reads(self, node: Node, position: int) -> tuple[str, ...]:
        return (node.inputs[0], node.outputs[0])

    def __call__(self, call: Call) -> Array:
        z = call.z
        return call.R[0] * call.a / (z + np.where(z >= 0, self.eps, -self.eps).astype(z.dtype))


@dataclass(frozen=True)
class Rescale(Rule):
    """DeepLIFT's Rescale rule at an activation (Shrikumar et al. 2017): R_in = R_out · Δa/Δz.

    Where |Δz| ≤ `eps` the derivative half-way between z and its baseline takes the place of the
    ratio.
    """

    contrasts: ClassVar[bool] = True
    eps: float = 1e-5

    def reads(self, node: Node, position: int) -> tuple[str, ...]:
        return (node.inputs[0], node.outputs[0])

    def __call__(self, call: Call) -> Array:
        z, z0 = call.z, call.baseline[call.node.inputs[0]]
        dz, da = z - z0, call.a - call.baseline[call.node.outputs[0]]
        large = np.abs(dz) > self.eps
        ratio = da / np.where(large, dz, 1)
        return call.R[0] * np.where(large, ratio, call.slope((z + z0) / 2))


@dataclass(frozen=True)
class MaxPoolBackward(Rule):
    """Max pooling to the first maximum in row-major window order, or equally among the ties."""

    ties: Literal["first", "split"] = "first"

    def reads(self, node: Node, position: int) -> tuple[str, ...]:
        return (node.inputs[0], node.outputs[0])

    def __call__(self, call: Call) -> Array:
        if self.ties == "first":
            return max_pool_X(call.node, call.R[0], X=call.z, Y=call.a)
        return max_pool_split(call.node, call.R[0], call.z, call.a)


@dataclass(frozen=True)
class Redistribute(Rule):
    """Proportional redistribution through a max pool (PRR; paper C.2, listing 3)."""

    eps: float = 1e-10

    def reads(self, node: Node, position: int) -> tuple[str, ...]:
        return (node.inputs[0],)

    def __call__(self, call: Call) -> Array:
        return max_pool_redistribute(call.node, call.R[0], call.z, self.eps)


@dataclass(frozen=True)
class RescaleMaxPool(Rule):
    """DeepLIFT through a max pool so that Σ multiplier · Δx = Δy in every window.

    With m = max(y, y₀): the unit that is the maximum gets R·(m − y₀), the unit that is the
    baseline's maximum R·(y − m), both over its own Δx (the Rescale form in Captum).
    """

    contrasts: ClassVar[bool] = True
    eps: float = 1e-10

    def reads(self, node: Node, position: int) -> tuple[str, ...]:
        return (node.inputs[0], node.outputs[0])

    def __call__(self, call: Call) -> Array:
        node, (R,) = call.node, call.R
        x, y = call.z, call.a
        x0, y0 = call.baseline[node.inputs[0]], call.baseline[node.outputs[0]]
        top = np.maximum(y, y0)
        share = max_pool_X(node, R * (top - y0), X=x, Y=y)
        share = share + max_pool_X(node, R * (y - top), X=x0, Y=y0)
        dx = x - x0
        large = np.abs(dx) > self.eps
        plain = max_pool_X(node, R, X=x, Y=y)
        return np.where(large, share / np.where(large, dx, 1), plain)


@dataclass(frozen=True)
class ConvTranspose(Rule):
    """A convolution's gradient, with the padding trick (paper C.1, listing 2) if `mask_border`.

    The gradient at the output is zeroed in the first and last cell of every spatial axis.
    """

    mask_border: bool = False

    def reads(self, node: Node, position: int) -> tuple[str, ...]:
        return Gradient().reads(node, position)

    def __call__(self, call: Call) -> Array:
        R = mask_border(call.R[0]) if self.mask_border else call.R[0]
        if call.position == 0:
            return conv_X(call.node, R, W=call.values[call.node.inputs[1]])
        return Gradient()(Call(call.node, call.position, (R,), call.values, call.baseline, 1))


def mask_border(R: Array) -> Array:
    """Zero in the first and last cell of every spatial axis of (N, C, *spatial)."""
    inner: tuple[Any, ...] = (..., *(slice(1, -1),) * (R.ndim - 2))
    masked = np.zeros_like(R)
    masked[inner] = R[inner]
    return masked
