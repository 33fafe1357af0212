"""Ownership of the batch's labels: the samples whose class lies in this shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OwnedSamples:
    """The samples of the global batch whose class this shard owns.

    The selection stays on the device: to list the samples, the host would have to wait for their number.
    """

    mask: Tensor  # [B] bool
    rows: Tensor  # [B] int64, the rows of their classes in this shard; 0 for all others

    def of_class(self, per_row: Tensor) -> Tensor:
        """Return each sample's entry of ``per_row`` [rows of the shard, …], [B, …]; row 0's where it has none."""
        if not len(per_row):
            return per_row.new_zeros(len(self.rows), *per_row.shape[1:])
        return per_row.index_select(0, self.rows)

    def only(self, values: Tensor) -> Tensor:
        """Replace the ``values`` [B, …] of all other samples by −0, which changes no number that it is added to."""
        return values.masked_fill(~self.mask.view(-1, *[1] * (values.dim() - 1)), -0.0)


def owned_samples(labels: Tensor, start: int, stop: int) -> OwnedSamples:
    """Find the samples whose label, of ``labels`` [B] int64, lies in this shard, the classes [start, stop)."""
    mask = (labels >= start) & (labels < stop)
    return OwnedSamples(mask, torch.where(mask, labels - start, 0))
