"""The backbones that come with the package, by the names that configuration files use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from partialfc.models import mobilefacenet, vit
from partialfc.models.glyph_net import GlyphNet
from partialfc.models.iresnet import DEPTHS, IResNet
from partialfc.models.mobilefacenet import MobileFaceNet
from partialfc.models.vit import VisionTransformer

#: Factories, called with embedding_dim, channels, image_size and their own options as keywords.
BY_NAME: dict[str, Callable[..., nn.Module]] = {
    "glyph_net": GlyphNet,
    **{f"iresnet{depth}": partial(IResNet, depth) for depth in DEPTHS},
    **{name: partial(MobileFaceNet, *sizes) for name, sizes in mobilefacenet.VARIANTS.items()},
    **{name: partial(VisionTransformer, **sizes) for name, sizes in vit.VARIANTS.items()},
}

# InsightFace's names. Its "mask_005" masks a tenth of the tokens: its code does not read the number.
BY_NAME |= {
    **{f"r{depth}": BY_NAME[f"iresnet{depth}"] for depth in DEPTHS},
    "mbf": BY_NAME["mobilefacenet"],
    "mbf_large": BY_NAME["mobilefacenet_large"],
    "vit_t_dp005_mask0": partial(BY_NAME["vit_t"], drop_path=0.05, mask_ratio=0.0),
    "vit_s_dp005_mask_0": partial(BY_NAME["vit_s"], drop_path=0.05, mask_ratio=0.0),
    "vit_b_dp005_mask_005": partial(BY_NAME["vit_b"], drop_path=0.05),
    "vit_l_dp005_mask_005": BY_NAME["vit_l"],
}
