"""The backbone of a run."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from partialfc import models
from partialfc.config import Config
from partialfc.data.order import BatchOrder, local_share
from partialfc.engines.batch_norm import BatchNormModes
from partialfc.errors import ConfigError
from partialfc.models.eval_mode import eval_mode
from partialfc.runtime.process import ProcessContext

Switch = Literal[True, False, "auto"]


def build_backbone(config: Config, process: ProcessContext) -> nn.Module:
    """Build the module whose tensors are trained, saved and exported, on this rank's device.

    Raises:
        ConfigError: the backbone is unknown, or the device does not support a setting.
        MissingDependency: the backbone needs a package that is not installed.
    """
    model = config.model
    backbone = models.build(
        model.name,
        model.embedding_dim,
        config.data.channels,
        config.data.image_size,
        model.options,
        model.activation_checkpointing,
    )
    if uses_sync_batchnorm(config.engine.sync_batchnorm, process.device.type, process.world_size):
        backbone = with_sync_batchnorm(backbone)
    backbone = backbone.to(process.device)
    if _on(model.channels_last, process.device.type):
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    return backbone


def check_batches(config: Config, backbone: nn.Module, order: BatchOrder, process: ProcessContext) -> None:
    """Check that ``backbone`` can be trained with the batches that ranks and micro-batches leave of a global batch.

    Raises:
        ConfigError: they are too small for batch normalisation; or a rank has no image of some, for which the
            backbone's code fails.
    """
    parts, ranks = config.optim.accumulation, process.world_size
    share = local_share(order.batch_size, parts, ranks)
    BatchNormModes(backbone).require_statistics(share, local_share(order.batch_size, parts, 1))
    last = order.steps_per_epoch - 1
    sizes = [size for step in (0, last) for size in order.micro_batch_samples(order.first_step + step, parts)]
    if min(sizes) > share * (ranks - 1):
        return  # each rank has an image of each
    images = torch.empty(0, config.data.channels, *[config.data.image_size] * 2, device=process.device)
    try:
        with eval_mode(backbone), torch.no_grad():
            backbone(images)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"model.name: {config.model.name} fails for a batch without images ({reason}), which is what "
            f"rank {ranks - 1} has where {min(sizes)} images are left for {ranks} ranks. Write x.flatten(1) for "
            "x.view(len(x), -1) there, use fewer ranks, or set data.last_batch=drop"
        ) from error


def uses_sync_batchnorm(switch: Switch, device_type: str, world_size: int) -> bool:
    """Return True if batch normalisation uses the statistics of all ranks' images.

    Raises:
        ConfigError: ``switch`` is True on a CPU.
    """
    if switch is True and device_type != "cuda":
        raise ConfigError(
            f"engine.sync_batchnorm: torch has SyncBatchNorm on GPUs only, and this run is on {device_type}; set it to "
            "auto or false"
        )
    return world_size > 1 and _on(switch, device_type)


def with_sync_batchnorm(backbone: nn.Module) -> nn.Module:
    """Return ``backbone`` with every batch normalisation synchronised; its tensors and their names stay."""
    if any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    return backbone


def _on(switch: Switch, device_type: str) -> bool:
    return device_type == "cuda" if switch == "auto" else switch
