"""The same methods on the same weights by PyTorch, written as fast as we know how, and by Captum.

A twin is one module for each node of the frozen graph, with the weights of the ONNX file. The two
networks have their batch normalisation folded into them, and no peer computes gradients with
respect to weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rectgrad_ref import analysis
from rectgrad_ref.graph import Graph, Node

from .clock import Contender

Q = 98.0
EPSILON = 1e-4
# Points of one sample that go through the network together; more make a gradient hardly cheaper.
_TOGETHER = 8

# The ReLU's output and the gradient there → the gradient that passes.
Rule = Callable[[Tensor, Tensor], Tensor]
Expected = Callable[[str], Callable[[], Any]]
Call = Callable[[], Tensor]
# Scores (N, units) → the threshold of each sample, (N,).
Threshold = Callable[[Tensor], Tensor]


def set_threads(threads: int) -> None:
    """As many as everybody else has."""
    torch.set_num_threads(threads)


class Network:
    """Twins of one graph, which share its weights.

    Parameters
    ----------
    graph : Graph
    memory_format : torch.memory_format
        In which the weights are kept.
    device : str
        ``"cpu"`` or ``"cuda"``, where they lie.

    Raises
    ------
    NotImplementedError
        A node has no module here.
    """

    def __init__(
        self,
        graph: Graph,
        memory_format: torch.memory_format = torch.channels_last,
        *,
        device: str = "cpu",
    ) -> None:
        self.graph, self.nodes, self.device = graph, analysis.path(graph), device
        self._modules = {node.name: _module(node) for node in self.nodes}
        for module in self._modules.values():
            for weight in module.parameters():
                weight.data = weight.data.to(device)
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=memory_format)
        self._producers = {node.outputs[0]: node for node in self.nodes}

    def plain(self) -> Twin:
        """The network itself."""
        return self._twin(self._modules)

    def ruled(self, rule: Rule, *, padding_trick: bool = False) -> Twin:
        """The network with another rule at each ReLU, and RectGrad's padding trick if asked for."""
        return self._with_relus(
            lambda node: Ruled(rule, padding_trick and self._follows_padding(node))
        )

    def rescaled(self) -> Twin:
        """The network for DeepLIFT."""
        return self._with_relus(lambda node: Rescaled())

    def _with_relus(self, make: Callable[[Node], nn.Module]) -> Twin:
        relus = {node.name: make(node) for node in self.nodes if node.op == "Relu"}
        return self._twin(self._modules | relus)

    def _twin(self, modules: Mapping[str, nn.Module]) -> Twin:
        return Twin(self, modules).eval().requires_grad_(False)

    def _follows_padding(self, node: Node) -> bool:
        """Whether it reads a padded convolution with a border and something inside."""
        producer = self._producers.get(node.inputs[0])
        if producer is None or producer.op != "Conv":
            return False
        return any(producer["pads"]) and min(producer.output_shapes[0][2:]) >= 3


class Twin(nn.Module):
    """One network, node by node."""

    def __init__(self, network: Network, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.network = network
        self.steps = nn.ModuleList(modules[node.name] for node in network.nodes)

    def forward(self, x: Tensor) -> Tensor:
        values = {self.network.graph.input: x}
        for node, step in zip(self.network.nodes, self.steps, strict=True):
            values[node.outputs[0]] = step(*(values[v] for v in node.inputs if v in values))
        return values[self.network.graph.logits]


class Ruled(nn.Module):
    """A ReLU with a rule of its own on the way back."""

    def __init__(self, rule: Rule, clears_border: bool) -> None:
        super().__init__()
        self.rule = _clearing_border(rule) if clears_border else rule

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = _RuledReLU.apply(z, self.rule)
        return result


class _RuledReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, rule: Rule) -> Tensor:
        a = z.relu()
        ctx.save_for_backward(a)
        ctx.rule = rule
        return a

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, None]:
        (a,) = ctx.saved_tensors
        return ctx.rule(a, R), None


class Rescaled(nn.Module):
    """A ReLU with DeepLIFT's multiplier; a pass without gradients sets the baseline."""

    def forward(self, z: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            self.baseline = z
            return z.relu()
        result: Tensor = _RuledReLU.apply(z, rescale(z.detach(), self.baseline))
        return result


class Concat(nn.Module):
    """Along the channels."""

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)


def _module(node: Node) -> nn.Module:
    try:
        return _MODULES[node.op](node)
    except KeyError:
        raise NotImplementedError(f"{node} has no module") from None


def _conv(node: Node) -> nn.Module:
    weight, bias = _tensors(node)
    filters, channels = weight.shape[:2]
    conv = nn.Conv2d(
        channels * node["group"],
        filters,
        tuple(node["kernel_shape"]),
        stride=tuple(node["strides"]),
        padding=_padding(node),
        dilation=tuple(node["dilations"]),
        groups=node["group"],
        bias=bias is not None,
        device="meta",
    )
    return _with(conv, weight, bias)


def _gemm(node: Node) -> nn.Module:
    weight, bias = _tensors(node)
    weight = weight if node["transB"] else weight.T.contiguous()
    if node["alpha"] != 1 or node["beta"] != 1 or node["transA"]:
        raise NotImplementedError(f"{node} is no linear layer")
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias is not None, device="meta")
    return _with(linear, weight, bias)


def _with(module: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    module.weight = nn.Parameter(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


def _tensors(node: Node) -> tuple[Tensor, Tensor | None]:
    weight, bias = (*node.constants, None)[1:3]
    if weight is None:
        raise NotImplementedError(f"{node} has no constant weights")
    return torch.tensor(weight), None if bias is None else torch.tensor(bias)


def _max_pool(node: Node) -> nn.Module:
    return nn.MaxPool2d(**_window(node), dilation=tuple(node["dilations"]))


def _average_pool(node: Node) -> nn.Module:
    return nn.AvgPool2d(**_window(node), count_include_pad=bool(node["count_include_pad"]))


def _window(node: Node) -> dict[str, Any]:
    return {
        "kernel_size": tuple(node["kernel_shape"]),
        "stride": tuple(node["strides"]),
        "padding": _padding(node),
        "ceil_mode": bool(node["ceil_mode"]),
    }


def _padding(node: Node) -> tuple[int, int]:
    pads = tuple(node["pads"])
    if len(pads) != 4 or pads[:2] != pads[2:]:
        raise NotImplementedError(f"{node} has pads {pads}")
    return pads[0], pads[1]


_MODULES: dict[str, Callable[[Node], nn.Module]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "Relu": lambda node: nn.ReLU(),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda node: nn.AdaptiveAvgPool2d(1),
    "Concat": lambda node: Concat(),
    "Flatten": lambda node: nn.Flatten(),
    "Dropout": lambda node: nn.Identity(),
}


# --- rules --------------------------------------------------------------------------------------


def kthvalue(scores: Tensor) -> Tensor:
    """The same unit as `tf_nearest`, by selection from below."""
    return scores.kthvalue(scores.shape[1] - _from_top(scores), dim=1).values


def topk(scores: Tensor) -> Tensor:
    """The same unit, by selection from above."""
    return scores.topk(_from_top(scores) + 1, dim=1, sorted=False).values.amin(1)


def quantile(scores: Tensor) -> Tensor:
    """As implementations usually have it: sorted, and interpolated."""
    return torch.quantile(scores, Q / 100, dim=1)


def _from_top(scores: Tensor) -> int:
    return round((scores.shape[1] - 1) * (1 - Q / 100))


def rectify(threshold: Threshold) -> Rule:
    """RectGrad: pass where a · R is above the sample's threshold."""

    def rule(a: Tensor, R: Tensor) -> Tensor:
        score = a * R
        tau = threshold(_rows(score))
        return torch.where(score > tau.view(-1, *[1] * (score.ndim - 1)), R, 0)

    return rule


def guided(a: Tensor, R: Tensor) -> Tensor:
    """Guided backpropagation."""
    return torch.ops.aten.threshold_backward(R.relu(), a, 0)


def deconvolution(a: Tensor, R: Tensor) -> Tensor:
    """Deconvolution."""
    return R.relu()


def epsilon_ratio(a: Tensor, R: Tensor) -> Tensor:
    """ε-LRP; where z < 0, a and so the ratio are 0."""
    return R * (a / (a + EPSILON))


def rescale(z: Tensor, z0: Tensor) -> Rule:
    """DeepLIFT: Δa/Δz, or where Δz is small the ReLU's derivative half-way."""

    def rule(a: Tensor, R: Tensor) -> Tensor:
        dz = z - z0
        half_way = (z + z0 > 0).to(R.dtype)
        return R * torch.where(dz.abs() > 1e-5, (a - z0.relu()) / dz, half_way)

    return rule


def _rows(score: Tensor) -> Tensor:
    """One sample a row, the units in whichever order needs no copy."""
    if score.ndim == 4 and score.is_contiguous(memory_format=torch.channels_last):
        score = score.permute(0, 2, 3, 1)
    return score.flatten(1)


def _clearing_border(rule: Rule) -> Rule:
    def cleared(a: Tensor, R: Tensor) -> Tensor:
        passed = rule(a, R)
        for axis in (2, 3):
            passed.select(axis, 0).zero_()
            passed.select(axis, -1).zero_()
        return passed

    return cleared


# --- contenders ---------------------------------------------------------------------------------


def torch_contenders(
    network: Network, x: np.ndarray, methods: Iterable[str], passes: int, expected: Expected
) -> Iterator[Contender]:
    """PyTorch's own: inference, and every method that it knows.

    Parameters
    ----------
    network : Network
    x : numpy.ndarray, shape (N, C, H, W)
    methods : iterable of str
    passes : int
        Of methods that sum over several points.
    expected : callable
        Method → what computes our map.
    """
    usual = torch.from_numpy(x).to(network.device)
    image = usual.contiguous(memory_format=torch.channels_last)

    def contender(method: str, by: str, call: Call, *rest: Any, **more: Any) -> Contender:
        if network.device == "cuda":
            call = _on_gpu(call, x, (usual, image))
        return Contender(method, by, call, *rest, **more)

    plain = network.plain()
    yield contender("forward", "PyTorch", lambda: _infer(plain, image))
    for method in methods:
        known = expected(method)
        if method == "rectgrad":
            for threshold in (kthvalue, topk):
                twin = network.ruled(rectify(threshold), padding_trick=True)
                call = _positive_product(twin, image)
                yield contender(method, f"PyTorch, {threshold.__name__}", call, expected=known)
            contiguous = Network(network.graph, torch.contiguous_format, device=network.device)
            twin = contiguous.ruled(rectify(quantile), padding_trick=True)
            call = _positive_product(twin, usual)
            yield contender(method, "PyTorch, usual (quantile)", call, expected=known)
        elif method in ("saliency", "input_x_gradient"):
            call = _gradient(plain, image, times_input=method != "saliency")
            yield contender(method, "PyTorch", call, expected=known)
        elif method in _RULES:
            twin = network.ruled(_RULES[method])
            call = _gradient(twin, image, times_input=method == "epsilon_lrp")
            yield contender(method, "PyTorch", call, expected=known)
        elif method == "deeplift":
            call = _deeplift(network.rescaled(), image)
            yield contender(method, "PyTorch", call, expected=known)
        elif method == "integrated_gradients":
            call = _integrated_gradients(plain, image, passes)
            yield contender(method, "PyTorch", call, passes, known)
        elif method == "smoothgrad":
            yield contender(method, "PyTorch", _smoothgrad(plain, image, passes), passes)


_RULES: dict[str, Rule] = {
    "guided_backprop": guided,
    "deconvolution": deconvolution,
    "epsilon_lrp": epsilon_ratio,
}


def _on_gpu(call: Call, x: np.ndarray, inputs: tuple[Tensor, ...]) -> Call:
    """From array to array, as ours: a CUDA graph of the call, or the call itself where none can be.

    Parameters
    ----------
    inputs : tuple of Tensor
        What the call reads on the device, `x` in several memory formats.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    host, run = torch.from_numpy(x).pin_memory(), call
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):  # cuDNN chooses its algorithms
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = call()
    except RuntimeError:  # it waits for the device somewhere
        torch.cuda.synchronize()
    else:

        def run() -> Tensor:
            graph.replay()
            return result

    def whole() -> Tensor:
        for tensor in inputs:
            tensor.copy_(host, non_blocking=True)
        return run().cpu()

    return whole


def _infer(twin: Twin, x: Tensor) -> Tensor:
    with torch.inference_mode():
        result: Tensor = twin(x)
        return result


def _R(twin: Twin, x: Tensor, target: Tensor | None = None) -> Tensor:
    """The gradient of the target's logit, by default the largest, in the same pass."""
    x = x.detach().requires_grad_()
    scores = twin(x)
    chosen = scores.argmax(1) if target is None else target
    (R,) = torch.autograd.grad(scores.gather(1, chosen[:, None]).sum(), x)
    return R


def _gradient(twin: Twin, x: Tensor, *, times_input: bool) -> Callable[[], Tensor]:
    return lambda: x * _R(twin, x) if times_input else _R(twin, x)


def _positive_product(twin: Twin, x: Tensor) -> Callable[[], Tensor]:
    return lambda: (x * _R(twin, x)).clamp_(min=0)


def _deeplift(twin: Twin, x: Tensor) -> Callable[[], Tensor]:
    # The same baseline for all, so one sample is enough; and in every call, so once is.
    _infer(twin, torch.zeros_like(x[:1]))
    return lambda: x * _R(twin, x)


def _integrated_gradients(twin: Twin, x: Tensor, passes: int) -> Callable[[], Tensor]:
    return lambda: x * _mean_R(twin, x, passes, lambda k: x * ((k + 1) / passes))


def _smoothgrad(twin: Twin, x: Tensor, passes: int) -> Callable[[], Tensor]:
    sigma = 0.1 * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    return lambda: _mean_R(twin, x, passes, lambda k: x + sigma * torch.randn_like(x))


def _mean_R(twin: Twin, x: Tensor, passes: int, point: Callable[[int], Tensor]) -> Tensor:
    target = _infer(twin, x).argmax(1)
    together = max(1, _TOGETHER // len(x))
    total = torch.zeros_like(x)
    for start in range(0, passes, together):
        points = [point(k) for k in range(start, min(start + together, passes))]
        R = _R(twin, torch.cat(points), target.repeat(len(points)))
        total += R.unflatten(0, (len(points), len(x))).sum(0)
    return total / passes


def captum_contenders(
    network: Network, x: np.ndarray, methods: Iterable[str], expected: Expected
) -> tuple[list[Contender], list[str]]:
    """Captum's guided backpropagation and DeepLIFT, or a note that it is not installed."""
    try:
        captum = import_module("captum.attr")
    except ImportError:
        return [], ["Captum is not installed, its methods are left out: pip install captum"]
    twin = network.plain()
    image = torch.from_numpy(x).to(network.device, memory_format=torch.channels_last)
    target = _infer(twin, image).argmax(1)

    def attribute(method: Any) -> Callable[[], Tensor]:
        def call() -> Tensor:
            attribution: Tensor = method.attribute(image.detach().requires_grad_(), target=target)
            return attribution.detach().cpu()

        return call

    known = {"guided_backprop": captum.GuidedBackprop, "deeplift": captum.DeepLift}
    return [
        Contender(m, "Captum", attribute(known[m](twin)), expected=expected(m))
        for m in methods
        if m in known
    ], []
