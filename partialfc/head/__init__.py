"""The sharded classifier: depends on torch and partialfc.losses only."""

from partialfc.head.center_loss import CenterLoss
from partialfc.head.partial_fc import HeadOutput, PartialFC
from partialfc.head.partition import ClassPartition
from partialfc.head.rate_schedule import LinearRate, StepRate
from partialfc.head.row_adaptive import RowAdagrad, RowAdamW
from partialfc.head.row_sgd import RowSGD

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
