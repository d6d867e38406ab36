"""Networks exported by PyTorch, against PyTorch's own gradient and a RectGrad written in it."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import pytest

from rectgrad_ref import Attribution, Explainer
from rectgrad_ref.errors import RectGradWarning

torch = pytest.importorskip("torch")
from networks import NETWORKS  # noqa: E402  (needs torch)

Q = 90.0
ACTIVATIONS = (
    torch.nn.ReLU, torch.nn.ReLU6, torch.nn.GELU, torch.nn.SiLU, torch.nn.Hardswish, torch.nn.Tanh,
)  # fmt: skip
# By which exporter, and with which opset. That by tracing takes 0.1 s, that by torch.export 2 to 9.
TRACED = [("tracing", name, network.opset) for name, network in NETWORKS.items()]
QUICK = {"RegNet", "MobileNetV2", "MLPMixer"}
CAPTURED = [
    pytest.param("capture", name, 18 + i % 4, marks=() if name in QUICK else pytest.mark.slow)
    for i, name in enumerate(NETWORKS)
]


def inputs(name: str) -> Any:
    """Two samples, float64."""
    made = torch.Generator().manual_seed(1)
    return torch.randn(2, *NETWORKS[name].shape, generator=made, dtype=torch.float64)


def export(
    net: Any, x: Any, exporter: str, opset: int, *, any_batch: bool = True
) -> onnx.ModelProto:
    """The network as ONNX, for any number of samples or for that of `x`."""
    options: dict[str, Any] = {"input_names": ["x"], "opset_version": opset}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "tracing":
            file, batch = io.BytesIO(), {"x": {0: "N"}} if any_batch else None
            torch.onnx.export(net, (x,), file, dynamo=False, dynamic_axes=batch, **options)
            return onnx.load_from_string(file.getvalue())
        pytest.importorskip("onnxscript")
        shapes = ({0: "N"},) if any_batch else None
        program = torch.onnx.export(
            net, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False, **options
        )
    return program.model_proto


class Rectify(torch.autograd.Function):
    """The identity, whose backward pass is the paper's rule; `layers` receives a, R and mask."""

    @staticmethod
    def forward(ctx: Any, z: Any, a: Any, layers: list[Any]) -> Any:
        ctx.a, ctx.layers = a, layers
        return a.clone()

    @staticmethod
    def backward(ctx: Any, R: Any) -> Any:
        mask = rectified(ctx.a, R)
        ctx.layers.append((ctx.a, R, mask))
        return torch.where(mask, R, torch.zeros_like(R)), None, None


def rectified(a: Any, R: Any) -> Any:
    """a·R above its q-th percentile in each sample, found by torch.kthvalue."""
    scores = (a * R).flatten(1)
    n = scores.shape[1]
    tau = scores.kthvalue(n - round((n - 1) * (1 - Q / 100)), dim=1, keepdim=True).values
    return (scores > tau).view_as(R)


def border_zeroed(R: Any) -> Any:
    """The padding trick; a picture of fewer than three cells is left alone."""
    if min(R.shape[2:]) < 3:
        return R
    inner = torch.zeros_like(R)
    inner[..., 1:-1, 1:-1] = R[..., 1:-1, 1:-1]
    return inner


def rectgrad(net: Any, x: Any) -> tuple[Any, list[Any]]:
    """R at the input by hooks, and the layers from the last to the first."""
    layers: list[Any] = []

    def at_activation(part: Any, given: Any, a: Any) -> Any:
        # The rule replaces the derivative of a ReLU and multiplies that of the others.
        source = given[0] if isinstance(part, torch.nn.ReLU) else a
        return Rectify.apply(source, a.detach(), layers)

    def at_convolution(part: Any, given: Any, y: Any) -> None:
        y.register_hook(border_zeroed)

    handles = []
    for part in net.modules():
        if isinstance(part, ACTIVATIONS):
            handles.append(part.register_forward_hook(at_activation))
        elif isinstance(part, torch.nn.Conv2d) and any(part.padding):
            handles.append(part.register_forward_hook(at_convolution))
    try:
        return gradient(net, x), layers
    finally:
        for handle in handles:
            handle.remove()


def gradient(net: Any, x: Any) -> np.ndarray:
    """∂S/∂x of each sample's largest logit."""
    x = x.clone().requires_grad_()
    net(x).max(dim=1).values.sum().backward()
    return x.grad.numpy()


def explained(explainer: Explainer, x: Any, method: str, **options: Any) -> Attribution:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RectGradWarning)
        return explainer.explain(x.numpy(), method=method, **options)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("exporter", "name", "opset"), [*TRACED, *CAPTURED])
def test_network(exporter: str, name: str, opset: int) -> None:
    """In float64, with the exporter's own fusions: logits, gradient and RectGrad's layers."""
    net, x = NETWORKS[name].build().double(), inputs(name)
    proto = export(net, x, exporter, opset)
    assert proto.opset_import[0].version == opset
    explainer = Explainer(proto, backend="reference")
    ours = explained(explainer, x, "saliency")
    assert relative(ours.logits, net(x).detach().numpy()) < 1e-9
    assert relative(ours.values, gradient(net, x)) < 1e-9

    ours = explained(
        explainer, x, "rectgrad", q=Q, trace=True, times_input=False, final_threshold=False
    )
    theirs, layers = rectgrad(net, x)
    assert len(ours.layers()) == len(layers) == NETWORKS[name].layers
    assert relative(ours.values, theirs) < 1e-9
    for layer in ours.layers().values():
        a, R = torch.tensor(layer.a), torch.tensor(layer.R_out)
        assert np.array_equal(layer.mask, rectified(a, R).numpy())
        same = [mask for other, _, mask in layers if other.shape == a.shape and other.allclose(a)]
        assert any(np.array_equal(layer.mask, mask.numpy()) for mask in same)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_on_the_cpu_backend(name: str) -> None:
    """In float32, exported for one sample: the same rule on the layers' own a and R."""
    pytest.importorskip("onnxruntime")
    network, x = NETWORKS[name], inputs(name)
    net = network.build()
    proto = export(net, x[:1].float(), "tracing", network.opset, any_batch=False)
    explainer = Explainer(proto, backend="cpu")
    ours = explained(explainer, x.float(), "saliency")
    net = net.double()
    assert relative(ours.logits, net(x.float().double()).detach().numpy()) < 1e-5
    assert relative(ours.values, gradient(net, x.float().double())) < 1e-5

    ours = explained(explainer, x.float(), "rectgrad", q=Q, trace=True)
    assert len(ours.layers()) == network.layers
    for layer in ours.layers().values():
        assert layer.a.dtype == np.float32
        a, R = torch.tensor(layer.a), torch.tensor(layer.R_out)
        assert np.array_equal(layer.mask, rectified(a, R).numpy())
