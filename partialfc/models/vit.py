"""Vision transformer (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929) as InsightFace trains it for Partial FC.

It differs from the paper: no class token, ReLU6, and an embedding made from all tokens together (An et al., CVPR 2022).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partialfc.errors import ConfigError
from partialfc.models.recompute import run_block

#: Parameters of each size.
VARIANTS: dict[str, dict[str, Any]] = {
    "vit_t": {"width": 256, "depth": 12, "drop_path": 0.1},
    "vit_s": {"width": 512, "depth": 12, "drop_path": 0.1},
    "vit_b": {"width": 512, "depth": 24, "drop_path": 0.1},
    "vit_l": {"width": 768, "depth": 24, "drop_path": 0.05},
}


class PatchEmbedding(nn.Module):
    """Linear embedding of patches: [B, channels, size, size] to [B, tokens, width]."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # each [B, heads, tokens, width/heads]
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers on each token, ReLU6 between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu6(self.fc1(x)))


class Block(nn.Module):
    """Pre-normalised attention and MLP; in training each is skipped for a share ``drop_path`` of the samples."""

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attn(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        """Apply stochastic depth (Huang et al., 2016): zero for some samples, scaled up for the others."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * (kept / (1 - self.drop_path)).to(branch.dtype)


class VisionTransformer(nn.Module):
    """Vision transformer with the tensor names and shapes of InsightFace's published weights, which it loads.

    Args:
        embedding_dim: D of the output [B, D], not normalised.
        channels: of the input [B, channels, image_size, image_size].
        image_size: pixels; published weights are for 112. Pixels beyond the last whole patch are ignored: at 112 and
            patches of 9, the last 4 rows and columns.
        width: of a token.
        depth: number of blocks.
        heads: attention heads; must divide the width.
        patch_size: pixels.
        mlp_ratio: hidden width of an MLP over ``width``.
        drop_path: the last block's rate of stochastic depth; it rises linearly from 0. In training only.
        mask_ratio: share of tokens that skip the blocks and are replaced by a learnt vector (as in masked autoencoders,
            He et al., CVPR 2022), drawn for each sample. In training only.
        activation_checkpointing: recompute blocks in backward instead of keeping their activations.

    Raises:
        ConfigError: the sizes do not fit each other, or a rate is out of range.
    """

    def __init__(
        self,
        embedding_dim: int = 512,
        channels: int = 3,
        image_size: int = 112,
        width: int = 512,
        depth: int = 12,
        heads: int = 8,
        patch_size: int = 9,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        mask_ratio: float = 0.1,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, size in {"width": width, "depth": depth, "heads": heads, "patch_size": patch_size}.items():
            if not isinstance(size, int) or size < 1:
                raise ConfigError(f"{name}: expected a whole number of 1 or more, got {size!r}")
        for name, rate in {"drop_path": drop_path, "mask_ratio": mask_ratio}.items():
            if not 0 <= rate < 1:
                raise ConfigError(f"{name} must lie in [0, 1), got {rate!r}")
        if width % heads:
            raise ConfigError(f"heads must divide the width: {width} is not a multiple of {heads}")
        if image_size < patch_size:
            raise ConfigError(f"an image of {image_size} pixels holds no patch of {patch_size}; lower patch_size")
        if int(mlp_ratio * width) < 1:
            raise ConfigError(f"mlp_ratio must leave a hidden width of 1 or more, got {mlp_ratio!r}")
        self.activation_checkpointing = activation_checkpointing
        self.tokens = (image_size // patch_size) ** 2
        self.kept_tokens = max(1, int(self.tokens * (1 - mask_ratio)))
        self.patch_embed = PatchEmbedding(channels, width, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.tokens, width))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, int(mlp_ratio * width), rate) for rate in rates)
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(width * self.tokens, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, eps=2e-5),
        )
        # Without masking it gets no gradient, for which DistributedDataParallel would wait.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width), requires_grad=mask_ratio > 0)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed  # [B, tokens, width]
        masked = self.training and self.mask_token.requires_grad
        if masked:
            chosen = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)[:, : self.kept_tokens]
            places = chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1])  # [B, kept, width]
            x = x.gather(1, places)
        for block in self.blocks:
            x = run_block(block, x, self.activation_checkpointing)
        x = self.norm(x)
        if masked:
            x = self.mask_token.to(x.dtype).expand(len(x), self.tokens, -1).scatter(1, places, x)
        return self.feature(x.flatten(1))
