"""Circle loss in its classification form."""

from __future__ import annotations

from torch import Tensor

from partialfc.losses.base import Loss, Samples, check_range


class Circle(Loss):
    """``z_y = γ·[1 + m − cos θ_y]₊·(cos θ_y − (1 − m))``, ``z_j = γ·[cos θ_j + m]₊·(cos θ_j − m)``
    (Sun et al., "Circle loss", CVPR 2020, arXiv:2002.10857, with class-level labels).

    The brackets are weights that follow each similarity's distance from its optimum; no gradient flows through them.

    Args:
        scale: γ; > 0.
        margin: m, in [0, 1].
    """

    def __init__(self, scale: float = 256.0, margin: float = 0.25) -> None:
        super().__init__(scale)
        self.margin = check_range("margin", margin, 0.0, 1.0)

    def target_logit(self, cosine: Tensor, samples: Samples) -> Tensor:
        weight = (1.0 + self.margin - cosine.detach()).clamp_min(0.0)
        return self.scale * weight * (cosine - (1.0 - self.margin))

    def negative_logits(self, cosine: Tensor, samples: Samples) -> Tensor:
        weight = (cosine.detach() + self.margin).clamp_min(0.0)
        return self.scale * weight * (cosine - self.margin)

    def logit_bound(self) -> float:
        return self.scale * max(1.0 - self.margin**2, self.margin**2)  # at cosine 1 and at cosine 0
