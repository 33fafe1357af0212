"""CosFace, also called LMCL or AM-Softmax."""

from __future__ import annotations

from torch import Tensor

from partialfc.losses.base import MarginGradient, MarginLoss, Samples, check_range


class CosFace(MarginLoss):
    """``z_y = s(cos θ_y − m)`` (Wang et al., "CosFace", CVPR 2018, arXiv:1801.09414, eq. 4).

    Args:
        scale: s, the inverse temperature; > 0.
        margin: m in cosine units, in [0, 2]; 0.4 here, 0.35 in AM-Softmax (arXiv:1801.05599).
        margin_gradient: see :class:`~partialfc.losses.MarginLoss`.
    """

    def __init__(self, scale: float = 64.0, margin: float = 0.4, margin_gradient: MarginGradient = "exact") -> None:
        super().__init__(scale, margin_gradient)
        self.margin = check_range("margin", margin, 0.0, 2.0)

    def with_margin(self, cosine: Tensor, samples: Samples) -> Tensor:
        return cosine - self.margin
