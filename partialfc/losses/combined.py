"""The combined margin: SphereFace's, ArcFace's and CosFace's in one formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from partialfc.losses.base import MarginGradient, MarginLoss, Samples, angle, check_range


class CombinedMargin(MarginLoss):
    """``z_y = s(cos(m1·θ_y + m2) − m3)`` (Deng et al., "ArcFace", CVPR 2019, arXiv:1801.07698, eq. 4).

    Where m1·θ_y + m2 > π the curve continues linearly in cos θ_y with slope 1, from its value −1 − m3 at that point: it
    stays continuous and monotone.

    Args:
        scale: s, the inverse temperature; > 0.
        m1: multiplies the angle, in [1, 8] (SphereFace).
        m2: is added to the angle, radians, in [0, π/2] (ArcFace).
        m3: is subtracted from the cosine, in [0, 2] (CosFace).
        margin_gradient: see :class:`~partialfc.losses.MarginLoss`.
    """

    def __init__(
        self,
        scale: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.5,
        m3: float = 0.0,
        margin_gradient: MarginGradient = "exact",
    ) -> None:
        super().__init__(scale, margin_gradient)
        self.m1 = check_range("m1", m1, 1.0, 8.0)
        self.m2 = check_range("m2", m2, 0.0, math.pi / 2)
        self.m3 = check_range("m3", m3, 0.0, 2.0)

    def with_margin(self, cosine: Tensor, samples: Samples) -> Tensor:
        shifted = self.m1 * angle(cosine) + self.m2
        turning_point = math.cos((math.pi - self.m2) / self.m1)  # the cosine at which m1·θ + m2 = π
        return torch.where(shifted <= math.pi, torch.cos(shifted), cosine - turning_point - 1.0) - self.m3
