"""The backbone's side of a step: forward, backward, the gradient's norm, the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from partialfc.config import OptimConfig
from partialfc.train.ranks import Rank


class DdpEngine:
    """A backbone with an optimizer, replicated on all ranks; its gradients are averaged by DistributedDataParallel.

    Args:
        module: the backbone, on the rank's device.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, rank: Rank) -> None:
        self.module, self.optim = module, optim
        self._local_gradient = GradientWatch()
        self._wrapped: nn.Module = module
        if rank.world_size > 1:
            self._wrapped = ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
            ddp.register_comm_hook(None, self._local_gradient.before(default_hooks.allreduce_hook))
        self.optimizer: torch.optim.Optimizer
        if optim.name == "adamw":
            self.optimizer = torch.optim.AdamW(module.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
        else:
            self.optimizer = torch.optim.SGD(
                module.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
            )
        self._buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self._before = [torch.empty_like(buffer) for buffer in self._buffers]

    def begin_step(self, lr: float) -> None:
        """Before the first forward pass of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._local_gradient.reset()
        if self._buffers:  # statistics that the forward pass moves, but a skipped step must not
            torch._foreach_copy_(self._before, self._buffers)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [b, D] of images [b, C, H, W]."""
        return self._wrapped(images)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this micro-batch's gradients; those of the step's ``last`` one are averaged over ranks with the rest."""
        with self._gradients_stay_local(not last):
            loss.backward()

    def clip(self) -> Tensor:
        """Clip the gradient to the largest norm allowed; returns the norm before, []: the same on all ranks."""
        largest = math.inf if self.optim.clip is None else self.optim.clip
        return nn.utils.clip_grad_norm_(self.module.parameters(), largest)

    def gradient_is_finite(self, grad_norm: Tensor) -> Tensor:
        """Whether this rank's own part of the gradient is, [] bool; ``grad_norm`` is what :meth:`clip` gave."""
        return self._local_gradient.is_finite() if self._wrapped is not self.module else grad_norm.isfinite()

    def step(self) -> None:
        """Update the backbone."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def skip(self) -> None:
        """Drop what this step has done to gradients and statistics."""
        self.optimizer.zero_grad()
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)

    def _gradients_stay_local(self, local: bool) -> AbstractContextManager[None]:
        if local and isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync()
        return nullcontext()


class GradientWatch:
    """Looks at a rank's own gradients before they are averaged: afterwards nobody can tell whose was broken."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None

    def reset(self) -> None:
        self._largest = None

    def before(self, reduce: Callable[..., Any]) -> Callable[[Any, dist.GradBucket], Any]:
        """A communication hook for DDP that looks at a bucket and then does ``reduce``."""

        def hook(group: Any, bucket: dist.GradBucket) -> Any:
            largest = torch.linalg.vector_norm(bucket.buffer(), math.inf)  # NaN if there is one
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
            return reduce(group, bucket)

        hook.__annotations__.clear()  # DDP compares them with types, and here they are strings
        return hook

    def is_finite(self) -> Tensor:
        """Whether all gradients seen since the reset are, [] bool."""
        assert self._largest is not None, "no gradient has been averaged in this step"
        return self._largest.isfinite()
