"""ArcFace: an additive angular margin."""

from __future__ import annotations

import math

from torch import Tensor

from partialfc.losses.base import MarginGradient, MarginLoss, Samples, check_range, cos_of_sum


class ArcFace(MarginLoss):
    """``z_y = s·cos(θ_y + m)`` (Deng et al., "ArcFace", CVPR 2019, arXiv:1801.07698, eq. 3).

    Where θ_y + m > π the cosine would rise again; there ``z_y = s(cos θ_y − m·sin m)`` keeps it monotone.

    Args:
        scale: s, the inverse temperature; > 0.
        margin: m in radians, in [0, π/2].
        margin_gradient: see :class:`~partialfc.losses.MarginLoss`.
    """

    def __init__(self, scale: float = 64.0, margin: float = 0.5, margin_gradient: MarginGradient = "exact") -> None:
        super().__init__(scale, margin_gradient)
        self.margin = check_range("margin", margin, 0.0, math.pi / 2)

    def with_margin(self, cosine: Tensor, samples: Samples) -> Tensor:
        return cos_of_sum(cosine, self.margin)
