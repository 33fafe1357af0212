"""SphereFace: a multiplicative angular margin, in its two forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from partialfc.errors import ConfigError
from partialfc.losses.base import MarginGradient, MarginLoss, Samples, angle, check_range


class SphereFace(MarginLoss):
    """``z_y = s·cos(m1·θ_y)``: the margin of SphereFace in the form of the combined family, trained without annealing
    (Liu et al., "SphereFace", CVPR 2017, arXiv:1704.08063; m1 = 1.35 of Deng et al., arXiv:1801.07698, section 2.2).

    Where m1·θ_y > π the curve continues linearly in cos θ_y with slope 1: it stays continuous and monotone.

    Args:
        scale: s, the inverse temperature; > 0.
        margin: m1, in [1, 8].
        margin_gradient: see :class:`~partialfc.losses.MarginLoss`.
    """

    def __init__(self, scale: float = 64.0, margin: float = 1.35, margin_gradient: MarginGradient = "exact") -> None:
        super().__init__(scale, margin_gradient)
        self.margin = check_range("margin", margin, 1.0, 8.0)

    def with_margin(self, cosine: Tensor, samples: Samples) -> Tensor:
        multiple = self.margin * angle(cosine)
        turning_point = math.cos(math.pi / self.margin)  # the cosine at which m1·θ = π
        return torch.where(multiple <= math.pi, torch.cos(multiple), cosine - turning_point - 1.0)


class ASoftmax(MarginLoss):
    """``z_y = s·(λ·cos θ_y + ψ(θ_y)) / (1 + λ)`` with ``ψ(θ) = (−1)^k cos(mθ) − 2k`` on [kπ/m, (k+1)π/m]
    (Liu et al., "SphereFace", CVPR 2017, arXiv:1704.08063, eq. 7, and its appendix on annealing).

    With m = 4 the bare ψ does not converge; so λ falls with the steps, ``λ = max(λ_end, λ_start / (1 + rate·step))``.
    The paper scales by the embeddings' lengths; here s is a constant, as in all later work.

    Args:
        scale: s, the inverse temperature; > 0.
        margin: m, a whole number in [1, 8].
        annealing_start: λ at step 0; ≥ annealing_end.
        annealing_end: the smallest λ; ≥ 0.
        annealing_rate: decay of λ per step; ≥ 0.
        margin_gradient: see :class:`~partialfc.losses.MarginLoss`.
    """

    def __init__(
        self,
        scale: float = 64.0,
        margin: int = 4,
        annealing_start: float = 1000.0,
        annealing_end: float = 5.0,
        annealing_rate: float = 0.12,
        margin_gradient: MarginGradient = "exact",
    ) -> None:
        super().__init__(scale, margin_gradient)
        if margin != int(check_range("margin", margin, 1, 8)):
            raise ConfigError(f"margin must be a whole number in [1, 8], got {margin}; SphereFace accepts fractions")
        self.margin = int(margin)
        self.annealing_end = check_range("annealing_end", annealing_end, 0.0, 1e9)
        self.annealing_start = check_range("annealing_start", annealing_start, annealing_end, 1e9)
        self.annealing_rate = check_range("annealing_rate", annealing_rate, 0.0, 1e9)

    def annealing(self, step: int) -> float:
        """Return λ at ``step``."""
        return max(self.annealing_end, self.annealing_start / (1.0 + self.annealing_rate * step))

    def with_margin(self, cosine: Tensor, samples: Samples) -> Tensor:
        theta = angle(cosine)
        k = torch.floor(theta.detach() * self.margin / math.pi).clamp_max(self.margin - 1)
        psi = torch.where(k % 2 == 0, 1.0, -1.0) * torch.cos(self.margin * theta) - 2.0 * k
        weight = self.annealing(samples.step)
        return (weight * cosine + psi) / (1.0 + weight)
