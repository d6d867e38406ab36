"""Residual additions: ResNet, ResNeXt, RegNet."""

from __future__ import annotations

import torch
from torch import nn

from .blocks import SqueezeExcitation, conv_bn, head


class Residual(nn.Module):
    """The block's result added to its input, which is projected where their shapes differ."""

    def __init__(self, body: nn.Module, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = body
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same else conv_bn(inputs, outputs, stride=stride, activation=None)
        )
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def basic(inputs: int, outputs: int, stride: int = 1) -> Residual:
    body = nn.Sequential(
        conv_bn(inputs, outputs, 3, stride=stride, padding=1),
        conv_bn(outputs, outputs, 3, padding=1, activation=None),
    )
    return Residual(body, inputs, outputs, stride)


def bottleneck(
    inputs: int, inner: int, outputs: int, stride: int = 1, groups: int = 1, squeezed: int = 0
) -> Residual:
    body = nn.Sequential(
        conv_bn(inputs, inner),
        conv_bn(inner, inner, 3, stride=stride, padding=1, groups=groups),
        SqueezeExcitation(inner, squeezed) if squeezed else nn.Identity(),
        conv_bn(inner, outputs, activation=None),
    )
    return Residual(body, inputs, outputs, stride)


class ResNet(nn.Sequential):
    """He et al. 2016, with blocks of two and of three convolutions."""

    def __init__(self) -> None:
        super().__init__(
            conv_bn(3, 8, 7, stride=2, padding=3),
            nn.MaxPool2d(3, stride=2, padding=1),
            basic(8, 8),
            basic(8, 16, stride=2),
            bottleneck(16, 8, 32),
            Residual(conv_bn(32, 32, 3, padding=1, activation=None), 32, 32),
            head(32),
        )


class ResNeXt(nn.Sequential):
    """Xie et al. 2017: grouped convolutions."""

    def __init__(self) -> None:
        super().__init__(
            conv_bn(3, 8, 3, padding=1),
            nn.MaxPool2d(3, stride=2, padding=1),
            bottleneck(8, 16, 32, groups=4),
            bottleneck(32, 16, 32, stride=2, groups=8),
            head(32),
        )


class RegNet(nn.Sequential):
    """Radosavovic et al. 2020, RegNetY: grouped, with squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__(
            conv_bn(3, 16, 3, stride=2, padding=1),
            bottleneck(16, 24, 24, stride=2, groups=3, squeezed=12),
            bottleneck(24, 24, 24, groups=3, squeezed=12),
            head(24),
        )
