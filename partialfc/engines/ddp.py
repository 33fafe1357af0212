"""The plain torch engine: DistributedDataParallel around the backbone, replicated on all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from partialfc.config import Config
from partialfc.data.order import local_share
from partialfc.engines.base import DTYPES, GradientWatch, broadcast_buffers, require_compiler, require_used
from partialfc.engines.batch_norm import FEWEST_IMAGES, BatchNormModes
from partialfc.engines.loss_scale import LossScale
from partialfc.engines.state import BackboneState, ReplicatedBackbone
from partialfc.models.eval_mode import eval_mode
from partialfc.runtime.process import ProcessContext


class DdpEngine:
    """A replicated backbone and its optimizer; DistributedDataParallel averages the gradients over the ranks.

    Args:
        module: the backbone, on the rank's device. Its weights stay float32; with ``bf16`` or ``fp16`` it computes
            under autocast, with ``fp16`` under dynamic loss scaling.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, config: Config, process: ProcessContext) -> None:
        precision = config.engine.precision
        self.module, self.optim, self.device = module, config.optim, process.device
        self.dtype = DTYPES[precision]
        self.loss_scale = LossScale() if precision == "fp16" else None
        self._batch_norm = BatchNormModes(module)
        self._local_gradient = GradientWatch()
        self._wrapped: nn.Module = module
        if process.world_size > 1:
            self._wrapped = ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
            # Each rank follows its own batch statistics. Those of rank 0 count, and are broadcast where they are used.
            # The argument of this name is deprecated since torch 2.13, and its successor is unknown before.
            ddp.broadcast_buffers = False
            ddp.register_comm_hook(None, self._local_gradient.before(default_hooks.allreduce_hook))
        if config.engine.compile:
            require_compiler(process.device.type)
            # In place, to keep names; with the random numbers of the uncompiled module.
            self._wrapped.compile(options={"fallback_random": True})
        self.optimizer = optimizer
        self.state: BackboneState = ReplicatedBackbone(module, self.optimizer)
        self._norm = torch.zeros((), device=process.device)
        self._gradients_checked = process.world_size == 1  # a single rank may have unused parameters
        share = local_share(config.data.global_batch_size, config.optim.accumulation, process.world_size)
        self._images_before_last_rank = (process.world_size - 1) * share
        self._buffers = list(module.buffers())
        self._buffers_before = [torch.empty_like(buffer) for buffer in self._buffers]

    def begin_step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._local_gradient.reset()
        if self._buffers:  # the forward pass changes statistics; a skipped step must not
            torch._foreach_copy_(self._buffers_before, self._buffers)

    def forward(self, images: Tensor, images_of_all_ranks: int, last: bool = True) -> Tensor:
        self._batch_norm.choose(len(images), images_of_all_ranks)
        # All ranks but the last are full. Running statistics that a rank normalises with are those of rank 0.
        if images_of_all_ranks - self._images_before_last_rank < FEWEST_IMAGES:
            broadcast_buffers(self._buffers)
        with nullcontext() if last else self._gradients_stay_local(), self._autocast():
            return self._wrapped(images).float()

    def backward(self, embeddings: Tensor, gradient: Tensor, last: bool) -> None:
        if self.loss_scale:
            gradient = gradient * self.loss_scale.value
        with nullcontext() if last else self._gradients_stay_local():
            embeddings.backward(gradient)

    @torch.no_grad()
    def finish_backward(self) -> tuple[Tensor, Tensor]:
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        if self.loss_scale and gradients:
            torch._foreach_mul_(gradients, 1.0 / self.loss_scale.value)
        if not self._gradients_checked:
            self._require_gradients()
        max_norm = math.inf if self.optim.clip is None else self.optim.clip
        self._norm = nn.utils.clip_grad_norm_(self.module.parameters(), max_norm)
        mean_is_finite = self._norm.isfinite()
        alone = self._wrapped is self.module
        return (mean_is_finite if alone else self._local_gradient.is_finite()), mean_is_finite

    def step(self) -> bool:
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.loss_scale:
            self.loss_scale.applied()
        return True

    @torch.no_grad()
    def skip(self) -> bool:
        self.optimizer.zero_grad()
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._buffers_before)
        return self.loss_scale is not None and self.loss_scale.skipped()

    def grad_norm(self) -> Tensor:
        return self._norm

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        broadcast_buffers(self._buffers)
        with eval_mode(self.module), self._autocast():
            yield self.module

    def counts(self) -> dict[str, Any]:
        return {"loss_scale": self.loss_scale.state()} if self.loss_scale else {}

    def load_counts(self, counts: dict[str, Any]) -> None:
        if self.loss_scale and "loss_scale" in counts:
            self.loss_scale.load(counts["loss_scale"])

    def _autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def _require_gradients(self) -> None:
        """Raise a ConfigError if a parameter has no gradient: DDP waits for all of them before it averages any."""
        require_used(self.module, lambda parameter: parameter.grad is not None)
        self._gradients_checked = True

    def _gradients_stay_local(self) -> AbstractContextManager[None]:
        return self._wrapped.no_sync() if isinstance(self._wrapped, DistributedDataParallel) else nullcontext()
