"""Depthwise convolutions: MobileNet V1 to V3, ShuffleNet V2, EfficientNet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .blocks import SqueezeExcitation, conv_bn, head


def _depthwise(
    channels: int,
    kernel: int = 3,
    stride: int = 1,
    activation: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    return conv_bn(
        channels,
        channels,
        kernel,
        stride=stride,
        padding=kernel // 2,
        groups=channels,
        activation=activation,
    )


class MobileNetV1(nn.Sequential):
    """Howard et al. 2017."""

    def __init__(self) -> None:
        parts = [conv_bn(3, 8, 3, stride=2, padding=1)]
        for inputs, outputs, stride in ((8, 12, 1), (12, 16, 2), (16, 16, 1), (16, 24, 2)):
            parts += [
                _depthwise(inputs, stride=stride, activation=nn.ReLU),
                conv_bn(inputs, outputs),
            ]
        super().__init__(*parts, head(24))


class InvertedResidual(nn.Module):
    """Expanded, convolved channel by channel, projected; added where the shape stays."""

    def __init__(
        self,
        inputs: int,
        inner: int,
        outputs: int,
        activation: Callable[[], nn.Module],
        *,
        kernel: int = 3,
        stride: int = 1,
        gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, inner, activation=activation) if inner != inputs else nn.Identity(),
            _depthwise(inner, kernel, stride, activation),
            gate or nn.Identity(),
            conv_bn(inner, outputs, activation=None),
        )
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.adds else self.body(x)


class MobileNetV2(nn.Sequential):
    """Sandler et al. 2018: ReLU6."""

    def __init__(self) -> None:
        super().__init__(
            conv_bn(3, 8, 3, stride=2, padding=1, activation=nn.ReLU6),
            InvertedResidual(8, 8, 8, nn.ReLU6),
            InvertedResidual(8, 32, 12, nn.ReLU6, stride=2),
            InvertedResidual(12, 48, 12, nn.ReLU6),
            conv_bn(12, 32, activation=nn.ReLU6),
            conv_bn(32, 32, activation=nn.ReLU6),
            head(32),
        )


class MobileNetV3(nn.Sequential):
    """Howard et al. 2019: ReLU and hard swish, gates of hard sigmoids as the authors spell them."""

    def __init__(self) -> None:
        def hard_sigmoid(x: torch.Tensor) -> torch.Tensor:
            return nn.functional.relu6(x + 3) / 6

        def gate(channels: int) -> SqueezeExcitation:
            return SqueezeExcitation(channels, 16, gate=hard_sigmoid)

        super().__init__(
            conv_bn(3, 8, 3, stride=2, padding=1, activation=nn.Hardswish),
            InvertedResidual(8, 8, 8, nn.ReLU, stride=2, gate=gate(8)),
            InvertedResidual(8, 32, 12, nn.ReLU),
            InvertedResidual(12, 32, 12, nn.Hardswish, kernel=5, gate=gate(32)),
            conv_bn(12, 32, activation=nn.Hardswish),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 48),
            nn.Hardswish(),
            nn.Dropout(0.2),
            nn.Linear(48, 10),
        )


class _Shuffled(nn.Module):
    """Half of the channels convolved, or all where the picture is halved; then all are shuffled."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.split = stride == 1
        taken = half if self.split else inputs
        self.left = (
            nn.Identity()
            if self.split
            else nn.Sequential(_depthwise(inputs, stride=stride), conv_bn(inputs, half))
        )
        self.right = nn.Sequential(
            conv_bn(taken, half), _depthwise(half, stride=stride), conv_bn(half, half)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=1) if self.split else (x, x)
        joined = torch.cat([self.left(left), self.right(right)], dim=1)
        n, channels, height, width = joined.shape
        grouped = joined.view(n, 2, channels // 2, height, width)
        return grouped.transpose(1, 2).reshape(n, channels, height, width)


class ShuffleNetV2(nn.Sequential):
    """Ma et al. 2018."""

    def __init__(self) -> None:
        super().__init__(
            conv_bn(3, 8, 3, stride=2, padding=1),
            nn.MaxPool2d(3, stride=2, padding=1),
            _Shuffled(8, 16, 2),
            _Shuffled(16, 16, 1),
            _Shuffled(16, 16, 1),
            conv_bn(16, 32),
            head(32),
        )


class EfficientNet(nn.Sequential):
    """Tan & Le 2019: SiLU, in the squeeze too, and gates of sigmoids."""

    def __init__(self) -> None:
        def block(inputs: int, inner: int, outputs: int, kernel: int, stride: int) -> nn.Module:
            gate = SqueezeExcitation(inner, 12, nn.SiLU)
            return InvertedResidual(
                inputs, inner, outputs, nn.SiLU, kernel=kernel, stride=stride, gate=gate
            )

        super().__init__(
            conv_bn(3, 8, 3, stride=2, padding=1, activation=nn.SiLU),
            block(8, 8, 8, 3, 1),
            block(8, 32, 12, 5, 2),
            block(12, 36, 12, 3, 1),
            conv_bn(12, 32, activation=nn.SiLU),
            head(32),
        )
