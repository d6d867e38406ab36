"""From other libraries' callables to arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import peer
import pytest

from rectgrad_ref.verify import Bundle, compare, diagnose, make
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
    found = diagnose(compare(bundle, given))
    assert [deviation.id for deviation in found.deviations] == ["gradient × input"]


def test_hooks_are_removed_even_after_an_error(bundle: Bundle) -> None:
    net = twin(bundle)
    with pytest.raises(RuntimeError), recorded(net):
        raise RuntimeError
    for module in net.modules():
        assert not module._forward_hooks and not module._backward_hooks


def test_captum(bundle: Bundle) -> None:
    """A Captum method is such a function; what its hooks make of R is recorded."""
    attr = pytest.importorskip("captum.attr")
    made = make(
        plain(), peer.images(), method="guided_backprop", backend="reference", dtype="float32"
    )
    net = twin(made)
    method = attr.GuidedBackprop(net)
    found = compare(made, from_torch(lambda x, t: method.attribute(x, target=t), made, net))
    assert found.agrees
    assert {row.part for row in found.rows} == {"R_out", "R_in"}


def test_in_place_activations() -> None:
    made = make(plain(), peer.images(), method="saliency", backend="reference", dtype="float32")
    net = twin(made)
    for part in (net[1], net[4], net[7]):
        part.inplace = True
    found = compare(made, from_torch(saliency(net), made, net))
    assert found.agrees
    assert len(found.rows) == 6


def test_what_hooks_make_of_a_gradient() -> None:
    """RectGrad by PyTorch's own hooks, which are there before the recording starts."""
    torch = pytest.importorskip("torch")
    made = peer.reference(padding_trick=False, final_threshold=False, times_input=False)
    net, taken = twin(made), {}

    def rectify(part: Any, R_in: Any, R_out: Any) -> Any:
        return (torch.from_numpy(peer.rectgrad(taken[part].numpy(), R_out[0].numpy())),)

    for part in (net[1], net[4], net[7]):
        part.register_forward_hook(lambda part, x, a: taken.update({part: a.detach()}))
        part.register_full_backward_hook(rectify)
    found = compare(made, from_torch(saliency(net), made, net))
    assert found.agrees
    assert len(found.rows) == 6


# --- Zennit ---------------------------------------------------------------------------------------


@pytest.fixture
def zennit() -> Any:
    pytest.importorskip("torch")
    return pytest.importorskip("zennit", exc_type=ImportError)


def attributing(net: Any, composite: Any, relevance: Any) -> Any:
    """A Zennit attributor as such a function; `relevance` is what enters at the logits."""
    import torch
    from zennit.attribution import Gradient

    def attribute(x: Any, target: Any) -> Any:
        chosen = torch.nn.functional.one_hot(target, 5)
        with Gradient(net, composite) as attributor:
            return attributor(x, lambda output: relevance(output, chosen))[1]

    return attribute


def test_zennit_guided_backpropagation(zennit: Any) -> None:
    from zennit.composites import GuidedBackprop

    made = make(
        plain(), peer.images(), method="guided_backprop", backend="reference", dtype="float32"
    )
    net = twin(made)
    attribute = attributing(net, GuidedBackprop(), lambda output, chosen: chosen.to(output))
    found = compare(made, from_torch(attribute, made, net))
    assert found.agrees
    assert {row.part for row in found.rows} == {"R_out", "R_in"}


@pytest.mark.parametrize("scores", ["sample", "batch"])
def test_rectgrad_as_a_zennit_rule(zennit: Any, scores: str) -> None:
    """A hook on ReLUs, once right and once with the percentile over the batch."""
    import torch
    from zennit.composites import LayerMapComposite
    from zennit.core import Hook

    rule = peer.rectgrad if scores == "sample" else peer.over_the_batch

    class Rectify(Hook):
        def forward(self, module: Any, input: Any, output: Any) -> None:
            self.stored_tensors["a"] = output

        def backward(self, module: Any, grad_input: Any, grad_output: Any) -> Any:
            a = self.stored_tensors["a"].detach().numpy()
            return (torch.from_numpy(rule(a, grad_output[0].numpy())),)

    made = peer.reference(padding_trick=False, final_threshold=False, times_input=False)
    net = twin(made)
    composite = LayerMapComposite([((torch.nn.ReLU,), Rectify())])
    attribute = attributing(net, composite, lambda output, chosen: chosen.to(output))
    comparison = compare(made, from_torch(attribute, made, net))
    assert comparison.agrees is (scores == "sample")
    found = diagnose(comparison)
    assert [d.id for d in found.deviations] == ([] if scores == "sample" else ["scope=batch"])


def test_zennit_s_epsilon_rule_is_another(zennit: Any) -> None:
    """It divides by z + ε at linear layers, the package at activations: equal as ε → 0."""
    import torch
    from zennit.composites import LayerMapComposite
    from zennit.rules import Epsilon

    distances = []
    for eps in (1e-2, 1e-8):
        made = make(
            plain(), peer.images(), method="epsilon_lrp", eps=eps, backend="reference",
            dtype="float32",
        )  # fmt: skip
        linear = (torch.nn.Conv2d, torch.nn.Linear)
        composite = LayerMapComposite([(linear, Epsilon(epsilon=eps))])
        attribute = attributing(twin(made), composite, lambda output, chosen: chosen * output)
        values = from_torch(attribute, made)["values"]
        distances.append(np.abs(values - made.values).max() / np.abs(made.values).max())
    assert distances[1] < 1e-4 < 1e-3 < distances[0]


# --- Keras and TensorFlow -------------------------------------------------------------------------


def keras_rectgrad(bundle: Bundle, rule: peer.Rule) -> Any:
    """RectGrad at every ReLU of the network in Keras, channels last, as TensorFlow writes it."""
    tf = pytest.importorskip("tensorflow")
    from tensorflow import keras

    taken: dict[str, Any] = {}

    def relu(name: str) -> Any:
        @tf.custom_gradient
        def rectified(z: Any) -> Any:
            a = tf.nn.relu(z)

            def backward(R: Any) -> Any:
                axes = (0, 3, 1, 2) if len(R.shape) == 4 else (0, 1)
                first = [v.numpy().transpose(axes) for v in (a, R)]
                taken[f"{name}/R_out"] = R
                return tf.constant(rule(*first).transpose(np.argsort(axes)))

            return a, backward

        return keras.layers.Lambda(rectified)

    w = peer.weights(bundle)
    layers = keras.layers
    net = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(5, 3, padding="same", name="conv1"),
            relu("conv1.relu"),
            layers.MaxPool2D(),
            layers.Conv2D(6, 3, padding="same", name="conv2"),
            relu("conv2.relu"),
            layers.Permute((3, 1, 2)),
            layers.Flatten(),
            layers.Dense(30, use_bias=False, name="dense1"),
            relu("dense1.relu"),
            layers.Dense(5, use_bias=False, name="dense2"),
        ]
    )
    for name in ("conv1", "conv2"):
        kernel = w[f"{name}.weight"].transpose(2, 3, 1, 0)
        net.get_layer(name).set_weights([kernel, w[f"{name}.bias"]])
    for name in ("dense1", "dense2"):
        net.get_layer(name).set_weights([w[f"{name}.weight"]])

    def explain(images: np.ndarray, target: np.ndarray) -> dict[str, Any]:
        x = tf.constant(images.transpose(0, 2, 3, 1))
        with tf.GradientTape() as tape:
            tape.watch(x)
            scores = tf.gather(net(x), target, batch_dims=1)
        return {"values": x * tape.gradient(scores, x), **taken}

    return explain


@pytest.mark.parametrize("what", ["map", "map and gradients"])
def test_keras(what: str) -> None:
    made = peer.reference(padding_trick=False, final_threshold=False)
    explain = keras_rectgrad(made, peer.rectgrad)
    function = explain if what != "map" else lambda *given: explain(*given)["values"]
    found = compare(made, from_callable(function, made))
    assert found.agrees
    assert all(match.transposed for match in found.matches if match.name != "dense1.relu")
    assert len(found.rows) == (0 if what == "map" else 3)


def test_a_wrong_one_in_keras() -> None:
    made = peer.reference(padding_trick=False, final_threshold=False)
    found = from_callable(keras_rectgrad(made, peer.over_the_batch), made)
    diagnosis = diagnose(compare(made, found))
    assert [deviation.id for deviation in diagnosis.deviations] == ["scope=batch"]
