"""Focal loss around any softmax loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from partialfc.errors import ConfigError
from partialfc.losses.base import Loss, Wrapper, check_positive, check_range


class Focal(Wrapper):
    """``−α·(1 − p_y)^γ·log p_y`` with the p_y of another loss (Lin et al., "Focal loss", ICCV 2017, arXiv:1708.02002,
    eq. 5). In terms of ``d = log Σ_{j≠y} exp(z_j) − z_y``: ``1 − p_y = σ(d)``, ``−log p_y = softplus(d)``.

    Args:
        loss: a softmax loss.
        gamma: γ, in [0, 10]; at 0 it is ``loss``.
        alpha: α; > 0.
    """

    def __init__(self, loss: Loss, gamma: float = 2.0, alpha: float = 1.0) -> None:
        super().__init__(loss)
        if not loss.is_cross_entropy:
            raise ConfigError(
                f"focal needs a loss that is the cross-entropy −log p_y of a softmax: {type(loss).__name__} has no p_y"
            )
        self.gamma = check_range("gamma", gamma, 0.0, 10.0)
        self.alpha = check_positive("alpha", alpha)

    def sample_loss(self, d: Tensor) -> Tensor:
        if self.gamma == 0:  # 0 · log 0 would not be 0
            return self.alpha * self.base.sample_loss(d)
        not_certain = torch.exp(self.gamma * logsigmoid(d))  # (1 − p_y)^γ
        return self.alpha * not_certain * self.base.sample_loss(d)

    def objective(self, negatives: Tensor, target_logit: Tensor, mean_logit: Tensor | None) -> Tensor:
        return self.sample_loss(negatives - target_logit)
