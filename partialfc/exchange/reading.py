"""Checkpoints of ours read by a single process, as whole tensors."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from partialfc.checkpoint.folders import CheckedReader, DamagedCheckpoint, verify
from partialfc.checkpoint.row_planner import RowLoadPlanner, read_tensors
from partialfc.checkpoint.state import latest_valid


def find_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A whole checkpoint and its manifest: ``folder`` itself, or the newest of a run folder.

    Raises:
        DamagedCheckpoint: there is none.
    """
    if (folder / "checkpoints").is_dir():
        found = latest_valid(folder / "checkpoints")
        if found is None:
            raise DamagedCheckpoint(f"{folder / 'checkpoints'} holds no whole checkpoint")
        return found
    return folder, verify(folder)


def stored_tensors(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Name, shape and dtype of what a checkpoint holds."""
    stored = CheckedReader(checkpoint).read_metadata().state_dict_metadata
    return {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def read_into(checkpoint: Path, targets: dict[str, Tensor], planner: RowLoadPlanner | None = None) -> None:
    """Fill ``targets``, whole tensors by the names of the checkpoint, converting to their dtype."""
    read_tensors(CheckedReader(checkpoint), targets, planner or RowLoadPlanner({}))


def map_file(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that lies in a file which has been made large enough; empty ones in memory."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    whole = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    return whole[offset : offset + count * dtype.itemsize].view(dtype).view(shape)


def reserve(path: Path, size: int) -> None:
    """Make ``path`` a file of ``size`` bytes, whose blocks exist.

    Raises:
        OSError: the disk is full; better now than by a signal when the mapped file is written.
    """
    with path.open("r+b" if path.exists() else "w+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)
