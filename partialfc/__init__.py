"""partialfc: train classifiers with very many classes, the classifier sharded over ranks.

>>> from partialfc import PartialFC, RowSGD, losses
>>> head = PartialFC(num_classes=1000, embedding_dim=128, loss=losses.ArcFace(scale=64.0, margin=0.5))
>>> optimizer = RowSGD(head.parameters(), lr=0.1)

The head and the losses need torch and are imported on first use, so ``partialfc --help`` and a run's side processes
start without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from partialfc import losses
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

_LAZY_PACKAGES = ("head", "losses")


def __getattr__(name: str) -> object:
    """Import a public name that needs torch (PEP 562)."""
    if name in _LAZY_PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in __all__:
        value: object = getattr(import_module(f"{__name__}.head"), name)
        globals()[name] = value  # later uses bypass this function
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY_PACKAGES})
