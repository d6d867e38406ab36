"""From other libraries' programs to the arrays that `compare` takes.

All are optional: `compare` takes any mapping of names to arrays. PyTorch is imported where it is
used only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from .bundle import Bundle


def from_callable(
    function: Callable[[np.ndarray, np.ndarray], Any], bundle: Bundle
) -> dict[str, np.ndarray]:
    """What a function of NumPy arrays returns.

    Parameters
    ----------
    function : callable
        Called with the images (N, …) and the class indices (N,); returns the maps, or a mapping of
        names to arrays with the gradients too. Anything that `numpy.asarray` takes is an array: a
        Keras or TensorFlow function's tensor, a JAX array.
    """
    found = function(bundle.inputs, bundle.target)
    parts = found if isinstance(found, Mapping) else {"values": found}
    return {name: np.asarray(part) for name, part in parts.items()}


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
    Of a module that is used more than once the last use is recorded. Activations that are functions
    no hook sees.
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

    def hooks(name: str) -> tuple[Callable[..., Any], Callable[..., None]]:
        def before(part: Any, inputs: Any) -> Any:
            call = calls[name] = {}
            if not inputs[0].requires_grad:
                return None
            # Other hooks change R at the copy, before it comes to the view.
            z = inputs[0].view_as(inputs[0])
            z.register_hook(partial(call.__setitem__, "R_in"))
            return (z.clone(), *inputs[1:])

        def after(part: Any, inputs: Any, output: Any) -> None:
            calls[name]["a"] = output.detach().clone()
            if output.requires_grad:
                output.register_hook(partial(calls[name].__setitem__, "R_out"))

        return before, after

    for name, part in chosen.items():
        before, after = hooks(name)
        handles.append(part.register_forward_pre_hook(before, prepend=True))
        handles.append(part.register_forward_hook(after))
    found: dict[str, np.ndarray] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, call in calls.items():
        found.update((f"{name}/{key}", _plain(value)) for key, value in call.items())


def _plain(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy() if hasattr(tensor, "detach") else np.asarray(tensor)
