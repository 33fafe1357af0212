"""Activation checkpointing (Chen et al., 2016, arXiv:1604.06174): blocks that are computed again for their backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """``block(x)``; with ``recompute``, training keeps ``x`` alone and computes the rest again when backward needs it.

    The second time draws the same random numbers, and counts for no running statistic.
    """
    if not (recompute and block.training and torch.is_grad_enabled()):
        return block(x)
    if torch.compiler.is_compiling():  # the compiler repeats computations, not updates of buffers
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _buffers_stay(block)))


@contextmanager
def _buffers_stay(block: nn.Module) -> Iterator[None]:
    """Undo what happens to a block's buffers within: batch normalisation would average a batch in twice."""
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # .data: what autograd has saved of it is not needed in training mode
