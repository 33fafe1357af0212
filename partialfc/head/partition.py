"""The partition of the classes among the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassPartition:
    """Contiguous ranges of classes, as DTensor's ``Shard(0)`` and ``torch.chunk`` cut them.

    Every rank gets ceil(num_classes / world_size) classes until none are left: the last non-empty shard may be
    smaller, and the shards behind it are empty.

    >>> [ClassPartition(5, 4).range(rank) for rank in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """

    num_classes: int
    world_size: int

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if self.world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {self.world_size}")

    @property
    def shard_size(self) -> int:
        """Classes of a full shard."""
        return -(-self.num_classes // self.world_size)

    def range(self, rank: int) -> tuple[int, int]:
        """Return the first class of ``rank`` and one past its last."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must lie in [0, {self.world_size}), got {rank}")
        start = min(rank * self.shard_size, self.num_classes)
        return start, min(start + self.shard_size, self.num_classes)

    def size(self, rank: int) -> int:
        """Return the number of classes that ``rank`` owns; may be 0."""
        start, stop = self.range(rank)
        return stop - start

    def owner(self, class_ids: Tensor) -> Tensor:
        """Return the ranks that own ``class_ids`` (int64 of any shape, each in [0, num_classes))."""
        return torch.div(class_ids, self.shard_size, rounding_mode="floor")
