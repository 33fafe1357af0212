"""Backbones that train in no time, for ``model.name=tests.small_backbones:NAME``."""

from __future__ import annotations

from torch import nn


def linear(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    """No convolutions, which a CPU does very slowly in float16, and odd sizes, which ranks cannot share evenly."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * image_size**2, 43),
        nn.LayerNorm(43),
        nn.ReLU(),
        nn.Linear(43, embedding_dim),
    )


def normalized(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    """With statistics of the batch."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * image_size**2, 43),
        nn.BatchNorm1d(43),
        nn.ReLU(),
        nn.Linear(43, embedding_dim),
        nn.BatchNorm1d(embedding_dim),
    )
