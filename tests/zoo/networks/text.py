"""Recurrent: a classifier of embedded words."""

from __future__ import annotations

import torch
from torch import nn


class LSTMClassifier(nn.Module):
    """Two layers in both directions, the mean over time, a dense layer with tanh."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, width, num_layers=2, bidirectional=True, batch_first=True)
        self.dense = nn.Linear(2 * width, 48)
        self.activation = nn.Tanh()
        self.scores = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(x)
        return self.scores(self.activation(self.dense(states.mean(1))))
