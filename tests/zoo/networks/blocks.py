"""What several families are built of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int] = 1,
    *,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
    eps: float = 1e-5,
    **options: int | tuple[int, int],
) -> nn.Sequential:
    """A convolution without bias, batch normalisation and, if any, an activation."""
    parts: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, bias=False, **options),
        nn.BatchNorm2d(outputs, eps=eps),
    ]
    if activation is not None:
        parts.append(activation())
    return nn.Sequential(*parts)


class Branches(nn.Module):
    """Paths from one input, their results joined along the channels."""

    def __init__(self, *paths: nn.Module) -> None:
        super().__init__()
        self.paths = nn.ModuleList(paths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([path(x) for path in self.paths], dim=1)


class SqueezeExcitation(nn.Module):
    """Channels weighted by a gate of their means (Hu et al. 2018)."""

    def __init__(
        self,
        channels: int,
        squeezed: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        gate: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid,
    ) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.activation = activation()
        self.excite = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = nn.functional.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.excite(self.activation(self.squeeze(means))))


def head(channels: int) -> nn.Sequential:
    """Global average pooling, dropout and the class scores."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, 10)
    )
