"""Verify RectGrad in PyTorch: one correct implementation, and the mistakes that people make.

    python examples/verify/pytorch_rectgrad.py [NAME ...]

Every implementation explains the same images with the package's CIFAR-10 network;
`rectgrad_ref.verify` says what each does otherwise. Needs PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from rectgrad_ref.onnx_models.cifar10_cnn import network_path
from rectgrad_ref.verify import Bundle, compare, diagnose, engine_of, make
from rectgrad_ref.verify.adapters import from_torch

Tensor = torch.Tensor
Rule = Callable[[Tensor, Tensor], Tensor]  # a, R_out → R_in
Q = 98.0


# --- a correct implementation ---------------------------------------------------------------------


def tau_of(scores: Tensor, q: float = Q) -> Tensor:
    """The q-th percentile of each row: nearest rank, counted from the largest score."""
    n = scores.shape[1]
    index = round((n - 1) * (1.0 - q / 100.0))  # Python, too, rounds halves to even
    return scores.sort(dim=1, descending=True).values[:, index]


def rectgrad(a: Tensor, R: Tensor) -> Tensor:
    """Only units of importance a·R above their sample's threshold pass the gradient."""
    scores = (a * R).flatten(1)
    mask = scores > tau_of(scores)[:, None]
    return torch.where(mask.view_as(R), R, 0)


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, rule: Rule) -> Tensor:
        a = z.clamp(min=0)
        ctx.save_for_backward(a)
        ctx.rule = rule
        return a

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (a,) = ctx.saved_tensors
        return ctx.rule(a, R), None


class RuleReLU(nn.ReLU):
    """A ReLU with a backward rule of its own."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, z: Tensor) -> Tensor:
        """max(z, 0)."""
        result: Tensor = _Rectify.apply(z, self.rule)
        return result


class BorderConv2d(nn.Conv2d):
    """A convolution with the padding trick: the gradient along its output's border is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        """The convolution."""
        y: Tensor = super().forward(x)
        if y.requires_grad:
            y.register_hook(without_border)
        return y


def without_border(R: Tensor) -> Tensor:
    """R with zeros in the first and last cell of both spatial axes."""
    result = torch.zeros_like(R)
    result[..., 1:-1, 1:-1] = R[..., 1:-1, 1:-1]
    return result


def network(activation: Callable[[], nn.Module], trick: bool = True) -> nn.Sequential:
    """The paper's CIFAR-10 network with the package's weights."""
    conv = BorderConv2d if trick else nn.Conv2d
    model = nn.Sequential(
        *(conv(3, 32, 3, padding=1), activation(), conv(32, 32, 3, padding=1), activation()),
        nn.MaxPool2d(2),
        *(conv(32, 64, 3, padding=1), activation(), conv(64, 64, 3, padding=1), activation()),
        nn.MaxPool2d(2),
        *(nn.Flatten(), nn.Linear(4096, 256), activation(), nn.Linear(256, 10)),
    )
    file = onnx.load(network_path())
    weights = {t.name: numpy_helper.to_array(t) for t in file.graph.initializer}
    names = ("conv1", "conv2", "conv3", "conv4", "dense1", "dense2")
    layers = [m for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
    for name, layer in zip(names, layers, strict=True):
        weight = torch.from_numpy(weights[f"{name}.weight"].copy())
        layer.weight.data = weight.T if isinstance(layer, nn.Linear) else weight
        layer.bias.data = torch.from_numpy(weights[f"{name}.bias"].copy())
    return model.eval()


def gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """What arrives at the input from 1 at each sample's target."""
    scores = model(x).gather(1, target[:, None])
    (R,) = torch.autograd.grad(scores.sum(), x)
    return R


# --- mistakes -------------------------------------------------------------------------------------


def over_the_batch(a: Tensor, R: Tensor) -> Tensor:
    """The percentile of all samples together."""
    scores = a * R
    return torch.where(scores > tau_of(scores.view(1, -1)), R, 0)


def interpolating(a: Tensor, R: Tensor) -> Tensor:
    """`torch.quantile` and `numpy.percentile` interpolate linearly by default."""
    scores = (a * R).flatten(1)
    tau = np.percentile(scores.double().numpy(), Q, axis=1)
    mask = scores.double() > torch.from_numpy(tau)[:, None]
    return torch.where(mask.view_as(R), R, 0)


def not_strict(a: Tensor, R: Tensor) -> Tensor:
    """≥ also passes the unit at the threshold; where that is 0, all dead units."""
    scores = (a * R).flatten(1)
    mask = scores >= tau_of(scores)[:, None]
    return torch.where(mask.view_as(R), R, 0)


def absolute(a: Tensor, R: Tensor) -> Tensor:
    """Scores |a·R| also pass units that speak against the class."""
    scores = (a * R).abs().flatten(1)
    mask = scores > tau_of(scores)[:, None]
    return torch.where(mask.view_as(R), R, 0)


def extra_relu_mask(a: Tensor, R: Tensor) -> Tensor:
    """≥ with the ReLU's own derivative multiplied in: dead units stay dead."""
    return not_strict(a, R) * (a > 0)


def by_gradient(a: Tensor, R: Tensor) -> Tensor:
    """The scores are R, not a·R."""
    scores = R.flatten(1)
    mask = scores > tau_of(scores)[:, None]
    return torch.where(mask.view_as(R), R, 0)


class SplittingPool(nn.Module):
    """Max pooling whose gradient is shared among equal maxima."""

    def forward(self, x: Tensor) -> Tensor:
        """`amax` over 2×2 windows, which PyTorch differentiates in that way."""
        n, c, h, w = x.shape
        windows = x.view(n, c, h // 2, 2, w // 2, 2)
        return windows.amax(dim=(3, 5))


class FunctionalNetwork(nn.Module):
    """`torch.relu` is no module, so hooks on `nn.ReLU` never fire."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList(m for m in layers if not isinstance(m, nn.ReLU))

    def forward(self, x: Tensor) -> Tensor:
        """The same scores."""
        for layer in self.layers:
            last = layer is self.layers[-1]
            x = layer(x)
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and not last:
                x = torch.relu(x)
        return x


# --- implementations: a model, and a function that explains ---------------------------------------

Implementation = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]


def with_rule(rule: Rule, trick: bool = True) -> Implementation:
    """RectGrad with another backward rule at the ReLUs."""
    model = network(lambda: RuleReLU(rule), trick)
    return model, lambda x, target: (x * gradient(model, x, target)).clamp(min=0)


def without_times_input() -> Implementation:
    """R itself."""
    model = network(lambda: RuleReLU(rectgrad))
    return model, lambda x, target: gradient(model, x, target)


def without_final_threshold() -> Implementation:
    """x·R with its negative values."""
    model = network(lambda: RuleReLU(rectgrad))
    return model, lambda x, target: x * gradient(model, x, target)


def hooks_that_never_fire() -> Implementation:
    """The rule is hooked to modules that do not exist."""
    model = FunctionalNetwork(network(nn.ReLU, trick=False))
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_full_backward_hook(lambda *_: None)
    return model, lambda x, target: x * gradient(model, x, target)


def splitting_ties() -> Implementation:
    """Another gradient of max pooling."""
    model = network(lambda: RuleReLU(rectgrad))
    for i, module in enumerate(model):
        if isinstance(module, nn.MaxPool2d):
            model[i] = SplittingPool()
    return model, lambda x, target: (x * gradient(model, x, target)).clamp(min=0)


def dense_layer_missing() -> Implementation:
    """The rule is applied to convolutions only."""
    model = network(lambda: RuleReLU(rectgrad))
    model[-2] = nn.ReLU()
    return model, lambda x, target: (x * gradient(model, x, target)).clamp(min=0)


def softmax_seed() -> Implementation:
    """The probability is differentiated, not the logit."""
    model = network(lambda: RuleReLU(rectgrad))
    headed = nn.Sequential(*model, nn.Softmax(dim=1))
    return model, lambda x, target: (x * gradient(headed, x, target)).clamp(min=0)


IMPLEMENTATIONS: dict[str, tuple[Callable[[], Implementation], str | None]] = {
    "correct": (lambda: with_rule(rectgrad), None),
    "batch percentile": (lambda: with_rule(over_the_batch), "scope=batch"),
    "linear interpolation": (lambda: with_rule(interpolating), "percentile=linear"),
    "not strict": (lambda: with_rule(not_strict), "strictness=>="),
    "absolute scores": (lambda: with_rule(absolute), "propagation_rule=PR2"),
    "gradient scores": (lambda: with_rule(by_gradient), "propagation_rule=PR4"),
    "no padding trick": (lambda: with_rule(rectgrad, trick=False), "padding_trick=False"),
    "no × input": (without_times_input, "times_input=False"),
    "no final threshold": (without_final_threshold, "final_threshold=False"),
    "hooks that never fire": (hooks_that_never_fire, "gradient × input"),
    "ties split": (splitting_ties, "maxpool_ties=split"),
    "dense layer missing": (dense_layer_missing, "no hook at dense layers"),
    "softmax seed": (softmax_seed, "output_seed=softmax"),
    "extra ReLU mask": (lambda: with_rule(extra_relu_mask), "strict_relu=True"),
}
"""Name → how to make it, and the deviation that the diagnosis has to name."""


def images() -> np.ndarray:
    """Two crops of scikit-image's photographs, as the network takes them: (2, 3, 32, 32)."""
    from PIL import Image
    from skimage import data

    pictures = [
        Image.fromarray(np.asarray(photo())).crop(box).resize((32, 32))
        for photo, box in ((data.chelsea, (105, 60, 345, 300)), (data.rocket, (190, 60, 430, 300)))
    ]
    return (np.stack(pictures).transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)


def reference() -> Bundle:
    """What every implementation is compared with."""
    return make(network_path(), images(), q=Q)


def main(names: list[str]) -> None:
    """Print what the diagnosis says of each implementation."""
    bundle = reference()
    engine = engine_of(bundle)
    for name in names or IMPLEMENTATIONS:
        model, attribute = IMPLEMENTATIONS[name][0]()
        theirs = from_torch(attribute, bundle, model)
        comparison = compare(bundle, theirs, engine)
        print(f"\n{name}: {'agrees' if comparison.agrees else 'differs'}")
        for sentence in diagnose(comparison).sentences:
            print(f"  {sentence}")


if __name__ == "__main__":
    main(sys.argv[1:])
