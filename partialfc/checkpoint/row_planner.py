"""Load planner that reads only the rows a rank owns, whichever ranks wrote them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from partialfc.checkpoint.reader import CheckedReader
from partialfc.errors import DamagedCheckpoint
from partialfc.runtime.collectives import Group, reason_of


class RowLoadPlanner(DefaultLoadPlanner):
    """Loads into plain tensors; those named in ``first_row`` are this rank's rows of a larger tensor.

    Rows beyond the stored ones are left unchanged, so that a head with more classes than the checkpoint loads without
    ever taking the old shape.

    Args:
        first_row: index of this rank's first row, by tensor name.
    """

    def __init__(self, first_row: dict[str, int]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.first_row = first_row

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, target in self.state_dict.items():
            stored: Any = self.metadata.state_dict_metadata[name]
            offsets, sizes = [0] * target.dim(), list(target.shape)
            if name in self.first_row:
                offsets[0] = self.first_row[name]
                sizes[0] = stored_rows(stored, offsets[0], len(target))
            chosen = int(name in self.first_row)
            assert sizes[chosen:] == list(stored.size[chosen:]), f"{name}: DCP would read the part in both shapes"
            if 0 not in sizes:
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                items += create_read_items_for_chunk_list(name, stored, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]


def stored_rows(stored: TensorStorageMetadata, first: int, count: int) -> int:
    """Return the number of stored rows among the ``count`` rows from ``first`` on."""
    return max(0, min(count, stored.size[0] - first))


def read_tensors(
    reader: CheckedReader, targets: dict[str, Tensor], planner: RowLoadPlanner, group: Group = None
) -> None:
    """Fill ``targets`` from a checkpoint. A collective of ``group``; without one, each rank reads alone.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about loading in a single process, which is intended
        try:
            dcp.load(targets, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
        except CheckpointException as error:
            raise DamagedCheckpoint(f"{reader.path} cannot be read: {reason_of(error)}") from error
