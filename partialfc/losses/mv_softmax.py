"""MV-AM-Softmax: misclassified negatives are emphasised."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.losses.base import MarginGradient, Samples, check_range
from partialfc.losses.cosface import CosFace


class MVAMSoftmax(CosFace):
    """CosFace whose support vectors, negatives with ``cos θ_j > cos θ_y − m``, have ``z_j = s(t·cos θ_j + t − 1)``
    (Wang et al., "Mis-classified vector guided softmax loss", AAAI 2020, arXiv:1912.00833, its adaptive form).

    Needs the targets' cosines before any negative: one more collective.

    Args:
        scale: s, the inverse temperature; > 0.
        margin: m in cosine units, in [0, 2].
        emphasis: t, in [1, 2]; at 1 it is CosFace.
        margin_gradient: see :class:`~partialfc.losses.MarginLoss`.
    """

    needs = frozenset({"target_cosine_first"})

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.35,
        emphasis: float = 1.12,
        margin_gradient: MarginGradient = "exact",
    ) -> None:
        super().__init__(scale, margin, margin_gradient)
        self.emphasis = check_range("emphasis", emphasis, 1.0, 2.0)

    def negative_logits(self, cosine: Tensor, samples: Samples) -> Tensor:
        assert samples.target_cosine is not None
        bar = (samples.target_cosine - self.margin).to(cosine.dtype)[:, None]
        return self.scale * torch.where(cosine > bar, self.emphasis * cosine + (self.emphasis - 1.0), cosine)

    def logit_bound(self) -> float:
        return self.scale * (2.0 * self.emphasis - 1.0)
