"""AdaFace: the margin adapts to the image quality, measured by the length of the embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.losses.base import MarginGradient, MarginLoss, Samples, angle, check_positive, check_range


class AdaFace(MarginLoss):
    """``z_y = s(cos(θ_y − m·ẑ) − m(1 + ẑ))`` with ``ẑ = clip(h·(‖x‖ − μ)/(σ + ε), −1, 1)``
    (Kim et al., "AdaFace", CVPR 2022, arXiv:2204.00964). μ and σ follow mean and standard deviation of the
    lengths in the global batches: ``μ ← (1 − α)·μ + α·mean``, σ alike. No gradient flows through the lengths.

    The angle θ_y − m·ẑ is clipped to [0, π], which keeps the target logit monotone.

    Args:
        scale: s, the inverse temperature; > 0.
        margin: m, in [0, 1].
        concentration: h; > 0.
        momentum: α, in [0, 1].
        epsilon: ε; > 0.
        margin_gradient: see :class:`~partialfc.losses.MarginLoss`.

    Buffer: ``state`` = [μ, σ], float64, starts at [20, 100].
    """

    state: Tensor

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.4,
        concentration: float = 0.333,
        momentum: float = 0.01,
        epsilon: float = 1e-3,
        margin_gradient: MarginGradient = "exact",
    ) -> None:
        super().__init__(scale, margin_gradient)
        self.margin = check_range("margin", margin, 0.0, 1.0)
        self.concentration = check_positive("concentration", concentration)
        self.momentum = check_range("momentum", momentum, 0.0, 1.0)
        self.epsilon = check_positive("epsilon", epsilon)
        self.register_buffer("state", torch.tensor([20.0, 100.0], dtype=torch.float64))

    def with_margin(self, cosine: Tensor, samples: Samples) -> Tensor:
        assert samples.state is not None
        mean, std = samples.state
        quality = self.concentration * (samples.norms.detach() - mean) / (std + self.epsilon)  # ẑ
        quality = quality.clamp(-1.0, 1.0)
        shifted = torch.cos((angle(cosine) - self.margin * quality).clamp(0.0, torch.pi))
        return shifted - self.margin * (1.0 + quality)

    def statistics(self, samples: Samples) -> Tensor:
        valid = samples.valid.double()
        norms = samples.norms.detach()
        return torch.stack((valid.sum(), (valid * norms).sum(), (valid * norms.square()).sum()))

    def next_state(self, state: Tensor, statistics: Tensor) -> Tensor:
        count, total, squares = statistics
        mean = total / count.clamp_min(1)
        variance = (squares - count * mean.square()).clamp_min(0.0) / (count - 1).clamp_min(1)
        batch = torch.stack((mean, variance.sqrt()))
        known = torch.stack((count > 0, count > 1))  # one sample has no standard deviation
        return torch.where(known, state + self.momentum * (batch - state), state)

    def reset(self, num_classes: int, sample_rate: float) -> None:
        self.state.copy_(torch.tensor([20.0, 100.0]))

    @property
    def mean(self) -> float:
        """μ after the last applied step."""
        return float(self.state[0])

    @property
    def std(self) -> float:
        """σ after the last applied step."""
        return float(self.state[1])
