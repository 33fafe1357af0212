"""UCE of UniFace: one threshold between all positive and all negative cosines."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from partialfc.losses.base import Loss, Samples, check_positive, check_range


class UCE(Loss):
    """``log(1 + exp(−s(cos θ_y − m) + b)) + λ·Σ_j log(1 + exp(s·cos θ_j − b))``
    (Zhou et al., "UniFace: unified cross-entropy loss for deep face recognition", ICCV 2023).

    Each class is a separate two-class problem; all share one learned threshold b, but no denominator. With a sample
    rate r this is the paper's L_uce-mb-r.

    Args:
        scale: s, the inverse temperature; > 0.
        margin: m in cosine units, in [0, 2].
        negative_weight: λ; > 0.
        bias: b at the start; default: log(10·num_classes·sample_rate), so that the negatives together weigh little.

    Parameter: ``bias`` [1], float32, the same on all ranks.
    """

    shared_denominator = False

    def __init__(
        self, scale: float = 64.0, margin: float = 0.4, negative_weight: float = 1.0, bias: float | None = None
    ) -> None:
        super().__init__(scale)
        self.margin = check_range("margin", margin, 0.0, 2.0)
        self.negative_weight = check_positive("negative_weight", negative_weight)
        self.initial_bias = None if bias is None else check_range("bias", bias, -1e4, 1e4)
        self.bias = nn.Parameter(torch.full((1,), self.initial_bias or 0.0, dtype=torch.float32))

    def target_logit(self, cosine: Tensor, samples: Samples) -> Tensor:
        return self.scale * (cosine - self.margin) - self.bias.double()

    def logit_offset(self) -> Tensor:
        return -self.bias.double()

    def objective(self, negatives: Tensor, target_logit: Tensor, mean_logit: Tensor | None) -> Tensor:
        positive = torch.logaddexp(-target_logit, torch.zeros_like(target_logit))
        return positive + self.negative_weight * negatives

    @torch.no_grad()
    def reset(self, num_classes: int, sample_rate: float) -> None:
        bias = self.initial_bias
        self.bias.fill_(math.log(10.0 * num_classes * sample_rate) if bias is None else bias)
