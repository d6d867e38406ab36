"""Chains of convolutions and concatenations: VGG, DenseNet, SqueezeNet."""

from __future__ import annotations

import torch
from torch import nn

from .blocks import Branches, head


class VGG(nn.Sequential):
    """Simonyan & Zisserman 2015: 3×3 convolutions with bias, three dense layers."""

    def __init__(self) -> None:
        convolutions: list[nn.Module] = []
        for inputs, outputs in ((3, 8), (8, 8), (8, 16), (16, 16), (16, 16)):
            convolutions += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            if outputs == inputs:
                convolutions.append(nn.MaxPool2d(2))
        super().__init__(
            *convolutions,
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 48),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(48, 48),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(48, 10),
        )


class _DenseLayer(nn.Sequential):
    """Normalised before it is convolved; its result is appended to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, super().forward(x)], 1)


class DenseNet(nn.Sequential):
    """Huang et al. 2017."""

    def __init__(self, growth: int = 6) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            _DenseLayer(12, growth),
            _DenseLayer(18, growth),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 12, 1, bias=False),
            nn.AvgPool2d(2),
            _DenseLayer(12, growth),
            _DenseLayer(18, growth),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            head(24),
        )


def _fire(inputs: int, squeezed: int, expanded: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, squeezed, 1),
        nn.ReLU(),
        Branches(
            nn.Sequential(nn.Conv2d(squeezed, expanded, 1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(squeezed, expanded, 3, padding=1), nn.ReLU()),
        ),
    )


class SqueezeNet(nn.Sequential):
    """Iandola et al. 2016, version 1.1: the classifier is a convolution."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 3, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            _fire(12, 6, 10),
            _fire(20, 8, 12),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            nn.Dropout(),
            nn.Conv2d(24, 10, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
