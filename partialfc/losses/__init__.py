"""Objectives for classifiers: pure pieces that read like their papers and know nothing of ranks or shards."""

from partialfc.losses.arcface import ArcFace
from partialfc.losses.base import Loss, MarginLoss, Samples
from partialfc.losses.combined import CombinedMargin
from partialfc.losses.cosface import CosFace
from partialfc.losses.normface import NormFace
from partialfc.losses.softmax import Softmax

#: Losses by the name that configuration files use.
BY_NAME: dict[str, type[Loss]] = {
    "softmax": Softmax,
    "normface": NormFace,
    "cosface": CosFace,
    "arcface": ArcFace,
    "combined": CombinedMargin,
}

__all__ = ["BY_NAME", "ArcFace", "CombinedMargin", "CosFace", "Loss", "MarginLoss", "NormFace", "Samples", "Softmax"]
