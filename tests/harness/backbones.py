"""Backbones that train in no time, for ``model.name=tests.harness.backbones:NAME``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


class First(nn.Module):
    """Its first parameter has one element, which only one rank can have, or is not used at all."""

    def __init__(self, embedding_dim: int, numbers: int, used: bool) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(1))
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(numbers, 43), nn.ReLU(), nn.Linear(43, embedding_dim))
        self.used = used

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.net(images)
        return embeddings * self.first if self.used else embeddings


def tiny_first(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    return First(embedding_dim, channels * image_size**2, used=True)


def unused_first(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    return First(embedding_dim, channels * image_size**2, used=False)


def frozen_first(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    """The first layer is not trained."""
    module = linear(embedding_dim, channels, image_size)
    next(module.parameters()).requires_grad_(False)
    return module


def frozen(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    """Nothing is trained."""
    return linear(embedding_dim, channels, image_size).requires_grad_(False)


def looking(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    """Its constructor looks at values, as that of many a published network does."""
    module = linear(embedding_dim, channels, image_size)
    module.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]  # type: ignore[assignment]
    return module


class Guessing(First):
    """Its forward pass looks at values."""

    def forward(self, images: Tensor) -> Tensor:
        embeddings = super().forward(images)
        return embeddings * 2 if embeddings.abs().mean().item() > 1 else embeddings


def guessing(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    return Guessing(embedding_dim, channels * image_size**2, used=True)
