"""MobileFaceNet (Chen et al., CCBR 2018, arXiv:1804.07573), in the two widths that InsightFace publishes."""

from __future__ import annotations

from torch import Tensor, nn

from partialfc.models.recompute import run_block

#: Width relative to the paper's, and blocks per stage.
VARIANTS = {"mobilefacenet": (2, (1, 4, 6, 2)), "mobilefacenet_large": (4, (2, 8, 12, 4))}


class Convolution(nn.Module):
    """Convolution, normalisation, PReLU; without the PReLU the linear layer that ends a bottleneck."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        prelu: bool = True,
    ) -> None:
        super().__init__()
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.layers = nn.Sequential(convolution, nn.BatchNorm2d(outputs), *([nn.PReLU(outputs)] if prelu else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Bottleneck(nn.Module):
    """Expansion to ``hidden`` channels, depthwise 3×3 convolution, projection to ``outputs``; residual at stride 1."""

    def __init__(self, inputs: int, outputs: int, hidden: int, stride: int, recompute: bool) -> None:
        super().__init__()
        self.residual, self.recompute = stride == 1, recompute
        self.layers = nn.Sequential(
            Convolution(inputs, hidden, 1),
            Convolution(hidden, hidden, 3, stride, padding=1, groups=hidden),
            Convolution(hidden, outputs, 1, prelu=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = run_block(self.layers, x, self.recompute)
        return x + y if self.residual else y


class Stage(nn.Module):
    """Bottlenecks that keep the size."""

    def __init__(self, width: int, blocks: int, hidden: int, recompute: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Bottleneck(width, width, hidden, 1, recompute) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class GlobalDepthwise(nn.Module):
    """One weight for each place and channel (the paper's GDConv), then a linear layer: [B, 512, s, s] to [B, D]."""

    def __init__(self, side: int, embedding_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Convolution(512, 512, side, groups=512, prelu=False),
            nn.Flatten(),
            nn.Linear(512, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MobileFaceNet(nn.Module):
    """MobileFaceNet with the tensor names and shapes of InsightFace's published weights, which it loads.

    Args:
        scale: width relative to the paper's.
        blocks: number in each of the four stages.
        embedding_dim: D of the output [B, D], not normalised.
        channels: of the input [B, channels, image_size, image_size].
        image_size: pixels; published weights are for 112.
        activation_checkpointing: recompute bottlenecks in backward instead of keeping their activations.
    """

    def __init__(
        self,
        scale: int,
        blocks: tuple[int, int, int, int],
        embedding_dim: int = 512,
        channels: int = 3,
        image_size: int = 112,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        again = activation_checkpointing
        width, wide = 64 * scale, 128 * scale
        self.layers = nn.Sequential(
            Convolution(channels, width, 3, 2, padding=1),
            Convolution(width, width, 3, padding=1, groups=64)
            if blocks[0] == 1
            else Stage(width, blocks[0], 128, again),
            Bottleneck(width, width, 128, 2, again),
            Stage(width, blocks[1], 128, again),
            Bottleneck(width, wide, 256, 2, again),
            Stage(wide, blocks[2], 256, again),
            Bottleneck(wide, wide, 512, 2, again),
            Stage(wide, blocks[3], 256, again),
        )
        self.conv_sep = Convolution(wide, 512, 1)
        side = -(-image_size // 16)  # four layers halve it, rounding up
        self.features = GlobalDepthwise(side, embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.conv_sep(self.layers(images)))
