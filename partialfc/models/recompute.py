"""Activation checkpointing (Chen et al., 2016, arXiv:1604.06174): backward recomputes the activations of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """Return ``block(x)``; with ``recompute``, training keeps only ``x`` and recomputes the rest in backward.

    The second pass draws the same random numbers, and does not update running statistics.
    """
    if not (recompute and block.training and torch.is_grad_enabled()):
        return block(x)
    if torch.compiler.is_compiling():  # the compiler recomputes values, but does not repeat updates of buffers
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _buffers_stay(block)))


@contextmanager
def _buffers_stay(block: nn.Module) -> Iterator[None]:
    """Restore a block's buffers after the context: batch normalisation would count a batch twice."""
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # .data: autograd does not need their saved values in training mode
