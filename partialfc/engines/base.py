"""The engine interface, and helpers that engines share."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partialfc.engines.state import BackboneState
from partialfc.errors import ConfigError, MissingDependency

#: The dtype of a precision's autocast; None for float32 throughout.
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(Protocol):
    """Forward, backward and update of a backbone, however its state is laid out over the ranks.

    The head runs its own backward pass, in float32 and without loss scale; the engine continues from the embeddings'
    gradient. An engine's scaling of a loss therefore never reaches the head.
    """

    module: nn.Module
    state: BackboneState

    def begin_step(self, lr: float) -> None:
        """Prepare a step, before its first forward pass."""

    def forward(self, images: Tensor, images_of_all_ranks: int, last: bool = True) -> Tensor:
        """Return the embeddings [b, D] float32 of images [b, C, H, W]. A collective.

        b differs between ranks, and may be 0: that rank takes part without influence. Batch normalisation treats fewer
        than two images as :class:`BatchNormModes` says. ``last`` is that of the backward pass to come.
        """

    def backward(self, embeddings: Tensor, gradient: Tensor, last: bool) -> None:
        """Add a micro-batch's gradients, given the gradient of its embeddings [b, D]. The ``last`` micro-batch of a
        step averages all of them over the ranks.
        """

    def finish_backward(self) -> tuple[Tensor, Tensor]:
        """Return, after the last backward pass, two flags [] bool: this rank's own gradient is finite; the mean over
        the ranks is finite. An engine that learns the latter only in :meth:`step` returns True.
        """

    def step(self) -> bool:
        """Update the backbone and return True; or return False on all ranks if the caller must :meth:`skip` the
        step.
        """

    def skip(self) -> bool:
        """Undo this step's effect on gradients and statistics; return True if the loss scale fell."""

    def grad_norm(self) -> Tensor:
        """Return the norm [] of the last step's gradient, unscaled and before clipping."""

    def evaluating(self) -> AbstractContextManager[nn.Module]:
        """Provide a module in evaluation mode, which each rank may call any number of times. A collective."""

    def counts(self) -> dict[str, Any]:
        """Return the engine's scalars for the manifest."""

    def load_counts(self, counts: dict[str, Any]) -> None:
        """Restore the result of :meth:`counts`, possibly another engine's."""


@torch.no_grad()
def broadcast_buffers(buffers: list[Tensor]) -> None:
    """Copy batch statistics from rank 0, which checkpoints hold, to all ranks, as DistributedDataParallel does before
    each step. A collective.
    """
    if not buffers or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    # float64 holds counts of batches too: a rank without two images of a batch has not counted it.
    flat = torch.cat([buffer.flatten().double() for buffer in buffers])
    dist.broadcast(flat, src=0)
    parts = flat.split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])


class GradientWatch:
    """Checks a rank's own gradients before they are averaged: the mean does not show whose was non-finite."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None

    def reset(self) -> None:
        """Forget all gradients, for a new step."""
        self._largest = None

    def add(self, gradient: Tensor) -> None:
        """Include one gradient tensor."""
        largest = torch.linalg.vector_norm(gradient, math.inf)  # NaN if there is one
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def before(self, reduce: Callable[..., Any]) -> Callable[[Any, dist.GradBucket], Any]:
        """Return a communication hook for DDP that includes each bucket and then calls ``reduce``."""

        def hook(group: Any, bucket: dist.GradBucket) -> Any:
            self.add(bucket.buffer())
            return reduce(group, bucket)

        hook.__annotations__.clear()  # DDP compares them with types, and here they are strings
        return hook

    def is_finite(self) -> Tensor:
        """Return True, [] bool, if all gradients since the reset are finite."""
        assert self._largest is not None, "no gradient has been averaged in this step"
        return self._largest.isfinite()


def require_used(module: nn.Module, is_used: Callable[[nn.Parameter], bool]) -> None:
    """Raise a ConfigError if backward leaves out a trainable parameter: DDP averages once it has all of them."""
    named = module.named_parameters()
    unused = [name for name, parameter in named if parameter.requires_grad and not is_used(parameter)]
    if unused:
        some = ", ".join(unused[:8]) + (", …" if len(unused) > 8 else "")
        raise ConfigError(
            f"model.name: the forward pass does not use {len(unused)} trainable parameters, which have no "
            f"gradient to average over ranks: {some}. Remove them, or freeze them (requires_grad_(False))"
        )


def require_compiler(device_type: str) -> None:
    """Check for a C++ compiler, which ``torch.compile`` would miss only at the first step.

    Raises:
        MissingDependency: there is none.
    """
    name = os.environ.get("CXX") or "g++"
    if device_type == "cpu" and shutil.which(name) is None:
        raise MissingDependency(
            f"engine.compile needs a C++ compiler on a CPU, and {name} is not installed: apt-get install g++, or set "
            "engine.compile=false"
        )
