"""Label smoothing around a softmax loss."""

from __future__ import annotations

from torch import Tensor

from partialfc.errors import ConfigError
from partialfc.losses.base import Loss, Wrapper, check_range


class LabelSmoothing(Wrapper):
    """Cross-entropy against ``(1 − ε)·[j = y] + ε/n`` over the n classes that take part
    (Szegedy et al., "Rethinking the Inception architecture", CVPR 2016, arXiv:1512.00567, section 7).

    That is ``softplus(d) + ε·(z_y − mean_j z_j)``. It makes sense around losses whose negatives are
    plain scaled cosines or inner products. Costs one more matrix product.

    Args:
        loss: a softmax loss with unmodified negatives, e.g. ``Softmax()``.
        smoothing: ε, in [0, 0.99].
    """

    def __init__(self, loss: Loss, smoothing: float = 0.1) -> None:
        super().__init__(loss)
        if not (loss.is_cross_entropy and loss.negatives_are_linear):
            raise ConfigError(
                "label smoothing needs a loss that is the cross-entropy of a softmax whose negatives are plain logits, "
                f"got {type(loss).__name__}"
            )
        self.smoothing = check_range("smoothing", smoothing, 0.0, 0.99)
        self.needs = self.needs | {"mean_logit"}

    def objective(self, negatives: Tensor, target_logit: Tensor, mean_logit: Tensor | None) -> Tensor:
        assert mean_logit is not None
        plain = self.base.objective(negatives, target_logit, mean_logit)
        return plain + self.smoothing * (target_logit - mean_logit)
