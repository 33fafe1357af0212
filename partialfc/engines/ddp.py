"""The backbone's side of a step: forward, backward, the gradient's norm, the update."""

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
from partialfc.engines.base import DTYPES, GradientWatch, require_compiler, take_from_first
from partialfc.engines.loss_scale import LossScale
from partialfc.engines.state import BackboneState, ReplicatedBackbone
from partialfc.errors import ConfigError
from partialfc.runtime.process import ProcessContext


class DdpEngine:
    """A backbone with an optimizer, replicated on all ranks; its gradients are averaged by DistributedDataParallel.

    Args:
        module: the backbone, on the rank's device. Its weights stay float32; with ``bf16`` or ``fp16`` it computes
            under autocast.
        config: ``engine.precision`` fp16 comes with dynamic loss scaling; ``engine.compile`` compiles.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, config: Config, process: ProcessContext) -> None:
        precision = config.engine.precision
        self.module, self.optim, self.device = module, config.optim, process.device
        self.dtype = DTYPES[precision]
        self.loss_scale = LossScale() if precision == "fp16" else None
        self._local_gradient = GradientWatch()
        self._wrapped: nn.Module = module
        if process.world_size > 1:
            self._wrapped = ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
            ddp.register_comm_hook(None, self._local_gradient.before(default_hooks.allreduce_hook))
        if config.engine.compile:
            require_compiler(process.device.type)
            # In place: names stay as they are. With the random numbers that are drawn without it.
            self._wrapped.compile(options={"fallback_random": True})
        self.optimizer = optimizer
        self.state: BackboneState = ReplicatedBackbone(module, self.optimizer)
        self._norm = torch.zeros((), device=process.device)
        self._all_reached = process.world_size == 1  # whether each parameter gets a gradient; alone it does not matter
        self._buffers = list(module.buffers())
        self._before = [torch.empty_like(buffer) for buffer in self._buffers]

    def begin_step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._local_gradient.reset()
        if self._buffers:  # statistics that the forward pass moves, but a skipped step must not
            torch._foreach_copy_(self._before, self._buffers)

    def forward(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self._wrapped(images).float()

    def backward(self, embeddings: Tensor, gradient: Tensor, last: bool) -> None:
        if self.loss_scale:
            gradient = gradient * self.loss_scale.value
        with self._gradients_stay_local(not last):
            embeddings.backward(gradient)

    @torch.no_grad()
    def finish_backward(self) -> tuple[Tensor, Tensor]:
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        if self.loss_scale and gradients:
            torch._foreach_mul_(gradients, 1.0 / self.loss_scale.value)
        if not self._all_reached:
            self._require_gradients()
        largest = math.inf if self.optim.clip is None else self.optim.clip
        self._norm = nn.utils.clip_grad_norm_(self.module.parameters(), largest)
        mean = self._norm.isfinite()
        return (mean if self._wrapped is self.module else self._local_gradient.is_finite()), mean

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
            torch._foreach_copy_(self._buffers, self._before)
        return self.loss_scale is not None and self.loss_scale.skipped()

    def grad_norm(self) -> Tensor:
        return self._norm

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        take_from_first(self._buffers)
        was_training = self.module.training
        self.module.eval()
        with self._autocast():
            yield self.module
        self.module.train(was_training)

    def counts(self) -> dict[str, Any]:
        return {"loss_scale": self.loss_scale.state()} if self.loss_scale else {}

    def load_counts(self, counts: dict[str, Any]) -> None:
        if self.loss_scale and "loss_scale" in counts:
            self.loss_scale.load(counts["loss_scale"])

    def _autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def _require_gradients(self) -> None:
        """DDP waits for the gradients of all parameters before it averages any."""
        named = self.module.named_parameters()
        idle = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
        if idle:
            some = ", ".join(idle[:8]) + (", …" if len(idle) > 8 else "")
            raise ConfigError(
                f"model.name: the forward pass does not use {len(idle)} trainable parameters, so that they have no "
                f"gradient to average over ranks: {some}. Remove them, or freeze them (requires_grad_(False))"
            )
        self._all_reached = True

    def _gradients_stay_local(self, local: bool) -> AbstractContextManager[None]:
        if local and isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync()
        return nullcontext()
