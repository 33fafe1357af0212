"""partialfc: train classifiers with very many classes, the classifier sharded over ranks.

>>> from partialfc import PartialFC, RowSGD, losses
>>> head = PartialFC(num_classes=1000, embedding_dim=128, loss=losses.ArcFace(scale=64.0, margin=0.5))
>>> optimizer = RowSGD(head.parameters(), lr=0.1)
"""

from partialfc import losses
from partialfc.errors import (
    BatchMismatch,
    ConfigError,
    DataError,
    LabelOutOfRange,
    MissingDependency,
    NonFiniteEmbeddings,
    PartialFCError,
    RankLost,
)
from partialfc.head import (
    CenterLoss,
    ClassPartition,
    HeadOutput,
    LinearRate,
    PartialFC,
    RowAdagrad,
    RowAdamW,
    RowSGD,
    StepRate,
)

__version__ = "0.1.0"

__all__ = [
    "BatchMismatch",
    "CenterLoss",
    "ClassPartition",
    "ConfigError",
    "DataError",
    "HeadOutput",
    "LabelOutOfRange",
    "LinearRate",
    "MissingDependency",
    "NonFiniteEmbeddings",
    "PartialFC",
    "PartialFCError",
    "RankLost",
    "RowAdagrad",
    "RowAdamW",
    "RowSGD",
    "StepRate",
    "losses",
]
