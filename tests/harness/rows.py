"""A small head, its batches, and sparse gradients, for tests of row optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partialfc import PartialFC, losses

CLASSES, DIM = 50, 12


def _head(**arguments: Any) -> PartialFC:
    return PartialFC(CLASSES, DIM, losses.ArcFace(scale=16.0), **arguments)


def _batch(seed: int = 0, batch: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, DIM, generator=generator)
    return x.requires_grad_(), torch.randint(0, CLASSES, (batch,), generator=generator)


def sparse(weight: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A gradient as the head makes it: sorted rows."""
    return torch.sparse_coo_tensor(rows[None], values, weight.shape, is_coalesced=True, check_invariants=True)
