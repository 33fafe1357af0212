"""Objectives for classifiers: small pieces that read like their papers.

Imports torch and ``errors`` only. ``head`` and the rooms above may import it.
"""

from partialfc.losses.adaface import AdaFace
from partialfc.losses.arcface import ArcFace
from partialfc.losses.base import Loss, MarginLoss, Samples, Wrapper
from partialfc.losses.circle import Circle
from partialfc.losses.combined import CombinedMargin
from partialfc.losses.cosface import CosFace
from partialfc.losses.curricularface import CurricularFace
from partialfc.losses.elasticface import ElasticArcFace, ElasticCosFace
from partialfc.losses.focal import Focal
from partialfc.losses.label_smoothing import LabelSmoothing
from partialfc.losses.magface import MagFace
from partialfc.losses.mv_softmax import MVAMSoftmax
from partialfc.losses.normface import NormFace
from partialfc.losses.softmax import Softmax
from partialfc.losses.sphereface import ASoftmax, SphereFace
from partialfc.losses.subcenter import SubCenter, SubCenterArcFace
from partialfc.losses.uce import UCE

#: Losses by the name that configuration files use.
BY_NAME: dict[str, type[Loss]] = {
    "softmax": Softmax,
    "normface": NormFace,
    "sphereface": SphereFace,
    "a_softmax": ASoftmax,
    "cosface": CosFace,
    "arcface": ArcFace,
    "combined": CombinedMargin,
    "subcenter_arcface": SubCenterArcFace,
    "curricularface": CurricularFace,
    "mv_am_softmax": MVAMSoftmax,
    "magface": MagFace,
    "adaface": AdaFace,
    "elastic_arcface": ElasticArcFace,
    "elastic_cosface": ElasticCosFace,
    "circle": Circle,
    "uce": UCE,
    # These wrap another loss, given as `loss`.
    "subcenter": SubCenter,
    "focal": Focal,
    "label_smoothing": LabelSmoothing,
}

__all__ = [
    "BY_NAME",
    "UCE",
    "ASoftmax",
    "AdaFace",
    "ArcFace",
    "Circle",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticArcFace",
    "ElasticCosFace",
    "Focal",
    "LabelSmoothing",
    "Loss",
    "MVAMSoftmax",
    "MagFace",
    "MarginLoss",
    "NormFace",
    "Samples",
    "Softmax",
    "SphereFace",
    "SubCenter",
    "SubCenterArcFace",
    "Wrapper",
]
