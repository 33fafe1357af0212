"""Backbones that train in no time, for ``model.name=tests.harness.backbones:NAME``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def linear(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    """A network without convolutions, slow on a CPU in float16, and with odd sizes, which ranks cannot share evenly."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * image_size**2, 43),
        nn.LayerNorm(43),
        nn.ReLU(),
        nn.Linear(43, embedding_dim),
    )


def normalized(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    """A network with batch statistics."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * image_size**2, 43),
        nn.BatchNorm1d(43),
        nn.ReLU(),
        nn.Linear(43, embedding_dim),
        nn.BatchNorm1d(embedding_dim),
    )


class Viewing(nn.Module):
    """Its code takes any batch but an empty one, for which -1 has no meaning."""

    def __init__(self, embedding_dim: int, numbers: int) -> None:
        super().__init__()
        self.net = nn.Linear(numbers, embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.net(images.view(len(images), -1))
        return embeddings


def viewing(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    return Viewing(embedding_dim, channels * image_size**2)


class First(nn.Module):
    """A network whose first parameter has one element, which only one rank can hold, or is unused."""

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
    """A network whose first layer is frozen."""
    module = linear(embedding_dim, channels, image_size)
    next(module.parameters()).requires_grad_(False)
    return module


def frozen(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    """A network without trainable parameters."""
    return linear(embedding_dim, channels, image_size).requires_grad_(False)


def looking(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    """A network whose constructor reads values, like many published ones."""
    module = linear(embedding_dim, channels, image_size)
    module.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]  # type: ignore[assignment]
    return module


class Guessing(First):
    """A network whose forward pass reads values."""

    def forward(self, images: Tensor) -> Tensor:
        embeddings = super().forward(images)
        return embeddings * 2 if embeddings.abs().mean().item() > 1 else embeddings


def guessing(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
    return Guessing(embedding_dim, channels * image_size**2, used=True)
