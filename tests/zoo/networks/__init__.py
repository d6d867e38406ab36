"""Classifiers of the usual families in PyTorch: every kind of block, few of each, and narrow.

All take pictures (N, 3, H, W), `text.LSTMClassifier` embedded words (N, T, 12), and return 10
scores. An activation is a module that is used once, so that a hook stands for exactly one layer;
gates are functions.
Scalars are such as float32 has exactly, because exporters write them so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from . import convolutional, inception, mobile, residual, text, transformer


@dataclass(frozen=True)
class Network:
    """How a network is made, fed and exported.

    Attributes
    ----------
    make : callable
        Returns the module, with random weights.
    shape : tuple of int
        Of one sample.
    opset : int
        For the exporter by tracing.
    layers : int
        How many activations are thresholded.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    opset: int
    layers: int

    def build(self) -> nn.Module:
        """The module for inference, with batch statistics that are not the initial ones."""
        torch.manual_seed(0)
        net = self.make().eval()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.2)
                nn.init.normal_(part.running_mean, 0, 0.1)
                nn.init.uniform_(part.running_var, 0.1, 0.4)
            elif isinstance(part, nn.LayerNorm):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.2)
        return net


NETWORKS = {
    "VGG": Network(convolutional.VGG, (3, 32, 32), 11, 7),
    "DenseNet": Network(convolutional.DenseNet, (3, 32, 32), 12, 11),
    "SqueezeNet": Network(convolutional.SqueezeNet, (3, 48, 48), 13, 8),
    "ResNet": Network(residual.ResNet, (3, 32, 32), 14, 9),
    "ResNeXt": Network(residual.ResNeXt, (3, 32, 32), 15, 7),
    "RegNet": Network(residual.RegNet, (3, 32, 32), 16, 9),
    "GoogLeNet": Network(inception.GoogLeNet, (3, 48, 48), 17, 15),
    "InceptionV3": Network(inception.InceptionV3, (3, 75, 75), 18, 40),
    "InceptionV4": Network(inception.InceptionV4, (3, 75, 75), 19, 42),
    "InceptionResNet": Network(inception.InceptionResNet, (3, 75, 75), 20, 31),
    "MobileNetV1": Network(mobile.MobileNetV1, (3, 32, 32), 11, 9),
    "MobileNetV2": Network(mobile.MobileNetV2, (3, 32, 32), 12, 8),
    "MobileNetV3": Network(mobile.MobileNetV3, (3, 32, 32), 14, 10),
    "ShuffleNetV2": Network(mobile.ShuffleNetV2, (3, 32, 32), 13, 9),
    "EfficientNet": Network(mobile.EfficientNet, (3, 32, 32), 15, 10),
    "ConvNeXt": Network(transformer.ConvNeXt, (3, 32, 32), 16, 3),
    "ViT": Network(transformer.ViT, (3, 32, 32), 17, 2),
    "Swin": Network(transformer.Swin, (3, 32, 32), 18, 4),
    "MLPMixer": Network(transformer.MLPMixer, (3, 32, 32), 19, 4),
    "LSTM": Network(text.LSTMClassifier, (9, 12), 14, 1),
}
