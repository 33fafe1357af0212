"""The backbone's side of a step: forward, backward, the gradient's norm, the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from partialfc.config import Config
from partialfc.errors import ConfigError
from partialfc.train.backbone import build_backbone_optimizer, require_compiler
from partialfc.train.backbone_state import BackboneState, ReplicatedBackbone
from partialfc.train.loss_scale import LossScale
from partialfc.train.ranks import Rank

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


class DdpEngine:
    """A backbone with an optimizer, replicated on all ranks; its gradients are averaged by DistributedDataParallel.

    Args:
        module: the backbone, on the rank's device. Its weights stay float32; with ``bf16`` or ``fp16`` it computes
            under autocast.
        config: ``engine.precision`` fp16 comes with dynamic loss scaling; ``engine.compile`` compiles.
    """

    def __init__(self, module: nn.Module, config: Config, rank: Rank) -> None:
        precision = config.engine.precision
        self.module, self.optim, self.device = module, config.optim, rank.device
        self.dtype = DTYPES[precision]
        self.loss_scale = LossScale() if precision == "fp16" else None
        self._local_gradient = GradientWatch()
        self._wrapped: nn.Module = module
        if rank.world_size > 1:
            self._wrapped = ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
            ddp.register_comm_hook(None, self._local_gradient.before(default_hooks.allreduce_hook))
        if config.engine.compile:
            require_compiler(rank.device.type)
            # In place: names stay as they are. With the random numbers that are drawn without it.
            self._wrapped.compile(options={"fallback_random": True})
        self.optimizer = build_backbone_optimizer(config, module, rank.device)
        self.state: BackboneState = ReplicatedBackbone(module, self.optimizer)
        self._norm = torch.zeros((), device=rank.device)
        self._all_reached = rank.world_size == 1  # whether each parameter gets a gradient; alone it does not matter
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


def build_engine(module: nn.Module, config: Config, rank: Rank) -> Engine:
    """The engine that ``engine.name`` names, around a backbone that has its first weights. A collective.

    Raises:
        ConfigError: nothing of the backbone can be trained, or the engine does not take its settings.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(f"model.name: {config.model.name} has no parameter to train: all are frozen")
    if config.engine.name == "deepspeed":
        from partialfc.train.deepspeed_engine import DeepSpeedEngine  # takes long to import

        return DeepSpeedEngine(module, config, rank)
    return DdpEngine(module, config, rank)


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
