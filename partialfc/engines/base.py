"""What the training loop asks of a backbone's engine, and what engines share."""

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
from partialfc.errors import MissingDependency

#: The dtype that a precision computes in, besides float32.
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(Protocol):
    """What the training loop asks of a backbone, however its state is laid out over the ranks.

    The head's backward pass runs by itself, in float32 and without loss scale, and gives the embeddings' gradient; the
    engine takes it from there. So nothing that it does to a loss (scaling, dividing) ever reaches the head.
    """

    module: nn.Module
    state: BackboneState

    def begin_step(self, lr: float) -> None:
        """Before the first forward pass of a step."""

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [b, D] float32 of images [b, C, H, W]."""

    def backward(self, embeddings: Tensor, gradient: Tensor, last: bool) -> None:
        """Add this micro-batch's gradients, from that of the embeddings [b, D]. Those of the step's ``last`` one are
        averaged over ranks together with the rest.
        """

    def finish_backward(self) -> tuple[Tensor, Tensor]:
        """After the last backward pass. Whether this rank's own part of the gradient is finite, and whether the mean
        over ranks is, [] bool each; an engine that sees the latter only in :meth:`step` says yes.
        """

    def step(self) -> bool:
        """Update the backbone; false if that has shown that the step is to be skipped, on all ranks alike. Then
        :meth:`skip` is to follow.
        """

    def skip(self) -> bool:
        """Drop what this step has done to gradients and statistics; whether a loss scale has fallen by it."""

    def grad_norm(self) -> Tensor:
        """Norm of the gradient of the last step, unscaled and not clipped, []."""

    def evaluating(self) -> AbstractContextManager[nn.Module]:
        """Within it, a module in evaluation mode that each rank may call as often as it likes. A collective."""

    def counts(self) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors."""

    def load_counts(self, counts: dict[str, Any]) -> None: ...


@torch.no_grad()
def take_from_first(buffers: list[Tensor]) -> None:
    """Make statistics of the batch, which each rank has its own of, those of the first rank: a checkpoint has these,
    and DistributedDataParallel begins each step with them. A collective.
    """
    buffers = [buffer for buffer in buffers if buffer.is_floating_point()]  # batches are counted alike anyway
    if not buffers or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([buffer.flatten().float() for buffer in buffers])
    dist.broadcast(flat, src=0)
    parts = flat.split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])


class GradientWatch:
    """Looks at a rank's own gradients before they are averaged: afterwards nobody can tell whose was broken."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None

    def reset(self) -> None:
        self._largest = None

    def see(self, gradient: Tensor) -> None:
        largest = torch.linalg.vector_norm(gradient, math.inf)  # NaN if there is one
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def before(self, reduce: Callable[..., Any]) -> Callable[[Any, dist.GradBucket], Any]:
        """A communication hook for DDP that looks at a bucket and then does ``reduce``."""

        def hook(group: Any, bucket: dist.GradBucket) -> Any:
            self.see(bucket.buffer())
            return reduce(group, bucket)

        hook.__annotations__.clear()  # DDP compares them with types, and here they are strings
        return hook

    def is_finite(self) -> Tensor:
        """Whether all gradients seen since the reset are, [] bool."""
        assert self._largest is not None, "no gradient has been averaged in this step"
        return self._largest.isfinite()


def require_compiler(device_type: str) -> None:
    """Say so now, not in the first step."""
    name = os.environ.get("CXX") or "g++"
    if device_type == "cpu" and shutil.which(name) is None:
        raise MissingDependency(
            f"engine.compile needs a C++ compiler on a CPU, and {name} is not installed: apt-get install g++, or set "
            "engine.compile=false"
        )
