"""Backbones: modules that turn images [B, channels, size, size] into embeddings [B, embedding_dim].

Imports torch, ``options`` and ``errors``. ``config`` and the rooms above may import it; ``head`` and ``losses`` do not.
"""

from __future__ import annotations

from partialfc.models.build import build, check, is_external, require_trust, spelled_out
from partialfc.models.by_name import BY_NAME
from partialfc.models.glyph_net import GlyphNet
from partialfc.models.iresnet import IResNet
from partialfc.models.mobilefacenet import MobileFaceNet
from partialfc.models.vit import VisionTransformer

__all__ = [
    "BY_NAME",
    "GlyphNet",
    "IResNet",
    "MobileFaceNet",
    "VisionTransformer",
    "build",
    "check",
    "is_external",
    "require_trust",
    "spelled_out",
]
