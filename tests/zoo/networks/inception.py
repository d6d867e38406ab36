"""Parallel paths: GoogLeNet, Inception V3, Inception V4, Inception-ResNet."""

from __future__ import annotations

import torch
from torch import nn

from .blocks import Branches, conv_bn, head


def _cell(
    inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, **options: int
) -> nn.Sequential:
    """As in the authors' code: eps 1e-3; padding that keeps the size, unless there is a stride."""
    if "stride" not in options and "valid" not in options:
        sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
        options["padding"] = tuple(size // 2 for size in sizes)
    options.pop("valid", None)
    return conv_bn(inputs, outputs, kernel, eps=1e-3, **options)


def _chain(inputs: int, *cells: tuple[int, int | tuple[int, int]], **last: int) -> nn.Sequential:
    """Cells of (channels, kernel); the options are the last one's."""
    parts = []
    for i, (outputs, kernel) in enumerate(cells):
        parts.append(_cell(inputs, outputs, kernel, **(last if i == len(cells) - 1 else {})))
        inputs = outputs
    return nn.Sequential(*parts)


class GoogLeNet(nn.Sequential):
    """Szegedy et al. 2015, with local response normalisation and without batch normalisation."""

    def __init__(self) -> None:
        def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
            padding = kernel // 2
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding), nn.ReLU()
            )

        def module(inputs: int) -> Branches:
            return Branches(
                conv(inputs, 6),
                nn.Sequential(conv(inputs, 6), conv(6, 8, 3)),
                nn.Sequential(conv(inputs, 2), conv(2, 4, 5)),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv(inputs, 4)),
            )

        super().__init__(
            conv(3, 8, 7, stride=2),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            nn.LocalResponseNorm(5, alpha=0.125, beta=0.75, k=1.0),
            conv(8, 8),
            conv(8, 12, 3),
            nn.LocalResponseNorm(5, alpha=0.125, beta=0.75, k=1.0),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            module(12),
            module(22),
            head(22),
        )


class InceptionV3(nn.Sequential):
    """Szegedy et al. 2016: every module once."""

    def __init__(self) -> None:
        pooled = nn.AvgPool2d(3, stride=1, padding=1)
        super().__init__(
            _cell(3, 6, 3, stride=2),
            _cell(6, 6, 3, valid=1),
            _cell(6, 8, 3),
            nn.MaxPool2d(3, stride=2),
            _cell(8, 8),
            Branches(  # A
                _cell(8, 6),
                _chain(8, (4, 1), (6, 5)),
                _chain(8, (4, 1), (6, 3), (6, 3)),
                nn.Sequential(pooled, _cell(8, 4)),
            ),
            Branches(  # B
                _cell(22, 8, 3, stride=2),
                _chain(22, (4, 1), (6, 3), (6, 3), stride=2),
                nn.MaxPool2d(3, stride=2),
            ),
            Branches(  # C
                _cell(36, 8),
                _chain(36, (6, 1), (6, (1, 7)), (8, (7, 1))),
                _chain(36, (6, 1), (6, (7, 1)), (6, (1, 7)), (6, (7, 1)), (8, (1, 7))),
                nn.Sequential(pooled, _cell(36, 8)),
            ),
            Branches(  # D
                _chain(32, (6, 1), (8, 3), stride=2),
                _chain(32, (6, 1), (6, (1, 7)), (6, (7, 1)), (8, 3), stride=2),
                nn.MaxPool2d(3, stride=2),
            ),
            Branches(  # E
                _cell(48, 10),
                nn.Sequential(_cell(48, 8), Branches(_cell(8, 8, (1, 3)), _cell(8, 8, (3, 1)))),
                nn.Sequential(
                    _chain(48, (8, 1), (8, 3)),
                    Branches(_cell(8, 8, (1, 3)), _cell(8, 8, (3, 1))),
                ),
                nn.Sequential(pooled, _cell(48, 8)),
            ),
            nn.AdaptiveAvgPool2d(1),
            nn.Dropout(),
            nn.Flatten(),
            nn.Linear(50, 10),
        )


class InceptionV4(nn.Sequential):
    """Szegedy et al. 2017: every module once; borders do not count in averages."""

    def __init__(self) -> None:
        pooled = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        super().__init__(
            _cell(3, 6, 3, stride=2),
            _cell(6, 6, 3, valid=1),
            _cell(6, 8, 3),
            Branches(nn.MaxPool2d(3, stride=2), _cell(8, 8, 3, stride=2)),
            Branches(
                _chain(16, (6, 1), (8, 3), valid=1),
                _chain(16, (6, 1), (6, (1, 7)), (6, (7, 1)), (8, 3), valid=1),
            ),
            Branches(_cell(16, 8, 3, stride=2), nn.MaxPool2d(3, stride=2)),
            Branches(  # A
                _cell(24, 8),
                _chain(24, (6, 1), (8, 3)),
                _chain(24, (6, 1), (8, 3), (8, 3)),
                nn.Sequential(pooled, _cell(24, 8)),
            ),
            Branches(  # reduction A
                _cell(32, 8, 3, stride=2),
                _chain(32, (6, 1), (6, 3), (8, 3), stride=2),
                nn.MaxPool2d(3, stride=2),
            ),
            Branches(  # B
                _cell(48, 8),
                _chain(48, (6, 1), (6, (1, 7)), (8, (7, 1))),
                _chain(48, (6, 1), (6, (7, 1)), (6, (1, 7)), (6, (7, 1)), (8, (1, 7))),
                nn.Sequential(pooled, _cell(48, 8)),
            ),
            Branches(  # C
                _cell(32, 8),
                nn.Sequential(_cell(32, 8), Branches(_cell(8, 6, (1, 3)), _cell(8, 6, (3, 1)))),
                nn.Sequential(
                    _chain(32, (8, 1), (8, (1, 3)), (8, (3, 1))),
                    Branches(_cell(8, 6, (3, 1)), _cell(8, 6, (1, 3))),
                ),
                nn.Sequential(pooled, _cell(32, 8)),
            ),
            head(40),
        )


class _Scaled(nn.Module):
    """A residual block whose result is scaled down before it is added."""

    def __init__(self, channels: int, body: Branches, width: int, scale: float) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Conv2d(width, channels, 1)
        self.scale = scale
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(x + self.scale * self.linear(self.body(x)))


class InceptionResNet(nn.Sequential):
    """Szegedy et al. 2017, Inception-ResNet-v2: every module once."""

    def __init__(self) -> None:
        super().__init__(
            _cell(3, 6, 3, stride=2),
            _cell(6, 6, 3, valid=1),
            _cell(6, 8, 3),
            nn.MaxPool2d(3, stride=2),
            _cell(8, 8),
            _cell(8, 12, 3, valid=1),
            nn.MaxPool2d(3, stride=2),
            _Scaled(
                12,
                Branches(
                    _cell(12, 4), _chain(12, (4, 1), (4, 3)), _chain(12, (4, 1), (6, 3), (8, 3))
                ),
                16,
                0.1875,
            ),
            Branches(  # reduction A
                _cell(12, 12, 3, stride=2),
                _chain(12, (6, 1), (6, 3), (8, 3), stride=2),
                nn.MaxPool2d(3, stride=2),
            ),
            _Scaled(
                32, Branches(_cell(32, 8), _chain(32, (6, 1), (7, (1, 7)), (8, (7, 1)))), 16, 0.125
            ),
            Branches(  # reduction B
                _chain(32, (8, 1), (12, 3), valid=1),
                _chain(32, (8, 1), (8, 3), (12, 3), valid=1),
                nn.AvgPool2d(3, stride=1),
            ),
            _Scaled(
                56, Branches(_cell(56, 8), _chain(56, (6, 1), (7, (1, 3)), (8, (3, 1)))), 16, 0.25
            ),
            head(56),
        )
