"""The sharded classifier, as a library for any trainer.

Imports torch, ``losses`` and ``errors`` only. ``config`` and the rooms above may import it.
"""

from partialfc.head.center_loss import CenterLoss
from partialfc.head.optim.adaptive import RowAdagrad, RowAdamW
from partialfc.head.optim.sgd import RowSGD
from partialfc.head.partial_fc import HeadOutput, PartialFC
from partialfc.head.partition import ClassPartition
from partialfc.head.sample_rate import LinearRate, StepRate

__all__ = [
    "CenterLoss",
    "ClassPartition",
    "HeadOutput",
    "LinearRate",
    "PartialFC",
    "RowAdagrad",
    "RowAdamW",
    "RowSGD",
    "StepRate",
]
