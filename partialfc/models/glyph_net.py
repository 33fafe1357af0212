"""A small residual network for drawn characters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StandardConv2d(nn.Conv2d):
    """Convolution with filters of mean 0 and unit gain (weight standardisation, Qiao et al., 2019).

    After a ReLU, all images share a mean activation, which filters of mean 0 do not pass on: images start apart, as
    with batch normalisation, but nothing depends on the batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        scale = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
        return F.conv2d(x, weight / scale * math.sqrt(2.0), None, self.stride, self.padding)


class Block(nn.Module):
    """Pre-activation residual block with group normalisation (He et al., 2016; Wu and He, 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = StandardConv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = StandardConv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(y)))


class GlyphNet(nn.Module):
    """Three stages down to 4×4, residual blocks in the last two, one linear layer: 1.4 million parameters.

    Group normalisation keeps no statistics of the batch, so a run is the same at any number of ranks.

    Args:
        embedding_dim: D of the output [B, D], not normalised.
        channels: of the input [B, channels, image_size, image_size].
        image_size: pixels; the first stride grows with it, so that an image never costs more than one of 32 pixels.
    """

    def __init__(self, embedding_dim: int = 128, channels: int = 1, image_size: int = 32) -> None:
        super().__init__()
        width, blocks_of_stages = 24, (0, 1, 1)
        stride = math.ceil(image_size / 32)
        side = math.ceil(math.ceil(image_size / stride) / 8)  # three stages halve it, rounding up
        layers: list[nn.Module] = [StandardConv2d(channels, width, 3, stride, padding=1, bias=False)]
        for blocks in blocks_of_stages:
            layers += [nn.GroupNorm(8, width), nn.ReLU()]
            layers += [StandardConv2d(width, 2 * width, 3, 2, padding=1, bias=False)]
            width *= 2
            layers += [Block(width) for _ in range(blocks)]
        # No ReLU at the end: it would give all embeddings a common direction, in which they can collapse.
        self.features = nn.Sequential(*layers, nn.GroupNorm(8, width))
        self.embedding = nn.Linear(width * side * side, embedding_dim)
        self.features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images.contiguous(memory_format=torch.channels_last))
        return self.embedding(features.flatten(1))
