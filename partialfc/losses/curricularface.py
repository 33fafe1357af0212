"""CurricularFace: hard negatives gain weight as training proceeds."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.losses.arcface import ArcFace
from partialfc.losses.base import MarginGradient, Samples, angle, check_range


class CurricularFace(ArcFace):
    """ArcFace whose hard negatives, those with ``cos θ_j > cos(θ_y + m)``, have ``z_j = s·cos θ_j·(t + cos θ_j)``
    (Huang et al., "CurricularFace", CVPR 2020, arXiv:2004.00288). t follows the mean target cosine of the
    global batches: ``t ← (1 − α)·t + α·mean(cos θ_y)``.

    Needs the targets' cosines before any negative: one more collective.

    Args:
        scale: s, the inverse temperature; > 0.
        margin: m in radians, in [0, π/2].
        momentum: α, in [0, 1].
        margin_gradient: see :class:`~partialfc.losses.MarginLoss`.

    Buffer: ``state`` = [t], float64, starts at 0.
    """

    needs = frozenset({"target_cosine_first"})
    state: Tensor

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.5,
        momentum: float = 0.01,
        margin_gradient: MarginGradient = "exact",
    ) -> None:
        super().__init__(scale, margin, margin_gradient)
        self.momentum = check_range("momentum", momentum, 0.0, 1.0)
        self.register_buffer("state", torch.zeros(1, dtype=torch.float64))

    def negative_logits(self, cosine: Tensor, samples: Samples) -> Tensor:
        assert samples.target_cosine is not None
        assert samples.state is not None
        bar = torch.cos(angle(samples.target_cosine) + self.margin).to(cosine.dtype)[:, None]  # cos(θ_y + m)
        t = samples.state[0].to(cosine.dtype)
        return self.scale * cosine * torch.where(cosine > bar, t + cosine, 1.0)

    def logit_bound(self) -> float:
        return 2.0 * self.scale

    def statistics(self, samples: Samples) -> Tensor:
        assert samples.target_cosine is not None
        valid = samples.valid.double()
        return torch.stack((valid.sum(), (valid * samples.target_cosine).sum()))

    def next_state(self, state: Tensor, statistics: Tensor) -> Tensor:
        count, total = statistics
        return torch.where(count > 0, state + self.momentum * (total / count.clamp_min(1) - state), state)

    def reset(self, num_classes: int, sample_rate: float) -> None:
        self.state.zero_()

    @property
    def t(self) -> float:
        """t after the last applied step."""
        return float(self.state[0])
