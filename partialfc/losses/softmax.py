"""Plain softmax on unnormalised embeddings."""

from __future__ import annotations

import math

from torch import Tensor

from partialfc.losses.base import Loss, Samples


class Softmax(Loss):
    """``z_j = w_j·x + b_j``: the ordinary linear classifier, for extreme classification without a metric.

    Args:
        bias: give each class a bias b_j (sharded like the weight, starts at 0).
    """

    needs = frozenset({"raw_logits"})

    def __init__(self, bias: bool = True) -> None:
        super().__init__(scale=1.0)
        self.class_bias = bool(bias)

    def target_logit(self, cosine: Tensor, samples: Samples) -> Tensor:
        return cosine  # with "raw_logits" the head passes w_y·x + b_y here

    def logit_bound(self) -> float:
        return math.inf
