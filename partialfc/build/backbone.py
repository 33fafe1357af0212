"""The backbone of a run."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from partialfc import models
from partialfc.config import Config
from partialfc.errors import ConfigError
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
