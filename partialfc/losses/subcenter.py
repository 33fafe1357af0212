"""Sub-centers: several weights per class, so that a class's noise can settle at one of its own."""

from __future__ import annotations

import numbers

from partialfc.errors import ConfigError
from partialfc.losses.arcface import ArcFace
from partialfc.losses.base import Loss, MarginGradient, Wrapper


class SubCenter(Wrapper):
    """Any loss on cosines, with ``cos θ_j = max_k cos θ_jk`` over K sub-centers of class j
    (Deng et al., "Sub-center ArcFace", ECCV 2020). The head's weight is then [classes, K, embedding_dim].

    Args:
        loss: the loss on the classes' cosines.
        sub_centers: K, in [1, 256].
    """

    def __init__(self, loss: Loss, sub_centers: int = 3) -> None:
        super().__init__(loss)
        if self.base.raw_logits:
            raise ConfigError(f"sub-centers compare cosines, but {type(loss).__name__} works on raw logits")
        if self.base.sub_centers is not None:
            raise ConfigError(f"{type(loss).__name__} has sub-centers already")
        self.sub_centers = check_sub_centers(sub_centers)


class SubCenterArcFace(ArcFace):
    """ArcFace on ``cos θ_j = max_k cos θ_jk`` (Deng et al., ECCV 2020); :class:`SubCenter` for other losses.

    Args:
        scale: s, the inverse temperature; > 0.
        margin: m in radians, in [0, π/2].
        sub_centers: K, in [1, 256].
        margin_gradient: see :class:`~partialfc.losses.MarginLoss`.
    """

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.5,
        sub_centers: int = 3,
        margin_gradient: MarginGradient = "exact",
    ) -> None:
        super().__init__(scale, margin, margin_gradient)
        self.sub_centers = check_sub_centers(sub_centers)


def check_sub_centers(sub_centers: int) -> int:
    """Return ``sub_centers`` if it is a whole number in [1, 256], else raise ConfigError."""
    if not (isinstance(sub_centers, numbers.Real) and 1 <= sub_centers <= 256 and sub_centers == int(sub_centers)):
        raise ConfigError(f"sub_centers must be a whole number in [1, 256], got {sub_centers}")
    return int(sub_centers)
