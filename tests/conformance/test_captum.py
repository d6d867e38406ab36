"""Captum's methods on the same weights in float64, where its definitions are the same.

Where they are not, the difference is shown: these tests are also the record of what Captum does
otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rectgrad_ref import Explainer, analysis
from rectgrad_ref.graph import Graph, Node
from rectgrad_ref.methods.noise import normal
from rectgrad_ref.onnx_models.cifar10_cnn import network_path

torch = pytest.importorskip("torch")
attr = pytest.importorskip("captum.attr")
nn = torch.nn

pytestmark = pytest.mark.filterwarnings("ignore:Setting:UserWarning", "ignore:.*backward hook")
NETWORKS = ["cifar10_cnn", "resnet20", pytest.param("squeezenet", marks=pytest.mark.slow)]


class Twin(nn.Module):  # type: ignore[misc]
    """A graph in PyTorch: a module for each node that Captum has a rule for.

    Attributes
    ----------
    copies : bool
        Whether a max pool reads a copy.
    """

    copies = False

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph, self.nodes = graph, analysis.path(graph)
        self.parts = nn.ModuleDict(
            {str(i): made for i, node in enumerate(self.nodes) if (made := module(node))}
        )
        self.double().eval()

    def forward(self, x: Any) -> Any:
        values = {self.graph.input: x}
        for i, node in enumerate(self.nodes):
            inputs = [values[v] for v in node.inputs if v in values]
            if self.copies and node.op == "MaxPool":
                inputs = [inputs[0].clone()]
            if str(i) in self.parts:
                values[node.outputs[0]] = self.parts[str(i)](*inputs)
            elif node.op == "Add":
                values[node.outputs[0]] = inputs[0] + inputs[1]
            elif node.op == "Concat":
                values[node.outputs[0]] = torch.cat(inputs, 1)
            else:
                assert node.op in ("Flatten", "Reshape"), node
                values[node.outputs[0]] = inputs[0].flatten(1)
        return values[self.graph.logits]


def module(node: Node) -> Any:
    """What computes the node; None for those that only arrange or add."""
    constants = [None if c is None else torch.tensor(c) for c in node.constants]
    if node.op == "Relu":
        return nn.ReLU()
    if node.op == "GlobalAveragePool":
        return nn.AdaptiveAvgPool2d(1)
    if node.op == "MaxPool":
        return nn.MaxPool2d(
            node["kernel_shape"],
            node["strides"],
            node["pads"][:2],
            ceil_mode=bool(node["ceil_mode"]),
        )
    if node.op == "Conv":
        weight, bias = (*constants, None)[1:3]
        made = nn.Conv2d(
            weight.shape[1], weight.shape[0], node["kernel_shape"], node["strides"],
            node["pads"][:2], bias=bias is not None,
        )  # fmt: skip
    elif node.op == "Gemm":
        weight, bias = constants[1:3]
        weight = weight if node["transB"] else weight.T
        made = nn.Linear(weight.shape[1], weight.shape[0])
    elif node.op == "BatchNormalization":
        weight, bias, mean, variance = constants[1:5]
        made = nn.BatchNorm2d(len(weight), eps=node["epsilon"])
        made.running_mean.data, made.running_var.data = mean, variance
    else:
        return None
    made.weight.data = weight
    if bias is not None:
        made.bias.data = bias
    return made


class Pair:
    """A network here and there, and one image."""

    def __init__(self, model: Path, x: np.ndarray) -> None:
        self.ours = Explainer(model, backend="reference")
        self.x = x.astype(np.float32).astype(np.float64)
        first = self.ours.explain(self.x, method="saliency")
        self.target = int(first.target[0])
        self.twin = Twin(self.ours.graph)
        logits = self.twin(torch.tensor(self.x)).detach().numpy()
        assert relative(first.logits, logits) < 1e-12

    def explain(self, method: str, **options: Any) -> np.ndarray:
        return self.ours.explain(self.x, method=method, target=self.target, **options).values

    def captum(self, peer: Any, **options: Any) -> np.ndarray:
        x = torch.tensor(self.x, requires_grad=True)
        found: np.ndarray = peer.attribute(x, target=self.target, **options).detach().numpy()
        return found


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request: pytest.FixtureRequest) -> Pair:
    if request.param == "cifar10_cnn":
        path, x = network_path(), np.random.default_rng(0).uniform(-1, 1, (1, 3, 32, 32))
        return Pair(path, x)
    models = request.getfixturevalue("shared_data") / "models"
    rng = np.random.default_rng(0)
    if request.param == "resnet20":
        x = rng.standard_normal((1, 3, 32, 32))
        return Pair(models / "cifar10_resnet20_bn_unfused.onnx", x)
    x = 60 * rng.standard_normal((1, 3, 227, 227))
    return Pair(models / "imagenet_squeezenet1.1_logits.onnx", x)


def test_saliency(pair: Pair) -> None:
    expected = pair.captum(attr.Saliency(pair.twin), abs=False)
    assert relative(pair.explain("saliency"), expected) < 1e-9
    # Captum's default is the absolute value.
    absolute = pair.captum(attr.Saliency(pair.twin))
    assert relative(np.abs(pair.explain("saliency")), absolute) < 1e-9
    assert (expected < 0).any()


def test_gradient_times_input(pair: Pair) -> None:
    expected = pair.captum(attr.InputXGradient(pair.twin))
    assert relative(pair.explain("input_x_gradient"), expected) < 1e-9


@pytest.mark.parametrize("method", ["GuidedBackprop", "Deconvolution"])
def test_modified_relus(pair: Pair, method: str) -> None:
    ours = {"GuidedBackprop": "guided_backprop", "Deconvolution": "deconvolution"}[method]
    expected = pair.captum(getattr(attr, method)(pair.twin))
    assert relative(pair.explain(ours), expected) < 1e-9


@pytest.mark.parametrize("rule", ["right", "gauss_legendre"])
def test_integrated_gradients(pair: Pair, rule: str) -> None:
    method = {"right": "riemann_right", "gauss_legendre": "gausslegendre"}[rule]
    options = {"n_steps": 4, "method": method, "internal_batch_size": 1}
    expected = pair.captum(attr.IntegratedGradients(pair.twin), **options)
    found = pair.explain("integrated_gradients", steps=4, rule=rule)
    # Captum's steps are in float32.
    assert relative(found, expected) < 1e-4


def test_captum_s_trapezoid_is_another(pair: Pair) -> None:
    """Its weights sum to (n − 1)/n, at n points instead of n + 1.

    They include the baseline, which must not be constant here: see the next test.
    """
    baseline = np.random.default_rng(1).standard_normal(pair.x.shape)
    options = {"n_steps": 4, "method": "riemann_trapezoid", "internal_batch_size": 1}
    peer = attr.IntegratedGradients(pair.twin)
    expected = pair.captum(peer, baselines=torch.tensor(baseline), **options)
    found = pair.explain("integrated_gradients", steps=3, rule="trapezoid", baseline=baseline)
    assert relative(found * 3 / 4, expected) < 1e-4


@pytest.mark.slow
def test_rounding_chooses_the_maximum_in_a_constant_image(shared_data: Path) -> None:
    """Where all cells of a window are equal but for rounding, the gradient follows the rounding.

    So it differs between two programs at a constant baseline, even in float64, unless both happen
    to round alike on this processor.
    """
    x = np.zeros((1, 3, 227, 227))
    pair = Pair(shared_data / "models" / "imagenet_squeezenet1.1_logits.onnx", x)
    pools = [node for node in pair.ours.graph.nodes if node.op == "MaxPool"]
    inputs = [node.inputs[0] for node in pools]
    ours = pair.ours.backend.forward(pair.ours.graph, pair.x, inputs)
    expected = pair.captum(attr.Saliency(pair.twin), abs=False)
    theirs: list[Any] = []
    parts = [part for part in pair.twin.modules() if isinstance(part, nn.MaxPool2d)]
    for part in parts:
        part.register_forward_hook(lambda part, x, y: theirs.append(x[0].detach()))
    pair.twin(torch.tensor(pair.x))
    differing = 0
    for part, name, z in zip(parts, inputs, tuple(theirs), strict=True):
        part.return_indices = True
        _, (here, there) = zip(*(part(torch.as_tensor(v)) for v in (ours[name], z)), strict=True)
        flat, moved = z.flatten(2), here.flatten(2) != there.flatten(2)
        maxima = [flat.gather(2, index.flatten(2))[moved] for index in (here, there)]
        assert torch.allclose(*maxima, rtol=1e-12, atol=0)
        differing += int(moved.sum())
    if not differing:
        pytest.skip("both programs round alike on this processor")
    assert relative(pair.explain("saliency"), expected) > 0.1


def test_deeplift(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captum's Rescale rule for max pools is the option `maxpool="rescale"` here.

    Captum loses it where a ReLU comes directly before the pool: both hang on one tensor, and the
    ReLU notes the gradient before the pool has replaced it. What is left is the gradient of the
    pool, our default. A copy between the two brings the rule back.
    """
    if any(node.op == "Concat" for node in pair.ours.graph.nodes):
        pytest.skip("its pools have windows that overlap, see the next test")
    expected = pair.captum(attr.DeepLift(pair.twin, eps=1e-5))
    assert relative(pair.explain("deeplift"), expected) < 1e-6
    pools = [part for part in pair.twin.modules() if isinstance(part, nn.MaxPool2d)]
    monkeypatch.setattr(pair.twin, "copies", True)
    copied = pair.captum(attr.DeepLift(pair.twin, eps=1e-5))
    assert relative(pair.explain("deeplift", maxpool="rescale"), copied) < 1e-6
    assert (relative(copied, expected) > 1e-3) is bool(pools)


@pytest.mark.slow
def test_deeplift_through_windows_that_overlap(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captum unpools by assignment, which keeps one of the windows that share a maximum."""
    x = 60 * np.random.default_rng(0).standard_normal((1, 3, 227, 227))
    pair = Pair(shared_data / "models" / "imagenet_squeezenet1.1_logits.onnx", x)
    monkeypatch.setattr(pair.twin, "copies", True)
    method, image = attr.DeepLift(pair.twin), torch.tensor(pair.x)
    _, gap = method.attribute(image, target=pair.target, return_convergence_delta=True)
    ours = pair.ours.explain(pair.x, method="deeplift", target=pair.target, maxpool="rescale")
    assert ours.completeness_gap is not None
    assert abs(ours.completeness_gap[0]) < 1e-4 < 0.1 < abs(float(gap))


def test_epsilon_lrp(pair: Pair) -> None:
    """Captum divides by z + ε at linear layers and pools, here at activations: equal as ε → 0."""
    if any(node.op == "BatchNormalization" for node in pair.ours.graph.nodes):
        pytest.skip("Captum's LRP has no rule for an addition of two branches")
    distances = []
    for eps in (1e-4, 1e-8):
        for part in pair.twin.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AdaptiveAvgPool2d)):
                part.rule = attr_rule(eps)
        expected = pair.captum(attr.LRP(pair.twin))
        found = pair.explain("epsilon_lrp", eps=eps)
        distances.append(relative(found, expected))
    assert distances[1] < 1e-5
    assert 100 * distances[1] < distances[0] < 0.5


def attr_rule(eps: float) -> Any:
    from captum.attr._utils.lrp_rules import EpsilonRule

    return EpsilonRule(epsilon=eps)


def test_smoothgrad_with_the_same_noise(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 3
    noise = np.stack([normal(0, 0, k, pair.x.shape[1:]) for k in range(n)])

    def drawn(mean: float, deviation: Any) -> Any:
        assert mean == 0 and deviation.shape == noise.shape
        return deviation * torch.tensor(noise)

    monkeypatch.setattr(torch, "normal", drawn)
    tunnel = attr.NoiseTunnel(attr.Saliency(pair.twin))
    sigma = 0.1 * float(np.ptp(pair.x))
    options = {"nt_type": "smoothgrad", "nt_samples": n, "stdevs": sigma, "abs": False}
    expected = pair.captum(tunnel, **options)
    assert relative(pair.explain("smoothgrad", n=n), expected) < 1e-6
