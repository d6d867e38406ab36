"""From other libraries' programs to the arrays that `compare` takes.

All are optional: `compare` takes any mapping of names to arrays. PyTorch is imported where it is
used only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .bundle import Bundle


def from_callable(
    function: Callable[[np.ndarray, np.ndarray], Any], bundle: Bundle
) -> dict[str, np.ndarray]:
    """The final map of a function of NumPy arrays.

    Parameters
    ----------
    function : callable
        Called with the images (N, …) and the class indices (N,); returns the maps, as anything
        that `numpy.asarray` takes: a Keras or TensorFlow function's tensor, a JAX array.
    """
    return {"values": np.asarray(function(bundle.inputs, bundle.target))}


def from_torch(
    attribute: Callable[[Any, Any], Any],
    bundle: Bundle,
    module: Any = None,
    *,
    activations: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """The final map of a PyTorch function and, with its module, R at every ReLU.

    Parameters
    ----------
    attribute : callable
        Called with the images and the class indices as tensors; returns the maps. A Captum method
        fits as ``lambda x, target: method.attribute(x, target=target)``, a Zennit one as
        ``lambda x, target: attributor(x, one_hot(target))[1]``.
    bundle : Bundle
    module : torch.nn.Module, optional
        Whose ReLU modules record the gradients during that call.
    activations : sequence of str, optional
        Names of the modules to record; all `torch.nn.ReLU` by default.

    Notes
    -----
    In-place ReLUs, and modules that are used more than once, are recorded as PyTorch's hooks see
    them; other activations are functions that no hook sees.
    """
    import torch

    x = torch.from_numpy(bundle.inputs.copy()).requires_grad_()
    target = torch.from_numpy(bundle.target)
    if module is None:
        return {"values": _plain(attribute(x, target))}
    with recorded(module, activations) as found:
        values = _plain(attribute(x, target))
    return {"values": values, **found}


@contextmanager
def recorded(
    module: Any, activations: Sequence[str] | None = None
) -> Iterator[Mapping[str, np.ndarray]]:
    """Record a, R_out and R_in at ReLU modules while the block runs.

    Yields
    ------
    dict
        ``NAME/a``, ``NAME/R_out`` and ``NAME/R_in`` by the modules' names, filled at the end, in
        the order in which the modules ran.
    """
    import torch

    chosen = {
        name: part
        for name, part in module.named_modules()
        if (name in activations if activations is not None else isinstance(part, torch.nn.ReLU))
    }
    calls: dict[str, dict[str, Any]] = {}
    handles = []

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def forward(part: Any, inputs: Any, output: Any) -> None:
            calls[name] = {"a": output.detach()}

        def backward(part: Any, R_in: Any, R_out: Any) -> None:
            calls[name] |= {"R_out": R_out[0], "R_in": R_in[0]}

        return forward, backward

    for name, part in chosen.items():
        forward, backward = hooks(name)
        handles.append(part.register_forward_hook(forward))
        handles.append(part.register_full_backward_hook(backward))
    found: dict[str, np.ndarray] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, call in calls.items():
        found.update((f"{name}/{key}", _plain(v)) for key, v in call.items() if v is not None)


def _plain(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy() if hasattr(tensor, "detach") else np.asarray(tensor)
