"""IResNet, the residual networks of ArcFace (Deng et al., CVPR 2019; blocks after Han et al., CVPR 2017)."""

from __future__ import annotations

from torch import Tensor, nn

from partialfc.errors import ConfigError
from partialfc.models.recompute import run_block

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}


class IBasicBlock(nn.Module):
    """Residual block: normalise, convolve, normalise, PReLU, convolve with the stride, normalise; add the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(y)) + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """IResNet with the tensor names and shapes of InsightFace's published weights, which it loads.

    Args:
        depth: 18, 34, 50, 100 or 200.
        embedding_dim: D of the output [B, D], not normalised.
        channels: of the input [B, channels, image_size, image_size].
        image_size: pixels; published weights are for 112.
        dropout: share of the last features that are dropped in training.
        activation_checkpointing: recompute blocks in backward instead of keeping their activations.

    Raises:
        ConfigError: the dropout is out of range.
    """

    def __init__(
        self,
        depth: int,
        embedding_dim: int = 512,
        channels: int = 3,
        image_size: int = 112,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), got {dropout!r}")
        self.activation_checkpointing = activation_checkpointing
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        width, side = 64, image_size
        for number, (outputs, blocks) in enumerate(zip((64, 128, 256, 512), DEPTHS[depth], strict=True), start=1):
            stage = [IBasicBlock(width if i == 0 else outputs, outputs, 2 if i == 0 else 1) for i in range(blocks)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            width, side = outputs, -(-side // 2)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width * side * side, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        # Its scale stays 1: the length of an embedding is not learnt per dimension.
        self.features.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))
        for number in (1, 2, 3, 4):
            for block in self.get_submodule(f"layer{number}").children():
                x = run_block(block, x, self.activation_checkpointing)
        return self.features(self.fc(self.dropout(self.bn2(x).flatten(1))))
