"""NormFace, also called normalised softmax loss (NSL)."""

from __future__ import annotations

from partialfc.losses.base import Loss


class NormFace(Loss):
    """``z = s·cos θ`` for all classes (Wang et al., "NormFace: L2 hypersphere embedding", 2017, arXiv:1704.06369).

    Args:
        scale: s, the inverse temperature; > 0.
    """
