"""Reading of checkpoints in a single process, as whole tensors."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partialfc.checkpoint.folders import latest_valid
from partialfc.checkpoint.manifest import verify
from partialfc.checkpoint.reader import CheckedReader
from partialfc.checkpoint.row_planner import RowLoadPlanner, read_tensors
from partialfc.errors import DamagedCheckpoint


def find_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return a valid checkpoint and its manifest: ``folder`` itself, or the newest of a run folder.

    Raises:
        DamagedCheckpoint: there is none.
    """
    if (folder / "checkpoints").is_dir():
        found = latest_valid(folder / "checkpoints")
        if found is None:
            raise DamagedCheckpoint(f"{folder / 'checkpoints'} holds no valid checkpoint")
        return found
    return folder, verify(folder)


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


def reserve(path: Path, size: int) -> None:
    """Allocate a file of ``size`` bytes at ``path``.

    Raises:
        OSError: the disk is full; without this, writing the mapped file would end the process by a signal.
    """
    with path.open("r+b" if path.exists() else "w+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)
