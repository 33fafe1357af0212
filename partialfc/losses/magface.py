"""MagFace: the length of an embedding measures the quality of the sample, and sets its margin."""

from __future__ import annotations

import math

from torch import Tensor

from partialfc.errors import ConfigError
from partialfc.losses.base import MarginGradient, MarginLoss, Samples, check_positive, check_range, cos_of_sum


class MagFace(MarginLoss):
    """``z_y = s·cos(θ_y + m(a))`` with a = ‖x‖ clamped to [a_low, a_high] and m(a) linear between the margins there.
    Each sample adds ``λ·g(a)``, ``g(a) = 1/a + a/a_high²`` (Meng et al., "MagFace", CVPR 2021, arXiv:2103.06627).

    Both depend on a with a gradient: longer embeddings pay a larger margin and earn a smaller g.

    Args:
        scale: s, the inverse temperature; > 0.
        margin_low, margin_high: m(a_low) and m(a_high), radians; 0 ≤ margin_low ≤ margin_high ≤ π/2.
        norm_low, norm_high: a_low and a_high; 0 < a_low < a_high.
        penalty_weight: λ; ≥ 0. The paper uses 35, common implementations 20.
        margin_gradient: see :class:`~partialfc.losses.MarginLoss`.
    """

    needs = frozenset({"norms"})

    def __init__(
        self,
        scale: float = 64.0,
        margin_low: float = 0.45,
        margin_high: float = 0.8,
        norm_low: float = 10.0,
        norm_high: float = 110.0,
        penalty_weight: float = 20.0,
        margin_gradient: MarginGradient = "exact",
    ) -> None:
        super().__init__(scale, margin_gradient)
        self.margin_low = check_range("margin_low", margin_low, 0.0, math.pi / 2)
        self.margin_high = check_range("margin_high", margin_high, self.margin_low, math.pi / 2)
        self.norm_low, self.norm_high = check_positive("norm_low", norm_low), check_positive("norm_high", norm_high)
        if not self.norm_low < self.norm_high:
            raise ConfigError(f"0 < norm_low < norm_high must hold, got {norm_low} and {norm_high}")
        self.penalty_weight = check_range("penalty_weight", penalty_weight, 0.0, 1e9)

    def with_margin(self, cosine: Tensor, samples: Samples) -> Tensor:
        a = samples.norms.clamp(self.norm_low, self.norm_high)
        rise = (self.margin_high - self.margin_low) / (self.norm_high - self.norm_low)
        return cos_of_sum(cosine, self.margin_low + rise * (a - self.norm_low))

    def penalty(self, samples: Samples) -> Tensor:
        a = samples.norms.clamp(self.norm_low, self.norm_high)
        return self.penalty_weight * (1.0 / a + a / self.norm_high**2)
