"""RNN, LSTM and GRU: a cell for each, run along the sequence and, for gradients, back through time.

What happens inside a cell is one operator: its gates and its tanh are no layers of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .activation import sigmoid
from .registry import Array, NotSamplewise, SampleAxis, operator, vjp

if TYPE_CHECKING:
    from ..graph import Node

# Name → value, and derivative by argument and value; α and β with the defaults of ONNX.
Curve = tuple[Callable[..., Array], Callable[..., Array], float, float]
_CURVES: dict[str, Curve] = {
    "sigmoid": (lambda x, a, b: sigmoid(x), lambda x, y, a, b: y * (1 - y), 0, 0),
    "tanh": (lambda x, a, b: np.tanh(x), lambda x, y, a, b: 1 - y * y, 0, 0),
    "relu": (lambda x, a, b: np.maximum(x, 0), lambda x, y, a, b: x > 0, 0, 0),
    "affine": (lambda x, a, b: a * x + b, lambda x, y, a, b: np.full_like(x, a), 1, 0),
    "leakyrelu": (
        lambda x, a, b: np.where(x < 0, a * x, x),
        lambda x, y, a, b: np.where(x < 0, a, 1),
        0.01,
        0,
    ),
    "thresholdedrelu": (lambda x, a, b: np.where(x > a, x, 0), lambda x, y, a, b: x > a, 1, 0),
    "scaledtanh": (
        lambda x, a, b: a * np.tanh(b * x),
        lambda x, y, a, b: a * b * (1 - np.tanh(b * x) ** 2),
        1,
        1,
    ),
    "hardsigmoid": (
        lambda x, a, b: np.clip(a * x + b, 0, 1),
        lambda x, y, a, b: a * ((y > 0) & (y < 1)),
        0.2,
        0.5,
    ),
    "elu": (
        lambda x, a, b: np.where(x < 0, a * np.expm1(np.minimum(x, 0)), x),
        lambda x, y, a, b: np.where(x < 0, y + a, 1),
        1,
        0,
    ),
    "softsign": (
        lambda x, a, b: x / (1 + np.abs(x)),
        lambda x, y, a, b: 1 / (1 + np.abs(x)) ** 2,
        0,
        0,
    ),
    "softplus": (lambda x, a, b: np.logaddexp(0, x), lambda x, y, a, b: sigmoid(x), 0, 0),
}
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_USUAL = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")


@dataclass(frozen=True)
class _Function:
    """One of the cell's activations."""

    name: str
    alpha: float
    beta: float

    def __call__(self, x: Array) -> Array:
        return _CURVES[self.name][0](x, self.alpha, self.beta)

    def slope(self, x: Array) -> Array:
        return _CURVES[self.name][1](x, self(x), self.alpha, self.beta)


@dataclass(frozen=True)
class _Cell:
    """The weights and functions of one direction; pre-activations z are (batch, gates · hidden)."""

    node: Node
    W: Array
    R: Array
    Wb: Array
    Rb: Array
    P: Array
    functions: tuple[_Function, ...]

    def clipped(self, z: Array) -> Array:
        limit = self.node.attributes.get("clip")
        return z if limit is None else np.clip(z, -limit, limit)

    def passes(self, z: Array) -> Array | float:
        """Where a clipped pre-activation has a slope."""
        limit = self.node.attributes.get("clip")
        return 1.0 if limit is None else np.abs(z) < limit

    def gates(self, z: Array) -> list[Array]:
        return np.split(z, _GATES[self.node.op], axis=-1)


@dataclass
class _Back:
    """What one step back gives.

    Attributes
    ----------
    dz : numpy.ndarray
        Gradient at the pre-activations as the input side sees them.
    recurrent : numpy.ndarray
        The same as the recurrent side sees them.
    reads : list of numpy.ndarray
        What the recurrent weights of each gate were multiplied with.
    dh, dc : numpy.ndarray
        Gradients at the previous states.
    dP : numpy.ndarray
        Of the peepholes, summed over the batch.
    """

    dz: Array
    recurrent: Array
    reads: list[Array]
    dh: Array
    dc: Array
    dP: Array


def _rnn(cell: _Cell, x: Array, h: Array, c: Array) -> tuple[Array, Array, Any]:
    z = x @ cell.W.T + h @ cell.R.T + cell.Wb + cell.Rb
    return cell.functions[0](cell.clipped(z)), c, z


def _rnn_back(cell: _Cell, x: Array, h: Array, c: Array, dh: Array, dc: Array) -> _Back:
    _, _, z = _rnn(cell, x, h, c)
    dz = dh * cell.functions[0].slope(cell.clipped(z)) * cell.passes(z)
    return _Back(dz, dz, [h], dz @ cell.R, dc, np.zeros_like(cell.P))


def _lstm(cell: _Cell, x: Array, h: Array, c: Array) -> tuple[Array, Array, Any]:
    f, g, out = cell.functions
    P_i, P_o, P_f = np.split(cell.P, 3)
    z_i, z_o, z_f, z_c = cell.gates(x @ cell.W.T + h @ cell.R.T + cell.Wb + cell.Rb)
    z_i, z_f = z_i + P_i * c, z_f + P_f * c
    i, new = f(cell.clipped(z_i)), g(cell.clipped(z_c))
    forget = 1 - i if cell.node["input_forget"] else f(cell.clipped(z_f))
    state = forget * c + i * new
    z_o = z_o + P_o * state
    o = f(cell.clipped(z_o))
    return o * out(state), state, (z_i, z_o, z_f, z_c, i, o, forget, new, state)


def _lstm_back(cell: _Cell, x: Array, h: Array, c: Array, dh: Array, dc: Array) -> _Back:
    f, g, out = cell.functions
    P_i, P_o, P_f = np.split(cell.P, 3)
    _, _, (z_i, z_o, z_f, z_c, i, o, forget, new, state) = _lstm(cell, x, h, c)

    def through(function: _Function, z: Array, d: Array) -> Array:
        return d * function.slope(cell.clipped(z)) * cell.passes(z)

    dz_o = through(f, z_o, dh * out(state))
    dc = dc + dh * o * out.slope(state) + dz_o * P_o
    if cell.node["input_forget"]:
        dz_i, dz_f = through(f, z_i, dc * (new - c)), np.zeros_like(z_f)
    else:
        dz_i, dz_f = through(f, z_i, dc * new), through(f, z_f, dc * c)
    dz = np.concatenate([dz_i, dz_o, dz_f, through(g, z_c, dc * i)], axis=-1)
    dP = np.concatenate([(d * s).sum(axis=0) for d, s in ((dz_i, c), (dz_o, state), (dz_f, c))])
    before = dc * forget + dz_i * P_i + dz_f * P_f
    return _Back(dz, dz, [h] * 4, dz @ cell.R, before, dP)


def _gru(cell: _Cell, x: Array, h: Array, c: Array) -> tuple[Array, Array, Any]:
    f, g = cell.functions
    R_h, Rb_h = cell.gates(cell.R.T)[2], cell.gates(cell.Rb)[2]
    from_x = cell.gates(x @ cell.W.T + cell.Wb)
    from_h = cell.gates(h @ cell.R.T + cell.Rb)
    z_z, z_r = from_x[0] + from_h[0], from_x[1] + from_h[1]
    z, r = f(cell.clipped(z_z)), f(cell.clipped(z_r))
    if cell.node["linear_before_reset"]:
        z_h = from_x[2] + r * from_h[2]
    else:
        z_h = from_x[2] + (r * h) @ R_h + Rb_h
    new = g(cell.clipped(z_h))
    return (1 - z) * new + z * h, c, (z_z, z_r, z_h, z, r, new, from_h[2])


def _gru_back(cell: _Cell, x: Array, h: Array, c: Array, dh: Array, dc: Array) -> _Back:
    f, g = cell.functions
    R_h = cell.gates(cell.R.T)[2]
    _, _, (z_z, z_r, z_h, z, r, new, linear) = _gru(cell, x, h, c)
    dz_h = dh * (1 - z) * g.slope(cell.clipped(z_h)) * cell.passes(z_h)
    dz_z = dh * (h - new) * f.slope(cell.clipped(z_z)) * cell.passes(z_z)
    first = cell.node["linear_before_reset"]
    dr = dz_h * linear if first else (dz_h @ R_h.T) * h
    dz_r = dr * f.slope(cell.clipped(z_r)) * cell.passes(z_r)
    gates = np.concatenate([dz_z, dz_r], axis=-1)
    recurrent = np.concatenate([gates, dz_h * r if first else dz_h], axis=-1)
    through = dz_h * r @ R_h.T if first else (dz_h @ R_h.T) * r
    before = dh * z + gates @ cell.R[: gates.shape[-1]] + through
    dz = np.concatenate([gates, dz_h], axis=-1)
    return _Back(dz, recurrent, [h, h, h if first else r * h], before, dc, np.zeros_like(cell.P))


_FORWARD = {"RNN": _rnn, "LSTM": _lstm, "GRU": _gru}
_BACKWARD = {"RNN": _rnn_back, "LSTM": _lstm_back, "GRU": _gru_back}


def _functions(node: Node, direction: int) -> tuple[_Function, ...]:
    """α and β are handed out in order, to those functions that have them."""
    usual = _USUAL[node.op]
    names = node.attributes.get("activations") or usual * 2
    alphas = iter(node.attributes.get("activation_alpha") or ())
    betas = iter(node.attributes.get("activation_beta") or ())
    found = []
    for name in names:
        _, _, alpha, beta = _CURVES[name.lower()]
        if alpha:
            alpha = next(alphas, alpha)
        if beta or name.lower() == "affine":
            beta = next(betas, beta)
        found.append(_Function(name.lower(), alpha, beta))
    return tuple(found[direction * len(usual) : (direction + 1) * len(usual)])


def _cells(node: Node, given: dict[str, Array | None]) -> Iterator[_Cell]:
    W, R, B, P = given["W"], given["R"], given.get("B"), given.get("P")
    assert W is not None and R is not None
    for d in range(W.shape[0]):
        bias = np.zeros(2 * W.shape[1], W.dtype) if B is None else B[d]
        peepholes = np.zeros(3 * R.shape[2], W.dtype) if P is None else P[d]
        Wb, Rb = np.split(bias, 2)
        yield _Cell(node, W[d], R[d], Wb, Rb, peepholes, _functions(node, d))


def _time_first(node: Node, x: Array) -> Array:
    """(time, batch, …) of an input sequence, (directions, batch, …) of a state; and back."""
    return np.swapaxes(x, 0, 1) if node.attributes.get("layout") else x


def _states(node: Node, given: dict[str, Array | None]) -> tuple[Array, Array, Array, Array]:
    """The sequence; the initial states; and which steps each sample has."""
    X, W, R = given["X"], given["W"], given["R"]
    assert X is not None and W is not None and R is not None
    X = _time_first(node, X)
    nothing = np.zeros((W.shape[0], X.shape[1], R.shape[2]), X.dtype)
    h, c = (
        nothing if given.get(name) is None else _time_first(node, np.asarray(given[name]))
        for name in ("initial_h", "initial_c")
    )
    lengths = given.get("sequence_lens")
    steps = np.arange(X.shape[0])[:, None, None]
    lives = steps < (np.full(X.shape[1], X.shape[0]) if lengths is None else lengths)[:, None]
    return X, h, c, lives


def _order(node: Node, direction: int, steps: int) -> range:
    reverse = node["direction"] == "reverse" or direction == 1
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _batch(node: Node, axes: tuple[SampleAxis, ...]) -> tuple[SampleAxis, ...]:
    """Axis 1 of the sequence, and of the states; axis 0 with ``layout`` 1."""
    first = bool(node.attributes.get("layout"))
    sample = 0 if first else 1
    if axes[0] != sample or any(axis is not None for axis in axes[1:]):
        raise NotSamplewise
    if any(
        v and node.input_shapes[i][sample] != 1 for i, v in enumerate(node.inputs) if i in (5, 6)
    ):
        raise NotSamplewise
    if len(node.inputs) > 4 and node.inputs[4]:
        raise NotSamplewise
    return (0, 0, 0) if first else (2, 1, 1)


@operator("RNN", "LSTM", "GRU", batch=_batch)
def recurrent(node: Node, *inputs: Array | None) -> tuple[Array, ...]:
    given = dict(zip(_INPUTS, inputs, strict=False))
    X, h0, c0, lives = _states(node, given)
    Y = np.zeros((X.shape[0], *h0.shape), X.dtype)
    last_h, last_c = np.empty_like(h0), np.empty_like(c0)
    for d, cell in enumerate(_cells(node, given)):
        order = _order(node, d, len(X))
        *_, (last_h[d], last_c[d]) = states = list(_run(cell, order, X, lives, h0[d], c0[d]))
        for t, (h, _) in zip(order, states[1:], strict=True):
            Y[t, d] = np.where(lives[t], h, 0)
    if node.attributes.get("layout"):
        Y = Y.transpose(2, 0, 1, 3)
    ends = (_time_first(node, last_h), _time_first(node, last_c))
    return (Y, *(ends if node.op == "LSTM" else ends[:1]))


def _run(
    cell: _Cell, order: range, X: Array, lives: Array, h: Array, c: Array
) -> Iterator[tuple[Array, Array]]:
    """The states before the first step and after each; a sample that has ended keeps its own."""
    yield h, c
    for t in order:
        new_h, new_c, _ = _FORWARD[cell.node.op](cell, X[t], h, c)
        h, c = np.where(lives[t], new_h, h), np.where(lives[t], new_c, c)
        yield h, c


def _gradients(
    node: Node, arriving: tuple[Array, ...], given: dict[str, Array | None]
) -> dict[str, Array]:
    """With respect to every floating-point input, by backpropagation through time."""
    X, h0, c0, lives = _states(node, given)
    dY, *ends = (*arriving, np.zeros(()), np.zeros(()))[:3]
    if node.attributes.get("layout") and dY.ndim:
        dY = dY.transpose(1, 2, 0, 3)
    dY = np.broadcast_to(dY, (len(X), *h0.shape))
    dh, dc = (
        np.array(np.broadcast_to(_time_first(node, d) if d.ndim else d, h0.shape)) for d in ends
    )
    dX, found = np.zeros_like(X), []
    for d, cell in enumerate(_cells(node, given)):
        order = _order(node, d, len(X))
        states = list(_run(cell, order, X, lives, h0[d], c0[d]))
        total = {name: np.zeros_like(getattr(cell, name)) for name in ("W", "R", "Wb", "Rb", "P")}
        for t, (h, c) in zip(reversed(order), reversed(states[:-1]), strict=True):
            at_h, at_c = np.where(lives[t], dh[d] + dY[t, d], 0), np.where(lives[t], dc[d], 0)
            back = _BACKWARD[node.op](cell, X[t], h, c, at_h, at_c)
            dX[t] += back.dz @ cell.W
            _add(total, cell, back, X[t])
            dh[d] = np.where(lives[t], back.dh, dh[d])
            dc[d] = np.where(lives[t], back.dc, dc[d])
        found.append(total)
    return {
        "X": _time_first(node, dX),
        "W": np.stack([total["W"] for total in found]),
        "R": np.stack([total["R"] for total in found]),
        "B": np.stack([np.concatenate([total["Wb"], total["Rb"]]) for total in found]),
        "P": np.stack([total["P"] for total in found]),
        "initial_h": _time_first(node, dh),
        "initial_c": _time_first(node, dc),
    }


def _add(total: dict[str, Array], cell: _Cell, back: _Back, x: Array) -> None:
    """What one step adds to the gradients of the weights."""
    parts = zip(cell.gates(back.recurrent), back.reads, strict=True)
    total["W"] += back.dz.T @ x
    total["R"] += np.concatenate([dz.T @ read for dz, read in parts])
    total["Wb"] += back.dz.sum(axis=0)
    total["Rb"] += back.recurrent.sum(axis=0)
    total["P"] += back.dP


def _lstm_vjp(wrt: str) -> Callable[..., Array]:
    def product(
        node: Node,
        arriving: tuple[Array, ...],
        *,
        X: Array,
        W: Array,
        R: Array,
        B: Array | None,
        sequence_lens: Array | None,
        initial_h: Array | None,
        initial_c: Array | None,
        P: Array | None,
    ) -> Array:
        inputs = (X, W, R, B, sequence_lens, initial_h, initial_c, P)
        return _gradients(node, arriving, dict(zip(_INPUTS, inputs, strict=True)))[wrt]

    return product


def _rnn_vjp(wrt: str) -> Callable[..., Array]:
    def product(
        node: Node,
        arriving: tuple[Array, ...],
        *,
        X: Array,
        W: Array,
        R: Array,
        B: Array | None,
        sequence_lens: Array | None,
        initial_h: Array | None,
    ) -> Array:
        inputs = (X, W, R, B, sequence_lens, initial_h)
        return _gradients(node, arriving, dict(zip(_INPUTS, inputs, strict=False)))[wrt]

    return product


for _wrt in ("X", "W", "R", "B", "initial_h"):
    vjp("RNN", "GRU", wrt=_wrt, every_output=True)(_rnn_vjp(_wrt))
for _wrt in ("X", "W", "R", "B", "initial_h", "initial_c", "P"):
    vjp("LSTM", wrt=_wrt, every_output=True)(_lstm_vjp(_wrt))
