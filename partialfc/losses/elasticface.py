"""ElasticFace: the margin of each sample is drawn from a normal distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.losses.arcface import ArcFace
from partialfc.losses.base import MarginGradient, Samples, check_range, cos_of_sum
from partialfc.losses.cosface import CosFace


class ElasticArcFace(ArcFace):
    """``z_y = s·cos(θ_y + E)``, E ~ N(m, σ) for each sample (Boutros et al., "ElasticFace", CVPR workshops 2022,
    arXiv:2109.09416). A draw is a function of (seed, step, position in the global batch).

    Args:
        scale: s, the inverse temperature; > 0.
        margin: m in radians, in [0, π/2].
        std: σ in radians, in [0, 1]; the paper uses 0.0125, and 0.0175 with ``plus``.
        plus: give the batch's largest draw to its smallest target cosine, and so on down (ElasticFace-Arc+).
        margin_gradient: see :class:`~partialfc.losses.MarginLoss`.
    """

    needs = frozenset({"noise"})

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.5,
        std: float = 0.0125,
        plus: bool = False,
        margin_gradient: MarginGradient = "exact",
    ) -> None:
        super().__init__(scale, margin, margin_gradient)
        self.std, self.plus = check_range("std", std, 0.0, 1.0), bool(plus)

    def with_margin(self, cosine: Tensor, samples: Samples) -> Tensor:
        return cos_of_sum(cosine, elastic_margin(self.margin, self.std, self.plus, cosine, samples))


class ElasticCosFace(CosFace):
    """``z_y = s(cos θ_y − E)``, E ~ N(m, σ) for each sample (Boutros et al., "ElasticFace", CVPR workshops 2022,
    arXiv:2109.09416). A draw is a function of (seed, step, position in the global batch).

    Args:
        scale: s, the inverse temperature; > 0.
        margin: m in cosine units, in [0, 2].
        std: σ in cosine units, in [0, 1]; the paper uses 0.0125, and 0.025 with ``plus``.
        plus: give the batch's largest draw to its smallest target cosine, and so on down (ElasticFace-Cos+).
        margin_gradient: see :class:`~partialfc.losses.MarginLoss`.
    """

    needs = frozenset({"noise"})

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.35,
        std: float = 0.0125,
        plus: bool = False,
        margin_gradient: MarginGradient = "exact",
    ) -> None:
        super().__init__(scale, margin, margin_gradient)
        self.std, self.plus = check_range("std", std, 0.0, 1.0), bool(plus)

    def with_margin(self, cosine: Tensor, samples: Samples) -> Tensor:
        return cosine - elastic_margin(self.margin, self.std, self.plus, cosine, samples)


def elastic_margin(mean: float, std: float, plus: bool, cosine: Tensor, samples: Samples) -> Tensor:
    """Return a margin for each sample, [B]; with ``plus`` the largest goes to the smallest target cosine, and so on."""
    assert samples.noise is not None
    draws = mean + std * samples.noise
    if not plus:
        return draws
    # Ignored samples come last in both orders: neither their draws nor their cosines matter.
    hardest_first = cosine.detach().masked_fill(~samples.valid, torch.inf).argsort(stable=True)
    largest_first = draws.masked_fill(~samples.valid, -torch.inf).sort(descending=True).values
    dealt = torch.empty_like(draws)
    dealt[hardest_first] = largest_first
    return torch.where(samples.valid, dealt, mean)
