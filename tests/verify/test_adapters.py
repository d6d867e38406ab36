"""From other libraries' callables to arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import peer
import pytest

from rectgrad_ref.verify import Bundle, compare, diagnose, engine_of, make
from rectgrad_ref.verify.adapters import from_callable, from_torch, recorded
from rectgrad_ref.verify.conformance import plain


def test_a_function_of_arrays(bundle: Bundle) -> None:
    def explain(x: np.ndarray, target: np.ndarray) -> Any:
        assert x.dtype == np.float32
        np.testing.assert_array_equal(target, bundle.target)
        return peer.explain(bundle)["values"].tolist()

    assert compare(bundle, from_callable(explain, bundle)).agrees


def twin(bundle: Bundle) -> Any:
    """The network in PyTorch, with plain ReLU modules."""
    torch = pytest.importorskip("torch")
    weights = {k: torch.from_numpy(v.copy()) for k, v in peer.weights(bundle).items()}
    nn = torch.nn
    net = nn.Sequential(
        *(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(96, 30, bias=False), nn.ReLU(), nn.Linear(30, 5, bias=False)),
    )
    layers = {"conv1": net[0], "conv2": net[3], "dense1": net[6], "dense2": net[8]}
    for name, layer in layers.items():
        weight = weights[f"{name}.weight"]
        layer.weight.data = weight.T if name.startswith("dense") else weight
        if f"{name}.bias" in weights:
            layer.bias.data = weights[f"{name}.bias"]
    return net


def saliency(net: Any) -> Any:
    import torch

    def attribute(x: Any, target: Any) -> Any:
        scores = net(x).gather(1, target[:, None])
        return torch.autograd.grad(scores.sum(), x)[0]

    return attribute


def test_a_module_with_its_gradients() -> None:
    made = make(plain(), peer.images(), method="saliency", backend="reference", dtype="float32")
    net = twin(made)
    given = from_torch(saliency(net), made, net)
    parts = {f"{name}/{part}" for name in ("1", "4", "7") for part in ("a", "R_out", "R_in")}
    assert given.keys() == {"values"} | parts
    found = compare(made, given)
    assert found.agrees
    assert [match.name for match in found.matches if match.part == "R_in"] == list(peer.RELUS)


def test_chosen_activations() -> None:
    made = make(plain(), peer.images(), method="saliency", backend="reference", dtype="float32")
    net = twin(made)
    given = from_torch(saliency(net), made, net, activations=["4"])
    assert {key.partition("/")[0] for key in given} == {"values", "4"}


def test_a_function_without_its_module(bundle: Bundle) -> None:
    net = twin(bundle)
    given = from_torch(lambda x, target: x * saliency(net)(x, target), bundle)
    assert list(given) == ["values"]
    found = diagnose(compare(bundle, given), engine_of(bundle))
    assert [deviation.id for deviation in found.deviations] == ["gradient × input"]


def test_hooks_are_removed_even_after_an_error(bundle: Bundle) -> None:
    net = twin(bundle)
    with pytest.raises(RuntimeError), recorded(net):
        raise RuntimeError
    for module in net.modules():
        assert not module._forward_hooks and not module._backward_hooks


def test_captum(bundle: Bundle) -> None:
    """A Captum method is such a function."""
    attr = pytest.importorskip("captum.attr")
    made = make(
        plain(), peer.images(), method="guided_backprop", backend="reference", dtype="float32"
    )
    method = attr.GuidedBackprop(twin(made))
    found = from_torch(lambda x, target: method.attribute(x, target=target), made)
    assert compare(made, found).agrees
