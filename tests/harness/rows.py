"""A small head, its batches, and sparse gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partialfc import PartialFC, losses

CLASSES, DIM = 50, 12


def small_head(**arguments: Any) -> PartialFC:
    """A head of 50 classes; ``arguments`` are of PartialFC."""
    return PartialFC(CLASSES, DIM, losses.ArcFace(scale=16.0), **arguments)


def small_batch(seed: int = 0, batch: int = 10) -> tuple[Tensor, Tensor]:
    """Embeddings, with a gradient to come, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, DIM, generator=generator)
    return x.requires_grad_(), torch.randint(0, CLASSES, (batch,), generator=generator)


def sparse(weight: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A gradient like the head's: sorted rows."""
    return torch.sparse_coo_tensor(rows[None], values, weight.shape, is_coalesced=True, check_invariants=True)
