"""Backbones: modules that turn images [B, channels, size, size] into embeddings [B, embedding_dim]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from partialfc.models.glyph_net import GlyphNet
from partialfc.models.iresnet import DEPTHS, IResNet

#: Backbones by the name that configuration files use; each is called with (embedding_dim, channels, image_size).
BY_NAME: dict[str, Callable[[int, int, int], nn.Module]] = {
    "glyph_net": GlyphNet,
    **{f"iresnet{depth}": partial(IResNet, depth) for depth in DEPTHS},
}

__all__ = ["BY_NAME", "GlyphNet", "IResNet"]
