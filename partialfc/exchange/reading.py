"""Reading of checkpoints in a single process, as whole tensors."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from partialfc.checkpoint.reader import CheckedReader
from partialfc.checkpoint.row_planner import RowLoadPlanner, read_tensors


def read_into(checkpoint: Path, targets: dict[str, Tensor], planner: RowLoadPlanner | None = None) -> None:
    """Fill ``targets``, whole tensors by their names in the checkpoint, and convert to their dtype."""
    read_tensors(CheckedReader(checkpoint), targets, planner or RowLoadPlanner({}))


def map_file(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor mapped from a file of sufficient size; an empty one is in memory."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    whole = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    return whole[offset : offset + count * dtype.itemsize].view(dtype).view(shape)


def reserve(file: BinaryIO, size: int) -> None:
    """Allocate ``size`` bytes for a file.

    Raises:
        OSError: the disk is full; without this, writing the mapped file would end the process by a signal.
    """
    os.posix_fallocate(file.fileno(), 0, size)
