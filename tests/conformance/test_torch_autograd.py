"""The same network in PyTorch: autograd for saliency, a custom autograd function for RectGrad."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nets import model
from onnx import ModelProto, helper, numpy_helper

from rectgrad_ref import Explainer

torch = pytest.importorskip("torch")
F = torch.nn.functional

Q = 90.0


def network() -> Any:
    """Convolutions, batch normalisation, a residual block, both poolings and dense layers."""
    torch.manual_seed(0)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.bn1 = torch.nn.BatchNorm2d(8)
            self.conv2 = torch.nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
            self.bn2 = torch.nn.BatchNorm2d(8)
            self.conv3 = torch.nn.Conv2d(8, 12, 3, stride=2, padding=1)
            self.dense1 = torch.nn.Linear(12 * 4, 40)
            self.dense2 = torch.nn.Linear(40, 5)

        def forward(self, x: Any, relu: Any, trace: dict[str, Any] | None = None) -> Any:
            def activation(name: str, z: Any) -> Any:
                a = relu(z)
                if trace is not None:
                    a.retain_grad()
                    trace[name] = a
                return a

            a = activation("relu1", self.bn1(self.conv1(x)))
            a = activation("relu2", self.bn2(self.conv2(a)) + a)
            a = F.max_pool2d(a, 2)
            a = activation("relu3", self.conv3(a))
            a = F.avg_pool2d(a, 3, stride=1, padding=1, count_include_pad=False)
            a = F.max_pool2d(a, 2)
            a = activation("relu4", self.dense1(a.flatten(1)))
            return self.dense2(a)

    made = Network().double().eval()
    for bn in (made.bn1, made.bn2):
        torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
        torch.nn.init.normal_(bn.bias, 0, 0.2)
        bn.running_mean.normal_(0, 0.2)
        bn.running_var.uniform_(0.5, 1.5)
    # The weights of a file are float32; PyTorch computes with the same numbers.
    made.load_state_dict({k: v.float().double() for k, v in made.state_dict().items()})
    return made


def exported(net: Any) -> ModelProto:
    """The network as ONNX, node by node."""
    arrays = {
        name: value.numpy().astype(np.float32)
        for name, value in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }

    def bn(name: str, source: str, result: str) -> Any:
        parts = ("weight", "bias", "running_mean", "running_var")
        inputs = [source, *(f"{name}.{part}" for part in parts)]
        return helper.make_node("BatchNormalization", inputs, [result], epsilon=1e-5)

    node = helper.make_node
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    halve = {"kernel_shape": [2, 2], "strides": [2, 2]}
    nodes = [
        node("Conv", ["x", "conv1.weight", "conv1.bias"], ["c1"], **same),
        bn("bn1", "c1", "b1"),
        node("Relu", ["b1"], ["relu1"]),
        node("Conv", ["relu1", "conv2.weight"], ["c2"], group=2, **same),
        bn("bn2", "c2", "b2"),
        node("Add", ["b2", "relu1"], ["sum"]),
        node("Relu", ["sum"], ["relu2"]),
        node("MaxPool", ["relu2"], ["p2"], **halve),
        node("Conv", ["p2", "conv3.weight", "conv3.bias"], ["c3"], strides=[2, 2], **same),
        node("Relu", ["c3"], ["relu3"]),
        node("AveragePool", ["relu3"], ["p3"], **same),
        node("MaxPool", ["p3"], ["p4"], **halve),
        node("Flatten", ["p4"], ["flat"]),
        node("Gemm", ["flat", "dense1.weight", "dense1.bias"], ["d1"], transB=1),
        node("Relu", ["d1"], ["relu4"]),
        node("Gemm", ["relu4", "dense2.weight", "dense2.bias"], ["logits"], transB=1),
    ]
    initializers = [numpy_helper.from_array(v, k) for k, v in arrays.items()]
    return model(nodes, ["N", 3, 16, 16], "logits", initializers)


class RectGradRelu(torch.autograd.Function):
    """ReLU whose backward pass is the paper's rule, q-th percentile by sample, TensorFlow's way."""

    @staticmethod
    def forward(ctx: Any, z: Any) -> Any:
        a = z.clamp(min=0)
        ctx.save_for_backward(a)
        return a

    @staticmethod
    def backward(ctx: Any, R: Any) -> Any:
        (a,) = ctx.saved_tensors
        scores = (a * R).flatten(1)
        descending = scores.sort(dim=1, descending=True).values
        index = round((scores.shape[1] - 1) * (1 - Q / 100))
        passes = scores > descending[:, index : index + 1]
        return torch.where(passes.view_as(R), R, torch.zeros_like(R))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def net() -> Any:
    return network()


def backward(net: Any, images: np.ndarray, relu: Any) -> tuple[np.ndarray, dict[str, Any], Any]:
    """The gradient at the input, the traced activations, and the logits."""
    x = torch.tensor(images, dtype=torch.float64, requires_grad=True)
    trace: dict[str, Any] = {}
    logits = net(x, relu, trace)
    logits.max(dim=1).values.sum().backward()
    return x.grad.numpy(), trace, logits.detach().numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_forward(net: Any, images: np.ndarray) -> None:
    _, _, logits = backward(net, images, F.relu)
    result = Explainer(exported(net), backend="reference").explain(images, method="saliency")
    assert relative(result.logits, logits) < 1e-12
    assert result.target.tolist() == logits.argmax(axis=1).tolist()


def test_saliency(net: Any, images: np.ndarray) -> None:
    gradient, trace, _ = backward(net, images, F.relu)
    explainer = Explainer(exported(net), backend="reference")
    result = explainer.explain(images, method="saliency", trace=True)
    assert relative(result.values, gradient) < 1e-9
    for name, layer in result.layers().items():
        assert relative(layer.a, trace[name].detach().numpy()) < 1e-9
        assert relative(layer.R_out, trace[name].grad.numpy()) < 1e-9


def test_saliency_in_float32(net: Any, images: np.ndarray) -> None:
    pytest.importorskip("onnxruntime")
    gradient, _, _ = backward(net, images, F.relu)
    result = Explainer(exported(net), backend="cpu").explain(images, method="saliency")
    assert relative(result.values, gradient) < 1e-5


def test_rectgrad(net: Any, images: np.ndarray) -> None:
    gradient, trace, _ = backward(net, images, RectGradRelu.apply)
    explainer = Explainer(exported(net), backend="reference")
    result = explainer.explain(
        images, q=Q, padding_trick=False, times_input=False, final_threshold=False, trace=True
    )
    assert relative(result.values, gradient) < 1e-9
    for name, layer in result.layers().items():
        a, R = trace[name].detach(), trace[name].grad
        assert relative(layer.R_out, R.numpy()) < 1e-9
        scores = (a * R).flatten(1)
        index = round((scores.shape[1] - 1) * (1 - Q / 100))
        tau = scores.sort(dim=1, descending=True).values[:, index]
        mask = (scores > tau[:, None]).view_as(a).numpy()
        assert np.array_equal(layer.mask, mask), name
        assert layer.tau == pytest.approx(tau.numpy(), rel=1e-9)
        assert 0 < mask.sum() < mask.size


def test_final_threshold(net: Any, images: np.ndarray) -> None:
    gradient, _, _ = backward(net, images, RectGradRelu.apply)
    expected = np.maximum(images * gradient, 0)
    explainer = Explainer(exported(net), backend="reference")
    result = explainer.explain(images, q=Q, padding_trick=False)
    assert relative(result.values, expected) < 1e-9


def test_padding_trick(net: Any, images: np.ndarray) -> None:
    """Hooks that zero the border of the gradient at each padded convolution's output."""

    def mask(R: Any) -> Any:
        inner = torch.zeros_like(R)
        inner[..., 1:-1, 1:-1] = R[..., 1:-1, 1:-1]
        return inner

    handles = [
        layer.register_forward_hook(lambda module, _, y: y.register_hook(mask) and None)
        for layer in (net.conv1, net.conv2, net.conv3)
    ]
    try:
        gradient, _, _ = backward(net, images, RectGradRelu.apply)
    finally:
        for handle in handles:
            handle.remove()
    explainer = Explainer(exported(net), backend="reference")
    result = explainer.explain(images, q=Q)
    assert relative(result.values, np.maximum(images * gradient, 0)) < 1e-9


def test_smoothgrad_and_integrated_gradients(net: Any, images: np.ndarray) -> None:
    from rectgrad_ref import SmoothGrad

    explainer = Explainer(exported(net), backend="reference")
    x, keys = images.astype(np.float64), np.arange(len(images))
    target = explainer.explain(images, method="saliency").target

    def gradient(points: np.ndarray) -> np.ndarray:
        p = torch.tensor(points, requires_grad=True)
        net(p, F.relu)[torch.arange(len(points)), torch.tensor(target)].sum().backward()
        return p.grad.numpy()

    path = sum(gradient(x * k / 20) for k in range(1, 21)) / 20 * x
    result = explainer.explain(images, method="integrated_gradients", steps=20)
    assert relative(result.values, path) < 1e-9
    noisy = sum(gradient(SmoothGrad().point(x, k, keys)) for k in range(5)) / 5
    result = explainer.explain(images, method="smoothgrad", n=5)
    assert relative(result.values, noisy) < 1e-9
