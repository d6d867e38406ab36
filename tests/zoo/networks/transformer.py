"""Tokens and channels last: ConvNeXt, ViT, Swin, MLP-Mixer."""

from __future__ import annotations

import torch
from torch import nn


def _mlp(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) → (N, H·W, C)."""
    return x.flatten(2).transpose(1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (N, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _mlp(width, 4 * width)
        self.scale = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.scale * self.mlp(self.norm(self.spatial(x).permute(0, 2, 3, 1)))
        return x + inner.permute(0, 3, 1, 2)


class ConvNeXt(nn.Sequential):
    """Liu et al. 2022."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 4, stride=4),
            ChannelNorm(12, eps=1e-6),
            _ConvNeXtBlock(12),
            _ConvNeXtBlock(12),
            ChannelNorm(12, eps=1e-6),
            nn.Conv2d(12, 20, 2, stride=2),
            _ConvNeXtBlock(20),
            nn.AdaptiveAvgPool2d(1),
            ChannelNorm(20, eps=1e-6),
            nn.Flatten(),
            nn.Linear(20, 10),
        )


class _EncoderBlock(nn.Module):
    """Normalised before attention and before the perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _mlp(width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Dosovitskiy et al. 2021: a class token and learnt positions."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.5)
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.5)
        self.blocks = nn.Sequential(_EncoderBlock(width, 4), _EncoderBlock(width, 3))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.scores = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        token = self.token.expand(x.shape[0], -1, -1)
        x = torch.cat([token, _tokens(self.embed(x))], dim=1) + self.positions
        return self.scores(self.norm(self.blocks(x))[:, 0])


class _WindowAttention(nn.Module):
    """Attention in windows, which may be shifted, with a bias for relative positions."""

    def __init__(self, width: int, heads: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.biases = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        places = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ).flatten(1)
        apart = places[:, :, None] - places[:, None] + window - 1
        self.register_buffer("relative", apart[0] * (2 * window - 1) + apart[1])
        region = torch.bucketize(
            torch.arange(size), torch.tensor([size - window, size - shift]), right=True
        )
        regions = self._windows((region[:, None] * 3 + region)[None, ..., None]).squeeze(-1)
        apart = regions[:, None, :] != regions[:, :, None]
        self.register_buffer("mask", apart * -100.0 if shift else None)

    def _windows(self, x: torch.Tensor) -> torch.Tensor:
        """(N, H, W, C) → (N · windows, cells, C)."""
        n, height, width, channels = x.shape
        size = self.window
        x = x.view(n, height // size, size, width // size, size, channels)
        return x.transpose(2, 3).reshape(-1, size * size, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, height, width, channels = x.shape
        size, heads = self.window, self.heads
        windows = self._windows(torch.roll(x, (-self.shift, -self.shift), (1, 2)))
        qkv = self.qkv(windows).view(-1, size * size, 3, heads, channels // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * (channels // heads) ** -0.5 @ k.transpose(-2, -1)
        bias = self.biases[self.relative.view(-1)].view(size * size, size * size, heads)
        scores = scores + bias.permute(2, 0, 1).unsqueeze(0)
        if self.mask is not None:
            count = self.mask.shape[0]
            scores = scores.view(n, count, heads, size * size, size * size)
            scores = (scores + self.mask[:, None].to(scores)).view(
                -1, heads, size * size, size * size
            )
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, size * size, channels)
        mixed = self.project(mixed)
        mixed = mixed.view(n, height // size, width // size, size, size, channels)
        mixed = mixed.transpose(2, 3).reshape(n, height, width, channels)
        return torch.roll(mixed, (self.shift, self.shift), (1, 2))


class _SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, size: int, shift: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _WindowAttention(width, heads, size, 4, shift)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _mlp(width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _PatchMerging(nn.Module):
    """Each 2×2 cells joined, normalised and reduced; channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduce(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    """Liu et al. 2021."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        self.norm1 = nn.LayerNorm(width)
        self.blocks = nn.Sequential(
            _SwinBlock(width, 4, 16, 0),
            _SwinBlock(width, 4, 16, 2),
            _PatchMerging(width),
            _SwinBlock(2 * width, 8, 8, 0),
            _SwinBlock(2 * width, 8, 8, 2),
        )
        self.norm2 = nn.LayerNorm(2 * width)
        self.scores = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.embed(x).permute(0, 2, 3, 1))
        return self.scores(self.norm2(self.blocks(x)).mean((1, 2)))


class _MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across, self.along = _mlp(tokens, 2 * tokens), _mlp(width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.norm2(x))


class MLPMixer(nn.Module):
    """Tolstikhin et al. 2021."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, stride=8)
        self.blocks = nn.Sequential(_MixerBlock(16, width), _MixerBlock(16, width))
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(self.norm(self.blocks(_tokens(self.embed(x)))).mean(1))
